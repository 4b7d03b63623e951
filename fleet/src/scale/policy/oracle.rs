//! The oracle knows what comes. It is the bound that others are measured by, and of no use to anybody live.

use ledger::Timestamp;

use super::parameters::parameters;
use crate::scale::forecast::whole;
use crate::scale::observe::{Decision, HISTORY_BIN_US, Observation};

/// Knows the future, and has to wait for a cold start like anybody else.
///
/// ```text
/// replicas = ceil(headroom · highest load of any minute from now to now + cold start)
/// ```
/// With a headroom of 1 this is the cheapest of all plans that overload no minute and hold their replicas for whole minutes. Take the
/// replicas one above the other: the k-th is needed in the minutes whose load is above k - 1. Let it go in a gap and it costs a cold
/// start again, so it is best kept through gaps of up to a cold start and let go in longer ones; and that is what the highest load of the
/// next cold start says at every moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Oracle {
    /// Replicas for so many times the load; below 1 it takes overload on purpose.
    pub headroom: f64,
}

impl Default for Oracle {
    fn default() -> Oracle {
        Oracle { headroom: 1.0 }
    }
}

parameters!(Oracle "oracle" {
    headroom "headroom" 0.1..=4.0 "replicas for so many times the load",
});

impl Oracle {
    /// The number of replicas that the next cold start needs; what there is when nobody knows the future.
    #[must_use]
    pub fn desired(&self, observation: &Observation, now: Timestamp) -> Decision {
        if observation.future.is_empty() {
            let reasons = vec!["the oracle is only for simulations: what there is stays".into()];
            return Decision { replicas: observation.provisioned(), reasons, ..Decision::default() };
        }
        let minutes = minutes_until(last_to_decide_us(observation, now));
        let ahead = observation.future.iter().take(minutes).copied().filter(|load| load.is_finite());
        let peak = f64::from(ahead.fold(0.0, f32::max));
        let at_cold_start = observation.future.get(minutes - 1).copied().map(f64::from);
        let replicas = whole(self.headroom * peak - 1e-6);
        let reasons = vec![format!("a load of {peak:.2} comes within the next cold start, which takes {replicas}")];
        Decision { replicas, forecast: at_cold_start, reasons, ..Decision::default() }
    }
}

/// Microseconds from the start of this minute up to which minutes have to be decided about now: a replica that is asked for now serves from
/// then on, and one that is asked for with the next decision would come too late.
fn last_to_decide_us(observation: &Observation, now: Timestamp) -> i64 {
    let into_us = (now.micros() - observation.history_start.micros()).rem_euclid(HISTORY_BIN_US);
    let looks = observation.samples;
    let every_us = match looks {
        [.., before, last] => i64::try_from(last.at.micros_since(before.at)).unwrap_or(0).clamp(0, HISTORY_BIN_US),
        _ => 0,
    };
    let cold_start_us = i64::from(whole(observation.bounds.cold_start_s * 1e3)) * 1_000;
    into_us + cold_start_us + every_us.max(1)
}

/// How many minutes start before then, counted from this one.
fn minutes_until(end_us: i64) -> usize {
    usize::try_from((end_us - 1).div_euclid(HISTORY_BIN_US) + 1).unwrap_or(1).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scale::observe::{Bounds, Sample};

    fn oracle(at_s: i64, every_s: i64, future: &[f32]) -> u32 {
        let now = Timestamp::from_micros(at_s * 1_000_000);
        let look = |at_s: i64| Sample { at: Timestamp::from_micros(at_s * 1_000_000), ..Sample::default() };
        let samples = [look(at_s - every_s), look(at_s)];
        let observation = Observation {
            samples: &samples,
            history: &[],
            history_start: Timestamp::from_micros(0),
            future,
            ready: 7,
            pending: &[],
            draining: 0,
            decisions: &[],
            manual: None,
            objective: crate::scale::Objective::default(),
            bounds: bounds(),
        };
        Oracle::default().desired(&observation, now).replicas
    }

    fn bounds() -> Bounds {
        Bounds {
            floor: 0,
            ceiling: 100,
            committed: 0,
            static_replicas: 10,
            cold_start_s: 120.0,
            batch_at_capacity: 1.0,
            requests_per_s_at_capacity: 1.0,
            input_tokens_per_s_at_capacity: 1.0,
            output_tokens_per_s_at_capacity: 1.0,
        }
    }

    #[test]
    fn it_starts_in_time_and_no_sooner() {
        let future = [1.0, 1.0, 5.2, 9.0];
        // At the start of a minute the one that begins a cold start later is the last to be decided about.
        assert_eq!(oracle(600, 10, &future), 6);
        // Ten seconds before the next minute there is one more decision in time for it.
        assert_eq!(oracle(650, 10, &future), 6);
        // Five seconds before, the next decision would be too late.
        assert_eq!(oracle(655, 10, &future), 9);
        assert_eq!(oracle(600, 10, &[]), 7, "nothing is known");
    }
}
