//! At most so many changes of direction within any hour: replicas that come and go cost their starts and serve nobody
//! (llm-d-autoscaling 1427, where noise in the queues moved the number every 15 seconds).

use super::{Limit, View};
use crate::scale::observe::Decision;
use crate::scale::{earlier, last_direction};

const HOUR_S: f64 = 3600.0;

/// Going up is always possible, so only a turn down is refused, as soon as it and the turn up behind it would be too many.
pub(super) fn limit(view: &View, _: &Decision) -> Limit {
    let allowed = view.guards.direction_changes_max;
    let Some(last) = view.last_desired().filter(|_| view.sees() && allowed > 0) else { return Limit::NONE };
    // Without a change in the hour nobody knows whether this is a turn.
    let would_turn = last_direction(view.observation.decisions) != Some(false);
    if would_turn && turns(view) + 2 > allowed { Limit::least(last) } else { Limit::NONE }
}

pub(super) fn because(view: &View, _: &Decision) -> String {
    let turned = turns(view);
    format!(
        "turned {turned} times within an hour, {} are allowed, so nothing is let go",
        view.guards.direction_changes_max
    )
}

/// Turns of the last hour. The first change within it counts as one, as the one before it is out of sight.
fn turns(view: &View) -> u32 {
    let since = earlier(view.now, HOUR_S);
    let mut rising: Option<bool> = None;
    let mut turns = 0;
    for pair in view.observation.decisions.windows(2) {
        let [before, after] = pair else { continue };
        if after.at <= since || before.desired == after.desired {
            continue;
        }
        let rises = after.desired > before.desired;
        turns += u32::from(rising != Some(rises));
        rising = Some(rises);
    }
    turns
}

#[cfg(test)]
mod tests {
    use crate::scale::guard::scene::{SECOND, Scene};
    use crate::scale::{Past, direction_changes};

    #[test]
    fn llm_d_autoscaling_1427_noise_moves_the_number_six_times_an_hour_at_most() {
        // A load that goes up and down every two minutes, and a policy that follows it.
        let mut scene = Scene::steady(6, 4.0);
        for look in 0..1440_u32 {
            let high = (look / 12) % 2 == 0;
            let (wanted, load) = if high { (7, 5.0) } else { (6, 4.0) };
            scene.set_load(load, 10.0);
            let desired = scene.guard(wanted).replicas;
            assert!(desired >= wanted, "what is needed is there");
            scene.ready = desired;
            scene.decisions.push(Past { at: scene.now, wanted, desired });
            let turned = direction_changes(&scene.decisions, scene.ago(3600.0));
            assert!(turned <= 6, "{turned} turns at look {look}");
            scene.pass(10 * SECOND);
        }
    }
}
