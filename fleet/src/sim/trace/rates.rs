//! Requests made from counts: so many in each bin, spread evenly at random within it, their tokens drawn from a mix.

use std::sync::Arc;

use crate::sim::demand::index;
use crate::sim::random::Random;
use crate::sim::request::Arrival;

/// Each bin's requests are drawn from a sequence of their own, so that a part of a trace is a part of the trace.
const BIN: u64 = 6;
/// From here on a Poisson number is drawn from the normal distribution.
const LARGE_MEAN: f64 = 60.0;

/// How many requests a bin has.
#[derive(Debug, Clone)]
pub(super) enum Counts {
    /// Exactly so many.
    Exact(Arc<[u32]>),
    /// A Poisson number with this mean.
    Mean(Arc<[f64]>),
}

impl Counts {
    /// How many bins there are.
    pub fn len(&self) -> usize {
        match self {
            Counts::Exact(counts) => counts.len(),
            Counts::Mean(means) => means.len(),
        }
    }
}

/// Makes them bin by bin.
#[derive(Debug)]
pub(super) struct RateFeed {
    counts: Counts,
    bin_us: u64,
    mix: Arc<[(u32, u32)]>,
    scale: f64,
    seed: u64,
    bin: usize,
    random: Random,
    /// Places within the current bin, latest first: the next one is taken from the end.
    places_us: Vec<u64>,
    /// Start of the current bin.
    at_us: u64,
}

impl RateFeed {
    /// From the bin on that holds `from_us`.
    pub fn new(counts: Counts, bin_us: u64, mix: Arc<[(u32, u32)]>, scale: f64, seed: u64, from_us: u64) -> RateFeed {
        let bin = usize::try_from(from_us / bin_us).unwrap_or(usize::MAX);
        let random = Random::new(seed);
        RateFeed { counts, bin_us, mix, scale, seed, bin, random, places_us: Vec::new(), at_us: 0 }
    }

    pub fn next(&mut self) -> Option<Arrival> {
        while self.places_us.is_empty() {
            self.next_bin()?;
        }
        let at_us = self.at_us + self.places_us.pop()?;
        let pair = self.random.below(self.mix.len() as u64);
        let (input_tokens, output_tokens) = self.mix[usize::try_from(pair).unwrap_or(0)];
        Some(Arrival { at_us, input_tokens, output_tokens, ..Arrival::default() })
    }

    fn next_bin(&mut self) -> Option<()> {
        self.random = Random::of(self.seed, BIN, self.bin as u64);
        let count = match &self.counts {
            Counts::Exact(counts) => {
                let count = f64::from(*counts.get(self.bin)?);
                // What scaling leaves of a request comes with that probability.
                if self.scale == 1.0 { index(count) } else { index(count * self.scale + self.random.unit()) }
            }
            Counts::Mean(means) => poisson(means.get(self.bin)? * self.scale, &mut self.random),
        };
        let (random, bin_us) = (&mut self.random, self.bin_us);
        self.places_us.extend((0..count).map(|_| random.below(bin_us)));
        self.places_us.sort_unstable_by(|a, b| b.cmp(a));
        self.at_us = self.bin as u64 * self.bin_us;
        self.bin += 1;
        Some(())
    }
}

fn poisson(mean: f64, random: &mut Random) -> usize {
    if mean > LARGE_MEAN {
        return index((mean + mean.sqrt() * random.normal() + 0.5).max(0.0));
    }
    let limit = (-mean.max(0.0)).exp();
    let mut product = random.unit();
    let mut count = 0;
    while product > limit {
        product *= random.unit();
        count += 1;
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn poisson_numbers_have_their_mean_and_variance() {
        let mut random = Random::new(2);
        for mean in [0.0, 0.5, 7.0, 300.0] {
            let drawn: Vec<f64> = (0..20_000).map(|_| poisson(mean, &mut random) as f64).collect();
            let found = drawn.iter().sum::<f64>() / 20_000.0;
            let variance = drawn.iter().map(|n| (n - found).powi(2)).sum::<f64>() / 20_000.0;
            assert!((found - mean).abs() <= mean * 0.02 + 0.02, "{mean}: {found}");
            assert!((variance - mean).abs() <= mean * 0.06 + 0.02, "{mean}: {variance}");
        }
    }
}
