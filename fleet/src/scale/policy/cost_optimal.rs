//! Cost-optimal under the objective: one more replica for as long as it costs less than the requests that it would probably save
//! from missing the objective.

use ledger::Timestamp;

use super::parameters::parameters;
use crate::scale::forecast::hold::held;
use crate::scale::forecast::{Model, Outlook, whole};
use crate::scale::observe::{Decision, Observation, Sample};

/// Minutes for which a lower optimum has to last before replicas are let go.
const HOLD_MINUTES: usize = 3;
/// Looks, of those without overload, from which it is judged whether a replica does what it should.
const LOOKS_MIN: usize = 12;
/// Part of them that must have missed the objective.
const MISSED_MIN: f64 = 0.1;
/// Microseconds after an overload in which a missed objective says nothing.
const AFTERMATH_US: u64 = 300_000_000;

/// Model-predictive: the smallest number of replicas whose predicted tail meets the objective, up to the point where meeting it more
/// often costs more than missing it.
///
/// A load of 1 is what one replica does when its tail (the objective's percentile of the time to first token and the time per output
/// token, from the step-time model) just meets the objective. So `n` replicas meet it in every minute whose load is at most
/// `n · usable`, and the tail of the load says how often they do not:
///
/// ```text
/// load      ~ Normal(mu, s)    mu: highest load expected until a replica asked for now would serve, and the backlog
///                              s = mu · sqrt(spread² + drift²)
/// replicas  = smallest n >= mu / usable with  miss · E[load; n < load / usable <= n + 1] <= 1
/// usable    = 1, or the mean load per replica at which the objective was missed although it should have been met, where that happened in
///             at least a tenth of the looks of the last hour
/// backlog   = waiting requests / requests a second of one replica / cold start, at most as much as is expected to come
/// ```
/// `miss` is the price of missing: what a replica's worth of requests in an overloaded minute costs, in replica-minutes. Committed replicas
/// are paid already, so none is let go. Letting go is held back as in [`super::forecast`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CostOptimal {
    /// Price of a replica's worth of requests in an overloaded minute, in replica-minutes.
    pub miss: f64,
    /// How far the level itself may be off, as a part of it.
    pub drift: f64,
    /// What is kept above the load of the last two minutes, as a part of it.
    pub burst: f64,
    /// Part of the replicas that must be too many before any is let go.
    pub slack: f64,
    /// Weight of the newest minute in the level.
    pub smoothing: f64,
    /// Former days of the same type at which the season is believed half.
    pub trust_days: f64,
}

impl Default for CostOptimal {
    fn default() -> CostOptimal {
        let model = Model::default();
        CostOptimal {
            miss: 20.0,
            drift: 0.05,
            burst: 0.1,
            slack: 0.05,
            smoothing: model.smoothing,
            trust_days: model.trust_days,
        }
    }
}

parameters!(CostOptimal "cost-optimal" {
    miss "miss" 0.01..=100_000.0 "price of a replica's worth of requests in an overloaded minute, replica-minutes",
    drift "drift" 0.0..=1.0 "how far the level itself may be off, part of it",
    burst "burst" 0.0..=2.0 "kept above the load of the last two minutes, part of it",
    slack "slack" 0.0..=0.5 "part of the replicas that must be too many before any is let go",
    smoothing "smoothing" 0.01..=1.0 "weight of the newest minute in the level",
    trust_days "trust-days" 0.0..=30.0 "former days at which the season is believed half",
});

impl CostOptimal {
    /// The number of replicas wanted; what there is when no load is known.
    #[must_use]
    pub fn desired(&self, observation: &Observation, now: Timestamp) -> Decision {
        let model = Model { smoothing: self.smoothing, trust_days: self.trust_days };
        let current = observation.provisioned();
        let Some(outlook) = Outlook::of(observation, &model, now, HOLD_MINUTES) else {
            return Decision {
                replicas: current,
                reasons: vec!["no load is known: what there is stays".into()],
                ..Decision::default()
            };
        };
        let usable = usable(observation);
        let backlog = backlog(observation);
        // Twice what comes clears any queue before long; more would be a cascade.
        let best = |load: f64| self.cheapest((load + backlog.min(load.max(1.0))) / usable, outlook.spread);
        let for_burst = outlook.fresh.map_or(0, |fresh| whole((1.0 + self.burst) * fresh / usable));
        let committed = observation.bounds.committed;
        let wanted = best(outlook.peak).max(for_burst).max(committed);
        let before = outlook.peaks_before.iter().map(|&load| best(load));
        let replicas = held(current, wanted, before, self.slack);
        let mut reasons = vec![format!(
            "{wanted} replicas cost least for an expected load of up to {:.2} with a spread of {:.1} % when an overloaded replica-minute costs {:.1}",
            outlook.peak,
            100.0 * outlook.spread,
            self.miss
        )];
        if usable < 1.0 {
            reasons.push(format!(
                "the objective was missed at {:.0} % of a replica's capacity, so that much is used",
                100.0 * usable
            ));
        }
        if backlog >= 0.01 {
            reasons.push(format!("waiting requests add a load of {backlog:.2}"));
        }
        if committed > 0 && committed == wanted {
            reasons.push(format!("{committed} are committed and paid already"));
        }
        if replicas > wanted {
            reasons.push(format!("{replicas} are kept: fewer were not best for all of the last {HOLD_MINUTES} minutes, or it is too few to let go"));
        }
        Decision { replicas, forecast: Some(outlook.at_cold_start), reasons, ..Decision::default() }
    }

    /// The number at which one more replica costs more than what it saves.
    fn cheapest(&self, load: f64, spread: f64) -> u32 {
        let s = load * spread.hypot(self.drift);
        let least = whole(load);
        if s <= 0.0 {
            return least;
        }
        let below = |replicas: u32| normal((f64::from(replicas) - load) / s);
        // Eight standard deviations are beyond any price.
        let most = whole(load + 8.0 * s).saturating_add(1);
        (least..most)
            .find(|&n| self.miss * (f64::from(n) + 0.5) * (below(n.saturating_add(1)) - below(n)) <= 1.0)
            .unwrap_or(most)
    }
}

/// The part of a replica's capacity at which the objective is met, as far as the looks of the last hour say.
fn usable(observation: &Observation) -> f64 {
    let missed = |sample: &Sample| {
        let objective = &observation.objective;
        let over = |tail: Option<f64>, promised: f64| tail.map(|tail| tail > promised);
        match (over(sample.ttft_s, objective.ttft_s), over(sample.tpot_s, objective.tpot_s)) {
            (None, None) => None,
            (first, each) => Some(first == Some(true) || each == Some(true)),
        }
    };
    let (mut looks, mut misses, mut fullness) = (0_usize, 0_u32, 0.0);
    let mut quiet_since = None;
    for sample in observation.samples {
        let Some(full) = sample.load.filter(|_| sample.ready > 0).map(|load| load / f64::from(sample.ready)) else {
            continue;
        };
        if full > 1.0 {
            quiet_since = Some(sample.at);
        }
        if quiet_since.is_some_and(|at| sample.at.micros_since(at) < AFTERMATH_US) {
            continue;
        }
        let Some(missed) = missed(sample) else { continue };
        looks += 1;
        if missed {
            misses += 1;
            fullness += full;
        }
    }
    let share = f64::from(misses) / (looks.max(1) as f64);
    if looks < LOOKS_MIN || share < MISSED_MIN { 1.0 } else { (fullness / f64::from(misses)).clamp(0.5, 1.0) }
}

/// The load of what waits, if it is to be done within a cold start.
fn backlog(observation: &Observation) -> f64 {
    let bounds = &observation.bounds;
    let one = bounds.requests_per_s_at_capacity * bounds.cold_start_s.max(60.0);
    let waiting = observation.newest().and_then(|sample| sample.waiting).unwrap_or(0.0);
    if one > 0.0 && waiting.is_finite() { waiting.max(0.0) / one } else { 0.0 }
}

/// The standard normal distribution's cumulative function (Abramowitz and Stegun 26.2.17, to 7.5e-8).
fn normal(z: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.231_641_9 * z.abs());
    let series = [0.319_381_530, -0.356_563_782, 1.781_477_937, -1.821_255_978, 1.330_274_429];
    let tail = t * series.iter().rev().fold(0.0, |sum, b| sum * t + b) * (-0.5 * z * z).exp()
        / (2.0 * std::f64::consts::PI).sqrt();
    if z >= 0.0 { 1.0 - tail } else { tail }
}

#[cfg(test)]
mod tests;
