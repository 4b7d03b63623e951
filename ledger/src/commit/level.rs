//! One committed level: where it pays, and what it comes to.

use crate::commit::Demand;
use crate::money::{GpuHourRate, Money};

/// What one GPU costs for an hour, either way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rates {
    /// `r`: for every hour of the commitment, used or not.
    pub committed: GpuHourRate,
    /// `p`: for an hour of use, without commitment.
    pub on_demand: GpuHourRate,
}

impl Rates {
    /// The part of the time that a GPU has to be in use so that committing to it is as cheap as renting it: `r / p`.
    /// `None` where renting is free.
    #[must_use]
    pub fn break_even(&self) -> Option<f64> {
        (self.on_demand.pico() > 0).then(|| self.committed.pico() as f64 / self.on_demand.pico() as f64)
    }

    /// Months of a term after which the need may end without a loss, if it was there all the time until then.
    #[must_use]
    pub fn break_even_months(&self, term_months: u32) -> Option<f64> {
        Some(self.break_even()? * f64::from(term_months))
    }
}

/// The cheapest level: the largest `C` with `P(D >= C) >= r / p`, in whole GPUs, never above the peak.
///
/// Committing to the `C`-th GPU costs `r` all the time and saves `p` while at least `C` are in use, so the cost falls as
/// long as the condition holds. At equality both cost the same and the larger level is taken. Exact: no division is made.
#[must_use]
pub fn best_level(demand: &Demand, rates: Rates) -> u32 {
    let paid = u128::from(rates.committed.pico()) * u128::from(demand.duration_us());
    let pays = |&(_, at_least_us): &(u32, u64)| u128::from(rates.on_demand.pico()) * u128::from(at_least_us) >= paid;
    demand.steps().into_iter().rev().find(pays).map_or(0, |(gpus, _)| gpus)
}

/// What a level comes to over the time of a curve.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bill {
    /// GPUs committed to.
    pub level: u32,
    /// Paid for them, used or not.
    pub committed: Money,
    /// Paid for what was in use above them.
    pub on_demand: Money,
    /// GPU-microseconds committed to.
    pub committed_gpu_us: u64,
    /// Of those, in use.
    pub used_gpu_us: u64,
    /// GPU-microseconds in use, committed or not.
    pub demand_gpu_us: u64,
}

impl Bill {
    /// What `level` committed GPUs and the rest on demand cost.
    #[must_use]
    pub fn of(demand: &Demand, rates: Rates, level: u32) -> Bill {
        let committed_gpu_us = u64::from(level).saturating_mul(demand.duration_us());
        let (demand_gpu_us, above) = (demand.gpu_us(), demand.above_gpu_us(level));
        Bill {
            level,
            committed: rates.committed.over(1, committed_gpu_us),
            on_demand: rates.on_demand.over(1, above),
            committed_gpu_us,
            used_gpu_us: demand_gpu_us - above,
            demand_gpu_us,
        }
    }

    /// All that is paid.
    #[must_use]
    pub fn total(&self) -> Money {
        self.committed + self.on_demand
    }

    /// The part of the use that the commitment covers. `None` without use.
    #[must_use]
    pub fn coverage(&self) -> Option<f64> {
        ratio(self.used_gpu_us, self.demand_gpu_us)
    }

    /// The part of the commitment that is used. `None` without a commitment.
    #[must_use]
    pub fn utilisation(&self) -> Option<f64> {
        ratio(self.used_gpu_us, self.committed_gpu_us)
    }
}

fn ratio(part: u64, whole: u64) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HOUR: u64 = 3_600_000_000;

    fn rates(committed: u64, on_demand: u64) -> Rates {
        Rates { committed: GpuHourRate::from_pico(committed), on_demand: GpuHourRate::from_pico(on_demand) }
    }

    /// Every level priced from the hours one by one, without the curve.
    fn brute_force(hours: &[u32], rates: Rates) -> Vec<u128> {
        let peak = hours.iter().copied().max().unwrap_or(0);
        (0..=peak)
            .map(|level| {
                let committed = u128::from(level) * u128::from(rates.committed.pico()) * hours.len() as u128;
                let above: u128 = hours.iter().map(|&gpus| u128::from(gpus.saturating_sub(level))).sum();
                committed + above * u128::from(rates.on_demand.pico())
            })
            .collect()
    }

    #[test]
    fn the_edges_are_what_one_would_say() {
        let demand = Demand::every(HOUR, [4, 4, 2, 0]);
        let cases = [
            ((60, 100), 2, "two are in use for three quarters of the time, four for half"),
            ((50, 100), 4, "half the time at half the price: either way, so the larger one"),
            ((51, 100), 2, "a little dearer and the tie is broken"),
            ((75, 100), 2, "a tie again"),
            ((76, 100), 0, "nothing is in use as long as that"),
            ((0, 100), 4, "free commitments cover the peak and no more"),
            ((100, 100), 0, "no GPU was in use all the time"),
            ((130, 100), 0, "dearer than renting"),
            ((10, 0), 0, "renting is free"),
        ];
        for ((committed, on_demand), expected, why) in cases {
            assert_eq!(best_level(&demand, rates(committed, on_demand)), expected, "{why}");
        }
        assert_eq!(
            best_level(&Demand::every(HOUR, [3, 5]), rates(100, 100)),
            3,
            "in use all the time, at no advantage"
        );
    }

    #[test]
    fn without_demand_nothing_is_committed() {
        for demand in [Demand::default(), Demand::every(HOUR, [0, 0, 0])] {
            assert_eq!(best_level(&demand, rates(60, 100)), 0);
            assert_eq!(best_level(&demand, rates(0, 100)), 0);
        }
    }

    #[test]
    fn a_bill_says_coverage_and_utilisation() {
        let rates = Rates { committed: "3".parse().unwrap(), on_demand: "5".parse().unwrap() };
        let bill = Bill::of(&Demand::every(HOUR, [4, 4, 2, 0]), rates, 2);
        assert_eq!((bill.committed.to_string(), bill.on_demand.to_string()), ("24.00".to_owned(), "20.00".to_owned()));
        assert_eq!((bill.coverage(), bill.utilisation()), (Some(0.6), Some(0.75)));
        assert_eq!(rates.break_even(), Some(0.6));
        assert!((rates.break_even_months(12).unwrap() - 7.2).abs() < 1e-12);
        let none = Bill::of(&Demand::default(), rates, 0);
        assert_eq!((none.total(), none.coverage(), none.utilisation()), (Money::ZERO, None, None));
    }

    proptest! {
        #[test]
        fn the_level_is_the_brute_force_optimum(
            hours in prop::collection::vec(0u32..60, 0..200),
            // Small prices make ties, large ones would overflow a careless product.
            (committed, on_demand) in prop_oneof![
                (0u64..6, 0u64..6),
                (0u64..20_000_000_000_000, 0u64..20_000_000_000_000),
            ],
        ) {
            let rates = rates(committed, on_demand);
            let costs = brute_force(&hours, rates);
            let least = costs.iter().min().copied().unwrap();
            let largest = costs.iter().rposition(|&cost| cost == least).unwrap();
            let demand = Demand::every(HOUR, hours.iter().copied());
            let level = best_level(&demand, rates);
            prop_assert_eq!(level as usize, if hours.is_empty() { 0 } else { largest });
            for (level, &cost) in (0u32..).zip(&costs) {
                prop_assert_eq!(Bill::of(&demand, rates, level).total().pico().unsigned_abs(), cost);
            }
        }

        #[test]
        fn unequal_intervals_are_weighed_by_their_length(
            intervals in prop::collection::vec((0u32..20, 1u64..50), 1..60),
            committed in 0u64..8,
            on_demand in 0u64..8,
        ) {
            let seconds: Vec<u32> =
                intervals.iter().flat_map(|&(gpus, length)| (0..length).map(move |_| gpus)).collect();
            let rates = rates(committed, on_demand);
            let costs = brute_force(&seconds, rates);
            let least = costs.iter().min().copied().unwrap();
            let level = best_level(&Demand::of(intervals), rates);
            prop_assert_eq!(costs[level as usize], least);
        }
    }
}
