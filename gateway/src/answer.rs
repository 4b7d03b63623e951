//! The body of a response on its way to the client: every chunk is metered and forwarded as it comes, and only what
//! ends the answer waits for the finished record.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode};
use http_body::{Body, Frame, SizeHint};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use ledger::{Operation, Outcome};
use tokio::time::{Instant, Sleep};

use crate::meter::{AnswerMeter, Metered};
use crate::pipeline::Open;
use crate::pipeline::open::{Sealed, Synced};
use crate::settings::OnClientAbort;

/// Carries the cost to a client that asked for it: a header, or a trailer after a stream.
pub(crate) const COST_HEADER: &str = "x-farthing-cost-usd";

/// Why an answer ends without its end. The client sees a broken body; the log says why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AnswerError {
    #[error("the upstream broke off in the middle of its answer")]
    Cut,
    #[error("the upstream fell silent in the middle of its answer")]
    Silent,
    #[error("the request took longer than it may")]
    TooLong,
    #[error("the answer's record cannot be written, and the policy is fail_closed")]
    Unrecorded,
}

impl AnswerError {
    /// The status for a client that has not seen a head yet.
    pub fn status(self) -> StatusCode {
        match self {
            AnswerError::Cut => StatusCode::BAD_GATEWAY,
            AnswerError::Silent | AnswerError::TooLong => StatusCode::GATEWAY_TIMEOUT,
            AnswerError::Unrecorded => StatusCode::SERVICE_UNAVAILABLE,
        }
    }
}

/// How the upstream's body ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// As HTTP ends a body, or with the event that ends the stream.
    Whole,
    /// With an error.
    Broken(AnswerError),
    /// It did not: the client went away.
    Abandoned,
}

/// What is known of an answer from its head.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reading {
    /// Whether it is an event stream.
    pub streamed: bool,
    /// Whether its cost follows it as a trailer.
    pub reports_at_end: bool,
    pub operation: Operation,
    /// Latest end, in microseconds after the request was received.
    pub deadline_us: u64,
}

/// An upstream's answer under way.
pub(crate) struct Live {
    upstream: Incoming,
    first: Option<Frame<Bytes>>,
    meter: AnswerMeter,
    open: Open,
    reading: Reading,
    /// Metered chunks that the client gets next.
    ready: VecDeque<Bytes>,
    /// While this is pending, `ready` holds the end of the answer and waits.
    seal: Option<Synced>,
    failure: Option<AnswerError>,
    ended: bool,
    reported: bool,
    timer: Option<Pin<Box<Sleep>>>,
    last_us: u64,
}

impl Live {
    pub fn new(
        upstream: Incoming,
        first: Option<Frame<Bytes>>,
        meter: AnswerMeter,
        open: Open,
        reading: Reading,
    ) -> Live {
        let last_us = open.now_us();
        Live {
            upstream,
            first,
            meter,
            open,
            reading,
            ready: VecDeque::new(),
            seal: None,
            failure: None,
            ended: false,
            reported: false,
            timer: None,
            last_us,
        }
    }

    pub fn has_nothing_to_come(&self) -> bool {
        self.first.is_none() && self.upstream.is_end_stream()
    }

    /// The cost of the attempt, once it is booked and if it is known.
    pub fn cost(&self) -> Option<HeaderValue> {
        HeaderValue::from_str(&self.open.cost()?.to_string()).ok()
    }

    /// Waits until the finished record survives what it must.
    pub async fn sealed(&mut self) -> Result<(), AnswerError> {
        std::future::poll_fn(|cx| self.poll_seal(cx)).await;
        self.failure.map_or(Ok(()), Err)
    }

    /// Puts bytes that were taken out and not passed on in front again.
    pub fn give_back(&mut self, bytes: Bytes) {
        self.ready.push_front(bytes);
    }

    /// Writes the finished record, once. What is ready afterwards is the end of the answer.
    pub fn finish(&mut self, end: End) {
        if !self.open.is_running() {
            return;
        }
        let reading = self.reading;
        let (sealed, trailing) = self.open.finish(&mut self.meter, |metered| outcome(end, reading, metered));
        self.ready.extend(trailing);
        self.apply(sealed);
    }

    fn apply(&mut self, sealed: Sealed) {
        self.seal = None;
        match sealed {
            Sealed::Released => {}
            Sealed::When(synced) => self.seal = Some(synced),
            Sealed::Refused => {
                self.ready.clear();
                self.fail(AnswerError::Unrecorded);
            }
        }
    }

    fn fail(&mut self, error: AnswerError) {
        self.failure = Some(error);
        self.ended = true;
    }

    fn poll_seal(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while let Some(seal) = &mut self.seal {
            match std::task::ready!(seal.as_mut().poll(cx)) {
                Ok(()) => self.seal = None,
                Err(error) => {
                    let sealed = self.open.unsynced(&error);
                    self.apply(sealed);
                }
            }
        }
        Poll::Ready(())
    }

    /// Takes in what the upstream did next.
    fn take(&mut self, next: Option<Result<Frame<Bytes>, hyper::Error>>) {
        self.last_us = self.open.now_us();
        match next {
            Some(Ok(frame)) => {
                let Ok(chunk) = frame.into_data() else { return };
                let fed = self.meter.feed(chunk, self.last_us);
                self.open.progressed(&self.meter);
                self.ready.extend(fed.release);
                if fed.ends || self.upstream.is_end_stream() {
                    self.finish(End::Whole);
                }
                self.ended |= self.upstream.is_end_stream();
            }
            Some(Err(error)) => self.break_off(AnswerError::Cut, &crate::upstream::chain(&error)),
            None => {
                self.finish(End::Whole);
                self.ended = true;
            }
        }
    }

    /// Ends an answer that did not end itself. After its record is written there is nothing left to break.
    fn break_off(&mut self, error: AnswerError, detail: &str) {
        if !self.open.is_running() {
            self.ended = true;
            return;
        }
        tracing::warn!(%error, detail, "answer broken off");
        self.finish(End::Broken(error));
        self.fail(error);
    }

    /// Whether the upstream has been silent, or the request running, for too long.
    fn poll_late(&mut self, cx: &mut Context<'_>) -> Poll<AnswerError> {
        let idle_us = self.open.settings().limits.stream_idle_ms_max.saturating_mul(1_000);
        loop {
            let (silent_at, over_at) = (self.last_us.saturating_add(idle_us), self.reading.deadline_us);
            let now_us = self.open.now_us();
            if now_us >= over_at {
                return Poll::Ready(AnswerError::TooLong);
            }
            if now_us >= silent_at {
                return Poll::Ready(AnswerError::Silent);
            }
            // The timer is set once and looked at again when it fires, not moved at every chunk.
            let timer = self.timer.get_or_insert_with(|| {
                Box::pin(tokio::time::sleep(Duration::from_micros(silent_at.min(over_at) - now_us)))
            });
            std::task::ready!(timer.as_mut().poll(cx));
            timer.as_mut().reset(
                Instant::now() + Duration::from_micros(silent_at.min(over_at).saturating_sub(now_us).max(1_000)),
            );
        }
    }

    fn poll_upstream(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(first) = self.first.take() {
            self.take(Some(Ok(first)));
            return Poll::Ready(());
        }
        match Pin::new(&mut self.upstream).poll_frame(cx) {
            Poll::Ready(next) => self.take(next),
            Poll::Pending => {
                let late = std::task::ready!(self.poll_late(cx));
                self.break_off(late, "time limit");
            }
        }
        Poll::Ready(())
    }

    fn report(&mut self) -> Option<HeaderMap> {
        if self.reported || !self.reading.reports_at_end {
            return None;
        }
        self.reported = true;
        Some(HeaderMap::from_iter([(http::HeaderName::from_static(COST_HEADER), self.cost()?)]))
    }

    /// Whether the rest is worth reading although nobody waits for it.
    fn is_worth_draining(&self) -> bool {
        let policy = self.open.settings().on_client_abort;
        self.open.is_running() && (!self.reading.streamed || policy == OnClientAbort::Drain)
    }

    /// Reads the answer to its end for its usage, within bounds of time and size.
    async fn drain(&mut self) {
        let limits = self.open.settings().limits;
        let reading = async {
            let mut read = 0;
            while self.open.is_running() {
                let next = match self.first.take() {
                    Some(first) => Some(Ok(first)),
                    None => self.upstream.frame().await,
                };
                let (Some(Ok(frame)), true) = (next, read <= limits.drain_bytes_max) else { return };
                let Ok(chunk) = frame.into_data() else { continue };
                read = read.saturating_add(u64::try_from(chunk.len()).unwrap_or(u64::MAX));
                let ends = self.meter.feed(chunk, self.open.now_us()).ends;
                self.open.progressed(&self.meter);
                if ends {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(Duration::from_millis(limits.drain_ms_max), reading).await;
        self.finish(End::Abandoned);
    }
}

impl Body for Live {
    type Data = Bytes;
    type Error = AnswerError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, AnswerError>>> {
        let this = &mut *self;
        loop {
            std::task::ready!(this.poll_seal(cx));
            if let Some(chunk) = this.ready.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(chunk))));
            }
            if this.ended {
                if let Some(error) = this.failure.take() {
                    return Poll::Ready(Some(Err(error)));
                }
                return Poll::Ready(this.report().map(|trailers| Ok(Frame::trailers(trailers))));
            }
            std::task::ready!(this.poll_upstream(cx));
        }
    }

    fn is_end_stream(&self) -> bool {
        let owes_report = self.reading.reports_at_end && !self.reported;
        self.ended && self.ready.is_empty() && self.seal.is_none() && self.failure.is_none() && !owes_report
    }
}

impl Drop for Live {
    /// Whoever held the answer let go of it before its end.
    fn drop(&mut self) {
        self.finish(End::Abandoned);
    }
}

fn outcome(end: End, reading: Reading, metered: &Metered) -> Outcome {
    match end {
        End::Abandoned => Outcome::ClientAborted,
        End::Broken(AnswerError::Silent | AnswerError::TooLong) => Outcome::TimedOut,
        End::Broken(_) => Outcome::UpstreamCut,
        End::Whole if metered.error.is_some() => Outcome::UpstreamError,
        // HTTP may end well in the middle of a stream; what a pass-through stream ends with is nobody's knowledge here.
        End::Whole if reading.streamed && !metered.complete && reading.operation != Operation::Other => {
            Outcome::UpstreamCut
        }
        End::Whole => Outcome::Completed,
    }
}

/// The body of any response.
pub(crate) struct Answer(Kind);

enum Kind {
    Whole(Option<Bytes>),
    Live(Option<Box<Live>>),
}

impl Answer {
    /// A body that is all there.
    pub fn whole(bytes: Bytes) -> Answer {
        Answer(Kind::Whole(Some(bytes).filter(|bytes| !bytes.is_empty())))
    }

    /// A body on its way.
    pub fn live(live: Live) -> Answer {
        Answer(Kind::Live(Some(Box::new(live))))
    }

    /// Reads what is left of it for its usage; its client is gone.
    pub async fn drain(mut self) {
        if let Kind::Live(live) = &mut self.0
            && let Some(mut live) = live.take()
        {
            live.drain().await;
        }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = AnswerError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, AnswerError>>> {
        match &mut self.0 {
            Kind::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Kind::Live(Some(live)) => Pin::new(&mut **live).poll_frame(cx),
            Kind::Live(None) => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Kind::Whole(bytes) => bytes.is_none(),
            Kind::Live(live) => live.as_ref().is_none_or(|live| live.is_end_stream()),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Kind::Whole(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| u64::try_from(bytes.len()).unwrap_or(0)))
            }
            Kind::Live(_) => SizeHint::default(),
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        let Kind::Live(live) = &mut self.0 else { return };
        let Some(mut live) = live.take() else { return };
        if !live.is_worth_draining() {
            // Dropping it cancels the upstream and books what was delivered.
            return;
        }
        let core = std::sync::Arc::clone(live.open.core());
        let metrics = std::sync::Arc::clone(&core);
        core.background.run(async move {
            metrics.metrics.draining.up();
            live.drain().await;
            metrics.metrics.draining.down();
        });
    }
}
