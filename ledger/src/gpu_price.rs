//! What providers ask for GPUs by the hour, as price lists write it: for a whole machine, with where and when it was read.

use serde::Deserialize;

use crate::money::GpuHourRate;

/// A dated list of prices, as a user's file or the small one that comes along.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GpuPriceList {
    /// The prices.
    #[serde(default, rename = "price")]
    pub prices: Vec<GpuPrice>,
}

/// What one provider asks for one product.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GpuPrice {
    /// The GPU's name, as the data sheets write it.
    pub gpu: String,
    /// Who asks for it.
    pub provider: String,
    /// The machine, as the provider names it.
    pub product: String,
    /// Where, if the price depends on it.
    pub region: Option<String>,
    /// GPUs of the product; prices below are for all of them together.
    #[serde(default = "one")]
    pub gpus: u32,
    /// By the hour, without commitment.
    pub on_demand_usd: GpuHourRate,
    /// By the hour, interruptible.
    pub spot_usd: Option<GpuHourRate>,
    /// What can be committed to.
    #[serde(default, rename = "commitment")]
    pub commitments: Vec<CommitmentPrice>,
    /// The day on which the price was read, `2026-11-24`.
    pub read_on: String,
    /// Where it was read.
    pub source: String,
}

/// A commitment that a provider offers for a product.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CommitmentPrice {
    /// What it is called.
    pub name: String,
    /// For every hour, used or not.
    pub usd: GpuHourRate,
    /// On top for every hour of use.
    #[serde(default)]
    pub used_usd: GpuHourRate,
    /// How long one is bound; unknown where the provider does not say.
    pub term_months: Option<u32>,
}

const fn one() -> u32 {
    1
}

impl GpuPrice {
    /// A price of the whole product for one of its GPUs, rounded half up to the picodollar.
    #[must_use]
    pub fn each(&self, usd: GpuHourRate) -> GpuHourRate {
        let gpus = u64::from(self.gpus.max(1));
        GpuHourRate::from_pico(usd.pico() / gpus + u64::from(usd.pico() % gpus * 2 >= gpus))
    }

    /// The row in a few words, for people to choose by.
    #[must_use]
    pub fn name(&self) -> String {
        let region = self.region.as_ref().map_or(String::new(), |region| format!(" in {region}"));
        format!("{} {}{region}", self.provider, self.product)
    }
}

impl GpuPriceList {
    /// What is wrong with the list itself: one sentence for the first row that is.
    #[must_use]
    pub fn mistake(&self) -> Option<String> {
        let day = |text: &str| text.len() == 10 && text.parse::<crate::Timestamp>().is_ok();
        self.prices.iter().find_map(|price| {
            let what = match () {
                () if price.gpus == 0 => "`gpus` is 0; say how many GPUs the prices are for".to_owned(),
                () if !day(&price.read_on) => format!("`read_on` is `{}`; write a day like 2026-11-24", price.read_on),
                () if price.source.trim().is_empty() => "`source` is empty; say where the price was read".to_owned(),
                () => return None,
            };
            Some(format!("{} ({}): {what}", price.name(), price.gpu))
        })
    }

    /// Prices of a GPU, by any case of its name, of one provider or of all.
    pub fn of<'a>(&'a self, gpu: &'a str, provider: Option<&'a str>) -> impl Iterator<Item = &'a GpuPrice> {
        self.prices.iter().filter(move |price| {
            price.gpu.eq_ignore_ascii_case(gpu)
                && provider.is_none_or(|provider| price.provider.eq_ignore_ascii_case(provider))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn price(gpus: u32, usd: &str) -> GpuPrice {
        GpuPrice {
            gpu: "H100".to_owned(),
            provider: "aws".to_owned(),
            product: "p5.48xlarge".to_owned(),
            region: Some("us-east-1".to_owned()),
            gpus,
            on_demand_usd: usd.parse().unwrap(),
            spot_usd: None,
            commitments: Vec::new(),
            read_on: "2026-11-09".to_owned(),
            source: "https://example.com".to_owned(),
        }
    }

    #[test]
    fn a_machines_price_is_shared_by_its_gpus() {
        let machine = price(8, "55.04");
        assert_eq!(machine.each(machine.on_demand_usd).to_string(), "6.88");
        let third = price(3, "1");
        assert_eq!(third.each(third.on_demand_usd).to_string(), "0.333333333333");
        assert_eq!(machine.name(), "aws p5.48xlarge in us-east-1");
    }

    #[test]
    fn prices_are_found_by_gpu_and_provider() {
        let list =
            GpuPriceList { prices: vec![price(8, "55.04"), GpuPrice { provider: "b".to_owned(), ..price(1, "3") }] };
        assert_eq!(list.of("h100", None).count(), 2);
        assert_eq!(list.of("H100", Some("B")).count(), 1);
        assert_eq!(list.of("L4", None).count(), 0);
    }

    #[test]
    fn a_price_without_a_day_or_a_source_is_no_price() {
        let with = |change: fn(&mut GpuPrice)| {
            let mut price = price(8, "55.04");
            change(&mut price);
            GpuPriceList { prices: vec![price] }.mistake()
        };
        assert_eq!(with(|_| ()), None);
        assert!(with(|price| price.gpus = 0).unwrap().contains("`gpus` is 0"));
        assert!(with(|price| price.read_on = "yesterday".to_owned()).unwrap().contains("2026-11-24"));
        assert!(with(|price| price.source = " ".to_owned()).unwrap().contains("`source` is empty"));
    }
}
