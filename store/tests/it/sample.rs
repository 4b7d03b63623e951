//! Facts to put in, and the plain sums that must come out.

use std::collections::BTreeMap;
use std::path::Path;

use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::{Decimal128Type, Int64Type};
use ledger::{
    Attempt, AttemptId, CapacityFact, Charge, Context, EstimateReason, Fact, Gap, Money, Opened, Operation, Outcome,
    Period, PurchaseOption, RequestId, ResolvedRates, Route, ServiceClass, Source, Timeline, Timestamp, TokenGaps,
    TokenKind, TokenPrice, TokenUsage, UnpricedReason, UsageQuality,
};
use store::{Options, Recovery, Session, Store, StoreError, attempts_of, postings_of};

pub const START: i64 = 1_764_000_000_000_000;

pub fn at(offset_us: i64) -> Timestamp {
    Timestamp::from_micros(START + offset_us)
}

pub fn rates() -> ResolvedRates {
    let prices =
        [(TokenKind::Input, TokenPrice::from_pico(2_500_000)), (TokenKind::Output, TokenPrice::from_pico(10_000_000))];
    ResolvedRates::new("test@1", "openai/gpt-4o", &prices, 900_000)
}

pub fn id(number: u32) -> AttemptId {
    // Every third request has a second attempt, and ids do not come in order.
    let millis = i64::from(number / 2) * 7;
    let mut random = [0u8; 10];
    random[..4].copy_from_slice(&(number / 2).wrapping_mul(2_654_435_761).to_be_bytes());
    AttemptId { request: RequestId::new(at(millis * 1_000), random), number: u16::try_from(number % 2).unwrap() }
}

pub fn attempt(number: u32) -> Attempt {
    let usage = TokenUsage { input: 100 + u64::from(number), output: u64::from(number % 50), ..TokenUsage::default() };
    let costs = rates().charge(&usage).unwrap();
    let charge = match number % 5 {
        0 => Charge::Unpriced { reason: UnpricedReason::UnknownModel },
        1 => Charge::Estimated { costs, rates: rates(), reason: EstimateReason::UsageCounted },
        _ => Charge::Priced { costs, rates: rates() },
    };
    let team = ["search", "support", "batch"][usize::try_from(number % 3).unwrap()];
    let mut tags = BTreeMap::new();
    if number.is_multiple_of(2) {
        tags.insert("a \"quoted\" name".into(), "ä value".into());
    }
    Attempt {
        id: id(number),
        source: match number % 7 {
            0 => Source::Import("requests:a.jsonl".into()),
            1 => Source::Span("agent".into()),
            _ => Source::Gateway,
        },
        context: Context {
            team: Some(team.into()),
            trace_id: Some(format!("{number:032x}").into()),
            tags,
            ..Context::default()
        },
        route: Route {
            operation: Operation::ALL[usize::try_from(number).unwrap() % Operation::ALL.len()],
            provider: "openai".into(),
            upstream: "openai".into(),
            request_model: Some("gpt-4o".into()),
            response_model: number.is_multiple_of(2).then(|| "gpt-4o-2024-08-06".into()),
            service_class: ServiceClass::ALL[usize::try_from(number).unwrap() % ServiceClass::ALL.len()],
            streamed: number.is_multiple_of(2),
            ..Route::default()
        },
        timeline: Timeline {
            received_at: id(number).request.at(),
            sent_us: Some(20),
            first_token_us: number.is_multiple_of(2).then_some(300),
            queued_us: number.is_multiple_of(3).then_some(u64::from(number)),
            finished_us: 1_000 + u64::from(number),
            gaps: TokenGaps { count: 3, total_us: 60, max_us: 30 },
            ..Timeline::default()
        },
        outcome: Outcome::ALL[usize::try_from(number).unwrap() % Outcome::ALL.len()],
        status: Some(200),
        usage,
        usage_quality: if number % 5 == 1 { UsageQuality::Estimated } else { UsageQuality::Reported },
        charge,
    }
}

pub fn finished(number: u32) -> Fact {
    Fact::Attempt(Box::new(attempt(number)))
}

pub fn opened(number: u32) -> Fact {
    let attempt = attempt(number);
    Fact::Opened(Box::new(Opened {
        id: attempt.id,
        received_at: attempt.timeline.received_at,
        context: attempt.context,
        route: attempt.route,
        estimate: TokenUsage { input: attempt.usage.input, ..TokenUsage::default() },
    }))
}

pub fn capacity(number: u32) -> Fact {
    let start = at(i64::from(number) * 60_000_000);
    Fact::Capacity(Box::new(CapacityFact {
        pool: "shared".into(),
        replica: format!("r{number}").into(),
        deployment: Some("model-a".into()),
        owner: None,
        gpu: "H100".into(),
        gpus: 2,
        rate: "2.50".parse().unwrap(),
        purchase: PurchaseOption::Spot,
        period: Period { start, end: start.plus_micros(60_000_000) },
        observed_at: start.plus_micros(60_000_000),
    }))
}

pub fn gap(number: u32) -> Fact {
    let start = at(i64::from(number) * 1_000);
    Fact::Gap(Gap {
        period: Period { start, end: start.plus_micros(10) },
        records_lost: 2,
        cause: format!("cause {number}"),
    })
}

/// Some of everything.
pub fn facts(attempts: u32) -> Vec<Fact> {
    let mut facts: Vec<Fact> = (0..attempts).flat_map(|number| [opened(number), finished(number)]).collect();
    facts.extend((0..3).map(capacity));
    facts.push(gap(1));
    facts.extend((0..4).flat_map(crate::telemetry::facts));
    facts
}

pub fn price(_: &Opened, usage: &TokenUsage) -> Charge {
    match rates().charge(usage) {
        Some(costs) => Charge::Estimated { costs, rates: rates(), reason: EstimateReason::Crash },
        None => Charge::Unpriced { reason: UnpricedReason::UnknownRate },
    }
}

pub async fn open(dir: &Path) -> (Store, Recovery) {
    open_with(dir, Options::default()).await
}

pub async fn open_with(dir: &Path, options: Options) -> (Store, Recovery) {
    Store::open(dir, options, at(0), &price).await.unwrap()
}

/// Everything in the ledger, sorted, as plain text: two ledgers with the same books give the same.
pub async fn books(store: &Store) -> Vec<String> {
    let session = store.session().await.unwrap();
    let mut rows = Vec::new();
    for batch in session.sql("SELECT * FROM attempts").await.unwrap() {
        rows.extend(attempts_of(&batch).unwrap().iter().map(|row| format!("{row:?}")));
    }
    for batch in session.sql("SELECT * FROM postings").await.unwrap() {
        rows.extend(postings_of(&batch).unwrap().iter().map(|row| format!("{row:?}")));
    }
    rows.extend(all(&session, "capacity", store::capacity_of).await);
    rows.extend(all(&session, "gaps", store::gaps_of).await);
    rows.extend(all(&session, "engines", store::engines_of).await);
    rows.extend(all(&session, "readings", store::readings_of).await);
    rows.extend(all(&session, "steps", store::steps_of).await);
    rows.extend(all(&session, "spans", store::spans_of).await);
    rows.extend(all(&session, "jobs", store::jobs_of).await);
    rows.extend(all(&session, "gpus", store::gpus_of).await);
    rows.extend(all(&session, "decisions", store::decisions_of).await);
    rows.sort();
    rows
}

async fn all<T: std::fmt::Debug>(
    session: &Session,
    table: &str,
    read: impl Fn(&RecordBatch) -> Result<Vec<T>, StoreError>,
) -> Vec<String> {
    let batches = session.sql(&format!("SELECT * FROM {table}")).await.unwrap();
    batches.iter().flat_map(|batch| read(batch).unwrap()).map(|row| format!("{row:?}")).collect()
}

/// What the books of these facts must be, without any store.
pub fn expected_books(facts: &[Fact]) -> Vec<String> {
    let mut rows = std::collections::BTreeSet::new();
    for fact in facts {
        match fact {
            Fact::Opened(_) => {}
            Fact::Attempt(attempt) => {
                rows.insert(format!("{attempt:?}"));
                rows.extend(ledger::Posting::of_charge(attempt).map(|posting| format!("{posting:?}")));
            }
            Fact::Capacity(capacity) => {
                rows.insert(format!("{capacity:?}"));
            }
            Fact::Posting(posting) => {
                rows.insert(format!("{posting:?}"));
            }
            Fact::Gap(row) => {
                rows.insert(format!("{row:?}"));
            }
            Fact::Engine(row) => {
                rows.insert(format!("{row:?}"));
            }
            Fact::Reading(row) => {
                rows.insert(format!("{row:?}"));
            }
            Fact::Step(row) => {
                rows.insert(format!("{row:?}"));
            }
            Fact::Span(row) => {
                rows.insert(format!("{row:?}"));
            }
            Fact::Job(row) => {
                rows.insert(format!("{row:?}"));
            }
            Fact::Gpu(row) => {
                rows.insert(format!("{row:?}"));
            }
            Fact::Decision(row) => {
                rows.insert(format!("{row:?}"));
            }
        }
    }
    rows.into_iter().collect()
}

/// One number from a query.
pub async fn count(store: &Store, query: &str) -> i64 {
    let batches = store.sql(query).await.unwrap();
    batches[0].column(0).as_primitive::<Int64Type>().value(0)
}

/// One amount from a query.
pub async fn amount(store: &Store, query: &str) -> Money {
    let batches = store.sql(query).await.unwrap();
    Money::from_pico(batches[0].column(0).as_primitive::<Decimal128Type>().value(0))
}

pub async fn assert_clean(store: &Store) {
    let found = store.verify(&|_| {}).await.unwrap();
    assert!(found.is_clean(), "{found:#?}");
}
