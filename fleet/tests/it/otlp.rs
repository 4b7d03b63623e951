//! Spans over HTTP and gRPC: what is stored, and what senders are told.

use std::convert::Infallible;
use std::io::Write;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use fleet::otlp::{Busy, Counts, Options, Receiver, serve_grpc};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use hyper::service::service_fn;
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioIo};
use ledger::{CallSpan, Operation, UsageQuality};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span};
use prost::Message;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tonic::Code;
use tonic::codec::CompressionEncoding;

use crate::client::clock;

/// Where a test's spans go, and whether there is room.
#[derive(Default)]
struct Kept {
    spans: Mutex<Vec<CallSpan>>,
    full: Mutex<bool>,
}

fn receiver(options: Options) -> (Arc<Kept>, Receiver) {
    let kept = Arc::new(Kept::default());
    let keeping = Arc::clone(&kept);
    let sink = move |spans: Vec<CallSpan>| {
        if *keeping.full.lock().unwrap() {
            return Err(Busy { reason: "the disk is full".to_owned() });
        }
        keeping.spans.lock().unwrap().extend(spans);
        Ok(())
    };
    (kept, Receiver::new(Arc::new(sink), clock(), options))
}

fn span(number: u8, attributes: &[(&str, Value)]) -> Span {
    let pair = |(name, value): &(&str, Value)| KeyValue {
        key: (*name).to_owned(),
        value: Some(AnyValue { value: Some(value.clone()) }),
        ..KeyValue::default()
    };
    Span {
        trace_id: vec![1; 16],
        span_id: vec![number; 8],
        start_time_unix_nano: 1_000_000_000,
        end_time_unix_nano: 2_000_000_000,
        attributes: attributes.iter().map(pair).collect(),
        ..Span::default()
    }
}

/// A model call, something else, and a call that nothing can be done with.
fn mixed() -> ExportTraceServiceRequest {
    let operation = ("gen_ai.operation.name", Value::StringValue("chat".into()));
    let call = [
        operation.clone(),
        ("gen_ai.request.model", Value::StringValue("gpt-x".into())),
        ("gen_ai.usage.input_tokens", Value::IntValue(9)),
        ("gen_ai.usage.output_tokens", Value::IntValue(3)),
        ("gen_ai.input.messages", Value::StringValue("a prompt".into())),
    ];
    let timeless = Span { start_time_unix_nano: 0, ..span(3, &[operation]) };
    of(vec![span(1, &call), span(2, &[]), timeless])
}

fn of(spans: Vec<Span>) -> ExportTraceServiceRequest {
    let scope_spans = vec![ScopeSpans { spans, ..ScopeSpans::default() }];
    ExportTraceServiceRequest { resource_spans: vec![ResourceSpans { scope_spans, ..ResourceSpans::default() }] }
}

fn gzip(plain: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(plain).unwrap();
    encoder.finish().unwrap()
}

fn post(headers: &[(&'static str, &str)], body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    let request = Request::post("/v1/traces");
    let request = headers.iter().fold(request, |request, &(name, value)| request.header(name, value));
    request.body(Full::new(body.into())).unwrap()
}

const PROTOBUF: (&str, &str) = ("content-type", "application/x-protobuf");
const JSON: (&str, &str) = ("content-type", "application/json; charset=utf-8");
const GZIP: (&str, &str) = ("content-encoding", "gzip");

async fn whole(response: Response<Full<Bytes>>) -> (StatusCode, HeaderMap, Bytes) {
    let (head, body) = response.into_parts();
    (head.status, head.headers, body.collect().await.unwrap().to_bytes())
}

#[tokio::test]
async fn spans_come_in_as_protobuf_or_json_plain_or_compressed() {
    let protobuf = mixed().encode_to_vec();
    let json = serde_json::to_vec(&mixed()).unwrap();
    for (headers, body, is_json) in [
        (vec![PROTOBUF], protobuf.clone(), false),
        (vec![("content-type", "Application/X-Protobuf"), GZIP], gzip(&protobuf), false),
        (vec![PROTOBUF, ("content-encoding", "identity")], protobuf, false),
        (vec![JSON], json.clone(), true),
        (vec![JSON, GZIP], gzip(&json), true),
    ] {
        let (kept, receiver) = receiver(Options::default());
        let (status, answered, body) = whole(receiver.serve(post(&headers, body)).await).await;
        assert_eq!(status, StatusCode::OK);
        let (rejected, message) = if is_json {
            assert_eq!(answered["content-type"], "application/json");
            let answer: serde_json::Value = serde_json::from_slice(&body).unwrap();
            let partial = &answer["partialSuccess"];
            (partial["rejectedSpans"].as_str().unwrap().parse().unwrap(), partial["errorMessage"].to_string())
        } else {
            assert_eq!(answered["content-type"], "application/x-protobuf");
            let partial = ExportTraceServiceResponse::decode(body).unwrap().partial_success.unwrap();
            (partial.rejected_spans, partial.error_message)
        };
        assert_eq!(rejected, 1);
        assert!(message.contains("start time"), "{message}");
        let [call] = kept.spans.lock().unwrap().clone().try_into().unwrap();
        assert_eq!((call.operation, call.usage.input, call.usage.output), (Operation::Chat, 9, 3));
        assert_eq!(call.span_id.as_deref(), Some("0101010101010101"));
        let counts = Counts { spans: 3, calls: 1, ignored: 1, rejected: 1, refused_requests: 0 };
        assert_eq!(receiver.counts(), counts);
    }
}

#[tokio::test]
async fn what_is_taken_whole_is_answered_without_complaint() {
    let (kept, receiver) = receiver(Options::default());
    for (kind, empty, answer) in [
        (PROTOBUF, &b""[..], &b""[..]),
        (JSON, b"{}", b"{}"),
        (JSON, b"", b"{}"),
        (JSON, br#"{"resourceSpans":null}"#, b"{}"),
    ] {
        let (status, _, body) = whole(receiver.serve(post(&[kind], empty)).await).await;
        assert_eq!((status, &body[..]), (StatusCode::OK, answer));
    }
    let ordinary = of(vec![span(2, &[])]).encode_to_vec();
    assert_eq!(whole(receiver.serve(post(&[PROTOBUF], ordinary)).await).await.2, Bytes::new());
    assert!(kept.spans.lock().unwrap().is_empty());
    assert_eq!(receiver.counts().ignored, 1);
}

#[tokio::test]
async fn json_is_read_as_protobuf_means_it() {
    let (kept, receiver) = receiver(Options::default());
    let body = json!({"unknown": {"a": [1]}, "resourceSpans": [
        {"resource": null, "scopeSpans": [{"scope": {"name": "x"}, "spans": [{
            "traceId": "5B8EFFF798038103D269B633813FC60C", "spanId": "eee19b7ec3c1b174", "parentSpanId": "", "name": "chat",
            "kind": 3, "startTimeUnixNano": "1544712660000000000", "endTimeUnixNano": 1_544_712_661_000_000_000_u64,
            "attributes": [
                {"key": "gen_ai.operation.name", "value": {"stringValue": "chat"}},
                {"key": "gen_ai.usage.input_tokens", "value": {"intValue": "12"}},
                {"key": "gen_ai.usage.output_tokens", "value": {"intValue": 3}},
                {"key": "gen_ai.response.time_to_first_chunk", "value": {"doubleValue": "0.5"}},
                {"key": "gen_ai.response.finish_reasons", "value": {"arrayValue": {}}},
                {"key": "gen_ai.latency.e2e", "value": {"doubleValue": "NaN"}},
                {"key": "nothing", "value": {}}, {"key": "null", "value": null}, {"key": "absent"},
                {"key": "bytes", "value": {"bytesValue": "AAE="}}, {"key": "map", "value": {"kvlistValue": {}}},
            ],
            "status": {"code": 2}, "events": [{"name": "e"}], "links": null, "flags": 256, "new": true,
        }]}]},
        {},
    ]});
    let (status, _, answer) = whole(receiver.serve(post(&[JSON], body.to_string())).await).await;
    assert_eq!((status, &answer[..]), (StatusCode::OK, &b"{}"[..]));
    let [call] = kept.spans.lock().unwrap().clone().try_into().unwrap();
    assert_eq!(call.trace_id.as_deref(), Some("5b8efff798038103d269b633813fc60c"));
    assert_eq!((call.usage.input, call.usage.output, call.failed), (12, 3, true));
    assert_eq!(call.period.start.to_string(), "2018-12-13T14:51:00Z");
    assert_eq!((call.period.end.micros_since(call.period.start), call.first_token_us), (1_000_000, Some(500_000)));
}

/// A body whose length nobody announced.
fn trickle(chunks: usize) -> impl hyper::body::Body<Data = Bytes, Error = Infallible> {
    let frames = (0..chunks).map(|_| Ok(Frame::data(Bytes::from(vec![b' '; 1_024]))));
    StreamBody::new(futures_util::stream::iter(frames))
}

/// Headers, a body, the status and a word of the reason.
type Refused = (Vec<(&'static str, &'static str)>, Vec<u8>, u16, &'static str);

#[tokio::test]
async fn what_cannot_be_taken_is_refused_with_a_reason() {
    const SECRET: &str = "a prompt in a place where none should be";
    let protobuf = mixed().encode_to_vec();
    let misplaced = json!({"resourceSpans": SECRET}).to_string().into_bytes();
    let not_an_id =
        json!({"resourceSpans": [{"scopeSpans": [{"spans": [{"traceId": "xyz"}]}]}]}).to_string().into_bytes();
    let cases: Vec<Refused> = vec![
        (vec![], protobuf.clone(), 415, "content-type"),
        (vec![("content-type", "text/plain")], protobuf.clone(), 415, "content-type"),
        (vec![PROTOBUF, ("content-encoding", "zstd")], protobuf.clone(), 415, "content-encoding"),
        (vec![PROTOBUF], b"\xff\xff\xff".to_vec(), 400, "not an OTLP trace request"),
        (vec![PROTOBUF, GZIP], protobuf.clone(), 400, "gzip"),
        (vec![PROTOBUF, GZIP], gzip(&protobuf)[..20].to_vec(), 400, "gzip"),
        (vec![JSON], b"{".to_vec(), 400, "line 1"),
        (vec![JSON], misplaced, 400, "line 1"),
        (vec![JSON], not_an_id, 400, "line 1"),
        (vec![PROTOBUF], vec![0; 5_000], 413, "4096 bytes"),
        (vec![PROTOBUF, GZIP], gzip(&vec![0; 5_000]), 413, "4096 bytes"),
        (vec![PROTOBUF, ("content-length", "99999999999999999999")], vec![], 200, ""),
        (vec![PROTOBUF, ("content-length", "4097")], vec![], 413, "4096 bytes"),
    ];
    let (kept, receiver) = receiver(Options { body_bytes_max: 4_096, ..Options::default() });
    for (headers, body, wanted, reason) in cases {
        let (status, answered, body) = whole(receiver.serve(post(&headers, body)).await).await;
        assert_eq!(status.as_u16(), wanted, "{headers:?} {body:?}");
        let text = String::from_utf8_lossy(&body);
        assert!(text.contains(reason) && !text.contains("prompt"), "{text}");
        let asked_json = !headers.contains(&PROTOBUF);
        assert_eq!(answered["content-type"] == "application/json", asked_json, "an error is encoded as its request");
        assert!(!asked_json || serde_json::from_slice::<serde_json::Value>(&body).unwrap()["message"].is_string());
    }
    let unannounced = Request::post("/").header(PROTOBUF.0, PROTOBUF.1).body(trickle(10)).unwrap();
    assert_eq!(receiver.serve(unannounced).await.status(), StatusCode::PAYLOAD_TOO_LARGE);
    let get = Request::get("/v1/traces").body(Full::<Bytes>::default()).unwrap();
    let (status, headers, _) = whole(receiver.serve(get).await).await;
    assert_eq!((status, headers["allow"].to_str().unwrap()), (StatusCode::METHOD_NOT_ALLOWED, "POST"));
    assert_eq!((kept.spans.lock().unwrap().len(), receiver.counts().refused_requests), (0, 14));
}

#[tokio::test]
async fn a_large_body_is_taken_too() {
    let (kept, receiver) = receiver(Options::default());
    let many = (1..=250).flat_map(|number| {
        mixed()
            .resource_spans
            .remove(0)
            .scope_spans
            .remove(0)
            .spans
            .into_iter()
            .map(move |span| Span { span_id: vec![number; 8], ..span })
    });
    let body = of(many.collect()).encode_to_vec();
    assert!(body.len() > 64 * 1024, "{}", body.len());
    assert_eq!(receiver.serve(post(&[PROTOBUF], body)).await.status(), StatusCode::OK);
    assert_eq!(kept.spans.lock().unwrap().len(), 250);
}

#[tokio::test]
async fn without_room_a_sender_is_told_to_come_back() {
    let (kept, receiver) = receiver(Options::default());
    *kept.full.lock().unwrap() = true;
    let body = mixed().encode_to_vec();
    let (status, headers, answer) = whole(receiver.serve(post(&[PROTOBUF], body.clone())).await).await;
    assert_eq!((status, headers["retry-after"].to_str().unwrap()), (StatusCode::SERVICE_UNAVAILABLE, "5"));
    assert!(String::from_utf8_lossy(&answer).contains("the disk is full"));
    assert_eq!(receiver.counts(), Counts { refused_requests: 1, ..Counts::default() }, "nothing is counted twice");
    *kept.full.lock().unwrap() = false;
    assert_eq!(receiver.serve(post(&[PROTOBUF], body)).await.status(), StatusCode::OK);
    assert_eq!(kept.spans.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn with_a_token_only_its_holders_may_send() {
    let (kept, receiver) = receiver(Options { token: Some("s3cret".to_owned()), ..Options::default() });
    let body = mixed().encode_to_vec();
    for (authorization, wanted) in [
        (None, 401),
        (Some("s3cret"), 401),
        (Some("Bearer s3cre"), 401),
        (Some("Bearer s3cret2"), 401),
        (Some("Basic s3cret"), 401),
        (Some("Bearer s3cret"), 200),
        (Some("bearer s3cret"), 200),
    ] {
        let mut headers = vec![PROTOBUF];
        headers.extend(authorization.map(|value| ("authorization", value)));
        let (status, answered, body) = whole(receiver.serve(post(&headers, body.clone())).await).await;
        assert_eq!(status.as_u16(), wanted, "{authorization:?}");
        assert_eq!(answered.contains_key("www-authenticate"), wanted == 401);
        assert!(!String::from_utf8_lossy(&body).contains("s3cret"));
    }
    assert_eq!(kept.spans.lock().unwrap().len(), 2);
}

/// Both listeners on loopback, until the sender is dropped.
async fn listen(receiver: Receiver) -> (SocketAddr, SocketAddr, oneshot::Sender<()>, tokio::task::JoinHandle<()>) {
    let (http, grpc) =
        (TcpListener::bind("127.0.0.1:0").await.unwrap(), TcpListener::bind("127.0.0.1:0").await.unwrap());
    let addresses = (http.local_addr().unwrap(), grpc.local_addr().unwrap());
    let (stop, stopped) = oneshot::channel();
    let serving = receiver.clone();
    let served = tokio::spawn(async move {
        serve_grpc(grpc, serving, async { stopped.await.unwrap_or(()) }).await.unwrap();
    });
    tokio::spawn(async move {
        while let Ok((stream, _)) = http.accept().await {
            let receiver = receiver.clone();
            let service = service_fn(move |request| {
                let receiver = receiver.clone();
                async move { Ok::<_, Infallible>(receiver.serve(request).await) }
            });
            tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
        }
    });
    (addresses.0, addresses.1, stop, served)
}

#[tokio::test]
async fn grpc_takes_the_same_spans_and_says_the_same() {
    let (kept, receiver) = receiver(Options { token: Some("s3cret".to_owned()), body_bytes_max: 4_096 });
    let (_, address, stop, served) = listen(receiver.clone()).await;
    let http = Client::builder(TokioExecutor::new()).http2_only(true).build_http::<tonic::body::Body>();
    let client = TraceServiceClient::with_origin(http, format!("http://{address}").parse().unwrap());
    let mut plain = client.clone();
    let mut packed = client.send_compressed(CompressionEncoding::Gzip).accept_compressed(CompressionEncoding::Gzip);
    let request = |spans: ExportTraceServiceRequest, token: &'static str| {
        let mut request = tonic::Request::new(spans);
        request.metadata_mut().insert("authorization", token.parse().unwrap());
        request
    };
    for token in ["Bearer no", "s3cret"] {
        let refused = plain.export(request(mixed(), token)).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unauthenticated);
    }
    let token = "Bearer s3cret";
    for client in [&mut plain, &mut packed] {
        let answer = client.export(request(mixed(), token)).await.unwrap().into_inner();
        assert_eq!(answer.partial_success.unwrap().rejected_spans, 1);
    }
    let answer = plain.export(request(ExportTraceServiceRequest::default(), token)).await.unwrap().into_inner();
    assert_eq!(answer.partial_success, None);
    let long = [("gen_ai.prompt", Value::StringValue("x".repeat(5_000)))];
    for client in [&mut plain, &mut packed] {
        let refused = client.export(request(of(vec![span(1, &long)]), token)).await.unwrap_err();
        assert!(matches!(refused.code(), Code::OutOfRange | Code::ResourceExhausted), "{refused}");
    }
    *kept.full.lock().unwrap() = true;
    let busy = plain.export(request(mixed(), token)).await.unwrap_err();
    assert_eq!(busy.code(), Code::Unavailable, "a sender tries this again");
    assert!(busy.message().contains("the disk is full"));
    assert_eq!(kept.spans.lock().unwrap().len(), 2);
    let counts = receiver.counts();
    assert_eq!((counts.calls, counts.ignored, counts.rejected, counts.refused_requests), (2, 2, 2, 3));
    drop(stop);
    tokio::time::timeout(Duration::from_secs(8), served).await.expect("it stops").unwrap();
}

/// Run by `tests/real/otlp/run`, which names the interpreter that has OpenTelemetry's exporters.
#[tokio::test]
#[ignore = "needs OpenTelemetry's Python exporters; tests/real/otlp/run installs them"]
async fn the_published_exporters_are_understood() {
    let python = std::env::var("FARTHING_OTLP_PYTHON").expect("run it with tests/real/otlp/run");
    let (kept, receiver) = receiver(Options { token: Some("s3cret".to_owned()), ..Options::default() });
    let (http, grpc, _stop, _served) = listen(receiver.clone()).await;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/real/otlp/send.py");
    let sending = tokio::process::Command::new(python)
        .arg(script)
        .args([format!("http://{http}/v1/traces"), format!("http://{grpc}"), "s3cret".to_owned()])
        .stdin(Stdio::null())
        .status();
    let status = tokio::time::timeout(Duration::from_secs(60), sending).await.expect("in time").unwrap();
    assert!(status.success(), "the exporters reported an error");
    let spans = kept.spans.lock().unwrap().clone();
    for service in ["http", "http-gzip", "grpc", "grpc-gzip"] {
        let of = |model: &str| {
            let mut found = spans.iter().filter(|call| {
                call.service.as_deref() == Some(service) && call.request_model.as_deref().unwrap_or_default() == model
            });
            let (first, second) = (found.next(), found.next());
            assert!(second.is_none(), "{service} {model}: told twice");
            first.unwrap_or_else(|| panic!("{service} {model}: not told; {spans:#?}"))
        };
        let call = of("gpt-x");
        assert_eq!((call.usage.input, call.usage.cache_read, call.usage.output), (86, 1_920, 108));
        assert_eq!((call.usage.reasoning, call.usage_quality), (192, UsageQuality::Reported));
        assert_eq!((call.response_id.as_deref(), call.provider.as_deref()), (Some("chatcmpl-1"), Some("openai")));
        assert_eq!((call.context.session.as_deref(), call.context.customer.as_deref()), (Some("conv-1"), Some("u-7")));
        assert_eq!(
            (call.context.team.as_deref(), call.context.application.as_deref()),
            (Some("search"), Some(service))
        );
        assert_eq!(call.context.tags.get("agent").map(|agent| &**agent), Some("tutor"));
        assert_eq!(call.trace_id.as_ref().map(|id| id.len()), Some(32));
        assert!(call.parent_span_id.is_some() && call.period.start <= call.period.end);
        let engine = of("");
        assert_eq!((engine.engine.as_deref(), engine.response_id.as_deref()), (Some("shared-0"), Some("cmpl-9a")));
        assert_eq!((engine.queue_us, engine.decode_us), (Some(10_000), Some(1_250_000)));
        assert_eq!(of("inference-x").usage.cache_read, 64);
        assert_eq!(of("embed-x").operation, Operation::Embeddings);
        let failed = of("failing-x");
        assert_eq!((failed.failed, failed.usage_quality), (true, UsageQuality::Missing));
    }
    assert_eq!(spans.len(), 4 * 5);
    assert_eq!((receiver.counts().ignored, receiver.counts().refused_requests), (4 * 2, 0));
    assert!(!serde_json::to_string(&spans).unwrap().contains("prompt text"));
}

#[tokio::test]
async fn only_so_many_requests_are_read_at_a_time() {
    let (kept, receiver) = receiver(Options::default());
    let mut slow: Vec<_> = (0..16)
        .map(|_| {
            let receiver = receiver.clone();
            let body = StreamBody::new(futures_util::stream::pending::<Result<Frame<Bytes>, Infallible>>());
            let request = Request::post("/v1/traces").header(PROTOBUF.0, PROTOBUF.1).body(body).unwrap();
            tokio::spawn(async move { receiver.serve(request).await })
        })
        .collect();
    tokio::task::yield_now().await;
    let mut next = std::pin::pin!(receiver.serve(post(&[PROTOBUF], mixed().encode_to_vec())));
    assert!(tokio::time::timeout(Duration::from_millis(200), next.as_mut()).await.is_err());
    assert_eq!(kept.spans.lock().unwrap().len(), 0);
    slow.pop().unwrap().abort();
    let answer = tokio::time::timeout(Duration::from_secs(10), next).await.unwrap();
    assert_eq!((answer.status(), kept.spans.lock().unwrap().len()), (StatusCode::OK, 1));
    slow.iter().for_each(tokio::task::JoinHandle::abort);
}
