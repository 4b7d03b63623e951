//! One interval of one pool: capacity and requests in, postings out that add up to the interval's cost exactly.
//!
//! A pure function of its facts. They may come late, twice, in any order or not at all; the same facts always give the
//! same postings, ids included, and facts that come later give [`corrections`], never changed rows.
//!
//! The GPUs of each capacity fact are divided among those that work on them (engines and jobs; slices apart), an engine's
//! part among its requests, and what is left goes down the idle waterfall. Money and GPU time are divided by the same
//! weights, each by largest remainder, so that both add up: the postings' GPU time is that of the pool to the microsecond.

use std::collections::BTreeMap;

pub use super::adjust::corrections;
use super::books::{Amount, Books, Found, Key, weight};
use super::colocated::MigSlice;
use super::counters::Counted;
use super::idle::Idle;
use super::parties::{Cast, Standing, together};
use super::policy::Policy;
use super::quality::EngineSample;
use super::replica::Replica;
use super::timeline::{EngineTimeline, Limits};
use crate::capacity::{CapacityFact, latest};
use crate::context::{Context, Label};
use crate::id::AttemptId;
use crate::money::MoneyError;
use crate::posting::{Line, Posting};
use crate::telemetry::{Adapter, EngineStep, JobFact, Speculation};
use crate::time::{Period, Timestamp};

/// One request that an engine of the pool served.
#[derive(Debug, Clone, PartialEq)]
pub struct Served {
    /// The attempt. A later observation of the same attempt replaces an earlier one.
    pub attempt: AttemptId,
    /// Who caused it.
    pub context: Context,
    /// The engine that served it, as in [`Engine::name`].
    pub engine: Label,
    /// When it ran; of one that still runs, its progress so far. Under [`Known::Counts`] only `arrived` and the tokens mean
    /// anything.
    pub timeline: EngineTimeline,
    /// What of the timeline is known.
    pub known: Known,
    /// The adapter that its tokens passed through.
    pub adapter: Option<Adapter>,
    /// Whether any part of the timeline is a guess.
    pub estimated: bool,
    /// When this was observed; the latest observation wins.
    pub observed_at: Timestamp,
}

/// What is known of one request's time on its engine.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Known {
    /// When it was scheduled and when its first and last tokens were there.
    #[default]
    Timeline,
    /// When it arrived and its tokens, as an import without times has them. All of it counts in the interval of its
    /// arrival.
    Counts,
}

/// One engine process: what it runs, and on whose GPUs.
#[derive(Debug, Clone, PartialEq)]
pub struct Engine {
    /// Its name.
    pub name: Label,
    /// The replica of the capacity facts whose GPUs it uses. Engines on the same replica are time-sliced.
    pub replica: Label,
    /// The model it serves.
    pub model: Option<Label>,
    /// The step-time model with its constants. Without one, time is divided by weighted tokens and the postings say so.
    pub constants: Option<Replica>,
    /// What it can hold.
    pub limits: Limits,
    /// The slice of each GPU that it has to itself; engines without one share the whole GPU by time.
    pub slice: Option<MigSlice>,
    /// How many tokens it drafts and accepts in a step, when it speculates.
    pub speculation: Option<Speculation>,
    /// When it could serve; what its GPUs cost before is cold start. Unknown: it always could.
    pub ready_at: Option<Timestamp>,
    /// Whose objective keeps it running whatever the demand; its idle time is warm.
    pub kept_warm_for: Option<Context>,
    /// What it counted in the interval less what was metered: what bypassed the gateway. `None` when its counters are not
    /// known.
    pub unobserved: Option<Counted>,
    /// What it said of itself in the interval, `at_s` in seconds from the interval's start.
    pub samples: Vec<EngineSample>,
    /// Its steps that touch the interval; where they cover it, time is divided step by step.
    pub steps: Vec<EngineStep>,
}

/// What is known of a pool beside its capacity and its requests.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Demand {
    /// The peak that the pool is kept for, in GPUs.
    pub peak_gpus: Option<f64>,
    /// What each consumer owes of the headroom, by the airport game over the pool's horizon (in any unit).
    pub headroom: Vec<(Context, f64)>,
}

/// All facts that an allocation reads. Those of other pools and other times change nothing.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// The GPUs and what they cost.
    pub capacity: &'a [CapacityFact],
    /// The engines on them.
    pub engines: &'a [Engine],
    /// What the engines served.
    pub served: &'a [Served],
    /// The work on the same GPUs that is no request.
    pub jobs: &'a [JobFact],
    /// The pool's peak and who makes it.
    pub demand: &'a Demand,
}

/// Allocates what `pool` cost within `period`.
///
/// # Errors
/// [`MoneyError`] when the amounts leave the range of the ledger.
pub fn allocate(
    pool: &Label,
    period: Period,
    facts: Facts<'_>,
    policy: &Policy,
    booked_at: Timestamp,
) -> Result<Vec<Posting>, MoneyError> {
    let Facts { capacity, engines, served, jobs, demand } = facts;
    let served = latest_served(served);
    let jobs = latest_jobs(jobs, pool);
    let mut books = Books::of(&served);
    let mut capacity = latest(capacity);
    capacity.retain(|fact| fact.pool == *pool && fact.period.intersect(period).is_some());
    let owner = Context { team: capacity.iter().find_map(|fact| fact.owner.clone()), ..Context::default() };
    let cast = Cast::of(engines, &served, &jobs, &owner, (&capacity, period));
    let mut idle = Idle::default();
    let mut left_idle: Vec<(Standing, Amount, Found)> = Vec::new();

    // Capacity facts of one replica (it grew, or was restarted) are handled one after the other.
    for fact in &capacity {
        let Some(span) = fact.period.intersect(period) else { continue };
        let micros = i64::try_from(span.micros()).unwrap_or(i64::MAX);
        let whole = Amount { money: fact.cost_within(period), gpu_us: micros.saturating_mul(i64::from(fact.gpus)) };
        for (part, amount) in together(&cast, fact, whole)? {
            let used = part.used(&cast, fact, span, policy);
            let gpus = f64::from(fact.gpus) * part.size;
            idle.busy += gpus * used.busy_s;
            match &part.standing {
                Standing::WithoutEngine => idle.without_engine_reserved += gpus * used.idle_s,
                Standing::Warm(_) => idle.standby += gpus * used.idle_s,
                Standing::Open => idle.other += gpus * used.idle_s,
                Standing::Stranded => {}
            }
            let found = used.found();
            left_idle.push((part.standing, used.book(&cast, amount, &mut books)?, found));
        }
    }

    idle.peak = demand.peak_gpus.map(|gpus| gpus * covered_s(&capacity, period));
    let waterfall = idle.waterfall();
    for (standing, amount, found) in left_idle {
        match standing {
            Standing::WithoutEngine => books.line(Key::line(Line::IdleReserved, &owner), amount, found),
            Standing::Warm(context) => books.line(Key::line(Line::Warm, &context), amount, found),
            Standing::Stranded => books.line(Key::line(Line::Stranded, &owner), amount, found),
            Standing::Open => {
                let parts = amount.split_or_last(&[waterfall.headroom, waterfall.above_peak].map(weight))?;
                books.line(Key::line(Line::IdleReserved, &owner), parts[1], found);
                books.headroom(parts[0], demand, policy.headroom, &owner, found)?;
            }
        }
    }
    Ok(books.postings(pool, period, policy, booked_at))
}

/// Seconds of `period` in which the pool had any GPU.
fn covered_s(capacity: &[&CapacityFact], period: Period) -> f64 {
    let mut spans: Vec<Period> = capacity.iter().filter_map(|fact| fact.period.intersect(period)).collect();
    spans.sort_by_key(|span| span.start);
    let (mut covered_us, mut until) = (0, period.start);
    for span in spans {
        covered_us += span.end.micros_since(span.start.max(until));
        until = until.max(span.end);
    }
    covered_us as f64 * 1e-6
}

/// The latest observation of each attempt, in the order of attempts.
fn latest_served(served: &[Served]) -> Vec<&Served> {
    let mut kept: BTreeMap<AttemptId, &Served> = BTreeMap::new();
    for one in served {
        let rank = |one: &Served| (one.observed_at, one.timeline.last_token, one.timeline.output_tokens);
        let newest = kept.entry(one.attempt).or_insert(one);
        if rank(one) > rank(newest) {
            *newest = one;
        }
    }
    kept.into_values().collect()
}

/// The latest observation of each job of the pool.
fn latest_jobs<'a>(jobs: &'a [JobFact], pool: &Label) -> Vec<&'a JobFact> {
    let mut kept: BTreeMap<(&str, &str, Timestamp), &JobFact> = BTreeMap::new();
    for job in jobs.iter().filter(|job| job.pool == *pool) {
        let rank = |job: &JobFact| (job.observed_at, job.period.end, job.share);
        let newest = kept.entry(job.identity()).or_insert(job);
        if rank(job) > rank(newest) {
            *newest = job;
        }
    }
    kept.into_values().collect()
}

#[cfg(test)]
#[path = "pool_tests.rs"]
mod tests;
