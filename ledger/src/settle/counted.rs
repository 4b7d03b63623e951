//! What an engine counted beyond what was metered: the traffic that bypassed the gateway.
//!
//! Counters and metered requests are compared over the engine's whole known life and not minute by minute, because nobody
//! knows in which minute an engine counted the tokens of a request that crosses one: some count a prompt when its prefill
//! ends, some when the request does. Known is only that a request counts after it was sent and before it has ended. From
//! that follows the least that must have bypassed the gateway between two readings `s` and `t`:
//!
//! ```text
//! growth(s, t) - (tokens of all requests that were sent by t and had not ended by s)
//! ```
//!
//! and the traffic up to `t` is the largest sum of such stretches. It never takes a request's tokens for somebody else's
//! whatever the edges, and it is exact between any two readings at which no metered request ran: what could not be told
//! apart under load is booked as soon as the engine was quiet once.
//!
//! Some engines (vLLM) count the prompt of a request for several answers (`n = 2`) once for each, and its usage says it once.
//! So prompts bypass only where generated tokens do: those of a request that nobody metered never come without.

use std::collections::BTreeMap;

use crate::allocate::counters::Counted;
use crate::telemetry::EngineReading;
use crate::time::{Period, Timestamp};

/// How far a reading's moment may lie from what it shows.
pub(super) const SLACK_US: i64 = 1_000_000;

/// The most that one request can have added to its engine's counters, and when.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Metered {
    /// When it was sent.
    pub(super) sent: Timestamp,
    /// When it ended. `None`: it still runs.
    pub(super) ended: Option<Timestamp>,
    /// Prompt tokens, cached ones included; cached tokens; tokens generated. Unknown: it may be anything, so that nothing
    /// is concluded from what was counted beside it.
    pub(super) tokens: Option<[f64; COUNTERS]>,
}

const COUNTERS: usize = 3;
/// Their places.
const PROMPTS: usize = 0;
const GENERATED: usize = 2;

/// What bypassed the gateway on one engine, over time.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Unobserved {
    /// By counter: the readings that had it, and what had bypassed the gateway by then since the first.
    upto: [Vec<(Timestamp, f64)>; COUNTERS],
}

impl Unobserved {
    /// From all readings of an engine, in any order, and all that was metered of it since before the first.
    pub(super) fn of(readings: &[&EngineReading], metered: &[Metered]) -> Unobserved {
        // Two readings of one moment are one, and order is time's.
        let by_time: BTreeMap<Timestamp, &EngineReading> =
            readings.iter().map(|reading| (reading.at, *reading)).collect();
        let counters: [fn(&EngineReading) -> Option<u64>; COUNTERS] =
            [|reading| reading.prompt_tokens, |reading| reading.cached_tokens, |reading| reading.generation_tokens];
        let bounds = Bounds::of(metered);
        let mut upto = [const { Vec::new() }; COUNTERS];
        let mut answers = false;
        for (place, counter) in counters.into_iter().enumerate() {
            let points: Vec<(Timestamp, f64)> =
                by_time.values().filter_map(|reading| Some((reading.at, counter(reading)? as f64))).collect();
            // An engine of embeddings counts no answers; one that has made any gives each prompt one.
            answers |= place == GENERATED && points.iter().any(|(_, shown)| *shown > 0.0);
            upto[place] = bounds.least(&points, place);
        }
        if answers {
            upto[PROMPTS] = answered(&upto[PROMPTS], &upto[GENERATED]);
        }
        Unobserved { upto }
    }

    /// What bypassed the gateway within `period`, between two readings in even flow. `None` where no two readings reach
    /// into it: unknown is not zero.
    pub(super) fn within(&self, period: Period) -> Option<Counted> {
        let [prompt, cached, generated] = [0, 1, 2].map(|place| {
            let upto = &self.upto[place];
            let known = Period { start: upto.first()?.0, end: upto.last()?.0 };
            let both = known.intersect(period)?;
            Some(at(upto, both.end) - at(upto, both.start))
        });
        if prompt.is_none() && generated.is_none() {
            return None;
        }
        // Few engines say of a single request how much of it they found in their cache, so that the cached tokens are
        // believed only as a part of the prompts that bypassed.
        let prompt = prompt.unwrap_or(0.0);
        let cached = cached.unwrap_or(0.0).min(prompt);
        Some(Counted {
            prompt_tokens: prompt - cached,
            cached_tokens: cached,
            generation_tokens: generated.unwrap_or(0.0),
            steps: 0.0,
        })
    }
}

/// The metered requests by the moments from which and until which they can have counted.
struct Bounds {
    /// Sums over requests by the moment from which they may count.
    opened: Sums,
    /// The same by the moment from which they certainly count no more.
    closed: Sums,
}

/// Running sums in order of time; requests of unknown size are counted apart.
#[derive(Default)]
struct Sums {
    at: Vec<Timestamp>,
    upto: Vec<([f64; COUNTERS], u64)>,
}

impl Sums {
    fn of(mut moments: Vec<(Timestamp, Option<[f64; COUNTERS]>)>) -> Sums {
        moments.sort_by_key(|(at, _)| *at);
        let mut sums = Sums { at: Vec::with_capacity(moments.len()), upto: vec![([0.0; COUNTERS], 0)] };
        let (mut sum, mut unknown) = ([0.0; COUNTERS], 0);
        for (at, tokens) in moments {
            match tokens {
                Some(tokens) => sum.iter_mut().zip(tokens).for_each(|(sum, tokens)| *sum += tokens),
                None => unknown += 1,
            }
            sums.at.push(at);
            sums.upto.push((sum, unknown));
        }
        sums
    }

    fn upto(&self, at: Timestamp) -> ([f64; COUNTERS], u64) {
        self.upto[self.at.partition_point(|moment| *moment <= at)]
    }
}

impl Bounds {
    fn of(metered: &[Metered]) -> Bounds {
        let opened = metered.iter().map(|one| (one.sent.plus_micros(-SLACK_US), one.tokens)).collect();
        let closed = metered.iter().filter_map(|one| Some((one.ended?.plus_micros(SLACK_US), one.tokens))).collect();
        Bounds { opened: Sums::of(opened), closed: Sums::of(closed) }
    }

    /// The least that bypassed the gateway up to each reading of one counter.
    fn least(&self, points: &[(Timestamp, f64)], place: usize) -> Vec<(Timestamp, f64)> {
        let mut upto = Vec::with_capacity(points.len());
        let (mut engine, mut least, mut best) = (0.0, 0.0f64, f64::NEG_INFINITY);
        let mut before: Option<(f64, u64)> = None;
        for &(at, shown) in points {
            let (opened, unknown_opened) = self.opened.upto(at);
            let (closed, unknown_closed) = self.closed.upto(at);
            if let Some((shown_before, unknown_closed_before)) = before {
                // A counter that fell belongs to another process, or is a sum of which a part is gone; how much was counted
                // in between is unknown, and nothing is concluded from it.
                engine += (shown - shown_before).max(0.0);
                if unknown_opened > unknown_closed_before {
                    // A request of unknown size ran in this stretch: count from here on anew.
                    best = f64::NEG_INFINITY;
                } else {
                    least = least.max(best + engine - opened[place]);
                }
            }
            best = best.max(least - (engine - closed[place]));
            before = Some((shown, unknown_closed));
            upto.push((at, least));
        }
        upto
    }
}

/// The prompts that bypassed the gateway, each held back until more generated tokens than before have bypassed it too.
fn answered(prompts: &[(Timestamp, f64)], generated: &[(Timestamp, f64)]) -> Vec<(Timestamp, f64)> {
    let (mut believed, mut answers) = (0.0, 0.0);
    let believe = |&(moment, all): &(Timestamp, f64)| {
        let answers_now = at(generated, moment);
        if all > believed && answers_now > answers {
            (believed, answers) = (all, answers_now);
        }
        (moment, believed)
    };
    prompts.iter().map(believe).collect()
}

/// A growing quantity between its readings, on a straight line.
fn at(upto: &[(Timestamp, f64)], at: Timestamp) -> f64 {
    let after = upto.partition_point(|(moment, _)| *moment <= at);
    match (after.checked_sub(1).map(|place| upto[place]), upto.get(after)) {
        (Some((from, low)), Some(&(until, high))) => {
            low + (high - low) * at.micros_since(from) as f64 / until.micros_since(from).max(1) as f64
        }
        (Some((_, last)), None) => last,
        (None, Some((_, first))) => *first,
        (None, None) => 0.0,
    }
}

#[cfg(test)]
#[path = "counted_tests.rs"]
mod tests;
