//! Settlement: reads what the ledger knows of a stretch of time, has it divided by [`ledger::settle`], and books what is
//! missing. The only part of it that has side effects.
//!
//! [`keep`] does it while the server runs: every minute behind a watermark, and again for each minute that a late fact touches
//! ([`Late`]). `farthing settle` does it for any time, with what [`imported`] assumes where only imports tell what ran. What came
//! of it is a [`Statement`] for each pool, whose lines add up to the pool's cost.

mod demands;
mod driver;
pub mod imported;
mod late;
mod read;
mod statement;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::Context as _;
use ledger::price::{PriceBook, PriceQuery};
use ledger::settle::{Minute, PoolPolicy, Told, calls_of_spans};
use ledger::{Attempt, Charge, Fact, Label, Period, Posting, Running, Timestamp};
use serde::Serialize;
use store::{Session, Store};

use crate::config::{self, Config};
use read::{ATTEMPTS_MAX, Facts, Stretch};

pub use demands::Demands;
pub use driver::{Driver, Sources, keep};
pub use late::Late;
pub use statement::{Statement, statements, table};

/// Postings that are appended at once, whole minutes aside.
const POSTINGS_MAX: usize = 20_000;
/// Records that may wait in the log before a long settlement stops to move them into the tables.
const UNFLUSHED_MAX: u64 = 200_000;
/// Minutes of a stretch whose facts are read at once.
const STRETCH_MINUTES: i64 = 60;

/// How pools are settled.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rules {
    /// The policy of each pool; a pool without one has the default.
    pub policies: BTreeMap<Label, PoolPolicy>,
    /// How long a minute waits for late facts before it is settled, microseconds.
    pub lag_us: i64,
    /// How far back a start settles again, microseconds.
    pub look_back_us: i64,
    /// The longest a request may take, microseconds.
    pub request_us_max: i64,
    /// Pools that stay as they are booked: they were settled by rules that nobody knows any more.
    pub left_out: BTreeSet<Label>,
}

impl Rules {
    /// The rules that the configuration sets.
    #[must_use]
    pub fn of(config: &Config) -> Rules {
        let micros = |millis: u64| i64::try_from(millis.saturating_mul(1_000)).unwrap_or(i64::MAX);
        Rules {
            policies: config::policies(config),
            lag_us: micros(config.settlement.lag_ms),
            look_back_us: i64::from(config.settlement.look_back_h).saturating_mul(3_600_000_000),
            request_us_max: micros(config.gateway.request_ms_max),
            left_out: BTreeSet::new(),
        }
    }

    /// The same rules, with every pool left out that was settled before and that neither they nor what is `fresh` know: its own
    /// rules may have been others, and settling it again would change what was booked for no reason.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub async fn for_ledger(self, session: &Session, fresh: &Fresh) -> anyhow::Result<Rules> {
        let settled = read::settled_pools(session).await?;
        Ok(self.without(settled, fresh))
    }

    /// The same rules without those of `pools` that neither they nor what is `fresh` know.
    fn without(mut self, pools: impl IntoIterator<Item = Label>, fresh: &Fresh) -> Rules {
        let known = |pool: &Label| self.policies.contains_key(pool) || fresh.has_pool(pool);
        self.left_out = pools.into_iter().filter(|pool| !known(pool)).collect();
        self
    }
}

/// What a settlement did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Settled {
    /// Postings booked, corrections included.
    pub postings: u64,
    /// Minutes of pools that were looked at.
    pub minutes: u64,
    /// Minutes of these that had been settled before and were corrected.
    pub corrected_minutes: u64,
    /// Calls that spans told of and nobody had metered; they are attempts now.
    pub calls: u64,
}

/// What belongs to the newest stretch and is in no table yet.
#[derive(Debug, Clone, Default)]
pub struct Fresh {
    /// Capacity, engines and jobs as they have grown; appended together with what is booked for them.
    pub facts: Vec<Fact>,
    /// Attempts that have not ended.
    pub running: Vec<Running>,
}

impl Fresh {
    fn has_pool(&self, pool: &Label) -> bool {
        self.facts.iter().any(|fact| matches!(fact, Fact::Capacity(fact) if fact.pool == *pool))
    }
}

/// Settles the minutes of `dirty`, hour by hour in bounded memory, and says how far it is on `bar`.
///
/// What was settled before and is as it was books nothing. After an error all of `dirty` can be settled again.
///
/// # Errors
/// When the ledger cannot be read or written.
pub async fn settle(
    store: &Store,
    rules: &Arc<Rules>,
    dirty: &[Period],
    fresh: Fresh,
    demands: &mut Demands,
    now: Timestamp,
    bar: &indicatif::ProgressBar,
) -> anyhow::Result<Settled> {
    let mut settled = Settled::default();
    let hours: Vec<Period> = dirty.iter().flat_map(|period| late::stretches(*period, STRETCH_MINUTES)).collect();
    bar.set_length(hours.iter().map(|hour| hour.micros() / 60_000_000).sum());
    let fresh_facts = Facts::of(&fresh);
    for (place, hour) in hours.iter().enumerate() {
        let session = store.session().await?;
        let before = Period { start: hour.start.plus_micros(-ledger::settle::LOOK_BACK_US), end: hour.end };
        let load = read::load(&session, before).await?;
        let stretches = read::cut(*hour, &load, ATTEMPTS_MAX);
        let demand = demands.of(&session, rules, hour.start).await?;
        for (part, stretch) in stretches.iter().enumerate() {
            let mut facts = Facts::read(&session, *stretch, rules.request_us_max).await?;
            facts.add(&fresh_facts);
            facts.demand.clone_from(&demand);
            facts.leave_out(&rules.left_out);
            let (postings, minutes) = divided(facts, rules, *stretch, now).await?;
            let last = place + 1 == hours.len() && part + 1 == stretches.len();
            settled.postings += u64::try_from(postings.len())?;
            settled.minutes += u64::try_from(minutes.len())?;
            settled.corrected_minutes += u64::try_from(minutes.iter().filter(|minute| minute.corrected).count())?;
            book(store, postings, if last { fresh.facts.clone() } else { Vec::new() })?;
            bar.inc(stretch.window.micros() / 60_000_000);
        }
        if store.unflushed() > UNFLUSHED_MAX {
            store.flush(now).await?;
        }
    }
    Ok(settled)
}

/// The arithmetic, away from the threads that serve.
async fn divided(
    facts: Facts,
    rules: &Arc<Rules>,
    stretch: Stretch,
    now: Timestamp,
) -> anyhow::Result<(Vec<Posting>, Vec<Minute>)> {
    let rules = Arc::clone(rules);
    let dividing = tokio::task::spawn_blocking(move || {
        let settlement = ledger::settle::settle(&facts.known(&rules), stretch.window, now)?;
        anyhow::Ok((settlement.postings, settlement.minutes))
    });
    dividing.await?.with_context(|| format!("settling {} to {}", stretch.window.start, stretch.window.end))
}

/// Appends postings and the facts that belong to them. All of a minute is written at once, so that no reader sees a part of it.
fn book(store: &Store, mut postings: Vec<Posting>, facts: Vec<Fact>) -> anyhow::Result<()> {
    postings.sort_by_key(|posting| posting.period.start);
    let mut waiting: Vec<Fact> = Vec::new();
    let mut minute = None;
    for posting in postings {
        if minute != Some(posting.period.start) && waiting.len() >= POSTINGS_MAX {
            store.append_all(&std::mem::take(&mut waiting))?;
        }
        minute = Some(posting.period.start);
        waiting.push(Fact::Posting(Box::new(posting)));
    }
    waiting.extend(facts);
    if !waiting.is_empty() {
        store.append_all(&waiting)?;
    }
    Ok(())
}

/// Makes attempts of the calls that spans of `window` tell of and nobody metered, once they are older than `watermark`.
///
/// # Errors
/// When the ledger cannot be read or written.
pub async fn take_calls(
    store: &Store,
    rules: &Rules,
    prices: &PriceBook,
    fresh: &Fresh,
    late: &Late,
    window: Period,
    watermark: Timestamp,
) -> anyhow::Result<u64> {
    let session = store.session().await?;
    let new = Facts::of(fresh);
    let Some(told) = read::spans_time(&session, window).await? else { return Ok(0) };
    let mut booked = 0;
    for hour in late::stretches(told, STRETCH_MINUTES) {
        let spans = read::spans(&session, hour, rules.request_us_max).await?;
        let (Some(start), Some(end)) =
            (spans.iter().map(|span| span.period.start).min(), spans.iter().map(|span| span.period.end).max())
        else {
            continue;
        };
        let around = Period { start, end: end.plus_micros(1) };
        let attempts = read::attempts(&session, around, rules.request_us_max, true).await?;
        let mut engines = read::newest_engines(&session, around).await?;
        engines.extend(new.engines.iter().cloned());
        let told = Told { spans: &spans, attempts: &attempts, running: &fresh.running, engines: &engines };
        let calls = calls_of_spans(&told, watermark, |attempt| charge(prices, attempt));
        let facts: Vec<Fact> = calls.into_iter().map(|call| Fact::Attempt(Box::new(call))).collect();
        if facts.is_empty() {
            continue;
        }
        store.append_all(&facts)?;
        facts.iter().for_each(|fact| late.note(fact));
        booked += u64::try_from(facts.len())?;
    }
    Ok(booked)
}

fn charge(prices: &PriceBook, attempt: &Attempt) -> Charge {
    prices.charge(&PriceQuery {
        provider: &attempt.route.provider,
        model: attempt.route.model().map(|model| &**model),
        operation: attempt.route.operation,
        service_class: attempt.route.service_class,
        usage: &attempt.usage,
        quality: attempt.usage_quality,
        at: attempt.timeline.received_at,
    })
}

/// The minutes of `window` that may have to be settled: those in which there were GPUs, and those in which something is booked.
///
/// # Errors
/// When the ledger cannot be read.
pub async fn minutes_of(session: &Session, window: Period, fresh: &Fresh) -> anyhow::Result<Vec<Period>> {
    let capacity = read::newest_capacity(session, window).await?;
    let new = fresh.facts.iter().filter_map(|fact| match fact {
        Fact::Capacity(fact) => Some(fact.period),
        _ => None,
    });
    let there = capacity.iter().map(|fact| fact.period).chain(new).filter_map(|period| period.intersect(window));
    Ok(late::joined(there.chain(read::booked_minutes(session, window).await?)))
}

impl Facts {
    /// What is fresh, as facts of every stretch.
    fn of(fresh: &Fresh) -> Facts {
        let mut facts = Facts { running: fresh.running.clone(), ..Facts::default() };
        for fact in &fresh.facts {
            match fact {
                Fact::Capacity(fact) => facts.capacity.push(fact.as_ref().clone()),
                Fact::Engine(fact) => facts.engines.push(fact.as_ref().clone()),
                Fact::Job(fact) => facts.jobs.push(fact.as_ref().clone()),
                _ => {}
            }
        }
        facts
    }

    /// Forgets what is known of these pools, so that nothing of theirs is settled.
    fn leave_out(&mut self, pools: &BTreeSet<Label>) {
        self.capacity.retain(|fact| !pools.contains(&fact.pool));
        self.posted.retain(|posting| posting.pool.as_ref().is_none_or(|pool| !pools.contains(pool)));
    }

    fn add(&mut self, fresh: &Facts) {
        self.capacity.extend(fresh.capacity.iter().cloned());
        self.engines.extend(fresh.engines.iter().cloned());
        self.jobs.extend(fresh.jobs.iter().cloned());
        self.running.extend(fresh.running.iter().cloned());
    }
}

#[cfg(test)]
mod tests;
