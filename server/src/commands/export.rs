//! `farthing export requests`: one JSON line per attempt, which `farthing import requests` reads back.

use std::io::{BufWriter, Write};
use std::process::ExitCode;

use futures_util::StreamExt;

use super::App;
use crate::cli::{Export, ExportKind};
use crate::import::requests;
use crate::{books, rows};

/// Writes attempts to standard output in the order of time.
///
/// # Errors
/// When the ledger cannot be read or the output not be written.
pub async fn run(app: &App, options: &Export) -> anyhow::Result<ExitCode> {
    let ExportKind::Requests = options.kind;
    let store = books::read(&app.global.data_dir()).await?;
    let within = rows::within("received_at", options.span.period());
    let query = format!("SELECT * FROM attempts WHERE {within} ORDER BY received_at, request_id, attempt");
    let mut batches = store.sql_stream(&query).await?;
    let mut out = BufWriter::new(std::io::stdout().lock());
    while let Some(batch) = batches.next().await {
        for attempt in store::attempts_of(&batch?)? {
            match writeln!(out, "{}", requests::line(&attempt)?) {
                Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(ExitCode::SUCCESS),
                other => other?,
            }
        }
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}
