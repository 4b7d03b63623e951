//! `farthing serve`: the server, until it is told to stop.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::bail;
use tokio::signal::unix::{SignalKind, signal};

use super::App;
use super::check::problems;
use crate::clock::SystemClock;
use crate::wiring::{Server, Shutdown};

/// Serves until Ctrl-C or SIGTERM, then drains.
///
/// # Errors
/// When the configuration is wrong, an address is taken, or the ledger is in use.
pub async fn run(app: &App) -> anyhow::Result<ExitCode> {
    let loaded = app.load()?;
    let wrong = problems(app, &loaded).await?;
    if !wrong.is_empty() {
        bail!("{}", wrong.join("; "));
    }
    for warning in crate::config::warnings(&loaded.config) {
        tracing::warn!("{warning}");
    }
    let server = Server::start(&app.global.data_dir(), loaded, Arc::new(SystemClock)).await?;
    tracing::info!(gateway = %server.gateway_address, admin = %server.admin_address, "serving");
    let (switch, shutdown) = Shutdown::new();
    tokio::spawn(async move {
        told_to_stop().await;
        tracing::info!("draining");
        let _ = switch.send(true);
    });
    server.run(shutdown).await?;
    Ok(ExitCode::SUCCESS)
}

/// Resolves on Ctrl-C or SIGTERM.
pub async fn told_to_stop() {
    let Ok(mut terminate) = signal(SignalKind::terminate()) else {
        let _ = tokio::signal::ctrl_c().await;
        return;
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}
