//! Policies side by side on one scenario: what each costs and misses, against the static plan, the tuned autoscaler and the oracle.

mod bound;

use std::sync::atomic::{AtomicUsize, Ordering};

use serde::Serialize;

pub use bound::{Bound, bound};

use super::demand::Demand;
use super::fleet::{self, Scenario};
use super::fluid;
use super::outcome::Outcome;
use super::plan::Plan;
use super::trace::{Trace, TraceError};
use crate::scale::{Guards, Policy};

/// Plays one policy on one scenario.
pub type Play<'a> = dyn Fn(&Policy) -> Result<Outcome, TraceError> + Sync + 'a;

/// Hears how many of how many runs are done.
pub type Progress<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// One policy's result.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// The policy.
    pub policy: Policy,
    /// What came out, without its course and its decisions.
    pub outcome: Outcome,
    /// Part of the static plan's dollars that was saved. Committed GPUs are paid in both, so that only what lies above the
    /// commitment counts.
    pub saved_static: f64,
    /// Part of the dollars of the first `hpa` in the comparison that was saved.
    pub saved_hpa: Option<f64>,
    /// Dollars above those of the first `oracle` in the comparison, as a part of them.
    pub over_oracle: Option<f64>,
    /// Decisions an hour.
    pub decisions_per_hour: f64,
    /// Turns from rising to falling or back an hour, mean.
    pub direction_changes_per_hour: f64,
}

/// Plays in the fluid mode. The oracle is played without guards, as the bound that it is.
pub fn fluid<'a>(plan: &'a Plan, demand: &'a Demand) -> impl Fn(&Policy) -> Result<Outcome, TraceError> + Sync + 'a {
    |policy| Ok(fluid::run(&with_policy(plan, policy), demand))
}

/// Plays with engines. The oracle is played without guards, as the bound that it is.
pub fn engines<'a>(
    scenario: &'a Scenario,
    trace: &'a Trace,
    demand: &'a Demand,
) -> impl Fn(&Policy) -> Result<Outcome, TraceError> + Sync + 'a {
    |policy| {
        let scenario = Scenario { plan: with_policy(&scenario.plan, policy), ..scenario.clone() };
        fleet::run(&scenario, trace, demand, &mut |_| {})
    }
}

fn with_policy(plan: &Plan, policy: &Policy) -> Plan {
    let guards = if matches!(policy, Policy::Oracle(_)) { Guards::off() } else { plan.guards };
    Plan { policy: policy.clone(), guards, ..plan.clone() }
}

/// Plays every policy, as many at once as there are threads. Rows come in the order of the policies.
///
/// # Errors
/// The first that reading the trace had.
pub fn compare(policies: &[Policy], play: &Play, threads: usize, progress: &Progress) -> Result<Vec<Row>, TraceError> {
    let outcomes = play_all(policies, play, threads, progress)?;
    let usd = |name: &str| {
        let found = policies.iter().position(|policy| policy.name() == name)?;
        outcomes.get(found).map(dollars).filter(|&usd| usd > 0.0)
    };
    let (hpa, oracle) = (usd("hpa"), usd("oracle"));
    let row = |(policy, outcome): (&Policy, &Outcome)| Row {
        policy: policy.clone(),
        saved_static: outcome.saved,
        saved_hpa: hpa.map(|hpa| 1.0 - dollars(outcome) / hpa),
        over_oracle: oracle.map(|oracle| dollars(outcome) / oracle - 1.0),
        decisions_per_hour: per_hour(outcome.decisions, outcome.hours),
        direction_changes_per_hour: per_hour(outcome.direction_changes, outcome.hours),
        outcome: Outcome { minutes: Vec::new(), log: Vec::new(), ..outcome.clone() },
    };
    Ok(policies.iter().zip(&outcomes).map(row).collect())
}

/// What was paid, for ratios only.
pub(super) fn dollars(outcome: &Outcome) -> f64 {
    outcome.usd.pico() as f64 / 1e12
}

fn per_hour(count: u64, hours: f64) -> f64 {
    if hours > 0.0 { count as f64 / hours } else { 0.0 }
}

/// Plays all, in order of the results, on at most so many threads.
pub(super) fn play_all(
    policies: &[Policy],
    play: &Play,
    threads: usize,
    progress: &Progress,
) -> Result<Vec<Outcome>, TraceError> {
    let next = AtomicUsize::new(0);
    let done = AtomicUsize::new(0);
    let work = || {
        let mut mine = Vec::new();
        while let Some((index, policy)) = {
            let index = next.fetch_add(1, Ordering::Relaxed);
            policies.get(index).map(|policy| (index, policy))
        } {
            mine.push((index, play(policy)));
            progress(done.fetch_add(1, Ordering::Relaxed) + 1, policies.len());
        }
        mine
    };
    let threads = threads.clamp(1, policies.len().max(1));
    let mut results = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(join).collect::<Vec<_>>()
    });
    results.sort_by_key(|&(index, _)| index);
    results.into_iter().map(|(_, outcome)| outcome).collect()
}

fn join<T>(worker: std::thread::ScopedJoinHandle<'_, T>) -> T {
    worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// The parameter that trades cost against misses most directly.
#[must_use]
pub fn main_parameter(policy: &Policy) -> Option<&'static str> {
    match policy {
        Policy::Static(_) => Some("replicas"),
        Policy::Schedule(_) => None,
        Policy::Hpa(_) | Policy::Kpa(_) => Some("target"),
        Policy::QueueKv(_) => Some("kv"),
        Policy::TokenRate(_) | Policy::Oracle(_) => Some("headroom"),
        Policy::Forecast(_) => Some("spreads"),
        Policy::CostOptimal(_) => Some("miss"),
    }
}

/// A policy over its main parameter: the points of its frontier. Only itself where it has none.
#[must_use]
pub fn sweep(policy: &Policy) -> Vec<Policy> {
    let Some(name) = main_parameter(policy) else { return vec![policy.clone()] };
    let Some((_, value, min, max)) = policy.parameters().into_iter().find(|(found, ..)| *found == name) else {
        return vec![policy.clone()];
    };
    let factors: &[f64] = match policy {
        Policy::CostOptimal(_) => &[0.05, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0, 100.0],
        _ => &[0.5, 0.65, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0],
    };
    let mut values: Vec<f64> = factors.iter().map(|factor| (value * factor).clamp(min, max)).collect();
    values.dedup();
    values.into_iter().filter_map(|value| policy.with(name, value).ok()).collect()
}

#[cfg(test)]
pub(crate) mod tests;
