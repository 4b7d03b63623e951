//! `farthing simulate engine`: one engine under a steady or recorded load, and its constants from a measured one.

mod constants;
mod measured;
mod show;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use fleet::sim::engine::calibrate::{Calibration, Errors, Point, calibrate, calibrate_points, compare, surely_whole};
use fleet::sim::engine::{Constants, Engine, Limits, Load, Spec, Summary};
use fleet::sim::{Arrival, Done};
use ledger::{GpuHourRate, Money};

use super::App;
use crate::allocate::read;
use crate::render;
pub use constants::{Dtype, spec};
use constants::{Fitted, Written};
use measured::Recorded;

const LOAD: &str = "What arrives";
const ENGINE: &str = "The engine";
const CALIBRATION: &str = "Calibration";
/// Requests of a steady load.
const REQUESTS: u32 = 500;

/// `farthing simulate engine`
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Requests a second that arrive, at random times.
    #[arg(long, value_name = "REQUESTS/S", value_parser = positive, requires_all = ["input_tokens", "output_tokens"],
          required_unless_present_any = ["timeline", "calibrate_from"], conflicts_with = "timeline", help_heading = LOAD)]
    pub rate: Option<f64>,
    /// Recorded requests: a vLLM timeline as `farthing import vllm-timeline` reads it, or a trace as `farthing simulate` does.
    #[arg(long, value_name = "FILE", help_heading = LOAD)]
    pub timeline: Option<PathBuf>,
    /// Input tokens of every request.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), help_heading = LOAD)]
    pub input_tokens: Option<u32>,
    /// Output tokens of every request.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), help_heading = LOAD)]
    pub output_tokens: Option<u32>,
    /// How many requests arrive; then the engine runs empty.
    #[arg(long, value_name = "N", default_value_t = REQUESTS, value_parser = clap::value_parser!(u32).range(1..=50_000_000), help_heading = LOAD)]
    pub requests: u32,
    /// What arrivals are drawn from; the same seed gives the same answer.
    #[arg(long, default_value_t = 1, help_heading = LOAD)]
    pub seed: u64,

    /// The model's Hugging Face `config.json`.
    #[arg(long, value_name = "FILE", help_heading = ENGINE)]
    pub model_config: PathBuf,
    /// The GPU, as its data sheet or its driver names it.
    #[arg(long, value_name = "NAME", help_heading = ENGINE)]
    pub gpu: String,
    /// GPUs that work as one.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096), help_heading = ENGINE)]
    pub gpus: u32,
    /// Weights of another width than the configuration says; the KV cache keeps its own.
    #[arg(long, value_enum, value_name = "TYPE", help_heading = ENGINE)]
    pub dtype: Option<Dtype>,
    /// Requests in a batch at the most [default: vLLM's for the GPU].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), help_heading = ENGINE)]
    pub max_num_seqs: Option<u32>,
    /// Tokens of a step at the most [default: vLLM's for the GPU].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), help_heading = ENGINE)]
    pub max_num_batched_tokens: Option<u32>,
    /// Tokens that fit the KV cache [default: what the weights leave].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), help_heading = ENGINE)]
    pub kv_tokens: Option<u64>,
    /// The engine's own settings as JSON (`engine_kwargs`, `kv_cache`), as benchmarks write them; options above win.
    #[arg(long, value_name = "FILE", help_heading = ENGINE)]
    pub meta: Option<PathBuf>,
    /// GB a second, each way, that sums over the replica's GPUs reach [default: three quarters of the fabric's data sheet].
    #[arg(long, value_name = "GB/S", value_parser = positive, help_heading = ENGINE)]
    pub link_gb_per_s: Option<f64>,
    /// USD for one GPU for one hour; without it nothing is said of cost.
    #[arg(long, value_name = "USD", help_heading = ENGINE)]
    pub gpu_hour_usd: Option<GpuHourRate>,

    /// Fitted constants (JSON), as --write-calibration or `farthing allocate --json` wrote them [default: the data sheet with
    /// usual efficiencies].
    #[arg(long, value_name = "FILE", conflicts_with = "calibrate_from", help_heading = CALIBRATION)]
    pub calibration: Option<PathBuf>,
    /// Fit the constants first: to a vLLM timeline, or to benchmarks at several rates (.csv with `rps`, `tps_output`, …), whose
    /// requests --input-tokens, --output-tokens and --requests describe.
    #[arg(long, value_name = "FILE", help_heading = CALIBRATION)]
    pub calibrate_from: Option<PathBuf>,
    /// The requests of the timeline that are fitted to, by arrival; the others judge.
    #[arg(long, value_enum, value_name = "PART", default_value = "first-half", requires = "calibrate_from", help_heading = CALIBRATION)]
    pub calibrate_on: Part,
    /// The rates of the benchmarks that are fitted to; the others judge [default: all].
    #[arg(long, value_name = "RATE,…", value_delimiter = ',', value_parser = positive, requires = "calibrate_from", help_heading = CALIBRATION)]
    pub calibrate_rates: Vec<f64>,
    /// Write the constants.
    #[arg(long, value_name = "FILE", requires = "calibrate_from", help_heading = CALIBRATION)]
    pub write_calibration: Option<PathBuf>,
}

/// A part of a timeline's requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Part {
    /// Those that arrived first.
    FirstHalf,
    /// Those that arrived last.
    SecondHalf,
    /// Every one: nothing is left to judge by.
    All,
}

impl Part {
    /// Whether the request in this place, of so many, belongs to it.
    fn holds(self, place: u64, requests: usize) -> bool {
        let first = place < requests as u64 / 2;
        match self {
            Part::FirstHalf => first,
            Part::SecondHalf => !first,
            Part::All => true,
        }
    }
}

/// What a run found out.
#[derive(Debug)]
struct Found {
    spec: Spec,
    /// What the constants were fitted to, if they were.
    fitted: Option<Fitted>,
    /// Whether the constants are fitted ones, now or before.
    calibrated: bool,
    run: Option<Run>,
    /// What the real engine did with the same requests.
    measured: Option<Summary>,
    /// Errors on all requests that were measured.
    errors: Option<Errors>,
    /// Errors on those that the constants were not fitted to.
    held_out: Option<(u64, Errors)>,
    /// Benchmarks beside their simulations.
    points: Vec<Compared>,
}

/// One simulated run.
#[derive(Debug)]
struct Run {
    summary: Summary,
    cost: Option<Money>,
    usd_per_million_output_tokens: Option<Money>,
    preemptions: u64,
    cached_input_share: f64,
    /// Part of the time in which the engine was in a step.
    utilisation: f64,
    /// Requests in the batch, a mean over time.
    batch: f64,
}

/// A benchmark beside its simulation.
#[derive(Debug)]
struct Compared {
    point: Point,
    fitted: bool,
    summary: Summary,
}

/// Simulates and writes the answer.
///
/// # Errors
/// One line on what is wrong with a file or an option.
pub fn run(app: &App, options: &Options) -> anyhow::Result<ExitCode> {
    let found = find(options)?;
    if app.global.json {
        render::say_json(&show::document(&found))?;
    } else {
        render::say(&show::text(&found, options))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn find(options: &Options) -> anyhow::Result<Found> {
    let spec = limited(
        constants::spec_of(
            &options.model_config,
            &options.gpu,
            options.gpus,
            options.dtype,
            options.calibration.as_deref(),
        )?,
        options,
    )?;
    let mut found = Found {
        spec,
        fitted: None,
        calibrated: options.calibration.is_some(),
        run: None,
        measured: None,
        errors: None,
        held_out: None,
        points: Vec::new(),
    };
    let bar = crate::commands::progress("{spinner} {msg} {elapsed}");
    bar.enable_steady_tick(std::time::Duration::from_millis(100));
    if let Some(file) = &options.calibrate_from {
        bar.set_message("calibrating");
        if is_csv(file) {
            from_benchmarks(&mut found, file, options)?;
        } else {
            from_timeline(&mut found, file, options)?;
        }
        if let Some(out) = &options.write_calibration {
            constants::write(out, &Written::of(&found.spec.constants, found.fitted.clone()))?;
        }
    }
    bar.set_message("simulating");
    play_load(&mut found, options)?;
    bar.finish_and_clear();
    Ok(found)
}

/// The engine with the settings of the command line, else of the engine's own description.
fn limited(spec: Spec, options: &Options) -> anyhow::Result<Spec> {
    let meta = options.meta.as_deref().map(read::meta).transpose()?.unwrap_or_default();
    let usual = spec.limits;
    let limits = Limits {
        max_num_seqs: options.max_num_seqs.or(meta.engine_kwargs.max_num_seqs).unwrap_or(usual.max_num_seqs),
        max_num_batched_tokens: options
            .max_num_batched_tokens
            .or(meta.engine_kwargs.max_num_batched_tokens)
            .unwrap_or(usual.max_num_batched_tokens),
        block_tokens: meta.kv_cache.block_size.filter(|size| *size > 0).unwrap_or(usual.block_tokens),
        kv_tokens: options.kv_tokens.or(meta.kv_cache.num_kv_tokens),
        ..usual
    };
    let link = options.link_gb_per_s.map(|gb| gb * 1e9).or(spec.constants.link_bytes_per_s);
    Ok(Spec { constants: Constants { link_bytes_per_s: link, ..spec.constants }, limits })
}

fn load(options: &Options, requests_per_s: f64) -> Option<Load> {
    let (input_tokens, output_tokens) = options.input_tokens.zip(options.output_tokens)?;
    Some(Load { requests_per_s, requests: options.requests, input_tokens, output_tokens, seed: options.seed })
}

fn from_benchmarks(found: &mut Found, file: &Path, options: &Options) -> anyhow::Result<()> {
    let Some(load) = load(options, 1.0) else {
        bail!("{} does not say how long its requests were; give --input-tokens and --output-tokens", file.display());
    };
    let points = measured::benchmarks(file, &load)?;
    let is_fitted = |point: &Point| {
        let rates = &options.calibrate_rates;
        rates.is_empty() || rates.iter().any(|rate| (rate / point.load.requests_per_s - 1.0).abs() < 1e-9)
    };
    let chosen: Vec<Point> = points.iter().filter(|point| is_fitted(point)).copied().collect();
    if chosen.is_empty() {
        let rates: Vec<String> = points.iter().map(|point| point.load.requests_per_s.to_string()).collect();
        bail!("{} has no such rate; it has {}", file.display(), rates.join(", "));
    }
    for point in &points {
        first_fits(&found.spec, &point.load.arrivals())?;
    }
    let Some(calibration) = calibrate_points(&found.spec, &chosen) else {
        bail!("no constants reproduce {}", file.display());
    };
    take(found, calibration, file);
    for point in points {
        let mut done = Vec::new();
        fleet::sim::engine::play(&found.spec, &point.load.arrivals(), Arc::default(), &mut |one| done.push(one))?;
        found.points.push(Compared { point, fitted: is_fitted(&point), summary: Summary::of(&done) });
    }
    Ok(())
}

fn from_timeline(found: &mut Found, file: &Path, options: &Options) -> anyhow::Result<()> {
    let Recorded { measured, arrivals, refused, .. } = measured::recorded(file)?;
    warn(file, refused.as_ref());
    if measured.is_empty() {
        bail!("{} says when requests arrived, not when their tokens came; nothing can be fitted to it", file.display());
    }
    first_fits(&found.spec, &arrivals)?;
    let (part, requests) = (options.calibrate_on, measured.len());
    let ended = surely_whole(&measured);
    let fitted = |one: &Done| part.holds(one.arrival.id, requests) && ended(one);
    let Some(calibration) = calibrate(&found.spec, &measured, fitted) else {
        bail!("{} holds too few requests to fit constants to", file.display());
    };
    take(found, calibration, file);
    let others = |one: &Done| !part.holds(one.arrival.id, requests);
    let count = measured.iter().filter(|one| others(one)).count() as u64;
    found.held_out = compare(&found.spec, &measured, others).map(|errors| (count, errors));
    Ok(())
}

fn take(found: &mut Found, calibration: Calibration, file: &Path) {
    let replica = &calibration.constants.replica;
    found.fitted = Some(Fitted {
        gpu: replica.gpu.name.to_owned(),
        gpus: replica.gpus,
        observations: calibration.observations,
        from: file.file_name().map_or(String::new(), |name| name.to_string_lossy().into_owned()),
        loss: calibration.loss,
    });
    found.spec.constants = calibration.constants;
    found.calibrated = true;
}

/// Plays the load that was asked for: the steady one, the recorded one, or the one that was calibrated from.
fn play_load(found: &mut Found, options: &Options) -> anyhow::Result<()> {
    let recorded_file = match (&options.timeline, &options.calibrate_from) {
        (Some(file), _) => Some(file),
        (None, Some(file)) if options.rate.is_none() && !is_csv(file) => Some(file),
        _ => None,
    };
    let recorded = match (recorded_file, options.rate) {
        (Some(file), _) => {
            let recorded = measured::recorded(file)?;
            if options.calibrate_from.as_ref() != Some(file) {
                warn(file, recorded.refused.as_ref());
            }
            recorded
        }
        (None, Some(rate)) => {
            let load = load(options, rate).context("a rate needs --input-tokens and --output-tokens")?;
            Recorded { arrivals: load.arrivals(), prefixes: Arc::default(), measured: Vec::new(), refused: None }
        }
        (None, None) => return Ok(()),
    };
    first_fits(&found.spec, &recorded.arrivals)?;
    found.run = Some(simulate(&found.spec, &recorded, options)?);
    if !recorded.measured.is_empty() {
        found.measured = Some(Summary::of(&recorded.measured));
        found.errors = compare(&found.spec, &recorded.measured, |_| true);
    }
    Ok(())
}

fn simulate(spec: &Spec, recorded: &Recorded, options: &Options) -> anyhow::Result<Run> {
    let mut engine = Engine::with_prefixes(spec, Arc::clone(&recorded.prefixes));
    let mut done: Vec<Done> = Vec::with_capacity(recorded.arrivals.len());
    for arrival in &recorded.arrivals {
        engine.advance(arrival.at_us, &mut |one| done.push(one));
        engine.submit(*arrival, arrival.at_us)?;
    }
    engine.finish(&mut |one| done.push(one));
    let summary = Summary::of(&done);
    let end_us = done.iter().map(|one| one.last_token_us).max().unwrap_or(0);
    let sum = |of: &dyn Fn(&Done) -> u64| done.iter().map(of).sum::<u64>();
    let (inputs, outputs) = (sum(&|one| one.arrival.input_tokens.into()), sum(&|one| one.arrival.output_tokens.into()));
    let share = |part: u64, whole: u64| part as f64 / whole.max(1) as f64;
    let cost = options.gpu_hour_usd.map(|rate| rate.over(options.gpus, end_us));
    let tokens = i128::from(outputs.max(1));
    Ok(Run {
        summary,
        cost,
        usd_per_million_output_tokens: cost
            .map(|cost| Money::from_pico((cost.pico().saturating_mul(1_000_000) + tokens / 2) / tokens)),
        preemptions: engine.preemptions(),
        cached_input_share: share(sum(&|one| one.cached_tokens.into()), inputs),
        utilisation: share(engine.busy_us(), end_us).min(1.0),
        batch: share(sum(&|one| one.last_token_us.saturating_sub(one.scheduled_us)), end_us),
    })
}

/// Says which request is too long before anything is computed.
fn first_fits(spec: &Spec, arrivals: &[Arrival]) -> anyhow::Result<()> {
    for (place, arrival) in (1u64..).zip(arrivals) {
        if let Err(long) = spec.check(arrival) {
            bail!("request {place}: {long} tokens; give --kv-tokens, more --gpus or smaller weights by --dtype");
        }
    }
    Ok(())
}

fn warn(file: &Path, refused: Option<&(u64, String)>) {
    if let Some((line, reason)) = refused {
        let reason = render::printable(reason);
        crate::complain(&format!("farthing: {}: some lines are left out; line {line}: {reason}", file.display()));
    }
}

/// A number above zero.
fn positive(text: &str) -> Result<f64, String> {
    let number = text.trim().parse().ok().filter(|value: &f64| value.is_finite() && *value > 0.0);
    number.ok_or_else(|| format!("`{text}` is not a number above 0"))
}

fn is_csv(file: &Path) -> bool {
    file.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("csv"))
}
