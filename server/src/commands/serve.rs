//! `farthing serve`: the server, until it is told to stop.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::bail;
use tokio::signal::unix::{Signal, SignalKind, signal};

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
    // Listened for from here on: whoever finds the port open may already ask for the end.
    let told = told_to_stop();
    let server = Server::start(&app.global.data_dir(), loaded, Arc::new(SystemClock)).await?;
    tracing::info!(gateway = %server.gateway_address, admin = %server.admin_address, "serving");
    let (switch, shutdown) = Shutdown::new();
    tokio::spawn(async move {
        told.await;
        tracing::info!("draining");
        let _ = switch.send(true);
    });
    server.run(shutdown).await?;
    Ok(ExitCode::SUCCESS)
}

/// Resolves on Ctrl-C or SIGTERM; both are listened for from this call on.
pub fn told_to_stop() -> impl Future<Output = ()> {
    let [interrupt, terminate] = [SignalKind::interrupt(), SignalKind::terminate()].map(|kind| signal(kind).ok());
    async move {
        tokio::select! {
            () = received(interrupt) => {}
            () = received(terminate) => {}
        }
    }
}

/// A signal that cannot be listened for never comes.
async fn received(signal: Option<Signal>) {
    match signal {
        Some(mut signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}
