//! What holds whatever is observed.

use proptest::prelude::*;

use super::scene::Scene;
use super::{Guards, guarded};
use crate::scale::observe::{Decision, Past, Sample};
use crate::scale::{Policy, judge};

fn scenes() -> impl Strategy<Value = Scene> {
    let state = (0_u32..20, 0.0_f64..30.0, 0_usize..6, prop::option::of(any::<bool>()), 0.0_f64..2_000.0);
    let bounds = (0_u32..5, 5_u32..40);
    let past = prop::collection::vec((0_u32..30, 0_u32..30), 0..40);
    (state, bounds, past, 0.0_f64..100.0, prop::bool::weighted(0.2)).prop_map(
        |((ready, load, pending, scheduled, age), (floor, ceiling), past, waiting, dark)| {
            let mut scene = Scene::steady(ready, load);
            scene.wait_for(pending, age, scheduled);
            (scene.bounds.floor, scene.bounds.ceiling) = (floor, ceiling);
            let count = past.len();
            for (index, (wanted, desired)) in past.into_iter().enumerate() {
                #[expect(clippy::cast_precision_loss, reason = "a few dozen")]
                let at = scene.at(scene.now_s - 10.0 * (count - index) as f64);
                scene.decisions.push(Past { at, wanted, desired });
            }
            scene.last().waiting = Some(waiting);
            if dark {
                scene.samples = vec![Sample { at: scene.now(), ..Sample::default() }];
            }
            scene
        },
    )
}

proptest! {
    #[test]
    fn the_floor_and_the_ceiling_always_hold(scene in scenes(), wanted in 0_u32..100, off in any::<bool>()) {
        let guards = if off { Guards::off() } else { scene.guards };
        let wish = Decision { replicas: wanted, ..Decision::default() };
        let decision = guarded(wish, &scene.observation(), &guards, scene.now());
        prop_assert!((scene.bounds.floor..=scene.bounds.ceiling).contains(&decision.replicas));
    }

    #[test]
    fn a_guard_that_changes_anything_says_so(scene in scenes(), wanted in 0_u32..100) {
        let decision = scene.guarded(wanted);
        prop_assert_eq!(decision.guards.len(), decision.reasons.len());
        prop_assert!(decision.replicas == wanted || !decision.guards.is_empty());
    }

    #[test]
    fn guarding_twice_is_guarding_once(scene in scenes(), wanted in 0_u32..100) {
        let once = scene.guarded(wanted);
        prop_assert_eq!(scene.guarded(once.replicas).replicas, once.replicas);
    }

    #[test]
    fn no_guard_makes_a_fall_of_a_wish_to_rise(scene in scenes(), more in 1_u32..50) {
        let current = scene.observation().provisioned();
        prop_assume!(current <= scene.bounds.ceiling && scene.pending.iter().all(|pending| pending.scheduled != Some(false)));
        prop_assume!(scene.samples.len() > 1);
        // A remembered give-up may hold, but not below what serves.
        prop_assert!(scene.guarded(current + more).replicas >= current.min(scene.ready));
    }

    #[test]
    fn every_policy_decides_the_same_from_the_same_and_says_why(scene in scenes(), which in 0_usize..9) {
        let policy: Policy = Policy::NAMES[which].parse().unwrap();
        let verdict = judge(&scene.observation(), &policy, &scene.guards, scene.now());
        prop_assert_eq!(&verdict, &judge(&scene.observation(), &policy, &scene.guards, scene.now()));
        prop_assert!(!verdict.decision.reasons.is_empty());
    }

    #[test]
    fn nothing_seen_changes_nothing(ready in 1_u32..20, which in 0_usize..9) {
        let mut scene = Scene::steady(ready, 3.0);
        scene.samples.clear();
        scene.past(ready);
        let policy: Policy = Policy::NAMES[which].parse().unwrap();
        prop_assert_eq!(judge(&scene.observation(), &policy, &scene.guards, scene.now()).decision.replicas, ready);
    }
}
