//! What is known of attempts before they end, for settling what they use meanwhile.

use std::time::Duration;

use gateway::{Kind, OnClientAbort, Settings};
use http_body_util::BodyExt;
use ledger::Running;

use crate::upstream::{DONE, Step, Upstream, chunk, delta, json, last_chunk, sse_head, usage_chunk, write};
use crate::world::{CHAT, CHAT_STREAM, World, settings};

/// Waits until a running attempt looks as it should.
async fn until(world: &World, wanted: impl Fn(&[Running]) -> bool) -> Vec<Running> {
    for _ in 0..400 {
        let running = world.gateway.running();
        if wanted(&running) {
            return running;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("never seen; now {:#?}", world.gateway.running());
}

fn answering(upstream: &Upstream, kind: Kind) -> Settings {
    settings(&[("engine", kind, upstream)])
}

#[tokio::test]
async fn a_stream_is_seen_at_each_stage_and_gone_when_it_ends() {
    let mut script = vec![Step::Wait(150), sse_head()];
    for text in ["One", " two", " three"] {
        script.extend([chunk(&delta(text)), Step::Wait(150)]);
    }
    let usage = usage_chunk(9, 3).replace("\"usage\"", "\"metrics\":{\"queue_time_ms\":2.5},\"usage\"");
    script.extend([chunk(&usage), chunk(DONE), last_chunk()]);
    let upstream = Upstream::start([script]).await;
    let world = World::start(answering(&upstream, Kind::Vllm)).await;
    assert!(world.gateway.running().is_empty());
    let request = world.post("/v1/chat/completions").header("x-farthing-feature", "summary");
    let asking = tokio::spawn(world.client.request(request.body(CHAT_STREAM.into()).unwrap()));

    let [waiting] = until(&world, |running| running.len() == 1).await.try_into().unwrap();
    let opened = world.journal.opened().remove(0);
    assert_eq!((waiting.id, &waiting.context, &waiting.route), (opened.id, &opened.context, &opened.route));
    assert_eq!(waiting.context.feature.as_deref(), Some("summary"));
    assert_eq!((waiting.usage.input, waiting.usage.output), (opened.estimate.input, 0));
    assert!(
        opened.estimate.input > 0 && waiting.timeline.sent_us.is_some() && waiting.timeline.first_byte_us.is_none()
    );

    let mut body = asking.await.unwrap().unwrap().into_body();
    let reading = tokio::spawn(async move { while body.frame().await.is_some() {} });
    let seen = |tokens| move |running: &[Running]| running.iter().any(|attempt| attempt.usage.output == tokens);
    let [first] = until(&world, seen(1)).await.try_into().unwrap();
    let [second] = until(&world, seen(2)).await.try_into().unwrap();
    let (one, two) = (first.timeline, second.timeline);
    assert_eq!((one.first_token_us, one.gaps.count, one.queued_us), (one.last_token_us, 0, None));
    assert_eq!((two.first_token_us, two.gaps.count), (one.first_token_us, 1));
    assert!(two.last_token_us > one.last_token_us && two.finished_us >= two.last_token_us.unwrap());
    assert!(two.sent_us <= two.first_byte_us && two.first_byte_us <= two.first_token_us);

    reading.await.unwrap();
    let attempt = world.one().await;
    assert!(world.gateway.running().is_empty());
    let timeline = attempt.timeline;
    assert_eq!((timeline.sent_us, timeline.first_token_us), (two.sent_us, two.first_token_us));
    assert_eq!((timeline.queued_us, attempt.usage.output), (Some(2_500), 3));
}

#[tokio::test]
async fn a_whole_answer_claims_no_output_before_it_is_there() {
    let body =
        crate::upstream::chat_body("m", 9, 300).replace("\"usage\"", "\"metrics\":{\"queue_time_ms\":7},\"usage\"");
    let mut script = vec![Step::Wait(200)];
    script.extend(json(200, &body));
    let upstream = Upstream::start([script]).await;
    let world = World::start(answering(&upstream, Kind::Vllm)).await;
    let (answered, running) =
        tokio::join!(world.send("/v1/chat/completions", CHAT), until(&world, |running| running.len() == 1));
    assert_eq!((answered.status.as_u16(), running[0].usage.output), (200, 0));
    let attempt = world.one().await;
    assert_eq!((attempt.timeline.queued_us, attempt.usage.output), (Some(7_000), 300));
    assert!(world.gateway.running().is_empty());
}

#[tokio::test]
async fn nothing_stays_behind_however_an_attempt_ends() {
    let started = vec![sse_head(), chunk(&delta("One")), Step::Wait(60_000)];
    let cut = vec![sse_head(), chunk(&delta("One")), Step::Reset];
    let endless = vec![write("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n"), Step::Stall];
    for policy in [OnClientAbort::Cancel, OnClientAbort::Drain] {
        let upstream = Upstream::start([started.clone(), cut.clone(), endless.clone(), json(500, "{}")]).await;
        let mut settings = answering(&upstream, Kind::OpenAi);
        settings.on_client_abort = policy;
        (settings.limits.drain_ms_max, settings.limits.stream_idle_ms_max) = (100, 300);
        let world = World::start(settings).await;
        let mut dropped = world.begin("/v1/chat/completions", CHAT_STREAM).await;
        dropped.frame().await.unwrap().unwrap();
        assert_eq!(world.gateway.running().len(), 1);
        drop(dropped);
        for _ in 0..3 {
            let request = world.post("/v1/chat/completions").body(CHAT_STREAM.into()).unwrap();
            if let Ok(response) = world.client.request(request).await {
                crate::world::read(response).await;
            }
        }
        assert_eq!(world.settled().await.len(), 4);
        assert!(world.gateway.running().is_empty());
    }
}
