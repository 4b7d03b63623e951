use fleet::engine::{EngineSpec, FinishReason, SharedGpus, start};
use ledger::step::{GpuSheet, ModelShape};
use ledger::{Clock, Timestamp};

use super::*;
use crate::demo::workload::plan;

/// Time as the runtime sees it, which is enough for an engine.
struct RuntimeClock(tokio::time::Instant);

impl Clock for RuntimeClock {
    fn now(&self) -> Timestamp {
        Timestamp::from_micros(i64::try_from(self.monotonic_us()).unwrap())
    }

    fn monotonic_us(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_micros()).unwrap()
    }
}

const MODELS: [&str; 6] = ["claude-sonnet-4-5", "gpt-4o", "gpt-4o-mini", "model-a", "model-b", "model-c"];

/// All traffic straight to one engine that serves every model: what clients saw is what the engine counted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_and_engine_agree_on_every_token() {
    let clock = Arc::new(RuntimeClock(tokio::time::Instant::now()));
    let spec = EngineSpec {
        models: MODELS.map(str::to_owned).to_vec(),
        failure_share: 0.05,
        answer_tokens_mean: 30.0,
        speed: 4.0,
        ..EngineSpec::new("all", ModelShape::LLAMA_3_1_8B, GpuSheet::H100, 1)
    };
    let engine = start(spec, SharedGpus::default(), clock).await.unwrap();
    let keys: BTreeMap<&'static str, String> =
        CONSUMERS.iter().map(|consumer| (consumer.name, format!("fk-{}", consumer.name))).collect();
    let mut tasks = plan(5, 3.0, 8.0);
    for call in tasks.iter_mut().flat_map(|task| &mut task.calls) {
        call.asks_usage = call.stream;
    }
    let options = Options { start_within_s: 3.0, drain_s: 30.0, retries: 3 };
    let reports = Arc::new(AtomicU64::new(0));
    let counted = reports.clone();
    let on_progress: OnProgress = Arc::new(move |_| {
        counted.fetch_add(1, Ordering::Relaxed);
    });
    let count = tasks.len() as u64;
    let seen = run(&engine.base_url(), &keys, tasks, options, on_progress).await.unwrap();

    while engine.load() > 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let progress = seen.progress;
    assert_eq!((progress.tasks_started, progress.tasks_done), (count, count));
    assert_eq!(seen.calls.len() as u64, progress.calls_sent);
    assert_eq!(reports.load(Ordering::Relaxed), progress.calls_sent);
    assert!(progress.calls_aborted > 0 && progress.calls_retried > 0, "{progress:?}");
    assert!(seen.calls.iter().all(|call| call.end != SeenEnd::Broken));
    assert!(seen.calls.iter().any(|call| matches!(call.end, SeenEnd::Refused(503 | 529))));
    let with_usage = seen.calls.iter().filter(|call| call.usage.is_some()).count() as u64;
    assert_eq!(with_usage, progress.calls_finished, "every finished call asked for its usage");

    // A client that hangs up while the last tokens are on their way leaves a request that the engine finished.
    let counters = engine.counters();
    let finished = counters.finished(FinishReason::Stop) + counters.finished(FinishReason::Length);
    assert_eq!(finished + counters.finished(FinishReason::Abort), progress.calls_finished + progress.calls_aborted);
    assert!(finished >= progress.calls_finished);
    assert!(counters.generation_tokens >= progress.output_tokens && counters.prompt_tokens >= progress.input_tokens);
    if finished == progress.calls_finished {
        let aborted: Vec<_> =
            engine.finished().into_iter().filter(|ended| ended.reason == FinishReason::Abort).collect();
        let tokens =
            |of: fn(&fleet::engine::Finished) -> u32| aborted.iter().map(|one| u64::from(of(one))).sum::<u64>();
        assert_eq!(counters.prompt_tokens, progress.input_tokens + tokens(|one| one.prompt_tokens));
        assert_eq!(counters.generation_tokens, progress.output_tokens + tokens(|one| one.output_tokens));
    }
    assert!(counters.prefix_cache_hits > 0);
}

#[tokio::test]
async fn nobody_there_is_seen_as_broken_and_ends() {
    let keys = CONSUMERS.iter().map(|consumer| (consumer.name, String::from("fk-x"))).collect();
    let tasks = plan(1, 0.001, 1.0);
    let options = Options { start_within_s: 1.0, drain_s: 5.0, retries: 1 };
    // Port 9 of the loopback is not served.
    let seen = run("http://127.0.0.1:9", &keys, tasks, options, Arc::new(|_| {})).await.unwrap();
    assert_eq!(seen.calls.len(), 2, "one call and its retry");
    assert!(seen.calls.iter().all(|call| call.end == SeenEnd::Broken && call.request_id.is_none()));
}

#[tokio::test]
async fn calls_still_open_at_the_end_are_aborts() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base_url = format!("http://{}", listener.local_addr().unwrap());
    let keys = CONSUMERS.iter().map(|consumer| (consumer.name, String::from("fk-x"))).collect();
    let options = Options { start_within_s: 0.2, drain_s: 0.1, retries: 1 };
    // Connections are taken by the system and never answered.
    let seen = run(&base_url, &keys, plan(1, 0.001, 1.0), options, Arc::new(|_| {})).await.unwrap();
    assert_eq!(seen.calls.iter().map(|call| call.end).collect::<Vec<_>>(), [SeenEnd::Aborted]);
    assert_eq!(seen.progress.calls_aborted, 1);
}
