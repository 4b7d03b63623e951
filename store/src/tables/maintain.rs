//! Keeping tables fast: merging small files, checkpoints, and removing what no version needs any more.

use std::num::NonZeroU64;
use std::time::Duration;

use chrono::TimeDelta;
use deltalake::operations::vacuum::VacuumMode;
use deltalake::protocol::checkpoints::{cleanup_expired_logs_for, create_checkpoint};
use ledger::Timestamp;

use crate::error::StoreError;
use crate::tables::delta::{Table, writer_properties};

/// Files are merged until they are about this large.
const TARGET_BYTES: NonZeroU64 = NonZeroU64::new(64 * 1024 * 1024).expect("64 MiB is not zero");

/// Which files may be removed once they are old enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sweep {
    /// Those that were merged into others.
    Merged,
    /// Also those that no commit ever named. Not while an import writes such files.
    Everything,
}

/// Merges small files, writes a checkpoint and drops history older than `kept`.
pub(crate) async fn maintain(
    table: &mut Table,
    now: Timestamp,
    kept: Duration,
    sweep: Sweep,
) -> Result<(), StoreError> {
    let properties = writer_properties(table.name, usize::MAX);
    let (merged, metrics) = table
        .delta
        .clone()
        .optimize()
        .with_target_size(TARGET_BYTES)
        .with_max_concurrent_tasks(1)
        .with_writer_properties(properties)
        .await?;
    tracing::debug!(
        table = table.name.as_str(),
        from = metrics.num_files_removed,
        to = metrics.num_files_added,
        "merged files"
    );
    table.delta = merged;
    create_checkpoint(&table.delta, None).await?;

    let kept = TimeDelta::from_std(kept).unwrap_or(TimeDelta::MAX);
    let mode = match sweep {
        Sweep::Merged => VacuumMode::Lite,
        Sweep::Everything => VacuumMode::Full,
    };
    let (swept, removed) = table
        .delta
        .clone()
        .vacuum()
        .with_mode(mode)
        .with_retention_period(kept)
        .with_enforce_retention_duration(false)
        .await?;
    tracing::debug!(table = table.name.as_str(), files = removed.files_deleted.len(), "removed old files");
    table.delta = swept;

    let cutoff_ms = now.micros().div_euclid(1_000) - kept.num_milliseconds().min(now.micros() / 1_000);
    if let Some(version) = table.delta.version() {
        let log = table.delta.log_store();
        cleanup_expired_logs_for(version, log.as_ref(), cutoff_ms, None).await?;
    }
    Ok(())
}
