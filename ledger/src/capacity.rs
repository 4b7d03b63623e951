//! What a pool of GPUs consists of and costs, as facts with a period.

use serde::{Deserialize, Serialize};

use crate::context::Label;
use crate::money::{GpuHourRate, Money};
use crate::time::{Period, Timestamp};

/// How a GPU was bought.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PurchaseOption {
    /// By the hour.
    #[default]
    OnDemand,
    /// Committed for a term.
    Reserved,
    /// Interruptible.
    Spot,
    /// Bought outright; the rate is depreciation and running cost.
    Owned,
}

impl PurchaseOption {
    /// The name used in tables and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            PurchaseOption::OnDemand => "on_demand",
            PurchaseOption::Reserved => "reserved",
            PurchaseOption::Spot => "spot",
            PurchaseOption::Owned => "owned",
        }
    }
}

/// GPUs of one kind that a pool had for a while. Facts of one pool add up; a later fact with the same
/// [`identity`](CapacityFact::identity) replaces an earlier one (it got longer, or ended).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CapacityFact {
    /// The pool that pays.
    pub pool: Label,
    /// The engine process that used them, when known; one replica's GPUs form one origin.
    pub replica: Label,
    /// The deployment served by it.
    pub deployment: Option<Label>,
    /// Who owns the pool: the team that pays for what nobody used.
    pub owner: Option<Label>,
    /// The GPU's name as the data sheets write it, such as `H100`.
    pub gpu: Label,
    /// How many.
    pub gpus: u32,
    /// The price of one for an hour.
    pub rate: GpuHourRate,
    /// How they were bought.
    pub purchase: PurchaseOption,
    /// When they were there.
    pub period: Period,
    /// When this was observed; the latest observation of an identity wins.
    pub observed_at: Timestamp,
}

impl CapacityFact {
    /// What makes two facts speak of the same GPUs: pool, replica and start.
    #[must_use]
    pub fn identity(&self) -> (&str, &str, Timestamp) {
        (&self.pool, &self.replica, self.period.start)
    }

    /// What these GPUs cost within `period`: `gpus x rate x seconds`.
    #[must_use]
    pub fn cost_within(&self, period: Period) -> Money {
        self.period.intersect(period).map_or(Money::ZERO, |both| self.rate.over(self.gpus, both.micros()))
    }
}

/// The facts that hold: for each identity the latest observation, whatever order they came in.
#[must_use]
pub fn latest<'a>(facts: impl IntoIterator<Item = &'a CapacityFact>) -> Vec<&'a CapacityFact> {
    let mut kept: std::collections::BTreeMap<(&str, &str, Timestamp), &CapacityFact> =
        std::collections::BTreeMap::new();
    for fact in facts {
        let newest = kept.entry(fact.identity()).or_insert(fact);
        if (fact.observed_at, fact.period.end) > (newest.observed_at, newest.period.end) {
            *newest = fact;
        }
    }
    kept.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fact(end: i64, observed: i64) -> CapacityFact {
        CapacityFact {
            pool: "shared".into(),
            replica: "r0".into(),
            deployment: None,
            owner: None,
            gpu: "H100".into(),
            gpus: 2,
            rate: "3.60".parse().expect("a rate"),
            purchase: PurchaseOption::OnDemand,
            period: Period { start: Timestamp::from_micros(0), end: Timestamp::from_micros(end) },
            observed_at: Timestamp::from_micros(observed),
        }
    }

    #[test]
    fn the_latest_observation_wins_in_any_order() {
        let (short, long) = (fact(1_000_000, 1), fact(2_000_000, 2));
        for order in [[&short, &long], [&long, &short]] {
            assert_eq!(latest(order), vec![&long]);
        }
        assert_eq!(long.cost_within(Period::ALL).to_string(), "0.004");
    }
}
