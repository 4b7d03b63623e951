//! The price book: what providers charge, by model, kind of token, class of service, context tier and date.

use crate::attempt::{Operation, ServiceClass};
use crate::charge::{Charge, UnpricedReason};
use crate::time::Timestamp;
use crate::usage::{TokenUsage, UsageQuality};

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
#[derive(Debug)]
pub struct PriceBook;

impl PriceBook {
    /// Public list prices from the `genai-prices` crate.
    #[must_use]
    pub fn base() -> PriceBook {
        PriceBook
    }

    /// What the provider charges. Unknown models give [`Charge::Unpriced`], never zero.
    #[must_use]
    pub fn charge(&self, _query: &PriceQuery<'_>) -> Charge {
        Charge::Unpriced { reason: UnpricedReason::UnknownModel }
    }
}
