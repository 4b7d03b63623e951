//! Imports: content-addressed, straight to the tables, and visible whole or not at all.
//!
//! Rows are written to files that no commit names. The import happens when its *pending* note is in place, which lists those
//! files for every table: from then on whoever opens the ledger completes the commits, each of which carries the import's name
//! so that it happens once. Before the note there is nothing, after it there is everything.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use deltalake::kernel::{Add, Transaction};
use ledger::{AttemptId, Fact, Timestamp};
use serde::{Deserialize, Serialize};

use crate::error::StoreError;
use crate::faults::Faults;
use crate::flush::FlushState;
use crate::log::Position;
use crate::log::segment::replace;
use crate::store::{Inner, Store};
use crate::tables::delta::{Table, rows_of, sync_files, write_files};
use crate::tables::existing::time_and_key;
use crate::tables::facts::RowKey;
use crate::tables::schema::{PerTable, TABLES, TableName};
use crate::tail::Rows;

/// Rows that are turned into files at once.
const BATCH_ROWS: usize = 100_000;

/// The name of some content: its BLAKE3 hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ImportId([u8; 32]);

impl ImportId {
    /// The id of `content`. Hash what else decides the result (a model, a consumer) together with it.
    #[must_use]
    pub fn of(content: &[u8]) -> ImportId {
        ImportId(*blake3::hash(content).as_bytes())
    }

    /// The id of everything `reader` gives.
    ///
    /// # Errors
    /// Those of the reader.
    pub fn of_reader(reader: &mut dyn Read) -> io::Result<ImportId> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(reader)?;
        Ok(ImportId(*hasher.finalize().as_bytes()))
    }
}

impl fmt::Display for ImportId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        blake3::Hash::from_bytes(self.0).to_hex().fmt(f)
    }
}

/// What an import brought.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportSummary {
    /// The content's hash.
    pub id: String,
    /// What the caller called it.
    pub name: String,
    /// When it was committed.
    pub at: Timestamp,
    /// New rows of `attempts`.
    pub attempts: u64,
    /// New rows of `postings`.
    pub postings: u64,
    /// New rows of `capacity`.
    pub capacity: u64,
    /// New rows of `gaps`.
    pub gaps: u64,
    /// New rows of `engines`, `readings`, `steps`, `spans`, `jobs`, `gpus` and `decisions`.
    #[serde(default)]
    pub telemetry: u64,
    /// Rows that were in the ledger already.
    pub skipped: u64,
}

/// Whether there is anything to import.
#[derive(Debug)]
pub enum Begun {
    /// This content was imported before.
    AlreadyDone(ImportSummary),
    /// Go on.
    Import(Import),
}

/// An import that nobody can see yet. Dropping it leaves nothing.
#[derive(Debug)]
pub struct Import {
    store: Store,
    summary: ImportSummary,
    waiting: Vec<Fact>,
    seen_attempts: HashSet<AttemptId>,
    seen_keys: HashSet<RowKey>,
    adds: BTreeMap<usize, Vec<Add>>,
    committed: bool,
}

/// The note that makes an import happen.
#[derive(Debug, Serialize, Deserialize)]
struct Pending {
    summary: ImportSummary,
    /// Files by table name.
    adds: BTreeMap<String, Vec<Add>>,
}

impl Store {
    /// Begins the import of some content, unless it was imported before.
    ///
    /// # Errors
    /// When the store is read-only or what is in the log cannot be flushed.
    pub async fn begin_import(&self, id: ImportId, name: &str, now: Timestamp) -> Result<Begun, StoreError> {
        let writing = self.writing()?;
        // Rows are compared with the tables, so the log goes first; this also completes an interrupted import.
        self.flush(now).await?;
        if let Ok(text) = fs::read(done_path(&self.inner.dir, &id.to_string())) {
            let summary =
                serde_json::from_slice(&text).map_err(|error| StoreError::corrupt("an import's summary", error))?;
            return Ok(Begun::AlreadyDone(summary));
        }
        let summary = ImportSummary { id: id.to_string(), name: name.to_owned(), at: now, ..ImportSummary::default() };
        writing.imports.fetch_add(1, Ordering::AcqRel);
        Ok(Begun::Import(Import {
            store: self.clone(),
            summary,
            waiting: Vec::new(),
            seen_attempts: HashSet::new(),
            seen_keys: HashSet::new(),
            adds: BTreeMap::new(),
            committed: false,
        }))
    }
}

impl Import {
    /// Takes facts to be imported. Opened facts mean nothing here and are ignored.
    ///
    /// # Errors
    /// When files cannot be written. The import can only be dropped then.
    pub async fn push(&mut self, facts: Vec<Fact>) -> Result<(), StoreError> {
        for fact in facts {
            let new = match &fact {
                Fact::Opened(_) => continue,
                Fact::Attempt(attempt) => self.seen_attempts.insert(attempt.id),
                other => time_and_key(other).is_some_and(|(_, key)| self.seen_keys.insert(key)),
            };
            if new {
                self.waiting.push(fact)
            } else {
                self.summary.skipped += 1
            }
            if self.waiting.len() >= BATCH_ROWS {
                self.write().await?;
            }
        }
        Ok(())
    }

    /// Makes everything visible. The file of the commit's note is the moment it happens.
    ///
    /// # Errors
    /// Before the note, nothing has happened. After it the import is certain, and an error means that a later flush or the next start
    /// completes it.
    pub async fn commit(mut self, now: Timestamp) -> Result<ImportSummary, StoreError> {
        self.write().await?;
        self.summary.at = now;
        let adds = TableName::ALL
            .iter()
            .filter_map(|name| Some((name.as_str().to_owned(), self.adds.remove(&name.index())?)))
            .collect();
        let pending = Pending { summary: self.summary.clone(), adds };
        let store = self.store.clone();
        let mut state = store.writing()?.flush.lock().await;
        let folder = store.inner.dir.join("imports");
        fs::create_dir_all(&folder).map_err(StoreError::io(format!("create {}", folder.display())))?;
        let bytes = serde_json::to_vec(&pending).map_err(|error| StoreError::corrupt("an import's note", error))?;
        // The note must not outlive, over a power cut, the files that it names.
        for (table, adds) in &pending.adds {
            sync_files(&store.inner.dir.join(table), adds)?;
        }
        replace(&pending_path(&store.inner.dir, &self.summary.id), &bytes)?;
        self.committed = true;
        state.unfinished_import = true;
        finish_pending(&store.inner, &mut state).await?;
        Ok(self.summary.clone())
    }

    async fn write(&mut self) -> Result<(), StoreError> {
        let facts = std::mem::take(&mut self.waiting);
        if facts.is_empty() {
            return Ok(());
        }
        let view = self.store.inner.current();
        let mut rows = Rows::of(facts.into_iter().map(|fact| (Position(1), fact)), [Position(0); TABLES]);
        self.summary.skipped += rows.drop_held(&self.store.inner.engine, &view.tables, None).await?;

        let rows = std::sync::Arc::new(rows);
        let mut encoding = Vec::new();
        for table in view.tables.iter().flatten() {
            let (delta, name, rows) = (table.delta.clone(), table.name, std::sync::Arc::clone(&rows));
            encoding.push((name, tokio::spawn(async move { write_files(delta, name, rows.batch(name)?).await })));
        }
        let mut outcome = Ok(());
        for (name, task) in encoding {
            match task.await.map_err(|error| StoreError::Tables(format!("encoding rows: {error}")))? {
                Ok(adds) => {
                    self.summary.add(name, rows_of(&adds));
                    self.adds.entry(name.index()).or_default().extend(adds);
                }
                Err(error) => outcome = Err(error),
            }
        }
        outcome
    }
}

impl ImportSummary {
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

impl Drop for Import {
    fn drop(&mut self) {
        if let Ok(writing) = self.store.writing() {
            writing.imports.fetch_sub(1, Ordering::AcqRel);
        }
        if self.committed {
            return;
        }
        for (table, adds) in &self.adds {
            let folder = self.store.inner.dir.join(TableName::ALL[*table].as_str());
            for add in adds {
                // What cannot be removed now is swept up by vacuum: no commit names it.
                let _ = fs::remove_file(folder.join(&add.path));
            }
        }
    }
}

/// Completes imports whose note is in place. The flusher's state is told what came in.
pub(crate) async fn finish_pending(inner: &Inner, state: &mut FlushState) -> Result<(), StoreError> {
    let mut tables = inner.current().tables.clone();
    let outcome = roll_forward(&inner.dir, &mut tables, &inner.options.faults).await;
    for table in tables.into_iter().flatten() {
        if let Some(newest) = table.newest {
            match table.name {
                TableName::Attempts => state.memory.attempts.forget_through(newest),
                TableName::Postings => state.memory.charges.forget_through(newest),
                _ => {}
            }
        }
        state.commits[table.name.index()] += 1;
        inner.publish(table);
    }
    state.unfinished_import = outcome.is_err();
    outcome.map(|_| ())
}

/// Commits every pending import to the tables that lack it, and says how many there were.
pub(crate) async fn roll_forward(
    dir: &Path,
    tables: &mut PerTable<Option<Table>>,
    faults: &Faults,
) -> Result<u64, StoreError> {
    let mut finished = 0;
    for path in pending(dir)? {
        let bytes = fs::read(&path).map_err(StoreError::io(format!("read {}", path.display())))?;
        let note: Pending =
            serde_json::from_slice(&bytes).map_err(|error| StoreError::corrupt(path.display().to_string(), error))?;
        let application = format!("farthing-import-{}", note.summary.id);
        for table in tables.iter_mut().flatten() {
            let Some(adds) = note.adds.get(table.name.as_str()).filter(|adds| !adds.is_empty()) else { continue };
            if table.transaction(&application).await?.is_none() {
                table.commit(adds.clone(), Transaction::new(&application, 1), faults).await?;
            }
        }
        let summary = serde_json::to_vec_pretty(&note.summary)
            .map_err(|error| StoreError::corrupt("an import's summary", error))?;
        replace(&done_path(dir, &note.summary.id), &summary)?;
        fs::remove_file(&path).map_err(StoreError::io(format!("delete {}", path.display())))?;
        finished += 1;
    }
    Ok(finished)
}

fn pending(dir: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let folder = dir.join("imports");
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(StoreError::io(format!("list {}", folder.display()))(error)),
    };
    let paths = entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>();
    let mut paths = paths.map_err(StoreError::io(format!("list {}", folder.display())))?;
    paths.retain(|path| path.to_string_lossy().ends_with(".pending.json"));
    paths.sort();
    Ok(paths)
}

fn pending_path(dir: &Path, id: &str) -> PathBuf {
    dir.join("imports").join(format!("{id}.pending.json"))
}

fn done_path(dir: &Path, id: &str) -> PathBuf {
    dir.join("imports").join(format!("{id}.json"))
}
