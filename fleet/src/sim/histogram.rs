//! Latencies of any number of requests in a fixed amount of memory, within half a percent.

use serde::Serialize;

/// Buckets within each power of two of microseconds.
const STEPS_LOG2: u32 = 7;
const STEPS: usize = 1 << STEPS_LOG2;
/// Up to 2^40 microseconds, twelve days; longer ones land in the last bucket.
const BUCKETS: usize = STEPS * (40 - STEPS_LOG2 as usize + 1);

/// Counts of durations by size.
#[derive(Debug, Clone)]
pub struct Histogram {
    buckets: Vec<u32>,
    count: u64,
    sum_us: f64,
    max_us: u64,
    /// The buckets in use, so that a histogram of few values is cleared as fast as it was filled.
    low: usize,
    high: usize,
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram { buckets: vec![0; BUCKETS], count: 0, sum_us: 0.0, max_us: 0, low: BUCKETS, high: 0 }
    }
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&mut self, us: u64) {
        let bucket = bucket(us);
        self.buckets[bucket] += 1;
        self.count += 1;
        self.sum_us += us as f64;
        self.max_us = self.max_us.max(us);
        self.low = self.low.min(bucket);
        self.high = self.high.max(bucket + 1);
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        if self.low < self.high {
            self.buckets[self.low..self.high].fill(0);
        }
        (self.count, self.sum_us, self.max_us, self.low, self.high) = (0, 0.0, 0, BUCKETS, 0);
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The duration in seconds that a part of `quantile` (0 to 1) did not exceed. `None` when nothing was counted.
    #[must_use]
    pub fn quantile_s(&self, quantile: f64) -> Option<f64> {
        let last = self.count.checked_sub(1)?;
        let mut left = (last as f64 * quantile.clamp(0.0, 1.0)).round();
        for index in self.low..self.high {
            let count = f64::from(self.buckets[index]);
            if left < count {
                return Some(middle(index).min(self.max_us) as f64 / 1e6);
            }
            left -= count;
        }
        Some(self.max_us as f64 / 1e6)
    }

    /// Its percentiles, with the objective's among them. `None` when nothing was counted.
    #[must_use]
    pub fn percentiles(&self, objective: f64) -> Option<Percentiles> {
        Some(Percentiles {
            mean_s: self.sum_us / self.count as f64 / 1e6,
            p50_s: self.quantile_s(0.5)?,
            p90_s: self.quantile_s(0.9)?,
            p95_s: self.quantile_s(0.95)?,
            p99_s: self.quantile_s(0.99)?,
            max_s: self.max_us as f64 / 1e6,
            at_objective_s: self.quantile_s(objective)?,
        })
    }
}

/// How long something took, seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Percentiles {
    /// The mean.
    pub mean_s: f64,
    /// Half took no longer.
    pub p50_s: f64,
    /// 90 % took no longer.
    pub p90_s: f64,
    /// 95 % took no longer.
    pub p95_s: f64,
    /// 99 % took no longer.
    pub p99_s: f64,
    /// The longest.
    pub max_s: f64,
    /// At the percentile of the objective.
    pub at_objective_s: f64,
}

fn bucket(us: u64) -> usize {
    let shift = (u64::BITS - us.leading_zeros()).saturating_sub(STEPS_LOG2 + 1);
    let index = usize::try_from(us >> shift).unwrap_or(BUCKETS) + shift as usize * STEPS;
    index.min(BUCKETS - 1)
}

fn middle(index: usize) -> u64 {
    let shift = (index / STEPS).saturating_sub(1);
    let floor = (index - shift * STEPS) as u64;
    (floor << shift) + ((1 << shift) >> 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_lands_within_half_a_percent() {
        for exponent in 0..39 {
            for us in [1_u64 << exponent, (1 << exponent) * 3 / 2 + 1, (1 << (exponent + 1)) - 1] {
                let back = middle(bucket(us));
                assert!(back.abs_diff(us) * 200 <= us, "{us} came back as {back}");
            }
        }
    }

    #[test]
    fn percentiles_of_a_known_distribution() {
        let mut histogram = Histogram::default();
        (1..=10_000).for_each(|us| histogram.record(us));
        let found = histogram.percentiles(0.999).unwrap();
        for (found, expected) in [
            (found.mean_s, 0.005_000_5),
            (found.p50_s, 0.005),
            (found.p90_s, 0.009),
            (found.p99_s, 0.0099),
            (found.max_s, 0.01),
            (found.at_objective_s, 0.00999),
        ] {
            assert!((found / expected - 1.0).abs() < 0.005, "{found} {expected}");
        }
        histogram.clear();
        assert_eq!(histogram.percentiles(0.5), None);
        histogram.record(1);
        assert_eq!(histogram.quantile_s(0.5), Some(0.000_001));
    }
}
