//! The first request to a fleet of none starts a replica and is not lost, and the last replica goes only when nothing came for a
//! while: at zero there is no engine to measure (llm-d-autoscaling 606 asks the router's queue; knative serving 2078 lost requests
//! at the end of the grace period).

use super::{Limit, Regime, View};
use crate::scale::earlier;
use crate::scale::observe::{Decision, Sample};

pub(super) fn limit(view: &View, _: &Decision) -> Limit {
    if view.regime == Regime::Manual || view.guards.zero_after_s <= 0.0 {
        return Limit::NONE;
    }
    let waits = view.observation.newest().is_some_and(is_asked);
    let keeps_last = view.sees() && view.current > 0 && !idle(view);
    if waits || keeps_last { Limit::least(1) } else { Limit::NONE }
}

pub(super) fn because(view: &View, _: &Decision) -> String {
    let waiting = view.observation.newest().and_then(|newest| newest.waiting).unwrap_or(0.0);
    format!(
        "{waiting:.0} wait and not all of the last {:.0} s were without a request, so one stays or starts",
        view.guards.zero_after_s
    )
}

/// Whether all looks of the last while, as long as it is, say that nothing was there. Unknown is not nothing.
fn idle(view: &View) -> bool {
    let since = earlier(view.now, view.guards.zero_after_s);
    let watched = view.observation.samples.first().is_some_and(|first| first.at <= since);
    watched && view.samples(view.guards.zero_after_s).iter().all(says_nothing_came)
}

fn says_nothing_came(sample: &Sample) -> bool {
    let known = sample.running.is_some() || sample.arrivals_per_s.is_some() || sample.load.is_some();
    known && !is_asked(sample)
}

fn is_asked(sample: &Sample) -> bool {
    [sample.waiting, sample.running, sample.arrivals_per_s, sample.load].into_iter().flatten().any(|value| value > 0.0)
}

#[cfg(test)]
mod tests {
    use crate::scale::Sample;
    use crate::scale::guard::scene::{SECOND, Scene};

    #[test]
    fn llm_d_autoscaling_606_a_request_held_at_zero_starts_the_first_replica() {
        let mut scene = Scene::steady(0, 0.0);
        scene.bounds.floor = 0;
        assert_eq!(scene.guard(0).replicas, 0, "nothing is asked");
        // No engine, so nothing but the gateway's held request is known.
        let at = scene.now;
        scene.samples.push(Sample { at, waiting: Some(1.0), ..Sample::default() });
        let first = scene.guard(0);
        assert_eq!((first.replicas, first.guards.as_slice()), (1, ["first-request"].as_slice()));
    }

    #[test]
    fn knative_serving_2078_the_last_replica_stays_until_nothing_came_for_the_whole_while() {
        let mut scene = Scene::steady(1, 0.0);
        scene.bounds.floor = 0;
        assert_eq!(scene.guard(0).replicas, 0);
        let at = scene.ago(250.0);
        scene.samples.iter_mut().find(|sample| sample.at >= at).unwrap().arrivals_per_s = Some(0.1);
        assert_eq!(scene.guard(0).replicas, 1, "a request 250 s ago");
        scene.pass(60 * SECOND);
        assert_eq!(scene.guard(0).replicas, 0);
        scene.samples.last_mut().unwrap().running = Some(1.0);
        assert_eq!(scene.guard(0).replicas, 1, "one runs");
    }
}
