//! The attribute names of the vocabularies that are met in the wild, by what they mean; the first that is there wins.
//!
//! OpenTelemetry GenAI in its present and former spellings, vLLM's engine spans, OpenInference (`llm.token_count.*`) and
//! OpenLLMetry (`llm.usage.*`, `traceloop.*`). A name that is not here is not read: no prompt, answer or tool argument is.

use std::collections::HashMap;
use std::time::Duration;

use ledger::Label;
use ledger::context::LABEL_BYTES_MAX;
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;

/// Which operation the span is.
pub(super) const OPERATION: &[&str] = &["gen_ai.operation.name", "llm.request.type"];
/// OpenInference's kind of a span, and what OpenLLMetry calls the spans around its calls.
pub(super) const OPENINFERENCE_KIND: &[&str] = &["openinference.span.kind"];
pub(super) const TRACELOOP_KIND: &[&str] = &["traceloop.span.kind"];

pub(super) const PROVIDER: &[&str] = &["gen_ai.provider.name", "gen_ai.system", "llm.provider", "llm.system"];
pub(super) const REQUEST_MODEL: &[&str] = &["gen_ai.request.model", "llm.model_name", "embedding.model_name"];
pub(super) const RESPONSE_MODEL: &[&str] = &["gen_ai.response.model"];
pub(super) const RESPONSE_ID: &[&str] = &["gen_ai.response.id"];
/// vLLM's own name of the request: the response's id, but for a number that it appends to some.
pub(super) const ENGINE_REQUEST_ID: &[&str] = &["gen_ai.request.id"];
pub(super) const ERROR: &[&str] = &["error.type"];

pub(super) const INPUT: &[&str] =
    &["gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens", "llm.token_count.prompt", "llm.usage.prompt_tokens"];
pub(super) const OUTPUT: &[&str] = &[
    "gen_ai.usage.output_tokens",
    "gen_ai.usage.completion_tokens",
    "llm.token_count.completion",
    "llm.usage.completion_tokens",
];
pub(super) const TOTAL: &[&str] = &["gen_ai.usage.total_tokens", "llm.usage.total_tokens", "llm.token_count.total"];
pub(super) const CACHE_READ: &[&str] = &[
    "gen_ai.usage.cache_read.input_tokens",
    "gen_ai.usage.cache_read_input_tokens",
    "llm.token_count.prompt_details.cache_read",
];
pub(super) const CACHE_WRITE: &[&str] = &[
    "gen_ai.usage.cache_creation.input_tokens",
    "gen_ai.usage.cache_write.input_tokens",
    "gen_ai.usage.cache_creation_input_tokens",
    "gen_ai.usage.cache_write_input_tokens",
    "llm.token_count.prompt_details.cache_write",
];
pub(super) const REASONING: &[&str] = &[
    "gen_ai.usage.reasoning.output_tokens",
    "gen_ai.usage.reasoning_tokens",
    "llm.usage.reasoning_tokens",
    "llm.token_count.completion_details.reasoning",
];
pub(super) const AUDIO_INPUT: &[&str] = &["gen_ai.usage.audio.input_tokens", "llm.token_count.prompt_details.audio"];
pub(super) const AUDIO_CACHE_READ: &[&str] = &["gen_ai.usage.audio.cache_read.input_tokens"];
pub(super) const IMAGE_INPUT: &[&str] = &["gen_ai.usage.image.input_tokens"];
pub(super) const AUDIO_OUTPUT: &[&str] =
    &["gen_ai.usage.audio.output_tokens", "llm.token_count.completion_details.audio"];
pub(super) const IMAGE_OUTPUT: &[&str] = &["gen_ai.usage.image.output_tokens"];

/// Seconds, as all of these.
pub(super) const QUEUE: &[&str] = &["gen_ai.latency.time_in_queue"];
pub(super) const FIRST_TOKEN: &[&str] = &["gen_ai.latency.time_to_first_token", "gen_ai.response.time_to_first_chunk"];
pub(super) const PREFILL: &[&str] = &["gen_ai.latency.time_in_model_prefill"];
pub(super) const DECODE: &[&str] = &["gen_ai.latency.time_in_model_decode"];

pub(super) const SESSION: &[&str] =
    &["farthing.session", "gen_ai.conversation.id", "session.id", "traceloop.association.properties.session_id"];
pub(super) const CUSTOMER: &[&str] = &[
    "farthing.customer",
    "enduser.id",
    "enduser.pseudo.id",
    "user.id",
    "gen_ai.user",
    "llm.user",
    "traceloop.association.properties.user_id",
];
pub(super) const CONSUMER: &[&str] = &["farthing.consumer"];
pub(super) const APPLICATION: &[&str] = &["farthing.application"];
pub(super) const TEAM: &[&str] = &["farthing.team"];
pub(super) const COST_CENTRE: &[&str] = &["farthing.cost_centre"];
pub(super) const FEATURE: &[&str] = &["farthing.feature"];
pub(super) const TASK: &[&str] = &["farthing.task"];
pub(super) const ENVIRONMENT: &[&str] =
    &["farthing.environment", "deployment.environment.name", "deployment.environment"];
/// What becomes a tag of the same meaning.
pub(super) const TAGS: &[(&str, &[&str])] = &[
    ("agent", &["gen_ai.agent.name", "gen_ai.agent.id", "agent.name"]),
    ("workflow", &["gen_ai.workflow.name", "traceloop.workflow.name"]),
];
/// Attributes of this prefix are tags by the rest of their name.
pub(super) const TAG_PREFIX: &str = "farthing.tag.";

pub(super) const SERVICE: &[&str] = &["service.name"];
/// The upstream's name in our configuration, set on an engine's resource.
pub(super) const ENGINE: &[&str] = &["farthing.engine"];

/// The attributes of one span, or of a resource, by name.
pub(super) struct Attributes<'a>(HashMap<&'a str, &'a Value>);

impl<'a> Attributes<'a> {
    pub fn new(pairs: &'a [KeyValue]) -> Attributes<'a> {
        let pairs = pairs.iter().filter_map(|pair| Some((pair.key.as_str(), pair.value.as_ref()?.value.as_ref()?)));
        Attributes(pairs.collect())
    }

    pub fn has(&self, names: &[&str]) -> bool {
        names.iter().any(|name| self.0.contains_key(name))
    }

    /// The first of the names with a text in it, as it was sent.
    pub fn word(&self, names: &[&str]) -> Option<&'a str> {
        names.iter().find_map(|name| match self.0.get(name) {
            Some(Value::StringValue(text)) if !text.trim().is_empty() => Some(text.trim()),
            _ => None,
        })
    }

    /// The first of the names that makes a label. Numbers are names too, where somebody numbers their users.
    pub fn label(&self, names: &[&str]) -> Option<Label> {
        names.iter().find_map(|name| match self.0.get(name)? {
            Value::StringValue(text) => label(text),
            Value::IntValue(number) => label(&number.to_string()),
            _ => None,
        })
    }

    /// The first of the names with a whole number that is not negative, also when it was written as text or as a float.
    pub fn count(&self, names: &[&str]) -> Option<u64> {
        names.iter().find_map(|name| match self.0.get(name)? {
            Value::IntValue(number) => u64::try_from(*number).ok(),
            Value::StringValue(text) => text.trim().parse().ok(),
            Value::DoubleValue(number) => whole(*number),
            _ => None,
        })
    }

    /// The first of the names with a time in seconds, in microseconds.
    pub fn micros(&self, names: &[&str]) -> Option<u64> {
        let seconds = names.iter().find_map(|name| match self.0.get(name)? {
            Value::DoubleValue(seconds) => Some(*seconds),
            Value::IntValue(seconds) => i32::try_from(*seconds).ok().map(f64::from),
            Value::StringValue(text) => text.trim().parse().ok(),
            _ => None,
        })?;
        u64::try_from(Duration::try_from_secs_f64(seconds).ok()?.as_micros()).ok()
    }

    /// Names that start with `prefix`, without it, and their labels.
    pub fn starting_with(&self, prefix: &'static str) -> impl Iterator<Item = (Label, Label)> + '_ {
        self.0.keys().filter_map(move |name| Some((label(name.strip_prefix(prefix)?)?, self.label(&[name])?)))
    }
}

fn whole(number: f64) -> Option<u64> {
    (number >= 0.0 && number.fract() == 0.0).then(|| format!("{number:.0}").parse().ok()).flatten()
}

/// A label of at most [`LABEL_BYTES_MAX`] bytes, cut at a character; what would move a terminal's cursor becomes a space.
pub(super) fn label(text: &str) -> Option<Label> {
    let text = text.trim();
    let text = text.get(..text.floor_char_boundary(LABEL_BYTES_MAX)).unwrap_or_default();
    (!text.is_empty()).then(|| text.replace(char::is_control, " ").into())
}

/// The name by which prices are kept, for what OpenTelemetry calls a provider. Names without another one stay.
pub(super) fn provider(name: &str) -> Option<Label> {
    let lower = name.to_ascii_lowercase();
    let known = match lower.as_str() {
        "gcp.gemini" | "gcp.gen_ai" | "gcp.vertex_ai" | "vertex_ai" | "vertexai" | "gemini" => "google",
        "azure.ai.openai" | "azure.ai.inference" | "az.ai.openai" | "az.ai.inference" => "azure",
        "aws.bedrock" | "bedrock" | "aws_bedrock" => "aws",
        "mistral_ai" | "mistralai" => "mistral",
        "x_ai" | "xai" => "x-ai",
        "together_ai" => "together",
        "vllm" | "sglang" | "tgi" => "self_hosted",
        other => other,
    };
    label(known)
}
