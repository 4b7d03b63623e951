//! What holds every policy back, each rule from a failure that others had in public and one file each.
//!
//! A guard says the least and the most that may come out, from what was observed alone, so that no order of the guards can
//! do harm and guarding twice is guarding once:
//! ```text
//! outcome = clamp(max(min(wanted, every most), every least), floor, ceiling)
//! ```
//! A least goes before a most: capacity that may be needed is kept. Which guards speak depends on the regime: a person's change
//! is followed, without metrics everything stands still, otherwise the rest.

mod manual;
mod outage;
mod pending;
mod rate;
pub mod roles;
mod stabilise;
mod survivors;
mod turns;
mod unschedulable;
mod zero;

#[cfg(test)]
mod laws;
#[cfg(test)]
pub(crate) mod scene;

use ledger::Timestamp;
use serde::{Deserialize, Serialize};

use super::earlier;
use super::observe::{Bounds, Decision, Observation, Sample};

pub use roles::{Roles, apart, judge_apart};

/// How strict the guards are. Times are seconds; 0 switches a guard off. Floor and ceiling always hold.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Guards {
    /// Nothing moves when the newest reading is older than this, or says nothing.
    pub stale_s: f64,
    /// At most so many times the load is asked for, unless somebody planned it or a forecast says so.
    pub cascade_factor: f64,
    /// How full of load those that stay may be when others are let go, 1 being all that they can do.
    pub survivors_full: f64,
    /// How full their KV caches may be then, 0 to 1.
    pub survivors_kv: f64,
    /// Requests that may wait for each of them then.
    pub survivors_waiting: f64,
    /// The part of the replicas that is added in a minute at most, four in any case.
    pub up_per_minute: f64,
    /// The part of the replicas that is let go in a minute at most, one in any case.
    pub down_per_minute: f64,
    /// For how long fewer have to be wanted.
    pub stabilise_s: f64,
    /// Turns from up to down or back that an hour may have; the last two are kept for going up.
    pub direction_changes_max: u32,
    /// After how long a replica without a place is given up.
    pub give_up_s: f64,
    /// After how many usual cold starts one is given up that has a place, or of which nobody says.
    pub give_up_cold_starts: f64,
    /// How long none beyond those that found a place is asked for then; longer each time.
    pub retry_s: f64,
    /// How long a person's change is followed.
    pub manual_s: f64,
    /// How long nothing may have come before the last replica goes.
    pub zero_after_s: f64,
}

impl Default for Guards {
    fn default() -> Guards {
        Guards {
            stale_s: 60.0,
            cascade_factor: 2.0,
            survivors_full: 1.0,
            survivors_kv: 0.95,
            survivors_waiting: 5.0,
            up_per_minute: 1.0,
            down_per_minute: 0.5,
            stabilise_s: 60.0,
            direction_changes_max: 6,
            give_up_s: 900.0,
            give_up_cold_starts: 6.0,
            retry_s: 1800.0,
            manual_s: 1800.0,
            zero_after_s: 300.0,
        }
    }
}

impl Guards {
    /// Floor and ceiling only: for a bound, not for a fleet.
    #[must_use]
    pub const fn off() -> Guards {
        Guards {
            stale_s: 0.0,
            cascade_factor: 0.0,
            survivors_full: 0.0,
            survivors_kv: 0.0,
            survivors_waiting: 0.0,
            up_per_minute: 0.0,
            down_per_minute: 0.0,
            stabilise_s: 0.0,
            direction_changes_max: 0,
            give_up_s: 0.0,
            give_up_cold_starts: 0.0,
            retry_s: 0.0,
            manual_s: 0.0,
            zero_after_s: 0.0,
        }
    }
}

/// Every guard, in the order in which they speak.
const GUARDS: [Guard; 9] = [
    Guard { name: "manual", limit: manual::limit, because: manual::because },
    Guard { name: "outage", limit: outage::limit, because: outage::because },
    Guard { name: "unschedulable", limit: unschedulable::limit, because: unschedulable::because },
    Guard { name: "pending", limit: pending::limit, because: pending::because },
    Guard { name: "rate", limit: rate::limit, because: rate::because },
    Guard { name: "survivors", limit: survivors::limit, because: survivors::because },
    Guard { name: "stabilise", limit: stabilise::limit, because: stabilise::because },
    Guard { name: "turns", limit: turns::limit, because: turns::because },
    Guard { name: "first-request", limit: zero::limit, because: zero::because },
];

/// What comes out of a decision behind the guards: always within floor and ceiling, with a sentence and a name from every guard
/// that changed it.
#[must_use]
pub fn guarded(decision: Decision, observation: &Observation, guards: &Guards, now: Timestamp) -> Decision {
    apply(decision, &View::new(observation, guards, now), &GUARDS)
}

/// One rule.
#[derive(Debug, Clone, Copy)]
struct Guard {
    name: &'static str,
    limit: fn(&View, &Decision) -> Limit,
    /// Why it may be no more, or no less.
    because: fn(&View, &Decision) -> String,
}

/// What a guard allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Limit {
    least: u32,
    most: u32,
}

impl Limit {
    const NONE: Limit = Limit { least: 0, most: u32::MAX };

    const fn least(least: u32) -> Limit {
        Limit { least, ..Limit::NONE }
    }

    const fn most(most: u32) -> Limit {
        Limit { most, ..Limit::NONE }
    }

    const fn exactly(replicas: u32) -> Limit {
        Limit { least: replicas, most: replicas }
    }
}

/// Who has the say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Regime {
    /// A person, a short while ago.
    Manual,
    /// Nobody: nothing can be seen.
    Blind,
    /// The policy within limits.
    Seeing,
}

/// An observation as the guards read it.
struct View<'a> {
    observation: &'a Observation<'a>,
    guards: &'a Guards,
    now: Timestamp,
    regime: Regime,
    /// Replicas that serve or will: without those that are given up.
    current: u32,
    /// Replicas that will never serve.
    lost: u32,
    /// Arriving load of now or of the last minute, whichever is higher; replicas.
    load: Option<f64>,
}

impl<'a> View<'a> {
    fn new(observation: &'a Observation<'a>, guards: &'a Guards, now: Timestamp) -> View<'a> {
        let lost = unschedulable::lost(observation, guards, now);
        let regime = if manual::holds(observation, guards, now) {
            Regime::Manual
        } else if outage::is_blind(observation, guards, now) {
            Regime::Blind
        } else {
            Regime::Seeing
        };
        View {
            observation,
            guards,
            now,
            regime,
            current: observation.provisioned().saturating_sub(lost),
            lost,
            load: load(observation, now),
        }
    }

    fn sees(&self) -> bool {
        self.regime == Regime::Seeing
    }

    /// The looks of the last `seconds`, oldest first.
    fn samples(&self, seconds: f64) -> &'a [Sample] {
        let since = earlier(self.now, seconds);
        let samples = self.observation.samples;
        &samples[samples.partition_point(|sample| sample.at < since)..]
    }

    /// What was decided last.
    fn last_desired(&self) -> Option<u32> {
        self.observation.decisions.last().map(|past| past.desired)
    }
}

fn apply(mut decision: Decision, view: &View, guards: &[Guard]) -> Decision {
    let wanted = decision.replicas;
    let limits: Vec<Limit> = guards.iter().map(|guard| (guard.limit)(view, &decision)).collect();
    let most = limits.iter().map(|limit| limit.most).min().unwrap_or(u32::MAX);
    let least = limits.iter().map(|limit| limit.least).max().unwrap_or(0);
    let allowed = wanted.min(most).max(least);
    let Bounds { floor, ceiling, .. } = view.observation.bounds;
    let outcome = allowed.clamp(floor, ceiling.max(floor));
    if outcome == wanted {
        return decision;
    }
    let spoke: Vec<&Guard> = guards
        .iter()
        .zip(&limits)
        .filter(|(_, limit)| {
            let lowered = limit.most == most && most < wanted;
            let raised = limit.least == least && least > wanted.min(most);
            lowered || raised
        })
        .map(|(guard, _)| guard)
        .collect();
    for guard in spoke {
        let reason = format!("{}: {}", guard.name, (guard.because)(view, &decision));
        decision.reasons.push(reason);
        decision.guards.push(guard.name);
    }
    if outcome > allowed {
        decision.reasons.push(format!("floor: never fewer than {floor}"));
        decision.guards.push("floor");
    } else if outcome < allowed {
        decision.reasons.push(format!("ceiling: never more than {ceiling}"));
        decision.guards.push("ceiling");
    }
    decision.replicas = outcome;
    decision
}

/// Arriving work in replicas, from the best reading there is.
fn demand(sample: &Sample, bounds: &Bounds) -> Option<f64> {
    let part =
        |value: Option<f64>, at_capacity: f64| value.filter(|_| at_capacity > 0.0).map(|value| value / at_capacity);
    let input = part(sample.input_tokens_per_s, bounds.input_tokens_per_s_at_capacity);
    let output = part(sample.output_tokens_per_s, bounds.output_tokens_per_s_at_capacity);
    let tokens = match (input, output) {
        (Some(input), Some(output)) => Some(input.max(output)),
        _ => None,
    };
    let arrivals = || part(sample.arrivals_per_s, bounds.requests_per_s_at_capacity);
    sample.load.or(tokens).or_else(arrivals).filter(|load| load.is_finite())
}

/// The load of the newest look or the mean of a minute, whichever is higher.
fn load(observation: &Observation, now: Timestamp) -> Option<f64> {
    let since = earlier(now, 60.0);
    let of = |sample: &Sample| demand(sample, &observation.bounds);
    let newest = observation.newest().and_then(of)?;
    let minute = observation.samples.iter().rev().take_while(|sample| sample.at > since).filter_map(of);
    let (sum, count) = minute.fold((0.0, 0.0), |(sum, count), load| (sum + load, count + 1.0));
    Some(if count > 0.0 { newest.max(sum / count) } else { newest })
}

/// Seconds from `then` to `now`.
fn seconds(now: Timestamp, then: Timestamp) -> f64 {
    now.micros_since(then) as f64 / 1e6
}
