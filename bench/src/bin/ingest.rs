//! How many attempts a second go through append, flush and Delta, with the log synced all the while, and how long an append takes.
//!
//! `cargo run --release -p bench --bin ingest -- [--seconds 20] [--rate 0] [--dir FOLDER]`. `--rate` paces the appends (attempts a
//! second), 0 is as fast as it goes. The last line is what counts: attempts that are in the tables per second from the first append
//! to the end of the last flush.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ledger::{
    Attempt, AttemptId, Charge, Clock, Context, Fact, Operation, Outcome, RequestId, ResolvedRates, Route, Source,
    Timeline, Timestamp, TokenGaps, TokenKind, TokenPrice, TokenUsage, UnpricedReason, UsageQuality,
};
use store::{Options, Store};

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Unflushed records at which the appender waits, so that the rate is that of the whole path and not of the log alone.
const LAG_MAX: u64 = 400_000;

struct Arguments {
    seconds: u64,
    rate: u64,
    dir: Option<PathBuf>,
}

#[derive(Debug)]
struct SystemClock {
    start: Instant,
}

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        wall_clock()
    }

    fn monotonic_us(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

fn main() -> Result<(), Failure> {
    let arguments = arguments()?;
    let temporary = tempfile::tempdir()?;
    let dir = arguments.dir.clone().unwrap_or_else(|| temporary.path().join("ledger"));
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(run(&arguments, &dir))
}

async fn run(arguments: &Arguments, dir: &Path) -> Result<(), Failure> {
    let unpriced = |_: &ledger::Opened, _: &TokenUsage| Charge::Unpriced { reason: UnpricedReason::NoUsage };
    let (store, _) = Store::open(dir, Options::default(), wall_clock(), &unpriced).await?;
    let clock: Arc<dyn Clock> = Arc::new(SystemClock { start: instant() });
    let flusher = store.spawn_flusher(Arc::clone(&clock), Duration::from_secs(2))?;

    let appending = store.clone();
    let (seconds, rate) = (arguments.seconds, arguments.rate);
    let measured = tokio::task::spawn_blocking(move || append_for(&appending, seconds, rate)).await??;
    let appended_us = measured.took.as_micros();
    let begin = instant();
    tokio::task::spawn_blocking(move || flusher.stop()).await??;
    let draining = begin.elapsed();

    let rows = store.sql("SELECT count(*) FROM attempts").await?;
    let in_tables = rows.first().map_or(0, |batch| {
        arrow::array::AsArray::as_primitive::<arrow::datatypes::Int64Type>(batch.column(0)).value(0)
    });
    if u64::try_from(in_tables)? != measured.attempts {
        return Err(format!("{} attempts were appended and {in_tables} are in the tables", measured.attempts).into());
    }
    let whole = measured.took + draining;
    let mut out = std::io::stdout().lock();
    writeln!(out, "machine              {}", machine())?;
    writeln!(out, "profile              {}", if cfg!(debug_assertions) { "dev" } else { "release" })?;
    writeln!(out, "attempts             {}", measured.attempts)?;
    writeln!(out, "appending            {:.1} s", appended_us as f64 / 1e6)?;
    writeln!(out, "last flush           {:.1} s", draining.as_secs_f64())?;
    writeln!(out, "append p50           {:.1} us", percentile(&measured.latencies_ns, 50))?;
    writeln!(out, "append p99           {:.1} us", percentile(&measured.latencies_ns, 99))?;
    writeln!(
        out,
        "append p99.9         {:.1} us",
        f64::from(measured.latencies_ns[measured.latencies_ns.len() * 999 / 1_000]) / 1e3
    )?;
    writeln!(out, "on disk              {:.0} bytes an attempt", bytes_in(dir)? as f64 / measured.attempts as f64)?;
    writeln!(out, "log to Delta tables  {:.0} attempts/s", measured.attempts as f64 / whole.as_secs_f64())?;
    Ok(())
}

struct Measured {
    attempts: u64,
    took: Duration,
    latencies_ns: Vec<u32>,
}

fn append_for(store: &Store, seconds: u64, rate: u64) -> Result<Measured, Failure> {
    let template = template();
    let mut latencies_ns = Vec::new();
    let begin = instant();
    let mut attempts = 0u64;
    while begin.elapsed().as_secs() < seconds {
        let fact = Fact::Attempt(Box::new(nth(&template, attempts)));
        let before = instant();
        store.append(&fact)?;
        latencies_ns.push(u32::try_from(before.elapsed().as_nanos()).unwrap_or(u32::MAX));
        attempts += 1;
        // A rate of zero is as fast as it goes.
        if let Some(due_ns) = attempts.saturating_mul(1_000_000_000).checked_div(rate) {
            let due = Duration::from_nanos(due_ns);
            if let Some(wait) = due.checked_sub(begin.elapsed()).filter(|wait| wait.as_micros() > 200) {
                std::thread::sleep(wait);
            }
        }
        while attempts.is_multiple_of(1_000) && store.unflushed() > LAG_MAX {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    let took = begin.elapsed();
    latencies_ns.sort_unstable();
    Ok(Measured { attempts, took, latencies_ns })
}

/// An ordinary streamed chat attempt.
fn template() -> Attempt {
    let prices =
        [(TokenKind::Input, TokenPrice::from_pico(2_500_000)), (TokenKind::Output, TokenPrice::from_pico(10_000_000))];
    let rates = ResolvedRates::new("genai-prices@0.2.1", "openai/gpt-4o", &prices, 1_000_000);
    let usage = TokenUsage { input: 1_200, output: 240, ..TokenUsage::default() };
    let charge = match rates.charge(&usage) {
        Some(costs) => Charge::Priced { costs, rates },
        None => Charge::Unpriced { reason: UnpricedReason::UnknownRate },
    };
    Attempt {
        id: AttemptId { request: RequestId::new(wall_clock(), [0; 10]), number: 0 },
        source: Source::Gateway,
        context: Context {
            consumer: Some("key-of-search".into()),
            application: Some("search".into()),
            team: Some("discovery".into()),
            cost_centre: Some("4711".into()),
            feature: Some("answers".into()),
            task: Some("task-1".into()),
            environment: Some("production".into()),
            ..Context::default()
        },
        route: Route {
            operation: Operation::Chat,
            provider: "openai".into(),
            upstream: "openai".into(),
            request_model: Some("gpt-4o".into()),
            response_model: Some("gpt-4o-2024-08-06".into()),
            streamed: true,
            ..Route::default()
        },
        timeline: Timeline {
            admitted_us: Some(10),
            sent_us: Some(40),
            first_byte_us: Some(180_000),
            first_token_us: Some(181_000),
            last_token_us: Some(2_400_000),
            finished_us: 2_400_100,
            gaps: TokenGaps { count: 239, total_us: 2_219_000, max_us: 40_000 },
            ..Timeline::default()
        },
        outcome: Outcome::Completed,
        status: Some(200),
        usage,
        usage_quality: UsageQuality::Reported,
        charge,
    }
}

fn nth(template: &Attempt, number: u64) -> Attempt {
    let now = wall_clock();
    let mut random = [0u8; 10];
    random[2..].copy_from_slice(&number.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_be_bytes());
    let mut attempt = template.clone();
    attempt.id = AttemptId { request: RequestId::new(now, random), number: 0 };
    attempt.context.trace_id = Some(format!("{number:032x}").into());
    attempt.route.response_id = Some(format!("chatcmpl-{number:024x}").into());
    attempt.timeline.received_at = now;
    attempt
}

fn percentile(sorted_ns: &[u32], percent: usize) -> f64 {
    f64::from(sorted_ns[(sorted_ns.len() * percent / 100).min(sorted_ns.len() - 1)]) / 1e3
}

fn bytes_in(dir: &Path) -> std::io::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += if metadata.is_dir() { bytes_in(&entry.path())? } else { metadata.len() };
    }
    Ok(bytes)
}

/// What the numbers were measured on.
fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("\t: unknown processor");
    format!("{cores} cores, {}, {}", model.trim_start_matches(['\t', ' ', ':']), std::env::consts::OS)
}

fn arguments() -> Result<Arguments, Failure> {
    let mut arguments = Arguments { seconds: 20, rate: 0, dir: None };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let value = words.next().ok_or_else(|| format!("{word} needs a value"))?;
        match word.as_str() {
            "--seconds" => arguments.seconds = value.parse()?,
            "--rate" => arguments.rate = value.parse()?,
            "--dir" => arguments.dir = Some(value.into()),
            other => return Err(format!("unknown option {other}; there are --seconds, --rate and --dir").into()),
        }
    }
    Ok(arguments)
}

#[expect(clippy::disallowed_methods, reason = "a benchmark measures with the system's clocks")]
fn instant() -> Instant {
    Instant::now()
}

#[expect(clippy::disallowed_methods, reason = "a benchmark measures with the system's clocks")]
fn wall_clock() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp::from_micros(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
}
