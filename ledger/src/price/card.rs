//! The rates of one model, in one class of service, for one span of time.

use std::fmt;

use serde::de::{MapAccess, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::attempt::ServiceClass;
use crate::context::Label;
use crate::money::TokenPrice;
use crate::time::Period;
use crate::usage::{TokenKind, TokenUsage};

/// What a provider charges for one model in one class of service while `period` lasts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateCard {
    /// The provider, as the price source names it.
    pub provider: Label,
    /// The model, as the price source names it. Aliases and dated names lead to the same card.
    pub model: Label,
    /// The class of service.
    #[serde(default)]
    pub class: ServiceClass,
    /// Name and version of the price source.
    pub source: Label,
    /// When these prices hold.
    #[serde(with = "open_ends", default = "always", skip_serializing_if = "is_always")]
    pub period: Period,
    /// The source has no price for this class; these are the model's standard prices.
    #[serde(default)]
    pub nearest_class: bool,
    /// The provider also bills something that is not a token, such as a fee per request. Tokens alone then cost too little.
    #[serde(default)]
    pub also_billed: bool,
    /// Kinds whose published price is finer than a picodollar a token. Theirs are rounded here, and charges are estimates.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inexact: Vec<TokenKind>,
    /// Prices by total input, lowest first. The first tier starts at nothing; there is always one.
    pub tiers: Vec<RateTier>,
}

impl RateCard {
    /// The tier that a request with this usage falls into: the highest one whose start its whole input exceeds.
    #[must_use]
    pub fn tier(&self, usage: &TokenUsage) -> Option<&RateTier> {
        let input = usage.input_tokens();
        self.tiers.iter().rev().find(|tier| input > tier.above_input_tokens).or(self.tiers.first())
    }

    /// The price of a kind in one of the card's tiers, and whether anything about it is a guess.
    #[must_use]
    pub fn rate(&self, tier: &RateTier, kind: TokenKind) -> Option<Rate> {
        let rate = tier.rates.nearest(kind)?;
        let borrowed = tier.rates.get(kind).is_none();
        let rounded = self.inexact.contains(&kind) || (borrowed && !self.inexact.is_empty());
        Some(Rate { guessed: rate.guessed || rounded, ..rate })
    }

    /// What was priced, in one word: `openai/gpt-5.4`, `openai/gpt-5.4:batch`, `openai/gpt-5.4:batch>272000`.
    #[must_use]
    pub fn sku(&self, tier: &RateTier) -> String {
        let mut sku = format!("{}/{}", self.provider, self.model);
        if self.class != ServiceClass::Standard && !self.nearest_class {
            sku.push(':');
            sku.push_str(self.class.name());
        }
        if tier.above_input_tokens > 0 {
            sku.push_str(&format!(">{}", tier.above_input_tokens));
        }
        sku
    }
}

/// The rates above a number of input tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateTier {
    /// These rates hold for requests whose input, cached or not, is larger than this. Zero in the first tier.
    #[serde(default)]
    pub above_input_tokens: u64,
    /// The rates, for every token of such a request.
    pub rates: Rates,
}

/// The price of each kind of token that has a price of its own. In JSON: USD per million tokens as decimal strings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Rates([Option<TokenPrice>; TokenKind::ALL.len()]);

/// The price that applies to a kind of token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// The price of one token.
    pub price: TokenPrice,
    /// It is another kind's price, and the provider probably charges something else.
    pub guessed: bool,
}

impl Rates {
    /// The kind's own price.
    #[must_use]
    pub const fn get(&self, kind: TokenKind) -> Option<TokenPrice> {
        self.0[kind as usize]
    }

    /// Sets the kind's own price.
    pub const fn set(&mut self, kind: TokenKind, price: Option<TokenPrice>) {
        self.0[kind as usize] = price;
    }

    /// Kinds that have a price of their own.
    pub fn iter(&self) -> impl Iterator<Item = (TokenKind, TokenPrice)> + '_ {
        TokenKind::ALL.into_iter().filter_map(|kind| Some((kind, self.get(kind)?)))
    }

    /// Whether nothing has a price.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.iter().next().is_none()
    }

    /// The kind's own price or the nearest one.
    ///
    /// A provider that publishes no price for cached, image or reasoning tokens bills them as plain input or output, so
    /// that is no guess. A missing price for the hour-long cache where the five-minute one is known, and for audio and
    /// for image output, is a hole in the list: providers do charge those apart.
    #[must_use]
    pub fn nearest(&self, kind: TokenKind) -> Option<Rate> {
        use TokenKind::{
            CacheRead, CacheReadAudio, CacheWrite1h, CacheWrite5m, Input, InputAudio, InputImage, Output, OutputAudio,
            OutputImage, Reasoning,
        };
        if let Some(price) = self.get(kind) {
            return Some(Rate { price, guessed: false });
        }
        let (next, guessed) = match kind {
            Input | Output => return None,
            CacheRead | CacheWrite5m | InputImage => (Input, false),
            CacheWrite1h => (CacheWrite5m, self.get(CacheWrite5m).is_some()),
            InputAudio => (Input, true),
            CacheReadAudio if self.get(CacheRead).is_some() => (CacheRead, true),
            CacheReadAudio => (InputAudio, false),
            Reasoning => (Output, false),
            OutputAudio | OutputImage => (Output, true),
        };
        let rate = self.nearest(next)?;
        Some(Rate { guessed: guessed || rate.guessed, ..rate })
    }
}

impl FromIterator<(TokenKind, TokenPrice)> for Rates {
    fn from_iter<I: IntoIterator<Item = (TokenKind, TokenPrice)>>(prices: I) -> Rates {
        let mut rates = Rates::default();
        for (kind, price) in prices {
            rates.set(kind, Some(price));
        }
        rates
    }
}

impl Serialize for Rates {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.iter().count()))?;
        for (kind, price) in self.iter() {
            map.serialize_entry(kind.name(), &price.usd_per_million())?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for Rates {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Rates, D::Error> {
        deserializer.deserialize_map(RatesVisitor)
    }
}

struct RatesVisitor;

impl<'de> Visitor<'de> for RatesVisitor {
    type Value = Rates;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("USD per million tokens as decimal strings, by kind of token")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Rates, A::Error> {
        let mut rates = Rates::default();
        while let Some((name, text)) = map.next_entry::<String, String>()? {
            let kind = TokenKind::from_name(&name)
                .ok_or_else(|| serde::de::Error::custom(format!("`{name}` is not a kind of token")))?;
            let price = TokenPrice::from_usd_per_million(&text).map_err(serde::de::Error::custom)?;
            rates.set(kind, Some(price));
        }
        Ok(rates)
    }
}

const fn always() -> Period {
    Period::ALL
}

fn is_always(period: &Period) -> bool {
    *period == Period::ALL
}

/// A period whose ends may be open, as `{"from": …, "to": …}` without the open ones.
mod open_ends {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::time::{Period, Timestamp};

    #[derive(Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Ends {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from: Option<Timestamp>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        to: Option<Timestamp>,
    }

    pub fn serialize<S: Serializer>(period: &Period, serializer: S) -> Result<S::Ok, S::Error> {
        let end = |at: Timestamp, open: Timestamp| (at != open).then_some(at);
        Ends { from: end(period.start, Period::ALL.start), to: end(period.end, Period::ALL.end) }.serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Period, D::Error> {
        let Ends { from, to } = Ends::deserialize(deserializer)?;
        Ok(Period { start: from.unwrap_or(Period::ALL.start), end: to.unwrap_or(Period::ALL.end) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(prices: &[(TokenKind, u64)]) -> Rates {
        prices.iter().map(|&(kind, pico)| (kind, TokenPrice::from_pico(pico))).collect()
    }

    #[test]
    fn a_missing_price_is_the_nearest_one_and_says_whether_that_is_a_guess() {
        let text = rates(&[(TokenKind::Input, 10), (TokenKind::Output, 50)]);
        let anthropic = rates(&[(TokenKind::Input, 10), (TokenKind::CacheWrite5m, 12), (TokenKind::Output, 50)]);
        let audio = rates(&[(TokenKind::Input, 10), (TokenKind::InputAudio, 32)]);
        let both = rates(&[(TokenKind::Input, 10), (TokenKind::CacheRead, 1)]);
        let cases = [
            (text, TokenKind::CacheRead, Some((10, false))),
            (text, TokenKind::CacheWrite1h, Some((10, false))),
            (anthropic, TokenKind::CacheWrite1h, Some((12, true))),
            (text, TokenKind::InputAudio, Some((10, true))),
            (text, TokenKind::CacheReadAudio, Some((10, true))),
            (audio, TokenKind::CacheReadAudio, Some((32, false))),
            (both, TokenKind::CacheReadAudio, Some((1, true))),
            (text, TokenKind::InputImage, Some((10, false))),
            (text, TokenKind::Reasoning, Some((50, false))),
            (text, TokenKind::OutputImage, Some((50, true))),
            (audio, TokenKind::Reasoning, None),
        ];
        for (rates, kind, expected) in cases {
            let found = rates.nearest(kind).map(|rate| (rate.price.pico(), rate.guessed));
            assert_eq!(found, expected, "{kind}");
        }
    }

    #[test]
    fn rates_are_decimal_strings_in_json() {
        let rates = rates(&[(TokenKind::Input, 2_500_000), (TokenKind::CacheWrite1h, 1)]);
        let json = serde_json::to_string(&rates).expect("json");
        assert_eq!(json, r#"{"input":"2.50","cache_write_1h":"0.000001"}"#);
        assert_eq!(serde_json::from_str::<Rates>(&json).expect("rates"), rates);
        assert!(serde_json::from_str::<Rates>(r#"{"inputs":"1"}"#).is_err());
    }
}
