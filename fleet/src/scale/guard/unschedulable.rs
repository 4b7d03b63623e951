//! What can never be scheduled is given up: replicas without a GPU to run on kept a planner waiting for hours, with no way down when
//! the load was gone (dynamo 14251). They are neither counted for ever nor asked for ever.

use ledger::Timestamp;

use super::{Guards, Limit, Regime, View, seconds};
use crate::scale::earlier;
use crate::scale::observe::{Decision, Observation, Past, Pending};

/// A start that takes this long is slow whatever a usual one takes, seconds.
const SLOW_S: f64 = 1800.0;

/// Replicas that are given up.
pub(super) fn lost(observation: &Observation, guards: &Guards, now: Timestamp) -> u32 {
    let lost = observation.pending.iter().filter(|one| is_lost(one, observation, guards, now)).count();
    u32::try_from(lost).unwrap_or(u32::MAX)
}

/// Whether a replica will hardly come any more: no place for long, or many cold starts without serving.
pub(super) fn is_lost(one: &Pending, observation: &Observation, guards: &Guards, now: Timestamp) -> bool {
    let waited = seconds(now, one.since);
    let slow = (guards.give_up_cold_starts * observation.bounds.cold_start_s).max(SLOW_S);
    match one.scheduled {
        Some(false) => guards.give_up_s > 0.0 && waited >= guards.give_up_s,
        Some(true) | None => guards.give_up_cold_starts > 0.0 && waited >= slow,
    }
}

pub(super) fn limit(view: &View, _: &Decision) -> Limit {
    if view.regime == Regime::Manual {
        return Limit::NONE;
    }
    if view.lost > 0 {
        return Limit::most(view.current);
    }
    refused(view).map_or(Limit::NONE, |refused| Limit::most(refused.placed.max(view.current)))
}

pub(super) fn because(view: &View, _: &Decision) -> String {
    if view.lost > 0 {
        return format!(
            "{} had no place or did not start for long and are given up, {} remain",
            view.lost, view.current
        );
    }
    let Some(refused) = refused(view) else { return String::new() };
    format!(
        "no more than {} found a place {:.0} s ago; more are asked for in {:.0} s",
        refused.placed, refused.ago_s, refused.left_s
    )
}

/// That replicas were given up lately.
struct Refused {
    placed: u32,
    ago_s: f64,
    left_s: f64,
}

/// The last time that replicas were given up, while its pause lasts: `retry_s` for each time within the hour.
fn refused(view: &View) -> Option<Refused> {
    let pause = view.guards.retry_s;
    if pause <= 0.0 {
        return None;
    }
    let since = earlier(view.now, 3600.0);
    let recent = view.observation.decisions.iter().rev().take_while(|past| past.at > since);
    let mut times = recent.filter(|past| gave_up(view, past));
    let last = times.next()?;
    let pause = pause * (1.0 + f64::from(u32::try_from(times.count()).unwrap_or(u32::MAX)));
    let ago_s = seconds(view.now, last.at);
    (ago_s < pause).then_some(Refused { placed: last.desired, ago_s, left_s: pause - ago_s })
}

/// Whether a decision went below what there was although the policy wanted more, behind a time in which some were on their way all
/// along: of all guards only this one does that.
fn gave_up(view: &View, past: &Past) -> bool {
    if past.desired >= past.wanted {
        return false;
    }
    let samples = view.observation.samples;
    let until = samples.partition_point(|sample| sample.at <= past.at);
    let long = earlier(past.at, view.guards.give_up_s / 2.0);
    let before = samples[..until].iter().rev().take_while(|sample| sample.at >= long);
    samples[..until].last().is_some_and(|last| last.ready.saturating_add(last.pending) > past.desired)
        && before.clone().count() > 0
        && before.into_iter().all(|sample| sample.pending > 0)
}

#[cfg(test)]
mod tests {
    use crate::scale::guard::scene::{SECOND, Scene};
    use crate::scale::{Past, Pending};

    #[test]
    fn dynamo_14251_replicas_without_a_gpu_are_given_up_and_asked_for_again_with_pauses() {
        // Four serve a load of seven; there is no GPU for any more, ever.
        let mut scene = Scene::steady(4, 7.0);
        let (mut asked, mut starts) = (0_u32, 0_u32);
        for _ in 0..(4 * 360) {
            let desired = scene.guard(8).replicas;
            assert!((4..=8).contains(&desired));
            asked += u32::from(desired > 4);
            let keep = usize::try_from(desired - 4).unwrap();
            starts += u32::from(scene.pending.is_empty() && keep > 0);
            scene.pending.truncate(keep);
            while scene.pending.len() < keep {
                scene.pending.push(Pending { since: scene.now, scheduled: Some(false) });
            }
            scene.decisions.push(Past { at: scene.now, wanted: 8, desired });
            scene.pass(10 * SECOND);
        }
        assert!((2..=8).contains(&starts), "asked for {starts} times in four hours");
        assert!(asked < 4 * 360 / 2, "and most of the time not: {asked} of 1440 looks");
    }

    #[test]
    fn dynamo_14251_when_the_load_is_gone_pending_replicas_do_not_keep_the_fleet_up() {
        let mut scene = Scene::steady(4, 0.5);
        scene.pending = vec![Pending { since: scene.ago(300.0), scheduled: Some(false) }; 4];
        for sample in &mut scene.samples {
            sample.pending = 4;
        }
        assert_eq!(scene.guard(1).replicas, 4, "half a minute, those without a place first");
        scene.pending = vec![Pending { since: scene.ago(950.0), scheduled: Some(false) }; 4];
        let given_up = scene.guard(8);
        assert_eq!((given_up.replicas, given_up.guards.as_slice()), (4, ["unschedulable"].as_slice()));
    }

    #[test]
    fn a_slow_start_is_no_lost_cause() {
        let mut scene = Scene::steady(4, 4.0);
        scene.pending = vec![Pending { since: scene.ago(1500.0), scheduled: Some(true) }];
        assert_eq!(scene.guard(5).replicas, 5);
        scene.pending = vec![Pending { since: scene.ago(2000.0), scheduled: Some(true) }];
        assert_eq!(scene.guard(5).replicas, 4);
    }
}
