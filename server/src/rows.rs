//! Cells of query results: by name into the ledger's types, or as text and JSON for whoever asked.

use anyhow::{Context as _, bail};
use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::{DataType, Decimal128Type, Int32Type, Int64Type, UInt64Type};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use ledger::Money;
use ledger::decimal::format_scaled;
use serde_json::Value;

/// The column of this name.
///
/// # Errors
/// When the result has none: a mistake in our own query.
pub fn column<'a>(batch: &'a RecordBatch, name: &str) -> anyhow::Result<&'a dyn Array> {
    batch.column_by_name(name).map(AsRef::as_ref).with_context(|| format!("the result has no column `{name}`"))
}

/// A count; `None` where the cell is null.
///
/// # Errors
/// When the column holds something else.
pub fn count(column: &dyn Array, row: usize) -> anyhow::Result<Option<u64>> {
    if column.is_null(row) {
        return Ok(None);
    }
    let value = match column.data_type() {
        DataType::Int64 => u64::try_from(column.as_primitive::<Int64Type>().value(row))?,
        DataType::UInt64 => column.as_primitive::<UInt64Type>().value(row),
        DataType::Int32 => u64::try_from(column.as_primitive::<Int32Type>().value(row))?,
        other => bail!("a count is stored as {other}"),
    };
    Ok(Some(value))
}

/// A whole number that may be negative; `None` where the cell is null.
///
/// # Errors
/// When the column holds something else.
pub fn signed(column: &dyn Array, row: usize) -> anyhow::Result<Option<i64>> {
    match column.data_type() {
        DataType::Null => Ok(None),
        DataType::Int64 => Ok((!column.is_null(row)).then(|| column.as_primitive::<Int64Type>().value(row))),
        other => bail!("a number is stored as {other}"),
    }
}

/// An amount; `None` where the cell is null, which is not zero.
///
/// # Errors
/// When the column holds something else.
pub fn money(column: &dyn Array, row: usize) -> anyhow::Result<Option<Money>> {
    match column.data_type() {
        DataType::Decimal128(_, 12) if column.is_null(row) => Ok(None),
        DataType::Decimal128(_, 12) => Ok(Some(Money::from_pico(column.as_primitive::<Decimal128Type>().value(row)))),
        DataType::Null => Ok(None),
        other => bail!("an amount is stored as {other}"),
    }
}

/// A text; `None` where the cell is null.
///
/// # Errors
/// When the cell cannot be shown.
pub fn text(column: &dyn Array, row: usize) -> anyhow::Result<Option<String>> {
    if column.is_null(row) {
        return Ok(None);
    }
    let value = match column.data_type() {
        DataType::Utf8 => column.as_string::<i32>().value(row).to_owned(),
        DataType::Utf8View => column.as_string_view().value(row).to_owned(),
        _ => shown(column, row)?,
    };
    Ok(Some(value))
}

/// Any cell as JSON: whole numbers and truth values as they are, amounts and everything else as text.
///
/// # Errors
/// When the cell cannot be shown.
pub fn json(column: &dyn Array, row: usize) -> anyhow::Result<Value> {
    if column.is_null(row) {
        return Ok(Value::Null);
    }
    Ok(match column.data_type() {
        DataType::Null => Value::Null,
        DataType::Boolean => column.as_boolean().value(row).into(),
        DataType::Int64 => column.as_primitive::<Int64Type>().value(row).into(),
        DataType::Int32 => column.as_primitive::<Int32Type>().value(row).into(),
        DataType::UInt64 => column.as_primitive::<UInt64Type>().value(row).into(),
        DataType::Float64 => column.as_primitive::<arrow::datatypes::Float64Type>().value(row).into(),
        _ => text(column, row)?.into(),
    })
}

/// Any cell as text for people; null is empty.
///
/// # Errors
/// When the cell cannot be shown.
pub fn plain(column: &dyn Array, row: usize) -> anyhow::Result<String> {
    Ok(text(column, row)?.unwrap_or_default())
}

fn shown(column: &dyn Array, row: usize) -> anyhow::Result<String> {
    if let DataType::Decimal128(_, scale) = column.data_type() {
        let scale = u32::try_from(*scale).unwrap_or(0);
        return Ok(format_scaled(column.as_primitive::<Decimal128Type>().value(row), scale, 2.min(scale as usize)));
    }
    let options = FormatOptions::default().with_null("");
    Ok(ArrayFormatter::try_new(column, &options)?.value(row).try_to_string()?)
}

/// A text as an SQL literal.
#[must_use]
pub fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// A moment as an SQL literal of the tables' own type.
#[must_use]
pub fn moment(at: ledger::Timestamp) -> String {
    format!("arrow_cast({}, 'Timestamp(Microsecond, Some(\"UTC\"))')", at.micros())
}

/// A condition that `column` lies within the period, with the days it spans so that whole files are left out.
#[must_use]
pub fn within(column: &str, period: ledger::Period) -> String {
    let all = ledger::Period::ALL;
    let mut conditions = Vec::new();
    if period.start != all.start {
        conditions.push(format!("{column} >= {}", moment(period.start)));
        conditions.push(format!("day >= arrow_cast({}, 'Date32')", period.start.day()));
    }
    if period.end != all.end {
        conditions.push(format!("{column} < {}", moment(period.end)));
        conditions.push(format!("day <= arrow_cast({}, 'Date32')", period.end.day()));
    }
    if conditions.is_empty() { "true".to_owned() } else { conditions.join(" AND ") }
}
