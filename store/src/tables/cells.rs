//! Cells: how each type of a fact's field is kept in a column, and rows that name their cells one after the other.
//!
//! A row says its columns once, in [`Row::cells`]; the schema, writing, reading and the row's key all follow from that.

use std::collections::BTreeMap;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanArray, Decimal128Array, Int64Array, RecordBatch, StringArray,
    TimestampMicrosecondArray,
};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Decimal128Type, Int64Type, TimeUnit, TimestampMicrosecondType};
use ledger::{
    Adapter, EngineSetup, GpuHourRate, JobSource, KeyId, Label, Operation, PurchaseOption, ScalingMode, Timestamp,
    UsageQuality,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::StoreError;

/// What visits the cells of a row: a column's name and the field behind it.
pub(crate) type Visit<'a> = dyn FnMut(&str, &mut dyn Cell) -> Result<(), StoreError> + 'a;

/// A fact that is a row of a table as it is.
pub(crate) trait Row {
    /// The moment that the row is found by; its day is the row's partition.
    fn at(&self) -> Timestamp;

    /// Shows every cell to `visit`, always in the same order. Reading fills the fields in, writing looks at them.
    fn cells(&mut self, visit: &mut Visit<'_>) -> Result<(), StoreError>;
}

/// What is in one cell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Value {
    Null,
    Text(Label),
    Count(i64),
    Flag(bool),
    Time(i64),
    Decimal(i128),
}

/// A field that can be kept in one column.
pub(crate) trait Cell {
    /// The column's type.
    fn data_type(&self) -> DataType;
    /// What to keep.
    fn get(&self) -> Value;
    /// Takes what was kept, or says what is wrong with it.
    fn set(&mut self, value: Value) -> Result<(), String>;
}

/// Names and types of a row's columns.
pub(crate) fn columns(row: &mut dyn Row) -> Vec<(String, DataType)> {
    let mut columns = Vec::new();
    let named = row.cells(&mut |name, cell| {
        columns.push((name.to_owned(), cell.data_type()));
        Ok(())
    });
    debug_assert!(named.is_ok(), "naming columns fails nowhere");
    columns
}

/// The values of one row, in the order of its columns.
pub(crate) fn values(row: &mut dyn Row) -> Result<Vec<Value>, StoreError> {
    let mut values = Vec::new();
    row.cells(&mut |_, cell| {
        values.push(cell.get());
        Ok(())
    })?;
    Ok(values)
}

/// A hash of a row's values, as they are kept: what makes two rows the same.
pub(crate) fn key<'a>(values: impl IntoIterator<Item = &'a Value>) -> u128 {
    let mut hasher = blake3::Hasher::new();
    for value in values {
        match value {
            Value::Null => hasher.update(&[0]),
            Value::Text(text) => {
                let bytes = u64::try_from(text.len()).unwrap_or(u64::MAX).to_le_bytes();
                hasher.update(&[1]).update(&bytes).update(text.as_bytes())
            }
            Value::Count(count) => hasher.update(&[2]).update(&count.to_le_bytes()),
            Value::Flag(flag) => hasher.update(&[3, u8::from(*flag)]),
            Value::Time(micros) => hasher.update(&[4]).update(&micros.to_le_bytes()),
            Value::Decimal(amount) => hasher.update(&[5]).update(&amount.to_le_bytes()),
        };
    }
    let mut first = [0; 16];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    u128::from_le_bytes(first)
}

/// One column of values.
pub(crate) fn array(wanted: &DataType, values: &[Value]) -> Result<ArrayRef, StoreError> {
    let text = |value: &Value| if let Value::Text(text) = value { Some(text.to_string()) } else { None };
    let count = |value: &Value| if let Value::Count(count) = value { Some(*count) } else { None };
    let flag = |value: &Value| if let Value::Flag(flag) = value { Some(*flag) } else { None };
    let time = |value: &Value| if let Value::Time(micros) = value { Some(*micros) } else { None };
    let amount = |value: &Value| if let Value::Decimal(amount) = value { Some(*amount) } else { None };
    let values = values.iter();
    Ok(match wanted {
        DataType::Int64 => Arc::new(values.map(count).collect::<Int64Array>()),
        DataType::Boolean => Arc::new(values.map(flag).collect::<BooleanArray>()),
        DataType::Timestamp(..) => {
            Arc::new(values.map(time).collect::<TimestampMicrosecondArray>().with_timezone("UTC"))
        }
        DataType::Decimal128(precision, scale) => {
            Arc::new(values.map(amount).collect::<Decimal128Array>().with_precision_and_scale(*precision, *scale)?)
        }
        _ => Arc::new(values.map(text).collect::<StringArray>()),
    })
}

/// Rows as they are kept, read value by value. Columns are found by name.
pub(crate) struct Kept {
    columns: Vec<ArrayRef>,
    rows: usize,
}

impl Kept {
    pub(crate) fn new(batch: &RecordBatch, columns: &[(String, DataType)]) -> Result<Kept, StoreError> {
        let column = |(name, wanted): &(String, DataType)| {
            let column =
                batch.column_by_name(name).ok_or_else(|| StoreError::corrupt(name, "the column is missing"))?;
            Ok(if column.data_type() == wanted { ArrayRef::clone(column) } else { cast(column, wanted)? })
        };
        let columns = columns.iter().map(column).collect::<Result<_, StoreError>>()?;
        Ok(Kept { columns, rows: batch.num_rows() })
    }

    /// How many rows there are.
    pub(crate) const fn len(&self) -> usize {
        self.rows
    }

    /// Fills in a row's fields.
    pub(crate) fn read(&self, index: usize, row: &mut dyn Row) -> Result<(), StoreError> {
        let mut columns = self.columns.iter();
        row.cells(&mut |name, cell| {
            let value = columns.next().map_or(Value::Null, |column| value(column, index));
            cell.set(value).map_err(|reason| StoreError::corrupt(name, reason))
        })
    }

    /// The key of a row.
    pub(crate) fn key(&self, index: usize) -> u128 {
        key(&self.columns.iter().map(|column| value(column, index)).collect::<Vec<_>>())
    }
}

fn value(column: &ArrayRef, row: usize) -> Value {
    if column.is_null(row) {
        return Value::Null;
    }
    match column.data_type() {
        DataType::Int64 => Value::Count(column.as_primitive::<Int64Type>().value(row)),
        DataType::Boolean => Value::Flag(column.as_boolean().value(row)),
        DataType::Timestamp(..) => Value::Time(column.as_primitive::<TimestampMicrosecondType>().value(row)),
        DataType::Decimal128(..) => Value::Decimal(column.as_primitive::<Decimal128Type>().value(row)),
        _ => Value::Text(column.as_string::<i32>().value(row).into()),
    }
}

fn unfit<T>(value: &Value) -> Result<T, String> {
    Err(match value {
        Value::Null => "a value is missing".to_owned(),
        other => format!("{other:?} is of another type"),
    })
}

impl<T: Cell + Default> Cell for Option<T> {
    fn data_type(&self) -> DataType {
        T::default().data_type()
    }

    fn get(&self) -> Value {
        self.as_ref().map_or(Value::Null, Cell::get)
    }

    fn set(&mut self, value: Value) -> Result<(), String> {
        if value == Value::Null {
            *self = None;
            return Ok(());
        }
        self.insert(T::default()).set(value)
    }
}

impl Cell for Label {
    fn data_type(&self) -> DataType {
        DataType::Utf8
    }

    fn get(&self) -> Value {
        Value::Text(Label::clone(self))
    }

    fn set(&mut self, value: Value) -> Result<(), String> {
        let Value::Text(text) = value else { return unfit(&value) };
        *self = text;
        Ok(())
    }
}

impl Cell for String {
    fn data_type(&self) -> DataType {
        DataType::Utf8
    }

    fn get(&self) -> Value {
        Value::Text(self.as_str().into())
    }

    fn set(&mut self, value: Value) -> Result<(), String> {
        let Value::Text(text) = value else { return unfit(&value) };
        *self = text.to_string();
        Ok(())
    }
}

impl Cell for bool {
    fn data_type(&self) -> DataType {
        DataType::Boolean
    }

    fn get(&self) -> Value {
        Value::Flag(*self)
    }

    fn set(&mut self, value: Value) -> Result<(), String> {
        let Value::Flag(flag) = value else { return unfit(&value) };
        *self = flag;
        Ok(())
    }
}

impl Cell for Timestamp {
    fn data_type(&self) -> DataType {
        DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()))
    }

    fn get(&self) -> Value {
        Value::Time(self.micros())
    }

    fn set(&mut self, value: Value) -> Result<(), String> {
        let Value::Time(micros) = value else { return unfit(&value) };
        *self = Timestamp::from_micros(micros);
        Ok(())
    }
}

impl Cell for GpuHourRate {
    fn data_type(&self) -> DataType {
        DataType::Decimal128(38, 12)
    }

    fn get(&self) -> Value {
        Value::Decimal(i128::from(self.pico()))
    }

    fn set(&mut self, value: Value) -> Result<(), String> {
        let Value::Decimal(pico) = value else { return unfit(&value) };
        *self = GpuHourRate::from_pico(u64::try_from(pico).map_err(|_| "it is out of range".to_owned())?);
        Ok(())
    }
}

impl Cell for Option<KeyId> {
    fn data_type(&self) -> DataType {
        DataType::Utf8
    }

    fn get(&self) -> Value {
        self.map_or(Value::Null, |id| Value::Text(id.to_string().into()))
    }

    fn set(&mut self, value: Value) -> Result<(), String> {
        *self = match value {
            Value::Null => None,
            Value::Text(text) => Some(text.parse().map_err(|_| format!("`{text}` cannot be read"))?),
            other => return unfit(&other),
        };
        Ok(())
    }
}

/// Counts above 2^63 saturate; nothing that is counted here gets near it.
macro_rules! counts {
    ($($count:ty),*) => {$(
        impl Cell for $count {
            fn data_type(&self) -> DataType {
                DataType::Int64
            }

            fn get(&self) -> Value {
                Value::Count(i64::try_from(*self).unwrap_or(i64::MAX))
            }

            fn set(&mut self, value: Value) -> Result<(), String> {
                let Value::Count(count) = value else { return unfit(&value) };
                *self = <$count>::try_from(count).map_err(|_| format!("{count} is out of range"))?;
                Ok(())
            }
        }
    )*};
}

counts!(u32, u64);

/// Enumerations are kept by name.
macro_rules! named {
    ($($name:ty: $all:expr),* $(,)?) => {$(
        impl Cell for $name {
            fn data_type(&self) -> DataType {
                DataType::Utf8
            }

            fn get(&self) -> Value {
                Value::Text(self.name().into())
            }

            fn set(&mut self, value: Value) -> Result<(), String> {
                let Value::Text(text) = value else { return unfit(&value) };
                let found = $all.into_iter().find(|one| one.name() == &*text);
                *self = found.ok_or_else(|| format!("`{text}` is unknown"))?;
                Ok(())
            }
        }
    )*};
}

named! {
    JobSource: JobSource::ALL,
    Operation: Operation::ALL,
    ScalingMode: ScalingMode::ALL,
    UsageQuality: [UsageQuality::Reported, UsageQuality::Estimated, UsageQuality::Missing],
    PurchaseOption: [PurchaseOption::OnDemand, PurchaseOption::Reserved, PurchaseOption::Spot, PurchaseOption::Owned],
}

/// What has parts of its own is kept as JSON text; nothing in it is no text.
macro_rules! json {
    ($($part:ty),* $(,)?) => {$(
        impl Cell for $part {
            fn data_type(&self) -> DataType {
                DataType::Utf8
            }

            fn get(&self) -> Value {
                to_json(self)
            }

            fn set(&mut self, value: Value) -> Result<(), String> {
                *self = of_json(value)?;
                Ok(())
            }
        }
    )*};
}

json!(EngineSetup, Vec<Adapter>, Vec<String>, Vec<Label>, BTreeMap<Label, Label>);

fn to_json<T: Serialize + Default + PartialEq>(part: &T) -> Value {
    if *part == T::default() {
        return Value::Null;
    }
    // Plain values always have a JSON form.
    serde_json::to_string(part).map_or(Value::Null, |text| Value::Text(text.into()))
}

fn of_json<T: DeserializeOwned + Default>(value: Value) -> Result<T, String> {
    match value {
        Value::Null => Ok(T::default()),
        Value::Text(text) => serde_json::from_str(&text).map_err(|error| error.to_string()),
        other => unfit(&other),
    }
}
