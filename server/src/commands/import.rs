//! `farthing import KIND FILE…`: usage from files into the ledger, each file whole or not at all.

use std::process::ExitCode;

use anyhow::{Context as _, bail};

use super::App;
use crate::cli::Import;
use crate::config::price_book;
use crate::import::{Outcome, Settings, import};
use crate::render::{self, Align, Table};
use crate::{books, clock};

/// Imports the files one after the other.
///
/// # Errors
/// When a file cannot be imported; files before it stay imported.
pub async fn run(app: &App, options: &Import) -> anyhow::Result<ExitCode> {
    for file in &options.files {
        // Before the ledger is made: a wrong file name should leave nothing behind.
        if !file.exists() {
            bail!("cannot read {}: there is no such file", file.display());
        }
    }
    let loaded = app.load()?;
    let (store, governance, _) = books::write(&app.global.data_dir(), &loaded).await?;
    let book = price_book(&loaded.config, governance.price_map.as_ref());
    let mut outcomes = Vec::new();
    for file in &options.files {
        let bar = super::progress("{msg} {wide_bar} {bytes}/{total_bytes} {eta}");
        bar.set_message(file.display().to_string());
        let outcome = import(&store, file, &settings(options, file)?, &book, clock::now(), &bar).await;
        bar.finish_and_clear();
        outcomes.push(outcome.with_context(|| format!("import of {}", file.display()))?);
    }
    for outcome in &outcomes {
        if let Some(rejects) = &outcome.rejects_file {
            let (file, rejected) = (outcome.file.display(), render::counted(outcome.rejected, "row"));
            crate::complain(&format!("farthing: {file}: {rejected} refused; see {}", rejects.display()));
        }
    }
    if app.global.json {
        render::say_json(&outcomes)?
    } else {
        render::say(&table(&outcomes).to_string())?
    }
    Ok(ExitCode::SUCCESS)
}

fn settings(options: &Import, file: &std::path::Path) -> anyhow::Result<Settings> {
    let stem = file.file_stem().context("the file has no name")?.to_string_lossy().into_owned();
    Ok(Settings {
        kind: options.kind,
        name: options.name.clone().unwrap_or(stem),
        model: options.model.clone(),
        provider: options.provider.clone(),
        pool: options.pool.clone(),
    })
}

fn table(outcomes: &[Outcome]) -> Table {
    let mut table = Table::new([
        ("file", Align::Left),
        ("rows", Align::Right),
        ("new", Align::Right),
        ("known", Align::Right),
        ("refused", Align::Right),
        ("input tokens", Align::Right),
        ("output tokens", Align::Right),
        ("unpriced", Align::Right),
        ("cost USD", Align::Right),
    ]);
    for outcome in outcomes {
        let name = outcome.file.display().to_string();
        let counts = [outcome.rows, outcome.attempts, outcome.already_known, outcome.rejected].map(render::count);
        let read = if outcome.already_imported {
            // The file was not read again, so that nothing is known about its rows' tokens here.
            ["", "", "", ""].map(str::to_owned)
        } else {
            let amount = match outcome.unpriced {
                unpriced if unpriced + outcome.rejected == outcome.rows => "unknown".to_owned(),
                _ => render::dollars(outcome.effective_cost),
            };
            let tokens = [outcome.input_tokens, outcome.output_tokens, outcome.unpriced].map(render::count);
            let [input, output, unpriced] = tokens;
            [input, output, unpriced, amount]
        };
        table.row([name].into_iter().chain(counts).chain(read));
    }
    table
}
