//! What is known of engines and GPUs beside the requests: which process runs what, what it counted, what it said about
//! single requests, and the work on the same GPUs that is no request. Unknown is `None`, never zero.

use serde::{Deserialize, Serialize};

use crate::allocate::colocated::MigSlice;
use crate::allocate::fit::FitError;
use crate::allocate::replica::Replica;
use crate::allocate::timeline::Limits;
use crate::attempt::Operation;
use crate::context::{Context, Label};
use crate::time::{Period, Timestamp};
use crate::usage::{TokenUsage, UsageQuality};

/// A share in millionths, 0 to 1,000,000.
pub type Millionths = u32;

/// One engine process for a while: what it runs, on whose GPUs, and the constants in force. Facts of one engine follow one
/// another; a later fact with the same [`identity`](EngineFact::identity) replaces an earlier one.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct EngineFact {
    /// Its name: the upstream that leads to it, as attempts carry it.
    pub engine: Label,
    /// The pool whose GPUs it uses.
    pub pool: Label,
    /// The replica of the capacity facts. Engines of one replica share its GPUs.
    pub replica: Label,
    /// The model it serves.
    pub model: Option<Label>,
    /// What is known of its speed and its limits.
    pub setup: EngineSetup,
    /// The adapters that it serves beside its base model.
    pub adapters: Vec<Adapter>,
    /// When it could serve; what its GPUs cost before is cold start. Unknown: it always could.
    pub ready_at: Option<Timestamp>,
    /// Whose objective keeps it running whatever the demand; its idle time is warm.
    pub warm_for: Option<Context>,
    /// When this held.
    pub period: Period,
    /// When this was observed; the latest observation of an identity wins.
    pub observed_at: Timestamp,
}

impl EngineFact {
    /// What makes two facts speak of the same engine and time: engine and start.
    #[must_use]
    pub fn identity(&self) -> (&str, Timestamp) {
        (&self.engine, self.period.start)
    }
}

/// What is known of an engine's speed and its limits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EngineSetup {
    /// The step-time model with the constants in force. `None` when the model's dimensions are unknown: then time is
    /// divided by tokens.
    pub constants: Option<Replica>,
    /// How far the fit behind the constants was off. `None` while they are the data sheet's.
    pub error: Option<FitError>,
    /// What the engine can hold.
    pub limits: Limits,
    /// The slice of each GPU that it has to itself.
    pub slice: Option<MigSlice>,
    /// How many tokens it drafts and accepts in a step, when it speculates.
    pub speculation: Option<Speculation>,
}

/// A low-rank adapter: what a request pays that names it as its model.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adapter {
    /// The name by which requests ask for it.
    pub model: Label,
    /// Bytes of its weights, read once in each step that has a request of it.
    pub bytes: u64,
    /// FLOP for one new token, `2 r sum(d_in + d_out)` over what it adapts.
    pub flop_per_token: u64,
}

/// Speculative decoding on average: every step of a request computes `1 + drafted` tokens and delivers `1 + accepted`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Speculation {
    /// Tokens drafted in one step of one request.
    pub drafted: f64,
    /// Drafted tokens that were accepted, at most `drafted`.
    pub accepted: f64,
}

/// What an engine reported at one moment. Counters count since its process started; one that fell means it restarted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineReading {
    /// The engine, as in [`EngineFact::engine`].
    pub engine: Label,
    /// Its pool.
    pub pool: Label,
    /// When it was read.
    pub at: Timestamp,
    /// Requests in the batch.
    pub running: Option<u32>,
    /// Requests that wait.
    pub waiting: Option<u32>,
    /// Part of the KV cache in use.
    pub kv_used: Option<Millionths>,
    /// Whether it sleeps, its weights out of the GPU's memory.
    pub asleep: Option<bool>,
    /// Input tokens, cached ones included.
    pub prompt_tokens: Option<u64>,
    /// Input tokens found in the prefix cache.
    pub cached_tokens: Option<u64>,
    /// Output tokens.
    pub generation_tokens: Option<u64>,
    /// Steps.
    pub steps: Option<u64>,
    /// Requests put back for lack of memory.
    pub preemptions: Option<u64>,
    /// Requests that ended, however.
    pub finished: Option<u64>,
    /// Tokens drafted by speculation.
    pub drafted_tokens: Option<u64>,
    /// Drafted tokens that were accepted.
    pub accepted_tokens: Option<u64>,
    /// Microseconds in which the engine worked, where it counts them.
    pub busy_us: Option<u64>,
    /// Tokens that fit the KV cache, as the engine's configuration says.
    pub kv_tokens: Option<u64>,
}

/// One step of an engine as it was run: who was in it is not said, how much was.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineStep {
    /// The engine.
    pub engine: Label,
    /// Data-parallel rank; every rank counts its own steps.
    pub rank: u32,
    /// The engine's number of the step; a hole means steps were lost.
    pub sequence: u64,
    /// When it began.
    pub at: Timestamp,
    /// How long it took. Steps may overlap.
    pub wall_us: u64,
    /// Requests with prefill in the step, their new tokens and the cached tokens they attended to.
    pub prefill_requests: u32,
    /// New prefill tokens of the step.
    pub prefill_tokens: u64,
    /// Tokens already cached that the prefills read.
    pub prefill_kv_tokens: u64,
    /// Requests that decoded.
    pub decode_requests: u32,
    /// Cached tokens that they read.
    pub decode_kv_tokens: u64,
}

/// A call to a model as an application or an engine told it over OpenTelemetry.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallSpan {
    /// W3C trace id, 32 hex digits.
    pub trace_id: Option<Label>,
    /// W3C id of this span, 16 hex digits.
    pub span_id: Option<Label>,
    /// The span that called.
    pub parent_span_id: Option<Label>,
    /// `service.name` of who told it.
    pub service: Option<Label>,
    /// The engine, when an engine told it.
    pub engine: Option<Label>,
    /// What was asked.
    pub operation: Operation,
    /// `gen_ai.provider.name`.
    pub provider: Option<Label>,
    /// The model that was asked for.
    pub request_model: Option<Label>,
    /// The model that answered.
    pub response_model: Option<Label>,
    /// `gen_ai.response.id`, or the engine's `gen_ai.request.id`, which is the same text.
    pub response_id: Option<Label>,
    /// From its start to its end.
    pub period: Period,
    /// Tokens by kind.
    pub usage: TokenUsage,
    /// Whether the span carried them.
    pub usage_quality: UsageQuality,
    /// Microseconds in the engine's queue.
    pub queue_us: Option<u64>,
    /// Microseconds from arrival to the first token.
    pub first_token_us: Option<u64>,
    /// Microseconds of prefill.
    pub prefill_us: Option<u64>,
    /// Microseconds of decode.
    pub decode_us: Option<u64>,
    /// Whether the call failed.
    pub failed: bool,
    /// Who caused it, as far as the span says.
    pub context: Context,
    /// When it was received.
    pub observed_at: Timestamp,
}

/// Who says that a job used GPUs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobSource {
    /// Somebody, through the API.
    #[default]
    Api,
    /// The labels of a GPU exporter.
    PodLabels,
    /// The processes that the driver lists.
    GpuProcesses,
}

impl JobSource {
    /// Every source.
    pub const ALL: [JobSource; 3] = [JobSource::Api, JobSource::PodLabels, JobSource::GpuProcesses];

    /// The name used in tables and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            JobSource::Api => "api",
            JobSource::PodLabels => "pod_labels",
            JobSource::GpuProcesses => "gpu_processes",
        }
    }
}

/// Work on a pool's GPUs that is no request: training, batch, notebooks. Grows while it runs; a later fact with the same
/// [`identity`](JobFact::identity) replaces an earlier one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobFact {
    /// Its name.
    pub job: Label,
    /// The pool.
    pub pool: Label,
    /// The replica of the capacity facts whose GPUs it used.
    pub replica: Label,
    /// Who caused it.
    pub context: Context,
    /// The part of the replica that it used at most, while it ran.
    pub share: Millionths,
    /// When it ran.
    pub period: Period,
    /// Who says so.
    pub source: JobSource,
    /// When this was observed; the latest observation of an identity wins.
    pub observed_at: Timestamp,
}

impl JobFact {
    /// What makes two facts speak of the same run: job, replica and start.
    #[must_use]
    pub fn identity(&self) -> (&str, &str, Timestamp) {
        (&self.job, &self.replica, self.period.start)
    }
}

/// One GPU, or one slice of one, at one moment. Utilisation is shown and never allocated by: it says that a kernel ran,
/// not how much was done.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GpuReading {
    /// The machine.
    pub host: Option<Label>,
    /// The GPU's UUID.
    pub uuid: Label,
    /// The device's name as the driver gives it.
    pub gpu: Option<Label>,
    /// The MIG instance, when it is one.
    pub slice: Option<Label>,
    /// The pool that it belongs to, by configuration.
    pub pool: Option<Label>,
    /// Kubernetes namespace of who holds it.
    pub namespace: Option<Label>,
    /// Kubernetes pod of who holds it.
    pub pod: Option<Label>,
    /// Container of that pod.
    pub container: Option<Label>,
    /// When it was read.
    pub at: Timestamp,
    /// Part of the time in which any engine of the GPU was active.
    pub engine_active: Option<Millionths>,
    /// Part of the time in which the tensor cores were active.
    pub tensor_active: Option<Millionths>,
    /// Part of the time in which the memory interface was active.
    pub memory_active: Option<Millionths>,
    /// `GPU_UTIL`: part of the time in which a kernel ran.
    pub utilisation: Option<Millionths>,
    /// Bytes of memory in use.
    pub memory_used_bytes: Option<u64>,
    /// Bytes of memory in all.
    pub memory_total_bytes: Option<u64>,
    /// Power, milliwatts.
    pub power_mw: Option<u64>,
    /// Energy since the driver was loaded, millijoules.
    pub energy_mj: Option<u64>,
}
