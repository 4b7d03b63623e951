//! A histogram of latencies with constant memory and less than one percent of error, by log-linear buckets.

use std::time::Duration;

/// Buckets within each power of two; 128 of them make the error at most 1/128.
const STEPS: usize = 128;
const STEPS_LOG2: usize = 7;
/// Up to 2^40 ns, about 18 minutes; longer values land in the last bucket.
const POWERS: usize = 40 - STEPS_LOG2 + 1;

/// Counts of durations by size.
#[derive(Debug, Clone)]
pub struct Histogram {
    buckets: Vec<u64>,
    count: u64,
    max_ns: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { buckets: vec![0; STEPS * POWERS], count: 0, max_ns: 0 }
    }
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&mut self, duration: Duration) {
        let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let last = self.buckets.len() - 1;
        self.buckets[bucket(ns).min(last)] += 1;
        self.count += 1;
        self.max_ns = self.max_ns.max(ns);
    }

    /// Adds everything that `other` counted.
    pub fn merge(&mut self, other: &Histogram) {
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            *mine += theirs;
        }
        self.count += other.count;
        self.max_ns = self.max_ns.max(other.max_ns);
    }

    /// Durations counted so far.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The longest duration, in milliseconds.
    #[must_use]
    pub fn max_ms(&self) -> f64 {
        ms(self.max_ns)
    }

    /// The duration in milliseconds that a share of `quantile` (0 to 1) did not exceed. `None` when nothing was counted.
    #[must_use]
    pub fn quantile_ms(&self, quantile: f64) -> Option<f64> {
        let mut left = self.count.checked_sub(1).map(|last| rank(last, quantile))?;
        for (index, &count) in self.buckets.iter().enumerate() {
            if left < count {
                return Some(ms(middle(index).min(self.max_ns)));
            }
            left -= count;
        }
        Some(self.max_ms())
    }
}

fn bucket(ns: u64) -> usize {
    let significant = 64 - usize::try_from(ns.leading_zeros()).unwrap_or(0);
    let shift = significant.saturating_sub(STEPS_LOG2 + 1);
    usize::try_from(ns >> shift).unwrap_or(usize::MAX).saturating_add(shift * STEPS)
}

fn middle(index: usize) -> u64 {
    let shift = (index / STEPS).saturating_sub(1);
    let floor = u64::try_from(index - shift * STEPS).unwrap_or(0);
    (floor << shift) + ((1 << shift) >> 1)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rank between 0 and the count, as a float"
)]
fn rank(last: u64, quantile: f64) -> u64 {
    (last as f64 * quantile.clamp(0.0, 1.0)).round() as u64
}

fn ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_size_lands_within_one_percent() {
        for exponent in 0..39 {
            for ns in [1_u64 << exponent, (1 << exponent) * 3 / 2 + 1] {
                let back = middle(bucket(ns));
                assert!(back.abs_diff(ns) * 100 <= ns, "{ns} came back as {back}");
            }
        }
    }

    #[test]
    fn quantiles_of_a_known_distribution() {
        let (mut one, mut other) = (Histogram::default(), Histogram::default());
        for us in 1..=1000 {
            if us % 2 == 0 { &mut one } else { &mut other }.record(Duration::from_micros(us));
        }
        one.merge(&other);
        assert_eq!(one.count(), 1000);
        for (quantile, expected) in [(0.0, 0.001), (0.5, 0.5), (0.99, 0.99), (1.0, 1.0)] {
            let found = one.quantile_ms(quantile).unwrap();
            assert!((found - expected).abs() <= expected * 0.012, "{quantile}: {found}");
        }
        assert_eq!(Histogram::default().quantile_ms(0.5), None);
    }
}
