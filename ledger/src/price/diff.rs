//! Re-rating: what past usage would have cost under another book, and where two books differ.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{PriceBook, PriceQuery, RateCard};
use crate::attempt::{Attempt, Operation, ServiceClass};
use crate::charge::Charge;
use crate::context::Label;
use crate::money::{Money, TokenPrice};
use crate::time::Timestamp;
use crate::usage::{TokenKind, TokenUsage, UsageQuality};

/// Usage of the past, ready to be priced again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PastUsage {
    /// The provider.
    pub provider: Label,
    /// The model, as the provider named it.
    pub model: Option<Label>,
    /// What was asked.
    #[serde(default)]
    pub operation: Operation,
    /// The class of service that was billed.
    #[serde(default)]
    pub service_class: ServiceClass,
    /// Tokens by kind.
    pub usage: TokenUsage,
    /// How the usage is known.
    #[serde(default = "reported")]
    pub quality: UsageQuality,
    /// When it was used.
    pub at: Timestamp,
}

impl PastUsage {
    /// The usage of an attempt.
    #[must_use]
    pub fn of(attempt: &Attempt) -> PastUsage {
        PastUsage {
            provider: attempt.route.provider.clone(),
            model: attempt.route.model().cloned(),
            operation: attempt.route.operation,
            service_class: attempt.route.service_class,
            usage: attempt.usage,
            quality: attempt.usage_quality,
            at: attempt.timeline.received_at,
        }
    }

    /// The question to put to a book.
    #[must_use]
    pub fn query(&self) -> PriceQuery<'_> {
        PriceQuery {
            provider: &self.provider,
            model: self.model.as_deref(),
            operation: self.operation,
            service_class: self.service_class,
            usage: &self.usage,
            quality: self.quality,
            at: self.at,
        }
    }
}

/// Past usage under two books.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rerated {
    /// Attempts.
    pub attempts: u64,
    /// Effective cost under the old book, of those it can price.
    pub old: Money,
    /// Effective cost under the new book, of those it can price.
    pub new: Money,
    /// Attempts that the old book cannot price.
    pub old_unpriced: u64,
    /// Attempts that the new book cannot price.
    pub new_unpriced: u64,
}

/// The result of [`rerate`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rerating {
    /// By provider and model, sorted.
    pub models: Vec<(Label, Label, Rerated)>,
    /// All of them.
    pub total: Rerated,
}

/// What past usage costs under two books, by provider and model. Usage without a model stands under `-`.
#[must_use]
pub fn rerate<'a>(usages: impl IntoIterator<Item = &'a PastUsage>, old: &PriceBook, new: &PriceBook) -> Rerating {
    let mut models: BTreeMap<(Label, Label), Rerated> = BTreeMap::new();
    let mut total = Rerated::default();
    for usage in usages {
        let (before, after) = (old.charge(&usage.query()), new.charge(&usage.query()));
        let key = (usage.provider.clone(), usage.model.clone().unwrap_or_else(|| "-".into()));
        models.entry(key).or_default().count(&before, &after);
        total.count(&before, &after);
    }
    Rerating { models: models.into_iter().map(|((provider, model), sums)| (provider, model, sums)).collect(), total }
}

impl Rerated {
    fn count(&mut self, before: &Charge, after: &Charge) {
        self.attempts += 1;
        match before.costs() {
            Some(costs) => self.old += costs.effective_cost,
            None => self.old_unpriced += 1,
        }
        match after.costs() {
            Some(costs) => self.new += costs.effective_cost,
            None => self.new_unpriced += 1,
        }
    }
}

/// One price that two books state differently. A price that a book borrows from another kind counts as stated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateChange {
    /// The provider.
    pub provider: Label,
    /// The model.
    pub model: Label,
    /// The class of service.
    pub class: ServiceClass,
    /// The tier: requests with more input than this.
    pub above_input_tokens: u64,
    /// The kind of token.
    pub kind: TokenKind,
    /// The old price, if there is one.
    pub old: Option<TokenPrice>,
    /// The new price, if there is one.
    pub new: Option<TokenPrice>,
}

/// The list prices that differ between two books at one moment, for these providers and models.
#[must_use]
pub fn compare(old: &PriceBook, new: &PriceBook, models: &[(String, String)], at: Timestamp) -> Vec<RateChange> {
    let mut changes = Vec::new();
    for (provider, model) in models {
        for class in ServiceClass::ALL {
            let own = |book: &PriceBook| book.find(provider, model, class, at).ok().filter(|card| !card.nearest_class);
            let (before, after) = (own(old), own(new));
            for start in starts(before.as_deref(), after.as_deref()) {
                for kind in TokenKind::ALL {
                    let (old, new) = (price(before.as_deref(), start, kind), price(after.as_deref(), start, kind));
                    if old != new {
                        let (provider, model) = (provider.as_str().into(), model.as_str().into());
                        changes.push(RateChange { provider, model, class, above_input_tokens: start, kind, old, new });
                    }
                }
            }
        }
    }
    changes
}

fn starts(before: Option<&RateCard>, after: Option<&RateCard>) -> Vec<u64> {
    let tiers = before.into_iter().chain(after).flat_map(|card| &card.tiers);
    let mut starts: Vec<u64> = tiers.map(|tier| tier.above_input_tokens).collect();
    starts.sort_unstable();
    starts.dedup();
    starts
}

fn price(card: Option<&RateCard>, start: u64, kind: TokenKind) -> Option<TokenPrice> {
    let tier = card?.tiers.iter().rev().find(|tier| tier.above_input_tokens <= start)?;
    tier.rates.nearest(kind).map(|rate| rate.price)
}

const fn reported() -> UsageQuality {
    UsageQuality::Reported
}
