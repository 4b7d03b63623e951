//! What stands between a policy's wish and an engine: one small function for each way in which autoscalers have failed in
//! public, in the order in which they apply. A guard that changes the outcome says so, with its numbers.

mod manual;
mod metrics;
mod pace;
mod pending;
mod phases;
mod survivors;
mod zero;

#[cfg(test)]
mod laws;
#[cfg(test)]
pub(crate) mod scene;

use ledger::Timestamp;
use serde::{Deserialize, Serialize};

use super::observe::{Decision, Observation};

/// How far the guards go. Every one can be loosened; floor and ceiling always hold.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Guards {
    /// Seconds after which a look is too old to decide by; 0 turns this guard off.
    pub stale_s: f64,
    /// Seconds for which a change by somebody else is left alone; 0 turns this guard off.
    pub manual_s: f64,
    /// While replicas are on their way no more than so many times what is needed is asked for; 0 turns this guard off.
    pub cascade_factor: f64,
    /// Seconds after which a replica without a place is given up; 0 turns this guard off.
    pub give_up_s: f64,
    /// Seconds until it is tried again.
    pub retry_s: f64,
    /// Part of its capacity that a survivor of a scale-down may be filled to; 0 turns this guard off.
    pub survivors_full: f64,
    /// Whether nothing is let go while time to first token or time per output token, each by itself, misses the objective.
    pub phases_apart: bool,
    /// Seconds without a request before the last replica may go; the floor decides whether it may at all.
    pub zero_after_s: f64,
    /// Seconds for which a lower wish has to last; 0 turns this guard off.
    pub stabilise_s: f64,
    /// Most part of the replicas that is added in a minute, four in any case; 0 turns this guard off.
    pub up_per_minute: f64,
    /// Most part of the replicas that is let go in a minute, one in any case; 0 turns this guard off.
    pub down_per_minute: f64,
    /// Most changes of direction in an hour; 0 turns this guard off.
    pub direction_changes_max: u32,
}

impl Default for Guards {
    fn default() -> Guards {
        Guards {
            stale_s: 60.0,
            manual_s: 1_800.0,
            cascade_factor: 2.0,
            give_up_s: 900.0,
            retry_s: 1_800.0,
            survivors_full: 1.0,
            phases_apart: true,
            zero_after_s: 300.0,
            stabilise_s: 60.0,
            up_per_minute: 1.0,
            down_per_minute: 0.5,
            direction_changes_max: 6,
        }
    }
}

impl Guards {
    /// Floor and ceiling and nothing else.
    #[must_use]
    pub fn off() -> Guards {
        Guards {
            stale_s: 0.0,
            manual_s: 0.0,
            cascade_factor: 0.0,
            give_up_s: 0.0,
            retry_s: 0.0,
            survivors_full: 0.0,
            phases_apart: false,
            zero_after_s: 0.0,
            stabilise_s: 0.0,
            up_per_minute: 0.0,
            down_per_minute: 0.0,
            direction_changes_max: 0,
        }
    }
}

/// What is left of a decision behind the guards; always from floor to ceiling.
#[must_use]
pub fn guarded(decision: Decision, observation: &Observation, guards: &Guards, now: Timestamp) -> Decision {
    let mut draft = Draft { decision, observation, guards, now };
    // What nobody could see, or somebody else decided, is not for a policy to overrule.
    if metrics::hold_on_missing(&mut draft) || manual::respect(&mut draft) {
        return draft.within_bounds();
    }
    // Downwards: who is left has to do the work, in both phases, and has to have done so for a while.
    survivors::hold_the_load(&mut draft);
    phases::judged_apart(&mut draft);
    zero::keeps_the_first_request(&mut draft);
    pace::stabilise(&mut draft);
    pace::turn_seldom(&mut draft);
    // Upwards: what is on its way counts, what cannot come is not asked for again.
    pending::count_as_capacity(&mut draft);
    pace::limit_rate(&mut draft);
    pending::give_up(&mut draft);
    draft.within_bounds()
}

/// A decision on its way through the guards.
struct Draft<'a> {
    decision: Decision,
    observation: &'a Observation<'a>,
    guards: &'a Guards,
    now: Timestamp,
}

impl Draft<'_> {
    /// Replicas that are there or on their way.
    fn current(&self) -> u32 {
        self.observation.provisioned()
    }

    fn lowers(&self) -> bool {
        self.decision.replicas < self.current()
    }

    fn raises(&self) -> bool {
        self.decision.replicas > self.current()
    }

    /// Takes another number and says who wanted it and why.
    fn take(&mut self, guard: &'static str, replicas: u32, why: impl FnOnce() -> String) {
        if replicas == self.decision.replicas {
            return;
        }
        self.decision.replicas = replicas;
        self.decision.guards.push(guard);
        self.decision.reasons.push(format!("{}: {replicas}", why()));
    }

    /// At least so many, but never more than there are: guards keep replicas, only policies ask for new ones.
    fn keep(&mut self, guard: &'static str, replicas: u32, why: impl FnOnce() -> String) {
        let kept = replicas.min(self.current());
        if kept > self.decision.replicas {
            self.take(guard, kept, why);
        }
    }

    fn within_bounds(mut self) -> Decision {
        let bounds = &self.observation.bounds;
        let floor = bounds.floor;
        let ceiling = bounds.ceiling.max(floor);
        if self.decision.replicas < floor {
            self.take("floor", floor, || format!("the floor is {floor}"));
        } else if self.decision.replicas > ceiling {
            self.take("ceiling", ceiling, || format!("the ceiling is {ceiling}"));
        }
        self.decision
    }
}
