//! What a run came to: throughput and the times that clients see.

use serde::{Deserialize, Serialize};

use super::cost::count;
use crate::sim::Done;

/// A mean and percentiles, interpolated between neighbours.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
}

impl Stats {
    /// Sorts `values`. All zero when there are none.
    #[must_use]
    pub fn of(values: &mut [f64]) -> Stats {
        values.sort_by(f64::total_cmp);
        let mean = values.iter().sum::<f64>() / count(values.len().max(1) as u64);
        let [p50, p90, p99] = [0.5, 0.9, 0.99].map(|part| percentile(values, part));
        Stats { mean, p50, p90, p99 }
    }
}

/// The value below which `part` (0 to 1) of `sorted` lies, interpolated; zero when there are none.
#[must_use]
pub fn percentile(sorted: &[f64], part: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let at = part.clamp(0.0, 1.0) * count(last as u64);
    let below = usize::try_from(super::cost::whole(at)).unwrap_or(last).min(last);
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * at.fract()
}

/// What a run came to. Times are milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Requests that ended.
    pub requests: u64,
    /// Seconds from the first arrival to the last token.
    pub duration_s: f64,
    /// Requests ended in a second.
    pub requests_per_s: f64,
    /// Output tokens a second.
    pub tps_output: f64,
    /// From arrival to the first token.
    pub ttft_ms: Stats,
    /// Between two tokens, a request's mean; requests of one token have none.
    pub tpot_ms: Stats,
    /// From arrival to the last token.
    pub e2e_ms: Stats,
}

impl Summary {
    /// Counts `done` from time 0, when the load began.
    #[must_use]
    pub fn of(done: &[Done]) -> Summary {
        let ms = |from_us: u64, to_us: u64| count(to_us.saturating_sub(from_us)) / 1e3;
        let mut ttft: Vec<f64> = done.iter().map(|one| ms(one.arrival.at_us, one.first_token_us)).collect();
        let mut e2e: Vec<f64> = done.iter().map(|one| ms(one.arrival.at_us, one.last_token_us)).collect();
        let mut tpot: Vec<f64> = done
            .iter()
            .filter(|one| one.arrival.output_tokens > 1)
            .map(|one| ms(one.first_token_us, one.last_token_us) / f64::from(one.arrival.output_tokens - 1))
            .collect();
        let end_us = done.iter().map(|one| one.last_token_us).max().unwrap_or(0);
        let duration_s = count(end_us) / 1e6;
        let tokens: u64 = done.iter().map(|one| u64::from(one.arrival.output_tokens)).sum();
        let requests = done.len() as u64;
        let per_s = |what: u64| if duration_s > 0.0 { count(what) / duration_s } else { 0.0 };
        Summary {
            requests,
            duration_s,
            requests_per_s: per_s(requests),
            tps_output: per_s(tokens),
            ttft_ms: Stats::of(&mut ttft),
            tpot_ms: Stats::of(&mut tpot),
            e2e_ms: Stats::of(&mut e2e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::Arrival;

    #[test]
    fn percentiles_lie_between_their_neighbours() {
        let mut values = vec![4.0, 1.0, 3.0, 2.0];
        let stats = Stats::of(&mut values);
        assert_eq!((stats.mean, stats.p50), (2.5, 2.5));
        assert!((stats.p90 - 3.7).abs() < 1e-12);
        assert_eq!(Stats::of(&mut []), Stats::default());
    }

    #[test]
    fn a_run_of_two() {
        let done = |at_us, first_token_us, last_token_us, output_tokens| Done {
            arrival: Arrival { at_us, output_tokens, ..Arrival::default() },
            first_token_us,
            last_token_us,
            ..Done::default()
        };
        let summary = Summary::of(&[done(0, 50_000, 150_000, 11), done(1_000_000, 1_100_000, 2_000_000, 1)]);
        assert_eq!((summary.requests, summary.duration_s, summary.tps_output), (2, 2.0, 6.0));
        assert_eq!(summary.tpot_ms.mean, 10.0);
        assert_eq!((summary.ttft_ms.mean, summary.e2e_ms.mean), (75.0, 575.0));
    }
}
