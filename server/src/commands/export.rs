//! `farthing export requests`: attempts as JSON Lines or Parquet, which `farthing import requests` reads back.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use futures_util::{Stream, StreamExt};
use store::StoreError;
use store::parquet::Writer;

use super::App;
use crate::cli::{Export, ExportKind};
use crate::import::requests;
use crate::{books, render, rows};

/// Writes attempts in the order of time, to standard output or into a Parquet file.
///
/// # Errors
/// When the ledger cannot be read or the output not be written.
pub async fn run(app: &App, options: &Export) -> anyhow::Result<ExitCode> {
    let ExportKind::Requests = options.kind;
    let store = books::read(&app.global.data_dir()).await?;
    let within = rows::within("received_at", options.span.period().map_err(anyhow::Error::msg)?);
    let query = format!("SELECT * FROM attempts WHERE {within} ORDER BY received_at, request_id, attempt");
    let mut batches = store.sql_stream(&query).await?;
    if let Some(file) = &options.parquet {
        let rows = parquet(file, batches.schema(), batches.map(|batch| batch.map_err(StoreError::from))).await?;
        crate::complain(&format!("{} written to {}", render::counted(rows, "attempt"), file.display()));
        return Ok(ExitCode::SUCCESS);
    }
    let mut out = BufWriter::new(std::io::stdout().lock());
    while let Some(batch) = batches.next().await {
        for attempt in store::attempts_of(&batch.map_err(StoreError::from)?)? {
            match writeln!(out, "{}", requests::line(&attempt)?) {
                Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(ExitCode::SUCCESS),
                other => other?,
            }
        }
    }
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

/// Writes a Parquet file beside its place and moves it there when it is whole; returns the number of rows.
async fn parquet(
    file: &Path,
    columns: SchemaRef,
    mut batches: impl Stream<Item = Result<RecordBatch, StoreError>> + Unpin,
) -> anyhow::Result<u64> {
    let whole = || format!("cannot write {}", file.display());
    let mut part = file.as_os_str().to_owned();
    part.push(".part");
    let mut writer = Writer::create(File::create(&part).with_context(whole)?, columns).with_context(whole)?;
    let mut rows = 0;
    while let Some(batch) = batches.next().await {
        let batch = batch?;
        writer.write(&batch).with_context(whole)?;
        rows += u64::try_from(batch.num_rows())?;
    }
    writer.finish().with_context(whole)?;
    std::fs::rename(&part, file).with_context(whole)?;
    Ok(rows)
}
