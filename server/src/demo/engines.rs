//! The demo's engines: model-a and model-b share a pool of A100s, the fine-tune model-c has an H200 of its own, and two
//! hosted providers stand in for public APIs, so that real list prices apply to some of the traffic.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use fleet::engine::{EngineSpec, Limits, RunningEngine, SharedGpus};
use fleet::prometheus::{self, Scrape};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use ledger::step::{GpuSheet, ModelShape};
use ledger::{Clock, Context};
use serde::Serialize;

use crate::config::EngineSection;

/// Longest scrape that is read.
const SCRAPE_BYTES_MAX: usize = 4 * 1024 * 1024;

/// How fast weights are read into a GPU's memory, bytes a second: what a good local disk gives.
pub const LOAD_BYTES_PER_S: f64 = 8e9;
/// How long an engine may take until it answers, and how often it is asked.
const READY_WITHIN: Duration = Duration::from_secs(60);
const ASK_EVERY: Duration = Duration::from_millis(50);

/// A pool of GPUs and its price.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pool {
    /// Its name in the configuration.
    pub name: &'static str,
    /// The team that owns it.
    pub owner: &'static str,
    /// The kind of GPU.
    pub gpu: &'static str,
    /// How many.
    pub gpus: u32,
    /// The price of one for an hour in USD.
    pub usd_per_gpu_hour: &'static str,
    /// The models it serves.
    pub deployments: &'static [&'static str],
    /// The peak that it is kept for, in GPUs.
    pub peak_gpus: Option<f64>,
}

/// The demo's pools, at round prices in the range that clouds ask for such GPUs on demand.
pub const POOLS: [Pool; 2] = [
    Pool {
        name: "shared",
        owner: "platform",
        gpu: GpuSheet::A100.name,
        gpus: 2,
        usd_per_gpu_hour: "2.50",
        deployments: &["model-a", "model-b"],
        peak_gpus: Some(1.5),
    },
    Pool {
        name: "dedicated",
        owner: "research",
        gpu: GpuSheet::H200.name,
        gpus: 1,
        usd_per_gpu_hour: "4.50",
        deployments: &["model-c"],
        peak_gpus: None,
    },
];

/// One engine as the gateway is to see it.
#[derive(Debug, Clone)]
pub struct Upstream {
    /// Its name in the configuration.
    pub name: &'static str,
    /// The kind of upstream: `vllm`, `openai` or `anthropic`.
    pub kind: &'static str,
    /// Where it listens, without a path.
    pub base_url: String,
    /// Whose prices apply.
    pub provider: &'static str,
    /// The pool that serves it, when self-hosted.
    pub pool: Option<&'static str>,
    /// The deployment on that pool.
    pub deployment: Option<&'static str>,
    /// The models to route to it.
    pub models: &'static [&'static str],
    /// What a user would say of the engine, when self-hosted.
    pub engine: Option<EngineSection>,
}

/// How the engines are to behave.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// What answers and failures are drawn from.
    pub seed: u64,
    /// How many times faster than real GPUs they work.
    pub speed: f64,
    /// Share of requests that fail before any token, 0 to 1.
    pub failure_share: f64,
}

impl Default for Options {
    fn default() -> Options {
        Options { seed: 1, speed: 1.0, failure_share: 0.03 }
    }
}

/// What an engine says it did, read from its `/metrics`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EngineTotals {
    /// The engine.
    pub upstream: &'static str,
    /// Prompt tokens, cached ones included.
    pub prompt_tokens: u64,
    /// Tokens generated, those of aborted requests included.
    pub generation_tokens: u64,
    /// Prompt tokens found in the prefix cache.
    pub prefix_cache_hits: u64,
    /// Requests answered to their end.
    pub requests_finished: u64,
    /// Requests whose client went away.
    pub requests_aborted: u64,
    /// Requests put back for lack of memory.
    pub preemptions: u64,
    /// Requests in the batch.
    pub running: u64,
    /// Requests in the queue.
    pub waiting: u64,
}

/// The engines, running until this is dropped.
pub struct Engines {
    running: Vec<(Upstream, RunningEngine)>,
    client: Client<HttpConnector, Full<Bytes>>,
}

/// What distinguishes one engine of the demo from another.
struct Plan {
    name: &'static str,
    kind: &'static str,
    provider: &'static str,
    pool: Option<&'static str>,
    models: &'static [&'static str],
    shape: ModelShape,
    gpu: GpuSheet,
    gpus: u32,
    /// Share of the GPUs' memory that it may use.
    memory_share: f64,
    answer_tokens_mean: f64,
    gpus_shared_with: SharedGpus,
    /// The team whose objective keeps it running.
    kept_warm_for: Option<&'static str>,
}

/// Starts all engines on free ports of 127.0.0.1.
///
/// # Errors
/// When no port is free.
pub async fn start(clock: Arc<dyn Clock>, options: Options) -> anyhow::Result<Engines> {
    let mut running = Vec::new();
    for (number, plan) in (0u64..).zip(plans()) {
        let spec = EngineSpec {
            models: plan.models.iter().map(|&model| model.to_owned()).collect(),
            limits: Limits::default().with_memory(&plan.shape, &plan.gpu, plan.gpus, plan.memory_share),
            answer_tokens_mean: plan.answer_tokens_mean,
            failure_share: options.failure_share,
            seed: options.seed.wrapping_mul(1000).wrapping_add(number),
            speed: options.speed,
            // What others host is there already.
            load_s: plan.pool.map_or(0.0, |_| plan.shape.weight_bytes() / LOAD_BYTES_PER_S / options.speed),
            ..EngineSpec::new(plan.name, plan.shape, plan.gpu, plan.gpus)
        };
        let described = plan.pool.map(|_| described(&spec, plan.kept_warm_for));
        let engine = fleet::engine::start(spec, plan.gpus_shared_with, clock.clone())
            .await
            .with_context(|| format!("starting the simulated engine {}", plan.name))?;
        let upstream = Upstream {
            name: plan.name,
            kind: plan.kind,
            base_url: engine.base_url(),
            provider: plan.provider,
            pool: plan.pool,
            deployment: plan.pool.and(plan.models.first().copied()),
            models: plan.models,
            engine: described,
        };
        running.push((upstream, engine));
    }
    Ok(Engines { running, client: Client::builder(TokioExecutor::new()).build_http() })
}

/// What the configuration says of an engine: its model's dimensions and its limits, but not how much of the GPU it reaches,
/// which nobody knows beforehand.
pub fn described(spec: &EngineSpec, kept_warm_for: Option<&str>) -> EngineSection {
    let limits = &spec.limits;
    EngineSection {
        model: Some(spec.shape.into()),
        kv_tokens: Some(u64::from(limits.kv_blocks) * u64::from(limits.block_size)),
        block_tokens: Some(limits.block_size),
        max_num_batched_tokens: Some(limits.max_num_batched_tokens),
        kept_warm_for: kept_warm_for.map(|team| Context { team: Some(team.into()), ..Context::default() }),
        ..EngineSection::default()
    }
}

impl Engines {
    /// The engines as upstreams of the gateway.
    pub fn upstreams(&self) -> Vec<Upstream> {
        self.running.iter().map(|(upstream, _)| upstream.clone()).collect()
    }

    /// Where the engine of this name listens.
    pub fn base_url(&self, name: &str) -> Option<String> {
        self.running.iter().find(|(upstream, _)| upstream.name == name).map(|(upstream, _)| upstream.base_url.clone())
    }

    /// Waits until every engine has loaded its model and answers.
    ///
    /// # Errors
    /// When one does not.
    pub async fn ready(&self) -> anyhow::Result<()> {
        let all = async {
            while self.totals().await.is_err() {
                tokio::time::sleep(ASK_EVERY).await;
            }
        };
        tokio::time::timeout(READY_WITHIN, all).await.context("the demo's engines did not get ready")
    }

    /// Reads every engine's `/metrics` over HTTP, as a collector would.
    ///
    /// # Errors
    /// When an engine does not answer or leaves a metric out: unknown is not zero.
    pub async fn totals(&self) -> anyhow::Result<Vec<EngineTotals>> {
        let mut totals = Vec::new();
        for (upstream, _) in &self.running {
            let scrape = self.scrape(&upstream.base_url).await;
            let read = scrape.and_then(|scrape| read_totals(upstream.name, &scrape));
            totals.push(read.with_context(|| format!("reading the metrics of {}", upstream.name))?);
        }
        Ok(totals)
    }

    async fn scrape(&self, base_url: &str) -> anyhow::Result<Scrape> {
        let response = self.client.get(format!("{base_url}/metrics").parse()?).await?;
        if !response.status().is_success() {
            bail!("it answered {}", response.status());
        }
        let body = Limited::new(response.into_body(), SCRAPE_BYTES_MAX).collect().await;
        let bytes = body.map_err(|error| anyhow::anyhow!(error))?.to_bytes();
        Ok(prometheus::parse(&String::from_utf8_lossy(&bytes)))
    }
}

fn plans() -> [Plan; 5] {
    let [shared, dedicated] = POOLS;
    let shared_gpus = SharedGpus::default();
    let self_hosted = Plan {
        name: "vllm-a",
        kind: "vllm",
        provider: "self_hosted",
        pool: Some(shared.name),
        models: &["model-a"],
        shape: ModelShape::LLAMA_3_1_8B,
        gpu: GpuSheet::A100,
        gpus: shared.gpus,
        memory_share: 0.45,
        answer_tokens_mean: 48.0,
        gpus_shared_with: shared_gpus.clone(),
        kept_warm_for: None,
    };
    let hosted = Plan {
        name: "openai",
        kind: "openai",
        provider: "openai",
        pool: None,
        models: &["gpt-4o", "gpt-4o-mini"],
        shape: ModelShape::LLAMA_3_1_8B,
        gpu: GpuSheet::H100,
        gpus: 1,
        memory_share: 0.9,
        answer_tokens_mean: 64.0,
        gpus_shared_with: SharedGpus::default(),
        kept_warm_for: None,
    };
    [
        Plan {
            name: "vllm-b",
            models: &["model-b"],
            shape: ModelShape::QWEN_2_5_7B,
            gpus_shared_with: shared_gpus,
            ..self_hosted
        },
        Plan {
            name: "vllm-c",
            pool: Some(dedicated.name),
            models: &["model-c"],
            gpu: GpuSheet::H200,
            gpus: dedicated.gpus,
            memory_share: 0.9,
            gpus_shared_with: SharedGpus::default(),
            kept_warm_for: Some(dedicated.owner),
            ..self_hosted
        },
        Plan {
            name: "anthropic",
            kind: "anthropic",
            provider: "anthropic",
            models: &["claude-sonnet-4-5"],
            answer_tokens_mean: 80.0,
            gpus_shared_with: SharedGpus::default(),
            ..hosted
        },
        self_hosted,
        hosted,
    ]
}

fn read_totals(upstream: &'static str, scrape: &Scrape) -> anyhow::Result<EngineTotals> {
    let count = |name: &str, labels: &[(&str, &str)]| {
        let value = scrape.value(name, labels).with_context(|| format!("`{name}` is missing"))?;
        whole(value).with_context(|| format!("`{name}` is {value}, which is no count"))
    };
    let ended = |reason: &str| count("vllm:request_success_total", &[("finished_reason", reason)]);
    Ok(EngineTotals {
        upstream,
        prompt_tokens: count("vllm:prompt_tokens_total", &[])?,
        generation_tokens: count("vllm:generation_tokens_total", &[])?,
        prefix_cache_hits: count("vllm:prefix_cache_hits_total", &[])?,
        requests_finished: ended("stop")? + ended("length")?,
        requests_aborted: ended("abort")?,
        preemptions: count("vllm:num_preemptions_total", &[])?,
        running: count("vllm:num_requests_running", &[])?,
        waiting: count("vllm:num_requests_waiting", &[])?,
    })
}

/// A count that Prometheus wrote as a float, if it is one.
fn whole(value: f64) -> Option<u64> {
    const EXACT_MAX: f64 = 9_007_199_254_740_992.0;
    if !(0.0..=EXACT_MAX).contains(&value) || value.fract() != 0.0 {
        return None;
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked above to be a whole number")]
    let count = value as u64;
    Some(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ledger::GpuHourRate;

    #[test]
    fn the_pools_rates_are_read() {
        let cost = |pool: Pool| pool.usd_per_gpu_hour.parse::<GpuHourRate>().unwrap().over(pool.gpus, 3_600_000_000);
        assert_eq!(POOLS.map(|pool| cost(pool).to_string()), ["5.00", "4.50"]);
    }

    #[test]
    fn every_deployment_of_a_pool_has_an_engine() {
        let plans = plans();
        for pool in POOLS {
            let mut served: Vec<&str> = plans
                .iter()
                .filter(|plan| plan.pool == Some(pool.name))
                .flat_map(|plan| plan.models)
                .copied()
                .collect();
            served.sort_unstable();
            assert_eq!(served, pool.deployments);
        }
    }

    #[test]
    fn counts_are_whole_numbers() {
        let cases = [(0.0, Some(0)), (12.0, Some(12)), (0.5, None), (-1.0, None), (f64::NAN, None), (1e300, None)];
        for (value, count) in cases {
            assert_eq!(whole(value), count, "{value}");
        }
        assert!(read_totals("x", &Scrape::default()).is_err(), "missing metrics are not zero");
    }
}
