//! How each source of telemetry goes, for people: when it last answered, what it lacks and what that costs.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fleet::telemetry::{EngineKind, Found, Missing, Target, restarted};
use ledger::{EngineReading, Label, Timestamp};
use serde_json::{Value, json};

/// The state of all sources. Cheap to clone; all clones are one.
#[derive(Debug, Clone, Default)]
pub struct Status(Arc<Mutex<Shown>>);

#[derive(Debug, Default)]
struct Shown {
    engines: BTreeMap<Label, Engine>,
    steps: BTreeMap<Label, Steps>,
    gpus: BTreeMap<Label, Source>,
}

/// What is common to all sources.
#[derive(Debug, Clone, Default)]
struct Source {
    url: String,
    answered_at: Option<Timestamp>,
    failed_at: Option<Timestamp>,
    /// Why the last try failed; `None` when it did not.
    failure: Option<String>,
    missing: Vec<Missing>,
    /// How many GPUs it told of.
    gpus: Option<usize>,
    /// Who holds GPUs and is known to no rule.
    unknown: Vec<Label>,
}

#[derive(Debug, Clone, Default)]
struct Engine {
    kind: Option<EngineKind>,
    source: Source,
    reading: Option<EngineReading>,
    restarts: u64,
}

/// How the steps of an engine come in.
#[derive(Debug, Clone, Default)]
pub struct Steps {
    /// Where they are published.
    pub endpoint: String,
    /// When the newest was heard.
    pub heard_at: Option<Timestamp>,
    /// Steps that were written.
    pub written: u64,
    /// Steps that were lost on the way: holes in their numbers, and those that could not be written.
    pub lost: u64,
    /// Messages that could not be read, and what was wrong with the last.
    pub unreadable: u64,
    /// What was last wrong.
    pub failure: Option<String>,
}

/// One source as the metrics show it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// Its name.
    pub name: Label,
    /// Whether the last try was answered.
    pub up: bool,
    /// When it last answered.
    pub answered_at: Option<Timestamp>,
    /// How many expected names it lacks.
    pub missing: usize,
}

impl Status {
    /// Forgets every source: the configuration changed.
    pub(super) fn forget(&self) {
        *self.lock() = Shown::default();
    }

    pub(super) fn engine(&self, name: &Label, target: &Target) {
        let source = Source { url: target.url.clone(), ..Source::default() };
        self.lock().engines.insert(name.clone(), Engine { kind: Some(target.kind), source, ..Engine::default() });
    }

    pub(super) fn engine_read(&self, name: &Label, found: Found, now: Timestamp) {
        let mut shown = self.lock();
        // A task that was stopped a moment ago may still speak: its source is no longer shown.
        let Some(engine) = shown.engines.get_mut(name) else { return };
        if engine.reading.as_ref().is_some_and(|before| restarted(before, &found.reading)) {
            engine.restarts += 1;
        }
        engine.source.answered(found.missing, now);
        engine.reading = Some(found.reading);
    }

    /// Whether this is news: the try before was answered, or failed in another way.
    pub(super) fn engine_failed(&self, name: &Label, why: &str, now: Timestamp) -> bool {
        self.lock().engines.get_mut(name).is_some_and(|engine| engine.source.failed(why, now))
    }

    pub(super) fn gpus(&self, name: &Label, url: &str) {
        self.lock().gpus.insert(name.clone(), Source { url: url.to_owned(), ..Source::default() });
    }

    pub(super) fn gpus_read(&self, name: &Label, gpus: usize, missing: Vec<Missing>, now: Timestamp) {
        let mut shown = self.lock();
        let Some(source) = shown.gpus.get_mut(name) else { return };
        source.gpus = Some(gpus);
        source.answered(missing, now);
    }

    pub(super) fn gpus_unknown(&self, name: &Label, unknown: Vec<Label>) {
        if let Some(source) = self.lock().gpus.get_mut(name) {
            source.unknown = unknown;
        }
    }

    /// As [`engine_failed`](Status::engine_failed).
    pub(super) fn gpus_failed(&self, name: &Label, why: &str, now: Timestamp) -> bool {
        self.lock().gpus.get_mut(name).is_some_and(|source| source.failed(why, now))
    }

    pub(super) fn steps(&self, name: &Label, endpoint: &str) {
        self.lock().steps.insert(name.clone(), Steps { endpoint: endpoint.to_owned(), ..Steps::default() });
    }

    pub(super) fn steps_changed(&self, name: &Label, change: impl FnOnce(&mut Steps)) {
        if let Some(steps) = self.lock().steps.get_mut(name) {
            change(steps);
        }
    }

    /// What an engine last said of itself, whenever that was.
    #[must_use]
    pub fn reading(&self, name: &Label) -> Option<EngineReading> {
        self.lock().engines.get(name)?.reading.clone()
    }

    /// What is known of an engine's telemetry; its age is counted up to `now`.
    #[must_use]
    pub fn of_engine(&self, name: &str, now: Timestamp) -> Value {
        let shown = self.lock();
        let metrics = shown.engines.get(name).map(|engine| {
            let mut document = engine.source.document(now);
            document["runs"] = json!(engine.kind);
            document["reading"] = json!(engine.reading);
            document["restarts"] = engine.restarts.into();
            document
        });
        let steps = shown.steps.get(name).map(|steps| {
            json!({
                "endpoint": steps.endpoint, "heard_at": steps.heard_at, "written": steps.written, "lost": steps.lost,
                "unreadable": steps.unreadable, "failure": steps.failure,
            })
        });
        json!({ "metrics": metrics, "forward_pass": steps })
    }

    /// The sources of GPU telemetry.
    #[must_use]
    pub fn of_gpus(&self, now: Timestamp) -> Vec<Value> {
        let shown = self.lock();
        let of = |(name, source): (&Label, &Source)| {
            let mut document = source.document(now);
            document["source"] = json!(name);
            document["gpus"] = json!(source.gpus);
            document["unknown_holders"] = json!(source.unknown);
            document
        };
        shown.gpus.iter().map(of).collect()
    }

    /// Every engine whose metrics are read.
    #[must_use]
    pub fn engines(&self) -> Vec<Health> {
        let of = |(name, engine): (&Label, &Engine)| engine.source.health(name);
        self.lock().engines.iter().map(of).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Shown> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Source {
    fn answered(&mut self, missing: Vec<Missing>, now: Timestamp) {
        self.answered_at = Some(now);
        self.failure = None;
        self.missing = missing;
    }

    fn failed(&mut self, why: &str, now: Timestamp) -> bool {
        self.failed_at = Some(now);
        self.failure.replace(why.to_owned()).is_none_or(|before| before != why)
    }

    fn health(&self, name: &Label) -> Health {
        let up = self.failure.is_none() && self.answered_at.is_some();
        Health { name: name.clone(), up, answered_at: self.answered_at, missing: self.missing.len() }
    }

    fn document(&self, now: Timestamp) -> Value {
        let missing: Vec<Value> = self
            .missing
            .iter()
            .map(|missing| {
                let tier = missing.loss.tier();
                json!({ "name": missing.name, "costs": missing.loss.text(), "tier": tier })
            })
            .collect();
        let age_s = self.answered_at.map(|at| now.micros().saturating_sub(at.micros()).max(0) / 1_000_000);
        json!({
            "url": self.url, "answered_at": self.answered_at, "age_s": age_s, "failed_at": self.failed_at,
            "failure": self.failure, "missing": missing,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use fleet::telemetry::Loss;

    #[test]
    fn a_source_shows_when_it_answered_and_what_it_lacks() {
        let (status, name): (Status, Label) = (Status::default(), "a".into());
        let at = |seconds: i64| Timestamp::from_micros(seconds * 1_000_000);
        let target = Target {
            engine: name.clone(),
            pool: "p".into(),
            kind: EngineKind::Vllm,
            url: "http://h/metrics".to_owned(),
            bearer: None,
        };
        status.engine(&name, &target);
        assert_eq!(status.of_engine("a", at(0))["metrics"]["answered_at"], Value::Null);
        let reading = |generation_tokens| EngineReading {
            generation_tokens: Some(generation_tokens),
            ..EngineReading::default()
        };
        let missing = vec![Missing { name: "vllm:num_preemptions", loss: Loss::Preemptions }];
        status.engine_read(&name, Found { reading: reading(9), missing }, at(10));
        assert!(status.engine_failed(&name, "nobody answers", at(20)));
        assert!(!status.engine_failed(&name, "nobody answers", at(30)), "said once");
        let shown = &status.of_engine("a", at(40))["metrics"];
        assert_eq!((&shown["age_s"], &shown["failure"]), (&30.into(), &"nobody answers".into()));
        assert_eq!(
            (&shown["missing"][0]["name"], &shown["missing"][0]["tier"]),
            (&"vllm:num_preemptions".into(), &"B".into())
        );
        assert_eq!(shown["reading"]["generation_tokens"], 9);
        assert!(!status.engines()[0].up);
        status.engine_read(&name, Found { reading: reading(1), missing: Vec::new() }, at(50));
        let shown = &status.of_engine("a", at(50))["metrics"];
        assert_eq!((&shown["restarts"], &shown["failure"]), (&1.into(), &Value::Null), "a counter fell");
        assert!(status.engines()[0].up);
    }
}
