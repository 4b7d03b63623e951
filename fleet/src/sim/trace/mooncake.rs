//! Mooncake's traces: a request a line, with the blocks of its prompt so that requests with a common beginning are seen.
//!
//! ```text
//! {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 48, 49]}
//! ```

use std::path::Path;

use serde::Deserialize;

use super::TraceError;
use super::lines::{Lines, bad, tokens};
use crate::sim::request::{Arrival, Prefixes};

/// Tokens of one of its blocks.
const BLOCK_TOKENS: u32 = 512;
/// Blocks that are kept at most: 2 GiB of them.
const BLOCKS_MAX: usize = 1 << 28;

#[derive(Deserialize)]
struct Line {
    /// Milliseconds since the start.
    timestamp: f64,
    input_length: u64,
    output_length: u64,
    #[serde(default)]
    hash_ids: Vec<u64>,
}

/// Reads a whole file: any two requests of it may share their beginnings, so all blocks are needed at once.
pub(super) fn read(path: &Path) -> Result<(Vec<Arrival>, Prefixes), TraceError> {
    const FIX: &str = r#"write {"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}"#;
    let mut lines = Lines::open(path)?;
    let mut arrivals: Vec<Arrival> = Vec::new();
    let mut prefixes = Prefixes { block_tokens: BLOCK_TOKENS, ids: Vec::new() };
    while let Some(text) = lines.next_line()? {
        let line: Line = serde_json::from_str(text)
            .map_err(|error| bad(&error.to_string(), FIX))
            .map_err(|fault| fault.at(path, lines.number()))?;
        let arrival = arrival(&line, &prefixes).map_err(|fault| fault.at(path, lines.number()))?;
        if arrivals.last().is_some_and(|before| before.at_us > arrival.at_us) {
            return Err(bad("arrives before the line before", "sort the file by arrival").at(path, lines.number()));
        }
        prefixes.ids.extend_from_slice(&line.hash_ids);
        arrivals.push(arrival);
    }
    Ok((arrivals, prefixes))
}

fn arrival(line: &Line, prefixes: &Prefixes) -> Result<Arrival, super::lines::Fault> {
    if prefixes.ids.len() + line.hash_ids.len() > BLOCKS_MAX {
        return Err(bad("is beyond the blocks that fit in memory", "play a part of the trace"));
    }
    if !line.timestamp.is_finite() || line.timestamp < 0.0 {
        return Err(bad("has a timestamp before the start", "write milliseconds since the start of the trace"));
    }
    let too_many = |_| bad("has too many blocks", "a prompt has one block for 512 tokens");
    Ok(Arrival {
        id: 0,
        at_us: crate::sim::startup::micros(line.timestamp / 1e3),
        input_tokens: tokens(line.input_length, "input_length")?,
        output_tokens: tokens(line.output_length, "output_length")?,
        prefix_at: u32::try_from(prefixes.ids.len()).map_err(too_many)?,
        prefix_blocks: u32::try_from(line.hash_ids.len()).map_err(too_many)?,
    })
}
