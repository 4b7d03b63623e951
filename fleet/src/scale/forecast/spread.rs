//! How far a minute strays from the level before it, at this time of day.

use ledger::Timestamp;

use super::course::{DAY, known, position_of};
use crate::scale::observe::Observation;

/// What is assumed where nothing is known.
pub(super) const USUAL: f64 = 0.08;
/// Minutes that the assumption counts for.
const USUAL_MINUTES: f64 = 400.0;
/// Former days that are looked at.
const DAYS: i64 = 7;
/// Minutes to either side of the time of day.
const HALF: i64 = 120;
/// Minutes up to now.
const RECENT: i64 = 720;
/// A single minute counts for at most so much.
const STRAY_MAX: f64 = 0.6;
/// Loads below this are too small to stray from in proportion.
const LEVEL_MIN: f64 = 0.2;

/// The standard deviation of `load(x) / level(x - horizon) - 1`.
pub(super) fn of(observation: &Observation, now: Timestamp, smoothing: f64, horizon: usize) -> f64 {
    let position = position_of(observation, now);
    let horizon = i64::try_from(horizon).unwrap_or(0);
    let target = position + horizon;
    let mut levels = Vec::new();
    let (mut squares, mut minutes) = (USUAL * USUAL * USUAL_MINUTES, USUAL_MINUTES);
    let former =
        (1..=DAYS).map(|day| target - day * DAY).take_while(|&x| x + HALF > horizon).map(|x| (x - HALF, x + HALF + 1));
    for (from, to) in former.chain([(position - RECENT, position)]) {
        let (sum, square, count) =
            strays(observation.history, (from, to.min(position)), smoothing, horizon, &mut levels);
        if count > 10.0 {
            squares += (square - sum * sum / count).max(0.0);
            minutes += count;
        }
    }
    (squares / minutes).sqrt()
}

/// Sum, sum of squares and number of the strays of a window.
fn strays(
    history: &[f32],
    (from, to): (i64, i64),
    smoothing: f64,
    horizon: i64,
    levels: &mut Vec<f64>,
) -> (f64, f64, f64) {
    let settle = i64::from(super::whole(3.0 / smoothing.max(0.02)));
    let from = from.max(horizon + 1);
    let begin = (from - horizon - settle).max(0);
    let (mut sum, mut square, mut count) = (0.0, 0.0, 0.0);
    let mut level = None;
    levels.clear();
    for x in begin..to {
        // The level before this minute; its position in `levels` is x - begin.
        levels.push(level.unwrap_or(f64::NAN));
        let Some(load) = known(history, x) else { continue };
        if x >= from {
            let before = usize::try_from(x - horizon - begin).ok().and_then(|index| levels.get(index)).copied();
            let stray = load / before.unwrap_or(f64::NAN).max(LEVEL_MIN) - 1.0;
            if before.is_some_and(f64::is_finite) {
                let stray = stray.clamp(-STRAY_MAX, STRAY_MAX);
                sum += stray;
                square += stray * stray;
                count += 1.0;
            }
        }
        level = Some(level.map_or(load, |level: f64| level + smoothing * (load - level)));
    }
    (sum, square, count)
}
