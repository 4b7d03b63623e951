//! No more than so many at a time: under constant traffic an autoscaler without a pace went to its maximum within seconds
//! (llm-d-autoscaling 777).

use super::{Limit, View};
use crate::scale::observe::Decision;

const MINUTE_S: f64 = 60.0;
/// Replicas that may be added in a minute however few there are.
const STEP: u32 = 4;

/// What there is already is never taken away by the one nor added to by the other.
pub(super) fn limit(view: &View, _: &Decision) -> Limit {
    let guards = view.guards;
    if !view.sees() {
        return Limit::NONE;
    }
    let (fewest, most) = range(view);
    let up = fewest.saturating_add(part(fewest, guards.up_per_minute).max(STEP)).max(view.current);
    let down = most.saturating_sub(part(most, guards.down_per_minute).max(1)).min(view.current);
    Limit {
        least: if guards.down_per_minute > 0.0 { down } else { 0 },
        most: if guards.up_per_minute > 0.0 { up } else { u32::MAX },
    }
}

pub(super) fn because(view: &View, decision: &Decision) -> String {
    let (fewest, most) = range(view);
    let Limit { least, most: up } = limit(view, decision);
    format!("between {fewest} and {most} within the last {MINUTE_S:.0} s, so {least} to {up} for now")
}

/// Fewest and most replicas of the last minute.
fn range(view: &View) -> (u32, u32) {
    let counts = view.samples(MINUTE_S).iter().map(|sample| sample.ready.saturating_add(sample.pending));
    counts.fold((view.current, view.current), |(fewest, most), count| (fewest.min(count), most.max(count)))
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float saturates at the integer's ends")]
fn part(replicas: u32, part: f64) -> u32 {
    (f64::from(replicas) * part).floor() as u32
}

#[cfg(test)]
mod tests {
    use crate::scale::guard::scene::{SECOND, Scene};
    use crate::scale::{Past, Pending};

    #[test]
    fn llm_d_autoscaling_777_constant_traffic_does_not_race_to_the_ceiling() {
        // A policy that asks for everything at every look, with a load that would even justify it.
        let mut scene = Scene::steady(2, 30.0);
        let mut course = Vec::new();
        for _ in 0..18 {
            let desired = scene.guard(40).replicas;
            for _ in scene.provisioned()..desired {
                scene.pending.push(Pending { since: scene.now, scheduled: Some(true) });
            }
            scene.decisions.push(Past { at: scene.now, wanted: 40, desired });
            course.push(desired);
            scene.pass(10 * SECOND);
        }
        assert!(course[..6].iter().all(|&desired| desired == 6), "four more in the first minute: {course:?}");
        assert!(course[7..13].iter().all(|&desired| desired == 12), "then double: {course:?}");
    }

    #[test]
    fn down_goes_by_half_a_minute_and_always_by_one() {
        assert_eq!(Scene::steady(20, 1.0).guard(1).replicas, 10);
        assert_eq!(Scene::steady(2, 0.1).guard(1).replicas, 1);
    }
}
