//! The engine against the step-by-step scheduler, which shares no code with it.

use ledger::allocate::replica::Replica;
use ledger::step::{GpuSheet, ModelShape};
use proptest::prelude::*;

use super::*;
use crate::engine::blocks::extend_chain;
use crate::engine::text::mix;
use crate::engine::{self, EngineSpec, Event, FinishReason, Scheduler, Submission};

const SHAPE: ModelShape = ModelShape::LLAMA_3_1_8B;
const BLOCK: u32 = 16;

#[derive(Debug, Clone, Copy)]
struct Case {
    kv_blocks: u32,
    max_num_seqs: u32,
    budget: u32,
    prefix_caching: bool,
}

impl Case {
    fn spec(&self) -> Spec {
        let constants = Constants::bare(Replica::unfitted(SHAPE.into(), GpuSheet::H100, 1));
        let limits = Limits {
            max_num_seqs: self.max_num_seqs,
            max_num_batched_tokens: self.budget,
            block_tokens: BLOCK,
            kv_tokens: Some(u64::from(self.kv_blocks * BLOCK)),
            prefix_caching: self.prefix_caching,
            reserve_full_prompt: false,
            ..Limits::of_gpu(&GpuSheet::H100)
        };
        Spec { constants, limits }
    }

    fn scheduler(&self) -> Scheduler {
        let limits = engine::Limits {
            kv_blocks: self.kv_blocks,
            prefix_caching: self.prefix_caching,
            max_num_batched_tokens: self.budget,
            max_num_seqs: self.max_num_seqs as usize,
            max_model_len: u32::MAX,
            block_size: BLOCK,
            waiting_max: usize::MAX,
        };
        Scheduler::new(EngineSpec { limits, ..EngineSpec::new("m", SHAPE, GpuSheet::H100, 1) })
    }
}

/// A request's prompt: its own tokens after some that its group shares.
#[derive(Debug, Clone, Copy)]
struct Asked {
    at_us: u64,
    shared: u32,
    group: u64,
    input: u32,
    output: u32,
}

fn prompt(number: u64, asked: &Asked) -> Vec<u64> {
    let shared = (0..u64::from(asked.shared.min(asked.input))).map(|at| mix(asked.group, at));
    let own = (u64::from(asked.shared.min(asked.input))..u64::from(asked.input)).map(|at| mix(1_000 + number, at));
    shared.chain(own).collect()
}

fn place(id: u64) -> usize {
    usize::try_from(id).unwrap()
}

/// First and last token of each request, its cached tokens, and preemptions, one step after the other.
fn step_by_step(case: &Case, asked: &[Asked]) -> (Vec<(f64, f64, u32)>, u64) {
    let mut scheduler = case.scheduler();
    let mut times = vec![(0.0, 0.0, 0); asked.len()];
    let (mut now, mut next) = (0.0f64, 0);
    loop {
        while next < asked.len() && count(asked[next].at_us) <= now {
            let submission = Submission {
                prompt: prompt(next as u64, &asked[next]),
                output_tokens: asked[next].output,
                ends_by: FinishReason::Length,
                answer_seed: next as u64,
            };
            assert_eq!(scheduler.submit(submission, 0), Ok(next as u64));
            next += 1;
        }
        let Some(step) = scheduler.begin_step(0) else {
            if next == asked.len() {
                return (times, scheduler.counters().preemptions);
            }
            now = count(asked[next].at_us);
            continue;
        };
        now += step.time.total_s * 1e6;
        for event in scheduler.end_step(0) {
            match event {
                Event::Token { id, index: 0, cached_tokens } => times[place(id)] = (now, now, cached_tokens),
                Event::Token { id, .. } => times[place(id)].1 = now,
                Event::Finished(_) => {}
            }
        }
    }
}

fn at_once(case: &Case, asked: &[Asked], unit: u32) -> (Vec<Done>, Engine) {
    let mut prefixes = Prefixes { block_tokens: unit, ids: Vec::new() };
    let mut arrivals = Vec::new();
    for (number, asked) in (0u64..).zip(asked) {
        let mut chain = Vec::new();
        extend_chain(&mut chain, &prompt(number, asked), unit as usize);
        // Only what several requests share needs a name; the rest is the request's own.
        chain.truncate((asked.shared.min(asked.input) / unit) as usize);
        arrivals.push(Arrival {
            id: number,
            at_us: asked.at_us,
            input_tokens: asked.input,
            output_tokens: asked.output,
            prefix_at: u32::try_from(prefixes.ids.len()).unwrap(),
            prefix_blocks: u32::try_from(chain.len()).unwrap(),
        });
        prefixes.ids.extend(chain);
    }
    let mut engine = Engine::with_prefixes(&case.spec(), Arc::new(prefixes));
    let mut done = Vec::new();
    for arrival in &arrivals {
        engine.advance(arrival.at_us, &mut |one| done.push(one));
        engine.submit(*arrival, arrival.at_us).unwrap();
    }
    engine.finish(&mut |one| done.push(one));
    done.sort_by_key(|one: &Done| one.arrival.id);
    (done, engine)
}

fn load() -> impl Strategy<Value = Vec<Asked>> {
    let one = (0u64..40_000, 0u32..80, 0u64..3, 1u32..300, 1u32..120);
    prop::collection::vec(one, 1..60).prop_map(|all| {
        let mut at_us = 0;
        all.into_iter()
            .map(|(gap_us, shared, group, input, output)| {
                at_us += gap_us;
                Asked { at_us, shared, group, input, output }
            })
            .collect()
    })
}

fn case() -> impl Strategy<Value = Case> {
    (27u32..200, 1u32..40, 4u32..400, any::<bool>()).prop_map(|(kv_blocks, max_num_seqs, budget, prefix_caching)| {
        Case { kv_blocks, max_num_seqs, budget, prefix_caching }
    })
}

#[track_caller]
fn same(case: &Case, asked: &[Asked], unit: u32) -> Result<u64, TestCaseError> {
    let (expected, preemptions) = step_by_step(case, asked);
    let (done, engine) = at_once(case, asked, unit);
    prop_assert_eq!(done.len(), asked.len());
    prop_assert_eq!(engine.preemptions(), preemptions);
    for (one, (first, last, cached_tokens)) in done.iter().zip(&expected) {
        let off = |told: u64, expected: f64| (count(told) - expected).abs();
        prop_assert!(off(one.first_token_us, *first) <= 1.0, "{one:?} {first} {last}");
        prop_assert!(off(one.last_token_us, *last) <= 1.0, "{one:?} {first} {last}");
        prop_assert_eq!(one.cached_tokens, *cached_tokens, "{:?}", one);
    }
    prop_assert_eq!((engine.kv_used(), engine.is_idle(), engine.next_us()), (0.0, true, None));
    Ok(preemptions)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn the_same_times_as_one_step_after_the_other(case in case(), asked in load()) {
        same(&case, &asked, BLOCK)?;
    }
}

proptest! {
    #[test]
    fn names_of_several_blocks_are_found_alike(units in 1u32..5, asked in load()) {
        // No prompt is cut in the middle of a unit, whose blocks the other engine finds one by one.
        let case = Case { kv_blocks: 4_000, max_num_seqs: 16, budget: 100_000, prefix_caching: true };
        let unit = units * BLOCK;
        let asked: Vec<Asked> = asked
            .into_iter()
            .map(|one| Asked { shared: one.shared / unit * unit, input: one.shared / unit * unit + one.input, ..one })
            .collect();
        same(&case, &asked, unit)?;
    }
}

#[test]
fn the_comparison_sees_preemptions_and_hits() {
    let asked: Vec<Asked> = (0..30)
        .map(|number| Asked { at_us: number * 3_000, shared: 64, group: number % 2, input: 130, output: 100 })
        .collect();
    let case = Case { kv_blocks: 60, max_num_seqs: 16, budget: 256, prefix_caching: true };
    assert!(same(&case, &asked, BLOCK).unwrap() > 10);
    assert!(at_once(&case, &asked, BLOCK).0.iter().any(|one| one.cached_tokens == 64 && one.preemptions > 0));
}

#[test]
fn a_router_may_ask_what_is_cached() {
    let prefixes = Arc::new(Prefixes { block_tokens: 32, ids: vec![7, 8, 9] });
    let case = Case { kv_blocks: 100, max_num_seqs: 8, budget: 512, prefix_caching: true };
    let mut engine = Engine::with_prefixes(&case.spec(), Arc::clone(&prefixes));
    let arrival = Arrival { input_tokens: 100, output_tokens: 5, prefix_blocks: 3, ..Arrival::default() };
    assert_eq!(engine.cached_tokens(&arrival), 0);
    engine.submit(arrival, 0).unwrap();
    engine.finish(&mut |_| {});
    assert_eq!(engine.cached_tokens(&arrival), 96);
    assert_eq!(engine.cached_tokens(&Arrival { prefix_at: 1, prefix_blocks: 2, ..arrival }), 64);
    assert_eq!(engine.cached_tokens(&Arrival { input_tokens: 40, ..arrival }), 32, "whole units of the prompt only");
    let off = Case { prefix_caching: false, ..case };
    assert_eq!(Engine::with_prefixes(&off.spec(), prefixes).cached_tokens(&arrival), 0);
}

#[test]
fn looking_does_not_change_anything() {
    let case = Case { kv_blocks: 80, max_num_seqs: 8, budget: 128, prefix_caching: true };
    let arrivals: Vec<Arrival> = (0..40)
        .map(|id| Arrival { id, at_us: id * 20_000, input_tokens: 200, output_tokens: 90, ..Arrival::default() })
        .collect();
    let mut plain = Vec::new();
    play(&case.spec(), &arrivals, Arc::default(), &mut |one| plain.push(one)).unwrap();
    let (mut engine, mut looked, mut next) = (Engine::new(&case.spec()), Vec::new(), 0);
    let (mut outputs, mut busy_us) = (0, 0);
    for now_us in (0..20_000_000).step_by(777) {
        while next < arrivals.len() && arrivals[next].at_us <= now_us {
            engine.advance(arrivals[next].at_us, &mut |one| looked.push(one));
            engine.submit(arrivals[next], arrivals[next].at_us).unwrap();
            next += 1;
        }
        engine.advance(now_us, &mut |one| looked.push(one));
        assert!((0.0..=1.0).contains(&engine.kv_used()));
        assert!(engine.output_tokens() >= outputs && engine.busy_us() >= busy_us && engine.busy_us() <= now_us);
        (outputs, busy_us) = (engine.output_tokens(), engine.busy_us());
        assert!(engine.next_us().is_none_or(|next_us| next_us > now_us));
    }
    assert_eq!(looked, plain);
    assert_eq!(engine.output_tokens(), 40 * 90);
    assert!(engine.preemptions() > 0);
}

#[test]
fn a_broken_engine_gives_back_what_it_had_and_starts_anew() {
    let case = Case { kv_blocks: 100, max_num_seqs: 4, budget: 512, prefix_caching: true };
    let mut engine = Engine::new(&case.spec());
    let arrival = |id| Arrival { id, input_tokens: 100, output_tokens: 50, ..Arrival::default() };
    for id in 0..6 {
        engine.submit(arrival(id), 0).unwrap();
    }
    engine.advance(100_000, &mut |_| {});
    assert_eq!((engine.running(), engine.waiting()), (4, 2));
    let ids: Vec<u64> = engine.fail().iter().map(|arrival| arrival.id).collect();
    assert_eq!(ids, [0, 1, 2, 3, 4, 5]);
    assert!(engine.is_idle() && engine.kv_used() == 0.0);
    engine.submit(arrival(9), 200_000).unwrap();
    let mut done = Vec::new();
    engine.finish(&mut |one| done.push(one));
    assert_eq!((done.len(), done[0].arrival.id), (1, 9));
    assert!(
        done[0].scheduled_us == 200_000 && engine.submit(Arrival { input_tokens: 1_600, ..arrival(10) }, 0).is_err()
    );
}

#[test]
fn a_prefilled_request_only_decodes() {
    let case = Case { kv_blocks: 1_000, max_num_seqs: 4, budget: 512, prefix_caching: false };
    let arrival = Arrival { input_tokens: 400, output_tokens: 50, ..Arrival::default() };
    let mut whole_run = Vec::new();
    play(&case.spec(), &[arrival], Arc::default(), &mut |one| whole_run.push(one)).unwrap();
    let mut parts = Vec::new();
    let first = Arrival { output_tokens: 1, ..arrival };
    play(&case.spec(), &[first], Arc::default(), &mut |one| parts.push(one)).unwrap();
    let prefilled = Done { arrival, ..parts[0] };
    let mut decoder = Engine::new(&case.spec());
    decoder.submit_decoding(prefilled, prefilled.first_token_us).unwrap();
    decoder.finish(&mut |one| parts.push(one));
    assert_eq!((parts[1].first_token_us, parts[1].scheduled_us), (whole_run[0].first_token_us, 0));
    assert!(parts[1].last_token_us.abs_diff(whole_run[0].last_token_us) <= 1);
    assert_eq!(decoder.output_tokens(), 49);
}

#[test]
#[expect(clippy::disallowed_methods, reason = "it measures how long it takes")]
fn a_replica_runs_ten_thousand_times_faster_than_time() {
    let replica = Replica::unfitted(SHAPE.into(), GpuSheet::H100, 1);
    let load = Load { requests_per_s: 10.0, requests: 50_000, input_tokens: 512, output_tokens: 256, seed: 1 };
    let arrivals = load.arrivals();
    let began = std::time::Instant::now();
    let mut ended = 0u32;
    play(&Spec::new(Constants::unfitted(replica)), &arrivals, Arc::default(), &mut |_| ended += 1).unwrap();
    let took_s = began.elapsed().as_secs_f64();
    let times = 5_000.0 / took_s;
    eprintln!("{times:.0} times real time, {:.0} requests/s", f64::from(ended) / took_s);
    assert_eq!(ended, 50_000);
    assert!(times > 10_000.0, "{times}");
}
