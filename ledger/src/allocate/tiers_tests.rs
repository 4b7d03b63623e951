//! The tiers against one another, on an engine simulated step by step: what is known of each step, of each request, and of
//! nothing but the counters should lead to nearly the same bill, and knowing less should cost accuracy.

use super::counters::{Counted, Rates};
use super::replica::Replica;
use super::share::Share;
use super::steps::{Entry, Step, charge};
use super::sweep::Sweep;
use super::timeline::{EngineTimeline, Limits, whole_micros};
use crate::step::{GpuSheet, ModelShape, Work};
use crate::time::Timestamp;

/// A request to simulate: arrival in seconds, input and output tokens.
pub(super) type Job = (f64, u32, u32);

/// A first-come-first-served engine with chunked prefill: decodes first, the rest of the step's tokens to prefills.
pub(super) fn simulate(replica: &Replica, jobs: &[Job]) -> (Vec<Step>, Vec<EngineTimeline>) {
    const STEP_TOKENS: u32 = 2_048;
    let moment = |seconds: f64| Timestamp::from_micros(whole_micros(seconds));
    let mut timelines: Vec<EngineTimeline> = jobs
        .iter()
        .map(|&(arrived, input_tokens, output_tokens)| EngineTimeline {
            arrived: moment(arrived),
            scheduled: moment(arrived),
            first_token: moment(arrived),
            last_token: moment(arrived),
            input_tokens,
            cached_tokens: 0,
            output_tokens,
        })
        .collect();
    // Tokens computed of the input, tokens delivered.
    let mut progress = vec![(0u32, 0u32); jobs.len()];
    let mut steps = Vec::new();
    let mut now = 0.0;
    loop {
        let open: Vec<usize> = (0..jobs.len()).filter(|&i| progress[i].1 < jobs[i].2).collect();
        if open.is_empty() {
            return (steps, timelines);
        }
        let here: Vec<usize> = open.iter().copied().filter(|&i| jobs[i].0 <= now).collect();
        if here.is_empty() {
            now = open.iter().map(|&i| jobs[i].0).fold(f64::INFINITY, f64::min);
            continue;
        }
        let mut room = STEP_TOKENS;
        let mut batch = Vec::new();
        for &i in here.iter().filter(|&&i| progress[i].1 > 0) {
            let cached_tokens = jobs[i].1 + progress[i].1 - 1;
            batch.push(Entry { tag: i as u64, work: Work { new_tokens: 1, cached_tokens }, adapter: None });
            room = room.saturating_sub(1);
        }
        for &i in here.iter().filter(|&&i| progress[i].1 == 0) {
            let new_tokens = (jobs[i].1 - progress[i].0).min(room);
            if new_tokens == 0 {
                break;
            }
            if progress[i].0 == 0 {
                timelines[i].scheduled = moment(now);
            }
            batch.push(Entry { tag: i as u64, work: Work { new_tokens, cached_tokens: progress[i].0 }, adapter: None });
            room -= new_tokens;
        }
        let works: Vec<Work> = batch.iter().map(|entry| entry.work).collect();
        let seconds = replica.step_s(&works);
        let start_s = now;
        now += seconds;
        for entry in &batch {
            let i = usize::try_from(entry.tag).unwrap();
            if progress[i].1 == 0 {
                progress[i].0 += entry.work.new_tokens;
                if progress[i].0 < jobs[i].1 {
                    continue;
                }
                timelines[i].first_token = moment(now);
            }
            progress[i].1 += 1;
            timelines[i].last_token = moment(now);
        }
        steps.push(Step { sequence: steps.len() as u64, start_s, seconds, batch });
    }
}

/// Two kinds of users: long documents with short answers, short questions with long answers.
pub(super) fn jobs(count: u32, gap_s: f64) -> Vec<Job> {
    (0..count)
        .map(|i| {
            let arrived = f64::from(i) * gap_s + f64::from(i * 7_919 % 101) / 101.0 * gap_s;
            let jitter = i * 2_654_435 % 1_000;
            if i % 3 == 0 {
                (arrived, 4_000 + 4 * jitter, 20 + jitter / 20)
            } else {
                (arrived, 80 + jitter / 3, 200 + jitter / 2)
            }
        })
        .collect()
}

pub(super) fn misallocation(truth: &[f64], other: &[f64]) -> f64 {
    let (a, b): (f64, f64) = (truth.iter().sum(), other.iter().sum());
    truth.iter().zip(other).map(|(x, y)| (x / a - y / b).abs()).sum::<f64>() / 2.0
}

/// The split that OpenCost derives from an engine's counters: cost goes to input and output tokens in proportion to
/// prefill seconds and to the sum of each request's *mean* time of an output token, and then flat within each.
fn by_split(timelines: &[EngineTimeline]) -> Vec<f64> {
    let sum = |of: &dyn Fn(&EngineTimeline) -> f64| timelines.iter().map(of).sum::<f64>();
    let seconds = |from: Timestamp, until: Timestamp| until.micros_since(from) as f64 * 1e-6;
    let prefill_s = sum(&|one| seconds(one.scheduled, one.first_token));
    let means_s =
        sum(&|one| seconds(one.first_token, one.last_token) / f64::from(one.output_tokens.saturating_sub(1).max(1)));
    let input_part = prefill_s / (prefill_s + means_s);
    let (input, output) = (sum(&|one| f64::from(one.input_tokens)), sum(&|one| f64::from(one.output_tokens)));
    let share = |one: &EngineTimeline| {
        input_part * f64::from(one.input_tokens) / input + (1.0 - input_part) * f64::from(one.output_tokens) / output
    };
    timelines.iter().map(share).collect()
}

/// Every moment in equal parts to the requests that run.
fn equal_time(replica: &Replica, timelines: &[EngineTimeline]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..timelines.len()).collect();
    order.sort_by_key(|&i| (timelines[i].scheduled, i));
    let mut sweep = Sweep::new(replica.overhead_only(), Limits::default(), Timestamp::from_micros(0));
    let mut shares = vec![0.0; timelines.len()];
    let mut emit = |part: super::sweep::Part| shares[usize::try_from(part.tag).unwrap()] += part.share.total_s();
    for i in order {
        sweep.push(i as u64, &timelines[i], &mut emit);
    }
    sweep.finish(&mut emit);
    shares
}

#[test]
fn knowing_less_costs_accuracy_and_flat_tokens_cost_most() {
    for (name, gap_s, overlap) in [("quiet", 0.5, 1.0), ("busy", 0.12, 1.0), ("busy, no overlap", 0.12, 0.0)] {
        let replica = Replica { overlap, ..Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 1) };
        let jobs = jobs(150, gap_s);
        let (steps, timelines) = simulate(&replica, &jobs);
        let charged = charge(&replica, &steps);
        let per_step: Vec<f64> = (0..jobs.len() as u64).map(|tag| charged.shares[&tag].total_s()).collect();

        let mut swept = vec![Share::default(); jobs.len()];
        let mut sweep = Sweep::new(replica, Limits::default(), Timestamp::from_micros(0));
        let engine = timelines.clone();
        let mut order: Vec<usize> = (0..jobs.len()).collect();
        order.sort_by_key(|&i| (timelines[i].scheduled, i));
        let mut emit = |part: super::sweep::Part| swept[usize::try_from(part.tag).unwrap()] += part.share;
        for i in order {
            sweep.push(i as u64, &timelines[i], &mut emit);
        }
        sweep.finish(&mut emit);
        assert!((sweep.busy_s() - charged.busy_s).abs() < 0.02 * charged.busy_s);
        let timelines: Vec<f64> = swept.iter().map(Share::total_s).collect();

        let batch = steps.iter().map(|step| step.batch.len()).sum::<usize>() as f64 / steps.len() as f64;
        let rates = Rates::of_model(&replica, batch, 1_000);
        let counted: Vec<Counted> = jobs
            .iter()
            .map(|&(_, input, output)| Counted {
                prompt_tokens: f64::from(input),
                generation_tokens: f64::from(output),
                ..Counted::default()
            })
            .collect();
        let counters = rates.share(&counted, charged.busy_s);
        let flat: Vec<f64> = jobs.iter().map(|&(_, input, output)| f64::from(input + output)).collect();
        let weighted: Vec<f64> = jobs.iter().map(|&(_, input, output)| f64::from(input + 2 * output)).collect();
        let split = by_split(&engine);
        let equal = equal_time(&replica, &engine);

        let [b, c, tokens] = [&timelines, &counters, &flat].map(|other| misallocation(&per_step, other));
        for (method, shares) in [
            ("tier B", &timelines),
            ("tier C", &counters),
            ("flat", &flat),
            ("weighted", &weighted),
            ("opencost", &split),
            ("equal", &equal),
        ] {
            let wrong = misallocation(&per_step, shares);
            println!("against tier A, {name}, batch {batch:.1}, {method}: {wrong:.4}");
        }
        assert!(b < 0.02 && b < c && c < tokens, "{name}");
    }
}
