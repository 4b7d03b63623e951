use proptest::prelude::*;

use super::super::fixtures::{Dice, at, between, reading};
use super::*;

fn metered(sent: f64, ended: f64, prompt: f64, generated: f64) -> Metered {
    Metered { sent: at(sent), ended: Some(at(ended)), tokens: Some([prompt, 0.0, generated]) }
}

fn of(readings: &[EngineReading], metered: &[Metered]) -> Unobserved {
    Unobserved::of(&readings.iter().collect::<Vec<_>>(), metered)
}

/// Prompt and generated tokens that bypassed within these seconds.
fn bypassed(found: &Unobserved, from: f64, until: f64) -> (f64, f64) {
    found.within(between(from, until)).map_or((f64::NAN, f64::NAN), |counted| {
        (counted.prompt_tokens + counted.cached_tokens, counted.generation_tokens)
    })
}

#[test]
fn what_nobody_metered_is_what_bypassed() {
    let readings =
        [reading("p", "e", 0.0, 1_000, 500), reading("p", "e", 30.0, 1_100, 550), reading("p", "e", 60.0, 1_400, 600)];
    let found = of(&readings, &[metered(5.0, 20.0, 100.0, 50.0)]);
    assert_eq!(bypassed(&found, 0.0, 30.0), (0.0, 0.0));
    assert_eq!(bypassed(&found, 30.0, 60.0), (300.0, 50.0));
    assert_eq!(bypassed(&found, 30.0, 45.0), (150.0, 25.0), "in even flow between two readings");
}

#[test]
fn unknown_is_not_zero() {
    let one = [reading("p", "e", 10.0, 5, 5)];
    assert_eq!(of(&one, &[]).within(between(0.0, 60.0)), None, "one reading has grown by nothing yet");
    assert_eq!(of(&[], &[]).within(between(0.0, 60.0)), None);
    let without = [0.0, 60.0].map(|seconds| EngineReading {
        prompt_tokens: None,
        generation_tokens: None,
        ..reading("p", "e", seconds, 0, 0)
    });
    assert_eq!(of(&without, &[]).within(between(0.0, 60.0)), None);
    let two = [reading("p", "e", 0.0, 5, 5), reading("p", "e", 30.0, 5, 5)];
    assert_eq!(of(&two, &[]).within(between(60.0, 120.0)), None, "what came after the last reading is not known");
    assert_eq!(bypassed(&of(&two, &[]), 0.0, 60.0), (0.0, 0.0));
}

#[test]
fn a_missing_scrape_loses_nothing_and_what_a_restart_hides_is_not_guessed() {
    let readings = [reading("p", "e", 0.0, 1_000, 100), reading("p", "e", 600.0, 5_000, 900)];
    assert_eq!(bypassed(&of(&readings, &[]), 0.0, 600.0), (4_000.0, 800.0));
    let restarted =
        [reading("p", "e", 0.0, 1_000, 100), reading("p", "e", 30.0, 70, 7), reading("p", "e", 60.0, 170, 17)];
    assert_eq!(bypassed(&of(&restarted, &[metered(40.0, 50.0, 100.0, 10.0)]), 0.0, 60.0), (0.0, 0.0));
    // One of two ranks is gone and the sum of both fell: what the other ever counted did not bypass just now.
    let one_rank_less = [reading("p", "e", 0.0, 2_000_000, 900_000), reading("p", "e", 30.0, 1_000_000, 450_000)];
    assert_eq!(bypassed(&of(&one_rank_less, &[]), 0.0, 30.0), (0.0, 0.0));
    let after = [reading("p", "e", 0.0, 1_000, 100), reading("p", "e", 30.0, 70, 7), reading("p", "e", 60.0, 170, 17)];
    assert_eq!(bypassed(&of(&after, &[]), 0.0, 60.0), (100.0, 10.0), "what came after it is known again");
}

#[test]
fn a_prompt_with_several_answers_is_no_bypass() {
    // vLLM counts the prompt of 100 tokens twice for n = 2; usage says it once, and both answers' tokens.
    let mut readings = vec![reading("p", "e", 0.0, 1_000, 500), reading("p", "e", 30.0, 1_200, 580)];
    let asked = [metered(5.0, 20.0, 100.0, 80.0)];
    assert_eq!(bypassed(&of(&readings, &asked), 0.0, 30.0), (0.0, 0.0));
    // An engine that counts prompts as they come and answers as they end: both are booked when both are known.
    let split =
        [reading("p", "e", 0.0, 1_000, 500), reading("p", "e", 30.0, 1_300, 500), reading("p", "e", 60.0, 1_300, 540)];
    assert_eq!(bypassed(&of(&split, &[]), 0.0, 30.0), (0.0, 0.0));
    assert_eq!(bypassed(&of(&split, &[]), 0.0, 60.0), (300.0, 40.0));
    // An engine of embeddings generates nothing, ever.
    readings.iter_mut().for_each(|reading| reading.generation_tokens = Some(0));
    assert_eq!(bypassed(&of(&readings, &[metered(5.0, 20.0, 100.0, 0.0)]), 0.0, 30.0), (100.0, 0.0));
}

#[test]
fn a_request_that_crosses_an_edge_is_no_bypass_wherever_it_was_counted() {
    // Counted all at its end by one engine, all at its start by another.
    let late = [reading("p", "e", 0.0, 0, 0), reading("p", "e", 60.0, 0, 0), reading("p", "e", 120.0, 900, 300)];
    let early = [reading("p", "e", 0.0, 0, 0), reading("p", "e", 60.0, 900, 300), reading("p", "e", 120.0, 900, 300)];
    for readings in [late, early] {
        let found = of(&readings, &[metered(50.0, 70.0, 900.0, 300.0)]);
        for minute in [(0.0, 60.0), (60.0, 120.0)] {
            assert_eq!(bypassed(&found, minute.0, minute.1), (0.0, 0.0));
        }
    }
}

#[test]
fn beside_a_request_of_unknown_size_nothing_is_concluded() {
    let readings: Vec<EngineReading> =
        (0u32..7).map(|step| reading("p", "e", f64::from(step) * 10.0, u64::from(step) * 100, 0)).collect();
    let unknown = Metered { tokens: None, ..metered(15.0, 25.0, 0.0, 0.0) };
    let found = of(&readings, &[unknown]);
    assert_eq!(bypassed(&found, 0.0, 10.0).0, 100.0);
    assert_eq!(bypassed(&found, 10.0, 30.0).0, 0.0);
    assert_eq!(bypassed(&found, 30.0, 60.0).0, 300.0);
    let running = Metered { ended: None, ..unknown };
    assert_eq!(bypassed(&of(&readings, &[running]), 10.0, 60.0).0, 0.0);
}

#[test]
fn cached_tokens_bypass_as_a_part_of_prompts_only() {
    let with = |seconds, prompt, cached| EngineReading {
        cached_tokens: Some(cached),
        ..reading("p", "e", seconds, prompt, 0)
    };
    let readings = [with(0.0, 0, 0), with(60.0, 1_000, 600)];
    let found = of(&readings, &[metered(10.0, 20.0, 1_000.0, 0.0)]);
    assert_eq!(found.within(between(0.0, 60.0)), Some(Counted::default()), "nobody said what the request found cached");
    let found = of(&readings, &[metered(10.0, 20.0, 700.0, 0.0)]);
    assert_eq!(
        found.within(between(0.0, 60.0)).map(|counted| (counted.prompt_tokens, counted.cached_tokens)),
        Some((0.0, 300.0))
    );
}

/// A simulated engine: each request counts its tokens in some pieces at some moments while it runs.
struct Simulated {
    readings: Vec<EngineReading>,
    metered: Vec<Metered>,
    /// Tokens that bypassed, by when they were counted.
    bypass: Vec<(f64, u64)>,
}

const RUN_S: f64 = 600.0;

fn simulate(seed: u64, bypassing: u64, restart: bool) -> Simulated {
    let mut dice = Dice(seed);
    let mut counted: Vec<(f64, u64)> = Vec::new();
    let (mut metered_requests, mut bypass) = (Vec::new(), Vec::new());
    for number in 0..60 {
        let sent = 10.0 + dice.seconds(500);
        let ended = sent + 0.1 + dice.seconds(60);
        let tokens = 1 + dice.roll(2_000);
        let mut left = tokens;
        while left > 0 {
            let piece = 1 + dice.roll(left);
            let when = sent + (ended - sent) * dice.seconds(1);
            counted.push((when, piece));
            if number < bypassing {
                bypass.push((when, piece));
            }
            left -= piece;
        }
        if number >= bypassing {
            metered_requests.push(metered(sent, ended, tokens as f64, 0.0));
        }
    }
    let mut readings = Vec::new();
    let mut seconds = 0.0;
    let fell = if restart { 5.0 } else { f64::MAX };
    while seconds <= RUN_S {
        // Some scrapes fail.
        if dice.roll(5) > 0 || seconds == 0.0 || seconds == RUN_S {
            let from = if seconds >= fell { fell } else { 0.0 };
            let base = if seconds >= fell { 0 } else { 12_345 };
            let shown = counted.iter().filter(|(when, _)| from <= *when && *when <= seconds).map(|(_, tokens)| tokens);
            readings.push(reading("p", "e", seconds, base + shown.sum::<u64>(), 0));
        }
        seconds += 5.0;
    }
    dice.shuffle(&mut readings);
    Simulated { readings, metered: metered_requests, bypass }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn nothing_bypassed_is_exactly_nothing_in_every_minute(seed: u64, restart: bool) {
        let Simulated { readings, metered, .. } = simulate(seed, 0, restart);
        let found = of(&readings, &metered);
        for minute in 0..10 {
            let from = f64::from(minute) * 60.0;
            prop_assert_eq!(bypassed(&found, from, from + 60.0).0, 0.0);
        }
    }

    #[test]
    fn what_bypassed_is_found_to_the_token_by_the_end_and_never_too_early(seed: u64, bypassing in 1u64..30) {
        let Simulated { readings, metered, bypass } = simulate(seed, bypassing, false);
        let found = of(&readings, &metered);
        let all: u64 = bypass.iter().map(|(_, tokens)| tokens).sum();
        prop_assert_eq!(bypassed(&found, 0.0, RUN_S).0, all as f64);
        let minutes: f64 = (0..10).map(|minute| bypassed(&found, f64::from(minute) * 60.0, f64::from(minute + 1) * 60.0).0).sum();
        prop_assert!((minutes - all as f64).abs() < 1e-6);
        // At a reading what is found so far has really bypassed by then.
        for reading in &readings {
            let seconds = reading.at.micros_since(at(0.0)) as f64 * 1e-6;
            let so_far: u64 = bypass.iter().filter(|(when, _)| *when <= seconds).map(|(_, tokens)| tokens).sum();
            let upto = found.within(between(0.0, seconds)).map_or(0.0, |counted| counted.prompt_tokens);
            prop_assert!(upto <= so_far as f64 + 1e-9, "{} {} {}", seconds, upto, so_far);
        }
    }

    #[test]
    fn a_minute_after_a_quiet_one_does_not_depend_on_what_came_before(seed: u64, bypassing in 0u64..30) {
        let Simulated { readings, metered, .. } = simulate(seed, bypassing, false);
        let whole = of(&readings, &metered);
        // The engine is quiet from 571 s on at the latest.
        let tail: Vec<EngineReading> = readings.iter().filter(|reading| reading.at >= at(575.0)).cloned().collect();
        let short = of(&tail, &metered);
        let from = tail.iter().map(|reading| reading.at).min().unwrap();
        let period = Period { start: from, end: at(RUN_S) };
        prop_assert_eq!(whole.within(period), short.within(period));
    }
}
