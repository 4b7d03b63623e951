//! Arriving tokens with headroom: replicas for the work that comes in, before it shows in queues.

use ledger::Timestamp;

use super::parameters::parameters;
use super::{mean, recent, unknown};
use crate::scale::earlier;
use crate::scale::forecast::whole;
use crate::scale::observe::{Decision, Observation};

/// ```text
/// wanted = ceil((1 + headroom) · highest mean load of any `window` within the last `stabilise` seconds)
/// ```
/// where only the newest window can ask for more than there is: up at once, down late. The load weighs input and output
/// tokens by what they cost the engine, so that long prompts and long answers count as what they are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenRate {
    /// Kept above the load, as a part of it.
    pub headroom: f64,
    /// Seconds over which the load is averaged.
    pub window_s: f64,
    /// Seconds for which a lower wish has to last.
    pub stabilise_s: f64,
}

impl Default for TokenRate {
    fn default() -> TokenRate {
        TokenRate { headroom: 0.2, window_s: 60.0, stabilise_s: 300.0 }
    }
}

parameters!(TokenRate "token-rate" {
    headroom "headroom" 0.0..=10.0 "kept above the load, part of it",
    window_s "window" 1.0..=3600.0 "seconds over which the load is averaged",
    stabilise_s "stabilise" 0.0..=3600.0 "seconds for which a lower wish has to last",
});

impl TokenRate {
    /// Replicas for the arriving work.
    #[must_use]
    pub fn desired(&self, observation: &Observation, now: Timestamp) -> Decision {
        let samples = recent(observation, now, self.window_s);
        let Some(load) = mean(samples.iter().map(|sample| sample.load)) else {
            return unknown(observation, "the load");
        };
        let wanted = whole(load * (1.0 + self.headroom));
        let most = whole(self.highest(observation, now).max(load) * (1.0 + self.headroom));
        let replicas = wanted.max(most.min(observation.provisioned()));
        let mut reasons = vec![format!(
            "a load of {load:.2} over {:.0} s and {:.0} % headroom take {wanted}",
            self.window_s,
            self.headroom * 100.0
        )];
        if replicas > wanted {
            reasons.push(format!("{most} were needed within the last {:.0} s", self.stabilise_s));
        }
        Decision { replicas, reasons, ..Decision::default() }
    }

    /// The highest mean load of the windows that end within the last `stabilise` seconds.
    fn highest(&self, observation: &Observation, now: Timestamp) -> f64 {
        let mut until = now;
        let mut highest = 0.0_f64;
        while until > earlier(now, self.stabilise_s) {
            let since = earlier(until, self.window_s.max(1.0));
            let within = observation.samples.iter().filter(|sample| sample.at > since && sample.at <= until);
            highest = highest.max(mean(within.map(|sample| sample.load)).unwrap_or(0.0));
            until = since;
        }
        highest
    }
}
