//! What a simulation ends with: what was paid, what was missed, who decided what, and the course of it minute by minute.

use ledger::{Money, Timestamp};
use serde::Serialize;

use super::demand::{Demand, MINUTE_US, narrow};
use super::histogram::{Histogram, Percentiles};
use super::meter::MinuteSums;
use super::plan::Plan;
use super::pool::{Pool, Role};
use super::request::Done;
use super::startup::micros;
use crate::scale::Objective;

const HOUR_US: u64 = 3_600_000_000;

/// What came out. Costs and misses are those of the judged time.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// The policy with its parameters.
    pub policy: String,
    /// What was played.
    pub trace: String,
    /// What a reader has to know about it.
    pub notes: Vec<String>,
    /// Hours that are judged.
    pub hours: f64,
    /// GPU-hours that replicas ran, from being asked for until they were gone.
    pub gpu_hours: f64,
    /// What was paid: committed GPUs whether used or not, what ran beyond them, and spot nodes.
    pub usd: Money,
    /// The cheapest fixed number of replicas that no minute would have overloaded.
    pub static_peak: StaticPeak,
    /// Part of the static plan's dollars that was saved; negative when it cost more.
    pub saved: f64,
    /// Requests that arrived.
    pub requests: u64,
    /// Requests that ended with their last token; in the fluid mode all of them.
    pub done: u64,
    /// Requests that failed: held too long, too many held, too long for an engine, or crashed too often.
    pub failed: u64,
    /// Requests without an end when the trace ended and every engine had run empty.
    pub unfinished: u64,
    /// Times that a request was tried again after a crash.
    pub retried: u64,
    /// Requests that waited for any replica to serve.
    pub held: u64,
    /// Minutes in which more work arrived than the ready replicas could do.
    pub overload: Overload,
    /// What the engines measured; `None` in the fluid mode, which has none.
    pub latency: Option<Latency>,
    /// Times that a request was put back for lack of memory, in the whole run.
    pub preemptions: u64,
    /// Replicas that were started, in the whole run.
    pub starts: u64,
    /// Replicas that crashed, in the whole run.
    pub crashes: u64,
    /// Replicas whose spot node was taken away, in the whole run.
    pub taken_away: u64,
    /// Replicas that were given up before they served, in the whole run.
    pub cancelled: u64,
    /// Replicas that found no place when they were asked for, in the whole run.
    pub unscheduled: u64,
    /// Decisions.
    pub decisions: u64,
    /// Decisions that changed the number of replicas.
    pub changes: u64,
    /// Times that the number turned from rising to falling or back.
    pub direction_changes: u64,
    /// The most of them within any hour.
    pub direction_changes_per_hour_max: u64,
    /// Fewest replicas that served at any moment.
    pub ready_min: u32,
    /// Most replicas that were there or on their way.
    pub provisioned_max: u32,
    /// Decisions with their reasons, in the whole run.
    pub log: Vec<Logged>,
    /// Decisions that would have been in the log but for its length.
    pub log_dropped: u64,
    /// The course of it, in the whole run.
    pub minutes: Vec<Minute>,
}

/// The static plan to compare with.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct StaticPeak {
    /// Its replicas.
    pub replicas: u32,
    /// Its GPU-hours.
    pub gpu_hours: f64,
    /// What it costs.
    pub usd: Money,
}

/// Minutes in which more work arrived than the ready replicas could do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Overload {
    /// How many.
    pub minutes: u64,
    /// Requests that arrived in them.
    pub requests: u64,
    /// Those as a part of all requests.
    pub share: f64,
}

/// What the engines measured about requests that arrived in the judged time.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Latency {
    /// From arrival to the first token.
    pub ttft: Percentiles,
    /// Between tokens, mean of each request with more than one.
    pub tpot: Percentiles,
    /// From arrival to the last token.
    pub e2e: Percentiles,
    /// Part of all requests whose first token came in time; a failed one missed it.
    pub attained_ttft: f64,
    /// Part of all requests whose tokens came fast enough.
    pub attained_tpot: f64,
    /// Part of all requests with both.
    pub attained: f64,
}

/// One minute; the last one may be a part of one, and its means are over that part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Minute {
    /// Requests that arrived.
    pub requests: u32,
    /// Work that arrived, replicas.
    pub load: f32,
    /// Replicas that served, mean.
    pub ready: f32,
    /// Replicas on their way, mean.
    pub pending: f32,
    /// Replicas that finished what they had, mean.
    pub draining: f32,
    /// Replicas that ran and were paid for, mean.
    pub paid: f32,
    /// Whether more work arrived than could be done.
    pub overloaded: bool,
}

/// A decision that was kept.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Logged {
    /// When.
    pub at: Timestamp,
    /// For which replicas.
    pub role: Role,
    /// What the policy wanted.
    pub wanted: u32,
    /// What came out behind the guards.
    pub desired: u32,
    /// Replicas that served.
    pub ready: u32,
    /// Replicas on their way.
    pub pending: u32,
    /// The load since the decision before, replicas.
    pub load: Option<f64>,
    /// The load that was predicted.
    pub forecast: Option<f64>,
    /// Why.
    pub reasons: Vec<String>,
    /// Guards that changed it.
    pub guards: Vec<&'static str>,
}

/// What happened to requests, beside what the pools know.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Requests {
    pub arrived: u64,
    pub done: u64,
    pub failed: u64,
    pub unfinished: u64,
    pub retried: u64,
    pub held: u64,
    pub preemptions: u64,
}

/// Measures requests against the objective in a fixed amount of memory.
#[derive(Debug, Default)]
pub(crate) struct Stopwatch {
    ttft: Histogram,
    tpot: Histogram,
    e2e: Histogram,
    in_time: u64,
    fast: u64,
    both: u64,
    ttft_limit_us: u64,
    tpot_limit_us: u64,
}

impl Stopwatch {
    pub fn new(objective: &Objective) -> Stopwatch {
        let (ttft_limit_us, tpot_limit_us) = (micros(objective.ttft_s), micros(objective.tpot_s));
        Stopwatch { ttft_limit_us, tpot_limit_us, ..Stopwatch::default() }
    }

    pub fn record(&mut self, done: &Done) {
        let (ttft_us, tpot_us) = (ttft_us(done), tpot_us(done));
        self.ttft.record(ttft_us);
        self.e2e.record(done.last_token_us.saturating_sub(done.arrival.at_us));
        if let Some(tpot_us) = tpot_us {
            self.tpot.record(tpot_us);
        }
        let in_time = ttft_us <= self.ttft_limit_us;
        let fast = tpot_us.is_none_or(|tpot_us| tpot_us <= self.tpot_limit_us);
        self.in_time += u64::from(in_time);
        self.fast += u64::from(fast);
        self.both += u64::from(in_time && fast);
    }

    pub fn latency(&self, objective: &Objective, requests: u64) -> Option<Latency> {
        let part = |count: u64| count as f64 / requests.max(1) as f64;
        Some(Latency {
            ttft: self.ttft.percentiles(objective.percentile)?,
            tpot: self.tpot.percentiles(objective.percentile).unwrap_or_default(),
            e2e: self.e2e.percentiles(objective.percentile)?,
            attained_ttft: part(self.in_time),
            attained_tpot: part(self.fast),
            attained: part(self.both),
        })
    }
}

/// Time to the first token, microseconds.
pub(crate) fn ttft_us(done: &Done) -> u64 {
    done.first_token_us.saturating_sub(done.arrival.at_us)
}

/// Mean time between tokens, microseconds; `None` for an answer of one token.
pub(crate) fn tpot_us(done: &Done) -> Option<u64> {
    let between = u64::from(done.arrival.output_tokens.checked_sub(1)?);
    (between > 0).then(|| done.last_token_us.saturating_sub(done.first_token_us) / between)
}

impl Outcome {
    /// Adds up what the pools saw until the end of the trace.
    pub(crate) fn of(
        plan: &Plan,
        demand: &Demand,
        pools: Vec<Pool<'_>>,
        requests: Requests,
        watch: &Stopwatch,
    ) -> Outcome {
        let minutes = minutes(demand, &pools);
        // A minute belongs to the judged time when it lies in it entirely.
        let first = usize::try_from(micros(plan.judge_from_s).div_ceil(MINUTE_US)).unwrap_or(usize::MAX);
        let judged = minutes.get(first..).unwrap_or_default();
        let judged_us = pools.iter().map(|pool| pool.meter.judged_us).max().unwrap_or(0);
        let running_us: u64 = pools.iter().map(|pool| pool.meter.paid_us).sum();
        let beyond_us: u64 = pools.iter().map(|pool| pool.meter.beyond_us).sum();
        let spot_us: u64 = pools.iter().map(|pool| pool.meter.spot_us).sum();
        let committed: u32 = pools.iter().map(|pool| pool.meter.committed).sum();
        let spot_rate = plan.failures.spot.map_or(plan.prices.on_demand, |spot| spot.rate);
        let usd = plan.prices.committed.over(plan.gpus.saturating_mul(committed), judged_us)
            + plan.prices.on_demand.over(plan.gpus, beyond_us)
            + spot_rate.over(plan.gpus, spot_us);
        let static_peak = static_peak(plan, &pools, first, judged_us, committed);
        let reversals = pools.iter().map(|pool| pool.decider.reversals_us.len() as u64).sum();
        let sum = |part: &dyn Fn(&Pool<'_>) -> u64| pools.iter().map(part).sum::<u64>();
        let overload = overload(judged);
        let mut outcome = Outcome {
            policy: plan.policy.to_string(),
            trace: demand.name.clone(),
            notes: demand.notes.clone(),
            hours: judged_us as f64 / HOUR_US as f64,
            gpu_hours: running_us as f64 / HOUR_US as f64 * f64::from(plan.gpus),
            usd,
            saved: 1.0 - ratio(usd, static_peak.usd),
            static_peak,
            requests: requests.arrived,
            done: requests.done,
            failed: requests.failed,
            unfinished: requests.unfinished,
            retried: requests.retried,
            held: requests.held,
            overload,
            latency: watch.latency(&plan.objective, requests.arrived),
            preemptions: requests.preemptions,
            starts: sum(&|pool| pool.tally.starts),
            crashes: sum(&|pool| pool.tally.crashes),
            taken_away: sum(&|pool| pool.tally.taken_away),
            cancelled: sum(&|pool| pool.tally.cancelled),
            unscheduled: sum(&|pool| pool.tally.unscheduled),
            decisions: sum(&|pool| pool.decider.decisions),
            changes: sum(&|pool| pool.decider.changes),
            direction_changes: reversals,
            direction_changes_per_hour_max: pools
                .iter()
                .map(|pool| most_within_an_hour(&pool.decider.reversals_us))
                .max()
                .unwrap_or(0),
            ready_min: pools.iter().map(|pool| pool.meter.ready_min).min().unwrap_or(0),
            provisioned_max: pools.iter().map(|pool| pool.meter.provisioned_max).sum(),
            log: Vec::new(),
            log_dropped: sum(&|pool| pool.decider.log_dropped),
            minutes,
        };
        outcome.log = pools.into_iter().flat_map(|pool| pool.decider.log).collect();
        outcome.log.sort_by_key(|logged| logged.at);
        outcome
    }
}

fn minutes(demand: &Demand, pools: &[Pool<'_>]) -> Vec<Minute> {
    let requests = demand.request_minutes();
    let end_us = demand.len_us();
    let minute = |index: usize| {
        // The last minute may be a part of one.
        let span_us = (end_us - index as u64 * MINUTE_US).min(MINUTE_US) as f64;
        let sum = |part: fn(&MinuteSums) -> u64| pools.iter().map(|pool| part(&pool.meter.minutes[index])).sum::<u64>();
        let mean = |part: fn(&MinuteSums) -> u64| narrow(sum(part) as f64 / span_us);
        let overloaded = |pool: &Pool<'_>| {
            let could = pool.meter.minutes[index].ready_us as f64 / span_us;
            f64::from(pool.decider.minutes[index]) > could * (1.0 + 1e-6)
        };
        Minute {
            requests: requests[index],
            load: pools.iter().map(|pool| pool.decider.minutes[index]).sum(),
            ready: mean(|sums| sums.ready_us),
            pending: mean(|sums| sums.pending_us),
            draining: mean(|sums| sums.draining_us),
            paid: mean(|sums| sums.paid_us),
            overloaded: pools.iter().any(overloaded),
        }
    };
    (0..requests.len()).map(minute).collect()
}

fn overload(judged: &[Minute]) -> Overload {
    let requests: u64 = judged.iter().map(|minute| u64::from(minute.requests)).sum();
    let overloaded = judged.iter().filter(|minute| minute.overloaded);
    let (minutes, missed) =
        overloaded.fold((0, 0), |(minutes, missed), minute| (minutes + 1, missed + u64::from(minute.requests)));
    Overload { minutes, requests: missed, share: missed as f64 / requests.max(1) as f64 }
}

fn static_peak(plan: &Plan, pools: &[Pool<'_>], first: usize, judged_us: u64, committed: u32) -> StaticPeak {
    let peak = |pool: &Pool<'_>| {
        let judged = pool.decider.minutes.get(first..).unwrap_or_default();
        whole(f64::from(judged.iter().copied().fold(0.0_f32, f32::max)).ceil()).max(1)
    };
    let replicas: u32 = pools.iter().map(peak).sum();
    let beyond: u32 = pools.iter().map(|pool| peak(pool).saturating_sub(pool.meter.committed)).sum();
    let usd = plan.prices.committed.over(plan.gpus.saturating_mul(committed), judged_us)
        + plan.prices.on_demand.over(plan.gpus.saturating_mul(beyond), judged_us);
    let gpu_hours = f64::from(replicas) * f64::from(plan.gpus) * judged_us as f64 / HOUR_US as f64;
    StaticPeak { replicas, gpu_hours, usd }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float saturates at the integer's ends")]
fn whole(value: f64) -> u32 {
    value as u32
}

fn ratio(amount: Money, of: Money) -> f64 {
    if of == Money::ZERO { 1.0 } else { amount.pico() as f64 / of.pico() as f64 }
}

/// The most of these times, in order, that lie within one hour.
fn most_within_an_hour(times_us: &[u64]) -> u64 {
    let mut from = 0;
    let mut most = 0;
    for (index, &at_us) in times_us.iter().enumerate() {
        while times_us[from] + HOUR_US <= at_us {
            from += 1;
        }
        most = most.max(index - from + 1);
    }
    most as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::request::Arrival;

    #[test]
    fn the_busiest_hour_is_found_wherever_it_lies() {
        let minute = |minute: u64| minute * MINUTE_US;
        assert_eq!(most_within_an_hour(&[]), 0);
        assert_eq!(most_within_an_hour(&[minute(0), minute(60)]), 1);
        assert_eq!(most_within_an_hour(&[minute(0), minute(50), minute(59), minute(100), minute(109)]), 4);
    }

    #[test]
    fn what_misses_either_part_of_the_objective_misses_it() {
        let objective = Objective { ttft_s: 1.0, tpot_s: 0.1, percentile: 0.95 };
        let mut watch = Stopwatch::new(&objective);
        let done = |first_s: u64, last_s: u64, output_tokens: u32| Done {
            arrival: Arrival { at_us: 0, output_tokens, ..Arrival::default() },
            first_token_us: first_s * 1_000_000,
            last_token_us: last_s * 1_000_000,
            ..Done::default()
        };
        for done in [done(1, 2, 11), done(1, 3, 11), done(2, 3, 11), done(1, 1, 1)] {
            watch.record(&done);
        }
        let latency = watch.latency(&objective, 5).unwrap();
        assert_eq!((latency.attained_ttft, latency.attained_tpot, latency.attained), (0.6, 0.6, 0.4));
        assert_eq!(latency.e2e.max_s, 3.0);
    }
}
