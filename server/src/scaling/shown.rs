//! What people and metrics are shown of scaling: each deployment as it stands and its last decisions.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fleet::sim::capacity::Capacity;
use gateway::Deployment;
use ledger::{ScalingDecision, ScalingMode};
use serde::Serialize;
use serde_json::{Value, json};
use utoipa::ToSchema;

use super::carry::Carried;
use super::plan::Plan;
use super::switch::Why;

/// Decisions that are kept to be shown; all of them are in the ledger.
const DECISIONS_MAX: usize = 20;

/// All deployments that are scaled. Cheap to clone; all clones are one.
#[derive(Debug, Clone, Default)]
pub struct Board(Arc<Mutex<BTreeMap<Deployment, Shown>>>);

/// One deployment.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub struct Shown {
    /// The pool that pays for its replicas.
    pub pool: String,
    /// The deployment.
    pub deployment: String,
    /// `shadow`, `act` or `stopped`.
    #[schema(value_type = String)]
    pub mode: ScalingMode,
    /// What holds the kill switch: `api` or `file`; `null` where nothing does.
    #[schema(value_type = Option<String>)]
    pub stopped_by: Option<Why>,
    /// The policy with its parameters.
    pub policy: String,
    /// The kind of actuator.
    pub actuator: String,
    /// Fewest replicas.
    pub floor: u32,
    /// Most replicas.
    pub ceiling: u32,
    /// What the plan without scaling has.
    pub static_replicas: u32,
    /// Replicas that are paid for in any case.
    pub committed: u32,
    /// Replicas that serve.
    pub ready: u32,
    /// Replicas on their way.
    pub pending: u32,
    /// Replicas that finish what they have.
    pub draining: u32,
    /// What should be there; `null` before the first decision.
    pub desired: Option<u32>,
    /// What was asked for last; `null` while nobody knows.
    pub asked: Option<u32>,
    /// What is being told.
    pub telling: Option<u32>,
    /// What went wrong last.
    pub failure: Option<String>,
    /// Tries to tell the actuator that failed.
    pub failures: u64,
    /// What was told and done.
    pub told: u64,
    /// What somebody else asked for and is respected for now.
    pub manual_replicas: Option<u32>,
    /// What one replica can do.
    pub capacity: Option<Reach>,
    /// The last decisions, the newest first, as the table `decisions` has them.
    #[schema(value_type = Vec<Object>)]
    pub decisions: VecDeque<ScalingDecision>,
}

/// What one replica can do under the objective.
#[derive(Debug, Clone, Copy, Default, Serialize, ToSchema)]
pub struct Reach {
    /// Requests a second of the usual mix.
    pub requests_per_s: f64,
    /// Input tokens a second.
    pub input_tokens_per_s: f64,
    /// Output tokens a second.
    pub output_tokens_per_s: f64,
    /// Requests in the batch.
    pub batch: f64,
}

impl Shown {
    /// A deployment right after a decision.
    #[must_use]
    pub fn of(
        plan: &Plan,
        capacity: &Capacity,
        carried: &Carried,
        decision: &ScalingDecision,
        stopped_by: Option<Why>,
    ) -> Shown {
        Shown {
            mode: decision.mode,
            stopped_by,
            ready: decision.ready,
            pending: decision.pending,
            draining: u32::try_from(carried.draining.len()).unwrap_or(u32::MAX),
            desired: Some(decision.desired),
            asked: carried.asked,
            telling: carried.order.as_ref().map(|order| order.replicas),
            failure: decision.failure.clone(),
            failures: carried.failures,
            told: carried.done,
            manual_replicas: carried.manual.map(|change| change.replicas),
            capacity: Some(Reach {
                requests_per_s: capacity.requests_per_s,
                input_tokens_per_s: capacity.input_tokens_per_s,
                output_tokens_per_s: capacity.output_tokens_per_s,
                batch: capacity.batch,
            }),
            decisions: VecDeque::from([decision.clone()]),
            ..Shown::planned(plan)
        }
    }

    fn planned(plan: &Plan) -> Shown {
        Shown {
            pool: plan.id.pool.to_string(),
            deployment: plan.id.name.to_string(),
            mode: plan.mode,
            policy: plan.policy.to_string(),
            actuator: plan.actuator.kind().to_owned(),
            floor: plan.bounds.floor,
            ceiling: plan.bounds.ceiling,
            static_replicas: plan.bounds.static_replicas,
            committed: plan.bounds.committed,
            ..Shown::default()
        }
    }

    /// The deployment in one line of the live page.
    #[must_use]
    pub fn line(&self) -> Value {
        json!({
            "deployment": self.deployment, "pool": self.pool, "mode": self.mode, "stopped_by": self.stopped_by,
            "ready": self.ready, "pending": self.pending, "desired": self.desired, "static_replicas": self.static_replicas,
            "load": self.load_milli().map(|milli| ledger::decimal::format_scaled(milli.into(), 3, 1)),
            "reason": self.decisions.front().and_then(|decision| decision.reasons.first()), "failure": self.failure,
        })
    }

    /// The load that the last decision saw, in replicas.
    #[must_use]
    pub fn load_milli(&self) -> Option<u64> {
        self.decisions.front()?.inputs.load_milli
    }

    /// The load that the last decision expected, in replicas.
    #[must_use]
    pub fn forecast_milli(&self) -> Option<u64> {
        self.decisions.front()?.inputs.forecast_milli
    }
}

impl Board {
    /// A deployment was decided about.
    pub fn decided(&self, of: &Deployment, mut shown: Shown) {
        let mut board = self.lock();
        if let Some(before) = board.remove(of) {
            shown.decisions.extend(before.decisions);
            shown.decisions.truncate(DECISIONS_MAX);
        }
        board.insert(of.clone(), shown);
    }

    /// A deployment cannot be decided about, and why.
    pub fn not_yet(&self, plan: &Plan, why: &str) {
        let shown = Shown { failure: Some(why.to_owned()), ..Shown::planned(plan) };
        self.lock().insert(plan.id.clone(), shown);
    }

    /// Every deployment, by pool and name.
    #[must_use]
    pub fn all(&self) -> Vec<Shown> {
        self.lock().values().cloned().collect()
    }

    /// The deployments of this name: one in each pool that has it.
    #[must_use]
    pub fn named(&self, name: &str) -> Vec<Deployment> {
        self.lock().keys().filter(|of| *of.name == *name).cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Deployment, Shown>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
