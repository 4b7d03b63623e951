use super::super::fixtures::{at, attempt, between, capacity, engine};
use super::*;

#[test]
fn who_makes_the_peak_owes_the_headroom() {
    let capacity = [capacity("p", "r", 0.0, 120.0)];
    let engines = [engine("p", "e", "r", 0.0, 120.0)];
    // `odd` runs for six seconds of the first minute, `even` for the whole second one.
    let attempts =
        [attempt(1, "p", "e", (0.0, 0.0, 6.0), (10, 100)), attempt(2, "p", "e", (60.0, 60.0, 120.0), (10, 100))];
    let (policies, given) = (BTreeMap::new(), BTreeMap::new());
    let known = Known {
        capacity: &capacity,
        engines: &engines,
        attempts: &attempts,
        running: &[],
        spans: &[],
        readings: &[],
        steps: &[],
        jobs: &[],
        posted: &[],
        policies: &policies,
        demand: &given,
    };
    let demand = demand_of(&known, &"p".into(), between(0.0, 120.0));
    assert_eq!(demand.peak_gpus, Some(1.0));
    let owed: BTreeMap<&str, f64> =
        demand.headroom.iter().map(|(context, owed)| (context.team.as_deref().unwrap(), *owed)).collect();
    // Demands of a tenth and one: the tenth is shared by both, the rest is the second's, who has paid one already.
    assert!((owed["odd"] - 0.0).abs() < 1e-9 && (owed["even"] - 0.9).abs() < 1e-9, "{owed:?}");
    assert_eq!(demand_of(&known, &"nobody".into(), between(0.0, 120.0)), Demand::default());
    assert_eq!(demand_of(&known, &"p".into(), Period { start: at(600.0), end: at(700.0) }), Demand::default());
}
