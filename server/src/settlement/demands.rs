//! Who makes a pool's peak, over the day before each hour: what the airport game divides headroom by.

use std::collections::BTreeMap;

use ledger::allocate::policy::HeadroomRule;
use ledger::allocate::pool::Demand;
use ledger::settle::demand_of;
use ledger::{Label, Period, Timestamp};
use store::Session;

use super::Rules;
use super::read::{self, ATTEMPTS_MAX, Facts, Stretch};

const HOUR_US: i64 = 3_600_000_000;
/// The horizon: a day and a night.
const HORIZON_US: i64 = 24 * HOUR_US;
/// Hours whose demand is remembered.
const HOURS_MAX: usize = 8;

/// Demands by hour. What an hour's headroom is divided by stays the same while it is remembered, however often its minutes are
/// settled.
#[derive(Debug, Default)]
pub struct Demands(BTreeMap<Timestamp, BTreeMap<Label, Demand>>);

impl Demands {
    /// The demand of every pool with the airport rule over the day before the hour that `at` lies in. Of a day that does not fit
    /// memory the latest part is looked at. A pool that was not used then has none here.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub async fn of(
        &mut self,
        session: &Session,
        rules: &Rules,
        at: Timestamp,
    ) -> anyhow::Result<BTreeMap<Label, Demand>> {
        let airport = rules.policies.iter().filter(|(_, rules)| rules.policy.headroom == HeadroomRule::Airport);
        let pools: Vec<Label> = airport.map(|(pool, _)| pool.clone()).collect();
        if pools.is_empty() {
            return Ok(BTreeMap::new());
        }
        let hour = Timestamp::from_micros(at.micros().div_euclid(HOUR_US).saturating_mul(HOUR_US));
        if let Some(known) = self.0.get(&hour) {
            return Ok(known.clone());
        }
        let day = Period { start: hour.plus_micros(-HORIZON_US), end: hour };
        let load = read::load(session, day).await?;
        let Some(latest) = read::cut(day, &load, ATTEMPTS_MAX).pop() else { return Ok(BTreeMap::new()) };
        let horizon = Period { start: latest.since.max(day.start).min(latest.window.start), end: hour };
        let stretch = Stretch { window: horizon, since: horizon.start };
        let facts = Facts::read(session, stretch, rules.request_us_max).await?;
        let rules = rules.clone();
        let found = tokio::task::spawn_blocking(move || {
            let known = facts.known(&rules);
            let demand = |pool: Label| (demand_of(&known, &pool, horizon), pool);
            let demands = pools.into_iter().map(demand).filter(|(demand, _)| !demand.headroom.is_empty());
            demands.map(|(demand, pool)| (pool, demand)).collect::<BTreeMap<Label, Demand>>()
        });
        let found = found.await?;
        while self.0.len() >= HOURS_MAX {
            self.0.pop_first();
        }
        self.0.insert(hour, found.clone());
        Ok(found)
    }
}
