//! The ledger's storage: a write-ahead log that holds what was acknowledged, Delta tables that hold it for good, and SQL over both.
//!
//! Facts are appended to the log ([`Store::append`]), flushed into tables exactly once by log position ([`Store::flush`]) and read
//! through one view of tables and log tail ([`Store::sql`]). Imports go to the tables directly and appear whole or not at all
//! ([`Store::begin_import`]). [`Store::verify`] proves that the books balance. Nothing here knows HTTP or providers.

pub mod control;
mod engine;
pub mod error;
pub mod faults;
mod flush;
pub mod import;
mod lock;
pub mod log;
mod memory;
pub mod parquet;
pub mod sql;
pub mod store;
pub mod tables;
mod tail;
pub mod verify;

pub use control::{ControlLog, Entry};
pub use error::StoreError;
pub use faults::Faults;
pub use flush::{Flushed, Flusher};
pub use import::{Begun, Import, ImportId, ImportSummary};
pub use log::{Damage, Position};
pub use sql::{Found, Session};
pub use store::{Options, PriceOpened, Recovery, Store};
pub use tables::facts::{
    capacity_of, decisions_of, engines_of, gaps_of, gpus_of, jobs_of, readings_of, spans_of, steps_of,
};
pub use tables::read::{attempts_of, postings_of};
pub use verify::{Example, Progress, Verification};
