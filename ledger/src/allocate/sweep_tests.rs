//! The sweep against a slow reading of the same formulas, its laws, and two runs of a real engine.

use proptest::prelude::*;

use super::*;
use crate::allocate::fit::{Fit, Observed};
use crate::allocate::measured::{self, Run};
use crate::allocate::quality::{EngineSample, Quality, compare, decode_observations};
use crate::allocate::shape::Model;
use crate::allocate::share::memory_bound_fraction;
use crate::allocate::timeline::whole_micros;
use crate::step::{GpuSheet, ModelShape};

fn replica() -> Replica {
    Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 1)
}

fn at(seconds: f64) -> Timestamp {
    Timestamp::from_micros(whole_micros(seconds))
}

fn request(scheduled: f64, prefill: f64, decode: f64, input_tokens: u32, output_tokens: u32) -> EngineTimeline {
    EngineTimeline {
        arrived: at(scheduled),
        scheduled: at(scheduled),
        first_token: at(scheduled + prefill),
        last_token: at(scheduled + prefill + decode),
        input_tokens,
        cached_tokens: 0,
        output_tokens,
    }
}

/// Runs a sweep over `timelines` in the order of their schedule and returns one part for each, and the sweep.
fn swept(sweep: Sweep, timelines: &[EngineTimeline], cuts: &[f64]) -> (Vec<Part>, Sweep) {
    let mut sweep = sweep;
    let mut order: Vec<usize> = (0..timelines.len()).collect();
    order.sort_by_key(|&index| (timelines[index].ordered().scheduled, index));
    let mut parts: Vec<Part> = (0..timelines.len()).map(|tag| Part { tag: tag as u64, ..Part::default() }).collect();
    let mut emit = |part: Part| {
        let sum = &mut parts[usize::try_from(part.tag).unwrap()];
        assert!(!sum.ended, "a request ends once");
        sum.share += part.share;
        sum.waste_s += part.waste_s;
        sum.preempted_s += part.preempted_s;
        sum.ended = part.ended;
    };
    let mut cuts = cuts.iter().map(|&cut| at(cut)).peekable();
    for index in order {
        while let Some(cut) = cuts.next_if(|&cut| cut <= timelines[index].ordered().scheduled) {
            sweep.cut(cut, &mut emit);
        }
        sweep.push(index as u64, &timelines[index], &mut emit);
    }
    for cut in cuts {
        sweep.cut(cut, &mut emit);
    }
    sweep.finish(&mut emit);
    (parts, sweep)
}

/// The formulas of the module's documentation, evaluated in many small stretches with a loop over the batch.
fn slowly(replica: &Replica, timelines: &[EngineTimeline]) -> Vec<f64> {
    let dt = 1e-3;
    let end = timelines.iter().map(|t| t.last_token.micros()).max().unwrap() as f64 * 1e-6;
    let one = replica.demand(Work { new_tokens: 1, cached_tokens: 0 });
    let two = replica.demand(Work { new_tokens: 1, cached_tokens: 1 });
    let beta = two.compute_s - one.compute_s;
    let (alpha, gamma) = (one.compute_s - beta / 2.0, two.memory_s);
    let mut charges = vec![0.0; timelines.len()];
    for tick in 0..whole_micros(end / dt / 1e6 * 1.0) {
        let t = (tick as f64 + 0.5) * dt;
        let s = |at: Timestamp| at.micros() as f64 * 1e-6;
        let prefills = |x: &EngineTimeline| s(x.scheduled) <= t && t < s(x.first_token);
        let decodes = |x: &EngineTimeline| s(x.first_token) <= t && t < s(x.last_token);
        let rate = |x: &EngineTimeline| f64::from(x.output_tokens - 1) / (s(x.last_token) - s(x.first_token));
        let deciders: Vec<f64> = timelines.iter().filter(|x| decodes(x)).map(rate).collect();
        let feed = |x: &EngineTimeline| f64::from(x.input_tokens) / (s(x.first_token) - s(x.scheduled));
        let active: Vec<usize> =
            (0..timelines.len()).filter(|&i| prefills(&timelines[i]) || decodes(&timelines[i])).collect();
        if active.is_empty() {
            continue;
        }
        let prefilling: Vec<usize> = active.iter().copied().filter(|&i| prefills(&timelines[i])).collect();
        let steps = if !prefilling.is_empty() {
            let turns: f64 =
                prefilling.iter().map(|&i| 1.0 / (s(timelines[i].first_token) - s(timelines[i].scheduled))).sum();
            let fed: f64 = prefilling.iter().map(|&i| feed(&timelines[i])).sum();
            (fed / 2_048.0).max(turns / prefilling.len() as f64)
        } else {
            deciders.iter().sum::<f64>() / deciders.len() as f64
        };
        let own: Vec<(f64, f64)> = active
            .iter()
            .map(|&i| {
                let x = &timelines[i];
                if prefills(x) {
                    let k = feed(x) * (t - s(x.scheduled));
                    (feed(x) * (alpha + beta * k), steps * gamma * k)
                } else {
                    let k = f64::from(x.input_tokens) + rate(x) * (t - s(x.first_token));
                    (steps * (alpha + beta * k), steps * gamma * k)
                }
            })
            .collect();
        let fixed = replica.fixed(1.0);
        let (c, m): (f64, f64) = own.iter().fold((0.0, 0.0), |sum, own| (sum.0 + own.0, sum.1 + own.1));
        let once = steps * fixed.weights_s;
        let tau = fixed.overlap * memory_bound_fraction(once, m, c);
        let terms: Vec<f64> = own
            .iter()
            .map(|own| {
                (steps * fixed.overhead_s + once) / active.len() as f64
                    + (1.0 - fixed.overlap + tau) * own.1
                    + (1.0 - tau) * own.0
            })
            .collect();
        let all: f64 = terms.iter().sum();
        for (&i, term) in active.iter().zip(&terms) {
            charges[i] += term / all * dt;
        }
    }
    charges
}

#[test]
fn the_sweep_is_the_slow_reading_of_the_formulas() {
    let timelines = [
        request(0.0, 0.5, 6.0, 3_000, 400),
        request(0.2, 0.6, 3.0, 500, 200),
        request(1.0, 0.05, 4.0, 40, 300),
        request(1.5, 1.5, 1.0, 12_000, 50),
        request(8.0, 0.4, 0.0, 900, 1),
        request(8.1, 0.5, 2.0, 2_000, 90),
    ];
    for overlap in [1.0, 0.4] {
        let replica = Replica { overlap, ..replica() };
        let (parts, sweep) = swept(Sweep::new(replica, Limits::default(), at(0.0)), &timelines, &[]);
        let slow = slowly(&replica, &timelines);
        for (part, slow) in parts.iter().zip(&slow) {
            let fast = part.share.total_s();
            assert!((fast - slow).abs() < 0.004 + 0.004 * slow, "request {}: {fast} is not {slow}", part.tag);
        }
        let all: f64 = parts.iter().map(|part| part.share.total_s()).sum();
        assert!((all - sweep.busy_s()).abs() < 1e-9 && (all - 9.1).abs() < 0.01 + 0.5, "{all}");
    }
}

#[test]
fn a_full_cache_makes_the_youngest_wait_and_pay_no_busy_time_for_it() {
    // Two requests of 1,000 tokens growing to 1,500 in a cache of 2,600: the second is out from about 3 s until the first ends.
    let timelines = [request(0.0, 0.5, 5.0, 1_000, 501), request(0.1, 0.5, 9.0, 1_000, 501)];
    let limits = Limits { kv_tokens: Some(2_600.0), ..Limits::default() };
    let (parts, sweep) = swept(Sweep::new(replica(), limits, at(0.0)), &timelines, &[2.0, 4.0]);
    assert_eq!(sweep.preemptions(), 1);
    assert_eq!(parts[0].preempted_s, 0.0);
    assert!((0.5..3.0).contains(&parts[1].preempted_s), "{parts:?}");
    assert!(parts[1].waste_s > 0.0);
    let all: f64 = parts.iter().map(|part| part.share.total_s() + part.waste_s).sum();
    assert!((all - sweep.busy_s()).abs() < 1e-9);
}

#[test]
fn a_month_later_the_same_requests_pay_the_same() {
    let timelines = [request(0.0, 0.5, 6.0, 3_000, 400), request(0.2, 0.6, 3.0, 500, 200)];
    let (once, _) = swept(Sweep::new(replica(), Limits::default(), at(0.0)), &timelines, &[]);
    let month_us = 30 * 86_400 * 1_000_000;
    let later = timelines.map(|x| EngineTimeline {
        arrived: x.arrived.plus_micros(month_us),
        scheduled: x.scheduled.plus_micros(month_us),
        first_token: x.first_token.plus_micros(month_us),
        last_token: x.last_token.plus_micros(month_us),
        ..x
    });
    let (again, _) = swept(Sweep::new(replica(), Limits::default(), at(0.0)), &later, &[]);
    for (a, b) in once.iter().zip(&again) {
        assert!((a.share.total_s() - b.share.total_s()).abs() < 1e-6, "{a:?} {b:?}");
    }
}

#[test]
fn from_outside_the_time_before_the_prefill_is_waiting() {
    let (sent, first, last) = (at(10.0), at(14.0), at(20.0));
    let seen = EngineTimeline::seen_from_outside(&replica(), sent, first, last, (2_000, 500, 100));
    assert!(seen.scheduled > at(13.9) && seen.scheduled < first && seen.arrived == sent);
    let hurried = EngineTimeline::seen_from_outside(&replica(), at(13.999), first, last, (200_000, 0, 100));
    assert_eq!(hurried.scheduled, at(13.999));
}

fn any_timelines(most: usize) -> impl Strategy<Value = Vec<EngineTimeline>> {
    let one = (0.0f64..30.0, 0.0f64..2.0, 0.0f64..8.0, 1u32..8_000, 1u32..600, 0u32..4_000).prop_map(
        |(scheduled, prefill, decode, input, output, cached)| EngineTimeline {
            cached_tokens: cached.min(input),
            ..request(scheduled, prefill, decode, input, output)
        },
    );
    prop::collection::vec(one, 1..most)
}

proptest! {
    #[test]
    fn every_busy_moment_is_paid_once_and_nobody_is_paid(
        timelines in any_timelines(40), capacity in prop::option::of(2_000.0f64..60_000.0), overlap in 0.0f64..=1.0,
    ) {
        let limits = Limits { kv_tokens: capacity, ..Limits::default() };
        let (parts, sweep) = swept(Sweep::new(Replica { overlap, ..replica() }, limits, at(0.0)), &timelines, &[]);
        let all: f64 = parts.iter().map(|part| part.share.total_s() + part.waste_s).sum();
        prop_assert!((all - sweep.busy_s()).abs() <= 1e-6 * sweep.busy_s().max(1.0), "{all} {}", sweep.busy_s());
        prop_assert!(parts.iter().all(|part| part.ended && part.share.total_s() >= -1e-9 && part.waste_s >= -1e-9));
        prop_assert!(parts.iter().all(|part| part.preempted_s >= 0.0));
        prop_assert_eq!(sweep.active(), 0);
        if capacity.is_none() {
            prop_assert_eq!(sweep.preemptions(), 0);
        }
    }

    #[test]
    fn charges_add_up_over_intervals(
        timelines in any_timelines(30), mut cuts in prop::collection::vec(0.0f64..45.0, 0..6),
        capacity in prop::option::of(2_000.0f64..60_000.0),
    ) {
        cuts.sort_by(f64::total_cmp);
        let limits = Limits { kv_tokens: capacity, ..Limits::default() };
        let (whole, _) = swept(Sweep::new(replica(), limits, at(0.0)), &timelines, &[]);
        let (pieces, _) = swept(Sweep::new(replica(), limits, at(0.0)), &timelines, &cuts);
        // A cut starts a new stretch, whose middle lies elsewhere; nothing else may differ.
        for (a, b) in whole.iter().zip(&pieces) {
            let (a, b) = (a.share.total_s() + a.waste_s, b.share.total_s() + b.waste_s);
            prop_assert!((a - b).abs() <= 1e-3 + 2e-2 * a.abs(), "{a} {b}");
        }
    }

    #[test]
    fn equal_work_at_the_same_time_pays_equally(timelines in any_timelines(20)) {
        let mut timelines = timelines;
        timelines.push(timelines[0]);
        let (parts, sweep) = swept(Sweep::new(replica(), Limits::default(), at(0.0)), &timelines, &[]);
        let (a, b) = (parts[0].share.total_s(), parts[timelines.len() - 1].share.total_s());
        prop_assert!((a - b).abs() <= 1e-9 * sweep.busy_s().max(1.0), "{a} {b}");
    }
}

/// One measured run: the reconstruction, its quality and what a fit makes of it.
struct Judged {
    quality: Quality,
    fit: Fit,
    held_out: f64,
    preemptions: u64,
}

fn judged(run: &Run, sheet: Replica, limits: Limits) -> Judged {
    let base = run.timelines.iter().map(|timeline| timeline.arrived).min().unwrap();
    let (parts, sweep) = swept(Sweep::new(sheet.ideal(), limits, base).recording(), &run.timelines, &[]);
    let samples: Vec<EngineSample> = run
        .samples
        .iter()
        .map(|&(at, running, waiting, kv)| EngineSample {
            at_s: sweep.seconds(at),
            running: Some(running),
            waiting: Some(waiting),
            kv_used: limits.kv_tokens.map(|_| kv / 100.0),
        })
        .collect();
    let waiting = |t: f64| {
        let waits = |x: &&EngineTimeline| sweep.seconds(x.arrived) <= t && t < sweep.seconds(x.scheduled);
        run.timelines.iter().filter(waits).count() as f64
    };
    let quality = compare(sweep.segments(), waiting, &samples, limits.kv_tokens);
    let window = |x: &EngineTimeline| (sweep.seconds(x.first_token), sweep.seconds(x.last_token));
    let observations = decode_observations(sweep.segments(), &run.timelines, &sheet, window);
    let mut errors = Vec::new();
    let mut fit = None;
    for half in [0, 1] {
        let train: Vec<Observed> = observations
            .iter()
            .enumerate()
            .filter(|(index, _)| index % 2 == half && parts[*index].preempted_s == 0.0)
            .filter_map(|(_, observed)| observed.clone())
            .collect();
        let found = Fit::of(&train).expect("enough requests");
        for (index, observed) in observations.iter().enumerate().filter(|(index, _)| index % 2 != half) {
            let Some(observed) = observed else { continue };
            let predicted = found.predict(&observed.loads) + parts[index].preempted_s;
            errors.push((predicted / observed.seconds - 1.0).abs());
        }
        fit = Some(found);
    }
    errors.sort_by(f64::total_cmp);
    Judged { quality, fit: fit.unwrap(), held_out: errors[errors.len() / 2], preemptions: sweep.preemptions() }
}

#[test]
fn the_batch_of_a_real_engine_is_followed() {
    let Some(run) = measured::run("RTXPRO6000_Qwen3-32B") else { return };
    let shape = ModelShape {
        layers: 64,
        hidden: 5120,
        heads: 64,
        kv_heads: 8,
        head_dim: 128,
        active_parameters: 31.98e9,
        total_parameters: 32.76e9,
        bytes_per_element: 2.0,
    };
    let sheet = Replica::unfitted(Model::from(shape), GpuSheet::RTX_PRO_6000, 2);
    let Judged { quality, fit, held_out, preemptions } = judged(&run, sheet, Limits::default());
    println!("Qwen3-32B on 2 RTX PRO 6000: {quality:.4?} {fit:.4?} held-out decode time {held_out:.4}");
    assert!(quality.running_error.unwrap() <= 0.5 && held_out <= 0.10 && preemptions == 0);
}

#[test]
fn an_overflowing_cache_is_noticed_on_a_real_engine() {
    let Some(run) = measured::run("RTX4090_Llama-3.1-8B") else { return };
    let sheet = Replica::unfitted(Model::from(ModelShape::LLAMA_3_1_8B), GpuSheet::RTX_4090, 1);
    let limits = Limits { kv_tokens: Some(41_408.0), ..Limits::default() };
    let Judged { quality, fit, held_out, preemptions } = judged(&run, sheet, limits);
    println!(
        "Llama-3.1-8B on RTX 4090: {quality:.4?} {fit:.4?} held-out decode time {held_out:.4}, preemptions {preemptions}"
    );
    assert!(quality.running_error.unwrap() <= 2.5 && quality.kv_error.unwrap() <= 0.05 && held_out <= 0.10);
    let blind = judged(&run, sheet, Limits::default()).quality;
    println!("the same without knowing the cache's size: {blind:.4?}");
    assert!(preemptions > 0 && quality.preempted_share > 0.0 && quality.running_error < blind.running_error);
}
