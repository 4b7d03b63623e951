//! Telemetry over real sockets: fleet's own engine, servers that misbehave, and a publisher of steps.

use std::io::Write;
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;
use fleet::engine::{EngineSpec, RunningEngine, SharedGpus, start};
use fleet::prometheus::parse;
use fleet::steps::{Heard, StepError, StepSource, follow};
use fleet::telemetry::{Bearer, EngineKind, GpuTarget, Limits, ScrapeCause, Scraper, Target, dcgm, read, restarted};
use http::StatusCode;
use ledger::step::{GpuSheet, ModelShape};
use ledger::{EngineReading, Timestamp};
use proptest::prelude::*;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use zeromq::{PubSocket, Socket, SocketSend, ZmqMessage};

use crate::client::{client, clock, post_json};

const NOW: Timestamp = Timestamp::from_micros(1_700_000_000_000_000);

fn target(kind: EngineKind, url: &str) -> Target {
    Target { engine: "engine-1".into(), pool: "pool-1".into(), kind, url: url.to_owned(), bearer: None }
}

fn spec() -> EngineSpec {
    EngineSpec { speed: 10.0, ..EngineSpec::new("model-a", ModelShape::LLAMA_3_1_8B, GpuSheet::H100, 1) }
}

async fn our_engine() -> RunningEngine {
    start(spec(), SharedGpus::default(), clock()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn our_own_engine_is_read_like_any_vllm() {
    let engine = our_engine().await;
    let (scraper, http) = (Scraper::new(Limits::default()), client());
    let at_engine = target(EngineKind::Vllm, &format!("{}/metrics", engine.base_url()));

    let prompt: Vec<String> = (0..100).map(|word| format!("w{word}")).collect();
    let request = json!({ "model": "model-a", "prompt": prompt.join(" "), "max_tokens": 12, "ignore_eos": true });
    let (mut prompt_tokens, mut generation_tokens) = (0, 0);
    for _ in 0..3 {
        let (status, answer) = post_json(&http, &format!("{}/v1/completions", engine.base_url()), &request).await;
        assert_eq!(status, StatusCode::OK);
        prompt_tokens += answer["usage"]["prompt_tokens"].as_u64().unwrap();
        generation_tokens += answer["usage"]["completion_tokens"].as_u64().unwrap();
    }
    while engine.load() > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    let found = scraper.engine(&at_engine, NOW).await.unwrap();
    assert_eq!(found.missing, [], "our engine says everything that is wanted of vLLM");
    let reading = found.reading;
    assert!(reading.steps.unwrap() >= 36 && reading.cached_tokens.unwrap() > 0, "{reading:?}");
    let expected = EngineReading {
        engine: "engine-1".into(),
        pool: "pool-1".into(),
        at: NOW,
        running: Some(0),
        waiting: Some(0),
        kv_used: Some(0),
        asleep: Some(false),
        prompt_tokens: Some(prompt_tokens),
        generation_tokens: Some(generation_tokens),
        finished: Some(3),
        preemptions: Some(0),
        kv_tokens: Some(u64::from(spec().limits.kv_blocks) * u64::from(spec().limits.block_size)),
        steps: reading.steps,
        cached_tokens: reading.cached_tokens,
        ..EngineReading::default()
    };
    assert_eq!(reading, expected);

    // Another process at the same name: its counters begin again.
    let another = our_engine().await;
    let again = target(EngineKind::Vllm, &format!("{}/metrics", another.base_url()));
    let fresh = scraper.engine(&again, NOW).await.unwrap().reading;
    assert!(restarted(&reading, &fresh) && !restarted(&fresh, &reading));
}

/// Serves these bytes to whoever connects and gives its address; `None` never answers. The channel has each request.
async fn server(answer: Option<Vec<u8>>) -> (String, mpsc::UnboundedReceiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/metrics", listener.local_addr().unwrap());
    let (requests, seen) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = vec![0; 4096];
            let bytes = stream.read(&mut request).await.unwrap_or(0);
            let _ = requests.send(String::from_utf8_lossy(&request[..bytes]).to_lowercase());
            match &answer {
                Some(answer) => {
                    let _ = stream.write_all(answer).await;
                }
                None => tokio::time::sleep(Duration::from_secs(60)).await,
            }
        }
    });
    (url, seen)
}

fn answer(head: &str, body: &[u8]) -> Vec<u8> {
    let mut bytes = format!("HTTP/1.1 {head}\r\ncontent-length: {}\r\n\r\n", body.len()).into_bytes();
    bytes.extend_from_slice(body);
    bytes
}

fn packed(text: &str) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(text.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

fn small() -> Scraper {
    Scraper::new(Limits { whole: Duration::from_millis(800), bytes_max: 32 * 1024, ..Limits::default() })
}

const RUNNING: &str = "vllm:num_requests_running{engine=\"0\"} 3\n";

#[tokio::test]
async fn packed_text_is_read_and_the_token_is_sent() {
    let (url, mut seen) = server(Some(answer("200 OK\r\ncontent-encoding: gzip", &packed(RUNNING)))).await;
    let target = Target { bearer: Some(Bearer::new("T0ken")), ..target(EngineKind::Vllm, &url) };
    let found = small().engine(&target, NOW).await.unwrap();
    assert_eq!((found.reading.running, found.reading.waiting), (Some(3), None));
    let request = seen.recv().await.unwrap();
    for header in ["get /metrics http/1.1", "authorization: bearer t0ken", "accept-encoding: gzip"] {
        assert!(request.contains(header), "{request}");
    }
}

/// What an error's cause must be.
type IsExpected = fn(&ScrapeCause) -> bool;

#[tokio::test]
async fn what_is_no_scrape_is_an_error_that_names_engine_address_and_fix() {
    let long = RUNNING.repeat(2_000);
    let half = b"HTTP/1.1 200 OK\r\ncontent-length: 500\r\n\r\nvllm:".to_vec();
    let status: IsExpected = |cause| matches!(cause, ScrapeCause::Status { .. });
    let too_long: IsExpected = |cause| matches!(cause, ScrapeCause::TooLong(_));
    let packing: IsExpected = |cause| matches!(cause, ScrapeCause::Packing(_));
    let foreign: IsExpected = |cause| matches!(cause, ScrapeCause::Foreign { .. });
    let unreachable: IsExpected = |cause| matches!(cause, ScrapeCause::Unreachable(_));
    let cases: Vec<(&str, Option<Vec<u8>>, IsExpected, &str)> = vec![
        ("redirect", Some(answer("302 Found\r\nlocation: http://10.0.0.9/m", b"")), status, "http://10.0.0.9/m"),
        ("refused", Some(answer("401 Unauthorized", b"")), status, "bearer token"),
        ("elsewhere", Some(answer("404 Not Found", b"")), status, "another path"),
        ("broken server", Some(answer("500 Oops", b"")), status, "500"),
        ("long", Some(answer("200 OK", long.as_bytes())), too_long, "32768 bytes"),
        ("long unpacked", Some(answer("200 OK\r\ncontent-encoding: gzip", &packed(&long))), too_long, "32768 bytes"),
        ("packed oddly", Some(answer("200 OK\r\ncontent-encoding: br", b"x")), packing, "`br`"),
        ("packed badly", Some(answer("200 OK\r\ncontent-encoding: gzip", b"x")), packing, "unpacked"),
        ("other engine", Some(answer("200 OK", b"sglang:num_running_reqs 1\n")), foreign, "runs = \"sglang\""),
        ("a page", Some(answer("200 OK", b"<html><body>hello</body></html>")), foreign, "--disable-log-stats"),
        ("nothing", Some(answer("200 OK", b"")), foreign, "vllm:"),
        (
            "old",
            Some(answer("200 OK", b"vllm:num_requests_running 3 1600000000000\n")),
            |cause| matches!(cause, ScrapeCause::Stale(_)),
            "older than 60 s",
        ),
        ("silent", None, |cause| matches!(cause, ScrapeCause::TimedOut(_)), "800 ms"),
        ("broken off", Some(half), unreachable, "running"),
        ("no http", Some(b"\x00\x01\x02 hello\r\n\r\n".to_vec()), unreachable, "port"),
    ];
    for (name, bytes, is_expected, text) in cases {
        let (url, _seen) = server(bytes).await;
        let error = small().engine(&target(EngineKind::Vllm, &url), NOW).await.expect_err(name);
        assert!(is_expected(&error.cause), "{name}: {error:?}");
        let told = error.to_string();
        for part in [text, "engine-1", &url] {
            assert!(told.contains(part), "{name}: `{part}` is not in: {told}");
        }
    }

    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let error = small().engine(&target(EngineKind::Vllm, &format!("http://{free}/metrics")), NOW).await.unwrap_err();
    assert!(unreachable(&error.cause), "{error}");
    let error = small().engine(&target(EngineKind::Vllm, "https://localhost/metrics"), NOW).await.unwrap_err();
    assert!(matches!(error.cause, ScrapeCause::Address(_)), "{error}");
}

#[tokio::test]
async fn gpus_are_read_and_other_pages_are_not() {
    let text = "DCGM_FI_PROF_GR_ENGINE_ACTIVE{UUID=\"GPU-1\",Hostname=\"n\",pod=\"train-0\"} 0.5\n";
    let (url, _seen) = server(Some(answer("200 OK", text.as_bytes()))).await;
    let exporter = GpuTarget { name: "exporter".into(), pool: Some("pool-1".into()), url, bearer: None };
    let found = small().gpus(&exporter, NOW).await.unwrap();
    assert_eq!(found.readings[0].engine_active, Some(500_000));
    assert_eq!((found.readings[0].at, found.readings[0].pool.as_deref()), (NOW, Some("pool-1")));

    let (url, _seen) = server(Some(answer("200 OK", RUNNING.as_bytes()))).await;
    let error = small().gpus(&GpuTarget { url, ..exporter }, NOW).await.unwrap_err();
    assert!(error.to_string().contains("9400"), "{error}");
}

/// A message as publishers write it: an empty topic, a number, a map.
fn message(number: u64, wall_time: f64, decoding: u32) -> ZmqMessage {
    let map = json!({
        "worker_id": "w", "dp_rank": 0, "wall_time": wall_time,
        "scheduled_requests": {
            "num_prefill_requests": 0, "sum_prefill_tokens": 0, "var_prefill_length": 0.0, "sum_prefill_kv_tokens": 0,
            "num_decode_requests": decoding, "sum_decode_kv_tokens": 100 * decoding, "var_decode_kv_tokens": 0.0,
        },
        "queued_requests": {},
    });
    framed(number, &rmp_serde::to_vec_named(&map).unwrap())
}

fn framed(number: u64, payload: &[u8]) -> ZmqMessage {
    let mut message = ZmqMessage::from(Vec::new());
    message.push_back(number.to_be_bytes().to_vec().into());
    message.push_back(payload.to_vec().into());
    message
}

/// What is heard next, within some seconds.
async fn next(heard: &mut mpsc::Receiver<Heard>) -> Heard {
    tokio::time::timeout(Duration::from_secs(20), heard.recv()).await.expect("something is heard").unwrap()
}

/// Publishes heartbeats from `number` on until one is heard, and gives the number that comes next: a subscription takes
/// its time to arrive, and what is published before is not heard by anybody.
async fn until_heard(
    publisher: &mut PubSocket,
    heard: &mut mpsc::Receiver<Heard>,
    mut number: u64,
) -> (u64, Vec<Heard>) {
    let mut others = Vec::new();
    loop {
        publisher.send(message(number, 0.0, 0)).await.unwrap();
        number += 1;
        while let Ok(Some(next)) = tokio::time::timeout(Duration::from_millis(50), heard.recv()).await {
            match next {
                Heard::Heartbeat => return (number, others),
                other => others.push(other),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_are_followed_through_losses_garbage_and_a_restart() {
    let mut publisher = PubSocket::new();
    let endpoint = publisher.bind("tcp://127.0.0.1:0").await.unwrap().to_string();
    let (out, mut heard) = mpsc::channel(64);
    let source = StepSource { engine: "engine-1".into(), endpoint: endpoint.clone() };
    let following = tokio::spawn(follow(source, clock(), out));

    assert_eq!(next(&mut heard).await, Heard::Connected);
    let (first, _) = until_heard(&mut publisher, &mut heard, 1_000).await;
    let before = clock().now();
    publisher.send(message(first, 0.25, 4)).await.unwrap();
    let Heard::Step(step) = next(&mut heard).await else { panic!("not a step") };
    assert_eq!((step.decode_requests, step.decode_kv_tokens, step.wall_us), (4, 400, 250_000));
    let ended = step.at.plus_micros(250_000);
    assert!(before <= ended && ended <= clock().now(), "a step ends when it is heard");

    publisher.send(message(first + 3, 0.1, 1)).await.unwrap();
    assert_eq!(next(&mut heard).await, Heard::Lost { rank: 0, messages: 2 });
    let Heard::Step(after_loss) = next(&mut heard).await else { panic!("not a step") };
    assert_eq!(after_loss.sequence, step.sequence + 3);

    publisher.send(framed(first + 4, b"not a map")).await.unwrap();
    assert!(matches!(next(&mut heard).await, Heard::Unreadable(StepError::Message(_))));

    // The engine's process ends and another takes its port; it counts from 0.
    drop(publisher);
    assert!(matches!(next(&mut heard).await, Heard::Disconnected(_)));
    let mut publisher = PubSocket::new();
    for attempt in 0.. {
        match publisher.bind(&endpoint).await {
            Ok(_) => break,
            Err(error) if attempt > 100 => panic!("{endpoint}: {error}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
    let (next_number, others) = until_heard(&mut publisher, &mut heard, 0).await;
    assert!(others.contains(&Heard::Connected) && others.contains(&Heard::Restarted { rank: 0 }), "{others:?}");
    publisher.send(message(next_number, 0.1, 2)).await.unwrap();
    assert!(matches!(next(&mut heard).await, Heard::Step(step) if step.decode_requests == 2));

    drop(heard);
    let ended = tokio::time::timeout(Duration::from_secs(20), following).await.expect("it ends with its receiver");
    assert_eq!(ended.unwrap(), Ok(()));
}

#[tokio::test]
async fn an_engine_that_is_not_there_yet_is_waited_for_and_a_wrong_endpoint_is_not() {
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let (out, mut heard) = mpsc::channel(64);
    let source = StepSource { engine: "engine-1".into(), endpoint: format!("tcp://127.0.0.1:{port}") };
    let following = tokio::spawn(follow(source.clone(), clock(), out.clone()));
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut publisher = PubSocket::new();
    publisher.bind(&source.endpoint).await.unwrap();
    while next(&mut heard).await != Heard::Connected {}
    following.abort();

    let wrong = StepSource { endpoint: "http://127.0.0.1:1".to_owned(), ..source };
    assert!(matches!(follow(wrong, clock(), out).await, Err(StepError::Endpoint { .. })));
}

/// Names that some reader looks for, with the labels that they look at.
const NAMES: [&str; 14] = [
    "vllm:cache_config_info",
    "vllm:engine_sleep_state",
    "vllm:prompt_tokens_total",
    "vllm:kv_cache_usage_perc",
    "sglang:realtime_tokens_total",
    "sglang:token_usage",
    "tgi_batch_forward_duration_sum",
    "trtllm_kv_cache_max_blocks",
    "trtllm_kv_cache_tokens_per_block",
    "nv_trt_llm_kv_cache_block_metrics",
    "nv_trt_llm_request_metrics",
    "llamacpp:prompt_tokens_total",
    "DCGM_FI_DEV_FB_USED",
    "DCGM_FI_PROF_GR_ENGINE_ACTIVE",
];
const LABELS: [&str; 12] = [
    "engine",
    "num_gpu_blocks",
    "block_size",
    "sleep_state",
    "dp_rank",
    "tp_rank",
    "mode",
    "priority",
    "kv_cache_block_type",
    "request_type",
    "UUID",
    "GPU_I_ID",
];
const TEXTS: [&str; 9] = ["", "0", "1", "18446744073709551615", "-1", "awake", "prefill_compute", "max", "tokens_per"];

fn line() -> impl Strategy<Value = String> {
    let label = (prop::sample::select(&LABELS[..]), prop::sample::select(&TEXTS[..]));
    let labels = prop::collection::vec(label.prop_map(|(name, text)| format!("{name}=\"{text}\"")), 0..5);
    let value = prop_oneof![
        any::<f64>().prop_map(|value| format!("{value}")),
        (0.0..2.0).prop_map(|value: f64| format!("{value}")),
        prop::sample::select(&["NaN", "+Inf", "-1", "1e19", "18446744073709551616", "x"][..]).prop_map(str::to_owned),
    ];
    (prop::sample::select(&NAMES[..]), labels, value)
        .prop_map(|(name, labels, value)| format!("{name}{{{}}} {value}\n", labels.join(",")))
}

fn read_all(text: &str) {
    let scrape = parse(text);
    for kind in EngineKind::ALL {
        let reading = read(kind, &scrape).reading;
        assert!(reading.kv_used.is_none_or(|part| part <= 1_000_000), "{reading:?}");
        assert!(!restarted(&reading, &reading));
    }
    let parts = |gpu: ledger::GpuReading| [gpu.engine_active, gpu.memory_active, gpu.utilisation];
    let readings = dcgm::read(&scrape, None, NOW).readings;
    assert!(readings.into_iter().flat_map(parts).flatten().all(|part| part <= 1_000_000));
}

proptest! {
    #[test]
    fn no_scrape_however_mangled_breaks_a_reader(
        lines in prop::collection::vec(line(), 0..30),
        at in any::<prop::sample::Index>(),
        byte in any::<char>(),
    ) {
        let text = lines.concat();
        read_all(&text);
        let mut mangled: Vec<char> = text.chars().collect();
        if !mangled.is_empty() {
            let at = at.index(mangled.len());
            mangled[at] = byte;
        }
        read_all(&mangled.into_iter().collect::<String>());
    }
}
