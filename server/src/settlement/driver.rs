//! Settlement while the server runs: every minute behind the watermark, late minutes again, constants fitted anew.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use ledger::price::PriceBook;
use ledger::settle::{interval_of, recalibrated, timelines_of};
use ledger::{Clock, EngineFact, Fact, Label, Period, Running, Timestamp};
use store::Store;
use tokio::sync::{mpsc, oneshot};

use super::read::{self, FIT_ATTEMPTS_MAX, Facts};
use super::{Demands, Fresh, Late, Rules, Settled, late, minutes_of, settle, take_calls};
use crate::wiring::Shutdown;

/// How often it is looked whether a minute is due.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long to wait after a settlement that failed.
const RETRY_AFTER_US: i64 = 10_000_000;
/// How long after the start constants are first fitted. The wait doubles from one fit to the next, because data sheets are far off
/// and little traffic is better than none, until it is an hour.
const FIRST_FIT_US: i64 = 60_000_000;
const FIT_EVERY_US: i64 = 3_600_000_000;
/// How far back spans are looked at for calls that nobody metered.
const SPANS_BACK_US: i64 = 3_600_000_000;

/// What the driver asks the rest of the server for.
pub struct Sources {
    /// Attempts that have not ended, as far as they got.
    pub running: Box<dyn Fn() -> Vec<Running> + Send + Sync>,
    /// Capacity, engines and jobs as they have grown until now.
    pub observe: Box<dyn Fn(Timestamp) -> Vec<Fact> + Send + Sync>,
    /// Takes new constants of an engine.
    pub recalibrate: Box<dyn Fn(EngineFact) + Send + Sync>,
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sources").finish_non_exhaustive()
    }
}

/// What settles, and how far it is.
#[derive(Debug)]
pub struct Driver {
    store: Store,
    rules: Arc<ArcSwap<Rules>>,
    prices: Arc<ArcSwap<PriceBook>>,
    sources: Sources,
    late: Late,
    /// The first minute that has not been settled; `None` before the first settlement.
    line: Option<Timestamp>,
    /// Pools of earlier runs that stay as they are booked, unless the configuration names them again.
    left_out: BTreeSet<Label>,
    /// Facts that were observed and could not be written yet.
    unwritten: Vec<Fact>,
    demands: Demands,
    not_before: Timestamp,
    next_fit: Option<Timestamp>,
    fit_after_us: i64,
}

/// Up to where a settlement goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Until {
    /// The watermark: minutes that had time to hear of late facts.
    Watermark,
    /// This very moment. What is settled ahead of the watermark is settled once more behind it.
    Now,
}

impl Driver {
    /// A driver that has not settled anything yet. `late` hears of every fact that is appended.
    #[must_use]
    pub fn new(
        store: Store,
        rules: Arc<ArcSwap<Rules>>,
        prices: Arc<ArcSwap<PriceBook>>,
        sources: Sources,
        late: Late,
    ) -> Driver {
        Driver {
            store,
            rules,
            prices,
            sources,
            late,
            line: None,
            left_out: BTreeSet::new(),
            unwritten: Vec::new(),
            demands: Demands::default(),
            not_before: Timestamp::default(),
            next_fit: None,
            fit_after_us: FIRST_FIT_US,
        }
    }

    pub(super) fn is_due(&self, now: Timestamp) -> bool {
        let watermark = interval_of(now.plus_micros(-self.rules.load().lag_us)).start;
        now >= self.not_before && self.line.is_none_or(|line| line < watermark)
    }

    /// Settles what is due. An error changes nothing: the same minutes are due again.
    pub(super) async fn settle(&mut self, until: Until, now: Timestamp) -> anyhow::Result<Settled> {
        // A configuration that is read again in between holds from the next settlement on.
        let rules = self.rules.load_full();
        let watermark = now.plus_micros(-rules.lag_us);
        let line = interval_of(watermark).start;
        // Running attempts come before any view of the ledger: one that ends in between is then in both, and not in neither.
        let running = (self.sources.running)();
        let mut fresh = Fresh { facts: self.observed(now), running };
        fresh.facts.iter().for_each(|fact| self.late.note(fact));
        let rules = self.rules_for(Rules::clone(&rules), &fresh).await?;
        let prices = self.prices.load_full();
        let told = Period { start: now.plus_micros(-SPANS_BACK_US), end: now };
        let calls = take_calls(&self.store, &rules, &prices, &fresh, &self.late, told, watermark).await?;

        let mut dirty = self.late.take(line);
        let end = match until {
            Until::Watermark => line,
            Until::Now => interval_of(now).end,
        };
        let outcome = async {
            match self.line {
                Some(line) => dirty.push(Period { start: line, end }),
                None => dirty.extend(self.left_open(&rules, &fresh, now, end).await?),
            }
            dirty = late::joined(dirty.drain(..));
            if dirty.is_empty() {
                // What was observed is written all the same, so that a crash does not lose it.
                if !fresh.facts.is_empty() {
                    self.store.append_all(&std::mem::take(&mut fresh.facts))?;
                }
                return Ok(Settled::default());
            }
            settle(&self.store, &rules, &dirty, fresh, &mut self.demands, now, &indicatif::ProgressBar::hidden()).await
        }
        .await;
        match outcome {
            Ok(settled) => {
                self.unwritten.clear();
                self.line = self.line.max(Some(line));
                Ok(Settled { calls, ..settled })
            }
            Err(error) => {
                self.late.put_back(&dirty);
                Err(error)
            }
        }
    }

    #[cfg(test)]
    pub(super) fn sources_observe_nothing(&mut self) {
        self.sources.observe = Box::new(|_| Vec::new());
    }

    #[cfg(test)]
    pub(super) fn set_rules(&mut self, rules: Rules) {
        self.rules.store(Arc::new(rules));
    }

    /// What has grown, in place of what was observed of the same before and could not be written.
    fn observed(&mut self, now: Timestamp) -> Vec<Fact> {
        let observed = (self.sources.observe)(now);
        self.unwritten.retain(|old| !observed.iter().any(|new| late::same_thing(old, new)));
        self.unwritten.extend(observed);
        self.unwritten.clone()
    }

    /// The rules for this ledger: pools of earlier runs that nobody knows any more stay as they are booked.
    async fn rules_for(&mut self, rules: Rules, fresh: &Fresh) -> anyhow::Result<Arc<Rules>> {
        if self.line.is_none() {
            let rules = rules.for_ledger(&self.store.session().await?, fresh).await?;
            self.left_out.clone_from(&rules.left_out);
            return Ok(Arc::new(rules));
        }
        Ok(Arc::new(rules.without(self.left_out.iter().cloned(), fresh)))
    }

    /// What an earlier run left open, and everything that it may have settled too early.
    async fn left_open(
        &self,
        rules: &Rules,
        fresh: &Fresh,
        now: Timestamp,
        end: Timestamp,
    ) -> anyhow::Result<Vec<Period>> {
        let session = self.store.session().await?;
        let back = now.plus_micros(-rules.look_back_us);
        let start = read::newest_settled(&session).await?.map_or(Period::ALL.start, |newest| newest.min(back));
        minutes_of(&session, Period { start, end }, fresh).await
    }

    /// Fits the constants of every engine to what it did in the last hour, and takes those that are better.
    async fn fit(&mut self, now: Timestamp) -> anyhow::Result<()> {
        let rules = self.rules.load_full();
        let hour = Period { start: now.plus_micros(-FIT_EVERY_US), end: now };
        let session = self.store.session().await?;
        let load = read::load(&session, hour).await?;
        // The newest stretch that fits memory is the one whose constants matter.
        let Some(newest) = read::cut(hour, &load, FIT_ATTEMPTS_MAX).pop() else { return Ok(()) };
        let within = Period { start: newest.since.max(hour.start), end: now };
        let stretch = read::Stretch { window: within, since: within.start };
        let facts = Facts::read(&session, stretch, rules.request_us_max).await?;
        // What was observed is kept for the next settlement, which appends it.
        let engines: Vec<EngineFact> = self
            .observed(now)
            .into_iter()
            .filter_map(|fact| match fact {
                Fact::Engine(engine) if engine.period.contains(now.plus_micros(-1)) => Some(*engine),
                _ => None,
            })
            .collect();
        let fitted = tokio::task::spawn_blocking(move || {
            let known = facts.known(&rules);
            let new =
                |engine: &EngineFact| recalibrated(engine, &timelines_of(&known, engine, within), &facts.readings, now);
            engines.iter().filter_map(new).collect::<Vec<EngineFact>>()
        });
        for engine in fitted.await? {
            tracing::info!(engine = %engine.engine, from = %engine.period.start, error = ?engine.setup.error, "new constants");
            (self.sources.recalibrate)(engine);
        }
        Ok(())
    }
}

/// Settles until told to stop, and then once more as far as everything went. `orders` ask for a settlement at once.
pub async fn keep(
    mut driver: Driver,
    clock: Arc<dyn Clock>,
    mut orders: mpsc::Receiver<oneshot::Sender<()>>,
    shutdown: Shutdown,
) {
    let mut looks = tokio::time::interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shutdown.requested() => break,
            Some(done) = orders.recv() => {
                let now = clock.now();
                driver.attempt(Until::Now, now).await;
                if let Err(error) = driver.store.flush(now).await {
                    tracing::error!("flush: {error:#}");
                }
                let _ = done.send(());
            }
            _ = looks.tick() => {
                let now = clock.now();
                if driver.is_due(now) {
                    driver.attempt(Until::Watermark, now).await;
                }
                driver.fit_when_due(now).await;
            }
        }
    }
    // The minute that runs is settled as far as it went; should the server start again within it, the rest follows.
    driver.attempt(Until::Now, clock.now()).await;
}

impl Driver {
    /// Settles; what fails is said and tried again later.
    async fn attempt(&mut self, until: Until, now: Timestamp) {
        match self.settle(until, now).await {
            Ok(settled) if settled.calls > 0 => {
                tracing::info!(calls = settled.calls, "spans told of calls that nobody metered");
            }
            Ok(_) => {}
            Err(error) => {
                self.not_before = now.plus_micros(RETRY_AFTER_US);
                tracing::error!("settling: {error:#}");
            }
        }
    }

    async fn fit_when_due(&mut self, now: Timestamp) {
        let due = *self.next_fit.get_or_insert(now.plus_micros(FIRST_FIT_US));
        if now < due {
            return;
        }
        self.next_fit = Some(now.plus_micros(self.fit_after_us));
        self.fit_after_us = (2 * self.fit_after_us).min(FIT_EVERY_US);
        if let Err(error) = self.fit(now).await {
            tracing::error!("fitting the engines' constants: {error:#}");
        }
    }
}
