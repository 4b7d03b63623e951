//! What one replica can do: the requests a second of a given mix that it serves as promised, and what a request is of that.
//!
//! Demand is counted in replicas. A request of so many tokens is `per_input_token x input + per_output_token x output`
//! replica-seconds of work; the work that arrives in a second is the load, and at load 1.0 one replica does as much as it can
//! under the objective. Nothing here is read off a formula: the engine is simulated at growing rates until the objective breaks.

use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde::{Deserialize, Serialize};

use super::engine::{Load, Spec, play};
use super::{Arrival, Done};
use crate::scale::Objective;

/// Requests of one simulated run. The first fifth fills the engine and is not judged.
const REQUESTS: u32 = 4_000;
/// Bisections after the rate is known to a factor of two: to one part in a thousand.
const ROUNDS: u32 = 10;
/// The lowest rate that is tried, requests a second.
const RATE_MIN: f64 = 1e-3;
/// The highest.
const RATE_MAX: f64 = 1e6;
/// How much longer prompts and answers are made to see what they cost.
const LONGER: f64 = 1.5;

/// How much of a replica a request needs, in replica-seconds for each token.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Work {
    /// Of an input token that is not in the prefix cache.
    pub per_input_token: f64,
    /// Of an output token.
    pub per_output_token: f64,
}

impl Work {
    /// Replica-seconds of a request with so many input tokens outside the cache and so many output tokens.
    #[must_use]
    pub fn of(&self, input_tokens: u32, output_tokens: u32) -> f64 {
        self.prefill(input_tokens) + self.per_output_token * f64::from(output_tokens)
    }

    /// The prefill's part of it.
    #[must_use]
    pub fn prefill(&self, input_tokens: u32) -> f64 {
        self.per_input_token * f64::from(input_tokens)
    }
}

/// One replica at the limit of its objective.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Capacity {
    /// Requests a second.
    pub requests_per_s: f64,
    /// Requests in the batch, a mean over time.
    pub batch: f64,
    /// Input tokens a second.
    pub input_tokens_per_s: f64,
    /// Output tokens a second.
    pub output_tokens_per_s: f64,
    /// What a request is of it.
    pub work: Work,
}

/// Finds the highest rate at which requests drawn from `mix`, pairs of input and output tokens, meet the objective on one
/// replica. The same seed gives the same answer. `None` when they never do, or without requests.
#[must_use]
pub fn capacity(spec: &Spec, mix: &[(u32, u32)], objective: &Objective, seed: u64) -> Option<Capacity> {
    let (requests_per_s, run) = highest_rate(spec, mix, objective, seed)?;
    let longer = |inputs: f64, outputs: f64| -> Vec<(u32, u32)> {
        mix.iter().map(|&(input, output)| (times(input, inputs), times(output, outputs))).collect()
    };
    let [input, output] = run.mean_tokens;
    let of = |inputs: f64, outputs: f64| -> Option<f64> {
        let (rate, _) = highest_rate(spec, &longer(inputs, outputs), objective, seed)?;
        Some(1.0 / rate - 1.0 / requests_per_s)
    };
    // What half as much again of each costs, in the proportion in which both together cost the whole. Longer requests that never
    // meet the objective leave the tokens' own step times as the measure.
    let more = of(LONGER, 1.0).zip(of(1.0, LONGER));
    let [prefill, decode] = match more {
        Some((inputs, outputs)) if inputs.max(0.0) + outputs.max(0.0) > 0.0 => [inputs.max(0.0), outputs.max(0.0)],
        _ => alone(spec, input, output, run.batch),
    };
    let whole = 1.0 / requests_per_s;
    let part = |of: f64, tokens: f64| whole * of / (prefill + decode) / tokens.max(1.0);
    Some(Capacity {
        requests_per_s,
        batch: run.batch,
        input_tokens_per_s: requests_per_s * input,
        output_tokens_per_s: requests_per_s * output,
        work: Work { per_input_token: part(prefill, input), per_output_token: part(decode, output) },
    })
}

/// Seconds of a prefill, and of a request's part of its decode steps in a batch of `batch`.
fn alone(spec: &Spec, input: f64, output: f64, batch: f64) -> [f64; 2] {
    use ledger::step::Work as Tokens;
    let replica = &spec.constants.replica;
    let one = replica.demand(Tokens { new_tokens: 1, cached_tokens: 0 });
    let batch = batch.max(1.0);
    let fixed = replica.fixed(batch);
    let step_s = (fixed.overhead_s + fixed.read_once_s()) / batch + spec.constants.sequence_s;
    [input * one.compute_s, output * (step_s + one.compute_s)]
}

/// What a simulated run showed.
#[derive(Debug, Clone, Copy)]
struct Run {
    met: bool,
    batch: f64,
    mean_tokens: [f64; 2],
}

fn highest_rate(spec: &Spec, mix: &[(u32, u32)], objective: &Objective, seed: u64) -> Option<(f64, Run)> {
    let at = |rate: f64| run(spec, mix, objective, rate, seed).filter(|run| run.met).map(|run| (rate, run));
    let mut best = at(1.0);
    let (mut low, mut high) = (0.0, RATE_MAX);
    let mut rate = 1.0;
    while best.is_some() && rate < RATE_MAX {
        low = rate;
        rate *= 2.0;
        match at(rate) {
            Some(met) => best = Some(met),
            None => {
                high = rate;
                break;
            }
        }
    }
    while best.is_none() {
        high = rate;
        rate /= 2.0;
        if rate < RATE_MIN {
            return None;
        }
        best = at(rate);
        low = rate;
    }
    for _ in 0..ROUNDS {
        let middle = f64::midpoint(low, high);
        match at(middle) {
            Some(met) => (low, best) = (middle, Some(met)),
            None => high = middle,
        }
    }
    best
}

/// One simulated run. `None` when there is nothing to run or a request can never be served.
fn run(spec: &Spec, mix: &[(u32, u32)], objective: &Objective, requests_per_s: f64, seed: u64) -> Option<Run> {
    if mix.is_empty() {
        return None;
    }
    let arrivals = arrivals(mix, requests_per_s, seed);
    let mut done = Vec::with_capacity(arrivals.len());
    play(spec, &arrivals, Arc::default(), &mut |one| done.push(one)).ok()?;
    let judged = arrivals[arrivals.len() / 5].at_us..arrivals.last()?.at_us;
    let seconds = |from_us: u64, to_us: u64| to_us.saturating_sub(from_us) as f64 / 1e6;
    let (mut met, mut all, mut held_s) = (0u32, 0u32, 0.0);
    let mut tokens = [0.0; 2];
    for Done { arrival, scheduled_us, first_token_us, last_token_us, .. } in done {
        tokens[0] += f64::from(arrival.input_tokens);
        tokens[1] += f64::from(arrival.output_tokens);
        held_s += seconds(scheduled_us.max(judged.start), last_token_us.min(judged.end));
        if !judged.contains(&arrival.at_us) {
            continue;
        }
        all += 1;
        let tpot_s = seconds(first_token_us, last_token_us) / f64::from(arrival.output_tokens.max(2) - 1);
        met += u32::from(seconds(arrival.at_us, first_token_us) <= objective.ttft_s && tpot_s <= objective.tpot_s);
    }
    Some(Run {
        met: f64::from(met) >= objective.percentile * f64::from(all),
        batch: held_s / seconds(judged.start, judged.end).max(f64::MIN_POSITIVE),
        mean_tokens: tokens.map(|sum| sum / arrivals.len() as f64),
    })
}

fn arrivals(mix: &[(u32, u32)], requests_per_s: f64, seed: u64) -> Vec<Arrival> {
    let mut random = StdRng::seed_from_u64(seed);
    let load = Load { requests_per_s, requests: REQUESTS, input_tokens: 1, output_tokens: 1, seed };
    let mut arrivals = load.arrivals();
    for arrival in &mut arrivals {
        (arrival.input_tokens, arrival.output_tokens) = mix[random.random_range(0..mix.len())];
    }
    arrivals
}

/// So many times as many tokens, at least one.
fn times(tokens: u32, factor: f64) -> u32 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "float to integer casts saturate")]
    let longer = (f64::from(tokens) * factor).round() as u32;
    longer.max(1)
}

#[cfg(test)]
mod tests {
    use ledger::allocate::replica::Replica;
    use ledger::step::{GpuSheet, ModelShape};

    use super::*;
    use crate::sim::engine::{Constants, Limits};

    fn spec() -> Spec {
        Spec::new(Constants::unfitted(Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 1)))
    }

    #[test]
    fn a_replica_at_capacity_has_load_one() {
        let mix = [(512, 256), (1_500, 60), (100, 500)];
        let found = capacity(&spec(), &mix, &Objective::default(), 7).unwrap();
        assert!((5.0..60.0).contains(&found.requests_per_s), "{found:?}");
        let load = found.work.per_input_token * found.input_tokens_per_s
            + found.work.per_output_token * found.output_tokens_per_s;
        assert!((load - 1.0).abs() < 1e-9, "{load}");
        assert!(found.work.per_output_token > found.work.per_input_token, "{found:?}");
        assert!(found.batch > 20.0, "{found:?}");
        assert_eq!(capacity(&spec(), &mix, &Objective::default(), 7), Some(found));
    }

    #[test]
    fn a_stricter_promise_leaves_less() {
        let mix = [(512, 256)];
        let rate = |tpot_s, ttft_s| {
            let objective = Objective { tpot_s, ttft_s, percentile: 0.95 };
            capacity(&spec(), &mix, &objective, 1).map(|found| found.requests_per_s)
        };
        let (loose, strict) = (rate(0.1, 2.0).unwrap(), rate(0.015, 2.0).unwrap());
        assert!(strict < 0.8 * loose, "{strict} {loose}");
        assert_eq!(rate(0.001, 2.0), None, "no step is that short");
        assert_eq!(capacity(&spec(), &[], &Objective::default(), 1), None);
    }

    #[test]
    fn twice_the_replica_does_about_twice_as_much() {
        // Long contexts: the cache is the limit, and two GPUs hold more than twice as many.
        let mix = [(3_000, 600)];
        let one = capacity(&spec(), &mix, &Objective::default(), 3).unwrap();
        let twice = Replica { gpus: 2, ..spec().constants.replica };
        let twice = Spec { constants: Constants { replica: twice, ..spec().constants }, ..spec() };
        let two = capacity(&twice, &mix, &Objective::default(), 3).unwrap();
        assert!((1.5..3.0).contains(&(two.requests_per_s / one.requests_per_s)), "{one:?} {two:?}");
        let small = Spec { limits: Limits { kv_tokens: Some(100), ..spec().limits }, ..spec() };
        assert_eq!(capacity(&small, &mix, &Objective::default(), 3), None);
    }
}
