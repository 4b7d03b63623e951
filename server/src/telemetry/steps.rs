//! The steps that engines publish one by one: over a bounded channel into the ledger, many at once.

use std::sync::Arc;

use fleet::steps::{Heard, StepSource};
use ledger::{Fact, Label};
use tokio::sync::mpsc;

use super::Parts;
use crate::config::UpstreamSection;

/// Steps that may wait to be written; an engine makes some hundred a second.
const WAITING_MAX: usize = 4_096;
/// Steps that are written at once.
const TOGETHER_MAX: usize = 512;

/// Where an upstream's engine publishes its steps.
pub(super) fn source(upstream: &UpstreamSection) -> Option<StepSource> {
    let endpoint = upstream.engine.as_ref()?.forward_pass.clone()?;
    upstream.pool.as_ref()?;
    Some(StepSource { engine: upstream.name.as_str().into(), endpoint })
}

/// Follows one engine for as long as the server runs.
pub(super) async fn follow(parts: Parts, source: StepSource) {
    let name = source.engine.clone();
    parts.status.steps(&name, &source.endpoint);
    let (out, mut heard) = mpsc::channel(WAITING_MAX);
    let following = fleet::steps::follow(source, Arc::clone(&parts.clock), out);
    let writing = async {
        let mut together = Vec::with_capacity(TOGETHER_MAX);
        while heard.recv_many(&mut together, TOGETHER_MAX).await > 0 {
            write(&parts, &name, together.drain(..));
        }
    };
    let (ended, ()) = tokio::join!(following, writing);
    if let Err(error) = ended {
        tracing::warn!("the steps of `{name}` are not followed: {error}");
        parts.status.steps_changed(&name, |steps| steps.failure = Some(error.to_string()));
    }
}

fn write(parts: &Parts, name: &Label, heard: impl Iterator<Item = Heard>) {
    let mut facts = Vec::new();
    let now = parts.clock.now();
    let mut alive = false;
    for one in heard {
        alive |= matches!(one, Heard::Step(_) | Heard::Heartbeat);
        match one {
            Heard::Step(step) => facts.push(Fact::Step(Box::new(step))),
            Heard::Lost { messages, .. } => parts.status.steps_changed(name, |steps| steps.lost += messages),
            Heard::Unreadable(error) => parts.status.steps_changed(name, |steps| {
                steps.unreadable += 1;
                steps.failure = Some(error.to_string());
            }),
            Heard::Connected => parts.status.steps_changed(name, |steps| steps.failure = None),
            Heard::Disconnected(reason) => parts.status.steps_changed(name, |steps| steps.failure = Some(reason)),
            Heard::Heartbeat | Heard::Restarted { .. } => {}
        }
    }
    let count = u64::try_from(facts.len()).unwrap_or(u64::MAX);
    let written = parts.facts.append(&facts);
    if alive {
        parts.declared.answered(name, now);
    }
    parts.status.steps_changed(name, |steps| {
        if alive {
            steps.heard_at = Some(now);
        }
        match written {
            Ok(()) => steps.written += count,
            Err(error) => {
                steps.lost += count;
                steps.failure = Some(format!("steps could not be written: {error}"));
            }
        }
    });
}
