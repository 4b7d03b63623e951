//! Several commitment products at once: each GPU of the curve, from the one always in use to the one of the peak, gets the
//! way of paying that is cheapest for how long it is in use.
//!
//! A product is a tariff in two parts: so much for every hour, and so much for every hour of use. A plain reservation has
//! only the first, on-demand only the second, a partial one both. The cheapest of such tariffs for a part `u` of the time
//! in use is the lower envelope of straight lines, so products lie in layers on the curve.

use crate::commit::Demand;
use crate::money::{GpuHourRate, Money};

/// Something that can be committed to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Product {
    /// What it is called.
    pub name: String,
    /// Paid for one GPU for every hour, used or not.
    pub committed: GpuHourRate,
    /// Paid on top for every hour of use.
    pub used: GpuHourRate,
    /// How long one is bound, in months; `None` when nobody said.
    pub term_months: Option<u32>,
}

/// GPUs of a curve that are paid in one way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layer {
    /// Which product, by its place in the list; `None` is on demand.
    pub product: Option<usize>,
    /// GPUs below this layer.
    pub below: u32,
    /// GPUs of this layer.
    pub gpus: u32,
    /// Paid for them over the time of the curve.
    pub cost: Money,
    /// GPU-microseconds of the layer in use.
    pub used_gpu_us: u64,
}

/// How all GPUs of a curve are paid.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// From the GPU that is in use longest up to the peak; neighbours differ.
    pub layers: Vec<Layer>,
}

impl Plan {
    /// All that is paid over the time of the curve.
    #[must_use]
    pub fn total(&self) -> Money {
        self.layers.iter().map(|layer| layer.cost).sum()
    }

    /// GPUs committed to, whatever the product.
    #[must_use]
    pub fn committed(&self) -> u32 {
        self.layers.iter().filter(|layer| layer.product.is_some()).map(|layer| layer.gpus).sum()
    }
}

/// The cheapest way to pay for the curve. `horizon_months` says for how long the need is believed to last: a term that is
/// longer is paid to its end all the same. Without it every term counts as long as the need. At equal cost a product is
/// taken before on-demand, and the earlier of two products.
#[must_use]
pub fn cheapest(demand: &Demand, on_demand: GpuHourRate, products: &[Product], horizon_months: Option<u32>) -> Plan {
    let mut plan = Plan::default();
    let mut below = 0;
    for (gpus, at_least_us) in demand.steps().into_iter().filter(|(gpus, _)| *gpus > 0) {
        let product = products
            .iter()
            .enumerate()
            .map(|(index, product)| (cost(demand, product, at_least_us, horizon_months), Some(index)))
            .chain([(u128::from(on_demand.pico()).saturating_mul(at_least_us.into()), None)])
            .min_by_key(|(cost, _)| *cost)
            .and_then(|(_, product)| product);
        let used_gpu_us = u64::from(gpus - below).saturating_mul(at_least_us);
        match plan.layers.last_mut().filter(|layer| layer.product == product) {
            Some(layer) => {
                layer.gpus += gpus - below;
                layer.used_gpu_us = layer.used_gpu_us.saturating_add(used_gpu_us);
            }
            None => plan.layers.push(Layer { product, below, gpus: gpus - below, cost: Money::ZERO, used_gpu_us }),
        }
        below = gpus;
    }
    for layer in &mut plan.layers {
        layer.cost = match layer.product.map(|index| &products[index]) {
            None => on_demand.over(1, layer.used_gpu_us),
            Some(product) => {
                let paid_us = paid_us(demand, product, horizon_months).saturating_mul(layer.gpus.into());
                let paid_us = u64::try_from(paid_us).unwrap_or(u64::MAX);
                product.committed.over(1, paid_us) + product.used.over(1, layer.used_gpu_us)
            }
        };
    }
    plan
}

/// One GPU in use for `at_least_us` of the curve, in picodollars times microseconds an hour.
fn cost(demand: &Demand, product: &Product, at_least_us: u64, horizon_months: Option<u32>) -> u128 {
    let committed = u128::from(product.committed.pico()).saturating_mul(paid_us(demand, product, horizon_months));
    committed.saturating_add(u128::from(product.used.pico()).saturating_mul(at_least_us.into()))
}

/// For how much of the curve's time a commitment is paid: more than all of it where the term outlives the need.
fn paid_us(demand: &Demand, product: &Product, horizon_months: Option<u32>) -> u128 {
    let duration = u128::from(demand.duration_us());
    match (product.term_months, horizon_months) {
        (Some(term), Some(horizon)) if term > 0 && horizon > 0 => {
            let months = u128::from(horizon.div_ceil(term)) * u128::from(term);
            (duration.saturating_mul(months)).div_ceil(u128::from(horizon))
        }
        _ => duration,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commit::{Bill, Rates, best_level};
    use proptest::prelude::*;

    const HOUR: u64 = 3_600_000_000;

    fn product(name: &str, committed: u64, used: u64, term_months: Option<u32>) -> Product {
        let rate = GpuHourRate::from_pico;
        Product { name: name.to_owned(), committed: rate(committed), used: rate(used), term_months }
    }

    /// Every number of every product priced hour by hour; what is committed serves first, cheapest use first.
    fn brute_force(hours: &[u32], on_demand: u64, products: &[Product]) -> i128 {
        let peak = hours.iter().copied().max().unwrap_or(0);
        let mut counts = vec![0u32; products.len()];
        let mut least = i128::MAX;
        loop {
            let mut order: Vec<usize> = (0..products.len()).collect();
            order.sort_by_key(|&index| products[index].used);
            let mut cost = 0i128;
            for &gpus in hours {
                let mut left = gpus;
                for &index in &order {
                    let served = if products[index].used.pico() > on_demand { 0 } else { left.min(counts[index]) };
                    left -= served;
                    cost += i128::from(served) * i128::from(products[index].used.pico());
                    cost += i128::from(counts[index]) * i128::from(products[index].committed.pico());
                }
                cost += i128::from(left) * i128::from(on_demand);
            }
            least = least.min(cost);
            let Some(place) = counts.iter().position(|&count| count < peak) else { return least };
            counts[..place].fill(0);
            counts[place] += 1;
        }
    }

    #[test]
    fn products_lie_in_layers_from_the_base_to_the_peak() {
        let demand = Demand::every(HOUR, (1..=10).collect::<Vec<_>>());
        let products = [product("1 year", 60, 0, Some(12)), product("partial", 20, 55, Some(12))];
        let plan = cheapest(&demand, GpuHourRate::from_pico(100), &products, None);
        let shown: Vec<_> = plan.layers.iter().map(|layer| (layer.product, layer.below, layer.gpus)).collect();
        // In use at least 8/11 of the time: all in; between 20/45 and that: in part; above: by the hour.
        assert_eq!(shown, [(Some(0), 0, 3), (Some(1), 3, 3), (None, 6, 4)]);
        assert_eq!(plan.committed(), 6);
    }

    #[test]
    fn a_term_longer_than_the_need_is_paid_to_its_end() {
        let demand = Demand::every(HOUR, [2, 2, 2, 2]);
        let products = [product("3 years", 40, 0, Some(36)), product("1 year", 60, 0, Some(12))];
        let chosen = |horizon| cheapest(&demand, GpuHourRate::from_pico(100), &products, horizon).layers[0].product;
        assert_eq!(chosen(None), Some(0));
        assert_eq!(chosen(Some(36)), Some(0));
        assert_eq!(chosen(Some(12)), Some(1), "three years for one of need cost 120 % of on-demand");
        assert_eq!(chosen(Some(6)), None, "twelve months for six of need cost 120 % of on-demand");
    }

    #[test]
    fn without_demand_there_is_no_layer() {
        let products = [product("free", 0, 0, None)];
        assert_eq!(cheapest(&Demand::every(HOUR, [0]), GpuHourRate::from_pico(1), &products, None), Plan::default());
    }

    proptest! {
        #[test]
        fn one_product_is_the_level(
            hours in prop::collection::vec(0u32..40, 1..80),
            committed in 0u64..8,
            on_demand in 0u64..8,
        ) {
            let demand = Demand::every(HOUR, hours);
            let rates = Rates { committed: GpuHourRate::from_pico(committed), on_demand: GpuHourRate::from_pico(on_demand) };
            let plan = cheapest(&demand, rates.on_demand, &[product("one", committed, 0, None)], None);
            let level = best_level(&demand, rates);
            prop_assert_eq!(plan.committed(), level);
            prop_assert_eq!(plan.total(), Bill::of(&demand, rates, level).total());
        }

        #[test]
        fn layers_are_the_brute_force_optimum(
            hours in prop::collection::vec(0u32..5, 1..12),
            on_demand in 0u64..12,
            tariffs in prop::collection::vec((0u64..12, 0u64..12), 0..3),
        ) {
            let products: Vec<Product> =
                tariffs.iter().map(|&(committed, used)| product("p", committed, used, None)).collect();
            let demand = Demand::every(HOUR, hours.iter().copied());
            let plan = cheapest(&demand, GpuHourRate::from_pico(on_demand), &products, None);
            prop_assert_eq!(plan.total().pico(), brute_force(&hours, on_demand, &products));
            prop_assert_eq!(plan.layers.iter().map(|layer| layer.gpus).sum::<u32>(), demand.peak());
        }
    }
}
