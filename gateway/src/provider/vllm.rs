//! A vLLM server of our own.
//!
//! ```json
//! {"prompt_tokens": 12, "total_tokens": 40, "completion_tokens": 28, "prompt_tokens_details": {"cached_tokens": 8}}
//! ```
//! It counts as OpenAI does (`prompt_tokens` **includes** cached ones, whose details are null unless it is started with
//! `--enable-prompt-tokens-details`) and serves Anthropic's messages too, where it counts as Anthropic does. With
//! `--enable-per-request-metrics` a whole answer, or the usage chunk of a stream, says what the engine did:
//! `"metrics": {"queue_time_ms": 1.5, "time_to_first_token_ms": 3.5, …}`.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, StatusCode};
use ledger::Operation;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::anthropic::Anthropic;
use super::openai::OpenAi;
use super::raw::{Answer, Envelope, RawUsage};
use super::{Adapter, Reading};
use crate::surface::Dialect;

pub(super) struct Vllm;

impl Adapter for Vllm {
    fn default_provider(&self) -> &'static str {
        "self_hosted"
    }

    fn speaks(&self, dialect: Dialect, operation: Operation) -> bool {
        let messages = matches!(operation, Operation::Messages | Operation::CountTokens);
        dialect == Dialect::OpenAi || (dialect == Dialect::Anthropic && messages)
    }

    fn credential(&self, secret: &str) -> (HeaderName, String) {
        OpenAi.credential(secret)
    }

    fn answer<'a>(&self, operation: Operation, envelope: &Envelope<'a>) -> Answer<'a> {
        let mut answer = spoken(operation).answer(operation, envelope);
        answer.queued_us = match envelope.metrics {
            Some(metrics) => queued_us(metrics),
            // The responses API wraps the response; only its last event has gone through the engine.
            None if answer.terminal => Envelope::inside(envelope.response).metrics.and_then(queued_us),
            None => None,
        };
        answer
    }

    fn usage(&self, operation: Operation, raw: &RawUsage) -> Reading {
        spoken(operation).usage(operation, raw)
    }

    fn usage_is_incremental(&self, operation: Operation) -> bool {
        spoken(operation).usage_is_incremental(operation)
    }

    fn error_body(&self, status: StatusCode, message: &str, request_id: &str) -> Bytes {
        OpenAi.error_body(status, message, request_id)
    }
}

/// Microseconds of `queue_time_ms`, from arrival in the engine's queue to the first step that the request was in.
fn queued_us(metrics: &RawValue) -> Option<u64> {
    #[derive(Deserialize)]
    struct Metrics {
        queue_time_ms: Option<f64>,
    }
    let metrics: Metrics = serde_json::from_str(metrics.get()).ok()?;
    let queued = Duration::try_from_secs_f64(metrics.queue_time_ms? / 1_000.0).ok()?;
    u64::try_from(queued.as_micros()).ok()
}

/// Whose protocol an operation of vLLM's follows.
fn spoken(operation: Operation) -> &'static dyn Adapter {
    if operation == Operation::Messages { &Anthropic } else { &OpenAi }
}
