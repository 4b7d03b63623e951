//! What an engine would deliver if it always had enough to do: the third of the three honest prices of a token.
//!
//! A steady state: `n` requests decode, each leaves after its output and makes room for the next prefill, so an average
//! step computes `n / output` prefills beside `n` tokens. `n` is as large as the KV cache, the engine's limit of
//! sequences and its step size allow. The step-time model says how long such a step takes.

use super::replica::{Demand, Fixed, Replica};
use super::timeline::{EngineTimeline, Limits};
use crate::step::Work;

/// A replica that never waits for work.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FullLoad {
    /// Requests that decode at once.
    pub batch: f64,
    /// Mean length of a step in seconds.
    pub step_s: f64,
    /// Tokens delivered in a second.
    pub output_tokens_per_s: f64,
}

/// The largest steady throughput of `replica` with requests like `timelines`. `None` without requests, or when not even
/// one of them fits. `limits.kv_tokens` is needed: unknown is taken as what the data sheet leaves beside the weights when
/// nine tenths of the memory are the engine's.
#[must_use]
pub fn full_load(
    replica: &Replica,
    limits: Limits,
    sequences_max: f64,
    timelines: &[EngineTimeline],
) -> Option<FullLoad> {
    let requests = timelines.len() as f64;
    let sum = |of: &dyn Fn(&EngineTimeline) -> f64| timelines.iter().map(of).sum::<f64>();
    let output = sum(&|one| f64::from(one.output_tokens)) / requests;
    let computed = sum(&|one| f64::from(one.input_tokens - one.cached_tokens.min(one.input_tokens))) / requests;
    if timelines.is_empty() || output <= 0.0 {
        return None;
    }
    // Long answers stay longer, so a context counts as often as a token is made from it.
    let context = sum(&|one| {
        let output = f64::from(one.output_tokens);
        output * (f64::from(one.input_tokens) + output / 2.0)
    }) / (output * requests);
    let prefill_s = sum(&|one| {
        let cached_tokens = one.cached_tokens.min(one.input_tokens);
        replica.demand(Work { new_tokens: one.input_tokens - cached_tokens, cached_tokens }).compute_s
    }) / requests;

    let kv_tokens = limits.kv_tokens.unwrap_or_else(|| replica.kv_capacity_tokens(0.9));
    let fits = kv_tokens / (context + limits.block_tokens / 2.0);
    let tokens_fit = limits.step_tokens_max / (1.0 + computed / output);
    let batch = fits.min(sequences_max).min(tokens_fit);
    if batch < 1.0 {
        return None;
    }
    let one = replica.demand(Work { new_tokens: 1, cached_tokens: 0 });
    let seen = replica.demand(Work { new_tokens: 1, cached_tokens: 1 });
    let all = Demand {
        compute_s: batch * (one.compute_s + context * (seen.compute_s - one.compute_s)) + batch / output * prefill_s,
        memory_s: batch * context * seen.memory_s,
        new_tokens: 0,
    };
    let fixed: Fixed = replica.fixed(batch * (1.0 + computed / output));
    let step_s = fixed.step_s(&[all]);
    Some(FullLoad { batch, step_s, output_tokens_per_s: batch / step_s })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::{GpuSheet, ModelShape};
    use crate::time::Timestamp;

    fn request(input_tokens: u32, output_tokens: u32) -> EngineTimeline {
        let at = Timestamp::from_micros(0);
        EngineTimeline {
            arrived: at,
            scheduled: at,
            first_token: at,
            last_token: at,
            input_tokens,
            cached_tokens: 0,
            output_tokens,
        }
    }

    #[test]
    fn a_larger_cache_gives_more_until_another_limit_holds() {
        let replica = Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 1);
        let load = |kv_tokens: f64, sequences_max: f64| {
            let limits = Limits { kv_tokens: Some(kv_tokens), ..Limits::default() };
            full_load(&replica, limits, sequences_max, &[request(500, 500), request(300, 100)])
        };
        let (small, large) = (load(10_000.0, 256.0).unwrap(), load(100_000.0, 256.0).unwrap());
        assert!(small.output_tokens_per_s < large.output_tokens_per_s && small.batch < large.batch);
        assert_eq!(load(1e9, 64.0).unwrap().batch, 64.0);
        assert!(load(1e9, 1e9).unwrap().batch < 2_048.0, "a step takes so many tokens");
        assert_eq!(load(100.0, 256.0), None);
        assert_eq!(full_load(&replica, Limits::default(), 256.0, &[]), None);
    }

    #[test]
    fn one_request_at_a_time_takes_its_own_steps() {
        let replica = Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 1);
        let load = full_load(&replica, Limits::default(), 1.0, &[request(10, 1_000)]).unwrap();
        let decode = replica.step_s(&[Work { new_tokens: 1, cached_tokens: 510 }]);
        assert!((load.step_s / decode - 1.0).abs() < 1e-3, "{load:?} {decode}");
    }
}
