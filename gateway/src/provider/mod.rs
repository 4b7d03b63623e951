//! How each provider wants to be spoken to and how it counts. One provider, one file, all of the same shape.
//!
//! Providers disagree on which counts include which others; an [`Adapter`] undoes that and yields disjoint kinds.
//! Nothing outside these files knows whether "prompt tokens" contain the cached ones.

mod anthropic;
mod gemini;
mod openai;
mod raw;
mod splice;
mod vllm;

use std::fmt;
use std::str::FromStr;

use bytes::Bytes;
use http::header::{AUTHORIZATION, InvalidHeaderValue};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use ledger::{Operation, ServiceClass, TokenUsage};
use serde::{Deserialize, Serialize};

pub use raw::RawUsage;
pub(crate) use raw::{Answer, Envelope};
pub use splice::{Prepared, without_query_key};

use crate::surface::{Dialect, Inspected};

/// The kind of an upstream: which protocol it speaks and how it counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// OpenAI, or anything that speaks its API.
    OpenAi,
    /// Anthropic.
    Anthropic,
    /// Google's Gemini.
    Gemini,
    /// A vLLM server of our own.
    Vllm,
}

/// What an answer's usage says, in disjoint kinds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reading {
    /// The counts; zero where the provider said nothing.
    pub usage: TokenUsage,
    /// Whether the provider counted the input.
    pub input_known: bool,
    /// Whether the provider counted the output, or there can be none.
    pub output_known: bool,
}

/// What differs from provider to provider.
pub(crate) trait Adapter: Sync {
    /// Whose prices apply when the configuration does not say.
    fn default_provider(&self) -> &'static str;
    /// Whether an upstream of this kind can answer such a request.
    fn speaks(&self, dialect: Dialect, operation: Operation) -> bool;
    /// The header that carries the credential, and its value.
    fn credential(&self, secret: &str) -> (HeaderName, String);
    /// What an answer, or one event of a streamed answer, says about itself.
    fn answer<'a>(&self, operation: Operation, envelope: &Envelope<'a>) -> Answer<'a>;
    /// The provider's counts as disjoint kinds. Contradictions saturate: no kind exceeds the total it is part of.
    fn usage(&self, operation: Operation, raw: &RawUsage) -> Reading;
    /// Whether later counts of one stream add to earlier ones by name rather than replace them all.
    fn usage_is_incremental(&self, operation: Operation) -> bool;
    /// An error in the provider's own words.
    fn error_body(&self, status: StatusCode, message: &str, request_id: &str) -> Bytes;
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 4] = [Kind::OpenAi, Kind::Anthropic, Kind::Gemini, Kind::Vllm];

    /// The name used in configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Kind::OpenAi => "openai",
            Kind::Anthropic => "anthropic",
            Kind::Gemini => "gemini",
            Kind::Vllm => "vllm",
        }
    }

    /// Whose prices apply when the configuration does not say: `openai`, `anthropic`, `google` or `self_hosted`.
    #[must_use]
    pub fn default_provider(self) -> &'static str {
        self.adapter().default_provider()
    }

    /// Whether an upstream of this kind can answer such a request.
    #[must_use]
    pub fn speaks(self, dialect: Dialect, operation: Operation) -> bool {
        dialect == Dialect::Unknown || self.adapter().speaks(dialect, operation)
    }

    /// Replaces every credential of the client by ours.
    ///
    /// # Errors
    /// When the secret contains bytes that no header may carry; the client's credentials are gone all the same.
    pub fn authorize(self, headers: &mut HeaderMap, secret: &str) -> Result<(), InvalidHeaderValue> {
        remove_credentials(headers);
        let (name, value) = self.adapter().credential(secret);
        let mut value = HeaderValue::from_str(&value)?;
        value.set_sensitive(true);
        headers.insert(name, value);
        Ok(())
    }

    /// The request as this kind of upstream gets it. `model` is the name a route puts in the client's place.
    ///
    /// `body` must be the one that was inspected; every byte passes but for the model's name and the request for a
    /// usage chunk.
    #[must_use]
    pub fn prepare(self, request: &Inspected, path_and_query: &str, body: Bytes, model: Option<&str>) -> Prepared {
        splice::prepare(request, path_and_query, body, model)
    }

    /// The provider's counts as disjoint kinds.
    #[must_use]
    pub fn usage(self, operation: Operation, raw: &RawUsage) -> Reading {
        self.adapter().usage(operation, raw)
    }

    /// An error in the words of this provider's API, as JSON.
    #[must_use]
    pub fn error_body(self, status: StatusCode, message: &str, request_id: &str) -> Bytes {
        self.adapter().error_body(status, message, request_id)
    }

    pub(crate) fn adapter(self) -> &'static dyn Adapter {
        match self {
            Kind::OpenAi => &openai::OpenAi,
            Kind::Anthropic => &anthropic::Anthropic,
            Kind::Gemini => &gemini::Gemini,
            Kind::Vllm => &vllm::Vllm,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Kind {
    type Err = String;
    fn from_str(name: &str) -> Result<Kind, String> {
        Kind::ALL
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| format!("no kind of upstream is called `{name}`"))
    }
}

/// Removes whatever a client may have presented as a credential, in any provider's header.
pub fn remove_credentials(headers: &mut HeaderMap) {
    headers.remove(AUTHORIZATION);
    for name in ["x-api-key", "api-key", "x-goog-api-key"] {
        headers.remove(name);
    }
}

/// The class of service behind the words that providers use in answers. Unknown words say nothing.
fn service_class(word: &str) -> Option<ServiceClass> {
    match word.to_ascii_lowercase().as_str() {
        "default" | "standard" | "scale" | "on_demand" | "provisioned_throughput" => Some(ServiceClass::Standard),
        "flex" | "on_demand_flex" => Some(ServiceClass::Flex),
        "priority" | "fast" | "on_demand_priority" => Some(ServiceClass::Priority),
        "batch" => Some(ServiceClass::Batch),
        _ => None,
    }
}

/// Takes at most `wanted` out of `left`: the step by which a total is split into disjoint parts that never exceed it.
fn take(left: &mut u64, wanted: u64) -> u64 {
    let taken = wanted.min(*left);
    *left -= taken;
    taken
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
