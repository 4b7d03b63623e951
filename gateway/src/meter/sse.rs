//! Server-sent events, as the WHATWG specifies them, read as they pass.
//!
//! Lines end in LF, CR or CRLF, anywhere in a chunk or between two. Bytes are forwarded as slices of the chunks they came
//! in. Only when OpenAI's usage chunk must be kept from the client are the bytes of an unfinished event held back, until
//! the event is complete or too large.

use bytes::Bytes;
use ledger::Operation;
use memchr::{memchr, memchr2, memmem};
use serde::de::IgnoredAny;

use super::events::{Reader, Seen};
use super::scan::is_closing;

/// Largest event that is read while events are held back; a larger one is released as it is.
pub const HELD_EVENT_BYTES_MAX: usize = 1024 * 1024;

/// Largest event that is read when nothing is held back; a larger one passes unread.
pub const EVENT_BYTES_MAX: usize = 16 * 1024 * 1024;

/// The reader of one stream.
#[derive(Debug)]
pub(super) struct Sse {
    /// Whether events of nothing but usage are kept from the client.
    hide: bool,
    event_bytes_max: usize,
    /// Whether the first line, which may start with a byte order mark, is still to come.
    first_line: bool,
    /// Whether the last byte was a CR, so that a LF now would belong to it.
    after_cr: bool,
    /// Whether the last whole event was kept from the client.
    dropped: bool,
    /// The beginning of a line whose end has not come.
    line: Vec<u8>,
    /// The data lines of the current event, joined by LF.
    data: Vec<u8>,
    event: Event,
    /// Pieces of the current event, from earlier chunks, that the client has not got.
    held: Vec<Bytes>,
}

/// What is known of the current event.
#[derive(Debug, Default)]
struct Event {
    /// Bytes so far, line ends included.
    bytes: usize,
    has_fields: bool,
    has_data: bool,
    /// Its name is one that closes a stream.
    closing: bool,
    oversized: bool,
    /// The current line has had bytes that were not kept.
    line_given_up: bool,
    /// Read before its blank line came, because it closes the stream.
    spent: bool,
}

/// What became of one chunk.
#[derive(Debug, Default)]
pub(super) struct Passed {
    pub release: Vec<Bytes>,
    pub tokens: bool,
    pub ends: bool,
}

/// What a line end means for the bytes before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Border {
    /// The event goes on.
    None,
    /// What came so far may go.
    Release,
    /// The event that ends here is not for the client.
    Drop,
}

impl Sse {
    pub fn new(hide: bool) -> Sse {
        Sse {
            hide,
            event_bytes_max: if hide { HELD_EVENT_BYTES_MAX } else { EVENT_BYTES_MAX },
            first_line: true,
            after_cr: false,
            dropped: false,
            line: Vec::new(),
            data: Vec::new(),
            event: Event::default(),
            held: Vec::new(),
        }
    }

    /// Reads a chunk and says which bytes may go on.
    pub fn feed(&mut self, chunk: &Bytes, reader: &mut Reader) -> Passed {
        let mut passed = Passed::default();
        if chunk.is_empty() {
            return passed;
        }
        // Bytes before `from` are dealt with, bytes before `decided` are known to go on.
        let (mut from, mut decided, mut at) = (0, 0, 0);
        if std::mem::take(&mut self.after_cr) && chunk.first() == Some(&b'\n') {
            at = 1;
            if self.event.bytes > 0 {
                self.event.bytes += 1;
            } else {
                // It ends the blank line of an event that is gone, and goes the same way.
                (from, decided) = (usize::from(self.dropped), 1);
            }
        }
        while let Some(length) = memchr2(b'\n', b'\r', chunk.get(at..).unwrap_or_default()) {
            let next = self.past_line_end(chunk, at + length);
            self.event.bytes += next - at;
            let (seen, border) = self.end_line(chunk.get(at..at + length).unwrap_or_default(), reader);
            passed.tokens |= seen.tokens;
            passed.ends |= seen.terminal;
            if border == Border::Release {
                decided = next;
            } else if border == Border::Drop {
                if decided > from {
                    self.forward(chunk, from, decided, &mut passed.release);
                }
                self.held.clear();
                (from, decided) = (next, next);
            }
            at = next;
        }
        self.keep_line(chunk.get(at..).unwrap_or_default());
        if self.hide && !self.event.oversized {
            if decided > from {
                self.forward(chunk, from, decided, &mut passed.release);
            }
            if chunk.len() > decided {
                self.held.push(chunk.slice(decided..));
            }
        } else {
            self.forward(chunk, from, chunk.len(), &mut passed.release);
        }
        passed
    }

    /// The end of the stream: what is still held, read for what it is worth. Returns the bytes that must still go, and
    /// whether there was text in them.
    pub fn finish(&mut self, reader: &mut Reader) -> (Vec<Bytes>, bool) {
        let (seen, _) = if self.line.is_empty() { (Seen::default(), Border::None) } else { self.end_line(&[], reader) };
        let mut last = Seen::default();
        if self.event.has_data && !self.event.spent && !self.event.oversized {
            if is_json(&self.data) {
                last = reader.event(&self.data);
            } else {
                last.tokens = reader.look(&self.data).tokens;
                reader.note(|| "the stream ended in the middle of an event".to_owned());
            }
            self.event.spent = true;
        }
        let held = std::mem::take(&mut self.held);
        (if self.hide && last.only_usage { Vec::new() } else { held }, seen.tokens || last.tokens)
    }

    fn forward(&mut self, chunk: &Bytes, from: usize, to: usize, release: &mut Vec<Bytes>) {
        release.append(&mut self.held);
        if from < to {
            release.push(chunk.slice(from..to));
        }
    }

    /// The start of the next line after the line end at `line_end`.
    fn past_line_end(&mut self, chunk: &Bytes, line_end: usize) -> usize {
        let carriage_return = chunk.get(line_end) == Some(&b'\r');
        match chunk.get(line_end + 1) {
            Some(b'\n') if carriage_return => line_end + 2,
            None => {
                self.after_cr = carriage_return;
                line_end + 1
            }
            Some(_) => line_end + 1,
        }
    }

    /// Keeps the beginning of a line for the next chunk.
    fn keep_line(&mut self, part: &[u8]) {
        self.event.bytes += part.len();
        if self.event.bytes > self.event_bytes_max {
            self.event.line_given_up |= !part.is_empty() || !self.line.is_empty();
            self.give_up();
        } else {
            self.line.extend_from_slice(part);
        }
    }

    fn give_up(&mut self) {
        self.event.oversized = true;
        self.line = Vec::new();
        self.data = Vec::new();
    }

    fn end_line(&mut self, rest: &[u8], reader: &mut Reader) -> (Seen, Border) {
        if self.event.bytes > self.event_bytes_max {
            // Of an event that is too large only its end matters: the next blank line.
            let given_up = std::mem::take(&mut self.event.line_given_up);
            let blank = !given_up && rest.is_empty() && self.line.is_empty();
            self.give_up();
            return if blank { self.end_event(reader) } else { (Seen::default(), Border::None) };
        }
        if self.line.is_empty() {
            return self.read_line(rest, reader);
        }
        let mut line = std::mem::take(&mut self.line);
        line.extend_from_slice(rest);
        let outcome = self.read_line(&line, reader);
        line.clear();
        self.line = line;
        outcome
    }

    fn read_line(&mut self, line: &[u8], reader: &mut Reader) -> (Seen, Border) {
        let first = std::mem::take(&mut self.first_line);
        let line = if first { line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line) } else { line };
        if line.is_empty() {
            return self.end_event(reader);
        }
        let (name, value) = line.split_at(memchr(b':', line).unwrap_or(line.len()));
        let value = value.strip_prefix(b":").unwrap_or(value);
        let value = value.strip_prefix(b" ").unwrap_or(value);
        match name {
            b"data" => (self.data_line(value, reader), Border::None),
            b"event" | b"id" | b"retry" => {
                self.event.has_fields = true;
                self.event.closing |= name == b"event" && is_closing(value);
                (Seen::default(), Border::None)
            }
            // A comment or a field without meaning stands for itself.
            _ if !self.event.has_fields && !self.event.has_data => {
                self.event = Event::default();
                self.dropped = false;
                (Seen::default(), Border::Release)
            }
            _ => (Seen::default(), Border::None),
        }
    }

    fn data_line(&mut self, value: &[u8], reader: &mut Reader) -> Seen {
        let first = !self.event.has_data;
        self.event.has_data = true;
        if first
            && (self.event.closing || closes(value, reader.operation()))
            && (value.trim_ascii() == b"[DONE]" || is_json(value))
        {
            // A client may act on this line alone, so the record must be made before it goes.
            self.event.spent = true;
            let seen = reader.event(value);
            self.hide &= !seen.terminal;
            return seen;
        }
        if !first {
            self.data.push(b'\n');
        }
        self.data.extend_from_slice(value);
        Seen::default()
    }

    fn end_event(&mut self, reader: &mut Reader) -> (Seen, Border) {
        let event = std::mem::take(&mut self.event);
        let mut seen = Seen::default();
        if event.oversized {
            reader.note(|| format!("an event of more than {} bytes was not read", self.event_bytes_max));
        } else if event.has_data && !event.spent {
            seen = reader.event(&self.data);
        }
        self.data.clear();
        self.dropped = self.hide && seen.only_usage && !seen.terminal;
        (seen, if self.dropped { Border::Drop } else { Border::Release })
    }
}

/// Whether a line of data may be the last of its stream. A false alarm costs a parse and nothing else.
fn closes(value: &[u8], operation: Operation) -> bool {
    let has = |word: &[u8]| memmem::find(value, word).is_some();
    match operation {
        Operation::Messages => has(b"\"message_stop\""),
        Operation::Responses => {
            has(b"\"response.completed\"") || has(b"\"response.failed\"") || has(b"\"response.incomplete\"")
        }
        _ => value.trim_ascii() == b"[DONE]",
    }
}

fn is_json(data: &[u8]) -> bool {
    serde_json::from_slice::<IgnoredAny>(data).is_ok()
}
