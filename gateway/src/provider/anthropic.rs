//! Anthropic.
//!
//! ```json
//! {"input_tokens": 3, "cache_read_input_tokens": 18, "cache_creation_input_tokens": 12304, "output_tokens": 550,
//!  "cache_creation": {"ephemeral_5m_input_tokens": 12304, "ephemeral_1h_input_tokens": 0}, "service_tier": "standard"}
//! ```
//! `input_tokens` **excludes** what a cache served and what was written to one. A stream says its input in `message_start`
//! and running totals in `message_delta`: the last value of each name holds.

use bytes::Bytes;
use http::{HeaderName, StatusCode};
use ledger::{Operation, TokenUsage};

use super::raw::{Answer, Envelope, RawUsage, error_name, word};
use super::{Adapter, Reading, service_class, take};
use crate::surface::Dialect;

pub(super) struct Anthropic;

impl Adapter for Anthropic {
    fn default_provider(&self) -> &'static str {
        "anthropic"
    }

    fn speaks(&self, dialect: Dialect, operation: Operation) -> bool {
        // The list of models lies at OpenAI's path, and a path alone does not tell the two apart.
        dialect == Dialect::Anthropic || (dialect == Dialect::OpenAi && operation == Operation::Models)
    }

    fn credential(&self, secret: &str) -> (HeaderName, String) {
        (HeaderName::from_static("x-api-key"), secret.to_owned())
    }

    fn answer<'a>(&self, _operation: Operation, envelope: &Envelope<'a>) -> Answer<'a> {
        let event = envelope.event_type().unwrap_or_default();
        let started = Envelope::inside(envelope.message.filter(|raw| raw.get().starts_with('{')));
        let usage = envelope.usage.or(started.usage);
        let raw = usage.and_then(|raw| RawUsage::parse(raw.get())).unwrap_or_default();
        let fast = raw.word("speed").filter(|&speed| speed == "fast");
        let error = envelope.error.map(error_name);
        Answer {
            id: envelope.id.and_then(word).or_else(|| started.id.and_then(word)),
            model: envelope.model.and_then(word).or_else(|| started.model.and_then(word)),
            service_class: fast.or_else(|| raw.word("service_tier")).and_then(service_class),
            usage,
            terminal: event == "message_stop" || error.is_some(),
            error,
            queued_us: None,
            only_usage: false,
        }
    }

    fn usage(&self, _operation: Operation, raw: &RawUsage) -> Reading {
        let read = raw.count("cache_read_input_tokens");
        let (write_5m, write_1h) = cache_writes(raw);
        let mut output = raw.count("output_tokens").unwrap_or(0);
        let reasoning = raw.any(&["output_tokens_details.thinking_tokens", "output_tokens_details.reasoning_tokens"]);
        let reasoning = take(&mut output, reasoning.unwrap_or(0));
        let usage = TokenUsage {
            input: raw.count("input_tokens").unwrap_or(0),
            cache_read: read.unwrap_or(0),
            cache_write_5m: write_5m,
            cache_write_1h: write_1h,
            output,
            reasoning,
            ..TokenUsage::default()
        };
        Reading {
            usage,
            input_known: raw.count("input_tokens").is_some(),
            output_known: raw.count("output_tokens").is_some(),
        }
    }

    fn usage_is_incremental(&self, _operation: Operation) -> bool {
        true
    }

    fn error_body(&self, status: StatusCode, message: &str, request_id: &str) -> Bytes {
        let kind = match status.as_u16() {
            401 => "authentication_error",
            402 => "billing_error",
            403 => "permission_error",
            404 => "not_found_error",
            413 => "request_too_large",
            429 => "rate_limit_error",
            529 => "overloaded_error",
            400..=499 => "invalid_request_error",
            504 => "timeout_error",
            _ => "api_error",
        };
        let error = serde_json::json!({"type": kind, "message": message});
        Bytes::from(serde_json::json!({"type": "error", "error": error, "request_id": request_id}).to_string())
    }
}

/// Tokens written for five minutes and for an hour. The split is part of the total, never on top of it; without a
/// split everything was written for five minutes.
fn cache_writes(raw: &RawUsage) -> (u64, u64) {
    let short = raw.count("cache_creation.ephemeral_5m_input_tokens").unwrap_or(0);
    let long = raw.count("cache_creation.ephemeral_1h_input_tokens").unwrap_or(0);
    let mut left = raw.count("cache_creation_input_tokens").unwrap_or_else(|| short.saturating_add(long));
    let long = take(&mut left, long);
    (left, long)
}
