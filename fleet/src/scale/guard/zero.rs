//! To nothing and back.

use super::Draft;
use crate::scale::earlier;
use crate::scale::observe::Sample;

/// Nothing waits in front of no replica, and the last one goes only after a while without a request.
///
/// Seen in public: the first request after a scale to zero was lost because nobody counted it (dynamo 4420, llm-d-benchmark
/// PR 1611). That the request itself is kept is the gateway's part.
pub(super) fn keeps_the_first_request(draft: &mut Draft) {
    if draft.decision.replicas > 0 {
        return;
    }
    let waits = draft.observation.newest().and_then(|newest| newest.waiting).unwrap_or(0.0);
    if waits > 0.0 {
        draft.take("scale-from-zero", 1, || format!("{waits:.0} requests wait for the first replica"));
        return;
    }
    let zero_after_s = draft.guards.zero_after_s;
    let since = earlier(draft.now, zero_after_s);
    let busy = |sample: &&Sample| {
        [sample.running, sample.waiting, sample.arrivals_per_s]
            .iter()
            .any(|value| value.is_some_and(|value| value > 0.0))
    };
    let asked = draft.observation.samples.iter().rev().take_while(|sample| sample.at > since).find(busy);
    if asked.is_some() {
        draft.keep("scale-to-zero", 1, || format!("something was asked within the last {zero_after_s:.0} s"));
    }
}

#[cfg(test)]
mod tests {
    use super::super::scene::Scene;

    #[test]
    fn dynamo_4420_a_request_in_front_of_nothing_asks_for_the_first_replica() {
        let mut scene = Scene::steady(0, 0.0);
        scene.last().waiting = Some(1.0);
        assert_eq!(scene.guarded(0).replicas, 1);
        assert_eq!(Scene::steady(0, 0.0).guarded(0).replicas, 0);
    }

    #[test]
    fn llm_d_benchmark_pr_1611_the_last_replica_stays_for_a_while() {
        let mut scene = Scene::steady(1, 0.0);
        scene.samples[40].running = Some(1.0);
        assert_eq!(scene.guarded(0).replicas, 1);
        scene.samples[40].running = Some(0.0);
        assert_eq!(scene.guarded(0).replicas, 0);
        scene.bounds.floor = 1;
        assert_eq!(scene.guarded(0).replicas, 1, "the floor always holds");
    }
}
