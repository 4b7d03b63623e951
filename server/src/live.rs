//! The live page: a plain view of what runs and what it costs, until the dashboard takes its place.

use std::collections::BTreeMap;

use axum::http::header;
use axum::response::IntoResponse;
use ledger::{CapacityFact, Money, Period};
use serde_json::{Value, json};
use store::Session;

use crate::api::State;
use crate::report::{Dimension, PoolBooks, report};

/// Tasks that the page shows.
const TASKS_MAX: usize = 15;

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The page itself. It holds no figures: its script asks the API for them.
pub async fn page() -> impl IntoResponse {
    asset("text/html; charset=utf-8", include_str!("live.html"))
}

/// Its script.
pub async fn script() -> impl IntoResponse {
    asset("text/javascript; charset=utf-8", include_str!("live.js"))
}

/// Its style.
pub async fn style() -> impl IntoResponse {
    asset("text/css; charset=utf-8", include_str!("live.css"))
}

fn asset(kind: &'static str, text: &'static str) -> impl IntoResponse {
    let headers = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, text)
}

/// Everything the page shows.
///
/// # Errors
/// When the ledger cannot be read.
pub async fn figures(state: &State) -> anyhow::Result<Value> {
    let store = &state.store;
    // One view for all: figures on one page that contradict one another would be worse than old ones.
    let session = &store.session().await?;
    let costs = report(session, &[Dimension::Team, Dimension::Model], Period::ALL).await?;
    let pools = with_books(session, Period::ALL, &costs.pools).await?;
    let gateway: BTreeMap<&str, u64> =
        state.gateway.metrics().snapshot().into_iter().map(|(name, value, _)| (name, value)).collect();
    Ok(json!({
        "at": state.clock.now(),
        "monotonic_us": state.clock.monotonic_us(),
        "gateway": gateway,
        "lost_records": store.lost(),
        "costs": costs,
        "tasks": tasks(session, TASKS_MAX).await?,
        "pools": pools,
        "scaling": state.scaling.board.all().iter().map(crate::scaling::Shown::line).collect::<Vec<_>>(),
    }))
}

/// The dearest tasks.
///
/// # Errors
/// When the ledger cannot be read.
pub async fn tasks(session: &Session, most: usize) -> anyhow::Result<Vec<Value>> {
    let query = format!(
        "SELECT task, min(team) AS team, min(feature) AS feature, sum(CASE WHEN attempt = 0 THEN 1 ELSE 0 END) AS requests, \
         sum(input_tokens) AS input_tokens, sum(output_tokens) AS output_tokens, \
         sum(CASE WHEN charge = 'unpriced' THEN 1 ELSE 0 END) AS without_amount, \
         sum(effective_cost) AS effective_cost FROM attempts WHERE task IS NOT NULL GROUP BY task \
         ORDER BY effective_cost DESC NULLS LAST, requests DESC, task LIMIT {most}"
    );
    crate::commands::sql::documents(&session.sql(&query).await?)
}

/// What each pool cost within the period, and what of it is booked for whom: busy, idle and why, waste, unallocated.
///
/// # Errors
/// When the ledger cannot be read.
pub async fn pools(session: &Session, period: Period) -> anyhow::Result<Vec<Value>> {
    with_books(session, period, &crate::report::pools(session, period).await?).await
}

async fn with_books(session: &Session, period: Period, books: &[PoolBooks]) -> anyhow::Result<Vec<Value>> {
    let mut capacity = Vec::new();
    for batch in session.sql("SELECT * FROM capacity").await? {
        capacity.extend(store::capacity_of(&batch)?);
    }
    Ok(by_pool(&capacity, period)
        .into_iter()
        .map(|(pool, (cost, newest))| {
            let books = books.iter().find(|books| books.pool == pool);
            // A pool of which nothing is booked yet has nothing in its books, which is known.
            let zero = Money::ZERO;
            let of = |part: fn(&PoolBooks) -> Money| books.map_or(zero, part);
            json!({
                "pool": pool, "owner": newest.owner, "gpu": newest.gpu, "gpus": newest.gpus, "usd_per_gpu_hour": newest.rate,
                "cost": cost, "booked": of(|books| books.all.cost), "unallocated": of(|books| books.unallocated.cost),
                "busy": of(|books| books.busy.cost), "idle": of(|books| books.idle.cost), "waste": of(|books| books.waste.cost),
                "books": books,
            })
        })
        .collect())
}

/// Each pool's cost and its newest fact.
fn by_pool(capacity: &[CapacityFact], period: Period) -> BTreeMap<&str, (Money, &CapacityFact)> {
    let mut pools: BTreeMap<&str, (Money, &CapacityFact)> = BTreeMap::new();
    for fact in ledger::capacity::latest(capacity) {
        let (cost, newest) = pools.entry(&fact.pool).or_insert((Money::ZERO, fact));
        *cost += ledger::settle::cost_by_minute(fact, period);
        if fact.observed_at > newest.observed_at {
            *newest = fact;
        }
    }
    pools
}
