use ledger::price::{PriceBook, PriceQuery};
use ledger::{Charge, Timestamp};
use proptest::prelude::*;

use super::exercise::{replay, sse_meter};
use super::*;

/// One recorded answer and what it must be metered as.
struct Golden {
    name: &'static str,
    answer: &'static [u8],
    kind: Kind,
    operation: Operation,
    usage: TokenUsage,
    model: Option<&'static str>,
    id: Option<&'static str>,
    class: Option<ServiceClass>,
    text_bytes: u64,
    deltas: u64,
}

macro_rules! fixture {
    ($name:literal) => {
        ($name, include_bytes!(concat!("../../tests/fixtures/", $name)) as &'static [u8])
    };
}

const NONE: TokenUsage = TokenUsage {
    input: 0,
    cache_read: 0,
    cache_write_5m: 0,
    cache_write_1h: 0,
    input_audio: 0,
    cache_read_audio: 0,
    input_image: 0,
    output: 0,
    reasoning: 0,
    output_audio: 0,
    output_image: 0,
};

const CHAT: TokenUsage = TokenUsage { input: 86, cache_read: 1920, output: 108, reasoning: 192, ..NONE };
const RESPONSES: TokenUsage = TokenUsage { input: 25, cache_read: 12, output: 7, reasoning: 4, ..NONE };
const GEMINI: TokenUsage = TokenUsage { input: 5005, cache_read: 257_955, output: 1744, reasoning: 320, ..NONE };

fn golden(
    (name, answer): (&'static str, &'static [u8]),
    kind: Kind,
    operation: Operation,
    usage: TokenUsage,
    [model, id]: [Option<&'static str>; 2],
    (class, text_bytes, deltas): (Option<ServiceClass>, u64, u64),
) -> Golden {
    Golden { name, answer, kind, operation, usage, model, id, class, text_bytes, deltas }
}

fn goldens() -> Vec<Golden> {
    use Kind::{Anthropic, Gemini, OpenAi, Vllm};
    use Operation::{Chat, Completions, Embeddings, Generate, Messages, Responses};
    let flex = Some(ServiceClass::Flex);
    let priority = Some(ServiceClass::Priority);
    let standard = Some(ServiceClass::Standard);
    let gpt = Some("gpt-4o-2024-08-06");
    let gemini = [Some("gemini-2.5-pro"), Some("mLxUaPLfM-2Y7M8PxbqF-Ag")];
    let response = [Some("gpt-4.1-2025-04-14"), Some("resp_67c9fdcecf488190bdd9a0409de3a1ec07b8b0ad4e5eb654")];
    vec![
        golden(
            fixture!("openai_chat.sse"),
            OpenAi,
            Chat,
            CHAT,
            [gpt, Some("chatcmpl-B9MHDbslfkBeAs8l4bebGdFOJ6PeG")],
            (standard, 25, 5),
        ),
        golden(
            fixture!("openai_chat.json"),
            OpenAi,
            Chat,
            CHAT,
            [gpt, Some("chatcmpl-B9MBs8CjcvOU2jLn4n570S5qMJKcT")],
            (flex, 34, 1),
        ),
        golden(
            fixture!("openai_audio.json"),
            OpenAi,
            Chat,
            TokenUsage {
                input: 10,
                cache_read: 10,
                input_audio: 80,
                cache_read_audio: 20,
                output: 15,
                output_audio: 75,
                ..NONE
            },
            [Some("gpt-4o-audio-preview-2024-12-17"), Some("chatcmpl-audio")],
            (None, 0, 0),
        ),
        golden(
            fixture!("openai_completions.json"),
            OpenAi,
            Completions,
            TokenUsage { input: 5, output: 7, ..NONE },
            [Some("gpt-3.5-turbo-instruct"), Some("cmpl-uqkvlQyYK7bGYrRHQ0eXlWi7")],
            (None, 23, 1),
        ),
        golden(
            fixture!("openai_embeddings.json"),
            OpenAi,
            Embeddings,
            TokenUsage { input: 8, ..NONE },
            [Some("text-embedding-3-small"), None],
            (None, 0, 0),
        ),
        golden(fixture!("openai_responses.sse"), OpenAi, Responses, RESPONSES, response, (priority, 9, 2)),
        golden(fixture!("openai_responses.json"), OpenAi, Responses, RESPONSES, response, (priority, 9, 1)),
        golden(
            fixture!("anthropic_messages.sse"),
            Anthropic,
            Messages,
            TokenUsage { input: 6, cache_write_5m: 159_217, output: 2745, ..NONE },
            [Some("claude-opus-4-7"), Some("msg_1nZdL29xx5MUA1yADyHTEsnR8uuvGzszyY")],
            (standard, 42, 3),
        ),
        golden(
            fixture!("anthropic_messages.json"),
            Anthropic,
            Messages,
            TokenUsage { input: 2095, cache_read: 700, cache_write_5m: 500, cache_write_1h: 1000, output: 503, ..NONE },
            [Some("claude-sonnet-4-5-20250929"), Some("msg_013Zva2CMHLNnXjNJJKqJ2EF")],
            (priority, 22, 1),
        ),
        golden(fixture!("gemini_generate.sse"), Gemini, Generate, GEMINI, gemini, (standard, 17, 3)),
        golden(fixture!("gemini_array.json"), Gemini, Generate, GEMINI, gemini, (standard, 17, 1)),
        golden(
            fixture!("gemini_generate.json"),
            Gemini,
            Generate,
            TokenUsage {
                input: 240,
                cache_read: 200,
                cache_read_audio: 100,
                input_audio: 250,
                input_image: 250,
                output: 10,
                output_image: 1290,
                reasoning: 50,
                ..NONE
            },
            gemini,
            (None, 5, 1),
        ),
        golden(
            fixture!("vllm_chat.sse"),
            Vllm,
            Chat,
            TokenUsage { input: 12, output: 4, ..NONE },
            [Some("tiny"), Some("chatcmpl-3d0c2f0c")],
            (None, 5, 3),
        ),
        golden(
            fixture!("vllm_chat.json"),
            Vllm,
            Chat,
            TokenUsage { input: 4, cache_read: 8, output: 28, ..NONE },
            [Some("tiny"), Some("chatcmpl-9a")],
            (None, 3, 1),
        ),
        golden(
            fixture!("vllm_messages.sse"),
            Vllm,
            Messages,
            TokenUsage { input: 9, output: 2, ..NONE },
            [Some("tiny"), Some("chatcmpl-7b")],
            (None, 2, 1),
        ),
        golden(
            fixture!("sse_wire.sse"),
            Vllm,
            Chat,
            TokenUsage { input: 3, output: 1, ..NONE },
            [Some("m"), Some("c1")],
            (None, 1, 1),
        ),
    ]
}

impl Golden {
    fn streamed(&self) -> bool {
        self.name.ends_with(".sse")
    }

    fn meter(&self, hide: bool) -> AnswerMeter {
        AnswerMeter::new(self.kind, self.operation, self.streamed(), hide)
    }

    fn check(&self, metered: &Metered) {
        let name = self.name;
        assert_eq!((metered.usage, metered.quality), (self.usage, UsageQuality::Reported), "{name}");
        assert_eq!(
            (metered.response_model.as_deref(), metered.response_id.as_deref()),
            (self.model, self.id),
            "{name}"
        );
        assert_eq!(metered.service_class, self.class, "{name}");
        assert_eq!((metered.delivered_text_bytes, metered.delivered_deltas), (self.text_bytes, self.deltas), "{name}");
        assert_eq!((metered.complete, &metered.error, &metered.broken), (true, &None, &None), "{name}");
    }
}

#[test]
fn golden_answers_are_metered_the_same_wherever_they_are_cut() {
    for golden in goldens() {
        let length = golden.answer.len();
        let bytewise: Vec<usize> = (0..length).collect();
        for cuts in (0..=length).map(|cut| vec![cut]).chain([bytewise]) {
            let (client, metered) = replay(golden.meter(false), golden.answer, &cuts);
            assert_eq!(client, golden.answer, "{} cut at {cuts:?}", golden.name);
            golden.check(&metered);
        }
    }
}

#[test]
fn only_the_usage_chunk_is_kept_from_the_client_wherever_it_is_cut() {
    for golden in goldens().iter().filter(|golden| golden.streamed()) {
        let expected = without_usage_chunk(golden.answer);
        let is_chat = golden.operation == Operation::Chat;
        assert_eq!(expected.len() < golden.answer.len(), is_chat, "{}", golden.name);
        let bytewise: Vec<usize> = (0..golden.answer.len()).collect();
        for cuts in (0..=golden.answer.len()).map(|cut| vec![cut]).chain([bytewise]) {
            let (client, metered) = replay(golden.meter(true), golden.answer, &cuts);
            assert_eq!(
                String::from_utf8_lossy(&client),
                String::from_utf8_lossy(&expected),
                "{} at {cuts:?}",
                golden.name
            );
            golden.check(&metered);
        }
    }
}

/// The stream without the event that has usage and no choices, found by its text and not by the code under test.
fn without_usage_chunk(stream: &[u8]) -> Vec<u8> {
    let text = std::str::from_utf8(stream).unwrap();
    for choices in ["\"choices\":[],", "\"choices\": [ ],"] {
        if let Some(at) = text.find(choices) {
            let start = text[..at].rfind("data:").unwrap();
            let length =
                ["\n\n", "\r\n\r\n"].iter().filter_map(|end| Some(text[at..].find(end)? + end.len())).min().unwrap();
            return [&stream[..start], &stream[at + length..]].concat();
        }
    }
    stream.to_vec()
}

#[test]
fn the_end_is_told_with_the_bytes_that_a_client_could_act_on() {
    type End<'a> = (&'a str, Kind, Operation, &'a [u8], &'a [u8]);
    let ends: [End<'_>; 6] = {
        let (chat, chat_bytes) = fixture!("openai_chat.sse");
        let (messages, messages_bytes) = fixture!("anthropic_messages.sse");
        let (responses, responses_bytes) = fixture!("openai_responses.sse");
        let (failed, failed_bytes) = fixture!("openai_responses_failed.sse");
        let (gemini, gemini_bytes) = fixture!("gemini_generate.sse");
        let (overloaded, overloaded_bytes) = fixture!("anthropic_overloaded.sse");
        [
            (chat, Kind::OpenAi, Operation::Chat, chat_bytes, b"data: [DONE]\n"),
            (messages, Kind::Anthropic, Operation::Messages, messages_bytes, b"{\"type\":\"message_stop\"}\n"),
            (responses, Kind::OpenAi, Operation::Responses, responses_bytes, b"\"metadata\":{}}}\n"),
            (failed, Kind::OpenAi, Operation::Responses, failed_bytes, b"\"metadata\":{}}}\n"),
            (overloaded, Kind::Anthropic, Operation::Messages, overloaded_bytes, b"\"request_id\":\"req_1\"}\n"),
            (gemini, Kind::Gemini, Operation::Generate, gemini_bytes, b""),
        ]
    };
    for (name, kind, operation, answer, last_line) in ends {
        let mut meter = AnswerMeter::new(kind, operation, true, operation == Operation::Chat);
        let mut client = Vec::new();
        let mut ended = 0;
        for &byte in answer {
            let fed = meter.feed(Bytes::copy_from_slice(&[byte]), 0);
            fed.release.iter().for_each(|bytes| client.extend_from_slice(bytes));
            if fed.ends {
                ended += 1;
                assert!(client.ends_with(last_line), "{name} ended early: {}", String::from_utf8_lossy(&client));
            }
        }
        assert_eq!(ended, usize::from(!last_line.is_empty()), "{name}");
    }
}

#[test]
fn times_and_gaps_are_those_of_the_chunks_with_text() {
    let mut meter = AnswerMeter::new(Kind::OpenAi, Operation::Chat, true, false);
    for (at_us, content) in [(10, ""), (25, "a"), (40, "b"), (41, ""), (100, "c")] {
        meter.feed(
            Bytes::from(format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{content}\"}}}}]}}\n\n")),
            at_us,
        );
    }
    let metered = meter.finish(120, || None);
    assert_eq!((metered.first_token_us, metered.last_token_us), (Some(25), Some(100)));
    assert_eq!(metered.gaps, TokenGaps { count: 2, total_us: 75, max_us: 60 });
}

#[test]
fn a_chunk_is_forwarded_without_copy_or_delay() {
    let chunk = Bytes::from_static(fixture!("openai_chat.sse").1).slice(..700);
    let mut meter = AnswerMeter::new(Kind::OpenAi, Operation::Chat, true, false);
    let fed = meter.feed(chunk.clone(), 0);
    assert_eq!(fed.release.len(), 1);
    assert_eq!(fed.release[0].as_ptr(), chunk.as_ptr());
    assert_eq!(fed.release[0].len(), 700);
}

#[test]
fn a_huge_event_is_released_and_not_read() {
    let huge = format!(
        "data: {{\"choices\":[],\"usage\":{{\"prompt_tokens\":1,\"x\":\"{}\"}}}}\n\ndata: [DONE]\n\n",
        "y".repeat(HELD_EVENT_BYTES_MAX)
    );
    for stride in [huge.len(), 65_536, 4_099] {
        let mut meter = AnswerMeter::new(Kind::OpenAi, Operation::Chat, true, true);
        let (mut released, mut held_max) = (0, 0);
        for (index, piece) in huge.as_bytes().chunks(stride).enumerate() {
            released += meter.feed(Bytes::copy_from_slice(piece), 0).release.iter().map(Bytes::len).sum::<usize>();
            held_max = held_max.max(((index + 1) * stride).min(huge.len()) - released);
        }
        let metered = meter.finish(0, || None);
        assert_eq!(released, huge.len());
        assert!(held_max <= HELD_EVENT_BYTES_MAX);
        assert_eq!(metered.quality, UsageQuality::Missing);
        assert!(metered.complete && metered.broken.unwrap().contains("was not read"));
    }
}

#[test]
fn errors_inside_a_good_answer_are_named_without_their_message() {
    let cases = [
        (fixture!("openai_error.sse").1, Kind::OpenAi, Operation::Chat, "server_error"),
        (fixture!("anthropic_overloaded.sse").1, Kind::Anthropic, Operation::Messages, "overloaded_error"),
        (fixture!("openai_responses_failed.sse").1, Kind::OpenAi, Operation::Responses, "server_error"),
        (
            b"data: {\"error\":{\"code\":503,\"message\":\"no\",\"status\":\"UNAVAILABLE\"}}\n\n",
            Kind::Gemini,
            Operation::Generate,
            "UNAVAILABLE",
        ),
    ];
    for (answer, kind, operation, name) in cases {
        let (_, metered) = replay(AnswerMeter::new(kind, operation, true, false), answer, &[]);
        assert_eq!(metered.error.as_deref(), Some(name));
        assert_ne!(metered.quality, UsageQuality::Reported, "{name}");
    }
}

#[test]
fn broken_answers_say_what_is_wrong_and_pass_all_the_same() {
    let cases: [(&[u8], bool, &str); 6] = [
        (b"data: {\"id\": nonsense}\n\n", true, "not valid JSON"),
        (b"data: {\"choices\":[{\"delta\":{\"content\":\"a", true, "in the middle of an event"),
        (b"\x1f\x8b\x08\0\0\0", true, "gzip"),
        (b"\x1f\x8b\x08\0\0\0", false, "gzip"),
        (b"{\"choices\":[{\"message\":{\"content\":\"abcd", false, "it ends early"),
        (b"\xff\xfe{}", false, "syntax"),
    ];
    for (answer, streamed, reason) in cases {
        let (client, metered) = replay(AnswerMeter::new(Kind::OpenAi, Operation::Chat, streamed, true), answer, &[3]);
        assert_eq!(client, answer);
        let broken = metered.broken.unwrap();
        assert!(broken.contains(reason), "{broken}");
    }
}

#[test]
fn unmetered_and_free_answers_count_nothing() {
    let answer = fixture!("openai_chat.json").1;
    let (client, metered) = replay(AnswerMeter::unmetered(Some("why".to_owned())), answer, &[5]);
    assert_eq!(
        (client.as_slice(), metered.quality, metered.broken.as_deref()),
        (answer, UsageQuality::Missing, Some("why"))
    );
    for operation in [Operation::CountTokens, Operation::Models] {
        let (_, metered) =
            replay(AnswerMeter::new(Kind::Anthropic, operation, false, false), b"{\"input_tokens\":2095}", &[]);
        assert_eq!((metered.usage, metered.quality), (NONE, UsageQuality::Reported));
    }
}

/// Meters a body or stream and charges it at list price.
fn charged(kind: Kind, operation: Operation, model: &str, streamed: bool, answer: &str) -> (Metered, Charge) {
    let (_, metered) =
        replay(AnswerMeter::new(kind, operation, streamed, false), answer.as_bytes(), &[answer.len() / 2]);
    let query = PriceQuery {
        provider: kind.default_provider(),
        model: Some(model),
        operation,
        service_class: metered.service_class.unwrap_or_default(),
        usage: &metered.usage,
        quality: metered.quality,
        // 20 November 2026, the date of the amounts below.
        at: Timestamp::from_micros(1_795_132_800_000_000),
    };
    let charge = PriceBook::base().charge(&query);
    (metered, charge)
}

fn list_cost(charge: &Charge) -> String {
    charge.costs().expect("a priced charge").list_cost.to_string()
}

#[test]
fn case_01_a_dropped_stream_keeps_what_was_delivered() {
    let (_, whole) = fixture!("openai_chat.sse");
    let cut = whole.len() / 2;
    let mut meter = AnswerMeter::new(Kind::OpenAi, Operation::Chat, true, true);
    meter.feed(Bytes::from_static(whole).slice(..cut), 5);
    let metered = meter.finish(9, || Some(2006));
    assert_eq!((metered.quality, metered.usage.input, metered.complete), (UsageQuality::Estimated, 2006, false));
    assert!(metered.usage.output > 0 && metered.usage.output == metered.delivered_tokens_counted.unwrap());
}

#[test]
fn case_02_a_cut_stream_is_not_billed_at_its_first_count() {
    // The opening event says one output token; a long text follows and the upstream breaks off.
    let start = r#"{"type":"message_start","message":{"id":"m","model":"claude-opus-4-7","usage":{"input_tokens":10,"cache_read_input_tokens":5,"output_tokens":1}}}"#;
    let mut stream = format!("event: message_start\ndata: {start}\n\n");
    for _ in 0..100 {
        stream.push_str("data: {\"type\":\"content_block_delta\",\"delta\":{\"type\":\"text_delta\",\"text\":\"twelve bytes\"}}\n\n");
    }
    let mut meter = AnswerMeter::new(Kind::Anthropic, Operation::Messages, true, false);
    meter.feed(Bytes::from(stream), 0);
    let metered = meter.finish(0, || panic!("the input was reported"));
    assert_eq!(metered.usage, TokenUsage { input: 10, cache_read: 5, output: 300, ..NONE });
    assert_eq!((metered.quality, metered.delivered_tokens_counted), (UsageQuality::Estimated, Some(300)));
}

#[test]
fn a_compressed_stream_is_known_by_its_first_byte_wherever_it_is_cut() {
    // Found by the fuzzer: provider and cut, then gzip's magic number.
    sse_meter(&[1, 0, 0x1f, 0x8b]);
}

#[test]
fn a_receipt_for_a_background_response_is_no_usage() {
    let body = br#"{"id":"resp_1","object":"response","status":"queued","model":"gpt-5","usage":null}"#;
    let mut meter = AnswerMeter::new(Kind::OpenAi, Operation::Responses, false, false);
    meter.feed(Bytes::from_static(body), 1);
    let metered = meter.finish(2, || Some(1_000));
    assert_eq!((metered.quality, metered.usage), (UsageQuality::Missing, TokenUsage::default()));
    assert_eq!(metered.response_id.as_deref(), Some("resp_1"));
}

#[test]
fn case_03_explicit_zero_is_reported_and_absence_is_missing() {
    let answers = [
        (r#"{"id":"a","usage":{"prompt_tokens":0,"completion_tokens":0}}"#, UsageQuality::Reported),
        (r#"{"id":"a","usage":{"prompt_tokens":0.0,"completion_tokens":0}}"#, UsageQuality::Reported),
        (r#"{"id":"a","usage":null}"#, UsageQuality::Missing),
        (r#"{"id":"a","usage":{}}"#, UsageQuality::Missing),
        (r#"{"id":"a","usage":{"prompt_tokens":null,"completion_tokens":null}}"#, UsageQuality::Missing),
        (r#"{"id":"a","usage":{"prompt_tokens":-1,"completion_tokens":"7"}}"#, UsageQuality::Missing),
        (r#"{"id":"a"}"#, UsageQuality::Missing),
    ];
    for (answer, quality) in answers {
        let (_, metered) =
            replay(AnswerMeter::new(Kind::OpenAi, Operation::Chat, false, false), answer.as_bytes(), &[]);
        assert_eq!((metered.quality, metered.usage), (quality, NONE), "{answer}");
    }
    let stream = "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":0,\"completion_tokens\":0}}\n\ndata: [DONE]\n\n";
    assert_eq!(charged(Kind::OpenAi, Operation::Chat, "gpt-4o", true, stream).0.quality, UsageQuality::Reported);
}

#[test]
fn case_04_a_disconnect_in_a_whole_body_books_the_output_that_was_sent() {
    let (_, whole) = fixture!("openai_chat.json");
    let cut = whole.len() - 420;
    let mut meter = AnswerMeter::new(Kind::OpenAi, Operation::Chat, false, false);
    meter.feed(Bytes::from_static(whole).slice(..cut), 0);
    let metered = meter.finish(0, || Some(2006));
    assert_eq!((metered.quality, metered.usage.input), (UsageQuality::Estimated, 2006));
    assert!(metered.usage.output > 0, "the text was there: {metered:?}");
    // Drained to its end, the same answer is reported in full.
    let (_, drained) = replay(AnswerMeter::new(Kind::OpenAi, Operation::Chat, false, false), whole, &[cut]);
    assert_eq!((drained.quality, drained.usage), (UsageQuality::Reported, CHAT));
}

#[test]
fn case_05_an_anthropic_cache_write_is_not_input_as_well() {
    let answer = r#"{"id":"m","type":"message","model":"claude-3-7-sonnet-20250219","usage":{"input_tokens":3,"cache_creation_input_tokens":12304,"cache_read_input_tokens":0,"output_tokens":550}}"#;
    let (metered, charge) = charged(Kind::Anthropic, Operation::Messages, "claude-3-7-sonnet-20250219", false, answer);
    assert_eq!(metered.usage, TokenUsage { input: 3, cache_write_5m: 12_304, output: 550, ..NONE });
    assert_eq!(list_cost(&charge), "0.054399");
}

#[test]
fn case_06_gemini_cache_hits_are_not_input_as_well() {
    let answer = r#"{"usageMetadata":{"promptTokenCount":262960,"cachedContentTokenCount":257955,"candidatesTokenCount":1744,"totalTokenCount":264704}}"#;
    let (metered, charge) = charged(Kind::Gemini, Operation::Generate, "gemini-2.5-pro", false, answer);
    assert_eq!(metered.usage, TokenUsage { input: 5005, cache_read: 257_955, output: 1744, ..NONE });
    // At today's list, over 200k tokens of context; the report's own card gives 0.1849 (asserted with the price book).
    assert_eq!(list_cost(&charge), "0.10316125");
}

#[test]
fn case_07_streamed_cache_creation_is_counted_once() {
    let (_, stream) = fixture!("anthropic_messages.sse");
    let text = std::str::from_utf8(stream).unwrap();
    let (metered, charge) = charged(Kind::Anthropic, Operation::Messages, "claude-opus-4-7", true, text);
    assert_eq!(metered.usage, TokenUsage { input: 6, cache_write_5m: 159_217, output: 2745, ..NONE });
    assert_eq!(list_cost(&charge), "1.06376125");
}

#[test]
fn case_08_openai_cached_tokens_are_not_full_price() {
    let answer = r#"{"id":"c","usage":{"prompt_tokens":1239328,"completion_tokens":12909,"total_tokens":1252237,"prompt_tokens_details":{"cached_tokens":1188096}}}"#;
    let (metered, charge) = charged(Kind::OpenAi, Operation::Chat, "gpt-5", false, answer);
    assert_eq!(metered.usage, TokenUsage { input: 51_232, cache_read: 1_188_096, output: 12_909, ..NONE });
    assert_eq!(list_cost(&charge), "0.341642");
}

#[test]
fn case_09_cached_input_is_counted_once_and_cache_writes_are_not_left_out() {
    let answer = r#"{"usage":{"prompt_tokens":17903,"prompt_tokens_details":{"cached_tokens":17817}}}"#;
    let (metered, _) = charged(Kind::OpenAi, Operation::Chat, "gpt-4o", false, answer);
    assert_eq!((metered.usage.input, metered.usage.cache_read), (86, 17_817));
    let answer = r#"{"usage":{"input_tokens":15460,"cache_creation_input_tokens":19810,"cache_read_input_tokens":0,"output_tokens":10370}}"#;
    let (metered, charge) = charged(Kind::Anthropic, Operation::Messages, "claude-sonnet-4-6", false, answer);
    assert_eq!(metered.usage, TokenUsage { input: 15_460, cache_write_5m: 19_810, output: 10_370, ..NONE });
    assert_eq!(list_cost(&charge), "0.2762175");
}

#[test]
fn case_13_the_upstreams_own_cost_is_ignored() {
    let with = r#"{"usage":{"prompt_tokens":1200,"completion_tokens":124,"total_tokens":1324,"cost":3144000}}"#;
    let without = r#"{"usage":{"prompt_tokens":1200,"completion_tokens":124,"total_tokens":1324}}"#;
    let (with, with_charge) = charged(Kind::OpenAi, Operation::Chat, "gpt-4o", false, with);
    let (without, without_charge) = charged(Kind::OpenAi, Operation::Chat, "gpt-4o", false, without);
    assert_eq!(with.usage, TokenUsage { input: 1200, output: 124, ..NONE });
    assert_eq!((with.usage, with_charge), (without.usage, without_charge));
}

/// Prints what metering costs: `cargo test -p gateway --lib -- --ignored --nocapture cost_of_a_chunk`.
#[test]
#[ignore = "prints a measurement"]
#[expect(clippy::disallowed_methods, reason = "a measurement needs the machine's own clock")]
fn cost_of_a_chunk() {
    const CHUNKS: u32 = 200_000;
    let chunk = Bytes::from_static(
        b"data: {\"id\":\"chatcmpl-B9MHDbslfkBeAs8l4bebGdFOJ6PeG\",\"object\":\"chat.completion.chunk\",\"created\":1741570283,\"model\":\"gpt-4o-2024-08-06\",\"service_tier\":\"default\",\"system_fingerprint\":\"fp_fc9f1d7035\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" hello\"},\"logprobs\":null,\"finish_reason\":null}],\"usage\":null}\n\n",
    );
    for hide in [false, true] {
        let mut meter = AnswerMeter::new(Kind::OpenAi, Operation::Chat, true, hide);
        let start = std::time::Instant::now();
        for at_us in 0..CHUNKS {
            std::hint::black_box(meter.feed(chunk.clone(), u64::from(at_us)));
        }
        let each = start.elapsed() / CHUNKS;
        println!("{} bytes a chunk, usage chunk hidden: {hide}: {each:?} each", chunk.len());
    }
}

/// A fixture with some of its bytes changed.
fn mutated() -> impl Strategy<Value = Vec<u8>> {
    let edits = proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..3_u8), 0..8);
    (0..goldens().len(), edits).prop_map(|(which, edits)| {
        let mut bytes = goldens()[which].answer.to_vec();
        for (at, byte, how) in edits {
            let at = at.index(bytes.len());
            match how {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                _ => drop(bytes.drain(at..(at + usize::from(byte)).min(bytes.len() - 1).max(at))),
            }
        }
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn garbage_keeps_the_laws(data in proptest::collection::vec(any::<u8>(), 0..600)) {
        sse_meter(&data);
        exercise::usage_adapters(&data);
    }

    #[test]
    fn garbage_of_the_right_alphabet_keeps_the_laws(choice in any::<[u8; 2]>(), words in proptest::collection::vec(
        prop::sample::select(vec!["data:", "data: ", "\n", "\r", "\r\n", "\n\n", ":", "event: message_stop", "[DONE]", "{\"choices\":[],\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":2}}",
            "{\"type\":\"message_stop\"}", "{\"choices\":[{\"delta\":{\"content\":\"x\"}}]}", "\u{feff}", "id: 3", "x"]), 0..40)) {
        let mut data = choice.to_vec();
        data.extend_from_slice(words.concat().as_bytes());
        sse_meter(&data);
        // The same with the usage chunk hidden, as chat.
        data[0] = 0x80;
        sse_meter(&data);
    }

    #[test]
    fn mutations_of_real_answers_keep_the_laws(choice in any::<[u8; 2]>(), answer in mutated()) {
        sse_meter(&[&choice[..], &answer].concat());
        exercise::usage_adapters(&answer);
    }
}

#[test]
fn an_engines_own_queue_time_is_read_from_whole_and_streamed_answers() {
    const METRICS: &str = r#""metrics":{"time_to_first_token_ms":3.5,"generation_time_ms":20.0,"queue_time_ms":1.25,"mean_itl_ms":null,"tokens_per_second":9.5}"#;
    let usage = r#""usage":{"prompt_tokens":3,"total_tokens":4,"completion_tokens":1}"#;
    let delta =
        r#"data: {"id":"c","model":"m","choices":[{"index":0,"delta":{"content":"a"},"finish_reason":"stop"}]}"#;
    let queued = |kind, operation, streamed, answer: &str| {
        replay(AnswerMeter::new(kind, operation, streamed, streamed), answer.as_bytes(), &[]).1.queued_us
    };
    let whole = format!(r#"{{"id":"c","model":"m","choices":[],{usage},{METRICS}}}"#);
    let stream = format!("{delta}\n\ndata: {{\"choices\":[],{usage},{METRICS}}}\n\ndata: [DONE]\n\n");
    let response = format!(
        r#"{{"type":"response.completed","response":{{"id":"r","usage":{{"input_tokens":3,"output_tokens":1}},{METRICS}}}}}"#
    );
    let responses = format!("event: response.completed\ndata: {response}\n\n");
    let (vllm, chat) = (Kind::Vllm, Operation::Chat);
    assert_eq!(queued(vllm, chat, false, &whole), Some(1_250));
    assert_eq!(queued(vllm, chat, true, &stream), Some(1_250));
    assert_eq!(queued(vllm, Operation::Responses, true, &responses), Some(1_250));
    assert_eq!(queued(Kind::OpenAi, chat, false, &whole), None, "only an engine of ours says it in this form");
    for wrong in ["null", "-1.0", "\"2\"", "1e300", "[]"] {
        assert_eq!(queued(vllm, chat, false, &whole.replace("1.25", wrong)), None, "{wrong}");
    }
    let silent = whole.replace(METRICS, r#""metrics":null"#);
    assert_eq!(queued(vllm, chat, false, &silent), None, "unknown is not zero");
}

#[test]
fn how_far_an_answer_got_is_known_while_it_passes() {
    let delta =
        |text: &str| Bytes::from(format!("data: {{\"choices\":[{{\"delta\":{{\"content\":\"{text}\"}}}}]}}\n\n"));
    let mut meter = AnswerMeter::new(Kind::Vllm, Operation::Chat, true, false);
    assert_eq!(meter.so_far(), SoFar::default());
    for (text, at_us) in [("", 5), ("a", 10), ("much longer text", 30)] {
        meter.feed(delta(text), at_us);
    }
    let so_far = meter.so_far();
    assert_eq!((so_far.first_token_us, so_far.last_token_us), (Some(10), Some(30)));
    assert_eq!((so_far.gaps.count, so_far.gaps.max_us), (1, 20));
    assert_eq!(so_far.output_tokens, 2, "an event of vLLM's is a token");
    let mut other = AnswerMeter::new(Kind::OpenAi, Operation::Chat, true, false);
    other.feed(delta("sixteen letters!"), 1);
    assert_eq!(other.so_far().output_tokens, 4, "others put more into one");
}
