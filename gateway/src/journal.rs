//! Where facts go. The store implements [`Journal`]; this crate only knows that an appended fact survives.

use futures_util::future::BoxFuture;
use ledger::Fact;
use serde::{Deserialize, Serialize};

/// The log could not be written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the log could not be written: {cause}")]
pub struct JournalError {
    /// What the operating system said.
    pub cause: String,
}

/// An append-only log of facts.
pub trait Journal: Send + Sync {
    /// Appends a fact and returns its position. When this returns, the fact survives the death of the process.
    ///
    /// It runs on the request path and takes microseconds; it must not wait for a disk's sync.
    ///
    /// # Errors
    /// [`JournalError`] when the fact was not written.
    fn append(&self, fact: &Fact) -> Result<u64, JournalError>;

    /// Resolves when everything up to `position` survives the death of the machine.
    fn synced(&self, position: u64) -> BoxFuture<'static, Result<(), JournalError>>;

    /// Keeps a finished attempt in memory whose append failed, to write it as soon as that works again. False when there is no
    /// room for it: then it is lost.
    fn keep(&self, fact: &Fact) -> bool;

    /// Told once for every fact that was lost while requests were served all the same, so that a gap is recorded.
    fn lost(&self, cause: &JournalError);
}

/// What a released answer survives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Durability {
    /// The death of the process: the record is in the file.
    #[default]
    Process,
    /// The death of the machine: the record is synced.
    Power,
}

/// What happens when a record cannot be written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WhenLogFails {
    /// Serve, count the loss and leave a marked gap.
    #[default]
    FailOpen,
    /// Refuse before the upstream is called; break off an answer whose record cannot be written.
    FailClosed,
}
