//! Farthing's own rows as Parquet: the columns of the `attempts` table, as `farthing export requests --parquet` and the
//! table's own files have them.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context as _, bail};
use arrow::array::RecordBatch;
use ledger::{Attempt, Label};
use store::parquet::{MAGIC, Reader};

use super::requests::check;
use crate::commands::sql::documents;

/// Whether the file says of itself that it is Parquet.
///
/// # Errors
/// When it cannot be read.
pub fn is_parquet(file: &Path) -> anyhow::Result<bool> {
    let mut start = Vec::new();
    let opened = File::open(file).with_context(|| format!("cannot read {}", file.display()))?;
    opened.take(4).read_to_end(&mut start).with_context(|| format!("cannot read {}", file.display()))?;
    Ok(start == MAGIC)
}

/// Opens a file whose columns are those of the `attempts` table.
///
/// # Errors
/// When it is damaged, or lacks a column.
pub fn open(file: &Path) -> anyhow::Result<Reader> {
    let opened = File::open(file).with_context(|| format!("cannot read {}", file.display()))?;
    let reader = Reader::open(opened)?;
    if let Err(error) = store::attempts_of(&RecordBatch::new_empty(reader.schema())) {
        bail!("its columns are not those of the attempts table: {error}; nothing was imported");
    }
    Ok(reader)
}

/// The rows of a batch, each as an attempt or with the reason why it is none.
#[must_use]
pub fn rows(batch: &RecordBatch) -> Vec<Result<Attempt, String>> {
    let one = |row| {
        let read = store::attempts_of(&batch.slice(row, 1)).map_err(|error| error.to_string())?;
        read.into_iter().next().ok_or_else(|| "the row is empty".to_owned())
    };
    // A whole batch is read at once; only where something in it is wrong, the rows are looked at singly.
    let read: Vec<Result<Attempt, String>> = match store::attempts_of(batch) {
        Ok(attempts) => attempts.into_iter().map(Ok).collect(),
        Err(_) => (0..batch.num_rows()).map(one).collect(),
    };
    let sound = |attempt: Attempt| -> Result<Attempt, String> {
        check(&attempt)?;
        labels(&attempt)?;
        Ok(attempt)
    };
    read.into_iter().map(|row| row.and_then(sound)).collect()
}

/// A refused row as people can read it.
#[must_use]
pub fn shown(batch: &RecordBatch, row: usize) -> String {
    let documents = documents(&[batch.slice(row, 1)]).unwrap_or_default();
    documents.first().map(ToString::to_string).unwrap_or_default()
}

/// Labels are bounded wherever they come from.
fn labels(attempt: &Attempt) -> Result<(), String> {
    let (context, route) = (&attempt.context, &attempt.route);
    let labels: [&Option<Label>; 12] = [
        &context.consumer,
        &context.application,
        &context.team,
        &context.cost_centre,
        &context.customer,
        &context.feature,
        &context.session,
        &context.task,
        &context.environment,
        &route.request_model,
        &route.response_model,
        &route.response_id,
    ];
    let long = labels.into_iter().flatten().find(|label| label.len() > ledger::context::LABEL_BYTES_MAX);
    long.map_or(Ok(()), |_| Err(format!("a label is longer than {} bytes", ledger::context::LABEL_BYTES_MAX)))
}
