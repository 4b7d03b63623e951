//! Scaling decisions as pure functions: what was observed in, how many replicas there should be and why out.
//!
//! ```text
//! observation ─> policy ─> wanted ─> guards ─> decision with its reasons
//! ```
//! The simulator and the live scaler call [`judge`] with the same types, so that what was tuned on a trace is what runs.

pub mod forecast;
pub mod guard;
pub mod observe;
pub mod policy;
pub mod shadow;

pub use guard::{Guards, guarded};
pub use observe::{Bounds, Decision, ManualChange, Objective, Observation, Past, Pending, Sample};
pub use policy::{Policy, PolicyError, desired_replicas};

use ledger::Timestamp;

/// A decision, and what the policy wanted before the guards.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Verdict {
    /// What the policy wanted.
    pub wanted: u32,
    /// What came out behind the guards.
    pub decision: Decision,
}

/// The policy behind its guards.
#[must_use]
pub fn judge(observation: &Observation, policy: &Policy, guards: &Guards, now: Timestamp) -> Verdict {
    let decision = desired_replicas(observation, policy, now);
    Verdict { wanted: decision.replicas, decision: guarded(decision, observation, guards, now) }
}

/// Changes of direction among decisions since a moment: a rise that follows a fall, or a fall that follows a rise.
#[must_use]
pub fn direction_changes(decisions: &[Past], since: Timestamp) -> u32 {
    let mut rising = None;
    let mut changes = 0;
    for pair in decisions.windows(2) {
        let [before, after] = pair else { continue };
        if before.desired == after.desired {
            continue;
        }
        let rises = after.desired > before.desired;
        changes += u32::from(after.at > since && rising.is_some_and(|rising| rising != rises));
        rising = Some(rises);
    }
    changes
}

/// Which way the last change went: `Some(true)` up.
pub(crate) fn last_direction(decisions: &[Past]) -> Option<bool> {
    decisions.windows(2).rev().find_map(|pair| match pair {
        [before, after] if before.desired != after.desired => Some(after.desired > before.desired),
        _ => None,
    })
}

/// `seconds` before `now`.
pub(crate) fn earlier(now: Timestamp, seconds: f64) -> Timestamp {
    #[expect(clippy::cast_possible_truncation, reason = "clamped to what a scaler looks back at")]
    let micros = (seconds.clamp(0.0, 1e9) * 1e6) as i64;
    now.plus_micros(-micros)
}
