//! How far a reconstruction can be trusted: compared with what the engine says of itself, and used to fit constants.

use super::fit::{Load, Observed};
use super::replica::Replica;
use super::sweep::Segment;
use super::timeline::EngineTimeline;
use crate::step::Work;

/// What an engine reported of itself at one moment. What it did not report is `None`, never zero.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct EngineSample {
    /// When, in seconds from the sweep's base.
    pub at_s: f64,
    /// Requests running.
    pub running: Option<f64>,
    /// Requests waiting.
    pub waiting: Option<f64>,
    /// Share of the KV cache in use, 0 to 1.
    pub kv_used: Option<f64>,
}

/// How far the reconstruction is from the engine's own series.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Quality {
    /// Mean absolute error of the running requests.
    pub running_error: Option<f64>,
    /// Mean absolute error of the waiting requests, preempted ones counted as waiting.
    pub waiting_error: Option<f64>,
    /// Mean absolute error of the KV cache in use, as a share of the cache.
    pub kv_error: Option<f64>,
    /// Share of the requests' scheduled time in which the reconstruction had them preempted.
    pub preempted_share: f64,
    /// 0 to 1: `(1 - running_error / mean running) (1 - kv_error) (1 - preempted_share)`. What the engine did not report
    /// lowers nothing; a reconstruction that was never compared is at most as good as its preempted share allows.
    pub score: f64,
}

/// Compares a recorded sweep with the engine's series. `kv_capacity_tokens` turns tokens into shares of the cache.
#[must_use]
pub fn compare(
    segments: &[Segment],
    waiting: impl Fn(f64) -> f64,
    samples: &[EngineSample],
    kv_capacity_tokens: Option<f64>,
) -> Quality {
    let mut running = Mean::default();
    let mut queued = Mean::default();
    let mut cache = Mean::default();
    let mut level = Mean::default();
    for sample in samples {
        let segment = segment_at(segments, sample.at_s);
        if let Some(reported) = sample.running {
            running.add((segment.decoding + segment.prefilling - reported).abs());
            level.add(reported);
        }
        if let Some(reported) = sample.waiting {
            queued.add((waiting(sample.at_s) + segment.preempted - reported).abs());
        }
        if let (Some(reported), Some(capacity)) = (sample.kv_used, kv_capacity_tokens) {
            cache.add((segment.kv_tokens / capacity - reported).abs());
        }
    }
    let time = |of: fn(&Segment) -> f64| segments.iter().map(|s| of(s) * (s.until_s - s.from_s)).sum::<f64>();
    let (lost, all) = (time(|s| s.preempted), time(|s| s.preempted + s.decoding + s.prefilling));
    let preempted_share = if all > 0.0 { lost / all } else { 0.0 };
    let running_off = running.value().zip(level.value()).map_or(0.0, |(error, level)| error / level.max(1.0));
    let score = (1.0 - running_off).max(0.0) * (1.0 - cache.value().unwrap_or(0.0)).max(0.0) * (1.0 - preempted_share);
    Quality {
        running_error: running.value(),
        waiting_error: queued.value(),
        kv_error: cache.value(),
        preempted_share,
        score,
    }
}

/// The decode phases of `timelines` as observations for a fit: their steps, what those steps had to do on average with
/// and without a prefill in them, and their time. In the order of `timelines`; `None` for one that never decoded.
///
/// The segments must come from a sweep over [`Replica::ideal`], whose seconds are those of the data sheet.
#[must_use]
pub fn decode_observations(
    segments: &[Segment],
    timelines: &[EngineTimeline],
    replica: &Replica,
    seconds: impl Fn(&EngineTimeline) -> (f64, f64),
) -> Vec<Option<Observed>> {
    let sums = Sums::of(segments);
    let empty = replica.load(&[]);
    let [first, second] = [0, 1].map(|cached_tokens| replica.ideal().demand(Work { new_tokens: 1, cached_tokens }));
    let per_context = (second.compute_s - first.compute_s, second.memory_s - first.memory_s);
    let load = |steps: f64, of: &Sum, per: f64| Load {
        steps,
        compute_s: (of.requests * first.compute_s + of.context * per_context.0 + of.prefill_s) / per,
        memory_s: empty.memory_s + of.context * per_context.1 / per,
    };
    timelines
        .iter()
        .map(|timeline| {
            let (from_s, until_s) = seconds(timeline);
            let steps = f64::from(timeline.output_tokens.saturating_sub(1));
            let [alone, mixed] = sums.between(from_s, until_s);
            let passed = alone.steps + mixed.steps;
            if steps <= 0.0 || passed <= 0.0 || until_s <= from_s {
                return None;
            }
            let loads = [alone, mixed]
                .iter()
                .filter(|sum| sum.steps > 0.0)
                .map(|sum| load(steps * sum.steps / passed, sum, sum.steps))
                .collect();
            Some(Observed { loads, seconds: until_s - from_s })
        })
        .collect()
}

fn segment_at(segments: &[Segment], at_s: f64) -> Segment {
    let after = segments.partition_point(|segment| segment.until_s <= at_s);
    segments.get(after).filter(|segment| segment.from_s <= at_s).copied().unwrap_or_default()
}

#[derive(Debug, Clone, Copy, Default)]
struct Mean {
    sum: f64,
    count: f64,
}

impl Mean {
    fn add(&mut self, value: f64) {
        self.sum += value;
        self.count += 1.0;
    }

    fn value(&self) -> Option<f64> {
        (self.count > 0.0).then(|| self.sum / self.count)
    }
}

/// Integrals over steps, for stretches without and with a prefill.
#[derive(Debug, Clone, Copy, Default)]
struct Sum {
    steps: f64,
    requests: f64,
    context: f64,
    prefill_s: f64,
}

impl Sum {
    fn minus(self, other: Sum) -> Sum {
        Sum {
            steps: self.steps - other.steps,
            requests: self.requests - other.requests,
            context: self.context - other.context,
            prefill_s: self.prefill_s - other.prefill_s,
        }
    }
}

struct Sums {
    until_s: Vec<f64>,
    upto: Vec<[Sum; 2]>,
}

impl Sums {
    fn of(segments: &[Segment]) -> Sums {
        let mut sums = Sums { until_s: Vec::with_capacity(segments.len()), upto: vec![[Sum::default(); 2]] };
        let mut running = [Sum::default(); 2];
        for segment in segments {
            let dt = segment.until_s - segment.from_s;
            let steps = segment.steps_per_s * dt;
            let sum = &mut running[usize::from(segment.prefilling > 0.5)];
            sum.steps += steps;
            sum.requests += steps * segment.decoding;
            sum.context += steps * segment.decode_context;
            sum.prefill_s += dt * segment.prefill_compute;
            sums.until_s.push(segment.until_s);
            sums.upto.push(running);
        }
        sums
    }

    /// Both ends are events, so they are ends of segments.
    fn between(&self, from_s: f64, until_s: f64) -> [Sum; 2] {
        let upto = |at: f64| self.upto[self.until_s.partition_point(|&until| until <= at + 5e-7)];
        let (from, until) = (upto(from_s), upto(until_s));
        [until[0].minus(from[0]), until[1].minus(from[1])]
    }
}
