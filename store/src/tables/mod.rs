//! The Delta tables: what their columns are, how facts become rows and rows facts, and how rows are committed exactly once.

pub(crate) mod delta;
pub(crate) mod existing;
pub(crate) mod maintain;
pub mod read;
pub(crate) mod rows;
pub mod schema;
