//! The part of the configuration that speaks of GPUs, engines, and how both are watched.

use std::net::SocketAddr;
use std::path::PathBuf;

use fleet::telemetry::EngineKind;
use gateway::provider::Kind;
use ledger::allocate::policy::{FixedRule, HeadroomRule, Method, Policy, SharingRule, WasteRule};
use ledger::allocate::shape::Model;
use ledger::gpu::GpuSheet;
use ledger::step::Efficiencies;
use ledger::{Context, GpuHourRate, PurchaseOption};
use serde::Deserialize;
use serde::de::{Deserializer, Error};

use super::sections::{Config, UpstreamSection};

/// `[[pool]]`
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolSection {
    /// Its name in upstreams and tables.
    pub name: String,
    /// The team that pays for what nobody used.
    pub owner: Option<String>,
    /// The GPU's name as data sheets or a `[[gpu]]` write it.
    pub gpu: String,
    /// How many.
    pub gpus: u32,
    /// The price of one for an hour.
    pub usd_per_gpu_hour: GpuHourRate,
    /// How they were bought.
    #[serde(default)]
    pub purchase: PurchaseOption,
    /// How busy time is divided.
    #[serde(default, deserialize_with = "method")]
    pub method: Method,
    /// Who pays for headroom.
    #[serde(default, deserialize_with = "headroom")]
    pub headroom: HeadroomRule,
    /// Who pays for work that was thrown away.
    #[serde(default, deserialize_with = "waste")]
    pub waste: WasteRule,
    /// How engines on the same GPUs share them.
    #[serde(default, deserialize_with = "sharing")]
    pub sharing: SharingRule,
    /// Among whom the fixed part of a step is divided.
    #[serde(default, deserialize_with = "fixed")]
    pub fixed: FixedRule,
    /// The peak that the pool is kept for, in GPUs.
    pub peak_gpus: Option<f64>,
    /// Its replicas; one with all GPUs when none is named.
    #[serde(default)]
    pub replicas: Vec<ReplicaSection>,
}

impl PoolSection {
    /// The replicas that it starts with: those named, else `NAME-0` with all GPUs.
    #[must_use]
    pub fn all_replicas(&self) -> Vec<ReplicaSection> {
        match self.replicas.as_slice() {
            [] => {
                vec![ReplicaSection { name: format!("{}-0", self.name), gpus: self.gpus, ..ReplicaSection::default() }]
            }
            named => named.to_vec(),
        }
    }

    /// All rules of the pool.
    #[must_use]
    pub fn policy(&self) -> Policy {
        Policy {
            method: self.method,
            headroom: self.headroom,
            waste: self.waste,
            sharing: self.sharing,
            fixed: self.fixed,
        }
    }
}

/// One entry of a pool's `replicas`: GPUs that work as one.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplicaSection {
    /// Its name in engines and tables.
    pub name: String,
    /// How many GPUs of the pool it has.
    pub gpus: u32,
    /// Machines whose GPUs these are, as exporters name them; to know whose GPU a job holds.
    #[serde(default)]
    pub hosts: Vec<String>,
    /// UUIDs of its GPUs, for the same end.
    #[serde(default)]
    pub uuids: Vec<String>,
}

/// `[[gpu]]`: a card without a built-in data sheet.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GpuSection {
    /// Its name in pools.
    pub name: String,
    /// Dense bf16 TFLOP/s.
    pub bf16_tflops: f64,
    /// Memory bandwidth, GB/s.
    pub gb_per_s: f64,
    /// Memory, GB.
    pub memory_gb: f64,
}

/// `engine` of an `[[upstream]]`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EngineSection {
    /// The model's Hugging Face `config.json`, beside the configuration.
    pub model_config: Option<PathBuf>,
    /// The model's dimensions, for a program that has them and no file.
    #[serde(skip)]
    pub model: Option<Model>,
    /// The replica whose GPUs it uses; the pool's only one when absent.
    pub replica: Option<String>,
    /// Where its metrics are, or `none`; `base_url/metrics` when absent.
    pub metrics: Option<String>,
    /// What it runs, which decides how its telemetry is read.
    pub runs: Option<EngineKind>,
    /// Its MIG slice of each GPU, such as `3g.40gb`.
    pub slice: Option<String>,
    /// Tokens that fit its KV cache.
    pub kv_tokens: Option<u64>,
    /// Tokens of one cache block.
    pub block_tokens: Option<u32>,
    /// New tokens that one step takes at most.
    pub max_num_batched_tokens: Option<u32>,
    /// Whose objective keeps it running without demand.
    pub kept_warm_for: Option<Context>,
    /// Where it publishes its steps, a ZeroMQ address.
    pub forward_pass: Option<String>,
    /// Constants that are known, so that none are fitted.
    pub efficiencies: Option<EfficienciesSection>,
    /// Adapters that it serves beside its base model.
    pub adapters: Vec<AdapterSection>,
}

/// One entry of an engine's `adapters`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterSection {
    /// The name by which requests ask for it.
    pub model: String,
    /// Bytes of its weights.
    pub bytes: u64,
    /// FLOP for one new token.
    pub flop_per_token: u64,
}

/// `efficiencies` of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EfficienciesSection {
    /// Share of the data sheet's FLOP/s that it reaches.
    pub compute: f64,
    /// Share of the data sheet's bandwidth that it reaches.
    pub bandwidth: f64,
    /// Microseconds of a step that are neither.
    pub overhead_us: f64,
}

impl EfficienciesSection {
    /// As the step model has them.
    #[must_use]
    pub fn efficiencies(&self) -> Efficiencies {
        Efficiencies {
            compute: nine_digits(self.compute),
            bandwidth: nine_digits(self.bandwidth),
            overhead_s: nine_digits(self.overhead_us * 1e-6),
        }
    }
}

impl UpstreamSection {
    /// The replica of `pool` whose GPUs its engine uses.
    #[must_use]
    pub fn replica(&self, pool: &PoolSection) -> String {
        let said = self.engine.as_ref().and_then(|engine| engine.replica.clone());
        said.unwrap_or_else(|| pool.all_replicas().swap_remove(0).name)
    }

    /// What it runs on a pool of our own; `None` where neither kind nor engine says.
    #[must_use]
    pub fn runs(&self) -> Option<EngineKind> {
        let said = self.engine.as_ref().and_then(|engine| engine.runs);
        said.or((self.kind == Kind::Vllm).then_some(EngineKind::Vllm))
    }

    /// Where its engine's metrics are; `None` where they are turned off or nothing says what it runs.
    #[must_use]
    pub fn metrics_url(&self) -> Option<String> {
        self.pool.as_ref()?;
        let path = match self.runs()? {
            EngineKind::TensorRtLlm => "prometheus/metrics",
            _ => "metrics",
        };
        match self.engine.as_ref().and_then(|engine| engine.metrics.as_deref()) {
            Some("none") => None,
            Some(url) => Some(url.to_owned()),
            None => Some(format!("{}/{path}", self.base_url.trim_end_matches('/'))),
        }
    }
}

/// `[telemetry]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TelemetrySection {
    /// Milliseconds between readings of an engine or a GPU.
    pub scrape_every_ms: u64,
    /// dcgm-exporters.
    pub gpu_exporters: Vec<ExporterSection>,
    /// Whether this machine's own GPUs are read, where it has any.
    pub nvml: bool,
    /// The pool of this machine's own GPUs.
    pub nvml_pool: Option<String>,
    /// Who holds a GPU and is an engine. Once one is named, everybody else who holds a GPU is a job.
    pub engines: Vec<HolderSection>,
    /// Who holds a GPU and is a job.
    pub jobs: Vec<JobSection>,
    /// Whether spans are taken at `/v1/traces` of the admin listener.
    pub otlp: bool,
    /// Where spans are taken over gRPC.
    pub otlp_grpc: Option<SocketAddr>,
}

impl Default for TelemetrySection {
    fn default() -> Self {
        TelemetrySection {
            scrape_every_ms: 5_000,
            gpu_exporters: Vec::new(),
            nvml: true,
            nvml_pool: None,
            engines: Vec::new(),
            jobs: Vec::new(),
            otlp: true,
            otlp_grpc: None,
        }
    }
}

/// One entry of `telemetry.gpu_exporters`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExporterSection {
    /// Where its metrics are.
    pub url: String,
    /// The pool of its GPUs.
    pub pool: Option<String>,
}

/// One entry of `telemetry.engines`: a holder of GPUs. In each text `*` stands for anything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HolderSection {
    /// Its Kubernetes namespace.
    pub namespace: Option<String>,
    /// Its Kubernetes pod.
    pub pod: Option<String>,
    /// The program of a process.
    pub process: Option<String>,
}

/// One entry of `telemetry.jobs`: holders of GPUs that are a job, and whose. In each text `*` stands for anything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct JobSection {
    /// Its Kubernetes namespace.
    pub namespace: Option<String>,
    /// Its Kubernetes pod.
    pub pod: Option<String>,
    /// The program of a process.
    pub process: Option<String>,
    /// The job's name; by the holder's own name when absent.
    pub job: Option<String>,
    /// Who caused it.
    pub context: Context,
}

/// `[settlement]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SettlementSection {
    /// Milliseconds that a minute waits for late facts before it is settled: the watermark.
    pub lag_ms: u64,
    /// Hours that a start settles again, should it have missed facts about them. Late facts correct any minute.
    pub look_back_h: u32,
}

impl Default for SettlementSection {
    fn default() -> Self {
        SettlementSection { lag_ms: 15_000, look_back_h: 2 }
    }
}

/// The data sheet of a GPU of this name: the configuration's own, else a built-in one, else one that a driver's name for
/// the device stands for.
#[must_use]
pub fn gpu_sheet(config: &Config, name: &str) -> Option<GpuSheet> {
    let own = config.gpu.iter().find(|gpu| gpu.name == name);
    own.map(|gpu| GpuSheet::custom(name, gpu.bf16_tflops * 1e12, gpu.gb_per_s * 1e9, gpu.memory_gb * 1e9))
        .or_else(|| GpuSheet::named(name).copied())
        .or_else(|| GpuSheet::recognised(name).copied())
}

/// Nine significant digits: what JSON gives back exactly, and more than anybody measures.
#[must_use]
pub fn nine_digits(value: f64) -> f64 {
    format!("{value:.8e}").parse().unwrap_or(value)
}

/// Reads a rule by its name; a wrong one is answered with all names.
fn rule<'de, D: Deserializer<'de>, T>(
    from: D,
    names: &'static [&'static str],
    named: impl Fn(&str) -> Option<T>,
) -> Result<T, D::Error> {
    let name = String::deserialize(from)?;
    named(&name).ok_or_else(|| D::Error::unknown_variant(&name, names))
}

const METHODS: &[&str] = &["roofline", "tokens", "weighted-tokens", "equal-time"];
const HEADROOMS: &[&str] = &["airport", "proportional", "line"];
const WASTES: &[&str] = &["line", "spread"];
const SHARINGS: &[&str] = &["time-sliced", "mps"];
const FIXEDS: &[&str] = &["request", "tenant"];

fn method<'de, D: Deserializer<'de>>(from: D) -> Result<Method, D::Error> {
    rule(from, METHODS, Method::named)
}

fn headroom<'de, D: Deserializer<'de>>(from: D) -> Result<HeadroomRule, D::Error> {
    rule(from, HEADROOMS, HeadroomRule::named)
}

fn waste<'de, D: Deserializer<'de>>(from: D) -> Result<WasteRule, D::Error> {
    rule(from, WASTES, WasteRule::named)
}

fn sharing<'de, D: Deserializer<'de>>(from: D) -> Result<SharingRule, D::Error> {
    rule(from, SHARINGS, SharingRule::named)
}

fn fixed<'de, D: Deserializer<'de>>(from: D) -> Result<FixedRule, D::Error> {
    rule(from, FIXEDS, FixedRule::named)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse;

    #[test]
    fn every_rule_has_its_name() {
        assert_eq!(Method::ALL.map(Method::name), METHODS);
        assert_eq!(HeadroomRule::ALL.map(HeadroomRule::name), HEADROOMS);
        assert_eq!(WasteRule::ALL.map(WasteRule::name), WASTES);
        assert_eq!(SharingRule::ALL.map(SharingRule::name), SHARINGS);
        assert_eq!(FixedRule::ALL.map(FixedRule::name), FIXEDS);
        let pool = "[[pool]]\nname = \"a\"\ngpu = \"L4\"\ngpus = 1\nusd_per_gpu_hour = \"1\"\n";
        let config = parse(&format!(
            "{pool}method = \"tokens\"\nheadroom = \"airport\"\nwaste = \"spread\"\nsharing = \"mps\"\nfixed = \"tenant\""
        ))
        .unwrap();
        let policy = config.pool[0].policy();
        assert_eq!(
            (policy.method, policy.sharing, policy.fixed),
            (Method::Tokens, SharingRule::Mps, FixedRule::Tenant)
        );
        assert_eq!(parse(pool).unwrap().pool[0].policy(), Policy::default());
    }

    #[test]
    fn a_gpu_is_found_by_its_own_name_first() {
        let mut config = Config::default();
        assert_eq!(gpu_sheet(&config, "h100").unwrap().name, "H100");
        assert_eq!(gpu_sheet(&config, "NVIDIA H100 80GB HBM3").unwrap().name, "H100");
        assert_eq!(gpu_sheet(&config, "abacus"), None);
        config.gpu.push(GpuSection { name: "H100".to_owned(), bf16_tflops: 1.0, gb_per_s: 2.0, memory_gb: 3.0 });
        assert_eq!(gpu_sheet(&config, "H100").unwrap().flop_per_s, 1e12);
    }

    #[test]
    fn constants_are_read_back_exactly() {
        for value in [1.0 / 3.0, 0.0005, 1e-300, 0.0, 0.8] {
            let rounded = nine_digits(value);
            assert_eq!(serde_json::from_str::<f64>(&serde_json::to_string(&rounded).unwrap()).unwrap(), rounded);
            assert!((rounded - value).abs() <= value * 1e-8);
        }
    }
}
