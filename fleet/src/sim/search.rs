//! Tuning: the cheapest parameters of a policy that keep to a goal, found in the fluid mode on the part of a trace that may be learnt
//! from, and to be judged elsewhere.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::compare::{Play, Progress, dollars, main_parameter, play_all};
use super::demand::Demand;
use super::outcome::Outcome;
use super::startup::micros;
use super::trace::TraceError;
use crate::scale::Policy;

/// What has to be kept to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Goal {
    /// At most this part of all requests in overloaded minutes.
    pub overload_share: f64,
    /// At least this part of all requests within the objective; only engines can say.
    pub attained: Option<f64>,
    /// At most so many turns from rising to falling or back in any hour.
    pub direction_changes_per_hour_max: Option<u64>,
}

impl Default for Goal {
    /// 0.08 % of the requests in overloaded minutes.
    fn default() -> Goal {
        Goal { overload_share: 0.0008, attained: None, direction_changes_per_hour_max: None }
    }
}

/// What was found.
#[derive(Debug, Clone)]
pub struct Found {
    /// The policy with its parameters.
    pub policy: Policy,
    /// Whether it keeps to the goal; if not it is the one that comes closest.
    pub met: bool,
    /// What came out of each play.
    pub outcomes: Vec<Outcome>,
    /// Sets of parameters that were tried.
    pub tried: usize,
}

/// Sets that are drawn at random beside the policy's own.
const DRAWN: usize = 32;
/// Times that a set's main parameter is halved in on.
const HALVINGS: usize = 7;
/// Rounds of refinement, each trying every other parameter a step up and a step down.
const ROUNDS: usize = 4;
/// The same within these rounds, where the bracket is narrow already.
const HALVINGS_NEAR: usize = 4;
/// The main parameter is looked for from its value divided by this to its value times this.
const BRACKET: f64 = 8.0;
/// The same within the rounds of refinement.
const BRACKET_NEAR: f64 = 1.5;

/// Looks for the cheapest parameters that keep to the goal over all plays together: requests are added up, and so are dollars as a part of
/// each static plan's. Deterministic.
///
/// Sets of the other parameters are drawn (each between a quarter and four times its value); of every set the main parameter is brought as
/// close to the goal as it goes, by halving; and the best set is refined one parameter at a time, in steps that shrink.
///
/// # Errors
/// The first that reading a trace had.
pub fn search(
    policy: &Policy,
    plays: &[&Play],
    goal: &Goal,
    threads: usize,
    progress: &Progress,
) -> Result<Found, TraceError> {
    let others = policy.parameters().len().saturating_sub(1);
    let expected = 1 + (DRAWN + 1) * (HALVINGS + 2) + ROUNDS * 2 * others * HALVINGS_NEAR;
    let mut state = State { plays, goal, threads, progress, tried: 0, expected, best: None };
    let mut random = StdRng::seed_from_u64(1);
    let mut sets = vec![policy.clone()];
    sets.extend((0..DRAWN).map(|_| {
        vary(policy, |_, value, min, max| (value * 4.0_f64.powf(random.random_range(-1.0..1.0))).clamp(min, max))
    }));
    state.try_all(std::slice::from_ref(policy))?;
    state.bring_to_goal(&sets, BRACKET, HALVINGS)?;
    let mut step = 1.6_f64;
    for _ in 0..ROUNDS {
        let best = state.policy(policy);
        if !state.bring_to_goal(&around(&best, step), BRACKET_NEAR, HALVINGS_NEAR)? {
            step = step.sqrt();
        }
    }
    let tried = state.tried;
    let found = |best: Best| Found { policy: best.policy, met: best.score.over <= 0.0, outcomes: best.outcomes, tried };
    let none = || Found { policy: policy.clone(), met: false, outcomes: Vec::new(), tried };
    Ok(state.best.map_or_else(none, found))
}

/// Each parameter but the main one a step up and a step down from there.
fn around(policy: &Policy, step: f64) -> Vec<Policy> {
    let main = main_parameter(policy);
    let names = policy.parameters().into_iter().map(|(name, ..)| name).filter(|name| Some(*name) != main);
    let both = |name: &'static str| [times(policy, name, step), times(policy, name, 1.0 / step)];
    names.flat_map(both).filter(|other| other != policy).collect()
}

/// The policy with one parameter multiplied, as far as it goes.
fn times(policy: &Policy, name: &str, factor: f64) -> Policy {
    vary(policy, |found, value, min, max| if found == name { (value * factor).clamp(min, max) } else { value })
}

/// The policy with every parameter changed as told; one that would not be allowed stays.
fn vary(policy: &Policy, mut change: impl FnMut(&str, f64, f64, f64) -> f64) -> Policy {
    let mut varied = policy.clone();
    for (name, value, min, max) in policy.parameters() {
        varied = varied.with(name, change(name, value, min, max)).unwrap_or(varied);
    }
    varied
}

/// Whether more of the main parameter means more replicas.
fn more_is_safer(policy: &Policy) -> bool {
    !matches!(policy, Policy::Hpa(_) | Policy::Kpa(_) | Policy::QueueKv(_))
}

/// The first part of a demand: what may be learnt from.
#[must_use]
pub fn first(demand: &Demand, seconds: f64) -> Demand {
    let bins = usize::try_from(micros(seconds) / demand.bin_us.max(1)).unwrap_or(usize::MAX);
    let mut first = demand.clone();
    first.load.truncate(bins);
    first.prefill.truncate(bins);
    first.requests.truncate(bins);
    first
}

struct State<'a> {
    plays: &'a [&'a Play<'a>],
    goal: &'a Goal,
    threads: usize,
    progress: &'a Progress<'a>,
    tried: usize,
    expected: usize,
    best: Option<Best>,
}

struct Best {
    policy: Policy,
    score: Score,
    outcomes: Vec<Outcome>,
}

/// Keeping to the goal comes first, then cost.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
struct Score {
    /// How far the goal is missed, as a part of it; 0 when it is met.
    over: f64,
    /// Dollars as a part of the static plans'.
    cost: f64,
}

impl State<'_> {
    fn policy(&self, otherwise: &Policy) -> Policy {
        self.best.as_ref().map_or_else(|| otherwise.clone(), |best| best.policy.clone())
    }

    /// Brings the main parameter of every set as close to the goal as it goes; whether one of all that were tried is better than the best
    /// so far.
    fn bring_to_goal(&mut self, sets: &[Policy], bracket: f64, halvings: usize) -> Result<bool, TraceError> {
        let Some(main) = sets.first().and_then(main_parameter) else {
            return self.try_all(sets).map(|scores| scores.better);
        };
        // Exponents of the bracket: from where it is cheap to where it is safe.
        let sign = if sets.first().is_none_or(more_is_safer) { 1.0 } else { -1.0 };
        let mut spans = vec![(-sign, sign); sets.len()];
        let mut better = false;
        for _ in 0..halvings {
            let middles = spans.iter().map(|(cheap, safe)| f64::midpoint(*cheap, *safe));
            let tries: Vec<Policy> =
                sets.iter().zip(middles).map(|(set, exponent)| times(set, main, bracket.powf(exponent))).collect();
            let scores = self.try_all(&tries)?;
            better |= scores.better;
            for (span, score) in spans.iter_mut().zip(scores.all) {
                let middle = f64::midpoint(span.0, span.1);
                if score.over <= 0.0 { span.1 = middle } else { span.0 = middle }
            }
        }
        Ok(better)
    }

    /// Plays all.
    fn try_all(&mut self, policies: &[Policy]) -> Result<Scores, TraceError> {
        let before = self.tried;
        let total = self.expected.max(before + policies.len());
        let plays = self.plays.len().max(1);
        let mut by_play = Vec::new();
        for (index, play) in self.plays.iter().enumerate() {
            let heard = |done: usize, of: usize| (self.progress)(before + (index * of + done) / plays, total);
            by_play.push(play_all(policies, play, self.threads, &heard)?.into_iter());
        }
        self.tried += policies.len();
        let mut scores = Scores { all: Vec::new(), better: false };
        for policy in policies {
            let outcomes: Vec<Outcome> = by_play.iter_mut().filter_map(Iterator::next).collect();
            let score = score(&outcomes, self.goal);
            scores.all.push(score);
            if self.best.as_ref().is_none_or(|best| score < best.score) {
                scores.better = true;
                self.best = Some(Best { policy: policy.clone(), score, outcomes });
            }
        }
        Ok(scores)
    }
}

/// What a number of tries came to.
struct Scores {
    all: Vec<Score>,
    /// Whether one of them is the best so far.
    better: bool,
}

fn score(outcomes: &[Outcome], goal: &Goal) -> Score {
    let sum = |of: &dyn Fn(&Outcome) -> f64| outcomes.iter().map(of).sum::<f64>();
    let requests = sum(&|outcome| outcome.requests as f64).max(1.0);
    let overloaded = sum(&|outcome| outcome.overload.requests as f64) / requests;
    let mut over = excess(overloaded, goal.overload_share);
    if let Some(attained) = goal.attained {
        let missed = sum(&|outcome| {
            outcome.requests as f64 * (1.0 - outcome.latency.as_ref().map_or(0.0, |latency| latency.attained))
        });
        over += excess(missed / requests, 1.0 - attained);
    }
    if let Some(most) = goal.direction_changes_per_hour_max {
        let turns = outcomes.iter().map(|outcome| outcome.direction_changes_per_hour_max).max().unwrap_or(0);
        over += excess(turns as f64, most as f64);
    }
    let cost = sum(&|outcome| dollars(outcome) / (outcome.static_peak.usd.pico() as f64 / 1e12).max(1e-9));
    Score { over, cost }
}

/// How far `value` is above what is allowed, as a part of it.
fn excess(value: f64, allowed: f64) -> f64 {
    if value <= allowed { 0.0 } else { (value - allowed) / allowed.max(1e-9) }
}

#[cfg(test)]
mod tests;
