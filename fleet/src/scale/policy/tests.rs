//! Policies on looks that can be followed by hand, and their way to text and back.

use super::*;
use crate::scale::guard::scene::Scene;
use crate::scale::observe::Pending;

fn wants(policy: &str, scene: &Scene) -> u32 {
    let policy: Policy = policy.parse().unwrap();
    desired_replicas(&scene.observation(), &policy, scene.now()).replicas
}

#[test]
fn a_policy_is_its_text() {
    for text in [
        "hpa",
        "token-rate:headroom=0.3",
        "static:replicas=7",
        "schedule:else=4,mon-fri/08:00-18:00=12",
        "kpa:target=0.5",
    ] {
        let policy: Policy = text.parse().unwrap();
        assert_eq!(policy.to_string(), text);
        assert_eq!(format!("{policy:#}").parse(), Ok(policy));
    }
    for name in Policy::NAMES {
        assert_eq!(name.parse::<Policy>().unwrap().name(), name);
    }
    assert_eq!("default".parse::<Policy>(), Err(PolicyError::Unknown("default".into())));
}

#[test]
fn what_is_no_parameter_is_named_with_what_there_is() {
    let error = |text: &str| text.parse::<Policy>().unwrap_err().to_string();
    assert!(error("hpa:speed=1").contains("no parameter `speed`; it has target, waiting"), "{}", error("hpa:speed=1"));
    assert!(error("token-rate:headroom=-1").contains("from 0 to 10"));
    assert!(error("token-rate:headroom=much").contains("a number"));
    assert!(error("schedule:mon/8-9=3").contains("mon-fri/08:00-18:00=12"));
}

#[test]
fn the_horizontal_pod_autoscaler_follows_its_ratio_beyond_the_tolerance() {
    assert_eq!(wants("hpa", &Scene::steady(10, 7.0)), 10, "at its target");
    assert_eq!(wants("hpa", &Scene::steady(10, 7.6)), 10, "within 10 %");
    assert_eq!(wants("hpa", &Scene::steady(10, 9.8)), 14);
    assert_eq!(wants("hpa", &Scene::steady(10, 3.5)), 5);
    assert_eq!(
        wants("hpa:target=0,waiting=0,utilisation=0.5", &Scene::steady(10, 9.8)),
        20,
        "doubling at the most, 19.6 asked"
    );
}

#[test]
fn unready_pods_dampen_the_horizontal_pod_autoscaler() {
    let mut scene = Scene::steady(4, 4.0);
    assert_eq!(wants("hpa", &scene), 6);
    scene.wait_for(2, 30.0, None);
    scene.last().pending = 2;
    assert_eq!(wants("hpa", &scene), 6, "the two on their way would do it");
}

#[test]
fn the_horizontal_pod_autoscaler_lets_go_after_its_window() {
    let mut scene = Scene::steady(10, 7.0);
    scene.last().running = Some(16.0 * 2.0);
    assert_eq!(wants("hpa", &scene), 10);
    assert_eq!(wants("hpa:stabilise=0", &scene), 3);
}

#[test]
fn knative_panics_at_twice_what_serves() {
    let mut scene = Scene::steady(4, 2.8);
    assert_eq!(wants("kpa", &scene), 4);
    scene.last().waiting = Some(16.0 * 10.0);
    assert_eq!(wants("kpa", &scene), 19, "12.8 of 0.7 each");
    scene.samples.iter_mut().for_each(|sample| sample.waiting = Some(0.0));
    scene.samples.iter_mut().for_each(|sample| sample.running = Some(16.0));
    assert_eq!(wants("kpa", &scene), 2, "no faster than by half");
}

#[test]
fn saturation_adds_one_at_a_time_and_waits_for_it() {
    let mut scene = Scene::steady(4, 4.0);
    scene.samples.iter_mut().for_each(|sample| sample.kv_used = Some(0.6));
    assert_eq!(wants("queue-kv", &scene), 4, "three could not hold it");
    scene.samples.iter_mut().for_each(|sample| sample.kv_used = Some(0.75));
    assert_eq!(wants("queue-kv", &scene), 5);
    scene.pending = vec![Pending { since: scene.now(), scheduled: None }];
    assert_eq!(wants("queue-kv", &scene), 5);
    assert_eq!(wants("queue-kv", &Scene::steady(4, 2.0)), 3);
    assert_eq!(wants("queue-kv", &Scene::steady(1, 0.0)), 0);
}

#[test]
fn tokens_are_answered_with_headroom_and_remembered_for_a_while() {
    assert_eq!(wants("token-rate", &Scene::steady(6, 4.0)), 5);
    let mut scene = Scene::steady(6, 4.8);
    let end = scene.samples.len();
    scene.samples[end - 12..].iter_mut().for_each(|sample| sample.load = Some(1.0));
    assert_eq!(wants("token-rate", &scene), 6, "4.8 were there three minutes ago");
    assert_eq!(wants("token-rate:stabilise=60", &scene), 2);
}

#[test]
fn a_schedule_knows_the_day_and_the_hour() {
    let at = |seconds: i64| {
        let policy: Policy = "schedule:else=2,mon-fri/08:00-18:00=12,sat/22:00-02:00=5".parse().unwrap();
        desired_replicas(&Scene::steady(3, 1.0).observation(), &policy, Timestamp::from_micros(seconds * 1_000_000))
            .replicas
    };
    // 5 January 1970 was a Monday.
    let monday = 4 * 86_400;
    assert_eq!(at(monday + 7 * 3_600), 2);
    assert_eq!(at(monday + 8 * 3_600), 12);
    assert_eq!(at(monday + 18 * 3_600), 2);
    assert_eq!(at(monday + 5 * 86_400 + 12 * 3_600), 2, "Saturday noon");
    assert_eq!(at(monday + 5 * 86_400 + 23 * 3_600), 5);
    assert_eq!(at(monday + 6 * 86_400 + 3_600), 5, "past midnight");
}
