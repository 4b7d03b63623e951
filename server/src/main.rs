//! `farthing`: the cost ledger for AI inference, one binary.

mod allocate;
mod api;
mod books;
mod capacity;
mod cli;
mod clock;
mod commands;
mod config;
mod declared;
mod demo;
mod engines;
mod facts;
mod governance;
mod gpu_prices;
mod import;
mod jobs;
mod live;
mod metrics;
mod render;
mod report;
mod rows;
mod scaling;
mod settlement;
mod telemetry;
mod wiring;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use tracing_subscriber::EnvFilter;

use cli::{Cli, Command};
use commands::App;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return answer_usage(&error),
    };
    log_to_stderr();
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            // The whole chain on one line: what failed, and why.
            complain(&format!("farthing: {}", render::printable(&render::one_line(&error))));
            ExitCode::FAILURE
        }
    }
}

/// Help and version as they are, mistakes on one line.
fn answer_usage(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind;
    if error.use_stderr() && error.kind() != ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        complain(&format!("farthing: {}", render::printable(&cli::usage_error(error))));
        return ExitCode::from(2);
    }
    // Nothing can be done when the output is closed.
    let _ = error.print();
    if error.use_stderr() { ExitCode::from(2) } else { ExitCode::SUCCESS }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let app = App { global: cli.global };
    let code = runtime.block_on(async {
        match cli.command {
            Command::Demo(options) => demo::run(&app, &options).await,
            Command::Serve => commands::serve::run(&app).await,
            Command::Check => commands::check::run(&app).await,
            Command::Import(options) => commands::import::run(&app, &options).await,
            Command::Export(options) => commands::export::run(&app, &options).await,
            Command::Allocate(options) => commands::allocate::run(&app, &options),
            Command::Settle(options) => commands::settle::run(&app, &options).await,
            Command::Report(options) => commands::report::run(&app, &options).await,
            Command::Explain { request_id } => commands::explain::run(&app, &request_id).await,
            Command::Simulate(options) => commands::simulate::run(&app, &options).await,
            Command::Commit(options) => commands::commit::run(&app, &options).await,
            Command::Sql(options) => commands::sql::run(&app, &options).await,
            Command::Verify => commands::verify::run(&app).await,
            Command::Key(command) => commands::key::run(&app, &command).await,
            Command::Price(command) => commands::price::run(&app, &command).await,
        }
    });
    // Idle connections must not keep the process.
    runtime.shutdown_timeout(std::time::Duration::from_secs(2));
    code
}

fn log_to_stderr() {
    let filter =
        EnvFilter::try_from_env("FARTHING_LOG").unwrap_or_else(|_| EnvFilter::new("warn,server=info,farthing=info"));
    // A second subscriber can only be a mistake of a test; logging is then as it was.
    let colours = std::io::stderr().is_terminal();
    let _ =
        tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(std::io::stderr).try_init();
}

/// One line on standard error; nothing can be done when even that is closed.
fn complain(line: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{line}");
}
