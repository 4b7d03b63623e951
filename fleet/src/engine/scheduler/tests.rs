use ledger::step::{GpuSheet, ModelShape};
use proptest::prelude::*;

use super::*;
use crate::engine::Limits;
use crate::engine::text::mix;

fn spec(limits: Limits) -> EngineSpec {
    EngineSpec { limits, ..EngineSpec::new("m", ModelShape::LLAMA_3_1_8B, GpuSheet::H100, 1) }
}

fn submission(seed: u64, prompt_tokens: u64, output_tokens: u32) -> Submission {
    let prompt = (0..prompt_tokens).map(|index| mix(seed, index)).collect();
    Submission { prompt, output_tokens, ends_by: FinishReason::Length, answer_seed: seed }
}

/// Runs to idleness on simulated time. Gives every event with its time.
fn run(scheduler: &mut Scheduler, now_us: &mut u64) -> Vec<(u64, Event)> {
    let mut log = Vec::new();
    while let Some(step) = scheduler.begin_step(*now_us) {
        *now_us += step.micros();
        log.extend(scheduler.end_step(*now_us).into_iter().map(|event| (*now_us, event)));
    }
    log
}

fn finished(log: &[(u64, Event)]) -> Vec<Finished> {
    log.iter()
        .filter_map(|(_, event)| match event {
            Event::Finished(finished) => Some(*finished),
            Event::Token { .. } => None,
        })
        .collect()
}

#[test]
fn one_request_prefills_in_chunks_and_then_decodes() {
    let mut scheduler = Scheduler::new(spec(Limits { max_num_batched_tokens: 100, ..Limits::default() }));
    scheduler.submit(submission(1, 250, 3), 0).unwrap();
    let mut steps = Vec::new();
    while let Some(step) = scheduler.begin_step(0) {
        steps.push(step.new_tokens);
        scheduler.end_step(0);
    }
    assert_eq!(steps, [100, 100, 50, 1, 1]);
    let counters = scheduler.counters();
    assert_eq!((counters.prompt_tokens, counters.generation_tokens), (250, 3));
    assert_eq!(counters.finished(FinishReason::Length), 1);
    assert_eq!(scheduler.gauges().kv_usage, 0.0);
}

#[test]
fn the_budget_goes_to_decoding_first_and_the_rest_to_prefill() {
    let mut scheduler = Scheduler::new(spec(Limits { max_num_batched_tokens: 64, ..Limits::default() }));
    scheduler.submit(submission(1, 10, 50), 0).unwrap();
    scheduler.begin_step(0).unwrap();
    scheduler.end_step(0);
    scheduler.submit(submission(2, 100, 5), 0).unwrap();
    let step = scheduler.begin_step(0).unwrap();
    assert_eq!((step.requests, step.new_tokens), (2, 64));
    scheduler.end_step(0);
    let step = scheduler.begin_step(0).unwrap();
    assert_eq!((step.requests, step.new_tokens), (2, 1 + 37));
}

#[test]
fn no_more_than_the_allowed_number_run_at_once() {
    let mut scheduler = Scheduler::new(spec(Limits { max_num_seqs: 2, ..Limits::default() }));
    for seed in 0..5 {
        scheduler.submit(submission(seed, 20, 4), 0).unwrap();
    }
    scheduler.begin_step(0).unwrap();
    assert_eq!((scheduler.gauges().running, scheduler.gauges().waiting), (2, 3));
    scheduler.end_step(0);
    assert_eq!(finished(&run(&mut scheduler, &mut 0)).len(), 5);
}

#[test]
fn a_second_request_finds_the_prefix_of_the_first() {
    let mut scheduler = Scheduler::new(spec(Limits::default()));
    let mut now_us = 0;
    scheduler.submit(submission(7, 100, 20), now_us).unwrap();
    run(&mut scheduler, &mut now_us);

    // The next turn of the conversation: the first prompt, its answer, and something new.
    let mut next = submission(7, 100, 5);
    next.prompt.extend((0..20).map(|index| token(answer_word(7, index))));
    next.prompt.extend([1, 2, 3]);
    scheduler.submit(next, now_us).unwrap();
    let ended = finished(&run(&mut scheduler, &mut now_us));
    // 119 of the 120 known tokens were computed before, of which seven blocks of 16 are full.
    assert_eq!((ended[0].prompt_tokens, ended[0].cached_tokens), (123, 112));
    assert_eq!(scheduler.counters().prefix_cache_hits, 112);
    assert_eq!(scheduler.counters().prefix_cache_queries, 223);
}

#[test]
fn an_equal_prompt_still_computes_one_token() {
    let mut scheduler = Scheduler::new(spec(Limits::default()));
    for _ in 0..2 {
        scheduler.submit(submission(1, 64, 1), 0).unwrap();
        run(&mut scheduler, &mut 0);
    }
    assert_eq!(scheduler.counters().prefix_cache_hits, 48);
}

#[test]
fn without_the_prefix_cache_nothing_is_found() {
    let mut scheduler = Scheduler::new(spec(Limits { prefix_caching: false, ..Limits::default() }));
    for _ in 0..2 {
        scheduler.submit(submission(1, 64, 20), 0).unwrap();
        run(&mut scheduler, &mut 0);
    }
    assert_eq!((scheduler.counters().prefix_cache_hits, scheduler.gauges().kv_usage), (0, 0.0));
}

#[test]
fn short_memory_preempts_and_still_finishes_everything() {
    for prefix_caching in [true, false] {
        let limits = Limits { kv_blocks: 20, prefix_caching, ..Limits::default() };
        let mut scheduler = Scheduler::new(spec(limits));
        for seed in 0..8 {
            scheduler.submit(submission(seed, 40, 100), 0).unwrap();
        }
        let ended = finished(&run(&mut scheduler, &mut 0));
        assert!(scheduler.counters().preemptions > 0);
        assert_eq!(ended.len(), 8);
        assert!(ended.iter().all(|one| (one.prompt_tokens, one.output_tokens) == (40, 100)));
        let counters = scheduler.counters();
        assert_eq!((counters.prompt_tokens, counters.generation_tokens), (8 * 40, 8 * 100), "recomputing is no usage");
        assert_eq!(scheduler.gauges().kv_usage, 0.0);
    }
}

#[test]
fn impossible_requests_are_turned_away() {
    let limits = Limits { kv_blocks: 4, waiting_max: 1, ..Limits::default() };
    let mut scheduler = Scheduler::new(spec(limits));
    assert_eq!(scheduler.submit(submission(1, 0, 5), 0), Err(Rejection::Empty));
    assert_eq!(scheduler.submit(submission(1, 5, 0), 0), Err(Rejection::Empty));
    assert_eq!(scheduler.submit(submission(1, 60, 5), 0), Err(Rejection::TooLong { tokens_max: 64 }));
    assert!(scheduler.submit(submission(1, 60, 4), 0).is_ok());
    assert_eq!(scheduler.submit(submission(1, 6, 4), 0), Err(Rejection::QueueFull));
}

#[test]
fn an_abort_keeps_what_was_generated() {
    let mut scheduler = Scheduler::new(spec(Limits::default()));
    let early = scheduler.submit(submission(1, 40, 100), 0).unwrap();
    let waiting = scheduler.abort(early, 5).unwrap();
    assert_eq!((waiting.prompt_tokens, waiting.output_tokens), (0, 0), "nothing ran, nothing is counted");

    let id = scheduler.submit(submission(2, 40, 100), 0).unwrap();
    for _ in 0..10 {
        scheduler.begin_step(0).unwrap();
        scheduler.end_step(0);
    }
    scheduler.begin_step(0).unwrap();
    let ended = scheduler.abort(id, 9).unwrap();
    assert_eq!((ended.prompt_tokens, ended.output_tokens, ended.reason), (40, 10, FinishReason::Abort));
    assert!(scheduler.end_step(0).is_empty(), "the token of the step under way is lost with it");
    assert_eq!(scheduler.counters().generation_tokens, 10);
    assert_eq!(scheduler.counters().finished(FinishReason::Abort), 2);
    assert_eq!(scheduler.abort(id, 9), None);
    assert_eq!(scheduler.begin_step(0), None);
}

#[test]
fn latencies_are_the_step_times() {
    let mut scheduler = Scheduler::new(spec(Limits::default()));
    scheduler.submit(submission(1, 500, 256), 0).unwrap();
    run(&mut scheduler, &mut 0);
    let counters = scheduler.counters();
    // One 8B model alone on an H100, see the defaults of `Efficiencies`.
    let gap_s = counters.inter_token_latency_s.mean().unwrap();
    assert!((0.0062..0.0070).contains(&gap_s), "{gap_s}");
    assert_eq!(counters.inter_token_latency_s.count(), 255);
    let total_s = counters.time_to_first_token_s.mean().unwrap() + gap_s * 255.0;
    assert!((counters.e2e_latency_s.mean().unwrap() - total_s).abs() < 1e-6);
}

/// Requests that arrive over time, some leaving early, on a small engine.
fn scenario(seed: u64, kv_blocks: u32, prefix_caching: bool) -> (Vec<(u64, Event)>, Scheduler, Vec<Finished>) {
    let limits = Limits { kv_blocks, prefix_caching, max_num_batched_tokens: 96, max_num_seqs: 8, ..Limits::default() };
    let mut scheduler = Scheduler::new(spec(limits));
    let (mut log, mut aborted, mut ids) = (Vec::new(), Vec::new(), Vec::new());
    let mut now_us = 0;
    for turn in 0..200u64 {
        let draw = mix(seed, turn);
        if draw.is_multiple_of(3) && turn < 120 {
            let outputs = u32::try_from(1 + draw / 7 % 60).unwrap();
            ids.push(scheduler.submit(submission(draw / 5 % 4, 1 + draw / 11 % 100, outputs), now_us).unwrap());
        }
        if draw.is_multiple_of(11) && !ids.is_empty() {
            let at = usize::try_from(draw / 13).unwrap() % ids.len();
            aborted.extend(scheduler.abort(ids.swap_remove(at), now_us));
        }
        if let Some(step) = scheduler.begin_step(now_us) {
            now_us += step.micros();
            log.extend(scheduler.end_step(now_us).into_iter().map(|event| (now_us, event)));
        }
    }
    log.extend(run(&mut scheduler, &mut now_us));
    (log, scheduler, aborted)
}

proptest! {
    #[test]
    fn counters_equal_the_sum_of_the_requests(seed: u64, kv_blocks in 10u32..60, prefix_caching: bool) {
        let (log, scheduler, aborted) = scenario(seed, kv_blocks, prefix_caching);
        let ended: Vec<Finished> = finished(&log).into_iter().chain(aborted).collect();
        let counters = scheduler.counters();
        let sum = |of: fn(&Finished) -> u32| ended.iter().map(|one| u64::from(of(one))).sum::<u64>();
        prop_assert_eq!(counters.prompt_tokens, sum(|one| one.prompt_tokens));
        prop_assert_eq!(counters.prompt_tokens_cached, sum(|one| one.cached_tokens));
        prop_assert_eq!(counters.generation_tokens, sum(|one| one.output_tokens));
        prop_assert_eq!(counters.finished.iter().sum::<u64>(), ended.len() as u64);
        let tokens = log.iter().filter(|(_, event)| matches!(event, Event::Token { .. })).count();
        prop_assert_eq!(counters.generation_tokens, tokens as u64);
        prop_assert_eq!(scheduler.gauges().kv_usage, 0.0);
        prop_assert_eq!((scheduler.gauges().running, scheduler.gauges().waiting), (0, 0));
    }

    #[test]
    fn the_same_seed_gives_the_same_schedule(seed: u64, kv_blocks in 10u32..60) {
        let (first, second) = (scenario(seed, kv_blocks, true), scenario(seed, kv_blocks, true));
        prop_assert_eq!(first.0, second.0);
        prop_assert_eq!(first.1.counters(), second.1.counters());
    }
}
