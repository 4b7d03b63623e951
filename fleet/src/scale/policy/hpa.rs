//! Kubernetes' horizontal pod autoscaler, `autoscaling/v2`, as its documentation describes the algorithm
//! (kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale).

use ledger::Timestamp;

use super::parameters::parameters;
use super::unknown;
use crate::scale::earlier;
use crate::scale::forecast::whole;
use crate::scale::observe::{Decision, Observation, Sample};

/// ```text
/// wanted = ceil(replicas · metric / target), nothing while the ratio is within `tolerance` of 1
/// ```
/// Of several metrics the largest wish wins. Replicas that do not serve yet count as if they did nothing when more are
/// wanted. Down to the most that was wanted in the last `stabilise` seconds, up at once, at most doubling (or by four) in
/// `period` seconds: the published defaults of `behavior`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hpa {
    /// Requests in a replica's batch, as a part of those at capacity; 0 leaves it out.
    pub target: f64,
    /// Requests that wait for each replica; 0 leaves it out.
    pub waiting: f64,
    /// Part of the time in which a replica is in a step; 0 leaves it out.
    pub utilisation: f64,
    /// How far from 1 a ratio has to be.
    pub tolerance: f64,
    /// Seconds for which a lower wish has to last.
    pub stabilise_s: f64,
    /// Seconds in which replicas at most double.
    pub period_s: f64,
}

impl Default for Hpa {
    fn default() -> Hpa {
        Hpa { target: 0.7, waiting: 5.0, utilisation: 0.0, tolerance: 0.1, stabilise_s: 300.0, period_s: 15.0 }
    }
}

parameters!(Hpa "hpa" {
    target "target" 0.0..=10.0 "requests in a batch, part of those at capacity, 0 to leave it out",
    waiting "waiting" 0.0..=10000.0 "requests that wait for each replica, 0 to leave it out",
    utilisation "utilisation" 0.0..=1.0 "part of the time in a step, 0 to leave it out",
    tolerance "tolerance" 0.0..=1.0 "how far from its target a metric has to be, part of it",
    stabilise_s "stabilise" 0.0..=3600.0 "seconds for which a lower wish has to last",
    period_s "period" 1.0..=3600.0 "seconds in which replicas at most double",
});

impl Hpa {
    /// The largest wish of the metrics.
    #[must_use]
    pub fn desired(&self, observation: &Observation, now: Timestamp) -> Decision {
        let newest = observation.newest().and_then(|newest| self.wish(newest, observation));
        let Some(newest) = newest else { return unknown(observation, "every metric") };
        let wanted = newest.replicas;
        let mut reasons = vec![newest.reason()];
        let current = observation.provisioned();
        let since = earlier(now, self.stabilise_s);
        let before = &observation.samples[observation.samples.partition_point(|sample| sample.at <= since)..];
        let wishes = before.iter().filter_map(|sample| self.wish(sample, observation));
        let most = wishes.map(|wish| wish.replicas).max().unwrap_or(0);
        let held = wanted.max(most.min(current));
        if held > wanted {
            reasons.push(format!("up to {most} were wanted within the last {:.0} s", self.stabilise_s));
        }
        // `behavior.scaleUp`: by 100 % or four pods a period, whichever is more.
        let period = earlier(now, self.period_s);
        let start = observation.samples.get(observation.samples.partition_point(|sample| sample.at <= period));
        let base = start.map_or(current, |sample| sample.ready + sample.pending).min(current);
        let most_now = base.saturating_mul(2).max(base.saturating_add(4));
        let replicas = if held > current { held.min(most_now.max(current)) } else { held };
        if replicas < held {
            reasons.push(format!("at most {most_now} within {:.0} s", self.period_s));
        }
        Decision { replicas, reasons, ..Decision::default() }
    }

    /// What the metrics of one look wish for; `None` when none is known.
    fn wish(&self, sample: &Sample, observation: &Observation) -> Option<Wish> {
        let ready = f64::from(sample.ready);
        let at_capacity = observation.bounds.batch_at_capacity.max(1.0);
        let metrics = [
            ("requests in batches", sample.running.map(|running| running / at_capacity), self.target),
            ("requests waiting", sample.waiting, self.waiting),
            ("time in steps", sample.utilisation.map(|part| part * ready), self.utilisation),
        ];
        let used = metrics.into_iter().filter(|(.., target)| *target > 0.0);
        used.filter_map(|(name, total, target)| Some(self.of(name, total?, target, sample)))
            .max_by_key(|wish| wish.replicas)
    }

    /// What one metric wishes for, that adds up to `total` over the replicas that serve and should be `target` for each.
    fn of(&self, name: &'static str, total: f64, target: f64, sample: &Sample) -> Wish {
        let current = sample.ready.saturating_add(sample.pending);
        let (ready, all) = (f64::from(sample.ready), f64::from(current));
        // Without a pod that serves there is no average; a queue in front of none asks for the first.
        let ratio = if sample.ready == 0 { f64::from(u8::from(total > 0.0)) } else { total / ready / target };
        let with_unready = total / all.max(1.0) / target;
        let replicas = if sample.ready == 0 {
            current.max(u32::from(total > 0.0))
        } else if (ratio - 1.0).abs() <= self.tolerance {
            current
        } else if ratio < 1.0 {
            whole(ratio * ready)
        } else if with_unready <= 1.0 + self.tolerance {
            current
        } else {
            whole(with_unready * all)
        };
        Wish { name, ratio, target, replicas }
    }
}

/// What the metric with the largest wish says.
struct Wish {
    name: &'static str,
    ratio: f64,
    target: f64,
    replicas: u32,
}

impl Wish {
    fn reason(&self) -> String {
        let Wish { name, ratio, target, replicas } = self;
        format!("{name} are {ratio:.2} of the target of {target} a replica, which takes {replicas}")
    }
}
