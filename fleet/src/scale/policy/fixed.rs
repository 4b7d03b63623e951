//! Always the same number: what everybody starts with, and what savings are measured against.

use ledger::Timestamp;

use super::parameters::parameters;
use crate::scale::observe::{Decision, Observation};

/// As many replicas as the static plan has, or as it is told.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Static {
    /// Replicas; 0 is the static plan's number.
    pub replicas: f64,
}

parameters!(Static "static" { replicas "replicas" 0.0..=1e6 "replicas, 0 for as many as the static plan has" });

impl Static {
    /// The number.
    #[must_use]
    pub fn desired(&self, observation: &Observation, _now: Timestamp) -> Decision {
        let replicas = match crate::scale::forecast::whole(self.replicas) {
            0 => observation.bounds.static_replicas,
            told => told,
        };
        Decision { replicas, reasons: vec![format!("always {replicas}")], planned: true, ..Decision::default() }
    }
}
