//! The demo's clients: work through the planned tasks over real HTTP and remember what was seen, so that it can be
//! compared with the ledger afterwards.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Serialize;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::answer::{Answer, Piece, Reader};
use super::workload::{CONSUMERS, Call, Surface, Task};

/// How the clients behave.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Tasks that were planned for later than this are left out, seconds.
    pub start_within_s: f64,
    /// How long running tasks may go on after that, seconds. Then their clients hang up.
    pub drain_s: f64,
    /// How often a client tries again when it is told to come back later.
    pub retries: u32,
}

impl Default for Options {
    fn default() -> Options {
        Options { start_within_s: 15.0, drain_s: 5.0, retries: 2 }
    }
}

/// How far the traffic has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Progress {
    /// Tasks that have begun.
    pub tasks_started: u64,
    /// Tasks that have ended, well or not.
    pub tasks_done: u64,
    /// Requests sent, retries included.
    pub calls_sent: u64,
    /// Requests whose answer was seen to its end.
    pub calls_finished: u64,
    /// Requests whose client hung up.
    pub calls_aborted: u64,
    /// Requests that got an error, or an answer that broke off.
    pub calls_failed: u64,
    /// Requests that were tries after the first.
    pub calls_retried: u64,
    /// Input tokens by the usages seen.
    pub input_tokens: u64,
    /// Output tokens by the usages seen.
    pub output_tokens: u64,
}

/// How a call ended, as its client saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SeenEnd {
    /// The client saw the end of its answer. The ledger must know the request.
    Finished,
    /// The client hung up.
    Aborted,
    /// An error with this status.
    Refused(u16),
    /// No answer, or one that broke off.
    Broken,
}

/// The usage that an answer reported.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct SeenUsage {
    /// Tokens that went in, cached ones included.
    pub input_tokens: u64,
    /// Tokens that came out.
    pub output_tokens: u64,
}

/// One call as its client saw it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SeenCall {
    /// The gateway's id of the request, when it gave one.
    pub request_id: Option<String>,
    /// Who called.
    pub consumer: &'static str,
    /// The model asked.
    pub model: &'static str,
    /// The task it was part of.
    pub task: String,
    /// How it ended.
    pub end: SeenEnd,
    /// Its usage, when the answer said so.
    pub usage: Option<SeenUsage>,
}

/// Everything the clients saw.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Seen {
    /// Every call, in the order they ended.
    pub calls: Vec<SeenCall>,
    /// Their sums.
    pub progress: Progress,
}

/// Called after every call with the sums so far.
pub type OnProgress = Arc<dyn Fn(&Progress) + Send + Sync>;

/// Sends the tasks to `base_url` (without `/v1`), each with its consumer's key, and returns when all have ended or the
/// time is up.
///
/// # Errors
/// When `base_url` cannot be used or a consumer has no key.
pub async fn run(
    base_url: &str,
    keys: &BTreeMap<&'static str, String>,
    tasks: Vec<Task>,
    options: Options,
    on_progress: OnProgress,
) -> anyhow::Result<Seen> {
    let _checked: http::Uri = base_url.parse().context("the base URL of the traffic")?;
    let shared = Arc::new(Clients {
        base_url: base_url.trim_end_matches('/').to_owned(),
        http: Client::builder(TokioExecutor::new()).build_http(),
        seen: Mutex::default(),
        spans: AtomicU64::new(1),
        retries: options.retries,
        on_progress,
    });
    let mut running = JoinSet::new();
    for task in tasks {
        let consumer = CONSUMERS[task.consumer].name;
        let key = keys.get(consumer).with_context(|| format!("{consumer} has no key"))?.clone();
        if task.start_us > seconds(options.start_within_s) {
            continue;
        }
        let clients = shared.clone();
        running.spawn(async move {
            tokio::time::sleep(Duration::from_micros(task.start_us)).await;
            clients.count(|progress| progress.tasks_started += 1);
            clients.work(&task, &key).await;
            clients.count(|progress| progress.tasks_done += 1);
        });
    }
    let limit = Duration::from_micros(seconds(options.start_within_s + options.drain_s));
    let all = async { while running.join_next().await.is_some() {} };
    if tokio::time::timeout(limit, all).await.is_err() {
        // Dropping a call counts it as aborted, see `OpenCall`.
        running.shutdown().await;
    }
    let seen = std::mem::take(&mut *shared.seen.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(seen)
}

struct Clients {
    base_url: String,
    http: Client<HttpConnector, Full<Bytes>>,
    seen: Mutex<Seen>,
    spans: AtomicU64,
    retries: u32,
    on_progress: OnProgress,
}

/// A call under way. However it ends, it is recorded once; when it is dropped its client has hung up.
struct OpenCall<'a> {
    clients: &'a Clients,
    seen: Option<SeenCall>,
}

impl OpenCall<'_> {
    fn end(mut self, end: SeenEnd, usage: Option<SeenUsage>) {
        self.record(end, usage);
    }

    fn record(&mut self, end: SeenEnd, usage: Option<SeenUsage>) {
        if let Some(seen) = self.seen.take() {
            self.clients.record(SeenCall { end, usage, ..seen });
        }
    }
}

impl Drop for OpenCall<'_> {
    fn drop(&mut self) {
        self.record(SeenEnd::Aborted, None);
    }
}

/// What a call leaves for the rest of its task.
enum Outcome {
    /// An answer, perhaps cut by its own client.
    Text(String),
    /// The server asks to come back later.
    Later,
    /// There is no point in going on.
    Failed,
}

impl Clients {
    async fn work(&self, task: &Task, key: &str) {
        let mut turns: Vec<(String, String)> = Vec::new();
        for call in &task.calls {
            tokio::time::sleep(Duration::from_micros(call.pause_us)).await;
            let known = if task.remembers() { turns.as_slice() } else { &[] };
            let Some(answer) = self.call_with_retries(task, call, known, key).await else { return };
            turns.push((call.text.clone(), answer));
        }
    }

    async fn call_with_retries(
        &self,
        task: &Task,
        call: &Call,
        known: &[(String, String)],
        key: &str,
    ) -> Option<String> {
        for attempt in 0..=self.retries {
            if attempt > 0 {
                self.count(|progress| progress.calls_retried += 1);
                tokio::time::sleep(Duration::from_millis(50 << attempt.min(8))).await;
            }
            match self.call(task, call, known, key).await {
                Outcome::Text(text) => return Some(text),
                Outcome::Later => {}
                Outcome::Failed => return None,
            }
        }
        None
    }

    async fn call(&self, task: &Task, call: &Call, known: &[(String, String)], key: &str) -> Outcome {
        self.count(|progress| progress.calls_sent += 1);
        let mut open = OpenCall {
            clients: self,
            seen: Some(SeenCall {
                request_id: None,
                consumer: CONSUMERS[task.consumer].name,
                model: call.model,
                task: task.id.clone(),
                end: SeenEnd::Broken,
                usage: None,
            }),
        };
        let sent = match self.request(task, call, known, key) {
            Ok(request) => self.http.request(request).await.map_err(anyhow::Error::from),
            Err(error) => Err(error),
        };
        let response = match sent {
            Ok(response) => response,
            Err(error) => {
                tracing::debug!(%error, "a call of the demo got no answer");
                open.end(SeenEnd::Broken, None);
                return Outcome::Later;
            }
        };
        if let Some(seen) = &mut open.seen {
            let id = response.headers().get("x-farthing-request-id");
            seen.request_id = id.and_then(|id| id.to_str().ok()).map(str::to_owned);
        }
        let status = response.status();
        if !status.is_success() {
            // The body is read, as a client does, and so the connection can be used again.
            let _message = response.into_body().collect().await;
            open.end(SeenEnd::Refused(status.as_u16()), None);
            let later = status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS;
            return if later { Outcome::Later } else { Outcome::Failed };
        }
        receive(open, call, response.into_body()).await
    }

    fn request(
        &self,
        task: &Task,
        call: &Call,
        known: &[(String, String)],
        key: &str,
    ) -> anyhow::Result<Request<Full<Bytes>>> {
        let path = match call.surface {
            Surface::Chat => "/v1/chat/completions",
            Surface::Completions => "/v1/completions",
            Surface::Messages => "/v1/messages",
        };
        let span = self.spans.fetch_add(1, Ordering::Relaxed);
        let mut request = Request::builder()
            .method(Method::POST)
            .uri(format!("{}{path}", self.base_url))
            .header("content-type", "application/json")
            .header("x-farthing-task", &task.id)
            .header("traceparent", format!("00-{}-{span:016x}-01", task.trace_id));
        request = match call.surface {
            Surface::Messages => request.header("x-api-key", key).header("anthropic-version", "2023-06-01"),
            Surface::Chat | Surface::Completions => request.header("authorization", format!("Bearer {key}")),
        };
        let optional = [
            ("x-farthing-application", CONSUMERS[task.consumer].application),
            ("x-farthing-feature", task.feature),
            ("x-farthing-customer", task.customer.as_deref()),
            ("x-farthing-session", task.session.as_deref()),
        ];
        for (name, value) in optional {
            if let Some(value) = value {
                request = request.header(name, value);
            }
        }
        Ok(request.body(Full::new(Bytes::from(body(task, call, known).to_string())))?)
    }

    fn record(&self, call: SeenCall) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        match call.end {
            SeenEnd::Finished => seen.progress.calls_finished += 1,
            SeenEnd::Aborted => seen.progress.calls_aborted += 1,
            SeenEnd::Refused(_) | SeenEnd::Broken => seen.progress.calls_failed += 1,
        }
        let usage = call.usage.unwrap_or_default();
        seen.progress.input_tokens += usage.input_tokens;
        seen.progress.output_tokens += usage.output_tokens;
        seen.calls.push(call);
        let progress = seen.progress;
        drop(seen);
        (self.on_progress)(&progress);
    }

    fn count(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner).progress);
    }
}

/// Reads an answer to its end, or to where the client means to hang up.
async fn receive(open: OpenCall<'_>, call: &Call, mut body: Incoming) -> Outcome {
    let mut reader = Reader::new(call.surface, call.stream);
    let (mut text, mut pieces) = (String::new(), 0);
    while let Some(frame) = body.frame().await {
        let Ok(frame) = frame else {
            open.end(SeenEnd::Broken, None);
            return Outcome::Failed;
        };
        let Ok(data) = frame.into_data() else { continue };
        for Piece(piece) in reader.read(&data) {
            text.push_str(&piece);
            pieces += 1;
        }
        if call.abort_after_tokens.is_some_and(|limit| pieces >= limit) {
            drop(body);
            open.end(SeenEnd::Aborted, None);
            return Outcome::Text(text);
        }
    }
    match reader.end() {
        Some(Answer { text: whole, usage }) => {
            open.end(SeenEnd::Finished, usage);
            Outcome::Text(whole.unwrap_or(text))
        }
        None => {
            open.end(SeenEnd::Broken, None);
            Outcome::Failed
        }
    }
}

/// The JSON of a call: the instructions, what was said before, and what is said now.
fn body(task: &Task, call: &Call, known: &[(String, String)]) -> Value {
    let mut body = json!({ "model": call.model, "max_tokens": call.max_tokens, "stream": call.stream });
    if call.asks_usage && call.surface != Surface::Messages {
        body["stream_options"] = json!({ "include_usage": true });
    }
    if call.surface == Surface::Completions {
        body["prompt"] = json!(format!("{} {}", task.instructions, call.text));
        return body;
    }
    let mut messages = Vec::new();
    if call.surface == Surface::Messages {
        body["system"] = json!(task.instructions);
    } else {
        messages.push(json!({ "role": "system", "content": task.instructions }));
    }
    for (question, answer) in known {
        messages.push(json!({ "role": "user", "content": question }));
        messages.push(json!({ "role": "assistant", "content": answer }));
    }
    messages.push(json!({ "role": "user", "content": call.text }));
    body["messages"] = json!(messages);
    body
}

fn seconds(seconds: f64) -> u64 {
    fleet::engine::scheduler::micros(seconds)
}

#[cfg(test)]
mod tests;
