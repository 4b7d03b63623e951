//! The Delta tables: what their columns are, how facts become rows and rows facts, and how rows are committed exactly once.

mod cells;
pub(crate) mod delta;
pub(crate) mod existing;
pub mod facts;
pub(crate) mod maintain;
pub mod read;
pub(crate) mod rows;
pub mod schema;

/// Postings as rows of their table, for files of their own.
///
/// # Errors
/// [`StoreError`](crate::StoreError) when an amount leaves the range of the columns.
pub fn postings_rows(postings: &[ledger::Posting]) -> Result<arrow::array::RecordBatch, crate::StoreError> {
    rows::postings(postings)
}
