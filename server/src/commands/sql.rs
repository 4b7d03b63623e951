//! `farthing sql`: SQL over the ledger, reads only.

use std::process::ExitCode;

use arrow::array::RecordBatch;
use arrow::datatypes::DataType;
use serde_json::{Map, Value};

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
    let batches = store.sql(&options.query).await?;
    if app.global.json {
        render::say_json(&documents(&batches)?)?;
    } else if options.csv {
        render::say(&csv(&batches)?)?;
    } else {
        render::say(&table(&batches)?)?;
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

fn csv(batches: &[RecordBatch]) -> anyhow::Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    if let Some(first) = batches.first() {
        writer.write_record(first.schema().fields().iter().map(|field| field.name().as_str()))?;
    }
    for batch in batches {
        for row in 0..batch.num_rows() {
            let cells = batch.columns().iter().map(|column| rows::plain(column, row));
            writer.write_record(cells.collect::<anyhow::Result<Vec<_>>>()?)?;
        }
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}

fn table(batches: &[RecordBatch]) -> anyhow::Result<String> {
    let Some(first) = batches.first() else { return Ok("no rows".to_owned()) };
    let schema = first.schema();
    let mut table = Table::new(schema.fields().iter().map(|field| {
        let number = field.data_type().is_numeric() || matches!(field.data_type(), DataType::Decimal128(..));
        (field.name().as_str(), if number { Align::Right } else { Align::Left })
    }));
    let mut count = 0;
    for batch in batches {
        for row in 0..batch.num_rows() {
            table.row(
                batch.columns().iter().map(|column| rows::plain(column, row)).collect::<anyhow::Result<Vec<_>>>()?,
            );
            count += 1;
        }
    }
    Ok(format!("{table}{count} {}\n", if count == 1 { "row" } else { "rows" }))
}
