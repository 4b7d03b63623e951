//! Replicas on their way count as capacity: where only those that serve were counted, every look at the same overload doubled
//! the fleet again, 2-4-8-16 (aibrix 2670).

use super::{Limit, View};
use crate::scale::forecast::whole;
use crate::scale::observe::Decision;

/// No more than `cascade_factor` times what arrives or is forecast, and one more at a time beyond that. Queues and full caches that
/// the missing replicas left behind are no reason for more: twice what comes clears any queue. What somebody planned passes.
pub(super) fn limit(view: &View, decision: &Decision) -> Limit {
    if !view.sees() || view.guards.cascade_factor <= 0.0 || decision.planned {
        return Limit::NONE;
    }
    let on_the_way = view.current > view.observation.ready;
    // Without a reading of the load a step at a time is all that can be justified.
    let step = view.current.saturating_add(u32::from(!on_the_way));
    match demand(view, decision) {
        Some(demand) => Limit::most(step.max(whole(demand * view.guards.cascade_factor))),
        None if on_the_way => Limit::most(step),
        None => Limit::NONE,
    }
}

pub(super) fn because(view: &View, decision: &Decision) -> String {
    let demand = demand(view, decision).map_or("unknown".to_owned(), |demand| format!("{demand:.2}"));
    format!(
        "{} serve, {} are on their way and the load is {demand}, which justifies {} at most",
        view.observation.ready,
        view.current.saturating_sub(view.observation.ready),
        limit(view, decision).most
    )
}

/// What arrives or will, or what waits where nothing arrives; replicas.
fn demand(view: &View, decision: &Decision) -> Option<f64> {
    let load = view.load?;
    let waiting = view.observation.newest().and_then(|newest| newest.waiting).unwrap_or(0.0);
    let backlog = waiting / view.observation.bounds.batch_at_capacity.max(1.0);
    let now = if load > 0.0 { load } else { backlog };
    Some(decision.forecast.filter(|forecast| forecast.is_finite()).map_or(now, |forecast| forecast.max(now)))
}

#[cfg(test)]
mod tests {
    use crate::scale::guard::guarded;
    use crate::scale::guard::scene::{SECOND, Scene, wish};
    use crate::scale::{Decision, Past, Pending, Sample};

    /// What is asked for in ten minutes by a policy that doubles what there is at each look while nothing starts.
    fn doubling(mut scene: Scene) -> Vec<u32> {
        let mut asked = Vec::new();
        for _ in 0..40 {
            let wanted = scene.provisioned() * 2;
            let desired = scene.guard(wanted).replicas;
            asked.push(desired);
            for _ in scene.provisioned()..desired {
                scene.pending.push(Pending { since: scene.now, scheduled: Some(true) });
            }
            scene.decisions.push(Past { at: scene.now, wanted, desired });
            scene.pass(15 * SECOND);
        }
        asked
    }

    #[test]
    fn aibrix_2670_replicas_on_their_way_are_not_asked_for_again() {
        // Two serve at twice their target of 70 %, and would take four.
        let asked = doubling(Scene::steady(2, 2.8));
        assert_eq!(asked[0], 4, "the need itself is met at once");
        assert_eq!(asked.iter().max(), Some(&6), "no cascade: {asked:?}");
    }

    #[test]
    fn aibrix_2670_without_a_reading_of_the_load_what_is_on_its_way_has_to_arrive_first() {
        let mut scene = Scene::steady(2, 2.8);
        for sample in &mut scene.samples {
            *sample = Sample { load: None, arrivals_per_s: None, ..*sample };
        }
        scene.wait_for(1, 10.0, None);
        let held = scene.guard(6);
        assert_eq!((held.replicas, held.guards.as_slice()), (3, ["pending"].as_slice()));
    }

    #[test]
    fn a_load_that_grows_a_forecast_and_a_plan_are_followed() {
        let mut scene = Scene::steady(4, 3.5);
        scene.wait_for(1, 10.0, Some(true));
        assert_eq!(scene.guard(9).replicas, 7);
        scene.set_load(7.0, 10.0);
        assert_eq!(scene.guard(8).replicas, 8);
        let scene = Scene::steady(6, 1.0);
        let wishes = [Decision { forecast: Some(9.0), ..wish(12) }, Decision { planned: true, ..wish(12) }];
        for decision in wishes {
            assert_eq!(guarded(decision, &scene.observation(), &scene.guards, scene.now).replicas, 12);
        }
        assert_eq!(scene.guard(12).replicas, 7, "one at a time whatever the load says");
    }
}
