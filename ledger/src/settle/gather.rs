//! The facts of a stretch of time, put where they are needed: by pool, by minute, by engine, each looked at once.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::Known;
use super::counted::{Metered, Unobserved};
use super::minutes::{INTERVAL_US, interval_of};
use super::ran::{Ran, timeline_of, timeline_of_running};
use super::spans::EngineSpans;
use crate::allocate::pool::Known as Times;
use crate::allocate::pool::Served;
use crate::attempt::{Attempt, Outcome, Route, Running, Source};
use crate::capacity::{CapacityFact, latest};
use crate::context::{Context, Label};
use crate::id::AttemptId;
use crate::posting::{Line, Origin, Posting};
use crate::telemetry::{Adapter, EngineFact, EngineReading, EngineStep, JobFact};
use crate::time::{Period, Timestamp};
use crate::usage::{TokenUsage, UsageQuality};

/// After how long an attempt that a crash interrupted has certainly stopped on its engine.
const CRASHED_US: i64 = 600_000_000;

/// All that is known of one pool.
#[derive(Default)]
pub(super) struct PoolFacts<'a> {
    /// The engines' facts that hold, by name and in order of time.
    pub(super) engines: BTreeMap<&'a str, Vec<&'a EngineFact>>,
    /// The names of its replicas.
    pub(super) replicas: BTreeSet<&'a Label>,
    /// What its engines served, each attempt once.
    pub(super) served: Vec<Served>,
    /// The readings of each engine, in order of time.
    pub(super) readings: BTreeMap<&'a str, Vec<&'a EngineReading>>,
    /// What bypassed the gateway on each engine.
    pub(super) unobserved: BTreeMap<&'a str, Unobserved>,
    /// The window's minutes in which it cost something or something is posted.
    pub(super) minutes: BTreeMap<Timestamp, MinuteFacts<'a>>,
}

/// All that is known of one minute of a pool.
#[derive(Default)]
pub(super) struct MinuteFacts<'a> {
    pub(super) capacity: Vec<&'a CapacityFact>,
    /// Places in [`PoolFacts::served`].
    pub(super) served: Vec<usize>,
    pub(super) jobs: Vec<&'a JobFact>,
    pub(super) steps: Vec<&'a EngineStep>,
    /// What is booked of it, true-ups to the invoice excepted.
    pub(super) posted: Vec<&'a Posting>,
}

/// Sorts all facts by pool; minutes are those that start within `window`.
pub(super) fn gather<'a>(known: &Known<'a>, window: Period) -> BTreeMap<&'a Label, PoolFacts<'a>> {
    let mut pools: BTreeMap<&'a Label, PoolFacts<'a>> = BTreeMap::new();
    for fact in latest(known.capacity) {
        let pool = pools.entry(&fact.pool).or_default();
        pool.replicas.insert(&fact.replica);
        each_minute(fact.period, window, |start| pool.minutes.entry(start).or_default().capacity.push(fact));
    }
    for posting in known.posted {
        let Origin::Pool { pool, start } = &posting.origin else { continue };
        if posting.line != Line::TrueUp && window.contains(*start) {
            pools.entry(pool).or_default().minutes.entry(*start).or_default().posted.push(posting);
        }
    }
    for fact in latest_engines(known.engines) {
        pools.entry(&fact.pool).or_default().engines.entry(&fact.engine).or_default().push(fact);
    }
    for reading in known.readings {
        pools.entry(&reading.pool).or_default().readings.entry(&reading.engine).or_default().push(reading);
    }
    for fact in latest_jobs(known.jobs) {
        let Some(pool) = pools.get_mut(&fact.pool) else { continue };
        each_minute(fact.period, window, |start| {
            if let Some(minute) = pool.minutes.get_mut(&start) {
                minute.jobs.push(fact);
            }
        });
    }
    let spans = EngineSpans::of(known.spans);
    let attempts = once(known);
    let mut steps: BTreeMap<&str, Vec<&EngineStep>> = BTreeMap::new();
    for step in known.steps {
        steps.entry(&step.engine).or_default().push(step);
    }
    for (label, pool) in &mut pools {
        pool.place_steps(&steps, window);
        let of_pool = attempts.get(label).map(Vec::as_slice).unwrap_or_default();
        pool.serve(of_pool, &spans, window);
    }
    pools
}

/// An attempt, ended or not.
#[derive(Clone, Copy)]
enum Seen<'a> {
    Ended(&'a Attempt),
    Running(&'a Running),
}

impl<'a> Seen<'a> {
    fn id(self) -> AttemptId {
        match self {
            Seen::Ended(attempt) => attempt.id,
            Seen::Running(running) => running.id,
        }
    }

    fn route(self) -> &'a Route {
        match self {
            Seen::Ended(attempt) => &attempt.route,
            Seen::Running(running) => &running.route,
        }
    }

    fn context(self) -> &'a Context {
        match self {
            Seen::Ended(attempt) => &attempt.context,
            Seen::Running(running) => &running.context,
        }
    }

    fn period(self) -> Period {
        let timeline = match self {
            Seen::Ended(attempt) => &attempt.timeline,
            Seen::Running(running) => &running.timeline,
        };
        Period { start: timeline.received_at, end: timeline.finished_at() }
    }

    /// Which of two facts of one attempt holds: the end before the running, a real end before a crash's, the later one.
    fn rank(self) -> impl Ord {
        let (ended, outcome, usage) = match self {
            Seen::Ended(attempt) => (true, attempt.outcome != Outcome::Crashed, &attempt.usage),
            Seen::Running(running) => (false, true, &running.usage),
        };
        (ended, outcome, self.period().end, usage.output_tokens(), usage.input_tokens())
    }
}

/// The attempts of each pool, every one once, in the order of their ids. A call that only a span told of gives way to the
/// gateway's own record of it, should that come later.
fn once<'a>(known: &Known<'a>) -> BTreeMap<&'a Label, Vec<Seen<'a>>> {
    let ended = known.attempts.iter().map(Seen::Ended);
    let running = known.running.iter().map(Seen::Running);
    let mut all: Vec<Seen<'a>> = ended.chain(running).filter(|seen| seen.route().pool.is_some()).collect();
    all.sort_by(|a, b| a.id().cmp(&b.id()).then_with(|| b.rank().cmp(&a.rank())));
    all.dedup_by(|later, kept| later.id() == kept.id());
    let told = |seen: &Seen<'_>| matches!(seen, Seen::Ended(attempt) if matches!(attempt.source, Source::Span(_)));
    let answers: HashSet<&str> =
        all.iter().filter(|seen| !told(seen)).filter_map(|seen| seen.route().response_id.as_deref()).collect();
    let mut pools: BTreeMap<&'a Label, Vec<Seen<'a>>> = BTreeMap::new();
    for seen in all {
        let metered = seen.route().response_id.as_deref().is_some_and(|id| answers.contains(id));
        if let (Some(pool), false) = (&seen.route().pool, told(&seen) && metered) {
            pools.entry(pool).or_default().push(seen);
        }
    }
    pools
}

impl<'a> PoolFacts<'a> {
    /// The engine that served an attempt with this route: the one it names, else the one that serves its model, else the
    /// only one. `None` when that cannot be told.
    fn engine_of(&self, route: &'a Route) -> Option<&'a Label> {
        if let Some(facts) = self.engines.get(&*route.upstream) {
            return facts.first().map(|fact| &fact.engine);
        }
        let mut all = self.engines.values().filter_map(|facts| facts.last());
        if self.engines.len() == 1 {
            return all.next().map(|fact| &fact.engine);
        }
        if self.engines.is_empty() {
            // Nothing is known of the engine but that it ran on the pool's only replica, or on the one of its name.
            let only = self.replicas.len() == 1 || self.replicas.contains(&route.upstream);
            return only.then_some(&route.upstream);
        }
        let serves = |fact: &EngineFact| {
            let asked = [route.request_model.as_ref(), route.response_model.as_ref()];
            let mut models = fact.model.iter().chain(fact.adapters.iter().map(|adapter| &adapter.model));
            models.any(|model| asked.contains(&Some(model)))
        };
        all.find(|fact| serves(fact)).map(|fact| &fact.engine)
    }

    /// The engine's fact that holds in the minute from `start`: the one that began last among those that touch it. An
    /// engine that served although no fact covers the minute is taken as it was before, else as it is after.
    pub(super) fn in_force(&self, engine: &str, minute: Period, served: bool) -> Option<&'a EngineFact> {
        let facts = self.engines.get(engine)?;
        let begun = facts.partition_point(|fact| fact.period.start < minute.end);
        let before = &facts[..begun];
        let touching = before.iter().rev().find(|fact| fact.period.end > minute.start);
        let nearest = || before.last().or_else(|| facts.first()).filter(|_| served);
        touching.or_else(nearest).copied()
    }

    fn place_steps(&mut self, steps: &BTreeMap<&str, Vec<&'a EngineStep>>, window: Period) {
        for &step in self.engines.keys().filter_map(|engine| steps.get(engine)).flatten() {
            let end = step.at.plus_micros(i64::try_from(step.wall_us.max(1)).unwrap_or(i64::MAX));
            each_minute(Period { start: step.at, end }, window, |start| {
                if let Some(minute) = self.minutes.get_mut(&start) {
                    minute.steps.push(step);
                }
            });
        }
    }

    /// Puts every attempt on its engine and in its minutes, and compares what was metered with what was counted.
    fn serve(&mut self, attempts: &[Seen<'a>], spans: &EngineSpans<'a>, window: Period) {
        let mut metered: BTreeMap<&'a str, Vec<Metered>> = BTreeMap::new();
        for &seen in attempts {
            let Some(engine) = self.engine_of(seen.route()) else { continue };
            let span = spans.find(seen.route(), seen.context(), seen.period());
            let minute = interval_of(seen.period().start);
            let fact = self.in_force(engine, minute, true);
            let replica = fact.and_then(|fact| fact.setup.constants.as_ref());
            let ran = match seen {
                Seen::Ended(attempt) => timeline_of(attempt, span, replica),
                Seen::Running(running) => timeline_of_running(running, span, replica),
            };
            let Some(ran) = ran else {
                metered.entry(engine).or_default().extend(failed(seen));
                continue;
            };
            metered.entry(engine).or_default().extend(counted(seen, &ran));
            if extent(&ran).intersect(window).is_some() {
                let adapter = fact.and_then(|fact| adapter(fact, seen.route()));
                self.place(seen, engine, &ran, adapter, window);
            }
        }
        for readings in self.readings.values_mut() {
            // Of two of one moment the order, too, must not depend on how they came.
            readings
                .sort_by_key(|reading| (reading.at, reading.prompt_tokens, reading.generation_tokens, reading.running));
        }
        for (engine, readings) in &self.readings {
            let metered = metered.get(engine).map(Vec::as_slice).unwrap_or_default();
            self.unobserved.insert(engine, Unobserved::of(readings, metered));
        }
    }

    /// Puts an attempt that ran into its minutes.
    fn place(&mut self, seen: Seen<'a>, engine: &Label, ran: &Ran, adapter: Option<Adapter>, window: Period) {
        let place = self.served.len();
        self.served.push(Served {
            attempt: seen.id(),
            context: seen.context().clone(),
            engine: engine.clone(),
            timeline: ran.timeline,
            known: ran.known,
            adapter,
            estimated: ran.estimated || *engine != seen.route().upstream,
            observed_at: seen.period().end,
        });
        each_minute(extent(ran), window, |start| {
            if let Some(minute) = self.minutes.get_mut(&start) {
                minute.served.push(place);
            }
        });
    }
}

/// The adapter that an attempt asked for by its model's name.
fn adapter(fact: &EngineFact, route: &Route) -> Option<Adapter> {
    let asked = [route.request_model.as_ref(), route.response_model.as_ref()];
    fact.adapters.iter().find(|adapter| asked.contains(&Some(&adapter.model))).cloned()
}

/// The minutes that an attempt can pay in.
fn extent(ran: &Ran) -> Period {
    let timeline = &ran.timeline;
    match ran.known {
        Times::Timeline => Period { start: timeline.scheduled, end: timeline.last_token.plus_micros(1) },
        Times::Counts => Period { start: timeline.arrived, end: timeline.arrived.plus_micros(1) },
    }
}

/// What an attempt can have added to its engine's counters.
fn counted(seen: Seen<'_>, ran: &Ran) -> Vec<Metered> {
    let sent = ran.timeline.arrived;
    let sizes = |usage: &TokenUsage| {
        [usage.input_tokens(), usage.cache_read.saturating_add(usage.cache_read_audio), usage.output_tokens()]
            .map(|tokens| tokens as f64)
    };
    match seen {
        Seen::Ended(attempt) => {
            // Of an answer that came as a whole or not at all nobody saw how far it was when it ended early.
            let unseen = attempt.outcome != Outcome::Completed && !attempt.route.streamed;
            let tokens = match attempt.usage_quality {
                UsageQuality::Reported => Some(sizes(&attempt.usage)),
                UsageQuality::Estimated if attempt.outcome != Outcome::Crashed && !unseen => {
                    let [prompt, cached, generated] = sizes(&attempt.usage);
                    let generated = generated.max(f64::from(ran.timeline.output_tokens));
                    Some([at_the_most(BYTES_PER_TOKEN * prompt), cached, at_the_most(generated)])
                }
                _ => None,
            };
            let ended = match attempt.outcome {
                Outcome::Crashed => attempt.timeline.received_at.plus_micros(CRASHED_US),
                _ => attempt.timeline.finished_at().max(ran.timeline.last_token),
            };
            vec![Metered { sent, ended: Some(ended), tokens }]
        }
        // Its prompt is a guess and its engine ahead of what was delivered: nothing is concluded until it has ended, and then
        // its minutes are settled again.
        Seen::Running(_) => vec![Metered { sent, ended: None, tokens: None }],
    }
}

/// An attempt that pays nothing because its engine failed: how far it got, and what it had counted by then, is unknown. One
/// that was refused (a status below 500, or 503) or never reached its engine counted nothing.
fn failed(seen: Seen<'_>) -> Option<Metered> {
    let Seen::Ended(attempt) = seen else { return None };
    let Attempt { outcome, status, timeline, .. } = attempt;
    let refused = status.is_some_and(|status| status < 500 || status == 503);
    let reached = *outcome == Outcome::UpstreamError && timeline.sent_us.is_some() && !refused;
    let at = |us: u64| timeline.received_at.plus_micros(i64::try_from(us).unwrap_or(i64::MAX));
    reached.then(|| Metered {
        sent: at(timeline.sent_us.unwrap_or(0)),
        ended: Some(timeline.finished_at()),
        tokens: None,
    })
}

/// Bytes that the estimate of a prompt takes for one token; a token is a byte at the least.
const BYTES_PER_TOKEN: f64 = 4.0;

/// The most tokens that an estimate may stand for.
fn at_the_most(estimate: f64) -> f64 {
    1.5 * estimate + 64.0
}

/// For each engine and start the latest observation, in order of time.
pub(super) fn latest_engines(facts: &[EngineFact]) -> Vec<&EngineFact> {
    let mut kept: BTreeMap<(&str, Timestamp), &EngineFact> = BTreeMap::new();
    for fact in facts {
        let newest = kept.entry(fact.identity()).or_insert(fact);
        if (fact.observed_at, fact.period.end) > (newest.observed_at, newest.period.end) {
            *newest = fact;
        }
    }
    kept.into_values().collect()
}

/// For each run of a job the latest observation.
fn latest_jobs(facts: &[JobFact]) -> Vec<&JobFact> {
    let mut kept: BTreeMap<(&str, &str, &str, Timestamp), &JobFact> = BTreeMap::new();
    for fact in facts {
        let (job, replica, start) = fact.identity();
        let newest = kept.entry((&fact.pool, job, replica, start)).or_insert(fact);
        if (fact.observed_at, fact.period.end, fact.share) > (newest.observed_at, newest.period.end, newest.share) {
            *newest = fact;
        }
    }
    kept.into_values().collect()
}

/// Calls `f` with the start of each minute of `window` that `period` touches.
fn each_minute(period: Period, window: Period, mut f: impl FnMut(Timestamp)) {
    let Some(both) = period.intersect(window) else { return };
    let mut start = interval_of(both.start).start;
    while start < both.end {
        if window.start <= start {
            f(start);
        }
        start = start.plus_micros(INTERVAL_US);
    }
}

#[cfg(test)]
#[path = "gather_tests.rs"]
mod tests;
