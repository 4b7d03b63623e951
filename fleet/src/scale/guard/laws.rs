//! What holds whatever is observed.

use proptest::prelude::*;

use super::scene::{SECOND, Scene, wish};
use super::{GUARDS, Guard, Guards, View, apply, guarded};
use crate::scale::{Decision, ManualChange, Past, Pending, Policy, judge};

fn scenes() -> impl Strategy<Value = Scene> {
    let state = (0_u32..20, 0.0_f64..30.0, 0_usize..8, prop::option::of(any::<bool>()), 0.0_f64..4_000.0);
    let bounds = (0_u32..5, 3_u32..40);
    let past = prop::collection::vec((0_u32..40, 0_u32..40), 0..60);
    let odd = (prop::bool::weighted(0.2), prop::option::weighted(0.2, (0_u32..50, 0.0_f64..2_000.0)), 0.0_f64..100.0);
    (state, bounds, past, odd).prop_map(
        |((ready, load, pending, scheduled, age), (floor, ceiling), past, (dark, manual, waiting))| {
            let mut scene = Scene::steady(ready, load);
            scene.pending = vec![Pending { since: scene.ago(age), scheduled }; pending];
            (scene.bounds.floor, scene.bounds.ceiling) = (floor, ceiling);
            if !past.is_empty() {
                scene.decisions.truncate(360 - past.len());
            }
            for (wanted, desired) in past {
                let at = scene.decisions.last().map_or(scene.ago(600.0), |last| last.at.plus_micros(10 * SECOND));
                scene.decisions.push(Past { at, wanted, desired });
            }
            scene.manual = manual.map(|(replicas, ago)| ManualChange { at: scene.ago(ago), replicas });
            scene.samples.last_mut().unwrap().waiting = Some(waiting);
            if dark {
                scene.samples.clear();
            }
            scene
        },
    )
}

fn with(scene: &Scene, guards: &[Guard], decision: Decision) -> Decision {
    apply(decision, &View::new(&scene.observation(), &scene.guards, scene.now), guards)
}

proptest! {
    #[test]
    fn the_floor_and_the_ceiling_always_hold(scene in scenes(), wanted in 0_u32..100, off in any::<bool>()) {
        let guards = if off { Guards::off() } else { scene.guards };
        let decision = guarded(wish(wanted), &scene.observation(), &guards, scene.now);
        prop_assert!(decision.replicas >= scene.bounds.floor && decision.replicas <= scene.bounds.ceiling.max(scene.bounds.floor));
    }

    #[test]
    fn guards_are_as_safe_in_every_order(scene in scenes(), wanted in 0_u32..100, order in Just(GUARDS.to_vec()).prop_shuffle()) {
        let usual = with(&scene, &GUARDS, wish(wanted));
        let shuffled = with(&scene, &order, wish(wanted));
        prop_assert_eq!(usual.replicas, shuffled.replicas);
        let names = |decision: &Decision| decision.guards.iter().copied().collect::<std::collections::BTreeSet<_>>();
        prop_assert_eq!(names(&usual), names(&shuffled));
    }

    #[test]
    fn guarding_twice_is_guarding_once(scene in scenes(), wanted in 0_u32..100) {
        let once = scene.guard(wanted);
        prop_assert_eq!(&guarded(once.clone(), &scene.observation(), &scene.guards, scene.now), &once);
    }

    #[test]
    fn a_guard_that_changes_anything_says_so_with_its_name_and_numbers(scene in scenes(), wanted in 0_u32..100) {
        let decision = scene.guard(wanted);
        prop_assert_eq!(decision.replicas == wanted, decision.guards.is_empty());
        for (guard, reason) in decision.guards.iter().zip(&decision.reasons) {
            prop_assert!(reason.starts_with(guard) && reason.contains(|c: char| c.is_ascii_digit()), "{}", reason);
        }
        prop_assert_eq!(decision.guards.len(), decision.reasons.len());
    }

    #[test]
    fn no_guard_makes_a_fall_of_a_wish_to_rise(scene in scenes(), more in 0_u32..50) {
        // Only a person and the ceiling can take away what is needed; what has no place was never there.
        prop_assume!(scene.manual.is_none() && !scene.samples.is_empty());
        let observation = scene.observation();
        let there = View::new(&observation, &scene.guards, scene.now).current;
        prop_assume!(there <= scene.bounds.ceiling);
        prop_assert!(scene.guard(observation.provisioned() + more).replicas >= there);
    }

    #[test]
    fn nothing_seen_changes_nothing(scene in scenes(), which in 0_usize..9) {
        let mut scene = scene;
        scene.samples.clear();
        scene.manual = None;
        scene.pending.clear();
        let policy: Policy = Policy::NAMES[which].parse().unwrap();
        let held = scene.decisions.last().map_or(scene.ready, |past| past.desired);
        let held = held.clamp(scene.bounds.floor, scene.bounds.ceiling.max(scene.bounds.floor));
        prop_assert_eq!(judge(&scene.observation(), &policy, &scene.guards, scene.now).decision.replicas, held);
    }

    #[test]
    fn every_policy_decides_the_same_from_the_same_and_says_why(scene in scenes(), which in 0_usize..9) {
        let policy: Policy = Policy::NAMES[which].parse().unwrap();
        let verdict = judge(&scene.observation(), &policy, &scene.guards, scene.now);
        prop_assert_eq!(&verdict, &judge(&scene.observation(), &policy, &scene.guards, scene.now));
        prop_assert!(!verdict.decision.reasons.is_empty());
    }
}

#[test]
fn dynamo_pr_11624_a_first_token_that_no_replica_can_make_in_time_keeps_nothing_up() {
    // One prompt takes 9 s alone and 2 s are promised: more replicas cannot help, so they neither come nor stay for it.
    for name in Policy::NAMES {
        let policy: Policy = name.parse().unwrap();
        if matches!(policy, Policy::Static(_) | Policy::Schedule(_) | Policy::Oracle(_)) {
            continue;
        }
        let mut scene = Scene::steady(6, 0.6);
        for _ in 0..180 {
            for sample in &mut scene.samples {
                sample.ttft_s = Some(9.0);
            }
            let verdict = judge(&scene.observation(), &policy, &scene.guards, scene.now);
            assert!(verdict.decision.replicas <= 6, "{name}: {verdict:?}");
            scene.decisions.push(Past { at: scene.now, wanted: verdict.wanted, desired: verdict.decision.replicas });
            scene.ready = verdict.decision.replicas;
            scene.pass(10 * SECOND);
        }
        assert!(scene.ready <= 2, "{name} keeps {} for a load of 0.6", scene.ready);
    }
}
