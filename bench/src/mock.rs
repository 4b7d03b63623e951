//! A provider that answers at once: OpenAI chat completions as JSON or as a stream, with usage that the request itself dictates.
//!
//! `max_tokens` is the number of output tokens and of chunks, `seed` the number of input tokens, and `"user":"pace:A:B"` waits A
//! microseconds before the answer and B between chunks. So a client knows which numbers must be in the ledger afterwards.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::time::{Instant, Sleep, sleep_until};

/// Where the mock says how many requests it was given: a number as text.
pub const COUNT_PATH: &str = "/mock/count";

const TOKENS_DEFAULT: u64 = 64;
/// A few hundred bytes of answer, as in a short chat.
const SENTENCE: &str = "The ledger adds up to the last unit, and every token has an owner. ";

/// Serves until the process ends.
///
/// # Errors
/// When the listener breaks.
pub async fn serve(listener: TcpListener) -> std::io::Result<()> {
    let count = Arc::new(AtomicU64::new(0));
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let count = Arc::clone(&count);
        tokio::spawn(async move {
            let service = service_fn(move |request| answer(request, Arc::clone(&count)));
            // A client that goes away is the client's business.
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

async fn answer(request: Request<Incoming>, count: Arc<AtomicU64>) -> Result<Response<Script>, Infallible> {
    if request.method() == Method::GET {
        let text = match request.uri().path() {
            COUNT_PATH => count.load(Ordering::Relaxed).to_string(),
            _ => r#"{"object":"list","data":[{"id":"gpt-4o","object":"model","owned_by":"mock"}]}"#.to_owned(),
        };
        return Ok(whole(text, Duration::ZERO));
    }
    let number = count.fetch_add(1, Ordering::Relaxed);
    // A request that breaks off has nobody to answer to.
    let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let asked = Asked::read(&body);
    Ok(if asked.stream { streamed(number, &asked) } else { whole(completion(number, &asked), asked.first) })
}

struct Asked {
    stream: bool,
    usage_chunk: bool,
    input_tokens: u64,
    output_tokens: u64,
    first: Duration,
    gap: Duration,
}

impl Asked {
    /// Looks for the few fields by their bytes: parsing JSON here would take time from the proxy under test.
    fn read(body: &[u8]) -> Asked {
        let (first, gap) = pace(body).unwrap_or_default();
        Asked {
            stream: flag(body, b"\"stream\":"),
            usage_chunk: flag(body, b"\"include_usage\":"),
            input_tokens: number(body, b"\"seed\":").unwrap_or(12),
            output_tokens: number(body, b"\"max_tokens\":").unwrap_or(TOKENS_DEFAULT),
            first: Duration::from_micros(first),
            gap: Duration::from_micros(gap),
        }
    }
}

fn after<'a>(body: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let at = memchr::memmem::find(body, name)? + name.len();
    Some(body[at..].trim_ascii_start())
}

fn flag(body: &[u8], name: &[u8]) -> bool {
    after(body, name).is_some_and(|value| value.starts_with(b"true"))
}

fn number(body: &[u8], name: &[u8]) -> Option<u64> {
    digits(after(body, name)?)
}

fn digits(text: &[u8]) -> Option<u64> {
    let end = text.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(text.len());
    std::str::from_utf8(&text[..end]).ok()?.parse().ok()
}

fn pace(body: &[u8]) -> Option<(u64, u64)> {
    let text = after(body, b"\"pace:")?;
    let colon = text.iter().position(|&byte| byte == b':')?;
    Some((digits(text)?, digits(&text[colon + 1..])?))
}

fn usage(asked: &Asked) -> String {
    let Asked { input_tokens, output_tokens, .. } = asked;
    format!(
        r#""usage":{{"prompt_tokens":{input_tokens},"completion_tokens":{output_tokens},"total_tokens":{},"prompt_tokens_details":{{"cached_tokens":0}},"completion_tokens_details":{{"reasoning_tokens":0}}}}"#,
        input_tokens + output_tokens
    )
}

fn completion(number: u64, asked: &Asked) -> String {
    format!(
        r#"{{"id":"chatcmpl-{number}","object":"chat.completion","created":1700000000,"model":"gpt-4o-2024-08-06","choices":[{{"index":0,"message":{{"role":"assistant","content":"{}"}},"logprobs":null,"finish_reason":"stop"}}],{},"service_tier":"default"}}"#,
        SENTENCE.repeat(5),
        usage(asked)
    )
}

fn whole(text: String, first: Duration) -> Response<Script> {
    let length = text.len();
    let mut response = Response::new(Script::new(vec![Bytes::from(text)], first, Duration::ZERO, Some(length)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn streamed(number: u64, asked: &Asked) -> Response<Script> {
    let chunk = |rest: &str| {
        Bytes::from(format!(
            "data: {{\"id\":\"chatcmpl-{number}\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,\"model\":\"gpt-4o-2024-08-06\",{rest}}}\n\n"
        ))
    };
    let token = chunk(r#""choices":[{"index":0,"delta":{"content":" token"},"logprobs":null,"finish_reason":null}]"#);
    let mut chunks = vec![chunk(
        r#""choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]"#,
    )];
    chunks.extend((0..asked.output_tokens).map(|_| token.clone()));
    chunks.push(chunk(r#""choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}]"#));
    if asked.usage_chunk {
        chunks.push(chunk(&format!(r#""choices":[],{}"#, usage(asked))));
    }
    chunks.push(Bytes::from_static(b"data: [DONE]\n\n"));
    let mut response = Response::new(Script::new(chunks, asked.first, asked.gap, None));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    response
}

/// A body of prepared chunks, each written on its own, as a model that emits one token after another does.
struct Script {
    chunks: std::vec::IntoIter<Bytes>,
    gap: Duration,
    length: Option<usize>,
    wait: Option<Pin<Box<Sleep>>>,
    yielded: bool,
}

impl Script {
    fn new(chunks: Vec<Bytes>, first: Duration, gap: Duration, length: Option<usize>) -> Script {
        let wait = (!first.is_zero()).then(|| Box::pin(sleep_until(Instant::now() + first)));
        Script { chunks: chunks.into_iter(), gap, length, wait, yielded: true }
    }
}

impl Body for Script {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if let Some(wait) = &mut self.wait {
            std::task::ready!(wait.as_mut().poll(cx));
            self.wait = None;
        } else if !std::mem::replace(&mut self.yielded, true) {
            // One turn of the event loop between chunks makes the server write each of them at once.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let Some(chunk) = self.chunks.next() else { return Poll::Ready(None) };
        if self.chunks.len() > 0 {
            self.yielded = false;
            self.wait = (!self.gap.is_zero()).then(|| Box::pin(sleep_until(Instant::now() + self.gap)));
        }
        Poll::Ready(Some(Ok(Frame::data(chunk))))
    }

    fn is_end_stream(&self) -> bool {
        self.chunks.len() == 0
    }

    fn size_hint(&self) -> SizeHint {
        self.length
            .map_or_else(SizeHint::default, |length| SizeHint::with_exact(u64::try_from(length).unwrap_or(u64::MAX)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_request_dictates_the_answer() {
        let asked = Asked::read(br#"{"stream": true,"seed": 17,"max_tokens":3,"user":"pace:500:20","stream_options":{"include_usage":true}}"#);
        assert!(asked.stream && asked.usage_chunk);
        assert_eq!((asked.input_tokens, asked.output_tokens), (17, 3));
        assert_eq!((asked.first.as_micros(), asked.gap.as_micros()), (500, 20));
        assert!(usage(&asked).contains(r#""total_tokens":20"#));
        assert_eq!(streamed(0, &asked).body().chunks.len(), 1 + 3 + 1 + 1 + 1);
    }
}
