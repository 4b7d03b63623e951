//! The demo's pool that is scaled: replicas of one model on small GPUs, started and stopped in this process by a webhook, which is
//! how a user's own tool would do it.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::Context as _;
use axum::extract::State as Shared;
use axum::http::StatusCode;
use axum::routing::post;
use axum::{Json, Router};
use fleet::actuate::Spec as Actuator;
use fleet::engine::{EngineSpec, Limits, RunningEngine, SharedGpus, start_on};
use fleet::scale::Guards;
use gateway::{Balance, ModelRoute, RouteTarget};
use ledger::Clock;
use ledger::step::{GpuSheet, ModelShape};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use super::engines::{LOAD_BYTES_PER_S, described};
use crate::config::{
    CapacitySection, Config, ModeSection, ObjectiveSection, PoolSection, ReplicaSection, ScaleSection, UpstreamSection,
};

/// The pool, the model that it serves, who owns it, and its price.
pub const POOL: &str = "elastic";
pub const MODEL: &str = "model-d";
const OWNER: &str = "support";
const USD_PER_GPU_HOUR: &str = "0.80";
/// Replicas of the static plan, and most of all.
const REPLICAS: u32 = 4;
const SHAPE: ModelShape = ModelShape::LLAMA_3_1_8B;
const GPU: GpuSheet = GpuSheet::L4;
/// How often is decided: a demo has seconds, not hours.
const DECIDE_EVERY_MS: u64 = 500;
const POLICY: &str = "token-rate:headroom=0.2,window=2,stabilise=2";

/// The replicas, running until this is dropped.
pub struct Elastic {
    replicas: Arc<Replicas>,
    hook: SocketAddr,
    serving: JoinHandle<()>,
}

struct Replicas {
    spec: EngineSpec,
    addresses: Vec<SocketAddr>,
    clock: Arc<dyn Clock>,
    running: Mutex<Vec<Option<RunningEngine>>>,
}

#[derive(Deserialize)]
struct Told {
    replicas: u32,
}

impl Drop for Elastic {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// Starts the first replica and listens to the webhook.
///
/// # Errors
/// When no port is free.
pub async fn start(clock: Arc<dyn Clock>, seed: u64) -> anyhow::Result<Elastic> {
    let spec = EngineSpec {
        models: vec![MODEL.to_owned()],
        limits: Limits::default().with_memory(&SHAPE, &GPU, 1, 0.9),
        answer_tokens_mean: 24.0,
        failure_share: 0.0,
        seed,
        load_s: SHAPE.weight_bytes() / LOAD_BYTES_PER_S,
        ..EngineSpec::new("vllm-d", SHAPE, GPU, 1)
    };
    let mut addresses = Vec::new();
    let mut taken = Vec::new();
    for _ in 0..REPLICAS {
        // All at once, so that no two are the same; each is free again when its replica starts.
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("a port for a replica")?;
        addresses.push(listener.local_addr()?);
        taken.push(listener);
    }
    drop(taken);
    let running = Mutex::new(addresses.iter().map(|_| None).collect());
    let replicas = Arc::new(Replicas { spec, addresses, clock, running });
    replicas.scale(1).await?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("a port for the webhook")?;
    let hook = listener.local_addr()?;
    let router = Router::new().route("/scale", post(told).get(asked)).with_state(Arc::clone(&replicas));
    let serving = tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!("the demo's webhook ended: {error}");
        }
    });
    Ok(Elastic { replicas, hook, serving })
}

impl Replicas {
    /// Runs the first `wanted` replicas and stops the others. Asked again, nothing changes.
    async fn scale(&self, wanted: u32) -> anyhow::Result<u32> {
        let mut running = self.running.lock().await;
        for ((number, address), slot) in (0u32..).zip(&self.addresses).zip(running.iter_mut()) {
            if number >= wanted {
                *slot = None;
            } else if slot.is_none() {
                let spec = EngineSpec { seed: self.spec.seed.wrapping_add(number.into()), ..self.spec.clone() };
                let engine = start_on(*address, spec, SharedGpus::default(), Arc::clone(&self.clock)).await;
                *slot = Some(engine.with_context(|| format!("replica {number} of {MODEL}"))?);
            }
        }
        Ok(wanted.min(REPLICAS))
    }
}

async fn told(
    Shared(replicas): Shared<Arc<Replicas>>,
    Json(told): Json<Told>,
) -> Result<Json<Value>, (StatusCode, String)> {
    match replicas.scale(told.replicas).await {
        Ok(replicas) => Ok(Json(json!({ "replicas": replicas }))),
        Err(error) => Err((StatusCode::SERVICE_UNAVAILABLE, format!("{error:#}"))),
    }
}

async fn asked(Shared(replicas): Shared<Arc<Replicas>>) -> Json<Value> {
    let running = replicas.running.lock().await.iter().flatten().count();
    Json(json!({ "replicas": running }))
}

impl Elastic {
    /// Adds the pool, its replicas and how they are scaled to the demo's configuration.
    ///
    /// # Errors
    /// When a name is none of the configuration's own.
    pub fn configure(&self, config: &mut Config) -> anyhow::Result<()> {
        let name = |number: u32| format!("{POOL}-{number}");
        config.pool.push(PoolSection {
            name: POOL.to_owned(),
            owner: Some(OWNER.to_owned()),
            gpu: GPU.name.to_owned(),
            gpus: REPLICAS,
            usd_per_gpu_hour: USD_PER_GPU_HOUR.parse().context("the pool's rate")?,
            replicas: (0..REPLICAS)
                .map(|number| ReplicaSection { name: name(number), gpus: 1, ..ReplicaSection::default() })
                .collect(),
            ..PoolSection::default()
        });
        let mut targets = Vec::new();
        for (number, address) in (0u32..).zip(&self.replicas.addresses) {
            let upstream = format!("vllm-d-{number}");
            targets.push(RouteTarget { upstream: upstream.clone(), model: None, weight: 1 });
            let mut engine = described(&self.replicas.spec, None);
            engine.replica = Some(name(number));
            config.upstream.push(UpstreamSection {
                name: upstream,
                kind: gateway::provider::Kind::Vllm,
                base_url: format!("http://{address}"),
                api_key: None,
                provider: Some("self_hosted".to_owned()),
                pool: Some(POOL.to_owned()),
                deployment: Some(MODEL.to_owned()),
                engine: Some(engine),
            });
        }
        config.route.push(ModelRoute {
            model: MODEL.to_owned(),
            targets,
            fallbacks: Vec::new(),
            retries: 1,
            balance: Balance::LeastOutstanding,
        });
        config.scale.push(self.scale()?);
        Ok(())
    }

    fn scale(&self) -> anyhow::Result<ScaleSection> {
        let hook = format!("http://{}/scale", self.hook);
        Ok(ScaleSection {
            deployment: MODEL.to_owned(),
            pool: POOL.to_owned(),
            upstreams: Vec::new(),
            mode: ModeSection::Act,
            policy: POLICY.parse().context("the policy")?,
            floor: 1,
            ceiling: None,
            static_replicas: None,
            committed: None,
            gpus: None,
            cold_start_s: self.replicas.spec.load_s,
            objective: ObjectiveSection { ttft_ms: 1_000.0, tpot_ms: 75.0, percentile: 0.95 },
            decide_every_ms: DECIDE_EVERY_MS,
            drain_ms_max: 10_000,
            // So few and short requests are of no usual mix, and there is no ledger yet that knows them.
            capacity: Some(CapacitySection { requests_per_s: 6.0, input_tokens: 110, output_tokens: 16, batch: None }),
            // What protects a service for hours would keep a demo of seconds from giving anything back.
            guards: Guards { stabilise_s: 2.0, down_per_minute: 0.0, survivors_full: 0.0, ..Guards::default() },
            actuator: Actuator::Webhook { url: hook, token: None },
        })
    }
}
