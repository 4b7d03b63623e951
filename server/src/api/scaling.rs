//! The API's calls about scaling: how each deployment stands, the switch that stops it, and what was given back.

use axum::Json;
use axum::extract::State as Shared;
use axum::extract::rejection::JsonRejection;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::error::ErrorBody;
use super::fleet::read;
use super::parameters::{Query, Span, period};
use super::{ApiError, State};
use crate::scaling::{self, GivenBackRow, Shown};

/// What is to be stopped or to go on.
#[derive(Debug, Clone, Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Which {
    /// One deployment; everything when absent.
    pub deployment: Option<String>,
}

/// What is scaled.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Stand {
    /// Every deployment as it stands, by pool and name.
    pub deployments: Vec<Shown>,
}

/// Every deployment that is scaled: its replicas, what was last decided and why, and what stops it.
#[utoipa::path(get, path = "/api/v1/scaling", tag = "scaling", responses((status = 200, body = Stand)))]
pub async fn scaling(Shared(state): Shared<State>) -> Json<Stand> {
    Json(stand(&state))
}

/// Stops carrying out decisions, of one deployment or of all: replicas stay as they are. Decisions go on being written down. Kept
/// across restarts.
#[utoipa::path(post, path = "/api/v1/scaling/stop", tag = "scaling", request_body = Which,
    responses((status = 200, body = Stand), (status = 404, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub async fn stop(
    Shared(state): Shared<State>,
    body: Result<Json<Which>, JsonRejection>,
) -> Result<Json<Stand>, ApiError> {
    turn(&state, &read(body)?, true)
}

/// Carries decisions out again, of one deployment or of all.
#[utoipa::path(post, path = "/api/v1/scaling/resume", tag = "scaling", request_body = Which,
    responses((status = 200, body = Stand), (status = 404, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub async fn resume(
    Shared(state): Shared<State>,
    body: Result<Json<Which>, JsonRejection>,
) -> Result<Json<Stand>, ApiError> {
    turn(&state, &read(body)?, false)
}

/// What was given back against the static plan, for each deployment and mode: the plan's cost is the actual cost and what was given
/// back, exactly.
#[utoipa::path(get, path = "/api/v1/scaling/given-back", tag = "scaling", params(Span),
    responses((status = 200, body = Vec<GivenBackRow>), (status = 400, body = ErrorBody)))]
pub async fn given_back(
    Shared(state): Shared<State>,
    Query(span): Query<Span>,
) -> Result<Json<Vec<GivenBackRow>>, ApiError> {
    let period = period(span.from.as_deref(), span.to.as_deref())?;
    Ok(Json(scaling::given_back(&state.store.session().await?, period).await?))
}

fn turn(state: &State, which: &Which, stop: bool) -> Result<Json<Stand>, ApiError> {
    let switch = &state.scaling.switch;
    let one = |of| if stop { switch.stop(of) } else { switch.resume(of) };
    let not_kept = |error: std::io::Error| {
        let done = if stop { "it is stopped, and a restart would forget it" } else { "nothing changed" };
        ApiError::unavailable(format!("the switch could not be kept: {error}; {done}"))
    };
    match &which.deployment {
        None => one(None).map_err(not_kept)?,
        Some(name) => {
            let named = state.scaling.board.named(name);
            if named.is_empty() {
                return Err(ApiError::not_found(format!("no deployment `{name}` is scaled")));
            }
            for of in &named {
                one(Some(of)).map_err(not_kept)?;
            }
        }
    }
    Ok(Json(stand(state)))
}

fn stand(state: &State) -> Stand {
    let mut deployments = state.scaling.board.all();
    // As the switch is now, not as it was at the last decision.
    for shown in &mut deployments {
        let of = gateway::Deployment { pool: shown.pool.as_str().into(), name: shown.deployment.as_str().into() };
        shown.stopped_by = state.scaling.switch.stopped(&of);
    }
    Stand { deployments }
}
