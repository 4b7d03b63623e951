//! What a level costs when the future is another: against the level that would have been best for that future.

use crate::commit::{Bill, Demand, Rates, best_level};
use crate::money::{GpuHourRate, Money};

/// A future, as changes of what was measured. What is committed keeps its price.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scenario {
    /// What it is called.
    pub name: &'static str,
    /// Demand, in per cent of the measured one.
    pub demand_percent: u32,
    /// The price on demand, in per cent of today's.
    pub on_demand_percent: u32,
}

impl Scenario {
    /// Growth, cheaper renting, lost demand, and everything as it was.
    pub const ALL: [Scenario; 7] = [
        Scenario { name: "as measured", demand_percent: 100, on_demand_percent: 100 },
        Scenario { name: "demand +30 %", demand_percent: 130, on_demand_percent: 100 },
        Scenario { name: "demand +60 %", demand_percent: 160, on_demand_percent: 100 },
        Scenario { name: "on-demand price -20 %", demand_percent: 100, on_demand_percent: 80 },
        Scenario { name: "on-demand price -40 %", demand_percent: 100, on_demand_percent: 60 },
        Scenario { name: "demand -30 %", demand_percent: 70, on_demand_percent: 100 },
        Scenario { name: "demand -50 %", demand_percent: 50, on_demand_percent: 100 },
    ];

    /// The rates of this future.
    #[must_use]
    pub fn rates(&self, rates: Rates) -> Rates {
        let pico = u128::from(rates.on_demand.pico()) * u128::from(self.on_demand_percent) / 100;
        Rates { on_demand: GpuHourRate::from_pico(u64::try_from(pico).unwrap_or(u64::MAX)), ..rates }
    }
}

/// The levels in one future.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Regret {
    /// The future.
    pub scenario: Scenario,
    /// The level that is best in it.
    pub best_level: u32,
    /// What that one costs.
    pub best: Money,
    /// What each of the levels costs, in the order in which they were asked for.
    pub costs: Vec<Money>,
}

impl Regret {
    /// What each level costs more than the best one: never below zero.
    pub fn regrets(&self) -> impl Iterator<Item = Money> {
        self.costs.iter().map(|&cost| cost - self.best)
    }
}

/// The cost of each of `levels` in each future.
#[must_use]
pub fn regrets(demand: &Demand, rates: Rates, levels: &[u32], scenarios: &[Scenario]) -> Vec<Regret> {
    let in_future = |scenario: &Scenario| {
        let (demand, rates) = (demand.scaled(scenario.demand_percent), scenario.rates(rates));
        let best_level = best_level(&demand, rates);
        Regret {
            scenario: *scenario,
            best_level,
            best: Bill::of(&demand, rates, best_level).total(),
            costs: levels.iter().map(|&level| Bill::of(&demand, rates, level).total()).collect(),
        }
    };
    scenarios.iter().map(in_future).collect()
}

/// The level, as its place in `levels`, whose worst regret over all futures is the smallest; the smaller level of two.
#[must_use]
pub fn least_regret(regrets: &[Regret]) -> Option<(usize, Money)> {
    let levels = regrets.iter().map(|regret| regret.costs.len()).min()?;
    let worst = |level: usize| regrets.iter().map(|regret| regret.costs[level] - regret.best).max();
    (0..levels).filter_map(|level| Some((level, worst(level)?))).min_by_key(|(_, worst)| *worst)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HOUR: u64 = 3_600_000_000;

    fn rates(committed: u64, on_demand: u64) -> Rates {
        Rates { committed: GpuHourRate::from_pico(committed), on_demand: GpuHourRate::from_pico(on_demand) }
    }

    #[test]
    fn a_price_drop_below_the_commitment_makes_every_commitment_a_regret() {
        let demand = Demand::every(HOUR, [4, 6, 8, 10]);
        let scenario = Scenario { name: "half price", demand_percent: 100, on_demand_percent: 50 };
        let found = regrets(&demand, rates(60, 100), &[0, 4, 6], &[scenario]);
        assert_eq!((found[0].best_level, found[0].best), (0, Bill::of(&demand, rates(60, 50), 0).total()));
        let paid: Vec<i128> = found[0].regrets().map(Money::pico).collect();
        assert_eq!(paid, [0, 160, 340]);
    }

    #[test]
    fn the_least_regret_hedges_between_futures() {
        let demand = Demand::every(HOUR, [10; 10]);
        let levels: Vec<u32> = (0..=16).collect();
        let found = regrets(&demand, rates(60, 100), &levels, &Scenario::ALL);
        let (level, worst) = least_regret(&found).unwrap();
        let of = |level: usize| found.iter().flat_map(|one| one.regrets().nth(level)).max().unwrap();
        assert!(levels[level] > 0 && levels[level] < 10, "{level}");
        assert!(of(0) > worst && of(10) > worst && of(level) == worst);
        assert_eq!(least_regret(&[]), None);
    }

    proptest! {
        #[test]
        fn no_level_is_better_than_the_best(
            hours in prop::collection::vec(0u32..40, 1..60),
            committed in 0u64..9,
            on_demand in 0u64..9,
        ) {
            let levels: Vec<u32> = (0..80).collect();
            for found in regrets(&Demand::every(HOUR, hours), rates(committed, on_demand), &levels, &Scenario::ALL) {
                prop_assert!(found.regrets().all(|regret| regret >= Money::ZERO));
                prop_assert_eq!(found.costs[found.best_level as usize], found.best);
            }
        }
    }
}
