//! One try at an upstream, as it happened. The central fact of the ledger.

use serde::{Deserialize, Serialize};

use crate::charge::Charge;
use crate::context::{Context, Label};
use crate::id::AttemptId;
use crate::time::Timestamp;
use crate::usage::{TokenUsage, UsageQuality};

/// What was asked of the model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Operation {
    /// OpenAI chat completions.
    Chat,
    /// OpenAI text completions.
    Completions,
    /// OpenAI responses.
    Responses,
    /// Embeddings of any provider.
    Embeddings,
    /// Anthropic messages.
    Messages,
    /// Counting tokens; free of charge at the providers that offer it.
    CountTokens,
    /// Gemini `generateContent` and `streamGenerateContent`.
    Generate,
    /// Listing models; free of charge.
    Models,
    /// Anything else, passed through.
    #[default]
    Other,
}

impl Operation {
    /// Every operation.
    pub const ALL: [Operation; 9] = [
        Operation::Chat,
        Operation::Completions,
        Operation::Responses,
        Operation::Embeddings,
        Operation::Messages,
        Operation::CountTokens,
        Operation::Generate,
        Operation::Models,
        Operation::Other,
    ];

    /// The name used in tables and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Operation::Chat => "chat",
            Operation::Completions => "completions",
            Operation::Responses => "responses",
            Operation::Embeddings => "embeddings",
            Operation::Messages => "messages",
            Operation::CountTokens => "count_tokens",
            Operation::Generate => "generate",
            Operation::Models => "models",
            Operation::Other => "other",
        }
    }
}

/// How an attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The upstream answered to its end and the client was given all of it.
    Completed,
    /// The client went away first.
    ClientAborted,
    /// The upstream answered with an error status.
    UpstreamError,
    /// The upstream broke off in the middle of its answer.
    UpstreamCut,
    /// The upstream could not be reached.
    UpstreamUnreachable,
    /// A time limit of ours ended it.
    TimedOut,
    /// Farthing stopped while it ran; booked at the next start.
    Crashed,
}

impl Outcome {
    /// Every outcome.
    pub const ALL: [Outcome; 7] = [
        Outcome::Completed,
        Outcome::ClientAborted,
        Outcome::UpstreamError,
        Outcome::UpstreamCut,
        Outcome::UpstreamUnreachable,
        Outcome::TimedOut,
        Outcome::Crashed,
    ];

    /// The name used in tables and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Outcome::Completed => "completed",
            Outcome::ClientAborted => "client_aborted",
            Outcome::UpstreamError => "upstream_error",
            Outcome::UpstreamCut => "upstream_cut",
            Outcome::UpstreamUnreachable => "upstream_unreachable",
            Outcome::TimedOut => "timed_out",
            Outcome::Crashed => "crashed",
        }
    }
}

/// Where the fact came from.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// Metered by our own gateway.
    #[default]
    Gateway,
    /// Read from a file: the import's kind and name, such as `azure-llm-trace:conv.csv`.
    Import(Label),
    /// Told over OpenTelemetry by the service of this name, and seen by no gateway of ours.
    Span(Label),
}

/// The class of service a provider prices apart.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServiceClass {
    /// The ordinary price.
    #[default]
    Standard,
    /// Slower and cheaper.
    Flex,
    /// Faster and dearer (`fast` is another name for it).
    Priority,
    /// Submitted through a batch API.
    Batch,
}

impl ServiceClass {
    /// Every class.
    pub const ALL: [ServiceClass; 4] =
        [ServiceClass::Standard, ServiceClass::Flex, ServiceClass::Priority, ServiceClass::Batch];

    /// The name used in tables and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            ServiceClass::Standard => "standard",
            ServiceClass::Flex => "flex",
            ServiceClass::Priority => "priority",
            ServiceClass::Batch => "batch",
        }
    }
}

/// Which model was asked where.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// What was asked.
    pub operation: Operation,
    /// The provider whose prices apply: `openai`, `anthropic`, `google`, …, or `self_hosted`.
    pub provider: Label,
    /// The upstream's name in the configuration.
    pub upstream: Label,
    /// The pool of GPUs that served it, when self-hosted. Its cost arrives by allocation.
    pub pool: Option<Label>,
    /// The deployment on that pool.
    pub deployment: Option<Label>,
    /// The model that the client named.
    pub request_model: Option<Label>,
    /// The model that answered, as the upstream named it.
    pub response_model: Option<Label>,
    /// The upstream's id of its answer, the key for joining spans and invoices.
    pub response_id: Option<Label>,
    /// The class of service that was billed.
    pub service_class: ServiceClass,
    /// Whether the answer was streamed.
    pub streamed: bool,
}

impl Route {
    /// The model to price and report by: the one that answered, else the one asked for.
    #[must_use]
    pub fn model(&self) -> Option<&Label> {
        self.response_model.as_ref().or(self.request_model.as_ref())
    }
}

/// Summary of the gaps between the chunks that carried tokens, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenGaps {
    /// Gaps seen.
    pub count: u32,
    /// Sum of all gaps.
    pub total_us: u64,
    /// The longest.
    pub max_us: u64,
}

/// When things happened. One wall-clock anchor, the rest monotonic microseconds after it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    /// Wall clock when the request's head had arrived. Attempts after the first keep the request's anchor.
    pub received_at: Timestamp,
    /// Let through by admission.
    pub admitted_us: Option<u64>,
    /// Sent to the upstream.
    pub sent_us: Option<u64>,
    /// First byte of the upstream's answer.
    pub first_byte_us: Option<u64>,
    /// First chunk that carried a token.
    pub first_token_us: Option<u64>,
    /// Last chunk that carried a token.
    pub last_token_us: Option<u64>,
    /// How long it waited in the engine's queue after it was sent, as the engine says.
    pub queued_us: Option<u64>,
    /// The end, whatever it was.
    pub finished_us: u64,
    /// Gaps between tokens.
    pub gaps: TokenGaps,
}

impl Timeline {
    /// Wall-clock time of the end.
    #[must_use]
    pub fn finished_at(&self) -> Timestamp {
        self.received_at.plus_micros(i64::try_from(self.finished_us).unwrap_or(i64::MAX))
    }
}

/// An attempt that has not ended, as far as it got.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Running {
    /// The attempt.
    pub id: AttemptId,
    /// Who caused it.
    pub context: Context,
    /// Which model was asked where.
    pub route: Route,
    /// What happened so far; `finished_us` is the moment of looking.
    pub timeline: Timeline,
    /// Tokens so far, counted from what passed: the input's estimate, the output delivered.
    pub usage: TokenUsage,
}

/// One try at an upstream on behalf of a request: what ran, for whom, and what it cost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// Unique; a second fact with the same id is a duplicate and changes nothing.
    pub id: AttemptId,
    /// Where this fact came from.
    pub source: Source,
    /// Who caused it.
    pub context: Context,
    /// Which model was asked where.
    pub route: Route,
    /// When things happened.
    pub timeline: Timeline,
    /// How it ended.
    pub outcome: Outcome,
    /// The upstream's HTTP status, if it answered.
    pub status: Option<u16>,
    /// Tokens by kind.
    pub usage: TokenUsage,
    /// How the usage is known.
    pub usage_quality: UsageQuality,
    /// What the provider charges for it. Self-hosted attempts are priced by allocation instead.
    pub charge: Charge,
}
