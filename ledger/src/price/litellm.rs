//! Imports LiteLLM's `model_prices_and_context_window.json`.
//!
//! Numbers are taken as the decimal text they are written in and never become floats. A price finer than a picodollar a
//! token is the rounding noise of somebody's float; its whole model is rejected, because the prices that are left would
//! silently stand in for it.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::card::{RateCard, RateTier, Rates};
use super::overrides::fingerprint;
use crate::attempt::ServiceClass;
use crate::context::Label;
use crate::money::TokenPrice;
use crate::time::{Period, Timestamp};
use crate::usage::TokenKind;

/// An imported price list, stored as one JSON document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Imported {
    /// Where it came from and a fingerprint of its content: `litellm@1a2b3c4d`.
    pub name: Label,
    /// Its cards.
    pub cards: Vec<RateCard>,
}

/// A model that was not imported.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reject {
    /// The model's key in the file.
    pub model: String,
    /// The entry that stands in the way.
    pub key: String,
    /// What is wrong with it.
    pub reason: String,
}

/// A file that cannot be imported at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImportError {
    /// The text is not a JSON object of objects.
    #[error("not a price map: {0}")]
    NotAMap(String),
    /// No model in it has a price per token.
    #[error("no model in this file has a price per token; the first of {rejected} rejects: {first}")]
    NothingPriced {
        /// How many models were rejected.
        rejected: usize,
        /// The first of them.
        first: String,
    },
}

/// Reads LiteLLM's price map.
///
/// # Errors
/// [`ImportError`] when nothing can be imported; single models that cannot are in the list of rejects.
pub fn import_litellm(json: &str) -> Result<(Imported, Vec<Reject>), ImportError> {
    let models: BTreeMap<String, &RawValue> =
        serde_json::from_str(json).map_err(|error| ImportError::NotAMap(error.to_string()))?;
    let (mut read, mut rejects) = (BTreeMap::<(Label, Label), Entry>::new(), Vec::new());
    let name: Label = format!("litellm@{}", fingerprint(json)).into();
    for (key, entry) in models.into_iter().filter(|(key, _)| key != "sample_spec") {
        match read_model(&key, entry, &name) {
            Ok(entry) => keep_one(&mut read, entry, &mut rejects),
            Err(reject) => rejects.push(reject),
        }
    }
    let cards: Vec<RateCard> = read.into_values().flat_map(|entry| entry.cards).collect();
    if cards.is_empty() {
        let first =
            rejects.first().map_or_else(|| "none".to_owned(), |reject| format!("{}: {}", reject.model, reject.reason));
        return Err(ImportError::NothingPriced { rejected: rejects.len(), first });
    }
    Ok((Imported { name, cards }, rejects))
}

/// One key of the file and its cards, the standard one first.
struct Entry {
    key: String,
    prefixed: bool,
    cards: Vec<RateCard>,
}

/// Of two keys for the same model at the same provider, the one that names the provider holds, as in LiteLLM.
fn keep_one(read: &mut BTreeMap<(Label, Label), Entry>, entry: Entry, rejects: &mut Vec<Reject>) {
    let Some(first) = entry.cards.first() else { return };
    let name = (first.provider.clone(), first.model.clone());
    let loser = match read.get_mut(&name) {
        None => {
            read.insert(name, entry);
            return;
        }
        Some(other) if entry.prefixed && !other.prefixed => std::mem::replace(other, entry),
        Some(_) => entry,
    };
    let reason = format!("another entry names the same model of {}", name.0);
    rejects.push(Reject { model: loser.key, key: "litellm_provider".to_owned(), reason });
}

fn read_model(key: &str, entry: &RawValue, source: &Label) -> Result<Entry, Reject> {
    let fields = Fields::of(key, entry)?;
    if fields.has("off_peak_pricing") {
        return Err(fields.reject("off_peak_pricing", "prices by time of day are not imported"));
    }
    let litellm_provider = fields.text("litellm_provider")?;
    let provider = canonical(&litellm_provider);
    let model =
        [&*litellm_provider, provider].iter().find_map(|name| key.strip_prefix(name)?.strip_prefix('/')).unwrap_or(key);
    let per_token = fields.standard_tiers("", provider == "xai")?;
    let standard = fields.tiered_pricing()?.unwrap_or(per_token);
    if standard
        .iter()
        .all(|tier| tier.rates.get(TokenKind::Input).is_none() && tier.rates.get(TokenKind::Output).is_none())
    {
        return Err(fields.reject("input_cost_per_token", "no price per token"));
    }
    let also_billed = ["input_cost_per_request", "input_cost_per_query"].iter().any(|fee| fields.has(fee));
    let card = |class, tiers| RateCard {
        provider: provider.into(),
        model: model.into(),
        class,
        source: source.clone(),
        period: Period::ALL,
        nearest_class: false,
        also_billed,
        inexact: Vec::new(),
        tiers,
    };
    let mut cards = vec![card(ServiceClass::Standard, standard)];
    for (class, suffix) in [(ServiceClass::Flex, "_flex"), (ServiceClass::Priority, "_priority")] {
        if fields.has_price_with(suffix) && !fields.has("tiered_pricing") {
            cards.push(card(class, fields.standard_tiers(suffix, provider == "xai")?));
        }
    }
    if fields.has("input_cost_per_token_batches") {
        cards.push(card(ServiceClass::Batch, fields.batch_tiers(provider == "xai")?));
    }
    Ok(Entry { key: key.to_owned(), prefixed: model != key, cards })
}

/// The provider as requests name it, without LiteLLM's division into kinds of models.
fn canonical(litellm_provider: &str) -> &str {
    match litellm_provider {
        "bedrock_converse" => "bedrock",
        "text-completion-openai" => "openai",
        "cohere_chat" => "cohere",
        other if other.starts_with("vertex_ai-") => "vertex_ai",
        other if other.starts_with("fireworks_ai-") => "fireworks_ai",
        other => other,
    }
}

const INPUT: &str = "input_cost_per_token";
const OUTPUT: &str = "output_cost_per_token";
const READ: &str = "cache_read_input_token_cost";
const WRITE: &str = "cache_creation_input_token_cost";
const WRITE_1H: &str = "cache_creation_input_token_cost_above_1hr";
const REASONING: &str = "output_cost_per_reasoning_token";
const OUTPUT_IMAGE: &str = "output_cost_per_image_token";

/// One model's entries, by key, as they are written.
struct Fields<'a> {
    model: &'a str,
    entries: BTreeMap<String, &'a RawValue>,
}

impl<'a> Fields<'a> {
    fn of(model: &'a str, entry: &'a RawValue) -> Result<Fields<'a>, Reject> {
        let entries = serde_json::from_str(entry.get()).map_err(|error| Reject {
            model: model.to_owned(),
            key: String::new(),
            reason: format!("not an object: {error}"),
        })?;
        Ok(Fields { model, entries })
    }

    fn reject(&self, key: &str, reason: impl ToString) -> Reject {
        Reject { model: self.model.to_owned(), key: key.to_owned(), reason: reason.to_string() }
    }

    fn has(&self, key: &str) -> bool {
        self.entries.get(key).is_some_and(|value| value.get() != "null")
    }

    fn has_price_with(&self, suffix: &str) -> bool {
        [INPUT, OUTPUT, READ, WRITE].iter().any(|key| self.has(&format!("{key}{suffix}")))
    }

    fn text(&self, key: &str) -> Result<String, Reject> {
        let value = self.entries.get(key).ok_or_else(|| self.reject(key, "missing"))?;
        serde_json::from_str(value.get()).map_err(|_| self.reject(key, "not a text"))
    }

    fn price(&self, key: &str) -> Result<Option<TokenPrice>, Reject> {
        if !self.has(key) {
            return Ok(None);
        }
        decimal(self.entries[key]).map(Some).map_err(|reason| self.reject(key, reason))
    }

    /// The price with the suffix of a class, else the standard one.
    fn class_price(&self, key: &str, suffix: &str) -> Result<Option<TokenPrice>, Reject> {
        Ok(self.price(&format!("{key}{suffix}"))?.or(self.price(key)?))
    }

    /// Prices of the standard class, or of the class with this suffix where it has its own.
    fn standard_tiers(&self, suffix: &str, inclusive: bool) -> Result<Vec<RateTier>, Reject> {
        let mut base = Rates::default();
        base.set(TokenKind::Input, self.class_price(INPUT, suffix)?);
        let output = self.class_price(OUTPUT, suffix)?.filter(|price| *price != TokenPrice::FREE);
        let output = output.or(self.price(OUTPUT_IMAGE)?).or(self.class_price(OUTPUT, suffix)?);
        base.set(TokenKind::Output, output);
        base.set(TokenKind::CacheRead, self.class_price(READ, suffix)?);
        base.set(TokenKind::CacheWrite5m, self.class_price(WRITE, suffix)?);
        base.set(TokenKind::CacheWrite1h, self.price(WRITE_1H)?);
        base.set(TokenKind::Reasoning, self.reasoning(suffix)?);
        self.set_media(&mut base, suffix)?;

        let mut tiers = vec![RateTier { above_input_tokens: 0, rates: base }];
        for (threshold, start) in self.thresholds(&[INPUT], "")? {
            let mut rates = base;
            let tiered = |key: &str| self.class_price(&format!("{key}_above_{threshold}_tokens"), suffix);
            for (kind, key) in [
                (TokenKind::Input, INPUT),
                (TokenKind::Output, OUTPUT),
                (TokenKind::CacheRead, READ),
                (TokenKind::CacheWrite5m, WRITE),
                (TokenKind::CacheWrite1h, WRITE_1H),
            ] {
                rates.set(kind, tiered(key)?.or(base.get(kind)));
            }
            tiers.push(RateTier { above_input_tokens: start - u64::from(inclusive), rates });
        }
        Ok(tiers)
    }

    /// Prices of the batch class. Cached and audio tokens without a batch price are plain batch input.
    fn batch_tiers(&self, inclusive: bool) -> Result<Vec<RateTier>, Reject> {
        const BATCH: &str = "_batches";
        let kinds = [
            (TokenKind::Input, INPUT),
            (TokenKind::Output, OUTPUT),
            (TokenKind::CacheRead, READ),
            (TokenKind::CacheWrite5m, WRITE),
        ];
        let mut base = Rates::default();
        for (kind, key) in kinds {
            base.set(kind, self.price(&format!("{key}{BATCH}"))?);
        }
        base.set(TokenKind::Output, base.get(TokenKind::Output).or(self.price(OUTPUT)?));
        base.set(TokenKind::InputAudio, self.price("input_cost_per_audio_token_batches")?);
        base.set(TokenKind::InputImage, self.price("input_cost_per_image_token_batches")?);

        let mut tiers = vec![RateTier { above_input_tokens: 0, rates: base }];
        for (threshold, start) in self.thresholds(&[INPUT, OUTPUT, READ, WRITE], BATCH)? {
            let mut rates = tiers.last().map_or(base, |tier| tier.rates);
            for (kind, key) in kinds {
                let own = self.price(&format!("{key}_above_{threshold}_tokens{BATCH}"))?;
                rates.set(kind, own.or(rates.get(kind)));
            }
            tiers.push(RateTier { above_input_tokens: start - u64::from(inclusive), rates });
        }
        Ok(tiers)
    }

    /// A table of input ranges, each with its own complete prices.
    fn tiered_pricing(&self) -> Result<Option<Vec<RateTier>>, Reject> {
        const KEY: &str = "tiered_pricing";
        if !self.has(KEY) {
            return Ok(None);
        }
        let rows: Vec<&RawValue> =
            serde_json::from_str(self.entries[KEY].get()).map_err(|error| self.reject(KEY, error))?;
        let mut tiers = Vec::with_capacity(rows.len());
        for row in rows {
            let row = Fields::of(self.model, row)?;
            let Some(range) = row.entries.get("range") else {
                return Err(self.reject(KEY, "a tier without a `range`"));
            };
            let bounds: Vec<&RawValue> = serde_json::from_str(range.get()).map_err(|error| self.reject(KEY, error))?;
            let start = bounds.first().and_then(|start| whole(start.get()));
            let start = start.ok_or_else(|| self.reject(KEY, "a range that does not start at a whole number"))?;
            let mut rates = Rates::default();
            rates.set(TokenKind::Input, row.price(INPUT)?);
            rates.set(TokenKind::Output, row.price(OUTPUT)?.or(self.price(OUTPUT)?));
            rates.set(TokenKind::CacheRead, row.price(READ)?);
            rates.set(TokenKind::CacheWrite5m, row.price(WRITE)?);
            rates.set(TokenKind::CacheWrite1h, row.price(WRITE_1H)?);
            rates.set(TokenKind::Reasoning, row.price(REASONING)?);
            self.set_media(&mut rates, "")?;
            tiers.push(RateTier { above_input_tokens: start, rates });
        }
        tiers.sort_by_key(|tier| tier.above_input_tokens);
        Ok((!tiers.is_empty()).then_some(tiers))
    }

    fn set_media(&self, rates: &mut Rates, suffix: &str) -> Result<(), Reject> {
        rates.set(TokenKind::InputAudio, self.class_price("input_cost_per_audio_token", suffix)?);
        rates.set(TokenKind::CacheReadAudio, self.class_price("cache_read_input_audio_token_cost", suffix)?);
        rates.set(TokenKind::InputImage, self.price("input_cost_per_image_token")?);
        rates.set(TokenKind::OutputAudio, self.price("output_cost_per_audio_token")?);
        rates.set(TokenKind::OutputImage, self.price(OUTPUT_IMAGE)?);
        Ok(())
    }

    /// A class with its own output price bills reasoning at that, unless it has its own reasoning price, too.
    fn reasoning(&self, suffix: &str) -> Result<Option<TokenPrice>, Reject> {
        let own = self.price(&format!("{REASONING}{suffix}"))?;
        let class_output = !suffix.is_empty() && self.has(&format!("{OUTPUT}{suffix}"));
        if own.is_some() || class_output { Ok(own) } else { self.price(REASONING) }
    }

    /// The thresholds written into keys such as `input_cost_per_token_above_272k_tokens`, lowest first.
    fn thresholds(&self, prefixes: &[&str], suffix: &str) -> Result<Vec<(String, u64)>, Reject> {
        let mut found = BTreeSet::new();
        for key in self.entries.keys().filter(|key| self.has(key)) {
            let written = prefixes.iter().find_map(|prefix| {
                key.strip_prefix(prefix)?.strip_prefix("_above_")?.strip_suffix(suffix)?.strip_suffix("_tokens")
            });
            let Some(written) = written else { continue };
            let (digits, scale) = written.strip_suffix('k').map_or((written, 1), |digits| (digits, 1_000));
            let number =
                digits.parse::<u64>().ok().and_then(|number| number.checked_mul(scale)).filter(|&start| start > 0);
            found.insert((number.ok_or_else(|| self.reject(key, "not a threshold"))?, written.to_owned()));
        }
        Ok(found.into_iter().map(|(start, written)| (written, start)).collect())
    }
}

/// A number, or a text with a number in it, as USD per token.
fn decimal(value: &RawValue) -> Result<TokenPrice, String> {
    let text: Cow<'_, str> = match value.get().strip_prefix('"') {
        Some(_) => serde_json::from_str::<String>(value.get()).map_err(|error| error.to_string())?.into(),
        None => value.get().into(),
    };
    TokenPrice::from_usd_per_token(text.trim()).map_err(|error| error.to_string())
}

/// A whole number of tokens, possibly written with a fraction of zero.
fn whole(text: &str) -> Option<u64> {
    u64::try_from(crate::decimal::parse_scaled(text, 0).ok()?).ok()
}

/// An imported list by provider and model.
#[derive(Debug, Clone)]
pub(super) struct Index {
    name: Label,
    providers: HashMap<String, HashMap<String, OfModel>>,
}

/// A model's cards by class of service.
type OfModel = [Vec<Arc<RateCard>>; ServiceClass::ALL.len()];

impl Index {
    pub(super) fn of(imported: Imported) -> Index {
        let mut index = Index { name: imported.name, providers: HashMap::new() };
        for card in imported.cards {
            let models = index.providers.entry(card.provider.to_lowercase()).or_default();
            models.entry(card.model.to_lowercase()).or_default()[card.class as usize].push(Arc::new(card));
        }
        for classes in index.providers.values_mut().flat_map(HashMap::values_mut) {
            let standard = classes[ServiceClass::Standard as usize].clone();
            for class in ServiceClass::ALL {
                let nearest = standard.iter().map(|card| RateCard { class, nearest_class: true, ..(**card).clone() });
                if classes[class as usize].is_empty() {
                    classes[class as usize] = nearest.map(Arc::new).collect();
                }
            }
        }
        index
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn models(&self) -> impl Iterator<Item = (String, String)> + '_ {
        let cards = self.providers.values().flat_map(HashMap::values).filter_map(|classes| classes[0].first());
        cards.map(|card| (card.provider.to_string(), card.model.to_string()))
    }

    /// The card, under the provider's own name or one that LiteLLM uses for it.
    pub(super) fn card(
        &self,
        provider: &str,
        model: &str,
        class: ServiceClass,
        at: Timestamp,
    ) -> Option<Arc<RateCard>> {
        let (provider, model) = (lower(provider), lower(model));
        let mut names = [&*provider].into_iter().chain(aliases(&provider).iter().copied());
        names.find_map(|name| {
            let cards = &self.providers.get(name)?.get(&*model)?[class as usize];
            cards.iter().rev().find(|card| card.period.contains(at)).cloned()
        })
    }
}

fn lower(text: &str) -> Cow<'_, str> {
    if text.bytes().any(|byte| byte.is_ascii_uppercase()) { text.to_lowercase().into() } else { text.into() }
}

/// What LiteLLM calls a provider of the base catalogue.
fn aliases(provider: &str) -> &'static [&'static str] {
    match provider {
        "google" => &["gemini", "vertex_ai"],
        "aws" | "amazon" => &["bedrock"],
        "x-ai" => &["xai"],
        "together" => &["together_ai"],
        "fireworks" => &["fireworks_ai"],
        "moonshotai" => &["moonshot"],
        "voyageai" => &["voyage"],
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"{
        "sample_spec": {"litellm_provider": "one of"},
        "gpt-x": {"litellm_provider": "openai", "input_cost_per_token": 2.5e-06, "output_cost_per_token": "1.5e-05",
            "cache_read_input_token_cost": 2.5e-07, "input_cost_per_token_above_272k_tokens": 5e-06,
            "input_cost_per_token_priority": 5e-06, "input_cost_per_token_batches": 1.25e-06,
            "output_cost_per_token_batches": 7.5e-06, "input_cost_per_token_above_272k_tokens_batches": 2.5e-06},
        "openai/gpt-y": {"litellm_provider": "openai", "input_cost_per_token": 2e-06},
        "gpt-y": {"litellm_provider": "openai", "input_cost_per_token": 9e-06},
        "xai/grok-x": {"litellm_provider": "xai", "input_cost_per_token": 1e-06, "input_cost_per_token_above_128k_tokens": 2e-06},
        "dashscope/q": {"litellm_provider": "dashscope", "tiered_pricing": [
            {"range": [32000, 128000.0], "input_cost_per_token": 2e-07, "output_cost_per_token": 2e-06},
            {"range": [0, 32000], "input_cost_per_token": 1e-07, "output_cost_per_token": 1e-06}]},
        "noise": {"litellm_provider": "databricks", "input_cost_per_token": 2.9999900000000002e-06},
        "drawer": {"litellm_provider": "fal_ai", "output_cost_per_image": 0.04},
        "night": {"litellm_provider": "deepseek", "input_cost_per_token": 1e-06, "off_peak_pricing": {}}
    }"#;

    #[test]
    fn prices_are_read_digit_by_digit_with_tiers_and_classes() {
        let (imported, rejects) = import_litellm(FILE).expect("an import");
        let index = Index::of(imported.clone());
        let price = |provider, model, class, tier: usize, kind| {
            let card = index.card(provider, model, class, Timestamp::default()).expect("a card");
            (card.tiers[tier].above_input_tokens, card.tiers[tier].rates.get(kind).map(TokenPrice::pico))
        };
        use ServiceClass::{Batch, Flex, Priority, Standard};
        use TokenKind::{CacheRead, Input, Output};
        assert_eq!(price("openai", "GPT-X", Standard, 0, Input), (0, Some(2_500_000)));
        assert_eq!(price("openai", "gpt-x", Standard, 1, Input), (272_000, Some(5_000_000)));
        assert_eq!(price("openai", "gpt-x", Standard, 1, CacheRead), (272_000, Some(250_000)));
        assert_eq!(price("openai", "gpt-x", Priority, 0, Output), (0, Some(15_000_000)));
        assert_eq!(price("openai", "gpt-x", Batch, 1, Input), (272_000, Some(2_500_000)));
        assert_eq!(price("openai", "gpt-x", Batch, 1, Output), (272_000, Some(7_500_000)));
        assert_eq!(price("x-ai", "grok-x", Standard, 1, Input), (127_999, Some(2_000_000)));
        assert_eq!(price("dashscope", "q", Standard, 1, Output), (32_000, Some(2_000_000)));
        assert!(index.card("openai", "gpt-x", Flex, Timestamp::default()).expect("a card").nearest_class);
        assert_eq!(price("openai", "gpt-y", Standard, 0, Input), (0, Some(2_000_000)));
        let mut rejected: Vec<_> = rejects.iter().map(|reject| (reject.model.as_str(), reject.key.as_str())).collect();
        let mut expected =
            vec![("drawer", INPUT), ("night", "off_peak_pricing"), ("noise", INPUT), ("gpt-y", "litellm_provider")];
        rejected.sort_unstable();
        expected.sort_unstable();
        assert_eq!(rejected, expected);
        let json = serde_json::to_string(&imported).expect("one document");
        assert_eq!(serde_json::from_str::<Imported>(&json).expect("the same"), imported);
    }

    #[test]
    fn a_file_that_is_no_price_map_says_so() {
        assert!(matches!(import_litellm("[]"), Err(ImportError::NotAMap(_))));
        assert!(matches!(import_litellm("{"), Err(ImportError::NotAMap(_))));
        assert!(matches!(import_litellm(r#"{"a": 1}"#), Err(ImportError::NothingPriced { rejected: 1, .. })));
    }
}
