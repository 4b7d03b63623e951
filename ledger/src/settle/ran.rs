//! When an attempt ran on its engine, from what the gateway saw, what the engine said, and a guess where both are silent.

use crate::allocate::pool::Known;
use crate::allocate::replica::Replica;
use crate::allocate::timeline::EngineTimeline;
use crate::attempt::{Attempt, Operation, Outcome, Route, Running, Source, Timeline};
use crate::step::Work;
use crate::telemetry::CallSpan;
use crate::time::Timestamp;
use crate::usage::{TokenUsage, UsageQuality};

/// An attempt's time on its engine.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Ran {
    /// When it was scheduled and when its tokens were there.
    pub timeline: EngineTimeline,
    /// What of it is known.
    pub known: Known,
    /// Whether any part of it is a guess.
    pub estimated: bool,
}

/// When `attempt` ran. `span` is what the engine told of it, `replica` the constants that a missing prefill time is
/// predicted with. `None` when it did no work: it was never sent, could not be delivered, or was refused.
#[must_use]
pub fn timeline_of(attempt: &Attempt, span: Option<&CallSpan>, replica: Option<&Replica>) -> Option<Ran> {
    let outcome = attempt.outcome;
    let metered = attempt.source == Source::Gateway;
    let Attempt { route, timeline, usage, usage_quality, .. } = attempt;
    let saw_tokens = usage.output_tokens() > 0 || timeline.first_token_us.is_some();
    let reached = match outcome {
        Outcome::UpstreamUnreachable => false,
        Outcome::UpstreamError => saw_tokens,
        // The record from before it was sent is all that is left of it.
        Outcome::Crashed => true,
        _ => !metered || timeline.sent_us.is_some() || timeline.first_byte_us.is_some() || saw_tokens,
    };
    if !reached {
        return None;
    }
    Seen { route, timeline, usage, quality: *usage_quality, ended_early: outcome != Outcome::Completed }
        .ran(span, replica)
}

/// How far `running` got on its engine by the moment it was looked at.
#[must_use]
pub fn timeline_of_running(running: &Running, span: Option<&CallSpan>, replica: Option<&Replica>) -> Option<Ran> {
    let Running { route, timeline, usage, .. } = running;
    timeline.sent_us?;
    Seen { route, timeline, usage, quality: UsageQuality::Estimated, ended_early: true }.ran(span, replica)
}

/// What finished and running attempts have in common.
struct Seen<'a> {
    route: &'a Route,
    timeline: &'a Timeline,
    usage: &'a TokenUsage,
    quality: UsageQuality,
    /// Whether it stopped, or was looked at, before the engine had finished.
    ended_early: bool,
}

/// Tokens as a timeline carries them.
#[derive(Clone, Copy)]
struct Tokens {
    input: u32,
    cached: u32,
    output: u32,
}

impl Seen<'_> {
    fn ran(&self, span: Option<&CallSpan>, replica: Option<&Replica>) -> Option<Ran> {
        if matches!(self.route.operation, Operation::CountTokens | Operation::Models) {
            return None;
        }
        let (tokens, counted) = self.tokens(span);
        let seen = self.timeline;
        let without_times = seen.finished_us == 0 && seen.sent_us.is_none() && seen.first_token_us.is_none();
        let Some(times) = Times::of(seen, span, without_times) else {
            return (tokens.input > 0 || tokens.output > 0).then_some(Ran {
                timeline: EngineTimeline {
                    arrived: seen.received_at,
                    scheduled: seen.received_at,
                    first_token: seen.received_at,
                    last_token: seen.received_at,
                    input_tokens: tokens.input,
                    cached_tokens: tokens.cached,
                    output_tokens: tokens.output,
                },
                known: Known::Counts,
                estimated: !counted,
            });
        };
        let prefill_us = predicted_prefill_us(replica, tokens);
        let (timeline, guessed) = match times.first_token {
            Some(first_token) => times.streamed(first_token, tokens, prefill_us),
            None if self.ended_early && self.route.streamed => times.unanswered(tokens, prefill_us),
            None if self.ended_early => times.cut_whole(tokens, prefill_us, replica),
            None if tokens.output == 0 => times.without_output(tokens, prefill_us),
            None => times.whole(tokens, prefill_us),
        };
        Some(Ran { timeline: timeline.ordered(), known: Known::Timeline, estimated: guessed || !counted })
    }

    /// The tokens, and whether they are what somebody reported.
    fn tokens(&self, span: Option<&CallSpan>) -> (Tokens, bool) {
        let told = span.filter(|span| span.usage_quality == UsageQuality::Reported);
        let (usage, reported) = match (self.quality, told) {
            (UsageQuality::Reported, _) => (self.usage, true),
            (_, Some(span)) => (&span.usage, true),
            _ => (self.usage, false),
        };
        // Who streams without saying what it used has shown at least one token for each chunk.
        let chunks = self.timeline.first_token_us.map_or(0, |_| u64::from(self.timeline.gaps.count) + 1);
        let output = if reported { usage.output_tokens() } else { usage.output_tokens().max(chunks) };
        let cached = usage.cache_read.saturating_add(usage.cache_read_audio);
        (Tokens { input: at_most(usage.input_tokens()), cached: at_most(cached), output: at_most(output) }, reported)
    }
}

/// The moments that are known, on the gateway's clock.
struct Times {
    sent: Timestamp,
    /// When the engine began with it, if that was said.
    scheduled: Option<Timestamp>,
    first_token: Option<Timestamp>,
    last_token: Option<Timestamp>,
    end: Timestamp,
    prefill_us: Option<i64>,
    decode_us: Option<i64>,
}

impl Times {
    /// `None` when nobody says when it ran.
    fn of(seen: &Timeline, span: Option<&CallSpan>, without_times: bool) -> Option<Times> {
        let told = |of: fn(&CallSpan) -> Option<u64>| span.and_then(of).map(whole);
        let queued_us = seen.queued_us.map(whole).or_else(|| told(|span| span.queue_us));
        let (sent, end) = match span {
            Some(span) if without_times => (span.period.start, span.period.end),
            None if without_times => return None,
            _ => {
                let at = |us: u64| seen.received_at.plus_micros(whole(us));
                (at(seen.sent_us.or(seen.admitted_us).unwrap_or(0)), seen.finished_at())
            }
        };
        let at = |us: u64| seen.received_at.plus_micros(whole(us));
        let prefill_us = told(|span| span.prefill_us);
        let first_us = told(|span| span.first_token_us);
        let (mut first_token, last_token) = (seen.first_token_us.map(at), seen.last_token_us.map(at));
        if first_token.is_none() {
            first_token = first_us.map(|us| sent.plus_micros(us).min(end));
        }
        Some(Times {
            sent,
            scheduled: queued_us.map(|us| sent.plus_micros(us)),
            first_token,
            last_token: last_token.or_else(|| seen.first_token_us.map(at)),
            end: end.max(sent),
            prefill_us,
            decode_us: told(|span| span.decode_us),
        })
    }

    /// Its first token was seen.
    fn streamed(&self, first_token: Timestamp, tokens: Tokens, predicted: Option<i64>) -> (EngineTimeline, bool) {
        let begun = |prefill: i64| first_token.plus_micros(-prefill).max(self.sent);
        let scheduled = self.scheduled.or_else(|| self.prefill_us.map(begun));
        let guess = predicted.map_or(self.sent, begun);
        let decoded = || self.decode_us.map(|us| first_token.plus_micros(us).min(self.end.max(first_token)));
        let last_token = self.last_token.or_else(decoded).unwrap_or(self.end);
        let timeline = self.timeline(scheduled.unwrap_or(guess).min(first_token), first_token, last_token, tokens);
        (timeline, scheduled.is_none())
    }

    /// It ended before any token came: it waited, then its prefill ran for at most as long as the model says.
    fn unanswered(&self, tokens: Tokens, predicted: Option<i64>) -> (EngineTimeline, bool) {
        let prefill_us = self.prefill_us.or(predicted).filter(|us| *us > 0);
        let begun = prefill_us.map_or(self.sent, |us| self.end.plus_micros(-us));
        let scheduled = self.scheduled.unwrap_or(begun).max(begun).max(self.sent).min(self.end);
        let ran_us = self.end.micros_since(scheduled);
        let input = match prefill_us {
            Some(all) => part_of(tokens.input, ran_us, all),
            None => tokens.input,
        };
        (self.timeline(scheduled, self.end, self.end, Tokens { input, output: 0, ..tokens }), true)
    }

    /// A whole answer that nobody waited for: it was generated until the end, for as many tokens as fit the time.
    fn cut_whole(&self, tokens: Tokens, predicted: Option<i64>, replica: Option<&Replica>) -> (EngineTimeline, bool) {
        let prefill_us = self.prefill_us.or(predicted).unwrap_or(0);
        let first_token = self.scheduled.unwrap_or(self.sent).plus_micros(prefill_us);
        if first_token >= self.end {
            return self.unanswered(tokens, predicted);
        }
        let step_us = replica.map(|replica| {
            let decode = Work { new_tokens: 1, cached_tokens: tokens.input };
            micros(replica.step_s(&[decode])).max(1)
        });
        let left_us = self.end.micros_since(first_token);
        let fit = step_us.map_or(1, |step| at_most(left_us / u64::try_from(step).unwrap_or(1)));
        let output = tokens.output.max(fit);
        let scheduled = self.scheduled.unwrap_or(self.sent);
        (self.timeline(scheduled, first_token, self.end, Tokens { output, ..tokens }), true)
    }

    /// It generates nothing, as an embedding: all of it is prefill, and it ends with it.
    fn without_output(&self, tokens: Tokens, predicted: Option<i64>) -> (EngineTimeline, bool) {
        let begun = self.prefill_us.or(predicted).map_or(self.sent, |us| self.end.plus_micros(-us).max(self.sent));
        let scheduled = self.scheduled.unwrap_or(begun);
        (self.timeline(scheduled, self.end, self.end, tokens), self.scheduled.is_none())
    }

    /// A whole answer, whose tokens nobody saw come.
    fn whole(&self, tokens: Tokens, predicted: Option<i64>) -> (EngineTimeline, bool) {
        let scheduled = self.scheduled.unwrap_or(self.sent);
        let left_us = whole(self.end.micros_since(scheduled));
        // Without a model a generated token is taken to last as long as 32 of the prompt.
        let by_tokens = || {
            let computed = i64::from(tokens.input.saturating_sub(tokens.cached));
            let all = computed + 32 * i64::from(tokens.output);
            i64::try_from(i128::from(left_us) * i128::from(computed) / i128::from(all.max(1))).unwrap_or(left_us)
        };
        let prefill_us = self.prefill_us.or(predicted).unwrap_or_else(by_tokens).min(left_us);
        let first_token = scheduled.plus_micros(prefill_us);
        let last_token = self.decode_us.map_or(self.end, |us| first_token.plus_micros(us).min(self.end));
        let known = self.scheduled.is_some() && self.prefill_us.is_some();
        (self.timeline(scheduled, first_token, last_token, tokens), !known)
    }

    fn timeline(&self, scheduled: Timestamp, first: Timestamp, last: Timestamp, tokens: Tokens) -> EngineTimeline {
        EngineTimeline {
            arrived: self.sent,
            scheduled,
            first_token: first,
            last_token: last,
            input_tokens: tokens.input,
            cached_tokens: tokens.cached,
            output_tokens: tokens.output,
        }
    }
}

/// How long the model says that the prefill takes alone.
fn predicted_prefill_us(replica: Option<&Replica>, tokens: Tokens) -> Option<i64> {
    let new_tokens = tokens.input.saturating_sub(tokens.cached).max(1);
    replica.map(|replica| micros(replica.step_s(&[Work { new_tokens, cached_tokens: tokens.cached }])))
}

fn part_of(tokens: u32, ran_us: u64, all_us: i64) -> u32 {
    let part = u128::from(tokens) * u128::from(ran_us) / u128::try_from(all_us.max(1)).unwrap_or(1);
    u32::try_from(part).unwrap_or(u32::MAX).min(tokens)
}

fn at_most(tokens: u64) -> u32 {
    u32::try_from(tokens).unwrap_or(u32::MAX)
}

fn whole(us: u64) -> i64 {
    i64::try_from(us).unwrap_or(i64::MAX)
}

/// Seconds as whole microseconds, at the most some thousand years.
#[expect(clippy::cast_possible_truncation, reason = "clamped to a range that fits")]
fn micros(seconds: f64) -> i64 {
    (seconds * 1e6).clamp(0.0, 1e17) as i64
}

#[cfg(test)]
#[path = "ran_tests.rs"]
mod tests;
