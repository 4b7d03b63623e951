//! Receives OpenTelemetry spans, over HTTP and gRPC, and keeps of them what the ledger needs: which model was called, for
//! whom, when, and with how many tokens.
//!
//! A [`Receiver`] is the whole of it: [`Receiver::serve`] answers `POST /v1/traces`, [`serve_grpc`] serves the same on a
//! listener of its own, and both hand [`ledger::CallSpan`]s to a [`Sink`]. Only the attributes that are named in `names` are
//! ever looked at, so that prompts and answers, which many instrumentations attach, are dropped with the message.

mod grpc;
mod http;
mod json;
mod names;
mod spans;
mod usage;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ledger::{CallSpan, Clock};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use tokio::sync::{Semaphore, SemaphorePermit};

pub use grpc::serve_grpc;
pub use spans::{Found, read};

/// Largest body, before and after it is decompressed, unless the options say otherwise.
pub const BODY_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Requests that are read at a time, over all connections; more wait. It bounds the memory that senders can take.
const REQUESTS_MAX: usize = 16;
/// Longest time that a request may take to arrive.
const REQUEST_TIME_MAX: Duration = Duration::from_secs(30);

/// Where spans go.
pub trait Sink: Send + Sync {
    /// Takes all of the spans for good, or none of them. Called between two steps of the runtime: it must not block.
    ///
    /// # Errors
    /// [`Busy`] when they cannot be kept now; the sender is told to try again.
    fn store(&self, spans: Vec<CallSpan>) -> Result<(), Busy>;
}

impl<F: Fn(Vec<CallSpan>) -> Result<(), Busy> + Send + Sync> Sink for F {
    fn store(&self, spans: Vec<CallSpan>) -> Result<(), Busy> {
        self(spans)
    }
}

/// Spans cannot be kept at the moment; the same request may be sent again later.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("spans cannot be stored now: {reason}")]
pub struct Busy {
    /// Why, for the sender's log.
    pub reason: String,
}

/// How to receive.
#[derive(Clone)]
pub struct Options {
    /// What a sender must present as `authorization: Bearer …`. Without it anybody who can connect may send.
    pub token: Option<String>,
    /// Largest body in bytes, before and after it is decompressed.
    pub body_bytes_max: usize,
}

impl Default for Options {
    fn default() -> Options {
        Options { token: None, body_bytes_max: BODY_BYTES_MAX }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let token = self.token.as_ref().map(|_| "…");
        f.debug_struct("Options").field("token", &token).field("body_bytes_max", &self.body_bytes_max).finish()
    }
}

/// What was received since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Spans that arrived.
    pub spans: u64,
    /// Spans that were model calls and were stored.
    pub calls: u64,
    /// Spans that were something else.
    pub ignored: u64,
    /// Model calls that could not be used, because nothing tells them from another or says when they were.
    pub rejected: u64,
    /// Requests that were answered with an error.
    pub refused_requests: u64,
}

/// Receives spans. Clones share everything.
#[derive(Clone)]
pub struct Receiver {
    shared: Arc<Shared>,
}

struct Shared {
    sink: Arc<dyn Sink>,
    clock: Arc<dyn Clock>,
    options: Options,
    room: Semaphore,
    spans: AtomicU64,
    calls: AtomicU64,
    ignored: AtomicU64,
    rejected: AtomicU64,
    refused_requests: AtomicU64,
}

impl Receiver {
    /// A receiver that hands what it reads to `sink`.
    #[must_use]
    pub fn new(sink: Arc<dyn Sink>, clock: Arc<dyn Clock>, options: Options) -> Receiver {
        let shared = Shared {
            sink,
            clock,
            options,
            room: Semaphore::new(REQUESTS_MAX),
            spans: AtomicU64::new(0),
            calls: AtomicU64::new(0),
            ignored: AtomicU64::new(0),
            rejected: AtomicU64::new(0),
            refused_requests: AtomicU64::new(0),
        };
        Receiver { shared: Arc::new(shared) }
    }

    /// What was received so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            spans: get(&self.shared.spans),
            calls: get(&self.shared.calls),
            ignored: get(&self.shared.ignored),
            rejected: get(&self.shared.rejected),
            refused_requests: get(&self.shared.refused_requests),
        }
    }

    /// Reads and stores one request. What comes back says which spans could not be used.
    fn take(&self, request: ExportTraceServiceRequest) -> Result<Taken, Busy> {
        let found = read(request, self.shared.clock.now());
        let calls = u64::try_from(found.calls.len()).unwrap_or(u64::MAX);
        if !found.calls.is_empty() {
            self.shared.sink.store(found.calls)?;
        }
        let add = |counter: &AtomicU64, number| counter.fetch_add(number, Ordering::Relaxed);
        add(&self.shared.spans, calls.saturating_add(found.ignored).saturating_add(found.rejected));
        add(&self.shared.calls, calls);
        add(&self.shared.ignored, found.ignored);
        add(&self.shared.rejected, found.rejected);
        Ok(Taken { rejected: found.rejected })
    }

    /// Whether the presented `authorization` value is the token that is asked for.
    fn admits(&self, authorization: Option<&[u8]>) -> bool {
        let Some(token) = &self.shared.options.token else { return true };
        let presented = authorization.and_then(|value| {
            let (scheme, rest) = value.split_at_checked(7)?;
            scheme.eq_ignore_ascii_case(b"bearer ").then_some(rest)
        });
        presented.is_some_and(|presented| same(presented, token.as_bytes()))
    }

    /// Waits until there is room for another request.
    async fn room(&self) -> SemaphorePermit<'_> {
        self.shared.room.acquire().await.expect("the semaphore is never closed")
    }

    fn refused(&self) {
        self.shared.refused_requests.fetch_add(1, Ordering::Relaxed);
    }

    fn body_bytes_max(&self) -> usize {
        self.shared.options.body_bytes_max
    }
}

/// What became of a request's spans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Taken {
    rejected: u64,
}

impl Taken {
    /// What to tell the sender, when something could not be used.
    fn complaint(self) -> Option<(i64, String)> {
        let rejected = i64::try_from(self.rejected).unwrap_or(i64::MAX);
        let message = "these model calls have no start time, or neither a trace and span id nor a response id";
        (rejected > 0).then(|| (rejected, message.to_owned()))
    }
}

/// Whether two byte strings are equal, in a time that does not tell where they differ.
fn same(left: &[u8], right: &[u8]) -> bool {
    left.len() == right.len() && left.iter().zip(right).fold(0, |differs, (left, right)| differs | (left ^ right)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_compared_whole_and_never_shown() {
        assert!(same(b"abc", b"abc") && !same(b"abc", b"abx") && !same(b"abc", b"ab") && !same(b"", b"a"));
        let options = Options { token: Some("secret".to_owned()), ..Options::default() };
        assert!(!format!("{options:?}").contains("secret"));
    }
}
