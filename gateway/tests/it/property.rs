//! Whatever upstreams and clients do, every opened record gets exactly one attempt.

use std::time::Duration;

use gateway::{Availability, Kind, ModelRoute, OnClientAbort, RouteTarget};
use http_body_util::BodyExt;
use proptest::prelude::*;

use crate::upstream::{
    DONE, Script, Step, Upstream, chat, chunk, delta, json, last_chunk, sse_head, usage_chunk, write,
};
use crate::world::{CHAT, CHAT_STREAM, World, settings};

/// How a client behaves.
#[derive(Debug, Clone, Copy)]
enum Patience {
    ReadsAll,
    LeavesAfterMs(u64),
    LeavesAfterChunks(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => "[a-z ]{1,12}".prop_map(|text| chunk(&delta(&text))),
        2 => Just(chunk(&usage_chunk(9, 4))),
        2 => Just(chunk(DONE)),
        2 => Just(last_chunk()),
        3 => (1u64..30).prop_map(Step::Wait),
        1 => Just(Step::Close),
        1 => Just(Step::Reset),
        1 => Just(Step::Stall),
        1 => Just(write("zz\r\n")),
        1 => Just(chunk("data: {broken\n\n")),
    ]
}

fn script() -> impl Strategy<Value = Script> {
    prop_oneof![
        6 => prop::collection::vec(step(), 0..8).prop_map(|steps| std::iter::once(sse_head()).chain(steps).collect()),
        2 => prop::collection::vec(step(), 0..3),
        1 => Just(chat(9, 4)),
        1 => prop::sample::select(vec![400u16, 429, 500, 503]).prop_map(|status| json(status, "{\"error\":{}}")),
        1 => Just(vec![write("HTTP/1.1 200 OK\r\ncontent-length: 90\r\n\r\n{\"id\""), Step::Wait(5), Step::Close]),
    ]
}

fn patience() -> impl Strategy<Value = Patience> {
    prop_oneof![
        Just(Patience::ReadsAll),
        (0u64..60).prop_map(Patience::LeavesAfterMs),
        (0usize..4).prop_map(Patience::LeavesAfterChunks),
    ]
}

/// What is said of an upstream, and when.
fn said() -> impl Strategy<Value = (u64, &'static str, Availability)> {
    let availability = [Availability::Serving, Availability::Draining, Availability::Away];
    (0u64..80, prop::sample::select(vec!["a", "b"]), prop::sample::select(availability.to_vec()))
}

/// What happens around the clients.
#[derive(Debug)]
struct Weather {
    said: Vec<(u64, &'static str, Availability)>,
    drains: bool,
    retries: u16,
    replicas: bool,
}

async fn play(a: Vec<Script>, b: Vec<Script>, clients: Vec<(Patience, bool)>, weather: Weather) {
    let Weather { said, drains, retries, replicas } = weather;
    let (a, b) = (Upstream::start(a).await, Upstream::start(b).await);
    let mut settings = settings(&[("a", Kind::OpenAi, &a), ("b", Kind::OpenAi, &b)]);
    let target = |name: &str| RouteTarget { upstream: name.into(), model: None, weight: 1 };
    for place in &mut settings.upstreams {
        std::sync::Arc::get_mut(place).unwrap().deployment = replicas.then(|| "one".into());
    }
    settings.limits.hold_ms_max = 60;
    settings.routes = vec![ModelRoute {
        model: "*".into(),
        targets: vec![target("a")],
        fallbacks: vec![target("b")],
        retries,
        ..ModelRoute::default()
    }];
    settings.on_client_abort = if drains { OnClientAbort::Drain } else { OnClientAbort::Cancel };
    (settings.limits.first_byte_ms_max, settings.limits.stream_idle_ms_max) = (120, 120);
    settings.limits.drain_ms_max = 200;
    let world = World::start(settings).await;
    let run = async |(patience, streams): (Patience, bool)| {
        let body = if streams { CHAT_STREAM } else { CHAT };
        let reading = async {
            let request = world.post("/v1/chat/completions").body(body.into()).unwrap();
            let Ok(mut response) = world.client.request(request).await else { return };
            let most = if let Patience::LeavesAfterChunks(most) = patience { most } else { usize::MAX };
            let mut seen = 0;
            while seen < most && matches!(response.frame().await, Some(Ok(_))) {
                seen += 1;
            }
        };
        match patience {
            Patience::LeavesAfterMs(ms) => drop(tokio::time::timeout(Duration::from_millis(ms), reading).await),
            _ => reading.await,
        }
    };
    let gateway = world.gateway.clone();
    let saying = tokio::spawn(async move {
        for (after_ms, name, availability) in said {
            tokio::time::sleep(Duration::from_millis(after_ms)).await;
            gateway.set_available(name, availability);
        }
    });
    futures_util::future::join_all(clients.into_iter().map(run)).await;
    saying.await.unwrap();
    // Clients that left may still be on their way in; the books are complete when the gateway is stopped.
    let mut world = world;
    let _ = world.stop.take().unwrap().send(());
    world.serving.take().unwrap().await.unwrap();
    world.settled().await;
    assert_eq!((world.gateway.in_flight("a"), world.gateway.in_flight("b")), (0, 0), "a place was never given back");
    assert!(world.gateway.held().is_empty() && world.gateway.metrics().held.get() == 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]
    #[test]
    fn every_opened_record_gets_exactly_one_attempt(
        a in prop::collection::vec(script(), 1..4),
        b in prop::collection::vec(script(), 1..3),
        clients in prop::collection::vec((patience(), any::<bool>()), 1..6),
        said in prop::collection::vec(said(), 0..5),
        drains in any::<bool>(),
        retries in 0u16..3,
        replicas in any::<bool>(),
    ) {
        let weather = Weather { said, drains, retries, replicas };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(play(a, b, clients, weather));
    }
}
