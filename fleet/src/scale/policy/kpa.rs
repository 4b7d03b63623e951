//! Knative's pod autoscaler: concurrency over a stable and a panic window
//! (knative.dev/docs/serving/autoscaling/kpa-specific, defaults of `config-autoscaler`).

use ledger::Timestamp;

use super::parameters::parameters;
use super::{mean, recent, unknown};
use crate::scale::earlier;
use crate::scale::forecast::whole;
use crate::scale::observe::{Decision, Observation, Sample};

/// ```text
/// wanted = ceil(mean requests in the system / (target · requests at capacity))
/// ```
/// over the stable window; over the panic window, and never down, from when that asks for `panic_threshold` times the
/// replicas that serve until a stable window later.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Kpa {
    /// `container-concurrency-target-percentage` as a part.
    pub target: f64,
    /// `stable-window`, seconds.
    pub stable_s: f64,
    /// `panic-window-percentage` as a part of the stable window.
    pub panic_part: f64,
    /// `panic-threshold-percentage` as a factor.
    pub panic_threshold: f64,
    /// `max-scale-up-rate`: so many times what serves at most.
    pub up_rate: f64,
    /// `max-scale-down-rate`: what serves divided by this at least.
    pub down_rate: f64,
    /// `scale-to-zero-grace-period`, seconds.
    pub grace_s: f64,
}

impl Default for Kpa {
    fn default() -> Kpa {
        Kpa {
            target: 0.7,
            stable_s: 60.0,
            panic_part: 0.1,
            panic_threshold: 2.0,
            up_rate: 1000.0,
            down_rate: 2.0,
            grace_s: 30.0,
        }
    }
}

parameters!(Kpa "kpa" {
    target "target" 0.01..=10.0 "requests in the system of a replica, part of those at capacity",
    stable_s "stable" 1.0..=3600.0 "seconds of the stable window",
    panic_part "panic" 0.0..=1.0 "the panic window, part of the stable one",
    panic_threshold "panic-threshold" 1.0..=100.0 "times what serves at which panic begins",
    up_rate "up-rate" 1.0..=1000.0 "times what serves at most",
    down_rate "down-rate" 1.0..=1000.0 "what serves divided by this at least",
    grace_s "grace" 0.0..=3600.0 "seconds without a request before the last replica goes",
});

impl Kpa {
    /// The stable or the panicking wish.
    #[must_use]
    pub fn desired(&self, observation: &Observation, now: Timestamp) -> Decision {
        let for_one = (self.target * observation.bounds.batch_at_capacity).max(1e-6);
        let stable = mean(recent(observation, now, self.stable_s).iter().map(in_system));
        let panic = mean(recent(observation, now, self.stable_s * self.panic_part).iter().map(in_system));
        let (Some(stable), Some(panic)) = (stable, panic) else { return unknown(observation, "concurrency") };
        let ready = observation.ready.max(1);
        let least = whole((f64::from(observation.ready) / self.down_rate).floor());
        let most = whole(f64::from(ready) * self.up_rate);
        let bounded = |requests: f64| whole(requests / for_one).clamp(least.min(most), most);
        let (of_stable, of_panic) = (bounded(stable), bounded(panic));
        let mut reasons =
            vec![format!("{stable:.1} requests over {:.0} s take {of_stable} at {for_one:.1} each", self.stable_s)];
        let mut replicas = of_stable;
        if self.panics(observation, now, for_one) {
            replicas = of_panic.max(of_stable).max(observation.provisioned());
            reasons.push(format!(
                "panic: {panic:.1} requests over {:.0} s take {of_panic}",
                self.stable_s * self.panic_part
            ));
        }
        let idle_since = earlier(now, self.stable_s + self.grace_s);
        let busy = observation.samples.iter().any(|sample| sample.at > idle_since && in_system(sample) != Some(0.0));
        if replicas == 0 && observation.provisioned() > 0 && busy {
            replicas = 1;
            reasons.push(format!("the last one stays for {:.0} s more", self.grace_s));
        }
        Decision { replicas, reasons, ..Decision::default() }
    }

    /// Whether a look of the last stable window asked for so much more than served.
    fn panics(&self, observation: &Observation, now: Timestamp, for_one: f64) -> bool {
        recent(observation, now, self.stable_s).iter().any(|sample| {
            let wanted = in_system(sample).map_or(0, |requests| whole(requests / for_one));
            f64::from(wanted) >= self.panic_threshold * f64::from(sample.ready.max(1))
        })
    }
}

/// Requests that run or wait.
fn in_system(sample: &Sample) -> Option<f64> {
    Some(sample.running? + sample.waiting.unwrap_or(0.0))
}
