//! The fleet that there would be if every decision had been carried out: what a scaler in shadow has to look at. A policy that
//! looks at the static plan's replicas instead takes its first step from them again and again, and never says what it would
//! have saved.

use ledger::Timestamp;

use super::earlier;
use super::observe::{Past, Pending, Sample};

/// Replicas that nobody has started.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Imagined {
    /// Those that would serve.
    pub ready: u32,
    /// Those that would be on their way, oldest first.
    pub pending: Vec<Pending>,
}

/// What the decisions of the last hour, oldest first, would have led to, were each replica to take `cold_start_s` seconds to start.
/// `None` before the first decision: then what really is there is all there is.
#[must_use]
pub fn imagined(decisions: &[Past], cold_start_s: f64, now: Timestamp) -> Option<Imagined> {
    let (first, later) = decisions.split_first()?;
    let mut ready = first.desired;
    let mut pending: Vec<Timestamp> = Vec::new();
    for past in later {
        let started = earlier(past.at, cold_start_s);
        serve(&mut ready, &mut pending, started);
        let there = ready.saturating_add(count(&pending));
        for _ in there..past.desired {
            pending.push(past.at);
        }
        for _ in past.desired..there {
            // Those that would come last go first.
            if pending.pop().is_none() {
                ready = ready.saturating_sub(1);
            }
        }
    }
    serve(&mut ready, &mut pending, earlier(now, cold_start_s));
    let pending = pending.into_iter().map(|since| Pending { since, scheduled: Some(true) }).collect();
    Some(Imagined { ready, pending })
}

impl Imagined {
    /// What a look at the real replicas would have shown of these: the same work, spread over so many.
    #[must_use]
    pub fn look(&self, really: &Sample) -> Sample {
        let factor = f64::from(really.ready) / f64::from(self.ready.max(1));
        let spread = |part: Option<f64>| part.map(|part| (part * factor).min(1.0));
        Sample {
            ready: self.ready,
            pending: count(&self.pending),
            kv_used: spread(really.kv_used),
            utilisation: spread(really.utilisation),
            ..*really
        }
    }
}

/// Those that were asked for up to `started` serve.
fn serve(ready: &mut u32, pending: &mut Vec<Timestamp>, started: Timestamp) {
    let before = pending.len();
    pending.retain(|since| *since > started);
    *ready = ready.saturating_add(u32::try_from(before - pending.len()).unwrap_or(u32::MAX));
}

fn count<T>(pending: &[T]) -> u32 {
    u32::try_from(pending.len()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scale::guard::scene::{SECOND, Scene};
    use crate::scale::{Guards, Observation, Policy, judge};

    #[test]
    fn decisions_add_up_to_the_fleet_that_would_be_there() {
        let at = |seconds: i64| Timestamp::from_micros(seconds * SECOND);
        let past = |seconds: i64, desired: u32| Past { at: at(seconds), wanted: desired, desired };
        let decisions = [past(0, 4), past(10, 6), past(20, 6), past(400, 7), past(410, 5)];
        let then = |seconds: i64, count: usize| imagined(&decisions[..count], 300.0, at(seconds)).unwrap();
        assert_eq!((then(15, 2).ready, then(15, 2).pending.len()), (4, 2));
        assert_eq!((then(310, 3).ready, then(310, 3).pending.len()), (6, 0));
        assert_eq!((then(400, 4).ready, then(400, 4).pending.len()), (6, 1));
        assert_eq!((then(410, 5).ready, then(410, 5).pending.len()), (5, 0), "the one on its way goes first");
        assert_eq!(imagined(&[], 300.0, at(0)), None);
    }

    #[test]
    fn in_shadow_a_policy_comes_to_the_number_that_it_would_run() {
        // Twenty run by the static plan and a load of 2.3 needs three.
        let mut scene = Scene::steady(20, 2.3);
        scene.decisions.clear();
        let policy: Policy = "token-rate".parse().unwrap();
        let mut looks: Vec<Sample> = Vec::new();
        for _ in 0..120 {
            let really = *scene.last();
            let fleet = imagined(&scene.decisions, 300.0, scene.now);
            looks.push(fleet.as_ref().map_or(really, |fleet| fleet.look(&really)));
            let (ready, pending) = fleet.map_or((20, Vec::new()), |fleet| (fleet.ready, fleet.pending));
            let observation = Observation { samples: &looks, ready, pending: &pending, ..scene.observation() };
            let verdict = judge(&observation, &policy, &Guards::default(), scene.now);
            scene.decisions.push(Past { at: scene.now, wanted: verdict.wanted, desired: verdict.decision.replicas });
            scene.pass(10 * SECOND);
        }
        assert_eq!(scene.decisions.last().unwrap().desired, 3);
    }
}
