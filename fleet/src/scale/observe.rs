//! What a policy sees, and what it answers. The simulator and the live scaler make the same values, so that what was
//! tuned on a trace is what runs.
//!
//! Demand has one unit, the *load*: how many replicas the arriving work would fill if each did as much as it can do
//! under the objective. A load of 3.2 needs four replicas and no headroom.

use ledger::Timestamp;

/// Microseconds of a bin of [`Observation::history`].
pub const HISTORY_BIN_US: i64 = 60_000_000;

/// What users were promised. A tail is the percentile that has to meet it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Objective {
    /// Time to first token, seconds.
    pub ttft_s: f64,
    /// Time per output token, seconds.
    pub tpot_s: f64,
    /// The part of all requests that has to meet both, such as 0.95.
    pub percentile: f64,
}

impl Default for Objective {
    /// 2 s to the first token and 100 ms a token for 95 % of all requests.
    fn default() -> Objective {
        Objective { ttft_s: 2.0, tpot_s: 0.1, percentile: 0.95 }
    }
}

/// One look at a deployment, over the time since the look before. Unknown is `None`, never zero.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Sample {
    /// When it was taken.
    pub at: Timestamp,
    /// Replicas that served.
    pub ready: u32,
    /// Replicas that were started and did not serve yet.
    pub pending: u32,
    /// Requests in all batches.
    pub running: Option<f64>,
    /// Requests that wait, at engines and in front of them.
    pub waiting: Option<f64>,
    /// Mean part of the ready replicas' KV caches in use, 0 to 1.
    pub kv_used: Option<f64>,
    /// Mean part of the time in which the ready replicas were in a step, 0 to 1.
    pub utilisation: Option<f64>,
    /// Requests that arrived a second.
    pub arrivals_per_s: Option<f64>,
    /// Input tokens that arrived a second, less those found in prefix caches.
    pub input_tokens_per_s: Option<f64>,
    /// Output tokens made a second.
    pub output_tokens_per_s: Option<f64>,
    /// Arriving work, in replicas.
    pub load: Option<f64>,
    /// Of that, the prefill's part, in replicas.
    pub prefill_load: Option<f64>,
    /// The objective's percentile of the time to first token, seconds.
    pub ttft_s: Option<f64>,
    /// The objective's percentile of the time per output token, seconds.
    pub tpot_s: Option<f64>,
}

/// A replica that was started and does not serve yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pending {
    /// When it was asked for.
    pub since: Timestamp,
    /// Whether it has a place to run. `None` when nobody says.
    pub scheduled: Option<bool>,
}

/// A decision that was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Past {
    /// When.
    pub at: Timestamp,
    /// What the policy wanted.
    pub wanted: u32,
    /// What came out behind the guards.
    pub desired: u32,
}

/// Replicas that were asked for by somebody else than us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ManualChange {
    /// When it was seen.
    pub at: Timestamp,
    /// What they asked for.
    pub replicas: u32,
}

/// What does not change from look to look.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bounds {
    /// Fewest replicas, always held.
    pub floor: u32,
    /// Most replicas.
    pub ceiling: u32,
    /// Replicas that are paid for whether they run or not.
    pub committed: u32,
    /// What the static plan has running.
    pub static_replicas: u32,
    /// Seconds from asking for a replica until it serves, as it usually takes.
    pub cold_start_s: f64,
    /// Requests in a batch at which one replica does as much as it can under the objective.
    pub batch_at_capacity: f64,
    /// Requests a second of the usual mix at which it does so.
    pub requests_per_s_at_capacity: f64,
    /// Input tokens a second at which it does so.
    pub input_tokens_per_s_at_capacity: f64,
    /// Output tokens a second at which it does so.
    pub output_tokens_per_s_at_capacity: f64,
}

/// Everything that a policy may look at.
#[derive(Debug, Clone, Copy)]
pub struct Observation<'a> {
    /// Looks of the last hour at most, oldest first; the last one is the newest. Empty when nothing could be seen.
    pub samples: &'a [Sample],
    /// Load in bins of [`HISTORY_BIN_US`], oldest first, the last complete one last; `NAN` where nothing is known.
    pub history: &'a [f32],
    /// Start of the first bin of `history`.
    pub history_start: Timestamp,
    /// What really comes, in bins as `history` and from `now` on: only a simulation has it, only the oracle looks at it.
    pub future: &'a [f32],
    /// Replicas that serve now.
    pub ready: u32,
    /// Replicas on their way, oldest first.
    pub pending: &'a [Pending],
    /// Replicas that finish what they have and take nothing new.
    pub draining: u32,
    /// Decisions of the last hour, oldest first.
    pub decisions: &'a [Past],
    /// The latest change by somebody else, if there was one in the last hour.
    pub manual: Option<ManualChange>,
    /// What users were promised.
    pub objective: Objective,
    /// What does not change.
    pub bounds: Bounds,
}

impl Observation<'_> {
    /// Replicas that are there or on their way: what a policy counts as capacity.
    #[must_use]
    pub fn provisioned(&self) -> u32 {
        self.ready.saturating_add(u32::try_from(self.pending.len()).unwrap_or(u32::MAX))
    }

    /// The newest look.
    #[must_use]
    pub fn newest(&self) -> Option<&Sample> {
        self.samples.last()
    }
}

/// What a policy or a guard decided.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Decision {
    /// Replicas that should be there, pending ones included.
    pub replicas: u32,
    /// Load that was predicted for when a replica started now would serve.
    pub forecast: Option<f64>,
    /// Whether somebody planned the number, such as a schedule's, so that it follows from no reading.
    pub planned: bool,
    /// Why, one sentence each with its numbers.
    pub reasons: Vec<String>,
    /// Guards that changed the outcome, by name.
    pub guards: Vec<&'static str>,
}
