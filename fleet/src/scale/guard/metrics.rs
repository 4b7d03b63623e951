//! An outage of metrics is not a load of zero.

use super::Draft;
use crate::scale::observe::Sample;

/// Holds what was decided last when the newest look is too old or says nothing. True when it does.
///
/// Seen in public: scaled to the minimum when the metrics endpoint was gone (llm-d-autoscaling 1213, dynamo PR 11624).
pub(super) fn hold_on_missing(draft: &mut Draft) -> bool {
    let stale_s = draft.guards.stale_s;
    if stale_s <= 0.0 {
        return false;
    }
    let seen = draft.observation.samples.iter().rev().find(|sample| says_something(sample));
    let age_s = seen.map(|sample| draft.now.micros_since(sample.at) as f64 / 1e6);
    if age_s.is_some_and(|age_s| age_s <= stale_s) {
        return false;
    }
    let held = draft.observation.decisions.last().map_or_else(|| draft.current(), |past| past.desired);
    let since = age_s.map_or("ever".to_owned(), |age_s| format!("for {age_s:.0} s"));
    draft.decision.forecast = None;
    draft.take("missing-metrics", held, || format!("nothing was seen {since}, what was decided before holds"));
    true
}

fn says_something(sample: &Sample) -> bool {
    sample.load.or(sample.running).or(sample.waiting).or(sample.arrivals_per_s).is_some()
}

#[cfg(test)]
mod tests {
    use super::super::scene::Scene;
    use crate::scale::observe::Sample;

    #[test]
    fn llm_d_autoscaling_1213_an_outage_of_metrics_is_not_zero_load() {
        let mut scene = Scene::steady(8, 6.0);
        scene.past(8);
        // Looks still come, but every reading is unknown.
        for sample in &mut scene.samples {
            *sample = Sample { at: sample.at, ready: sample.ready, ..Sample::default() };
        }
        assert_eq!(scene.guarded(0).replicas, 8);
        assert_eq!(scene.guarded(0).guards, ["missing-metrics"]);
        // No look comes at all.
        scene.samples.clear();
        assert_eq!(scene.guarded(0).replicas, 8);
        assert_eq!(scene.guarded(40).replicas, 8, "and nobody asks for more on a guess");
    }

    #[test]
    fn dynamo_pr_11624_stale_readings_decide_nothing() {
        let mut scene = Scene::steady(8, 1.0);
        scene.past(8);
        scene.now_s += 61.0;
        assert_eq!(scene.guarded(2).replicas, 8);
        scene.now_s -= 2.0;
        assert!(scene.guarded(2).replicas < 8);
    }
}
