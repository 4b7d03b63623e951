//! One file a command. Each reads its options, asks the rest of the crate, and writes the answer.

pub mod allocate;
pub mod check;
pub mod commit;
pub mod explain;
pub mod export;
pub mod import;
pub mod key;
pub mod price;
pub mod report;
pub mod serve;
pub mod settle;
pub mod simulate;
pub mod sql;
pub mod verify;

use std::process::ExitCode;

use crate::cli::Global;
use crate::config::{self, Loaded};

/// What every command has at hand.
#[derive(Debug, Clone)]
pub struct App {
    /// Options of every command.
    pub global: Global,
}

impl App {
    /// Reads the configuration that was asked for.
    ///
    /// # Errors
    /// One line that names file, line and key.
    pub fn load(&self) -> anyhow::Result<Loaded> {
        config::load(self.global.config.as_deref())
    }
}

/// The exit code of a command that did its work and found something wrong.
pub const FOUND_WRONG: ExitCode = ExitCode::FAILURE;

/// Who changes keys and prices from the command line.
#[must_use]
pub fn author() -> String {
    let user = std::env::var("USER").ok().filter(|user| !user.trim().is_empty());
    format!("cli:{}", user.as_deref().unwrap_or("unknown"))
}

/// A progress bar on standard error, or nothing where that is no terminal.
#[must_use]
pub fn progress(template: &str) -> indicatif::ProgressBar {
    use std::io::IsTerminal;
    if !std::io::stderr().is_terminal() {
        return indicatif::ProgressBar::hidden();
    }
    let bar = indicatif::ProgressBar::new(0);
    if let Ok(style) = indicatif::ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("━╸─"));
    }
    bar
}
