//! One Delta table: opening, creating, writing files, and committing them exactly once by log position.
//!
//! The position of the log up to which a table has been filled is the version of an application transaction in the same
//! commit as the rows. Whatever is interrupted, a commit is there with its position or not at all.

use std::path::Path;

use arrow::array::RecordBatch;
use deltalake::kernel::engine::arrow_conversion::TryIntoKernel;
use deltalake::kernel::transaction::{CommitBuilder, CommitProperties};
use deltalake::kernel::{Action, Add, StructType, Transaction};
use deltalake::parquet::basic::Compression;
use deltalake::parquet::file::properties::{EnabledStatistics, WriterProperties};
use deltalake::parquet::schema::types::ColumnPath;
use deltalake::protocol::{DeltaOperation, SaveMode};
use deltalake::writer::{DeltaWriter, RecordBatchWriter};
use deltalake::{DeltaTable, DeltaTableBuilder};
use ledger::RequestId;
use url::Url;

use crate::error::StoreError;
use crate::faults::Faults;
use crate::log::Position;
use crate::tables::schema::{DAY, TableName};

/// Rows of a row group: small enough to skip most of a day when one id is looked up.
const ROW_GROUP_ROWS: usize = 128 * 1024;
/// A file that grows beyond this is finished and another one begun.
const FILE_BYTES: u64 = 256 * 1024 * 1024;

/// A version of one table, and how much of the log is in it. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    pub name: TableName,
    pub delta: DeltaTable,
    /// Records up to here are in the table, or are none of its rows.
    pub passed: Position,
    /// No row has a larger request id than this one.
    pub newest: Option<RequestId>,
}

impl Table {
    /// Opens a table, or `None` when the folder holds none.
    pub(crate) async fn open(root: &Path, name: TableName, log_id: &str) -> Result<Option<Table>, StoreError> {
        let folder = root.join(name.as_str());
        if !folder.join("_delta_log").is_dir() {
            return Ok(None);
        }
        let mut delta = DeltaTableBuilder::from_url(url_of(&folder)?)?.build()?;
        match delta.load().await {
            Ok(()) => {}
            // A folder whose first commit never came about is no table yet.
            Err(deltalake::DeltaTableError::NotATable(_)) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        let mut table = Table { name, delta, passed: Position(0), newest: None };
        table.check_columns(root)?;
        table.passed = table.committed(log_id).await?;
        table.newest = table.newest_in_statistics()?;
        Ok(Some(table))
    }

    /// Refuses a table that was made before a column of it existed.
    fn check_columns(&self, root: &Path) -> Result<(), StoreError> {
        let kept = self.delta.snapshot()?.schema();
        match self.name.schema().fields().iter().find(|field| kept.field(field.name()).is_none()) {
            None => Ok(()),
            Some(field) => {
                let found = format!("its table {} has no column {}", self.name.as_str(), field.name());
                Err(StoreError::Format { dir: root.to_owned(), found })
            }
        }
    }

    /// Creates an empty table.
    pub(crate) async fn create(root: &Path, name: TableName) -> Result<Table, StoreError> {
        let folder = root.join(name.as_str());
        std::fs::create_dir_all(&folder).map_err(StoreError::io(format!("create {}", folder.display())))?;
        let columns: StructType = name.schema().as_ref().try_into_kernel()?;
        let delta = DeltaTableBuilder::from_url(url_of(&folder)?)?
            .build()?
            .create()
            .with_table_name(name.as_str())
            .with_columns(columns.fields().cloned())
            .with_partition_columns([DAY])
            .with_configuration([
                ("delta.checkpointInterval", Some("50")),
                ("delta.dataSkippingStatsColumns", Some(name.statistics())),
                ("delta.logRetentionDuration", Some("interval 1 hour")),
                ("delta.deletedFileRetentionDuration", Some("interval 1 hour")),
            ])
            .with_raise_if_key_not_exists(false)
            .await?;
        Ok(Table { name, delta, passed: Position(0), newest: None })
    }

    /// Reads the newest version.
    pub(crate) async fn refresh(&mut self, log_id: &str) -> Result<(), StoreError> {
        let before = self.delta.version();
        self.delta.update_state().await?;
        if self.delta.version() != before {
            self.passed = self.passed.max(self.committed(log_id).await?);
            self.newest = self.newest_in_statistics()?;
        }
        Ok(())
    }

    /// The version that has been committed under an application's name.
    pub(crate) async fn transaction(&self, application: &str) -> Result<Option<i64>, StoreError> {
        let log = self.delta.log_store();
        Ok(self.delta.snapshot()?.transaction_version(log.as_ref(), application).await?)
    }

    async fn committed(&self, log_id: &str) -> Result<Position, StoreError> {
        let version = self.transaction(&application(log_id)).await?.unwrap_or(0);
        Ok(Position(u64::try_from(version).unwrap_or(0)))
    }

    /// Commits files together with what makes the commit happen once. An error that came after the commit is no error.
    pub(crate) async fn commit(
        &mut self,
        adds: Vec<Add>,
        transaction: Transaction,
        faults: &Faults,
    ) -> Result<(), StoreError> {
        faults.commit(self.name.as_str()).map_err(StoreError::io(format!("commit to {}", self.name.as_str())))?;
        let (application, version) = (transaction.app_id.clone(), transaction.version);
        let newest = adds.iter().filter_map(newest_of).max();
        let outcome = self.try_commit(adds, transaction).await;
        if let Err(error) = outcome {
            self.delta.update_state().await?;
            if self.transaction(&application).await?.is_none_or(|committed| committed < version) {
                return Err(error);
            }
            tracing::warn!(%error, table = self.name.as_str(), "the commit succeeded, what follows it did not");
        }
        self.newest = self.newest.max(newest);
        Ok(())
    }

    async fn try_commit(&mut self, adds: Vec<Add>, transaction: Transaction) -> Result<(), StoreError> {
        let properties = CommitProperties::default()
            .with_application_transaction(transaction)
            .with_cleanup_expired_logs(Some(false));
        let operation =
            DeltaOperation::Write { mode: SaveMode::Append, partition_by: Some(vec![DAY.to_owned()]), predicate: None };
        let committed = CommitBuilder::from(properties)
            .with_actions(adds.into_iter().map(Action::Add).collect())
            .build(Some(self.delta.snapshot()?), self.delta.log_store(), operation)
            .await?;
        self.delta.state = Some(committed.snapshot());
        Ok(())
    }

    fn newest_in_statistics(&self) -> Result<Option<RequestId>, StoreError> {
        if !matches!(self.name, TableName::Attempts | TableName::Postings) {
            return Ok(None);
        }
        let files = self.delta.snapshot()?.log_data();
        Ok(files.iter().filter_map(|file| newest_in(file.stats().as_deref())).max())
    }

    /// Live files: path below the table's folder and rows.
    pub(crate) fn files(&self) -> Result<Vec<(String, u64)>, StoreError> {
        let files = self.delta.snapshot()?.log_data();
        let rows = |rows: Option<usize>| rows.and_then(|rows| u64::try_from(rows).ok()).unwrap_or(0);
        Ok(files.iter().map(|file| (file.object_store_path().to_string(), rows(file.num_records()))).collect())
    }
}

/// The name under which a log's position is committed.
pub(crate) fn application(log_id: &str) -> String {
    format!("farthing-log-{log_id}")
}

/// Writes rows to files that no commit names yet. What is not committed is swept up by vacuum.
pub(crate) async fn write_files(
    table: DeltaTable,
    name: TableName,
    batch: RecordBatch,
) -> Result<Vec<Add>, StoreError> {
    if batch.num_rows() == 0 {
        return Ok(Vec::new());
    }
    let mut writer = RecordBatchWriter::for_table(&table)?
        .with_target_file_size(FILE_BYTES)
        .with_writer_properties(writer_properties(name, batch.num_rows()));
    writer.write(batch).await?;
    Ok(writer.flush().await?)
}

/// Forces freshly written files of the table in `folder` to the medium.
pub(crate) fn sync_files(folder: &Path, adds: &[Add]) -> Result<(), StoreError> {
    for add in adds {
        sync_file(&folder.join(&add.path))?;
    }
    Ok(())
}

/// Forces the newest commit of a table to the medium: the log may be deleted after that.
pub(crate) fn sync_commit(root: &Path, table: &Table) -> Result<(), StoreError> {
    let version = table.delta.version().unwrap_or(0);
    let folder = root.join(table.name.as_str()).join("_delta_log");
    sync_file(&folder.join(format!("{version:020}.json")))?;
    sync_file(&folder)
}

fn sync_file(path: &Path) -> Result<(), StoreError> {
    let synced = std::fs::File::open(path).and_then(|file| file.sync_all());
    synced.map_err(StoreError::io(format!("sync {}", path.display())))
}

/// Rows in freshly written files.
pub(crate) fn rows_of(adds: &[Add]) -> u64 {
    let rows = |add: &Add| {
        let json: serde_json::Value = serde_json::from_str(add.stats.as_deref()?).ok()?;
        json.get("numRecords")?.as_u64()
    };
    adds.iter().filter_map(rows).sum()
}

/// How files are encoded: dictionaries where values repeat, page statistics on ids, a Bloom filter on the trace id.
pub(crate) fn writer_properties(name: TableName, rows: usize) -> WriterProperties {
    let mut properties = WriterProperties::builder()
        .set_created_by(concat!("farthing ", env!("CARGO_PKG_VERSION")).to_owned())
        .set_compression(Compression::SNAPPY)
        .set_max_row_group_row_count(Some(ROW_GROUP_ROWS))
        .set_statistics_enabled(EnabledStatistics::Chunk)
        .set_dictionary_enabled(true);
    for unique in ["request_id", "posting_id", "origin_key", "response_id"] {
        properties = properties.set_column_dictionary_enabled(ColumnPath::from(unique), false);
    }
    properties = properties.set_column_statistics_enabled(ColumnPath::from("request_id"), EnabledStatistics::Page);
    if matches!(name, TableName::Attempts | TableName::Postings | TableName::Spans) {
        let traces = u64::try_from(rows.min(ROW_GROUP_ROWS)).unwrap_or(1).max(64);
        properties = properties
            .set_column_bloom_filter_enabled(ColumnPath::from("trace_id"), true)
            .set_column_bloom_filter_max_ndv(ColumnPath::from("trace_id"), traces)
            .set_column_bloom_filter_fpp(ColumnPath::from("trace_id"), 0.01);
    }
    properties.build()
}

pub(crate) fn url_of(folder: &Path) -> Result<Url, StoreError> {
    let absolute = std::path::absolute(folder).map_err(StoreError::io(format!("find {}", folder.display())))?;
    Url::from_directory_path(&absolute).map_err(|()| StoreError::Tables(format!("{} is no folder", folder.display())))
}

fn newest_of(add: &Add) -> Option<RequestId> {
    newest_in(add.stats.as_deref())
}

/// The largest request id that a file's statistics admit. Statistics that do not say admit everything.
fn newest_in(statistics: Option<&str>) -> Option<RequestId> {
    let anything = RequestId::from_uuid(uuid::Uuid::max());
    let Some(json) = statistics.and_then(|text| serde_json::from_str::<serde_json::Value>(text).ok()) else {
        return Some(anything);
    };
    match json.pointer("/maxValues/request_id").and_then(serde_json::Value::as_str) {
        Some(text) => Some(text.parse().unwrap_or(anything)),
        // Without a largest value every row lacks the id, or the statistics are none.
        None if json.pointer("/nullCount/request_id").is_some() => None,
        None => Some(anything),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_that_do_not_say_admit_everything() {
        let id = "0190a5c8-5b7a-7c00-8000-000000000000";
        let all = RequestId::from_uuid(uuid::Uuid::max());
        assert_eq!(newest_in(None), Some(all));
        assert_eq!(newest_in(Some("{")), Some(all));
        assert_eq!(newest_in(Some("{}")), Some(all));
        assert_eq!(newest_in(Some(r#"{"nullCount":{"request_id":3}}"#)), None);
        assert_eq!(newest_in(Some(&format!(r#"{{"maxValues":{{"request_id":"{id}"}}}}"#))), Some(id.parse().unwrap()));
    }
}
