//! `farthing check`: reads the configuration and says everything that is wrong with it.

use std::process::ExitCode;

use serde_json::json;

use super::{App, FOUND_WRONG};
use crate::config::{self, Loaded, Standing};
use crate::{books, clock, render};

/// Checks the configuration file, or the defaults.
///
/// # Errors
/// When the file cannot be read or is not well formed.
pub async fn run(app: &App) -> anyhow::Result<ExitCode> {
    let loaded = app.load()?;
    let wrong = problems(app, &loaded).await?;
    let file = loaded.file.as_ref().map_or("the default configuration".to_owned(), |file| file.display().to_string());
    if app.global.json {
        render::say_json(&json!({ "file": loaded.file, "ok": wrong.is_empty(), "problems": wrong }))?;
    } else if wrong.is_empty() {
        let config = &loaded.config;
        let counted = |count: usize, noun: &str| render::counted(u64::try_from(count).unwrap_or(u64::MAX), noun);
        render::say(&format!(
            "{file} is right: {}, {}, {}; gateway on {}, admin on {}",
            counted(config.upstream.len(), "upstream"),
            counted(config.route.len(), "route"),
            counted(config.pool.len(), "pool"),
            config.gateway.listen,
            config.admin.listen
        ))?;
    }
    if wrong.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    for problem in &wrong {
        crate::complain(&format!("farthing: {file}: {problem}"));
    }
    Ok(FOUND_WRONG)
}

/// What is wrong with a well-formed configuration, secrets and certificates included.
///
/// # Errors
/// When the ledger's keys cannot be read.
pub async fn problems(app: &App, loaded: &Loaded) -> anyhow::Result<Vec<String>> {
    let keys = books::standing(&app.global.data_dir()).await?.valid_keys(clock::now());
    let mut wrong = config::check(&loaded.config, Standing { keys });
    if wrong.is_empty() {
        wrong.extend(config::settings(loaded).err().map(|error| format!("{error:#}")));
        if let Some(token) = &loaded.config.admin.token {
            wrong.extend(loaded.secret(token).err().map(|error| format!("admin.token: {error:#}")));
        }
        wrong.extend(crate::wiring::tls(loaded).err().map(|error| format!("gateway.tls: {error:#}")));
    }
    Ok(wrong)
}
