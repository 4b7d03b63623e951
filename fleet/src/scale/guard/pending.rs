//! What is on its way is capacity, until it is clear that it will not come.

use ledger::Timestamp;

use super::Draft;
use crate::scale::earlier;
use crate::scale::forecast::whole;

/// While replicas are on their way, no more than `cascade_factor` times what is needed is asked for.
///
/// Seen in public: 2, 4, 8, 16 replicas while the first ones still loaded (aibrix 2670, llm-d-autoscaling 1433). A wish that
/// comes from a forecast is not a reaction to what is still missing, and passes.
pub(super) fn count_as_capacity(draft: &mut Draft) {
    let factor = draft.guards.cascade_factor;
    let observation = draft.observation;
    let on_the_way = observation.pending.len();
    if factor <= 0.0 || on_the_way == 0 || !draft.raises() || draft.decision.forecast.is_some() {
        return;
    }
    let Some((load, newest)) = observation.newest().and_then(|newest| Some((newest.load?, newest))) else { return };
    let backlog = newest.waiting.unwrap_or(0.0) / observation.bounds.batch_at_capacity.max(1.0);
    let needed = load + backlog;
    let most = whole(needed * factor).saturating_add(1).max(draft.current());
    if draft.decision.replicas > most {
        draft.take("pending-is-capacity", most, || {
            format!("{on_the_way} are on their way and what comes and waits would fill {needed:.2}")
        });
    }
}

/// Gives up replicas that have had no place for too long, and does not ask for more than fits for a while.
///
/// Seen in public: replicas that can never be scheduled were counted as capacity for ever, or asked for again at every
/// interval (dynamo PR 14575's discussion of pending pods, llm-d-autoscaling 1213).
pub(super) fn give_up(draft: &mut Draft) {
    let give_up_s = draft.guards.give_up_s;
    if give_up_s <= 0.0 {
        return;
    }
    let since = earlier(draft.now, give_up_s);
    let observation = draft.observation;
    let hopeless =
        observation.pending.iter().filter(|pending| pending.scheduled == Some(false) && pending.since <= since);
    let hopeless = u32::try_from(hopeless.count()).unwrap_or(u32::MAX);
    let fits = draft.current().saturating_sub(hopeless);
    if hopeless > 0 && draft.decision.replicas > fits {
        draft.take("unschedulable", fits, || format!("{hopeless} have had no place for {give_up_s:.0} s"));
    } else if let Some((at, left)) = given_up(draft)
        && draft.decision.replicas > left.max(observation.ready)
    {
        let retry_s = draft.guards.retry_s;
        let ago_s = draft.now.micros_since(at) as f64 / 1e6;
        draft.take("unschedulable", left.max(observation.ready), || {
            format!("more had no place {ago_s:.0} s ago, the next try is after {retry_s:.0} s")
        });
    }
}

/// When replicas were last given up, and to how many: a fall that the policy did not want and that nobody made by hand.
fn given_up(draft: &Draft) -> Option<(Timestamp, u32)> {
    let observation = draft.observation;
    let since = earlier(draft.now, draft.guards.retry_s);
    let by_hand = |at: Timestamp| observation.manual.is_some_and(|manual| at >= manual.at);
    observation.decisions.windows(2).rev().take_while(|pair| pair[1].at > since).find_map(|pair| {
        let [before, after] = pair else { return None };
        let against_the_wish = after.desired < before.desired && after.wanted >= before.desired;
        let bounded = after.desired >= observation.bounds.ceiling;
        (against_the_wish && !bounded && !by_hand(after.at)).then_some((after.at, after.desired))
    })
}

#[cfg(test)]
mod tests {
    use super::super::scene::Scene;
    use crate::scale::observe::{Past, Pending};

    #[test]
    fn aibrix_2670_pending_replicas_are_capacity() {
        // One serves, two load, and a policy that only sees the one that serves doubles again and again.
        let mut scene = Scene::steady(1, 2.4);
        scene.wait_for(3, 60.0, None);
        let decision = scene.guarded(16);
        assert_eq!(decision.replicas, 6, "2 x 2.4 and one");
        assert_eq!(decision.guards, ["pending-is-capacity"]);
        scene.last().waiting = Some(40.0);
        assert_eq!(scene.guarded(16).replicas, 8, "what waits needs its replicas too, and four a minute is the pace");
    }

    #[test]
    fn llm_d_autoscaling_1433_what_can_never_be_scheduled_is_given_up() {
        let mut scene = Scene::steady(3, 6.0);
        scene.wait_for(4, 1_000.0, Some(false));
        let decision = scene.guarded(7);
        assert_eq!((decision.replicas, decision.guards.as_slice()), (3, ["unschedulable"].as_slice()));
        // A minute later they are gone, and are not asked for again at once.
        let at = scene.now();
        scene.decisions =
            vec![Past { at: at.plus_micros(-10_000_000), wanted: 7, desired: 7 }, Past { at, wanted: 7, desired: 3 }];
        scene.pending.clear();
        scene.now_s += 60.0;
        scene.look_again();
        assert_eq!(scene.guarded(7).replicas, 3);
        scene.now_s += 1_800.0;
        scene.look_again();
        assert_eq!(scene.guarded(7).replicas, 7, "the next try");
    }

    #[test]
    fn a_pod_that_waits_for_its_node_is_not_given_up_early() {
        let mut scene = Scene::steady(3, 6.0);
        scene.pending = vec![Pending { since: scene.now(), scheduled: Some(false) }; 4];
        assert_eq!(scene.guarded(7).replicas, 7);
    }
}
