//! Counts tokens where the provider does not: the model's own tokenizer where it is public, an estimate elsewhere.
//! Whatever comes from here is marked as estimated.

use std::fmt;

use ledger::Operation;
use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use tiktoken_rs::CoreBPE;

use super::events::Delivered;
use crate::provider::Kind;

/// Most text that is tokenized, so that a huge prompt costs milliseconds; the rest is extrapolated.
const TOKENIZED_BYTES_MAX: usize = 64 * 1024;

/// English text in the common vocabularies has about this many bytes a token.
const BYTES_PER_TOKEN: u64 = 4;

/// What a chat message costs beside its text: its role and separators.
const TOKENS_PER_MESSAGE: u64 = 3;

/// Tokens of a text in the model's vocabulary, or an estimate where that is not public.
#[must_use]
pub fn text(model: Option<&str>, text: &str) -> u64 {
    let beginning = text.get(..text.floor_char_boundary(TOKENIZED_BYTES_MAX)).unwrap_or_default();
    let Some(tokenizer) = model.and_then(tokenizer) else { return size(text).div_ceil(BYTES_PER_TOKEN) };
    let tokens = u64::try_from(tokenizer.count_ordinary(beginning)).unwrap_or(u64::MAX);
    extrapolated(tokens, size(beginning), size(text))
}

/// Tokens of a request's text: messages, prompts, instructions, tools. Pictures and sound are not counted.
///
/// `None` when there is nothing to count: another operation, not JSON, or no text.
#[must_use]
pub fn input(operation: Operation, model: Option<&str>, body: &[u8]) -> Option<u64> {
    let generates = !matches!(operation, Operation::CountTokens | Operation::Models | Operation::Other);
    let mut gathered = Gathered::default();
    // What was gathered before a fault still counts.
    let whole = generates
        .then(|| Walk { out: &mut gathered, text: false }.deserialize(&mut serde_json::Deserializer::from_slice(body)));
    whole?.ok().or((gathered.bytes > 0).then_some(()))?;
    let kept = size(&gathered.text);
    let counted = extrapolated(text(model, &gathered.text), kept, gathered.bytes);
    let messages = gathered.messages.saturating_mul(TOKENS_PER_MESSAGE);
    let tokens = counted.saturating_add(gathered.tokens).saturating_add(messages);
    (tokens > 0).then_some(tokens)
}

/// Tokens that reached the client.
pub(super) fn delivered(kind: Kind, streamed: bool, model: Option<&str>, delivered: &Delivered) -> u64 {
    if streamed && kind == Kind::Vllm {
        // Its vocabulary is unknown here, but it sends an event per token.
        return delivered.deltas;
    }
    let known = model.and_then(tokenizer).is_some();
    let counted = extrapolated(text(model, &delivered.text), size(&delivered.text), delivered.bytes);
    // No event carries less than a token.
    if known || !streamed { counted } else { counted.max(delivered.deltas) }
}

/// The same while the answer passes, without a tokenizer: an event is a token at least.
pub(super) fn passed(kind: Kind, delivered: &Delivered) -> u64 {
    if kind == Kind::Vllm { delivered.deltas } else { delivered.deltas.max(delivered.bytes.div_ceil(BYTES_PER_TOKEN)) }
}

fn tokenizer(model: &str) -> Option<&'static CoreBPE> {
    let name = model.rsplit('/').next().unwrap_or(model);
    tiktoken_rs::bpe_for_model(name).ok()
}

fn extrapolated(tokens: u64, counted_bytes: u64, bytes: u64) -> u64 {
    if counted_bytes == 0 {
        return bytes.div_ceil(BYTES_PER_TOKEN);
    }
    let scaled = (u128::from(tokens) * u128::from(bytes)).div_ceil(u128::from(counted_bytes));
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

fn size(text: &str) -> u64 {
    u64::try_from(text.len()).unwrap_or(u64::MAX)
}

/// The text of a request, as far as it is needed.
#[derive(Default)]
struct Gathered {
    text: String,
    bytes: u64,
    /// Prompts may also come as token numbers.
    tokens: u64,
    messages: u64,
}

impl Gathered {
    fn add(&mut self, text: &str) {
        self.bytes = self.bytes.saturating_add(size(text));
        let room = TOKENIZED_BYTES_MAX.saturating_sub(self.text.len());
        self.text.push_str(text.get(..text.floor_char_boundary(room)).unwrap_or_default());
    }
}

/// Walks a JSON value; `text` says whether a bare string here is part of the prompt.
struct Walk<'a> {
    out: &'a mut Gathered,
    text: bool,
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();
    fn deserialize<D: serde::Deserializer<'de>>(self, source: D) -> Result<(), D::Error> {
        source.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a request")
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        if self.text {
            self.out.add(text);
        }
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        self.out.tokens += u64::from(self.text);
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        while items.next_element_seed(Walk { out: &mut *self.out, text: self.text })?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<(), A::Error> {
        while let Some(key) = members.next_key::<std::borrow::Cow<'de, str>>()? {
            match key.as_ref() {
                "tools" | "functions" => self.out.add(members.next_value::<&RawValue>()?.get()),
                "image_url" | "input_audio" | "file" | "source" | "inlineData" | "inline_data" | "metadata" => {
                    members.next_value::<IgnoredAny>()?;
                }
                name => {
                    self.out.messages += u64::from(name == "role");
                    let text = matches!(
                        name,
                        "content"
                            | "text"
                            | "input"
                            | "prompt"
                            | "suffix"
                            | "system"
                            | "instructions"
                            | "arguments"
                            | "thinking"
                            | "output"
                    );
                    members.next_value_seed(Walk { out: &mut *self.out, text })?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_vocabularies_are_used_and_others_estimated() {
        // "hello world" is two tokens in every vocabulary of OpenAI's.
        for model in ["gpt-4o", "gpt-4-0613", "openai/gpt-4o-mini-2024-07-18", "ft:gpt-4o:org::1"] {
            assert_eq!(text(Some(model), "hello world"), 2, "{model}");
        }
        assert_eq!(text(Some("claude-sonnet-4-5"), "hello world"), 3);
        assert_eq!(text(None, ""), 0);
    }

    #[test]
    fn long_text_is_extrapolated() {
        let long = "hello world ".repeat(20_000);
        let tokens = text(Some("gpt-4o"), &long);
        assert!((39_000..=61_000).contains(&tokens), "{tokens}");
    }

    #[test]
    fn the_text_of_every_protocol_is_found_and_pictures_are_not() {
        let cases: [(Operation, &str, Option<u64>); 9] = [
            (Operation::Chat, r#"{"model":"m","messages":[{"role":"user","content":"12345678"}]}"#, Some(5)),
            (
                Operation::Chat,
                r#"{"messages":[{"role":"user","content":[{"type":"text","text":"12345678"},{"type":"image_url","image_url":{"url":"data:0123456789"}}]}]}"#,
                Some(5),
            ),
            (Operation::Completions, r#"{"prompt":["1234","5678"],"max_tokens":100}"#, Some(2)),
            (Operation::Completions, r#"{"prompt":[1,2,3]}"#, Some(3)),
            (Operation::Responses, r#"{"input":"1234","instructions":"5678"}"#, Some(2)),
            (Operation::Messages, r#"{"system":"1234","messages":[{"role":"user","content":"5678"}]}"#, Some(5)),
            (Operation::Generate, r#"{"contents":[{"parts":[{"text":"12345678"}]}]}"#, Some(2)),
            (Operation::Embeddings, r#"{"input":[[1,2],[3]]}"#, Some(3)),
            (Operation::Models, "", None),
        ];
        for (operation, body, tokens) in cases {
            assert_eq!(input(operation, None, body.as_bytes()), tokens, "{body}");
        }
        assert_eq!(input(Operation::Chat, None, b"\xff"), None);
        assert_eq!(
            input(Operation::Chat, None, br#"{"messages":[{"content":"12345678"}"#),
            Some(2),
            "a cut body counts as far as it goes"
        );
        assert_eq!(input(Operation::Chat, None, "[".repeat(10_000).as_bytes()), None, "deep nesting is refused");
    }
}
