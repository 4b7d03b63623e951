//! What a provider charges for an attempt, and how sure we are.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::context::Label;
use crate::money::{Money, TokenPrice};
use crate::usage::{TokenKind, TokenUsage};

/// One amount at the FOCUS price levels. All four are real: they differ where discounts or commitments exist.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Costs {
    /// At the public price.
    pub list_cost: Money,
    /// At the negotiated price.
    pub contracted_cost: Money,
    /// After amortised commitments: what it really cost. Reports add this up.
    pub effective_cost: Money,
    /// What the invoice will show for it.
    pub billed_cost: Money,
}

impl Costs {
    /// The same amount at every level.
    #[must_use]
    pub const fn flat(amount: Money) -> Costs {
        Costs { list_cost: amount, contracted_cost: amount, effective_cost: amount, billed_cost: amount }
    }
}

/// Why an amount is an estimate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EstimateReason {
    /// The answer was cut and its usage counted from what was delivered.
    UsageCounted,
    /// The process stopped in mid-request; booked from what was known when it was opened.
    Crash,
    /// The model is priced, but not this kind of token or class of service; its nearest price was used.
    NearestPrice,
}

impl EstimateReason {
    /// The name used in tables and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            EstimateReason::UsageCounted => "usage_counted",
            EstimateReason::Crash => "crash",
            EstimateReason::NearestPrice => "nearest_price",
        }
    }
}

/// Why an attempt has no amount. Unknown is not zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UnpricedReason {
    /// No price book knows the model.
    UnknownModel,
    /// The model is known, a kind of token it used has no price and none near enough.
    UnknownRate,
    /// No usage was reported and none could be counted.
    NoUsage,
    /// Billed by something other than tokens (images, seconds, characters) that is not metered yet.
    UnsupportedUnit,
    /// Runs on our own GPUs: the pool's allocation prices it.
    SelfHosted,
}

impl UnpricedReason {
    /// The name used in tables and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            UnpricedReason::UnknownModel => "unknown_model",
            UnpricedReason::UnknownRate => "unknown_rate",
            UnpricedReason::NoUsage => "no_usage",
            UnpricedReason::UnsupportedUnit => "unsupported_unit",
            UnpricedReason::SelfHosted => "self_hosted",
        }
    }
}

/// What the provider charges for an attempt.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Charge {
    /// Reported usage at a known price.
    Priced {
        /// The amounts.
        costs: Costs,
        /// The rates they were made with.
        rates: ResolvedRates,
    },
    /// A number with a stated weakness.
    Estimated {
        /// The amounts.
        costs: Costs,
        /// The rates they were made with.
        rates: ResolvedRates,
        /// The weakness.
        reason: EstimateReason,
    },
    /// No number.
    Unpriced {
        /// Why not.
        reason: UnpricedReason,
    },
}

impl Charge {
    /// The amounts, unless there are none.
    #[must_use]
    pub const fn costs(&self) -> Option<Costs> {
        match self {
            Charge::Priced { costs, .. } | Charge::Estimated { costs, .. } => Some(*costs),
            Charge::Unpriced { .. } => None,
        }
    }

    /// The rates behind the amounts, unless there are none.
    #[must_use]
    pub const fn rates(&self) -> Option<&ResolvedRates> {
        match self {
            Charge::Priced { rates, .. } | Charge::Estimated { rates, .. } => Some(rates),
            Charge::Unpriced { .. } => None,
        }
    }

    /// `priced`, `estimated` or `unpriced`.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        match self {
            Charge::Priced { .. } => "priced",
            Charge::Estimated { .. } => "estimated",
            Charge::Unpriced { .. } => "unpriced",
        }
    }

    /// Why it is estimated or unpriced.
    #[must_use]
    pub const fn reason(&self) -> Option<&'static str> {
        match self {
            Charge::Priced { .. } => None,
            Charge::Estimated { reason, .. } => Some(reason.name()),
            Charge::Unpriced { reason } => Some(reason.name()),
        }
    }
}

/// The rates that one attempt was priced with, after date, tier, class and overrides were settled.
///
/// Kept on every row as text such as `genai-prices@0.2.1 openai/gpt-4o input=2500000 output=10000000 x0.9`
/// (picodollars a token, and the negotiated factor), so that any amount can be recomputed from its own row.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ResolvedRates(Label);

impl ResolvedRates {
    /// Writes down the rates of `book` for `sku`, and the contracted price as a share of the list price in millionths.
    #[must_use]
    pub fn new(book: &str, sku: &str, rates: &[(TokenKind, TokenPrice)], contracted_millionths: u32) -> ResolvedRates {
        let mut text = format!("{} {}", one_word(book), one_word(sku));
        for (kind, price) in rates {
            text.push_str(&format!(" {kind}={}", price.pico()));
        }
        if contracted_millionths != 1_000_000 {
            text.push_str(&format!(" x{contracted_millionths}"));
        }
        ResolvedRates(text.into())
    }

    /// The text as it is stored.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Name and version of the price book.
    #[must_use]
    pub fn book(&self) -> &str {
        self.0.split(' ').next().unwrap_or_default()
    }

    /// What was priced: provider, model, class and tier.
    #[must_use]
    pub fn sku(&self) -> &str {
        self.0.split(' ').nth(1).unwrap_or_default()
    }

    /// The rate of one kind of token.
    #[must_use]
    pub fn rate(&self, kind: TokenKind) -> Option<TokenPrice> {
        self.terms().find(|&(name, _)| name == kind.name()).map(|(_, pico)| TokenPrice::from_pico(pico))
    }

    /// The contracted price as a share of the list price, in millionths.
    #[must_use]
    pub fn contracted_millionths(&self) -> u32 {
        self.0
            .rsplit(' ')
            .next()
            .and_then(|word| word.strip_prefix('x'))
            .and_then(|n| n.parse().ok())
            .unwrap_or(1_000_000)
    }

    /// The amounts of `usage` at these rates: list by multiplication, the rest by the negotiated factor.
    ///
    /// `None` when a kind that was used has no rate here, or the sum is larger than the ledger can hold.
    #[must_use]
    pub fn charge(&self, usage: &TokenUsage) -> Option<Costs> {
        let mut list_cost = Money::ZERO;
        for (kind, tokens) in usage.iter() {
            list_cost = list_cost.checked_add(self.rate(kind)?.times(tokens)).ok()?;
        }
        let contracted_cost = discounted(list_cost, self.contracted_millionths())?;
        Some(Costs { list_cost, contracted_cost, effective_cost: contracted_cost, billed_cost: contracted_cost })
    }

    fn terms(&self) -> impl Iterator<Item = (&str, u64)> {
        self.0.split(' ').skip(2).filter_map(|word| {
            let (name, pico) = word.split_once('=')?;
            Some((name, pico.parse().ok()?))
        })
    }
}

/// `amount * millionths / 10^6` through the largest-remainder split, so that price and discount add up to the list.
fn discounted(amount: Money, millionths: u32) -> Option<Money> {
    const WHOLE: u32 = 1_000_000;
    match millionths.checked_sub(WHOLE) {
        Some(0) => Some(amount),
        Some(markup) => {
            // A markup is the list price plus a share of it.
            let wholes = Money::from_pico(amount.pico().checked_mul(i128::from(markup / WHOLE))?);
            let part = discounted(amount, markup % WHOLE)?;
            amount.checked_add(wholes).and_then(|sum| sum.checked_add(part)).ok()
        }
        None => {
            let parts = amount.split(&[u64::from(millionths), u64::from(WHOLE - millionths)]).ok()?;
            parts.first().copied()
        }
    }
}

fn one_word(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join("_")
}

impl fmt::Display for ResolvedRates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for ResolvedRates {
    type Err = std::convert::Infallible;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(ResolvedRates(text.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_can_be_read_back_and_recharge_the_same() {
        let list = [
            (TokenKind::Input, TokenPrice::from_pico(2_500_000)),
            (TokenKind::Output, TokenPrice::from_pico(10_000_000)),
        ];
        let rates = ResolvedRates::new("genai-prices@0.2.1", "openai/gpt 4o", &list, 900_000);
        assert_eq!(rates.as_str(), "genai-prices@0.2.1 openai/gpt_4o input=2500000 output=10000000 x900000");
        assert_eq!((rates.book(), rates.sku()), ("genai-prices@0.2.1", "openai/gpt_4o"));
        let usage = TokenUsage { input: 1_000, output: 100, ..TokenUsage::default() };
        let costs = rates.charge(&usage).expect("a charge");
        assert_eq!(costs.list_cost.to_string(), "0.0035");
        assert_eq!(costs.effective_cost.to_string(), "0.00315");
        assert_eq!(rates.charge(&TokenUsage { cache_read: 1, ..usage }), None);
    }

    #[test]
    fn a_markup_is_above_the_list() {
        let rates = ResolvedRates::new("internal", "a/b", &[(TokenKind::Input, TokenPrice::from_pico(10))], 1_200_000);
        let costs = rates.charge(&TokenUsage { input: 5, ..TokenUsage::default() }).expect("a charge");
        assert_eq!((costs.list_cost.pico(), costs.contracted_cost.pico()), (50, 60));
        // 0.9 of a picodollar is rounded by the split, as a discount's is, and not cut off.
        assert_eq!(discounted(Money::from_pico(1), 1_900_000), Some(Money::from_pico(2)));
        assert_eq!(discounted(Money::from_pico(7), 3_000_000), Some(Money::from_pico(21)));
    }
}
