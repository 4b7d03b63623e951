//! Each request's seconds of its engine, from the requests' files to files: what DuckDB and Polars are asked for as well.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, Float64Array, Int64Array, RecordBatch};
use bench::clock::now;
use bench::month::ENGINES;
use bench::process::own_peak_bytes;
use ledger::Timestamp;
use ledger::allocate::sweep::Sweep;
use ledger::step::Work;
use serde_json::{Value, json};
use store::parquet::Writer;

use super::files::{on_each_pool, read};
use super::{Failure, limits, replica};

const ROWS: usize = 65_536;

/// Divides the time of every engine among its requests, a pool on each thread.
pub fn run(dir: &Path) -> Result<Value, Failure> {
    let begin = now();
    let counts = on_each_pool(|pool| run_pool(dir, pool))?;
    let (requests, seconds) = (counts.iter().sum::<u64>(), begin.elapsed().as_secs_f64());
    Ok(json!({
        "requests": requests, "seconds": seconds, "requests_per_s": requests as f64 / seconds,
        "peak_bytes": own_peak_bytes(),
    }))
}

fn run_pool(dir: &Path, pool: u32) -> Result<u64, Failure> {
    let mut sweeps: Vec<Sweep> =
        (0..ENGINES).map(|_| Sweep::new(replica(), limits(), Timestamp::from_micros(0))).collect();
    let mut rows = Rows::default();
    let file = File::create(dir.join(format!("farthing-{pool}.parquet")))?;
    let mut writer = Writer::create(file, rows.take()?.schema())?;
    let mut written = 0;
    read(dir, pool, |engine, request| {
        sweeps[engine as usize].push(request.tag, &request.timeline, &mut |part| {
            rows.add(part.tag, part.share.total_s());
        });
        if rows.request.len() >= ROWS {
            written += rows.request.len() as u64;
            writer.write(&rows.take()?)?;
        }
        Ok(())
    })?;
    for sweep in &mut sweeps {
        sweep.finish(&mut |part| rows.add(part.tag, part.share.total_s()));
    }
    written += rows.request.len() as u64;
    writer.write(&rows.take()?)?;
    writer.finish()?;
    Ok(written)
}

#[derive(Debug, Default)]
struct Rows {
    request: Vec<i64>,
    seconds: Vec<f64>,
}

impl Rows {
    fn add(&mut self, tag: u64, seconds: f64) {
        self.request.push(tag.cast_signed());
        self.seconds.push(seconds);
    }

    fn take(&mut self) -> Result<RecordBatch, Failure> {
        let Rows { request, seconds } = std::mem::take(self);
        let request: ArrayRef = Arc::new(Int64Array::from(request));
        let seconds: ArrayRef = Arc::new(Float64Array::from(seconds));
        Ok(RecordBatch::try_from_iter([("request", request), ("seconds", seconds)])?)
    }
}

/// The constants of the step-time model as SQL needs them: seconds of a new token, of a pair of tokens, of reading a
/// cached token, of everything that a step has once; how far compute and memory overlap; new tokens that fit a step.
pub fn constants() -> Value {
    let replica = replica();
    let one = replica.demand(Work { new_tokens: 1, cached_tokens: 0 });
    let seen = replica.demand(Work { new_tokens: 1, cached_tokens: 1 });
    let pair_s = seen.compute_s - one.compute_s;
    let fixed = replica.fixed(0.0);
    json!({
        "alpha": one.compute_s - pair_s / 2.0, "beta": pair_s, "gamma": seen.memory_s,
        "overhead": fixed.overhead_s, "weights": fixed.weights_s, "overlap": fixed.overlap,
        "step_tokens": limits().step_tokens_max,
    })
}
