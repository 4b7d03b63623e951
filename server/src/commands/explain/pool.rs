//! What one attempt on a pool of GPUs cost, term by term, with the rows that prove it.

use std::collections::{BTreeMap, BTreeSet};

use ledger::allocate::replica::Replica;
use ledger::bill::{cost_of, idle_part, mean_batch, spared_us};
use ledger::{
    Attempt, CapacityFact, EngineFact, Line, Money, Origin, Period, Posting, Terms, Tier, Timestamp, capacity, settle,
};
use serde_json::{Value, json};
use store::{Found, Session};

use crate::report::engines_within;
use crate::rows;

/// An attempt's bill.
#[derive(Debug)]
pub struct PoolBill<'a> {
    pub attempt: &'a Attempt,
    pub pool: &'a str,
    /// Its postings, minute by minute, corrections behind what they correct.
    pub postings: Vec<&'a Posting>,
    pub amount: Money,
    /// GPU-microseconds that it pays; `None` when some posting does not say.
    pub gpu_us: Option<i64>,
    /// The amount by term; `None` when some posting has no terms.
    pub terms: Option<Terms>,
    /// The worst of its minutes.
    pub tier: Option<Tier>,
    /// The worst of its minutes, in millionths.
    pub quality: Option<u32>,
    pub policies: BTreeSet<&'a str>,
    pub minutes: Vec<Minute<'a>>,
    /// Its part of what stood idle in its minutes. Not charged.
    pub idle: Option<Money>,
    pub batch: Batch,
    pub cache: Cache,
    pub engine: Option<EngineFact>,
}

/// A minute of the pool that it has a part of.
#[derive(Debug)]
pub struct Minute<'a> {
    pub origin: &'a Origin,
    pub period: Period,
    /// What all postings of the minute add up to.
    pub posted: Money,
    /// What the pool's GPUs cost in it.
    pub cost: Money,
    /// What requests and jobs used of it.
    pub used: Money,
    pub idle: Money,
}

/// Who ran beside it.
#[derive(Debug, Default)]
pub struct Batch {
    /// Requests at once on average by the times of all attempts on the engine, itself included.
    pub mean: Option<f64>,
    /// Others that ran while it ran.
    pub others: u64,
    /// Requests at once on average as the engine counted them, and how often it was asked.
    pub counted: Option<(f64, u64)>,
}

/// What the prefix cache spared it.
#[derive(Debug)]
pub enum Cache {
    /// Nothing of its input was cached.
    Nothing,
    /// Some was, and what it spared is not known for this reason.
    Unknown(u64, &'static str),
    /// Cached tokens, and what computing them would have cost less what reading them did.
    Spared(u64, Money),
}

/// The bills of all attempts on pools.
///
/// # Errors
/// When the ledger cannot be read.
pub async fn bills<'a>(session: &Session, found: &'a Found) -> anyhow::Result<Vec<PoolBill<'a>>> {
    let mut bills = Vec::new();
    for attempt in &found.attempts {
        let Some(pool) = attempt.route.pool.as_deref() else { continue };
        let of_pool = |posting: &&Posting| matches!(posting.origin, Origin::Pool { .. });
        let mut own: Vec<&Posting> =
            found.postings.iter().filter(|posting| posting.attempt == Some(attempt.id)).filter(of_pool).collect();
        own.sort_by_key(|posting| (posting.period.start, posting.booked_at, posting.id));
        bills.push(bill(session, attempt, pool, own).await?);
    }
    Ok(bills)
}

async fn bill<'a>(
    session: &Session,
    attempt: &'a Attempt,
    pool: &'a str,
    postings: Vec<&'a Posting>,
) -> anyhow::Result<PoolBill<'a>> {
    let ran = ran(attempt);
    let capacity = capacity_of(session, pool).await?;
    let minutes = minutes(session, pool, &postings, &capacity).await?;
    let engine = engine_of(session, attempt, pool, ran).await?;
    let idle = minutes.iter().try_fold(Money::ZERO, |sum, minute| {
        let own = postings.iter().filter(|posting| posting.origin == *minute.origin);
        let own: Money = own.map(|posting| posting.costs.effective_cost).sum();
        Some(sum + idle_part(own, minute.used, minute.idle)?)
    });
    let cache = cache(attempt, engine.as_ref(), &capacity, ran.start);
    let (tier, quality) = known(&postings);
    Ok(PoolBill {
        attempt,
        pool,
        amount: postings.iter().map(|posting| posting.costs.effective_cost).sum(),
        gpu_us: all(&postings, |posting| Some(posting.basis?.gpu_us)).map(|times| times.into_iter().sum()),
        terms: all(&postings, |posting| posting.basis?.terms).map(sum_of),
        tier,
        quality,
        policies: postings.iter().map(|posting| &*posting.policy).collect(),
        idle: idle.filter(|_| !postings.is_empty()),
        batch: batch(session, attempt, pool, ran).await?,
        cache,
        engine,
        minutes,
        postings,
    })
}

/// From when it was sent, and had left the engine's queue if that is known, to its last token.
fn ran(attempt: &Attempt) -> Period {
    let line = &attempt.timeline;
    let after = |micros: u64| line.received_at.plus_micros(i64::try_from(micros).unwrap_or(i64::MAX));
    let start = line.sent_us.unwrap_or(0).saturating_add(line.queued_us.unwrap_or(0));
    Period { start: after(start), end: after(line.last_token_us.unwrap_or(line.finished_us)) }
}

/// What every posting says, or nothing.
fn all<T>(postings: &[&Posting], of: impl Fn(&Posting) -> Option<T>) -> Option<Vec<T>> {
    if postings.is_empty() {
        return None;
    }
    postings.iter().map(|posting| of(posting)).collect()
}

fn sum_of(all: Vec<Terms>) -> Terms {
    let mut sum = Terms::default();
    for terms in all {
        sum.overhead += terms.overhead;
        sum.weights += terms.weights;
        sum.kv += terms.kv;
        sum.compute += terms.compute;
    }
    sum
}

/// The worst tier and quality of its minutes, each minute as it was booked last.
fn known(postings: &[&Posting]) -> (Option<Tier>, Option<u32>) {
    let mut last: BTreeMap<&Origin, &Posting> = BTreeMap::new();
    for posting in postings {
        let newest = last.entry(&posting.origin).or_insert(posting);
        if posting.booked_at >= newest.booked_at {
            *newest = posting;
        }
    }
    let tier = last.values().filter_map(|posting| posting.tier).max();
    let quality = last.values().filter_map(|posting| posting.basis?.quality).min();
    (tier, quality)
}

async fn capacity_of(session: &Session, pool: &str) -> anyhow::Result<Vec<CapacityFact>> {
    let mut facts = Vec::new();
    for batch in session.sql(&format!("SELECT * FROM capacity WHERE pool = {}", rows::literal(pool))).await? {
        facts.extend(store::capacity_of(&batch)?);
    }
    Ok(capacity::latest(&facts).into_iter().cloned().collect())
}

async fn minutes<'a>(
    session: &Session,
    pool: &str,
    postings: &[&'a Posting],
    capacity: &[CapacityFact],
) -> anyhow::Result<Vec<Minute<'a>>> {
    let mut minutes: BTreeMap<Timestamp, Minute<'a>> = BTreeMap::new();
    for posting in postings {
        let Origin::Pool { start, .. } = posting.origin else { continue };
        let nothing = Money::ZERO;
        let minute = minutes.entry(start).or_insert_with(|| Minute {
            origin: &posting.origin,
            period: posting.period,
            posted: nothing,
            cost: nothing,
            used: nothing,
            idle: nothing,
        });
        minute.period.end = minute.period.end.max(posting.period.end);
    }
    let (Some(first), Some(last)) = (minutes.first_key_value(), minutes.last_key_value()) else {
        return Ok(Vec::new());
    };
    let span = Period { start: *first.0, end: last.0.plus_micros(1) };
    let query = format!(
        "SELECT origin_key, line, sum(effective_cost) AS effective_cost, max(period_end) AS until FROM postings \
         WHERE origin_kind = 'pool' AND pool = {} AND {} GROUP BY origin_key, line",
        rows::literal(pool),
        rows::within("period_start", span)
    );
    let by_key: BTreeMap<String, Timestamp> =
        minutes.iter().map(|(start, minute)| (minute.origin.key(), *start)).collect();
    for batch in session.sql(&query).await? {
        for row in 0..batch.num_rows() {
            let key = rows::plain(rows::column(&batch, "origin_key")?, row)?;
            let Some(minute) = by_key.get(&key).and_then(|start| minutes.get_mut(start)) else { continue };
            let line = rows::plain(rows::column(&batch, "line")?, row)?;
            let cost = rows::money(rows::column(&batch, "effective_cost")?, row)?.unwrap_or_default();
            minute.posted += cost;
            match Line::ALL.into_iter().find(|known| known.name() == line) {
                Some(line) if line.is_use() => minute.used += cost,
                Some(line) if line.is_idle() => minute.idle += cost,
                _ => {}
            }
        }
    }
    let facts: Vec<&CapacityFact> = capacity.iter().collect();
    for minute in minutes.values_mut() {
        minute.cost = settle::pool_cost(&facts, pool, minute.period);
    }
    Ok(minutes.into_values().collect())
}

/// The engine that served it: the upstream's, else the one that serves its model, else the pool's only one.
async fn engine_of(
    session: &Session,
    attempt: &Attempt,
    pool: &str,
    ran: Period,
) -> anyhow::Result<Option<EngineFact>> {
    let moment = Period { start: ran.start, end: ran.end.max(ran.start.plus_micros(1)) };
    let mut engines = engines_within(session, moment).await?;
    engines.retain(|engine| &*engine.pool == pool);
    let by = |found: &dyn Fn(&EngineFact) -> bool| engines.iter().position(found);
    let model = attempt.route.request_model.as_ref().or(attempt.route.model());
    let place = by(&|engine| engine.engine == attempt.route.upstream)
        .or_else(|| by(&|engine| engine.model.is_some() && engine.model.as_ref() == model))
        .or_else(|| (engines.len() == 1).then_some(0));
    Ok(place.map(|place| engines.swap_remove(place)))
}

async fn batch(session: &Session, attempt: &Attempt, pool: &str, ran: Period) -> anyhow::Result<Batch> {
    const LONGEST_US: i64 = 3_600_000_000;
    let own_us = ran.micros();
    let around = Period { start: ran.start.plus_micros(-LONGEST_US), end: ran.end };
    let micros = |at: Timestamp| at.micros();
    // Whole microseconds since 1970 keep the arithmetic exact.
    let query = format!(
        "SELECT sum(CASE WHEN b > a THEN b - a ELSE 0 END) AS together, sum(CASE WHEN b > a THEN 1 ELSE 0 END) AS many FROM \
         (SELECT greatest(CAST(received_at AS BIGINT) + coalesce(sent_us, 0) + coalesce(queued_us, 0), {}) AS a, \
         least(CAST(received_at AS BIGINT) + coalesce(last_token_us, finished_us), {}) AS b \
         FROM attempts WHERE pool = {} AND upstream = {} AND {})",
        micros(ran.start),
        micros(ran.end),
        rows::literal(pool),
        rows::literal(&attempt.route.upstream),
        rows::within("received_at", around)
    );
    let mut batch = Batch::default();
    for rows_of in session.sql(&query).await?.iter().filter(|rows| rows.num_rows() > 0) {
        let together = rows::count(rows::column(rows_of, "together")?, 0)?.unwrap_or(0);
        batch.mean = mean_batch(own_us, together);
        batch.others = rows::count(rows::column(rows_of, "many")?, 0)?.unwrap_or(0).saturating_sub(1);
    }
    let query = format!(
        "SELECT avg(running) AS running, count(running) AS many FROM readings WHERE engine = {} AND {}",
        rows::literal(&attempt.route.upstream),
        rows::within("read_at", ran)
    );
    for rows_of in session.sql(&query).await?.iter().filter(|rows| rows.num_rows() > 0) {
        let many = rows::count(rows::column(rows_of, "many")?, 0)?.unwrap_or(0);
        let mean = rows::json(rows::column(rows_of, "running")?, 0)?.as_f64();
        batch.counted = mean.filter(|_| many > 0).map(|mean| (mean, many));
    }
    Ok(batch)
}

fn cache(attempt: &Attempt, engine: Option<&EngineFact>, capacity: &[CapacityFact], at: Timestamp) -> Cache {
    let cached = attempt.usage.cache_read;
    if cached == 0 {
        return Cache::Nothing;
    }
    let Some(constants) = engine.and_then(|engine| engine.setup.constants) else {
        return Cache::Unknown(cached, "the engine's constants are unknown");
    };
    let on = capacity
        .iter()
        .find(|fact| engine.is_some_and(|engine| engine.replica == fact.replica) && fact.period.contains(at));
    let Some(fact) = on else { return Cache::Unknown(cached, "the price of its GPUs is unknown") };
    let tokens = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
    let spared = spared_us(&constants, tokens(attempt.usage.input_tokens()), tokens(cached));
    Cache::Spared(cached, cost_of(fact.rate, constants.gpus, spared))
}

impl PoolBill<'_> {
    /// Whether the postings of each of its minutes add up to what the pool's GPUs cost in it.
    #[must_use]
    pub fn closes(&self) -> bool {
        self.minutes.iter().all(|minute| minute.posted == minute.cost)
    }

    /// Postings that changed what was booked before.
    #[must_use]
    pub fn corrections(&self) -> usize {
        self.postings.len() - self.minutes.len().min(self.postings.len())
    }

    /// The query that shows its rows.
    #[must_use]
    pub fn proof(&self) -> String {
        format!(
            "SELECT posting_id, origin_key, line, effective_cost, gpu_us, term_weights, term_kv, term_compute, term_overhead, \
             tier, quality, policy FROM postings WHERE request_id = '{}' AND attempt = {} ORDER BY period_start, booked_at",
            self.attempt.id.request, self.attempt.id.number
        )
    }

    /// The query that shows all of one of its minutes.
    #[must_use]
    pub fn minute_proof(&self) -> Option<String> {
        let key = self.minutes.first()?.origin.key();
        Some(format!(
            "SELECT line, sum(effective_cost) AS usd, sum(gpu_us) AS gpu_us FROM postings WHERE origin_key = {} GROUP BY line",
            rows::literal(&key)
        ))
    }

    /// The bill as a JSON document.
    #[must_use]
    pub fn document(&self) -> Value {
        let seconds = |micros: i64| ledger::decimal::format_scaled(micros.into(), 6, 1);
        let minutes: Vec<Value> = self
            .minutes
            .iter()
            .map(|minute| {
                let own = self.postings.iter().filter(|posting| posting.origin == *minute.origin);
                json!({
                    "origin": minute.origin.key(), "period": minute.period, "pool_cost": minute.cost, "posted": minute.posted,
                    "closed": minute.posted == minute.cost, "used": minute.used, "idle": minute.idle,
                    "postings": own.map(|posting| posting.id.to_string()).collect::<Vec<_>>(),
                })
            })
            .collect();
        json!({
            "attempt": self.attempt.id.number,
            "pool": self.pool,
            "settled": !self.postings.is_empty(),
            "cost": (!self.postings.is_empty()).then_some(self.amount),
            "gpu_seconds": self.gpu_us.map(seconds),
            "terms": self.terms,
            "mean_batch": self.batch.mean,
            "others": self.batch.others,
            "mean_batch_by_engine": self.batch.counted.map(|(mean, _)| mean),
            "idle_share": self.idle,
            "cache": match self.cache {
                Cache::Nothing => json!({ "cached_tokens": 0, "spared": "0.00" }),
                Cache::Unknown(cached, why) => json!({ "cached_tokens": cached, "spared": null, "unknown_because": why }),
                Cache::Spared(cached, spared) => json!({ "cached_tokens": cached, "spared": spared }),
            },
            "tier": self.tier,
            "quality": self.quality.map(|millionths| ledger::decimal::format_scaled(millionths.into(), 6, 1)),
            "policies": self.policies,
            "corrections": self.corrections(),
            "engine": self.engine.as_ref().map(engine_document),
            "minutes": minutes,
            "closed": self.closes(),
            "sql": self.proof(),
        })
    }
}

fn engine_document(engine: &EngineFact) -> Value {
    let constants = engine.setup.constants.map(|Replica { gpu, gpus, efficiencies, overlap, .. }| {
        json!({
            "gpu": gpu.name, "gpus": gpus, "eta_c": efficiencies.compute, "eta_b": efficiencies.bandwidth,
            "overhead_s": efficiencies.overhead_s, "overlap": overlap,
        })
    });
    json!({
        "engine": engine.engine, "replica": engine.replica, "model": engine.model, "constants": constants,
        "fit_error": engine.setup.error,
    })
}
