//! Tier A of a pool's interval: an engine's own steps, joined with its requests' timelines.
//!
//! A step says how many requests prefilled and decoded and over how many tokens, not who they were. The timelines say who:
//! at a step's middle a request prefills from its schedule to its first token and decodes from there to its last. Prefill
//! tokens go to the prefilling requests in the order of their schedule, each at most what is left of its input; cached
//! tokens of the decoding ones are scaled so that they add up to what the step says. Then [`share_step`] divides the
//! step's measured time.
//!
//! Steps may overlap: each is charged for the time that no earlier one covers. A hole in the sequence is time of which no
//! step is known and goes to [`reconstruct`](super::reconstruct), as does the time before the first step and after the
//! last. Between two steps that follow one another the engine ran nothing, whatever the timelines say.
//!
//! Every data-parallel rank counts its own steps and which requests it had is not known, so that several ranks are no join.

use std::collections::BTreeMap;

use super::policy::{FixedRule, Policy};
use super::pool::Engine;
use super::reconstruct::Ran;
use super::replica::Replica;
use super::share::Share;
use super::steps::{Adapter, Entry, share_step, share_step_among};
use crate::step::Work;
use crate::telemetry::EngineStep;
use crate::time::{Period, Timestamp};

/// What an engine's steps say of a span.
#[derive(Debug, Clone, Default)]
pub(super) struct Joined {
    /// Seconds of the replica that each request pays, in the order of the requests.
    pub(super) shares: Vec<Share>,
    /// The steps with known requests in them, clipped so that none overlaps another.
    pub(super) busy: Vec<Period>,
    /// Time of which no step is known, in order.
    pub(super) holes: Vec<Period>,
    /// Seconds that the model predicts for the charged steps.
    pub(super) predicted_s: f64,
    /// Seconds of steps in which nobody was whom we know.
    pub(super) strangers_s: f64,
    /// How many requests were in the engine's batch, at the middle of each step.
    pub(super) running: Vec<(Timestamp, f64)>,
}

/// Joins `engine`'s steps with its requests. `None` when no step touches `span`, the model is unknown, or several ranks
/// report.
pub(super) fn join(
    engine: &Engine,
    constants: &Replica,
    order: &[Ran<'_>],
    span: Period,
    policy: &Policy,
) -> Option<Joined> {
    let mut once: BTreeMap<(Timestamp, u64), &EngineStep> = BTreeMap::new();
    for step in engine.steps.iter().filter(|step| lasts(step).intersect(span).is_some()) {
        once.insert((step.at, step.sequence), step);
    }
    let rank = once.values().next()?.rank;
    if once.values().any(|step| step.rank != rank) {
        return None;
    }
    let mut joined = Joined { shares: vec![Share::default(); order.len()], ..Joined::default() };
    let mut batch = Batch::of(engine, order);
    let (mut covered, mut before) = (span.start, None);
    for step in once.into_values() {
        let lasts = lasts(step);
        if before.is_none_or(|before: u64| before.checked_add(1) != Some(step.sequence)) {
            joined.holes.extend(Period { start: covered, end: lasts.start }.intersect(span));
        }
        before = Some(step.sequence);
        let own = Period { start: lasts.start.max(covered), end: lasts.end }.intersect(span);
        covered = covered.max(lasts.end);
        let (entries, members) = batch.step(step);
        joined.running.push((middle(step), f64::from(step.prefill_requests) + f64::from(step.decode_requests)));
        let Some(own) = own else { continue };
        let seconds = own.micros() as f64 * 1e-6;
        if entries.is_empty() {
            joined.strangers_s += seconds;
            continue;
        }
        let shares = match policy.fixed {
            FixedRule::Request => share_step(constants, entries, seconds),
            FixedRule::Tenant => {
                let tenants: Vec<u32> = members.iter().map(|&at| order[at].tenant).collect();
                share_step_among(constants, entries, &tenants, seconds)
            }
        };
        for (&at, share) in members.iter().zip(shares) {
            joined.shares[at] += share;
        }
        joined.busy.push(own);
        let works: Vec<Work> = entries.iter().map(|entry| entry.work).collect();
        joined.predicted_s += constants.step_s(&works) * (own.micros() as f64 / lasts.micros().max(1) as f64);
    }
    joined.holes.extend(Period { start: covered, end: span.end }.intersect(span));
    Some(joined)
}

fn lasts(step: &EngineStep) -> Period {
    Period { start: step.at, end: step.at.plus_micros(i64::try_from(step.wall_us).unwrap_or(i64::MAX)) }
}

fn middle(step: &EngineStep) -> Timestamp {
    step.at.plus_micros(i64::try_from(step.wall_us / 2).unwrap_or(i64::MAX))
}

/// Who is in the batch, step after step.
struct Batch<'a> {
    order: &'a [Ran<'a>],
    /// Tokens that a decoding request computes in a step.
    computed: u32,
    /// Requests that may be in the next step, and how many are scheduled so far.
    active: Vec<usize>,
    scheduled: usize,
    /// What is left of each request's input, once it was seen.
    left: Vec<Option<u32>>,
    entries: Vec<Entry>,
    members: Vec<usize>,
}

impl<'a> Batch<'a> {
    fn of(engine: &Engine, order: &'a [Ran<'a>]) -> Batch<'a> {
        let drafted = engine.speculation.map_or(0.0, |speculation| speculation.drafted);
        Batch {
            order,
            computed: 1 + whole(drafted),
            active: Vec::new(),
            scheduled: 0,
            left: vec![None; order.len()],
            entries: Vec::new(),
            members: Vec::new(),
        }
    }

    /// The requests of one step and what each did, in the order of their schedule. Steps come in the order of time.
    fn step(&mut self, step: &EngineStep) -> (&[Entry], &[usize]) {
        let middle = middle(step);
        while self.order.get(self.scheduled).is_some_and(|ran| ran.timeline.scheduled <= middle) {
            self.active.push(self.scheduled);
            self.scheduled += 1;
        }
        self.active.retain(|&at| self.order[at].timeline.last_token > middle);
        self.entries.clear();
        self.members.clear();
        let mut chunk = whole(step.prefill_tokens as f64);
        let mut decoding = 0.0;
        for &at in &self.active {
            let ran = &self.order[at];
            let timeline = &ran.timeline;
            let computed = timeline.input_tokens - timeline.cached_tokens;
            let left = self.left[at].get_or_insert_with(|| {
                // Seen for the first time: what it computed before is taken as even, and nothing where it is new.
                let all = timeline.first_token.micros_since(timeline.scheduled).max(1) as f64;
                let passed = step.at.micros_since(timeline.scheduled) as f64 / all;
                computed - whole(f64::from(computed) * passed.min(1.0)).min(computed)
            });
            let work = if middle < timeline.first_token && *left > 0 {
                let new_tokens = chunk.min(*left);
                let work = Work { new_tokens, cached_tokens: timeline.input_tokens - *left };
                chunk -= new_tokens;
                *left -= new_tokens;
                work
            } else {
                *left = 0;
                let length = timeline.last_token.micros_since(timeline.first_token).max(1) as f64;
                let passed = middle.micros_since(timeline.first_token) as f64 / length;
                let delivered = f64::from(timeline.output_tokens) * passed.min(1.0);
                let cached_tokens = timeline.input_tokens.saturating_add(whole(delivered));
                decoding += 1.0;
                Work { new_tokens: self.computed, cached_tokens }
            };
            // A request whose turn it was not is not in the step.
            if work.new_tokens > 0 {
                let adapter = ran.adapter.zip(ran.served.adapter.as_ref()).map(|(id, adapter)| Adapter {
                    id: u64::from(id),
                    bytes: adapter.bytes as f64,
                    flop_per_token: adapter.flop_per_token as f64,
                });
                self.entries.push(Entry { tag: at as u64, work, adapter });
                self.members.push(at);
            }
        }
        self.scale_contexts(step, decoding);
        (&self.entries, &self.members)
    }

    /// Moves the decoding requests' contexts to the sum that the step reports, where it counted as many of them or more.
    fn scale_contexts(&mut self, step: &EngineStep, decoding: f64) {
        let order = self.order;
        let left = &self.left;
        let middle = middle(step);
        let is_decode = |at: usize| left[at] == Some(0) && middle >= order[at].timeline.first_token;
        let known: f64 = self
            .entries
            .iter()
            .zip(&self.members)
            .filter(|(_, at)| is_decode(**at))
            .map(|(entry, _)| f64::from(entry.work.cached_tokens))
            .sum();
        let reported = step.decode_kv_tokens as f64;
        if known <= 0.0 || reported <= 0.0 || step.decode_requests == 0 {
            return;
        }
        let ours = (decoding / f64::from(step.decode_requests)).min(1.0);
        // Beyond a factor of two the join is off, and scaling would only move the error to other requests.
        let factor = (reported * ours / known).clamp(0.5, 2.0);
        for (entry, &at) in self.entries.iter_mut().zip(&self.members) {
            if is_decode(at) {
                entry.work.cached_tokens = whole(f64::from(entry.work.cached_tokens) * factor);
            }
        }
    }
}

/// A number of tokens, rounded.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to a range that fits")]
fn whole(tokens: f64) -> u32 {
    tokens.round().clamp(0.0, f64::from(u32::MAX)) as u32
}

#[cfg(test)]
#[path = "joined_tests.rs"]
mod tests;
