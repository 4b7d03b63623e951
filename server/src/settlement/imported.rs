//! Pools and engines of time in which only imports tell what ran: there they are taken as the configuration has them.
//!
//! What the ledger knows of GPUs and engines stands. The configuration fills the rest of the time in which a pool has
//! imported requests, each time once: filled time is known from then on, whatever is imported later.

use anyhow::Context as _;
use ledger::settle::{recalibrated, timelines_of};
use ledger::{CapacityFact, EngineFact, Fact, GpuHourRate, Label, Period, Timestamp};
use serde::Serialize;
use store::Session;

use super::read::{self, FIT_ATTEMPTS_MAX, Facts, Stretch};
use super::{Fresh, Rules};
use crate::capacity::Pools;
use crate::config::Loaded;
use crate::engines::Engines;
use crate::rows;

/// GPUs of a pool that are taken as configured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AssumedGpus {
    /// The pool.
    pub pool: Label,
    /// The replica.
    pub replica: Label,
    /// The kind of GPU.
    pub gpu: Label,
    /// How many.
    pub gpus: u32,
    /// The price of one for an hour.
    pub usd_per_gpu_hour: GpuHourRate,
    /// The time for which they are taken.
    pub period: Period,
}

/// An engine that is taken as configured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AssumedEngine {
    /// The engine.
    pub engine: Label,
    /// Its pool.
    pub pool: Label,
    /// Whether its model's dimensions are known; without them its time is divided by tokens.
    pub model_known: bool,
    /// Median error of the constants on requests that they were not fitted to; `None` when they are the data sheet's.
    pub fit_error: Option<f64>,
    /// The time for which it is taken.
    pub period: Period,
}

/// What is assumed, and what cannot be.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Assumed {
    /// GPUs.
    pub gpus: Vec<AssumedGpus>,
    /// Engines.
    pub engines: Vec<AssumedEngine>,
    /// Pools of imported requests that neither the ledger nor the configuration knows, with their requests. Their cost is unknown.
    pub unknown_pools: Vec<(Label, u64)>,
    /// The same as facts.
    #[serde(skip)]
    pub facts: Vec<Fact>,
}

/// The time in which one pool has imported requests.
struct Imports {
    pool: Label,
    attempts: u64,
    period: Period,
}

/// What the configuration says of pools in the part of `window` in which only imports tell what ran. An end of `window` that
/// is given holds for every such pool: its GPUs were there from or until then.
///
/// # Errors
/// When the ledger or a model's `config.json` cannot be read.
pub async fn assumed(
    session: &Session,
    loaded: &Loaded,
    rules: &Rules,
    window: Period,
    now: Timestamp,
) -> anyhow::Result<Assumed> {
    let mut assumed = Assumed::default();
    let capacity = read::newest_capacity(session, Period::ALL).await?;
    let engines = read::newest_engines(session, Period::ALL).await?;
    for Imports { pool, attempts, period } in imports(session, window).await? {
        let known: Vec<Period> = capacity.iter().filter(|fact| fact.pool == pool).map(|fact| fact.period).collect();
        if known.is_empty() && !loaded.config.pool.iter().any(|section| *section.name == *pool) {
            assumed.unknown_pools.push((pool, attempts));
            continue;
        }
        for gap in gaps(period, &known) {
            let facts = Pools::new(loaded, gap.start).observe(gap.end);
            assumed.take_gpus(facts.into_iter().filter(|fact| fact.pool == pool), now);
        }
        for engine in Engines::new(loaded, period.start)?.observe(period.end) {
            if engine.pool != pool {
                continue;
            }
            let known = engines.iter().filter(|fact| fact.engine == engine.engine).map(|fact| fact.period);
            for gap in gaps(period, &known.collect::<Vec<_>>()) {
                // A pool's imports begin when its engines serve.
                let fact = EngineFact { period: gap, ready_at: None, observed_at: now, ..engine.clone() };
                assumed.take_engine(fact);
            }
        }
    }
    assumed.fit(session, loaded, rules, now).await?;
    Ok(assumed)
}

impl Assumed {
    fn take_gpus(&mut self, facts: impl Iterator<Item = CapacityFact>, now: Timestamp) {
        for fact in facts {
            self.gpus.push(AssumedGpus {
                pool: fact.pool.clone(),
                replica: fact.replica.clone(),
                gpu: fact.gpu.clone(),
                gpus: fact.gpus,
                usd_per_gpu_hour: fact.rate,
                period: fact.period,
            });
            self.facts.push(Fact::Capacity(Box::new(CapacityFact { observed_at: now, ..fact })));
        }
    }

    fn take_engine(&mut self, fact: EngineFact) {
        self.engines.push(AssumedEngine {
            engine: fact.engine.clone(),
            pool: fact.pool.clone(),
            model_known: fact.setup.constants.is_some(),
            fit_error: None,
            period: fact.period,
        });
        self.facts.push(Fact::Engine(Box::new(fact)));
    }

    /// Fits each engine's constants to the requests that were imported for it, unless the configuration sets them.
    async fn fit(&mut self, session: &Session, loaded: &Loaded, rules: &Rules, now: Timestamp) -> anyhow::Result<()> {
        let set = |engine: &str| {
            let mut upstreams = loaded.config.upstream.iter();
            let upstream = upstreams.find(|upstream| upstream.name == engine);
            upstream.and_then(|upstream| upstream.engine.as_ref()?.efficiencies).is_some()
        };
        let all = Facts::of(&Fresh { facts: self.facts.clone(), running: Vec::new() });
        for (place, engine) in self.engines.iter_mut().enumerate() {
            if !engine.model_known || set(&engine.engine) {
                continue;
            }
            let load = read::load(session, engine.period).await?;
            let Some(Stretch { window, .. }) = read::cut(engine.period, &load, FIT_ATTEMPTS_MAX).first().copied()
            else {
                continue;
            };
            let mut facts = Facts::read(session, Stretch { window, since: window.start }, rules.request_us_max).await?;
            facts.add(&all);
            let Some(fact) = all.engines.get(place) else { continue };
            let timelines = timelines_of(&facts.known(rules), fact, window);
            let Some(fitted) = recalibrated(fact, &timelines, &facts.readings, now) else { continue };
            engine.fit_error = fitted.setup.error.map(|error| error.median);
            let own = self.facts.iter_mut().filter_map(|fact| match fact {
                Fact::Engine(fact) => Some(fact),
                _ => None,
            });
            if let Some(kept) = own.into_iter().nth(place) {
                kept.setup = fitted.setup;
            }
        }
        Ok(())
    }

    /// What was assumed, a sentence each.
    #[must_use]
    pub fn sentences(&self) -> Vec<String> {
        let gpus = self.gpus.iter().map(|one| {
            format!(
                "pool `{}`: nothing in the ledger says when its GPUs were there; replica `{}` is taken as configured from {} to {}: \
                 {} x {} at {} USD/h",
                one.pool, one.replica, one.period.start, one.period.end, one.gpus, one.gpu, one.usd_per_gpu_hour
            )
        });
        let engines = self.engines.iter().map(|one| {
            let constants = match (one.model_known, one.fit_error) {
                (false, _) => {
                    "its model is unknown, so that its time is divided by tokens; name its `model_config`".to_owned()
                }
                (true, None) => "its constants are those of the data sheet or the configuration".to_owned(),
                (true, Some(error)) => {
                    format!(
                        "its constants are fitted to the imported requests, with a median error of {:.1} %",
                        error * 100.0
                    )
                }
            };
            format!("engine `{}` of pool `{}` is taken as configured for that time; {constants}", one.engine, one.pool)
        });
        let unknown = self.unknown_pools.iter().map(|(pool, attempts)| {
            format!(
                "pool `{pool}` is named by {attempts} imported requests and known nowhere, so that its cost is unknown; describe it in \
                 a [[pool]] of --config"
            )
        });
        gpus.chain(engines).chain(unknown).collect()
    }
}

/// The pools that have imported requests within `window`, and when. Of a pool without any capacity in the ledger all requests
/// count: they cannot have been metered here.
async fn imports(session: &Session, window: Period) -> anyhow::Result<Vec<Imports>> {
    let query = format!(
        "SELECT pool, count(*) AS attempts, CAST(min(received_at) AS BIGINT) AS first, \
         max(CAST(received_at AS BIGINT) + CASE WHEN finished_us > 0 THEN finished_us ELSE 1 END) AS last \
         FROM attempts WHERE pool IS NOT NULL AND {} \
         AND (source LIKE 'import:%' OR pool NOT IN (SELECT pool FROM capacity WHERE pool IS NOT NULL)) GROUP BY pool ORDER BY pool",
        rows::within("received_at", window)
    );
    let mut found = Vec::new();
    for batch in session.sql(&query).await? {
        let column = |name| rows::column(&batch, name);
        let [pools, attempts, first, last] = [column("pool")?, column("attempts")?, column("first")?, column("last")?];
        for row in 0..batch.num_rows() {
            let moment = |column| anyhow::Ok(Timestamp::from_micros(rows::plain(column, row)?.parse()?));
            let all = Period::ALL;
            let start = if window.start == all.start { moment(first)? } else { window.start };
            let end = if window.end == all.end { moment(last)? } else { window.end };
            let attempts = rows::count(attempts, row)?.context("a count that is none")?;
            found.push(Imports { pool: rows::plain(pools, row)?.into(), attempts, period: Period { start, end } });
        }
    }
    Ok(found)
}

/// The parts of `whole` that no period of `known` covers.
fn gaps(whole: Period, known: &[Period]) -> Vec<Period> {
    let mut known: Vec<Period> = known.iter().filter_map(|period| period.intersect(whole)).collect();
    known.sort_by_key(|period| (period.start, period.end));
    let (mut gaps, mut upto) = (Vec::new(), whole.start);
    for period in known {
        if period.start > upto {
            gaps.push(Period { start: upto, end: period.start });
        }
        upto = upto.max(period.end);
    }
    if upto < whole.end {
        gaps.push(Period { start: upto, end: whole.end });
    }
    gaps
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn period(start: i64, end: i64) -> Period {
        Period { start: Timestamp::from_micros(start), end: Timestamp::from_micros(end) }
    }

    #[test]
    fn only_what_nothing_covers_is_filled() {
        assert_eq!(gaps(period(0, 100), &[]), [period(0, 100)]);
        assert_eq!(gaps(period(0, 100), &[period(40, 60), period(90, 200)]), [period(0, 40), period(60, 90)]);
        assert_eq!(gaps(period(0, 100), &[period(-5, 200)]), []);
    }

    proptest! {
        #[test]
        fn gaps_and_what_is_known_cover_all_and_never_overlap(known in prop::collection::vec((0i64..60, 1i64..20), 0..8)) {
            let known: Vec<Period> = known.iter().map(|&(start, length)| period(start, start + length)).collect();
            let gaps = gaps(period(10, 50), &known);
            for at in (0..70).map(Timestamp::from_micros) {
                let covered = known.iter().any(|one| one.contains(at));
                let filled = gaps.iter().filter(|one| one.contains(at)).count();
                prop_assert_eq!(filled, usize::from(period(10, 50).contains(at) && !covered));
            }
        }
    }
}
