//! What a scaler decided and why, as facts: every decision with what it saw, so that anybody can ask later why a GPU was
//! there or was given back.

mod given_back;

use serde::{Deserialize, Serialize};

use crate::context::Label;
use crate::money::GpuHourRate;
use crate::time::Timestamp;

pub use given_back::{Decided, GivenBack, Part, given_back};

/// What a decision was made for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScalingMode {
    /// Only to be written down: nobody was told to do anything.
    #[default]
    Shadow,
    /// To be carried out.
    Act,
    /// The kill switch is on: decided and written down, carried out by nobody.
    Stopped,
}

impl ScalingMode {
    /// Every mode.
    pub const ALL: [ScalingMode; 3] = [ScalingMode::Shadow, ScalingMode::Act, ScalingMode::Stopped];

    /// The name used in tables and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            ScalingMode::Shadow => "shadow",
            ScalingMode::Act => "act",
            ScalingMode::Stopped => "stopped",
        }
    }
}

/// One decision about the replicas of one deployment.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScalingDecision {
    /// The pool that pays for the replicas.
    pub pool: Label,
    /// What is scaled: engines that serve the same thing.
    pub deployment: Label,
    /// When it was decided.
    pub at: Timestamp,
    /// Whether it was to be carried out.
    pub mode: ScalingMode,
    /// The policy with its parameters.
    pub policy: Label,
    /// Replicas that served.
    pub ready: u32,
    /// Replicas that were started and did not serve yet.
    pub pending: u32,
    /// What the policy wanted before any guard.
    pub wanted: u32,
    /// What came out behind the guards.
    pub desired: u32,
    /// What the actuator was told; `None` when it was told nothing.
    pub told: Option<u32>,
    /// What the static plan would have running.
    pub static_replicas: u32,
    /// Replicas that are paid for whether they run or not.
    pub committed: u32,
    /// GPUs of one replica.
    pub gpus: u32,
    /// The price of one GPU for an hour.
    pub rate: GpuHourRate,
    /// Why, one sentence each, the policy's reasons first.
    pub reasons: Vec<String>,
    /// The guards that changed the outcome, by name.
    pub guards: Vec<Label>,
    /// What was seen.
    pub inputs: ScalingInputs,
    /// What went wrong when it was carried out.
    pub failure: Option<String>,
}

/// What a decision was made from. Unknown is `None`, never zero.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ScalingInputs {
    /// Requests in the batches of all replicas.
    pub running: Option<u32>,
    /// Requests that wait, at engines and in front of them.
    pub waiting: Option<u32>,
    /// Mean part of the KV cache in use, millionths.
    pub kv_used: Option<u32>,
    /// Arriving work in thousandths of what one replica can do under the objective.
    pub load_milli: Option<u64>,
    /// Predicted load for when a replica started now would serve, in the same unit.
    pub forecast_milli: Option<u64>,
    /// Requests that arrived a second, thousandths.
    pub arrivals_milli: Option<u64>,
    /// Input tokens that arrived a second.
    pub input_tokens_per_s: Option<u64>,
    /// Output tokens made a second.
    pub output_tokens_per_s: Option<u64>,
    /// The objective's percentile of the time to first token, microseconds.
    pub ttft_us: Option<u64>,
    /// The objective's percentile of the time per output token, microseconds.
    pub tpot_us: Option<u64>,
    /// Age of the oldest reading that was used, microseconds.
    pub stale_us: Option<u64>,
}
