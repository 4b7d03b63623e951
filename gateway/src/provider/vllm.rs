//! A vLLM server of our own.
//!
//! ```json
//! {"prompt_tokens": 12, "total_tokens": 40, "completion_tokens": 28, "prompt_tokens_details": {"cached_tokens": 8}}
//! ```
//! It counts as OpenAI does (`prompt_tokens` **includes** cached ones, whose details are null unless it is started with
//! `--enable-prompt-tokens-details`) and serves Anthropic's messages too, where it counts as Anthropic does.

use bytes::Bytes;
use http::{HeaderName, StatusCode};
use ledger::Operation;

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
        spoken(operation).answer(operation, envelope)
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

/// Whose protocol an operation of vLLM's follows.
fn spoken(operation: Operation) -> &'static dyn Adapter {
    if operation == Operation::Messages { &Anthropic } else { &OpenAi }
}
