//! The API's calls about GPUs, engines and jobs: what autoscalers, schedulers and people say of them, and what is known.

use axum::Json;
use axum::extract::State as Shared;
use axum::extract::rejection::JsonRejection;
use ledger::context::LABEL_BYTES_MAX;
use ledger::telemetry::Millionths;
use ledger::{Context, GpuHourRate, Label, PurchaseOption, Timestamp};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::error::ErrorBody;
use super::{ApiError, State};
use crate::capacity;
use crate::declared::{NotTaken, ReplicaEvent};
use crate::engines::NOT_YET;
use crate::jobs;

type Answer = Result<Json<Value>, ApiError>;
type Body<T> = Result<Json<T>, JsonRejection>;

/// What happened to a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Happened {
    /// Its GPUs are paid for from now on; its engines load.
    Started,
    /// Its engines can serve.
    Ready,
    /// Its GPUs are given back.
    Stopped,
}

/// An event of a replica.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CapacityEvent {
    /// What happened.
    pub event: Happened,
    /// The pool that pays.
    pub pool: String,
    /// The replica: GPUs that work as one.
    pub replica: String,
    /// When, RFC 3339; now when absent. The same event with the same time changes nothing when it is sent again.
    #[schema(value_type = Option<String>, example = "2026-11-20T10:00:00Z")]
    pub at: Option<Timestamp>,
    /// The GPU's name; the pool's when absent.
    #[schema(example = "H100")]
    pub gpu: Option<String>,
    /// How many GPUs; the configured replica's when absent.
    pub gpus: Option<u32>,
    /// The price of one GPU for an hour, a decimal number; the pool's when absent.
    #[schema(value_type = Option<String>, example = "2.50")]
    pub usd_per_gpu_hour: Option<GpuHourRate>,
    /// `on_demand`, `reserved`, `spot` or `owned`; the pool's when absent.
    #[schema(value_type = Option<String>)]
    pub purchase: Option<PurchaseOption>,
    /// The team that pays for what nobody used; the pool's when absent.
    pub owner: Option<String>,
    /// What the replica serves.
    pub deployment: Option<String>,
}

/// What a job says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Said {
    /// It started.
    Start,
    /// It still runs.
    Heartbeat,
    /// It stopped.
    Stop,
}

/// An event of a job: work on a pool's GPUs that is no request.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JobEvent {
    /// What it says.
    pub event: Said,
    /// Its name.
    pub job: String,
    /// The pool whose GPUs it uses.
    pub pool: String,
    /// The replica; the pool's only one when absent.
    pub replica: Option<String>,
    /// When, RFC 3339; now when absent. The same event with the same time changes nothing when it is sent again.
    #[schema(value_type = Option<String>, example = "2026-11-20T10:00:00Z")]
    pub at: Option<Timestamp>,
    /// The part of the replica that it uses at most, above 0 and at most 1; 1 when absent.
    pub share: Option<f64>,
    /// It counts as stopped when it says nothing for so many seconds; never when absent.
    pub lease_s: Option<u32>,
    /// Who caused it: `team`, `consumer`, `application`, `cost_centre`, `customer`, `feature`, `session`, `task`,
    /// `environment`, `tags`.
    #[schema(value_type = Option<Object>)]
    pub context: Option<Context>,
}

/// What an event did.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Taken {
    /// Whether anything is new: the same event sent again changes nothing.
    pub changed: bool,
    /// The replica or the job as it is now.
    #[schema(value_type = Object)]
    pub fact: Value,
}

/// Says what happened to a replica. Taken when it answers: a crash does not forget it.
#[utoipa::path(post, path = "/api/v1/capacity", tag = "fleet", request_body = CapacityEvent,
    responses((status = 200, body = Taken), (status = 400, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub async fn capacity_event(Shared(state): Shared<State>, body: Body<CapacityEvent>) -> Result<Json<Taken>, ApiError> {
    let said = read(body)?;
    let (pool, replica) = (label("pool", &said.pool)?, label("replica", &said.replica)?);
    let event = replica_event(&said)?;
    let now = state.clock.now();
    let changed = state.declared.replica((&pool, &replica), &event, said.at, now).map_err(not_taken)?;
    written(&state, now)?;
    Ok(Json(Taken { changed: changed.changed, fact: document(&changed.fact)? }))
}

/// The replicas that run.
#[utoipa::path(get, path = "/api/v1/capacity", tag = "fleet", responses((status = 200, body = Vec<Object>)))]
pub async fn capacity(Shared(state): Shared<State>) -> Answer {
    Ok(Json(state.declared.replicas().iter().map(document).collect::<Result<Vec<Value>, _>>()?.into()))
}

/// Says that a job on a pool's GPUs started, still runs, or stopped. Taken when it answers: a crash does not forget it.
#[utoipa::path(post, path = "/api/v1/jobs", tag = "fleet", request_body = JobEvent,
    responses((status = 200, body = Taken), (status = 400, body = ErrorBody), (status = 503, body = ErrorBody)))]
pub async fn job_event(Shared(state): Shared<State>, body: Body<JobEvent>) -> Result<Json<Taken>, ApiError> {
    let said = read(body)?;
    let (job, pool) = (label("job", &said.job)?, label("pool", &said.pool)?);
    let replica = match &said.replica {
        Some(replica) => label("replica", replica)?,
        None => only_replica(&state, &pool)?,
    };
    let now = state.clock.now();
    let lease_us = said.lease_s.map(|seconds| i64::from(seconds) * 1_000_000);
    if lease_us == Some(0) {
        return Err(ApiError::bad_request("`lease_s` is 0; leave it out for a job that runs until it stops"));
    }
    let changed = match said.event {
        Said::Start => {
            let (share, context) = (share(said.share)?, said.context.clone().unwrap_or_default());
            let described = jobs::Described { job, pool, replica, context, share, lease_us };
            state.declared.job_started(described, said.at, now)
        }
        Said::Heartbeat => {
            only_at_start(&[("share", said.share.is_some()), ("context", said.context.is_some())], "start")?;
            if said.at.is_some() {
                return Err(ApiError::bad_request("`at` does not belong to a heartbeat, which is of the moment"));
            }
            state.declared.job_heartbeat((&job, &replica), lease_us, now)
        }
        Said::Stop => {
            let more =
                [("share", said.share.is_some()), ("context", said.context.is_some()), ("lease_s", lease_us.is_some())];
            only_at_start(&more, "start")?;
            state.declared.job_stopped((&job, &replica), said.at, now)
        }
    };
    let changed = changed.map_err(not_taken)?;
    written(&state, now)?;
    Ok(Json(Taken { changed: changed.changed, fact: document(&changed.fact)? }))
}

/// The jobs that the API was told of and that have not stopped.
#[utoipa::path(get, path = "/api/v1/jobs", tag = "fleet", responses((status = 200, body = Vec<Object>)))]
pub async fn jobs(Shared(state): Shared<State>) -> Answer {
    Ok(Json(state.declared.jobs().iter().map(document).collect::<Result<Vec<Value>, _>>()?.into()))
}

/// Every engine on our own GPUs: what it is, the constants in force, what it said last, and what its telemetry lacks.
#[utoipa::path(get, path = "/api/v1/engines", tag = "fleet", responses((status = 200, body = Vec<Object>)))]
pub async fn engines(Shared(state): Shared<State>) -> Answer {
    let now = state.clock.now();
    let mut documents = Vec::new();
    for (fact, runs) in state.declared.engines() {
        let phase = match fact.ready_at {
            _ if !runs => "stopped",
            Some(NOT_YET) => "loading",
            _ => "running",
        };
        let ready_at = fact.ready_at.filter(|&at| at != NOT_YET);
        documents.push(json!({
            "engine": fact.engine, "pool": fact.pool, "replica": fact.replica, "model": fact.model, "state": phase,
            "since": runs.then_some(fact.period.start), "ready_at": ready_at, "kept_warm_for": fact.warm_for,
            "setup": document(&fact.setup)?, "adapters": document(&fact.adapters)?,
            "telemetry": state.telemetry.of_engine(&fact.engine, now),
        }));
    }
    Ok(Json(documents.into()))
}

/// The sources of GPU telemetry: exporters and this machine's own GPUs.
#[utoipa::path(get, path = "/api/v1/gpus", tag = "fleet", responses((status = 200, body = Vec<Object>)))]
pub async fn gpus(Shared(state): Shared<State>) -> Answer {
    Ok(Json(state.telemetry.of_gpus(state.clock.now()).into()))
}

/// The body of a call; what is wrong with it is said in one sentence.
pub(super) fn read<T>(body: Body<T>) -> Result<T, ApiError> {
    let Json(said) = body.map_err(|error| {
        let text = error.body_text();
        let text = text.split_once(": ").map_or(&*text, |(_, reason)| reason);
        ApiError::bad_request(text)
    })?;
    Ok(said)
}

/// Appends what is declared now; what was said is known to every reader once it is answered.
fn written(state: &State, now: Timestamp) -> Result<(), ApiError> {
    let facts = state.declared.observe(now);
    state.facts.append(&facts).map_err(|error| {
        state.declared.put_back(facts);
        ApiError::from(error)
    })
}

fn not_taken(error: NotTaken) -> ApiError {
    match error {
        NotTaken::Wrong(message) => ApiError::bad_request(message),
        NotTaken::NotKept(_) => ApiError::unavailable(error.to_string()),
    }
}

fn replica_event(said: &CapacityEvent) -> Result<ReplicaEvent, ApiError> {
    let described = [
        ("gpu", said.gpu.is_some()),
        ("gpus", said.gpus.is_some()),
        ("usd_per_gpu_hour", said.usd_per_gpu_hour.is_some()),
        ("purchase", said.purchase.is_some()),
        ("owner", said.owner.is_some()),
        ("deployment", said.deployment.is_some()),
    ];
    match said.event {
        Happened::Started => {
            let optional = |name: &str, text: &Option<String>| text.as_ref().map(|text| label(name, text)).transpose();
            Ok(ReplicaEvent::Started(capacity::Described {
                gpu: optional("gpu", &said.gpu)?,
                gpus: said.gpus,
                rate: said.usd_per_gpu_hour,
                purchase: said.purchase,
                owner: optional("owner", &said.owner)?,
                deployment: optional("deployment", &said.deployment)?,
            }))
        }
        Happened::Ready => only_at_start(&described, "started").map(|()| ReplicaEvent::Ready),
        Happened::Stopped => only_at_start(&described, "started").map(|()| ReplicaEvent::Stopped),
    }
}

fn only_at_start(fields: &[(&str, bool)], start: &str) -> Result<(), ApiError> {
    match fields.iter().find(|(_, given)| *given) {
        Some((name, _)) => Err(ApiError::bad_request(format!("`{name}` belongs to the event `{start}` only"))),
        None => Ok(()),
    }
}

fn label(name: &str, text: &str) -> Result<Label, ApiError> {
    let text = text.trim();
    if text.is_empty() || text.len() > LABEL_BYTES_MAX || text.chars().any(char::is_control) {
        return Err(ApiError::bad_request(format!("`{name}` has to be a name of 1 to {LABEL_BYTES_MAX} bytes")));
    }
    Ok(text.into())
}

fn share(share: Option<f64>) -> Result<Millionths, ApiError> {
    let share = share.unwrap_or(1.0);
    if !(share > 0.0 && share <= 1.0) {
        return Err(ApiError::bad_request(format!("`share` is {share}; it has to be above 0 and at most 1")));
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked above to be a share")]
    let millionths = (share * 1e6).round().max(1.0) as Millionths;
    Ok(millionths)
}

fn only_replica(state: &State, pool: &Label) -> Result<Label, ApiError> {
    let replicas = state.declared.replicas();
    let own: Vec<&Label> = replicas.iter().filter(|fact| fact.pool == *pool).map(|fact| &fact.replica).collect();
    match own.as_slice() {
        [only] => Ok((*only).clone()),
        [] => Err(ApiError::bad_request(format!("pool `{pool}` has no running replica"))),
        several => {
            let names = several.iter().map(|name| &***name).collect::<Vec<_>>().join(", ");
            Err(ApiError::bad_request(format!("pool `{pool}` has several replicas; set `replica` to one of {names}")))
        }
    }
}

fn document(fact: &impl Serialize) -> Result<Value, ApiError> {
    serde_json::to_value(fact).map_err(|error| ApiError::from(anyhow::Error::from(error)))
}
