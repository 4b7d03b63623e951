//! From spans to model calls: which spans are one, and what each says in the ledger's words.

use ledger::{CallSpan, Context, Label, Operation, Period, Timestamp};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;

use super::names::{self, Attributes};
use super::usage::usage;

/// Most tags of one span that are kept.
const TAGS_MAX: usize = 16;

/// What a request of an exporter contained.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// The model calls.
    pub calls: Vec<CallSpan>,
    /// Spans of anything else: agents, tools, databases, web requests.
    pub ignored: u64,
    /// Model calls of which it is unknown when they began, or that nothing tells from one another.
    pub rejected: u64,
}

/// Reads all spans of a request. Nothing in it can make this fail; what makes no sense is left out or unknown.
#[must_use]
pub fn read(request: ExportTraceServiceRequest, observed_at: Timestamp) -> Found {
    let mut found = Found::default();
    for group in &request.resource_spans {
        let resource = group.resource.as_ref().map(|resource| resource.attributes.as_slice()).unwrap_or_default();
        let resource = Resource::new(Attributes::new(resource));
        for span in group.scope_spans.iter().flat_map(|scope| &scope.spans) {
            let attributes = Attributes::new(&span.attributes);
            let Some(kind) = kind(span, &attributes) else {
                found.ignored += 1;
                continue;
            };
            match call(span, kind, &attributes, &resource, observed_at) {
                Some(call) => found.calls.push(call),
                None => found.rejected += 1,
            }
        }
    }
    found
}

/// What all spans of a service share, looked at once: a sender may give it as many attributes as spans.
struct Resource<'a> {
    attributes: Attributes<'a>,
    tags: Vec<(Label, Label)>,
}

impl<'a> Resource<'a> {
    fn new(attributes: Attributes<'a>) -> Resource<'a> {
        let mut tags = free_tags(&attributes);
        // The span's own tags come first and hide at most as many of these as are kept.
        tags.truncate(2 * TAGS_MAX);
        Resource { attributes, tags }
    }
}

/// Tags under names of their own. A map of attributes has no order; which of them are kept must not depend on that.
fn free_tags(attributes: &Attributes<'_>) -> Vec<(Label, Label)> {
    let mut tags: Vec<(Label, Label)> = attributes.starting_with(names::TAG_PREFIX).collect();
    tags.sort();
    tags
}

/// Who tells of a model call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// The engine that ran it.
    Engine,
    /// The application that called, or a library in it.
    Caller(Operation),
}

/// Whether a span is one model call, rather than something around calls whose usage would count them twice.
fn kind(span: &Span, attributes: &Attributes<'_>) -> Option<Kind> {
    if attributes.has(names::ENGINE_REQUEST_ID) || attributes.has(names::QUEUE) {
        return Some(Kind::Engine);
    }
    if let Some(kind) = attributes.word(names::OPENINFERENCE_KIND) {
        return match kind {
            "LLM" => Some(Kind::Caller(said_operation(attributes).unwrap_or(Operation::Chat))),
            "EMBEDDING" => Some(Kind::Caller(Operation::Embeddings)),
            _ => None,
        };
    }
    if let Some(operation) = said_operation(attributes) {
        return Some(Kind::Caller(operation));
    }
    let says_other = attributes.word(names::OPERATION).is_some_and(is_around_calls);
    if says_other || attributes.has(names::TRACELOOP_KIND) {
        return None;
    }
    // Neither the conventions' word nor a reason against it: a call names its model and is a client's, or counts tokens.
    let names_model = attributes.has(names::REQUEST_MODEL) || attributes.has(names::RESPONSE_MODEL);
    let counts = attributes.has(names::INPUT) || attributes.has(names::OUTPUT) || attributes.has(names::RESPONSE_ID);
    (names_model && (counts || span.kind() == SpanKind::Client)).then_some(Kind::Caller(Operation::Other))
}

fn said_operation(attributes: &Attributes<'_>) -> Option<Operation> {
    match attributes.word(names::OPERATION)?.to_ascii_lowercase().as_str() {
        "chat" => Some(Operation::Chat),
        "text_completion" | "completion" | "completions" => Some(Operation::Completions),
        "generate_content" => Some(Operation::Generate),
        "embeddings" | "embedding" => Some(Operation::Embeddings),
        "responses" => Some(Operation::Responses),
        "messages" => Some(Operation::Messages),
        _ => None,
    }
}

/// Operations of the conventions that are no call of a model, though they may add up the usage of some.
fn is_around_calls(operation: &str) -> bool {
    matches!(operation, "create_agent" | "invoke_agent" | "invoke_workflow" | "execute_tool" | "retrieval" | "plan")
        || operation.contains("memory")
        || operation.contains("agent")
}

fn call(
    span: &Span,
    kind: Kind,
    attributes: &Attributes<'_>,
    resource: &Resource<'_>,
    observed_at: Timestamp,
) -> Option<CallSpan> {
    let trace_id = id(&span.trace_id, 16);
    let span_id = id(&span.span_id, 8);
    let response_id = attributes
        .word(names::RESPONSE_ID)
        .or_else(|| attributes.word(names::ENGINE_REQUEST_ID).map(answer_of))
        .and_then(names::label);
    let identified = response_id.is_some() || (trace_id.is_some() && span_id.is_some());
    let period = period(span)?;
    if !identified {
        return None;
    }
    let service = resource.attributes.label(names::SERVICE);
    let operation = match kind {
        Kind::Caller(operation) => operation,
        Kind::Engine => engine_operation(response_id.as_deref()),
    };
    let mut context = context(attributes, resource);
    (context.trace_id, context.span_id) = (trace_id.clone(), span_id.clone());
    let (engine, provider) = match kind {
        Kind::Engine => {
            (resource.attributes.label(names::ENGINE).or_else(|| service.clone()), Some("self_hosted".into()))
        }
        Kind::Caller(_) => (None, attributes.word(names::PROVIDER).and_then(names::provider)),
    };
    if kind != Kind::Engine && context.application.is_none() {
        context.application.clone_from(&service);
    }
    let (usage, usage_quality) = usage(attributes, operation);
    Some(CallSpan {
        trace_id,
        span_id,
        parent_span_id: id(&span.parent_span_id, 8),
        service,
        engine,
        operation,
        provider,
        request_model: attributes.label(names::REQUEST_MODEL),
        response_model: attributes.label(names::RESPONSE_MODEL),
        response_id,
        period,
        usage,
        usage_quality,
        queue_us: attributes.micros(names::QUEUE),
        first_token_us: attributes.micros(names::FIRST_TOKEN),
        prefill_us: attributes.micros(names::PREFILL),
        decode_us: attributes.micros(names::DECODE),
        failed: span.status.as_ref().is_some_and(|status| status.code() == StatusCode::Error)
            || attributes.has(names::ERROR),
        context,
        observed_at,
    })
}

/// An id of `bytes` bytes in hex. One of another length, or of zeroes, is none.
fn id(raw: &[u8], bytes: usize) -> Option<Label> {
    let valid = raw.len() == bytes && raw.iter().any(|&byte| byte != 0);
    valid.then(|| raw.iter().map(|byte| format!("{byte:02x}")).collect::<String>().into())
}

/// From start to end. A span that has no end yet, or one before its start, is as long as nothing.
fn period(span: &Span) -> Option<Period> {
    let at = |nanos: u64| i64::try_from(nanos / 1_000).ok().map(Timestamp::from_micros);
    let start = at(span.start_time_unix_nano).filter(|start| start.micros() > 0)?;
    Some(Period { start, end: at(span.end_time_unix_nano)?.max(start) })
}

/// The id of the answer that an engine's request belongs to: vLLM numbers the prompts of a text completion, and the
/// rounds of a response or of several prompts, behind it.
fn answer_of(request: &str) -> &str {
    let numbered = |separator| {
        let (answer, number) = request.rsplit_once(separator)?;
        (!number.is_empty() && number.len() < 6 && number.bytes().all(|byte| byte.is_ascii_digit())).then_some(answer)
    };
    let answer = if request.starts_with("cmpl-") {
        // `cmpl-1` alone is a whole id; only a second hyphen starts a number.
        numbered('-').filter(|answer| answer.len() > "cmpl".len())
    } else if request.starts_with("chatcmpl-") || request.starts_with("resp_") {
        numbered('_').filter(|answer| answer.len() > "resp".len())
    } else {
        None
    };
    answer.unwrap_or(request)
}

/// What was asked of an engine, by the form of its answer's id. Anthropic's messages look like chat here.
fn engine_operation(response_id: Option<&str>) -> Operation {
    let starts = |prefix| response_id.is_some_and(|id| id.starts_with(prefix));
    match () {
        () if starts("chatcmpl-") => Operation::Chat,
        () if starts("cmpl-") => Operation::Completions,
        () if starts("resp_") => Operation::Responses,
        () if starts("embd-") => Operation::Embeddings,
        () => Operation::Other,
    }
}

/// Who caused the call: the span's own word, else that of the service that told it.
fn context(attributes: &Attributes<'_>, resource: &Resource<'_>) -> Context {
    let of = |names| attributes.label(names).or_else(|| resource.attributes.label(names));
    let mut context = Context {
        consumer: of(names::CONSUMER),
        key_id: None,
        application: of(names::APPLICATION),
        team: of(names::TEAM),
        cost_centre: of(names::COST_CENTRE),
        customer: of(names::CUSTOMER),
        feature: of(names::FEATURE),
        session: of(names::SESSION),
        task: of(names::TASK),
        environment: of(names::ENVIRONMENT),
        ..Context::default()
    };
    let named = names::TAGS.iter().filter_map(|&(tag, names)| Some((Label::from(tag), of(names)?)));
    context.tags.extend(named);
    let own = free_tags(attributes);
    for (tag, value) in own.into_iter().chain(resource.tags.iter().cloned()) {
        if context.tags.len() < TAGS_MAX {
            context.tags.entry(tag).or_insert(value);
        }
    }
    context
}

#[cfg(test)]
#[path = "spans_tests.rs"]
mod tests;
