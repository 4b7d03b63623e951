//! Reads exact prices out of the `genai-prices` crate, which answers only "what would this usage cost" in binary floats.
//!
//! Published prices are decimals, nearly all of at most six places per million tokens, so the answer for a single kind of
//! token, written with six places, is the published price. Kinds for which it is not are named by
//! [`Prober::inexact_kinds`], so that nobody takes the rounded price for the published one. Whether a kind has a
//! price of its own is seen from the errors: the crate checks that a part does not exceed its whole only for priced parts.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use genai_prices::{Calculator, ErrorKind, PriceRequest, Usage};

use super::card::{RateTier, Rates};
use crate::money::TokenPrice;
use crate::time::Timestamp;
use crate::usage::{TokenKind, TokenUsage};

/// Input sizes with at most one price step between neighbours; steps are then found by bisection. The catalogue's
/// steps lie at 32, 100, 128, 200, 256, 272, 512 and 524 thousand tokens.
const SIZES: [u32; 13] =
    [1, 20_000, 48_000, 80_000, 114_000, 160_000, 228_000, 264_000, 400_000, 700_000, 1_500_000, 4_000_000, 16_000_000];
const PER_MILLION: f64 = 1_000_000.0;

/// The catalogue gave no usable answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Unreadable;

/// Asks for one model's prices at one moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Prober<'a> {
    pub(super) provider: &'a str,
    pub(super) model: &'a str,
    pub(super) context: Option<(&'a str, &'a str)>,
    pub(super) at: Timestamp,
}

/// The catalogue's own names of what it found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) provider: String,
    pub(super) model: String,
    /// A fee is charged for a request without any tokens.
    pub(super) request_fee: bool,
}

impl Prober<'_> {
    /// The model that the catalogue finds under these names, aliases, dates and documented fallback providers included.
    pub(super) fn identity(&self) -> Option<Identity> {
        if !names_a_provider(self.provider, self.model) {
            return None;
        }
        let found = self.ask(&Usage::new()).ok()?;
        let request_fee = found.total_price > 0.0;
        Some(Identity { provider: found.provider_id, model: found.model_id, request_fee })
    }

    /// Whether anything that is not a token has a price: seconds of audio, characters, pages.
    pub(super) fn bills_other_units(&self) -> bool {
        let units =
            ["audio_seconds", "input_audio_seconds", "input_characters", "input_document_pages", "input_pixels"];
        let usage: Usage = units.into_iter().map(|unit| (unit, PER_MILLION)).collect();
        self.ask(&usage).is_ok_and(|found| found.total_price > 0.0)
    }

    /// The kinds that have a price of their own.
    pub(super) fn priced_kinds(&self) -> Vec<TokenKind> {
        TokenKind::ALL.into_iter().filter(|&kind| self.has_own_price(kind)).collect()
    }

    /// The prices by size of the input, for kinds that have one of their own.
    pub(super) fn tiers(&self, kinds: &[TokenKind]) -> Result<Vec<RateTier>, Unreadable> {
        let mut tiers = vec![RateTier { above_input_tokens: 0, rates: self.rates(kinds, SIZES[0])? }];
        for pair in SIZES.windows(2) {
            let (mut low, high) = (pair[0], pair[1]);
            let last = self.rates(kinds, high)?;
            let mut rates = tiers.last().map_or_else(Rates::default, |tier| tier.rates);
            while rates != last {
                let first = self.first_size_with_other_rates(kinds, rates, low, high)?;
                rates = self.rates(kinds, first)?;
                tiers.push(RateTier { above_input_tokens: u64::from(first - 1), rates });
                low = first;
            }
        }
        Ok(tiers)
    }

    /// The kinds whose published price is finer than a picodollar a token in some tier.
    pub(super) fn inexact_kinds(&self, kinds: &[TokenKind], tiers: &[RateTier]) -> Result<Vec<TokenKind>, Unreadable> {
        let mut inexact = Vec::new();
        for &kind in kinds {
            for tier in tiers {
                let size = u32::try_from(tier.above_input_tokens + 1).map_err(|_| Unreadable)?;
                let published = self.per_million(kind, f64::from(size))?;
                if !inexact.contains(&kind) && !is_exact(published, nearest(published)?) {
                    inexact.push(kind);
                }
            }
        }
        Ok(inexact)
    }

    /// Two answers that tell apart any two price lists in practice: everything at once in a small and in a large request.
    pub(super) fn mark(&self, kinds: &[TokenKind]) -> Option<(u64, u64)> {
        let mut usage = TokenUsage::default();
        for (index, &kind) in kinds.iter().enumerate() {
            *usage.get_mut(kind) = 1_009 + 97 * index as u64;
        }
        let small = self.ask(&provider_usage(&usage)).ok()?.total_price.to_bits();
        usage.input += 12_000_000;
        let large = self.ask(&provider_usage(&usage)).ok()?.total_price.to_bits();
        Some((small, large))
    }

    fn first_size_with_other_rates(
        &self,
        kinds: &[TokenKind],
        as_at_low: Rates,
        low: u32,
        high: u32,
    ) -> Result<u32, Unreadable> {
        let (mut low, mut high) = (low, high);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.rates(kinds, middle)? == as_at_low { low = middle } else { high = middle }
        }
        Ok(high)
    }

    fn rates(&self, kinds: &[TokenKind], input_tokens: u32) -> Result<Rates, Unreadable> {
        kinds.iter().map(|&kind| Ok((kind, self.rate(kind, f64::from(input_tokens))?))).collect()
    }

    fn rate(&self, kind: TokenKind, input_tokens: f64) -> Result<TokenPrice, Unreadable> {
        nearest(self.per_million(kind, input_tokens)?)
    }

    fn per_million(&self, kind: TokenKind, input_tokens: f64) -> Result<f64, Unreadable> {
        let mut usage = Usage::new();
        let per_million = if kind.is_input() {
            for key in keys(kind) {
                usage.insert(*key, input_tokens);
            }
            self.ask(&usage)?.input_price * PER_MILLION / input_tokens
        } else {
            usage.insert("input_tokens", input_tokens);
            for key in keys(kind) {
                usage.insert(*key, PER_MILLION);
            }
            self.ask(&usage)?.output_price
        };
        Ok(per_million)
    }

    fn has_own_price(&self, kind: TokenKind) -> bool {
        let units = keys(kind);
        let own = if kind == TokenKind::CacheWrite5m { &units[..2] } else { &units[..1] };
        if units.len() == 1 {
            // The whole itself: a part of it without the whole is refused exactly when the whole is priced.
            let part = if kind.is_input() { "cache_read_tokens" } else { "output_reasoning_tokens" };
            return self.refuses(Usage::from([(part, 1.0)]));
        }
        own.iter().any(|&key| {
            let mut usage: Usage = units.iter().map(|&unit| (unit, 0.0)).collect();
            usage.insert(key, 1.0);
            self.refuses(usage)
        })
    }

    fn refuses(&self, usage: Usage) -> bool {
        self.request(&usage).is_err_and(|error| error.kind() == ErrorKind::InvalidUsage)
    }

    fn ask(&self, usage: &Usage) -> Result<genai_prices::PriceCalculation, Unreadable> {
        self.request(usage).map_err(|_| Unreadable)
    }

    fn request(&self, usage: &Usage) -> genai_prices::Result<genai_prices::PriceCalculation> {
        let mut request =
            PriceRequest::new(self.model, usage).with_provider_id(self.provider).with_timestamp(system_time(self.at));
        if let Some((key, value)) = self.context {
            request = request.with_price_context(key, value);
        }
        Calculator::bundled().calculate(&request)
    }
}

/// Usage in the catalogue's units, where every whole contains its parts. Overlaps we do not count apart are stated zeros.
pub(super) fn provider_usage(usage: &TokenUsage) -> Usage {
    let sum = |tokens: &[u64]| tokens.iter().fold(0u64, |sum, &tokens| sum.saturating_add(tokens)) as f64;
    let mut wholes = Usage::from([
        ("input_tokens", usage.input_tokens() as f64),
        ("output_tokens", usage.output_tokens() as f64),
        ("cache_read_tokens", sum(&[usage.cache_read, usage.cache_read_audio])),
        ("cache_write_tokens", sum(&[usage.cache_write_5m, usage.cache_write_1h])),
        ("cache_write_5m_tokens", usage.cache_write_5m as f64),
        ("cache_write_1h_tokens", usage.cache_write_1h as f64),
        ("input_audio_tokens", sum(&[usage.input_audio, usage.cache_read_audio])),
        ("cache_audio_read_tokens", usage.cache_read_audio as f64),
        ("input_image_tokens", usage.input_image as f64),
        ("output_reasoning_tokens", usage.reasoning as f64),
        ("output_audio_tokens", usage.output_audio as f64),
        ("output_image_tokens", usage.output_image as f64),
    ]);
    for overlap in ["cache_image_read_tokens", "cache_audio_write_tokens", "cache_image_write_tokens"] {
        wholes.insert(overlap, 0.0);
    }
    wholes
}

/// The catalogue's unit of a kind, then every unit that contains it.
const fn keys(kind: TokenKind) -> &'static [&'static str] {
    match kind {
        TokenKind::Input => &["input_tokens"],
        TokenKind::CacheRead => &["cache_read_tokens", "input_tokens"],
        TokenKind::CacheWrite5m => &["cache_write_5m_tokens", "cache_write_tokens", "input_tokens"],
        TokenKind::CacheWrite1h => &["cache_write_1h_tokens", "cache_write_tokens", "input_tokens"],
        TokenKind::InputAudio => &["input_audio_tokens", "input_tokens"],
        TokenKind::CacheReadAudio => {
            &["cache_audio_read_tokens", "cache_read_tokens", "input_audio_tokens", "input_tokens"]
        }
        TokenKind::InputImage => &["input_image_tokens", "input_tokens"],
        TokenKind::Output => &["output_tokens"],
        TokenKind::Reasoning => &["output_reasoning_tokens", "output_tokens"],
        TokenKind::OutputAudio => &["output_audio_tokens", "output_tokens"],
        TokenKind::OutputImage => &["output_image_tokens", "output_tokens"],
    }
}

/// The provider must be named and known: the catalogue would otherwise guess one from the model's name, which could be
/// somebody else's price. Only `litellm`, a proxy, may name its provider in front of the model.
fn names_a_provider(provider: &str, model: &str) -> bool {
    let knows = |name: &str| Calculator::bundled().find_provider(Some(name), None).is_ok_and(|found| found.is_some());
    match model.split_once('/') {
        Some((prefix, _)) if provider.eq_ignore_ascii_case("litellm") => !prefix.is_empty() && knows(prefix),
        _ => !provider.trim().is_empty() && knows(provider),
    }
}

/// The price in whole picodollars a token.
fn nearest(usd_per_million: f64) -> Result<TokenPrice, Unreadable> {
    TokenPrice::from_usd_per_million(&format!("{usd_per_million:.6}")).map_err(|_| Unreadable)
}

/// Whether the price is the published decimal and not a rounding of it. The tolerance covers the float's own error only.
fn is_exact(usd_per_million: f64, price: TokenPrice) -> bool {
    let read_back: f64 = price.usd_per_million().parse().unwrap_or(f64::NAN);
    (read_back - usd_per_million).abs() <= 1e-9 + usd_per_million * 1e-13
}

fn system_time(at: Timestamp) -> SystemTime {
    let distance = Duration::from_micros(at.micros().unsigned_abs());
    let moved = if at.micros() < 0 { UNIX_EPOCH.checked_sub(distance) } else { UNIX_EPOCH.checked_add(distance) };
    moved.unwrap_or(UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prober<'a>(provider: &'a str, model: &'a str) -> Prober<'a> {
        Prober { provider, model, context: None, at: "2026-11-20".parse().expect("a day") }
    }

    #[test]
    fn only_decimals_of_six_places_are_exact() {
        let cases =
            [(0.3, 300_000, true), (0.1 + 0.2, 300_000, true), (1.0 / 3.0, 333_333, false), (0.000_000_4, 0, false)];
        for (float, pico, exact) in cases {
            let price = nearest(float).expect("a price");
            assert_eq!((price.pico(), is_exact(float, price)), (pico, exact), "{float}");
        }
        assert_eq!(nearest(-1.0), Err(Unreadable));
        assert_eq!(nearest(f64::NAN), Err(Unreadable));
    }

    #[test]
    fn own_prices_are_told_from_borrowed_ones() {
        use TokenKind::{CacheRead, CacheWrite1h, CacheWrite5m, Input, InputAudio, Output, Reasoning};
        let cases: [(&str, &str, &[TokenKind]); 5] = [
            ("anthropic", "claude-opus-4-7", &[Input, CacheRead, CacheWrite5m, CacheWrite1h, Output]),
            ("openai", "gpt-4o", &[Input, CacheRead, Output]),
            ("openai", "gpt-4o-transcribe", &[Input, InputAudio, Output]),
            ("openai", "text-embedding-3-small", &[Input]),
            ("perplexity", "sonar-deep-research", &[Input, Output, Reasoning]),
        ];
        for (provider, model, expected) in cases {
            assert_eq!(prober(provider, model).priced_kinds(), expected, "{provider}/{model}");
        }
    }

    #[test]
    fn context_tiers_are_found_to_the_token() {
        let cases =
            [("openai", "gpt-5.4", 272_000), ("google", "gemini-2.5-pro", 200_000), ("x-ai", "grok-4.5", 199_999)];
        for (provider, model, start) in cases {
            let prober = prober(provider, model);
            let tiers = prober.tiers(&prober.priced_kinds()).expect("exact prices");
            assert_eq!(tiers.iter().map(|tier| tier.above_input_tokens).collect::<Vec<_>>(), [0, start], "{model}");
        }
    }

    #[test]
    fn names_resolve_as_in_the_catalogue_and_never_at_another_provider() {
        let cases = [
            ("openai", "gpt-4o-2024-08-06", Some(("openai", "gpt-4o"))),
            ("OpenAI", "GPT-4o", Some(("openai", "gpt-4o"))),
            ("azure", "gpt-4o", Some(("azure", "gpt-4o"))),
            ("bedrock", "eu.anthropic.claude-opus-4-5-20251101-v1:0", Some(("aws", "anthropic.claude-opus-4-5"))),
            ("vertex_ai", "gemini-2.5-pro", Some(("google", "gemini-2.5-pro"))),
            ("litellm", "anthropic/claude-opus-4-7", Some(("anthropic", "claude-opus-4-7"))),
            ("anthropic", "gpt-4o", None),
            ("openai", "claude-opus-4-7", None),
            ("litellm", "claude-opus-4-7", None),
            ("deepinfra", "gpt-4o", None),
            ("", "gpt-4o", None),
        ];
        for (provider, model, expected) in cases {
            let found = prober(provider, model).identity();
            let found = found.as_ref().map(|identity| (identity.provider.as_str(), identity.model.as_str()));
            if let Some(expected) = expected {
                assert_eq!(found.map(|found| found.0), Some(expected.0), "{provider}/{model}");
            } else {
                assert_eq!(found, None, "{provider}/{model}");
            }
        }
    }
}
