//! One engine's timeline and its GPUs' price in, what each request costs out. Reads files, needs no ledger.

pub mod outcome;
pub mod read;

use anyhow::{Context as _, bail};
use ledger::allocate::calibrate::{Calibration, calibrate};
use ledger::allocate::full_load::{FullLoad, full_load};
use ledger::allocate::policy::{Method, Policy};
use ledger::allocate::pool::{Demand, Engine, Facts, Served, allocate};
use ledger::allocate::replica::Replica;
use ledger::allocate::shape::Model;
use ledger::allocate::terms::{Used, used};
use ledger::allocate::timeline::{EngineTimeline, Limits};
use ledger::closure::imbalances;
use ledger::step::GpuSheet;
use ledger::{CapacityFact, Line, Money, Origin, Period, Posting, PurchaseOption, Timestamp};

use crate::cli::Allocate as Options;
use crate::config::nearest;
use read::{ENGINE, Meta, Requests};

/// vLLM's own default for the requests that run at once.
const SEQUENCES_MAX: u32 = 256;

/// Everything that a run found out.
#[derive(Debug)]
pub struct Allocated {
    /// How busy time was divided.
    pub method: Method,
    /// The requests as read.
    pub requests: Requests,
    /// The time that was paid for.
    pub window: Period,
    /// The model, the GPUs and the constants in force.
    pub constants: Replica,
    /// What the engine can hold.
    pub limits: Limits,
    /// The fit and how far to believe it.
    pub calibration: Calibration,
    /// What there was to allocate.
    pub origin: Money,
    /// What was allocated.
    pub postings: Vec<Posting>,
    /// Whether the postings add up to the origin.
    pub closed: bool,
    /// What each request within the window used, in the order in which they were scheduled.
    pub used: Vec<Used>,
    /// Busy, idle and wasted seconds of the replica.
    pub seconds: Seconds,
    /// The engine with enough to do.
    pub full_load: Option<FullLoad>,
}

/// How the replica's time was used, in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Seconds {
    /// The window's length.
    pub window: f64,
    /// In which requests paid.
    pub busy: f64,
    /// Computed twice.
    pub waste: f64,
    /// In which nothing ran.
    pub idle: f64,
}

/// Reads the files and allocates.
///
/// # Errors
/// One line on what is wrong with a file or an option.
pub fn run(options: &Options, bars: &dyn Fn(&str) -> indicatif::ProgressBar) -> anyhow::Result<Allocated> {
    let sheet = replica(options)?;
    let meta = options.meta.as_deref().map(read::meta).transpose()?.unwrap_or_default();
    let contexts = options.context_from.as_deref().map(read::contexts).transpose()?;
    let start = options.series_start.or(meta.started_at);
    let series = options.series.as_deref().map(|file| read::series(file, start)).transpose()?.unwrap_or_default();
    let bar = bars("{msg} {wide_bar} {bytes}/{total_bytes} {eta}");
    bar.set_message("reading");
    let requests = read::requests(&options.timeline, contexts.as_ref(), &bar)?;
    let limits = limits(options, &meta);
    check_cache(&requests, limits)?;
    let window = window(options, &requests)?;

    let bar = bars("{spinner} {msg} {elapsed}");
    bar.enable_steady_tick(std::time::Duration::from_millis(100));
    bar.set_message("fitting the step-time model");
    let timelines: Vec<EngineTimeline> = requests.served.iter().map(|one| one.timeline).collect();
    let calibration = calibrate(&sheet, limits, &timelines, &series);
    if let (Some(file), 0) = (&options.series, calibration.samples) {
        let whole = whole(&requests);
        bail!(
            "{} has no sample between {} and {}, when the requests ran; the clocks do not match",
            file.display(),
            whole.start,
            whole.end
        );
    }
    let constants = calibration.fit.as_ref().map_or(sheet, |fit| sheet.fitted(fit));

    bar.set_message("allocating");
    let engine = Engine {
        name: ENGINE.into(),
        replica: ENGINE.into(),
        model: options.model.as_ref().or(meta.model.as_ref()).map(|model| model.as_str().into()),
        constants: Some(constants),
        limits,
        slice: None,
        speculation: None,
        ready_at: None,
        kept_warm_for: None,
        unobserved: None,
        samples: Vec::new(),
        steps: Vec::new(),
    };
    let (origin, postings) = book(options, &engine, constants.gpu.name, &requests.served, window)?;
    let key = Origin::Pool { pool: options.pool.as_str().into(), start: window.start };
    let closed = imbalances([(key, origin)], &postings).is_empty();
    let used = used(&engine, &requests.served, window, options.method);
    let sequences = options.max_sequences.or(meta.engine_kwargs.max_num_seqs).unwrap_or(SEQUENCES_MAX);
    let full_load = full_load(&constants, limits, f64::from(sequences), &timelines);
    bar.finish_and_clear();
    Ok(Allocated {
        method: options.method,
        seconds: seconds(window, origin, &postings),
        requests,
        window,
        constants,
        limits,
        calibration,
        origin,
        postings,
        closed,
        used,
        full_load,
    })
}

/// The model on its GPUs, as the data sheets promise.
fn replica(options: &Options) -> anyhow::Result<Replica> {
    let file = options.model_config.display();
    let text = std::fs::read_to_string(&options.model_config).with_context(|| format!("cannot read {file}"))?;
    let model = Model::from_config(&text).with_context(|| format!("{file}"))?;
    let names = GpuSheet::ALL.map(|sheet| sheet.name);
    let Some(gpu) = GpuSheet::recognised(&options.gpu) else {
        let upper = options.gpu.to_ascii_uppercase();
        let hint = nearest(&upper, names).map_or(String::new(), |near| format!("did you mean `{near}`? "));
        bail!("there is no data sheet for the GPU `{}`; {hint}Known are {}", options.gpu, names.join(", "));
    };
    let replica = Replica::unfitted(model, *gpu, options.gpus);
    if replica.kv_capacity_tokens(1.0) == 0.0 {
        bail!(
            "{file}: weights of {:.1} GB do not fit {} {} with {:.0} GB each; give more --gpus, or another configuration",
            model.weight_bytes / 1e9,
            options.gpus,
            gpu.name,
            gpu.memory_bytes / 1e9
        );
    }
    Ok(replica)
}

#[expect(clippy::cast_precision_loss, reason = "tokens of a cache are far below 2^52")]
fn limits(options: &Options, meta: &Meta) -> Limits {
    let usual = Limits::default();
    Limits {
        kv_tokens: options.kv_tokens.or(meta.kv_cache.num_kv_tokens).map(|tokens| tokens as f64),
        block_tokens: meta.kv_cache.block_size.map_or(usual.block_tokens, f64::from),
        step_tokens_max: meta.engine_kwargs.max_num_batched_tokens.map_or(usual.step_tokens_max, f64::from),
    }
}

/// Every request had its whole context in the cache at its end; a smaller one is a wrong number.
fn check_cache(requests: &Requests, limits: Limits) -> anyhow::Result<()> {
    let Some(kv_tokens) = limits.kv_tokens else { return Ok(()) };
    let context = |one: &Served| f64::from(one.timeline.input_tokens) + f64::from(one.timeline.output_tokens);
    for (one, name) in requests.served.iter().zip(&requests.names) {
        if context(one) > kv_tokens {
            bail!("a KV cache of {kv_tokens} tokens cannot have held request `{name}` with {} tokens", context(one));
        }
    }
    Ok(())
}

/// From the first arrival to the last token; the end belongs to it.
fn whole(requests: &Requests) -> Period {
    let start = requests.served.iter().map(|one| one.timeline.arrived).min().unwrap_or_default();
    let end = requests.served.iter().map(|one| one.timeline.last_token).max().unwrap_or_default();
    Period { start, end: end.plus_micros(1) }
}

fn window(options: &Options, requests: &Requests) -> anyhow::Result<Period> {
    options.span.period().map_err(anyhow::Error::msg)?;
    let whole = whole(requests);
    let window = Period { start: options.span.from.unwrap_or(whole.start), end: options.span.to.unwrap_or(whole.end) };
    let ran = |one: &Served| one.timeline.scheduled < window.end && window.start < one.timeline.last_token;
    if !requests.served.iter().any(ran) {
        bail!(
            "no request ran between {} and {}; they ran from {} to {}",
            window.start,
            window.end,
            whole.start,
            whole.end
        );
    }
    Ok(window)
}

fn book(
    options: &Options,
    engine: &Engine,
    gpu: &str,
    served: &[Served],
    window: Period,
) -> anyhow::Result<(Money, Vec<Posting>)> {
    let capacity = CapacityFact {
        pool: options.pool.as_str().into(),
        replica: engine.replica.clone(),
        deployment: None,
        owner: None,
        gpu: gpu.into(),
        gpus: options.gpus,
        rate: options.rate,
        purchase: PurchaseOption::OnDemand,
        period: window,
        observed_at: window.end,
    };
    let origin = capacity.cost_within(window);
    let facts = Facts {
        capacity: std::slice::from_ref(&capacity),
        engines: std::slice::from_ref(engine),
        served,
        jobs: &[],
        demand: &Demand::default(),
    };
    let policy = Policy { method: options.method, ..Policy::default() };
    // Booked at the window's end, not now: the same files give the same postings.
    let postings = allocate(&options.pool.as_str().into(), window, facts, &policy, booked_at(window))?;
    Ok((origin, postings))
}

fn booked_at(window: Period) -> Timestamp {
    window.end
}

/// What was paid for is time: the seconds behind each line are its part of the window.
#[expect(clippy::cast_precision_loss, reason = "seconds that are shown, never booked")]
fn seconds(window: Period, origin: Money, postings: &[Posting]) -> Seconds {
    let length = window.micros() as f64 * 1e-6;
    let of = |line: Line| {
        let booked: Money =
            postings.iter().filter(|posting| posting.line == line).map(|posting| posting.costs.effective_cost).sum();
        if origin == Money::ZERO { 0.0 } else { length * (booked.pico() as f64 / origin.pico() as f64) }
    };
    Seconds { window: length, busy: of(Line::Request), waste: of(Line::Waste), idle: of(Line::IdleReserved) }
}
