//! Upstreams that come and go: no request is lost when one goes, and the first one waits until one comes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use gateway::settings::{Balance, Upstream as Place};
use gateway::{Availability, Deployment, Kind, ModelRoute, RouteTarget, Settings};
use http::StatusCode;
use http_body_util::BodyExt;
use ledger::Outcome;
use tokio::task::JoinSet;

use crate::upstream::{Script, Step, Upstream, chat, chat_stream, chunk, delta, json, sse_head};
use crate::world::{Answered, CHAT, CHAT_STREAM, TestClient, World, settings};

const PATH: &str = "/v1/chat/completions";

/// Settings with replicas of one deployment behind one route.
fn replicas(upstreams: &[&Upstream], change: impl FnOnce(&mut Settings)) -> Settings {
    let named = |number: usize| ["r1", "r2", "r3"][number];
    let places: Vec<(&str, Kind, &Upstream)> =
        upstreams.iter().enumerate().map(|(number, upstream)| (named(number), Kind::Vllm, *upstream)).collect();
    let mut settings = settings(&places);
    for place in &mut settings.upstreams {
        let place = Arc::get_mut(place).unwrap();
        (place.pool, place.deployment) = (Some("shared".into()), Some("chat".into()));
    }
    let target = |place: &Arc<Place>| RouteTarget { upstream: place.name.to_string(), model: None, weight: 1 };
    let targets = settings.upstreams.iter().map(target).collect();
    let balance = Balance::LeastOutstanding;
    settings.routes = vec![ModelRoute { model: "*".into(), targets, balance, ..ModelRoute::default() }];
    change(&mut settings);
    settings
}

fn deployment() -> Deployment {
    Deployment { pool: "shared".into(), name: "chat".into() }
}

async fn until(what: &str, is_so: impl Fn() -> bool) {
    for _ in 0..1_000 {
        if is_so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("never: {what}");
}

fn held(world: &World) -> u32 {
    world.gateway.held().get(&deployment()).copied().unwrap_or(0)
}

/// Requests that are asked for in tasks of their own.
fn asking(world: &World, body: &'static str, count: usize) -> JoinSet<Answered> {
    let mut asking = JoinSet::new();
    for _ in 0..count {
        let (client, request) = (world.client.clone(), world.post(PATH).body(body.into()).unwrap());
        asking.spawn(async move { crate::world::read(client.request(request).await.unwrap()).await });
    }
    asking
}

/// An address where nobody listens.
async fn nobody() -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

fn moved(settings: &mut Settings, name: &str, base_url: &str) {
    for place in settings.upstreams.iter_mut().filter(|place| &*place.name == name) {
        let mut elsewhere = Place::clone(place);
        elsewhere.base_url = base_url.parse().unwrap();
        *place = Arc::new(elsewhere);
    }
}

#[tokio::test]
async fn a_request_waits_until_something_serves_it_and_costs_nothing_meanwhile() {
    for body in [CHAT, CHAT_STREAM] {
        let script = if body == CHAT { chat(9, 2) } else { chat_stream(&["a", "b"], 5, 9, 2) };
        let upstream = Upstream::start([script]).await;
        let world = World::start(replicas(&[&upstream], |_| {})).await;
        world.gateway.set_available("r1", Availability::Away);
        let mut waiting = asking(&world, body, 3);
        until("three wait", || held(&world) == 3).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(upstream.received().is_empty() && world.journal.opened().is_empty(), "nothing was opened");
        assert_eq!(world.gateway.metrics().held.get(), 3);
        assert_eq!(world.gateway.demand()[&deployment()].arrived, 3, "whoever scales hears of it");
        assert_eq!(world.gateway.in_flight("r1"), 0);

        world.gateway.set_available("r1", Availability::Serving);
        while let Some(answered) = waiting.join_next().await {
            let answered = answered.unwrap();
            assert!(answered.status == 200 && answered.whole, "{answered:?}");
        }
        let attempts = world.settled().await;
        assert_eq!(attempts.len(), 3);
        for attempt in &attempts {
            assert!(attempt.timeline.sent_us.unwrap() > 50_000, "the wait shows in the timeline");
        }
        assert!(world.gateway.held().is_empty());
        let demand = &world.gateway.demand()[&deployment()];
        assert_eq!((demand.arrived, demand.finished, demand.failed), (3, 3, 0));
        assert_eq!((demand.input_tokens, demand.output_tokens, demand.in_flight), (27, 6, 0));
        if body == CHAT_STREAM {
            assert_eq!((demand.ttft.count(), demand.tpot.count()), (3, 3));
            assert!(demand.ttft.percentile_s(0.5).unwrap() > 0.05, "the wait is part of the time to the first token");
        }
    }
}

#[tokio::test]
async fn no_more_wait_than_may() {
    let upstream = Upstream::start([chat(9, 1)]).await;
    let world = World::start(replicas(&[&upstream], |settings| settings.limits.hold_requests_max = 2)).await;
    world.gateway.set_available("r1", Availability::Draining);
    let mut waiting = asking(&world, CHAT, 2);
    until("two wait", || held(&world) == 2).await;
    let refused = world.send(PATH, CHAT).await;
    assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(refused.headers.contains_key("retry-after") && refused.text.contains("too many"), "{}", refused.text);
    assert_eq!(held(&world), 2);
    world.gateway.set_available("r1", Availability::Serving);
    while let Some(answered) = waiting.join_next().await {
        assert_eq!(answered.unwrap().status, 200);
    }
    assert_eq!(world.settled().await.len(), 2, "the refused one was never opened");
}

#[tokio::test]
async fn nobody_waits_for_ever() {
    let upstream = Upstream::start([chat(9, 1)]).await;
    let world = World::start(replicas(&[&upstream], |settings| settings.limits.hold_ms_max = 150)).await;
    world.gateway.set_available("r1", Availability::Away);
    let start = tokio::time::Instant::now();
    let refused = world.send(PATH, CHAT_STREAM).await;
    assert_eq!(refused.status, StatusCode::SERVICE_UNAVAILABLE);
    assert!(refused.headers.contains_key("retry-after") && refused.text.contains("in time"), "{}", refused.text);
    assert!((150..1_000).contains(&start.elapsed().as_millis()));
    assert!(world.settled().await.is_empty() && world.gateway.held().is_empty());
}

#[tokio::test]
async fn a_body_that_finds_no_room_is_not_held() {
    let upstream = Upstream::start([chat(9, 1)]).await;
    let world = World::start(replicas(&[&upstream], |settings| settings.limits.retained_bytes_max = 10)).await;
    assert_eq!(world.send(PATH, CHAT).await.status, 200, "it is sent all the same");
    world.gateway.set_available("r1", Availability::Away);
    let refused = world.send(PATH, CHAT).await;
    assert!(refused.status == 503 && refused.text.contains("no room"), "{}", refused.text);
}

#[tokio::test]
async fn a_look_wakes_nobody() {
    let upstream = Upstream::start([json(200, "{}")]).await;
    let world = World::start(replicas(&[&upstream], |_| {})).await;
    world.gateway.set_available("r1", Availability::Away);
    let request = http::Request::get(format!("http://{}/v1/models", world.address));
    let answered = world.ask(request.body(Default::default()).unwrap()).await;
    assert!(answered.status == 503 && answered.headers.contains_key("retry-after"), "{answered:?}");
    assert!(world.gateway.demand().get(&deployment()).is_none_or(|demand| demand.arrived == 0));
}

#[tokio::test]
async fn a_client_that_hangs_up_leaves_the_queue() {
    for body in [CHAT, CHAT_STREAM] {
        let upstream = Upstream::start([chat(9, 1)]).await;
        let world = World::start(replicas(&[&upstream], |_| {})).await;
        world.gateway.set_available("r1", Availability::Away);
        let mut waiting = asking(&world, body, 2);
        until("two wait", || held(&world) == 2).await;
        waiting.abort_all();
        while waiting.join_next().await.is_some() {}
        until("nobody waits", || held(&world) == 0).await;
        assert_eq!(world.gateway.metrics().held.get(), 0);
        world.gateway.set_available("r1", Availability::Serving);
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(upstream.received().is_empty(), "nothing is started for somebody who left");
        assert!(world.settled().await.is_empty() && world.journal.opened().is_empty());
    }
}

#[tokio::test]
async fn a_fallback_serves_at_once_and_the_wanted_deployment_hears_of_it() {
    let (chat_upstream, other) = (Upstream::start([chat(9, 1)]).await, Upstream::start([chat(9, 1)]).await);
    let settings = replicas(&[&chat_upstream, &other], |settings| {
        Arc::get_mut(&mut settings.upstreams[1]).unwrap().deployment = Some("other".into());
        let fallback = settings.routes[0].targets.remove(1);
        settings.routes[0].fallbacks = vec![fallback];
    });
    let world = World::start(settings).await;
    world.gateway.set_available("r1", Availability::Away);
    assert_eq!(world.send(PATH, CHAT).await.status, 200);
    assert_eq!((chat_upstream.received().len(), other.received().len()), (0, 1));
    let demand = world.gateway.demand();
    let other = Deployment { name: "other".into(), ..deployment() };
    assert_eq!((demand[&deployment()].arrived, demand[&deployment()].finished), (1, 0));
    assert_eq!((demand[&other].arrived, demand[&other].finished), (0, 1));
}

#[tokio::test]
async fn what_is_said_of_an_upstream_survives_new_settings() {
    let (a, b) = (Upstream::start([chat(9, 1)]).await, Upstream::start([chat(9, 1)]).await);
    let world = World::start(replicas(&[&a, &b], |_| {})).await;
    world.gateway.set_available("r1", Availability::Away);
    world.gateway.set_available("r3", Availability::Away);
    let c = Upstream::start([chat(9, 1)]).await;
    world.settings.store(Arc::new(replicas(&[&a, &b, &c], |_| {})));
    assert_eq!(world.gateway.available("r1"), Availability::Away);
    for _ in 0..5 {
        assert_eq!(world.send(PATH, CHAT).await.status, 200);
    }
    assert_eq!((a.received().len(), b.received().len(), c.received().len()), (0, 5, 0));
    assert_eq!(world.gateway.demand()[&deployment()].finished, 5);
    assert_eq!(world.gateway.served()["r2"].arrived, 5);
}

#[tokio::test]
async fn the_fewest_in_flight_come_next() {
    let slow = || [vec![Step::Wait(300)], chat(9, 1)].concat();
    let (a, b) = (Upstream::start([slow()]).await, Upstream::start([slow()]).await);
    let world = World::start(replicas(&[&a, &b], |_| {})).await;
    let mut asked = JoinSet::new();
    for number in 1..=10 {
        let (client, request) = (world.client.clone(), world.post(PATH).body(CHAT.into()).unwrap());
        asked.spawn(async move { crate::world::read(client.request(request).await.unwrap()).await });
        until("it is on its way", || world.gateway.in_flight("r1") + world.gateway.in_flight("r2") == number).await;
        assert!(world.gateway.in_flight("r1").abs_diff(world.gateway.in_flight("r2")) <= 1);
    }
    while let Some(answered) = asked.join_next().await {
        assert_eq!(answered.unwrap().status, 200);
    }
    assert_eq!((a.received().len(), b.received().len()), (5, 5));
}

/// Asks without a pause until told to stop; counts answers and everything that is not one.
fn load(world: &World, clients: usize, stop: &Arc<AtomicUsize>) -> JoinSet<(usize, Vec<String>)> {
    let mut load = JoinSet::new();
    for number in 0..clients {
        let stop = Arc::clone(stop);
        let (client, address): (TestClient, _) = (world.client.clone(), world.address);
        load.spawn(async move {
            let (mut good, mut bad) = (0, Vec::new());
            while stop.load(Ordering::Relaxed) == 0 {
                let body = if number % 2 == 0 { CHAT } else { CHAT_STREAM };
                let request = http::Request::post(format!("http://{address}{PATH}"));
                let request = request.header("content-type", "application/json").body(body.into()).unwrap();
                match client.request(request).await {
                    Ok(response) => match crate::world::read(response).await {
                        Answered { status: StatusCode::OK, whole: true, .. } => good += 1,
                        answered => bad.push(format!("{answered:?}")),
                    },
                    Err(error) => bad.push(error.to_string()),
                }
            }
            (good, bad)
        });
    }
    load
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_is_drained_and_stopped_under_load_and_no_request_notices() {
    let answer = || chat_stream(&["a", "b", "c"], 4, 9, 3);
    let (a, b) = (Upstream::start([answer()]).await, Upstream::start([answer()]).await);
    let world = World::start(replicas(&[&a, &b], |_| {})).await;
    let (a_url, gone) = (format!("http://{}", a.address), nobody().await);
    let stop = Arc::new(AtomicUsize::new(0));
    let mut load = load(&world, 12, &stop);
    for _ in 0..6 {
        tokio::time::sleep(Duration::from_millis(60)).await;
        world.gateway.set_available("r1", Availability::Draining);
        tokio::time::timeout(Duration::from_secs(5), world.gateway.drained("r1")).await.expect("it drains");
        // Stopped: from here on whoever still went there would be refused.
        let before = a.received().len();
        world.settings.rcu(|settings| {
            let mut settings = Settings::clone(settings);
            moved(&mut settings, "r1", &gone);
            settings
        });
        world.gateway.set_available("r1", Availability::Away);
        tokio::time::sleep(Duration::from_millis(40)).await;
        assert_eq!((a.received().len(), world.gateway.in_flight("r1")), (before, 0), "nobody goes there any more");
        world.settings.rcu(|settings| {
            let mut settings = Settings::clone(settings);
            moved(&mut settings, "r1", &a_url);
            settings
        });
        world.gateway.set_available("r1", Availability::Serving);
    }
    stop.store(1, Ordering::Relaxed);
    let mut answered = 0;
    while let Some(one) = load.join_next().await {
        let (good, bad) = one.unwrap();
        assert!(bad.is_empty(), "{bad:?}");
        answered += good;
    }
    let attempts = world.settled().await;
    assert!(attempts.iter().all(|attempt| attempt.outcome == Outcome::Completed));
    assert_eq!(attempts.len(), answered, "no request needed a second attempt");
    assert!(answered > 200, "{answered}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_is_killed_under_load_takes_no_request_with_it_that_had_not_begun() {
    // Worst manners: it resets what has not begun to answer.
    let dying = Upstream::start([vec![Step::Wait(100), Step::Reset]]).await;
    let good = Upstream::start([chat_stream(&["a", "b"], 4, 9, 2)]).await;
    let world = World::start(replicas(&[&dying, &good], |_| {})).await;
    let mut asked = asking(&world, CHAT_STREAM, 10);
    until("five are at the one that dies", || world.gateway.in_flight("r1") == 5).await;
    world.gateway.set_available("r1", Availability::Away);
    while let Some(answered) = asked.join_next().await {
        let answered = answered.unwrap();
        assert!(answered.status == 200 && answered.whole, "{answered:?}");
    }
    let attempts = world.settled().await;
    let cut = attempts.iter().filter(|attempt| attempt.outcome == Outcome::UpstreamCut).count();
    let whole = attempts.iter().filter(|attempt| attempt.outcome == Outcome::Completed).count();
    assert_eq!((attempts.len(), cut, whole), (15, 5, 10));
}

#[tokio::test]
async fn a_replica_that_dies_without_a_word_costs_no_request_and_a_deadly_request_no_third_replica() {
    let dying = || vec![Step::Wait(20), Step::Reset];
    for (second, answered, tries) in [(chat(9, 1), 200, 2), (dying(), 502, 2)] {
        let (a, b) = (Upstream::start([dying()]).await, Upstream::start([second.clone()]).await);
        let c = Upstream::start([second]).await;
        let world = World::start(replicas(&[&a, &b, &c], |_| {})).await;
        for name in ["r1", "r2", "r3"] {
            world.gateway.set_available(name, Availability::Serving);
        }
        // Its weight makes it the one with the least to do.
        world.settings.rcu(|settings| {
            let mut settings = Settings::clone(settings);
            settings.routes[0].targets[0].weight = 100;
            settings
        });
        let got = world.send(PATH, CHAT).await;
        assert_eq!(got.status.as_u16(), answered, "{}", got.text);
        assert_eq!(world.settled().await.len(), tries);
    }
}

#[tokio::test]
async fn a_refused_connection_is_tried_on_a_sibling_first() {
    let good = Upstream::start([chat(9, 1)]).await;
    let gone = nobody().await;
    let settings = replicas(&[&good, &good], |settings| moved(settings, "r1", &gone));
    let world = World::start(settings).await;
    for _ in 0..30 {
        let answered = world.send(PATH, CHAT).await;
        assert_eq!(answered.status, 200, "{}", answered.text);
    }
    let attempts = world.settled().await;
    let refused = attempts.iter().filter(|attempt| attempt.outcome == Outcome::UpstreamUnreachable).count();
    assert!(attempts.len() == 30 + refused && refused == 1, "one tries for all of them: {refused}");
}

#[tokio::test]
async fn a_replica_that_breaks_while_it_goes_leaves_its_requests_to_the_next_one() {
    let endings: [Script; 3] = [
        vec![Step::Wait(150), Step::Reset],
        [vec![Step::Wait(150)], json(503, "{\"error\":\"shutting down\"}")].concat(),
        vec![sse_head(), Step::Wait(150), Step::Reset],
    ];
    for ending in endings {
        let (dying, next) =
            (Upstream::start([ending.clone()]).await, Upstream::start([chat_stream(&["a"], 0, 9, 1)]).await);
        let world = World::start(replicas(&[&dying, &next], |_| {})).await;
        world.gateway.set_available("r2", Availability::Away);
        world.gateway.set_available("r1", Availability::Serving);
        let mut asked = asking(&world, CHAT_STREAM, 1);
        until("it is there", || world.gateway.in_flight("r1") == 1).await;
        world.gateway.set_available("r1", Availability::Draining);
        until("it waits for the next one", || held(&world) == 1).await;
        assert_eq!(world.gateway.in_flight("r1"), 0);
        world.gateway.set_available("r2", Availability::Serving);
        let answered = asked.join_next().await.unwrap().unwrap();
        assert!(answered.status == 200 && answered.whole, "{ending:?} {answered:?}");
        assert_eq!(world.settled().await.len(), 2);
    }
}

#[tokio::test]
async fn a_scaled_replica_that_vanished_without_a_word_is_given_time_to_come_back() {
    let next = Upstream::start([chat(9, 1)]).await;
    let gone = nobody().await;
    let world = World::start(replicas(&[&next], |settings| moved(settings, "r1", &gone))).await;
    assert_eq!(world.send(PATH, CHAT).await.status, 502, "nobody scales it: it is just not there");
    world.gateway.set_available("r1", Availability::Serving);
    let mut asked = asking(&world, CHAT, 1);
    until("one try failed", || world.journal.attempts().len() == 2).await;
    // Whoever scales it notices.
    world.gateway.set_available("r1", Availability::Away);
    until("it waits", || held(&world) == 1).await;
    // A request keeps the settings that it came with, so its replica comes back at the old address.
    let address: std::net::SocketAddr = gone.trim_start_matches("http://").parse().unwrap();
    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    let answering = tokio::spawn(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut seen = [0; 4_096];
        let _ = stream.read(&mut seen).await.unwrap();
        for step in chat(9, 1) {
            if let Step::Write(bytes) = step {
                stream.write_all(&bytes).await.unwrap();
            }
        }
        stream
    });
    world.gateway.set_available("r1", Availability::Serving);
    assert_eq!(asked.join_next().await.unwrap().unwrap().status, 200);
    drop(answering.await.unwrap());
    assert_eq!(world.settled().await.last().unwrap().outcome, Outcome::Completed);
}

#[tokio::test]
async fn a_stop_lets_nobody_wait_in_vain() {
    let upstream = Upstream::start([chat(9, 1)]).await;
    let mut world = World::start(replicas(&[&upstream], |_| {})).await;
    world.gateway.set_available("r1", Availability::Away);
    let mut waiting = asking(&world, CHAT, 1);
    until("it waits", || held(&world) == 1).await;
    let start = tokio::time::Instant::now();
    let _ = world.stop.take().unwrap().send(());
    let answered = waiting.join_next().await.unwrap().unwrap();
    assert!(answered.status == 503 && answered.headers.contains_key("retry-after"), "{answered:?}");
    assert!(start.elapsed() < Duration::from_secs(2));
}

#[tokio::test]
async fn a_running_answer_keeps_its_replica_from_being_drained() {
    let long = vec![sse_head(), chunk(&delta("a")), Step::Wait(200), chunk(&delta("b")), Step::Wait(60_000)];
    let upstream = Upstream::start([long]).await;
    let world = World::start(replicas(&[&upstream], |_| {})).await;
    let mut response = world.begin(PATH, CHAT_STREAM).await;
    response.frame().await.unwrap().unwrap();
    world.gateway.set_available("r1", Availability::Draining);
    let patience = Duration::from_millis(100);
    assert!(tokio::time::timeout(patience, world.gateway.drained("r1")).await.is_err());
    assert_eq!((world.gateway.in_flight("r1"), world.gateway.demand()[&deployment()].in_flight), (1, 1));
    drop(response);
    tokio::time::timeout(Duration::from_secs(5), world.gateway.drained("r1")).await.expect("its client left");
    assert_eq!(world.gateway.demand()[&deployment()].aborted, 1);
}
