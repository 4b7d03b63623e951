//! Plays policies, tuned or as they are, with a progress bar.

use fleet::scale::{Guards, Policy};
use fleet::sim::compare::{self, Row};
use fleet::sim::fleet::Scenario;
use fleet::sim::outcome::Outcome;
use fleet::sim::plan::{Log, Plan};
use fleet::sim::search::{self, Found, Goal};
use fleet::sim::{fleet as engines, fluid};

use super::prepare::Played;
use crate::commands::progress;

/// A policy as it was asked for, and what tuning made of it.
#[derive(Debug)]
pub struct Tuned {
    /// As it was asked for.
    pub asked: Policy,
    /// What was found on the days to learn.
    pub found: Found,
}

/// Plays each policy: with engines where there is one, else the load alone. One policy keeps its decisions and minutes.
///
/// # Errors
/// What reading the trace says.
pub fn policies(played: &Played, policies: &[Policy]) -> anyhow::Result<Vec<Row>> {
    let bar = progress("{msg} {wide_bar} {pos}/{len} {eta}");
    bar.set_message("simulating");
    let rows = match policies {
        [only] => vec![alone(only, one(played, only, &bar)?)],
        several => {
            let plan = Plan { log: Log::None, ..played.plan.clone() };
            match played.engine {
                Some(engine) => {
                    let scenario = Scenario { router: played.router, ..Scenario::new(plan, engine, played.work) };
                    let play = compare::engines(&scenario, &played.trace, &played.demand);
                    compare::compare(several, &play, threads(), &shown(&bar))?
                }
                None => {
                    let play = compare::fluid(&plan, &played.demand);
                    compare::compare(several, &play, threads(), &shown(&bar))?
                }
            }
        }
    };
    bar.finish_and_clear();
    Ok(rows)
}

fn one(played: &Played, policy: &Policy, bar: &indicatif::ProgressBar) -> anyhow::Result<Outcome> {
    let guards = if super::knows_the_future(policy) { Guards::off() } else { played.plan.guards };
    let plan = Plan { policy: policy.clone(), guards, log: Log::Changes, ..played.plan.clone() };
    let Some(engine) = played.engine else { return Ok(fluid::run(&plan, &played.demand)) };
    bar.set_length(played.demand.requests.iter().map(|&requests| u64::from(requests)).sum());
    let scenario = Scenario { router: played.router, ..Scenario::new(plan, engine, played.work) };
    Ok(engines::run(&scenario, &played.trace, &played.demand, &mut |done| bar.set_position(done))?)
}

/// A policy that stands beside the static plan only.
fn alone(policy: &Policy, outcome: Outcome) -> Row {
    let an_hour = |count: u64| if outcome.hours > 0.0 { count as f64 / outcome.hours } else { 0.0 };
    Row {
        policy: policy.clone(),
        saved_static: outcome.saved,
        saved_hpa: None,
        over_oracle: None,
        decisions_per_hour: an_hour(outcome.decisions),
        direction_changes_per_hour: an_hour(outcome.direction_changes),
        outcome,
    }
}

/// Tunes each policy on the days to learn, the load alone. The first third of them is only learnt from there too.
///
/// # Errors
/// When there are no days to learn.
pub fn search(played: &Played, policies: &[Policy], overload_max: f64) -> anyhow::Result<Vec<Tuned>> {
    let learn_s = played.plan.judge_from_s;
    if learn_s <= 0.0 {
        anyhow::bail!(
            "there is nothing to tune on: say with --learn-days how many days at the beginning are to learn from"
        );
    }
    let demand = search::first(&played.demand, learn_s);
    let plan = Plan { judge_from_s: learn_s / 3.0, log: Log::None, ..played.plan.clone() };
    let goal = Goal { overload_share: overload_max, direction_changes_per_hour_max: Some(6), ..Goal::default() };
    let play = compare::fluid(&plan, &demand);
    policies
        .iter()
        .map(|policy| {
            let bar = progress("{msg} {wide_bar} {pos}/{len} {eta}");
            bar.set_message(format!("tuning {}", policy.name()));
            let found = search::search(policy, &[&play], &goal, threads(), &shown(&bar))?;
            bar.finish_and_clear();
            Ok(Tuned { asked: policy.clone(), found })
        })
        .collect()
}

fn shown(bar: &indicatif::ProgressBar) -> impl Fn(usize, usize) + Sync + '_ {
    |done, total| {
        bar.set_length(u64::try_from(total).unwrap_or(u64::MAX));
        bar.set_position(u64::try_from(done).unwrap_or(u64::MAX));
    }
}

fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
