//! What passes, unchanged, and what does not: bytes, headers, versions, credentials.

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use gateway::{Kind, Secret, Settings};
use http::{Request, Version};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioIo};
use ledger::{ContextField, Outcome};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::faults::raw;
use crate::upstream::{
    DONE, Script, Step, Upstream, chat, chat_body, chat_stream, chunk, delta, json, last_chunk, sse_head, usage_chunk,
    write,
};
use crate::world::{CHAT, CHAT_STREAM, World, key, settings};

async fn openai(script: Script) -> (Upstream, World) {
    let upstream = Upstream::start([script]).await;
    let world = World::start(settings(&[("openai", Kind::OpenAi, &upstream)])).await;
    (upstream, world)
}

#[tokio::test]
async fn a_stream_passes_unbuffered_and_the_usage_chunk_we_asked_for_is_kept_back() {
    let (upstream, world) = openai(chat_stream(&["one", "two"], 100, 17, 2)).await;
    let mut response = world.begin("/v1/chat/completions", CHAT_STREAM).await;
    let start = tokio::time::Instant::now();
    let first = response.frame().await.unwrap().unwrap().into_data().unwrap();
    assert_eq!(first, delta("one"));
    assert!(start.elapsed() < Duration::from_millis(90), "the first chunk did not wait for the second");
    let rest = crate::world::read(response).await;
    assert_eq!(rest.text, format!("{}{DONE}", delta("two")));
    let attempt = world.one().await;
    assert_eq!((attempt.usage.input, attempt.usage.output), (17, 2));
    assert!(upstream.received()[0].body.contains("\"include_usage\":true"));
    let timeline = attempt.timeline;
    let marks = [
        timeline.admitted_us,
        timeline.sent_us,
        timeline.first_byte_us,
        timeline.first_token_us,
        timeline.last_token_us,
    ];
    let marks: Vec<u64> =
        marks.into_iter().map(|mark| mark.expect("every mark is set")).chain([timeline.finished_us]).collect();
    assert!(marks.is_sorted(), "{marks:?}");
    assert!(timeline.gaps.count == 1 && timeline.gaps.max_us >= 90_000, "{:?}", timeline.gaps);
}

#[tokio::test]
async fn a_client_that_asked_for_the_usage_chunk_gets_every_byte() {
    let (upstream, world) = openai(chat_stream(&["one"], 0, 17, 2)).await;
    let body = CHAT_STREAM.replacen('{', "{ \"stream_options\" : {\"include_usage\": true},", 1);
    let answered = world.send("/v1/chat/completions", &body).await;
    assert_eq!(answered.text, format!("{}{}{DONE}", delta("one"), usage_chunk(17, 2)));
    assert_eq!(upstream.received()[0].body, body, "the request passed byte for byte");
}

#[tokio::test]
async fn a_plain_answer_passes_byte_for_byte_with_its_length() {
    let (upstream, world) = openai(chat(1_000, 500)).await;
    let answered = world.send("/v1/chat/completions", CHAT).await;
    let expected = chat_body("gpt-4o-2024-08-06", 1_000, 500);
    assert_eq!(answered.text, expected);
    assert_eq!(answered.headers["content-length"], expected.len().to_string());
    assert_eq!(answered.headers["x-farthing-attempts"], "1");
    let attempt = world.one().await;
    assert_eq!(answered.headers["x-farthing-request-id"].to_str().unwrap(), attempt.id.request.to_string());
    assert!(!answered.headers.contains_key("x-farthing-cost-usd"), "nobody asked");
    let received = &upstream.received()[0];
    assert_eq!(received.body, CHAT);
    assert!(
        received.head.contains(&format!("host: {}", upstream.address))
            && received.head.contains("accept-encoding: identity")
    );
}

#[tokio::test]
async fn the_cost_is_a_header_or_a_trailer_for_those_who_ask() {
    let (_upstream, world) = openai(chat(1_000, 500)).await;
    let ask = |body: &'static str| {
        world
            .post("/v1/chat/completions")
            .header("x-farthing-report", "cost")
            .header("te", "trailers")
            .body(body.into())
            .unwrap()
    };
    let answered = world.ask(ask(CHAT)).await;
    assert_eq!((&answered.headers["x-farthing-cost-usd"], answered.whole), (&"0.0075".parse().unwrap(), true));
    assert_eq!(answered.text, chat_body("gpt-4o-2024-08-06", 1_000, 500));

    let (_upstream, world) = openai(chat_stream(&["one"], 0, 1_000, 500)).await;
    let ask = |body: &'static str| {
        world
            .post("/v1/chat/completions")
            .header("x-farthing-report", "cost")
            .header("te", "trailers")
            .body(body.into())
            .unwrap()
    };
    let answered = world.ask(ask(CHAT_STREAM)).await;
    assert_eq!(answered.trailers["x-farthing-cost-usd"], "0.0075");
    assert_eq!(answered.text, format!("{}{DONE}", delta("one")));
}

#[tokio::test]
async fn http2_keep_alive_head_and_get_work() {
    let (_upstream, world) = openai(chat_stream(&["one", "two"], 10, 17, 2)).await;
    let client: Client<_, Full<Bytes>> = Client::builder(TokioExecutor::new()).http2_only(true).build_http();
    let ask = || {
        let request = world.post("/v1/chat/completions").body(CHAT_STREAM.into()).unwrap();
        async { crate::world::read(client.request(request).await.unwrap()).await }
    };
    for answered in futures_util::future::join_all((0..8).map(|_| ask())).await {
        assert!(answered.status == 200 && answered.whole && answered.text.ends_with(DONE));
    }
    assert_eq!(world.settled().await.len(), 8);
    assert_eq!(world.gateway.metrics().connections.get(), 1, "eight streams on one connection");

    let models = "{\"object\":\"list\",\"data\":[]}";
    let head = vec![write(&format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        models.len()
    ))];
    let upstream = Upstream::start([head, json(200, models), vec![write("HTTP/1.1 204 No Content\r\n\r\n")]]).await;
    let world = World::start(settings(&[("openai", Kind::OpenAi, &upstream)])).await;
    let requests = "HEAD /v1/models HTTP/1.1\r\nhost: x\r\n\r\nGET /v1/models HTTP/1.1\r\nhost: x\r\n\r\nDELETE /v1/files/1 HTTP/1.1\r\nhost: x\r\n\r\n";
    let answers = raw(&world, requests.as_bytes()).await;
    assert_eq!(answers.matches("HTTP/1.1 200").count(), 2, "{answers}");
    assert!(answers.contains("HTTP/1.1 204") && answers.contains(models), "{answers}");
    let attempts = world.settled().await;
    assert_eq!(attempts.len(), 3);
    assert!(attempts.iter().all(|attempt| attempt.outcome == Outcome::Completed), "{attempts:#?}");
    assert_eq!(world.gateway.metrics().requests.get(), 3);
}

#[tokio::test]
async fn an_expected_100_continue_is_given_after_the_key_was_looked_at() {
    let upstream = Upstream::start([chat(9, 1)]).await;
    let (plain, ring) = key(|_| {});
    let world = World::with(settings(&[("openai", Kind::OpenAi, &upstream)]), ring, None).await;
    let head = |credential: &str| {
        format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {credential}\r\ncontent-type: application/json\r\nexpect: 100-continue\r\ncontent-length: {}\r\n\r\n",
            CHAT.len()
        )
    };
    let refused = raw(&world, head("fk-unknown").as_bytes()).await;
    assert!(refused.starts_with("HTTP/1.1 401"), "{refused}");
    let mut stream = TcpStream::connect(world.address).await.unwrap();
    stream.write_all(head(plain.reveal()).as_bytes()).await.unwrap();
    let mut bytes = vec![0; 4_096];
    let read = stream.read(&mut bytes).await.unwrap();
    assert!(bytes[..read].starts_with(b"HTTP/1.1 100 Continue"));
    stream.write_all(CHAT.as_bytes()).await.unwrap();
    let read = stream.read(&mut bytes).await.unwrap();
    assert!(bytes[..read].starts_with(b"HTTP/1.1 200"));
}

/// What `tracing` printed, for looking through.
#[derive(Clone, Default)]
struct Printed(Arc<Mutex<Vec<u8>>>);

impl Write for Printed {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn secrets_reach_neither_the_wrong_upstream_nor_a_log_nor_an_error() {
    let printed = Printed::default();
    let writer = printed.clone();
    let subscriber =
        tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(move || writer.clone()).finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let secret = "sk-upstream-4711";
    let script = [json(500, "{}"), vec![Step::Reset], vec![sse_head(), chunk(&delta("a")), Step::Reset], chat(9, 1)];
    let upstream = Upstream::start(script).await;
    let (plain, ring) = key(|key| key.may_set = vec![ContextField::Feature]);
    let mut with_secret = settings(&[("openai", Kind::OpenAi, &upstream)]);
    Arc::get_mut(&mut with_secret.upstreams[0]).unwrap().api_key = Some(Secret::from(secret.to_owned()));
    let world = World::with(with_secret, ring, None).await;
    let plain = plain.reveal();
    let mut seen = String::new();
    for place in ["authorization", "x-api-key", "x-goog-api-key", "query", "wrong"] {
        let path = if place == "query" {
            format!("/v1/chat/completions?key={plain}&a=1")
        } else {
            "/v1/chat/completions".to_owned()
        };
        let mut request = world.post(&path).header("x-farthing-feature", "f").header("x-note", format!("try {plain}"));
        request = match place {
            "authorization" => request.header("authorization", format!("Bearer {plain}")),
            "query" => request,
            "wrong" => request.header("x-api-key", "fk-wrong-key-0815"),
            name => request.header(name, plain),
        };
        let answered = world.ask(request.body(CHAT.into()).unwrap()).await;
        seen.push_str(&format!("{answered:?}"));
    }
    assert_eq!(world.settled().await.len(), 4);
    let received = upstream.received();
    assert_eq!(received.len(), 4);
    for head in received.iter().map(|received| &received.head) {
        assert!(
            !head.contains("fk-") && !head.contains("x-farthing") && !head.contains(&plain.to_ascii_lowercase()),
            "{head}"
        );
        assert!(head.contains(&format!("authorization: bearer {secret}")), "{head}");
    }
    seen.push_str(&String::from_utf8_lossy(&printed.0.lock().unwrap()));
    assert!(seen.len() > 1_000, "something was printed");
    for hidden in [plain, secret, "fk-wrong-key-0815", "Say hello"] {
        assert!(!seen.contains(hidden), "{hidden} was shown");
    }
}

#[tokio::test]
async fn without_a_secret_of_ours_the_clients_own_credential_passes() {
    let upstream = Upstream::start([chat(9, 1)]).await;
    let (plain, ring) = key(|_| {});
    let world = World::with(settings(&[("openai", Kind::OpenAi, &upstream)]), ring, None).await;
    let request = world
        .post("/v1/chat/completions")
        .header("x-api-key", plain.reveal())
        .header("authorization", "Bearer sk-theirs");
    assert_eq!(world.ask(request.body(CHAT.into()).unwrap()).await.status, 200);
    let head = &upstream.received()[0].head;
    assert!(head.contains("authorization: bearer sk-theirs") && !head.contains("fk-"), "{head}");
}

#[tokio::test]
async fn a_stop_lets_running_answers_end_and_cuts_what_does_not() {
    for (ms, patience, whole) in [(50, 5_000, true), (5_000, 200, false)] {
        let (_upstream, mut world) = openai(chat_stream(&["a", "b"], ms, 9, 2)).await;
        let mut bounded = Settings::clone(&world.settings.load());
        bounded.limits.shutdown_ms_max = patience;
        // Limits of the listener are read when it starts, so this world is started anew.
        world = World::start(bounded).await;
        let mut response = world.begin("/v1/chat/completions", CHAT_STREAM).await;
        response.frame().await.unwrap().unwrap();
        let _ = world.stop.take().unwrap().send(());
        let rest = crate::world::read(response).await;
        assert_eq!(rest.whole, whole);
        world.serving.take().unwrap().await.unwrap();
        let outcome = if whole { Outcome::Completed } else { Outcome::ClientAborted };
        assert_eq!(world.one().await.outcome, outcome, "booked before serve returned");
        assert!(TcpStream::connect(world.address).await.is_err(), "the listener is closed");
    }
}

#[tokio::test]
async fn tls_serves_both_versions() {
    let (certificate, secret) = (include_bytes!("tls/certificate.pem"), include_bytes!("tls/key.pem"));
    let tls = gateway::server_tls(certificate, secret).unwrap();
    assert!(gateway::server_tls(b"nothing", secret).is_err() && gateway::server_tls(certificate, b"nothing").is_err());
    let upstream = Upstream::start([chat(9, 1)]).await;
    let ring = gateway::KeyRing::new([0; 32], []);
    let world = World::with(settings(&[("openai", Kind::OpenAi, &upstream)]), ring, Some(tls)).await;
    let mut roots = rustls::RootCertStore::empty();
    let chain = rustls::pki_types::pem::PemObject::pem_slice_iter(certificate);
    for certificate in chain {
        let certificate: rustls::pki_types::CertificateDer<'static> = certificate.unwrap();
        roots.add(certificate).unwrap();
    }
    for (version, alpn) in [(Version::HTTP_11, &b"http/1.1"[..]), (Version::HTTP_2, b"h2")] {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots.clone())
            .with_no_client_auth();
        config.alpn_protocols = vec![alpn.to_vec()];
        let stream = TcpStream::connect(world.address).await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let stream = connector.connect("localhost".try_into().unwrap(), stream).await.unwrap();
        let request = Request::post("https://localhost/v1/chat/completions").header("content-type", "application/json");
        let request = request.version(version).body(Full::<Bytes>::from(CHAT)).unwrap();
        let response = if version == Version::HTTP_2 {
            let (mut sender, connection) =
                hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
            tokio::spawn(connection);
            sender.send_request(request).await.unwrap()
        } else {
            let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
            tokio::spawn(connection);
            let mut request = request;
            *request.uri_mut() = "/v1/chat/completions".parse().unwrap();
            request.headers_mut().insert("host", "localhost".parse().unwrap());
            sender.send_request(request).await.unwrap()
        };
        let answered = crate::world::read(response).await;
        assert!(answered.status == 200 && answered.whole, "{answered:?}");
    }
    assert_eq!(world.settled().await.len(), 2);
    let mut plain = TcpStream::connect(world.address).await.unwrap();
    plain.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut rest = Vec::new();
    let _ = plain.read_to_end(&mut rest).await;
    assert!(!String::from_utf8_lossy(&rest).contains("HTTP/1.1"), "no plain text on a TLS listener");
}

#[tokio::test]
async fn answers_of_unknown_length_end_only_after_their_record() {
    let body = "{\"made\":1}";
    let script = vec![
        write("HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"),
        chunk(body),
        Step::Wait(20),
        last_chunk(),
    ];
    let (_upstream, world) = openai(script).await;
    let answered = world.send("/v1/unheard/of", CHAT).await;
    assert_eq!((answered.text.as_str(), answered.whole), (body, true));
    assert_eq!(world.journal.attempts().len(), 1, "booked before the body ended");
    let closing = vec![write(&format!("HTTP/1.1 200 OK\r\n\r\n{body}")), Step::Close];
    let (_upstream, world) = openai(closing).await;
    let answered = world.send("/v1/unheard/of", CHAT).await;
    assert_eq!((answered.text.as_str(), answered.whole), (body, true));
    assert_eq!(world.one().await.outcome, Outcome::Completed);
}

#[tokio::test]
async fn an_answer_too_long_to_hold_for_its_cost_still_arrives_whole() {
    let long = format!("{{\"x\":\"{}\"}}", "a".repeat(17 << 20));
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    let (_upstream, world) = openai(vec![write(head), chunk(&long), last_chunk()]).await;
    let request = world.post("/v1/unheard/of").header("x-farthing-report", "cost").body(CHAT.into()).unwrap();
    let answered = world.ask(request).await;
    assert!(answered.status == 200 && answered.whole && answered.text == long, "{}", answered.text.len());
    assert_eq!(world.one().await.outcome, Outcome::Completed);
}

#[tokio::test]
async fn a_key_of_ours_reaches_no_upstream_in_any_spelling_of_the_query() {
    let (upstream, world) = openai(chat(9, 1)).await;
    let other = gateway::mint([6; 32], &[1; 32]).0;
    let escaped = other.reveal().replacen('f', "%66", 1);
    for query in [format!("k%65y={escaped}&a=1"), format!("a=1&api_key={}", other.reveal())] {
        world.send(&format!("/v1/chat/completions?{query}"), CHAT).await;
    }
    for received in upstream.received() {
        assert!(received.head.starts_with("post /v1/chat/completions?a=1 "), "{}", received.head);
    }
}
