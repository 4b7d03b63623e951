use std::sync::Mutex;

use ledger::Timestamp;

use super::*;
use crate::scale::Bounds;

pub(crate) fn bounds(peak: u32) -> Bounds {
    Bounds {
        floor: 1,
        ceiling: 3 * peak,
        committed: 0,
        static_replicas: peak,
        cold_start_s: 300.0,
        batch_at_capacity: 64.0,
        requests_per_s_at_capacity: 2.0,
        input_tokens_per_s_at_capacity: 2000.0,
        output_tokens_per_s_at_capacity: 400.0,
    }
}

/// Days of a smooth course between 2 and 10 replicas, in bins of 10 s, with a little noise that is always the same.
pub(crate) fn days(count: u32) -> Demand {
    let bins = count * 8640;
    let load = |bin: u32| {
        let angle = f64::from(bin % 8640) / 8640.0 * std::f64::consts::TAU;
        let noise = f64::from(bin.wrapping_mul(2_654_435_761) >> 16) / 65_536.0 - 0.5;
        super::super::demand::narrow((6.0 - 4.0 * angle.cos()) * (1.0 + 0.2 * noise))
    };
    let loads: Vec<f32> = (0..bins).map(load).collect();
    let requests = (0..bins).map(|bin| crate::scale::forecast::whole(f64::from(load(bin)) * 20.0)).collect();
    Demand::from_load(Timestamp::from_micros(1_714_953_600_000_000), 10.0, loads, requests)
}

pub(crate) fn plan() -> Plan {
    Plan { decide_every_s: 30.0, ..Plan::new(Policy::default(), bounds(11)) }
}

fn all() -> Vec<Policy> {
    ["static", "hpa", "forecast", "cost-optimal", "oracle"].iter().map(|name| name.parse().unwrap()).collect()
}

#[test]
fn rows_come_in_order_with_what_they_are_compared_to() {
    let (plan, demand) = (plan(), days(2));
    let heard = Mutex::new(Vec::new());
    let rows = compare(&all(), &fluid(&plan, &demand), 2, &|done, of| heard.lock().unwrap().push((done, of))).unwrap();
    assert_eq!(
        rows.iter().map(|row| row.policy.name()).collect::<Vec<_>>(),
        all().iter().map(Policy::name).collect::<Vec<_>>()
    );
    let mut heard = heard.into_inner().unwrap();
    heard.sort_unstable();
    assert_eq!(heard, (1..=5).map(|done| (done, 5)).collect::<Vec<_>>());
    let [fixed, hpa, forecast, _, oracle] = rows.as_slice() else { panic!("five rows") };
    assert!(fixed.saved_static.abs() < 1e-9 && hpa.saved_hpa == Some(0.0) && oracle.over_oracle == Some(0.0));
    assert_eq!(oracle.outcome.overload.requests, 0, "the oracle misses nothing");
    assert!(forecast.saved_static > 0.2 && forecast.saved_static < oracle.saved_static);
    assert!(forecast.over_oracle.unwrap() > 0.0);
}

#[test]
fn nobody_is_below_the_bound() {
    let (plan, demand) = (plan(), days(2));
    let floor = bound(&demand.minutes(), &demand.request_minutes(), 5, 0.0);
    let rows = compare(&all(), &fluid(&plan, &demand), 2, &|_, _| {}).unwrap();
    for row in rows.iter().filter(|row| row.outcome.overload.requests == 0) {
        assert!(row.outcome.gpu_hours * 60.0 >= floor.replica_minutes - 1e-6, "{} {floor:?}", row.policy);
    }
    // The oracle reaches it but for what its replicas cost while they drain, and the static plan that it starts with.
    let oracle = rows.last().unwrap().outcome.gpu_hours * 60.0;
    assert!(oracle < 1.04 * floor.replica_minutes, "{oracle} {floor:?}");
}

#[test]
fn results_do_not_depend_on_threads() {
    let (plan, demand) = (plan(), days(1));
    let with = |threads| -> Vec<f64> {
        let rows = compare(&all(), &fluid(&plan, &demand), threads, &|_, _| {}).unwrap();
        rows.iter().map(|row| row.outcome.gpu_hours).collect()
    };
    assert_eq!(with(1), with(3));
}

#[test]
fn committed_gpus_save_no_cash() {
    let demand = days(1);
    let free = plan();
    let mut bound = plan();
    bound.bounds.committed = 11;
    let saved = |plan: &Plan| compare(&all(), &fluid(plan, &demand), 2, &|_, _| {}).unwrap()[2].saved_static;
    assert!(saved(&free) > 0.1);
    assert!(saved(&bound) <= 1e-9, "everything is paid already: {}", saved(&bound));
}

#[test]
fn every_policy_has_a_frontier_of_valid_points() {
    for name in Policy::NAMES {
        let Ok(policy) = name.parse::<Policy>() else { continue };
        let points = sweep(&policy);
        assert!(!points.is_empty());
        if let Some(main) = main_parameter(&policy) {
            assert!(policy.parameters().iter().any(|(found, ..)| *found == main), "{policy} has no {main}");
            assert!(points.len() > 3 || policy.name() == "static", "{policy}");
        }
    }
}
