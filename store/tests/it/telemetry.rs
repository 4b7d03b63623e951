//! What is known of engines, GPUs and jobs goes in and comes out as it was, once.

use ledger::allocate::fit::FitError;
use ledger::allocate::replica::Replica;
use ledger::gpu::GpuSheet;
use ledger::step::ModelShape;
use ledger::{
    Adapter, Basis, CallSpan, Context, Costs, EngineFact, EngineReading, EngineSetup, EngineStep, Fact, GpuReading,
    JobFact, JobSource, Line, Money, Operation, Origin, Period, Posting, PostingId, ScalingDecision, ScalingInputs,
    ScalingMode, Terms, Tier, TokenUsage, UsageQuality,
};
use store::{Begun, ImportId, StoreError};

use crate::sample::*;

/// One of each kind. Even ones say all that can be said, odd ones as little as possible.
pub fn facts(number: u32) -> Vec<Fact> {
    let full = number.is_multiple_of(2);
    let start = at(i64::from(number) * 60_000_000 + 123_457);
    let period = Period { start, end: start.plus_micros(59_999_999) };
    let context = Context {
        team: Some("search".into()),
        trace_id: Some("0af7651916cd43dd8448eb211c80319c".into()),
        tags: [("ä".into(), "\"".into())].into(),
        ..Context::default()
    };
    let mut facts = vec![
        Fact::Engine(Box::new(EngineFact {
            engine: format!("vllm-{number}").into(),
            pool: "shared".into(),
            replica: "shared-0".into(),
            model: full.then(|| "llama".into()),
            setup: if full { setup() } else { EngineSetup::default() },
            adapters: if full { vec![Adapter { model: "a".into(), bytes: 5, flop_per_token: 7 }] } else { Vec::new() },
            ready_at: full.then_some(start),
            // Warm for nobody known is not the same as not warm.
            warm_for: [Some(context.clone()), None, Some(Context::default()), None]
                [usize::try_from(number % 4).unwrap()]
            .clone(),
            period,
            observed_at: period.end,
        })),
        Fact::Step(Box::new(EngineStep {
            engine: "vllm".into(),
            rank: number,
            sequence: u64::MAX / 4,
            at: start,
            wall_us: 11,
            prefill_requests: 1,
            prefill_tokens: 2,
            prefill_kv_tokens: 3,
            decode_requests: 4,
            decode_kv_tokens: 5,
        })),
        Fact::Job(Box::new(JobFact {
            job: "train".into(),
            pool: "shared".into(),
            replica: "shared-0".into(),
            context: if full { context.clone() } else { Context::default() },
            share: 250_000,
            period,
            source: JobSource::ALL[usize::try_from(number % 3).unwrap()],
            observed_at: period.end,
        })),
    ];
    let reading = EngineReading { engine: "vllm".into(), pool: "shared".into(), at: start, ..EngineReading::default() };
    let span = CallSpan { period, observed_at: start, ..CallSpan::default() };
    let gpu = GpuReading { uuid: "GPU-1".into(), at: start, ..GpuReading::default() };
    facts.extend(match full {
        false => [Fact::Reading(Box::new(reading)), Fact::Span(Box::new(span)), Fact::Gpu(Box::new(gpu))],
        true => [
            Fact::Reading(Box::new(EngineReading {
                running: Some(3),
                waiting: Some(0),
                kv_used: Some(999_999),
                asleep: Some(false),
                prompt_tokens: Some(10),
                cached_tokens: Some(4),
                generation_tokens: Some(6),
                steps: Some(9),
                preemptions: Some(1),
                finished: Some(2),
                drafted_tokens: Some(8),
                accepted_tokens: Some(7),
                busy_us: Some(100),
                kv_tokens: Some(40_000),
                ..reading
            })),
            Fact::Span(Box::new(CallSpan {
                trace_id: Some("0af7651916cd43dd8448eb211c80319c".into()),
                span_id: Some("00f067aa0ba902b7".into()),
                parent_span_id: Some("b7ad6b7169203331".into()),
                service: Some("agent".into()),
                engine: Some("vllm".into()),
                operation: Operation::Messages,
                provider: Some("self_hosted".into()),
                request_model: Some("llama".into()),
                response_model: Some("llama-3".into()),
                response_id: Some(format!("cmpl-{number}").into()),
                usage: TokenUsage { input: 5, cache_read: 6, output: 7, reasoning: 8, ..TokenUsage::default() },
                usage_quality: UsageQuality::Reported,
                queue_us: Some(1),
                first_token_us: Some(2),
                prefill_us: Some(3),
                decode_us: Some(4),
                failed: true,
                context: context.clone(),
                ..span
            })),
            Fact::Gpu(Box::new(GpuReading {
                host: Some("node".into()),
                gpu: Some("NVIDIA H100".into()),
                slice: Some("1".into()),
                pool: Some("shared".into()),
                namespace: Some("ml".into()),
                pod: Some("vllm-0".into()),
                container: Some("engine".into()),
                engine_active: Some(1_000_000),
                tensor_active: Some(1),
                memory_active: Some(0),
                utilisation: Some(500_000),
                memory_used_bytes: Some(1 << 33),
                memory_total_bytes: Some(1 << 36),
                power_mw: Some(700_000),
                energy_mj: Some(1),
                ..gpu
            })),
        ],
    });
    facts.push(Fact::Decision(Box::new(decision(number, full, start))));
    facts.extend((0..2).map(|part| posting(number, part, period)));
    facts
}

fn decision(number: u32, full: bool, at: ledger::Timestamp) -> ScalingDecision {
    let least = ScalingDecision {
        pool: "shared".into(),
        deployment: "chat".into(),
        at,
        mode: ScalingMode::ALL[usize::try_from(number % 3).unwrap()],
        policy: "hpa".into(),
        ..ScalingDecision::default()
    };
    if !full {
        return least;
    }
    ScalingDecision {
        ready: 3,
        pending: 1,
        wanted: 5,
        desired: 4,
        told: Some(4),
        static_replicas: 8,
        committed: 2,
        gpus: 2,
        rate: "2.50".parse().unwrap(),
        reasons: vec!["load 3.2 of \"4\"".into(), "ä".into()],
        guards: vec!["rate-cap".into(), "floor".into()],
        inputs: ScalingInputs {
            running: Some(12),
            waiting: Some(0),
            kv_used: Some(512_000),
            load_milli: Some(3_200),
            forecast_milli: Some(3_900),
            arrivals_milli: Some(7_500),
            input_tokens_per_s: Some(9_000),
            output_tokens_per_s: Some(1_500),
            ttft_us: Some(450_000),
            tpot_us: Some(31_000),
            stale_us: Some(2_000_000),
        },
        failure: Some("the webhook answered 503".into()),
        ..least
    }
}

fn setup() -> EngineSetup {
    let model = ModelShape::LLAMA_3_1_8B.into();
    let mut constants = Replica::unfitted(model, GpuSheet::H100, 2);
    constants.efficiencies.compute = 0.603_691_234;
    constants.efficiencies.bandwidth = 0.913_044_567;
    EngineSetup {
        constants: Some(constants),
        error: Some(FitError { median: 0.031_377, p95: 0.198_67, bias: -0.000_765 }),
        ..EngineSetup::default()
    }
}

/// An amount and, in part 1, the correction that takes some of it back.
fn posting(number: u32, part: u8, period: Period) -> Fact {
    let sign = if part == 0 { 1 } else { -1 };
    let term = |pico: i128| Money::from_pico(sign * pico);
    let amount = term(10);
    let mut random = [part; 10];
    random[..4].copy_from_slice(&number.to_be_bytes());
    Fact::Posting(Box::new(Posting {
        id: PostingId::new(period.start, random),
        origin: Origin::Pool { pool: "none".into(), start: period.start },
        line: Line::ALL[usize::try_from(number).unwrap() % Line::ALL.len()],
        period,
        attempt: Some(id(number)),
        context: Context::default(),
        provider: "self_hosted".into(),
        model: None,
        pool: Some("none".into()),
        costs: Costs { list_cost: amount, contracted_cost: amount, effective_cost: amount, billed_cost: Money::ZERO },
        estimated: true,
        tier: Some(Tier::B),
        basis: (number != 3).then_some(Basis {
            gpu_us: if part == 0 { 17 } else { -17 },
            terms: (number != 1).then_some(Terms {
                overhead: term(1),
                weights: term(2),
                kv: term(3),
                compute: term(4),
            }),
            quality: number.is_multiple_of(2).then_some(970_000),
        }),
        policy: "roofline".into(),
        booked_at: period.end,
    }))
}

#[tokio::test]
async fn every_fact_comes_out_as_it_went_in_from_log_tables_and_import() {
    let facts: Vec<Fact> = (0..4).flat_map(facts).collect();
    let expected = expected_books(&facts);
    assert_eq!(expected.len(), 36);
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    store.append_all(&facts).unwrap();
    assert_eq!(books(&store).await, expected, "from the log");
    let flushed = store.flush(at(1)).await.unwrap();
    assert_eq!((flushed.telemetry, flushed.postings), (28, 8));
    assert_eq!(books(&store).await, expected, "from the tables");
    store.compact(at(2)).await.unwrap();
    drop(store);
    let (store, _) = open(dir.path()).await;
    assert_eq!(books(&store).await, expected, "after a restart");
    let read_only = store::Store::open_read_only(dir.path(), store::Options::default()).await.unwrap();
    assert_eq!(books(&read_only).await, expected, "beside the writer");
    assert_clean(&store).await;

    let other = tempfile::tempdir().unwrap();
    let (store, _) = open(other.path()).await;
    let Begun::Import(mut import) = store.begin_import(ImportId::of(b"x"), "telemetry:x", at(1)).await.unwrap() else {
        panic!("it was never imported")
    };
    import.push(facts.clone()).await.unwrap();
    import.push(facts).await.unwrap();
    let summary = import.commit(at(2)).await.unwrap();
    assert_eq!((summary.telemetry, summary.postings, summary.skipped), (28, 8, 36));
    assert_eq!(books(&store).await, expected, "from an import");
    assert_clean(&store).await;
}

#[tokio::test]
async fn the_same_fact_is_there_once_however_late_it_comes_again() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    // Many moments that lie far apart, and all of them again in another order, across flushes and restarts.
    let mut facts: Vec<Fact> = (0..60).flat_map(|number| facts(number * 61)).collect();
    let expected = expected_books(&facts);
    for half in facts.chunks(facts.len() / 2 + 1) {
        store.append_all(half).unwrap();
        store.flush(at(1)).await.unwrap();
    }
    facts.reverse();
    store.append_all(&facts[..40]).unwrap();
    assert_eq!(books(&store).await, expected);
    let again = store.flush(at(2)).await.unwrap();
    assert_eq!((again.telemetry, again.postings), (0, 0));
    drop(store);
    let (store, _) = open(dir.path()).await;
    store.append_all(&facts).unwrap();
    let again = store.flush(at(3)).await.unwrap();
    assert_eq!((again.telemetry, again.postings), (0, 0));
    assert_eq!(books(&store).await, expected);
    assert_clean(&store).await;
}

#[tokio::test]
async fn facts_that_grow_are_all_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    let Some(Fact::Job(first)) = facts(0).into_iter().nth(2) else { panic!("the third is a job") };
    for minute in 0..3 {
        let mut grown = first.clone();
        grown.period.end = grown.period.end.plus_micros(minute * 60_000_000);
        store.append(&Fact::Job(grown)).unwrap();
        store.flush(at(1)).await.unwrap();
    }
    assert_eq!(count(&store, "SELECT count(*) FROM jobs").await, 3);
    assert_eq!(count(&store, "SELECT count(DISTINCT period_start) FROM jobs WHERE team = 'search'").await, 1);
}

#[tokio::test]
async fn terms_that_do_not_add_up_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    let Some(Fact::Posting(mut wrong)) = facts(0).into_iter().next_back() else { panic!("the last is a posting") };
    wrong.basis.as_mut().unwrap().terms.as_mut().unwrap().kv += Money::from_pico(1);
    store.append(&Fact::Posting(wrong)).unwrap();
    let found = store.verify(&|_| {}).await.unwrap();
    assert!(!found.balanced && found.mispriced == 1, "{found:#?}");
    assert!(found.examples.iter().any(|example| example.detail.contains("its terms add up to")), "{found:#?}");
}

#[tokio::test]
async fn a_ledger_of_an_earlier_format_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    store.append_all(&facts(0)).unwrap();
    drop(store);
    let mut header = store::log::frame::header(store::Position(1));
    header[8..12].copy_from_slice(&1u32.to_le_bytes());
    let checksum = crc32fast::hash(&header[..20]);
    header[20..].copy_from_slice(&checksum.to_le_bytes());
    let segment = dir.path().join("log").join(format!("{:020}.log", 1));
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[..24].copy_from_slice(&header);
    std::fs::write(&segment, &bytes).unwrap();
    let opened = store::Store::open(dir.path(), store::Options::default(), at(0), &price).await;
    let Err(error @ StoreError::Format { .. }) = opened else { panic!("{opened:?}") };
    let text = error.to_string();
    assert!(text.contains("format 1") && text.contains("begin a new one in another folder"), "{text}");
    let read = store::Store::open_read_only(dir.path(), store::Options::default()).await;
    assert!(matches!(read, Err(StoreError::Format { .. })));
    assert_eq!(std::fs::read(&segment).unwrap(), bytes);
}

#[tokio::test]
async fn decisions_are_a_table_that_sql_reads() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    let decisions =
        (0..6).map(|number| Fact::Decision(Box::new(decision(number, number != 5, at(60 * i64::from(number))))));
    store.append_all(&decisions.collect::<Vec<_>>()).unwrap();
    for place in ["the log", "the table"] {
        assert_eq!(count(&store, "SELECT count(*) FROM decisions WHERE mode = 'act'").await, 2, "{place}");
        assert_eq!(count(&store, "SELECT sum(told) FROM decisions WHERE deployment = 'chat'").await, 20, "{place}");
        assert_eq!(count(&store, "SELECT count(*) FROM decisions WHERE guards LIKE '%rate-cap%'").await, 5, "{place}");
        // What was not known is no zero.
        assert_eq!(count(&store, "SELECT count(*) FROM decisions WHERE waiting = 0").await, 5, "{place}");
        store.flush(at(1_000)).await.unwrap();
    }
}
