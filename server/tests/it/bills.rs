//! A pool's cost as people see it: hand-made facts in a ledger, exact amounts and words out.

use ledger::allocate::fit::FitError;
use ledger::allocate::replica::Replica;
use ledger::gpu::GpuSheet;
use ledger::step::ModelShape;
use ledger::{
    Attempt, AttemptId, Basis, CapacityFact, Charge, Context, Costs, EngineFact, EngineReading, EngineSetup, Fact,
    Line, Money, Operation, Origin, Outcome, Period, Posting, PostingId, PurchaseOption, RequestId, Route, Source,
    Terms, Tier, Timeline, Timestamp, TokenUsage, UnpricedReason, UsageQuality,
};
use serde_json::{Value, json};
use store::{Options, Store};

use crate::support::{Books, Served};

const MINUTE_US: i64 = 60_000_000;

/// Microseconds after ten o'clock.
fn at(micros: i64) -> Timestamp {
    let ten: Timestamp = "2026-11-02T10:00:00Z".parse().unwrap();
    ten.plus_micros(micros)
}

fn minute(number: i64) -> Period {
    Period { start: at(number * MINUTE_US), end: at((number + 1) * MINUTE_US) }
}

fn id(number: u8) -> AttemptId {
    AttemptId { request: RequestId::new(at(0), [number; 10]), number: 0 }
}

fn context(team: &str) -> Context {
    Context { team: Some(team.into()), ..Context::default() }
}

/// A request that was sent at second `from` and got its last token at second `until`.
fn attempt(number: u8, pool: &str, team: &str, (from, until): (i64, i64), usage: TokenUsage) -> Fact {
    let length = u64::try_from((until - from) * 1_000_000).unwrap();
    Fact::Attempt(Box::new(Attempt {
        id: id(number),
        source: Source::Gateway,
        context: context(team),
        route: Route {
            operation: Operation::Chat,
            provider: "self_hosted".into(),
            upstream: "vllm-0".into(),
            pool: Some(pool.into()),
            request_model: Some("llama".into()),
            ..Route::default()
        },
        timeline: Timeline {
            received_at: at(from * 1_000_000),
            sent_us: Some(0),
            first_token_us: Some(length / 10),
            last_token_us: Some(length),
            finished_us: length,
            ..Timeline::default()
        },
        outcome: Outcome::Completed,
        status: Some(200),
        usage,
        usage_quality: UsageQuality::Reported,
        charge: Charge::Unpriced { reason: UnpricedReason::SelfHosted },
    }))
}

/// An amount in millidollars, one of which pays for a GPU-second here. `terms` are overhead, weights, cache and compute.
struct Booked {
    number: u8,
    pool: &'static str,
    minute: i64,
    line: Line,
    whose: Option<(u8, &'static str)>,
    amount: i64,
    terms: Option<[i64; 4]>,
    quality: Option<u32>,
    timed: bool,
}

impl Booked {
    const BASE: Booked = Booked {
        number: 0,
        pool: "shared",
        minute: 0,
        line: Line::Request,
        whose: None,
        amount: 0,
        terms: None,
        quality: None,
        timed: true,
    };

    fn fact(self) -> Fact {
        let milli = |amount: i64| Money::from_pico(i128::from(amount) * 1_000_000_000);
        let (amount, period) = (milli(self.amount), minute(self.minute));
        let basis = Basis {
            gpu_us: self.amount * 1_000_000,
            terms: self.terms.map(|[overhead, weights, kv, compute]| Terms {
                overhead: milli(overhead),
                weights: milli(weights),
                kv: milli(kv),
                compute: milli(compute),
            }),
            quality: self.quality,
        };
        Fact::Posting(Box::new(Posting {
            id: PostingId::new(period.start, [self.number; 10]),
            origin: Origin::Pool { pool: self.pool.into(), start: period.start },
            line: self.line,
            period,
            attempt: self.whose.map(|(number, _)| id(number)),
            context: self.whose.map_or_else(Context::default, |(_, team)| context(team)),
            provider: "self_hosted".into(),
            model: self.whose.map(|_| "llama".into()),
            pool: Some(self.pool.into()),
            costs: Costs {
                list_cost: amount,
                contracted_cost: amount,
                effective_cost: amount,
                billed_cost: Money::ZERO,
            },
            estimated: false,
            tier: self.whose.map(|_| Tier::B),
            basis: self.timed.then_some(basis),
            policy: "roofline/1 headroom=line".into(),
            booked_at: at(MINUTE_US * 3 + i64::from(self.number)),
        }))
    }
}

fn capacity(pool: &str, gpus: u32, gpu: &str, minutes: i64) -> Fact {
    Fact::Capacity(Box::new(CapacityFact {
        pool: pool.into(),
        replica: format!("{pool}-0").into(),
        deployment: None,
        owner: Some("platform".into()),
        gpu: gpu.into(),
        gpus,
        rate: "3.60".parse().unwrap(),
        purchase: PurchaseOption::OnDemand,
        period: Period { start: at(0), end: at(minutes * MINUTE_US) },
        observed_at: at(minutes * MINUTE_US),
    }))
}

fn engine() -> Fact {
    let mut constants = Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 2);
    constants.efficiencies.compute = 0.6;
    constants.efficiencies.bandwidth = 0.9;
    constants.efficiencies.overhead_s = 0.000_12;
    Fact::Engine(Box::new(EngineFact {
        engine: "vllm-0".into(),
        pool: "shared".into(),
        replica: "shared-0".into(),
        model: Some("llama".into()),
        setup: EngineSetup {
            constants: Some(constants),
            error: Some(FitError { median: 0.031, p95: 0.199, bias: -0.008 }),
            ..EngineSetup::default()
        },
        period: Period { start: at(0), end: at(2 * MINUTE_US) },
        observed_at: at(2 * MINUTE_US),
        ..EngineFact::default()
    }))
}

fn reading(second: i64, running: u32) -> Fact {
    Fact::Reading(Box::new(EngineReading {
        engine: "vllm-0".into(),
        pool: "shared".into(),
        at: at(second * 1_000_000),
        running: Some(running),
        ..EngineReading::default()
    }))
}

/// Two minutes of a pool of two GPUs at 3.60 USD an hour, 0.12 USD a minute; one minute of a pool of which nothing is known.
fn facts() -> Vec<Fact> {
    let (search, support) = (Some((1, "search")), Some((2, "support")));
    let postings = [
        Booked {
            number: 1,
            whose: search,
            amount: 30,
            terms: Some([3, 12, 6, 9]),
            quality: Some(970_000),
            ..Booked::BASE
        },
        Booked { number: 2, whose: support, amount: 10, terms: Some([1, 4, 2, 3]), ..Booked::BASE },
        Booked { number: 3, line: Line::IdleReserved, amount: 60, ..Booked::BASE },
        Booked { number: 4, line: Line::Headroom, amount: 10, ..Booked::BASE },
        Booked { number: 5, line: Line::Waste, amount: 10, ..Booked::BASE },
        // What came late moved a part of it from one request to the other.
        Booked {
            number: 6,
            whose: search,
            amount: -1,
            terms: Some([0, -1, 0, 0]),
            quality: Some(960_000),
            ..Booked::BASE
        },
        Booked { number: 7, whose: support, amount: 1, terms: Some([0, 1, 0, 0]), ..Booked::BASE },
        Booked {
            number: 8,
            minute: 1,
            whose: search,
            amount: 5,
            terms: Some([0, 2, 1, 2]),
            quality: Some(900_000),
            ..Booked::BASE
        },
        Booked { number: 9, minute: 1, line: Line::IdleReserved, amount: 115, ..Booked::BASE },
        Booked { number: 10, pool: "blind", line: Line::Unallocated, amount: 60, timed: false, ..Booked::BASE },
    ];
    let long = TokenUsage { input: 1_000, cache_read: 1_000, output: 300, ..TokenUsage::default() };
    let short = TokenUsage { input: 100, output: 200, ..TokenUsage::default() };
    let mut facts = vec![
        capacity("shared", 2, "H100", 2),
        capacity("blind", 1, "L4", 1),
        engine(),
        reading(45, 2),
        reading(55, 3),
        // Outside of the long request's time.
        reading(100, 9),
        attempt(1, "shared", "search", (40, 70), long),
        attempt(2, "shared", "support", (50, 60), short),
        attempt(3, "blind", "search", (10, 20), TokenUsage { cache_read: 7, ..TokenUsage::default() }),
    ];
    facts.extend(postings.map(Booked::fact));
    facts
}

fn books() -> Books {
    let books = Books::new();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let price = |_: &ledger::Opened, _: &TokenUsage| Charge::Unpriced { reason: UnpricedReason::SelfHosted };
        let (store, _) = Store::open(&books.data(), Options::default(), at(0), &price).await.unwrap();
        store.append_all(&facts()).unwrap();
        store.flush(at(1)).await.unwrap();
    });
    books
}

#[test]
fn a_request_on_a_pool_has_a_bill_that_a_person_can_check() {
    let books = books();
    let verified = books.run(&["verify"]);
    assert_eq!(verified.code, 0, "{verified:?}");

    let long = id(1).request.to_string();
    let text = books.run(&["explain", &long]).out;
    for line in [
        "on our own GPUs: its cost comes by allocation, below",
        "attempt 0 on pool shared, engine vllm-0",
        "  paid            0.034 USD for 34.000 GPU-seconds",
        "    weights       0.013 USD  38.2 %",
        "    KV cache      0.007 USD  20.6 %",
        "    compute       0.011 USD  32.4 %",
        "    overhead      0.003 USD  8.8 %",
        // Thirty seconds of its own and ten beside another.
        "  shared with     1.3 requests at once on average, itself included (1 other while it ran); the engine counted 2.5 in 2 readings",
        // 70 x 29/40 in the first minute, 115 x 5/5 in the second.
        "  idle share      0.1658 USD, not charged",
        // Computing 2,000 tokens less computing 1,000 and reading 1,000 is 13,731 µs of two GPUs at 3.60 USD an hour.
        "  cache savings   0.00002746 USD, not booked: 1,000 cached tokens read instead of computed",
        "  known by        tier B, the times of requests; quality 90.0 % against the engine's own series",
        "  policy          roofline/1 headroom=line",
        "  constants       2 x H100: eta_c 0.600, eta_b 0.900, overhead 120 µs, overlap 1.00; fitted, off by 3.1 % at the median, 19.9 % at the 95th percentile, -0.8 % on average",
        "  rows            2 minutes, 1 correction; each adds up to what its GPUs cost",
        "2026-11-02T10:01:00Z",
        "sum of postings   0.034 USD",
        "every charge is posted exactly",
    ] {
        assert!(text.contains(line), "`{line}` is not in\n{text}");
    }
    assert!(!text.contains("unknown"), "{text}");

    // The queries that it names show the same amounts.
    let mut queries = text.lines().filter_map(|line| line.trim().strip_prefix("farthing sql \"")?.strip_suffix('"'));
    let own = books.json(&["sql", queries.next().unwrap()]);
    let own: Vec<&str> = own.as_array().unwrap().iter().map(|row| row["effective_cost"].as_str().unwrap()).collect();
    assert_eq!(own, ["0.03", "-0.001", "0.005"]);
    let whole = books.json(&["sql", queries.next().unwrap()]);
    assert_eq!(whole.as_array().unwrap().len(), 4, "{whole}");

    let document = books.json(&["explain", &long]);
    let bill = &document["pools"][0];
    let expected = json!({
        "cost": "0.034", "gpu_seconds": "34.0", "idle_share": "0.16575", "quality": "0.9", "tier": "B",
        "closed": true, "corrections": 1, "settled": true, "others": 1, "mean_batch_by_engine": 2.5,
        "terms": { "overhead": "0.003", "weights": "0.013", "kv": "0.007", "compute": "0.011" },
        "cache": { "cached_tokens": 1_000, "spared": "0.000027462" },
    });
    for (key, value) in expected.as_object().unwrap() {
        assert_eq!(&bill[key], value, "{key} in {bill:#}");
    }
    let minutes = &bill["minutes"];
    assert_eq!(
        (&minutes[0]["pool_cost"], &minutes[0]["used"], &minutes[0]["idle"]),
        (&json!("0.12"), &json!("0.04"), &json!("0.07"))
    );
    assert_eq!(minutes[0]["postings"].as_array().unwrap().len(), 2);
    assert_eq!(document["effective_cost"], "0.034");
    assert_eq!(document["unpriced_attempts"], 0);
}

#[test]
fn what_is_not_settled_or_not_known_is_unknown_and_not_zero() {
    let books = books();
    let text = books.run(&["explain", &id(3).request.to_string()]).out;
    for line in [
        "attempt 0 on pool blind, engine unknown",
        "not settled yet: what it costs is unknown, which is not zero",
        "unknown for 7 cached tokens: the engine's constants are unknown",
        "constants       unknown: no engine is known to have served it",
        "1 attempt without an amount",
    ] {
        assert!(text.contains(line), "`{line}` is not in\n{text}");
    }
    let bill = &books.json(&["explain", &id(3).request.to_string()])["pools"][0];
    for key in ["cost", "gpu_seconds", "terms", "idle_share", "tier", "quality", "engine"] {
        assert_eq!(bill[key], Value::Null, "{key} in {bill:#}");
    }
    assert_eq!(bill["cache"]["spared"], Value::Null);
}

#[test]
fn a_report_shows_what_pools_did_and_three_prices_of_a_token() {
    let books = books();
    let report = books.json(&["report", "--by", "team"]);
    let row = |team: Value, line: &str| {
        let rows = report["rows"].as_array().unwrap();
        rows.iter().find(|row| row["key"][0] == team && row["line"] == line).unwrap_or_else(|| panic!("{report:#}"))
    };
    let search = row(json!("search"), "request");
    assert_eq!((&search["effective_cost"], &search["gpu_seconds"]), (&json!("0.034"), &json!("34.0")));
    assert_eq!(row(Value::Null, "unallocated")["gpu_seconds"], Value::Null);

    let [blind, shared] = report["pools"].as_array().unwrap().as_slice() else { panic!("{report:#}") };
    for (part, cost, seconds) in [
        ("busy", "0.045", "45.0"),
        ("idle", "0.185", "185.0"),
        ("waste", "0.01", "10.0"),
        ("unallocated", "0.00", "0.0"),
    ] {
        assert_eq!((&shared[part]["cost"], &shared[part]["gpu_seconds"]), (&json!(cost), &json!(seconds)), "{part}");
    }
    assert_eq!((&shared["cost"], &shared["gpu_seconds"]), (&json!("0.24"), &json!("240.0")));
    assert_eq!(shared["output_tokens"], 500);
    let prices = &shared["usd_per_million_output_tokens"];
    assert_eq!((&prices["busy"], &prices["with_idle"]), (&json!("90.00"), &json!("480.00")));
    let full: Money = prices["full_load"].as_str().unwrap().parse().unwrap();
    assert!(Money::ZERO < full && full < "1".parse().unwrap(), "a full batch is far cheaper: {full}");

    assert_eq!((&blind["cost"], &blind["gpu_seconds"]), (&json!("0.06"), &Value::Null));
    let unknown = json!({ "busy": null, "with_idle": null, "full_load": null });
    assert_eq!(blind["usd_per_million_output_tokens"], unknown);

    let text = books.run(&["report", "--by", "team"]).out;
    let row = |starts: &str| {
        let line = text.lines().find(|line| line.trim_start().starts_with(starts));
        line.unwrap_or_else(|| panic!("{starts} is not in\n{text}")).split_whitespace().collect::<Vec<_>>().join(" ")
    };
    assert!(row("search").ends_with("0.0340 34.000"), "{text}");
    for line in [
        "busy 45.000 0.0450 18.8 %",
        "idle 185.000 0.1850 77.1 %",
        "idle reserved 175.000 0.1750 72.9 %",
        "headroom 10.000 0.0100 4.2 %",
        "waste 10.000 0.0100 4.2 %",
        "all 240.000 0.2400 100.0 %",
        "pool cost not yet allocated unknown 0.0600 100.0 %",
    ] {
        let found = text.lines().any(|one| one.split_whitespace().collect::<Vec<_>>().join(" ") == line);
        assert!(found, "`{line}` is not in\n{text}");
    }
    assert!(text.contains("a million output tokens: 90.00 USD busy only, 480.00 USD with idle, 0."), "{text}");
    assert!(text.contains("unknown busy only, unknown with idle, unknown at full load; 0 were made"), "{text}");
}

#[test]
fn the_server_shows_the_same_in_its_metrics_its_page_and_its_api() {
    let books = books();
    let served = Served::start(&books, "token = { env = \"ADMIN\" }", "");
    let token = "authorization: Bearer s3cret\r\n";
    let (_, _, metrics) = served.ask("GET", "/metrics", token, "");
    for line in [
        "farthing_pool_cost_usd{pool=\"shared\",line=\"request\"} 0.045",
        "farthing_pool_idle_usd{pool=\"shared\",line=\"idle_reserved\"} 0.175",
        "farthing_pool_idle_usd{pool=\"shared\",line=\"headroom\"} 0.01",
        "farthing_pool_unallocated_usd{pool=\"blind\",line=\"unallocated\"} 0.06",
        "farthing_pool_gpu_seconds{pool=\"shared\",line=\"waste\"} 10.0",
    ] {
        assert!(metrics.contains(&format!("{line}\n")), "`{line}` is not in\n{metrics}");
    }
    assert!(!metrics.contains("farthing_pool_gpu_seconds{pool=\"blind\""), "unknown is absent:\n{metrics}");
    let (_, _, live) = served.ask("GET", "/api/v1/live", token, "");
    let live: Value = serde_json::from_str(&live).unwrap();
    let shared = live["pools"].as_array().unwrap().iter().find(|pool| pool["pool"] == "shared").unwrap();
    assert_eq!(
        (&shared["cost"], &shared["busy"], &shared["idle"], &shared["waste"], &shared["unallocated"]),
        (&json!("0.24"), &json!("0.045"), &json!("0.185"), &json!("0.01"), &json!("0.00"))
    );
    let (status, _, bill) = served.ask("GET", &format!("/api/v1/attempts/{}", id(1).request), token, "");
    let bill: Value = serde_json::from_str(&bill).unwrap();
    assert_eq!((status, &bill["pools"][0]["idle_share"]), (200, &json!("0.16575")));
}
