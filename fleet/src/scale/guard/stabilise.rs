//! Fewer has to be wanted for a while, and by somebody who has watched that long: a scaler that restarts knows nothing of the
//! minutes before.

use super::{Limit, View, seconds};
use crate::scale::earlier;
use crate::scale::observe::Decision;

pub(super) fn limit(view: &View, _: &Decision) -> Limit {
    if !view.sees() || view.guards.stabilise_s <= 0.0 {
        return Limit::NONE;
    }
    Limit::least(if watched(view) { most_wanted(view).min(view.current) } else { view.current })
}

pub(super) fn because(view: &View, _: &Decision) -> String {
    let window = view.guards.stabilise_s;
    if watched(view) {
        return format!("{} were wanted within the last {window:.0} s", most_wanted(view));
    }
    let watched = view.observation.decisions.first().map_or(0.0, |first| seconds(view.now, first.at));
    format!("watched for {watched:.0} of {window:.0} s only, so {} stay", view.current)
}

fn watched(view: &View) -> bool {
    let since = earlier(view.now, view.guards.stabilise_s);
    view.observation.decisions.first().is_some_and(|first| first.at <= since)
}

fn most_wanted(view: &View) -> u32 {
    let since = earlier(view.now, view.guards.stabilise_s);
    let recent = view.observation.decisions.iter().rev().take_while(|past| past.at > since);
    recent.map(|past| past.wanted).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use crate::scale::Past;
    use crate::scale::guard::scene::Scene;

    #[test]
    fn a_wish_for_fewer_has_to_last_a_minute() {
        let mut scene = Scene::steady(6, 2.0);
        let at = scene.ago(20.0);
        let last = scene.decisions.iter_mut().rev().find(|past| past.at <= at).unwrap();
        *last = Past { wanted: 5, ..*last };
        let held = scene.guard(5);
        assert_eq!(held.replicas, 5, "{:?}", held.reasons);
        let held = scene.guard(4);
        assert_eq!((held.replicas, held.guards.as_slice()), (5, ["stabilise"].as_slice()));
    }

    #[test]
    fn a_scaler_that_has_just_started_lets_nothing_go() {
        let mut scene = Scene::steady(6, 2.0);
        scene.decisions.clear();
        let held = scene.guard(5);
        assert_eq!((held.replicas, held.guards.as_slice()), (6, ["stabilise"].as_slice()));
        scene.set_load(6.0, 60.0);
        assert_eq!(scene.guard(8).replicas, 8, "more can be had at once");
    }
}
