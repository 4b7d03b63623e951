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

/// One metric: what it adds up to over the replicas that serve, and its target for one.
struct Metric {
    name: &'static str,
    total: f64,
    target: f64,
}

impl Hpa {
    /// The largest wish of the metrics.
    #[must_use]
    pub fn desired(&self, observation: &Observation, now: Timestamp) -> Decision {
        let Some((wanted, mut reasons)) = observation.newest().and_then(|newest| self.wish(newest, observation)) else {
            return unknown(observation, "every metric");
        };
        let current = observation.provisioned();
        let since = earlier(now, self.stabilise_s);
        let before = observation.samples.iter().filter(|sample| sample.at > since);
        let most = before.filter_map(|sample| self.wish(sample, observation)).map(|(wish, _)| wish).max();
        let held = wanted.max(most.unwrap_or(0).min(current));
        if held > wanted {
            reasons.push(format!("up to {} was wanted within the last {:.0} s", most.unwrap_or(0), self.stabilise_s));
        }
        // `behavior.scaleUp`: by 100 % or four pods a period, whichever is more.
        let period = earlier(now, self.period_s);
        let start = observation.samples.iter().find(|sample| sample.at > period);
        let base = start.map_or(current, |sample| sample.ready + sample.pending).min(current);
        let most_now = base.saturating_mul(2).max(base.saturating_add(4));
        let replicas = if held > current { held.min(most_now.max(current)) } else { held };
        if replicas < held {
            reasons.push(format!("at most {most_now} within {:.0} s", self.period_s));
        }
        Decision { replicas, reasons, ..Decision::default() }
    }

    /// What the metrics of one look wish for; `None` when none is known.
    fn wish(&self, sample: &Sample, observation: &Observation) -> Option<(u32, Vec<String>)> {
        let ready = f64::from(sample.ready);
        let at_capacity = observation.bounds.batch_at_capacity.max(1.0);
        let metrics = [
            sample.running.map(|running| Metric {
                name: "requests in batches",
                total: running / at_capacity,
                target: self.target,
            }),
            sample.waiting.map(|waiting| Metric { name: "requests waiting", total: waiting, target: self.waiting }),
            sample.utilisation.map(|part| Metric {
                name: "time in steps",
                total: part * ready,
                target: self.utilisation,
            }),
        ];
        let wishes = metrics.into_iter().flatten().filter(|metric| metric.target > 0.0);
        let wishes = wishes.map(|metric| self.of(&metric, sample));
        wishes.max_by_key(|(wish, _)| *wish).map(|(wish, reason)| (wish, vec![reason]))
    }

    fn of(&self, metric: &Metric, sample: &Sample) -> (u32, String) {
        let Metric { name, total, target } = metric;
        let (ready, all) = (f64::from(sample.ready), f64::from(sample.ready + sample.pending));
        let current = sample.ready + sample.pending;
        if sample.ready == 0 {
            // Without a pod that serves there is no average; a queue in front of none asks for the first.
            let wish = current.max(u32::from(*total > 0.0));
            return (wish, format!("{name} {total:.1} and nothing serves"));
        }
        let ratio = total / ready / target;
        let with_unready = total / all / target;
        let wish = if (ratio - 1.0).abs() <= self.tolerance {
            current
        } else if ratio < 1.0 {
            whole(ratio * ready)
        } else if with_unready <= 1.0 + self.tolerance {
            current
        } else {
            whole(with_unready * all)
        };
        (wish, format!("{name} are {ratio:.2} of the target of {target} a replica, which takes {wish}"))
    }
}
