//! An upstream that does what a script says, byte by byte, faults included.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// One thing an upstream does with a connection.
#[derive(Debug, Clone)]
pub enum Step {
    Write(Vec<u8>),
    Wait(u64),
    /// Closes the connection in good order.
    Close,
    /// Closes it with a reset.
    Reset,
    /// Says nothing more until the other side goes.
    Stall,
}

pub type Script = Vec<Step>;

/// A request as it arrived.
#[derive(Debug, Clone)]
pub struct Received {
    /// In lower case.
    pub head: String,
    pub body: String,
}

/// The running upstream. Answers requests with its scripts in order, the last one for ever.
#[derive(Clone)]
pub struct Upstream {
    pub address: SocketAddr,
    scripts: Arc<Mutex<VecDeque<Script>>>,
    received: Arc<Mutex<Vec<Received>>>,
    hung_up: Arc<Mutex<usize>>,
}

impl Upstream {
    pub async fn start(scripts: impl IntoIterator<Item = Script>) -> Upstream {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let upstream = Upstream {
            address: listener.local_addr().unwrap(),
            scripts: Arc::new(Mutex::new(scripts.into_iter().collect())),
            received: Arc::default(),
            hung_up: Arc::default(),
        };
        let accepting = upstream.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(accepting.clone().connection(stream));
            }
        });
        upstream
    }

    pub fn received(&self) -> Vec<Received> {
        self.received.lock().unwrap().clone()
    }

    /// Connections that the gateway closed while a script still had something to say.
    pub fn hung_up(&self) -> usize {
        *self.hung_up.lock().unwrap()
    }

    fn next_script(&self) -> Script {
        let mut scripts = self.scripts.lock().unwrap();
        if scripts.len() > 1 { scripts.pop_front().unwrap() } else { scripts.front().cloned().unwrap_or_default() }
    }

    async fn connection(self, mut stream: TcpStream) {
        stream.set_nodelay(true).unwrap();
        while let Some(received) = read_request(&mut stream).await {
            self.received.lock().unwrap().push(received);
            for step in self.next_script() {
                let alive = match step {
                    Step::Write(bytes) => stream.write_all(&bytes).await.is_ok(),
                    Step::Wait(ms) => self.stays(&mut stream, ms).await,
                    Step::Stall => self.stays(&mut stream, 60_000).await,
                    Step::Close => false,
                    Step::Reset => {
                        stream.set_zero_linger().unwrap();
                        false
                    }
                };
                if !alive {
                    return;
                }
            }
        }
    }

    /// Waits, unless the gateway hangs up meanwhile.
    async fn stays(&self, stream: &mut TcpStream, ms: u64) -> bool {
        let mut byte = [0];
        let gone = tokio::time::timeout(Duration::from_millis(ms), stream.read(&mut byte)).await;
        if gone.is_ok() {
            *self.hung_up.lock().unwrap() += 1;
        }
        gone.is_err()
    }
}

async fn read_request(stream: &mut TcpStream) -> Option<Received> {
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break end + 4;
        }
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok()).unwrap_or(0);
    while bytes.len() < end + length {
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
    Some(Received { head, body: String::from_utf8_lossy(&bytes[end..]).into_owned() })
}

pub fn write(text: &str) -> Step {
    Step::Write(text.as_bytes().to_vec())
}

/// A whole JSON answer with its length.
pub fn json(status: u16, body: &str) -> Script {
    vec![write(&format!(
        "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    ))]
}

/// The head of an event stream.
pub fn sse_head() -> Step {
    write("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n")
}

/// One HTTP chunk.
pub fn chunk(text: &str) -> Step {
    write(&format!("{:x}\r\n{text}\r\n", text.len()))
}

pub fn last_chunk() -> Step {
    write("0\r\n\r\n")
}

/// An OpenAI chat chunk with some text.
pub fn delta(text: &str) -> String {
    format!(
        "data: {{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"model\":\"gpt-4o-2024-08-06\",\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{text}\"}},\"finish_reason\":null}}]}}\n\n"
    )
}

/// OpenAI's usage chunk.
pub fn usage_chunk(input: u64, output: u64) -> String {
    let total = input + output;
    format!(
        "data: {{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"model\":\"gpt-4o-2024-08-06\",\"choices\":[],\"usage\":{{\"prompt_tokens\":{input},\"completion_tokens\":{output},\"total_tokens\":{total}}}}}\n\n"
    )
}

pub const DONE: &str = "data: [DONE]\n\n";

/// A good streamed chat answer with pauses of `ms` between its chunks.
pub fn chat_stream(deltas: &[&str], ms: u64, input: u64, output: u64) -> Script {
    let mut script = vec![sse_head()];
    for text in deltas {
        script.push(chunk(&delta(text)));
        script.push(Step::Wait(ms));
    }
    script.extend([chunk(&usage_chunk(input, output)), chunk(DONE), last_chunk()]);
    script
}

/// A good chat answer.
pub fn chat(input: u64, output: u64) -> Script {
    json(200, &chat_body("gpt-4o-2024-08-06", input, output))
}

pub fn chat_body(model: &str, input: u64, output: u64) -> String {
    let total = input + output;
    format!(
        "{{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion\",\"model\":\"{model}\",\"choices\":[{{\"index\":0,\"message\":{{\"role\":\"assistant\",\"content\":\"Hello there\"}},\"finish_reason\":\"stop\"}}],\"usage\":{{\"prompt_tokens\":{input},\"completion_tokens\":{output},\"total_tokens\":{total}}}}}"
    )
}
