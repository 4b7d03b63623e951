//! `farthing simulate`: a trace against scaling policies, or one engine on its own.

pub mod engine;
mod history;
mod play;
pub mod prepare;
mod show;

use std::process::ExitCode;

use fleet::scale::Policy;
use fleet::sim::failure::Failures;

use super::App;
use crate::cli::{Fault, Policies, Simulate, SimulateFleet, SimulateOne};
use crate::render::{self, picture};
use prepare::prepare;

/// Plays what was asked for and writes the answer.
///
/// # Errors
/// One line on what is wrong with a file or an option.
pub async fn run(app: &App, options: &Simulate) -> anyhow::Result<ExitCode> {
    match &options.one {
        Some(SimulateOne::Engine(options)) => engine::run(app, options),
        None => fleet(app, &options.fleet).await,
    }
}

async fn fleet(app: &App, options: &SimulateFleet) -> anyhow::Result<ExitCode> {
    options.picture.as_deref().map(picture::check).transpose()?;
    let mut played = prepare(app, &options.workload).await?;
    played.router = options.router;
    played.plan.faults = Fault::all(&options.fault);
    played.plan.failures = Failures { mtbf_h: options.crash_every_h, ..played.plan.failures };
    let policies = match (&options.compare, &options.policy) {
        (Some(Policies(several)), _) => several.clone(),
        (None, one) => vec![one.clone().unwrap_or_default()],
    };
    let tuned = if options.search { play::search(&played, &policies, options.overload_max)? } else { Vec::new() };
    let policies = if tuned.is_empty() { policies } else { tuned.iter().map(|one| one.found.policy.clone()).collect() };
    let rows = play::policies(&played, &policies)?;
    if let Some(file) = &options.picture {
        picture::write(file, &show::picture(&played, &rows)?)?;
    }
    if app.global.json {
        render::say_json(&show::document(&played, &rows, &tuned)?)?;
    } else {
        render::say(&show::text(&played, options, &rows, &tuned))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether a policy knows what comes: a bound, not a choice.
fn knows_the_future(policy: &Policy) -> bool {
    matches!(policy, Policy::Oracle(_))
}
