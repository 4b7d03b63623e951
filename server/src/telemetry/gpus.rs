//! GPUs: exporters that are scraped, and this machine's own through the driver; and the jobs that hold them.

use std::sync::Arc;
use std::time::Duration;

use fleet::jobs::{HolderPattern, JobRule, Pattern, Place, Rules, SeenJobs, observe_pods, observe_processes};
use fleet::telemetry::{FoundGpus, GpuTarget, Nvml, Scraper};
use ledger::{Fact, GpuReading, JobFact, Label, Timestamp};

use super::{Parts, pause};
use crate::config::{Config, ReplicaSection};

/// What this machine's own GPUs are called among the sources.
const OWN: &str = "nvml";

/// The exporters of the configuration.
pub(super) fn targets(config: &Config) -> Vec<GpuTarget> {
    let target = |url: &str, pool: Option<&str>| GpuTarget {
        name: url.into(),
        pool: pool.map(Into::into),
        url: url.to_owned(),
        bearer: None,
    };
    config.telemetry.gpu_exporters.iter().map(|exporter| target(&exporter.url, exporter.pool.as_deref())).collect()
}

/// Reads one exporter again and again.
pub(super) async fn watch(parts: Parts, scraper: Scraper, target: GpuTarget, finding: Finding, every: Duration) {
    let name = target.name.clone();
    parts.status.gpus(&name, &target.url);
    let (mut failures, mut open) = (0, Vec::new());
    loop {
        let now = parts.clock.now();
        match scraper.gpus(&target, now).await {
            Ok(found) => {
                failures = 0;
                if let Some(rules) = finding.rules(&parts, every) {
                    let seen = observe_pods(&rules, &open, &found.readings, now);
                    open = keep(&parts, &name, seen, now);
                }
                take(&parts, &name, found, now);
            }
            Err(error) => {
                failures += 1;
                if parts.status.gpus_failed(&name, &error.to_string(), now) {
                    tracing::warn!("{error}");
                }
            }
        }
        tokio::time::sleep(pause(every, failures)).await;
    }
}

/// Reads this machine's GPUs again and again; ends at once where there are none.
pub(super) async fn watch_own(parts: Parts, pool: Option<String>, finding: Finding, every: Duration) {
    let loaded = tokio::task::spawn_blocking(Nvml::load).await;
    let Ok(Some(nvml)) = loaded else { return };
    let nvml = Arc::new(nvml);
    let (name, pool): (Label, Option<Label>) = (OWN.into(), pool.map(Into::into));
    parts.status.gpus(&name, "this machine's driver");
    let mut open = Vec::new();
    loop {
        let now = parts.clock.now();
        let (asked, pool) = (Arc::clone(&nvml), pool.clone());
        let asking = tokio::task::spawn_blocking(move || (asked.read(None, pool.as_ref(), now), asked.processes()));
        match asking.await {
            Ok((readings, processes)) => {
                if let Some(rules) = finding.rules(&parts, every) {
                    let seen = observe_processes(&rules, &open, &readings, &processes, now);
                    open = keep(&parts, &name, seen, now);
                }
                take(&parts, &name, FoundGpus { readings, ..FoundGpus::default() }, now);
            }
            Err(error) => {
                parts.status.gpus_failed(&name, &error.to_string(), now);
            }
        }
        tokio::time::sleep(every).await;
    }
}

fn take(parts: &Parts, name: &Label, found: FoundGpus, now: Timestamp) {
    let fact = |reading: &GpuReading| Fact::Gpu(Box::new(reading.clone()));
    let written = parts.facts.append(&found.readings.iter().map(fact).collect::<Vec<_>>());
    parts.status.gpus_read(name, found.readings.len(), found.missing, now);
    if let Err(error) = written {
        parts.status.gpus_failed(name, &format!("the readings could not be written: {error}"), now);
    }
}

/// Writes the jobs that were seen, and gives those that are not over for the next look.
fn keep(parts: &Parts, name: &Label, seen: SeenJobs, now: Timestamp) -> Vec<JobFact> {
    let facts: Vec<Fact> = seen.facts.into_iter().map(|job| Fact::Job(Box::new(job))).collect();
    if let Err(error) = parts.facts.append(&facts) {
        parts.status.gpus_failed(name, &format!("the jobs could not be written: {error}"), now);
    }
    parts.status.gpus_unknown(name, seen.unknown);
    seen.open
}

/// How jobs are found among those who hold GPUs, as the configuration says.
#[derive(Debug, Clone)]
pub(super) struct Finding {
    engines: Vec<HolderPattern>,
    jobs: Vec<JobRule>,
    /// Where the GPUs of a replica are: pool, replica, machines, UUIDs.
    known: Vec<(String, ReplicaSection)>,
}

impl Finding {
    pub(super) fn of(config: &Config) -> Finding {
        let pattern = |text: &Option<String>| text.as_deref().and_then(|text| text.parse::<Pattern>().ok());
        let telemetry = &config.telemetry;
        let holder = |namespace, pod, process| HolderPattern {
            namespace: pattern(namespace),
            pod: pattern(pod),
            process: pattern(process),
        };
        let engines = telemetry.engines.iter().map(|one| holder(&one.namespace, &one.pod, &one.process));
        let jobs = telemetry.jobs.iter().map(|one| JobRule {
            holder: holder(&one.namespace, &one.pod, &one.process),
            job: one.job.as_deref().map(Into::into),
            context: one.context.clone(),
        });
        let known = config.pool.iter().flat_map(|pool| {
            pool.all_replicas().into_iter().map(|replica| (pool.name.clone(), replica)).collect::<Vec<_>>()
        });
        Finding { engines: engines.collect(), jobs: jobs.collect(), known: known.collect() }
    }

    /// The rules for the replicas that run now; `None` when nobody is looked for.
    fn rules(&self, parts: &Parts, every: Duration) -> Option<Rules> {
        if self.engines.is_empty() && self.jobs.is_empty() {
            return None;
        }
        let places = parts.declared.replicas().into_iter().map(|fact| {
            let known =
                self.known.iter().find(|(pool, replica)| **pool == *fact.pool && *replica.name == *fact.replica);
            let labels = |texts: &[String]| texts.iter().map(|text| text.as_str().into()).collect();
            Place {
                hosts: known.map(|(_, replica)| labels(&replica.hosts)).unwrap_or_default(),
                uuids: known.map(|(_, replica)| labels(&replica.uuids)).unwrap_or_default(),
                pool: fact.pool,
                replica: fact.replica,
                gpus: fact.gpus,
            }
        });
        Some(Rules {
            engines: self.engines.clone(),
            jobs: self.jobs.clone(),
            places: places.collect(),
            interval_us: u64::try_from(every.as_micros()).unwrap_or(u64::MAX),
            ..Rules::default()
        })
    }
}
