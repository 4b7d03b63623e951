//! What configuration and API say of GPUs, engines and jobs, in one place: looked at together, changed together, and kept
//! across restarts as far as the API said it.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Context as _;
use ledger::{CapacityFact, EngineFact, Fact, JobFact, Label, Timestamp};
use serde::{Deserialize, Serialize};

use crate::capacity::{self, Pools};
use crate::config::Loaded;
use crate::engines::{Engines, Learned};
use crate::jobs::{self, Jobs};

/// The file of the ledger's folder that keeps what the API said.
const FILE: &str = "declared.json";

/// Pools, engines and jobs as they are declared. Shared by the API, telemetry and settlement.
#[derive(Debug)]
pub struct Declared {
    inner: Mutex<Inner>,
    /// Whether any engine is awaited, so that nothing has to be locked for each answer while none is.
    awaiting: AtomicBool,
    file: PathBuf,
}

#[derive(Debug, Clone)]
struct Inner {
    pools: Pools,
    engines: Engines,
    jobs: Jobs,
    /// What was observed and could not be written.
    unwritten: Vec<Fact>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct Kept {
    replicas: capacity::Kept,
    jobs: Vec<jobs::Running>,
}

/// What happened to a replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReplicaEvent {
    /// Its GPUs are paid for from now on; its engines load.
    Started(capacity::Described),
    /// Its engines can serve.
    Ready,
    /// Its GPUs are given back.
    Stopped,
    /// Its engines ended, and its GPUs stay paid for: they are committed.
    Parked,
    /// Its engines load again on the GPUs that it kept.
    Resumed,
}

/// Why an event was not taken.
#[derive(Debug, thiserror::Error)]
pub enum NotTaken {
    /// It makes no sense; nothing changed.
    #[error("{0}")]
    Wrong(String),
    /// It could not be kept; the same event may be sent again.
    #[error("what was said could not be kept: {0}")]
    NotKept(#[source] std::io::Error),
}

impl Declared {
    /// What the configuration says from `now` on, and what the API had said before the last stop.
    ///
    /// # Errors
    /// When a model's `config.json` or the kept file cannot be read.
    pub fn open(data: &Path, loaded: &Loaded, now: Timestamp) -> anyhow::Result<Declared> {
        let file = data.join(FILE);
        let kept = match std::fs::read(&file) {
            Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", file.display()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Kept::default(),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", file.display())),
        };
        let mut engines = Engines::new(loaded, now)?;
        for fact in &kept.replicas.stopped {
            engines.replica_stopped(&fact.pool, &fact.replica, now, now);
        }
        let inner = Inner {
            pools: Pools::with(loaded, kept.replicas, now),
            engines,
            jobs: Jobs::with(kept.jobs),
            unwritten: Vec::new(),
        };
        Ok(Declared { inner: Mutex::new(inner), awaiting: AtomicBool::new(false), file })
    }

    /// Takes a changed configuration.
    ///
    /// # Errors
    /// When a model's `config.json` cannot be read; nothing has changed then.
    pub fn change(&self, loaded: &Loaded, now: Timestamp) -> anyhow::Result<()> {
        let mut inner = self.lock();
        inner.engines.change(loaded, now)?;
        inner.pools.change(loaded, now);
        Ok(())
    }

    /// Everything as it has been until now, to be appended to the ledger: GPUs, engines, jobs.
    pub fn observe(&self, now: Timestamp) -> Vec<Fact> {
        let mut inner = self.lock();
        let mut facts = std::mem::take(&mut inner.unwritten);
        facts.extend(inner.pools.observe(now).into_iter().map(|fact| Fact::Capacity(Box::new(fact))));
        facts.extend(inner.engines.observe(now).into_iter().map(|fact| Fact::Engine(Box::new(fact))));
        facts.extend(inner.jobs.observe(now).into_iter().map(|fact| Fact::Job(Box::new(fact))));
        facts
    }

    /// Takes back what was observed and could not be written; the next look gives it again.
    pub fn put_back(&self, facts: Vec<Fact>) {
        self.lock().unwritten.extend(facts);
    }

    /// Every engine as it is, and whether its replica runs.
    #[must_use]
    pub fn engines(&self) -> Vec<(EngineFact, bool)> {
        self.lock().engines.all().map(|(fact, runs)| (fact.clone(), runs)).collect()
    }

    /// Every replica that runs.
    #[must_use]
    pub fn replicas(&self) -> Vec<CapacityFact> {
        self.lock().pools.all().cloned().collect()
    }

    /// The engine answered: see [`Engines::answered`]. Costs nothing while no engine is awaited.
    pub fn answered(&self, engine: &str, at: Timestamp) {
        if self.awaiting.load(Ordering::Relaxed) {
            self.heard(engine, at);
        }
    }

    /// As [`answered`](Declared::answered), from a scrape: also of one that nobody waits for.
    pub fn heard(&self, engine: &str, at: Timestamp) {
        let mut inner = self.lock();
        inner.engines.answered(engine, at);
        self.awaiting.store(inner.engines.any_awaited(), Ordering::Relaxed);
    }

    /// The engine did not answer a scrape: see [`Engines::silent`]. Whether it is starting as far as is known.
    pub fn silent(&self, engine: &str) -> bool {
        let mut inner = self.lock();
        let starting = inner.engines.silent(engine);
        self.awaiting.store(inner.engines.any_awaited(), Ordering::Relaxed);
        starting
    }

    /// Whether the engine's replica is known to be stopped.
    #[must_use]
    pub fn is_stopped(&self, engine: &str) -> bool {
        self.lock().engines.is_stopped(engine)
    }

    /// What an engine says of itself.
    pub fn learn(&self, engine: &str, learned: Learned, now: Timestamp) {
        self.lock().engines.learn(engine, learned, now);
    }

    /// Takes constants that were fitted, from the fact's start on.
    pub fn recalibrate(&self, fact: EngineFact) {
        self.lock().engines.recalibrate(fact);
    }

    /// Something happened to a replica. Told again, nothing changes.
    ///
    /// # Errors
    /// [`NotTaken`].
    pub fn replica(
        &self,
        (pool, replica): (&Label, &Label),
        event: &ReplicaEvent,
        at: Option<Timestamp>,
        now: Timestamp,
    ) -> Result<capacity::Changed, NotTaken> {
        self.changing(|inner| match event {
            ReplicaEvent::Started(described) => {
                let changed = inner.pools.started((pool, replica), described, at, now)?;
                if changed.changed {
                    inner.engines.replica_started(&changed.fact, now);
                }
                Ok(changed)
            }
            ReplicaEvent::Ready => {
                let ready = capacity::moment(at, now)?;
                let running = inner.pools.running(pool, replica).cloned();
                let fact = running.ok_or_else(|| {
                    format!("replica `{replica}` of pool `{pool}` does not run; tell of its start first")
                })?;
                if ready < fact.period.start {
                    return Err(format!(
                        "replica `{replica}` of pool `{pool}` runs since {}; it cannot have been ready at {ready}",
                        fact.period.start
                    ));
                }
                inner.engines.replica_ready(pool, replica, ready);
                Ok(capacity::Changed { fact, changed: true })
            }
            ReplicaEvent::Parked | ReplicaEvent::Resumed => {
                let fact = inner.pools.running(pool, replica).cloned();
                let fact = fact.ok_or_else(|| format!("replica `{replica}` of pool `{pool}` has no GPUs"))?;
                if matches!(event, ReplicaEvent::Parked) {
                    inner.engines.replica_stopped(pool, replica, now, now);
                } else {
                    let mut again = fact.clone();
                    again.period.start = now;
                    inner.engines.replica_started(&again, now);
                }
                Ok(capacity::Changed { fact, changed: true })
            }
            ReplicaEvent::Stopped => {
                let changed = inner.pools.stopped((pool, replica), at, now)?;
                if changed.changed {
                    inner.engines.replica_stopped(pool, replica, changed.fact.period.end, now);
                }
                Ok(changed)
            }
        })
    }

    /// A job started.
    ///
    /// # Errors
    /// [`NotTaken`]: among others when its pool has no such replica.
    pub fn job_started(
        &self,
        described: jobs::Described,
        at: Option<Timestamp>,
        now: Timestamp,
    ) -> Result<jobs::Changed, NotTaken> {
        self.changing(|inner| {
            if inner.pools.running(&described.pool, &described.replica).is_none() {
                return Err(format!("pool `{}` has no running replica `{}`", described.pool, described.replica));
            }
            inner.jobs.started(described, at, now)
        })
    }

    /// A job says that it still runs.
    ///
    /// # Errors
    /// [`NotTaken`].
    pub fn job_heartbeat(
        &self,
        id: (&Label, &Label),
        lease_us: Option<i64>,
        now: Timestamp,
    ) -> Result<jobs::Changed, NotTaken> {
        self.changing(|inner| inner.jobs.heartbeat(id, lease_us, now))
    }

    /// A job stopped.
    ///
    /// # Errors
    /// [`NotTaken`].
    pub fn job_stopped(
        &self,
        id: (&Label, &Label),
        at: Option<Timestamp>,
        now: Timestamp,
    ) -> Result<jobs::Changed, NotTaken> {
        self.changing(|inner| inner.jobs.stopped(id, at, now))
    }

    /// Every job that has not stopped.
    #[must_use]
    pub fn jobs(&self) -> Vec<JobFact> {
        self.lock().jobs.kept().into_iter().map(|job| job.fact).collect()
    }

    /// Tries a change on a copy, keeps it in the file, and only then makes it: whoever was told that it is taken finds it
    /// after a crash.
    fn changing<T>(&self, change: impl FnOnce(&mut Inner) -> Result<T, String>) -> Result<T, NotTaken> {
        let mut inner = self.lock();
        let mut changed = inner.clone();
        let outcome = change(&mut changed).map_err(NotTaken::Wrong)?;
        let kept = Kept { replicas: changed.pools.kept(), jobs: changed.jobs.kept() };
        keep(&self.file, &kept).map_err(NotTaken::NotKept)?;
        self.awaiting.store(changed.engines.any_awaited(), Ordering::Relaxed);
        *inner = changed;
        Ok(outcome)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Replaces the file as a whole: a crash leaves the old one or the new one.
fn keep(file: &Path, kept: &Kept) -> std::io::Result<()> {
    use std::io::Write;
    let fresh = file.with_extension("json.new");
    let mut written = std::fs::File::create(&fresh)?;
    written.write_all(&serde_json::to_vec(kept)?)?;
    written.sync_all()?;
    std::fs::rename(&fresh, file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_micros(seconds * 1_000_000)
    }

    fn loaded() -> Loaded {
        let text = "[[pool]]\nname = \"shared\"\ngpu = \"H100\"\ngpus = 2\nusd_per_gpu_hour = \"3\"\n[[upstream]]\nname = \
                    \"a\"\nkind = \"vllm\"\nbase_url = \"http://h\"\npool = \"shared\"\n";
        Loaded { config: config::parse(text).unwrap(), file: None }
    }

    #[test]
    fn what_the_api_said_is_there_after_a_crash_and_what_was_refused_is_not() {
        let data = tempfile::tempdir().unwrap();
        let (pool, replica, extra): (Label, Label, Label) = ("shared".into(), "shared-0".into(), "extra".into());
        let job = |replica: &Label| jobs::Described {
            job: "train".into(),
            pool: pool.clone(),
            replica: replica.clone(),
            share: 250_000,
            ..jobs::Described::default()
        };
        {
            let declared = Declared::open(data.path(), &loaded(), at(0)).unwrap();
            let wrong =
                declared.replica((&pool, &extra), &ReplicaEvent::Started(capacity::Described::default()), None, at(1));
            assert!(matches!(wrong, Err(NotTaken::Wrong(_))), "{wrong:?}");
            assert!(
                declared.job_started(job(&extra), None, at(1)).unwrap_err().to_string().contains("no running replica")
            );
            assert!(!data.path().join(FILE).exists());
            let one = capacity::Described { gpus: Some(1), ..capacity::Described::default() };
            declared.replica((&pool, &extra), &ReplicaEvent::Started(one), None, at(1)).unwrap();
            declared.job_started(job(&extra), None, at(2)).unwrap();
            declared.replica((&pool, &replica), &ReplicaEvent::Stopped, None, at(3)).unwrap();
            assert!(!declared.engines()[0].1, "its replica was stopped");
        }
        let declared = Declared::open(data.path(), &loaded(), at(60)).unwrap();
        let facts = declared.observe(at(70));
        let names: Vec<&str> = facts
            .iter()
            .map(|fact| match fact {
                Fact::Capacity(fact) => &*fact.replica,
                Fact::Job(fact) => &*fact.job,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(names, ["extra", "train"]);

        // Back again: its engine loads until it answers.
        declared
            .replica((&pool, &replica), &ReplicaEvent::Started(capacity::Described::default()), None, at(80))
            .unwrap();
        declared.answered("a", at(95));
        let ready: Vec<_> = declared.engines().iter().map(|(fact, _)| fact.ready_at).collect();
        assert_eq!(ready, [Some(at(95))]);
        std::fs::write(data.path().join(FILE), "{").unwrap();
        assert!(Declared::open(data.path(), &loaded(), at(100)).is_err());
    }
}
