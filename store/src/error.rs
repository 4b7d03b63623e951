//! What can go wrong, named by what the caller can do about it.

use std::path::PathBuf;

use datafusion::common::utils::datafusion_strsim;
use datafusion::common::{Column, SchemaError};
use datafusion::error::DataFusionError;
use datafusion::sql::sqlparser::parser::ParserError;

use crate::tables::schema::TableName;

/// An error of the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another process writes this ledger: stop it, or open read-only.
    #[error("the ledger {} is in use by {holder}; stop it, or open the ledger read-only", dir.display())]
    Locked {
        /// The ledger's folder.
        dir: PathBuf,
        /// The other process, as it described itself.
        holder: String,
    },
    /// There is no ledger here.
    #[error("there is no ledger in {}", dir.display())]
    NoLedger {
        /// The folder.
        dir: PathBuf,
    },
    /// Another version of this program wrote it: keep it for that version and begin another.
    #[error("the ledger {} has another format ({found}); begin a new one in another folder (--data), and import into it what it should hold", dir.display())]
    Format {
        /// The ledger's folder.
        dir: PathBuf,
        /// What is different.
        found: String,
    },
    /// Opened read-only.
    #[error("the ledger was opened read-only")]
    ReadOnly,
    /// The disk refused; the caller's policy decides.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was attempted, as a verb with its object.
        action: String,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A record is larger than the log takes.
    #[error("a record of {bytes} bytes is larger than the limit of {bytes_max}")]
    TooLarge {
        /// The record's size.
        bytes: usize,
        /// The limit.
        bytes_max: usize,
    },
    /// The query is wrong, or needs more memory and disk than it may have.
    #[error("{0}")]
    Sql(String),
    /// Somebody else appended to the control log first: look again and decide again.
    #[error("the control log has moved on to entry {newest}")]
    Conflict {
        /// The newest entry.
        newest: u64,
    },
    /// The control log was tampered with or damaged.
    #[error("the control log is broken at entry {number}: {reason}")]
    ChainBroken {
        /// The first entry that does not fit.
        number: u64,
        /// Why.
        reason: String,
    },
    /// Stored bytes do not mean what they should.
    #[error("{what} is damaged: {reason}")]
    Corrupt {
        /// The thing.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The tables refused.
    #[error("tables: {0}")]
    Tables(String),
}

impl StoreError {
    /// Wraps an IO error with what was attempted.
    pub(crate) fn io(action: impl Into<String>) -> impl FnOnce(std::io::Error) -> StoreError {
        let action = action.into();
        move |source| StoreError::Io { action, source }
    }

    /// Wraps whatever says that stored bytes are damaged.
    pub(crate) fn corrupt(what: impl Into<String>, reason: impl ToString) -> StoreError {
        StoreError::Corrupt { what: what.into(), reason: reason.to_string() }
    }
}

impl From<deltalake::DeltaTableError> for StoreError {
    fn from(error: deltalake::DeltaTableError) -> StoreError {
        StoreError::Tables(error.to_string())
    }
}

impl From<arrow::error::ArrowError> for StoreError {
    fn from(error: arrow::error::ArrowError) -> StoreError {
        StoreError::Tables(error.to_string())
    }
}

impl From<DataFusionError> for StoreError {
    fn from(error: DataFusionError) -> StoreError {
        StoreError::Sql(in_words(&error))
    }
}

impl From<object_store::Error> for StoreError {
    fn from(error: object_store::Error) -> StoreError {
        StoreError::Io { action: "use the object store".to_owned(), source: std::io::Error::other(error) }
    }
}

/// What is wrong with a query, in the words of whoever wrote it rather than of the engine.
fn in_words(error: &DataFusionError) -> String {
    match error.find_root() {
        DataFusionError::SQL(error, _) => match error.as_ref() {
            ParserError::TokenizerError(reason) | ParserError::ParserError(reason) => {
                format!("the query is not SQL: {}", lower_first(reason))
            }
            ParserError::RecursionLimitExceeded => "the query is nested too deeply".to_owned(),
        },
        DataFusionError::SchemaError(error, _) => match error.as_ref() {
            SchemaError::FieldNotFound { field, valid_fields } => no_column(field, valid_fields),
            other => other.to_string(),
        },
        DataFusionError::Plan(reason) => planned(reason),
        DataFusionError::NotImplemented(reason) if reason.contains("a single SQL statement") => {
            "write one statement at a time".to_owned()
        }
        other => {
            let text = other.strip_backtrace();
            if let Some((_, call)) = text.split_once("No function matches the given name and argument types ") {
                let call = call.split(". ").next().unwrap_or(call);
                return format!("no function takes these arguments: {call}");
            }
            ["Arrow error: ", "Execution error: ", "External error: "]
                .iter()
                .find_map(|prefix| text.strip_prefix(prefix))
                .unwrap_or(&text)
                .to_owned()
        }
    }
}

fn planned(reason: &str) -> String {
    let missing = reason.strip_prefix("table 'datafusion.public.").and_then(|rest| rest.strip_suffix("' not found"));
    if let Some(table) = missing {
        let tables = TableName::ALL.map(TableName::as_str).join(", ");
        return format!("there is no table `{table}`; the tables are {tables}");
    }
    if ["DML not", "DDL not", "Statement not"].iter().any(|start| reason.starts_with(start)) {
        return "only reading is allowed; write a SELECT".to_owned();
    }
    if reason.starts_with("No SQL statements") {
        return "the query is empty; write a SELECT".to_owned();
    }
    reason.to_owned()
}

/// An unknown column, with the nearest known one or all of them.
fn no_column(field: &Column, known: &[Column]) -> String {
    let alike = |name: &str| datafusion_strsim::normalized_levenshtein(&field.name, name);
    let near = known.iter().map(|column| column.name.as_str()).max_by(|a, b| alike(a).total_cmp(&alike(b)));
    let hint = match near {
        Some(near) if alike(near) > 0.5 => format!("did you mean `{near}`?"),
        _ => format!("there are {}", known.iter().map(|column| column.name.as_str()).collect::<Vec<_>>().join(", ")),
    };
    format!("there is no column `{}`; {hint}", field.name)
}

fn lower_first(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
}
