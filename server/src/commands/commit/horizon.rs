//! What a committed GPU costs over the time that it is needed: a term that is longer than the need is paid to its end.

use anyhow::Context as _;
use ledger::GpuHourRate;
use ledger::commit::{Product, Rates};

use crate::cli::Commit as Options;
use crate::commands::simulate::prepare::Played;

/// What the level is found with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chosen {
    /// What both kinds of GPUs cost for an hour of the need.
    pub rates: Rates,
    /// The committed one for an hour of its term.
    pub listed: GpuHourRate,
    /// For how many months it binds, if known.
    pub term_months: Option<u32>,
}

/// Puts all committed prices of what is played on the time of the need, once and for everything, and chooses the cheapest commitment
/// for that time.
///
/// # Errors
/// When no committed GPU has a price.
pub fn spread(played: &mut Played, options: &Options) -> anyhow::Result<Chosen> {
    let price = &mut played.price;
    let given = price.committed.map(|given| (given, options.term_months));
    let horizon = options.horizon_months;
    // A price that was given leaves no products; of products the cheapest may be another one than for a whole term.
    let (listed, term_months) = cheapest(&price.products, horizon).or(given).context(
        "say what a committed GPU costs: --committed-usd USD, or a price list that has a commitment for this GPU (--prices, \
         --gpu, --provider)",
    )?;
    let committed = over_need(listed, term_months, horizon);
    for product in &mut price.products {
        product.committed = over_need(product.committed, product.term_months, horizon);
    }
    price.committed = Some(committed);
    played.plan.prices.committed = committed;
    Ok(Chosen { rates: Rates { committed, on_demand: price.on_demand }, listed, term_months })
}

/// The price and the term of the product that costs least over the need, of those whose use costs nothing more.
fn cheapest(products: &[Product], horizon: Option<u32>) -> Option<(GpuHourRate, Option<u32>)> {
    let plain = products.iter().filter(|product| product.used == GpuHourRate::default());
    let cheapest = plain.min_by_key(|product| over_need(product.committed, product.term_months, horizon))?;
    Some((cheapest.committed, cheapest.term_months))
}

/// The rate of an hour of the need: `ceil(h / t)` terms of `t` months are paid for `h` months, rounded up.
fn over_need(rate: GpuHourRate, term_months: Option<u32>, horizon_months: Option<u32>) -> GpuHourRate {
    let (Some(term), Some(horizon)) = (term_months.filter(|&term| term > 0), horizon_months.filter(|&need| need > 0))
    else {
        return rate;
    };
    let paid_months = u128::from(horizon.div_ceil(term)) * u128::from(term);
    let pico = u128::from(rate.pico()).saturating_mul(paid_months).div_ceil(u128::from(horizon));
    GpuHourRate::from_pico(u64::try_from(pico).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use ledger::commit::{Demand, best_level};

    use super::*;

    const DOLLAR: u64 = 1_000_000_000_000;

    fn usd(dollars: u64) -> GpuHourRate {
        GpuHourRate::from_pico(dollars * DOLLAR)
    }

    #[test]
    fn a_term_that_outlives_the_need_is_paid_to_its_end() {
        assert_eq!(over_need(usd(3), Some(36), Some(12)), usd(9));
        assert_eq!(over_need(usd(3), Some(12), Some(36)), usd(3), "three terms are just as long");
        assert_eq!(over_need(usd(3), Some(12), Some(18)), usd(4), "a second term for half of it");
        assert_eq!((over_need(usd(3), None, Some(12)), over_need(usd(3), Some(36), None)), (usd(3), usd(3)));
        let always = Demand::of([(8, 3_600_000_000)]);
        let level = |need| {
            let committed = over_need(usd(3), Some(36), need);
            best_level(&always, Rates { committed, on_demand: usd(5) })
        };
        assert_eq!((level(None), level(Some(36)), level(Some(12))), (8, 8, 0), "9 for what costs 5");
    }

    #[test]
    fn for_a_short_need_another_product_is_the_cheapest() {
        let product = |committed, used, term| Product {
            name: "a".to_owned(),
            committed: usd(committed),
            used: usd(used),
            term_months: Some(term),
        };
        let products = [product(3, 0, 12), product(2, 0, 36), product(1, 2, 12)];
        assert_eq!(cheapest(&products, None), Some((usd(2), Some(36))));
        assert_eq!(cheapest(&products, Some(12)), Some((usd(3), Some(12))));
        assert_eq!(cheapest(&products[2..], Some(12)), None, "its use costs more");
    }
}
