//! What a client may see when its record cannot be written.

use gateway::{Durability, Kind, Settings, WhenLogFails};
use http_body_util::BodyExt;
use ledger::Outcome;

use crate::upstream::{DONE, Script, Upstream, chat, chat_stream};
use crate::world::{CHAT, CHAT_STREAM, Fails, World, settings};

async fn world_of(script: Script, policy: WhenLogFails, durability: Durability) -> (Upstream, World) {
    let upstream = Upstream::start([script]).await;
    let settings = settings(&[("openai", Kind::OpenAi, &upstream)]);
    (upstream, World::start(Settings { when_log_fails: policy, durability, ..settings }).await)
}

#[tokio::test]
async fn fail_closed_refuses_before_the_upstream_is_called() {
    let (upstream, world) = world_of(chat(9, 1), WhenLogFails::FailClosed, Durability::Process).await;
    world.journal.fail(Fails::Opened);
    for path in ["/v1/chat/completions", "/v1/messages"] {
        let answered = world.send(path, CHAT).await;
        let shape =
            if path.ends_with("messages") && answered.status == 503 { "\"type\":\"error\"" } else { "\"error\"" };
        assert!(answered.text.replace(' ', "").contains(shape), "{}", answered.text);
        if path.ends_with("completions") {
            assert_eq!(answered.status, 503);
        }
    }
    assert!(upstream.received().is_empty() && world.settled().await.is_empty());
    world.journal.fail(Fails::Nothing);
    assert_eq!(world.send("/v1/chat/completions", CHAT).await.status, 200, "and serves again when the disk does");
}

#[tokio::test]
async fn fail_closed_breaks_off_an_answer_whose_record_cannot_be_written() {
    for (fails, durability) in [(Fails::Finished, Durability::Process), (Fails::Sync, Durability::Power)] {
        for (script, body) in [(chat(9, 1), CHAT), (chat_stream(&["a", "b"], 5, 9, 2), CHAT_STREAM)] {
            let (_upstream, world) = world_of(script, WhenLogFails::FailClosed, durability).await;
            world.journal.fail(fails);
            let request = world.post("/v1/chat/completions").body(body.into()).unwrap();
            match world.client.request(request).await {
                Ok(response) => {
                    let answered = crate::world::read(response).await;
                    assert!(!answered.whole && !answered.text.contains(DONE.trim()), "{fails:?} {}", answered.text);
                    assert_eq!(answered.text.is_empty(), body == CHAT, "chunks before the end were not held back");
                }
                // An answer that is all end is not begun.
                Err(_) => assert_eq!(body, CHAT),
            }
            let expected = u64::from(fails == Fails::Finished);
            assert_eq!(world.gateway.metrics().lost_records.get(), expected);
        }
    }
}

#[tokio::test]
async fn fail_open_serves_and_counts_every_lost_record() {
    for (fails, lost, opened, booked) in
        [(Fails::Opened, 1, 0, 1), (Fails::Finished, 1, 1, 0), (Fails::Everything, 2, 0, 0)]
    {
        for (script, body) in [(chat(9, 1), CHAT), (chat_stream(&["a", "b"], 0, 9, 2), CHAT_STREAM)] {
            let (_upstream, world) = world_of(script, WhenLogFails::FailOpen, Durability::Process).await;
            world.journal.fail(fails);
            let answered = world.send("/v1/chat/completions", body).await;
            assert!(answered.status == 200 && answered.whole, "{fails:?}");
            assert_eq!(world.gateway.metrics().lost_records.get(), lost);
            assert_eq!(world.journal.lost.load(std::sync::atomic::Ordering::Relaxed), lost, "a gap is marked");
            assert_eq!((world.journal.opened().len(), world.journal.attempts().len()), (opened, booked));
        }
    }
}

#[tokio::test]
async fn the_record_is_there_before_the_end_is() {
    for (script, body, end) in [(chat(9, 1), CHAT, "}"), (chat_stream(&["a", "b"], 0, 9, 2), CHAT_STREAM, DONE)] {
        let (_upstream, world) = world_of(script, WhenLogFails::FailClosed, Durability::Process).await;
        let mut response = world.begin("/v1/chat/completions", body).await;
        let mut seen = String::new();
        while !seen.ends_with(end) {
            let chunk = response.frame().await.expect("the end").unwrap().into_data().unwrap();
            seen.push_str(std::str::from_utf8(&chunk).unwrap());
        }
        // Read without waiting: it must already be there.
        assert_eq!(world.journal.attempts().len(), 1, "{seen}");
        assert_eq!(world.one().await.outcome, Outcome::Completed);
    }
}

#[tokio::test]
async fn a_slow_append_is_the_only_thing_that_delays_a_request() {
    let (_upstream, world) = world_of(chat(9, 1), WhenLogFails::FailOpen, Durability::Process).await;
    world.journal.append_delay_ms.store(50, std::sync::atomic::Ordering::Relaxed);
    let start = tokio::time::Instant::now();
    world.send("/v1/chat/completions", CHAT).await;
    let taken = start.elapsed().as_millis();
    // One append before the upstream, one before the end, and no third.
    assert!((100..150).contains(&taken), "{taken} ms");
}
