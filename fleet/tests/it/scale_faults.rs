//! What goes wrong, played against every policy behind the usual guards: whatever happens, nothing cascades, the floor holds, nothing
//! flaps, and every decision says why.

use fleet::scale::{Bounds, Guards, Policy};
use fleet::sim::demand::Demand;
use fleet::sim::failure::{Faults, Outage, Window};
use fleet::sim::fluid;
use fleet::sim::outcome::{Logged, Outcome};
use fleet::sim::plan::{Log, Plan};
use ledger::Timestamp;

const HOUR_S: f64 = 3600.0;
const HOURS: f64 = 5.0;
const FLOOR: u32 = 2;
const CEILING: u32 = 60;
const STATIC: u32 = 12;
/// The load before anything happens.
const BASE: f64 = 7.0;
/// From when on things go wrong; before that a policy has found its place.
const FROM_S: f64 = 2.0 * HOUR_S;
/// Turns of the number of replicas within any hour that are still no flapping.
const TURNS_MAX: u64 = 6;

/// A course of load with the noise that real ones have, in bins of ten seconds.
fn course(load: impl Fn(f64) -> f64) -> Demand {
    let bins: u32 = 360 * 5;
    let noisy = |bin: u32| {
        let noise = f64::from(bin.wrapping_mul(2_654_435_761) >> 16) / 65_536.0 - 0.5;
        load(f64::from(bin) * 10.0) * (1.0 + 0.2 * noise)
    };
    #[expect(clippy::cast_possible_truncation, reason = "loads need no more digits")]
    let loads: Vec<f32> = (0..bins).map(|bin| noisy(bin) as f32).collect();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small number of requests")]
    let requests = (0..bins).map(|bin| (noisy(bin) * 20.0) as u32).collect();
    Demand::from_load(Timestamp::from_micros(1_714_953_600_000_000), 10.0, loads, requests)
}

fn steady() -> Demand {
    course(|_| BASE)
}

fn play(policy: &str, demand: &Demand, faults: Faults) -> Outcome {
    let bounds = Bounds {
        floor: FLOOR,
        ceiling: CEILING,
        committed: 0,
        static_replicas: STATIC,
        cold_start_s: 300.0,
        batch_at_capacity: 64.0,
        requests_per_s_at_capacity: 2.0,
        input_tokens_per_s_at_capacity: 2000.0,
        output_tokens_per_s_at_capacity: 400.0,
    };
    let policy: Policy = policy.parse().unwrap();
    let plan = Plan { faults, log: Log::All, guards: Guards::default(), ..Plan::new(policy, bounds) };
    fluid::run(&plan, demand)
}

fn policies() -> impl Iterator<Item = &'static str> {
    Policy::NAMES.into_iter().map(|name| if name == "schedule" { "schedule:else=12" } else { name })
}

/// Those whose number follows the load, and so have to follow it here too.
fn following() -> impl Iterator<Item = &'static str> {
    policies().filter(|name| !name.starts_with("static") && !name.starts_with("schedule"))
}

fn seconds(outcome: &Outcome, logged: &Logged) -> f64 {
    let start = outcome.log.first().map_or(logged.at, |first| first.at);
    logged.at.micros_since(start) as f64 / 1e6 + 10.0
}

fn during(outcome: &Outcome, from_s: f64, to_s: f64) -> impl Iterator<Item = &Logged> {
    outcome.log.iter().filter(move |logged| (from_s..to_s).contains(&seconds(outcome, logged)))
}

/// What has to hold whatever happens. `most` is the highest load that ever came.
fn check(policy: &str, what: &str, outcome: &Outcome, most: f64) {
    let case = format!("{policy} under {what}");
    assert!(outcome.log.len() > 1000, "{case}: every decision is there, {}", outcome.log.len());
    for logged in &outcome.log {
        assert!((FLOOR..=CEILING).contains(&logged.desired), "{case}: {logged:?}");
        assert!(
            !logged.reasons.is_empty() && logged.reasons.iter().all(|reason| !reason.is_empty()),
            "{case}: {logged:?}"
        );
        assert!(logged.desired == logged.wanted || !logged.guards.is_empty(), "{case}: nobody says why: {logged:?}");
    }
    let floor_held =
        outcome.minutes.iter().all(|minute| f64::from(minute.ready + minute.pending) >= f64::from(FLOOR) - 1e-3);
    assert!(floor_held, "{case}: fewer than the floor");
    assert!(
        outcome.direction_changes_per_hour_max <= TURNS_MAX,
        "{case}: {} turns",
        outcome.direction_changes_per_hour_max
    );
    // Twice what a noisy minute brings is headroom; two, four, eight, sixteen for one is a cascade.
    let enough = f64::from(STATIC).max(2.5 * most + 4.0);
    assert!(
        f64::from(outcome.provisioned_max) <= enough,
        "{case}: {} replicas for a load of {most}",
        outcome.provisioned_max
    );
}

fn window(from_s: f64, to_s: f64) -> Window {
    Window { from_s, to_s }
}

#[test]
fn nothing_goes_wrong() {
    for policy in policies() {
        check(policy, "nothing", &play(policy, &steady(), Faults::default()), BASE);
    }
}

#[test]
fn a_metrics_outage_is_not_zero_load() {
    for outage in [Outage::Frozen, Outage::Blank] {
        for policy in policies() {
            let faults = Faults { metrics: vec![(window(FROM_S, FROM_S + 1800.0), outage)], ..Faults::default() };
            let outcome = play(policy, &steady(), faults);
            check(policy, "a metrics outage", &outcome, BASE);
            // The oracle needs no metrics: it knows.
            if policy == "oracle" {
                continue;
            }
            let before = during(&outcome, FROM_S - 60.0, FROM_S).map(|logged| logged.ready).min().unwrap();
            // Looks count as fresh for a little while; behind that everything has to stand still.
            let blind: Vec<u32> =
                during(&outcome, FROM_S + 180.0, FROM_S + 1800.0).map(|logged| logged.desired).collect();
            assert!(blind.windows(2).all(|pair| pair[0] == pair[1]), "{policy}, {outage:?}: moved blindly {blind:?}");
            assert!(blind.iter().all(|&desired| desired + 1 >= before), "{policy}, {outage:?}: {before} to {blind:?}");
        }
    }
}

#[test]
fn pods_that_never_schedule_are_not_piled_up() {
    let rising = course(|at_s| if at_s < FROM_S { BASE } else { 14.0 });
    for policy in policies() {
        let faults = Faults { unschedulable: vec![window(FROM_S - 60.0, f64::INFINITY)], ..Faults::default() };
        let outcome = play(policy, &rising, faults);
        // Nothing new ever serves: the number asked for must not grow with the time it takes.
        check(policy, "no place for anything", &outcome, 14.0);
        let ready = during(&outcome, FROM_S, HOURS * HOUR_S).map(|logged| logged.ready).min().unwrap();
        assert!(ready >= FLOOR, "{policy}: {ready} serve");
    }
}

#[test]
fn places_that_come_back_are_used() {
    let rising = course(|at_s| if at_s < FROM_S { BASE } else { 14.0 });
    for policy in following() {
        let faults = Faults { unschedulable: vec![window(FROM_S - 60.0, FROM_S + 1800.0)], ..Faults::default() };
        let outcome = play(policy, &rising, faults);
        check(policy, "no place for half an hour", &outcome, 14.0);
        let late = during(&outcome, FROM_S + 2.0 * HOUR_S, HOURS * HOUR_S).map(|logged| logged.ready).max().unwrap();
        assert!(late >= 13, "{policy}: only {late} serve a load of 14 long after there was room again");
    }
}

#[test]
fn slow_starts_count_as_capacity_on_its_way() {
    let rising = course(|at_s| if at_s < FROM_S { BASE } else { 14.0 });
    for policy in policies() {
        let faults = Faults { slow_starts: vec![(window(FROM_S, FROM_S + HOUR_S), 4.0)], ..Faults::default() };
        check(policy, "starts four times as slow", &play(policy, &rising, faults), 14.0);
    }
}

#[test]
fn manual_changes_are_respected_for_a_while() {
    for policy in policies() {
        let outcome = play(policy, &steady(), Faults { manual: vec![(FROM_S, 20)], ..Faults::default() });
        check(policy, "a manual edit", &outcome, 10.0);
        let after: Vec<u32> = during(&outcome, FROM_S + 20.0, FROM_S + 300.0).map(|logged| logged.desired).collect();
        assert!(after.iter().all(|&desired| desired == 20), "{policy}: {after:?}");
    }
    for policy in following() {
        let outcome = play(policy, &steady(), Faults { manual: vec![(FROM_S, 20)], ..Faults::default() });
        let late = outcome.log.last().unwrap().desired;
        assert!(late < 20, "{policy} still has {late} hours after somebody asked for 20");
    }
}

#[test]
fn a_doubling_in_ten_seconds_is_followed_and_no_more() {
    let doubled = course(|at_s| if at_s < FROM_S { BASE } else { 2.0 * BASE });
    for policy in policies() {
        check(policy, "a doubling", &play(policy, &doubled, Faults::default()), 2.0 * BASE);
    }
    for policy in following() {
        let outcome = play(policy, &doubled, Faults::default());
        let late = during(&outcome, FROM_S + HOUR_S, HOURS * HOUR_S).map(|logged| logged.ready).min().unwrap();
        assert!(
            f64::from(late) >= 1.8 * BASE,
            "{policy}: {late} serve an hour after the load doubled to {}",
            2.0 * BASE
        );
    }
}

#[test]
fn an_oscillating_load_is_no_reason_to_flap() {
    for period_s in [600.0, 1200.0, 2400.0] {
        let wave = course(|at_s| if at_s < FROM_S || (at_s / period_s).fract() < 0.5 { BASE } else { 2.0 * BASE });
        for policy in policies() {
            check(policy, &format!("waves of {period_s} s"), &play(policy, &wave, Faults::default()), 2.0 * BASE);
        }
    }
}

#[test]
fn crashes_leave_the_floor() {
    for policy in policies() {
        let outcome = play(policy, &steady(), Faults { crashes: vec![(FROM_S, 4)], ..Faults::default() });
        check(policy, "four crashes at once", &outcome, BASE);
    }
}
