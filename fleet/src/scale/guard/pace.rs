//! Not too fast, not too often, and not for a moment's sake.

use super::Draft;
use crate::scale::{direction_changes, earlier, last_direction};

const MINUTE_S: f64 = 60.0;
const HOUR_S: f64 = 3_600.0;

/// Lowers only to the most that the policy wanted of late.
///
/// Seen in public: replicas let go in a dip of seconds and missed a minute later (llm-d-autoscaling 777).
pub(super) fn stabilise(draft: &mut Draft) {
    let stabilise_s = draft.guards.stabilise_s;
    if stabilise_s <= 0.0 || !draft.lowers() {
        return;
    }
    let since = earlier(draft.now, stabilise_s);
    let most = draft.observation.decisions.iter().filter(|past| past.at > since).map(|past| past.wanted).max();
    draft.keep("stabilise", most.unwrap_or(0), || format!("as many were wanted within the last {stabilise_s:.0} s"));
}

/// Begins no further way down when direction changed too often: up is always possible, so that nobody is overloaded for the
/// sake of calm. A fall now and the rise after it are two more changes, so two have to be left.
///
/// Seen in public: up and down with every period of an oscillating load (dynamo 14251, llm-d-autoscaling 777).
pub(super) fn turn_seldom(draft: &mut Draft) {
    let most = draft.guards.direction_changes_max;
    let decisions = draft.observation.decisions;
    if most == 0 || !draft.lowers() || last_direction(decisions) != Some(true) {
        return;
    }
    let changes = direction_changes(decisions, earlier(draft.now, HOUR_S));
    if changes + 2 > most {
        let current = draft.current();
        draft.keep("direction", current, || {
            format!("direction changed {changes} times within the hour, {most} is the most")
        });
    }
}

/// No more than a part of the replicas is added or let go in a minute.
///
/// Seen in public: hundreds of replicas from one wrong reading (aibrix 2670).
pub(super) fn limit_rate(draft: &mut Draft) {
    let current = draft.current();
    let since = earlier(draft.now, MINUTE_S);
    let recent = draft.observation.decisions.iter().filter(|past| past.at > since).map(|past| past.desired);
    let (up, down) = (draft.guards.up_per_minute, draft.guards.down_per_minute);
    if up > 0.0 && draft.raises() {
        let least = recent.fold(current, u32::min);
        let most = least.saturating_add(part(least, up).max(4)).max(current);
        if draft.decision.replicas > most {
            draft.take("rate", most, || format!("from {least} a minute ago no more are added at once"));
        }
    } else if down > 0.0 && draft.lowers() {
        let most = recent.fold(current, u32::max);
        let least = most.saturating_sub(part(most, down).max(1));
        draft.keep("rate", least, || format!("from {most} a minute ago no more are let go at once"));
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "float to integer casts saturate")]
fn part(replicas: u32, part: f64) -> u32 {
    (f64::from(replicas) * part).floor() as u32
}

#[cfg(test)]
mod tests {
    use super::super::scene::Scene;

    #[test]
    fn llm_d_autoscaling_777_a_dip_of_seconds_lets_nobody_go() {
        let mut scene = Scene::steady(8, 2.0);
        scene.past(8);
        assert_eq!(scene.guarded(4).guards, ["stabilise"]);
        assert_eq!(scene.guarded(4).replicas, 8);
    }

    #[test]
    fn dynamo_14251_oscillation_ends_with_the_direction_that_is_safe() {
        let mut scene = Scene::steady(6, 2.0);
        scene.zigzag(6);
        assert_eq!(scene.guarded(3).replicas, 6);
        assert_eq!(scene.guarded(9).replicas, 9, "up is always possible");
    }

    #[test]
    fn aibrix_2670_one_wrong_reading_asks_for_four_more_and_not_for_hundreds() {
        assert_eq!(Scene::steady(2, 500.0).guarded(500).replicas, 6);
        assert_eq!(Scene::steady(20, 500.0).guarded(500).replicas, 40);
        assert_eq!(Scene::steady(20, 1.0).guarded(1).replicas, 10);
    }
}
