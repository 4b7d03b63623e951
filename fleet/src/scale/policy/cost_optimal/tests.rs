use super::*;
use crate::scale::forecast::tests::Scene;

fn decide(scene: &Scene, miss: f64) -> Decision {
    CostOptimal { miss, ..CostOptimal::default() }.desired(&scene.observation(), scene.now())
}

fn steady() -> Scene {
    Scene { ready: 0, ..Scene::of(600, |_| 16.0) }
}

#[test]
fn the_price_of_missing_decides_how_much_is_kept() {
    let at = |miss| decide(&steady(), miss).replicas;
    assert_eq!(at(0.01), 16, "where misses cost nothing the expected load is enough");
    assert!(at(1.0) < at(10.0) && at(10.0) < at(1000.0), "{} {} {}", at(1.0), at(10.0), at(1000.0));
    assert!(at(1000.0) < 32);
}

/// The rule is that of the smallest expected cost, which a plain scan over all numbers finds too.
#[test]
fn it_is_the_cheapest_of_all_numbers() {
    let policy = CostOptimal::default();
    for (load, spread) in [(0.3, 0.1), (2.0, 0.2), (9.7, 0.08), (31.4, 0.06), (120.0, 0.05)] {
        let s = load * f64::hypot(spread, policy.drift);
        let cost = |n: u32| {
            let missed: f64 = (n..n + 400)
                .map(|k| {
                    (f64::from(k) + 0.5) * (normal((f64::from(k) + 1.0 - load) / s) - normal((f64::from(k) - load) / s))
                })
                .sum();
            f64::from(n) + policy.miss * missed
        };
        let least = whole(load);
        let best = (least..least + 60).min_by(|&a, &b| cost(a).total_cmp(&cost(b))).unwrap();
        assert_eq!(policy.cheapest(load, spread), best, "{load} {spread}");
    }
}

#[test]
fn committed_replicas_are_not_let_go() {
    let mut scene = Scene::of(600, |_| 2.0);
    scene.ready = 12;
    scene.committed = 9;
    let decision = decide(&scene, 10.0);
    assert_eq!(decision.replicas, 9);
    assert!(decision.reasons.iter().any(|reason| reason.contains("committed")));
}

#[test]
fn a_replica_that_does_less_than_it_should_counts_as_less() {
    let look = |ttft_s: f64| Sample {
        ready: 20,
        load: Some(16.0),
        ttft_s: Some(ttft_s),
        tpot_s: Some(0.05),
        ..Sample::default()
    };
    let as_promised = steady().looks(&[look(1.0); 30]);
    let too_slow = steady().looks(&[look(3.0); 30]);
    let (good, bad) = (decide(&as_promised, 10.0), decide(&too_slow, 10.0));
    assert!(bad.replicas > good.replicas, "{good:?} {bad:?}");
    assert!(bad.reasons.iter().any(|reason| reason.contains("80 %")), "{bad:?}");
    // A miss while there was too much to do says nothing about what a replica can do.
    let overloaded = steady().looks(&[Sample { load: Some(25.0), ..look(3.0) }; 30]);
    assert_eq!(usable(&overloaded.observation()), 1.0);
}

#[test]
fn what_waits_has_to_be_done_too() {
    let look = |waiting| Sample { load: Some(16.0), ready: 20, waiting: Some(waiting), ..Sample::default() };
    let none = decide(&steady().looks(&[look(0.0)]), 10.0).replicas;
    // 2,400 requests are 4 replicas for a cold start of five minutes at 2 requests/s each.
    assert!(decide(&steady().looks(&[look(2400.0)]), 10.0).replicas >= none + 4);
}

#[test]
fn the_normal_distribution_is_the_one_of_the_tables() {
    for (z, p) in [(0.0, 0.5), (1.0, 0.841_344_7), (-1.96, 0.024_997_9), (3.0, 0.998_650_1)] {
        assert!((normal(z) - p).abs() < 2e-7, "{z}: {}", normal(z));
    }
}
