//! Listening to engines and GPUs while the server runs: one task for each source, what it says into the ledger, how it
//! goes into [`Status`].
//!
//! No source can stop another, or the server: a task that cannot read waits and tries again, and what it could not read is
//! unknown, never zero.

mod gpus;
mod spans;
mod status;
mod steps;

use std::sync::Arc;
use std::time::Duration;

use fleet::telemetry::{Limits, ScrapeError, Scraper, Target};
use ledger::{Clock, Fact};
use tokio::task::JoinSet;

use crate::config::{Config, Loaded, UpstreamSection};
use crate::declared::Declared;
use crate::engines::Learned;
use crate::facts::Facts;

pub use spans::receiver;
pub use status::Status;

/// Longest pause between two tries at a source that does not answer.
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// What every task works with.
#[derive(Clone)]
pub struct Parts {
    /// Where facts go.
    pub facts: Facts,
    /// The engines, which learn from what is heard of them.
    pub declared: Arc<Declared>,
    /// What people are shown.
    pub status: Status,
    /// Where time comes from.
    pub clock: Arc<dyn Clock>,
}

/// All sources that are listened to; they end when this is dropped.
pub struct Telemetry {
    parts: Parts,
    tasks: JoinSet<()>,
}

impl Telemetry {
    /// Starts a task for each source of the configuration.
    #[must_use]
    pub fn start(loaded: &Loaded, parts: Parts) -> Telemetry {
        let mut telemetry = Telemetry { parts, tasks: JoinSet::new() };
        telemetry.listen(&loaded.config);
        telemetry
    }

    /// Takes a changed configuration.
    pub fn change(&mut self, loaded: &Loaded) {
        self.tasks.abort_all();
        self.parts.status.forget();
        self.listen(&loaded.config);
    }

    fn listen(&mut self, config: &Config) {
        let every = Duration::from_millis(config.telemetry.scrape_every_ms);
        let scraper =
            Scraper::new(Limits { whole: every.clamp(MIN_WAIT, Limits::default().whole), ..Limits::default() });
        for upstream in &config.upstream {
            if let Some(target) = target(upstream) {
                self.tasks.spawn(watch(self.parts.clone(), scraper.clone(), target, every));
            }
            if let Some(source) = steps::source(upstream) {
                self.tasks.spawn(steps::follow(self.parts.clone(), source));
            }
        }
        let finding = gpus::Finding::of(config);
        for target in gpus::targets(config) {
            self.tasks.spawn(gpus::watch(self.parts.clone(), scraper.clone(), target, finding.clone(), every));
        }
        if config.telemetry.nvml {
            let pool = config.telemetry.nvml_pool.clone();
            self.tasks.spawn(gpus::watch_own(self.parts.clone(), pool, finding, every));
        }
    }
}

/// Shortest time that an answer is given, however often is asked.
const MIN_WAIT: Duration = Duration::from_secs(1);

/// The engine behind an upstream, when its metrics are to be read.
fn target(upstream: &UpstreamSection) -> Option<Target> {
    Some(Target {
        engine: upstream.name.as_str().into(),
        pool: upstream.pool.as_deref()?.into(),
        kind: upstream.runs()?,
        url: upstream.metrics_url()?,
        bearer: None,
    })
}

/// Reads one engine again and again.
async fn watch(parts: Parts, scraper: Scraper, target: Target, every: Duration) {
    let name = target.engine.clone();
    parts.status.engine(&name, &target);
    let mut failures = 0;
    loop {
        let now = parts.clock.now();
        match scraper.engine(&target, now).await {
            Ok(found) => {
                failures = 0;
                parts.declared.heard(&name, now);
                parts.declared.learn(&name, Learned::of(&found.reading), now);
                let written = parts.facts.append(&[Fact::Reading(Box::new(found.reading.clone()))]);
                parts.status.engine_read(&name, found, now);
                if let Err(error) = written {
                    parts.status.engine_failed(&name, &format!("the reading could not be written: {error}"), now);
                }
            }
            Err(error) => {
                failures += 1;
                let starting = if is_alive(&error) {
                    parts.declared.heard(&name, now);
                    false
                } else {
                    parts.declared.silent(&name)
                };
                let stopped = parts.declared.is_stopped(&name);
                if parts.status.engine_failed(&name, &error.to_string(), now) && !stopped {
                    tracing::warn!("{error}");
                }
                // When a starting engine is ready decides what its start cost, so it is asked as often as ever.
                // And one whose replica is stopped may be started at any moment.
                failures = if starting || stopped { 0 } else { failures };
            }
        }
        tokio::time::sleep(pause(every, failures)).await;
    }
}

/// Whether something answered, though not with metrics: then the engine's process is there.
fn is_alive(error: &ScrapeError) -> bool {
    use fleet::telemetry::scrape::ScrapeCause;
    !matches!(error.cause, ScrapeCause::Unreachable(_) | ScrapeCause::TimedOut(_) | ScrapeCause::Address(_))
}

/// How long to wait after so many failures: twice as long each time, within bounds.
fn pause(every: Duration, failures: u32) -> Duration {
    every.saturating_mul(1 << failures.min(10)).min(PAUSE_MAX.max(every))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_is_asked_less_and_less_often() {
        let seconds = |failures| pause(Duration::from_secs(5), failures).as_secs();
        assert_eq!([0, 1, 2, 3, 4, 9].map(seconds), [5, 10, 20, 40, 60, 60]);
        assert_eq!(pause(Duration::from_secs(300), u32::MAX), Duration::from_secs(300));
    }
}
