//! What happens to a request, in order, each step with its reason. Read [`serve`] from top to bottom.

mod admit;
mod exchange;
mod hold;
mod identify;
pub(crate) mod open;
mod receive;
mod retained;

use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context as TaskContext, Poll, ready};
use std::time::Duration;

use arc_swap::ArcSwap;
use futures_util::future::BoxFuture;
use http::{HeaderValue, Request, Response, StatusCode};
use hyper::body::Incoming;
use ledger::price::PriceBook;
use ledger::{Clock, RequestId};

pub(crate) use self::exchange::Asked;
pub(crate) use self::open::Open;
pub(crate) use self::retained::Room;
use crate::answer::Answer;
use crate::aside;
use crate::attribute::{BodySays, attribute};
use crate::availability::Board;
use crate::background::Background;
use crate::journal::Journal;
use crate::keys::KeyRing;
use crate::metrics::Metrics;
use crate::plan::Plan;
use crate::refusal::Refusal;
use crate::running::Registry;
use crate::settings::{OnClientAbort, Settings};
use crate::surface::{self, Dialect};
use crate::upstream::{Outbound, forwarded};

/// What every request shares.
pub(crate) struct Core {
    pub settings: Arc<ArcSwap<Settings>>,
    pub keys: Arc<ArcSwap<KeyRing>>,
    pub prices: Arc<ArcSwap<PriceBook>>,
    pub journal: Arc<dyn Journal>,
    pub clock: Arc<dyn Clock>,
    pub metrics: Metrics,
    pub outbound: Outbound,
    pub background: Background,
    pub running: Arc<Registry>,
    pub room: Arc<Room>,
    pub board: Board,
}

/// Answers one request. Every path through here ends in a response: an upstream's, or a refusal of ours.
pub(crate) async fn serve(core: Arc<Core>, peer: IpAddr, request: Request<Incoming>) -> Response<Answer> {
    core.metrics.requests.up();
    let arrival = receive::arrive(&*core.clock);
    // Until the body is read, the path alone says whose error shape the client understands.
    let mut dialect = surface::inspect(request.method(), receive::path_of(&request), None, b"").dialect;
    let answered = pass(&core, peer, arrival, request, &mut dialect).await;
    let mut response = answered.unwrap_or_else(|refusal| {
        core.metrics.refused.up();
        tracing::debug!(request = %arrival.id, status = refusal.status.as_u16(), reason = %refusal.message, "refused");
        refusal.response(dialect, arrival.id).map(Answer::whole)
    });
    response.headers_mut().insert("x-farthing-request-id", id_header(arrival.id));
    response
}

async fn pass(
    core: &Arc<Core>,
    peer: IpAddr,
    arrival: receive::Arrival,
    request: Request<Incoming>,
    dialect: &mut Dialect,
) -> Result<Response<Answer>, Refusal> {
    // One snapshot for the whole request: a reload in the middle changes nothing for it.
    let settings = core.settings.load_full();

    // Receive the head: what cannot be put behind a base URL goes no further.
    let (head, body) = request.into_parts();
    let path = receive::check(&head, &settings.limits)?;

    // Identify before the body is read, so that a stranger costs no memory.
    let caller = identify::identify(&head, core.keys.load().as_ref(), settings.anonymous, peer, arrival.received_at)?;

    // Receive the body, whole: routing needs the model in it, and a retry needs it again.
    let receiving = receive::body(body, &settings.limits);
    let whole = Duration::from_millis(settings.limits.request_ms_max);
    let body = tokio::time::timeout(whole, receiving).await.unwrap_or_else(|_| Err(receive::too_slow()))?;

    // Inspect what is asked. A body that is not what it says it is would be metered wrongly, so it is not sent on.
    let inspect = || surface::inspect(&head.method, path, receive::content_type(&head.headers), &body);
    let inspected = aside::reading(body.len(), inspect);
    *dialect = inspected.dialect;
    if let Some(reason) = &inspected.malformed {
        return Err(Refusal::new(StatusCode::BAD_REQUEST, format!("the request body is not usable: {reason}")));
    }

    // Attribute it: the key says on whom it is booked, and what else its holder may say.
    let says = BodySays { end_user: inspected.end_user.as_deref(), metadata: &inspected.metadata };
    let context = attribute(caller.key.as_deref(), &head.headers, says);

    // Admit it. Scopes are checked here; limits and budget holds will be, for every surface alike.
    let now_us = core.clock.monotonic_us().saturating_sub(arrival.anchor_us);
    let admitted = admit::admit(caller.key.as_deref(), &head.method, path, &inspected, now_us)?;

    // Keep what the attempts need.
    let keep = !inspected.streamed || settings.on_client_abort == OnClientAbort::Drain;
    let gone = Arc::new(AtomicBool::new(false));
    let body = core.room.keep(body, settings.limits.retained_bytes_max);
    let asked = Asked {
        core: Arc::clone(core),
        headers: forwarded(&head.headers, caller.presented.as_deref()),
        reports_cost: receive::wants_cost(&head.headers),
        takes_trailers: receive::takes_trailers(&head),
        path: path.to_owned(),
        method: head.method,
        settings,
        arrival,
        inspected,
        context,
        admitted,
        body,
        gone: Arc::clone(&gone),
        key: caller.key,
    };

    // Plan where to try, in which order. What it would go to if all were there hears of it, so that it is there next time.
    let targets = match asked.plan() {
        Plan::Nowhere => return Err(receive::unrouted(&asked.inspected)),
        Plan::Wait(wanted) => {
            asked.arrived_for(&wanted);
            None
        }
        Plan::Try { targets, wanted } => {
            asked.arrived_for(&wanted);
            Some(targets)
        }
    };

    // Exchange: wait until somebody takes it, then for each attempt open, send, meter, finish, release the end. It outlives a
    // client that hangs up, as far as that is needed to know what was used.
    let running = Some(Box::pin(exchange::exchange(asked, targets)) as Running);
    Outliving { running, core: Arc::clone(core), gone, keep }.await
}

fn id_header(id: RequestId) -> HeaderValue {
    let mut buffer = uuid::Uuid::encode_buffer();
    let text = id.uuid().hyphenated().encode_lower(&mut buffer);
    HeaderValue::from_str(text).expect("hex digits and hyphens are a header value")
}

type Running = BoxFuture<'static, Result<Response<Answer>, Refusal>>;

/// An exchange that goes on in the background when its client hangs up before the answer's head came.
///
/// It runs inside the connection's own task, so that a request costs no hop between tasks; only when that task lets
/// go of it early is it moved out.
struct Outliving {
    running: Option<Running>,
    core: Arc<Core>,
    gone: Arc<AtomicBool>,
    keep: bool,
}

impl Future for Outliving {
    type Output = Result<Response<Answer>, Refusal>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<Self::Output> {
        let running = self.running.as_mut().expect("an exchange is not polled after it ended");
        let result = ready!(running.as_mut().poll(cx));
        self.running = None;
        Poll::Ready(result)
    }
}

impl Drop for Outliving {
    fn drop(&mut self) {
        let Some(running) = self.running.take() else { return };
        self.gone.store(true, Ordering::Relaxed);
        if !self.keep {
            // Dropping the exchange cancels the upstream and books what is known.
            return;
        }
        let core = Arc::clone(&self.core);
        let bound = core.settings.load().limits.drain_ms_max;
        self.core.background.run(async move {
            core.metrics.draining.up();
            let answered = tokio::time::timeout(Duration::from_millis(bound), running).await;
            if let Ok(Ok(response)) = answered {
                response.into_body().drain().await;
            }
            core.metrics.draining.down();
        });
    }
}
