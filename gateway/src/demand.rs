//! What came and what became of it, counted as requests end, so that whoever scales a deployment can look at any stretch
//! of time by taking one look from another.

use std::sync::atomic::{AtomicU64, Ordering};

use ledger::{Attempt, Outcome, UsageQuality};

/// Steps of equal width in each doubling of a time: a percentile is known to an eighth.
const STEPS: u64 = 8;
/// Times below this, microseconds, are in steps of equal width.
const LINEAR_BELOW_US: u64 = 1 << LINEAR_BITS;
const LINEAR_BITS: u32 = 10;
/// Doublings above that: up to 71 minutes. What takes longer is in the last step.
const DOUBLINGS: u64 = 22;
const CELLS: usize = 8 + 22 * 8;

/// What a deployment or an upstream was asked for since the gateway was made, or between two looks. All counts only grow, `held`
/// and `in_flight` apart.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Demand {
    /// Of a deployment: requests that wanted it, counted once and at once, whether they were held or another served them in the
    /// end. Of an upstream: attempts that were sent to it.
    pub arrived: u64,
    /// Attempts that were answered to their end.
    pub finished: u64,
    /// Attempts whose client went away first.
    pub aborted: u64,
    /// Attempts that ended in any other way.
    pub failed: u64,
    /// Attempts whose tokens are in the sums below, however they ended: what a usual one has is to be divided by these. One that
    /// failed without any token is none of them, and neither is one of which nobody knows.
    pub counted: u64,
    /// Input tokens of attempts that ended, those read from a cache left out.
    pub input_tokens: u64,
    /// Input tokens that were read from a cache.
    pub cached_input_tokens: u64,
    /// Output tokens of attempts that ended.
    pub output_tokens: u64,
    /// From the arrival of a request, however long it was held, to the first token of its streamed answer.
    pub ttft: Distribution,
    /// From token to token, the mean of each streamed answer of at least two.
    pub tpot: Distribution,
    /// Requests that wait for it now. Zero for an upstream.
    pub held: u32,
    /// Attempts that have not ended now.
    pub in_flight: u32,
}

impl Demand {
    /// What came after an `earlier` look; `held` and `in_flight` as they are in this one.
    #[must_use]
    pub fn since(&self, earlier: &Demand) -> Demand {
        Demand {
            arrived: self.arrived.saturating_sub(earlier.arrived),
            finished: self.finished.saturating_sub(earlier.finished),
            aborted: self.aborted.saturating_sub(earlier.aborted),
            failed: self.failed.saturating_sub(earlier.failed),
            counted: self.counted.saturating_sub(earlier.counted),
            input_tokens: self.input_tokens.saturating_sub(earlier.input_tokens),
            cached_input_tokens: self.cached_input_tokens.saturating_sub(earlier.cached_input_tokens),
            output_tokens: self.output_tokens.saturating_sub(earlier.output_tokens),
            ttft: self.ttft.since(&earlier.ttft),
            tpot: self.tpot.since(&earlier.tpot),
            held: self.held,
            in_flight: self.in_flight,
        }
    }
}

/// How often times of each length occurred, to an eighth of their length.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Distribution {
    /// Empty, or one count for each step.
    counts: Vec<u64>,
    total_us: u64,
}

impl Distribution {
    /// How many times were measured.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Their mean, seconds. `None` when nothing was measured.
    #[must_use]
    pub fn mean_s(&self) -> Option<f64> {
        let count = self.count();
        (count > 0).then(|| seconds(self.total_us) / precise(count))
    }

    /// The time, seconds, that `part` (0 to 1) of all measured ones do not exceed, to an eighth of it. `None` when nothing was
    /// measured.
    #[must_use]
    pub fn percentile_s(&self, part: f64) -> Option<f64> {
        let count = self.count();
        let wanted = part.clamp(0.0, 1.0) * precise(count);
        let mut below = 0.0;
        for (cell, &here) in self.counts.iter().enumerate() {
            let here = precise(here);
            if here > 0.0 && below + here >= wanted {
                let (start, end) = (seconds(start_us(cell)), seconds(start_us(cell + 1)));
                // Within a step times are taken as evenly spread.
                return Some(start + (end - start) * ((wanted - below) / here));
            }
            below += here;
        }
        None
    }

    fn since(&self, earlier: &Distribution) -> Distribution {
        let before = earlier.counts.iter().copied().chain(std::iter::repeat(0));
        let counts = self.counts.iter().zip(before).map(|(now, before)| now.saturating_sub(before)).collect();
        Distribution { counts, total_us: self.total_us.saturating_sub(earlier.total_us) }
    }
}

/// The running counts behind a [`Demand`].
#[derive(Debug, Default)]
pub(crate) struct Tally {
    finished: AtomicU64,
    aborted: AtomicU64,
    failed: AtomicU64,
    counted: AtomicU64,
    input_tokens: AtomicU64,
    cached_input_tokens: AtomicU64,
    output_tokens: AtomicU64,
    ttft: Histogram,
    tpot: Histogram,
}

impl Tally {
    /// The first token of a streamed answer came. Counted then, not at its end: a long answer must not hide a long wait.
    pub fn first_token(&self, after_us: u64) {
        self.ttft.add(after_us);
    }

    /// Counts an attempt that ended.
    pub fn add(&self, attempt: &Attempt) {
        let ended = match attempt.outcome {
            Outcome::Completed => &self.finished,
            Outcome::ClientAborted => &self.aborted,
            _ => &self.failed,
        };
        up(ended, 1);
        let usage = &attempt.usage;
        let cached = usage.cache_read.saturating_add(usage.cache_read_audio);
        up(&self.cached_input_tokens, cached);
        up(&self.input_tokens, usage.input_tokens().saturating_sub(cached));
        let output = usage.output_tokens();
        up(&self.output_tokens, output);
        let has_tokens = match attempt.outcome {
            Outcome::Completed | Outcome::ClientAborted => true,
            // One that no upstream took is of no length: its next attempt is.
            _ => usage.input_tokens() > 0 || output > 0,
        };
        up(&self.counted, u64::from(has_tokens && attempt.usage_quality != UsageQuality::Missing));
        let times = &attempt.timeline;
        let (true, Some(first_us), Some(last_us)) = (attempt.route.streamed, times.first_token_us, times.last_token_us)
        else {
            return;
        };
        if output >= 2 && attempt.outcome == Outcome::Completed {
            self.tpot.add(last_us.saturating_sub(first_us) / (output - 1));
        }
    }

    /// The counts now; what only the holder of the tally knows is zero.
    pub fn read(&self) -> Demand {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Demand {
            finished: get(&self.finished),
            aborted: get(&self.aborted),
            failed: get(&self.failed),
            counted: get(&self.counted),
            input_tokens: get(&self.input_tokens),
            cached_input_tokens: get(&self.cached_input_tokens),
            output_tokens: get(&self.output_tokens),
            ttft: self.ttft.read(),
            tpot: self.tpot.read(),
            ..Demand::default()
        }
    }
}

fn up(count: &AtomicU64, by: u64) {
    if by > 0 {
        count.fetch_add(by, Ordering::Relaxed);
    }
}

/// Counts of times by length.
#[derive(Debug)]
struct Histogram {
    cells: [AtomicU64; CELLS],
    total_us: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram { cells: std::array::from_fn(|_| AtomicU64::new(0)), total_us: AtomicU64::new(0) }
    }
}

impl Histogram {
    fn add(&self, us: u64) {
        up(&self.cells[cell(us)], 1);
        up(&self.total_us, us);
    }

    fn read(&self) -> Distribution {
        let counts = self.cells.iter().map(|cell| cell.load(Ordering::Relaxed)).collect();
        Distribution { counts, total_us: self.total_us.load(Ordering::Relaxed) }
    }
}

/// The step that a time falls into.
fn cell(us: u64) -> usize {
    let step = if us < LINEAR_BELOW_US {
        us / (LINEAR_BELOW_US / STEPS)
    } else {
        let doubling = u64::from(us.ilog2() - LINEAR_BITS);
        let within = (us >> (us.ilog2() - STEPS.ilog2())) % STEPS;
        STEPS + doubling * STEPS + within
    };
    usize::try_from(step).unwrap_or(CELLS).min(CELLS - 1)
}

/// The shortest time of a step, microseconds.
fn start_us(cell: usize) -> u64 {
    let cell = u64::try_from(cell).unwrap_or(u64::MAX).min(STEPS + DOUBLINGS * STEPS);
    let Some(above) = cell.checked_sub(STEPS) else { return cell * (LINEAR_BELOW_US / STEPS) };
    let doubled = LINEAR_BELOW_US << (above / STEPS);
    doubled + doubled / STEPS * (above % STEPS)
}

fn seconds(us: u64) -> f64 {
    precise(us) / 1e6
}

/// Counts and microseconds stay below 2^53 for centuries.
#[expect(clippy::cast_precision_loss, reason = "what is counted here stays below 2^53")]
const fn precise(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use ledger::{
        AttemptId, Charge, Context, RequestId, Route, Source, Timeline, Timestamp, TokenUsage, UnpricedReason,
    };
    use proptest::prelude::*;

    use super::*;

    fn streamed(first_us: u64, last_us: u64, output: u64, outcome: Outcome) -> Attempt {
        Attempt {
            id: AttemptId { request: RequestId::new(Timestamp::from_micros(0), [1; 10]), number: 0 },
            source: Source::Gateway,
            context: Context::default(),
            route: Route { streamed: true, ..Route::default() },
            timeline: Timeline { first_token_us: Some(first_us), last_token_us: Some(last_us), ..Timeline::default() },
            outcome,
            status: Some(200),
            usage: TokenUsage { input: 100, cache_read: 20, output, ..TokenUsage::default() },
            usage_quality: UsageQuality::Reported,
            charge: Charge::Unpriced { reason: UnpricedReason::NoUsage },
        }
    }

    #[test]
    fn a_look_less_an_earlier_one_is_what_came_between_them() {
        let tally = Tally::default();
        for _ in 0..100 {
            tally.first_token(50_000);
            tally.add(&streamed(50_000, 150_000, 11, Outcome::Completed));
        }
        let before = tally.read();
        for _ in 0..10 {
            tally.first_token(3_000_000);
            tally.add(&streamed(3_000_000, 5_000_000, 21, Outcome::Completed));
        }
        tally.add(&streamed(1, 2, 1, Outcome::UpstreamCut));
        tally.add(&streamed(1, 2, 0, Outcome::ClientAborted));
        let between = tally.read().since(&before);
        assert_eq!((between.finished, between.failed, between.aborted, between.counted), (10, 1, 1, 12));
        assert_eq!((between.input_tokens, between.cached_input_tokens, between.output_tokens), (1_200, 240, 211));
        assert_eq!((between.ttft.count(), between.tpot.count()), (10, 10), "one token has no time between tokens");
        let tail = between.ttft.percentile_s(0.9).unwrap();
        assert!((2.7..3.4).contains(&tail), "{tail}");
        let mean = between.tpot.mean_s().unwrap();
        assert!((mean - 0.1).abs() < 1e-9, "{mean}");
        assert_eq!(Distribution::default().percentile_s(0.5), None);
        assert_eq!(Distribution::default().mean_s(), None);
    }

    #[test]
    fn attempts_are_counted_with_their_tokens_or_not_at_all() {
        let tally = Tally::default();
        let ended = |outcome, usage_quality, usage| Attempt { usage_quality, usage, ..streamed(1, 2, 0, outcome) };
        let ten = TokenUsage { input: 10, output: 1, ..TokenUsage::default() };
        tally.add(&ended(Outcome::ClientAborted, UsageQuality::Estimated, ten));
        tally.add(&ended(Outcome::UpstreamCut, UsageQuality::Estimated, ten));
        tally.add(&ended(Outcome::Completed, UsageQuality::Reported, ten));
        assert_eq!((tally.read().counted, tally.read().input_tokens), (3, 30));
        // Refused before anything was sent; an error that says nothing of tokens; an answer of which nobody knows.
        tally.add(&ended(Outcome::UpstreamUnreachable, UsageQuality::Estimated, TokenUsage::default()));
        tally.add(&ended(Outcome::UpstreamError, UsageQuality::Missing, TokenUsage::default()));
        tally.add(&ended(Outcome::Completed, UsageQuality::Missing, TokenUsage::default()));
        assert_eq!((tally.read().counted, tally.read().finished, tally.read().failed), (3, 2, 3));
    }

    #[test]
    fn steps_follow_each_other_without_a_gap() {
        for step in 0..CELLS {
            assert_eq!(cell(start_us(step)), step);
            assert!(start_us(step + 1) > start_us(step));
            assert_eq!(cell(start_us(step + 1) - 1), step);
        }
        assert_eq!(cell(u64::MAX), CELLS - 1);
    }

    proptest! {
        #[test]
        fn a_percentile_is_known_to_an_eighth(mut times in prop::collection::vec(1u64..4_000_000_000, 1..200), part in 0.01f64..1.0) {
            let histogram = Histogram::default();
            times.iter().for_each(|&us| histogram.add(us));
            times.sort_unstable();
            let found = histogram.read().percentile_s(part).unwrap();
            let exact = times.iter().enumerate().find(|(index, _)| precise(*index as u64 + 1) >= part * precise(times.len() as u64));
            let exact = seconds(*exact.unwrap().1);
            prop_assert!(found <= exact * 1.126 + 130e-6 && found >= exact * 0.874 - 130e-6, "{found} {exact}");
        }
    }
}
