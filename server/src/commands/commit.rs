//! `farthing commit`: how many GPUs to commit to, found by playing the trace at every level.

mod answer;
mod horizon;
mod levels;
mod words;

use std::process::ExitCode;

use anyhow::bail;

use super::App;
use super::simulate::prepare::prepare;
use crate::cli::Commit as Options;
use crate::render::{self, picture};

/// Finds the level and writes the answer.
///
/// # Errors
/// One line on what is wrong with a file or an option.
pub async fn run(app: &App, options: &Options) -> anyhow::Result<ExitCode> {
    options.picture.as_deref().map(picture::check).transpose()?;
    if options.workload.committed > 0 {
        bail!("--committed says what is committed already; `farthing commit` tries every level, so leave it out");
    }
    let mut played = prepare(app, &options.workload).await?;
    let chosen = horizon::spread(&mut played, options)?;
    let levels = levels::find(&played, options, chosen.rates);
    let answer = answer::of(&played, options, chosen, levels);
    if let Some(file) = &options.picture {
        picture::write(file, &picture::curve(&answer.curve())?)?;
    }
    if app.global.json {
        render::say_json(&answer.document())?;
    } else {
        render::say(&words::text(&played, options, &answer))?;
    }
    Ok(ExitCode::SUCCESS)
}
