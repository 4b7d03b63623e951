//! The last minutes of load and the season around them.

use ledger::Timestamp;

use super::Model;
use crate::scale::observe::{HISTORY_BIN_US, Observation};

/// Microseconds of a day.
const DAY_US: i64 = 86_400_000_000;
/// Minutes of a day.
pub(super) const DAY: i64 = DAY_US / HISTORY_BIN_US;
/// Former days that are looked at, at most.
const DAYS_MAX: i64 = 28;
/// Minutes to either side of a time of day that make up its season.
const SEASON_HALF: i64 = 20;
/// Minutes of the level, at most.
const LEVEL_MAX: usize = 120;

/// Minutes around now. Positions count minutes from the start of the history; the first that is not over is `now`.
pub(super) struct Course<'a> {
    history: &'a [f32],
    now: i64,
    horizon: usize,
    lags: usize,
    keep: f64,
    /// Season of the minutes from `first` on, raised to the trust in it; `None` where there is none.
    season: Vec<Option<f64>>,
    first: i64,
    season_days: u32,
}

/// What was expected at some moment.
pub(super) struct Seen {
    /// For that moment's minute.
    pub(super) first: f64,
    /// For the minute a cold start later.
    pub(super) last: f64,
    /// The highest from the one to the other.
    pub(super) peak: f64,
}

impl<'a> Course<'a> {
    pub(super) fn new(
        observation: &Observation<'a>,
        model: &Model,
        now: Timestamp,
        horizon: usize,
        back: usize,
    ) -> Course<'a> {
        let position = position_of(observation, now);
        let smoothing = model.smoothing.clamp(0.005, 1.0);
        let lags = usize::try_from(super::whole(5.0 / smoothing)).unwrap_or(LEVEL_MAX).clamp(1, LEVEL_MAX);
        let first = position - signed(lags + back);
        let count = lags + back + horizon + 1;
        let season = Season::of(observation, first, count);
        let season_days = season.days.last().copied().unwrap_or(0);
        let days = f64::from(season_days);
        let trust = if season_days == 0 { 0.0 } else { days / (days + model.trust_days.max(0.0)) };
        let trusted = season.loads.iter().map(|load| load.filter(|&load| load > 0.0).map(|load| load.powf(trust)));
        Course {
            history: observation.history,
            now: position,
            horizon,
            lags,
            keep: 1.0 - smoothing,
            season: trusted.collect(),
            first,
            season_days,
        }
    }

    /// Former days that the season at the end of the cold start was made of.
    pub(super) fn season_days(&self) -> u32 {
        self.season_days
    }

    /// What was expected at the start of the minute that was `ago` minutes before the one of now; `None` when nothing was known.
    pub(super) fn seen_from(&self, ago: usize) -> Option<Seen> {
        let at = self.now - signed(ago);
        // Minutes with a season and those without are added up apart, since only the former can be moved along it.
        let (mut moved, mut plain, mut weights) = (0.0, 0.0, (0.0, 0.0));
        let mut weight = 1.0;
        for lag in 1..=self.lags {
            let x = at - signed(lag);
            if let Some(load) = known(self.history, x) {
                plain += weight * load;
                weights.0 += weight;
                if let Some(season) = self.season_at(x) {
                    moved += weight * load / season;
                    weights.1 += weight;
                }
            }
            weight *= self.keep;
        }
        if weights.0 <= 0.0 {
            return None;
        }
        let level = plain / weights.0;
        let expected = |ahead: usize| match self.season_at(at + signed(ahead)) {
            Some(season) if weights.1 >= 0.5 * weights.0 => season * moved / weights.1,
            _ => level,
        };
        let peak = (0..=self.horizon).map(expected).fold(0.0, f64::max);
        Some(Seen { first: expected(0), last: expected(self.horizon), peak })
    }

    fn season_at(&self, x: i64) -> Option<f64> {
        let index = usize::try_from(x - self.first).ok()?;
        self.season.get(index).copied().flatten()
    }
}

/// The season of consecutive minutes, and of how many former days it was made.
struct Season {
    loads: Vec<Option<f64>>,
    days: Vec<u32>,
}

impl Season {
    fn of(observation: &Observation, first: i64, count: usize) -> Season {
        let mut sums = vec![0.0; count];
        let mut days = vec![0_u32; count];
        let oldest = first + signed(count) - 1;
        let mut upto = Vec::with_capacity(count + 2 * usize::try_from(SEASON_HALF).unwrap_or(0) + 2);
        for former in 1..=DAYS_MAX.min((oldest + SEASON_HALF).div_euclid(DAY)) {
            let (from, to) = (first - former * DAY, oldest - former * DAY);
            if ![first, oldest].iter().any(|&x| same_type(observation, x, x - former * DAY)) {
                continue;
            }
            running_sums(observation.history, from - SEASON_HALF, to + SEASON_HALF, &mut upto);
            let width = usize::try_from(2 * SEASON_HALF + 1).unwrap_or(1);
            for index in 0..count {
                let (low, high) = (upto[index], upto[index + width]);
                let minutes = high.1 - low.1;
                let x = first + signed(index);
                if minutes * 2 > width && same_type(observation, x, x - former * DAY) {
                    sums[index] += (high.0 - low.0) / minutes as f64;
                    days[index] += 1;
                }
            }
        }
        let loads = sums.iter().zip(&days).map(|(&sum, &days)| (days > 0).then(|| sum / f64::from(days))).collect();
        Season { loads, days }
    }
}

/// Sums and counts of what is known before each position of `from..=to`, and behind its last one.
fn running_sums(history: &[f32], from: i64, to: i64, upto: &mut Vec<(f64, usize)>) {
    upto.clear();
    let (mut sum, mut count) = (0.0, 0);
    upto.push((sum, count));
    for x in from..=to {
        if let Some(load) = known(history, x) {
            sum += load;
            count += 1;
        }
        upto.push((sum, count));
    }
}

/// The load of a minute, where it is known.
pub(super) fn known(history: &[f32], x: i64) -> Option<f64> {
    let load = *history.get(usize::try_from(x).ok()?)?;
    load.is_finite().then(|| f64::from(load).max(0.0))
}

/// The minute that holds `now`, and at most one behind the history's end whose bins are all over.
pub(super) fn position_of(observation: &Observation, now: Timestamp) -> i64 {
    (now.micros() - observation.history_start.micros()).div_euclid(HISTORY_BIN_US)
}

/// Whether two minutes are both of weekdays or both of weekends, in UTC.
fn same_type(observation: &Observation, x: i64, y: i64) -> bool {
    is_weekend(observation, x) == is_weekend(observation, y)
}

/// The first day of 1970 was a Thursday.
fn is_weekend(observation: &Observation, x: i64) -> bool {
    let day = (observation.history_start.micros() + x * HISTORY_BIN_US).div_euclid(DAY_US);
    (day + 3).rem_euclid(7) >= 5
}

pub(super) fn signed(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}
