//! Prices of our own: overrides of list prices, negotiated discounts, and markups for internal price lists.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::base::Found;
use super::card::{RateCard, RateTier, Rates};
use crate::attempt::ServiceClass;
use crate::context::Label;
use crate::decimal::{DecimalError, format_scaled, parse_scaled};
use crate::time::{Period, Timestamp};

/// All of an organisation's own prices. The two lists are the `[[price]]` and `[[discount]]` tables of the configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Overrides {
    /// List prices that replace the published ones. Of several that name the same kind, the last one holds.
    pub price: Vec<PriceOverride>,
    /// Negotiated discounts. The most specific one holds (model, then provider, then all), of equals the last; they never add up.
    pub discount: Vec<Discount>,
}

/// New list prices for some kinds of token of one model. Kinds that it does not name keep their published price.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PriceOverride {
    /// The provider, as requests or as the price list name it. Case does not matter.
    pub provider: Label,
    /// The model, as requests name it, or its undated name in the price list.
    pub model: Label,
    /// The class of service; the standard one when nothing is said.
    #[serde(default)]
    pub class: ServiceClass,
    /// The first moment it holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Timestamp>,
    /// The first moment it no longer holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Timestamp>,
    /// It holds for requests whose whole input is larger than this. An entry from zero replaces every tier of its kinds.
    #[serde(default)]
    pub above_input_tokens: u64,
    /// USD per million tokens by kind: `input = "2.00"`.
    #[serde(flatten)]
    pub rates: Rates,
}

/// A share off the list price.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Discount {
    /// Only this provider.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub provider: Option<Label>,
    /// Only this model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<Label>,
    /// The first moment it holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<Timestamp>,
    /// The first moment it no longer holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Timestamp>,
    /// How much is taken off. A negative percentage is a markup.
    pub percent: Percent,
}

/// A percentage of at most 100 with up to four decimals, written as a decimal string.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Percent(u32);

/// Overrides that cannot be meant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OverrideError {
    /// `to` is not after `from`.
    #[error("{what} {number}: `to` must be after `from`")]
    EmptyPeriod {
        /// `price` or `discount`.
        what: &'static str,
        /// Position in the list, from 1.
        number: usize,
    },
    /// No kind of token has a price.
    #[error("price {number} ({provider}/{model}) names no kind of token, such as `input` or `output`")]
    NoRates {
        /// Position in the list, from 1.
        number: usize,
        /// Its provider.
        provider: Label,
        /// Its model.
        model: Label,
    },
}

impl Overrides {
    /// Looks for entries that could never apply.
    ///
    /// # Errors
    /// The first such entry.
    pub fn check(&self) -> Result<(), OverrideError> {
        for (number, price) in (1..).zip(&self.price) {
            if price.rates.is_empty() {
                let (provider, model) = (price.provider.clone(), price.model.clone());
                return Err(OverrideError::NoRates { number, provider, model });
            }
            not_empty(price.from, price.to, "price", number)?;
        }
        for (number, discount) in (1..).zip(&self.discount) {
            not_empty(discount.from, discount.to, "discount", number)?;
        }
        Ok(())
    }

    /// A name that changes with the content; `None` when there are none.
    pub(super) fn version(&self) -> Option<String> {
        if self.price.is_empty() && self.discount.is_empty() {
            return None;
        }
        let json = serde_json::to_string(self).expect("overrides are strings and numbers");
        Some(format!("overrides@{}", fingerprint(&json)))
    }

    /// The listed card with our own prices put over it.
    pub(super) fn patch(&self, provider: &str, model: &str, class: ServiceClass, at: Timestamp, list: Found) -> Found {
        let names = Names { provider, model, listed: list.as_ref().ok() };
        let of = |class| {
            self.price
                .iter()
                .filter(|price| names.are(price) && price.class == class && holds(price, at))
                .collect::<Vec<_>>()
        };
        let own = of(class);
        if !own.is_empty() {
            let listed = list.as_ref().ok().cloned();
            return Ok(Arc::new(patched(provider, model, class, listed.as_deref(), &own)));
        }
        let has_class_price = list.as_ref().is_ok_and(|card| !card.nearest_class);
        let standard = of(ServiceClass::Standard);
        if has_class_price || standard.is_empty() {
            return list;
        }
        let card = patched(provider, model, class, list.as_ref().ok().map(Arc::as_ref), &standard);
        Ok(Arc::new(RateCard { nearest_class: true, ..card }))
    }

    /// The contracted price as a share of the list price, in millionths.
    pub(super) fn factor(&self, providers: [&str; 2], models: [&str; 2], at: Timestamp) -> u32 {
        let fits = |wanted: &Option<Label>, names: [&str; 2]| {
            wanted.as_ref().is_none_or(|wanted| names.iter().any(|name| wanted.eq_ignore_ascii_case(name)))
        };
        self.discount
            .iter()
            .filter(|discount| period(discount.from, discount.to).contains(at))
            .filter(|discount| fits(&discount.provider, providers) && fits(&discount.model, models))
            .max_by_key(|discount| (discount.model.is_some(), discount.provider.is_some()))
            .map_or(Percent::WHOLE, |discount| discount.percent.left())
    }
}

/// The names that a price may be given under.
struct Names<'a> {
    provider: &'a str,
    model: &'a str,
    listed: Option<&'a Arc<RateCard>>,
}

impl Names<'_> {
    fn are(&self, price: &PriceOverride) -> bool {
        let is = |wanted: &str, named: &str, listed: Option<&str>| {
            wanted.eq_ignore_ascii_case(named) || listed.is_some_and(|listed| wanted.eq_ignore_ascii_case(listed))
        };
        is(&price.provider, self.provider, self.listed.map(|card| &*card.provider))
            && is(&price.model, self.model, self.listed.map(|card| &*card.model))
    }
}

fn patched(
    provider: &str,
    model: &str,
    class: ServiceClass,
    listed: Option<&RateCard>,
    own: &[&PriceOverride],
) -> RateCard {
    let listed_tiers = listed.map_or(&[][..], |card| &card.tiers);
    let starts: BTreeSet<u64> = [0]
        .into_iter()
        .chain(listed_tiers.iter().map(|tier| tier.above_input_tokens))
        .chain(own.iter().map(|price| price.above_input_tokens))
        .collect();
    let tiers = starts
        .into_iter()
        .map(|start| RateTier { above_input_tokens: start, rates: rates_at(start, listed_tiers, own) });
    let all = listed.map_or(Period::ALL, |card| card.period);
    RateCard {
        provider: listed.map_or_else(|| provider.into(), |card| card.provider.clone()),
        model: listed.map_or_else(|| model.into(), |card| card.model.clone()),
        class,
        source: listed.map_or_else(|| "overrides".into(), |card| format!("{}+overrides", card.source).into()),
        period: own.iter().fold(all, |all, price| all.intersect(period(price.from, price.to)).unwrap_or(all)),
        nearest_class: false,
        also_billed: listed.is_some_and(|card| card.also_billed),
        inexact: listed.map_or_else(Vec::new, |card| card.inexact.clone()),
        tiers: tiers.collect(),
    }
}

fn rates_at(start: u64, listed: &[RateTier], own: &[&PriceOverride]) -> Rates {
    let below = listed.iter().rev().find(|tier| tier.above_input_tokens <= start);
    let mut rates = below.map_or_else(Rates::default, |tier| tier.rates);
    let mut in_force: Vec<_> = own.iter().filter(|price| price.above_input_tokens <= start).collect();
    // A stable sort: among entries of one tier the last one stays last and is written last.
    in_force.sort_by_key(|price| price.above_input_tokens);
    for (kind, price) in in_force.into_iter().flat_map(|price| price.rates.iter()) {
        rates.set(kind, Some(price));
    }
    rates
}

fn holds(price: &PriceOverride, at: Timestamp) -> bool {
    period(price.from, price.to).contains(at)
}

fn period(from: Option<Timestamp>, to: Option<Timestamp>) -> Period {
    Period { start: from.unwrap_or(Period::ALL.start), end: to.unwrap_or(Period::ALL.end) }
}

fn not_empty(
    from: Option<Timestamp>,
    to: Option<Timestamp>,
    what: &'static str,
    number: usize,
) -> Result<(), OverrideError> {
    let period = period(from, to);
    if period.start < period.end { Ok(()) } else { Err(OverrideError::EmptyPeriod { what, number }) }
}

/// Eight hex digits that differ when the text does (FNV-1a). Tells versions apart; it is no protection against forgery.
pub(super) fn fingerprint(text: &str) -> String {
    let hash = text
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    format!("{:08x}", (hash >> 32) ^ (hash & 0xffff_ffff))
}

impl Percent {
    const WHOLE: u32 = 1_000_000;

    /// What is left of the price, in millionths.
    #[must_use]
    pub const fn left(self) -> u32 {
        self.0
    }
}

impl FromStr for Percent {
    type Err = DecimalError;

    fn from_str(text: &str) -> Result<Percent, DecimalError> {
        let left = i128::from(Percent::WHOLE) - parse_scaled(text, 4)?;
        u32::try_from(left).map(Percent).map_err(|_| DecimalError::OutOfRange(text.to_owned()))
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format_scaled(i128::from(Percent::WHOLE) - i128::from(self.0), 4, 0))
    }
}

impl Serialize for Percent {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Percent {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Percent, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages_are_exact_and_bounded() {
        assert_eq!("12.5".parse::<Percent>().map(Percent::left), Ok(875_000));
        assert_eq!("-20".parse::<Percent>().map(Percent::left), Ok(1_200_000));
        assert_eq!("0.0001".parse::<Percent>().map(Percent::left), Ok(999_999));
        assert!(
            "100.1".parse::<Percent>().is_err()
                && "0.00001".parse::<Percent>().is_err()
                && "ten".parse::<Percent>().is_err()
        );
        assert_eq!("12.5".parse::<Percent>().expect("a percentage").to_string(), "12.5");
    }

    #[test]
    fn entries_that_cannot_apply_are_refused() {
        let read = |json: &str| serde_json::from_str::<Overrides>(json).expect("overrides").check();
        let empty = r#"{"price":[{"provider":"a","model":"b"}]}"#;
        assert!(matches!(read(empty), Err(OverrideError::NoRates { number: 1, .. })));
        let backwards = r#"{"discount":[{"percent":"5"},{"percent":"5","from":"2026-02-01","to":"2026-02-01"}]}"#;
        assert_eq!(read(backwards), Err(OverrideError::EmptyPeriod { what: "discount", number: 2 }));
        assert!(serde_json::from_str::<Overrides>(r#"{"price":[{"provider":"a","model":"b","imput":"1"}]}"#).is_err());
    }
}
