//! Finding what an engine told of an attempt: by the answer's id, else by the trace.

use std::collections::HashMap;

use crate::attempt::Route;
use crate::context::{Context, Label};
use crate::telemetry::CallSpan;
use crate::time::Period;

/// How far the clocks of who tells a span and of the gateway may be apart.
pub(super) const CLOCKS_US: i64 = 2_000_000;

/// Spans with an engine's own times in them, by what they can be found with.
#[derive(Default)]
pub(super) struct EngineSpans<'a> {
    by_response: HashMap<&'a str, &'a CallSpan>,
    by_caller: HashMap<(&'a str, &'a str), Vec<&'a CallSpan>>,
}

impl<'a> EngineSpans<'a> {
    pub(super) fn of(spans: &'a [CallSpan]) -> EngineSpans<'a> {
        let mut found = EngineSpans::default();
        for span in spans.iter().filter(|span| has_times(span)) {
            if let Some(id) = &span.response_id {
                let best = found.by_response.entry(id).or_insert(span);
                if rank(span) > rank(best) {
                    *best = span;
                }
            }
            if let (Some(trace), Some(parent)) = (&span.trace_id, &span.parent_span_id) {
                found.by_caller.entry((trace, parent)).or_default().push(span);
            }
        }
        found
    }

    /// What an engine told of the attempt with this route, context and time.
    pub(super) fn find(&self, route: &Route, context: &Context, period: Period) -> Option<&'a CallSpan> {
        if let Some(span) = route.response_id.as_deref().and_then(|id| self.by_response.get(id)) {
            return Some(span);
        }
        let called = (context.trace_id.as_deref()?, context.span_id.as_deref()?);
        self.by_caller
            .get(&called)?
            .iter()
            .filter(|span| plausible(span, route, period))
            .max_by(|a, b| rank(a).cmp(&rank(b)))
            .copied()
    }
}

fn has_times(span: &CallSpan) -> bool {
    span.queue_us.is_some() || span.prefill_us.is_some() || span.decode_us.is_some()
}

/// Prefers the span that says more, then the later one.
fn rank(span: &CallSpan) -> impl Ord + '_ {
    let said = [span.queue_us, span.first_token_us, span.prefill_us, span.decode_us].into_iter().flatten().count();
    (said, span.observed_at, span.period.end, span.period.start, span.span_id.as_deref(), span.service.as_deref())
}

/// Whether a span of the same caller can speak of this attempt: no other answer, no other model, the same time.
pub(super) fn plausible(span: &CallSpan, route: &Route, period: Period) -> bool {
    let another_answer = matches!((&span.response_id, &route.response_id), (Some(a), Some(b)) if a != b);
    let told: Vec<&Label> = [&span.response_model, &span.request_model].into_iter().flatten().collect();
    let known: Vec<&Label> = [&route.response_model, &route.request_model].into_iter().flatten().collect();
    let another_model = !told.is_empty() && !known.is_empty() && !told.iter().any(|model| known.contains(model));
    !another_answer && !another_model && widened(span.period).intersect(widened(period)).is_some()
}

/// A period with the clocks' difference at its ends, never empty.
pub(super) fn widened(period: Period) -> Period {
    Period { start: period.start.plus_micros(-CLOCKS_US), end: period.end.max(period.start).plus_micros(CLOCKS_US) }
}
