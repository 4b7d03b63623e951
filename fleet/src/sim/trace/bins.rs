//! Azure's week of 2024 as counts of requests in bins of equal length.
//!
//! ```text
//! Time,TIMESTAMP
//! 2024-05-10 00:00:00,146
//! 2024-05-10 00:00:10,238
//! ```

use std::path::Path;

use ledger::Timestamp;

use super::TraceError;
use super::lines::{Fault, Lines, bad};

/// Gaps longer than this are no part of a trace.
const BINS_MAX: u64 = 100_000_000;

pub(super) struct Bins {
    pub start: Timestamp,
    pub bin_us: u64,
    pub counts: Vec<u32>,
}

/// Reads them all: a week has 60,481. A bin that is left out had no requests.
pub(super) fn read(path: &Path) -> Result<Bins, TraceError> {
    let mut lines = Lines::open(path)?;
    lines.next_line()?;
    let mut found: Vec<(i64, u32, u64)> = Vec::new();
    while let Some(line) = lines.next_line()? {
        let (time, count) = bin(line).map_err(|fault| fault.at(path, lines.number()))?;
        if found.last().is_some_and(|&(before, ..)| before >= time) {
            return Err(bad("is not later than the line before", "sort the file by time").at(path, lines.number()));
        }
        found.push((time, count, lines.number()));
    }
    let &(start_us, ..) = found.first().ok_or_else(|| TraceError::Empty { path: path.to_owned(), window: false })?;
    let widths = found.windows(2).map(|pair| pair[1].0.abs_diff(pair[0].0));
    let bin_us = widths.min().unwrap_or(10_000_000);
    let mut counts = Vec::with_capacity(found.len());
    for &(at_us, count, line) in &found {
        let since_us = at_us.abs_diff(start_us);
        if !since_us.is_multiple_of(bin_us) {
            let problem = format!("is not a whole number of {} s bins after the first line", bin_us as f64 / 1e6);
            return Err(bad(&problem, "use bins of one length").at(path, line));
        }
        let bin = since_us / bin_us;
        if bin > BINS_MAX {
            return Err(bad("lies years after the first line", "check the date").at(path, line));
        }
        counts.resize(usize::try_from(bin).unwrap_or(usize::MAX), 0);
        counts.push(count);
    }
    Ok(Bins { start: Timestamp::from_micros(start_us), bin_us, counts })
}

fn bin(line: &str) -> Result<(i64, u32), Fault> {
    let (time, count) = line.split_once(',').ok_or_else(|| bad("has no comma", "write time,count"))?;
    let at: Result<Timestamp, String> = time.trim().parse();
    let at = at.map_err(|problem| bad(&problem, "the first column is a time"))?;
    let count = count.trim();
    let requests =
        count.parse().map_err(|_| bad(&format!("`{count}` is no count of requests"), "write a whole number"))?;
    Ok((at.micros(), requests))
}
