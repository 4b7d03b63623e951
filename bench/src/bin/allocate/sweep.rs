//! The tier-B sweep on one core, over any number of requests that are made while it runs.

use std::time::Duration;

use bench::clock::now;
use bench::month::{ENGINES, Engine};
use bench::process::own_peak_bytes;
use ledger::Timestamp;
use ledger::allocate::sweep::{Part, Sweep};
use serde_json::{Value, json};

use super::{Failure, limits, replica};

/// Requests made at a time, outside of the measured time.
pub const BLOCK: usize = 65_536;

/// Sweeps each engine's requests, one engine after the other.
pub fn run(seed: u64, requests: u64) -> Result<Value, Failure> {
    let mut found = Found::default();
    let mut block = Vec::with_capacity(BLOCK);
    for number in 0..ENGINES {
        let mut engine = Engine::new(seed, number, requests);
        let mut sweep = Sweep::new(replica(), limits(), Timestamp::from_micros(0));
        loop {
            engine.refill(&mut block);
            let begin = now();
            for request in &block {
                sweep.push(request.tag, &request.timeline, &mut |part| found.take(part));
            }
            found.held_max = found.held_max.max(sweep.active());
            if block.is_empty() {
                sweep.finish(&mut |part| found.take(part));
            }
            found.took += begin.elapsed();
            if block.is_empty() {
                break;
            }
        }
        found.busy_s += sweep.busy_s();
    }
    if (found.charged_s / found.busy_s - 1.0).abs() > 1e-6 || found.requests != requests {
        return Err(
            format!("{} requests pay {} of {} busy seconds", found.requests, found.charged_s, found.busy_s).into()
        );
    }
    Ok(json!({
        "requests": requests, "seconds": found.took.as_secs_f64(),
        "requests_per_s": requests as f64 / found.took.as_secs_f64(),
        "busy_s": found.busy_s, "held_max": found.held_max, "peak_bytes": own_peak_bytes(),
    }))
}

#[derive(Debug, Default)]
struct Found {
    requests: u64,
    charged_s: f64,
    busy_s: f64,
    held_max: usize,
    took: Duration,
}

impl Found {
    fn take(&mut self, part: Part) {
        self.requests += u64::from(part.ended);
        self.charged_s += part.share.total_s() + part.waste_s;
    }
}
