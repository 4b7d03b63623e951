//! Those that stay must hold N/(N-1) of the load before one goes: a fleet that goes from two to one because each is below its limit
//! is overloaded at once and comes back, for ever (dynamo PR 9294).

use super::{Limit, View};
use crate::scale::forecast::whole;
use crate::scale::observe::Decision;

pub(super) fn limit(view: &View, _: &Decision) -> Limit {
    if !view.sees() {
        return Limit::NONE;
    }
    Limit::least(strictest(view).map_or(0, |need| need.replicas.min(view.current)))
}

pub(super) fn because(view: &View, _: &Decision) -> String {
    let Some(need) = strictest(view) else { return String::new() };
    format!("{}, and at {} each that takes {} of {}", need.seen, need.limit, need.replicas, view.current)
}

/// Replicas that one reading takes.
struct Need {
    seen: String,
    limit: f64,
    replicas: u32,
}

fn strictest(view: &View) -> Option<Need> {
    let newest = view.observation.newest()?;
    let ready = f64::from(view.observation.ready);
    let batch = view.observation.bounds.batch_at_capacity;
    let by_batch = newest.running.filter(|_| view.load.is_none() && batch > 0.0).map(|running| running / batch);
    let guards = view.guards;
    let readings = [
        ("a load of", view.load.or(by_batch), guards.survivors_full),
        ("KV caches filled", newest.kv_used.map(|kv| kv * ready), guards.survivors_kv),
        ("requests waiting", newest.waiting, guards.survivors_waiting),
    ];
    let needs = readings.into_iter().filter_map(|(name, total, limit)| {
        let total = total.filter(|total| total.is_finite() && limit > 0.0)?;
        Some((name, total, limit, whole(total / limit)))
    });
    let (name, total, limit, replicas) = needs.max_by_key(|(.., replicas)| *replicas)?;
    Some(Need { seen: format!("{name} {total:.2}"), limit, replicas })
}

#[cfg(test)]
mod tests {
    use crate::scale::guard::scene::Scene;

    #[test]
    fn dynamo_pr_9294_two_at_seventy_percent_do_not_become_one() {
        // Each is below its limit; the one that stayed would have 140 %.
        let scene = Scene::steady(2, 1.4);
        let held = scene.guard(1);
        assert_eq!((held.replicas, held.guards.as_slice()), (2, ["survivors"].as_slice()));
        assert!(held.reasons[0].contains("1.40"), "{:?}", held.reasons);
        // At 45 % each the other can do it.
        assert_eq!(Scene::steady(2, 0.9).guard(1).replicas, 1);
        // Of twenty at 90 % two can go and three cannot.
        assert_eq!(Scene::steady(20, 18.0).guard(18).replicas, 18);
        assert_eq!(Scene::steady(20, 18.0).guard(17).replicas, 18);
    }

    #[test]
    fn full_caches_and_queues_are_load_too() {
        let mut scene = Scene::steady(4, 1.0);
        scene.samples.last_mut().unwrap().kv_used = Some(0.7);
        assert_eq!(scene.guard(2).replicas, 3);
        scene.samples.last_mut().unwrap().kv_used = Some(0.2);
        scene.samples.last_mut().unwrap().waiting = Some(40.0);
        assert_eq!(scene.guard(2).replicas, 4);
    }
}
