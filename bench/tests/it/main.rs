//! The measuring tools measured: mock provider, plain proxy and load generator against one another.

use std::net::SocketAddr;
use std::time::Duration;

use bench::load::{self, Pace, Target};
use bench::wire::{Connection, Keep, get, post};
use bench::{mock, plain};

fn listener() -> (std::net::TcpListener, SocketAddr) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.set_nonblocking(true).expect("a socket that can be set");
    let address = listener.local_addr().expect("a bound socket");
    (listener, address)
}

/// A mock behind a plain proxy, both on a runtime that lasts as long as the returned value.
fn chain() -> (tokio::runtime::Runtime, SocketAddr, SocketAddr) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    let ((upstream, upstream_address), (proxy, proxy_address)) = (listener(), listener());
    runtime.spawn(async { mock::serve(tokio::net::TcpListener::from_std(upstream).expect("a runtime")).await });
    runtime.spawn(async move {
        plain::serve(tokio::net::TcpListener::from_std(proxy).expect("a runtime"), upstream_address.to_string()).await
    });
    (runtime, upstream_address, proxy_address)
}

#[test]
fn the_plain_proxy_passes_every_byte_on() {
    let (_runtime, upstream, proxy) = chain();
    for body in [
        r#"{"max_tokens":3,"seed":7}"#,
        r#"{"stream":true,"max_tokens":3,"seed":7,"stream_options":{"include_usage":true}}"#,
    ] {
        let bodies = [upstream, proxy].map(|address| {
            let request = post("/v1/chat/completions", address, "", body);
            let answer = Connection::new(address, Duration::from_secs(5)).call(&request, Keep::Body).unwrap();
            assert_eq!(answer.status, 200);
            String::from_utf8(answer.body).unwrap()
        });
        // The mock numbers its answers, so two of them differ in their ids and nothing else.
        let [direct, proxied] = bodies.map(|text| text.replace(|byte: char| byte.is_ascii_digit(), "0"));
        assert_eq!(direct, proxied);
        assert!(direct.contains("\"usage\""));
    }
}

#[test]
fn the_load_generator_counts_what_the_mock_counts() {
    let (_runtime, upstream, proxy) = chain();
    let request = post("/v1/chat/completions", proxy, "", r#"{"max_tokens":3,"seed":7}"#);
    let target = Target { address: proxy, request: request.into(), body_bytes_min: 100 };
    let (duration, rate) = (Duration::from_millis(500), 200.0);
    let saturated = load::run(&target, 4, duration, Pace::Saturate);
    let paced = load::run(&target, 4, duration, Pace::PerSecond(rate));
    assert_eq!((saturated.errors, paced.errors), (0, 0));
    assert!(saturated.rate() > rate, "{}", saturated.rate());
    assert!((80..=100).contains(&paced.total.count()), "{}", paced.total.count());
    let counted = Connection::new(upstream, duration).call(&get(mock::COUNT_PATH, upstream, ""), Keep::Body).unwrap();
    assert_eq!(String::from_utf8(counted.body).unwrap(), (saturated.answered + paced.answered).to_string());
}

#[test]
fn latency_at_a_fixed_rate_counts_from_the_moment_a_request_was_due() {
    let (_runtime, _, proxy) = chain();
    // Each answer takes 50 ms and one connection is asked for 100 a second: the queue grows, and so must the latency.
    let request = post("/v1/chat/completions", proxy, "", r#"{"user":"pace:50000:0"}"#);
    let target = Target { address: proxy, request: request.into(), body_bytes_min: 100 };
    let outcome = load::run(&target, 1, Duration::from_millis(600), Pace::PerSecond(100.0));
    let longest = outcome.total.quantile_ms(1.0).unwrap();
    assert!(longest > 400.0, "{longest}");
}
