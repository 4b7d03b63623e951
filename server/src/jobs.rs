//! Work on our GPUs that is no request and that somebody told the API of: it starts, says now and then that it still runs,
//! and stops.

use std::collections::BTreeMap;

use ledger::telemetry::Millionths;
use ledger::{Context, JobFact, JobSource, Label, Period, Timestamp};
use serde::{Deserialize, Serialize};

use crate::capacity::moment;

/// How long a job is remembered whose lease ran out: in that time it can still say that it never stopped.
const FORGOTTEN_AFTER_US: i64 = 24 * 3_600_000_000;

/// What a caller says of a job that starts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Described {
    /// Its name.
    pub job: Label,
    /// The pool.
    pub pool: Label,
    /// The replica whose GPUs it uses.
    pub replica: Label,
    /// Who caused it.
    pub context: Context,
    /// The part of the replica that it uses at most.
    pub share: Millionths,
    /// How long it runs on without a sign of life; for ever when absent.
    pub lease_us: Option<i64>,
}

/// A job as the API knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// As it has been so far.
    pub fact: JobFact,
    /// How long it runs on without a sign of life.
    pub lease_us: Option<i64>,
    /// When it was heard of last.
    pub heard_at: Timestamp,
}

/// What an event did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    /// The job as it is now.
    pub fact: JobFact,
    /// Whether anything is new.
    pub changed: bool,
}

/// All jobs that the API was told of and that have not stopped.
#[derive(Debug, Clone, Default)]
pub struct Jobs {
    running: BTreeMap<Key, Running>,
    /// The latest that stopped, so that a stop that is told twice is no mistake.
    stopped: BTreeMap<Key, JobFact>,
    ended: Vec<JobFact>,
}

/// Job and replica.
type Key = (Label, Label);

impl Jobs {
    /// The jobs that ran when an earlier run of the server ended.
    #[must_use]
    pub fn with(running: Vec<Running>) -> Jobs {
        let running = running.into_iter().map(|job| (key(&job.fact), job));
        Jobs { running: running.collect(), ..Jobs::default() }
    }

    /// What has to outlive the process.
    #[must_use]
    pub fn kept(&self) -> Vec<Running> {
        self.running.values().cloned().collect()
    }

    /// Every job as it has been until now, and those that ended since the last look.
    pub fn observe(&mut self, now: Timestamp) -> Vec<JobFact> {
        self.running.retain(|_, job| now.micros() - job.until(now).micros() < FORGOTTEN_AFTER_US);
        for job in self.running.values_mut() {
            job.fact.period.end = job.until(now).max(job.fact.period.end);
            job.fact.observed_at = now;
        }
        let grown = self.running.values().map(|job| job.fact.clone());
        self.ended.drain(..).chain(grown).filter(|fact| fact.period.micros() > 0).collect()
    }

    /// A job started. Told again it is a sign of life; told otherwise, what ran ends where the new begins.
    ///
    /// # Errors
    /// One sentence that says what is wrong; nothing changed.
    pub fn started(&mut self, described: Described, at: Option<Timestamp>, now: Timestamp) -> Result<Changed, String> {
        let start = moment(at, now)?;
        let key = (described.job.clone(), described.replica.clone());
        if let Some(running) = self.running.get_mut(&key) {
            let same = running.fact.share == described.share
                && running.fact.context == described.context
                && running.lease_us == described.lease_us;
            let began = running.fact.period.start;
            if same && at.is_none_or(|at| at == began) {
                running.heard_at = running.heard_at.max(now);
                return Ok(Changed { fact: running.fact.clone(), changed: false });
            }
            if start < began {
                return Err(format!(
                    "job `{}` runs on replica `{}` since {began} already, which is after {start}; stop it first, or leave `at` out",
                    described.job, described.replica
                ));
            }
            self.end(&key, start, now);
        }
        if let Some(stopped) = self.stopped.get(&key)
            && start < stopped.period.end
        {
            if at == Some(stopped.period.start) {
                return Ok(Changed { fact: stopped.clone(), changed: false });
            }
            return Err(format!(
                "job `{}` ran on replica `{}` until {}, which is after {start}; it cannot have been started before",
                described.job, described.replica, stopped.period.end
            ));
        }
        let fact = JobFact {
            job: described.job,
            pool: described.pool,
            replica: described.replica,
            context: described.context,
            share: described.share,
            period: Period { start, end: start },
            source: JobSource::Api,
            observed_at: now,
        };
        self.running.insert(key, Running { fact: fact.clone(), lease_us: described.lease_us, heard_at: now });
        Ok(Changed { fact, changed: true })
    }

    /// A job says that it still runs; it may set how long it may be silent from now on.
    ///
    /// # Errors
    /// When no such job runs.
    pub fn heartbeat(
        &mut self,
        (job, replica): (&Label, &Label),
        lease_us: Option<i64>,
        now: Timestamp,
    ) -> Result<Changed, String> {
        let running = self.running.get_mut(&(job.clone(), replica.clone())).ok_or_else(|| not_running(job, replica))?;
        running.heard_at = running.heard_at.max(now);
        running.lease_us = lease_us.or(running.lease_us);
        running.fact.period.end = now.max(running.fact.period.end);
        running.fact.observed_at = now;
        Ok(Changed { fact: running.fact.clone(), changed: true })
    }

    /// A job stopped.
    ///
    /// # Errors
    /// One sentence that says what is wrong; nothing changed.
    pub fn stopped(
        &mut self,
        (job, replica): (&Label, &Label),
        at: Option<Timestamp>,
        now: Timestamp,
    ) -> Result<Changed, String> {
        let key = (job.clone(), replica.clone());
        let end = moment(at, now)?;
        let Some(running) = self.running.get(&key) else {
            return match self.stopped.get(&key) {
                Some(fact) if at.is_none_or(|at| at == fact.period.end) => {
                    Ok(Changed { fact: fact.clone(), changed: false })
                }
                Some(fact) => Err(format!(
                    "job `{job}` on replica `{replica}` stopped at {} already; it cannot have stopped at {end}",
                    fact.period.end
                )),
                None => Err(not_running(job, replica)),
            };
        };
        let began = running.fact.period.start;
        if end < began {
            return Err(format!("job `{job}` runs since {began}; it cannot have stopped at {end}"));
        }
        let fact = self.end(&key, end, now).ok_or_else(|| not_running(job, replica))?;
        Ok(Changed { fact, changed: true })
    }

    fn end(&mut self, key: &Key, end: Timestamp, now: Timestamp) -> Option<JobFact> {
        let mut fact = self.running.remove(key)?.fact;
        fact.period.end = end;
        fact.observed_at = now;
        self.ended.push(fact.clone());
        self.stopped.retain(|_, fact| now.micros() - fact.period.end.micros() < FORGOTTEN_AFTER_US);
        self.stopped.insert(key.clone(), fact.clone());
        Some(fact)
    }
}

impl Running {
    /// Until when it ran, as far as is known now.
    fn until(&self, now: Timestamp) -> Timestamp {
        match self.lease_us {
            Some(lease) => now.min(self.heard_at.plus_micros(lease)),
            None => now,
        }
    }
}

fn key(fact: &JobFact) -> Key {
    (fact.job.clone(), fact.replica.clone())
}

fn not_running(job: &Label, replica: &Label) -> String {
    format!("job `{job}` does not run on replica `{replica}`; tell of its start first")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_micros(seconds * 1_000_000)
    }

    fn described(share: Millionths, lease_s: Option<i64>) -> Described {
        Described {
            job: "finetune".into(),
            pool: "shared".into(),
            replica: "shared-0".into(),
            share,
            lease_us: lease_s.map(|seconds| seconds * 1_000_000),
            ..Described::default()
        }
    }

    fn spans(facts: &[JobFact]) -> Vec<(Millionths, i64, i64)> {
        let seconds = |at: Timestamp| at.micros() / 1_000_000;
        facts.iter().map(|fact| (fact.share, seconds(fact.period.start), seconds(fact.period.end))).collect()
    }

    #[test]
    fn a_job_grows_until_it_stops_and_repeating_changes_nothing() {
        let (job, replica): (Label, Label) = ("finetune".into(), "shared-0".into());
        let id = (&job, &replica);
        let mut jobs = Jobs::default();
        assert!(jobs.stopped(id, None, at(1)).unwrap_err().contains("does not run"));
        assert!(jobs.started(described(500_000, None), Some(at(10)), at(12)).unwrap().changed);
        for again in [Some(at(10)), None] {
            assert!(!jobs.started(described(500_000, None), again, at(13)).unwrap().changed);
        }
        assert_eq!(spans(&jobs.observe(at(20))), [(500_000, 10, 20)]);
        let mut jobs = Jobs::with(serde_json::from_str(&serde_json::to_string(&jobs.kept()).unwrap()).unwrap());
        assert_eq!(spans(&jobs.observe(at(50))), [(500_000, 10, 50)], "it ran while the server did not");
        jobs.started(described(1_000_000, None), Some(at(60)), at(60)).unwrap();
        assert_eq!(spans(&jobs.observe(at(70))), [(500_000, 10, 60), (1_000_000, 60, 70)]);
        assert!(jobs.stopped(id, Some(at(59)), at(80)).unwrap_err().contains("cannot have stopped"));
        assert!(jobs.stopped(id, Some(at(75)), at(80)).unwrap().changed);
        assert!(!jobs.stopped(id, None, at(81)).unwrap().changed);
        assert!(
            !jobs.started(described(1_000_000, None), Some(at(60)), at(82)).unwrap().changed,
            "the same run, told late"
        );
        assert!(jobs.started(described(1_000_000, None), Some(at(70)), at(82)).unwrap_err().contains("until"));
        assert_eq!(spans(&jobs.observe(at(90))), [(1_000_000, 60, 75)]);
        assert!(jobs.observe(at(100)).is_empty());
    }

    #[test]
    fn a_silent_job_ends_with_its_lease_and_may_come_back() {
        let (job, replica): (Label, Label) = ("finetune".into(), "shared-0".into());
        let mut jobs = Jobs::default();
        jobs.started(described(1, Some(30)), None, at(0)).unwrap();
        assert_eq!(spans(&jobs.observe(at(100))), [(1, 0, 30)]);
        jobs.heartbeat((&job, &replica), Some(60_000_000), at(110)).unwrap();
        assert_eq!(spans(&jobs.observe(at(120))), [(1, 0, 120)], "it never stopped");
        assert_eq!(spans(&jobs.observe(at(500))), [(1, 0, 170)]);
        assert!(jobs.observe(at(200_000)).is_empty());
        assert!(jobs.heartbeat((&job, &replica), None, at(200_000)).is_err());
    }
}
