//! Google's Gemini API.
//!
//! ```json
//! {"promptTokenCount": 257665, "cachedContentTokenCount": 240000, "toolUsePromptTokenCount": 12,
//!  "candidatesTokenCount": 1042, "thoughtsTokenCount": 800, "totalTokenCount": 259519,
//!  "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 257665}], "trafficType": "ON_DEMAND"}
//! ```
//! `promptTokenCount` **includes** cached content; tool results and thoughts are counted **apart** from prompt and
//! candidates. Every event of a stream carries the counts so far: the last one holds. A stream has no closing event.

use bytes::Bytes;
use http::{HeaderName, StatusCode};
use ledger::{Operation, TokenUsage};

use super::openai::OpenAi;
use super::raw::{Answer, Envelope, RawUsage, error_name, word};
use super::{Adapter, Reading, service_class, take};
use crate::surface::Dialect;

pub(super) struct Gemini;

impl Adapter for Gemini {
    fn default_provider(&self) -> &'static str {
        "google"
    }

    fn speaks(&self, dialect: Dialect, _operation: Operation) -> bool {
        dialect == Dialect::Gemini
    }

    fn credential(&self, secret: &str) -> (HeaderName, String) {
        (HeaderName::from_static("x-goog-api-key"), secret.to_owned())
    }

    fn answer<'a>(&self, operation: Operation, envelope: &Envelope<'a>) -> Answer<'a> {
        if compatible(operation) {
            return OpenAi.answer(operation, envelope);
        }
        let usage = envelope.usage_metadata;
        // Every event carries usage; it is read for its words only where there may be some.
        let worded = usage.filter(|raw| raw.get().contains("trafficType") || raw.get().contains("serviceTier"));
        let raw = worded.and_then(|raw| RawUsage::parse(raw.get())).unwrap_or_default();
        Answer {
            id: envelope.response_id.and_then(word),
            model: envelope.model_version.and_then(word),
            service_class: raw.word("serviceTier").or_else(|| raw.word("trafficType")).and_then(service_class),
            usage,
            error: envelope.error.map(error_name),
            queued_us: None,
            terminal: envelope.error.is_some(),
            only_usage: false,
        }
    }

    fn usage(&self, operation: Operation, raw: &RawUsage) -> Reading {
        if compatible(operation) || raw.count("prompt_tokens").is_some() {
            return OpenAi.usage(operation, raw);
        }
        let prompt = raw.count("promptTokenCount");
        let tools = raw.count("toolUsePromptTokenCount").unwrap_or(0);
        let thoughts = raw.count("thoughtsTokenCount").unwrap_or(0);
        let beside = prompt.unwrap_or(0).saturating_add(tools).saturating_add(thoughts);
        // Left out when there were none; the total tells.
        let candidates =
            raw.count("candidatesTokenCount").or_else(|| raw.count("totalTokenCount")?.checked_sub(beside));
        let mut usage = TokenUsage { reasoning: thoughts, ..TokenUsage::default() };
        split_input(&mut usage, prompt.unwrap_or(0), raw);
        usage.input = usage.input.saturating_add(tools);
        let mut left = candidates.unwrap_or(0);
        usage.output_audio = take(&mut left, raw.count("candidatesTokensDetails.AUDIO").unwrap_or(0));
        usage.output_image = take(&mut left, raw.count("candidatesTokensDetails.IMAGE").unwrap_or(0));
        usage.output = left;
        Reading {
            usage,
            input_known: prompt.is_some(),
            output_known: candidates.is_some() || operation == Operation::Embeddings,
        }
    }

    fn usage_is_incremental(&self, _operation: Operation) -> bool {
        false
    }

    fn error_body(&self, status: StatusCode, message: &str, request_id: &str) -> Bytes {
        let name = match status.as_u16() {
            401 => "UNAUTHENTICATED",
            403 => "PERMISSION_DENIED",
            404 => "NOT_FOUND",
            408 | 504 => "DEADLINE_EXCEEDED",
            409 => "ABORTED",
            429 => "RESOURCE_EXHAUSTED",
            400..=499 => "INVALID_ARGUMENT",
            502 | 503 => "UNAVAILABLE",
            _ => "INTERNAL",
        };
        let details =
            serde_json::json!([{"@type": "type.googleapis.com/google.rpc.RequestInfo", "requestId": request_id}]);
        let error =
            serde_json::json!({"code": status.as_u16(), "message": message, "status": name, "details": details});
        Bytes::from(serde_json::json!({ "error": error }).to_string())
    }
}

/// Google serves OpenAI's protocol too, below a path of its own.
fn compatible(operation: Operation) -> bool {
    matches!(operation, Operation::Chat | Operation::Completions)
}

/// Video and documents are priced as text; audio and images are not.
fn split_input(usage: &mut TokenUsage, prompt: u64, raw: &RawUsage) {
    let mut left = prompt;
    let mut cached = take(&mut left, raw.count("cachedContentTokenCount").unwrap_or(0));
    usage.cache_read_audio = take(&mut cached, raw.count("cacheTokensDetails.AUDIO").unwrap_or(0));
    usage.cache_read = cached;
    let cached_images = raw.count("cacheTokensDetails.IMAGE").unwrap_or(0);
    let of = |modality: &str, cached: u64| raw.count(modality).unwrap_or(0).saturating_sub(cached);
    usage.input_audio = take(&mut left, of("promptTokensDetails.AUDIO", usage.cache_read_audio));
    usage.input_image = take(&mut left, of("promptTokensDetails.IMAGE", cached_images));
    usage.input = left;
}
