//! Calls that applications and engines told of over OpenTelemetry and nobody metered.
//!
//! One call may be told by several spans: an application's, a framework's around it, the engine's. Spans of the same answer
//! are one call, and of spans that lie in one another the innermost are the calls; what is around several of them (an
//! agent's turn) is none. A call that the gateway metered, or that is booked from a span already, is not made again: joined
//! by the answer's id, else by trace and span.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::gather::latest_engines;
use super::minutes::hash;
use super::spans::{plausible, widened};
use crate::attempt::{Attempt, Operation, Outcome, Route, Running, ServiceClass, Source, Timeline};
use crate::charge::{Charge, UnpricedReason};
use crate::context::{Context, Label};
use crate::id::{AttemptId, RequestId};
use crate::telemetry::{CallSpan, EngineFact};
use crate::time::{Period, Timestamp};
use crate::usage::{TokenUsage, UsageQuality};

/// What is known of calls, in any order and any number of times.
#[derive(Debug, Clone, Copy)]
pub struct Told<'a> {
    /// The spans.
    pub spans: &'a [CallSpan],
    /// Attempts of the same time, those that were made from spans before included.
    pub attempts: &'a [Attempt],
    /// Attempts that run.
    pub running: &'a [Running],
    /// The engines of our pools: a call that one of these tells is its pool's.
    pub engines: &'a [EngineFact],
}

/// The attempts behind calls that nobody metered. A call waits until all its spans are older than `watermark` and no
/// request of its trace runs, because the gateway's own record may still come. `charge` prices what a provider will bill.
///
/// Ids follow from the answer's id or from trace and span, so that the same spans always give the same attempts.
#[must_use]
pub fn calls_of_spans(told: &Told<'_>, watermark: Timestamp, charge: impl Fn(&Attempt) -> Charge) -> Vec<Attempt> {
    let spans = once(told.spans);
    let metered = Metered::of(told.attempts);
    let waiting = Waiting::of(told.running);
    let pools: HashMap<&str, &Label> =
        latest_engines(told.engines).into_iter().map(|fact| (&*fact.engine, &fact.pool)).collect();
    let mut attempts: BTreeMap<AttemptId, Attempt> = BTreeMap::new();
    for call in calls(&spans) {
        let young = call.iter().any(|span| span.observed_at.max(span.period.end) >= watermark);
        if young || waiting.holds(&call) || call.iter().any(|span| metered.has(span)) {
            continue;
        }
        let mut attempt = attempt(&call, &pools);
        if attempt.route.pool.is_none() {
            attempt.charge = charge(&attempt);
        }
        attempts.entry(attempt.id).or_insert(attempt);
    }
    attempts.into_values().collect()
}

/// Every span once, the last observation of each, in an order that does not depend on how they came.
fn once(spans: &[CallSpan]) -> Vec<&CallSpan> {
    let mut kept: BTreeMap<_, &CallSpan> = BTreeMap::new();
    for span in spans.iter().filter(|span| !matches!(span.operation, Operation::Models | Operation::CountTokens)) {
        let identity = match (&span.trace_id, &span.span_id) {
            (Some(trace), Some(id)) => (Some(trace), Some(id), None, None, None),
            // Without ids of its own a span is known by who told what and when.
            _ => (None, None, span.response_id.as_ref(), span.service.as_ref(), Some(told_when(span))),
        };
        let newest = kept.entry(identity).or_insert(span);
        if freshness(span) > freshness(newest) {
            *newest = span;
        }
    }
    kept.into_values().collect()
}

fn told_when(span: &CallSpan) -> (Timestamp, Timestamp, Option<&Label>, Option<&Label>, u64, u64) {
    let CallSpan { period, engine, request_model, usage, .. } = span;
    (period.start, period.end, engine.as_ref(), request_model.as_ref(), usage.input_tokens(), usage.output_tokens())
}

fn freshness(span: &CallSpan) -> impl Ord + '_ {
    let reported = span.usage_quality == UsageQuality::Reported;
    let CallSpan { observed_at, period, usage, response_id, response_model, .. } = span;
    (*observed_at, reported, period.end, usage.output_tokens(), usage.input_tokens(), response_id, response_model)
}

/// The calls behind the spans, each with its spans from the outermost to the innermost.
fn calls<'a>(spans: &[&'a CallSpan]) -> Vec<Vec<&'a CallSpan>> {
    let parents = parents(spans);
    // A chain of parents that never ends is a mistake of who told it; it counts as deep.
    let depth = |at: usize| std::iter::successors(Some(at), |&at| parents[at]).take(DEPTH_MAX).count();
    let depths: Vec<usize> = (0..spans.len()).map(depth).collect();
    let mut same = same_answers(spans);
    let around = around(spans, &parents, &depths, &mut same);
    let around: BTreeSet<usize> = around.into_iter().map(|at| same.root(at)).collect();
    let mut calls: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for at in 0..spans.len() {
        let root = same.root(at);
        if !around.contains(&root) {
            calls.entry(root).or_default().push(at);
        }
    }
    let order = |at: &usize| {
        let span = spans[*at];
        (span.engine.is_some(), depths[*at], span.period.start, *at)
    };
    calls
        .into_values()
        .map(|mut call| {
            call.sort_by_key(order);
            call.into_iter().map(|at| spans[at]).collect()
        })
        .collect()
}

/// Where among the spans each one's parent is, if somebody told it.
fn parents(spans: &[&CallSpan]) -> Vec<Option<usize>> {
    let own = |(at, span): (usize, &&CallSpan)| Some(((span.trace_id.clone()?, span.span_id.clone()?), at));
    let by_id: HashMap<(Label, Label), usize> = spans.iter().enumerate().filter_map(own).collect();
    let parent = |(at, span): (usize, &&CallSpan)| {
        let parent = *by_id.get(&(span.trace_id.clone()?, span.parent_span_id.clone()?))?;
        (parent != at).then_some(parent)
    };
    spans.iter().enumerate().map(parent).collect()
}

/// Spans of one answer are one call.
fn same_answers(spans: &[&CallSpan]) -> Same {
    let mut same = Same::new(spans.len());
    let mut answers: HashMap<&str, usize> = HashMap::new();
    for (at, span) in spans.iter().enumerate() {
        if let Some(id) = span.response_id.as_deref() {
            let first = *answers.entry(id).or_insert(at);
            same.join(first, at);
        }
    }
    same
}

/// Joins a span to the only call within it, and gives those that are around several calls.
fn around(spans: &[&CallSpan], parents: &[Option<usize>], depths: &[usize], same: &mut Same) -> Vec<usize> {
    // Innermost first, so that a parent sees its children as calls.
    let mut children: BTreeMap<(Reverse<usize>, usize), Vec<usize>> = BTreeMap::new();
    for (at, parent) in parents.iter().enumerate() {
        if let Some(parent) = parent.filter(|_| depths[at] < DEPTH_MAX) {
            children.entry((Reverse(depths[parent]), parent)).or_default().push(at);
        }
    }
    let mut around = Vec::new();
    for ((_, parent), children) in children {
        let within: BTreeSet<usize> = children.iter().map(|&child| same.root(child)).collect();
        let contradicts = |child: &usize| {
            let (outer, inner) = (&spans[parent].response_id, &spans[*child].response_id);
            matches!((outer, inner), (Some(outer), Some(inner)) if outer != inner)
        };
        if within.contains(&same.root(parent)) {
            continue;
        }
        match within.first() {
            Some(&only) if within.len() == 1 && !children.iter().any(contradicts) => same.join(only, parent),
            _ => around.push(parent),
        }
    }
    around
}

/// How many spans deep a trace may be.
const DEPTH_MAX: usize = 64;

/// Which spans are the same call: sets that only grow together.
struct Same(Vec<usize>);

impl Same {
    fn new(count: usize) -> Same {
        Same((0..count).collect())
    }

    fn root(&mut self, mut at: usize) -> usize {
        while self.0[at] != at {
            self.0[at] = self.0[self.0[at]];
            at = self.0[at];
        }
        at
    }

    fn join(&mut self, a: usize, b: usize) {
        let (a, b) = (self.root(a), self.root(b));
        // The smaller root stays, so that the result does not depend on the order of joining.
        self.0[a.max(b)] = a.min(b);
    }
}

/// What is booked already.
struct Metered<'a> {
    by_answer: HashSet<&'a str>,
    by_caller: HashMap<(&'a str, &'a str), Vec<&'a Attempt>>,
    by_trace: HashMap<&'a str, Vec<&'a Attempt>>,
}

impl<'a> Metered<'a> {
    fn of(attempts: &'a [Attempt]) -> Metered<'a> {
        let mut metered = Metered { by_answer: HashSet::new(), by_caller: HashMap::new(), by_trace: HashMap::new() };
        for attempt in attempts {
            metered.by_answer.extend(attempt.route.response_id.as_deref());
            let Some(trace) = attempt.context.trace_id.as_deref() else { continue };
            metered.by_trace.entry(trace).or_default().push(attempt);
            if let Some(span) = attempt.context.span_id.as_deref() {
                metered.by_caller.entry((trace, span)).or_default().push(attempt);
            }
        }
        metered
    }

    /// Attempts whose caller was this span.
    fn called_by<'s>(&'s self, trace: &'s str, caller: Option<&'s Label>) -> &'s [&'s Attempt] {
        let found = caller.and_then(|caller| self.by_caller.get(&(trace, &**caller)));
        found.map(Vec::as_slice).unwrap_or_default()
    }

    /// Whether the call that `span` tells of is booked.
    fn has(&self, span: &CallSpan) -> bool {
        if span.response_id.as_deref().is_some_and(|id| self.by_answer.contains(id)) {
            return true;
        }
        let Some(trace) = span.trace_id.as_deref() else { return false };
        let another = |attempt: &Attempt| {
            let answers = (&span.response_id, &attempt.route.response_id);
            matches!(answers, (Some(told), Some(metered)) if told != metered)
        };
        // The span itself called, or its caller did; a caller may have called more than once.
        let own = self.called_by(trace, span.span_id.as_ref());
        let siblings = self.called_by(trace, span.parent_span_id.as_ref());
        if own.iter().any(|attempt| !another(attempt))
            || siblings.iter().any(|attempt| plausible(span, &attempt.route, lasted(attempt)))
        {
            return true;
        }
        // A client that has a span of its own between (an HTTP library's): the same trace and time, and the same tokens
        // where both say them. Who streams without usage is metered by an estimate, and told by another one.
        let other_tokens = |attempt: &Attempt| {
            let counts = |usage: &TokenUsage| (usage.input_tokens(), usage.output_tokens());
            let known = [span.usage_quality, attempt.usage_quality] == [UsageQuality::Reported; 2];
            known && counts(&span.usage) != counts(&attempt.usage)
        };
        self.by_trace.get(trace).is_some_and(|attempts| {
            attempts.iter().any(|attempt| {
                let lasted = lasted(attempt);
                let around = widened(span.period);
                let inside = around.start <= lasted.start && lasted.end <= around.end;
                inside && !other_tokens(attempt) && plausible(span, &attempt.route, lasted)
            })
        })
    }
}

fn lasted(attempt: &Attempt) -> Period {
    Period { start: attempt.timeline.received_at, end: attempt.timeline.finished_at() }
}

/// What still runs: its own record will come.
struct Waiting<'a>(HashSet<&'a str>);

impl<'a> Waiting<'a> {
    fn of(running: &'a [Running]) -> Waiting<'a> {
        let keys = running.iter().flat_map(|one| [one.context.trace_id.as_deref(), one.route.response_id.as_deref()]);
        Waiting(keys.flatten().collect())
    }

    fn holds(&self, call: &[&CallSpan]) -> bool {
        let keys = call.iter().flat_map(|span| [span.trace_id.as_deref(), span.response_id.as_deref()]);
        keys.flatten().any(|key| self.0.contains(key))
    }
}

/// The attempt of a call that is told by these spans, the outermost first and the engine's last.
fn attempt(call: &[&CallSpan], pools: &HashMap<&str, &Label>) -> Attempt {
    let head = call.first().copied().expect("a call has at least one span");
    let engine = call.iter().rev().copied().find(|span| span.engine.is_some());
    let of_pool = engine.and_then(|span| Some((span.engine.as_ref()?, *pools.get(&**span.engine.as_ref()?)?)));
    // The engine's own clock places the work; without it the caller's time is all there is.
    let timed = engine.unwrap_or(head);
    let first = |of: fn(&CallSpan) -> Option<&Label>| call.iter().find_map(|span| of(span)).cloned();
    let usage = |quality| call.iter().find(|span| span.usage_quality == quality);
    let best = usage(UsageQuality::Reported).or_else(|| usage(UsageQuality::Estimated));
    let operation = call.iter().map(|span| span.operation).find(|operation| *operation != Operation::Other);
    let provider = first(|span| span.provider.as_ref()).unwrap_or_else(|| "unknown".into());
    let response_id = call.iter().filter_map(|span| span.response_id.as_ref()).min().cloned();
    let route = Route {
        operation: operation.unwrap_or_default(),
        provider: if of_pool.is_some() { "self_hosted".into() } else { provider.clone() },
        upstream: of_pool.map_or(provider, |(engine, _)| engine.clone()),
        pool: of_pool.map(|(_, pool)| pool.clone()),
        deployment: None,
        request_model: first(|span| span.request_model.as_ref()),
        response_model: first(|span| span.response_model.as_ref()),
        response_id,
        service_class: ServiceClass::default(),
        streamed: call.iter().any(|span| span.first_token_us.is_some()),
    };
    let number = 0;
    Attempt {
        id: AttemptId { request: request_id(head, route.response_id.as_ref()), number },
        source: Source::Span(
            first(|span| span.service.as_ref().or(span.engine.as_ref())).unwrap_or_else(|| "unknown".into()),
        ),
        context: context(call, head, engine),
        route,
        timeline: timeline(timed),
        outcome: if timed.failed { Outcome::UpstreamError } else { Outcome::Completed },
        status: None,
        usage: best.map(|span| span.usage).unwrap_or_default(),
        usage_quality: best.map_or(UsageQuality::Missing, |span| span.usage_quality),
        charge: Charge::Unpriced { reason: UnpricedReason::SelfHosted },
    }
}

fn timeline(span: &CallSpan) -> Timeline {
    let finished_us = span.period.micros();
    let in_engine = || Some(span.queue_us?.saturating_add(span.prefill_us?));
    let first_token_us = span.first_token_us.or_else(in_engine).map(|us| us.min(finished_us));
    Timeline {
        received_at: span.period.start,
        sent_us: Some(0),
        first_token_us,
        last_token_us: first_token_us.map(|_| finished_us),
        queued_us: span.queue_us,
        finished_us,
        ..Timeline::default()
    }
}

/// Who called, from the outermost span that says it. The calling span is the application's own, or the one that the engine
/// names as its parent, so that whichever of them is told later is found to be booked.
fn context(call: &[&CallSpan], head: &CallSpan, engine: Option<&CallSpan>) -> Context {
    let mut context = head.context.clone();
    for other in &call[1..] {
        let Context { consumer, key_id, application, team, cost_centre, customer, feature, session, task, .. } =
            other.context.clone();
        context.consumer = context.consumer.or(consumer);
        context.key_id = context.key_id.or(key_id);
        context.application = context.application.or(application);
        context.team = context.team.or(team);
        context.cost_centre = context.cost_centre.or(cost_centre);
        context.customer = context.customer.or(customer);
        context.feature = context.feature.or(feature);
        context.session = context.session.or(session);
        context.task = context.task.or(task);
        context.environment = context.environment.or_else(|| other.context.environment.clone());
        for (name, value) in &other.context.tags {
            context.tags.entry(name.clone()).or_insert_with(|| value.clone());
        }
    }
    let told_by_engine = engine.is_some_and(|engine| std::ptr::eq(engine, head));
    let own =
        if told_by_engine { head.parent_span_id.as_ref().or(head.span_id.as_ref()) } else { head.span_id.as_ref() };
    context.trace_id = head.trace_id.clone().or(context.trace_id);
    context.span_id = own.cloned().or(context.span_id);
    context
}

/// An id that follows from the answer's id, else from trace and span, else from all that was told.
fn request_id(head: &CallSpan, response_id: Option<&Label>) -> RequestId {
    let key = match (response_id, &head.trace_id, &head.span_id) {
        (Some(answer), _, _) => format!("answer {answer}"),
        (None, Some(trace), Some(span)) => format!("span {trace} {span}"),
        _ => format!("told {:?} {:?}", head.service, told_when(head)),
    };
    let mut random = [0; 10];
    random.copy_from_slice(&hash(key.bytes()).to_be_bytes()[6..]);
    RequestId::new(head.period.start, random)
}

#[cfg(test)]
#[path = "calls_tests.rs"]
mod tests;
