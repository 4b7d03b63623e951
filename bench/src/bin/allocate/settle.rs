//! A month's settlement: every minute of every engine is divided among its requests to the picodollar, a pool on each core.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::{ArrayRef, Decimal128Array, Float64Array, Int8Array, Int32Array, Int64Array, RecordBatch};
use bench::clock::now;
use bench::month::{ENGINES, Engine};
use bench::process::own_peak_bytes;
use ledger::allocate::stream::{Owed, Stream, Whose};
use ledger::{GpuHourRate, Money, Timestamp};
use serde_json::{Value, json};
use store::parquet::Writer;

use super::files::{bytes_of, engines_of, on_each_pool, read};
use super::sweep::BLOCK;
use super::{Failure, limits, replica};

/// 2.99 USD an hour, which is no whole number of picodollars a minute.
const RATE: GpuHourRate = GpuHourRate::from_pico(2_990_000_000_000);
const MINUTE_US: u64 = 60_000_000;
const ROWS: usize = 65_536;

/// Settles requests that are made meanwhile, outside of the measured time; what is owed is added up and checked.
pub fn in_memory(seed: u64, requests: u64) -> Result<Value, Failure> {
    let begin = now();
    let found = on_each_pool(|pool| {
        let (mut took, mut block, mut all) = (Duration::ZERO, Vec::with_capacity(BLOCK), Books::default());
        for number in engines_of(pool) {
            let (mut engine, mut stream, mut books) =
                (Engine::new(seed, number, requests), new_stream(), Books::default());
            let mut last = Timestamp::from_micros(0);
            loop {
                engine.refill(&mut block);
                let started = now();
                for request in &block {
                    stream.push(request.tag, &request.timeline, &mut |owed| books.take(&owed))?;
                    last = last.max(request.timeline.last_token);
                }
                took += started.elapsed();
                if block.is_empty() {
                    break;
                }
            }
            let started = now();
            stream.finish(whole_minute(last), &mut |owed| books.take(&owed))?;
            took += started.elapsed();
            books.close(last)?;
            all.add(&books);
        }
        Ok((took, all))
    })?;
    let took = found.iter().map(|(took, _)| *took).max().unwrap_or_default();
    let mut all = Books::default();
    found.iter().for_each(|(_, books)| all.add(books));
    Ok(all.json(requests, took, &json!({"with_making_s": begin.elapsed().as_secs_f64()})))
}

/// Settles what [`files::write`](super::files::write) wrote, into files of postings.
pub fn with_files(dir: &Path) -> Result<Value, Failure> {
    let begin = now();
    let found = on_each_pool(|pool| settle_file(dir, pool))?;
    let took = begin.elapsed();
    let (mut all, mut requests) = (Books::default(), 0);
    for (count, books) in &found {
        requests += count;
        all.add(books);
    }
    let (read_bytes, written_bytes) = (bytes_of(dir, "requests-")?, bytes_of(dir, "postings-")?);
    Ok(all.json(requests, took, &json!({"read_bytes": read_bytes, "written_bytes": written_bytes})))
}

fn settle_file(dir: &Path, pool: u32) -> Result<(u64, Books), Failure> {
    let mut engines: Vec<Settled> = (0..ENGINES).map(|_| Settled::new()).collect();
    let mut rows = Rows::default();
    let file = File::create(dir.join(format!("postings-{pool}.parquet")))?;
    let mut writer = Writer::create(file, rows.take()?.schema())?;
    let mut requests = 0;
    read(dir, pool, |number, request| {
        requests += 1;
        let engine = &mut engines[number as usize];
        engine.last = engine.last.max(request.timeline.last_token);
        let books = &mut engine.books;
        engine.stream.push(request.tag, &request.timeline, &mut |owed| {
            books.take(&owed);
            rows.add(number, &owed);
        })?;
        if rows.request.len() >= ROWS {
            writer.write(&rows.take()?)?;
        }
        Ok(())
    })?;
    let mut all = Books::default();
    for number in engines_of(pool) {
        let Settled { stream, mut books, last } = std::mem::replace(&mut engines[number as usize], Settled::new());
        stream.finish(whole_minute(last), &mut |owed| {
            books.take(&owed);
            rows.add(number, &owed);
        })?;
        books.close(last)?;
        all.add(&books);
        writer.write(&rows.take()?)?;
    }
    writer.finish()?;
    Ok((requests, all))
}

struct Settled {
    stream: Stream,
    books: Books,
    last: Timestamp,
}

impl Settled {
    fn new() -> Settled {
        Settled { stream: new_stream(), books: Books::default(), last: Timestamp::from_micros(0) }
    }
}

fn new_stream() -> Stream {
    Stream::new(replica(), limits(), 1, RATE, Timestamp::from_micros(0))
}

/// The end of the minute in which `at` lies.
fn whole_minute(at: Timestamp) -> Timestamp {
    let minute = MINUTE_US.cast_signed();
    Timestamp::from_micros((at.micros() + minute).div_euclid(minute) * minute)
}

/// What one engine's minutes add up to, each held against what it cost.
#[derive(Debug, Default)]
struct Books {
    minute: Timestamp,
    within: Money,
    minutes: u64,
    wrong: u64,
    postings: u64,
    requests: Money,
    idle: Money,
}

impl Books {
    fn take(&mut self, owed: &Owed) {
        if owed.minute != self.minute {
            self.end_of_minute();
            // A minute that comes again, or none at all, is as wrong as one that does not add up.
            self.wrong += u64::from(owed.minute.micros() != self.minute.micros() + MINUTE_US.cast_signed());
            self.minute = owed.minute;
        }
        self.within += owed.amount;
        self.postings += 1;
        match owed.whose {
            Whose::Idle => self.idle += owed.amount,
            Whose::Request(_) | Whose::Waste => self.requests += owed.amount,
        }
    }

    fn end_of_minute(&mut self) {
        self.minutes += 1;
        self.wrong += u64::from(self.within != RATE.over(1, MINUTE_US));
        self.within = Money::ZERO;
    }

    /// # Errors
    /// When a minute is missing or does not add up.
    fn close(&mut self, last: Timestamp) -> Result<(), Failure> {
        self.end_of_minute();
        let expected = whole_minute(last).micros().unsigned_abs() / MINUTE_US;
        if self.wrong > 0 || self.minutes != expected {
            return Err(
                format!("{} of {} minutes ({expected} expected) do not add up", self.wrong, self.minutes).into()
            );
        }
        Ok(())
    }

    fn add(&mut self, other: &Books) {
        self.minutes += other.minutes;
        self.postings += other.postings;
        self.requests += other.requests;
        self.idle += other.idle;
    }

    fn json(&self, requests: u64, took: Duration, more: &Value) -> Value {
        let mut found = json!({
            "requests": requests, "seconds": took.as_secs_f64(),
            "requests_per_s": requests as f64 / took.as_secs_f64(),
            "postings": self.postings, "engine_minutes": self.minutes, "closed": true,
            "requests_usd": self.requests.to_string(), "idle_usd": self.idle.to_string(),
            "peak_bytes": own_peak_bytes(),
        });
        for (key, value) in more.as_object().into_iter().flatten() {
            found[key] = value.clone();
        }
        found
    }
}

#[derive(Debug, Default)]
struct Rows {
    request: Vec<Option<i64>>,
    line: Vec<i8>,
    engine: Vec<i32>,
    minute: Vec<i64>,
    seconds: Vec<f64>,
    amount: Vec<i128>,
}

impl Rows {
    fn add(&mut self, engine: u32, owed: &Owed) {
        let (request, line) = match owed.whose {
            Whose::Request(tag) => (Some(tag.cast_signed()), 0),
            Whose::Waste => (None, 1),
            Whose::Idle => (None, 2),
        };
        self.request.push(request);
        self.line.push(line);
        self.engine.push(engine.cast_signed());
        self.minute.push(owed.minute.micros());
        self.seconds.push(owed.seconds);
        self.amount.push(owed.amount.pico());
    }

    fn take(&mut self) -> Result<RecordBatch, Failure> {
        let Rows { request, line, engine, minute, seconds, amount } = std::mem::take(self);
        let amount = Decimal128Array::from(amount).with_precision_and_scale(38, 12)?;
        let columns: [(&str, ArrayRef); 6] = [
            ("request", Arc::new(Int64Array::from(request))),
            ("line", Arc::new(Int8Array::from(line))),
            ("engine", Arc::new(Int32Array::from(engine))),
            ("minute_us", Arc::new(Int64Array::from(minute))),
            ("seconds", Arc::new(Float64Array::from(seconds))),
            ("amount_usd", Arc::new(amount)),
        ];
        // A file whose first rows all have a request must still take those that have none.
        let fields = columns
            .iter()
            .map(|(name, column)| arrow::datatypes::Field::new(*name, column.data_type().clone(), *name == "request"));
        let schema = Arc::new(arrow::datatypes::Schema::new(fields.collect::<Vec<_>>()));
        Ok(RecordBatch::try_new(schema, columns.into_iter().map(|(_, column)| column).collect())?)
    }
}
