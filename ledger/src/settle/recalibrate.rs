//! New constants for an engine from what it was seen to do.

use super::Known;
use super::gather::{gather, latest_engines};
use super::minutes::interval_of;
use crate::allocate::calibrate::calibrate;
use crate::allocate::fit::FitError;
use crate::allocate::pool::Known as Times;
use crate::allocate::replica::Replica;
use crate::allocate::timeline::EngineTimeline;
use crate::step::Efficiencies;
use crate::telemetry::{EngineFact, EngineReading, EngineSetup};
use crate::time::{Period, Timestamp};

/// Fewest requests that new constants are made from.
pub const REQUESTS_MIN: usize = 50;
/// How much smaller than the present constants' the error of new ones must be.
const BETTER: f64 = 0.9;
/// By what part at least one constant must change.
const DIFFERENT: f64 = 0.03;

/// The same engine with new constants from the minute after `now` on. `None` unless they predict requests that they were
/// not fitted to better than those in force predict them, and differ enough to matter. What ran before keeps the constants
/// that it was settled with, so that settling it again gives the same amounts.
///
/// `timelines` are of the last hours, in the order in which they were scheduled, as [`timelines_of`] gives them.
#[must_use]
pub fn recalibrated(
    engine: &EngineFact,
    timelines: &[EngineTimeline],
    readings: &[EngineReading],
    now: Timestamp,
) -> Option<EngineFact> {
    let constants = engine.setup.constants?;
    // A fit counts a step a token, and an engine that speculates makes fewer.
    if engine.setup.speculation.is_some() || timelines.len() < REQUESTS_MIN {
        return None;
    }
    let mut series: Vec<_> = readings
        .iter()
        .filter(|reading| reading.engine == engine.engine)
        .filter_map(|reading| Some((reading.at, super::sample(reading, reading.at)?)))
        .collect();
    series.sort_by_key(|(at, _)| *at);
    let found = calibrate(&constants, engine.setup.limits, timelines, &series);
    let (fit, error, in_force) = (found.fit?, found.held_out?, found.in_force?);
    if fit.observations < REQUESTS_MIN || score(&error) >= BETTER * score(&in_force) {
        return None;
    }
    let new = rounded(&constants.fitted(&fit));
    if !differ(&constants, &new) {
        return None;
    }
    let start = interval_of(now).end;
    Some(EngineFact {
        setup: EngineSetup { constants: Some(new), error: Some(rounded_error(error)), ..engine.setup },
        period: Period { start, end: engine.period.end.max(start) },
        observed_at: now,
        ..engine.clone()
    })
}

/// The timelines of the requests that `engine` served within `within`, in the order in which they were scheduled; those of
/// which only tokens are known, or which did not decode, are left out.
#[must_use]
pub fn timelines_of(known: &Known<'_>, engine: &EngineFact, within: Period) -> Vec<EngineTimeline> {
    let engines: Vec<EngineFact> = latest_engines(known.engines).into_iter().cloned().collect();
    let pools = gather(&Known { engines: &engines, posted: &[], ..*known }, within);
    let served = pools.get(&engine.pool).map(|pool| pool.served.as_slice()).unwrap_or_default();
    let own = served.iter().filter(|one| one.engine == engine.engine && one.known == Times::Timeline);
    let mut timelines: Vec<EngineTimeline> = own
        .map(|one| one.timeline)
        .filter(|timeline| within.contains(timeline.scheduled) && timeline.last_token <= within.end)
        .collect();
    timelines.sort_by_key(|timeline| (timeline.scheduled, timeline.last_token, timeline.output_tokens));
    timelines
}

/// One number for an error: the middle and the tail.
fn score(error: &FitError) -> f64 {
    error.median + error.p95
}

fn differ(before: &Replica, after: &Replica) -> bool {
    let constants = |replica: &Replica| {
        let Efficiencies { compute, bandwidth, overhead_s } = replica.efficiencies;
        [compute, bandwidth, overhead_s, replica.overlap]
    };
    let pairs = constants(before).into_iter().zip(constants(after));
    pairs.into_iter().any(|(before, after)| (after - before).abs() > DIFFERENT * before.abs())
}

/// Constants that JSON reads back as they were written.
fn rounded(replica: &Replica) -> Replica {
    let Efficiencies { compute, bandwidth, overhead_s } = replica.efficiencies;
    let efficiencies = Efficiencies {
        compute: nine_digits(compute),
        bandwidth: nine_digits(bandwidth),
        overhead_s: nine_digits(overhead_s),
    };
    Replica { efficiencies, overlap: nine_digits(replica.overlap), ..*replica }
}

fn rounded_error(error: FitError) -> FitError {
    FitError { median: nine_digits(error.median), p95: nine_digits(error.p95), bias: nine_digits(error.bias) }
}

/// Nine significant digits.
fn nine_digits(value: f64) -> f64 {
    format!("{value:.8e}").parse().unwrap_or(value)
}

#[cfg(test)]
#[path = "recalibrate_tests.rs"]
mod tests;
