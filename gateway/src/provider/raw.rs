//! What providers write, before anybody says what it means.

use std::collections::BTreeMap;

use ledger::ServiceClass;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

/// Longest usage object that is read; honest ones have a few hundred bytes.
const USAGE_BYTES_MAX: usize = 64 * 1024;

/// Deepest nesting of counts that is read.
const USAGE_DEPTH_MAX: usize = 4;

/// The counts and words of one usage object by their dotted names, such as `prompt_tokens_details.cached_tokens`.
///
/// A list of `{modality, tokenCount}`, Gemini's way, is read as `promptTokensDetails.AUDIO` and so on. What is not a
/// whole, non-negative number is left out, so a count that makes no sense is missing rather than wrong.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RawUsage {
    counts: BTreeMap<String, u64>,
    words: BTreeMap<String, String>,
}

impl RawUsage {
    /// Reads a usage object from JSON. Null, other types and what is not JSON give `None`.
    #[must_use]
    pub fn parse(json: &str) -> Option<RawUsage> {
        if json.len() > USAGE_BYTES_MAX {
            return None;
        }
        let value: Value = serde_json::from_str(json).ok()?;
        let mut usage = RawUsage::default();
        usage.collect("", value.as_object().map(|_| &value)?, 0);
        Some(usage)
    }

    /// A count by its dotted name.
    #[must_use]
    pub fn count(&self, name: &str) -> Option<u64> {
        self.counts.get(name).copied()
    }

    /// The first of several names that has a count.
    #[must_use]
    pub fn any(&self, names: &[&str]) -> Option<u64> {
        names.iter().find_map(|name| self.count(name))
    }

    /// A word by its dotted name.
    #[must_use]
    pub fn word(&self, name: &str) -> Option<&str> {
        self.words.get(name).map(String::as_str)
    }

    /// Takes over what `later` says and keeps what it does not mention. Providers send running totals, so the
    /// last value of a name wins and nothing is added up.
    pub fn update(&mut self, later: RawUsage) {
        self.counts.extend(later.counts);
        self.words.extend(later.words);
    }

    fn collect(&mut self, name: &str, value: &Value, depth: usize) {
        match value {
            Value::Number(number) => {
                if let Some(count) = number.as_u64().or_else(|| whole(number.as_f64()?)) {
                    self.counts.insert(name.to_owned(), count);
                }
            }
            Value::String(word) => {
                self.words.insert(name.to_owned(), word.clone());
            }
            Value::Object(members) if depth < USAGE_DEPTH_MAX => {
                for (key, member) in members {
                    let path = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
                    self.collect(&path, member, depth + 1);
                }
            }
            Value::Array(items) => items.iter().for_each(|item| self.collect_modality(name, item)),
            _ => {}
        }
    }

    fn collect_modality(&mut self, name: &str, item: &Value) {
        let modality = item.get("modality").and_then(Value::as_str);
        let tokens = item.get("tokenCount").and_then(Value::as_u64);
        if let (Some(modality), Some(tokens)) = (modality, tokens) {
            let count = self.counts.entry(format!("{name}.{modality}")).or_default();
            *count = count.saturating_add(tokens);
        }
    }
}

/// A float that is a whole number, as some servers write counts.
fn whole(number: f64) -> Option<u64> {
    (number >= 0.0 && number.fract() == 0.0).then(|| format!("{number:.0}").parse().ok()).flatten()
}

/// The members of an answer, or of one event of it, that any provider uses to describe it. The rest is skipped.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Envelope<'a> {
    #[serde(borrow, rename = "type")]
    pub event: Option<&'a RawValue>,
    #[serde(borrow)]
    pub id: Option<&'a RawValue>,
    #[serde(borrow)]
    pub model: Option<&'a RawValue>,
    #[serde(borrow)]
    pub service_tier: Option<&'a RawValue>,
    #[serde(borrow)]
    pub usage: Option<&'a RawValue>,
    #[serde(borrow)]
    pub choices: Option<&'a RawValue>,
    #[serde(borrow)]
    pub error: Option<&'a RawValue>,
    #[serde(borrow)]
    pub code: Option<&'a RawValue>,
    #[serde(borrow)]
    pub message: Option<&'a RawValue>,
    #[serde(borrow)]
    pub status: Option<&'a RawValue>,
    #[serde(borrow)]
    pub response: Option<&'a RawValue>,
    #[serde(borrow)]
    pub metrics: Option<&'a RawValue>,
    #[serde(borrow, rename = "responseId")]
    pub response_id: Option<&'a RawValue>,
    #[serde(borrow, rename = "modelVersion")]
    pub model_version: Option<&'a RawValue>,
    #[serde(borrow, rename = "usageMetadata")]
    pub usage_metadata: Option<&'a RawValue>,
}

impl<'a> Envelope<'a> {
    /// Reads one JSON object.
    pub fn parse(json: &'a [u8]) -> Result<Envelope<'a>, serde_json::Error> {
        serde_json::from_slice(json)
    }

    /// The envelope inside a member, or an empty one.
    pub fn inside(member: Option<&'a RawValue>) -> Envelope<'a> {
        member.and_then(|raw| serde_json::from_str(raw.get()).ok()).unwrap_or_default()
    }

    /// Whether this is the receipt of an answer that is still to be made.
    pub fn is_pending(&self) -> bool {
        self.status.is_some_and(|status| matches!(status.get(), "\"queued\"" | "\"in_progress\""))
    }

    /// The event's type, if it names one.
    pub fn event_type(&self) -> Option<String> {
        self.event.and_then(word)
    }
}

/// What an answer, or one event of it, says about itself.
#[derive(Debug, Default)]
pub(crate) struct Answer<'a> {
    /// The upstream's id of the answer.
    pub id: Option<String>,
    /// The model that answered.
    pub model: Option<String>,
    /// The class of service that served it.
    pub service_class: Option<ServiceClass>,
    /// The usage object, still unread.
    pub usage: Option<&'a RawValue>,
    /// The code or type of an error.
    pub error: Option<String>,
    /// Microseconds that the request waited in the engine's queue.
    pub queued_us: Option<u64>,
    /// Whether this is the stream's last event.
    pub terminal: bool,
    /// Whether the event carries nothing but usage: OpenAI's extra chunk.
    pub only_usage: bool,
}

/// A string of a bounded length; what is longer or empty is no name.
pub(crate) fn word(raw: &RawValue) -> Option<String> {
    let text: String = serde_json::from_str(raw.get()).ok()?;
    (!text.is_empty()).then(|| text.get(..text.floor_char_boundary(256)).unwrap_or_default().to_owned())
}

/// The name of an error: its code, status or type, never its message, which may quote a prompt.
pub(crate) fn error_name(raw: &RawValue) -> String {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Named<'a> {
        #[serde(borrow)]
        code: Option<&'a RawValue>,
        #[serde(borrow)]
        status: Option<&'a RawValue>,
        #[serde(borrow, rename = "type")]
        kind: Option<&'a RawValue>,
    }
    let named: Named<'_> = serde_json::from_str(raw.get()).unwrap_or_default();
    let number = |raw: &RawValue| serde_json::from_str::<u64>(raw.get()).ok().map(|code| code.to_string());
    let words = [named.kind, named.status, named.code];
    let name = words.into_iter().flatten().find_map(word).or_else(|| named.code.and_then(number));
    name.unwrap_or_else(|| "error".to_owned())
}
