//! Requests that nothing takes now: they wait, in bounds of number, time and memory, until something does. This is how the first
//! request survives a deployment that was scaled to zero.

use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::Duration;

use http::{Method, StatusCode};

use crate::availability::{Deployment, Held};
use crate::metrics::Metrics;
use crate::pipeline::exchange::{Asked, time_left};
use crate::pipeline::receive;
use crate::plan::{Plan, Target};
use crate::refusal::Refusal;
use crate::settings::Upstream;

/// What a refused client is told to wait. A replica takes longer to start, but it was asked for already, and who comes back
/// early is held again.
const RETRY_AFTER_S: u64 = 5;

/// Whether a request only looks. A look is no reason to start a replica, so it neither waits nor counts as demand.
pub(crate) fn only_looks(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS)
}

/// Plans until there is somewhere to go, and waits in between. Nothing is recorded meanwhile: what was not sent used nothing.
///
/// # Errors
/// A refusal with status 503 when there is no room to wait, when it took too long, or when the gateway stops.
pub(crate) async fn until_served(asked: &Asked) -> Result<Vec<Target>, Refusal> {
    let (board, limits) = (&asked.core.board, &asked.settings.limits);
    let patience = Duration::from_millis(limits.hold_ms_max).min(time_left(asked));
    let mut too_late = std::pin::pin!(tokio::time::sleep(patience));
    let mut gone = std::future::poll_fn(|_| {
        // Whoever sets it has the request polled again, or dropped.
        if asked.gone.load(Ordering::Relaxed) { Poll::Ready(()) } else { Poll::Pending }
    });
    let mut place = None;
    loop {
        // Listened first and looked afterwards, so that no change falls between the two.
        let changed = board.changed().notified();
        let wanted = match asked.plan() {
            Plan::Try { targets, .. } => return Ok(targets),
            Plan::Wait(wanted) => wanted,
            Plan::Nowhere => return Err(receive::unrouted(&asked.inspected)),
        };
        if board.is_closed() {
            return Err(asleep(&wanted, "and this gateway is stopping"));
        }
        if only_looks(&asked.method) {
            return Err(asleep(&wanted, "and a request that only reads does not wake it"));
        }
        if place.is_none() {
            place = Some(wait(asked, &wanted)?);
        }
        tokio::select! {
            biased;
            () = &mut gone => return Err(asleep(&wanted, "and its client went away")),
            () = &mut too_late => return Err(asleep(&wanted, "and did not come in time")),
            () = changed => {}
        }
    }
}

/// A place among those that wait. It is given back when this is dropped.
struct Waiting<'a> {
    metrics: &'a Metrics,
    _held: Held,
}

fn wait<'a>(asked: &'a Asked, wanted: &Upstream) -> Result<Waiting<'a>, Refusal> {
    if !asked.body.is_kept() {
        return Err(asleep(wanted, "and there is no room to keep the request until it comes"));
    }
    let deployment = Deployment::of(wanted);
    let held = asked.core.board.hold(&deployment, asked.settings.limits.hold_requests_max);
    let held = held.ok_or_else(|| asleep(wanted, "and too many requests wait for it"))?;
    let metrics = &asked.core.metrics;
    metrics.holds.up();
    metrics.held.up();
    tracing::debug!(request = %asked.arrival.id, pool = %deployment.pool, deployment = %deployment.name, "held");
    Ok(Waiting { metrics, _held: held })
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.metrics.held.down();
    }
}

fn asleep(wanted: &Upstream, why: &str) -> Refusal {
    let Deployment { name, .. } = Deployment::of(wanted);
    let mut refusal =
        Refusal::new(StatusCode::SERVICE_UNAVAILABLE, format!("`{name}` takes no requests now, {why}; try again"));
    refusal.retry_after_s = Some(RETRY_AFTER_S);
    refusal
}
