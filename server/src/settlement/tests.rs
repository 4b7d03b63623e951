//! The driver on facts made by hand, over a real ledger in a temporary folder and a clock that the test moves.

use std::sync::Mutex;

use arc_swap::ArcSwap;
use ledger::allocate::replica::Replica;
use ledger::gpu::GpuSheet;
use ledger::step::ModelShape;
use ledger::{
    AttemptId, CallSpan, CapacityFact, Charge, Context, EngineFact, EngineReading, EngineSetup, Line, Money, Outcome,
    PurchaseOption, RequestId, Route, Source, Timeline, TokenUsage, UnpricedReason, UsageQuality,
};
use store::{Faults, Options};

use super::driver::Until;
use super::*;

/// A minute's start, long ago enough to be no time at which a test runs.
const BASE: i64 = 1_700_000_040_000_000;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_micros(BASE + seconds * 1_000_000)
}

/// A pool of one A100 at 3.60 an hour, which is 0.06 a minute, and one engine, both since second 0.
struct World {
    _folder: tempfile::TempDir,
    store: Store,
    late: Late,
    running: Arc<Mutex<Vec<Running>>>,
    driver: Driver,
    faults: Faults,
}

async fn new_world() -> World {
    let folder = tempfile::tempdir().unwrap();
    let faults = Faults::default();
    let options = Options { faults: faults.clone(), ..Options::default() };
    let price = |_: &ledger::Opened, _: &TokenUsage| Charge::Unpriced { reason: UnpricedReason::SelfHosted };
    let (store, _) = Store::open(folder.path(), options, at(0), &price).await.unwrap();
    let (late, running) = (Late::default(), Arc::new(Mutex::new(Vec::new())));
    let driver = driver(&store, &late, &running);
    World { _folder: folder, store, late, running, driver, faults }
}

fn driver(store: &Store, late: &Late, running: &Arc<Mutex<Vec<Running>>>) -> Driver {
    let rules = Rules {
        policies: BTreeMap::from([("shared".into(), PoolPolicy::default())]),
        lag_us: 15_000_000,
        look_back_us: 7_200_000_000,
        request_us_max: 3_600_000_000,
        ..Rules::default()
    };
    let running = Arc::clone(running);
    let sources = Sources {
        running: Box::new(move || running.lock().unwrap().clone()),
        observe: Box::new(|now| vec![Fact::Capacity(Box::new(gpus(now))), Fact::Engine(Box::new(engine(now)))]),
        recalibrate: Box::new(|_| {}),
    };
    let prices = Arc::new(ArcSwap::from_pointee(PriceBook::base()));
    Driver::new(store.clone(), Arc::new(ArcSwap::from_pointee(rules)), prices, sources, late.clone())
}

fn gpus(until: Timestamp) -> CapacityFact {
    CapacityFact {
        pool: "shared".into(),
        replica: "shared-0".into(),
        deployment: None,
        owner: Some("platform".into()),
        gpu: "A100".into(),
        gpus: 1,
        rate: "3.60".parse().unwrap(),
        purchase: PurchaseOption::OnDemand,
        period: Period { start: at(0), end: until },
        observed_at: until,
    }
}

fn engine(until: Timestamp) -> EngineFact {
    let constants = Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::A100, 1);
    EngineFact {
        engine: "vllm".into(),
        pool: "shared".into(),
        replica: "shared-0".into(),
        model: Some("llama".into()),
        setup: EngineSetup { constants: Some(constants), ..EngineSetup::default() },
        period: Period { start: at(0), end: until },
        observed_at: until,
        ..EngineFact::default()
    }
}

fn route() -> Route {
    Route {
        provider: "self_hosted".into(),
        upstream: "vllm".into(),
        pool: Some("shared".into()),
        request_model: Some("llama".into()),
        streamed: true,
        ..Route::default()
    }
}

/// A request from `start` to `end`, in seconds, of one team.
fn attempt(number: u8, team: &str, start: i64, end: i64) -> Attempt {
    let micros = |seconds: i64| u64::try_from(seconds * 1_000_000).unwrap();
    Attempt {
        id: AttemptId { request: RequestId::new(at(start), [number; 10]), number: 0 },
        source: Source::Gateway,
        context: Context { team: Some(team.into()), ..Context::default() },
        route: route(),
        timeline: Timeline {
            received_at: at(start),
            sent_us: Some(0),
            first_byte_us: Some(200_000),
            first_token_us: Some(200_000),
            last_token_us: Some(micros(end - start)),
            finished_us: micros(end - start),
            ..Timeline::default()
        },
        outcome: Outcome::Completed,
        status: Some(200),
        usage: TokenUsage { input: 500, output: 400, ..TokenUsage::default() },
        usage_quality: UsageQuality::Reported,
        charge: Charge::Unpriced { reason: UnpricedReason::SelfHosted },
    }
}

impl World {
    fn append(&self, fact: Fact) {
        self.store.append(&fact).unwrap();
        self.late.note(&fact);
    }

    fn served(&self, attempt: Attempt) {
        self.append(Fact::Attempt(Box::new(attempt)));
    }

    async fn settle(&mut self, seconds: i64) -> Settled {
        self.driver.settle(Until::Watermark, at(seconds)).await.unwrap()
    }

    async fn statement(&self) -> Statement {
        let mut all = statements(&self.store.session().await.unwrap(), Period::ALL).await.unwrap();
        assert_eq!(all.len(), 1, "{all:?}");
        all.remove(0)
    }

    /// What is booked for each team's requests.
    async fn by_team(&self) -> BTreeMap<String, Money> {
        let query = "SELECT team, sum(effective_cost) AS cost FROM postings WHERE line = 'request' GROUP BY team";
        let mut found = BTreeMap::new();
        for batch in self.store.sql(query).await.unwrap() {
            let (teams, costs) =
                (crate::rows::column(&batch, "team").unwrap(), crate::rows::column(&batch, "cost").unwrap());
            for row in 0..batch.num_rows() {
                let cost = crate::rows::money(costs, row).unwrap().unwrap();
                found.insert(crate::rows::plain(teams, row).unwrap(), cost);
            }
        }
        found
    }
}

fn usd(text: &str) -> Money {
    text.parse().unwrap()
}

#[tokio::test]
async fn a_minute_is_settled_behind_the_watermark_and_once() {
    let mut world = new_world().await;
    world.served(attempt(1, "search", 5, 20));
    assert!(world.driver.is_due(at(20)), "at the start everything is");
    world.settle(20).await;
    assert!(!world.driver.is_due(at(74)), "the minute waits for what comes late");
    assert!(world.driver.is_due(at(75)));
    let settled = world.settle(75).await;
    assert_eq!((settled.minutes, settled.corrected_minutes), (1, 0));

    let statement = world.statement().await;
    // The capacity reaches beyond the settled minute already: only whole minutes are compared here.
    assert_eq!(statement.sum, usd("0.06"));
    assert!(statement.line(Line::Request) > Money::ZERO && statement.line(Line::IdleReserved) > Money::ZERO);
    assert_eq!(statement.line(Line::Unallocated), Money::ZERO);
    assert_eq!((statement.requests, statement.tiers.keys().cloned().collect::<Vec<_>>()), (1, vec!["B".to_owned()]));

    assert!(!world.driver.is_due(at(100)));
    let again = world.settle(100).await;
    assert_eq!(again.postings, 0);
}

#[tokio::test]
async fn late_facts_correct_what_was_settled_and_the_books_stay_closed() {
    let mut world = new_world().await;
    world.served(attempt(1, "search", 5, 20));
    world.settle(75).await;
    let alone = world.by_team().await;
    // Known only now: another request ran at the same time.
    world.served(attempt(2, "support", 5, 20));
    let settled = world.settle(135).await;
    assert_eq!((settled.minutes, settled.corrected_minutes), (2, 1));
    let shared = world.by_team().await;
    assert!(shared["search"] < alone["search"] && shared["support"] > Money::ZERO, "{alone:?} {shared:?}");
    assert_eq!(world.statement().await.sum, usd("0.12"));

    // From the same facts in another order the same amounts follow.
    let mut other = new_world().await;
    other.served(attempt(2, "support", 5, 20));
    other.served(attempt(1, "search", 5, 20));
    other.settle(135).await;
    assert_eq!(other.by_team().await, shared);
}

#[tokio::test]
async fn a_running_request_pays_for_its_progress_and_then_for_what_it_was() {
    let mut world = new_world().await;
    let whole = attempt(1, "search", 30, 90);
    let mut timeline = Timeline { last_token_us: Some(45_000_000), finished_us: 45_000_000, ..whole.timeline };
    timeline.received_at = whole.timeline.received_at;
    let running = Running {
        id: whole.id,
        context: whole.context.clone(),
        route: whole.route.clone(),
        timeline,
        usage: TokenUsage { input: 500, output: 300, ..TokenUsage::default() },
    };
    world.running.lock().unwrap().push(running);
    world.settle(75).await;
    let first = world.by_team().await["search"];
    assert!(first > Money::ZERO, "half of the minute was its own");

    world.running.lock().unwrap().clear();
    world.served(whole);
    world.settle(150).await;
    let statement = world.statement().await;
    assert_eq!(statement.sum, usd("0.12"));
    assert!(world.by_team().await["search"] > first);
    assert_eq!(statement.requests, 1);
}

#[tokio::test]
async fn the_running_minute_is_settled_when_asked_and_completed_later() {
    let mut world = new_world().await;
    world.served(attempt(1, "search", 5, 20));
    world.driver.settle(Until::Now, at(30)).await.unwrap();
    let early = world.statement().await;
    assert!(early.balanced, "{early:?}");
    assert_eq!(early.cost, usd("0.03"));
    world.driver.settle(Until::Now, at(60)).await.unwrap();
    let whole = world.statement().await;
    assert!(whole.balanced, "{whole:?}");
    assert_eq!(whole.cost, usd("0.06"));
    // A server that starts again settles the same minutes from the same facts: nothing is left to book.
    let mut again = driver(&world.store, &Late::default(), &world.running);
    let settled = again.settle(Until::Watermark, at(75)).await.unwrap();
    assert_eq!(settled.minutes, 1);
    assert_eq!(world.statement().await.line(Line::Request), whole.line(Line::Request));
}

#[tokio::test]
async fn what_a_crash_left_open_is_settled_at_the_start() {
    let world = new_world().await;
    world.append(Fact::Capacity(Box::new(gpus(at(170)))));
    world.append(Fact::Engine(Box::new(engine(at(170)))));
    world.served(attempt(1, "search", 5, 70));
    world.store.flush(at(170)).await.unwrap();
    // Longer ago than the start looks back.
    let mut fresh = driver(&world.store, &Late::default(), &world.running);
    fresh.sources_observe_nothing();
    let settled = fresh.settle(Until::Watermark, at(86_400)).await.unwrap();
    assert_eq!(settled.minutes, 3);
    let statement = world.statement().await;
    assert!(statement.balanced, "{statement:?}");
    assert_eq!((statement.cost, statement.requests), (usd("0.17"), 1));
}

#[tokio::test]
async fn a_pool_whose_rules_are_gone_stays_as_it_is_booked() {
    let mut world = new_world().await;
    world.served(attempt(1, "search", 5, 20));
    world.settle(75).await;
    let before = world.statement().await;
    world.served(attempt(2, "support", 5, 20));
    // The next run's configuration does not name the pool.
    let mut next = driver(&world.store, &Late::default(), &world.running);
    next.sources_observe_nothing();
    next.set_rules(Rules { policies: BTreeMap::new(), request_us_max: 3_600_000_000, ..Rules::default() });
    assert_eq!(next.settle(Until::Watermark, at(300)).await.unwrap().postings, 0);
    assert_eq!(world.statement().await, before);
    // One that names it again settles what came in between.
    let mut again = driver(&world.store, &Late::default(), &world.running);
    assert_eq!(again.settle(Until::Watermark, at(300)).await.unwrap().corrected_minutes, 1);
    assert!(world.by_team().await["support"] > Money::ZERO);
}

#[tokio::test]
async fn a_full_disk_delays_a_settlement_and_loses_nothing() {
    let mut world = new_world().await;
    world.served(attempt(1, "search", 5, 20));
    world.settle(20).await;
    world.faults.fill_log_after(0);
    assert!(world.driver.settle(Until::Watermark, at(75)).await.is_err());
    assert!(world.driver.is_due(at(80)));
    world.faults.free_log();
    world.settle(80).await;
    assert_eq!(world.statement().await.sum, usd("0.06"));
    assert_eq!(world.settle(140).await.minutes, 1);
}

#[tokio::test]
async fn a_call_that_nobody_metered_is_taken_from_its_span_once() {
    let mut world = new_world().await;
    let metered = attempt(1, "search", 5, 20);
    let span = |id: &str, start: i64, end: i64| CallSpan {
        trace_id: Some(format!("{:0>32}", id).into()),
        span_id: Some(format!("{:0>16}", id).into()),
        service: Some("vllm".into()),
        engine: Some("vllm".into()),
        response_id: Some(id.into()),
        request_model: Some("llama".into()),
        period: Period { start: at(start), end: at(end) },
        usage: TokenUsage { input: 100, output: 200, ..TokenUsage::default() },
        usage_quality: UsageQuality::Reported,
        first_token_us: Some(100_000),
        queue_us: Some(0),
        context: Context { team: Some("bypass".into()), ..Context::default() },
        observed_at: at(end),
        ..CallSpan::default()
    };
    let known = Route { response_id: Some("aaa".into()), ..metered.route.clone() };
    world.served(Attempt { route: known, ..metered });
    world.append(Fact::Span(Box::new(span("aaa", 5, 20))));
    world.append(Fact::Span(Box::new(span("bbb", 10, 40))));
    let settled = world.settle(75).await;
    assert_eq!(settled.calls, 1, "one of them went through the gateway");
    assert_eq!(world.settle(140).await.calls, 0, "and the other was taken already");
    let teams = world.by_team().await;
    assert!(teams["bypass"] > Money::ZERO && teams["search"] > Money::ZERO, "{teams:?}");
    assert_eq!(world.statement().await.sum, usd("0.12"));
}

#[tokio::test]
async fn tokens_that_nobody_metered_are_unobserved() {
    let mut world = new_world().await;
    let reading = |seconds: i64, prompt: u64, generated: u64, running: u32| {
        Fact::Reading(Box::new(EngineReading {
            engine: "vllm".into(),
            pool: "shared".into(),
            at: at(seconds),
            running: Some(running),
            waiting: Some(0),
            prompt_tokens: Some(prompt),
            generation_tokens: Some(generated),
            ..EngineReading::default()
        }))
    };
    world.append(reading(1, 0, 0, 0));
    world.served(attempt(1, "search", 5, 20));
    // The request's 500 and 400, and as many again that came another way.
    world.append(reading(30, 1_000, 800, 0));
    world.append(reading(70, 1_000, 800, 0));
    world.settle(75).await;
    let statement = world.statement().await;
    assert!(statement.line(Line::Unobserved) > Money::ZERO, "{statement:?}");
    assert_eq!(statement.sum, usd("0.06"));
}
