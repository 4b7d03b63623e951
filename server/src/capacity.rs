//! The GPUs that pools have, as facts that grow while the server runs: those of the configuration, and those that the API
//! said were started, are ready, or were stopped.

use std::collections::BTreeMap;

use ledger::{CapacityFact, GpuHourRate, Label, Period, PurchaseOption, Timestamp};
use serde::{Deserialize, Serialize};

use crate::config::{Loaded, PoolSection, ReplicaSection};

/// How far ahead of this machine's clock a caller's may be.
const AHEAD_US: i64 = 60_000_000;
/// How far back a start or a stop may be told.
const BACK_US: i64 = 31 * 24 * 3_600_000_000;

/// What the API says of a replica; what it leaves out is as the configuration says of the pool.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Described {
    /// The GPU's name.
    pub gpu: Option<Label>,
    /// How many.
    pub gpus: Option<u32>,
    /// The price of one for an hour.
    pub rate: Option<GpuHourRate>,
    /// How they were bought.
    pub purchase: Option<PurchaseOption>,
    /// Who owns the pool.
    pub owner: Option<Label>,
    /// What runs on it.
    pub deployment: Option<Label>,
}

/// What an event did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    /// The replica as it is now.
    pub fact: CapacityFact,
    /// Whether anything is new.
    pub changed: bool,
}

/// What outlives the process: replicas that the API started or stopped.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Kept {
    /// Started through the API and running.
    pub started: Vec<CapacityFact>,
    /// Stopped through the API, with their ends.
    pub stopped: Vec<CapacityFact>,
}

/// The GPUs of all pools.
#[derive(Debug, Clone, Default)]
pub struct Pools {
    running: BTreeMap<Key, Running>,
    /// Stopped through the API; the configuration does not start them again.
    stopped: BTreeMap<Key, CapacityFact>,
    /// The configuration's pools, for what an event leaves out.
    sections: Vec<PoolSection>,
    /// Facts that ended and have to be written once more.
    ended: Vec<CapacityFact>,
}

/// Pool and replica.
type Key = (Label, Label);

#[derive(Debug, Clone)]
struct Running {
    fact: CapacityFact,
    /// Started through the API: the configuration neither changes nor ends it.
    by_api: bool,
}

impl Pools {
    /// The pools that the configuration names, from `now` on.
    #[must_use]
    pub fn new(loaded: &Loaded, now: Timestamp) -> Pools {
        Pools::with(loaded, Kept::default(), now)
    }

    /// As [`new`](Pools::new), with what an earlier run was told through the API.
    #[must_use]
    pub fn with(loaded: &Loaded, kept: Kept, now: Timestamp) -> Pools {
        let mut pools = Pools { sections: loaded.config.pool.clone(), ..Pools::default() };
        pools.stopped.extend(kept.stopped.into_iter().map(|fact| (key(&fact), fact)));
        pools.running.extend(kept.started.into_iter().map(|fact| (key(&fact), Running { fact, by_api: true })));
        pools.start_configured(loaded, now);
        pools
    }

    /// Takes a changed configuration: what is not as it was ends, and starts again as it is.
    pub fn change(&mut self, loaded: &Loaded, now: Timestamp) {
        self.sections.clone_from(&loaded.config.pool);
        let configured: BTreeMap<Key, CapacityFact> =
            pool_facts(loaded, now).into_iter().map(|fact| (key(&fact), fact)).collect();
        let over: Vec<Key> = self
            .running
            .iter()
            .filter(|(key, running)| {
                !running.by_api && !configured.get(*key).is_some_and(|fact| same_gpus(fact, &running.fact))
            })
            .map(|(key, _)| key.clone())
            .collect();
        for key in over {
            self.end(&key, now, now);
        }
        self.start_configured(loaded, now);
    }

    fn start_configured(&mut self, loaded: &Loaded, now: Timestamp) {
        for fact in pool_facts(loaded, now) {
            let key = key(&fact);
            if !self.stopped.contains_key(&key) {
                self.running.entry(key).or_insert(Running { fact, by_api: false });
            }
        }
    }

    /// Every replica as it has been until now, and those that ended since the last look.
    pub fn observe(&mut self, now: Timestamp) -> Vec<CapacityFact> {
        for running in self.running.values_mut() {
            running.fact.period.end = now.max(running.fact.period.end);
            running.fact.observed_at = now;
        }
        let grown = self.running.values().map(|running| &running.fact).filter(|fact| fact.period.micros() > 0).cloned();
        self.ended.drain(..).chain(grown).collect()
    }

    /// What has to outlive the process.
    #[must_use]
    pub fn kept(&self) -> Kept {
        Kept {
            started: self
                .running
                .values()
                .filter(|running| running.by_api)
                .map(|running| running.fact.clone())
                .collect(),
            stopped: self.stopped.values().cloned().collect(),
        }
    }

    /// The replica as it is now, if it runs.
    #[must_use]
    pub fn running(&self, pool: &Label, replica: &Label) -> Option<&CapacityFact> {
        self.running.get(&(pool.clone(), replica.clone())).map(|running| &running.fact)
    }

    /// Every replica that runs.
    pub fn all(&self) -> impl Iterator<Item = &CapacityFact> {
        self.running.values().map(|running| &running.fact)
    }

    /// A replica was started. Told again, nothing changes; told otherwise, what ran ends where the new begins.
    ///
    /// # Errors
    /// One sentence that says what is wrong; nothing changed.
    pub fn started(
        &mut self,
        (pool, replica): (&Label, &Label),
        described: &Described,
        at: Option<Timestamp>,
        now: Timestamp,
    ) -> Result<Changed, String> {
        let key = (pool.clone(), replica.clone());
        let before = self.running.get(&key).map(|running| running.fact.clone());
        let start = moment(at, now)?;
        let fact = CapacityFact { observed_at: now, ..self.described(&key, described, before.as_ref(), start)? };
        if let Some(before) = before {
            let unchanged = same_gpus(&before, &fact);
            if unchanged && at.is_none_or(|at| at == before.period.start) {
                let first_told =
                    self.running.get_mut(&key).is_some_and(|running| !std::mem::replace(&mut running.by_api, true));
                return Ok(Changed { fact: before, changed: first_told });
            }
            if start < before.period.start {
                return Err(format!(
                    "replica `{replica}` of pool `{pool}` runs since {} already, which is after {start}; stop it first, or leave `at` out",
                    before.period.start
                ));
            }
            self.end(&key, start, now);
        }
        if let Some(stopped) = self.stopped.get(&key)
            && start < stopped.period.end
        {
            return Err(format!(
                "replica `{replica}` of pool `{pool}` ran until {}, which is after {start}; it cannot have been started before",
                stopped.period.end
            ));
        }
        self.stopped.remove(&key);
        self.running.insert(key, Running { fact: fact.clone(), by_api: true });
        Ok(Changed { fact, changed: true })
    }

    /// A replica was stopped.
    ///
    /// # Errors
    /// One sentence that says what is wrong; nothing changed.
    pub fn stopped(
        &mut self,
        (pool, replica): (&Label, &Label),
        at: Option<Timestamp>,
        now: Timestamp,
    ) -> Result<Changed, String> {
        let key = (pool.clone(), replica.clone());
        let end = moment(at, now)?;
        let Some(running) = self.running.get(&key) else {
            return match self.stopped.get(&key) {
                Some(fact) if at.is_none_or(|at| at == fact.period.end) => {
                    Ok(Changed { fact: fact.clone(), changed: false })
                }
                Some(fact) => Err(format!(
                    "replica `{replica}` of pool `{pool}` was stopped at {} already; it cannot be stopped at {end}",
                    fact.period.end
                )),
                None => Err(format!("replica `{replica}` of pool `{pool}` does not run; tell of its start first")),
            };
        };
        if end < running.fact.period.start {
            return Err(format!(
                "replica `{replica}` of pool `{pool}` runs since {}; it cannot have been stopped at {end}",
                running.fact.period.start
            ));
        }
        let fact = self.end(&key, end, now).ok_or("the replica does not run")?;
        self.stopped.insert(key, fact.clone());
        Ok(Changed { fact, changed: true })
    }

    fn end(&mut self, key: &Key, end: Timestamp, now: Timestamp) -> Option<CapacityFact> {
        let mut fact = self.running.remove(key)?.fact;
        fact.period.end = end;
        fact.observed_at = now;
        self.ended.push(fact.clone());
        Some(fact)
    }

    fn described(
        &self,
        (pool, replica): &Key,
        described: &Described,
        before: Option<&CapacityFact>,
        start: Timestamp,
    ) -> Result<CapacityFact, String> {
        let section = self.sections.iter().find(|section| *section.name == **pool);
        let missing = |name: &str| {
            format!(
                "`{name}` is missing, and neither the configuration nor an earlier start of replica `{replica}` says it"
            )
        };
        let named = section.and_then(|section| {
            section.all_replicas().into_iter().find(|known| *known.name == **replica).map(|known| known.gpus)
        });
        // As it runs, else as the configuration has it, else as it ran last.
        let last = self.stopped.get(&(pool.clone(), replica.clone()));
        let known = before.or(if named.is_some() { None } else { last });
        let gpus = described.gpus.or(known.map(|fact| fact.gpus)).or(named).ok_or_else(|| missing("gpus"))?;
        if gpus == 0 {
            return Err("`gpus` is 0; a replica has one at least".to_owned());
        }
        let gpu = described.gpu.clone().or_else(|| known.map(|fact| fact.gpu.clone()));
        let rate = described.rate.or(known.map(|fact| fact.rate)).or(section.map(|section| section.usd_per_gpu_hour));
        let purchase = described.purchase.or(known.map(|fact| fact.purchase));
        let owner = described.owner.clone().or_else(|| known.and_then(|fact| fact.owner.clone()));
        Ok(CapacityFact {
            pool: pool.clone(),
            replica: replica.clone(),
            deployment: described.deployment.clone().or_else(|| known.and_then(|fact| fact.deployment.clone())),
            owner: owner.or_else(|| section?.owner.as_deref().map(Into::into)),
            gpu: gpu.or_else(|| Some(section?.gpu.as_str().into())).ok_or_else(|| missing("gpu"))?,
            gpus,
            rate: rate.ok_or_else(|| missing("usd_per_gpu_hour"))?,
            purchase: purchase.or(section.map(|section| section.purchase)).unwrap_or_default(),
            period: Period { start, end: start },
            observed_at: start,
        })
    }
}

/// A moment that a caller named, or now.
///
/// # Errors
/// When it lies too far ahead or back to be meant.
pub fn moment(at: Option<Timestamp>, now: Timestamp) -> Result<Timestamp, String> {
    let Some(at) = at else { return Ok(now) };
    if at > now.plus_micros(AHEAD_US) {
        return Err(format!("`at` is {at}, which is yet to come; it is {now}"));
    }
    if at < now.plus_micros(-BACK_US) {
        return Err(format!("`at` is {at}, more than 31 days ago; import what is older"));
    }
    Ok(at)
}

fn key(fact: &CapacityFact) -> Key {
    (fact.pool.clone(), fact.replica.clone())
}

/// Whether both speak of the same GPUs on the same terms, whenever.
fn same_gpus(a: &CapacityFact, b: &CapacityFact) -> bool {
    CapacityFact { period: b.period, observed_at: b.observed_at, ..a.clone() } == *b
}

fn pool_facts(loaded: &Loaded, since: Timestamp) -> Vec<CapacityFact> {
    let fact = |pool: &PoolSection, replica: &ReplicaSection| CapacityFact {
        pool: pool.name.as_str().into(),
        replica: replica.name.as_str().into(),
        deployment: deployment(loaded, pool, replica),
        owner: pool.owner.as_deref().map(Into::into),
        gpu: pool.gpu.as_str().into(),
        gpus: replica.gpus,
        rate: pool.usd_per_gpu_hour,
        purchase: pool.purchase,
        period: Period { start: since, end: since },
        observed_at: since,
    };
    let pools = loaded.config.pool.iter();
    pools.flat_map(|pool| pool.all_replicas().iter().map(|replica| fact(pool, replica)).collect::<Vec<_>>()).collect()
}

/// What the replica serves, when it is one thing.
fn deployment(loaded: &Loaded, pool: &PoolSection, replica: &ReplicaSection) -> Option<Label> {
    let of_pool = loaded.config.upstream.iter().filter(|upstream| upstream.pool.as_deref() == Some(&pool.name));
    let mut own = of_pool.filter(|upstream| upstream.replica(pool) == replica.name);
    match (own.next(), own.next()) {
        (Some(only), None) => only.deployment.as_deref().map(Into::into),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    fn loaded(more: &str, gpus: u32) -> Loaded {
        let text = format!(
            "[[pool]]\nname = \"shared\"\nowner = \"platform\"\ngpu = \"A100\"\ngpus = {gpus}\nusd_per_gpu_hour = \"2.50\"\n{more}"
        );
        Loaded { config: config::parse(&text).unwrap(), file: None }
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_micros(seconds * 1_000_000)
    }

    fn spans(facts: &[CapacityFact]) -> Vec<(&str, u32, i64, i64)> {
        let seconds = |at: Timestamp| at.micros() / 1_000_000;
        facts
            .iter()
            .map(|fact| (&*fact.replica, fact.gpus, seconds(fact.period.start), seconds(fact.period.end)))
            .collect()
    }

    #[test]
    fn pools_grow_and_a_change_starts_a_new_fact() {
        let mut pools = Pools::new(&loaded("", 2), at(0));
        assert!(pools.observe(at(0)).is_empty());
        assert_eq!(spans(&pools.observe(at(60))), [("shared-0", 2, 0, 60)]);
        pools.change(&loaded("", 2), at(70));
        assert_eq!(spans(&pools.observe(at(80))), [("shared-0", 2, 0, 80)], "nothing changed");
        pools.change(&loaded("", 4), at(90));
        assert_eq!(spans(&pools.observe(at(100))), [("shared-0", 2, 0, 90), ("shared-0", 4, 90, 100)]);
        let named = "replicas = [{ name = \"a\", gpus = 1 }, { name = \"b\", gpus = 3 }]";
        pools.change(&loaded(named, 4), at(110));
        assert_eq!(spans(&pools.observe(at(120))), [("shared-0", 4, 90, 110), ("a", 1, 110, 120), ("b", 3, 110, 120)]);
        let mut none = loaded("", 1);
        none.config.pool.clear();
        pools.change(&none, at(130));
        assert_eq!(spans(&pools.observe(at(140))), [("a", 1, 110, 130), ("b", 3, 110, 130)]);
        assert!(pools.observe(at(150)).is_empty());
    }

    #[test]
    fn replicas_come_and_go_through_the_api_and_repeating_changes_nothing() {
        let mut pools = Pools::new(&loaded("", 2), at(0));
        let (pool, replica): (Label, Label) = ("shared".into(), "extra".into());
        let id = (&pool, &replica);
        let refused = pools.started(id, &Described::default(), None, at(5)).unwrap_err();
        assert!(refused.contains("`gpus` is missing"), "{refused}");
        let two = Described { gpus: Some(2), purchase: Some(PurchaseOption::Spot), ..Described::default() };
        let new = pools.started(id, &two, Some(at(3)), at(5)).unwrap();
        assert!(new.changed);
        assert_eq!(
            (&*new.fact.gpu, new.fact.owner.as_deref(), new.fact.purchase),
            ("A100", Some("platform"), PurchaseOption::Spot)
        );
        for again in [Some(at(3)), None] {
            assert!(!pools.started(id, &two, again, at(6)).unwrap().changed);
        }
        let four = Described { gpus: Some(4), ..Described::default() };
        assert!(pools.started(id, &four, Some(at(2)), at(7)).unwrap_err().contains("runs since"));
        assert!(pools.started(id, &four, Some(at(8)), at(9)).unwrap().changed, "it grew");
        assert_eq!(spans(&pools.observe(at(10))), [("extra", 2, 3, 8), ("extra", 4, 8, 10), ("shared-0", 2, 0, 10)]);

        assert!(pools.stopped(id, Some(at(7)), at(10)).unwrap_err().contains("cannot have been stopped"));
        assert!(pools.stopped(id, Some(at(12)), at(12)).unwrap().changed);
        assert!(!pools.stopped(id, Some(at(12)), at(13)).unwrap().changed);
        assert!(pools.stopped(id, Some(at(11)), at(13)).unwrap_err().contains("already"));
        assert!(pools.started(id, &two, Some(at(11)), at(13)).unwrap_err().contains("cannot have been started before"));
        assert_eq!(spans(&pools.observe(at(20))), [("extra", 4, 8, 12), ("shared-0", 2, 0, 20)]);
        assert!(pools.stopped((&pool, &"other".into()), None, at(20)).unwrap_err().contains("does not run"));
        assert!(pools.started(id, &two, Some(at(500)), at(20)).unwrap_err().contains("yet to come"));
    }

    #[test]
    fn what_the_api_said_outlives_the_process_and_the_configuration() {
        let mut pools = Pools::new(&loaded("", 2), at(0));
        let pool: Label = "shared".into();
        let described = Described { gpus: Some(1), ..Described::default() };
        pools.started((&pool, &"extra".into()), &described, None, at(1)).unwrap();
        pools.stopped((&pool, &"shared-0".into()), None, at(2)).unwrap();
        pools.observe(at(3));
        let text = serde_json::to_string(&pools.kept()).unwrap();
        let mut again = Pools::with(&loaded("", 2), serde_json::from_str(&text).unwrap(), at(60));
        assert_eq!(spans(&again.observe(at(61))), [("extra", 1, 1, 61)], "it ran while the server did not");
        again.change(&loaded("", 4), at(62));
        assert_eq!(spans(&again.observe(at(63))), [("extra", 1, 1, 63)], "stopped is stopped");
        again.started((&pool, &"shared-0".into()), &Described::default(), None, at(64)).unwrap();
        assert_eq!(spans(&again.observe(at(65))), [("extra", 1, 1, 65), ("shared-0", 4, 64, 65)]);
    }
}
