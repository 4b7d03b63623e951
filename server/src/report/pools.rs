//! The books of each pool: what was used, what stood idle and why, what was wasted, and three prices of a token.

use std::collections::BTreeMap;

use ledger::allocate::full_load::{FullLoad, full_load};
use ledger::allocate::timeline::EngineTimeline;
use ledger::bill::{Loaded, per_million, per_million_at_full_load};
use ledger::{CapacityFact, EngineFact, Line, Money, Period, Timestamp, capacity};
use serde::Serialize;
use store::Session;
use utoipa::ToSchema;

use super::gpu_seconds;
use crate::rows;

/// Requests that an engine without a known limit runs at once, as vLLM has it.
const SEQUENCES_MAX: f64 = 256.0;
/// Requests of an engine that say what its load looks like.
const SAMPLE_MAX: usize = 10_000;

/// An amount, and the GPU time that it pays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Part {
    /// What it costs.
    #[schema(value_type = String)]
    pub cost: Money,
    /// GPU-seconds; `null` where a part of them is unknown.
    #[serde(rename = "gpu_seconds", serialize_with = "gpu_seconds")]
    #[schema(value_type = Option<String>)]
    pub gpu_us: Option<i64>,
}

impl Part {
    /// Nothing at all, which is known.
    const NOTHING: Part = Part { cost: Money::ZERO, gpu_us: Some(0) };

    fn and(self, other: Part) -> Part {
        // Unlike a group's sum, a part is known only when all of it is.
        let gpu_us = self.gpu_us.zip(other.gpu_us).map(|(one, two)| one.saturating_add(two));
        Part { cost: self.cost + other.cost, gpu_us }
    }
}

/// One line of a pool's books.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct LineBooks {
    /// What the amount is for.
    pub line: &'static str,
    /// The amount.
    #[serde(flatten)]
    pub part: Part,
}

/// A million output tokens in three honest forms. What cannot be known is `null`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct PerMillion {
    /// What requests paid.
    #[schema(value_type = Option<String>)]
    pub busy: Option<Money>,
    /// All that the GPUs cost, jobs left out.
    #[schema(value_type = Option<String>)]
    pub with_idle: Option<Money>,
    /// What it would be if the engines always had enough to do.
    #[schema(value_type = Option<String>)]
    pub full_load: Option<Money>,
}

/// A pool's books.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct PoolBooks {
    /// The pool.
    pub pool: String,
    /// All that is booked.
    #[serde(flatten)]
    pub all: Part,
    /// What requests and jobs used.
    pub busy: Part,
    /// What stood idle, whatever for.
    pub idle: Part,
    /// What reached nobody.
    pub waste: Part,
    /// What nothing has allocated yet.
    pub unallocated: Part,
    /// Every line that has an amount.
    pub lines: Vec<LineBooks>,
    /// Output tokens of the requests that it served.
    pub output_tokens: u64,
    /// Prices of a million of them.
    pub usd_per_million_output_tokens: PerMillion,
}

/// The books of every pool within a period, by name.
///
/// # Errors
/// When the ledger cannot be read.
pub async fn pools(session: &Session, period: Period) -> anyhow::Result<Vec<PoolBooks>> {
    let mut books = booked(session, period).await?;
    let full = at_full_load(session, period, books.iter().map(|books| &books.pool)).await?;
    for books in &mut books {
        books.usd_per_million_output_tokens.full_load = full.get(&books.pool).copied();
    }
    Ok(books)
}

/// The same without the price at full load, which needs a look at many requests.
///
/// # Errors
/// When the ledger cannot be read.
pub async fn booked(session: &Session, period: Period) -> anyhow::Result<Vec<PoolBooks>> {
    let mut books: BTreeMap<String, BTreeMap<Line, Part>> = BTreeMap::new();
    let query = format!(
        "SELECT pool, line, sum(effective_cost) AS effective_cost, sum(gpu_us) AS gpu_us, count(*) - count(gpu_us) AS untimed \
         FROM postings WHERE origin_kind = 'pool' AND pool IS NOT NULL AND {} GROUP BY pool, line",
        rows::within("period_start", period)
    );
    for batch in session.sql(&query).await? {
        for row in 0..batch.num_rows() {
            let named = rows::plain(rows::column(&batch, "line")?, row)?;
            let Some(line) = Line::ALL.into_iter().find(|line| line.name() == named) else { continue };
            let cost = rows::money(rows::column(&batch, "effective_cost")?, row)?.unwrap_or_default();
            let untimed = rows::count(rows::column(&batch, "untimed")?, row)?.unwrap_or(0);
            let gpu_us = match line {
                // An adjustment to an invoice pays for no time of its own.
                Line::TrueUp => Some(0),
                _ if untimed > 0 => None,
                _ => rows::signed(rows::column(&batch, "gpu_us")?, row)?,
            };
            let pool = rows::plain(rows::column(&batch, "pool")?, row)?;
            books.entry(pool).or_default().insert(line, Part { cost, gpu_us });
        }
    }
    if books.is_empty() {
        return Ok(Vec::new());
    }
    let tokens = output_tokens(session, period).await?;
    Ok(books
        .into_iter()
        .map(|(pool, lines)| {
            let output_tokens = tokens.get(&pool).copied().unwrap_or(0);
            of_pool(pool, &lines, output_tokens)
        })
        .collect())
}

fn of_pool(pool: String, lines: &BTreeMap<Line, Part>, output_tokens: u64) -> PoolBooks {
    let sum = |wanted: &dyn Fn(Line) -> bool| {
        lines.iter().filter(|(line, _)| wanted(**line)).fold(Part::NOTHING, |sum, (_, part)| sum.and(*part))
    };
    let only = |line: Line| sum(&|one| one == line);
    let unallocated = only(Line::Unallocated);
    // As long as nobody knows whose a part of the cost is, nobody knows what requests paid.
    let busy =
        (unallocated.cost == Money::ZERO).then(|| per_million(only(Line::Request).cost, output_tokens)).flatten();
    let with_idle = per_million(sum(&|line| line != Line::Job).cost, output_tokens);
    PoolBooks {
        pool,
        all: sum(&|_| true),
        busy: sum(&Line::is_use),
        idle: sum(&Line::is_idle),
        waste: only(Line::Waste),
        unallocated,
        lines: lines.iter().map(|(line, part)| LineBooks { line: line.name(), part: *part }).collect(),
        output_tokens,
        usd_per_million_output_tokens: PerMillion { busy, with_idle, full_load: None },
    }
}

async fn output_tokens(session: &Session, period: Period) -> anyhow::Result<BTreeMap<String, u64>> {
    let query = format!(
        "SELECT pool, sum(output_tokens) AS tokens FROM attempts WHERE pool IS NOT NULL AND {} GROUP BY pool",
        rows::within("received_at", period)
    );
    let mut tokens = BTreeMap::new();
    for batch in session.sql(&query).await? {
        for row in 0..batch.num_rows() {
            let count = rows::count(rows::column(&batch, "tokens")?, row)?.unwrap_or(0);
            tokens.insert(rows::plain(rows::column(&batch, "pool")?, row)?, count);
        }
    }
    Ok(tokens)
}

/// What a million tokens of each pool would cost if its engines never waited, by the newest constants in the period.
async fn at_full_load<'a>(
    session: &Session,
    period: Period,
    pools: impl Iterator<Item = &'a String>,
) -> anyhow::Result<BTreeMap<String, Money>> {
    let mut facts: Vec<CapacityFact> = Vec::new();
    for batch in session.sql("SELECT * FROM capacity").await? {
        facts.extend(store::capacity_of(&batch)?);
    }
    let engines = engines_within(session, period).await?;
    let mut prices = BTreeMap::new();
    for pool in pools {
        // The GPUs that the pool had last.
        let mut replicas: BTreeMap<&str, &CapacityFact> = BTreeMap::new();
        let theirs = facts.iter().filter(|fact| *fact.pool == **pool && fact.period.intersect(period).is_some());
        for fact in capacity::latest(theirs) {
            let newest = replicas.entry(&fact.replica).or_insert(fact);
            if fact.period.start > newest.period.start {
                *newest = fact;
            }
        }
        let mut loaded = Vec::with_capacity(replicas.len());
        for (replica, fact) in replicas {
            let mut loads: Vec<FullLoad> = Vec::new();
            for engine in engines.iter().filter(|engine| *engine.pool == **pool && &*engine.replica == replica) {
                loads.extend(load_of(session, period, engine).await?);
            }
            loaded.push(Loaded { rate: fact.rate, gpus: fact.gpus, engines: loads });
        }
        if let Some(price) = per_million_at_full_load(&loaded) {
            prices.insert(pool.clone(), price);
        }
    }
    Ok(prices)
}

/// Each engine's newest fact that touches the period.
///
/// # Errors
/// When the ledger cannot be read.
pub async fn engines_within(session: &Session, period: Period) -> anyhow::Result<Vec<EngineFact>> {
    let mut newest: BTreeMap<String, EngineFact> = BTreeMap::new();
    // A fact that began long ago may still hold.
    let begun = Period { start: Period::ALL.start, end: period.end };
    let query = format!("SELECT * FROM engines WHERE {}", rows::within("period_start", begun));
    for batch in session.sql(&query).await? {
        for fact in store::engines_of(&batch)?.into_iter().filter(|fact| fact.period.intersect(period).is_some()) {
            let of = |fact: &EngineFact| (fact.period.start, fact.observed_at);
            match newest.get_mut(&*fact.engine) {
                Some(held) if of(held) >= of(&fact) => {}
                Some(held) => *held = fact,
                None => {
                    newest.insert(fact.engine.to_string(), fact);
                }
            }
        }
    }
    Ok(newest.into_values().collect())
}

async fn load_of(session: &Session, period: Period, engine: &EngineFact) -> anyhow::Result<Option<FullLoad>> {
    let Some(constants) = &engine.setup.constants else { return Ok(None) };
    let query = format!(
        "SELECT input_tokens, cache_read_tokens, output_tokens FROM attempts WHERE pool = {} AND upstream = {} \
         AND output_tokens > 0 AND {} ORDER BY received_at DESC LIMIT {SAMPLE_MAX}",
        rows::literal(&engine.pool),
        rows::literal(&engine.engine),
        rows::within("received_at", period)
    );
    let mut timelines = Vec::new();
    for batch in session.sql(&query).await? {
        let tokens = |name: &str, row| {
            let count = rows::count(rows::column(&batch, name)?, row)?.unwrap_or(0);
            anyhow::Ok(u32::try_from(count).unwrap_or(u32::MAX))
        };
        for row in 0..batch.num_rows() {
            let never = Timestamp::default();
            timelines.push(EngineTimeline {
                arrived: never,
                scheduled: never,
                first_token: never,
                last_token: never,
                input_tokens: tokens("input_tokens", row)?,
                cached_tokens: tokens("cache_read_tokens", row)?,
                output_tokens: tokens("output_tokens", row)?,
            });
        }
    }
    Ok(full_load(constants, engine.setup.limits, SEQUENCES_MAX, &timelines))
}
