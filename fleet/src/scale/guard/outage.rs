//! Without readings nothing moves: an outage is not a load of zero (dynamo PR 14575, where failed queries read as no requests and
//! left fewer replicas than the floor; llm-d-benchmark PR 1611, whose metrics server answered 401 under load and whose autoscaler then
//! wanted none).

use ledger::Timestamp;

use super::{Guards, Limit, Regime, View, seconds};
use crate::scale::observe::{Decision, Observation, Sample};

/// Whether the newest look is missing, old or empty.
pub(super) fn is_blind(observation: &Observation, guards: &Guards, now: Timestamp) -> bool {
    guards.stale_s > 0.0
        && observation.newest().is_none_or(|newest| !says_something(newest) || seconds(now, newest.at) > guards.stale_s)
}

fn says_something(sample: &Sample) -> bool {
    [sample.load, sample.arrivals_per_s, sample.input_tokens_per_s, sample.running, sample.waiting, sample.kv_used]
        .into_iter()
        .flatten()
        .any(f64::is_finite)
}

/// What was asked for last, or what there is; less what is given up.
pub(super) fn limit(view: &View, _: &Decision) -> Limit {
    if view.regime != Regime::Blind {
        return Limit::NONE;
    }
    let asked = view.last_desired().unwrap_or(view.current);
    Limit::exactly(if view.lost > 0 { asked.min(view.current) } else { asked })
}

pub(super) fn because(view: &View, decision: &Decision) -> String {
    let held = limit(view, decision).least;
    match view.observation.newest() {
        None => format!("nothing was ever seen, so {held} stay"),
        Some(newest) => {
            let age = seconds(view.now, newest.at);
            format!(
                "the newest of {} looks is {age:.0} s old or says nothing, so {held} stay",
                view.observation.samples.len()
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::scale::Sample;
    use crate::scale::guard::scene::Scene;

    #[test]
    fn dynamo_pr_14575_a_metrics_outage_neither_shrinks_the_fleet_nor_leaves_it_below_the_floor() {
        // Readings stop, or come without content; the policy takes that for no load.
        let frozen = |scene: &mut Scene| scene.samples.retain(|sample| sample.at < scene.now.plus_micros(-90_000_000));
        let blank = |scene: &mut Scene| {
            let last = scene.samples.last_mut().unwrap();
            *last = Sample { at: last.at, ready: last.ready, pending: last.pending, ..Sample::default() };
        };
        let empty = |scene: &mut Scene| scene.samples.clear();
        for outage in [&frozen as &dyn Fn(&mut Scene), &blank, &empty] {
            let mut scene = Scene::steady(6, 4.5);
            outage(&mut scene);
            let held = scene.guard(0);
            assert_eq!((held.replicas, held.guards.as_slice()), (6, ["outage"].as_slice()), "{:?}", held.reasons);
            assert_eq!(scene.guard(30).replicas, 6, "and nothing is added blindly");
            // Below the floor the floor is asked for, outage or not.
            scene.bounds.floor = 8;
            assert_eq!(scene.guard(0).replicas, 8);
        }
    }

    #[test]
    fn llm_d_benchmark_pr_1611_a_metrics_server_that_refuses_is_no_wish_for_none() {
        // Requests come for nine minutes and no reading ever does: two serve, none is wanted, two stay.
        let mut scene = Scene::steady(2, 1.8);
        for sample in &mut scene.samples {
            *sample = Sample { at: sample.at, ready: sample.ready, ..Sample::default() };
        }
        for _ in 0..54 {
            assert_eq!(scene.guard(0).replicas, 2);
            scene.now = scene.now.plus_micros(10_000_000);
            scene.samples.push(Sample { at: scene.now, ready: 2, ..Sample::default() });
        }
    }

    #[test]
    fn replicas_that_die_during_an_outage_are_still_asked_for() {
        let mut scene = Scene::steady(6, 4.5);
        scene.samples.clear();
        scene.ready = 3;
        assert_eq!(scene.guard(3).replicas, 6);
    }
}
