//! One engine at a time, driven by HTTP clients.

use std::time::Duration;

use fleet::engine::{EngineSpec, FinishReason, Limits, RunningEngine, SharedGpus, start};
use fleet::prometheus::{self, Scrape};
use futures_util::future::join_all;
use http::StatusCode;
use http_body_util::BodyExt;
use ledger::step::{GpuSheet, ModelShape};
use serde_json::{Value, json};

use crate::client::{HttpClient, client, clock, events, get, post, post_json};

fn spec() -> EngineSpec {
    EngineSpec { speed: 10.0, seed: 42, ..EngineSpec::new("model-a", ModelShape::LLAMA_3_1_8B, GpuSheet::H100, 1) }
}

async fn engine(spec: EngineSpec) -> (RunningEngine, HttpClient) {
    (start(spec, SharedGpus::default(), clock()).await.unwrap(), client())
}

/// A chat request with `words` words that no other `seed` shares.
fn chat(seed: usize, words: usize, max_tokens: u32, stream: bool) -> Value {
    let text: Vec<String> = (0..words).map(|word| format!("w{seed}-{word}")).collect();
    json!({
        "model": "model-a",
        "messages": [{ "role": "user", "content": text.join(" ") }],
        "max_tokens": max_tokens,
        "ignore_eos": true,
        "stream": stream,
        "stream_options": { "include_usage": true },
    })
}

async fn scrape(client: &HttpClient, engine: &RunningEngine) -> Scrape {
    let (status, text) = get(client, &format!("{}/metrics", engine.base_url())).await;
    assert_eq!(status, StatusCode::OK);
    let scrape = prometheus::parse(&text);
    assert_eq!(scrape.unknown_lines, 0);
    scrape
}

async fn until_idle(engine: &RunningEngine) {
    for _ in 0..1000 {
        if engine.load() == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the engine still works on {} requests", engine.load());
}

#[tokio::test(flavor = "multi_thread")]
async fn counters_equal_usages_with_16_streams_at_once_and_aborts() {
    let (engine, client) = engine(EngineSpec { speed: 1.0, ..spec() }).await;
    let url = format!("{}/v1/chat/completions", engine.base_url());
    let requests = (0..16).map(|seed| {
        let (client, url) = (client.clone(), url.clone());
        async move {
            let (status, mut body) = post(&client, &url, chat(seed, 20 + seed, 40, true).to_string()).await;
            assert_eq!(status, StatusCode::OK);
            if seed % 4 == 3 {
                // Read some tokens, then hang up.
                for _ in 0..3 {
                    body.frame().await.unwrap().unwrap();
                }
                drop(body);
                return None;
            }
            let events = events(body).await;
            assert_eq!(events.last().unwrap(), "[DONE]");
            let chunks: Vec<Value> =
                events[..events.len() - 1].iter().map(|event| serde_json::from_str(event).unwrap()).collect();
            let usage = &chunks.last().unwrap()["usage"];
            let text: String =
                chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
            let completion = usage["completion_tokens"].as_u64().unwrap();
            assert_eq!(text.split_whitespace().count() as u64, completion);
            assert_eq!(chunks[chunks.len() - 2]["choices"][0]["finish_reason"], "length");
            assert_eq!(chunks.len() as u64, completion + 2, "a chunk for the role, one a token, one for the usage");
            Some((usage["prompt_tokens"].as_u64().unwrap(), completion))
        }
    });
    let usages: Vec<(u64, u64)> = join_all(requests).await.into_iter().flatten().collect();
    assert_eq!(usages.len(), 12);
    until_idle(&engine).await;

    let aborted: Vec<_> = engine.finished().into_iter().filter(|ended| ended.reason == FinishReason::Abort).collect();
    assert_eq!(aborted.len(), 4);
    assert!(aborted.iter().all(|ended| (1..40).contains(&ended.output_tokens)), "{aborted:?}");
    let prompt: u64 = usages.iter().map(|usage| usage.0).sum::<u64>()
        + aborted.iter().map(|ended| u64::from(ended.prompt_tokens)).sum::<u64>();
    let output: u64 = usages.iter().map(|usage| usage.1).sum::<u64>()
        + aborted.iter().map(|ended| u64::from(ended.output_tokens)).sum::<u64>();

    let scrape = scrape(&client, &engine).await;
    assert_eq!(scrape.total("vllm:prompt_tokens_total"), Some(prompt as f64));
    assert_eq!(scrape.total("vllm:generation_tokens_total"), Some(output as f64));
    let ended = |reason| scrape.value("vllm:request_success_total", &[("finished_reason", reason)]);
    assert_eq!((ended("length"), ended("abort"), ended("stop")), (Some(12.0), Some(4.0), Some(0.0)));
    assert_eq!(scrape.total("vllm:num_requests_running"), Some(0.0));
    assert_eq!(scrape.total("vllm:time_to_first_token_seconds_count"), Some(16.0));
}

#[tokio::test]
async fn a_client_that_does_not_stream_and_leaves_is_an_abort() {
    let (engine, client) = engine(EngineSpec { speed: 1.0, ..spec() }).await;
    let url = format!("{}/v1/chat/completions", engine.base_url());
    let request = chat(1, 20, 2000, false);
    let asked = tokio::time::timeout(Duration::from_millis(300), post_json(&client, &url, &request)).await;
    assert!(asked.is_err(), "2,000 tokens take longer than 300 ms");
    drop(client);
    until_idle(&engine).await;
    let ended = engine.finished();
    assert_eq!((ended.len(), ended[0].reason), (1, FinishReason::Abort));
    assert_eq!(engine.counters().generation_tokens, u64::from(ended[0].output_tokens));
}

#[tokio::test]
async fn the_next_turn_of_a_conversation_hits_the_prefix_cache() {
    let (engine, client) = engine(spec()).await;
    let url = format!("{}/v1/chat/completions", engine.base_url());
    let mut request = chat(1, 100, 30, false);
    let (_, first) = post_json(&client, &url, &request).await;
    assert_eq!(first["usage"]["prompt_tokens"], 102, "100 words, the user's turn and the assistant's");
    assert_eq!(first["usage"]["prompt_tokens_details"]["cached_tokens"], 0);

    let messages = request["messages"].as_array_mut().unwrap();
    messages.push(first["choices"][0]["message"].clone());
    messages.push(json!({ "role": "user", "content": [{ "type": "text", "text": "and then what" }] }));
    let (_, second) = post_json(&client, &url, &request).await;
    assert_eq!(second["usage"]["prompt_tokens"], 102 + 30 + 4 + 1);
    assert_eq!(second["usage"]["prompt_tokens_details"]["cached_tokens"], 128, "131 computed tokens in full blocks");

    let scrape = scrape(&client, &engine).await;
    assert_eq!(scrape.total("vllm:prefix_cache_hits_total"), Some(128.0));
    assert_eq!(scrape.total("vllm:prefix_cache_queries_total"), Some(102.0 + 137.0));
    assert_eq!(scrape.value("vllm:prompt_tokens_by_source_total", &[("source", "local_cache_hit")]), Some(128.0));
}

#[tokio::test]
async fn small_memory_preempts_and_finishes_everything() {
    let limits = Limits { kv_blocks: 16, ..Limits::default() };
    let (engine, client) = engine(EngineSpec { limits, ..spec() }).await;
    let url = format!("{}/v1/chat/completions", engine.base_url());
    let requests: Vec<Value> = (0..8).map(|seed| chat(seed, 30, 100, false)).collect();
    let answers = join_all(requests.iter().map(|request| post_json(&client, &url, request))).await;
    for (status, answer) in answers {
        assert_eq!((status, &answer["usage"]["completion_tokens"]), (StatusCode::OK, &json!(100)));
    }
    let scrape = scrape(&client, &engine).await;
    assert!(scrape.total("vllm:num_preemptions_total") > Some(0.0));
    assert_eq!(scrape.total("vllm:prompt_tokens_total"), Some(8.0 * 32.0));
    assert_eq!(scrape.total("vllm:generation_tokens_total"), Some(800.0));
}

#[tokio::test]
async fn completions_speak_their_own_shape() {
    let (engine, client) = engine(spec()).await;
    let url = format!("{}/v1/completions", engine.base_url());
    let request = json!({ "model": "model-a", "prompt": "one two three", "max_tokens": 5, "ignore_eos": true });
    let (status, answer) = post_json(&client, &url, &request).await;
    assert_eq!((status, &answer["object"]), (StatusCode::OK, &json!("text_completion")));
    assert_eq!(
        answer["usage"],
        json!({ "prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8,
                                        "prompt_tokens_details": { "cached_tokens": 0 } })
    );
    let text = answer["choices"][0]["text"].as_str().unwrap();

    let mut request = request;
    request["stream"] = json!(true);
    let (_, body) = post(&client, &url, request.to_string()).await;
    let events = events(body).await;
    let streamed: String = events
        .iter()
        .filter_map(|event| serde_json::from_str::<Value>(event).ok())
        .filter_map(|chunk| chunk["choices"][0]["text"].as_str().map(str::to_owned))
        .collect();
    assert_eq!(streamed, text, "equal prompts get equal answers");
    assert_eq!(events.len(), 6, "without include_usage there is no usage chunk");
}

#[tokio::test]
async fn messages_exclude_cache_reads_from_input() {
    let (engine, client) = engine(spec()).await;
    let url = format!("{}/v1/messages", engine.base_url());
    let words: Vec<String> = (0..60).map(|word| format!("w{word}")).collect();
    let mut request = json!({
        "model": "model-a", "max_tokens": 10, "system": words.join(" "),
        "messages": [{ "role": "user", "content": "hello there" }],
    });
    let (status, first) = post_json(&client, &url, &request).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(first["usage"]["input_tokens"], 61 + 3 + 1);
    let (_, counted) = post_json(&client, &format!("{url}/count_tokens"), &request).await;
    assert_eq!(counted, json!({ "input_tokens": 65 }));

    request["stream"] = json!(true);
    let (_, body) = post(&client, &url, request.to_string()).await;
    let events: Vec<Value> = events(body).await.iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    let start = &events[0]["message"]["usage"];
    assert_eq!((&start["input_tokens"], &start["cache_read_input_tokens"]), (&json!(1), &json!(64)));
    assert_eq!(events[events.len() - 2]["usage"]["output_tokens"], first["usage"]["output_tokens"]);
    assert_eq!(events.last().unwrap()["type"], "message_stop");

    request["max_tokens"] = Value::Null;
    let (status, error) = post_json(&client, &url, &request).await;
    assert_eq!((status, &error["error"]["type"]), (StatusCode::BAD_REQUEST, &json!("invalid_request_error")));
}

#[tokio::test]
async fn bad_requests_get_one_clear_error() {
    let (engine, client) = engine(spec()).await;
    let long = chat(1, 20, 1_000_000, false).to_string();
    let cases = [
        ("/v1/chat/completions", "{\"model\": ", 400, "BadRequestError"),
        ("/v1/chat/completions", "{}", 400, "BadRequestError"),
        ("/v1/chat/completions", "{\"messages\": 7}", 400, "BadRequestError"),
        ("/v1/chat/completions", &long, 400, "BadRequestError"),
        ("/v1/chat/completions", "{\"model\": \"nobody\", \"messages\": []}", 404, "NotFoundError"),
        ("/v1/completions", "{\"prompt\": [\"a\", \"b\"]}", 400, "BadRequestError"),
        ("/v1/completions", "{\"prompt\": \" \"}", 400, "BadRequestError"),
        ("/v1/embeddings", "{}", 404, "NotFoundError"),
    ];
    for (path, body, status, kind) in cases {
        let (got, body) = post(&client, &format!("{}{path}", engine.base_url()), body.to_owned()).await;
        let error: Value = serde_json::from_slice(&body.collect().await.unwrap().to_bytes()).unwrap();
        assert_eq!((got.as_u16(), error["error"]["type"].as_str()), (status, Some(kind)), "{path} {error}");
        assert_eq!(error["error"]["code"], status);
    }
    assert_eq!(engine.counters().prompt_tokens, 0);
    assert_eq!(get(&client, &format!("{}/health", engine.base_url())).await.0, StatusCode::OK);
    let (_, models) = get(&client, &format!("{}/v1/models", engine.base_url())).await;
    assert_eq!(serde_json::from_str::<Value>(&models).unwrap()["data"][0]["id"], "model-a");
}

#[tokio::test]
async fn failures_come_at_their_rate_and_before_any_token() {
    let (engine, client) = engine(EngineSpec { failure_share: 0.3, ..spec() }).await;
    let url = format!("{}/v1/chat/completions", engine.base_url());
    let mut failed = 0;
    for seed in 0..100 {
        let (status, answer) = post_json(&client, &url, &chat(seed, 5, 1, false)).await;
        match status {
            StatusCode::OK => {}
            StatusCode::SERVICE_UNAVAILABLE => {
                assert_eq!(answer["error"]["type"], "ServiceUnavailableError");
                failed += 1;
            }
            other => panic!("{other}: {answer}"),
        }
    }
    assert!((15..45).contains(&failed), "{failed}");
    assert_eq!(engine.counters().generation_tokens, 100 - failed);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_active_neighbour_on_the_same_gpus_slows_a_step_down() {
    let gpus = SharedGpus::default();
    let clock = clock();
    let start = async |model: &str| {
        let spec = EngineSpec { models: vec![model.to_owned()], speed: 1.0, ..spec() };
        start(spec, gpus.clone(), clock.clone()).await.unwrap()
    };
    let (a, b) = (start("model-a").await, start("model-b").await);
    let client = client();
    let url = |engine: &RunningEngine| format!("{}/v1/chat/completions", engine.base_url());
    let request = chat(1, 10, 60, false);
    let timed = async |request: &Value| {
        let before = clock.monotonic_us();
        post_json(&client, &url(&a), request).await;
        clock.monotonic_us() - before
    };
    let alone_us = timed(&request).await;

    let mut neighbour = chat(2, 10, 100, true);
    neighbour["model"] = json!("model-b");
    let (_, _stream) = post(&client, &url(&b), neighbour.to_string()).await;
    let shared_us = timed(&request).await;
    let slowdown = shared_us as f64 / alone_us as f64;
    assert!((1.4..3.0).contains(&slowdown), "{alone_us} us alone, {shared_us} us with a neighbour");
}

#[tokio::test]
async fn descriptions_that_cannot_work_are_refused() {
    let cases = [
        EngineSpec { models: vec![], ..spec() },
        EngineSpec { gpus: 0, ..spec() },
        EngineSpec { speed: 0.0, ..spec() },
        EngineSpec::new(
            "too-large",
            ModelShape { total_parameters: 70e9, ..ModelShape::LLAMA_3_1_8B },
            GpuSheet::L4,
            1,
        ),
    ];
    for spec in cases {
        assert!(start(spec.clone(), SharedGpus::default(), clock()).await.is_err(), "{spec:?}");
    }
}
