//! A list of requests through one engine, and seeded lists to play.

use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde::{Deserialize, Serialize};

use super::cost::{count, whole};
use super::{Engine, Spec, TooLong};
use crate::sim::{Arrival, Done, Prefixes};

/// Plays `arrivals`, in the order of their times, through one engine until all have ended; gives the time of the end in
/// microseconds.
///
/// # Errors
/// [`TooLong`] at the first request that the engine can never serve.
pub fn play(
    spec: &Spec,
    arrivals: &[Arrival],
    prefixes: Arc<Prefixes>,
    done: &mut impl FnMut(Done),
) -> Result<u64, TooLong> {
    let mut engine = Engine::with_prefixes(spec, prefixes);
    for arrival in arrivals {
        engine.advance(arrival.at_us, done);
        engine.submit(*arrival, arrival.at_us)?;
    }
    Ok(engine.finish(done))
}

/// A steady load of like requests, as benchmarks make it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Load {
    /// Requests a second; infinite lets all come at once.
    pub requests_per_s: f64,
    /// How many.
    pub requests: u32,
    /// Input tokens of each.
    pub input_tokens: u32,
    /// Output tokens of each.
    pub output_tokens: u32,
    /// What arrivals are drawn from.
    pub seed: u64,
}

impl Load {
    /// The requests. Their gaps are drawn from the exponential distribution and stretched so that the last one arrives after
    /// exactly `requests / requests_per_s` seconds, as `vllm bench serve` does it.
    #[must_use]
    pub fn arrivals(&self) -> Vec<Arrival> {
        let mut random = StdRng::seed_from_u64(self.seed);
        let mut at = 0.0;
        let times: Vec<f64> = (0..self.requests)
            .map(|_| {
                at += -(1.0 - random.random::<f64>()).ln();
                at
            })
            .collect();
        let stretch = count(u64::from(self.requests)) / self.requests_per_s / at.max(f64::MIN_POSITIVE) * 1e6;
        (0u64..)
            .zip(times)
            .map(|(id, at)| Arrival {
                id,
                at_us: whole((at * stretch).round()),
                input_tokens: self.input_tokens,
                output_tokens: self.output_tokens,
                ..Arrival::default()
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_is_seeded_and_as_long_as_it_says() {
        let load = Load { requests_per_s: 10.0, requests: 500, input_tokens: 5, output_tokens: 7, seed: 3 };
        let arrivals = load.arrivals();
        assert_eq!(arrivals, load.arrivals());
        assert_eq!((arrivals.len(), arrivals[499].at_us), (500, 50_000_000));
        assert!(arrivals.is_sorted_by_key(|arrival| arrival.at_us));
        let at_once = Load { requests_per_s: f64::INFINITY, ..load };
        assert!(at_once.arrivals().iter().all(|arrival| arrival.at_us == 0));
    }
}
