//! Somebody who scales by hand has a reason.

use super::Draft;

/// Leaves a change by somebody else alone for a while. True when it does.
///
/// Seen in public: an operator's change undone within one interval (llm-d-autoscaling 662).
pub(super) fn respect(draft: &mut Draft) -> bool {
    let Some(change) = draft.observation.manual else { return false };
    let age_s = draft.now.micros_since(change.at) as f64 / 1e6;
    if age_s >= draft.guards.manual_s {
        return false;
    }
    let left_s = draft.guards.manual_s - age_s;
    draft
        .take("manual", change.replicas, || format!("set by hand {age_s:.0} s ago, left alone for {left_s:.0} s more"));
    true
}

#[cfg(test)]
mod tests {
    use ledger::Timestamp;

    use super::super::scene::Scene;
    use crate::scale::observe::ManualChange;

    #[test]
    fn llm_d_autoscaling_662_a_change_by_hand_is_left_alone_for_a_while() {
        let mut scene = Scene::steady(8, 3.0);
        scene.manual =
            Some(ManualChange { at: Timestamp::from_micros(scene.now().micros() - 60_000_000), replicas: 12 });
        assert_eq!(scene.guarded(4).replicas, 12);
        scene.bounds.ceiling = 10;
        assert_eq!(scene.guarded(4).replicas, 10, "the ceiling holds against hands too");
        scene.now_s += 1_800.0;
        scene.look_again();
        assert!(scene.guarded(4).replicas < 8);
    }
}
