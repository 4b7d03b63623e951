//! Prefill and decode fail each in its own way, and a mean over both hides it.

use super::Draft;

/// Lets nobody go while the time to first token or the time per output token, each by itself, misses the objective.
///
/// Seen in public: decode saturated while the mean said idle, prefill scaled by decode's numbers (dynamo PR 9294, PR 14575).
pub(super) fn judged_apart(draft: &mut Draft) {
    if !draft.guards.phases_apart || !draft.lowers() {
        return;
    }
    let Some(newest) = draft.observation.newest() else { return };
    let objective = draft.observation.objective;
    let missed = |is: Option<f64>, promised: f64| is.filter(|&is| is > promised);
    let current = draft.current();
    if let Some(ttft_s) = missed(newest.ttft_s, objective.ttft_s) {
        draft.keep("phases-apart", current, || {
            format!("prefill is late: {ttft_s:.2} s to the first token, promised {} s", objective.ttft_s)
        });
    } else if let Some(tpot_s) = missed(newest.tpot_s, objective.tpot_s) {
        draft.keep("phases-apart", current, || {
            format!("decode is late: {:.0} ms a token, promised {:.0} ms", tpot_s * 1e3, objective.tpot_s * 1e3)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::scene::Scene;

    #[test]
    fn dynamo_pr_14575_decode_alone_keeps_replicas() {
        let mut scene = Scene::steady(6, 2.0);
        scene.last().tpot_s = Some(0.2);
        assert_eq!(scene.guarded(3).replicas, 6);
    }

    #[test]
    fn dynamo_pr_9294_prefill_alone_keeps_replicas() {
        let mut scene = Scene::steady(6, 2.0);
        scene.last().ttft_s = Some(5.0);
        let decision = scene.guarded(3);
        assert_eq!(decision.replicas, 6);
        assert!(decision.reasons.iter().any(|reason| reason.contains("5.00 s to the first token")), "{decision:?}");
        scene.last().ttft_s = Some(0.5);
        assert!(scene.guarded(3).replicas < 6);
    }
}
