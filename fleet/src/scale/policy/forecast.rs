//! Forecast and reactive in one: replicas for the highest load expected until a replica asked for now would serve, and a margin
//! for how far a minute strays from what was expected.

use ledger::Timestamp;

use super::parameters::parameters;
use crate::scale::forecast::hold::held;
use crate::scale::forecast::{Model, Outlook, whole};
use crate::scale::observe::{Decision, Observation};

/// Minutes for which a lower forecast has to last before replicas are let go.
const HOLD_MINUTES: usize = 3;

/// The default policy.
///
/// ```text
/// need(load) = ceil(load · (1 + margin + spreads · spread))
/// wanted     = max(need(highest load expected from now to now + cold start), ceil((1 + burst) · load of the last two minutes))
/// replicas   = wanted where that is no less than there are; otherwise the most that was needed as seen from now and each of the last
///              three minutes, once that is at least `slack` less
/// ```
/// The expectation and the spread are those of [`crate::scale::forecast`]. The spread is measured and says how calm this hour is; the margin
/// is for what has not been seen yet. Both are parts of the load, so that the same parameters serve three replicas and three hundred.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Forecast {
    /// Spreads above the expected load.
    pub spreads: f64,
    /// What is kept above the expected load in any case, as a part of it.
    pub margin: f64,
    /// What is kept above the load of the last two minutes, as a part of it.
    pub burst: f64,
    /// Part of the replicas that must be too many before any is let go.
    pub slack: f64,
    /// Weight of the newest minute in the level.
    pub smoothing: f64,
    /// Former days of the same type at which the season is believed half.
    pub trust_days: f64,
}

impl Default for Forecast {
    fn default() -> Forecast {
        let model = Model::default();
        Forecast {
            spreads: 2.7,
            margin: 0.05,
            burst: 0.1,
            slack: 0.05,
            smoothing: model.smoothing,
            trust_days: model.trust_days,
        }
    }
}

parameters!(Forecast "forecast" {
    spreads "spreads" 0.0..=8.0 "spreads above the expected load",
    margin "margin" 0.0..=3.0 "kept above the expected load in any case, part of it",
    burst "burst" 0.0..=2.0 "kept above the load of the last two minutes, part of it",
    slack "slack" 0.0..=0.5 "part of the replicas that must be too many before any is let go",
    smoothing "smoothing" 0.01..=1.0 "weight of the newest minute in the level",
    trust_days "trust-days" 0.0..=30.0 "former days at which the season is believed half",
});

impl Forecast {
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
        let need = |load: f64| whole(load * (1.0 + self.margin + self.spreads * outlook.spread));
        let for_burst = outlook.fresh.map_or(0, |fresh| whole((1.0 + self.burst) * fresh));
        let wanted = need(outlook.peak).max(for_burst);
        let replicas = held(current, wanted, outlook.peaks_before.iter().map(|&load| need(load)), self.slack);
        Decision {
            replicas,
            forecast: Some(outlook.at_cold_start),
            reasons: reasons(&outlook, wanted, for_burst, replicas),
            ..Decision::default()
        }
    }
}

fn reasons(outlook: &Outlook, wanted: u32, for_burst: u32, replicas: u32) -> Vec<String> {
    let how = match outlook.season_days {
        0 => "by persistence (no former day of this type is known)".to_owned(),
        days => format!("by level and season of {days} former days"),
    };
    let Outlook { peak, level, spread, .. } = outlook;
    let mut reasons = vec![format!(
        "a load of up to {peak:.2} is expected over the next cold start {how}, {level:.2} now; with a spread of {:.1} % that takes {wanted}",
        100.0 * spread
    )];
    if let Some(fresh) = outlook.fresh.filter(|_| for_burst == wanted && for_burst > 0) {
        reasons.push(format!("the last two minutes brought {fresh:.2}, which takes {for_burst}"));
    }
    if replicas > wanted {
        reasons.push(format!(
            "{replicas} are kept: fewer were not enough for the last {HOLD_MINUTES} minutes, or it is too few to let go"
        ));
    }
    reasons
}

#[cfg(test)]
mod tests;
