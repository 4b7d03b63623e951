//! Plays the trace with 0, 1, 2, … committed replicas and keeps what each level came to.

use std::sync::atomic::{AtomicU32, Ordering};

use fleet::scale::{Bounds, Policy};
use fleet::sim::fluid;
use fleet::sim::outcome::{Minute, Outcome};
use fleet::sim::plan::{Log, Plan};
use ledger::Money;
use ledger::commit::{Bill, Demand, Rates};

use crate::cli::{Commit as Options, Scaler};
use crate::commands::progress;
use crate::commands::simulate::prepare::Played;

const MINUTE_US: u64 = 60_000_000;
const HOUR_US: u64 = 60 * MINUTE_US;
const MINUTES_PER_HOUR: usize = 60;

/// What was found at every level.
#[derive(Debug)]
pub struct Levels {
    /// The policy with its parameters; `None` where the demand alone was taken.
    pub policy: Option<String>,
    /// What both kinds of GPUs cost for an hour of the need.
    pub rates: Rates,
    /// GPUs in use without any commitment.
    pub demand: Demand,
    /// From no committed replica to as many as were ever there.
    pub candidates: Vec<Candidate>,
    /// The course without any commitment; empty where the demand alone was taken.
    pub minutes: Vec<Minute>,
}

/// One level.
#[derive(Debug, Clone, Copy)]
pub struct Candidate {
    /// By the curve of use without commitment: what is above it is paid on demand.
    pub bill: Bill,
    /// All that is paid when the trace is played with this level.
    pub played: Money,
    /// Part of all requests in overloaded minutes then; `None` where nothing was played.
    pub overloaded: Option<f64>,
}

/// Plays them all at these rates, which are what is played, too.
#[must_use]
pub fn find(played: &Played, options: &Options, rates: Rates) -> Levels {
    match &options.policy {
        Some(Scaler::Nobody) => of_demand(played, options, rates),
        Some(Scaler::By(policy)) => of_policy(played, rates, policy.clone()),
        None => of_policy(played, rates, Policy::default()),
    }
}

/// The demand of each hour in whole replicas, without a policy.
fn of_demand(played: &Played, options: &Options, rates: Rates) -> Levels {
    // Nothing is learnt, so nothing is left out unless that was asked for.
    let first = if options.workload.learn_days.is_some() { first_judged(&played.plan) } else { 0 };
    let minutes = played.demand.minutes();
    let hours = minutes.get(first..).unwrap_or_default().chunks(MINUTES_PER_HOUR).map(|hour| {
        let mean = hour.iter().map(|&load| f64::from(load)).sum::<f64>() / hour.len() as f64;
        let length_us = HOUR_US / 60 * u64::try_from(hour.len()).unwrap_or(0);
        // Rounding of floats may put a whole number just above itself.
        (whole((mean - 1e-6).ceil()).saturating_mul(played.plan.gpus), length_us)
    });
    let demand = Demand::of(hours);
    let candidates = (0..=demand.peak() / played.plan.gpus)
        .map(|replicas| {
            let bill = Bill::of(&demand, rates, replicas * played.plan.gpus);
            Candidate { bill, played: bill.total(), overloaded: None }
        })
        .collect();
    Levels { policy: None, rates, demand, candidates, minutes: Vec::new() }
}

/// What the policy keeps running, with every level as the floor: committed replicas run at no cost of their own.
fn of_policy(played: &Played, rates: Rates, policy: Policy) -> Levels {
    let plan = Plan { policy, log: Log::None, ..played.plan.clone() };
    let without = play(&plan, played, 0);
    let gpus = plan.gpus;
    let first = first_judged(&plan).min(without.minutes.len());
    let last_us = played.demand.len_us() % MINUTE_US;
    let demand = curve(&without.minutes[first..], last_us, gpus);
    let peak = demand.peak() / gpus;

    let bar = progress("{msg} {wide_bar} {pos}/{len} {eta}");
    bar.set_message("playing every level");
    bar.set_length(u64::from(peak));
    let mut candidates: Vec<Candidate> = vec![candidate(&demand, rates, gpus, 0, &without)];
    let next = AtomicU32::new(1);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8);
    let found: Vec<Vec<Candidate>> = std::thread::scope(|scope| {
        let work = || {
            let mut found = Vec::new();
            loop {
                let level = next.fetch_add(1, Ordering::Relaxed);
                if level > peak {
                    return found;
                }
                found.push(candidate(&demand, rates, gpus, level, &play(&plan, played, level)));
                bar.inc(1);
            }
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        threads.into_iter().map(|thread| thread.join().expect("a simulation does not panic")).collect()
    });
    candidates.extend(found.into_iter().flatten());
    candidates.sort_by_key(|candidate| candidate.bill.level);
    bar.finish_and_clear();
    Levels {
        policy: Some(plan.policy.to_string()),
        rates,
        demand,
        candidates,
        minutes: without.minutes[first..].to_vec(),
    }
}

fn play(plan: &Plan, played: &Played, level: u32) -> Outcome {
    let bounds = plan.bounds;
    let floor = bounds.floor.max(level);
    let bounds = Bounds { committed: level, floor, ceiling: bounds.ceiling.max(floor), ..bounds };
    fluid::run(&Plan { bounds, ..plan.clone() }, &played.demand)
}

fn candidate(demand: &Demand, rates: Rates, gpus: u32, replicas: u32, outcome: &Outcome) -> Candidate {
    Candidate {
        bill: Bill::of(demand, rates, replicas.saturating_mul(gpus)),
        played: outcome.usd,
        overloaded: Some(outcome.overload.share),
    }
}

/// Minutes as a curve. A minute with 17.4 replicas on average had 18 of them for 0.4 of it and 17 for the rest. The last
/// one may be a part of a minute, `last_us` long.
fn curve(minutes: &[Minute], last_us: u64, gpus: u32) -> Demand {
    let last = minutes.len().saturating_sub(1);
    Demand::of(minutes.iter().enumerate().flat_map(|(index, minute)| {
        let length_us = if index == last && last_us > 0 { last_us } else { MINUTE_US };
        let paid = f64::from(minute.paid);
        let (low, part) = (whole(paid.floor()), paid.fract());
        let high_us = u64::from(whole((part * length_us as f64).round())).min(length_us);
        [(low.saturating_mul(gpus), length_us - high_us), ((low + 1).saturating_mul(gpus), high_us)]
    }))
}

fn first_judged(plan: &Plan) -> usize {
    whole((plan.judge_from_s / 60.0).ceil()) as usize
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float saturates at the integer's ends")]
fn whole(value: f64) -> u32 {
    value as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minute_with_a_part_of_a_replica_keeps_its_gpu_time() {
        let minute = |paid| Minute { paid, ..Minute::default() };
        let demand = curve(&[minute(2.0), minute(2.25)], 0, 4);
        assert_eq!(demand, Demand::of([(8, MINUTE_US), (8, MINUTE_US * 3 / 4), (12, MINUTE_US / 4)]));
        assert_eq!(demand.gpu_us(), 17 * MINUTE_US);
        // Three replicas for the ten seconds that are left.
        assert_eq!(curve(&[minute(3.0)], MINUTE_US / 6, 1), Demand::of([(3, MINUTE_US / 6)]));
    }
}
