//! Reads what `farthing allocate` works on: the timeline, whose requests they are, the engine's series and settings.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use anyhow::{Context as _, bail};
use ledger::allocate::pool::{Known, Served};
use ledger::allocate::quality::EngineSample;
use ledger::allocate::timeline::EngineTimeline;
use ledger::{Attempt, Context, Label, Timestamp};
use serde::Deserialize;

use crate::cli::ImportKind;
use crate::import::lines::Lines;
use crate::import::vllm_timeline::Rows;
use crate::import::{Ids, Settings};

/// The engine that a timeline is of; a file holds one.
pub const ENGINE: &str = "engine";
/// No request waits longer between its arrival and its engine's queue: then the clocks are not those of one process.
const HANDOVER_US_MAX: u64 = 3_600_000_000;
/// 1 January 2100: a later arrival was not written in seconds.
const WALL_CLOCK_US_MAX: i64 = 4_102_444_800_000_000;

/// The requests of a timeline, each once.
#[derive(Debug, Default)]
pub struct Requests {
    /// In the order in which they were scheduled.
    pub served: Vec<Served>,
    /// The engine's name of each request, in the same order.
    pub names: Vec<Label>,
    /// Lines that said again what another line had said.
    pub duplicates: u64,
    /// Lines that were no rows.
    pub refused: u64,
    /// The first of them: its number and what is wrong with it.
    pub first_refused: Option<(u64, String)>,
    /// Requests for which nobody is named, when names were given.
    pub without_context: u64,
}

/// Reads `vllm-timeline` lines with the importer's own reader. `contexts` says who caused which request.
///
/// # Errors
/// When the file cannot be read, holds no row, or mixes clocks.
pub fn requests(
    file: &Path,
    contexts: Option<&BTreeMap<String, Context>>,
    bar: &indicatif::ProgressBar,
) -> anyhow::Result<Requests> {
    let settings = Settings {
        kind: ImportKind::VllmTimeline,
        name: file.file_stem().context("the file has no name")?.to_string_lossy().into_owned(),
        model: None,
        provider: None,
        pool: None,
    };
    let unreadable = || format!("cannot read {}", file.display());
    let rows = Rows::new(&settings, open(file)?).with_context(unreadable)?;
    let mut found = Requests::default();
    let mut kept: BTreeMap<(Label, Timestamp), (Served, Label)> = BTreeMap::new();
    bar.set_length(std::fs::metadata(file)?.len());
    let mut lines = Lines::new(open(file)?);
    while let Some(line) = lines.next_line().with_context(unreadable)? {
        bar.inc(line.bytes);
        let read = match &line.text {
            Ok(text) if text.trim().is_empty() => continue,
            // Ids of their own: the same line has the same id wherever it stands, and however often.
            Ok(text) => rows.row(text, &mut Ids::default()),
            Err(reason) => Err(reason.clone()),
        };
        let attempt = match read {
            Ok(attempt) => attempt,
            Err(reason) => {
                found.refused += 1;
                found.first_refused.get_or_insert((line.number, reason));
                continue;
            }
        };
        let name = attempt.route.response_id.clone().unwrap_or_default();
        check_clocks(file, line.number, &name, &attempt)?;
        let context = match contexts {
            Some(contexts) => contexts.get(&*name).cloned(),
            None => Some(Context::default()),
        };
        found.without_context += u64::from(context.is_none());
        let one = served(&attempt, context.unwrap_or_default());
        match kept.entry((name.clone(), attempt.timeline.received_at)) {
            Entry::Vacant(place) => {
                place.insert((one, name));
            }
            Entry::Occupied(mut place) => {
                found.duplicates += 1;
                // Of two observations the one that got further holds; which line came first does not matter.
                if progress(&one) > progress(&place.get().0) {
                    place.insert((one, name));
                }
            }
        }
    }
    bar.finish_and_clear();
    if kept.is_empty() {
        match found.first_refused {
            Some((number, reason)) => {
                bail!("{} holds no vllm-timeline row; line {number}: {reason}", file.display())
            }
            None => bail!("{} is empty", file.display()),
        }
    }
    let mut all: Vec<(Served, Label)> = kept.into_values().collect();
    all.sort_by_key(|(one, _)| (one.timeline.scheduled, one.attempt));
    (found.served, found.names) = all.into_iter().unzip();
    Ok(found)
}

fn progress(one: &Served) -> (Timestamp, u32, u32, Timestamp, Timestamp, Timestamp) {
    let at = &one.timeline;
    (at.last_token, at.output_tokens, at.input_tokens, at.first_token, at.scheduled, at.arrived)
}

fn served(attempt: &Attempt, context: Context) -> Served {
    let timeline = &attempt.timeline;
    let at = |after: Option<u64>| {
        let micros = i64::try_from(after.unwrap_or(0)).unwrap_or(i64::MAX);
        Timestamp::from_micros(timeline.received_at.micros().saturating_add(micros))
    };
    let tokens = |count: u64| u32::try_from(count).unwrap_or(u32::MAX);
    let last_token = at(timeline.last_token_us);
    Served {
        attempt: attempt.id,
        context,
        engine: ENGINE.into(),
        timeline: EngineTimeline {
            arrived: at(timeline.sent_us),
            scheduled: at(timeline.sent_us.zip(timeline.queued_us).map(|(sent, queued)| sent.saturating_add(queued))),
            first_token: at(timeline.first_token_us),
            last_token,
            input_tokens: tokens(attempt.usage.input_tokens()),
            cached_tokens: 0,
            output_tokens: tokens(attempt.usage.output_tokens()),
        }
        .ordered(),
        known: Known::Timeline,
        adapter: None,
        estimated: false,
        observed_at: last_token,
    }
}

/// One offset maps the engine's clock onto the wall. Where it cannot, the times mean nothing.
fn check_clocks(file: &Path, line: u64, name: &str, attempt: &Attempt) -> anyhow::Result<()> {
    let at = || format!("{} line {line}, request `{name}`", file.display());
    if attempt.timeline.received_at.micros() > WALL_CLOCK_US_MAX {
        bail!("{}: arrival_time lies after the year 2100; is it in milliseconds? It has to be in seconds", at());
    }
    let handover_us = attempt.timeline.sent_us.unwrap_or(0);
    if handover_us > HANDOVER_US_MAX {
        bail!(
            "{}: queued_ts is {} h after arrival_time where others were queued at once; the lines mix the clocks of several \
             engine processes, so allocate them one at a time",
            at(),
            handover_us / HANDOVER_US_MAX
        );
    }
    Ok(())
}

/// Reads who caused which request: CSV with the column `request_id` and any of the context's fields.
///
/// # Errors
/// When the file cannot be read or names a field that is none.
pub fn contexts(file: &Path) -> anyhow::Result<BTreeMap<String, Context>> {
    let shown = file.display();
    let mut reader = csv::Reader::from_reader(open(file)?);
    let headings = reader.headers().with_context(|| format!("cannot read {shown}"))?.clone();
    let Some(id) = headings.iter().position(|heading| heading == "request_id") else {
        bail!("{shown} has no column `request_id`");
    };
    for heading in headings.iter().filter(|heading| *heading != "request_id") {
        if field(&mut Context::default(), heading).is_none() {
            bail!("{shown}: `{heading}` is no field of a context; known are {}", FIELDS.join(", "));
        }
    }
    let mut contexts = BTreeMap::new();
    for row in reader.records() {
        let row = row.with_context(|| format!("cannot read {shown}"))?;
        let mut context = Context::default();
        for (heading, value) in headings.iter().zip(&row).filter(|(_, value)| !value.is_empty()) {
            if let Some(place) = field(&mut context, heading) {
                *place = Some(value.into());
            }
        }
        contexts.insert(row.get(id).unwrap_or_default().to_owned(), context);
    }
    Ok(contexts)
}

const FIELDS: [&str; 8] =
    ["consumer", "application", "team", "cost_centre", "customer", "feature", "task", "environment"];

fn field<'a>(context: &'a mut Context, name: &str) -> Option<&'a mut Option<Label>> {
    Some(match name {
        "consumer" => &mut context.consumer,
        "application" => &mut context.application,
        "team" => &mut context.team,
        "cost_centre" => &mut context.cost_centre,
        "customer" => &mut context.customer,
        "feature" => &mut context.feature,
        "task" => &mut context.task,
        "environment" => &mut context.environment,
        _ => return None,
    })
}

/// The engine's own settings, as a benchmark writes them beside its run.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Meta {
    /// The model's name.
    pub model: Option<String>,
    /// When the run, and with it the series, started.
    pub started_at: Option<Timestamp>,
    /// Limits of sequences and of a step.
    pub engine_kwargs: EngineSettings,
    /// The cache as the engine made it.
    pub kv_cache: KvCache,
}

/// What the engine was told.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct EngineSettings {
    /// Requests that run at once.
    pub max_num_seqs: Option<u32>,
    /// New tokens of one step.
    pub max_num_batched_tokens: Option<u32>,
}

/// The cache as the engine made it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct KvCache {
    /// Tokens that fit.
    pub num_kv_tokens: Option<u64>,
    /// Tokens of a block.
    pub block_size: Option<u32>,
}

/// Reads the engine's settings.
///
/// # Errors
/// When the file is no such JSON document.
pub fn meta(file: &Path) -> anyhow::Result<Meta> {
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
    let meta: Meta = serde_json::from_str(&text)
        .with_context(|| format!("{} is no description of an engine's run", file.display()))?;
    let Meta { model, started_at, engine_kwargs: engine, kv_cache: cache } = &meta;
    let numbers = [engine.max_num_seqs, engine.max_num_batched_tokens, cache.block_size];
    let said = model.is_some() || started_at.is_some() || cache.num_kv_tokens.is_some();
    if !said && numbers.iter().all(Option::is_none) {
        bail!("{} says none of `model`, `started_at`, `engine_kwargs`, `kv_cache`", file.display());
    }
    Ok(meta)
}

/// Reads the engine's own series: CSV with `t` and any of `running`, `waiting`, `kv_cache_pct`. `t` counts seconds from
/// `start`, or from 1970.
///
/// # Errors
/// When the file cannot be read, lacks its columns, or counts from a start that is not known.
pub fn series(file: &Path, start: Option<Timestamp>) -> anyhow::Result<Vec<(Timestamp, EngineSample)>> {
    let shown = file.display();
    let mut reader = csv::Reader::from_reader(open(file)?);
    let headings = reader.headers().with_context(|| format!("cannot read {shown}"))?.clone();
    let place = |name: &str| headings.iter().position(|heading| heading == name);
    let Some(t) = place("t") else { bail!("{shown} has no column `t`") };
    let columns = [place("running"), place("waiting"), place("kv_cache_pct")];
    if columns.iter().all(Option::is_none) {
        bail!("{shown} has none of the columns `running`, `waiting`, `kv_cache_pct`");
    }
    let mut samples = Vec::new();
    for (number, row) in (2u64..).zip(reader.records()) {
        let row = row.with_context(|| format!("cannot read {shown}"))?;
        let cell = |place: usize| row.get(place).and_then(|cell| cell.trim().parse::<f64>().ok());
        let seconds = cell(t).filter(|t| t.is_finite() && *t >= 0.0 && *t < 1e11);
        let Some(seconds) = seconds else { bail!("{shown} line {number}: `t` is not a time in seconds") };
        let [running, waiting, kv] = columns.map(|place| place.and_then(cell));
        let is_wall_clock = seconds >= 946_684_800.0;
        let base = match start {
            _ if is_wall_clock => Timestamp::from_micros(0),
            Some(start) => start,
            None => bail!("{shown} counts `t` from a start that it does not name; give --series-start or --meta"),
        };
        let at = base.plus_micros(micros(seconds));
        samples.push((at, EngineSample { at_s: 0.0, running, waiting, kv_used: kv.map(|percent| percent / 100.0) }));
    }
    Ok(samples)
}

#[expect(clippy::cast_possible_truncation, reason = "below 1e11 seconds")]
fn micros(seconds: f64) -> i64 {
    (seconds * 1e6).round() as i64
}

fn open(file: &Path) -> anyhow::Result<BufReader<File>> {
    crate::import::open(file)
}
