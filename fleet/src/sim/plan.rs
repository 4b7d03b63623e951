//! What is played: the policy and what it may do, how replicas start and fail, what they cost, what is judged.

use std::sync::Arc;

use ledger::GpuHourRate;

use super::failure::{Failures, Faults};
use super::startup::Startup;
use crate::scale::{Bounds, Guards, Objective, Policy};

/// What a GPU costs for an hour.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prices {
    /// On demand.
    pub on_demand: GpuHourRate,
    /// Committed: paid whether it is used or not.
    pub committed: GpuHourRate,
}

impl Default for Prices {
    /// One dollar for either, so that dollars are GPU-hours.
    fn default() -> Prices {
        let dollar = GpuHourRate::from_pico(1_000_000_000_000);
        Prices { on_demand: dollar, committed: dollar }
    }
}

/// Which decisions are kept with their reasons.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Log {
    /// None.
    None,
    /// Those that change the number of replicas, or that a guard changed for the first time.
    #[default]
    Changes,
    /// Every one.
    All,
}

/// A deployment and who decides about it, without its engines.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Who decides.
    pub policy: Policy,
    /// What holds it back.
    pub guards: Guards,
    /// Between which numbers, and what one replica can do.
    pub bounds: Bounds,
    /// What users were promised.
    pub objective: Objective,
    /// GPUs of one replica.
    pub gpus: u32,
    /// What they cost.
    pub prices: Prices,
    /// How replicas start.
    pub startup: Startup,
    /// What goes wrong by chance.
    pub failures: Failures,
    /// What goes wrong by the clock.
    pub faults: Faults,
    /// Seconds between decisions.
    pub decide_every_s: f64,
    /// Replicas that serve at the start; `None` for the static plan's.
    pub initial: Option<u32>,
    /// Load of each minute before the start, oldest first, as far as it is known.
    pub history: Arc<[f32]>,
    /// Seconds since the start from which costs and misses count. What comes before is only learnt from.
    pub judge_from_s: f64,
    /// Requests in the batch at load 0.5, as a part of those at load 1; only the fluid mode needs to be told, and
    /// [`super::fluid::batch_at_half`] measures it. Less than a half: the fuller a batch is, the longer each of its steps takes.
    pub batch_at_half: f64,
    /// Part of its KV cache that a replica uses at load 1; only the fluid mode needs to be told.
    pub kv_at_capacity: f64,
    /// Seconds that a replica needs to finish what it has; only the fluid mode needs to be told.
    pub drain_s: f64,
    /// Which decisions are kept.
    pub log: Log,
    /// What chance is drawn from.
    pub seed: u64,
}

impl Plan {
    /// A deployment with everything else as usual: one GPU a replica, a start of five minutes (which `bounds.cold_start_s`
    /// is set to), nothing that fails, a decision every ten seconds, everything judged.
    #[must_use]
    pub fn new(policy: Policy, bounds: Bounds) -> Plan {
        let startup = Startup::default();
        Plan {
            policy,
            guards: Guards::default(),
            bounds: Bounds { cold_start_s: startup.usual_s(), ..bounds },
            objective: Objective::default(),
            gpus: 1,
            prices: Prices::default(),
            startup,
            failures: Failures::default(),
            faults: Faults::default(),
            decide_every_s: 10.0,
            initial: None,
            history: Arc::from([]),
            judge_from_s: 0.0,
            batch_at_half: 0.25,
            kv_at_capacity: 0.7,
            drain_s: 30.0,
            log: Log::default(),
            seed: 1,
        }
    }
}
