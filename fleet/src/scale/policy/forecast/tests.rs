use super::*;
use crate::scale::forecast::tests::Scene;
use crate::scale::observe::Sample;

fn decide(scene: &Scene) -> Decision {
    Forecast::default().desired(&scene.observation(), scene.now())
}

#[test]
fn it_keeps_a_margin_for_what_it_cannot_know() {
    let mut scene = Scene::of(600, |_| 16.0);
    scene.ready = 10;
    let decision = decide(&scene);
    // 16 · (1 + 0.05 + 2.7 · spread), with a spread that what is assumed and what was seen have in common.
    assert!((19..=21).contains(&decision.replicas), "{decision:?}");
    assert_eq!(decision.forecast.map(f64::round), Some(16.0));
    assert!(decision.reasons[0].contains("persistence"), "{decision:?}");
}

#[test]
fn what_is_not_known_is_not_zero() {
    let scene = Scene::of(60, |_| f32::NAN);
    let decision = decide(&scene);
    assert_eq!((decision.replicas, decision.forecast), (10, None));
    assert!(decision.reasons[0].contains("no load is known"));
}

#[test]
fn a_doubling_counts_before_the_level_follows() {
    let load = |load| Sample { load: Some(load), ..Sample::default() };
    let scene = Scene::of(600, |_| 8.0).looks(&[load(16.0); 12]);
    let decision = decide(&scene);
    assert_eq!(decision.replicas, 18, "{decision:?}");
    assert!(decision.reasons.iter().any(|reason| reason.contains("last two minutes")), "{decision:?}");
}

#[test]
fn less_is_let_go_only_when_it_lasts() {
    let mut scene = Scene::of(600, |_| 8.0);
    let steady = decide(&scene).replicas;
    scene.ready = 30;
    assert_eq!(decide(&scene).replicas, steady, "far too many go at once");
    scene.ready = steady;
    assert_eq!(decide(&scene).replicas, steady);
    // One minute of less changes nothing.
    let mut scene = Scene::of(600, |minute| if minute == 599 { 1.0 } else { 8.0 });
    scene.ready = steady;
    assert_eq!(decide(&scene).replicas, steady);
}
