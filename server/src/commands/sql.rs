//! `farthing sql`: SQL over the ledger, reads only.

use std::process::ExitCode;

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, Schema};
use futures_util::StreamExt;
use serde_json::{Map, Value};
use store::StoreError;

use super::App;
use crate::cli::Sql;
use crate::render::{self, Align, Table};
use crate::{books, rows};

/// Runs the query and writes its rows.
///
/// # Errors
/// When the query is wrong or is not a read.
pub async fn run(app: &App, options: &Sql) -> anyhow::Result<ExitCode> {
    let store = books::read(&app.global.data_dir()).await?;
    let mut stream = store.sql_stream(&options.query).await?;
    let schema = stream.schema();
    let mut batches = Vec::new();
    while let Some(batch) = stream.next().await {
        batches.push(batch.map_err(StoreError::from)?);
    }
    if app.global.json {
        render::say_json(&documents(&batches)?)?;
    } else if options.csv {
        render::say(&csv(&schema, &batches)?)?;
    } else {
        render::say(&table(&schema, &batches)?)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The rows as JSON objects, amounts as decimal strings.
///
/// # Errors
/// When a cell cannot be shown.
pub fn documents(batches: &[RecordBatch]) -> anyhow::Result<Vec<Value>> {
    let mut documents = Vec::new();
    for batch in batches {
        let schema = batch.schema();
        for row in 0..batch.num_rows() {
            let mut document = Map::new();
            for (field, column) in schema.fields().iter().zip(batch.columns()) {
                document.insert(field.name().clone(), rows::json(column, row)?);
            }
            documents.push(Value::Object(document));
        }
    }
    Ok(documents)
}

fn csv(schema: &Schema, batches: &[RecordBatch]) -> anyhow::Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(schema.fields().iter().map(|field| field.name().as_str()))?;
    for batch in batches {
        for row in 0..batch.num_rows() {
            let cells = batch.columns().iter().map(|column| rows::plain(column, row));
            writer.write_record(cells.collect::<anyhow::Result<Vec<_>>>()?)?;
        }
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}

fn table(schema: &Schema, batches: &[RecordBatch]) -> anyhow::Result<String> {
    let mut table = Table::new(schema.fields().iter().map(|field| {
        let number = field.data_type().is_numeric() || matches!(field.data_type(), DataType::Decimal128(..));
        (field.name().as_str(), if number { Align::Right } else { Align::Left })
    }));
    let mut count = 0;
    for batch in batches {
        for row in 0..batch.num_rows() {
            let cell = |column| anyhow::Ok(rows::text(column, row)?.unwrap_or_else(|| "NULL".to_owned()));
            table.row(batch.columns().iter().map(|column| cell(column.as_ref())).collect::<anyhow::Result<Vec<_>>>()?);
            count += 1;
        }
    }
    Ok(format!("{table}{}\n", render::counted(count, "row")))
}
