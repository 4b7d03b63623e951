//! The price book: what providers charge, by model, kind of token, class of service, context tier and date.
//!
//! A price is looked for in the overrides, then in the imported lists, then in the base catalogue. Where it is found decides
//! the list price; negotiated discounts and markups make the contracted price from it. What a provider's answer says about
//! its own cost is never read: its unit is unknown.

pub mod card;
pub mod diff;
pub mod litellm;
pub mod overrides;

mod base;
mod probe;

use std::sync::Arc;

use crate::attempt::{Operation, ServiceClass};
use crate::charge::{Charge, Costs, EstimateReason, ResolvedRates, UnpricedReason};
use crate::money::Money;
use crate::time::Timestamp;
use crate::usage::{TokenUsage, UsageQuality};

pub use base::BASE_VERSION;
pub use card::{Rate, RateCard, RateTier, Rates};
pub use diff::{PastUsage, RateChange, Rerated, Rerating, compare, rerate};
pub use litellm::{ImportError, Imported, Reject, import_litellm};
pub use overrides::{Discount, OverrideError, Overrides, PriceOverride};

/// The provider name of models that run on our own GPUs.
pub const SELF_HOSTED: &str = "self_hosted";

/// What is to be priced.
#[derive(Debug, Clone, Copy)]
pub struct PriceQuery<'a> {
    /// The provider whose list applies: `openai`, `anthropic`, `google`, …; `self_hosted` is never priced here.
    pub provider: &'a str,
    /// The model as the provider named it, dated names included.
    pub model: Option<&'a str>,
    /// What was asked of it; counting tokens and listing models are free.
    pub operation: Operation,
    /// The class of service that was billed.
    pub service_class: ServiceClass,
    /// Tokens by kind.
    pub usage: &'a TokenUsage,
    /// How the usage is known.
    pub quality: UsageQuality,
    /// When it was used.
    pub at: Timestamp,
}

/// An immutable set of prices.
#[derive(Debug, Clone)]
pub struct PriceBook {
    version: String,
    imported: Vec<litellm::Index>,
    overrides: Overrides,
}

impl PriceBook {
    /// Public list prices from the `genai-prices` crate.
    #[must_use]
    pub fn base() -> PriceBook {
        PriceBook { version: BASE_VERSION.to_owned(), imported: Vec::new(), overrides: Overrides::default() }
    }

    /// With an imported list that is asked before the base. A later import is asked before an earlier one.
    #[must_use]
    pub fn with_imported(mut self, imported: Imported) -> PriceBook {
        self.imported.insert(0, litellm::Index::of(imported));
        self.named()
    }

    /// With these overrides and discounts instead of any earlier ones. Prices of an entry that
    /// [`Overrides::check`] refuses are left out, so check first.
    #[must_use]
    pub fn with_overrides(mut self, overrides: Overrides) -> PriceBook {
        self.overrides = overrides;
        self.named()
    }

    /// Name and version of everything in the book, one word. Every priced row carries it.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }

    /// What the provider charges. Unknown models give [`Charge::Unpriced`], never zero.
    #[must_use]
    pub fn charge(&self, query: &PriceQuery<'_>) -> Charge {
        if query.provider == SELF_HOSTED {
            return Charge::Unpriced { reason: UnpricedReason::SelfHosted };
        }
        if matches!(query.operation, Operation::CountTokens | Operation::Models) {
            return self.free_of_charge(query);
        }
        if query.quality == UsageQuality::Missing {
            return Charge::Unpriced { reason: UnpricedReason::NoUsage };
        }
        let Some(model) = query.model else {
            return Charge::Unpriced { reason: UnpricedReason::UnknownModel };
        };
        match self.find(query.provider, model, query.service_class, query.at) {
            Ok(card) => self.priced(query, model, &card),
            Err(reason) => Charge::Unpriced { reason },
        }
    }

    /// The card that applies, overrides included, with the time it holds. For people; it takes some milliseconds.
    #[must_use]
    pub fn card(&self, provider: &str, model: &str, class: ServiceClass, at: Timestamp) -> Option<Arc<RateCard>> {
        let card = self.find(provider, model, class, at).ok()?;
        if &*card.source == BASE_VERSION {
            base::CATALOGUE.dated_card(provider, model, class, at).ok()
        } else {
            Some(card)
        }
    }

    /// The cards of a model at a moment: the standard one, then each class that has prices of its own. Empty when unknown.
    #[must_use]
    pub fn show(&self, provider: &str, model: &str, at: Timestamp) -> Vec<Arc<RateCard>> {
        let cards = ServiceClass::ALL.into_iter().filter_map(|class| self.card(provider, model, class, at));
        cards.filter(|card| !card.nearest_class).collect()
    }

    /// Every provider and model that the book lists by name, sorted. Aliases and dated names are priced, too.
    #[must_use]
    pub fn models(&self) -> Vec<(String, String)> {
        let base = genai_prices::Calculator::bundled()
            .providers()
            .flat_map(|provider| provider.models().map(move |model| (provider.id().to_owned(), model.id().to_owned())));
        let imported = self.imported.iter().flat_map(litellm::Index::models);
        let overridden = self.overrides.price.iter().map(|price| (price.provider.to_string(), price.model.to_string()));
        let mut all: Vec<_> = base.chain(imported).chain(overridden).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    fn find(&self, provider: &str, model: &str, class: ServiceClass, at: Timestamp) -> base::Found {
        let list = self.list_card(provider, model, class, at);
        if self.overrides.price.is_empty() {
            return list;
        }
        self.overrides.patch(provider, model, class, at, list)
    }

    fn list_card(&self, provider: &str, model: &str, class: ServiceClass, at: Timestamp) -> base::Found {
        if let Some(card) = self.imported.iter().find_map(|list| list.card(provider, model, class, at)) {
            return Ok(card);
        }
        let found = base::CATALOGUE.card(provider, model, class, at);
        let Ok(base) = &found else { return found };
        // A dated or prefixed name that the imported list lacks may be there under the name that the base knows it by.
        let renamed = self.imported.iter().find_map(|list| list.card(provider, &base.model, class, at));
        renamed.map_or(found, Ok)
    }

    fn priced(&self, query: &PriceQuery<'_>, model: &str, card: &RateCard) -> Charge {
        let unknown_rate = Charge::Unpriced { reason: UnpricedReason::UnknownRate };
        let Some(tier) = card.tier(query.usage) else { return unknown_rate };
        let mut guessed = card.nearest_class || card.also_billed;
        let mut used = Vec::with_capacity(4);
        for (kind, _) in query.usage.iter() {
            let Some(rate) = card.rate(tier, kind) else { return unknown_rate };
            guessed |= rate.guessed;
            used.push((kind, rate.price));
        }
        let factor = self.overrides.factor([query.provider, &card.provider], [model, &card.model], query.at);
        let rates = ResolvedRates::new(&self.version, &card.sku(tier), &used, factor);
        let Some(costs) = rates.charge(query.usage) else { return unknown_rate };
        match (query.quality, guessed) {
            (UsageQuality::Estimated, _) => Charge::Estimated { costs, rates, reason: EstimateReason::UsageCounted },
            (_, true) => Charge::Estimated { costs, rates, reason: EstimateReason::NearestPrice },
            _ => Charge::Priced { costs, rates },
        }
    }

    fn free_of_charge(&self, query: &PriceQuery<'_>) -> Charge {
        let sku = format!("{}/{}:{}", query.provider, query.model.unwrap_or("-"), query.operation.name());
        let rates = ResolvedRates::new(&self.version, &sku, &[], 1_000_000);
        Charge::Priced { costs: Costs::flat(Money::ZERO), rates }
    }

    fn named(mut self) -> PriceBook {
        let parts = self.imported.iter().map(|list| list.name().to_owned());
        let overrides = self.overrides.version();
        self.version =
            [BASE_VERSION.to_owned()].into_iter().chain(parts).chain(overrides).collect::<Vec<_>>().join("+");
        self
    }
}

#[cfg(test)]
mod tests;
