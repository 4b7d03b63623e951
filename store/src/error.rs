//! What can go wrong, named by what the caller can do about it.

use std::path::PathBuf;

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

impl From<datafusion::error::DataFusionError> for StoreError {
    fn from(error: datafusion::error::DataFusionError) -> StoreError {
        StoreError::Sql(error.strip_backtrace())
    }
}

impl From<object_store::Error> for StoreError {
    fn from(error: object_store::Error) -> StoreError {
        StoreError::Io { action: "use the object store".to_owned(), source: std::io::Error::other(error) }
    }
}
