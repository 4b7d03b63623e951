//! The attempts of one request: open, send, meter, finish, and again elsewhere while there is hope and time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER, TRAILER};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use ledger::{Context, Outcome};

use crate::answer::{Answer, COST_HEADER, End, Live, Reading};
use crate::availability::{Availability, Deployment, Look};
use crate::keys::KeyRecord;
use crate::meter::AnswerMeter;
use crate::pipeline::admit::Admitted;
use crate::pipeline::hold;
use crate::pipeline::open::Sealed;
use crate::pipeline::receive::Arrival;
use crate::pipeline::retained::RequestBody;
use crate::pipeline::{Core, Open};
use crate::plan::{Ask, Plan, Target, plan, sibling};
use crate::provider::without_query_key;
use crate::refusal::Refusal;
use crate::settings::{Settings, Upstream};
use crate::surface::Inspected;
use crate::upstream::{SendError, returned};

/// Longest answer that is held back so that its cost can go into a header.
const HELD_BYTES_MAX: u64 = 16 << 20;
/// Longest error that is read for its usage before the next try.
const ERROR_BYTES_MAX: usize = 65_536;
/// Longest time it may take.
const ERROR_READ: Duration = Duration::from_secs(2);
/// Wait before another look at a replica that is not there although nobody said that it goes; longer each time.
const UNNOTICED: Duration = Duration::from_secs(1);
/// Wait before the first retry on the same upstream when it names none; doubled each time.
const BACKOFF: Duration = Duration::from_millis(50);

/// An admitted request, ready to be sent.
pub(crate) struct Asked {
    pub core: Arc<Core>,
    pub settings: Arc<Settings>,
    pub arrival: Arrival,
    pub admitted: Admitted,
    pub method: Method,
    pub path: String,
    pub headers: HeaderMap,
    pub inspected: Inspected,
    pub context: Context,
    pub body: RequestBody,
    /// Set when the client hung up: then nothing new is started for it.
    pub gone: Arc<AtomicBool>,
    pub reports_cost: bool,
    pub takes_trailers: bool,
    pub key: Option<Arc<KeyRecord>>,
}

impl Asked {
    /// Where to send it as things are now.
    pub fn plan(&self) -> Plan {
        let now_us = self.core.clock.monotonic_us();
        plan(self.ask(), |upstream| self.core.board.look(upstream, now_us))
    }

    /// Counts it for whoever scales what it wants.
    pub fn arrived_for(&self, wanted: &Upstream) {
        if !hold::only_looks(&self.method) {
            self.core.board.arrived(&Deployment::of(wanted));
        }
    }

    fn ask(&self) -> Ask<'_> {
        let Asked { settings, inspected, key, arrival, .. } = self;
        Ask { settings, request: inspected, key: key.as_deref(), seed: arrival.seed }
    }

    fn look(&self, upstream: &Upstream) -> Look {
        self.core.board.look(upstream, self.core.clock.monotonic_us())
    }

    fn is_going(&self, upstream: &Upstream) -> bool {
        self.look(upstream).availability != Availability::Serving
    }

    /// Whether another attempt may be made after `tries` of them.
    fn may_try_again(&self, tries: u16) -> bool {
        self.body.is_kept()
            && usize::from(tries) < self.settings.limits.attempts_max
            && !self.gone.load(Ordering::Relaxed)
            && !time_left(self).is_zero()
    }
}

/// The head of an answer, and what of its body was read to be sure that there is one.
struct Answered {
    head: http::response::Parts,
    body: Incoming,
    first: Option<Frame<Bytes>>,
    hides_usage_chunk: bool,
}

/// Why a try gave nothing that could be passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failure {
    Unreachable,
    Broken,
    TimedOut,
    /// What the client sent cannot be put into a request to this upstream.
    Unsendable,
}

/// An upstream's error that was not passed on because there was hope of better. It is what the client gets if time runs out.
struct Spare {
    head: http::response::Parts,
    body: Bytes,
    open: Open,
    sealed: Sealed,
}

/// Tries the targets in order until one answers; an error with nothing left to try is passed on byte for byte. Without targets it
/// first waits for some.
///
/// A replica that goes away takes no request with it: what it was about to do is done by another one, or waits for the next.
pub(crate) async fn exchange(asked: Asked, targets: Option<Vec<Target>>) -> Result<Response<Answer>, Refusal> {
    let mut asked = asked;
    let mut targets = match targets {
        Some(targets) => targets,
        None => hold::until_served(&asked).await?,
    };
    if !asked.body.is_kept() {
        tracing::debug!(request = %asked.arrival.id, "no room to keep the body for another try");
        targets.truncate(1);
    }
    let mut wait = Duration::ZERO;
    let mut skip = None;
    let mut failed = None;
    let mut spare = None;
    let mut number = 0;
    let mut index = 0;
    let mut unreached = Vec::new();
    let mut refused = None;
    while let Some(target) = targets.get(index).cloned() {
        index += 1;
        if skip.as_ref().is_some_and(|upstream| Arc::ptr_eq(upstream, &target.upstream)) {
            continue;
        }
        if number > 0 && (!asked.may_try_again(number) || time_left(&asked) <= wait) {
            break;
        }
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        let Some(seat) = asked.core.board.enter(&target.upstream) else {
            // It began to go after it was planned.
            match hold::until_served(&asked).await {
                Ok(others) => (targets, index, wait, skip) = (others, 0, Duration::ZERO, None),
                Err(refusal) => {
                    refused = Some(refusal);
                    break;
                }
            }
            continue;
        };
        let mut open = Open::new(&asked, &target, seat, number)?;
        number += 1;
        let later = targets.get(index..).unwrap_or_default();
        let more = !later.is_empty() && usize::from(number) < asked.settings.limits.attempts_max;
        // One that may go in the middle of its answer is not believed before the first of it is here.
        let careful = more || (asked.core.board.comes_and_goes(&target.upstream) && asked.may_try_again(number));
        (wait, skip) = (Duration::ZERO, None);
        let body = asked.body.take();
        let lost = match attempt(&asked, &target, body, &mut open, careful).await {
            Ok(answered) => {
                asked.core.board.answered(&target.upstream);
                let is_going = answered.head.status.is_server_error() && asked.is_going(&target.upstream);
                let lost = is_going && asked.may_try_again(number);
                let next = if more && !lost {
                    next_step(&answered.head, &target, later, number, &asked.settings)
                } else {
                    Next::Pass
                };
                match next {
                    // An answer now is better than none later.
                    Next::Try(after) if after >= time_left(&asked) => {
                        return pass_on(&asked, open, &target, answered, number).await;
                    }
                    Next::Try(after) => wait = after,
                    Next::Skip => skip = Some(Arc::clone(&target.upstream)),
                    Next::Pass if lost => {}
                    Next::Pass => return pass_on(&asked, open, &target, answered, number).await,
                }
                tracing::info!(request = %asked.arrival.id, upstream = %target.upstream.name, status = answered.head.status.as_u16(), "trying again");
                spare = give_up_on(&asked, open, &target, answered).await;
                lost.then_some(Lost::Going)
            }
            Err(failure) => {
                let outcome = match failure {
                    Failure::Unreachable | Failure::Unsendable => Outcome::UpstreamUnreachable,
                    Failure::Broken => Outcome::UpstreamCut,
                    Failure::TimedOut => Outcome::TimedOut,
                };
                open.unanswered(outcome);
                if failure == Failure::Unreachable {
                    asked.core.board.refused(&target.upstream, asked.core.clock.monotonic_us());
                }
                tracing::warn!(request = %asked.arrival.id, upstream = %target.upstream.name, ?failure, "no answer");
                let same_next = later.first().is_some_and(|next| Arc::ptr_eq(&next.upstream, &target.upstream));
                wait = if same_next { backoff(number) } else { Duration::ZERO };
                failed = Some((failure, target.clone()));
                lost_to(&asked, &target, failure, number)
            }
        };
        let Some(lost) = lost else { continue };
        unreached.push(Arc::clone(&target.upstream));
        match elsewhere(&asked, &target, &unreached, lost, later, number).await {
            Elsewhere::Instead(others) => (targets, index, wait) = (others, 0, Duration::ZERO),
            Elsewhere::AsPlanned => {}
            Elsewhere::Nowhere(refusal) => {
                refused = Some(refusal);
                break;
            }
        }
    }
    match (spare, failed) {
        (Some(spare), None | Some((Failure::TimedOut, _))) => instead(spare, number).await,
        (_, failed) => Err(refused.unwrap_or_else(|| refusal(failed, number))),
    }
}

/// Why a try came to nothing although the request is fine, and another replica can do what it asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lost {
    /// The replica is said to go.
    Going,
    /// Nobody says so, but it is not there. Nothing was sent to it.
    Unreached,
    /// It comes and goes, and broke off without a word: it was killed, or the request killed it.
    Died,
}

fn lost_to(asked: &Asked, target: &Target, failure: Failure, tries: u16) -> Option<Lost> {
    if !asked.may_try_again(tries) {
        return None;
    }
    match failure {
        Failure::Unreachable | Failure::Broken if asked.is_going(&target.upstream) => Some(Lost::Going),
        Failure::Unreachable => Some(Lost::Unreached),
        Failure::Broken if asked.core.board.comes_and_goes(&target.upstream) => Some(Lost::Died),
        _ => None,
    }
}

/// What comes next after a try was lost.
enum Elsewhere {
    /// These, and nothing of what was planned.
    Instead(Vec<Target>),
    /// What was planned.
    AsPlanned,
    /// Nothing, and this is why.
    Nowhere(Refusal),
}

async fn elsewhere(
    asked: &Asked,
    target: &Target,
    unreached: &[Arc<Upstream>],
    lost: Lost,
    later: &[Target],
    tries: u16,
) -> Elsewhere {
    // A request that kills whoever takes it gets no third.
    if lost == Lost::Died && unreached.len() > 1 {
        return Elsewhere::AsPlanned;
    }
    // Another replica comes before what is planned: it does the same work, and more tries at this one would be in vain.
    if let Some(other) = sibling(asked.ask(), target, unreached, |upstream| asked.look(upstream)) {
        let rest = later.iter().filter(|later| !Arc::ptr_eq(&later.upstream, &target.upstream)).cloned();
        return Elsewhere::Instead(std::iter::once(other).chain(rest).collect());
    }
    let elsewhere = later.iter().any(|later| !Arc::ptr_eq(&later.upstream, &target.upstream));
    match lost {
        Lost::Going => {}
        // Something that comes and goes and is not there may have gone without a word: whoever scales it will notice.
        Lost::Unreached if !elsewhere && asked.core.board.comes_and_goes(&target.upstream) => {
            let patience = (UNNOTICED * u32::from(tries)).min(time_left(asked));
            let _ = tokio::time::timeout(patience, asked.core.board.changed().notified()).await;
        }
        Lost::Unreached | Lost::Died => return Elsewhere::AsPlanned,
    }
    hold::until_served(asked).await.map_or_else(Elsewhere::Nowhere, Elsewhere::Instead)
}

pub(super) fn time_left(asked: &Asked) -> Duration {
    let used_us = asked.core.clock.monotonic_us().saturating_sub(asked.arrival.anchor_us);
    let most = Duration::from_millis(asked.settings.limits.request_ms_max);
    most.saturating_sub(Duration::from_micros(used_us))
}

fn backoff(tries: u16) -> Duration {
    BACKOFF * (1 << tries.saturating_sub(1).min(6))
}

fn refusal(failed: Option<(Failure, Target)>, tries: u16) -> Refusal {
    let Some((failure, target)) = failed else {
        return Refusal::new(StatusCode::GATEWAY_TIMEOUT, "there was no time left to try the upstream");
    };
    let (status, what) = match failure {
        Failure::Unreachable => (StatusCode::BAD_GATEWAY, "could not be reached"),
        Failure::Broken => (StatusCode::BAD_GATEWAY, "broke off before it answered"),
        Failure::TimedOut => (StatusCode::GATEWAY_TIMEOUT, "did not answer in time"),
        Failure::Unsendable => {
            (StatusCode::BAD_REQUEST, "cannot be sent this request: its path or credential is malformed")
        }
    };
    Refusal::new(status, format!("upstream `{}` {what} (attempts: {tries})", target.upstream.name))
}

enum Next {
    /// Give the client what came.
    Pass,
    /// Try the next target after this time.
    Try(Duration),
    /// Try the next target on another upstream: this one asked for more patience than there is.
    Skip,
}

/// What to do about an answer while there are targets left.
fn next_step(head: &http::response::Parts, target: &Target, later: &[Target], tries: u16, settings: &Settings) -> Next {
    let retryable = head.status == StatusCode::TOO_MANY_REQUESTS || head.status.is_server_error();
    if !retryable {
        return Next::Pass;
    }
    let is_other = |next: &Target| !Arc::ptr_eq(&next.upstream, &target.upstream);
    if later.first().is_none_or(is_other) {
        return Next::Try(Duration::ZERO);
    }
    let Some(asked_for) = retry_after(&head.headers) else { return Next::Try(backoff(tries)) };
    if asked_for <= Duration::from_millis(settings.limits.retry_after_ms_max) {
        return Next::Try(asked_for);
    }
    if later.iter().any(is_other) { Next::Skip } else { Next::Pass }
}

/// Seconds, or milliseconds in OpenAI's own header. Dates are not worth a clock here; they fall back to our own wait.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let number = |name: &str| headers.get(name)?.to_str().ok()?.trim().parse::<u64>().ok();
    number("retry-after-ms")
        .map(Duration::from_millis)
        .or_else(|| number(RETRY_AFTER.as_str()).map(Duration::from_secs))
}

/// One try: from the opened record to the head of an answer, or when it is `careful` to the first byte of its body.
async fn attempt(
    asked: &Asked,
    target: &Target,
    body: Bytes,
    open: &mut Open,
    careful: bool,
) -> Result<Answered, Failure> {
    let (request, hides_usage_chunk) = prepare(asked, target, body).map_err(|_| Failure::Unsendable)?;
    let patience = Duration::from_millis(asked.settings.limits.first_byte_ms_max).min(time_left(asked));
    open.sent();
    let exchange = async {
        let answer = asked.core.outbound.send(target.upstream.kind, request).await.map_err(|error| match error {
            SendError::Unreachable => Failure::Unreachable,
            SendError::Broken => Failure::Broken,
        })?;
        let (head, mut body) = answer.into_parts();
        let streamed = is_event_stream(&head.headers);
        open.answered(head.status, streamed);
        // With somewhere else to go, a head alone is no answer: some upstreams fail right after it.
        let wait_for_body = careful && head.status.is_success() && !body.is_end_stream();
        let first = if wait_for_body { body.frame().await.transpose().map_err(|_| Failure::Broken)? } else { None };
        Ok(Answered { head, body, first, hides_usage_chunk })
    };
    tokio::time::timeout(patience, exchange).await.unwrap_or(Err(Failure::TimedOut))
}

fn prepare(asked: &Asked, target: &Target, body: Bytes) -> Result<(Request<Full<Bytes>>, bool), http::Error> {
    let upstream = &target.upstream;
    let prepared = upstream.kind.prepare(&asked.inspected, &asked.path, body, target.model.as_deref());
    let mut headers = asked.headers.clone();
    let mut path = prepared.path_and_query.as_str().into();
    if let Some(secret) = &upstream.api_key {
        upstream.kind.authorize(&mut headers, secret.reveal())?;
        path = without_query_key(&prepared.path_and_query);
    }
    let mut request = Request::new(Full::new(prepared.body));
    *request.method_mut() = asked.method.clone();
    *request.uri_mut() = upstream.base_url.join(&path)?;
    *request.headers_mut() = headers;
    Ok((request, prepared.hide_usage_chunk))
}

fn is_event_stream(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    kind.get(..17).is_some_and(|start| start.eq_ignore_ascii_case(b"text/event-stream"))
}

fn meter(asked: &Asked, target: &Target, head: &http::response::Parts, hides_usage_chunk: bool) -> AnswerMeter {
    let encoding =
        head.headers.get(CONTENT_ENCODING).filter(|value| !value.as_bytes().eq_ignore_ascii_case(b"identity"));
    if let Some(encoding) = encoding {
        let encoding = String::from_utf8_lossy(encoding.as_bytes()).into_owned();
        return AnswerMeter::unmetered(Some(format!("answer encoded as {encoding}")));
    }
    if asked.inspected.stored {
        return AnswerMeter::unmetered(None);
    }
    let streamed = is_event_stream(&head.headers);
    let meter = AnswerMeter::new(target.upstream.kind, asked.inspected.operation, streamed, hides_usage_chunk);
    meter.with_model(target.model.as_deref().or(asked.inspected.model.as_deref()))
}

/// Reads an error that the client will hardly see, for the usage it may report, and books the attempt. It is given back
/// when it was read to its end.
async fn give_up_on(asked: &Asked, open: Open, target: &Target, answered: Answered) -> Option<Spare> {
    let mut meter = meter(asked, target, &answered.head, answered.hides_usage_chunk);
    let mut open = open;
    let mut body = answered.body;
    let mut whole = Vec::new();
    let reading = async {
        while let Some(frame) = body.frame().await {
            let Ok(frame) = frame else { return false };
            let Ok(chunk) = frame.into_data() else { continue };
            whole.extend_from_slice(&chunk);
            meter.feed(chunk, open.now_us());
            if whole.len() > ERROR_BYTES_MAX {
                return false;
            }
        }
        true
    };
    // Whether it ended or took too long, the attempt is over.
    let ended = tokio::time::timeout(ERROR_READ, reading).await == Ok(true);
    let (sealed, _) = open.finish(&mut meter, |_| Outcome::UpstreamError);
    ended.then(|| Spare { head: answered.head, body: Bytes::from(whole), open, sealed })
}

/// Makes the client's response of an error that is booked already.
async fn instead(spare: Spare, tries: u16) -> Result<Response<Answer>, Refusal> {
    let Spare { head, body, open, mut sealed } = spare;
    while let Sealed::When(synced) = sealed {
        sealed = match synced.await {
            Ok(()) => Sealed::Released,
            Err(error) => open.unsynced(&error),
        };
    }
    if matches!(sealed, Sealed::Refused) {
        return Err(unrecorded());
    }
    let (mut parts, ()) = Response::new(()).into_parts();
    parts.status = head.status;
    parts.headers = returned(head.headers);
    parts.headers.insert("x-farthing-attempts", HeaderValue::from(tries));
    Ok(Response::from_parts(parts, Answer::whole(body)))
}

/// Makes the client's response of an upstream's answer.
async fn pass_on(
    asked: &Asked,
    open: Open,
    target: &Target,
    answered: Answered,
    tries: u16,
) -> Result<Response<Answer>, Refusal> {
    let Answered { head, body, first, hides_usage_chunk } = answered;
    let streamed = is_event_stream(&head.headers);
    let meter = meter(asked, target, &head, hides_usage_chunk);
    let (mut parts, ()) = Response::new(()).into_parts();
    parts.status = head.status;
    parts.headers = returned(head.headers);
    parts.headers.insert("x-farthing-attempts", HeaderValue::from(tries));
    let reports_at_end = asked.reports_cost && streamed && asked.takes_trailers;
    if streamed && (hides_usage_chunk || reports_at_end) {
        // The body gets shorter than announced, or goes on after it: only the end of the stream ends it.
        parts.headers.remove(CONTENT_LENGTH);
    }
    if reports_at_end {
        parts.headers.insert(TRAILER, HeaderValue::from_static(COST_HEADER));
    }
    let length = body.size_hint().exact();
    let reading = Reading {
        streamed,
        reports_at_end,
        operation: asked.inspected.operation,
        deadline_us: asked.settings.limits.request_ms_max.saturating_mul(1_000),
    };
    let mut live = Live::new(body, first, meter, open, reading);
    if live.has_nothing_to_come() {
        // A response without a body is never polled for one, so this one is booked before its head goes out.
        live.finish(End::Whole);
        live.sealed().await.map_err(|_| unrecorded())?;
        return Ok(Response::from_parts(parts, Answer::whole(Bytes::new())));
    }
    if asked.reports_cost && !streamed && length.is_none_or(|bytes| bytes <= HELD_BYTES_MAX) {
        return hold(live, parts).await;
    }
    Ok(Response::from_parts(parts, Answer::live(live)))
}

fn unrecorded() -> Refusal {
    let message = "the answer cannot be released: its record cannot be written, and the policy is fail_closed";
    Refusal::new(StatusCode::SERVICE_UNAVAILABLE, message)
}

/// Holds an answer back until its cost is known. Only for clients that asked for the cost and do not stream.
async fn hold(live: Live, parts: http::response::Parts) -> Result<Response<Answer>, Refusal> {
    let mut parts = parts;
    let mut live = live;
    let mut whole = Vec::new();
    while let Some(frame) = live.frame().await {
        let frame = frame.map_err(|error| Refusal::new(error.status(), format!("the answer is lost: {error}")))?;
        if let Ok(chunk) = frame.into_data() {
            whole.extend_from_slice(&chunk);
        }
        if u64::try_from(whole.len()).is_ok_and(|bytes| bytes > HELD_BYTES_MAX) {
            // Too long to be held back: it goes out as it comes, without its cost, rather than not at all.
            live.give_back(Bytes::from(whole));
            return Ok(Response::from_parts(parts, Answer::live(live)));
        }
    }
    if let Some(cost) = live.cost() {
        parts.headers.insert(COST_HEADER, cost);
    }
    Ok(Response::from_parts(parts, Answer::whole(Bytes::from(whole))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provider::Kind;

    fn targets(names: &[&str]) -> Vec<Target> {
        let mut known: Vec<Arc<Upstream>> = Vec::new();
        let target = |name: &&str| {
            let found = known.iter().find(|upstream| &*upstream.name == *name).cloned();
            let upstream = found.unwrap_or_else(|| {
                known.push(Arc::new(Upstream::new(name, Kind::OpenAi, "http://127.0.0.1:1".parse().unwrap())));
                Arc::clone(known.last().unwrap())
            });
            Target { upstream, model: None }
        };
        names.iter().map(target).collect()
    }

    #[test]
    fn an_upstreams_wish_to_wait_is_honoured_within_bounds() {
        let step = |status: u16, wait: Option<&str>, names: &[&str]| {
            let mut builder = Response::builder().status(status);
            if let Some(wait) = wait {
                builder = builder.header("retry-after", wait);
            }
            let (head, ()) = builder.body(()).unwrap().into_parts();
            let targets = targets(names);
            match next_step(&head, &targets[0], &targets[1..], 1, &Settings::default()) {
                Next::Pass => "pass".to_owned(),
                Next::Skip => "skip".to_owned(),
                Next::Try(wait) => format!("{wait:?}"),
            }
        };
        assert_eq!(step(200, None, &["a", "a"]), "pass");
        assert_eq!(step(400, None, &["a", "a"]), "pass");
        assert_eq!(step(503, None, &["a", "a"]), "50ms");
        assert_eq!(step(429, Some("2"), &["a", "a"]), "2s");
        assert_eq!(step(429, Some("3600"), &["a", "a"]), "pass");
        assert_eq!(step(429, Some("3600"), &["a", "a", "b"]), "skip");
        assert_eq!(step(429, Some("3600"), &["a", "b"]), "0ns");
        assert_eq!(step(500, Some("Fri, 31 Dec 1999 23:59:59 GMT"), &["a", "a"]), "50ms");
    }
}
