//! How many requests a second one core attributes from timelines, with and without settling each minute, and how many parts
//! a second an amount is divided into.
//!
//! ```text
//! cargo run --release -p ledger --example sweep_speed
//! ```
//!
//! Requests of three minutes are repeated end to end, so that the number that runs at once stays what it is.

use std::io::Write;
use std::time::Instant;

use ledger::allocate::replica::Replica;
use ledger::allocate::stream::{Owed, Stream};
use ledger::allocate::sweep::{Belongs, Sweep};
use ledger::allocate::timeline::{EngineTimeline, Limits};
use ledger::step::{GpuSheet, ModelShape};
use ledger::{Money, Timestamp};

const REQUESTS: u64 = 3_000_000;
const LENGTH_US: i64 = 180_000_000;

#[expect(clippy::disallowed_methods, reason = "a measurement of speed needs the time")]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut out = std::io::stdout().lock();
    let replica = Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::RTX_4090, 1);
    let start = Timestamp::from_micros(0);
    let unlimited = Sweep::new(replica, Limits::default(), start);
    let limits = Limits { kv_tokens: Some(10_000.0), ..Limits::default() };
    for (name, sweep) in [
        ("unlimited cache", unlimited.clone()),
        ("cache of 10,000 tokens", Sweep::new(replica, limits, start)),
        ("fixed part by tenant", unlimited.clone().by_tenant()),
    ] {
        writeln!(out, "sweep, {name}: {}", swept(sweep))?;
    }
    writeln!(out, "settled by the minute: {}", settled(Stream::of(unlimited, 1, "0.69".parse()?, start))?)?;

    let weights: Vec<u64> = (0..140_000u64).map(|index| 1_000_000 + index * 7_919 % 1_000_003).collect();
    let started = Instant::now();
    let parts = Money::from_pico(2_500_000_000_000).split(&weights)?;
    writeln!(out, "exact split: {:.2} million parts/s", parts.len() as f64 / started.elapsed().as_secs_f64() / 1e6)?;
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "a measurement of speed needs the time")]
fn swept(mut sweep: Sweep) -> String {
    let (mut charged_s, mut active_max) = (0.0, 0);
    let started = Instant::now();
    for (tag, timeline) in endless() {
        let of = Belongs { tenant: u32::try_from(tag % 40).unwrap_or(0), adapter: None };
        sweep.push_of(tag, &timeline, of, &mut |part| charged_s += part.share.total_s() + part.waste_s);
        active_max = active_max.max(sweep.active());
    }
    sweep.finish(&mut |part| charged_s += part.share.total_s() + part.waste_s);
    let millions = REQUESTS as f64 / started.elapsed().as_secs_f64() / 1e6;
    format!(
        "{millions:.2} million requests/s, at most {active_max} held at once, {} preemptions, {charged_s:.0} s charged of {:.0}",
        sweep.preemptions(),
        sweep.busy_s()
    )
}

#[expect(clippy::disallowed_methods, reason = "a measurement of speed needs the time")]
fn settled(mut stream: Stream) -> Result<String, ledger::MoneyError> {
    let (mut amounts, mut sum, mut until) = (0u64, Money::ZERO, Timestamp::default());
    let mut count = |owed: Owed| {
        amounts += 1;
        sum += owed.amount;
    };
    let started = Instant::now();
    for (tag, timeline) in endless() {
        stream.push(tag, &timeline, &mut count)?;
        until = until.max(timeline.last_token);
    }
    let totals = stream.finish(until, &mut count)?;
    let millions = REQUESTS as f64 / started.elapsed().as_secs_f64() / 1e6;
    let closed = if totals.cost == sum { "closed" } else { "NOT CLOSED" };
    Ok(format!("{millions:.2} million requests/s, {amounts} amounts over {} minutes, {closed}", totals.minutes))
}

/// The requests of three minutes again and again, numbered.
fn endless() -> impl Iterator<Item = (u64, EngineTimeline)> {
    let batch = requests(300);
    let turns = (0..).flat_map(move |turn| {
        let moved: Vec<EngineTimeline> = batch.iter().map(|timeline| moved(timeline, LENGTH_US * turn)).collect();
        moved.into_iter()
    });
    (0..REQUESTS).zip(turns)
}

/// Requests spread over the first part of the three minutes, in the order of their schedule.
fn requests(count: u32) -> Vec<EngineTimeline> {
    let requests = (0..count).map(|index| {
        let (input_tokens, output_tokens) = (50 + index * 7_919 % 2_000, 20 + index * 104_729 % 400);
        let arrived = Timestamp::from_micros(i64::from(index) * 550_000);
        let scheduled = arrived.plus_micros(2_000);
        let first_token = scheduled.plus_micros(20_000 + 60 * i64::from(input_tokens));
        let last_token = first_token.plus_micros(30_000 * i64::from(output_tokens - 1));
        EngineTimeline { arrived, scheduled, first_token, last_token, input_tokens, cached_tokens: 0, output_tokens }
    });
    requests.collect()
}

fn moved(timeline: &EngineTimeline, by_us: i64) -> EngineTimeline {
    EngineTimeline {
        arrived: timeline.arrived.plus_micros(by_us),
        scheduled: timeline.scheduled.plus_micros(by_us),
        first_token: timeline.first_token.plus_micros(by_us),
        last_token: timeline.last_token.plus_micros(by_us),
        ..*timeline
    }
}
