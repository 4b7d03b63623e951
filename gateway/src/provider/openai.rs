//! OpenAI, and every server that speaks its API.
//!
//! ```json
//! {"prompt_tokens": 2006, "completion_tokens": 300, "total_tokens": 2306,
//!  "prompt_tokens_details": {"cached_tokens": 1920, "audio_tokens": 0},
//!  "completion_tokens_details": {"reasoning_tokens": 192, "audio_tokens": 0}}
//! ```
//! `prompt_tokens` **includes** cached and audio tokens, `completion_tokens` **includes** reasoning and audio. The responses
//! API says `input_tokens` and `output_tokens` and means the same. Embeddings have a prompt only.

use bytes::Bytes;
use http::header::AUTHORIZATION;
use http::{HeaderName, StatusCode};
use ledger::{Operation, TokenUsage};

use super::raw::{Answer, Envelope, RawUsage, error_name, word};
use super::{Adapter, Reading, service_class, take};
use crate::surface::Dialect;

pub(super) struct OpenAi;

impl Adapter for OpenAi {
    fn default_provider(&self) -> &'static str {
        "openai"
    }

    fn speaks(&self, dialect: Dialect, _operation: Operation) -> bool {
        dialect == Dialect::OpenAi
    }

    fn credential(&self, secret: &str) -> (HeaderName, String) {
        (AUTHORIZATION, format!("Bearer {secret}"))
    }

    fn answer<'a>(&self, operation: Operation, envelope: &Envelope<'a>) -> Answer<'a> {
        let event = envelope.event_type().unwrap_or_default();
        if operation == Operation::Responses && envelope.response.is_some() {
            return response_event(&event, &Envelope::inside(envelope.response));
        }
        let mut answer = plain_answer(envelope);
        if answer.error.is_none() && event == "error" {
            answer.error = Some(envelope.code.and_then(word).unwrap_or(event));
        }
        answer.terminal = answer.error.is_some();
        answer
    }

    fn usage(&self, operation: Operation, raw: &RawUsage) -> Reading {
        let prompt = raw.any(&["prompt_tokens", "input_tokens"]);
        let completion = raw.any(&["completion_tokens", "output_tokens"]);
        let mut usage = TokenUsage::default();
        split_input(&mut usage, prompt.unwrap_or(0), raw);
        split_output(&mut usage, prompt.unwrap_or(0), completion.unwrap_or(0), raw);
        Reading {
            usage,
            input_known: prompt.is_some(),
            output_known: completion.is_some() || operation == Operation::Embeddings,
        }
    }

    fn usage_is_incremental(&self, _operation: Operation) -> bool {
        false
    }

    fn error_body(&self, status: StatusCode, message: &str, request_id: &str) -> Bytes {
        let (kind, code) = match status.as_u16() {
            401 => ("invalid_request_error", Some("invalid_api_key")),
            403 => ("permission_error", None),
            404 => ("invalid_request_error", Some("not_found")),
            429 => ("rate_limit_error", Some("rate_limit_exceeded")),
            400..=499 => ("invalid_request_error", None),
            _ => ("server_error", None),
        };
        let error = serde_json::json!({"message": message, "type": kind, "param": null, "code": code, "request_id": request_id});
        Bytes::from(serde_json::json!({ "error": error }).to_string())
    }
}

fn plain_answer<'a>(envelope: &Envelope<'a>) -> Answer<'a> {
    let choices = envelope.choices.map(|raw| raw.get().trim_start_matches('[').trim_start());
    Answer {
        id: envelope.id.and_then(word),
        model: envelope.model.and_then(word),
        service_class: envelope.service_tier.and_then(word).as_deref().and_then(service_class),
        usage: envelope.usage,
        error: envelope.error.map(error_name),
        queued_us: None,
        terminal: false,
        only_usage: envelope.usage.is_some()
            && envelope.error.is_none()
            && choices.is_some_and(|rest| rest.starts_with(']')),
    }
}

/// An event of the responses API, which wraps the whole response in its first and last events.
fn response_event<'a>(event: &str, response: &Envelope<'a>) -> Answer<'a> {
    let terminal =
        matches!(event, "response.completed" | "response.failed" | "response.incomplete" | "response.cancelled");
    Answer { terminal, only_usage: false, ..plain_answer(response) }
}

fn detail(raw: &RawUsage, groups: [&str; 3], names: &[&str]) -> u64 {
    let paths = groups.iter().flat_map(|group| names.iter().map(move |name| format!("{group}.{name}")));
    paths.into_iter().find_map(|path| raw.count(&path)).unwrap_or(0)
}

fn split_input(usage: &mut TokenUsage, prompt: u64, raw: &RawUsage) {
    const GROUPS: [&str; 3] = ["prompt_tokens_details", "input_tokens_details", "input_token_details"];
    let mut left = prompt;
    let mut cached = take(&mut left, detail(raw, GROUPS, &["cached_tokens"]));
    let mut audio = detail(raw, GROUPS, &["audio_tokens"]);
    // Audio that a cache served is in both counts.
    let cached_audio = detail(raw, GROUPS, &["cached_tokens_details.audio_tokens"]).min(audio);
    usage.cache_read_audio = take(&mut cached, cached_audio);
    audio -= usage.cache_read_audio;
    usage.cache_read = cached;
    usage.cache_write_5m = take(&mut left, detail(raw, GROUPS, &["cache_write_tokens", "cache_creation_tokens"]));
    usage.input_audio = take(&mut left, audio);
    usage.input_image = take(&mut left, detail(raw, GROUPS, &["image_tokens"]));
    usage.input = left;
}

fn split_output(usage: &mut TokenUsage, prompt: u64, completion: u64, raw: &RawUsage) {
    const GROUPS: [&str; 3] = ["completion_tokens_details", "output_tokens_details", "output_token_details"];
    let reasoning = detail(raw, GROUPS, &["reasoning_tokens"]);
    // A compatible provider (xAI) leaves reasoning out of the completion; its total gives it away.
    let apart = prompt.saturating_add(completion).saturating_add(reasoning);
    let mut left = if reasoning > 0 && raw.count("total_tokens") == Some(apart) {
        completion.saturating_add(reasoning)
    } else {
        completion
    };
    usage.reasoning = take(&mut left, reasoning);
    usage.output_audio = take(&mut left, detail(raw, GROUPS, &["audio_tokens"]));
    usage.output_image = take(&mut left, detail(raw, GROUPS, &["image_tokens"]));
    usage.output = left;
}
