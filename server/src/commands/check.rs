//! `farthing check`: reads the configuration and says everything that is wrong with it.

use std::process::ExitCode;

use serde::Serialize;
use serde_json::json;

use super::{App, FOUND_WRONG};
use crate::config::{self, Loaded, Standing};
use crate::{books, clock, engines, render};

/// Part of a GPU's memory that engines take as a rule, weights and cache together.
const MEMORY_SHARE: f64 = 0.9;

/// Checks the configuration file, or the defaults.
///
/// # Errors
/// When the file cannot be read or is not well formed.
pub async fn run(app: &App) -> anyhow::Result<ExitCode> {
    let loaded = app.load()?;
    let wrong = problems(app, &loaded).await?;
    let engines = if wrong.is_empty() { shown(&loaded)? } else { Vec::new() };
    let mut warnings = config::warnings(&loaded.config);
    warnings.extend(engines.iter().filter_map(Shown::warning));
    let file = loaded.file.as_ref().map_or("the default configuration".to_owned(), |file| file.display().to_string());
    if app.global.json {
        render::say_json(&json!({
            "file": loaded.file, "ok": wrong.is_empty(), "problems": wrong, "warnings": warnings, "engines": engines,
        }))?;
    } else if wrong.is_empty() {
        let config = &loaded.config;
        let counted = |count: usize, noun: &str| render::counted(u64::try_from(count).unwrap_or(u64::MAX), noun);
        render::say(&format!(
            "{file} is right: {}, {}, {}; gateway on {}, admin on {}",
            counted(config.upstream.len(), "upstream"),
            counted(config.route.len(), "route"),
            counted(config.pool.len(), "pool"),
            config.gateway.listen,
            config.admin.listen
        ))?;
        for engine in &engines {
            render::say(&engine.line())?;
        }
    }
    if wrong.is_empty() {
        for warning in &warnings {
            crate::complain(&format!("farthing: {file}: warning: {warning}"));
        }
        return Ok(ExitCode::SUCCESS);
    }
    for problem in &wrong {
        crate::complain(&format!("farthing: {file}: {problem}"));
    }
    Ok(FOUND_WRONG)
}

/// What is wrong with a well-formed configuration, secrets, certificates and models included.
///
/// # Errors
/// When the ledger's keys cannot be read.
pub async fn problems(app: &App, loaded: &Loaded) -> anyhow::Result<Vec<String>> {
    let keys = books::standing(&app.global.data_dir()).await?.valid_keys(clock::now());
    let mut wrong = config::check(&loaded.config, Standing { keys });
    if wrong.is_empty() {
        wrong.extend(config::settings(loaded).err().map(|error| format!("{error:#}")));
        if let Some(token) = &loaded.config.admin.token {
            wrong.extend(loaded.secret(token).err().map(|error| format!("admin.token: {error:#}")));
        }
        wrong.extend(crate::wiring::tls(loaded).err().map(|error| format!("gateway.tls: {error:#}")));
        wrong.extend(engines::engine_facts(loaded).err().map(|error| format!("{error:#}")));
    }
    Ok(wrong)
}

/// One engine as the check shows it.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Shown {
    engine: String,
    pool: String,
    replica: String,
    gpu: String,
    gpus: u32,
    /// Parameters in all; unknown without a model configuration.
    parameters: Option<f64>,
    /// Bytes of the weights.
    weight_bytes: Option<f64>,
    /// Bytes of memory of the replica's GPUs, or of the slices of them.
    memory_bytes: Option<f64>,
    /// Whether the weights fit the memory.
    fits: Option<bool>,
    /// Tokens that fit the cache: as configured, else what nine tenths of the memory leave.
    kv_tokens: Option<f64>,
    /// What it runs.
    runs: Option<&'static str>,
    /// Where its metrics are read.
    metrics: Option<String>,
    /// Where its steps are heard.
    forward_pass: Option<String>,
}

fn shown(loaded: &Loaded) -> anyhow::Result<Vec<Shown>> {
    let config = &loaded.config;
    let shown = engines::engine_facts(loaded)?.into_iter().filter_map(|(fact, _)| {
        let upstream = config.upstream.iter().find(|upstream| *upstream.name == *fact.engine)?;
        let pool = config.pool.iter().find(|pool| *pool.name == *fact.pool)?;
        let gpus = pool.all_replicas().into_iter().find(|replica| *replica.name == *fact.replica)?.gpus;
        let constants = fact.setup.constants;
        let memory_bytes = constants.map(|replica| replica.gpu.memory_bytes * f64::from(replica.gpus));
        let weight_bytes = constants.map(|replica| replica.model.weight_bytes);
        Some(Shown {
            engine: upstream.name.clone(),
            pool: pool.name.clone(),
            replica: fact.replica.to_string(),
            gpu: constants.map_or(pool.gpu.clone(), |replica| replica.gpu.name.to_owned()),
            gpus,
            parameters: constants.map(|replica| replica.model.shape.total_parameters),
            weight_bytes,
            memory_bytes,
            fits: weight_bytes.zip(memory_bytes).map(|(weights, memory)| weights < memory),
            kv_tokens: fact
                .setup
                .limits
                .kv_tokens
                .or(constants.map(|replica| replica.kv_capacity_tokens(MEMORY_SHARE).floor())),
            runs: upstream.runs().map(fleet::telemetry::EngineKind::name),
            metrics: upstream.metrics_url(),
            forward_pass: upstream.engine.as_ref().and_then(|engine| engine.forward_pass.clone()),
        })
    });
    Ok(shown.collect())
}

impl Shown {
    fn line(&self) -> String {
        let model = match (self.parameters, self.weight_bytes, self.memory_bytes) {
            (Some(parameters), Some(weights), Some(memory)) => format!(
                "{} of weights {} {}",
                size(parameters, weights),
                if self.fits == Some(true) { "fit in" } else { "do NOT fit in" },
                giga(memory)
            ),
            _ => "its model's dimensions are unknown".to_owned(),
        };
        let cache = self.kv_tokens.map_or(String::new(), |tokens| format!(", {tokens:.0} tokens of cache"));
        let metrics = match (&self.metrics, self.runs) {
            (Some(url), Some(runs)) => format!("{runs} metrics at {url}"),
            _ => "its metrics are not read".to_owned(),
        };
        let steps = self.forward_pass.as_ref().map_or(String::new(), |endpoint| format!(", steps at {endpoint}"));
        format!(
            "  engine {} on {} ({} x {}): {model}{cache}; {metrics}{steps}",
            self.engine, self.replica, self.gpus, self.gpu
        )
    }

    fn warning(&self) -> Option<String> {
        let (weights, memory) = (self.weight_bytes?, self.memory_bytes?);
        (self.fits == Some(false)).then(|| {
            format!(
                "upstream `{}`: the model's weights take {} and its GPUs have {}; give its replica more GPUs, or correct \
                 engine.model_config, gpu or engine.slice",
                self.engine,
                giga(weights),
                giga(memory)
            )
        })
    }
}

/// Parameters and bytes, such as `8.0 B parameters, 16.1 GB`.
fn size(parameters: f64, bytes: f64) -> String {
    let parameters =
        if parameters < 1e9 { format!("{:.0} M", parameters / 1e6) } else { format!("{:.1} B", parameters / 1e9) };
    format!("{parameters} parameters, {}", giga(bytes))
}

fn giga(bytes: f64) -> String {
    if bytes < 1e9 { format!("{:.0} MB", bytes / 1e6) } else { format!("{:.1} GB", bytes / 1e9) }
}
