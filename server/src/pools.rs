//! GPU pools: what the configuration says of them as capacity facts, and the booking of what they cost.

use std::collections::BTreeMap;

use ledger::{CapacityFact, Fact, Money, Origin, Period, Timestamp};
use store::Store;

use crate::config::{Loaded, PoolSection};
use crate::rows;

/// The configuration's pools as capacity facts that grow while the server runs.
#[derive(Debug)]
pub struct Pools {
    since: Timestamp,
    facts: Vec<CapacityFact>,
    /// Facts that ended and have to be written once more.
    ended: Vec<CapacityFact>,
}

impl Pools {
    /// The pools that the configuration names, from `now` on.
    #[must_use]
    pub fn new(loaded: &Loaded, now: Timestamp) -> Pools {
        Pools { since: now, facts: pool_facts(loaded, now), ended: Vec::new() }
    }

    /// Takes a changed configuration: the pools as they were end, and start again as they are.
    pub fn change(&mut self, loaded: &Loaded, now: Timestamp) {
        let mut same = pool_facts(loaded, self.since);
        for (new, old) in same.iter_mut().zip(&self.facts) {
            (new.period, new.observed_at) = (old.period, old.observed_at);
        }
        if same == self.facts {
            return;
        }
        let ended = self.observe(now);
        *self = Pools { ended, ..Pools::new(loaded, now) };
    }

    /// Every pool as it has been until now.
    pub fn observe(&mut self, now: Timestamp) -> Vec<CapacityFact> {
        for fact in &mut self.facts {
            fact.period.end = now.max(fact.period.end);
            fact.observed_at = now;
        }
        let grown = self.facts.iter().filter(|fact| fact.period.micros() > 0).cloned();
        self.ended.drain(..).chain(grown).collect()
    }
}

fn pool_facts(loaded: &Loaded, since: Timestamp) -> Vec<CapacityFact> {
    let deployment = |pool: &PoolSection| {
        let mut own = loaded.config.upstream.iter().filter(|upstream| upstream.pool.as_deref() == Some(&pool.name));
        match (own.next(), own.next()) {
            (Some(only), None) => only.deployment.as_deref().map(Into::into),
            _ => None,
        }
    };
    loaded
        .config
        .pool
        .iter()
        .map(|pool| CapacityFact {
            pool: pool.name.as_str().into(),
            replica: format!("{}-0", pool.name).into(),
            deployment: deployment(pool),
            owner: pool.owner.as_deref().map(Into::into),
            gpu: pool.gpu.as_str().into(),
            gpus: pool.gpus,
            rate: pool.usd_per_gpu_hour,
            purchase: pool.purchase,
            period: Period { start: since, end: since },
            observed_at: since,
        })
        .collect()
}

/// What a settlement booked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Settled {
    /// Postings booked.
    pub postings: u64,
    /// Their sum.
    pub amount: Money,
}

/// Books what was observed of pools, and what they cost within the window that nothing has booked yet, minute by minute.
///
/// Capacity and postings are written at once, so that no reader sees one without the other.
///
/// # Errors
/// When the ledger cannot be read or written.
pub async fn settle(
    store: &Store,
    observed: Vec<CapacityFact>,
    window: Period,
    now: Timestamp,
) -> anyhow::Result<Settled> {
    let session = store.session().await?;
    let mut capacity = observed.clone();
    let reaching = match window.start {
        start if start == Period::ALL.start => "true".to_owned(),
        start => format!("period_end > {}", rows::moment(start)),
    };
    for batch in session.sql(&format!("SELECT * FROM capacity WHERE {reaching}")).await? {
        capacity.extend(store::capacity_of(&batch)?);
    }
    let posted = if capacity.is_empty() { BTreeMap::new() } else { posted(&session, window).await? };
    let postings = ledger::settle::unallocated(&capacity, &posted, window, now);

    let amount = postings.iter().map(|posting| posting.costs.effective_cost).sum();
    let settled = Settled { postings: u64::try_from(postings.len()).unwrap_or(u64::MAX), amount };
    let facts: Vec<Fact> = observed
        .into_iter()
        .map(|fact| Fact::Capacity(Box::new(fact)))
        .chain(postings.into_iter().map(|posting| Fact::Posting(Box::new(posting))))
        .collect();
    if !facts.is_empty() {
        store.append_all(&facts)?;
    }
    Ok(settled)
}

/// What is booked of each pool's minutes, from a minute before the window: its first minute may have started earlier.
async fn posted(session: &store::Session, window: Period) -> anyhow::Result<BTreeMap<Origin, Money>> {
    let since = match window.start {
        start if start == Period::ALL.start => Period::ALL,
        start => Period { start: start.plus_micros(-ledger::settle::INTERVAL_US), ..Period::ALL },
    };
    let query = format!(
        "SELECT origin_key, sum(effective_cost) AS posted FROM postings WHERE origin_kind = 'pool' AND {} GROUP BY origin_key",
        rows::within("period_start", since)
    );
    let mut posted = BTreeMap::new();
    for batch in session.sql(&query).await? {
        let (keys, sums) = (rows::column(&batch, "origin_key")?, rows::column(&batch, "posted")?);
        for row in 0..batch.num_rows() {
            if let Some(origin) = pool_origin(&rows::plain(keys, row)?) {
                posted.insert(origin, rows::money(sums, row)?.unwrap_or_default());
            }
        }
    }
    Ok(posted)
}

/// The origin behind a key of the postings table, as [`Origin::key`] writes it.
fn pool_origin(key: &str) -> Option<Origin> {
    let (pool, start) = key.rsplit_once('@')?;
    Some(Origin::Pool { pool: pool.into(), start: Timestamp::from_micros(start.parse().ok()?) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    fn loaded(gpus: u32) -> Loaded {
        let text = format!("[[pool]]\nname = \"shared\"\ngpu = \"A100\"\ngpus = {gpus}\nusd_per_gpu_hour = \"2.50\"");
        Loaded { config: config::parse(&text).unwrap(), file: None }
    }

    #[test]
    fn pools_grow_and_a_change_starts_a_new_fact() {
        let at = Timestamp::from_micros;
        let mut pools = Pools::new(&loaded(2), at(0));
        assert!(pools.observe(at(0)).is_empty());
        assert_eq!(pools.observe(at(60))[0].period, Period { start: at(0), end: at(60) });
        pools.change(&loaded(2), at(70));
        assert_eq!(pools.observe(at(80)).len(), 1, "nothing changed");
        pools.change(&loaded(4), at(90));
        let facts = pools.observe(at(100));
        assert_eq!(
            facts.iter().map(|fact| (fact.gpus, fact.period.start, fact.period.end)).collect::<Vec<_>>(),
            [(2, at(0), at(90)), (4, at(90), at(100)),]
        );
    }

    #[test]
    fn origins_are_read_back_from_their_keys() {
        let origin = Origin::Pool { pool: "a@b".into(), start: Timestamp::from_micros(-60) };
        assert_eq!(pool_origin(&origin.key()), Some(origin));
        assert_eq!(pool_origin("nothing"), None);
    }
}
