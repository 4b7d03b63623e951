//! The query engine: one bounded memory pool and spill folder for everything that runs in this process.

use std::path::Path;
use std::sync::Arc;

use datafusion::dataframe::DataFrame;
use datafusion::execution::disk_manager::{DiskManagerBuilder, DiskManagerMode};
use datafusion::execution::memory_pool::FairSpillPool;
use datafusion::execution::runtime_env::{RuntimeEnv, RuntimeEnvBuilder};
use datafusion::execution::session_state::SessionStateBuilder;
use datafusion::prelude::{SessionConfig, SessionContext};

use crate::error::StoreError;
use crate::tables::delta::Table;

/// How a query reads files. Measured on 20 million rows: filtering inside the reader makes finding one id 14 times faster and
/// a large join 1.6 times slower.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reading {
    /// Read columns whole and filter afterwards: aggregates and joins.
    Scan,
    /// Evaluate filters while reading: a few rows by id.
    LookUp,
}

/// Makes sessions. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Engine {
    runtime: Arc<RuntimeEnv>,
}

impl Engine {
    /// An engine that uses at most `memory_bytes` and spills to `spill`, or to the system's temporary folder.
    pub(crate) fn new(spill: Option<&Path>, memory_bytes: usize) -> Result<Engine, StoreError> {
        let disk = match spill {
            Some(folder) => {
                std::fs::create_dir_all(folder).map_err(StoreError::io(format!("create {}", folder.display())))?;
                DiskManagerMode::Directories(vec![folder.to_owned()])
            }
            None => DiskManagerMode::OsTmpDirectory,
        };
        let runtime = RuntimeEnvBuilder::new()
            .with_memory_pool(Arc::new(FairSpillPool::new(memory_bytes)))
            .with_disk_manager_builder(DiskManagerBuilder::default().with_mode(disk))
            .build_arc()?;
        Ok(Engine { runtime })
    }

    /// A session without tables.
    pub(crate) fn session(&self, reading: Reading) -> SessionContext {
        let mut config = SessionConfig::new().with_information_schema(true);
        let parquet = &mut config.options_mut().execution.parquet;
        parquet.pushdown_filters = reading == Reading::LookUp;
        parquet.reorder_filters = reading == Reading::LookUp;
        parquet.bloom_filter_on_read = true;
        parquet.schema_force_view_types = false;
        config.options_mut().sql_parser.map_string_types_to_utf8view = false;
        let state = SessionStateBuilder::new()
            .with_config(config)
            .with_runtime_env(Arc::clone(&self.runtime))
            .with_default_features()
            .build();
        SessionContext::new_with_state(state)
    }

    /// A table by itself, for finding a few rows.
    pub(crate) async fn look_up(&self, table: &Table) -> Result<DataFrame, StoreError> {
        let session = self.session(Reading::LookUp);
        let provider = provider(&session, table).await?;
        Ok(session.read_table(provider)?)
    }
}

/// A version of a table, read the way the session says.
pub(crate) async fn provider(
    session: &SessionContext,
    table: &Table,
) -> Result<Arc<dyn datafusion::catalog::TableProvider>, StoreError> {
    let snapshot = table.delta.snapshot()?.snapshot().clone();
    let builder = deltalake::delta_datafusion::DeltaScanNext::builder()
        .with_eager_snapshot(snapshot)
        .with_log_store(table.delta.log_store())
        .with_session(Arc::new(session.state()));
    Ok(Arc::new(builder.build().await?))
}
