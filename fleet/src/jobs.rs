//! Work on a pool's GPUs that is no request, found by who holds the GPUs: pods by the labels of a GPU exporter, processes
//! by the driver. Pure: rules, what was open and what is seen now give the [`JobFact`]s.
//!
//! A job's share is the part of its replica that it used *at most*: the part of the time in which the GPUs it holds were
//! active at all (the larger of compute and memory activity), and all of it where that is not measured. Activity is a
//! bound on time, not a measure of work, and nothing else is read from it.

use std::collections::BTreeMap;
use std::str::FromStr;

use ledger::telemetry::Millionths;
use ledger::{Context, GpuReading, JobFact, JobSource, Label, Timestamp};

use crate::telemetry::{GpuProcess, dcgm};

const WHOLE: Millionths = 1_000_000;

/// A text in which each `*` stands for any text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    /// Whether the whole text fits.
    #[must_use]
    pub fn fits(&self, text: &str) -> bool {
        let Some((start, rest)) = self.0.split_once('*') else { return self.0 == text };
        let Some(mut text) = text.strip_prefix(start) else { return false };
        let Some((middles, end)) = rest.rsplit_once('*') else { return text.ends_with(rest) };
        for middle in middles.split('*') {
            match text.find(middle) {
                Some(at) => text = &text[at + middle.len()..],
                None => return false,
            }
        }
        text.ends_with(end)
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Pattern, String> {
        if text.is_empty() {
            return Err("an empty pattern fits nothing; write * for anything".to_owned());
        }
        Ok(Pattern(text.to_owned()))
    }
}

/// Who may hold a GPU. Every pattern that is given must fit, and one must be given.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HolderPattern {
    /// Kubernetes namespace.
    pub namespace: Option<Pattern>,
    /// Kubernetes pod.
    pub pod: Option<Pattern>,
    /// Program of a process, with or without its path.
    pub process: Option<Pattern>,
}

/// Holders that are a job, and whose.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct JobRule {
    /// Who.
    pub holder: HolderPattern,
    /// The job's name. Holders of one name are one job. Without it each holder is a job of its own name.
    pub job: Option<Label>,
    /// Who caused it.
    pub context: Context,
}

/// A replica and how to know its GPUs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Place {
    /// The pool.
    pub pool: Label,
    /// The replica of the capacity facts.
    pub replica: Label,
    /// How many GPUs it has.
    pub gpus: u32,
    /// Machines whose GPUs belong to it. Without these and `uuids` every GPU of the pool does.
    pub hosts: Vec<Label>,
    /// UUIDs of its GPUs.
    pub uuids: Vec<Label>,
}

/// How to find jobs.
#[derive(Debug, Clone, PartialEq)]
pub struct Rules {
    /// Holders that are engines and never jobs. Once one is named by its pod, every other pod that holds a GPU is a job; once
    /// one is named by its process, every other process.
    pub engines: Vec<HolderPattern>,
    /// Holders that are jobs; the first that fits decides.
    pub jobs: Vec<JobRule>,
    /// The replicas.
    pub places: Vec<Place>,
    /// Microseconds between two looks.
    pub interval_us: u64,
    /// A job ends when it was not seen for this many intervals; seen again it is another run.
    pub ends_after: u32,
}

impl Default for Rules {
    fn default() -> Rules {
        Rules { engines: Vec::new(), jobs: Vec::new(), places: Vec::new(), interval_us: 5_000_000, ends_after: 3 }
    }
}

/// What a look at the GPUs gave.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SeenJobs {
    /// Facts that grew or are new, to be appended.
    pub facts: Vec<JobFact>,
    /// Facts that are not over, to be given to the next look.
    pub open: Vec<JobFact>,
    /// Holders of the pools' GPUs that no rule knows, so that somebody can write one.
    pub unknown: Vec<Label>,
}

/// Finds the jobs among the pods that hold GPUs. `before` is [`SeenJobs::open`] of the last look.
#[must_use]
pub fn observe_pods(rules: &Rules, before: &[JobFact], gpus: &[GpuReading], now: Timestamp) -> SeenJobs {
    let held = gpus.iter().filter_map(|gpu| {
        let pod = gpu.pod.as_deref()?;
        Some(Held { namespace: gpu.namespace.as_deref(), pod: Some(pod), process: None, gpu })
    });
    observe(rules, before, held, JobSource::PodLabels, now)
}

/// Finds the jobs among the processes that compute on GPUs. `gpus` are the driver's readings of the same moment, which
/// tell the pool. `before` is [`SeenJobs::open`] of the last look.
#[must_use]
pub fn observe_processes(
    rules: &Rules,
    before: &[JobFact],
    gpus: &[GpuReading],
    processes: &[GpuProcess],
    now: Timestamp,
) -> SeenJobs {
    let held = processes.iter().filter_map(|process| {
        let gpu = gpus.iter().find(|gpu| gpu.uuid == process.uuid && gpu.slice == process.slice)?;
        let name = process.name.as_deref().unwrap_or("unnamed process");
        Some(Held { namespace: None, pod: None, process: Some(name), gpu })
    });
    observe(rules, before, held, JobSource::GpuProcesses, now)
}

/// A GPU and one of those who hold it.
struct Held<'a> {
    namespace: Option<&'a str>,
    pod: Option<&'a str>,
    process: Option<&'a str>,
    gpu: &'a GpuReading,
}

impl Held<'_> {
    fn name(&self) -> Label {
        match (self.namespace, self.pod, self.process) {
            (Some(namespace), Some(pod), _) => format!("{namespace}/{pod}").into(),
            (_, Some(name), _) | (_, _, Some(name)) => name.into(),
            (_, None, None) => "unnamed".into(),
        }
    }

    fn fits(&self, pattern: &HolderPattern) -> bool {
        let fits = |pattern: &Option<Pattern>, text: Option<&str>| match (pattern, text) {
            (None, _) => true,
            (Some(pattern), Some(text)) => pattern.fits(text),
            (Some(_), None) => false,
        };
        let program = self.process.and_then(|path| path.rsplit('/').next());
        let is_process = fits(&pattern.process, self.process) || fits(&pattern.process, program);
        let names_somebody = pattern.namespace.is_some() || pattern.pod.is_some() || pattern.process.is_some();
        names_somebody && fits(&pattern.namespace, self.namespace) && fits(&pattern.pod, self.pod) && is_process
    }
}

/// What is seen of one job on one replica.
struct Seen<'a> {
    pool: &'a Label,
    context: Context,
    /// GPUs of the replica in use by it at most.
    gpus: f64,
    replica_gpus: f64,
}

/// The jobs that hold one GPU, each with its replica.
type Holders<'a> = BTreeMap<(Label, Label), (Context, &'a Place, &'a GpuReading)>;

fn observe<'a>(
    rules: &Rules,
    before: &[JobFact],
    held: impl Iterator<Item = Held<'a>>,
    source: JobSource,
    now: Timestamp,
) -> SeenJobs {
    let mut unknown: Vec<Label> = Vec::new();
    // Who holds each GPU or slice, each job once: the processes of one job share its part.
    let mut holders: BTreeMap<(&Label, &Option<Label>), Holders<'_>> = BTreeMap::new();
    for held in held {
        let Some(place) = place_of(rules, held.gpu) else { continue };
        match rules.job_of(&held) {
            Role::Engine => {}
            Role::Unknown => unknown.push(held.name()),
            Role::Job(job, context) => {
                let jobs = holders.entry((&held.gpu.uuid, &held.gpu.slice)).or_default();
                jobs.insert((job, place.replica.clone()), (*context, place, held.gpu));
            }
        }
    }
    let mut seen: BTreeMap<(Label, Label), Seen<'_>> = BTreeMap::new();
    for jobs in holders.into_values() {
        // Jobs that hold the same GPU share its activity, so that together they never used more than it was active.
        let sharers = jobs.len().max(1) as f64;
        for (identity, (context, place, gpu)) in jobs {
            let replica_gpus = f64::from(place.gpus.max(1));
            let job = seen.entry(identity).or_insert(Seen { pool: &place.pool, context, gpus: 0.0, replica_gpus });
            job.gpus += f64::from(active(gpu)) / f64::from(WHOLE) * part_of_gpu(gpu) / sharers;
        }
    }
    unknown.sort_unstable();
    unknown.dedup();
    grow(rules, before, seen, source, now, unknown)
}

/// Extends the facts of the jobs that are seen, starts those of new ones and drops those of jobs long gone.
fn grow(
    rules: &Rules,
    before: &[JobFact],
    seen: BTreeMap<(Label, Label), Seen<'_>>,
    source: JobSource,
    now: Timestamp,
    unknown: Vec<Label>,
) -> SeenJobs {
    let patience_us = rules.interval_us.saturating_mul(u64::from(rules.ends_after));
    let is_open = |fact: &&JobFact| fact.source == source && now.micros_since(fact.period.end) <= patience_us;
    let mut open: BTreeMap<(Label, Label), JobFact> = BTreeMap::new();
    for fact in before.iter().filter(is_open) {
        open.insert((fact.job.clone(), fact.replica.clone()), fact.clone());
    }
    let mut facts = Vec::new();
    for (identity, job) in seen {
        let cap = part_of(job.gpus / job.replica_gpus);
        let fact = match open.remove(&identity) {
            Some(fact) if now <= fact.period.end => {
                open.insert(identity, fact);
                continue;
            }
            Some(fact) => longer(fact, cap, job.context, now),
            None => JobFact {
                job: identity.0.clone(),
                pool: job.pool.clone(),
                replica: identity.1.clone(),
                context: job.context,
                share: cap,
                // A look speaks of the interval that ends with it.
                period: ledger::Period {
                    start: now.plus_micros(i64::try_from(rules.interval_us).map_or(0, |interval| -interval)),
                    end: now,
                },
                source,
                observed_at: now,
            },
        };
        facts.push(fact.clone());
        open.insert(identity, fact);
    }
    SeenJobs { facts, open: open.into_values().collect(), unknown }
}

/// The fact until `now`; its share becomes the mean over its time.
fn longer(fact: JobFact, cap: Millionths, context: Context, now: Timestamp) -> JobFact {
    let (known_us, new_us) = (fact.period.micros() as f64, now.micros_since(fact.period.end) as f64);
    let share = (f64::from(fact.share) * known_us + f64::from(cap) * new_us) / (known_us + new_us);
    let period = ledger::Period { end: now, ..fact.period };
    JobFact { share: part_of(share / f64::from(WHOLE)), context, period, observed_at: now, ..fact }
}

enum Role {
    Engine,
    Job(Label, Box<Context>),
    Unknown,
}

impl Rules {
    fn job_of(&self, held: &Held<'_>) -> Role {
        if self.engines.iter().any(|engine| held.fits(engine)) {
            return Role::Engine;
        }
        if let Some(rule) = self.jobs.iter().find(|rule| held.fits(&rule.holder)) {
            return Role::Job(rule.job.clone().unwrap_or_else(|| held.name()), Box::new(rule.context.clone()));
        }
        // Engines that are named by their pods say nothing of what their processes are called, nor the other way round.
        let engines_named = self.engines.iter().any(|engine| engine.process.is_some() == held.process.is_some());
        if engines_named { Role::Job(held.name(), Box::default()) } else { Role::Unknown }
    }
}

/// The replica that the GPU belongs to: by UUID, else by machine, else the one that takes every GPU of the pool.
fn place_of<'a>(rules: &'a Rules, gpu: &GpuReading) -> Option<&'a Place> {
    let places = || rules.places.iter().filter(|place| gpu.pool.as_ref().is_none_or(|pool| *pool == place.pool));
    let by_uuid = places().find(|place| place.uuids.contains(&gpu.uuid));
    let by_host = || places().find(|place| gpu.host.as_ref().is_some_and(|host| place.hosts.contains(host)));
    let takes_all = |place: &&Place| gpu.pool.is_some() && place.uuids.is_empty() && place.hosts.is_empty();
    by_uuid.or_else(by_host).or_else(|| places().find(takes_all))
}

/// Part of the time in which the GPU or slice was active at most.
fn active(gpu: &GpuReading) -> Millionths {
    gpu.engine_active.max(gpu.memory_active).unwrap_or(WHOLE)
}

/// A slice's part of its GPU by its sevenths of the compute, 1 for a whole GPU or a slice of unknown size.
fn part_of_gpu(gpu: &GpuReading) -> f64 {
    let profile = gpu.slice.as_deref().map(dcgm::profile_of);
    let sevenths = profile.and_then(|profile| profile.split_once('g')?.0.parse::<u32>().ok());
    sevenths.filter(|sevenths| (1..=7).contains(sevenths)).map_or(1.0, |sevenths| f64::from(sevenths) / 7.0)
}

fn part_of(part: f64) -> Millionths {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to 0..=1 before")]
    let millionths = (part.clamp(0.0, 1.0) * f64::from(WHOLE)).round() as u32;
    millionths
}

#[cfg(test)]
mod tests;
