use http::header::AUTHORIZATION;
use proptest::prelude::*;

use super::*;
use crate::surface::inspect;

fn read(kind: Kind, operation: Operation, json: &str) -> TokenUsage {
    kind.usage(operation, &RawUsage::parse(json).unwrap()).usage
}

#[test]
fn counts_that_contradict_stay_within_their_total() {
    let openai = r#"{"prompt_tokens":10,"completion_tokens":5,"prompt_tokens_details":{"cached_tokens":99,"audio_tokens":7},"completion_tokens_details":{"reasoning_tokens":50,"audio_tokens":9}}"#;
    let usage = read(Kind::OpenAi, Operation::Chat, openai);
    assert_eq!(usage, TokenUsage { cache_read: 10, reasoning: 5, ..TokenUsage::default() });
    let gemini = r#"{"promptTokenCount":10,"cachedContentTokenCount":99,"candidatesTokenCount":4,"candidatesTokensDetails":[{"modality":"IMAGE","tokenCount":9}]}"#;
    let usage = read(Kind::Gemini, Operation::Generate, gemini);
    assert_eq!(usage, TokenUsage { cache_read: 10, output_image: 4, ..TokenUsage::default() });
    let anthropic = r#"{"input_tokens":1,"cache_creation_input_tokens":10,"cache_creation":{"ephemeral_5m_input_tokens":50,"ephemeral_1h_input_tokens":70},"output_tokens":2}"#;
    let usage = read(Kind::Anthropic, Operation::Messages, anthropic);
    assert_eq!(usage, TokenUsage { input: 1, cache_write_1h: 10, output: 2, ..TokenUsage::default() });
}

#[test]
fn reasoning_is_outside_the_completion_where_the_total_says_so() {
    let inside = r#"{"prompt_tokens":10,"completion_tokens":20,"total_tokens":30,"completion_tokens_details":{"reasoning_tokens":15}}"#;
    let usage = read(Kind::OpenAi, Operation::Chat, inside);
    assert_eq!((usage.output, usage.reasoning), (5, 15));
    let outside = r#"{"prompt_tokens":10,"completion_tokens":20,"total_tokens":45,"completion_tokens_details":{"reasoning_tokens":15}}"#;
    let usage = read(Kind::OpenAi, Operation::Chat, outside);
    assert_eq!((usage.output, usage.reasoning), (20, 15));
}

#[test]
fn vllm_counts_as_the_protocol_it_speaks() {
    let usage =
        read(Kind::Vllm, Operation::Messages, r#"{"input_tokens":4,"cache_read_input_tokens":8,"output_tokens":1}"#);
    assert_eq!((usage.input, usage.cache_read), (4, 8));
    let usage = read(
        Kind::Vllm,
        Operation::Chat,
        r#"{"prompt_tokens":12,"completion_tokens":1,"prompt_tokens_details":{"cached_tokens":8}}"#,
    );
    assert_eq!((usage.input, usage.cache_read), (4, 8));
}

#[test]
fn our_credential_replaces_every_other() {
    let expected =
        [("authorization", "Bearer s"), ("x-api-key", "s"), ("x-goog-api-key", "s"), ("authorization", "Bearer s")];
    for (kind, (header, value)) in Kind::ALL.into_iter().zip(expected) {
        let mut headers = HeaderMap::new();
        for name in ["authorization", "x-api-key", "api-key", "x-goog-api-key"] {
            headers.append(name, HeaderValue::from_static("fk-client"));
        }
        kind.authorize(&mut headers, "s").unwrap();
        assert_eq!(headers.len(), 1, "{kind}");
        assert_eq!(headers.get(header).unwrap(), value);
        assert!(headers.get(header).unwrap().is_sensitive());
        assert!(kind.authorize(&mut headers, "line\nbreak").is_err());
        assert_eq!(headers.get(AUTHORIZATION), None);
    }
}

#[test]
fn errors_have_each_providers_own_shape() {
    for kind in Kind::ALL {
        for status in [400_u16, 401, 403, 404, 413, 429, 500, 502, 529] {
            let body = kind.error_body(StatusCode::from_u16(status).unwrap(), "a \"reason\"", "req-1");
            let json: serde_json::Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(json["error"]["message"], "a \"reason\"");
            assert!(body.windows(5).any(|part| part == b"req-1"));
            match kind {
                Kind::Anthropic => assert_eq!(json["type"], "error"),
                Kind::Gemini => assert_eq!(json["error"]["code"], status),
                Kind::OpenAi | Kind::Vllm => assert!(json["error"]["type"].is_string()),
            }
        }
    }
}

fn prepared(path: &str, body: &'static str, model: Option<&str>) -> Prepared {
    let request = inspect(&http::Method::POST, path, Some("application/json"), body.as_bytes());
    assert_eq!(request.malformed, None, "{body}");
    Kind::OpenAi.prepare(&request, path, Bytes::from_static(body.as_bytes()), model)
}

#[test]
fn only_the_edited_bytes_change() {
    let chat = "/v1/chat/completions";
    let cases: [(&'static str, Option<&str>, &str, bool); 10] = [
        (r#"{"model": "a" , "x":1.50}"#, None, r#"{"model": "a" , "x":1.50}"#, false),
        (r#"{"x":{"model":"a"}, "model": "a" }"#, Some("b\"c"), r#"{"x":{"model":"a"}, "model": "b\"c" }"#, false),
        (r#"{"model":"a"}"#, Some("a"), r#"{"model":"a"}"#, false),
        (
            r#" {"stream":true,"model":"a"}"#,
            Some("b"),
            r#" {"stream_options":{"include_usage":true},"stream":true,"model":"b"}"#,
            true,
        ),
        (
            r#"{"stream":true,"stream_options":{}}"#,
            None,
            r#"{"stream":true,"stream_options":{"include_usage":true}}"#,
            true,
        ),
        (
            r#"{"stream":true,"stream_options":null}"#,
            None,
            r#"{"stream":true,"stream_options":{"include_usage":true}}"#,
            true,
        ),
        (
            r#"{"stream":true,"stream_options":{"a":1}}"#,
            None,
            r#"{"stream":true,"stream_options":{"include_usage":true,"a":1}}"#,
            true,
        ),
        (
            r#"{"stream":true,"stream_options":{"include_usage":false}}"#,
            None,
            r#"{"stream":true,"stream_options":{"include_usage":true}}"#,
            true,
        ),
        (
            r#"{"stream":true,"stream_options":{"include_usage":true}}"#,
            None,
            r#"{"stream":true,"stream_options":{"include_usage":true}}"#,
            false,
        ),
        (
            r#"{"stream":true,"stream_options":{"include_usage":null}}"#,
            None,
            r#"{"stream":true,"stream_options":{"include_usage":true}}"#,
            true,
        ),
    ];
    for (body, model, expected, hide) in cases {
        let prepared = prepared(chat, body, model);
        assert_eq!(
            (std::str::from_utf8(&prepared.body).unwrap(), prepared.hide_usage_chunk),
            (expected, hide),
            "{body}"
        );
    }
}

#[test]
fn paths_are_tidied_rewritten_and_freed_of_our_keys() {
    let path = "//v1beta//models/gemini-2.5-pro:streamGenerateContent?key=fk-1&alt=sse";
    assert_eq!(prepared(path, "{}", Some("x/y")).path_and_query, "/v1beta/models/x%2Fy:streamGenerateContent?alt=sse");
    assert_eq!(prepared("/v1/chat/completions?key=fk-1", "{}", None).path_and_query, "/v1/chat/completions");
    assert_eq!(without_query_key("/a?key=b&c=d"), "/a?c=d");
    assert_eq!(without_query_key("/a?monkey=b"), "/a?monkey=b");
}

proptest! {
    #[test]
    fn kinds_of_any_counts_add_up_to_their_totals(counts in proptest::array::uniform8(prop_oneof![0..100_u64, any::<u64>()])) {
        let [prompt, completion, cached, audio, reasoning, image, write, cached_audio] = counts;
        let json = format!(r#"{{"prompt_tokens":{prompt},"completion_tokens":{completion},"prompt_tokens_details":{{"cached_tokens":{cached},"audio_tokens":{audio},"image_tokens":{image},"cache_write_tokens":{write},"cached_tokens_details":{{"audio_tokens":{cached_audio}}}}},"completion_tokens_details":{{"reasoning_tokens":{reasoning},"audio_tokens":{audio}}}}}"#);
        let usage = read(Kind::OpenAi, Operation::Chat, &json);
        prop_assert_eq!((usage.input_tokens(), usage.output_tokens()), (prompt, completion));
        let json = format!(r#"{{"promptTokenCount":{prompt},"cachedContentTokenCount":{cached},"candidatesTokenCount":{completion},"promptTokensDetails":[{{"modality":"AUDIO","tokenCount":{audio}}}],"cacheTokensDetails":[{{"modality":"AUDIO","tokenCount":{cached_audio}}}]}}"#);
        let usage = read(Kind::Gemini, Operation::Generate, &json);
        prop_assert_eq!((usage.input_tokens(), usage.output_tokens()), (prompt, completion));
        let json = format!(r#"{{"input_tokens":0,"output_tokens":{completion},"cache_creation_input_tokens":{write},"cache_creation":{{"ephemeral_5m_input_tokens":{audio},"ephemeral_1h_input_tokens":{cached}}}}}"#);
        let usage = read(Kind::Anthropic, Operation::Messages, &json);
        prop_assert_eq!((usage.input_tokens(), usage.output_tokens()), (write, completion));
    }
}
