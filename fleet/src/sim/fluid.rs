//! The fast mode: work flows at its mean rate against what the ready replicas can do, without engines or single requests.
//! Start-ups, failures, decisions and costs are those of the whole simulator, so that what a search finds here holds there.

use std::sync::Arc;

use ledger::Timestamp;

use super::capacity::Capacity;
use super::demand::{Demand, Sums};
use super::engine::{self, Spec};
use super::outcome::{Outcome, Requests, Stopwatch};
use super::plan::Plan;
use super::pool::{Pool, Role};
use super::request::{Arrival, Done};
use super::startup::micros;
use super::trace::Trace;
use crate::scale::Sample;

/// Requests that the batch at half the load is measured with.
const MEASURED_REQUESTS: f64 = 3_000.0;

/// Plays a demand.
#[must_use]
pub fn run(plan: &Plan, demand: &Demand) -> Outcome {
    let end_us = demand.len_us();
    let every_us = micros(plan.decide_every_s).max(1);
    let pool = Pool::new(plan, Role::Both, plan.bounds, demand.start, demand.minutes(), end_us);
    let mut pool = pool.drains_for(plan.drain_s);
    let mut flow = Flow::new(plan, demand);
    let mut happenings = Vec::new();
    let mut now_us = 0;
    while now_us < end_us {
        let before_us = now_us;
        now_us = now_us.saturating_add(every_us).min(end_us);
        pool.upto(now_us, &|_| 0, &mut happenings);
        if now_us < end_us {
            let reading = flow.read(before_us, now_us, pool.ready());
            pool.decide(now_us, reading, &|_| 0, &mut happenings);
        }
        happenings.clear();
    }
    pool.meter.upto(end_us);
    let judge_from_us = micros(plan.judge_from_s).min(end_us);
    let arrived = rounded(flow.requests.between(judge_from_us, end_us));
    let requests = Requests { arrived, done: arrived, ..Requests::default() };
    Outcome::of(plan, demand, vec![pool], requests, &Stopwatch::default())
}

/// Measures [`Plan::batch_at_half`] on an engine: the mean batch at half of what it can do, as a part of that at all of it.
/// `None` when the engine cannot serve the mix.
#[must_use]
pub fn batch_at_half(spec: &Spec, mix: &[(u32, u32)], found: &Capacity, seed: u64) -> Option<f64> {
    let rate = found.requests_per_s / 2.0;
    let seconds = MEASURED_REQUESTS / rate;
    let trace = Trace::rates("half", Timestamp::default(), seconds, &[rate], mix, seed);
    let arrivals: Vec<Arrival> = trace.arrivals().ok()?.collect::<Result<_, _>>().ok()?;
    let mut in_batch_us = 0;
    let mut add = |done: Done| in_batch_us += done.last_token_us.saturating_sub(done.scheduled_us);
    let end_us = engine::play(spec, &arrivals, Arc::default(), &mut add).ok()?;
    Some(in_batch_us as f64 / end_us.max(1) as f64 / found.batch)
}

/// The course of work, and what of it could not be done yet.
struct Flow<'a> {
    plan: &'a Plan,
    load: Sums,
    prefill: Sums,
    requests: Sums,
    /// Replica-seconds of work that wait.
    backlog_s: f64,
}

impl<'a> Flow<'a> {
    fn new(plan: &'a Plan, demand: &Demand) -> Flow<'a> {
        let bin_s = demand.bin_us as f64 / 1e6;
        let sums = |bins: &[f32]| Sums::new(demand.bin_us, bins.iter().map(|&load| f64::from(load) * bin_s));
        Flow {
            plan,
            load: sums(&demand.load),
            prefill: sums(&demand.prefill),
            requests: Sums::new(demand.bin_us, demand.requests.iter().map(|&requests| f64::from(requests))),
            backlog_s: 0.0,
        }
    }

    /// Requests in a batch, as a part of those at load 1. With `b` of them a step takes `s + t b`, and `b` is what comes in a
    /// request's time of so many steps: `b(x) / b(1) = x (1 - k) / (1 - k x)`.
    fn filled(&self, load: f64) -> f64 {
        let half = self.plan.batch_at_half.clamp(0.01, 0.5);
        let k = (1.0 - 2.0 * half) / (1.0 - half);
        load * (1.0 - k) / (1.0 - k * load)
    }

    /// What engines would say about a span in which so many replicas served.
    fn read(&mut self, from_us: u64, to_us: u64, ready: u32) -> Sample {
        let seconds = (to_us - from_us) as f64 / 1e6;
        let arriving_s = self.load.between(from_us, to_us);
        let possible_s = f64::from(ready) * seconds;
        let served_s = (arriving_s + self.backlog_s).min(possible_s);
        self.backlog_s = (self.backlog_s + arriving_s - served_s).max(0.0);
        let bounds = &self.plan.bounds;
        let load = arriving_s / seconds;
        let served = served_s / seconds;
        let full = if ready == 0 { None } else { Some(served / f64::from(ready)) };
        Sample {
            running: Some(f64::from(ready) * self.filled(full.unwrap_or(0.0)) * bounds.batch_at_capacity),
            waiting: Some(self.backlog_s * bounds.requests_per_s_at_capacity),
            kv_used: full.map(|full| self.filled(full) * self.plan.kv_at_capacity),
            utilisation: full,
            arrivals_per_s: Some(self.requests.between(from_us, to_us) / seconds),
            input_tokens_per_s: Some(load * bounds.input_tokens_per_s_at_capacity),
            output_tokens_per_s: Some(served * bounds.output_tokens_per_s_at_capacity),
            load: Some(load),
            prefill_load: Some(self.prefill.between(from_us, to_us) / seconds),
            ..Sample::default()
        }
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count of requests, as a float")]
fn rounded(count: f64) -> u64 {
    count.round() as u64
}
