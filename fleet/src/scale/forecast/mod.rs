//! What load to expect over the next cold start, from the minutes before `now` alone.
//!
//! Three things are known about load: where it is (a smoothed level), where it usually goes at this time of such a day (the
//! season of former weekdays or weekends), and how far it strays from that at this time of day (the spread). Within the few
//! minutes that a replica needs to start, more is not in the data: what is left is noise from minute to minute.
//!
//! ```text
//! season(t)  mean load of former days of t's type (weekday, weekend) within 20 minutes of t's time of day
//! trust      n / (n + trust_days)                      n: former days that season(t) was made of
//! level(t)   sum of w_i load(t-i) (season(t) / season(t-i))^trust over sum of w_i     w_i = (1 - smoothing)^i, i = 1, 2, …
//! spread     standard deviation of load(x) / plain level before(x) - 1, within two hours of this time of day on each of the last
//!            7 days and over the last 12 hours, each window about its own mean, together with 400 minutes of 0.08
//! ```
//! Without former days of a type the season says nothing and `level` is plain persistence, which is the reactive case.

mod course;
pub(crate) mod hold;
mod spread;

use ledger::Timestamp;

use super::observe::{HISTORY_BIN_US, Observation};
use course::Course;

/// Newest part of the looks that is averaged into what comes right now, seconds.
const FRESH_S: i64 = 120;

/// How load is predicted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Model {
    /// Weight of the newest minute in the level, 0 to 1.
    pub smoothing: f64,
    /// Former days at which the season is believed half.
    pub trust_days: f64,
}

impl Default for Model {
    fn default() -> Model {
        Model { smoothing: 0.07, trust_days: 1.0 }
    }
}

/// What is expected.
#[derive(Debug, Clone, PartialEq)]
pub struct Outlook {
    /// Highest load expected from now until a replica that is asked for now would serve, replicas.
    pub peak: f64,
    /// The same as it was seen a minute ago, two minutes ago, and so on.
    pub peaks_before: Vec<f64>,
    /// Load expected when a replica that is asked for now would serve, replicas.
    pub at_cold_start: f64,
    /// Load now, smoothed, replicas.
    pub level: f64,
    /// Load of the last two minutes, replicas.
    pub fresh: Option<f64>,
    /// How far a minute strays from what was expected, relative.
    pub spread: f64,
    /// Former days of this type that the season was made of; 0 when this is persistence only.
    pub season_days: u32,
}

impl Outlook {
    /// What is expected, seen from now and from each of the last `back` minutes. `None` when no load is known at all: nothing is
    /// expected then, which is not the same as a load of zero.
    #[must_use]
    pub fn of(observation: &Observation, model: &Model, now: Timestamp, back: usize) -> Option<Outlook> {
        let fresh = fresh(observation, now);
        let horizon = minutes_ahead(observation.bounds.cold_start_s);
        let course = Course::new(observation, model, now, horizon, back);
        let Some(seen) = course.seen_from(0) else { return Outlook::of_looks(observation) };
        let before = (1..=back).map_while(|ago| course.seen_from(ago).map(|seen| seen.peak)).collect();
        Some(Outlook {
            peak: seen.peak,
            peaks_before: before,
            at_cold_start: seen.last,
            level: seen.first,
            fresh,
            spread: spread::of(observation, now, model.smoothing, horizon),
            season_days: course.season_days(),
        })
    }

    /// What the looks of the last hour say, where there is no whole minute of history yet.
    fn of_looks(observation: &Observation) -> Option<Outlook> {
        let known = || observation.samples.iter().filter_map(|sample| sample.load).filter(|load| load.is_finite());
        let level = mean(known())?;
        Some(Outlook {
            peak: level,
            peaks_before: Vec::new(),
            at_cold_start: level,
            level,
            fresh: Some(level),
            spread: spread::USUAL,
            season_days: 0,
        })
    }
}

/// Minutes until a replica asked for now serves, at least one and at most an hour.
fn minutes_ahead(cold_start_s: f64) -> usize {
    let bin_s = HISTORY_BIN_US as f64 / 1e6;
    usize::try_from(whole(cold_start_s / bin_s)).unwrap_or(60).clamp(1, 60)
}

fn fresh(observation: &Observation, now: Timestamp) -> Option<f64> {
    let since = now.plus_micros(-FRESH_S * 1_000_000);
    mean(observation.samples.iter().rev().take_while(|sample| sample.at > since).filter_map(|sample| sample.load))
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0_u32), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / f64::from(count))
}

/// Smallest whole number of replicas that is at least `load`; 0 for what is not a number.
#[must_use]
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float saturates at the integer's ends, and NaN becomes zero"
)]
pub fn whole(load: f64) -> u32 {
    (load - 1e-9).ceil() as u32
}

#[cfg(test)]
pub(crate) mod tests;
