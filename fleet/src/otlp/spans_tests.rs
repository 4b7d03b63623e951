use ledger::{TokenUsage, UsageQuality};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, ArrayValue, KeyValue, KeyValueList};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Status};
use proptest::prelude::*;

use super::*;

const NOW: Timestamp = Timestamp::from_micros(9_000_000);

enum V {
    S(&'static str),
    I(i64),
    D(f64),
}
use V::{D, I, S};

fn pair(name: &str, value: Value) -> KeyValue {
    KeyValue { key: name.to_owned(), value: Some(AnyValue { value: Some(value) }), ..KeyValue::default() }
}

fn pairs(attributes: &[(&str, V)]) -> Vec<KeyValue> {
    let value = |value: &V| match value {
        S(text) => Value::StringValue((*text).to_owned()),
        I(number) => Value::IntValue(*number),
        D(number) => Value::DoubleValue(*number),
    };
    attributes.iter().map(|(name, given)| pair(name, value(given))).collect()
}

fn span(attributes: Vec<KeyValue>) -> Span {
    Span {
        trace_id: vec![0x4b; 16],
        span_id: vec![0x0a; 8],
        parent_span_id: vec![0x0b; 8],
        start_time_unix_nano: 5_000_000_999,
        end_time_unix_nano: 6_500_000_000,
        attributes,
        ..Span::default()
    }
}

fn request(resource: &[(&str, V)], spans: Vec<Span>) -> ExportTraceServiceRequest {
    let resource = Some(Resource { attributes: pairs(resource), ..Resource::default() });
    let scope_spans = vec![ScopeSpans { spans, ..ScopeSpans::default() }];
    ExportTraceServiceRequest {
        resource_spans: vec![ResourceSpans { resource, scope_spans, ..ResourceSpans::default() }],
    }
}

fn found(attributes: &[(&str, V)]) -> Found {
    read(request(&[("service.name", S("bot"))], vec![span(pairs(attributes))]), NOW)
}

#[track_caller]
fn one(attributes: &[(&str, V)]) -> CallSpan {
    let [call] = found(attributes).calls.try_into().expect("one model call");
    call
}

fn tokens(kinds: [u64; 5]) -> TokenUsage {
    let [input, cache_read, cache_write_5m, output, reasoning] = kinds;
    TokenUsage { input, cache_read, cache_write_5m, output, reasoning, ..TokenUsage::default() }
}

/// Its name, a span in it, and the tokens of that: input, cache read, cache write, output, reasoning.
type Vocabulary = (&'static str, &'static [(&'static str, V)], [u64; 5]);

#[test]
fn every_vocabulary_is_read() {
    let cases: [Vocabulary; 6] = [
        (
            "OpenTelemetry",
            &[
                ("gen_ai.operation.name", S("chat")),
                ("gen_ai.provider.name", S("openai")),
                ("gen_ai.request.model", S("gpt-x")),
                ("gen_ai.response.model", S("gpt-x-0801")),
                ("gen_ai.response.id", S("chatcmpl-1")),
                ("gen_ai.usage.input_tokens", I(2_006)),
                ("gen_ai.usage.output_tokens", I(300)),
                ("gen_ai.usage.cache_read.input_tokens", I(1_920)),
                ("gen_ai.usage.cache_creation.input_tokens", I(6)),
                ("gen_ai.usage.reasoning.output_tokens", I(192)),
            ],
            [80, 1_920, 6, 108, 192],
        ),
        (
            "OpenTelemetry's former names",
            &[
                ("gen_ai.operation.name", S("chat")),
                ("gen_ai.system", S("openai")),
                ("gen_ai.request.model", S("gpt-x")),
                ("gen_ai.response.model", S("gpt-x-0801")),
                ("gen_ai.response.id", S("chatcmpl-1")),
                ("gen_ai.usage.prompt_tokens", I(12)),
                ("gen_ai.usage.completion_tokens", I(3)),
            ],
            [12, 0, 0, 3, 0],
        ),
        (
            "OpenInference",
            &[
                ("openinference.span.kind", S("LLM")),
                ("llm.provider", S("openai")),
                ("llm.model_name", S("gpt-x")),
                ("gen_ai.response.model", S("gpt-x-0801")),
                ("gen_ai.response.id", S("chatcmpl-1")),
                ("llm.token_count.prompt", I(100)),
                ("llm.token_count.completion", I(20)),
                ("llm.token_count.total", I(120)),
                ("llm.token_count.prompt_details.cache_read", I(64)),
                ("llm.token_count.completion_details.reasoning", I(15)),
            ],
            [36, 64, 0, 5, 15],
        ),
        (
            "OpenLLMetry, which says the total and one side",
            &[
                ("llm.request.type", S("chat")),
                ("gen_ai.system", S("OpenAI")),
                ("gen_ai.request.model", S("gpt-x")),
                ("gen_ai.response.model", S("gpt-x-0801")),
                ("gen_ai.response.id", S("chatcmpl-1")),
                ("gen_ai.usage.prompt_tokens", I(90)),
                ("llm.usage.total_tokens", I(100)),
                ("gen_ai.usage.cache_read_input_tokens", I(40)),
                ("llm.usage.reasoning_tokens", I(4)),
            ],
            [50, 40, 0, 6, 4],
        ),
        (
            "numbers as text and as floats",
            &[
                ("gen_ai.operation.name", S("chat")),
                ("gen_ai.system", S("openai")),
                ("gen_ai.request.model", S("gpt-x")),
                ("gen_ai.response.model", S("gpt-x-0801")),
                ("gen_ai.response.id", S("chatcmpl-1")),
                ("gen_ai.usage.input_tokens", S("12")),
                ("gen_ai.usage.output_tokens", D(3.0)),
            ],
            [12, 0, 0, 3, 0],
        ),
        (
            "no operation, but a model and counts",
            &[
                ("gen_ai.system", S("openai")),
                ("gen_ai.request.model", S("gpt-x")),
                ("gen_ai.response.model", S("gpt-x-0801")),
                ("gen_ai.response.id", S("chatcmpl-1")),
                ("gen_ai.usage.input_tokens", I(1)),
                ("gen_ai.usage.output_tokens", I(0)),
            ],
            [1, 0, 0, 0, 0],
        ),
    ];
    for (name, attributes, kinds) in cases {
        let call = one(attributes);
        assert_eq!((call.usage, call.usage_quality), (tokens(kinds), UsageQuality::Reported), "{name}");
        assert_eq!(call.provider.as_deref(), Some("openai"), "{name}");
        assert_eq!(call.request_model.as_deref(), Some("gpt-x"), "{name}");
        assert_eq!(call.response_model.as_deref(), Some("gpt-x-0801"), "{name}");
        assert_eq!(call.response_id.as_deref(), Some("chatcmpl-1"), "{name}");
        assert_eq!((call.service.as_deref(), call.engine, call.failed), (Some("bot"), None, false), "{name}");
    }
}

#[test]
fn a_span_of_vllm_is_the_engines_word_on_one_request() {
    let attributes = [
        ("gen_ai.latency.time_to_first_token", D(0.125)),
        ("gen_ai.latency.e2e", D(1.5)),
        ("gen_ai.latency.time_in_queue", D(0.01)),
        ("gen_ai.usage.prompt_tokens", I(1_103)),
        ("gen_ai.usage.completion_tokens", I(40)),
        ("gen_ai.latency.time_in_model_prefill", D(0.1)),
        ("gen_ai.latency.time_in_model_decode", D(1.25)),
        ("gen_ai.latency.time_in_model_inference", D(1.35)),
        ("gen_ai.request.id", S("chatcmpl-9a")),
        ("gen_ai.request.temperature", D(0.5)),
    ];
    let resource = [("service.name", S("vllm")), ("farthing.engine", S("shared-0"))];
    let spans = vec![span(pairs(&attributes))];
    let [call] = read(request(&resource, spans), NOW).calls.try_into().unwrap();
    assert_eq!((call.engine.as_deref(), call.service.as_deref()), (Some("shared-0"), Some("vllm")));
    assert_eq!((call.provider.as_deref(), call.operation), (Some("self_hosted"), Operation::Chat));
    assert_eq!(call.response_id.as_deref(), Some("chatcmpl-9a"));
    assert_eq!((call.queue_us, call.first_token_us), (Some(10_000), Some(125_000)));
    assert_eq!((call.prefill_us, call.decode_us), (Some(100_000), Some(1_250_000)));
    assert_eq!((call.usage, call.usage_quality), (tokens([1_103, 0, 0, 40, 0]), UsageQuality::Reported));
    let period = Period { start: Timestamp::from_micros(5_000_000), end: Timestamp::from_micros(6_500_000) };
    assert_eq!((call.period, call.observed_at), (period, NOW));
    assert_eq!(call.trace_id.as_deref(), Some("4b4b4b4b4b4b4b4b4b4b4b4b4b4b4b4b"));
    assert_eq!(call.span_id.as_deref(), Some("0a0a0a0a0a0a0a0a"));
    assert_eq!(call.parent_span_id.as_deref(), Some("0b0b0b0b0b0b0b0b"));
    assert_eq!((call.context.trace_id, call.context.application), (call.trace_id, None));
    let unnamed = one(&attributes);
    assert_eq!(unnamed.engine.as_deref(), Some("bot"), "its service is the next best name");
}

#[test]
fn a_time_that_makes_no_sense_is_unknown() {
    let call = one(&[
        ("gen_ai.request.id", S("cmpl-1")),
        ("gen_ai.latency.time_in_queue", D(-3.5)),
        ("gen_ai.latency.time_to_first_token", D(f64::NAN)),
        ("gen_ai.latency.time_in_model_decode", D(f64::INFINITY)),
        ("gen_ai.latency.time_in_model_prefill", S("soon")),
    ]);
    assert_eq!((call.queue_us, call.first_token_us, call.prefill_us, call.decode_us), (None, None, None, None));
    assert_eq!(call.usage_quality, UsageQuality::Missing);
}

#[test]
fn an_engines_request_is_joined_by_the_id_of_its_answer() {
    for (request, answer) in [
        ("cmpl-6f0c-0", "cmpl-6f0c"),
        ("cmpl-6f0c-12", "cmpl-6f0c"),
        ("cmpl-6f0c", "cmpl-6f0c"),
        ("cmpl-123", "cmpl-123"),
        ("cmpl-abc-123456789", "cmpl-abc-123456789"),
        ("chatcmpl-6f0c", "chatcmpl-6f0c"),
        ("chatcmpl-6f0c_1", "chatcmpl-6f0c"),
        ("resp_6f0c_0", "resp_6f0c"),
        ("resp_60", "resp_60"),
        ("other-1", "other-1"),
        ("", ""),
    ] {
        assert_eq!(answer_of(request), answer);
    }
}

#[test]
fn spans_that_are_no_model_call_are_counted_and_left() {
    let usage =
        |name, value| vec![(name, value), ("gen_ai.request.model", S("m")), ("gen_ai.usage.input_tokens", I(9))];
    for attributes in [
        vec![("http.request.method", S("POST"))],
        vec![],
        vec![("db.system", S("qdrant")), ("db.vector.query.top_k", I(3))],
        usage("gen_ai.operation.name", S("invoke_agent")),
        usage("gen_ai.operation.name", S("execute_tool")),
        usage("gen_ai.operation.name", S("create_agent")),
        usage("gen_ai.operation.name", S("upsert_memory")),
        usage("openinference.span.kind", S("CHAIN")),
        usage("openinference.span.kind", S("AGENT")),
        usage("openinference.span.kind", S("TOOL")),
        usage("traceloop.span.kind", S("workflow")),
        vec![("gen_ai.usage.input_tokens", I(9)), ("gen_ai.agent.name", S("sum of its calls"))],
    ] {
        let found = found(&attributes);
        assert_eq!((found.calls.len(), found.ignored, found.rejected), (0, 1, 0));
    }
    assert_eq!(one(&usage("openinference.span.kind", S("EMBEDDING"))).operation, Operation::Embeddings);
    assert_eq!(one(&usage("gen_ai.operation.name", S("transcribe"))).operation, Operation::Other, "a word of its own");
}

/// Counts by name, the tokens they mean, and why.
type Parts = (&'static [(&'static str, i64)], [u64; 5], &'static str);

#[test]
fn parts_are_disjoint_also_where_they_are_counted_apart() {
    let count = |counts: &[(&'static str, i64)]| {
        let mut attributes = vec![("gen_ai.operation.name", S("chat"))];
        attributes.extend(counts.iter().map(|&(name, tokens)| (name, I(tokens))));
        one(&attributes).usage
    };
    const INPUT: &str = "gen_ai.usage.input_tokens";
    const OUTPUT: &str = "gen_ai.usage.output_tokens";
    const TOTAL: &str = "gen_ai.usage.total_tokens";
    const READ: &str = "gen_ai.usage.cache_read.input_tokens";
    const WRITE: &str = "gen_ai.usage.cache_write.input_tokens";
    const THOUGHT: &str = "gen_ai.usage.reasoning_tokens";
    let cases: [Parts; 7] = [
        (&[(INPUT, 100), (OUTPUT, 10), (READ, 60), (WRITE, 30)], [10, 60, 30, 10, 0], "included, as the rule is"),
        (&[(INPUT, 10), (OUTPUT, 10), (READ, 60), (WRITE, 30)], [10, 60, 30, 10, 0], "too large to be included"),
        (&[(INPUT, 100), (OUTPUT, 10), (READ, 60), (TOTAL, 170)], [100, 60, 0, 10, 0], "the total says apart"),
        (&[(INPUT, 100), (OUTPUT, 10), (READ, 60), (TOTAL, 110)], [40, 60, 0, 10, 0], "the total says included"),
        (&[(INPUT, 5), (OUTPUT, 10), (THOUGHT, 40)], [5, 0, 0, 10, 40], "more thought than said"),
        (&[(INPUT, 5), (OUTPUT, 50), (THOUGHT, 40), (TOTAL, 95)], [5, 0, 0, 50, 40], "thought apart by the total"),
        (&[(INPUT, 5), (OUTPUT, 50), (THOUGHT, 40), (TOTAL, 3)], [5, 0, 0, 10, 40], "a total of nothing helps not"),
    ];
    for (counts, kinds, why) in cases {
        assert_eq!(count(counts), tokens(kinds), "{why}");
    }
    let audio = count(&[
        (INPUT, 100),
        (OUTPUT, 30),
        ("gen_ai.usage.audio.input_tokens", 20),
        ("gen_ai.usage.audio.output_tokens", 25),
    ]);
    assert_eq!((audio.input, audio.input_audio, audio.output, audio.output_audio), (80, 20, 5, 25));
}

#[test]
fn unknown_usage_is_missing_and_zero_is_zero() {
    let quality = |counts: &[(&'static str, V)], operation| {
        let mut attributes = vec![("gen_ai.operation.name", S(operation))];
        attributes.extend(counts.iter().map(|(name, value)| {
            (
                *name,
                match value {
                    S(text) => S(text),
                    I(number) => I(*number),
                    D(number) => D(*number),
                },
            )
        }));
        let call = one(&attributes);
        (call.usage_quality, call.usage.input_tokens(), call.usage.output_tokens())
    };
    assert_eq!(quality(&[], "chat"), (UsageQuality::Missing, 0, 0));
    assert_eq!(quality(&[("gen_ai.usage.input_tokens", I(-1))], "chat"), (UsageQuality::Missing, 0, 0));
    assert_eq!(quality(&[("gen_ai.usage.total_tokens", I(9))], "chat"), (UsageQuality::Missing, 0, 0), "which side?");
    assert_eq!(quality(&[("gen_ai.usage.input_tokens", I(9))], "chat"), (UsageQuality::Estimated, 9, 0), "at least");
    let nothing = [("gen_ai.usage.input_tokens", I(0)), ("gen_ai.usage.output_tokens", I(0))];
    assert_eq!(quality(&nothing, "chat"), (UsageQuality::Reported, 0, 0));
    assert_eq!(quality(&[("gen_ai.usage.input_tokens", I(9))], "embeddings"), (UsageQuality::Reported, 9, 0));
    assert_eq!(quality(&[("llm.token_count.total", I(9))], "embeddings"), (UsageQuality::Reported, 9, 0));
}

#[test]
fn who_caused_it_comes_from_the_span_then_from_its_service() {
    let attributes = [
        ("gen_ai.operation.name", S("chat")),
        ("gen_ai.conversation.id", S("conv-1")),
        ("gen_ai.agent.name", S("Math Tutor")),
        ("enduser.id", I(77)),
        ("user.id", S("not this one")),
        ("farthing.feature", S("summary")),
        ("farthing.team", S("  search\u{1b}[31m ")),
        ("farthing.tag.region", S("eu")),
        ("farthing.tag.agent", S("the convention's name wins")),
    ];
    let resource = [
        ("service.name", S("bot")),
        ("deployment.environment.name", S("staging")),
        ("farthing.team", S("platform")),
        ("farthing.cost_centre", S("4711")),
        ("farthing.tag.region", S("us")),
        ("farthing.tag.tier", S("gold")),
    ];
    let [call] = read(request(&resource, vec![span(pairs(&attributes))]), NOW).calls.try_into().unwrap();
    let context = call.context;
    assert_eq!(context.session.as_deref(), Some("conv-1"));
    assert_eq!(context.customer.as_deref(), Some("77"));
    assert_eq!(context.feature.as_deref(), Some("summary"));
    assert_eq!(context.team.as_deref(), Some("search [31m"));
    assert_eq!(context.cost_centre.as_deref(), Some("4711"));
    assert_eq!(context.application.as_deref(), Some("bot"), "a service is an application unless it says otherwise");
    assert_eq!(context.environment.as_deref(), Some("staging"));
    let tags: Vec<_> = context.tags.iter().map(|(name, value)| format!("{name}={value}")).collect();
    assert_eq!(tags, ["agent=Math Tutor", "region=eu", "tier=gold"]);
}

#[test]
fn labels_are_cut_and_tags_bounded() {
    let long = "é".repeat(400);
    let mut attributes = pairs(&[("gen_ai.operation.name", S("chat"))]);
    attributes.push(pair("gen_ai.conversation.id", Value::StringValue(long)));
    for number in 0..100 {
        attributes.push(pair(&format!("farthing.tag.{number:03}"), Value::StringValue("v".into())));
    }
    let [call] = read(request(&[], vec![span(attributes)]), NOW).calls.try_into().unwrap();
    assert_eq!(call.context.session.map(|text| text.len()), Some(256));
    let kept: Vec<_> = call.context.tags.keys().map(|name| &**name).collect();
    assert_eq!((kept.len(), kept[0], kept[15]), (TAGS_MAX, "000", "015"), "always the same ones");
}

#[test]
fn prompts_and_answers_are_never_kept() {
    const SECRET: &str = "the patient's name is";
    let mut attributes = pairs(&[("gen_ai.operation.name", S("chat")), ("gen_ai.request.model", S("m"))]);
    let nested = Value::ArrayValue(ArrayValue {
        values: vec![AnyValue {
            value: Some(Value::KvlistValue(KeyValueList {
                values: vec![pair("content", Value::StringValue(SECRET.into()))],
            })),
        }],
    });
    for name in [
        "gen_ai.input.messages",
        "gen_ai.output.messages",
        "gen_ai.system_instructions",
        "gen_ai.prompt",
        "gen_ai.completion",
        "gen_ai.prompt.0.content",
        "gen_ai.completion.0.content",
        "gen_ai.tool.call.arguments",
        "gen_ai.tool.call.result",
        "gen_ai.tool.definitions",
        "gen_ai.retrieval.query.text",
        "input.value",
        "output.value",
        "llm.input_messages.0.message.content",
        "llm.output_messages.0.message.content",
        "llm.prompts",
        "llm.invocation_parameters",
        "llm.prompt_template.template",
        "embedding.embeddings.0.embedding.text",
        "traceloop.entity.input",
        "traceloop.entity.output",
        "metadata",
    ] {
        attributes.push(pair(name, Value::StringValue(SECRET.into())));
        attributes.push(pair(name, nested.clone()));
    }
    // Where a name is expected, a structure is none.
    attributes.push(pair("gen_ai.conversation.id", nested));
    let mut told = span(attributes);
    told.name = SECRET.to_owned();
    told.status = Some(Status { message: SECRET.to_owned(), code: 2 });
    told.events.push(opentelemetry_proto::tonic::trace::v1::span::Event {
        name: SECRET.to_owned(),
        attributes: vec![pair("gen_ai.prompt", Value::StringValue(SECRET.into()))],
        ..Default::default()
    });
    let [call] = read(request(&[("process.command_line", S(SECRET))], vec![told]), NOW).calls.try_into().unwrap();
    assert!(call.failed);
    assert!(!serde_json::to_string(&call).unwrap().contains("patient"));
}

#[test]
fn a_call_without_a_time_or_a_name_is_rejected() {
    let attributes = || pairs(&[("gen_ai.operation.name", S("chat"))]);
    let nameless = Span { span_id: vec![0; 8], ..span(attributes()) };
    let misnamed = Span { trace_id: vec![1; 3], ..span(attributes()) };
    let timeless = Span { start_time_unix_nano: 0, ..span(attributes()) };
    let rejected = read(request(&[], vec![nameless, misnamed, timeless]), NOW);
    assert_eq!((rejected.calls.len(), rejected.ignored, rejected.rejected), (0, 0, 3));
    let by_answer = pairs(&[("gen_ai.operation.name", S("chat")), ("gen_ai.response.id", S("r1"))]);
    let known = Span { trace_id: vec![], parent_span_id: vec![], end_time_unix_nano: 0, ..span(by_answer) };
    let [call] = read(request(&[], vec![known]), NOW).calls.try_into().unwrap();
    assert_eq!((call.trace_id, call.parent_span_id, call.response_id.as_deref()), (None, None, Some("r1")));
    assert_eq!(call.period.start, call.period.end, "an end before the start is none");
}

#[test]
fn an_error_is_seen_by_status_or_type() {
    assert!(one(&[("gen_ai.operation.name", S("chat")), ("error.type", S("timeout"))]).failed);
    let attributes = pairs(&[("gen_ai.operation.name", S("chat"))]);
    let fine = Span { status: Some(Status { code: 1, ..Status::default() }), ..span(attributes) };
    assert!(!read(request(&[], vec![fine]), NOW).calls[0].failed);
}

/// Every name that is read, so that the property below meets them all.
fn known_names() -> Vec<&'static str> {
    let lists = [
        names::OPERATION,
        names::OPENINFERENCE_KIND,
        names::TRACELOOP_KIND,
        names::PROVIDER,
        names::REQUEST_MODEL,
        names::RESPONSE_MODEL,
        names::RESPONSE_ID,
        names::ENGINE_REQUEST_ID,
        names::ERROR,
        names::INPUT,
        names::OUTPUT,
        names::TOTAL,
        names::CACHE_READ,
        names::CACHE_WRITE,
        names::REASONING,
        names::AUDIO_INPUT,
        names::AUDIO_CACHE_READ,
        names::IMAGE_INPUT,
        names::AUDIO_OUTPUT,
        names::IMAGE_OUTPUT,
        names::QUEUE,
        names::FIRST_TOKEN,
        names::PREFILL,
        names::DECODE,
        names::SESSION,
        names::CUSTOMER,
        names::ENVIRONMENT,
    ];
    lists.into_iter().flatten().copied().collect()
}

fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<i64>().prop_map(Value::IntValue),
        (0..200_i64).prop_map(Value::IntValue),
        any::<f64>().prop_map(Value::DoubleValue),
        ".{0,20}".prop_map(Value::StringValue),
        "(chat|embeddings|LLM|cmpl-[0-9a-f-]{0,6}|resp_[0-9_]{0,5}|-?[0-9]{1,25})".prop_map(Value::StringValue),
        any::<bool>().prop_map(Value::BoolValue),
        prop::collection::vec(any::<u8>(), 0..9).prop_map(Value::BytesValue),
    ]
}

proptest! {
    #[test]
    fn nothing_panics_and_no_part_exceeds_its_whole(
        attributes in prop::collection::vec((prop::sample::select(known_names()), any_value()), 0..24),
        ids in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..18), 3),
        times in any::<(u64, u64)>(),
        kind in any::<i32>(),
    ) {
        let given = attributes.iter().map(|(name, value)| pair(name, value.clone())).collect();
        let [trace_id, span_id, parent_span_id]: [Vec<u8>; 3] = ids.try_into().unwrap();
        let told = Span {
            trace_id, span_id, parent_span_id, kind, start_time_unix_nano: times.0, end_time_unix_nano: times.1, ..span(given)
        };
        let found = read(request(&[], vec![told]), NOW);
        prop_assert_eq!(found.calls.len() as u64 + found.ignored + found.rejected, 1);
        for call in &found.calls {
            prop_assert!(call.period.start <= call.period.end);
            let known = call.usage.input_tokens() > 0 || call.usage.output_tokens() > 0;
            prop_assert!(!known || call.usage_quality != UsageQuality::Missing);
            let labels = [&call.request_model, &call.response_id, &call.context.session, &call.context.customer];
            prop_assert!(labels.into_iter().flatten().all(|label| !label.is_empty() && label.len() <= 256));
        }
    }

    #[test]
    fn included_parts_add_up_to_the_whole(input in 0..5_000_u64, output in 0..5_000_u64, parts in any::<[u8; 6]>()) {
        let [read, write, thought, audio, image, spoken] = parts.map(u64::from);
        let (cached, input) = (read + write, input + read + write);
        let output = output + thought;
        let mut attributes = pairs(&[("gen_ai.operation.name", S("chat"))]);
        for (name, tokens) in [
            ("gen_ai.usage.input_tokens", input), ("gen_ai.usage.output_tokens", output),
            ("gen_ai.usage.cache_read.input_tokens", read), ("gen_ai.usage.cache_creation.input_tokens", write),
            ("gen_ai.usage.reasoning.output_tokens", thought), ("gen_ai.usage.audio.input_tokens", audio),
            ("gen_ai.usage.image.input_tokens", image), ("gen_ai.usage.audio.output_tokens", spoken),
        ] {
            attributes.push(pair(name, Value::IntValue(i64::try_from(tokens).unwrap())));
        }
        let [call] = read_one(attributes);
        prop_assert_eq!((call.usage.input_tokens(), call.usage.output_tokens()), (input, output));
        prop_assert_eq!(call.usage.cache_read + call.usage.cache_read_audio + call.usage.cache_write_5m, cached);
    }
}

fn read_one(attributes: Vec<KeyValue>) -> [CallSpan; 1] {
    read(request(&[], vec![span(attributes)]), NOW).calls.try_into().unwrap()
}

#[test]
#[expect(clippy::disallowed_methods, reason = "measures how long reading takes")]
fn what_a_service_says_of_all_its_spans_is_looked_at_once() {
    // As many attributes of the service as spans: looking at all of them for each span would take minutes.
    let many = 20_000;
    let names: Vec<String> = (0..many).map(|number| format!("farthing.tag.{number:05}")).collect();
    let resource: Vec<(&str, V)> = names.iter().map(|name| (name.as_str(), S("x"))).collect();
    let own = pairs(&[("gen_ai.operation.name", S("chat")), ("farthing.tag.00003", S("own"))]);
    let started = std::time::Instant::now();
    let calls = read(request(&resource, vec![span(own); many]), NOW).calls;
    assert!(started.elapsed().as_secs() < 60, "{:?}", started.elapsed());
    assert_eq!(calls.len(), many);
    let tags = &calls[many - 1].context.tags;
    assert_eq!((tags.len(), &*tags["00003"], &*tags["00000"]), (TAGS_MAX, "own", "x"));
}
