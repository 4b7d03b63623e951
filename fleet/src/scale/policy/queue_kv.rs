//! Saturation of queues and KV caches: the rule of inference gateways (a replica is saturated from a KV cache at 80 % or
//! five waiting requests on, as the Gateway API inference extension publishes it), one replica at a time.

use ledger::Timestamp;

use super::parameters::parameters;
use super::{mean, recent, unknown};
use crate::scale::observe::{Decision, Observation};

/// One more when the mean KV cache or the mean queue comes within `spare` of saturation and none is on its way; one less when
/// the others would still be as far from it with the load of all.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QueueKv {
    /// Part of the KV cache at which a replica is saturated.
    pub kv: f64,
    /// Waiting requests at which a replica is saturated.
    pub queue: f64,
    /// Part of the way to saturation that is kept free.
    pub spare: f64,
    /// Seconds over which both are averaged.
    pub window_s: f64,
}

impl Default for QueueKv {
    fn default() -> QueueKv {
        QueueKv { kv: 0.8, queue: 5.0, spare: 0.1, window_s: 60.0 }
    }
}

parameters!(QueueKv "queue-kv" {
    kv "kv" 0.01..=1.0 "part of the KV cache at which a replica is saturated",
    queue "queue" 0.1..=10000.0 "waiting requests at which a replica is saturated",
    spare "spare" 0.0..=1.0 "what is kept free of the KV cache",
    window_s "window" 1.0..=3600.0 "seconds over which both are averaged",
});

impl QueueKv {
    /// One more, one less, or as it is.
    #[must_use]
    pub fn desired(&self, observation: &Observation, now: Timestamp) -> Decision {
        let samples = recent(observation, now, self.window_s);
        let current = observation.provisioned();
        let kv = mean(samples.iter().map(|sample| sample.kv_used));
        let waiting = mean(samples.iter().map(|sample| sample.waiting));
        if observation.ready == 0 {
            let first = u32::from(waiting.unwrap_or(0.0) > 0.0);
            let reasons = vec![format!("nothing serves and {:.1} requests wait", waiting.unwrap_or(0.0))];
            return Decision { replicas: current.max(first), reasons, ..Decision::default() };
        }
        let (Some(kv), Some(waiting)) = (kv, waiting) else {
            return unknown(observation, "the KV caches' or the queues' state");
        };
        let ready = f64::from(observation.ready);
        let queue = waiting / ready;
        let full = |factor: f64| kv * factor > self.kv - self.spare || queue * factor > self.queue * (1.0 - self.spare);
        let state = format!("KV caches at {:.0} %, {queue:.1} waiting a replica", kv * 100.0);
        let (replicas, why) = if full(1.0) && observation.pending.is_empty() {
            (current.saturating_add(1), "close to saturation: one more")
        } else if full(1.0) {
            (current, "close to saturation, and one is on its way")
        } else if observation.ready > 1 && observation.pending.is_empty() && !full(ready / (ready - 1.0)) {
            (current.saturating_sub(1), "the others could do it: one less")
        } else if observation.ready == 1 && kv == 0.0 && queue == 0.0 && samples.iter().all(idle) {
            (0, "nothing is asked: none")
        } else {
            (current, "neither full nor empty")
        };
        Decision { replicas, reasons: vec![format!("{state}; {why}")], ..Decision::default() }
    }
}

fn idle(sample: &crate::scale::observe::Sample) -> bool {
    sample.running == Some(0.0) && sample.waiting == Some(0.0)
}
