//! What inference engines and GPUs say of themselves, read into the ledger's words.
//!
//! One file per kind of engine, all of the same shape: a pure function of a parsed scrape to the fields of an
//! [`EngineReading`] and the names that were expected and not there. [`scrape`] fetches over HTTP, [`dcgm`] and [`nvml`]
//! read GPUs. Unknown is never zero: a value that is absent, negative, not a number or stale is `None`.

pub mod dcgm;
pub mod llama_cpp;
pub mod nvml;
pub mod scrape;
pub mod sglang;
pub mod tensorrt_llm;
pub mod tgi;
pub mod triton;
mod values;
pub mod vllm;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use ledger::{EngineReading, GpuReading, Label, Tier};
use serde::{Deserialize, Serialize};

use crate::prometheus::Scrape;

pub use nvml::{GpuProcess, Nvml};
pub use scrape::{Limits, ScrapeCause, ScrapeError, Scraper};

/// What runs behind a metrics address, which decides the names that are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum EngineKind {
    /// vLLM 0.19 to 0.32.
    #[serde(rename = "vllm")]
    Vllm,
    /// SGLang, started with `--enable-metrics`.
    #[serde(rename = "sglang")]
    Sglang,
    /// Hugging Face text-generation-inference.
    #[serde(rename = "tgi")]
    Tgi,
    /// `trtllm-serve`.
    #[serde(rename = "tensorrt-llm")]
    TensorRtLlm,
    /// Triton with the TensorRT-LLM backend.
    #[serde(rename = "triton")]
    Triton,
    /// `llama-server`, started with `--metrics`.
    #[serde(rename = "llama.cpp")]
    LlamaCpp,
}

impl EngineKind {
    /// Every kind.
    pub const ALL: [EngineKind; 6] = [
        EngineKind::Vllm,
        EngineKind::Sglang,
        EngineKind::Tgi,
        EngineKind::TensorRtLlm,
        EngineKind::Triton,
        EngineKind::LlamaCpp,
    ];

    /// The name used in configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            EngineKind::Vllm => "vllm",
            EngineKind::Sglang => "sglang",
            EngineKind::Tgi => "tgi",
            EngineKind::TensorRtLlm => "tensorrt-llm",
            EngineKind::Triton => "triton",
            EngineKind::LlamaCpp => "llama.cpp",
        }
    }

    /// How the names of its metrics begin.
    #[must_use]
    pub const fn prefix(self) -> &'static str {
        match self {
            EngineKind::Vllm => "vllm:",
            EngineKind::Sglang => "sglang:",
            EngineKind::Tgi => "tgi_",
            EngineKind::TensorRtLlm => "trtllm_",
            EngineKind::Triton => "nv_trt_llm_",
            EngineKind::LlamaCpp => "llamacpp:",
        }
    }

    /// How to make it serve its metrics, for people whose scrape shows none.
    #[must_use]
    pub const fn hint(self) -> &'static str {
        match self {
            EngineKind::Vllm => "vLLM serves them at /metrics unless it was started with --disable-log-stats",
            EngineKind::Sglang => "start SGLang with --enable-metrics",
            EngineKind::Tgi => "TGI serves them at /metrics of its own port",
            EngineKind::TensorRtLlm => {
                "trtllm-serve serves them at /prometheus/metrics when its configuration has return_perf_metrics: true"
            }
            EngineKind::Triton => "Triton serves them at port 8002, and the TensorRT-LLM backend must be loaded",
            EngineKind::LlamaCpp => "start llama-server with --metrics",
        }
    }

    /// The kind whose names the scrape has.
    #[must_use]
    pub fn detect(scrape: &Scrape) -> Option<EngineKind> {
        let speaks = |kind: &EngineKind| scrape.samples.iter().any(|sample| sample.name.starts_with(kind.prefix()));
        EngineKind::ALL.into_iter().find(speaks)
    }
}

impl fmt::Display for EngineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for EngineKind {
    type Err = String;

    fn from_str(text: &str) -> Result<EngineKind, String> {
        EngineKind::ALL.into_iter().find(|kind| kind.name() == text).ok_or_else(|| {
            let names = EngineKind::ALL.map(EngineKind::name).join(", ");
            format!("`{text}` is no engine that can be read; write one of {names}")
        })
    }
}

/// A secret that is sent to a metrics address. Its text shows nowhere.
#[derive(Clone, PartialEq, Eq)]
pub struct Bearer(Arc<str>);

impl Bearer {
    /// Wraps the token, without the word `Bearer`.
    #[must_use]
    pub fn new(token: &str) -> Bearer {
        Bearer(token.into())
    }

    fn token(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Bearer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Bearer(…)")
    }
}

/// An engine to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its name, as attempts carry it.
    pub engine: Label,
    /// Its pool.
    pub pool: Label,
    /// What runs there.
    pub kind: EngineKind,
    /// Where its metrics are, such as `http://127.0.0.1:8000/metrics`.
    pub url: String,
    /// The token it wants.
    pub bearer: Option<Bearer>,
}

/// A GPU exporter to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuTarget {
    /// Its name in messages.
    pub name: Label,
    /// The pool its GPUs belong to.
    pub pool: Option<Label>,
    /// Where its metrics are, such as `http://127.0.0.1:9400/metrics`.
    pub url: String,
    /// The token it wants.
    pub bearer: Option<Bearer>,
}

/// What a scrape of an engine said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Found {
    /// The fields that are known. Engine, pool and time are filled in by who scraped.
    pub reading: EngineReading,
    /// The names that were expected, and what their absence costs.
    pub missing: Vec<Missing>,
}

/// What a scrape of a GPU exporter said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FoundGpus {
    /// One reading per GPU, slice and holder.
    pub readings: Vec<GpuReading>,
    /// The names that were expected, and what their absence costs.
    pub missing: Vec<Missing>,
}

/// A name that was expected and has no usable value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Missing {
    /// The name.
    pub name: &'static str,
    /// What is lost without it.
    pub loss: Loss,
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}`: {}", self.name, self.loss.text())
    }
}

/// What is lost without a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Loss {
    /// Tokens, in or out.
    Counts,
    /// Steps, or the time they took.
    Steps,
    /// The engine's own running, waiting and KV series.
    Series,
    /// The size of the KV cache.
    Capacity,
    /// Requests put back.
    Preemptions,
    /// How active a GPU was.
    Activity,
    /// Memory, power and energy.
    Upkeep,
}

impl Loss {
    /// The tier of attribution that suffers. `None`: no amount depends on it.
    #[must_use]
    pub const fn tier(self) -> Option<Tier> {
        match self {
            Loss::Series | Loss::Capacity | Loss::Preemptions => Some(Tier::B),
            Loss::Counts | Loss::Steps => Some(Tier::C),
            Loss::Activity | Loss::Upkeep => None,
        }
    }

    /// What a person should know.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Loss::Counts => "tier C has no counts, and traffic that bypasses the gateway cannot be told from none",
            Loss::Steps => "tier C cannot fit step times from counters",
            Loss::Series => "tier B is not checked against the engine's own batch, so its quality stays unknown",
            Loss::Capacity => "tier B does not know when the KV cache overflows unless `kv_tokens` is configured",
            Loss::Preemptions => "tier B cannot confirm preemptions, whose recomputation is waste",
            Loss::Activity => "a job counts as using all of each GPU that it holds",
            Loss::Upkeep => "the GPU's memory or power is shown as unknown; no amount depends on it",
        }
    }
}

/// Reads the scrape of an engine. Pure; engine, pool and time stay empty.
#[must_use]
pub fn read(kind: EngineKind, scrape: &Scrape) -> Found {
    match kind {
        EngineKind::Vllm => vllm::read(scrape),
        EngineKind::Sglang => sglang::read(scrape),
        EngineKind::Tgi => tgi::read(scrape),
        EngineKind::TensorRtLlm => tensorrt_llm::read(scrape),
        EngineKind::Triton => triton::read(scrape),
        EngineKind::LlamaCpp => llama_cpp::read(scrape),
    }
}

/// Whether the engine restarted between two readings: some counter fell. What it counted in between is unknown.
#[must_use]
pub fn restarted(earlier: &EngineReading, later: &EngineReading) -> bool {
    let counters = |reading: &EngineReading| {
        [
            reading.prompt_tokens,
            reading.cached_tokens,
            reading.generation_tokens,
            reading.steps,
            reading.preemptions,
            reading.finished,
            reading.drafted_tokens,
            reading.accepted_tokens,
            reading.busy_us,
        ]
    };
    counters(earlier)
        .into_iter()
        .zip(counters(later))
        .any(|pair| matches!(pair, (Some(before), Some(after)) if after < before))
}
