//! Bad input and bad upstreams: never a crash, never a lost row, one clear thing said.

use std::time::Duration;

use gateway::{Kind, ModelRoute, RouteTarget, Settings};
use http::Request;
use http_body_util::Full;
use ledger::{Outcome, UsageQuality};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::upstream::{
    DONE, Script, Step, Upstream, chat, chat_stream, chunk, delta, json, last_chunk, sse_head, write,
};
use crate::world::{CHAT, CHAT_STREAM, World, settings};

async fn world_of(script: Script, change: impl FnOnce(&mut Settings)) -> (Upstream, World) {
    let upstream = Upstream::start([script]).await;
    let mut settings = settings(&[("openai", Kind::OpenAi, &upstream)]);
    change(&mut settings);
    (upstream, World::start(settings).await)
}

/// Sends bytes as they are and reads until the gateway closes or falls silent.
pub async fn raw(world: &World, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    // A refused request may be answered before all of it was taken.
    let _ = stream.write_all(bytes).await;
    let mut answer = Vec::new();
    while let Ok(Ok(read)) = tokio::time::timeout(Duration::from_millis(700), stream.read_buf(&mut answer)).await {
        if read == 0 {
            break;
        }
    }
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn bodies_that_are_not_what_they_say_are_refused_without_an_upstream_call() {
    let (upstream, world) = world_of(chat(1, 1), |_| {}).await;
    let wrong: [&[u8]; 5] = [
        b"{\"model\":\"gpt-4o\"",
        b"not json",
        b"{\"model\":\"gpt-\xff\"}",
        b"{\"model\":\"a\",\"model\":\"b\"}",
        b"[1,2]",
    ];
    for body in wrong {
        let request = world.post("/v1/chat/completions").body(Full::from(body.to_vec())).unwrap();
        let answered = world.ask(request).await;
        assert_eq!(answered.status, 400, "{}", String::from_utf8_lossy(body));
        let id = answered.headers["x-farthing-request-id"].to_str().unwrap();
        assert!(answered.text.contains(id) && answered.text.contains("\"error\""), "{}", answered.text);
    }
    assert!(upstream.received().is_empty() && world.settled().await.is_empty());
}

#[tokio::test]
async fn heads_that_cannot_be_proxied_are_refused() {
    let (upstream, world) = world_of(chat(1, 1), |settings| settings.limits.header_bytes_max = 16_384).await;
    let giant = format!("GET /v1/models HTTP/1.1\r\nhost: x\r\nx-big: {}\r\n\r\n", "a".repeat(40_000));
    let many = format!("GET /v1/models HTTP/1.1\r\nhost: x\r\n{}\r\n", "x-a: b\r\n".repeat(200));
    let cases = [
        ("GET http://169.254.169.254/latest HTTP/1.1\r\nhost: x\r\n\r\n", "400", "forward proxy"),
        ("GET /v1/../admin HTTP/1.1\r\nhost: x\r\n\r\n", "400", "`..`"),
        ("GET /v1/%2e%2e/admin HTTP/1.1\r\nhost: x\r\n\r\n", "400", "`..`"),
        ("CONNECT evil:443 HTTP/1.1\r\nhost: evil:443\r\n\r\n", "405", "CONNECT"),
        (
            "GET /v1/realtime HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
            "501",
            "websocket",
        ),
        ("POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n", "413", "larger than"),
        ("POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n", "400", ""),
        (
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked, x\r\n\r\n",
            "400",
            "",
        ),
        (giant.as_str(), "431", ""),
        (many.as_str(), "431", ""),
        ("\u{0}\u{1}nonsense\r\n\r\n", "400", ""),
    ];
    for (request, status, says) in cases {
        let answer = raw(&world, request.as_bytes()).await;
        let shown: String = request.chars().take(60).collect();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status}")) && answer.contains(says), "{shown:?}: {answer}");
    }
    assert!(upstream.received().is_empty() && world.settled().await.is_empty());
}

#[tokio::test]
async fn a_body_without_length_is_bounded_too() {
    let (upstream, world) = world_of(chat(1, 1), |settings| settings.limits.body_bytes_max = 1_000).await;
    let chunks = format!("400\r\n{}\r\n", "a".repeat(1_024)).repeat(2);
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n";
    let answer = raw(&world, format!("{head}{chunks}").as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    let short = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n{\"model\":";
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    stream.write_all(short.as_bytes()).await.unwrap();
    drop(stream);
    assert_eq!(world.send("/v1/chat/completions", CHAT).await.status, 200, "and the gateway lives on");
    assert_eq!((upstream.received().len(), world.settled().await.len()), (1, 1));
}

#[tokio::test]
async fn slow_clients_are_let_go() {
    let change = |settings: &mut Settings| {
        settings.limits.header_ms_max = 150;
        settings.limits.stream_idle_ms_max = 150;
    };
    let (_upstream, world) = world_of(chat(1, 1), change).await;
    for start in ["", "P", "POST /v1/chat/completions HTTP/1.1\r\nhost:"] {
        let mut stream = TcpStream::connect(world.address).await.unwrap();
        stream.write_all(start.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let closed = tokio::time::timeout(Duration::from_secs(2), stream.read_to_end(&mut answer)).await;
        assert!(closed.is_ok(), "{start:?} held a connection open");
    }
    let slow_body = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{";
    assert!(raw(&world, slow_body.as_bytes()).await.starts_with("HTTP/1.1 408"));
}

#[tokio::test]
async fn a_client_that_stops_reading_does_not_hold_an_answer_open() {
    let long = delta(&"x".repeat(100_000));
    let script = [vec![sse_head()], vec![chunk(&long); 400], vec![last_chunk()]].concat();
    let (_upstream, world) = world_of(script, |settings| settings.limits.stream_idle_ms_max = 300).await;
    let mut deaf = TcpStream::connect(world.address).await.unwrap();
    let head =
        format!("POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n", CHAT_STREAM.len());
    deaf.write_all(format!("{head}{CHAT_STREAM}").as_bytes()).await.unwrap();
    // 40 MB fit no socket buffer; the client keeps its connection and reads no more than the first byte.
    deaf.read_u8().await.unwrap();
    let attempt = tokio::time::timeout(Duration::from_secs(10), world.one()).await.unwrap();
    assert_eq!(attempt.outcome, Outcome::ClientAborted);
    assert!(attempt.usage.output > 0, "what was delivered is booked");
    drop(deaf);
}

#[tokio::test]
async fn upstreams_that_do_not_answer_are_named_and_booked() {
    let quick = |settings: &mut Settings| settings.limits.first_byte_ms_max = 200;
    let cases = [
        (vec![Step::Stall], 504, Outcome::TimedOut, "did not answer in time"),
        (vec![Step::Reset], 502, Outcome::UpstreamCut, "broke off"),
        (vec![Step::Close], 502, Outcome::UpstreamCut, "broke off"),
        (vec![write("SSH-2.0-nonsense\r\n\r\n"), Step::Close], 502, Outcome::UpstreamCut, "broke off"),
        (vec![write("HTTP/1.1 200 OK\r\nx: \u{0}\r\n\r\n"), Step::Close], 502, Outcome::UpstreamCut, "broke off"),
    ];
    for (script, status, outcome, says) in cases {
        let (_upstream, world) = world_of(script.clone(), quick).await;
        let answered = world.send("/v1/chat/completions", CHAT).await;
        assert_eq!(answered.status, status, "{script:?}");
        assert!(answered.text.contains(says) && answered.text.contains("openai"), "{}", answered.text);
        let attempt = world.one().await;
        assert_eq!((attempt.outcome, attempt.usage_quality), (outcome, UsageQuality::Estimated), "{script:?}");
        assert!(attempt.usage.input > 0, "it may have run");
    }
}

#[tokio::test]
async fn an_unreachable_upstream_used_nothing() {
    let (upstream, world) = world_of(chat(1, 1), |_| {}).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut closed = settings(&[("openai", Kind::OpenAi, &upstream)]);
    let place = std::sync::Arc::get_mut(&mut closed.upstreams[0]).unwrap();
    place.base_url = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
    drop(listener);
    world.settings.store(closed.into());
    let answered = world.send("/v1/messages/../x", CHAT).await;
    assert_eq!(answered.status, 400);
    let answered = world.send("/v1/chat/completions", CHAT).await;
    assert_eq!(answered.status, 502);
    assert!(answered.text.contains("could not be reached"), "{}", answered.text);
    let attempt = world.one().await;
    assert_eq!((attempt.outcome, attempt.usage.input), (Outcome::UpstreamUnreachable, 0));
    assert_eq!(crate::world::usd(&attempt).as_deref(), Some("0.00"), "nothing was sent");
}

#[tokio::test]
async fn upstreams_that_lie_or_break_are_booked_and_their_breaking_is_passed_on() {
    let lying = vec![
        write("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{\"id\":\"x\","),
        Step::Wait(20),
        Step::Close,
    ];
    let too_much = vec![
        write("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}extra bytes"),
        Step::Close,
    ];
    let bad_chunk = vec![sse_head(), chunk(&delta("a")), write("zz\r\n"), Step::Close];
    let silent = vec![sse_head(), chunk(&delta("a")), Step::Stall];
    let no_end = vec![sse_head(), chunk(&delta("a")), last_chunk()];
    let broken_event =
        vec![sse_head(), chunk("data: {\"choi\n\ndata: \u{0}\u{1}\n\n:\n\nevent\ndata"), chunk(DONE), last_chunk()];
    let cases = [
        (lying, CHAT, false, Outcome::UpstreamCut),
        (too_much, CHAT, true, Outcome::Completed),
        (bad_chunk, CHAT_STREAM, false, Outcome::UpstreamCut),
        (silent, CHAT_STREAM, false, Outcome::TimedOut),
        (no_end, CHAT_STREAM, true, Outcome::UpstreamCut),
    ];
    for (script, body, whole, outcome) in cases {
        let (_upstream, world) = world_of(script.clone(), |settings| settings.limits.stream_idle_ms_max = 200).await;
        let answered = world.send("/v1/chat/completions", body).await;
        assert_eq!((answered.status.as_u16(), answered.whole), (200, whole), "{script:?}");
        assert_eq!(world.one().await.outcome, outcome, "{script:?}");
    }
    let (_upstream, world) = world_of(broken_event, |_| {}).await;
    let answered = world.send("/v1/chat/completions", CHAT_STREAM).await;
    assert!(answered.whole && answered.text.contains("{\"choi\n\n"), "passed on as it came: {}", answered.text);
    assert_ne!(world.one().await.usage_quality, UsageQuality::Reported);
}

#[tokio::test]
async fn a_request_has_only_so_much_time() {
    let endless =
        std::iter::once(sse_head()).chain((0..200).flat_map(|_| [chunk(&delta("a")), Step::Wait(20)])).collect();
    let (_upstream, world) = world_of(endless, |settings| settings.limits.request_ms_max = 300).await;
    let answered = world.send("/v1/chat/completions", CHAT_STREAM).await;
    assert!(!answered.whole && answered.text.len() > 500);
    let attempt = world.one().await;
    assert_eq!(attempt.outcome, Outcome::TimedOut);
    assert!((250_000..2_000_000).contains(&attempt.timeline.finished_us));
}

fn two(a: &Upstream, b: &Upstream, retries: u16) -> Settings {
    let mut settings = settings(&[("a", Kind::OpenAi, a), ("b", Kind::OpenAi, b)]);
    let target = |name: &str| RouteTarget { upstream: name.into(), model: None, weight: 1 };
    settings.routes = vec![ModelRoute {
        model: "*".into(),
        targets: vec![target("a")],
        fallbacks: vec![target("b")],
        retries,
        ..ModelRoute::default()
    }];
    settings
}

#[tokio::test]
async fn retries_and_fallbacks_are_attempts_of_one_request() {
    let cases: [(Script, u16, usize, Outcome); 5] = [
        (json(500, "{\"error\":{}}"), 1, 3, Outcome::UpstreamError),
        (json(429, "{\"error\":{}}"), 0, 2, Outcome::UpstreamError),
        (vec![Step::Reset], 1, 3, Outcome::UpstreamCut),
        (vec![Step::Stall], 0, 2, Outcome::TimedOut),
        // A head and nothing after it is no answer either, while there is somewhere else to go.
        (vec![sse_head(), Step::Wait(20), Step::Reset], 0, 2, Outcome::UpstreamCut),
    ];
    for (failing, retries, expected, outcome) in cases {
        let (a, b) = (Upstream::start([failing.clone()]).await, Upstream::start([chat_stream(&["ok"], 0, 9, 1)]).await);
        let mut settings = two(&a, &b, retries);
        settings.limits.first_byte_ms_max = 300;
        let world = World::start(settings).await;
        let answered = world.send("/v1/chat/completions", CHAT_STREAM).await;
        assert!(answered.status == 200 && answered.whole, "{failing:?} {answered:?}");
        assert_eq!(answered.headers["x-farthing-attempts"].to_str().unwrap(), expected.to_string());
        let attempts = world.settled().await;
        let (last, failed) = attempts.split_last().unwrap();
        assert_eq!((attempts.len(), last.outcome, last.usage.output), (expected, Outcome::Completed, 1), "{failing:?}");
        assert!(
            failed.iter().all(|attempt| attempt.outcome == outcome && &*attempt.route.upstream == "a"),
            "{failed:#?}"
        );
        assert!(attempts.iter().all(|attempt| attempt.id.request == last.id.request));
        assert_eq!(world.gateway.metrics().retries.get(), u64::try_from(expected - 1).unwrap());
    }
}

#[tokio::test]
async fn the_last_error_reaches_the_client_byte_for_byte() {
    let error = "{\"error\": {\"message\" : \"slow down\",\"type\":\"x\"}}";
    let mut script = json(429, error);
    script[0] = write(&format!(
        "HTTP/1.1 429 X\r\nretry-after: 1\r\nx-ratelimit-reset: 7\r\ncontent-length: {}\r\n\r\n{error}",
        error.len()
    ));
    let (a, b) = (Upstream::start([json(500, "{}")]).await, Upstream::start([script]).await);
    let world = World::start(two(&a, &b, 0)).await;
    let answered = world.send("/v1/chat/completions", CHAT).await;
    assert_eq!((answered.status.as_u16(), answered.text.as_str()), (429, error));
    assert_eq!(
        (&answered.headers["retry-after"], &answered.headers["x-ratelimit-reset"]),
        (&"1".parse().unwrap(), &"7".parse().unwrap())
    );
    let attempts = world.settled().await;
    assert_eq!(attempts.iter().map(|attempt| attempt.status).collect::<Vec<_>>(), [Some(500), Some(429)]);
    assert!(
        attempts
            .iter()
            .all(|attempt| attempt.usage_quality == UsageQuality::Missing && attempt.charge.name() == "unpriced")
    );
}

#[tokio::test]
async fn client_errors_are_not_retried_and_a_client_that_left_starts_nothing_new() {
    let (a, b) = (Upstream::start([json(400, "{}")]).await, Upstream::start([chat(1, 1)]).await);
    let world = World::start(two(&a, &b, 3)).await;
    assert_eq!(world.send("/v1/chat/completions", CHAT).await.status, 400);
    assert_eq!(world.settled().await.len(), 1);

    let slow_error = [vec![Step::Wait(300)], json(500, "{}")].concat();
    let (a, b) = (Upstream::start([slow_error]).await, Upstream::start([chat(1, 1)]).await);
    let world = World::start(two(&a, &b, 0)).await;
    let request: Request<Full<_>> = world.post("/v1/chat/completions").body(CHAT.into()).unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(100), world.ask(request)).await.is_err());
    let attempt = world.one().await;
    assert_eq!((attempt.outcome, attempt.status), (Outcome::UpstreamError, Some(500)));
    assert!(b.received().is_empty());
}

#[tokio::test]
async fn a_client_that_leaves_during_an_error_does_not_make_it_cost_something() {
    let head = "HTTP/1.1 500 X\r\ncontent-type: application/json\r\ncontent-length: 20\r\n\r\n{";
    let (a, b) = (Upstream::start([vec![write(head), Step::Stall]]).await, Upstream::start([chat(1, 1)]).await);
    let world = World::start(two(&a, &b, 0)).await;
    let request: Request<Full<_>> = world.post("/v1/chat/completions").body(CHAT_STREAM.into()).unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(200), world.ask(request)).await.is_err());
    let attempt = world.one().await;
    assert_eq!((attempt.outcome, attempt.status), (Outcome::UpstreamError, Some(500)));
    assert_eq!((attempt.usage_quality, attempt.charge.name()), (UsageQuality::Missing, "unpriced"));
}

#[tokio::test]
async fn a_body_that_trickles_has_only_so_much_time() {
    let (upstream, world) = world_of(chat(1, 1), |settings| settings.limits.request_ms_max = 300).await;
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 900\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let (mut reading, mut writing) = stream.into_split();
    let trickle = tokio::spawn(async move {
        while writing.write_all(b" ").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await
        }
    });
    let mut answer = vec![0; 64];
    let read =
        tokio::time::timeout(Duration::from_secs(3), reading.read(&mut answer)).await.expect("an answer").unwrap();
    trickle.abort();
    assert!(answer[..read].starts_with(b"HTTP/1.1 408") && upstream.received().is_empty());
}

#[tokio::test]
async fn an_error_is_passed_on_when_there_is_no_time_for_a_retry() {
    let busy = "{\"error\":{\"message\":\"too busy\"}}";
    let slow_down = |wait: &str| {
        let head =
            format!("HTTP/1.1 429 X\r\nretry-after: {wait}\r\nx-why: load\r\ncontent-length: {}\r\n\r\n", busy.len());
        vec![write(&format!("{head}{busy}"))]
    };
    // The upstream asks for more time than the request has, or the retry does not answer in what is left of it.
    for (scripts, tries) in [(vec![slow_down("2")], 1), (vec![slow_down("0"), vec![Step::Stall]], 2)] {
        let a = Upstream::start(scripts).await;
        let mut settings = two(&a, &a, 1);
        settings.routes[0].fallbacks.clear();
        settings.limits.request_ms_max = 600;
        let world = World::start(settings).await;
        let answered = world.send("/v1/chat/completions", CHAT).await;
        assert_eq!((answered.status.as_u16(), answered.text.as_str(), answered.whole), (429, busy, true));
        assert_eq!(answered.headers["x-why"], "load");
        assert_eq!(answered.headers["x-farthing-attempts"].to_str().unwrap(), tries.to_string());
        let outcomes: Vec<_> = world.settled().await.into_iter().map(|attempt| attempt.outcome).collect();
        assert_eq!(outcomes, [Outcome::UpstreamError, Outcome::TimedOut][..tries]);
    }
}

#[tokio::test]
async fn without_room_for_its_body_a_request_is_tried_once_and_still_counted() {
    for (room, tries, status) in [(1 << 20, 2, 200), (100, 1, 500)] {
        let a = Upstream::start([json(500, "{\"error\":{}}")]).await;
        let b = Upstream::start([vec![sse_head(), chunk(&delta("ok")), Step::Reset]]).await;
        let mut settings = two(&a, &b, 0);
        settings.limits.retained_bytes_max = room;
        let world = World::start(settings).await;
        let answered = world.send("/v1/chat/completions", CHAT_STREAM).await;
        assert_eq!(answered.status.as_u16(), status);
        assert_eq!(world.settled().await.len(), tries);
        assert_eq!(
            a.received()[0].body,
            b.received().first().map_or(a.received()[0].body.clone(), |sent| sent.body.clone())
        );
        assert!(a.received()[0].body.contains("everyone"), "the body was sent all the same");
    }
    let cut = Upstream::start([vec![sse_head(), chunk(&delta("ok")), Step::Reset]]).await;
    let mut settings = settings(&[("a", Kind::OpenAi, &cut)]);
    settings.limits.retained_bytes_max = 0;
    let world = World::start(settings).await;
    assert!(!world.send("/v1/chat/completions", CHAT_STREAM).await.whole);
    let attempt = world.one().await;
    let estimate = world.journal.opened()[0].estimate.input;
    assert_eq!((attempt.usage.input, attempt.usage_quality), (estimate, UsageQuality::Estimated));
    assert!(estimate > 0);
}
