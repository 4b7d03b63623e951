//! A raw HTTP/1.1 client on a blocking socket: it costs less than a client library, and it knows exactly when an answer has ended.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::clock::now;

/// Longest response head that is accepted, in bytes.
const HEAD_BYTES_MAX: usize = 64 * 1024;

/// One keep-alive connection. Reconnects by itself when the last answer left it unusable.
#[derive(Debug)]
pub struct Connection {
    address: SocketAddr,
    timeout: Duration,
    stream: Option<TcpStream>,
    buffer: Vec<u8>,
}

/// An answer that was read to its end, as HTTP defines the end.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The head as received.
    pub head: Vec<u8>,
    /// The body with its chunk framing removed; empty unless it was asked for.
    pub body: Vec<u8>,
    /// Bytes of the body.
    pub body_bytes: usize,
    /// When the first byte of the body was here; the end of the head for an empty body.
    pub first_byte: Instant,
}

/// Why an answer could not be read to its end, and what was known by then.
#[derive(Debug)]
pub struct Broken {
    /// What the socket said.
    pub error: io::Error,
    /// The head, if all of it had arrived.
    pub head: Option<Vec<u8>>,
}

/// How much of an answer to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Read to the end and forget the body.
    Nothing,
    /// Read to the end and return the body.
    Body,
    /// Close the connection once this many bytes of the body have arrived.
    AbortAfter(usize),
}

impl Connection {
    /// A connection to `address` that is opened by the first request; reads and writes give up after `timeout`.
    #[must_use]
    pub fn new(address: SocketAddr, timeout: Duration) -> Connection {
        Connection { address, timeout, stream: None, buffer: Vec::with_capacity(64 * 1024) }
    }

    /// Sends a whole request and reads the answer to its end.
    ///
    /// # Errors
    /// When the connection cannot be opened or breaks, times out, or the answer is no HTTP.
    pub fn call(&mut self, request: &[u8], keep: Keep) -> Result<Answer, Broken> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => self.open().map_err(|error| Broken { error, head: None })?,
        };
        self.buffer.clear();
        stream.write_all(request).map_err(|error| Broken { error, head: None })?;
        let head = self.read_head(&mut stream).map_err(|error| Broken { error, head: None })?;
        match self.read_body(&mut stream, &head, keep) {
            Ok((answer, reusable)) => {
                self.stream = reusable.then_some(stream);
                Ok(answer)
            }
            Err(error) => Err(Broken { error, head: Some(head) }),
        }
    }

    fn open(&self) -> io::Result<TcpStream> {
        let stream = TcpStream::connect_timeout(&self.address, self.timeout)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(self.timeout))?;
        stream.set_write_timeout(Some(self.timeout))?;
        Ok(stream)
    }

    fn read_head(&mut self, stream: &mut TcpStream) -> io::Result<Vec<u8>> {
        loop {
            if let Some(at) = memchr::memmem::find(&self.buffer, b"\r\n\r\n") {
                return Ok(self.buffer.drain(..at + 4).collect());
            }
            if self.buffer.len() > HEAD_BYTES_MAX {
                return Err(invalid("the head of the answer is too long"));
            }
            self.more(stream)?;
        }
    }

    fn read_body(&mut self, stream: &mut TcpStream, head: &[u8], keep: Keep) -> io::Result<(Answer, bool)> {
        let status = status(head).ok_or_else(|| invalid("no HTTP status"))?;
        let close = header(head, "connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
        let chunked = header(head, "transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case("chunked"));
        let length = header(head, "content-length").and_then(|value| value.parse::<usize>().ok());
        let mut sink = Sink { keep, body: Vec::new(), bytes: 0, first_byte: None };
        match (chunked, length) {
            (true, _) => self.read_chunks(stream, &mut sink)?,
            (false, Some(length)) => self.read_exactly(stream, length, &mut sink)?,
            (false, None) => return Err(invalid("the answer states no length, so its end cannot be told from a cut")),
        }
        let first_byte = sink.first_byte.unwrap_or_else(now);
        let answer = Answer { status, head: head.to_vec(), body: sink.body, body_bytes: sink.bytes, first_byte };
        Ok((answer, !close))
    }

    fn read_exactly(&mut self, stream: &mut TcpStream, mut left: usize, sink: &mut Sink) -> io::Result<()> {
        while left > 0 {
            if self.buffer.is_empty() {
                self.more(stream)?;
            }
            let take = left.min(self.buffer.len());
            sink.push(&self.buffer[..take])?;
            self.buffer.drain(..take);
            left -= take;
        }
        Ok(())
    }

    fn read_chunks(&mut self, stream: &mut TcpStream, sink: &mut Sink) -> io::Result<()> {
        loop {
            let line = self.read_line(stream)?;
            let digits = line.split(|&byte| byte == b';').next().unwrap_or_default();
            let size = std::str::from_utf8(digits)
                .ok()
                .and_then(|digits| usize::from_str_radix(digits.trim(), 16).ok())
                .ok_or_else(|| invalid("a chunk without a size"))?;
            if size == 0 {
                while !self.read_line(stream)?.is_empty() {}
                return Ok(());
            }
            self.read_exactly(stream, size, sink)?;
            if !self.read_line(stream)?.is_empty() {
                return Err(invalid("a chunk longer than its size"));
            }
        }
    }

    fn read_line(&mut self, stream: &mut TcpStream) -> io::Result<Vec<u8>> {
        loop {
            if let Some(at) = memchr::memmem::find(&self.buffer, b"\r\n") {
                let line = self.buffer[..at].to_vec();
                self.buffer.drain(..at + 2);
                return Ok(line);
            }
            if self.buffer.len() > HEAD_BYTES_MAX {
                return Err(invalid("a line without an end"));
            }
            self.more(stream)?;
        }
    }

    fn more(&mut self, stream: &mut TcpStream) -> io::Result<()> {
        let mut bytes = [0_u8; 16 * 1024];
        match stream.read(&mut bytes)? {
            0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the connection was closed in mid-answer")),
            count => {
                self.buffer.extend_from_slice(&bytes[..count]);
                Ok(())
            }
        }
    }
}

struct Sink {
    keep: Keep,
    body: Vec<u8>,
    bytes: usize,
    first_byte: Option<Instant>,
}

impl Sink {
    fn push(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.first_byte.get_or_insert_with(now);
        self.bytes += bytes.len();
        match self.keep {
            Keep::Nothing => Ok(()),
            Keep::Body => {
                self.body.extend_from_slice(bytes);
                Ok(())
            }
            Keep::AbortAfter(limit) if self.bytes < limit => Ok(()),
            Keep::AbortAfter(_) => Err(io::Error::new(io::ErrorKind::ConnectionAborted, "closed on purpose")),
        }
    }
}

/// The value of a header in a raw head.
#[must_use]
pub fn header<'a>(head: &'a [u8], name: &str) -> Option<&'a str> {
    std::str::from_utf8(head).ok()?.split("\r\n").skip(1).find_map(|line| {
        let (found, value) = line.split_once(':')?;
        found.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

/// A whole POST request with a JSON body; `headers` are further lines, each ending in CRLF.
#[must_use]
pub fn post(path: &str, host: SocketAddr, headers: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n{headers}content-length: {length}\r\n\r\n{body}")
        .into_bytes()
}

/// A GET request; `headers` are further lines, each ending in CRLF.
#[must_use]
pub fn get(path: &str, host: SocketAddr, headers: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nhost: {host}\r\n{headers}\r\n").into_bytes()
}

fn status(head: &[u8]) -> Option<u16> {
    std::str::from_utf8(head.get(9..12)?).ok()?.parse().ok()
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn answer_with(bytes: &'static [u8], keep: Keep) -> Result<Answer, Broken> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            assert!(stream.read(&mut request).unwrap() > 0);
            // Byte by byte, so that every boundary is met.
            for byte in bytes {
                if stream.write_all(&[*byte]).is_err() {
                    return;
                }
            }
        });
        let answer = Connection::new(address, Duration::from_secs(5)).call(&get("/", address, ""), keep);
        server.join().unwrap();
        answer
    }

    #[test]
    fn an_answer_ends_where_http_says_so() {
        let fixed = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-Id: a\r\n\r\nhello";
        let chunked =
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nhe\r\n3\r\nllo\r\n0\r\nx-cost: 1\r\n\r\n";
        for bytes in [fixed.as_slice(), chunked.as_slice()] {
            let answer = answer_with(bytes, Keep::Body).unwrap();
            assert_eq!((answer.status, answer.body.as_slice(), answer.body_bytes), (200, b"hello".as_slice(), 5));
        }
        assert_eq!(header(fixed, "x-id"), Some("a"));
    }

    #[test]
    fn a_cut_answer_is_never_taken_for_a_whole_one() {
        let whole = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
        for cut in 1..whole.len() {
            let broken = answer_with(&whole[..cut], Keep::Body).unwrap_err();
            assert_eq!(broken.error.kind(), io::ErrorKind::UnexpectedEof, "cut at {cut}");
        }
        assert!(answer_with(b"HTTP/1.1 200 OK\r\n\r\nhello", Keep::Body).is_err(), "no length, so no end");
    }

    #[test]
    fn an_abort_closes_after_the_bytes_asked_for() {
        let broken =
            answer_with(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", Keep::AbortAfter(3)).unwrap_err();
        assert_eq!(broken.error.kind(), io::ErrorKind::ConnectionAborted);
        assert!(broken.head.is_some());
    }
}
