//! The fault-injection run with engines instead of the fluid: policies behind the usual guards see what engines and their queues
//! really show, and requests are what must not be lost.

use fleet::scale::{Bounds, Policy};
use fleet::sim::demand::{Demand, Work};
use fleet::sim::engine::{Constants, Spec};
use fleet::sim::failure::{Faults, Outage, Window};
use fleet::sim::fleet::{Scenario, run};
use fleet::sim::outcome::{Logged, Outcome};
use fleet::sim::plan::{Log, Plan};
use fleet::sim::startup::Startup;
use fleet::sim::trace::Trace;
use ledger::Timestamp;
use ledger::allocate::replica::Replica;
use ledger::step::{GpuSheet, ModelShape};

const MIX: [(u32, u32); 3] = [(400, 60), (1500, 20), (100, 200)];
/// Roughly what an H100 does of the mix; a load of 1 is 27 requests a second.
const WORK: Work = Work { per_input_token: 20e-6, per_output_token: 250e-6 };
const POLICIES: [&str; 6] = ["hpa", "kpa", "queue-kv", "token-rate", "forecast", "cost-optimal"];
const FLOOR: u32 = 2;
const STATIC: u32 = 5;
/// When things go wrong, seconds.
const FROM_S: f64 = 900.0;
/// Turns of the number of replicas within any hour that are still no flapping.
const TURNS_MAX: u64 = 6;

/// Forty minutes in bins of five, requests a second.
fn trace(rates: [f64; 8]) -> Trace {
    Trace::rates("faults", Timestamp::from_micros(1_714_953_600_000_000), 300.0, &rates, &MIX, 7)
}

fn steady() -> Trace {
    trace([60.0; 8])
}

fn play(policy: &str, trace: &Trace, faults: Faults) -> Outcome {
    let bounds = Bounds {
        floor: FLOOR,
        ceiling: 40,
        committed: 0,
        static_replicas: STATIC,
        cold_start_s: 120.0,
        batch_at_capacity: 60.0,
        requests_per_s_at_capacity: 27.0,
        input_tokens_per_s_at_capacity: 18_000.0,
        output_tokens_per_s_at_capacity: 2_500.0,
    };
    let base = Plan::new(policy.parse::<Policy>().unwrap(), bounds);
    let plan = Plan { startup: Startup::fixed(120.0), faults, log: Log::All, ..base };
    let replica = Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 1);
    let scenario = Scenario::new(plan, Spec::new(Constants::unfitted(replica)), WORK);
    let demand = Demand::of(trace, &WORK).unwrap();
    run(&scenario, trace, &demand, &mut |_| {}).unwrap()
}

/// What has to hold whatever happens. `most` is the highest load that ever came.
fn check(policy: &str, what: &str, outcome: &Outcome, most: f64) {
    let case = format!("{policy} under {what}");
    assert_eq!((outcome.failed, outcome.done), (0, outcome.requests), "{case}: requests were lost");
    assert!(outcome.log.len() > 200, "{case}: {} decisions", outcome.log.len());
    for logged in &outcome.log {
        assert!(logged.desired >= FLOOR, "{case}: {logged:?}");
        assert!(
            logged.reasons.iter().any(|reason| reason.contains(|c: char| c.is_ascii_digit())),
            "{case}: {logged:?}"
        );
        assert!(logged.desired == logged.wanted || !logged.guards.is_empty(), "{case}: nobody says why: {logged:?}");
    }
    assert!(outcome.direction_changes_per_hour_max <= TURNS_MAX, "{case}: {}", outcome.direction_changes_per_hour_max);
    let enough = f64::from(STATIC).max(2.0 * most + 4.0);
    assert!(f64::from(outcome.provisioned_max) <= enough, "{case}: {} for {most}", outcome.provisioned_max);
}

fn window(from_s: f64, to_s: f64) -> Window {
    Window { from_s, to_s }
}

fn between(outcome: &Outcome, from_s: f64, to_s: f64) -> impl Iterator<Item = &Logged> {
    let start = outcome.log.first().map(|first| first.at);
    let seconds = move |logged: &Logged| start.map_or(0.0, |start| logged.at.micros_since(start) as f64 / 1e6);
    outcome.log.iter().filter(move |logged| (from_s..to_s).contains(&seconds(logged)))
}

#[test]
fn engines_behind_a_metrics_outage_keep_what_they_have() {
    for policy in POLICIES {
        for outage in [Outage::Frozen, Outage::Blank] {
            let faults = Faults { metrics: vec![(window(FROM_S, FROM_S + 600.0), outage)], ..Faults::default() };
            let outcome = play(policy, &steady(), faults);
            check(policy, "a metrics outage", &outcome, 2.4);
            let blind: Vec<u32> =
                between(&outcome, FROM_S + 90.0, FROM_S + 590.0).map(|logged| logged.desired).collect();
            assert!(blind.windows(2).all(|pair| pair[0] == pair[1]), "{policy}: moved blindly {blind:?}");
        }
    }
}

#[test]
fn engines_without_a_place_are_not_piled_up() {
    let doubled = trace([60.0, 60.0, 60.0, 120.0, 120.0, 120.0, 60.0, 60.0]);
    for policy in POLICIES {
        let faults = Faults { unschedulable: vec![window(FROM_S - 30.0, f64::INFINITY)], ..Faults::default() };
        let outcome = play(policy, &doubled, faults);
        check(policy, "no place for anything", &outcome, 4.8);
    }
}

#[test]
fn a_doubling_with_slow_starts_and_a_crash_is_served_in_the_end() {
    let doubled = trace([60.0, 60.0, 60.0, 120.0, 120.0, 120.0, 120.0, 120.0]);
    for policy in POLICIES {
        let faults = Faults {
            slow_starts: vec![(window(FROM_S, FROM_S + 300.0), 3.0)],
            crashes: vec![(FROM_S + 1000.0, 1)],
            ..Faults::default()
        };
        let outcome = play(policy, &doubled, faults);
        check(policy, "a doubling with slow starts", &outcome, 4.8);
        let late = between(&outcome, FROM_S + 1200.0, f64::INFINITY).map(|logged| logged.ready).max().unwrap();
        // One replica at a time is what queue and KV saturation publishes; the others know how many are missing.
        let enough = if policy == "queue-kv" { 3 } else { 4 };
        assert!(late >= enough, "{policy}: {late} serve twenty minutes behind a doubling to a load of 4.4");
    }
}

#[test]
fn engines_that_somebody_adds_by_hand_stay_for_a_while() {
    for policy in POLICIES {
        let outcome = play(policy, &steady(), Faults { manual: vec![(FROM_S, 6)], ..Faults::default() });
        check(policy, "a manual edit", &outcome, 3.0);
        let after: Vec<u32> = between(&outcome, FROM_S + 20.0, FROM_S + 600.0).map(|logged| logged.desired).collect();
        assert!(after.iter().all(|&desired| desired == 6), "{policy}: {after:?}");
    }
}
