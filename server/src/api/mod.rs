//! The admin listener: JSON API under `/api/v1`, live page, metrics and health.

mod auth;
mod error;
mod fleet;
mod handlers;
mod parameters;
mod scaling;

use std::sync::Arc;
use std::time::Duration;

use ::fleet::otlp::Receiver;
use arc_swap::ArcSwap;
use axum::Router;
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get};
use gateway::Gateway;
use ledger::Clock;
use ledger::price::PriceBook;
use serde_json::Value;
use store::Store;
use tokio::net::TcpListener;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::declared::Declared;
use crate::facts::Facts;
use crate::scaling::Scaling;
use crate::telemetry::Status;
use crate::wiring::Shutdown;
use crate::{live, metrics};

pub use error::ApiError;

/// What the handlers work with.
#[derive(Clone)]
pub struct State {
    /// The ledger.
    pub store: Store,
    /// The gateway, for its counters.
    pub gateway: Gateway,
    /// Prices as they stand.
    pub prices: Arc<ArcSwap<PriceBook>>,
    /// The bearer token, when one is set.
    pub token: Option<Arc<str>>,
    /// Where time comes from.
    pub clock: Arc<dyn Clock>,
    /// GPUs, engines and jobs as they are declared.
    pub declared: Arc<Declared>,
    /// What telemetry last said, and what it lacks.
    pub telemetry: Status,
    /// Where facts go.
    pub facts: Facts,
    /// Takes spans, when the configuration says so.
    pub spans: Option<Receiver>,
    /// Answers that many ask for at once.
    pub cache: Cache,
    /// What is scaled, and the switch that stops it.
    pub scaling: Scaling,
}

/// One answer that is kept for a moment, so that many pages and scrapers cost one query.
#[derive(Debug, Clone, Default)]
pub struct Cache(Arc<tokio::sync::Mutex<Kept>>);

#[derive(Debug, Default)]
struct Kept {
    live: Option<(u64, Value)>,
    metrics: Option<(u64, String)>,
}

impl Cache {
    /// The live page's figures: kept ones that are younger than a second, else fresh ones.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub async fn live(&self, state: &State) -> anyhow::Result<Value> {
        let mut kept = self.0.lock().await;
        let now = state.clock.monotonic_us();
        match &kept.live {
            Some((at, value)) if now.saturating_sub(*at) < 1_000_000 => Ok(value.clone()),
            _ => {
                let value = live::figures(state).await?;
                kept.live = Some((state.clock.monotonic_us(), value.clone()));
                Ok(value)
            }
        }
    }

    /// The ledger's part of the metrics: kept text that is younger than five seconds, else fresh text.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub async fn metrics(&self, state: &State) -> anyhow::Result<String> {
        let mut kept = self.0.lock().await;
        let now = state.clock.monotonic_us();
        match &kept.metrics {
            Some((at, text)) if now.saturating_sub(*at) < 5_000_000 => Ok(text.clone()),
            _ => {
                let text = metrics::ledger(state).await?;
                kept.metrics = Some((state.clock.monotonic_us(), text.clone()));
                Ok(text)
            }
        }
    }
}

#[derive(OpenApi)]
#[openapi(info(
    title = "Farthing",
    description = "The cost ledger for AI inference. Amounts are USD as decimal strings, times RFC 3339 in UTC. Where an admin \
                   token is set, every path but health wants `Authorization: Bearer TOKEN`."
))]
struct Description;

fn documented() -> OpenApiRouter<State> {
    OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(handlers::report))
        .routes(routes!(handlers::attempts))
        .routes(routes!(handlers::attempt))
        .routes(routes!(handlers::postings))
        .routes(routes!(handlers::pools))
        .routes(routes!(fleet::capacity, fleet::capacity_event))
        .routes(routes!(fleet::jobs, fleet::job_event))
        .routes(routes!(fleet::engines))
        .routes(routes!(fleet::gpus))
        .routes(routes!(scaling::scaling))
        .routes(routes!(scaling::stop))
        .routes(routes!(scaling::resume))
        .routes(routes!(scaling::given_back))
        .routes(routes!(handlers::verify))
        .routes(routes!(handlers::keys))
        .routes(routes!(handlers::prices))
        .routes(routes!(handlers::sql))
        .routes(routes!(handlers::live))
        .routes(routes!(handlers::health))
}

/// The OpenAPI document of the API, as it is served and as `docs/openapi.json` keeps it.
#[must_use]
pub fn openapi() -> utoipa::openapi::OpenApi {
    let mut document = documented().into_openapi();
    env!("CARGO_PKG_VERSION").clone_into(&mut document.info.version);
    document
}

/// Every path of the admin listener, each layer with its reason.
fn router(state: State) -> Router {
    let (api, _) = documented().split_for_parts();
    api.route("/api/v1/openapi.json", get(|| async { axum::Json(openapi()) }))
        .route("/metrics", get(metrics::page))
        .route("/v1/traces", any(spans))
        // Who may ask: the token, or nobody but this machine.
        .route_layer(middleware::from_fn_with_state(state.clone(), auth::required))
        // Outside of it: the page has no figures of its own, and health is for probes.
        .route("/", get(live::page))
        .route("/live.js", get(live::script))
        .route("/live.css", get(live::style))
        .route("/health", get(handlers::health))
        .fallback(|| async { ApiError::not_found("there is nothing here; the API is under /api/v1") })
        // A page that names another host is not ours to answer: it may be a rebound name in somebody's browser.
        .layer(middleware::from_fn_with_state(state.clone(), auth::same_host))
        // No query may hold a connection for ever.
        .layer(middleware::from_fn(within_time))
        .with_state(state)
}

/// Spans over OTLP/HTTP, answered in the protocol's own words.
async fn spans(axum::extract::State(state): axum::extract::State<State>, request: axum::extract::Request) -> Response {
    match &state.spans {
        Some(receiver) => receiver.serve(request).await.map(axum::body::Body::new),
        None => ApiError::not_found("spans are not taken; set telemetry.otlp = true").into_response(),
    }
}

async fn within_time(request: axum::extract::Request, next: middleware::Next) -> Response {
    match tokio::time::timeout(Duration::from_secs(120), next.run(request)).await {
        Ok(response) => response,
        Err(_) => ApiError::timed_out().into_response(),
    }
}

/// Serves until told to stop.
///
/// # Errors
/// When the listener fails.
pub async fn serve(listener: TcpListener, state: State, shutdown: Shutdown) -> anyhow::Result<()> {
    let serving = axum::serve(listener, router(state)).with_graceful_shutdown({
        let shutdown = shutdown.clone();
        async move { shutdown.requested().await }
    });
    tokio::select! {
        outcome = serving => Ok(outcome?),
        // Browsers keep connections open; they get a moment to finish.
        () = async { shutdown.requested().await; tokio::time::sleep(Duration::from_secs(2)).await } => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_document_is_the_generated_one() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/openapi.json");
        let generated = openapi().to_pretty_json().unwrap() + "\n";
        if std::env::var_os("UPDATE_OPENAPI").is_some() {
            std::fs::write(path, &generated).unwrap();
        }
        let committed = std::fs::read_to_string(path).unwrap_or_default();
        assert!(committed == generated, "docs/openapi.json is not the code's; run the tests with UPDATE_OPENAPI=1");
    }
}
