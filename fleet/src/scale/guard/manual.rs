//! A person's change is followed for a while: an autoscaler that answers an operator within seconds makes an incident worse, and
//! one that believes its own last answer instead of what is there does nothing at all (dynamo 4420).

use ledger::Timestamp;

use super::{Guards, Limit, Regime, View, seconds};
use crate::scale::observe::{Decision, Observation};

pub(super) fn holds(observation: &Observation, guards: &Guards, now: Timestamp) -> bool {
    observation.manual.is_some_and(|manual| seconds(now, manual.at) < guards.manual_s)
}

pub(super) fn limit(view: &View, _: &Decision) -> Limit {
    match view.observation.manual {
        Some(manual) if view.regime == Regime::Manual => Limit::exactly(manual.replicas),
        _ => Limit::NONE,
    }
}

pub(super) fn because(view: &View, _: &Decision) -> String {
    let Some(manual) = view.observation.manual else { return String::new() };
    let left = view.guards.manual_s - seconds(view.now, manual.at);
    format!("somebody asked for {} and is heard for {left:.0} s more", manual.replicas)
}

#[cfg(test)]
mod tests {
    use crate::scale::guard::scene::{SECOND, Scene};
    use crate::scale::{ManualChange, Past};

    #[test]
    fn dynamo_4420_replicas_changed_by_hand_are_followed_and_then_taken_back() {
        let mut scene = Scene::steady(2, 0.6);
        // We asked for one; a person made it two, and nothing asks for two.
        for past in &mut scene.decisions {
            *past = Past { wanted: 1, desired: 1, ..*past };
        }
        scene.manual = Some(ManualChange { at: scene.ago(30.0), replicas: 2 });
        let held = scene.guard(1);
        assert_eq!((held.replicas, held.guards.as_slice()), (2, ["manual"].as_slice()));
        assert!(held.reasons[0].contains("1770 s"), "{:?}", held.reasons);
        // Later what is there counts, not what was asked for last: the second replica goes.
        scene.manual = Some(ManualChange { at: scene.ago(1801.0), replicas: 2 });
        assert_eq!(scene.guard(1).replicas, 1);
    }

    #[test]
    fn a_person_may_go_up_down_and_nowhere_beyond_the_bounds() {
        for (asked, expected) in [(20, 20), (2, 2), (0, 1), (1000, 40)] {
            let mut scene = Scene::steady(8, 6.0);
            scene.manual = Some(ManualChange { at: scene.now.plus_micros(-SECOND), replicas: asked });
            assert_eq!(scene.guard(9).replicas, expected, "asked for {asked}");
        }
    }
}
