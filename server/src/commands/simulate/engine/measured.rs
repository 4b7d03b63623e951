//! What a load is read from: recorded requests, with or without the times that a real engine took, and benchmarks.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail};
use fleet::sim::engine::Load;
use fleet::sim::engine::calibrate::Point;
use fleet::sim::trace::{Trace, TraceOptions};
use fleet::sim::{Arrival, Done, Prefixes};
use ledger::Attempt;

use crate::cli::ImportKind;
use crate::import::lines::Lines;
use crate::import::vllm_timeline::Rows;
use crate::import::{Ids, Settings, open};

/// Requests of a file in the order in which they arrived; the first one arrives at 0.
#[derive(Debug, Clone)]
pub struct Recorded {
    /// The requests.
    pub arrivals: Vec<Arrival>,
    /// What their prompts have in common.
    pub prefixes: Arc<Prefixes>,
    /// What a real engine made of them, in the same order, if the file says.
    pub measured: Vec<Done>,
    /// Lines that were no requests, and the first of them.
    pub refused: Option<(u64, String)>,
}

/// Reads a timeline of vLLM, or else a trace.
///
/// # Errors
/// One line on what is wrong with the file.
pub fn recorded(file: &Path) -> anyhow::Result<Recorded> {
    match timeline(file)? {
        Some(recorded) => Ok(recorded),
        None => trace(file),
    }
}

/// `None` when no line is of a timeline.
fn timeline(file: &Path) -> anyhow::Result<Option<Recorded>> {
    let unreadable = || format!("cannot read {}", file.display());
    let settings =
        Settings { kind: ImportKind::VllmTimeline, name: String::new(), model: None, provider: None, pool: None };
    let rows = Rows::new(&settings, open(file)?).with_context(unreadable)?;
    let mut refused = None;
    let mut attempts: Vec<Attempt> = Vec::new();
    let mut known = BTreeSet::new();
    let mut lines = Lines::new(open(file)?);
    while let Some(line) = lines.next_line().with_context(unreadable)? {
        let read = match &line.text {
            Ok(text) if text.trim().is_empty() => continue,
            // Ids of their own: the same line has the same id, and is one request.
            Ok(text) => rows.row(text, &mut Ids::default()),
            Err(reason) => Err(reason.clone()),
        };
        match read {
            Ok(attempt) if known.insert(attempt.id) => attempts.push(attempt),
            Ok(_) => {}
            Err(reason) => {
                refused.get_or_insert((line.number, reason));
            }
        }
    }
    attempts.sort_by_key(|attempt| (attempt.timeline.received_at, attempt.id));
    let Some(start) = attempts.first().map(|attempt| attempt.timeline.received_at) else { return Ok(None) };
    let measured: Vec<Done> = (0u64..)
        .zip(&attempts)
        .map(|(id, attempt)| {
            let at = &attempt.timeline;
            let at_us = at.received_at.micros_since(start);
            let after = |us: Option<u64>| at_us.saturating_add(us.unwrap_or(0));
            let tokens = |count: u64| u32::try_from(count).unwrap_or(u32::MAX).max(1);
            let arrival = Arrival {
                id,
                at_us,
                input_tokens: tokens(attempt.usage.input_tokens()),
                output_tokens: tokens(attempt.usage.output_tokens()),
                ..Arrival::default()
            };
            Done {
                arrival,
                scheduled_us: after(at.sent_us.zip(at.queued_us).map(|(sent, queued)| sent.saturating_add(queued))),
                first_token_us: after(at.first_token_us),
                last_token_us: after(at.last_token_us),
                ..Done::default()
            }
        })
        .collect();
    let arrivals = measured.iter().map(|one| one.arrival).collect();
    Ok(Some(Recorded { arrivals, prefixes: Arc::default(), measured, refused }))
}

fn trace(file: &Path) -> anyhow::Result<Recorded> {
    let trace = Trace::open(file, &TraceOptions::default())?;
    let mut arrivals = trace.arrivals()?.collect::<Result<Vec<Arrival>, _>>()?;
    let Some(start_us) = arrivals.first().map(|arrival| arrival.at_us) else {
        bail!("{} holds no request", file.display());
    };
    arrivals.iter_mut().for_each(|arrival| arrival.at_us -= start_us);
    Ok(Recorded { arrivals, prefixes: Arc::clone(trace.prefixes()), measured: Vec::new(), refused: None })
}

/// Reads benchmarks at several rates: CSV with a column `rps` and any of those that [`Point`] compares, under the names that
/// published results of `vllm bench serve` use. `load` says how long the requests were and how many.
///
/// # Errors
/// One line on what is wrong with the file.
pub fn benchmarks(file: &Path, load: &Load) -> anyhow::Result<Vec<Point>> {
    let shown = file.display();
    let mut reader = csv::Reader::from_reader(open(file)?);
    let headings = reader.headers().with_context(|| format!("cannot read {shown}"))?.clone();
    let place = |name: &str| headings.iter().position(|heading| heading.trim() == name);
    let Some(rate) = place("rps") else { bail!("{shown} has no column `rps` with the requests a second") };
    let columns = |names: &[&str]| names.iter().map(|name| place(name)).collect::<Vec<_>>();
    let [ttft, tpot, e2e] = [
        columns(&["ttft_mean_ms", "ttft_p50_ms", "ttft_p99_ms"]),
        columns(&["tpot_p50_ms", "tpot_p90_ms"]),
        columns(&["e2el_p50_ms", "e2el_p99_ms"]),
    ];
    let tps = place("tps_output");
    if tps.is_none() && [&ttft, &tpot, &e2e].iter().all(|columns| columns.iter().all(Option::is_none)) {
        bail!("{shown} has none of the columns tps_output, ttft_p50_ms, tpot_p50_ms, e2el_p50_ms, …");
    }
    let mut points = Vec::new();
    for (number, row) in (2u64..).zip(reader.records()) {
        let row = row.with_context(|| format!("cannot read {shown}"))?;
        let cell = |place: Option<usize>| row.get(place?)?.trim().parse::<f64>().ok().filter(|value| *value > 0.0);
        let Some(requests_per_s) = cell(Some(rate)).filter(|rate| rate.is_finite()) else {
            bail!("{shown} line {number}: `rps` is not a number above 0");
        };
        points.push(Point {
            load: Load { requests_per_s, ..*load },
            tps_output: cell(tps),
            ttft_ms: [cell(ttft[0]), cell(ttft[1]), cell(ttft[2])],
            tpot_ms: [cell(tpot[0]), cell(tpot[1])],
            e2e_ms: [cell(e2e[0]), cell(e2e[1])],
        });
    }
    points.sort_by(|a, b| a.load.requests_per_s.total_cmp(&b.load.requests_per_s));
    if points.is_empty() {
        bail!("{shown} holds no row");
    }
    Ok(points)
}
