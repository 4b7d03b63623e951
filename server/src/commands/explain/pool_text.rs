//! The bill of an attempt on a pool as people read it.

use std::fmt::Write;

use ledger::allocate::fit::FitError;
use ledger::{EngineFact, Money, Tier};

use super::pool::{Cache, PoolBill};
use crate::render::{self, printable};

/// Minutes that are listed one by one.
const MINUTES_MAX: usize = 12;

/// Writes the bill.
pub fn write(text: &mut String, bill: &PoolBill<'_>) {
    let name = bill.engine.as_ref().map_or("unknown".to_owned(), |engine| printable(&engine.engine));
    let _ = writeln!(text, "\nattempt {} on pool {}, engine {name}", bill.attempt.id.number, printable(bill.pool));
    if bill.postings.is_empty() {
        text.push_str("  not settled yet: what it costs is unknown, which is not zero\n");
    } else {
        paid(text, bill);
    }
    let line = |text: &mut String, name: &str, value: String| {
        let _ = writeln!(text, "  {name:<16}{value}");
    };
    line(text, "shared with", batch(bill));
    if !bill.postings.is_empty() {
        let idle = match bill.idle {
            Some(idle) => format!("{} USD, not charged: its part of what stood idle in the same minutes", usd(idle)),
            None => "unknown".to_owned(),
        };
        line(text, "idle share", idle);
    }
    line(text, "cache savings", cache(&bill.cache));
    line(text, "known by", known(bill));
    for policy in &bill.policies {
        line(text, "policy", printable(policy));
    }
    line(text, "constants", constants(bill.engine.as_ref()));
    proof(text, bill);
}

fn usd(amount: Money) -> String {
    render::dollars(amount)
}

fn paid(text: &mut String, bill: &PoolBill<'_>) {
    let time = bill.gpu_us.map_or("an unknown number of".to_owned(), render::gpu_seconds);
    let _ = writeln!(text, "  {:<16}{} USD for {time} GPU-seconds", "paid", bill.amount);
    let Some(terms) = bill.terms else {
        let _ = writeln!(text, "    by term       unknown: its method has no terms");
        return;
    };
    let whole = u128::try_from(bill.amount.pico()).unwrap_or(0);
    for (name, amount) in
        [("weights", terms.weights), ("KV cache", terms.kv), ("compute", terms.compute), ("overhead", terms.overhead)]
    {
        let share = u128::try_from(amount.pico()).ok().and_then(|part| render::percent(part, whole));
        let _ = writeln!(text, "    {name:<14}{amount} USD  {}", share.unwrap_or_default());
    }
}

fn batch(bill: &PoolBill<'_>) -> String {
    let others = render::counted(bill.batch.others, "other");
    let mean = match bill.batch.mean {
        Some(mean) => format!("{mean:.1} requests at once on average, itself included ({others} while it ran)"),
        None => "unknown: it did not run for any time".to_owned(),
    };
    match bill.batch.counted {
        Some((counted, times)) => {
            format!("{mean}; the engine counted {counted:.1} in {}", render::counted(times, "reading"))
        }
        None => mean,
    }
}

fn cache(cache: &Cache) -> String {
    match cache {
        Cache::Nothing => "none: nothing of its input was cached".to_owned(),
        Cache::Unknown(cached, why) => format!("unknown for {}: {why}", render::counted(*cached, "cached token")),
        Cache::Spared(cached, spared) => format!(
            "{} USD, not booked: {} read instead of computed",
            usd(*spared),
            render::counted(*cached, "cached token")
        ),
    }
}

fn known(bill: &PoolBill<'_>) -> String {
    let tier = match bill.tier {
        Some(Tier::A) => "tier A, step by step",
        Some(Tier::B) => "tier B, the times of requests",
        Some(Tier::C) => "tier C, counters only",
        None => "no tier",
    };
    let quality = match bill.quality {
        Some(millionths) => {
            let share = render::percent(millionths.into(), 1_000_000).unwrap_or_default();
            format!("quality {share} against the engine's own series")
        }
        None => "never compared with the engine's own series".to_owned(),
    };
    let guessed = if bill.postings.iter().any(|posting| posting.estimated) { ", part of it estimated" } else { "" };
    format!("{tier}; {quality}{guessed}")
}

fn constants(engine: Option<&EngineFact>) -> String {
    let Some(engine) = engine else { return "unknown: no engine is known to have served it".to_owned() };
    let Some(constants) = engine.setup.constants else {
        return "unknown: the model's dimensions are not known, so time is divided by tokens".to_owned();
    };
    let of = constants.efficiencies;
    let error = match engine.setup.error {
        Some(FitError { median, p95, bias }) => format!(
            "fitted, off by {:.1} % at the median, {:.1} % at the 95th percentile, {:+.1} % on average",
            median * 100.0,
            p95 * 100.0,
            bias * 100.0
        ),
        None => "not fitted yet".to_owned(),
    };
    format!(
        "{} x {}: eta_c {:.3}, eta_b {:.3}, overhead {:.0} µs, overlap {:.2}; {error}",
        constants.gpus,
        printable(constants.gpu.name),
        of.compute,
        of.bandwidth,
        of.overhead_s * 1e6,
        constants.overlap
    )
}

fn proof(text: &mut String, bill: &PoolBill<'_>) {
    let Some(minute_query) = bill.minute_proof() else { return };
    let minutes = render::counted(u64::try_from(bill.minutes.len()).unwrap_or(u64::MAX), "minute");
    let corrections = match bill.corrections() {
        0 => String::new(),
        some => format!(", {}", render::counted(u64::try_from(some).unwrap_or(u64::MAX), "correction")),
    };
    let closed =
        if bill.closes() { "each adds up to what its GPUs cost" } else { "NOT EVERY ONE ADDS UP to its GPUs' cost" };
    let _ = writeln!(text, "  {:<16}{minutes}{corrections}; {closed}", "rows");
    for minute in bill.minutes.iter().take(MINUTES_MAX) {
        for posting in bill.postings.iter().filter(|posting| posting.origin == *minute.origin) {
            let _ = writeln!(
                text,
                "    {} {} {} USD of {}",
                minute.period.start, posting.id, posting.costs.effective_cost, minute.cost
            );
        }
    }
    if bill.minutes.len() > MINUTES_MAX {
        let _ = writeln!(text, "    … and {} more", bill.minutes.len() - MINUTES_MAX);
    }
    let _ = writeln!(text, "    farthing sql \"{}\"", bill.proof());
    let _ = writeln!(text, "    farthing sql \"{minute_query}\"");
}
