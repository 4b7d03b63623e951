//! A first look at what the gateway adds; `bench/gateway` measures properly. Run with `--ignored --nocapture`.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use gateway::settings::{Balance, Upstream as Place};
use gateway::{Kind, ModelRoute, RouteTarget, Settings};
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::service::service_fn;
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpListener;

use crate::upstream::chat_body;
use crate::world::{CHAT, World};

const REQUESTS: usize = 4_000;

async fn engine() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let answer = Bytes::from(chat_body("gpt-4o-2024-08-06", 17, 2));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            stream.set_nodelay(true).unwrap();
            let answer = answer.clone();
            let service = service_fn(move |request: Request<hyper::body::Incoming>| {
                let answer = answer.clone();
                async move {
                    let _ = request.into_body().collect().await;
                    let response = Response::builder().header("content-type", "application/json");
                    Ok::<_, Infallible>(response.body(Full::new(answer)).unwrap())
                }
            });
            tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
        }
    });
    address
}

/// Microseconds of the median and the 99th of a hundred requests, one after the other on one connection.
async fn measure(address: SocketAddr) -> (u128, u128) {
    let client: Client<_, Full<Bytes>> = Client::builder(TokioExecutor::new()).build_http();
    let mut taken = Vec::with_capacity(REQUESTS);
    for _ in 0..REQUESTS {
        let request = Request::post(format!("http://{address}/v1/chat/completions"));
        let request = request.header("content-type", "application/json").body(CHAT.into()).unwrap();
        let start = tokio::time::Instant::now();
        let response = client.request(request).await.unwrap();
        response.into_body().collect().await.unwrap();
        taken.push(start.elapsed().as_micros());
    }
    taken.sort_unstable();
    (taken[REQUESTS / 2], taken[REQUESTS * 99 / 100])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "prints a measurement"]
async fn added_latency_of_one_connection() {
    let engine = engine().await;
    let place = Place::new("openai", Kind::OpenAi, format!("http://{engine}").parse().unwrap());
    let world = World::start(Settings { upstreams: vec![Arc::new(place)], ..Settings::default() }).await;
    measure(engine).await;
    for _ in 0..2 {
        let (direct, through) = (measure(engine).await, measure(world.address).await);
        println!(
            "direct p50 {} p99 {} us; through the gateway p50 {} p99 {} us",
            direct.0, direct.1, through.0, through.1
        );
    }
    assert_eq!(world.settled().await.len(), 2 * REQUESTS);
}

#[test]
#[ignore = "prints a measurement"]
fn cost_of_a_plan_among_replicas() {
    for count in [1, 4, 16, 64] {
        let names: Vec<String> = (0..count).map(|number| format!("replica-{number}")).collect();
        let place = |name: &String| {
            let mut place = Place::new(name, Kind::Vllm, "http://127.0.0.1:1".parse().unwrap());
            (place.pool, place.deployment) = (Some("shared".into()), Some("chat".into()));
            Arc::new(place)
        };
        let target = |name: &String| RouteTarget { upstream: name.clone(), model: None, weight: 1 };
        let route = ModelRoute {
            model: "gpt-4o".into(),
            targets: names.iter().map(target).collect(),
            balance: Balance::LeastOutstanding,
            ..ModelRoute::default()
        };
        let settings =
            Settings { upstreams: names.iter().map(place).collect(), routes: vec![route], ..Settings::default() };
        let request = gateway::surface::inspect(
            &http::Method::POST,
            "/v1/chat/completions",
            Some("application/json"),
            CHAT.as_bytes(),
        );
        let start = tokio::time::Instant::now();
        for seed in 0..100_000 {
            let ask = gateway::Ask { settings: &settings, request: &request, key: None, seed };
            std::hint::black_box(gateway::plan(ask, |_| gateway::Look::default()));
        }
        println!("a plan among {count} replicas takes {} ns", start.elapsed().as_nanos() / 100_000);
    }
}
