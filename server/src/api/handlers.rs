//! The API's calls. Each asks the same functions as the command line.

use axum::Json;
use axum::extract::{Path, State as Shared};
use serde_json::{Value, json};

use super::error::ErrorBody;
use super::parameters::{Grouping, Listing, PriceOf, Query, Span, SqlQuery, period};
use super::{ApiError, State};
use crate::commands::key::Listed;
use crate::commands::{explain, sql as queries};
use crate::governance::Governance;
use crate::report::{Report, dimensions, report as grouped};
use crate::rows;

/// Most rows that one SQL call answers with.
const SQL_ROWS_MAX: usize = 10_000;

type Answer = Result<Json<Value>, ApiError>;

/// Cost and use by any dimensions.
#[utoipa::path(get, path = "/api/v1/report", tag = "costs", params(Grouping),
    responses((status = 200, body = Report), (status = 400, body = ErrorBody)))]
pub async fn report(Shared(state): Shared<State>, Query(of): Query<Grouping>) -> Result<Json<Report>, ApiError> {
    let by = dimensions(of.by.split(',')).map_err(ApiError::bad_request)?;
    let period = period(of.from.as_deref(), of.to.as_deref())?;
    Ok(Json(grouped(&state.store.session().await?, &by, period).await?))
}

/// The newest attempts.
#[utoipa::path(get, path = "/api/v1/attempts", tag = "facts", params(Listing),
    responses((status = 200, body = Vec<Object>), (status = 400, body = ErrorBody)))]
pub async fn attempts(Shared(state): Shared<State>, Query(of): Query<Listing>) -> Answer {
    listed(&state, "attempts", "received_at", &of).await
}

/// One request: its attempts, every term of their cost, and the postings that prove it.
#[utoipa::path(get, path = "/api/v1/attempts/{request_id}", tag = "facts",
    params(("request_id" = String, Path, description = "The `x-farthing-request-id` of its answer.")),
    responses((status = 200, body = Object), (status = 404, body = ErrorBody)))]
pub async fn attempt(Shared(state): Shared<State>, Path(request_id): Path<String>) -> Answer {
    let id = request_id.parse().map_err(|_| ApiError::bad_request(format!("`{request_id}` is not a request id")))?;
    let found = explain::document(&state.store, id).await?;
    found.map(Json).ok_or_else(|| ApiError::not_found(format!("the ledger has no request {id}")))
}

/// The newest postings.
#[utoipa::path(get, path = "/api/v1/postings", tag = "facts", params(Listing),
    responses((status = 200, body = Vec<Object>), (status = 400, body = ErrorBody)))]
pub async fn postings(Shared(state): Shared<State>, Query(of): Query<Listing>) -> Answer {
    listed(&state, "postings", "period_start", &of).await
}

async fn listed(state: &State, table: &str, time: &str, of: &Listing) -> Answer {
    let period = period(of.from.as_deref(), of.to.as_deref())?;
    let limit = of.limit.unwrap_or(100);
    if !(1..=1_000).contains(&limit) {
        return Err(ApiError::bad_request("limit is from 1 to 1000"));
    }
    let mut conditions = vec![rows::within(time, period)];
    for (column, value) in [("team", &of.team), ("model", &of.model)] {
        conditions.extend(value.as_ref().map(|value| format!("{column} = {}", rows::literal(value))));
    }
    let query = format!("SELECT * FROM {table} WHERE {} ORDER BY {time} DESC LIMIT {limit}", conditions.join(" AND "));
    Ok(Json(queries::documents(&state.store.sql(&query).await?)?.into()))
}

/// What each pool of GPUs cost, and how much of it nothing has allocated yet.
#[utoipa::path(get, path = "/api/v1/pools", tag = "costs", params(Span),
    responses((status = 200, body = Vec<Object>), (status = 400, body = ErrorBody)))]
pub async fn pools(Shared(state): Shared<State>, Query(span): Query<Span>) -> Answer {
    let period = period(span.from.as_deref(), span.to.as_deref())?;
    Ok(Json(crate::live::pools(&state.store.session().await?, period).await?.into()))
}

/// Whether the books balance.
#[utoipa::path(get, path = "/api/v1/verify", tag = "proof", responses((status = 200, body = Object)))]
pub async fn verify(Shared(state): Shared<State>) -> Answer {
    let verification = state.store.verify(&|_| {}).await?;
    let mut document = serde_json::to_value(&verification).map_err(anyhow::Error::from)?;
    document["clean"] = verification.is_clean().into();
    Ok(Json(document))
}

/// All virtual keys, without their secrets.
#[utoipa::path(get, path = "/api/v1/keys", tag = "governance", responses((status = 200, body = Vec<Listed>)))]
pub async fn keys(Shared(state): Shared<State>) -> Result<Json<Vec<Listed>>, ApiError> {
    let governance = Governance::load(&state.store.control()).await?;
    let now = state.clock.now();
    Ok(Json(governance.keys.values().map(|key| Listed::of(key, now)).collect()))
}

/// The rates of a model.
#[utoipa::path(get, path = "/api/v1/prices", tag = "governance", params(PriceOf),
    responses((status = 200, body = Object), (status = 404, body = ErrorBody)))]
pub async fn prices(Shared(state): Shared<State>, Query(of): Query<PriceOf>) -> Answer {
    let at = match of.at.as_deref() {
        Some(text) => text.parse().map_err(ApiError::bad_request)?,
        None => state.clock.now(),
    };
    let book = state.prices.load();
    let cards = book.show(&of.provider, &of.model, at);
    if cards.is_empty() {
        return Err(ApiError::not_found(format!("no price is known for {}/{}", of.provider, of.model)));
    }
    Ok(Json(json!({ "book": book.version(), "at": at, "cards": cards })))
}

/// SQL over the ledger. Reads only; at most 10,000 rows.
#[utoipa::path(post, path = "/api/v1/sql", tag = "facts", request_body = SqlQuery,
    responses((status = 200, body = Object), (status = 400, body = ErrorBody)))]
pub async fn sql(
    Shared(state): Shared<State>,
    body: Result<Json<SqlQuery>, axum::extract::rejection::JsonRejection>,
) -> Answer {
    use futures_util::StreamExt;
    let Json(asked) = body.map_err(|error| ApiError::bad_request(error.body_text()))?;
    let mut stream = state.store.sql_stream(&asked.query).await?;
    let mut documents = Vec::new();
    while let Some(batch) = stream.next().await {
        let batch = batch.map_err(|error| ApiError::bad_request(error.to_string()))?;
        documents.extend(queries::documents(&[batch])?);
        if documents.len() > SQL_ROWS_MAX {
            documents.truncate(SQL_ROWS_MAX);
            return Ok(Json(json!({ "rows": documents, "truncated": true })));
        }
    }
    Ok(Json(json!({ "rows": documents, "truncated": false })))
}

/// The figures of the live page.
#[utoipa::path(get, path = "/api/v1/live", tag = "costs", responses((status = 200, body = Object)))]
pub async fn live(Shared(state): Shared<State>) -> Answer {
    Ok(Json(state.cache.live(&state).await?))
}

/// Whether the server runs and loses nothing.
#[utoipa::path(get, path = "/api/v1/health", tag = "proof", responses((status = 200, body = Object)))]
pub async fn health(Shared(state): Shared<State>) -> Json<Value> {
    let lost = state.store.lost();
    Json(json!({
        "status": if lost == 0 { "ok" } else { "losing_records" },
        "version": env!("CARGO_PKG_VERSION"),
        "lost_records": lost,
        "log_position": state.store.last_position().0,
        "time": state.clock.now(),
    }))
}
