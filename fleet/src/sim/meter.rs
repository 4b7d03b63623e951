//! How many replicas there were and what they cost: replica-time by minute, as exact sums of microseconds.

use super::demand::MINUTE_US;
use super::startup::micros;

/// Replicas by what they do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub ready: u32,
    pub pending: u32,
    pub draining: u32,
    /// Those that are paid for because they run; the committed ones come on top of what is missing to them.
    pub paid: u32,
    /// Of those, the ones on spot nodes.
    pub spot: u32,
}

/// One minute's replica-time, microseconds.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct MinuteSums {
    pub ready_us: u64,
    pub pending_us: u64,
    pub draining_us: u64,
    pub paid_us: u64,
}

/// The meter of one pool.
#[derive(Debug)]
pub(crate) struct Meter {
    counts: Counts,
    since_us: u64,
    end_us: u64,
    judge_from_us: u64,
    pub committed: u32,
    pub minutes: Vec<MinuteSums>,
    /// Within the judged time: all that ran, what of it ran on spot nodes, and what ran elsewhere beyond the commitment.
    pub paid_us: u64,
    pub spot_us: u64,
    pub beyond_us: u64,
    pub judged_us: u64,
    pub ready_min: u32,
    pub provisioned_max: u32,
}

impl Meter {
    pub fn new(end_us: u64, judge_from_s: f64, committed: u32) -> Meter {
        let minutes = usize::try_from(end_us.div_ceil(MINUTE_US)).unwrap_or(usize::MAX);
        let judge_from_us = micros(judge_from_s).min(end_us);
        Meter {
            counts: Counts::default(),
            since_us: 0,
            end_us,
            judge_from_us,
            committed,
            minutes: vec![MinuteSums::default(); minutes],
            paid_us: 0,
            spot_us: 0,
            beyond_us: 0,
            judged_us: end_us - judge_from_us,
            ready_min: u32::MAX,
            provisioned_max: 0,
        }
    }

    /// From `now_us` on there are so many. Time never goes back.
    pub fn set(&mut self, now_us: u64, counts: Counts) {
        self.upto(now_us);
        self.counts = counts;
    }

    /// Counts what is there until `now_us`.
    pub fn upto(&mut self, now_us: u64) {
        let to_us = now_us.min(self.end_us);
        if to_us <= self.since_us {
            return;
        }
        let from_us = self.since_us;
        self.since_us = to_us;
        self.judge(from_us.max(self.judge_from_us), to_us);
        let counts = self.counts;
        let mut at_us = from_us;
        while at_us < to_us {
            let minute = at_us / MINUTE_US;
            let until_us = ((minute + 1) * MINUTE_US).min(to_us);
            let sums = &mut self.minutes[usize::try_from(minute).unwrap_or(usize::MAX)];
            let span_us = until_us - at_us;
            sums.ready_us += u64::from(counts.ready) * span_us;
            sums.pending_us += u64::from(counts.pending) * span_us;
            sums.draining_us += u64::from(counts.draining) * span_us;
            sums.paid_us += u64::from(counts.paid) * span_us;
            at_us = until_us;
        }
    }

    fn judge(&mut self, from_us: u64, to_us: u64) {
        if from_us >= to_us {
            return;
        }
        let counts = self.counts;
        self.paid_us += u64::from(counts.paid) * (to_us - from_us);
        self.spot_us += u64::from(counts.spot) * (to_us - from_us);
        let beyond = (counts.paid - counts.spot).saturating_sub(self.committed);
        self.beyond_us += u64::from(beyond) * (to_us - from_us);
        self.ready_min = self.ready_min.min(counts.ready);
        self.provisioned_max = self.provisioned_max.max(counts.ready + counts.pending);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replica_time_is_cut_at_minutes_and_judged_from_where_it_is_asked_to() {
        let mut meter = Meter::new(3 * MINUTE_US, 90.0, 2);
        let counts = |ready| Counts { ready, paid: ready, ..Counts::default() };
        meter.set(0, counts(3));
        meter.set(30_000_000, counts(1));
        meter.set(150_000_000, counts(4));
        meter.upto(999_000_000);
        let ready: Vec<u64> = meter.minutes.iter().map(|sums| sums.ready_us / 1_000_000).collect();
        assert_eq!(ready, [120, 60, 150]);
        assert_eq!((meter.paid_us, meter.beyond_us), (180_000_000, 60_000_000));
        assert_eq!((meter.judged_us, meter.ready_min, meter.provisioned_max), (90_000_000, 1, 4));
    }
}
