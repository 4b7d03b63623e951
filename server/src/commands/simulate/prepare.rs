//! From the command line to what is played: the trace, its demand in replicas, the deployment, and the prices.

use std::path::Path;

use anyhow::{Context as _, anyhow, bail};
use fleet::scale::{Bounds, Objective, Policy};
use fleet::sim::capacity::{self, Capacity};
use fleet::sim::demand::{Demand, Work};
use fleet::sim::engine::Spec;
use fleet::sim::failure::Failures;
use fleet::sim::plan::{Plan, Prices};
use fleet::sim::router::Router;
use fleet::sim::{Trace, TraceOptions};
use ledger::commit::Product;
use ledger::gpu::GpuSheet;
use ledger::gpu_price::GpuPrice;
use ledger::{GpuHourRate, Timestamp};

use super::{engine, history};
use crate::cli::Workload;
use crate::commands::App;
use crate::{gpu_prices, render};

/// Replicas at the busiest minute where nothing says what one does.
const REPLICAS_AT_PEAK: f64 = 40.0;
/// Pairs of lengths that a capacity is found with.
const MIX: usize = 2_000;
/// Requests in a batch at capacity, where no engine says: what policies that count requests are told.
const BATCH: f64 = 32.0;
const DAY_US: f64 = 86_400e6;

/// What is played.
#[derive(Debug)]
pub struct Played {
    /// The requests.
    pub trace: Trace,
    /// The same as a course of load.
    pub demand: Demand,
    /// The deployment, under the default policy.
    pub plan: Plan,
    /// The engine, where one is simulated.
    pub engine: Option<Spec>,
    /// What a token weighs.
    pub work: Work,
    /// How requests find a replica.
    pub router: Router,
    /// What GPUs cost.
    pub price: Price,
    /// What a reader has to know.
    pub notes: Vec<String>,
}

/// What GPUs cost and who says so.
#[derive(Debug, Clone)]
pub struct Price {
    /// One GPU for an hour.
    pub on_demand: GpuHourRate,
    /// One committed GPU for an hour.
    pub committed: Option<GpuHourRate>,
    /// What can be committed to.
    pub products: Vec<Product>,
    /// One interruptible GPU for an hour.
    pub spot: Option<GpuHourRate>,
    /// Where the on-demand price is from.
    pub source: String,
}

impl Played {
    /// The judged part of the trace in hours.
    #[must_use]
    pub fn judged_hours(&self) -> f64 {
        (self.demand.len_us() as f64 / 1e6 - self.plan.judge_from_s).max(0.0) / 3_600.0
    }
}

/// Reads and computes everything that comes before the first decision.
///
/// # Errors
/// One line on what is wrong with a file or an option.
pub async fn prepare(app: &App, options: &Workload) -> anyhow::Result<Played> {
    // First what is wrong at a glance, then what takes time.
    let price = price(options)?;
    let spec = options.model_config.as_deref().map(|config| spec(options, config)).transpose()?;
    let mut notes = Vec::new();
    let trace = trace(app, options, spec.is_some(), &mut notes).await?;
    let objective = Objective {
        ttft_s: options.objective_ttft_ms / 1e3,
        tpot_s: options.objective_tpot_ms / 1e3,
        percentile: options.objective_percentile,
    };
    let (trace, demand, able) = match &spec {
        Some(spec) => with_engine(options, spec, trace, &objective, &mut notes)?,
        None => by_count(options, trace, &mut notes)?,
    };
    let peak = demand.minutes().iter().copied().fold(0.0_f32, f32::max);
    let static_replicas = whole(f64::from(peak).ceil()).max(1);
    let ceiling = options.ceiling.unwrap_or_else(|| (static_replicas.saturating_mul(3) / 2).max(static_replicas + 2));
    let floor = options.floor.max(options.committed);
    if ceiling < floor {
        bail!("--ceiling {ceiling} is below the {floor} replicas that are always there (--floor, --committed)");
    }
    let startup = options.start_up_varies.map_or(options.start_up_s, |sigma| options.start_up_s.varied(sigma));
    let bounds = Bounds {
        floor,
        ceiling,
        committed: options.committed,
        static_replicas,
        cold_start_s: startup.usual_s(),
        batch_at_capacity: able.batch,
        requests_per_s_at_capacity: able.requests_per_s,
        input_tokens_per_s_at_capacity: able.input_tokens_per_s,
        output_tokens_per_s_at_capacity: able.output_tokens_per_s,
    };
    let judge_from_s = judge_from_s(options, &demand)?;
    if options.committed > 0 && price.committed.is_none() {
        notes.push("committed GPUs are counted at the on-demand price; --committed-usd says otherwise".to_owned());
    }
    let plan = Plan {
        objective,
        gpus: options.gpus,
        prices: Prices { on_demand: price.on_demand, committed: price.committed.unwrap_or(price.on_demand) },
        startup,
        failures: Failures::default(),
        decide_every_s: options.decide_every_s,
        judge_from_s,
        seed: options.seed,
        ..Plan::new(Policy::default(), bounds)
    };
    let engine = spec.filter(|_| !options.fluid);
    Ok(Played {
        trace,
        demand,
        plan: Plan { startup, bounds, ..plan },
        engine,
        work: able.work,
        router: Router::default(),
        price,
        notes,
    })
}

/// The trace of a file, or the ledger's.
async fn trace(app: &App, options: &Workload, with_engine: bool, notes: &mut Vec<String>) -> anyhow::Result<Trace> {
    let period = options.span.period().map_err(anyhow::Error::msg)?;
    let Some(file) = &options.trace else {
        let (trace, note) = history::trace(app, period, &options.deployment).await?;
        notes.push(note);
        return Ok(trace.between(0.0, f64::INFINITY, options.scale));
    };
    let tokens = options.input_tokens.zip(options.output_tokens);
    // Without engines nothing depends on how long requests are.
    let tokens = tokens.or((!with_engine && options.lengths.is_none()).then_some((1, 1)));
    let whole = TraceOptions { seed: options.seed, pairs: options.lengths.clone(), tokens, ..TraceOptions::default() };
    let hint = |error: fleet::sim::TraceError| match error {
        fleet::sim::TraceError::NeedsTokens { path } => anyhow!(
            "{} counts requests without their tokens; name a trace to draw them from with --lengths FILE, or give \
             --input-tokens and --output-tokens",
            path.display()
        ),
        other => other.into(),
    };
    let start = Trace::open(file, &whole).map_err(hint)?.start();
    let since = |at: Option<Timestamp>| at.map(|at| at.micros_since(start) as f64 / 1e6);
    let part =
        TraceOptions { scale: options.scale, from_s: since(options.span.from), to_s: since(options.span.to), ..whole };
    Trace::open(file, &part).map_err(hint)
}

/// What one replica is able to do.
struct Able {
    work: Work,
    batch: f64,
    requests_per_s: f64,
    input_tokens_per_s: f64,
    output_tokens_per_s: f64,
}

impl From<Capacity> for Able {
    fn from(found: Capacity) -> Able {
        Able {
            work: found.work,
            batch: found.batch,
            requests_per_s: found.requests_per_s,
            input_tokens_per_s: found.input_tokens_per_s,
            output_tokens_per_s: found.output_tokens_per_s,
        }
    }
}

/// The capacity by simulation, and the load by what each request's tokens weigh.
fn with_engine(
    options: &Workload,
    spec: &Spec,
    trace: Trace,
    objective: &Objective,
    notes: &mut Vec<String>,
) -> anyhow::Result<(Trace, Demand, Able)> {
    let mix = trace.mix(MIX)?;
    let found = capacity::capacity(spec, &mix, objective, options.seed).ok_or_else(|| {
        anyhow!(
            "one replica cannot meet the objective with a single request of this trace at a time; check --objective-ttft-ms, \
             --objective-tpot-ms, --gpu and --gpus"
        )
    })?;
    notes.push(format!(
        "one replica sustains {:.2} requests/s of this mix under the objective, {:.0} at once (simulated)",
        found.requests_per_s, found.batch
    ));
    let demand = Demand::of(&trace, &found.work)?;
    let Some(replicas) = options.replicas_at_peak else { return Ok((trace, demand, found.into())) };
    let peak = f64::from(demand.minutes().iter().copied().fold(0.0_f32, f32::max));
    let factor = replicas / peak;
    notes.push(format!("{factor:.3} times as many requests, so that the busiest minute fills {replicas} replicas"));
    let trace = trace.between(0.0, f64::INFINITY, factor);
    let demand = Demand::of(&trace, &found.work)?;
    Ok((trace, demand, found.into()))
}

/// Every request weighs the same: so much that the given number of them fills a replica, or that the busiest minute fills
/// the given number of replicas.
fn by_count(options: &Workload, trace: Trace, notes: &mut Vec<String>) -> anyhow::Result<(Trace, Demand, Able)> {
    let mut demand = Demand::of(&trace, &Work { per_input_token: 0.0, per_output_token: 0.0 })?;
    let bin_s = demand.bin_us as f64 / 1e6;
    demand.load = demand.requests.iter().map(|&requests| narrow(f64::from(requests) / bin_s)).collect();
    let peak_per_s = f64::from(demand.minutes().iter().copied().fold(0.0_f32, f32::max));
    let (requests_per_s, replicas) = match (options.capacity, options.replicas_at_peak) {
        (Some(capacity), None) => (capacity, peak_per_s / capacity),
        (Some(capacity), Some(replicas)) => (capacity, replicas),
        (None, replicas) => {
            let replicas = replicas.unwrap_or(REPLICAS_AT_PEAK);
            (peak_per_s / replicas, replicas)
        }
    };
    demand = demand.scaled_to_peak(replicas);
    if options.lengths.is_none() && options.input_tokens.is_none() {
        // Lengths that nobody gave and nothing depends on need not be spoken of.
        demand.notes.retain(|note| !note.contains("1 input and 1 output tokens"));
    }
    notes.push(format!(
        "every request counts the same, {requests_per_s:.2} a second fill one replica; response times need --model-config"
    ));
    let mix = trace.mix(MIX)?;
    let mean =
        |of: fn(&(u32, u32)) -> u32| mix.iter().map(|pair| f64::from(of(pair))).sum::<f64>() / mix.len().max(1) as f64;
    let able = Able {
        work: Work { per_input_token: 0.0, per_output_token: 0.0 },
        batch: BATCH,
        requests_per_s,
        input_tokens_per_s: requests_per_s * mean(|pair| pair.0),
        output_tokens_per_s: requests_per_s * mean(|pair| pair.1),
    };
    Ok((trace, demand, able))
}

fn judge_from_s(options: &Workload, demand: &Demand) -> anyhow::Result<f64> {
    let days = demand.len_us() as f64 / DAY_US;
    let learn = match options.learn_days {
        Some(learn) if learn >= days => bail!("--learn-days {learn} leaves nothing to judge of {days:.2} days"),
        Some(learn) => learn,
        None if days >= 5.0 => 3.0,
        None => 0.0,
    };
    Ok(learn * 86_400.0)
}

fn spec(options: &Workload, config: &Path) -> anyhow::Result<Spec> {
    let gpu = options.gpu.as_deref().context("--model-config needs --gpu")?;
    engine::spec(config, gpu, options.gpus, options.calibration.as_deref())
}

/// Prices as they are given, else as the list has them for the GPU.
fn price(options: &Workload) -> anyhow::Result<Price> {
    let listed = listed(options)?;
    let each = |price: &GpuPrice, usd: GpuHourRate| price.each(usd);
    let products: Vec<Product> = match (&listed, options.committed_usd) {
        (Some(price), None) => price
            .commitments
            .iter()
            .map(|offer| Product {
                name: format!("{} {}", price.provider, offer.name),
                committed: each(price, offer.usd),
                used: each(price, offer.used_usd),
                term_months: offer.term_months,
            })
            .collect(),
        _ => Vec::new(),
    };
    let on_demand = match (options.gpu_hour_usd, &listed) {
        (Some(given), _) => given,
        (None, Some(price)) => each(price, price.on_demand_usd),
        (None, None) => bail!("say what a GPU costs: --gpu-hour-usd USD, or --gpu NAME for a list price"),
    };
    let plain = |product: &&Product| product.used == GpuHourRate::default();
    let committed = options.committed_usd.or(products.iter().filter(plain).map(|product| product.committed).min());
    let source = match (&listed, options.gpu_hour_usd) {
        (Some(price), None) => format!("{}, read on {} at {}", price.name(), price.read_on, price.source),
        _ => "given on the command line".to_owned(),
    };
    let spot = listed.as_ref().and_then(|price| Some(each(price, price.spot_usd?)));
    Ok(Price { on_demand, committed, products, spot, source })
}

/// The row of the price list, where one is needed and the GPU is named.
fn listed(options: &Workload) -> anyhow::Result<Option<GpuPrice>> {
    let list = gpu_prices::load(options.prices.as_deref())?;
    let asked = options.prices.is_some() || options.provider.is_some();
    let gpu = match options.gpu.as_deref() {
        Some(gpu) => GpuSheet::recognised(gpu).map_or(gpu, |sheet| sheet.name),
        None if asked => match &list.prices[..] {
            [only] => return Ok(Some(only.clone())),
            _ => bail!("several GPUs have prices; choose one with --gpu"),
        },
        None => return Ok(None),
    };
    if options.gpu_hour_usd.is_some() && !asked {
        return Ok(None);
    }
    gpu_prices::choose(&list, gpu, options.provider.as_deref()).map(|price| Some(price.clone()))
}

/// What is played, in words: the trace, what is judged, the deployment, the price.
#[must_use]
pub fn words(played: &Played) -> String {
    let Played { demand, plan, price, .. } = played;
    let requests: u64 = demand.requests.iter().map(|&requests| u64::from(requests)).sum();
    let days = demand.len_us() as f64 / DAY_US;
    let judged = match plan.judge_from_s {
        0.0 => String::new(),
        from_s => format!(", {:.1} days to learn and the rest judged", from_s / 86_400.0),
    };
    let mut said =
        vec![format!("{}: {} over {}{judged}", demand.name, render::counted(requests, "request"), length(days))];
    said.extend(demand.notes.iter().chain(&played.notes).map(|note| format!("  {note}")));
    let peak = demand.minutes().iter().copied().fold(0.0_f32, f32::max);
    said.push(format!(
        "{peak:.1} replicas of {} at the busiest minute, {:.0} s to start one, {} USD for a GPU-hour ({})",
        if plan.gpus == 1 { "1 GPU".to_owned() } else { format!("{} GPUs", plan.gpus) },
        plan.startup.usual_s(),
        price.on_demand,
        price.source
    ));
    said.into_iter().map(|line| line + "\n").collect()
}

fn length(days: f64) -> String {
    if days >= 2.0 { format!("{days:.1} days") } else { format!("{:.2} hours", days * 24.0) }
}

#[expect(clippy::cast_possible_truncation, reason = "loads are small numbers")]
fn narrow(value: f64) -> f32 {
    value as f32
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float saturates at the integer's ends")]
fn whole(value: f64) -> u32 {
    value as u32
}
