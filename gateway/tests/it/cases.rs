//! What broke on other gateways, by number: `docs` and the issue list say where it was reported.

use std::time::Duration;

use gateway::{Kind, ModelRoute, OnClientAbort, RouteTarget, Settings};
use http_body_util::BodyExt;
use ledger::{Charge, Operation, Outcome, ServiceClass, UnpricedReason, UsageQuality};

use crate::upstream::{
    DONE, Script, Step, Upstream, chat, chat_body, chat_stream, chunk, delta, json, last_chunk, sse_head, usage_chunk,
};
use crate::world::{Answered, CHAT, CHAT_STREAM, Fails, World, key, settings, usd};

async fn openai(script: Script) -> (Upstream, World) {
    let upstream = Upstream::start([script]).await;
    let world = World::start(settings(&[("openai", Kind::OpenAi, &upstream)])).await;
    (upstream, world)
}

async fn draining(script: Script) -> (Upstream, World) {
    let upstream = Upstream::start([script]).await;
    let mut settings = settings(&[("openai", Kind::OpenAi, &upstream)]);
    settings.on_client_abort = OnClientAbort::Drain;
    (upstream, World::start(settings).await)
}

/// Asks for a stream, reads one chunk of it, and goes away.
async fn drop_after_a_chunk(world: &World) {
    let mut response = world.begin("/v1/chat/completions", CHAT_STREAM).await;
    let first = response.frame().await.expect("a chunk").unwrap().into_data().unwrap();
    assert!(first.starts_with(b"data: "));
}

#[tokio::test]
async fn case_01_client_drops_the_stream_and_its_usage_is_booked() {
    let words = ["Hello", " to", " everyone", " in", " the", " room"];
    let (upstream, world) = openai(chat_stream(&words, 200, 17, 6)).await;
    drop_after_a_chunk(&world).await;
    let attempt = world.one().await;
    assert_eq!((attempt.outcome, attempt.usage_quality), (Outcome::ClientAborted, UsageQuality::Estimated));
    assert!(attempt.usage.input > 0 && attempt.usage.output > 0, "{:?}", attempt.usage);
    assert!(matches!(attempt.charge, Charge::Estimated { .. }), "{:?}", attempt.charge);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(upstream.hung_up(), 1, "the upstream was told to stop");
}

#[tokio::test]
async fn case_02_a_cut_stream_is_booked_with_what_was_delivered() {
    let mut script = vec![sse_head()];
    script.extend(["One", " two", " three", " four"].map(|text| chunk(&delta(text))));
    script.extend([Step::Wait(50), Step::Reset]);
    let (_upstream, world) = openai(script).await;
    let answered = world.send("/v1/chat/completions", CHAT_STREAM).await;
    assert!(!answered.whole, "the client must see that it was cut");
    let attempt = world.one().await;
    assert_eq!((attempt.outcome, attempt.usage_quality), (Outcome::UpstreamCut, UsageQuality::Estimated));
    assert!(attempt.usage.output >= 4 && attempt.usage.input >= 7, "{:?}", attempt.usage);
}

#[tokio::test]
async fn case_02_drain_books_the_real_usage_of_a_dropped_stream() {
    let (upstream, world) = draining(chat_stream(&["Hello", " to", " all"], 50, 17, 321)).await;
    drop_after_a_chunk(&world).await;
    let attempt = world.one().await;
    assert_eq!((attempt.outcome, attempt.usage_quality), (Outcome::ClientAborted, UsageQuality::Reported));
    assert_eq!((attempt.usage.input, attempt.usage.output), (17, 321));
    assert_eq!(upstream.hung_up(), 0);
}

#[tokio::test]
async fn case_02_drain_is_bounded_in_time_and_size() {
    let endless: Script =
        std::iter::once(sse_head()).chain((0..10_000).flat_map(|_| [chunk(&delta("word ")), Step::Wait(1)])).collect();
    for (ms, bytes) in [(100, u64::MAX), (60_000, 2_000)] {
        let (_upstream, world) = draining(endless.clone()).await;
        let mut bounded = Settings::clone(&world.settings.load());
        (bounded.limits.drain_ms_max, bounded.limits.drain_bytes_max) = (ms, bytes);
        world.settings.store(bounded.into());
        drop_after_a_chunk(&world).await;
        let attempt = world.one().await;
        assert_eq!((attempt.outcome, attempt.usage_quality), (Outcome::ClientAborted, UsageQuality::Estimated));
        assert!(attempt.usage.output > 1 && attempt.timeline.finished_us < 3_000_000);
    }
}

#[tokio::test]
async fn case_03_explicit_zero_usage_is_known_not_missing() {
    for (script, body) in [(chat(0, 0), CHAT), (chat_stream(&[], 0, 0, 0), CHAT_STREAM)] {
        let (_upstream, world) = openai(script).await;
        assert!(world.send("/v1/chat/completions", body).await.whole);
        let attempt = world.one().await;
        assert_eq!(attempt.usage_quality, UsageQuality::Reported);
        assert_eq!((attempt.charge.name(), usd(&attempt).as_deref()), ("priced", Some("0.00")));
    }
}

#[tokio::test]
async fn case_04_a_non_streaming_disconnect_books_the_whole_answer() {
    // At both moments a client can leave: before the head of the answer, and in the middle of its body.
    let body = chat_body("gpt-4o-2024-08-06", 1_000, 500);
    let (start, end) = body.split_at(20);
    let head =
        format!("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{start}", body.len());
    let late = |ms, first: &str| {
        vec![Step::Wait(ms), crate::upstream::write(first), Step::Wait(300), crate::upstream::write(end)]
    };
    for wait in [300, 0] {
        let (upstream, world) = openai(late(wait, &head)).await;
        let asking = world.send("/v1/chat/completions", CHAT);
        assert!(tokio::time::timeout(Duration::from_millis(150), asking).await.is_err(), "the client gave up");
        let attempt = world.one().await;
        assert_eq!((attempt.outcome, attempt.usage_quality), (Outcome::ClientAborted, UsageQuality::Reported));
        assert_eq!((attempt.usage.input, attempt.usage.output), (1_000, 500));
        assert_eq!(usd(&attempt).as_deref(), Some("0.0075"), "1000 x 2.50 + 500 x 10 a million");
        assert_eq!(upstream.hung_up(), 0);
    }
}

/// The price card is the reporter's: cache hits at half of the input.
#[tokio::test]
async fn case_06_gemini_cache_hits_are_booked_at_their_own_price() {
    let body = r#"{"candidates":[{"content":{"parts":[{"text":"Done"}]},"finishReason":"STOP"}],"modelVersion":"gemini-2.5-pro","responseId":"r1","usageMetadata":{"promptTokenCount":262960,"cachedContentTokenCount":257955,"candidatesTokenCount":1744,"totalTokenCount":264704}}"#;
    let upstream = Upstream::start([json(200, body)]).await;
    let world = World::start(settings(&[("google", Kind::Gemini, &upstream)])).await;
    let card = r#"{"price":[{"provider":"google","model":"gemini-2.5-pro","input":"1.25","cache_read":"0.625","output":"10"}]}"#;
    let overrides = serde_json::from_str(card).unwrap();
    world.prices.store(ledger::price::PriceBook::base().with_overrides(overrides).into());
    let ask = r#"{"contents":[{"role":"user","parts":[{"text":"Go on."}]}]}"#;
    assert_eq!(world.send("/v1beta/models/gemini-2.5-pro:generateContent", ask).await.text, body);
    let attempt = world.one().await;
    assert_eq!((attempt.usage.input, attempt.usage.cache_read, attempt.usage.output), (5_005, 257_955, 1_744));
    assert_eq!(attempt.charge.costs().unwrap().effective_cost.rounded(4), "0.1849");
}

#[tokio::test]
async fn case_10_the_reported_tier_and_dated_model_decide_the_price() {
    let cases = [
        ("gpt-4o-mini-2024-07-18", 9, 2, "priority", "0.00000425"),
        ("gpt-4o-2024-08-06", 9, 1, "priority", "0.00005525"),
        ("gpt-4.1-2025-04-14", 9, 1, "priority", "0.0000455"),
        ("gpt-4.1-mini-2025-04-14", 9, 1, "priority", "0.0000091"),
        ("gpt-4o-2024-08-06", 9, 1, "default", "0.0000325"),
    ];
    for (model, input, output, tier, right) in cases {
        let body = chat_body(model, input, output).replacen('{', &format!("{{\"service_tier\":\"{tier}\","), 1);
        let (_upstream, world) = openai(json(200, &body)).await;
        let asked = CHAT.replacen('{', "{\"service_tier\":\"priority\",", 1);
        world.send("/v1/chat/completions", &asked).await;
        let attempt = world.one().await;
        let class = if tier == "priority" { ServiceClass::Priority } else { ServiceClass::Standard };
        assert_eq!((attempt.route.service_class, attempt.route.response_model.as_deref()), (class, Some(model)));
        assert_eq!(usd(&attempt).as_deref(), Some(right), "{model} {tier} {:?}", attempt.charge);
    }
}

#[tokio::test]
async fn case_12_each_attempt_of_a_fallback_has_its_own_price() {
    let first = r#"{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"},"usage":{"input_tokens":2,"cache_creation_input_tokens":2085,"cache_read_input_tokens":560186,"output_tokens":299}}"#;
    let second = r#"{"id":"msg_1","type":"message","role":"assistant","model":"claude-opus-4-8","content":[{"type":"text","text":"Done"}],"stop_reason":"end_turn","usage":{"input_tokens":0,"cache_creation_input_tokens":0,"cache_read_input_tokens":480000,"output_tokens":696}}"#;
    let upstream = Upstream::start([json(529, first), json(200, second)]).await;
    let backup = upstream.clone();
    let mut settings = settings(&[("a", Kind::Anthropic, &upstream), ("b", Kind::Anthropic, &backup)]);
    let target =
        |upstream: &str, model: &str| RouteTarget { upstream: upstream.into(), model: Some(model.into()), weight: 1 };
    settings.routes = vec![ModelRoute {
        model: "smart".into(),
        targets: vec![target("a", "claude-fable-5")],
        fallbacks: vec![target("b", "claude-opus-4-8")],
        ..ModelRoute::default()
    }];
    let world = World::start(settings).await;
    let body = r#"{"model":"smart","max_tokens":1000,"messages":[{"role":"user","content":"Go on."}]}"#;
    let answered = world.send("/v1/messages", body).await;
    assert_eq!((answered.status.as_u16(), answered.text.as_str()), (200, second), "byte for byte");
    assert_eq!(answered.headers["x-farthing-attempts"], "2");
    let attempts = world.settled().await;
    let [failed, good] = attempts.as_slice() else { panic!("{attempts:#?}") };
    assert_eq!((failed.id.request, failed.id.number, good.id.number), (good.id.request, 0, 1));
    assert_eq!((failed.outcome, good.outcome), (Outcome::UpstreamError, Outcome::Completed));
    assert_eq!(usd(failed).as_deref(), Some("0.6012185"), "{:?}", failed.charge);
    assert_eq!(usd(good).as_deref(), Some("0.2574"));
    let sum: ledger::Money =
        attempts.iter().filter_map(|attempt| attempt.charge.costs()).map(|costs| costs.effective_cost).sum();
    assert_eq!(sum.to_string(), "0.8586185");
    let models: Vec<_> = upstream.received().iter().map(|received| received.body.contains("claude-fable-5")).collect();
    assert_eq!(models, [true, false], "the model's name was rewritten for each");
}

#[tokio::test]
async fn case_13_a_cost_in_the_usage_is_not_believed() {
    let body = chat_body("grok-4.5", 1_200, 124).replace("\"total_tokens\"", "\"cost\":3144000,\"total_tokens\"");
    let upstream = Upstream::start([json(200, &body)]).await;
    let mut settings = settings(&[("xai", Kind::OpenAi, &upstream)]);
    std::sync::Arc::get_mut(&mut settings.upstreams[0]).unwrap().provider = "x-ai".into();
    let world = World::start(settings).await;
    world.send("/v1/chat/completions", &CHAT.replace("gpt-4o", "grok-4.5")).await;
    let attempt = world.one().await;
    assert_eq!(usd(&attempt).as_deref(), Some("0.003144"), "{:?}", attempt.charge);
}

#[tokio::test]
async fn case_14_an_unknown_model_is_unpriced_and_never_zero() {
    let model = "deepseek-ai/DeepSeek-V4-Flash-0731";
    let upstream = Upstream::start([json(200, &chat_body(model, 100, 10))]).await;
    let mut settings = settings(&[("deepinfra", Kind::OpenAi, &upstream)]);
    std::sync::Arc::get_mut(&mut settings.upstreams[0]).unwrap().provider = "deepinfra".into();
    let world = World::start(settings).await;
    world.send("/v1/chat/completions", &CHAT.replace("gpt-4o", model)).await;
    let attempt = world.one().await;
    assert_eq!(attempt.charge, Charge::Unpriced { reason: UnpricedReason::UnknownModel });
    assert_eq!((attempt.usage.input, attempt.usage.output), (100, 10));
}

#[tokio::test]
async fn case_15_every_surface_is_admitted_and_metered_alike() {
    let usage = r#""usage":{"input_tokens":30,"output_tokens":12,"total_tokens":42}"#;
    let responses = format!(
        r#"{{"id":"resp_1","object":"response","status":"completed","model":"gpt-4o-2024-08-06","output":[],{usage}}}"#
    );
    let messages = format!(
        r#"{{"id":"msg_1","type":"message","model":"claude-sonnet-4-5","content":[],"stop_reason":"end_turn",{usage}}}"#
    );
    let ask = r#"{"model":"MODEL","input":"Hello","max_tokens":9,"messages":[{"role":"user","content":"Hello"}]}"#;
    let surfaces = [
        ("/v1/responses", "gpt-4o", responses.as_str(), Operation::Responses, Some((30, 12))),
        ("/v1/messages", "claude-sonnet-4-5", messages.as_str(), Operation::Messages, Some((30, 12))),
        ("/v1/something/new", "gpt-4o", r#"{"made":1}"#, Operation::Other, None),
    ];
    for (path, model, answer, operation, tokens) in surfaces {
        let upstream = Upstream::start([json(200, answer)]).await;
        let settings = settings(&[("openai", Kind::OpenAi, &upstream), ("anthropic", Kind::Anthropic, &upstream)]);
        let (plain, ring) = key(|key| key.models = vec![model.into()]);
        let world = World::with(settings, ring, None).await;
        let ask_as = async |credential: &str, model: &str| -> Answered {
            let body = ask.replace("MODEL", model);
            let request = world.post(path).header("x-api-key", credential).body(body.into()).unwrap();
            world.ask(request).await
        };
        assert_eq!(ask_as("", model).await.status, 401, "{path}: no key");
        assert_eq!(ask_as("fk-wrong", model).await.status, 401, "{path}: unknown key");
        assert_eq!(ask_as(plain.reveal(), "o3").await.status, 403, "{path}: not a model of the key");
        assert!(upstream.received().is_empty() && world.journal.opened().is_empty());
        let answered = ask_as(plain.reveal(), model).await;
        assert_eq!((answered.status.as_u16(), answered.text.as_str()), (200, answer));
        let attempt = world.one().await;
        assert_eq!((attempt.route.operation, attempt.context.team.as_deref()), (operation, Some("search")));
        match tokens {
            Some(tokens) => assert_eq!(
                (attempt.usage.input, attempt.usage.output, attempt.charge.name()),
                (tokens.0, tokens.1, "priced")
            ),
            None => assert_eq!((attempt.usage_quality, attempt.charge.name()), (UsageQuality::Missing, "unpriced")),
        }
    }
}

#[test]
fn case_23_the_request_path_cannot_read_a_table() {
    let manifest = include_str!("../../Cargo.toml");
    for storage in ["store", "deltalake", "datafusion", "parquet", "object_store", "arrow"] {
        let needs = manifest.lines().any(|line| line.split(['.', ' ', '=']).next() == Some(storage));
        assert!(!needs, "the gateway depends on `{storage}`");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn case_23_a_slow_sync_delays_only_the_end_of_answers_and_nothing_waits_in_line() {
    let script =
        [vec![sse_head(), chunk(&delta("Hello"))], vec![chunk(&usage_chunk(9, 1)), chunk(DONE), last_chunk()]].concat();
    let upstream = Upstream::start([script]).await;
    let mut settings = settings(&[("openai", Kind::OpenAi, &upstream)]);
    settings.durability = gateway::Durability::Power;
    let world = World::start(settings).await;
    world.journal.sync_delay_ms.store(50, std::sync::atomic::Ordering::Relaxed);
    let start = tokio::time::Instant::now();
    let ask = async || {
        let mut response = world.begin("/v1/chat/completions", CHAT_STREAM).await;
        let first = response.frame().await.unwrap().unwrap().into_data().unwrap();
        assert!(first.ends_with(b"\n\n"));
        let first_at = start.elapsed();
        let rest = crate::world::read(response).await;
        assert!(rest.whole && rest.text.ends_with(DONE));
        (first_at, start.elapsed())
    };
    let times = futures_util::future::join_all((0..20).map(|_| ask())).await;
    for (first_at, end_at) in times {
        assert!(end_at - first_at >= Duration::from_millis(40), "the end waited for the sync");
        assert!(end_at < Duration::from_millis(500), "twenty syncs of 50 ms did not queue up: {end_at:?}");
    }
    assert_eq!(world.settled().await.len(), 20);
    world.journal.fail(Fails::Nothing);
}
