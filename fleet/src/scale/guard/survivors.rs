//! Who is left has to do the work of all.

use super::Draft;
use crate::scale::earlier;
use crate::scale::forecast::whole;

/// Seconds of which the highest load counts.
const LOOK_BACK_S: f64 = 120.0;
/// Part of the KV caches that survivors may come to.
const KV_FULL: f64 = 0.9;

/// Before `N` become `M`, the `M` must hold `N / M` times what each holds now.
///
/// Seen in public: down by one, overloaded, up by one, for ever (llm-d-autoscaling 777, dynamo 14251).
pub(super) fn hold_the_load(draft: &mut Draft) {
    let full = draft.guards.survivors_full;
    if full <= 0.0 || !draft.lowers() {
        return;
    }
    let since = earlier(draft.now, LOOK_BACK_S);
    let recent = || draft.observation.samples.iter().filter(move |sample| sample.at > since);
    let load = recent().filter_map(|sample| sample.load).fold(0.0, f64::max);
    let kv = recent().filter_map(|sample| Some(sample.kv_used? * f64::from(sample.ready))).fold(0.0, f64::max);
    let needed = whole(load / full).max(whole(kv / KV_FULL));
    draft.keep("survivors", needed, || {
        format!("whoever is left has to do a load of {load:.2} and hold {kv:.2} KV caches")
    });
}

#[cfg(test)]
mod tests {
    use super::super::scene::Scene;

    #[test]
    fn llm_d_autoscaling_777_survivors_must_hold_the_load_of_all() {
        let scene = Scene::steady(4, 3.4);
        let decision = scene.guarded(3);
        assert_eq!((decision.replicas, decision.guards.as_slice()), (4, ["survivors"].as_slice()));
        assert_eq!(Scene::steady(4, 2.9).guarded(3).replicas, 3);
    }

    #[test]
    fn dynamo_14251_full_kv_caches_of_few_requests_count_too() {
        let mut scene = Scene::steady(4, 0.5);
        scene.samples.iter_mut().for_each(|sample| sample.kv_used = Some(0.8));
        assert_eq!(scene.guarded(1).replicas, 4);
    }
}
