//! The requests as Parquet, one file for each pool, its engines mixed in the order in which their requests were scheduled.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Int32Array, Int64Array, RecordBatch};
use arrow::datatypes::{Int32Type, Int64Type};
use bench::clock::now;
use bench::month::{ENGINES, Engine, Request};
use ledger::Timestamp;
use ledger::allocate::timeline::EngineTimeline;
use serde_json::{Value, json};
use store::parquet::{Reader, Writer};

use super::{Failure, POOLS};

const ROWS: usize = 65_536;

/// The file of a pool's requests.
pub fn requests_file(dir: &Path, pool: u32) -> PathBuf {
    dir.join(format!("requests-{pool}.parquet"))
}

/// Writes the requests of all pools, each on its own thread.
pub fn write(seed: u64, requests: u64, dir: &Path) -> Result<Value, Failure> {
    let begin = now();
    let rows = on_each_pool(|pool| write_pool(seed, requests, pool, dir))?;
    let bytes = bytes_of(dir, "requests-")?;
    Ok(json!({"requests": rows.iter().sum::<u64>(), "seconds": begin.elapsed().as_secs_f64(), "bytes": bytes}))
}

/// Runs the same work for every pool at once, each on a thread of its own.
pub fn on_each_pool<T: Send>(work: impl Fn(u32) -> Result<T, Failure> + Sync) -> Result<Vec<T>, Failure> {
    let work = &work;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..POOLS).map(|pool| scope.spawn(move || work(pool))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err("a thread died".into()))).collect()
    })
}

/// The engines of a pool.
pub fn engines_of(pool: u32) -> impl Iterator<Item = u32> {
    (0..ENGINES).filter(move |engine| engine % POOLS == pool)
}

/// Bytes of the files in `dir` whose names begin so.
pub fn bytes_of(dir: &Path, prefix: &str) -> Result<u64, Failure> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            bytes += entry.metadata()?.len();
        }
    }
    Ok(bytes)
}

fn write_pool(seed: u64, requests: u64, pool: u32, dir: &Path) -> Result<u64, Failure> {
    let mut engines: Vec<(u32, Engine)> =
        engines_of(pool).map(|number| (number, Engine::new(seed, number, requests))).collect();
    let mut heads: Vec<Option<Request>> = engines.iter_mut().map(|(_, engine)| engine.next()).collect();
    let mut rows = Rows::default();
    let mut writer = Writer::create(File::create(requests_file(dir, pool))?, Rows::default().batch()?.schema())?;
    let mut written = 0;
    loop {
        let first = (0..heads.len())
            .filter_map(|index| Some((heads[index]?.timeline.scheduled, index)))
            .min()
            .map(|(_, index)| index);
        let Some(index) = first else { break };
        if let Some(request) = std::mem::replace(&mut heads[index], engines[index].1.next()) {
            rows.add(engines[index].0, &request);
            written += 1;
        }
        if rows.request.len() == ROWS {
            writer.write(&std::mem::take(&mut rows).batch()?)?;
        }
    }
    writer.write(&rows.batch()?)?;
    writer.finish()?;
    Ok(written)
}

#[derive(Debug, Default)]
struct Rows {
    request: Vec<i64>,
    engine: Vec<i32>,
    times: [Vec<i64>; 4],
    tokens: [Vec<i32>; 3],
}

impl Rows {
    fn add(&mut self, engine: u32, request: &Request) {
        let EngineTimeline { arrived, scheduled, first_token, last_token, input_tokens, cached_tokens, output_tokens } =
            request.timeline;
        self.request.push(i64::try_from(request.tag).unwrap_or(i64::MAX));
        self.engine.push(engine.cast_signed());
        for (column, at) in self.times.iter_mut().zip([arrived, scheduled, first_token, last_token]) {
            column.push(at.micros());
        }
        for (column, tokens) in self.tokens.iter_mut().zip([input_tokens, cached_tokens, output_tokens]) {
            column.push(tokens.cast_signed());
        }
    }

    fn batch(self) -> Result<RecordBatch, Failure> {
        let long = |values: Vec<i64>| -> ArrayRef { Arc::new(Int64Array::from(values)) };
        let short = |values: Vec<i32>| -> ArrayRef { Arc::new(Int32Array::from(values)) };
        let mut columns = vec![("request", long(self.request)), ("engine", short(self.engine))];
        let times = ["arrived_us", "scheduled_us", "first_token_us", "last_token_us"];
        columns.extend(times.into_iter().zip(self.times.map(long)));
        columns.extend(["input_tokens", "cached_tokens", "output_tokens"].into_iter().zip(self.tokens.map(short)));
        Ok(RecordBatch::try_from_iter(columns)?)
    }
}

/// Reads a pool's requests in the order of the file.
pub fn read(dir: &Path, pool: u32, mut each: impl FnMut(u32, Request) -> Result<(), Failure>) -> Result<(), Failure> {
    for batch in Reader::open(File::open(requests_file(dir, pool))?)? {
        let batch = batch?;
        let longs: Vec<&[i64]> =
            [0, 2, 3, 4, 5].iter().map(|&at| &batch.column(at).as_primitive::<Int64Type>().values()[..]).collect();
        let shorts: Vec<&[i32]> =
            [1, 6, 7, 8].iter().map(|&at| &batch.column(at).as_primitive::<Int32Type>().values()[..]).collect();
        for row in 0..batch.num_rows() {
            let at = |column: usize| Timestamp::from_micros(longs[column][row]);
            let count = |column: usize| shorts[column][row].cast_unsigned();
            let timeline = EngineTimeline {
                arrived: at(1),
                scheduled: at(2),
                first_token: at(3),
                last_token: at(4),
                input_tokens: count(1),
                cached_tokens: count(2),
                output_tokens: count(3),
            };
            each(count(0), Request { tag: longs[0][row].cast_unsigned(), timeline })?;
        }
    }
    Ok(())
}
