//! Measured material for tests: read where it is present, skipped loudly where it is not.

use std::path::PathBuf;

use super::timeline::{EngineTimeline, whole_micros};
use crate::time::Timestamp;

/// The folder named by `FARTHING_DATA`, else `shared/data` beside the checkout.
pub(crate) fn folder() -> Option<PathBuf> {
    let beside = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/data");
    let folder = std::env::var_os("FARTHING_DATA").map_or_else(beside, PathBuf::from);
    if folder.is_dir() {
        return Some(folder);
    }
    println!("SKIPPED: no measured material in {}; set FARTHING_DATA to its folder", folder.display());
    None
}

/// A comma-separated file as rows of (heading, value).
pub(crate) fn table(path: &str) -> Option<Vec<std::collections::BTreeMap<String, String>>> {
    let path = folder()?.join(path);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut lines = text.lines();
    let headings: Vec<&str> = lines.next().unwrap().split(',').collect();
    Some(
        lines
            .map(|line| headings.iter().map(|&h| h.to_owned()).zip(line.split(',').map(str::to_owned)).collect())
            .collect(),
    )
}

/// One run of a real engine: its requests and its own series.
pub(crate) struct Run {
    pub timelines: Vec<EngineTimeline>,
    /// When each sample was taken, and the engine's own running, waiting and KV use in percent.
    pub samples: Vec<(Timestamp, f64, f64, f64)>,
}

/// Reads a folder of `vllm-runs`. The requests' clock is the engine's monotonic one, the samples count seconds from the
/// start of the run; the request that was queued soonest after its arrival ties both to the wall clock.
pub(crate) fn run(name: &str) -> Option<Run> {
    let folder = folder()?.join("vllm-runs").join(name);
    let read = |file: &str| {
        std::fs::read_to_string(folder.join(file)).unwrap_or_else(|error| panic!("{name}/{file}: {error}"))
    };
    let meta: serde_json::Value = serde_json::from_str(&read("meta.json")).unwrap();
    let rows: Vec<serde_json::Value> =
        read("requests.jsonl").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let seconds = |row: &serde_json::Value, key: &str| row[key].as_f64().unwrap();
    let ahead =
        rows.iter().map(|row| seconds(row, "arrival_time") - seconds(row, "queued_ts")).fold(f64::MIN, f64::max);
    let at = |row: &serde_json::Value, key: &str| Timestamp::from_micros(whole_micros(seconds(row, key) + ahead));
    let tokens = |row: &serde_json::Value, key: &str| u32::try_from(row[key].as_u64().unwrap()).unwrap();
    let timelines = rows
        .iter()
        .map(|row| EngineTimeline {
            arrived: at(row, "queued_ts"),
            scheduled: at(row, "scheduled_ts"),
            first_token: at(row, "first_token_ts"),
            last_token: at(row, "last_token_ts"),
            input_tokens: tokens(row, "input_toks"),
            cached_tokens: 0,
            output_tokens: tokens(row, "output_toks"),
        })
        .collect();
    let started: Timestamp = meta["started_at"].as_str().unwrap().parse().unwrap();
    let samples = table(&format!("vllm-runs/{name}/timeseries.csv"))?
        .iter()
        .map(|row| {
            let value = |key: &str| row[key].parse::<f64>().unwrap();
            let at = started.plus_micros(whole_micros(value("t")));
            (at, value("running"), value("waiting"), value("kv_cache_pct"))
        })
        .collect();
    Some(Run { timelines, samples })
}
