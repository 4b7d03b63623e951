//! From a metric's floating-point value to a count, a part or a time, or to nothing where it is none of these.

use ledger::telemetry::Millionths;

use super::{Found, Loss, Missing};
use crate::prometheus::{Sample, Scrape};

/// Above this a floating-point number no longer tells neighbouring integers apart, so it is no count.
const EXACT_MAX: f64 = 9_007_199_254_740_992.0;

/// A count. Negative, infinite and undefined values are none.
pub(super) fn count(value: f64) -> Option<u64> {
    if !(0.0..=EXACT_MAX).contains(&value) {
        return None;
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked above to fit")]
    let count = value.round() as u64;
    Some(count)
}

/// A count of things at one moment.
pub(super) fn few(value: f64) -> Option<u32> {
    count(value).and_then(|count| u32::try_from(count).ok())
}

/// A part of a whole, 0 to 1. A hair more than the whole is the whole: exporters average over windows of their own.
pub(super) fn part(value: f64) -> Option<Millionths> {
    if !(0.0..=1.01).contains(&value) {
        return None;
    }
    few(value.min(1.0) * 1e6)
}

/// Microseconds of a number of seconds.
pub(super) fn micros(seconds: f64) -> Option<u64> {
    count(seconds * 1e6)
}

/// The sum. `None` without samples, and when one of them is no quantity: a sum without it would look like a restart.
pub(super) fn sum<'a>(samples: impl IntoIterator<Item = &'a Sample>) -> Option<f64> {
    samples.into_iter().map(|sample| quantity(sample.value)).try_fold(None, |sum: Option<f64>, value| {
        let value = value?;
        Some(Some(sum.unwrap_or(0.0) + value))
    })?
}

/// The mean, under the same rule as [`sum`].
pub(super) fn mean<'a>(samples: impl IntoIterator<Item = &'a Sample>) -> Option<f64> {
    let samples: Vec<&Sample> = samples.into_iter().collect();
    sum(samples.iter().copied()).map(|sum| sum / samples.len() as f64)
}

/// The value if it measures something.
pub(super) fn quantity(value: f64) -> Option<f64> {
    (value.is_finite() && value >= 0.0).then_some(value)
}

/// A scrape being read: it notes what was expected and is not there.
pub(super) struct Page<'a> {
    pub(super) scrape: &'a Scrape,
    missing: Vec<Missing>,
}

impl<'a> Page<'a> {
    pub(super) fn new(scrape: &'a Scrape) -> Page<'a> {
        Page { scrape, missing: Vec::new() }
    }

    /// The sum over all label sets of the first of these names that is there.
    pub(super) fn sum(&self, names: &[&str]) -> Option<f64> {
        let name = names.iter().find(|name| self.has(name))?;
        sum(self.scrape.named(name))
    }

    /// The mean over all label sets of the first of these names that is there.
    pub(super) fn mean(&self, names: &[&str]) -> Option<f64> {
        let name = names.iter().find(|name| self.has(name))?;
        mean(self.scrape.named(name))
    }

    /// Notes the name as missing when it gave no value.
    pub(super) fn need<T>(&mut self, name: &'static str, loss: Loss, value: Option<T>) -> Option<T> {
        if value.is_none() {
            self.missing.push(Missing { name, loss });
        }
        value
    }

    pub(super) fn found(self, reading: ledger::EngineReading) -> Found {
        Found { reading, missing: self.missing }
    }

    pub(super) fn missing(self) -> Vec<Missing> {
        self.missing
    }

    fn has(&self, name: &str) -> bool {
        self.scrape.named(name).next().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prometheus::parse;

    #[test]
    fn what_is_no_quantity_is_unknown() {
        let cases =
            [(0.0, Some(0)), (12.4, Some(12)), (-1.0, None), (f64::NAN, None), (f64::INFINITY, None), (1e16, None)];
        for (value, expected) in cases {
            assert_eq!(count(value), expected, "{value}");
        }
        assert_eq!(few(5e9), None);
        for (value, expected) in [(0.25, Some(250_000)), (1.004, Some(1_000_000)), (1.2, None), (-0.1, None)] {
            assert_eq!(part(value), expected, "{value}");
        }
        assert_eq!(micros(1.5), Some(1_500_000));
    }

    #[test]
    fn a_sum_with_an_unknown_term_is_unknown() {
        let scrape = parse("a{r=\"0\"} 1\na{r=\"1\"} 2\nb{r=\"0\"} 1\nb{r=\"1\"} NaN\nc -1\n");
        assert_eq!(sum(scrape.named("a")), Some(3.0));
        assert_eq!(mean(scrape.named("a")), Some(1.5));
        for name in ["b", "c", "d"] {
            assert_eq!(sum(scrape.named(name)), None, "{name}");
        }
    }
}
