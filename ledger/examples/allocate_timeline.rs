//! Allocates one measured run of an engine and says how far the result can be trusted.
//!
//! ```text
//! cargo run -p ledger --example allocate_timeline -- RUN_FOLDER MODEL_CONFIG GPU GPUS USD_PER_GPU_HOUR [KV_TOKENS]
//! ```
//!
//! `RUN_FOLDER` holds `requests.jsonl` (`input_toks`, `output_toks`, `arrival_time`, `queued_ts`, `scheduled_ts`,
//! `first_token_ts`, `last_token_ts`), `timeseries.csv` (`t,…,running,waiting,kv_cache_pct`) and `meta.json` (`started_at`);
//! `MODEL_CONFIG` is the model's Hugging Face `config.json`.

use std::io::Write;
use std::path::Path;

use ledger::allocate::fit::{Fit, Observed};
use ledger::allocate::policy::{Method, Policy};
use ledger::allocate::pool::{Demand, Engine, Facts, Served, allocate};
use ledger::allocate::quality::{EngineSample, compare, decode_observations};
use ledger::allocate::replica::Replica;
use ledger::allocate::shape::Model;
use ledger::allocate::sweep::{Part, Sweep};
use ledger::allocate::timeline::{EngineTimeline, Limits};
use ledger::closure::imbalances;
use ledger::step::GpuSheet;
use ledger::{
    AttemptId, CapacityFact, Context, Line, Money, Origin, Period, Posting, PurchaseOption, RequestId, Timestamp,
};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, config, gpu, gpus, rate, rest @ ..] = arguments.as_slice() else {
        return Err("usage: allocate_timeline RUN_FOLDER MODEL_CONFIG GPU GPUS USD_PER_GPU_HOUR [KV_TOKENS]".into());
    };
    let model = Model::from_config(&std::fs::read_to_string(config)?)?;
    let gpu = GpuSheet::recognised(gpu).ok_or_else(|| format!("no data sheet for `{gpu}`"))?;
    let gpus: u32 = gpus.parse()?;
    let kv_tokens = rest.first().map(|text| text.parse()).transpose()?;
    let limits = Limits { kv_tokens, ..Limits::default() };
    let run = Run::read(Path::new(folder))?;
    let sheet = Replica::unfitted(model, *gpu, gpus);
    let mut out = std::io::stdout().lock();

    let fitted = judge(&run, sheet, limits, &mut out)?;
    settle(&run, fitted, limits, &gpu.name.into(), rate.parse()?, &mut out)?;
    speed(&run, fitted, limits, &mut out)
}

/// One run: requests in the order of their schedule, and the engine's own series.
struct Run {
    timelines: Vec<EngineTimeline>,
    samples: Vec<(Timestamp, EngineSample)>,
}

impl Run {
    fn read(folder: &Path) -> Result<Run, Failure> {
        let text = |name: &str| std::fs::read_to_string(folder.join(name)).map_err(|error| format!("{name}: {error}"));
        let rows: Vec<serde_json::Value> =
            text("requests.jsonl")?.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        let number = |row: &serde_json::Value, key: &str| row[key].as_f64().ok_or_else(|| format!("no number `{key}`"));
        let mut ahead = f64::MIN;
        for row in &rows {
            ahead = ahead.max(number(row, "arrival_time")? - number(row, "queued_ts")?);
        }
        let at = |row: &serde_json::Value, key: &str| number(row, key).map(|seconds| moment(seconds + ahead));
        let tokens = |row: &serde_json::Value, key: &str| {
            row[key].as_u64().and_then(|count| u32::try_from(count).ok()).ok_or_else(|| format!("no count `{key}`"))
        };
        let mut timelines = Vec::with_capacity(rows.len());
        for row in &rows {
            let timeline = EngineTimeline {
                arrived: at(row, "queued_ts")?,
                scheduled: at(row, "scheduled_ts")?,
                first_token: at(row, "first_token_ts")?,
                last_token: at(row, "last_token_ts")?,
                input_tokens: tokens(row, "input_toks")?,
                cached_tokens: 0,
                output_tokens: tokens(row, "output_toks")?,
            };
            timelines.push(timeline.ordered());
        }
        timelines.sort_by_key(|timeline| timeline.scheduled);
        let meta: serde_json::Value = serde_json::from_str(&text("meta.json")?)?;
        let started: Timestamp = meta["started_at"].as_str().ok_or("no `started_at`")?.parse()?;
        let series = text("timeseries.csv")?;
        let mut lines = series.lines();
        let headings: Vec<&str> = lines.next().ok_or("an empty timeseries.csv")?.split(',').collect();
        let place = |name: &str| headings.iter().position(|heading| *heading == name).ok_or(format!("no `{name}`"));
        let places = [place("t")?, place("running")?, place("waiting")?, place("kv_cache_pct")?];
        let mut samples = Vec::new();
        for line in lines {
            let cells: Vec<&str> = line.split(',').collect();
            let [t, running, waiting, kv] =
                places.map(|place| cells.get(place).and_then(|cell| cell.parse::<f64>().ok()));
            let at = started.plus_micros(moment(t.ok_or("a row without `t`")?).micros());
            let kv_used = kv.map(|percent| percent / 100.0);
            samples.push((at, EngineSample { at_s: 0.0, running, waiting, kv_used }));
        }
        Ok(Run { timelines, samples })
    }

    fn base(&self) -> Timestamp {
        self.timelines.iter().map(|timeline| timeline.arrived).min().unwrap_or_default()
    }

    fn end(&self) -> Timestamp {
        self.timelines.iter().map(|timeline| timeline.last_token).max().unwrap_or_default()
    }
}

/// Reconstructs the batch, compares it with the engine's series, fits the constants and prints all errors.
fn judge(run: &Run, sheet: Replica, limits: Limits, out: &mut impl Write) -> Result<Replica, Failure> {
    let mut sweep = Sweep::new(sheet.ideal(), limits, run.base()).recording();
    let mut preempted = vec![0.0; run.timelines.len()];
    let mut emit = |part: Part| preempted[usize::try_from(part.tag).unwrap_or(0)] += part.preempted_s;
    for (tag, timeline) in run.timelines.iter().enumerate() {
        sweep.push(tag as u64, timeline, &mut emit);
    }
    sweep.finish(&mut emit);
    let preempted_requests = preempted.iter().filter(|seconds| **seconds > 0.0).count();

    let samples: Vec<EngineSample> =
        run.samples.iter().map(|(at, sample)| EngineSample { at_s: sweep.seconds(*at), ..*sample }).collect();
    let waiting = |t: f64| {
        let waits = |x: &&EngineTimeline| sweep.seconds(x.arrived) <= t && t < sweep.seconds(x.scheduled);
        run.timelines.iter().filter(waits).count() as f64
    };
    let quality = compare(sweep.segments(), waiting, &samples, limits.kv_tokens);
    writeln!(out, "requests {}, preempted {preempted_requests} ({} times)", run.timelines.len(), sweep.preemptions())?;
    writeln!(out, "against the engine's own series: {quality:.4?}")?;

    let window = |x: &EngineTimeline| (sweep.seconds(x.first_token), sweep.seconds(x.last_token));
    let observations = decode_observations(sweep.segments(), &run.timelines, &sheet, window);
    let train = |of: &dyn Fn(usize) -> bool| -> Vec<Observed> {
        let rows = observations.iter().enumerate().filter(|(row, _)| of(*row) && preempted[*row] == 0.0);
        rows.filter_map(|(_, observed)| observed.clone()).collect()
    };
    let mut errors = Vec::new();
    for half in [0, 1] {
        let fit = Fit::of(&train(&|row| row % 2 == half)).ok_or("too few requests for a fit")?;
        for (row, observed) in observations.iter().enumerate().filter(|(row, _)| row % 2 != half) {
            let Some(observed) = observed else { continue };
            errors.push(((fit.predict(&observed.loads) + preempted[row]) / observed.seconds - 1.0).abs());
        }
    }
    errors.sort_by(f64::total_cmp);
    let rank = |part: usize| errors[(errors.len() * part / 100).min(errors.len() - 1)];
    writeln!(out, "decode time of held-out requests: error median {:.4}, p95 {:.4}", rank(50), rank(95))?;
    let fit = Fit::of(&train(&|_| true)).ok_or("too few requests for a fit")?;
    writeln!(out, "fit: {fit:.4?}")?;
    Ok(sheet.fitted(&fit))
}

/// Allocates minute by minute with every method and prints what the lines add up to.
fn settle(
    run: &Run,
    constants: Replica,
    limits: Limits,
    gpu: &ledger::context::Label,
    rate: ledger::GpuHourRate,
    out: &mut impl Write,
) -> Result<(), Failure> {
    let whole = Period { start: run.base(), end: run.end().plus_micros(1) };
    let capacity = [CapacityFact {
        pool: "pool".into(),
        replica: "replica".into(),
        deployment: None,
        owner: None,
        gpu: gpu.clone(),
        gpus: constants.gpus,
        rate,
        purchase: PurchaseOption::OnDemand,
        period: whole,
        observed_at: whole.end,
    }];
    let engines = [Engine {
        name: "engine".into(),
        replica: "replica".into(),
        model: None,
        constants,
        limits,
        slice: None,
        ready_at: None,
        kept_warm_for: None,
        unobserved_s: None,
    }];
    let served: Vec<Served> = run
        .timelines
        .iter()
        .zip(0u16..)
        .map(|(timeline, number)| Served {
            attempt: AttemptId { request: RequestId::new(timeline.arrived, [0; 10]), number },
            context: Context::default(),
            engine: "engine".into(),
            timeline: *timeline,
            estimated: false,
            observed_at: timeline.last_token,
        })
        .collect();
    let demand = Demand::default();
    for method in Method::ALL {
        let policy = Policy { method, ..Policy::default() };
        let (mut postings, mut origins): (Vec<Posting>, Vec<(Origin, Money)>) = Default::default();
        let mut start = whole.start;
        while start < whole.end {
            let minute = Period { start, end: start.plus_micros(60_000_000).min(whole.end) };
            let facts = Facts { capacity: &capacity, engines: &engines, served: &served, demand: &demand };
            postings.extend(allocate(&"pool".into(), minute, facts, &policy, whole.end)?);
            origins.push((Origin::Pool { pool: "pool".into(), start }, capacity[0].cost_within(minute)));
            start = minute.end;
        }
        let cost: Money = origins.iter().map(|(_, amount)| *amount).sum();
        let closed = imbalances(origins, &postings).is_empty();
        write!(out, "{:<16} origin_usd {cost} closed: {closed}", method.name())?;
        for line in Line::ALL {
            let sum: Money = postings.iter().filter(|p| p.line == line).map(|p| p.costs.effective_cost).sum();
            if sum != Money::ZERO {
                write!(out, " {} {}", line.name(), sum.rounded(6))?;
            }
        }
        writeln!(out)?;
    }
    Ok(())
}

/// Requests a second of the sweep and of the exact split, over the run repeated end to end.
#[expect(clippy::disallowed_methods, reason = "a measurement of speed needs the time")]
fn speed(run: &Run, constants: Replica, limits: Limits, out: &mut impl Write) -> Result<(), Failure> {
    const REQUESTS: usize = 3_000_000;
    let length_us = run.end().micros_since(run.base());
    let length_us = i64::try_from(length_us)?;
    for (name, limits) in [("unlimited cache", Limits { kv_tokens: None, ..limits }), ("cache as given", limits)] {
        let mut sweep = Sweep::new(constants, limits, run.base());
        let (mut weights, mut active_max, mut busy_s) = (Vec::with_capacity(run.timelines.len()), 0, 0.0);
        let started = std::time::Instant::now();
        let mut pushed = 0usize;
        let mut turn = 0;
        while pushed < REQUESTS {
            let shift = length_us * turn;
            for timeline in &run.timelines {
                let moved = |at: Timestamp| at.plus_micros(shift);
                let timeline = EngineTimeline {
                    arrived: moved(timeline.arrived),
                    scheduled: moved(timeline.scheduled),
                    first_token: moved(timeline.first_token),
                    last_token: moved(timeline.last_token),
                    ..*timeline
                };
                sweep.push(pushed as u64, &timeline, &mut |part| weights.push(part.share.total_s() + part.waste_s));
                pushed += 1;
            }
            active_max = active_max.max(sweep.active());
            turn += 1;
            busy_s += weights.drain(..).sum::<f64>();
        }
        sweep.finish(&mut |part| busy_s += part.share.total_s() + part.waste_s);
        let seconds = started.elapsed().as_secs_f64();
        writeln!(
            out,
            "sweep, {name}: {:.2} million requests/s on one core, at most {active_max} held at once, {busy_s:.0} s charged of {:.0}",
            pushed as f64 / seconds / 1e6,
            sweep.busy_s(),
        )?;
    }
    let weights: Vec<u64> = (0..140_000u64).map(|index| 1_000_000 + index * 7_919 % 1_000_003).collect();
    let started = std::time::Instant::now();
    let parts = Money::from_pico(2_500_000_000_000).split(&weights)?;
    let seconds = started.elapsed().as_secs_f64();
    writeln!(out, "exact split: {:.2} million parts/s", parts.len() as f64 / seconds / 1e6)?;
    Ok(())
}

/// Seconds since 1970 as a moment.
#[expect(clippy::cast_possible_truncation, reason = "seconds of this era fit in microseconds")]
fn moment(seconds: f64) -> Timestamp {
    Timestamp::from_micros((seconds * 1e6).round() as i64)
}
