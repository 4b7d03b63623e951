//! Whole fleets on small traces: nothing is lost, nothing is counted twice, and the same seed plays the same game.

use fleet::scale::{Bounds, Guards, Policy};
use fleet::sim::demand::{Demand, Work};
use fleet::sim::engine::{Constants, Spec};
use fleet::sim::failure::{Failures, Faults, Outage, Spot, Window};
use fleet::sim::fleet::{Hold, Scenario, Split, run};
use fleet::sim::outcome::Outcome;
use fleet::sim::plan::{Log, Plan, Prices};
use fleet::sim::router::Router;
use fleet::sim::startup::Startup;
use fleet::sim::trace::Trace;
use fleet::sim::{Arrival, Prefixes, fluid};
use ledger::allocate::replica::Replica;
use ledger::step::{GpuSheet, ModelShape};
use ledger::{GpuHourRate, Money, Timestamp};
use proptest::prelude::*;

const MIX: [(u32, u32); 3] = [(400, 60), (1500, 20), (100, 200)];
/// Roughly what an H100 does of the mix; the tests need a scale, not the truth.
const WORK: Work = Work { per_input_token: 20e-6, per_output_token: 250e-6 };

fn bounds(static_replicas: u32) -> Bounds {
    Bounds {
        floor: 1,
        ceiling: 40,
        committed: 0,
        static_replicas,
        cold_start_s: 120.0,
        batch_at_capacity: 60.0,
        requests_per_s_at_capacity: 15.0,
        input_tokens_per_s_at_capacity: 10_000.0,
        output_tokens_per_s_at_capacity: 1_400.0,
    }
}

fn plan(policy: &str, static_replicas: u32) -> Plan {
    let plan = Plan::new(policy.parse::<Policy>().unwrap(), bounds(static_replicas));
    Plan { startup: Startup::fixed(120.0), ..plan }
}

fn scenario(plan: Plan) -> Scenario {
    let replica = Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 1);
    Scenario::new(plan, Spec::new(Constants::unfitted(replica)), WORK)
}

/// Twenty minutes at 10, 40, 60, 20 and 5 requests a second.
fn hill(seed: u64) -> Trace {
    Trace::rates("hill", Timestamp::default(), 240.0, &[10.0, 40.0, 60.0, 20.0, 5.0], &MIX, seed)
}

fn play(scenario: &Scenario, trace: &Trace) -> Outcome {
    let demand = Demand::of(trace, &scenario.work).unwrap();
    run(scenario, trace, &demand, &mut |_| {}).unwrap()
}

fn count(trace: &Trace) -> u64 {
    trace.arrivals().unwrap().count() as u64
}

#[test]
fn a_seed_plays_the_same_game_again_and_another_seed_another() {
    let trace = hill(1);
    let with_seed = |seed| {
        let failures = Failures { mtbf_h: Some(0.3), ..Failures::default() };
        let startup = Startup::fixed(60.0).varied(0.4);
        play(&scenario(Plan { seed, failures, startup, log: Log::All, ..plan("token-rate", 3) }), &trace)
    };
    let first = with_seed(1);
    assert!(first.crashes > 0 && first.starts > 0, "the game has chance in it: {first:?}");
    assert!(first == with_seed(1));
    assert!(first != with_seed(2));
}

#[test]
fn a_static_fleet_that_is_large_enough_keeps_every_promise() {
    let trace = hill(2);
    let outcome = play(&scenario(plan("static", 6)), &trace);
    assert_eq!((outcome.requests, outcome.done), (count(&trace), count(&trace)));
    assert_eq!((outcome.failed, outcome.unfinished, outcome.held, outcome.overload.minutes), (0, 0, 0, 0));
    assert_eq!((outcome.ready_min, outcome.provisioned_max, outcome.starts, outcome.changes), (6, 6, 0, 0));
    let latency = outcome.latency.unwrap();
    assert!(latency.attained > 0.99, "{latency:?}");
    assert!((outcome.gpu_hours - 6.0 * 20.0 / 60.0).abs() < 0.02, "{}", outcome.gpu_hours);
    assert!(outcome.static_peak.replicas <= 6 && outcome.saved <= 0.0);
}

#[test]
fn a_fleet_that_is_too_small_is_overloaded_and_late() {
    let outcome = play(&scenario(plan("static", 1)), &hill(2));
    assert!(outcome.overload.minutes > 5 && outcome.overload.share > 0.5, "{:?}", outcome.overload);
    assert!(outcome.latency.unwrap().attained < 0.7);
    assert_eq!(outcome.requests, outcome.done);
}

#[test]
fn what_is_paid_is_what_ran_and_what_was_committed() {
    let rate = |text: &str| text.parse::<GpuHourRate>().unwrap();
    let trace = hill(3);
    let base = plan("token-rate", 3);
    let prices = Prices { on_demand: rate("6.00"), committed: rate("3.00") };
    let plan = Plan { gpus: 2, prices, bounds: Bounds { committed: 2, ..base.bounds }, ..base };
    let outcome = play(&scenario(plan), &trace);
    let by_minute: f64 = outcome.minutes.iter().map(|minute| f64::from(minute.paid) / 60.0 * 2.0).sum();
    assert!((by_minute / outcome.gpu_hours - 1.0).abs() < 1e-4, "{by_minute} {}", outcome.gpu_hours);
    let beyond: f64 = outcome.minutes.iter().map(|minute| f64::from((minute.paid - 2.0).max(0.0)) / 60.0 * 2.0).sum();
    let dollars = beyond * 6.0 + 2.0 * 2.0 * outcome.hours * 3.0;
    let paid = outcome.usd.pico() as f64 / Money::from_pico(1_000_000_000_000).pico() as f64;
    // A minute in which the number of replicas passes the commitment is between the two ways to add up.
    assert!((paid / dollars - 1.0).abs() < 0.03, "{paid} {dollars}");
    for minute in &outcome.minutes {
        assert!(minute.paid + 1e-4 >= minute.ready + minute.draining, "{minute:?}");
        assert!(minute.paid <= minute.ready + minute.draining + minute.pending + 1e-3, "{minute:?}");
    }
}

#[test]
fn the_fluid_mode_pays_the_same_and_misses_the_same_minutes() {
    let trace = hill(4);
    for policy in ["static", "token-rate"] {
        let scenario = scenario(plan(policy, 3));
        let whole = play(&scenario, &trace);
        let fluid = fluid::run(&scenario.plan, &Demand::of(&trace, &WORK).unwrap());
        assert!(
            (fluid.gpu_hours / whole.gpu_hours - 1.0).abs() < 0.05,
            "{policy}: {} {}",
            fluid.gpu_hours,
            whole.gpu_hours
        );
        assert!(
            fluid.overload.minutes.abs_diff(whole.overload.minutes) <= 2,
            "{:?} {:?}",
            fluid.overload,
            whole.overload
        );
        assert_eq!((fluid.requests, fluid.static_peak), (whole.requests, whole.static_peak));
        assert_eq!(fluid.latency, None);
    }
}

#[test]
fn only_the_judged_time_counts() {
    let scenario = scenario(Plan { judge_from_s: 600.0, ..plan("static", 4) });
    let trace = hill(5);
    let outcome = play(&scenario, &trace);
    let judged = trace.arrivals().unwrap().filter(|arrival| arrival.as_ref().unwrap().at_us >= 600_000_000).count();
    assert_eq!(outcome.requests, judged as u64);
    assert_eq!(outcome.done, outcome.requests);
    assert!((outcome.gpu_hours - 4.0 * 10.0 / 60.0).abs() < 0.02);
    assert_eq!(outcome.minutes.len(), 20, "the course is that of the whole run");
}

#[test]
fn a_last_minute_that_is_not_full_is_judged_by_its_part() {
    let demand = |load| Demand::from_load(Timestamp::default(), 10.0, vec![load; 7], vec![5; 7]);
    for (load, overloaded) in [(1.9, 0), (2.1, 2)] {
        let outcome = fluid::run(&plan("static", 2), &demand(load));
        assert_eq!((outcome.overload.minutes, outcome.minutes.len()), (overloaded, 2));
        assert!((outcome.minutes[1].load - load).abs() < 1e-6 && (outcome.minutes[1].ready - 2.0).abs() < 1e-6);
        assert!((outcome.gpu_hours - 2.0 * 70.0 / 3600.0).abs() < 1e-9);
    }
}

#[test]
fn requests_wait_for_the_first_replica_and_fail_when_too_many_do_or_too_long() {
    let trace = Trace::rates("few", Timestamp::default(), 300.0, &[1.0], &MIX, 1);
    let base = scenario(Plan { initial: Some(0), ..plan("static", 1) });
    let outcome = play(&base, &trace);
    // The first decision comes after ten seconds, the replica two minutes later.
    assert!((100..170).contains(&outcome.held), "{}", outcome.held);
    assert_eq!((outcome.failed, outcome.done, outcome.ready_min), (0, outcome.requests, 0));
    let first = outcome.latency.unwrap().ttft.max_s;
    assert!((120.0..140.0).contains(&first), "{first}");

    let few = Hold { requests_max: 10, ..Hold::default() };
    let outcome = play(&Scenario { hold: few, ..base.clone() }, &trace);
    assert_eq!((outcome.held, outcome.done + outcome.failed), (10, outcome.requests));
    let short = Hold { seconds_max: 30.0, ..Hold::default() };
    let outcome = play(&Scenario { hold: short, ..base }, &trace);
    assert!((70..150).contains(&outcome.failed), "{}", outcome.failed);
    assert_eq!(outcome.done + outcome.failed, outcome.requests);
}

#[test]
fn an_arrival_at_the_moment_a_replica_is_ready_finds_it() {
    let arrival = |at_us| Arrival { at_us, input_tokens: 100, output_tokens: 10, ..Arrival::default() };
    let ready_us = 130_000_000;
    let arrivals = vec![arrival(ready_us - 1), arrival(ready_us), arrival(200_000_000)];
    let trace = Trace::of_arrivals("three", Timestamp::default(), arrivals, Prefixes::default());
    let outcome = play(&scenario(Plan { initial: Some(0), ..plan("static", 1) }), &trace);
    assert_eq!((outcome.held, outcome.done), (1, 3));
}

#[test]
fn crashed_replicas_lose_no_request_and_come_back() {
    let faults = Faults { crashes: vec![(300.0, 2), (500.0, 3)], ..Faults::default() };
    let trace = hill(6);
    let outcome = play(&scenario(Plan { faults, ..plan("static", 4) }), &trace);
    assert_eq!((outcome.crashes, outcome.failed, outcome.done), (5, 0, count(&trace)));
    assert!(outcome.retried > 5, "{}", outcome.retried);
    assert_eq!(outcome.ready_min, 1);
    assert!((outcome.gpu_hours - 4.0 / 3.0).abs() < 0.02, "a crashed replica is paid for: {}", outcome.gpu_hours);

    let faults = Faults { crashes: vec![(300.0, 4), (300.5, 4)], ..Faults::default() };
    let failures = Failures { retries_max: 0, ..Failures::default() };
    let outcome = play(&scenario(Plan { faults, failures, ..plan("static", 4) }), &trace);
    assert!(outcome.failed > 5 && outcome.failed + outcome.done == outcome.requests, "{outcome:?}");
}

#[test]
fn spot_nodes_are_cheaper_and_cost_tries() {
    let rate = |text: &str| text.parse::<GpuHourRate>().unwrap();
    let prices = Prices { on_demand: rate("4.00"), committed: rate("2.00") };
    let with = |notice_s| {
        let failures = Failures {
            spot: Some(Spot { share: 1.0, mean_hours: 0.2, notice_s, rate: rate("1.00") }),
            ..Failures::default()
        };
        play(&scenario(Plan { failures, prices, startup: Startup::fixed(30.0), ..plan("static", 5) }), &hill(11))
    };
    let (abrupt, told) = (with(0.0), with(60.0));
    for outcome in [&abrupt, &told] {
        assert!(outcome.taken_away > 3, "{}", outcome.taken_away);
        assert_eq!((outcome.failed, outcome.unfinished, outcome.done), (0, 0, outcome.requests));
        let dollars = outcome.usd.pico() as f64 / 1e12;
        assert!((dollars / outcome.gpu_hours - 1.0).abs() < 1e-6, "a dollar an hour: {dollars}");
    }
    assert!(abrupt.retried > 10, "{}", abrupt.retried);
    assert_eq!(told.retried, 0, "a minute is enough to finish");
}

#[test]
fn replicas_without_a_place_cost_nothing_and_never_serve() {
    let never = Window { from_s: 0.0, to_s: f64::INFINITY };
    let faults = Faults { unschedulable: vec![never], ..Faults::default() };
    let guards = Guards::off();
    let outcome = play(&scenario(Plan { initial: Some(2), faults, guards, ..plan("static", 5) }), &hill(7));
    assert_eq!((outcome.ready_min, outcome.unscheduled), (2, 3));
    assert!((outcome.gpu_hours - 2.0 / 3.0).abs() < 0.02, "{}", outcome.gpu_hours);
    assert!(outcome.minutes.last().unwrap().pending > 2.9);
}

#[test]
fn what_is_set_by_hand_is_seen_and_a_drained_replica_finishes_what_it_has() {
    let faults = Faults { manual: vec![(500.0, 1)], ..Faults::default() };
    let outcome = play(&scenario(Plan { faults, ..plan("static", 5) }), &hill(8));
    assert_eq!((outcome.failed, outcome.unfinished, outcome.done), (0, 0, outcome.requests));
    assert!(outcome.minutes.iter().any(|minute| minute.draining > 0.0));
    assert!(outcome.ready_min <= 2);
}

#[test]
fn an_outage_of_the_metrics_hides_them_and_nothing_else() {
    let outage = |outage| {
        let faults = Faults { metrics: vec![(Window { from_s: 0.0, to_s: 3600.0 }, outage)], ..Faults::default() };
        play(&scenario(Plan { faults, log: Log::All, ..plan("token-rate", 3) }), &hill(9))
    };
    for outage in [outage(Outage::Frozen), outage(Outage::Blank)] {
        assert_eq!(
            (outage.changes, outage.ready_min, outage.provisioned_max),
            (0, 3, 3),
            "nothing known, nothing done"
        );
        assert_eq!(outage.done, outage.requests);
    }
}

#[test]
fn prompts_and_answers_on_their_own_replicas() {
    let trace = hill(10);
    let split = Split { prefill: bounds(3), transfer_s: 0.01, transfer_s_per_token: 10e-6 };
    let together = play(&scenario(plan("static", 6)), &trace);
    let apart = play(&Scenario { split: Some(split), ..scenario(plan("static", 3)) }, &trace);
    assert_eq!((apart.done, apart.failed, apart.unfinished), (apart.requests, 0, 0));
    assert!((apart.gpu_hours / together.gpu_hours - 1.0).abs() < 0.01);
    let (together, apart) = (together.latency.unwrap(), apart.latency.unwrap());
    assert!(apart.tpot.p99_s < together.tpot.p99_s, "no prompt disturbs an answer: {apart:?} {together:?}");
    let slow = Split { transfer_s: 2.0, ..split };
    let slow = play(&Scenario { split: Some(slow), ..scenario(plan("static", 3)) }, &trace).latency.unwrap();
    assert!((1.9..2.2).contains(&(slow.e2e.p50_s - apart.e2e.p50_s)), "{slow:?} {apart:?}");
}

#[test]
fn requests_with_a_common_beginning_are_faster_where_it_is_known() {
    // A hundred and ninety-nine users with prompts of eight blocks of which seven are their own from turn to turn.
    let ids: Vec<u64> = (0..4000_u64)
        .flat_map(|turn| (0..8).map(move |block| if block < 7 { turn % 199 * 8 + block } else { 1_000_000 + turn }))
        .collect();
    let arrivals = (0..4000_u32).map(|turn| Arrival {
        at_us: u64::from(turn) * 100_000,
        input_tokens: 8 * 512,
        output_tokens: 20,
        prefix_at: turn * 8,
        prefix_blocks: 8,
        ..Arrival::default()
    });
    let trace =
        Trace::of_arrivals("turns", Timestamp::default(), arrivals.collect(), Prefixes { block_tokens: 512, ids });
    let with = |router| {
        let mut scenario = Scenario { router, ..scenario(plan("static", 5)) };
        // Room for about eighty of them in each cache: together they hold them all, each alone does not.
        scenario.engine.limits.kv_tokens = Some(80 * 4096);
        play(&scenario, &trace).latency.unwrap().ttft.mean_s
    };
    let (affine, round) = (with(Router::PrefixAffinity), with(Router::RoundRobin));
    assert!(affine < 0.7 * round, "{affine} {round}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever goes wrong, every request ends exactly once, and what ran is what was paid.
    #[test]
    fn every_request_ends_once(
        seed in 0..1_000_u64,
        rates in prop::collection::vec(0.0..40.0_f64, 1..8),
        policy in prop::sample::select(vec!["static", "hpa", "kpa", "queue-kv", "token-rate"]),
        router in prop::sample::select(vec![Router::RoundRobin, Router::LeastOutstanding, Router::PrefixAffinity]),
        initial in 0..4_u32,
        mtbf_h in prop::option::of(0.05..0.5_f64),
        never_schedules in 0.0..0.5_f64,
        retries_max in 0..4_u8,
        spot in prop::option::of(0.05..0.5_f64),
        split in any::<bool>(),
        hold in 0..200_usize,
    ) {
        let trace = Trace::rates("any", Timestamp::default(), 60.0, &rates, &MIX, seed);
        let spot = spot.map(|mean_hours| Spot { share: 0.5, mean_hours, notice_s: 2.0, rate: GpuHourRate::from_pico(7) });
        let failures = Failures { mtbf_h, never_schedules, retries_max, spot, ..Failures::default() };
        let plan = Plan { seed, failures, initial: Some(initial), startup: Startup::fixed(40.0).varied(0.5), ..plan(policy, 2) };
        let split = split.then_some(Split { prefill: bounds(2), transfer_s: 0.05, transfer_s_per_token: 1e-6 });
        let hold = Hold { requests_max: hold, seconds_max: 20.0 };
        let outcome = play(&Scenario { router, split, hold, ..scenario(plan) }, &trace);
        prop_assert_eq!(outcome.requests, count(&trace));
        prop_assert_eq!(outcome.done + outcome.failed + outcome.unfinished, outcome.requests);
        let by_minute: f64 = outcome.minutes.iter().map(|minute| f64::from(minute.paid) / 60.0).sum();
        prop_assert!((by_minute - outcome.gpu_hours).abs() < 1e-3 * outcome.gpu_hours.max(1.0));
    }
}
