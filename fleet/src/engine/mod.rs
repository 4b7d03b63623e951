//! A simulated inference engine: a pure scheduler driven by the step-time model, and real HTTP around it.
//!
//! [`scheduler`] decides what runs in each step and never looks at a clock; [`driver`] lets its steps take as long as
//! the model predicts and shares GPUs between engines; [`http`] speaks the OpenAI and Anthropic protocols and serves
//! [`metrics`] under vLLM's names. Tokens are words ([`text`]), so counters and usages can be compared exactly.

mod anthropic;
pub mod blocks;
pub mod driver;
pub mod http;
pub mod metrics;
mod openai;
mod protocol;
pub mod scheduler;
pub mod text;

use std::time::Duration;

use ledger::step::{Efficiencies, GpuSheet, ModelShape};

pub use driver::SharedGpus;
pub use http::{RunningEngine, start, start_on};
pub use metrics::FinishReason;
pub use scheduler::{Event, Finished, Rejection, Scheduler, Submission};

use crate::FleetError;

/// Everything that decides how an engine behaves.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineSpec {
    /// Names under which it serves its model; the first is the label of its metrics.
    pub models: Vec<String>,
    /// The model's dimensions.
    pub shape: ModelShape,
    /// The kind of GPU.
    pub gpu: GpuSheet,
    /// GPUs that work as one replica.
    pub gpus: u32,
    /// How much of the data sheet it reaches.
    pub efficiencies: Efficiencies,
    /// The scheduler's settings.
    pub limits: Limits,
    /// Mean length of an answer that nothing cuts, in tokens.
    pub answer_tokens_mean: f64,
    /// Share of requests that fail with "overloaded" before any token, 0 to 1.
    pub failure_share: f64,
    /// What answers, their lengths and failures are drawn from.
    pub seed: u64,
    /// How many times faster than the model predicts steps run; 1 is real time.
    pub speed: f64,
    /// Seconds from its start until its model is loaded and anybody is answered.
    pub load_s: f64,
}

/// The settings of a scheduler, under vLLM's names where it has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Tokens that one step may process.
    pub max_num_batched_tokens: u32,
    /// Requests that may run at once.
    pub max_num_seqs: usize,
    /// Tokens that prompt and answer of one request may have.
    pub max_model_len: u32,
    /// Tokens in a KV block.
    pub block_size: u32,
    /// KV blocks in memory.
    pub kv_blocks: u32,
    /// Whether computed prefixes are found again.
    pub prefix_caching: bool,
    /// Requests that may wait; more are turned away.
    pub waiting_max: usize,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            max_num_batched_tokens: 2048,
            max_num_seqs: 256,
            max_model_len: 16_384,
            block_size: 16,
            kv_blocks: 4096,
            prefix_caching: true,
            waiting_max: 4096,
        }
    }
}

impl Limits {
    /// These limits with the KV blocks that fit beside the weights when the engine may use `memory_share` of its GPUs.
    #[must_use]
    pub fn with_memory(self, shape: &ModelShape, gpu: &GpuSheet, gpus: u32, memory_share: f64) -> Limits {
        let free = gpu.memory_bytes * f64::from(gpus) * memory_share - shape.weight_bytes();
        let blocks = (free / (shape.kv_bytes_per_token() * f64::from(self.block_size))).max(0.0);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "float to integer casts saturate, and the value is not negative"
        )]
        let kv_blocks = blocks as u32;
        Limits { kv_blocks, ..self }
    }
}

impl EngineSpec {
    /// An engine for this model on these GPUs with the usual settings and 90 % of their memory.
    #[must_use]
    pub fn new(model: &str, shape: ModelShape, gpu: GpuSheet, gpus: u32) -> EngineSpec {
        EngineSpec {
            models: vec![model.to_owned()],
            shape,
            gpu,
            gpus,
            efficiencies: Efficiencies::default(),
            limits: Limits::default().with_memory(&shape, &gpu, gpus, 0.9),
            answer_tokens_mean: 64.0,
            failure_share: 0.0,
            seed: 0,
            speed: 1.0,
            load_s: 0.0,
        }
    }

    fn check(&self) -> Result<(), FleetError> {
        let problem = match self {
            _ if self.models.is_empty() => "it serves no model",
            _ if self.gpus == 0 => "it has no GPU",
            _ if self.limits.block_size == 0 => "its KV blocks hold no token",
            _ if self.limits.kv_blocks == 0 => "its model leaves no memory for the KV cache",
            _ if self.limits.max_num_batched_tokens == 0 || self.limits.max_num_seqs == 0 => "its batch holds nothing",
            _ if !(self.speed.is_finite() && self.speed > 0.0) => "its speed is not a positive number",
            _ if Duration::try_from_secs_f64(self.load_s).is_err() => "the time in which it loads is no time",
            _ => return Ok(()),
        };
        Err(FleetError::Spec(problem))
    }
}
