//! Two kinds of load: as fast as the target answers, and at a fixed rate whatever the target does.
//!
//! At a fixed rate, latency counts from the moment at which a request was due, not from the moment at which it could be sent; otherwise
//! a target that stalls would delay the requests that were to show its stall (coordinated omission).

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use crate::clock::now;
use crate::histogram::Histogram;
use crate::wire::{Connection, Keep};

/// No answer takes longer than this, or it counts as an error.
const ANSWER_PATIENCE: Duration = Duration::from_secs(20);
/// Enough for the small frames here; 256 threads with the default of 2 MiB would only waste address space.
const THREAD_STACK_BYTES: usize = 256 * 1024;

/// What to send where.
#[derive(Debug, Clone)]
pub struct Target {
    /// Where to connect.
    pub address: SocketAddr,
    /// The whole request, sent over and over.
    pub request: Arc<[u8]>,
    /// A whole answer has at least this many bytes of body.
    pub body_bytes_min: usize,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Outcome {
    /// From due (or sent) to the end of the answer.
    pub total: Histogram,
    /// From due (or sent) to the first byte of the body.
    pub first_byte: Histogram,
    /// How late the generator itself was to notice that a request was due although a connection was free.
    pub lateness: Histogram,
    /// Answers that were whole and had status 200, warm-up included.
    pub answered: u64,
    /// Answers that were not.
    pub errors: u64,
    /// How long the measured part took, in seconds.
    pub seconds: f64,
}

impl Outcome {
    /// Whole answers a second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        if self.seconds > 0.0 { self.total.count() as f64 / self.seconds } else { 0.0 }
    }

    fn merge(&mut self, other: &Outcome) {
        self.total.merge(&other.total);
        self.first_byte.merge(&other.first_byte);
        self.lateness.merge(&other.lateness);
        self.answered += other.answered;
        self.errors += other.errors;
        self.seconds = self.seconds.max(other.seconds);
    }
}

/// When the next request is to be sent.
#[derive(Debug, Clone, Copy)]
pub enum Pace {
    /// As soon as the last one is answered.
    Saturate,
    /// This many a second over all connections, evenly spaced.
    PerSecond(f64),
}

/// Makes the kernel wake sleeping threads on time rather than up to 50 microseconds late. Threads started later inherit it.
pub fn sharpen_timers() {
    // Without it, the lateness column of the report says so.
    let _ = std::fs::write("/proc/self/timerslack_ns", "1");
}

/// Loads `target` over `connections` for `duration`. Each connection first makes one request that is not measured.
#[must_use]
pub fn run(target: &Target, connections: usize, duration: Duration, pace: Pace) -> Outcome {
    let barrier = Arc::new(Barrier::new(connections + 1));
    let (next, start) = (Arc::new(AtomicU64::new(0)), Arc::new(std::sync::OnceLock::new()));
    let workers: Vec<_> = (0..connections)
        .map(|_| {
            let (target, barrier, next, start) = (target.clone(), barrier.clone(), next.clone(), start.clone());
            let work = move || {
                let mut worker = Worker {
                    connection: Connection::new(target.address, ANSWER_PATIENCE),
                    target,
                    outcome: Outcome::default(),
                };
                worker.warm_up();
                barrier.wait();
                worker.work(*start.get_or_init(now), duration, pace, &next);
                worker.outcome
            };
            thread::Builder::new()
                .stack_size(THREAD_STACK_BYTES)
                .spawn(work)
                .expect("the machine can run a few hundred threads")
        })
        .collect();
    barrier.wait();
    let mut all = Outcome::default();
    for worker in workers {
        all.merge(&worker.join().expect("a load thread does not panic"));
    }
    all
}

struct Worker {
    target: Target,
    connection: Connection,
    outcome: Outcome,
}

impl Worker {
    fn warm_up(&mut self) {
        if self.call().is_some() {
            self.outcome.answered += 1;
        }
    }

    fn work(&mut self, start: Instant, duration: Duration, pace: Pace, next: &AtomicU64) {
        let end = start + duration;
        loop {
            let due = match pace {
                Pace::Saturate => now(),
                Pace::PerSecond(rate) => {
                    start + Duration::from_secs_f64(next.fetch_add(1, Ordering::Relaxed) as f64 / rate)
                }
            };
            if due >= end {
                break;
            }
            self.wait_until(due);
            match self.call() {
                Some(first_byte) => {
                    self.outcome.answered += 1;
                    self.outcome.first_byte.record(first_byte.duration_since(due));
                    self.outcome.total.record(due.elapsed());
                }
                None => {
                    self.outcome.errors += 1;
                    thread::sleep(Duration::from_millis(1));
                }
            }
        }
        self.outcome.seconds = start.elapsed().as_secs_f64();
    }

    fn wait_until(&mut self, due: Instant) {
        let left = due.saturating_duration_since(now());
        if !left.is_zero() {
            thread::sleep(left);
            self.outcome.lateness.record(due.elapsed());
        }
    }

    fn call(&mut self) -> Option<Instant> {
        let answer = self.connection.call(&self.target.request, Keep::Nothing).ok()?;
        (answer.status == 200 && answer.body_bytes >= self.target.body_bytes_min).then_some(answer.first_byte)
    }
}
