//! The first steps: a request's head and body come in, within bounds.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, TE, UPGRADE};
use http::request::Parts;
use http::{HeaderMap, Method, Request, StatusCode, Version};
use http_body::Body;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use ledger::{Clock, RequestId, Timestamp};

use crate::attribute::label;
use crate::refusal::Refusal;
use crate::settings::Limits;
use crate::surface::Inspected;
use crate::upstream::check_target;

/// No more than this is set aside on the word of a `content-length` alone.
const BODY_BYTES_TRUSTED: usize = 1 << 20;

/// When a request arrived, and the name it got.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrival {
    pub id: RequestId,
    pub received_at: Timestamp,
    /// The monotonic clock at that moment; the timeline counts from here.
    pub anchor_us: u64,
    /// Chooses among weighted targets.
    pub seed: u64,
}

pub(crate) fn arrive(clock: &dyn Clock) -> Arrival {
    let received_at = clock.now();
    let mut random = [0; 18];
    getrandom::fill(&mut random).expect("the operating system gives random numbers");
    let [id @ .., a, b, c, d, e, f, g, h] = random;
    Arrival {
        id: RequestId::new(received_at, id),
        received_at,
        anchor_us: clock.monotonic_us(),
        seed: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
    }
}

pub(crate) fn path_of<B>(request: &Request<B>) -> &str {
    request.uri().path_and_query().map_or("/", |path| path.as_str())
}

/// The request's path and query, if the head is one that can be proxied.
pub(crate) fn check<'a>(head: &'a Parts, limits: &Limits) -> Result<&'a str, Refusal> {
    if head.method == Method::CONNECT {
        return Err(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "CONNECT is not served here"));
    }
    if head.headers.contains_key(UPGRADE) && !head.headers.get_all(UPGRADE).iter().all(|to| to == "h2c") {
        let message = "upgrades such as websocket are not metered and not served; use HTTP requests and event streams";
        return Err(Refusal::new(StatusCode::NOT_IMPLEMENTED, message));
    }
    let length = head.headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|bytes| usize::try_from(bytes).map_or(true, |bytes| bytes > limits.body_bytes_max)) {
        return Err(too_large(limits));
    }
    // In HTTP/2 every request names an authority; in HTTP/1 only one that is meant for a forward proxy does.
    let absolute_form_allowed = head.version == Version::HTTP_2;
    check_target(&head.uri, absolute_form_allowed).map_err(|reason| Refusal::new(StatusCode::BAD_REQUEST, reason))
}

/// The answer to a body that takes too long, byte by byte or altogether.
pub(crate) fn too_slow() -> Refusal {
    Refusal::new(StatusCode::REQUEST_TIMEOUT, "the request body did not arrive in time")
}

fn too_large(limits: &Limits) -> Refusal {
    let message = format!("the request body is larger than {} bytes", limits.body_bytes_max);
    Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, message)
}

/// Reads the whole body, within bounds of size and silence. One that came in one piece is not copied.
pub(crate) async fn body(mut body: Incoming, limits: &Limits) -> Result<Bytes, Refusal> {
    let idle = Duration::from_millis(limits.stream_idle_ms_max);
    let expected = body.size_hint().exact().and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(0);
    let mut first = Bytes::new();
    let mut whole = BytesMut::new();
    while !body.is_end_stream() {
        let Ok(frame) = tokio::time::timeout(idle, body.frame()).await else {
            return Err(too_slow());
        };
        let Some(frame) = frame else { break };
        let frame = frame.map_err(|_| Refusal::new(StatusCode::BAD_REQUEST, "the request body broke off"))?;
        let Ok(chunk) = frame.into_data() else { continue };
        if first.len() + whole.len() + chunk.len() > limits.body_bytes_max {
            return Err(too_large(limits));
        }
        if first.is_empty() && whole.is_empty() {
            first = chunk;
            continue;
        }
        if whole.is_empty() {
            whole.reserve(expected.min(BODY_BYTES_TRUSTED).max(first.len() + chunk.len()));
            whole.extend_from_slice(&std::mem::take(&mut first));
        }
        whole.extend_from_slice(&chunk);
    }
    Ok(if whole.is_empty() { first } else { whole.freeze() })
}

pub(crate) fn content_type(headers: &HeaderMap) -> Option<&str> {
    headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok())
}

/// Whether the client asked to be told the cost with the answer.
pub(crate) fn wants_cost(headers: &HeaderMap) -> bool {
    let values = headers.get_all("x-farthing-report").iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|word| word.trim().eq_ignore_ascii_case("cost"))
}

/// Whether the client reads trailers: it says so, or it speaks HTTP/2 and says so there.
pub(crate) fn takes_trailers(head: &Parts) -> bool {
    let values = head.headers.get_all(TE).iter().filter_map(|value| value.to_str().ok());
    let mut words = values.flat_map(|value| value.split(','));
    head.version >= Version::HTTP_11 && words.any(|word| word.trim().eq_ignore_ascii_case("trailers"))
}

/// The answer to a request that nothing serves.
pub(crate) fn unrouted(request: &Inspected) -> Refusal {
    let message = match request.model.as_deref().and_then(label) {
        Some(model) => format!("no route or upstream serves model `{model}` on this path"),
        None => "no upstream serves this path".to_owned(),
    };
    Refusal::new(StatusCode::NOT_FOUND, message)
}
