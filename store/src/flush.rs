//! Log to tables: every few seconds or on size, exactly once by log position, and segments go when nobody needs them.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use deltalake::kernel::{Add, Transaction};
use ledger::{Clock, Timestamp};
use serde::Serialize;
use tokio::sync::watch;

use crate::error::StoreError;
use crate::log::{Position, reader};
use crate::memory::Memory;
use crate::store::{Store, View, Writing};
use crate::tables::delta::{self, Table, application, write_files};
use crate::tables::maintain::{Sweep, maintain};
use crate::tables::schema::{PerTable, TableName};
use crate::tail::Rows;

/// What one flush moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Flushed {
    /// The tables hold the log up to this position.
    pub through: u64,
    /// New rows of `attempts`.
    pub attempts: u64,
    /// New rows of `postings`.
    pub postings: u64,
    /// New rows of `capacity`.
    pub capacity: u64,
    /// New rows of `gaps`.
    pub gaps: u64,
    /// New rows of `engines`, `readings`, `steps`, `spans`, `jobs`, `gpus` and `decisions`.
    pub telemetry: u64,
}

/// What only one flush, compaction or import commit at a time may touch.
#[derive(Debug)]
pub(crate) struct FlushState {
    pub memory: Memory,
    /// Commits since each table was last tended.
    pub commits: PerTable<u64>,
    /// An import's commit was interrupted and has to be finished first.
    pub unfinished_import: bool,
}

impl Store {
    /// Moves what is in the log into the tables. Doing it twice is doing it once.
    ///
    /// # Errors
    /// When files cannot be written or committed: nothing is lost, the log keeps what is not in a table, the next flush tries again.
    pub async fn flush(&self, now: Timestamp) -> Result<Flushed, StoreError> {
        let writing = self.writing()?;
        if let Err(error) = writing.log.settle_debts(now) {
            tracing::warn!(%error, "what earlier failures left owing still cannot be written");
        }
        let mut state = writing.flush.lock().await;
        if state.unfinished_import {
            crate::import::finish_pending(&self.inner, &mut state).await?;
        }
        let through = writing.log.last();
        let mut flushed = Flushed::default();
        loop {
            let from = self.inner.current().lowest_passed();
            if from >= through {
                break;
            }
            let (folder, end) = (self.inner.log_folder(), reader::piece_end(&self.inner.log_folder(), from, through)?);
            let (facts, found) = blocking(move || reader::facts(&folder, from, end)).await?;
            for damage in &found.damage {
                tracing::error!(reason = %damage.reason, records = damage.records_lost, "the log is damaged");
            }
            self.flush_piece(writing, &mut state, facts, end, &mut flushed).await?;
        }
        flushed.through = through.0;
        writing.log.delete_passed(self.inner.current().lowest_passed())?;
        if state.commits.iter().any(|&commits| commits >= self.inner.options.compact_every) {
            self.tend(&mut state, now, self.inner.options.compact_every).await?;
        }
        Ok(flushed)
    }

    /// Merges small files and drops old history of every table. Runs by itself every so many commits.
    ///
    /// # Errors
    /// When files cannot be read, written or removed; the tables stay as they were.
    pub async fn compact(&self, now: Timestamp) -> Result<(), StoreError> {
        let mut state = self.writing()?.flush.lock().await;
        self.tend(&mut state, now, 0).await
    }

    /// Flushes every `every`, sooner when much was written, on a thread of its own: encoding files would stall a gateway's tasks.
    ///
    /// # Errors
    /// When the thread or its runtime cannot be started, or the store is read-only.
    pub fn spawn_flusher(&self, clock: Arc<dyn Clock>, every: Duration) -> Result<Flusher, StoreError> {
        self.writing()?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("flush-worker")
            .enable_all()
            .build()
            .map_err(StoreError::io("start the flusher's runtime"))?;
        let (stop, mut stopped) = watch::channel(false);
        let store = self.clone();
        let thread = std::thread::Builder::new()
            .name("flusher".to_owned())
            .spawn(move || {
                runtime.block_on(async {
                    loop {
                        let writing = store.writing()?;
                        let last = tokio::select! {
                            _ = stopped.wait_for(|stop| *stop) => true,
                            () = writing.much.notified() => false,
                            () = tokio::time::sleep(every) => false,
                        };
                        let outcome = store.flush(clock.now()).await;
                        if last {
                            return outcome.map(|_| ());
                        }
                        if let Err(error) = outcome {
                            tracing::error!(%error, "cannot flush the log into the tables; it is kept and tried again");
                            tokio::time::sleep(every).await;
                        }
                    }
                })
            })
            .map_err(StoreError::io("start the flusher"))?;
        Ok(Flusher { stop, thread: Some(thread) })
    }

    async fn flush_piece(
        &self,
        writing: &Writing,
        state: &mut FlushState,
        facts: Vec<(Position, ledger::Fact)>,
        end: Position,
        flushed: &mut Flushed,
    ) -> Result<(), StoreError> {
        let view = self.inner.current();
        let mut rows = Rows::of(facts, view.passed());
        rows.drop_held(&self.inner.engine, &view.tables, Some(&state.memory)).await?;
        let rows = Arc::new(rows);
        // All tables encode at once: attempts and postings keep one core busy each.
        let mut encoding = Vec::new();
        for table in view.tables.iter().flatten().filter(|table| table.passed < end) {
            let (delta, name, rows) = (table.delta.clone(), table.name, Arc::clone(&rows));
            let task = tokio::spawn(async move { write_files(delta, name, rows.batch(name)?).await });
            encoding.push((table.clone(), task));
        }
        let mut outcome = Ok(());
        for (mut table, task) in encoding {
            let adds = task.await.map_err(|error| StoreError::Tables(format!("encoding rows: {error}")))?;
            let committed = match adds {
                Ok(adds) if adds.is_empty() => Ok(0),
                Ok(adds) => self.commit_piece(&mut table, adds, end).await,
                Err(error) => Err(error),
            };
            match committed {
                Ok(count) => {
                    rows.note(table.name, &mut state.memory);
                    flushed.add(table.name, count);
                    state.commits[table.name.index()] += u64::from(count > 0);
                    table.passed = end;
                    self.inner.publish(table);
                }
                // The other tables go on: each has its own position in the log.
                Err(error) => outcome = Err(error),
            }
        }
        writing.flushed_bytes.store(writing.log.bytes(), std::sync::atomic::Ordering::Relaxed);
        outcome
    }

    /// Commits one table's files. Everything is on the medium afterwards, because the log that it came from may be deleted.
    async fn commit_piece(&self, table: &mut Table, adds: Vec<Add>, end: Position) -> Result<u64, StoreError> {
        let inner = &self.inner;
        delta::sync_files(&inner.dir.join(table.name.as_str()), &adds)?;
        let count = delta::rows_of(&adds);
        let version = i64::try_from(end.0).unwrap_or(i64::MAX);
        table.commit(adds, Transaction::new(application(&inner.log_id), version), &inner.options.faults).await?;
        delta::sync_commit(&inner.dir, table)?;
        Ok(count)
    }

    async fn tend(&self, state: &mut FlushState, now: Timestamp, commits_min: u64) -> Result<(), StoreError> {
        let writing = self.writing()?;
        let view: Arc<View> = self.inner.current();
        for table in view.tables.iter().flatten() {
            if state.commits[table.name.index()] < commits_min.max(1) && commits_min > 0 {
                continue;
            }
            let importing = writing.imports.load(std::sync::atomic::Ordering::Acquire) > 0;
            let sweep = if importing { Sweep::Merged } else { Sweep::Everything };
            let mut tended: Table = table.clone();
            maintain(&mut tended, now, self.inner.options.log_retention, sweep).await?;
            state.commits[table.name.index()] = 0;
            self.inner.publish(tended);
        }
        Ok(())
    }
}

impl Flushed {
    fn add(&mut self, table: TableName, rows: u64) {
        match table {
            TableName::Attempts => self.attempts += rows,
            TableName::Postings => self.postings += rows,
            TableName::Capacity => self.capacity += rows,
            TableName::Gaps => self.gaps += rows,
            _ => self.telemetry += rows,
        }
    }
}

/// The background flusher. Dropping it flushes once more and ends it.
#[derive(Debug)]
pub struct Flusher {
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<Result<(), StoreError>>>,
}

impl Flusher {
    /// Ends it after a last flush. Blocks until that is done.
    ///
    /// # Errors
    /// Those of the last [`Store::flush`].
    pub fn stop(mut self) -> Result<(), StoreError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), StoreError> {
        self.stop.send_replace(true);
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(outcome)) => outcome,
            Some(Err(_)) => Err(StoreError::Tables("the flusher panicked".to_owned())),
        }
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            tracing::error!(%error, "the last flush failed; the log keeps what is not in the tables");
        }
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| StoreError::io("read the log")(std::io::Error::other(error)))?
}
