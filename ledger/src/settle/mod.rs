//! Settling pools minute by minute: facts of a stretch of time in, the postings that are missing out.
//!
//! A minute of a pool is always computed from all its facts, and what differs from the books is booked: the first time
//! that is all of it, later it is a correction. So facts may come late, twice, in any order or not at all, and the books
//! that many settlements leave are those that one would have left that knew everything.

mod calls;
mod counted;
#[cfg(test)]
mod fixtures;
mod gather;
mod minutes;
mod peaks;
mod ran;
mod recalibrate;
mod spans;

use std::collections::{BTreeMap, BTreeSet};

pub use calls::{Told, calls_of_spans};
pub use minutes::{INTERVAL_US, cost_by_minute, interval_of, pool_cost};
pub use peaks::demand_of;
pub use ran::{Ran, timeline_of, timeline_of_running};
pub use recalibrate::{recalibrated, timelines_of};

use crate::allocate::counters::Counted;
use crate::allocate::policy::{HeadroomRule, Policy};
use crate::allocate::pool::{Demand, Engine, Facts, Served, allocate, corrections};
use crate::allocate::quality::EngineSample;
use crate::attempt::{Attempt, Running};
use crate::capacity::{CapacityFact, PurchaseOption};
use crate::context::Label;
use crate::id::PostingId;
use crate::money::{Money, MoneyError};
use crate::posting::{Line, Origin, Posting, Tier};
use crate::telemetry::{CallSpan, EngineFact, EngineReading, EngineStep, JobFact};
use crate::time::{Period, Timestamp};
use gather::{MinuteFacts, PoolFacts, gather};

/// How long before a window facts should be known: what bypassed the gateway is counted from the last moment at which its
/// engine was quiet.
pub const LOOK_BACK_US: i64 = 3_600_000_000;

/// Everything known of a stretch of time, in any order. Of two facts with the same identity the later observation holds.
#[derive(Debug, Clone, Copy)]
pub struct Known<'a> {
    /// The pools' GPUs.
    pub capacity: &'a [CapacityFact],
    /// The engines on them.
    pub engines: &'a [EngineFact],
    /// Attempts that ended.
    pub attempts: &'a [Attempt],
    /// Attempts that run.
    pub running: &'a [Running],
    /// What applications and engines told of calls.
    pub spans: &'a [CallSpan],
    /// What engines showed.
    pub readings: &'a [EngineReading],
    /// Their steps.
    pub steps: &'a [EngineStep],
    /// Work that is no request.
    pub jobs: &'a [JobFact],
    /// Every posting of the pools' minutes so far.
    pub posted: &'a [Posting],
    /// The rules of each pool; one that is missing has the default ones.
    pub policies: &'a BTreeMap<Label, PoolPolicy>,
    /// Peaks and who makes them, where they are known from a longer time than this one.
    pub demand: &'a BTreeMap<Label, Demand>,
}

/// The rules of a pool.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PoolPolicy {
    /// How it is allocated.
    pub policy: Policy,
    /// The peak that it is kept for, in GPUs.
    pub peak_gpus: Option<f64>,
}

/// What has to be booked, and what it was made of.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Settlement {
    /// New postings and corrections of those that are there.
    pub postings: Vec<Posting>,
    /// The minutes that were looked at, by pool and time.
    pub minutes: Vec<Minute>,
}

/// One settled minute of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Minute {
    /// The pool.
    pub pool: Label,
    /// The whole minute.
    pub period: Period,
    /// What the pool cost in it, as far as its capacity is known.
    pub cost: Money,
    /// How much was known: the least of all its requests. `None` without requests.
    pub tier: Option<Tier>,
    /// How well the reconstruction follows the engines' own series, in millionths: the worst of its requests.
    pub quality: Option<u32>,
    /// Requests that pay in it.
    pub requests: usize,
    /// Whether something was booked before that is now corrected.
    pub corrected: bool,
    /// Whether some of its work bypassed the gateway.
    pub unobserved: bool,
}

/// What has to be booked of every minute that `window` touches. A minute that the window's end cuts is settled as far as
/// capacity reaches, and corrected later.
///
/// Deterministic: the same facts and the same books give the same postings, ids included.
///
/// # Errors
/// [`MoneyError`] when an amount leaves the range of the ledger.
pub fn settle(known: &Known<'_>, window: Period, now: Timestamp) -> Result<Settlement, MoneyError> {
    let start = if window.start == Period::ALL.start { window.start } else { interval_of(window.start).start };
    let window = Period { start, ..window };
    let mut settlement = Settlement::default();
    for (pool, facts) in &gather(known, window) {
        let rules = known.policies.get(*pool).copied().unwrap_or_default();
        let demand = demand(known, pool, facts, rules);
        for (start, minute) in &facts.minutes {
            let period = interval_of(*start);
            let settled = SettledMinute { pool, period, pool_facts: facts, facts: minute };
            let after = settled.postings(&rules.policy, &demand, now)?;
            let missing = missing(&minute.posted, &after);
            settlement.minutes.push(settled.summary(&after, &missing));
            settlement.postings.extend(missing);
        }
    }
    Ok(settlement)
}

/// The pool's demand: as given, else as its policy needs it.
fn demand(known: &Known<'_>, pool: &Label, facts: &PoolFacts<'_>, rules: PoolPolicy) -> Demand {
    let mut demand = known.demand.get(pool).cloned().unwrap_or_default();
    if demand.headroom.is_empty() && rules.policy.headroom == HeadroomRule::Airport {
        let own = peaks::demand(facts, facts.minutes.keys().copied());
        demand = Demand { peak_gpus: demand.peak_gpus.or(rules.peak_gpus).or(own.peak_gpus), ..own };
    }
    Demand { peak_gpus: demand.peak_gpus.or(rules.peak_gpus), ..demand }
}

/// One minute of one pool with all that is known of it.
struct SettledMinute<'a> {
    pool: &'a Label,
    period: Period,
    pool_facts: &'a PoolFacts<'a>,
    facts: &'a MinuteFacts<'a>,
}

impl SettledMinute<'_> {
    /// The postings that the minute should have.
    fn postings(&self, policy: &Policy, demand: &Demand, now: Timestamp) -> Result<Vec<Posting>, MoneyError> {
        let served: Vec<Served> =
            self.facts.served.iter().map(|&place| self.pool_facts.served[place].clone()).collect();
        let engines = self.engines(&served);
        let jobs: Vec<JobFact> = self.facts.jobs.iter().map(|&fact| fact.clone()).collect();
        let nothing_known = engines.is_empty() && jobs.is_empty();
        // GPUs that nobody reserved and of which nothing is known were used by somebody: their cost stays a line.
        let (allocated, unknown): (Vec<&CapacityFact>, Vec<&CapacityFact>) =
            self.facts.capacity.iter().partition(|fact| !nothing_known || is_kept(fact));
        let capacity: Vec<CapacityFact> = allocated.into_iter().cloned().collect();
        let facts = Facts { capacity: &capacity, engines: &engines, served: &served, jobs: &jobs, demand };
        let mut postings = allocate(self.pool, self.period, facts, policy, now)?;
        let open = pool_cost(&unknown, self.pool, self.period);
        if open != Money::ZERO {
            let origin = Origin::Pool { pool: self.pool.clone(), start: self.period.start };
            postings.push(minutes::posting(origin, self.pool, self.period, open, Money::ZERO, now));
        }
        Ok(postings)
    }

    /// The engines of the minute: those that are known to have run, and those that served.
    fn engines(&self, served: &[Served]) -> Vec<Engine> {
        let serving: BTreeSet<&str> = served.iter().map(|one| &*one.engine).collect();
        let known = self.pool_facts.engines.keys().filter_map(|name| {
            let fact = self.pool_facts.in_force(name, self.period, serving.contains(name))?;
            Some(self.engine(fact, serving.contains(&**name)))
        });
        let unknown = serving.iter().filter(|name| !self.pool_facts.engines.contains_key(*name));
        known.chain(unknown.filter_map(|name| self.engine_without_fact(name))).collect()
    }

    fn engine(&self, fact: &EngineFact, serving: bool) -> Engine {
        let setup = &fact.setup;
        let steps = self.facts.steps.iter().filter(|step| step.engine == fact.engine);
        Engine {
            name: fact.engine.clone(),
            replica: self.replica(&fact.replica, serving),
            model: fact.model.clone(),
            constants: setup.constants,
            limits: setup.limits,
            slice: setup.slice,
            speculation: setup.speculation,
            ready_at: fact.ready_at,
            kept_warm_for: fact.warm_for.clone(),
            unobserved: self.unobserved(&fact.engine),
            samples: self.samples(&fact.engine),
            steps: steps.map(|&step| step.clone()).collect(),
        }
    }

    /// An engine of which nothing is known but that it served: on the only replica there is, or on the one of its name.
    fn engine_without_fact(&self, name: &str) -> Option<Engine> {
        let mut replicas: BTreeSet<&Label> = self.facts.capacity.iter().map(|fact| &fact.replica).collect();
        if replicas.len() > 1 {
            replicas.retain(|replica| &***replica == name);
        }
        let replica = replicas.first()?;
        let fact = EngineFact { engine: name.into(), replica: (*replica).clone(), ..EngineFact::default() };
        Some(self.engine(&fact, true))
    }

    /// The replica whose GPUs the engine uses. One that served ran somewhere: where nobody knows its replica it was the
    /// minute's only one.
    fn replica(&self, named: &Label, serving: bool) -> Label {
        let mut replicas: BTreeSet<&Label> = self.facts.capacity.iter().map(|fact| &fact.replica).collect();
        let unknown = serving && !self.pool_facts.replicas.contains(named);
        let only = replicas.pop_first().filter(|_| unknown && replicas.is_empty());
        only.unwrap_or(named).clone()
    }

    fn unobserved(&self, engine: &str) -> Option<Counted> {
        self.pool_facts.unobserved.get(engine)?.within(self.period)
    }

    /// What the engine said of itself in the minute.
    fn samples(&self, engine: &str) -> Vec<EngineSample> {
        let Some(readings) = self.pool_facts.readings.get(engine) else { return Vec::new() };
        let from = readings.partition_point(|reading| reading.at < self.period.start);
        let until = readings.partition_point(|reading| reading.at < self.period.end);
        let mut samples: Vec<EngineSample> =
            readings[from..until].iter().filter_map(|reading| sample(reading, self.period.start)).collect();
        samples.dedup_by(|later, kept| later.at_s == kept.at_s);
        samples
    }

    fn summary(&self, after: &[Posting], missing: &[Posting]) -> Minute {
        let requests = || after.iter().filter(|posting| posting.line == Line::Request);
        let unobserved = after.iter().any(|posting| posting.line == Line::Unobserved);
        Minute {
            pool: self.pool.clone(),
            period: self.period,
            cost: pool_cost(&self.facts.capacity, self.pool, self.period),
            tier: requests().filter_map(|posting| posting.tier).max(),
            quality: requests().filter_map(|posting| posting.basis?.quality).min(),
            requests: requests().filter_map(|posting| posting.attempt).collect::<BTreeSet<_>>().len(),
            corrected: !self.facts.posted.is_empty() && !missing.is_empty(),
            unobserved,
        }
    }
}

fn is_kept(fact: &CapacityFact) -> bool {
    matches!(fact.purchase, PurchaseOption::Reserved | PurchaseOption::Owned)
}

/// What an engine said of its batch; `None` when it said nothing of it.
fn sample(reading: &EngineReading, base: Timestamp) -> Option<EngineSample> {
    let sample = EngineSample {
        at_s: (reading.at.micros() - base.micros()) as f64 * 1e-6,
        running: reading.running.map(f64::from),
        waiting: reading.waiting.map(f64::from),
        kv_used: reading.kv_used.map(|millionths| f64::from(millionths) * 1e-6),
    };
    (sample.running.is_some() || sample.waiting.is_some() || sample.kv_used.is_some()).then_some(sample)
}

/// What has to be booked so that the `posted` rows become `after`.
fn missing(posted: &[&Posting], after: &[Posting]) -> Vec<Posting> {
    // The same posting may be told twice.
    let mut before: BTreeMap<PostingId, &Posting> = BTreeMap::new();
    for &posting in posted {
        before.entry(posting.id).or_insert(posting);
    }
    let rows: Vec<Posting> = before.values().map(|&posting| posting.clone()).collect();
    let mut missing = corrections(&rows, after);
    for posting in &mut missing {
        // An amount that went and came back is booked under another id than the first time.
        while before.contains_key(&posting.id) {
            let bytes = posting.id.uuid().into_bytes().into_iter().chain(rows.len().to_be_bytes());
            let mut random = [0; 10];
            random.copy_from_slice(&minutes::hash(bytes).to_be_bytes()[6..]);
            posting.id = PostingId::new(posting.period.start, random);
        }
    }
    missing
}

#[cfg(test)]
mod tests;
