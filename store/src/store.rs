//! One ledger on disk: opening it, replaying its log, appending to it.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use ledger::{
    Attempt, AttemptId, Charge, Fact, Opened, Operation, Outcome, Timeline, Timestamp, TokenUsage, UnpricedReason,
    UsageQuality,
};
use object_store::local::LocalFileSystem;
use serde::Serialize;
use tokio::sync::{Mutex, Notify};

use crate::control::ControlLog;
use crate::engine::Engine;
use crate::error::StoreError;
use crate::faults::Faults;
use crate::flush::FlushState;
use crate::import;
use crate::lock::FolderLock;
use crate::log::Position;
use crate::log::frame::Damage;
use crate::log::reader::{self, Findings, Peek, peek};
use crate::log::segment;
use crate::log::writer::{LogWriter, WriterOptions};
use crate::memory::{Memory, Recent};
use crate::tables::delta::Table;
use crate::tables::existing;
use crate::tables::schema::{PerTable, TABLES, TableName};

/// How a store works. The default is right for a gateway.
#[derive(Debug, Clone)]
pub struct Options {
    /// A segment of the log that has grown to this many bytes is followed by another.
    pub segment_bytes_max: u64,
    /// A larger record is refused.
    pub record_bytes_max: usize,
    /// The log is synced at least this often while it is written to.
    pub sync_within: Duration,
    /// This much unflushed log wakes the background flusher early, in bytes.
    pub flush_bytes: u64,
    /// After this many commits a table's small files are merged.
    pub compact_every: u64,
    /// Queries that need more memory spill to disk.
    pub query_memory_bytes: usize,
    /// Replaced files and old versions of tables are kept this long for readers that still use them.
    pub log_retention: Duration,
    /// Injected disk failures.
    pub faults: Faults,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            segment_bytes_max: 8 * 1024 * 1024,
            record_bytes_max: 1024 * 1024,
            sync_within: Duration::from_millis(5),
            flush_bytes: 4 * 1024 * 1024,
            compact_every: 40,
            query_memory_bytes: 512 * 1024 * 1024,
            log_retention: Duration::from_secs(3_600),
            faults: Faults::default(),
        }
    }
}

/// Prices an attempt that was opened and never finished, from what was known when it was opened.
pub type PriceOpened<'a> = &'a (dyn Fn(&Opened, &TokenUsage) -> Charge + Send + Sync);

/// What opening found and did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Recovery {
    /// Log segments read.
    pub segments: u64,
    /// Records in them.
    pub records: u64,
    /// Bytes of writes that a crash cut short; nobody was told that they were written.
    pub torn_bytes: u64,
    /// Damage in the log, with what it cost.
    pub damaged: Vec<Damage>,
    /// Attempts that were running when the process ended, booked now as estimates.
    pub crashed: Vec<Attempt>,
    /// Imports whose commit was interrupted and is complete now.
    pub imports_finished: u64,
}

/// A ledger. Clones share it; the last one to go closes it.
#[derive(Debug, Clone)]
pub struct Store {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub dir: PathBuf,
    pub options: Options,
    pub engine: Engine,
    pub log_id: String,
    control: ControlLog,
    view: RwLock<Arc<View>>,
    writing: Option<Writing>,
}

/// What only the one writer has.
#[derive(Debug)]
pub(crate) struct Writing {
    pub log: LogWriter,
    pub flush: Mutex<FlushState>,
    /// Wakes the flusher when much was written.
    pub much: Notify,
    pub flushed_bytes: AtomicU64,
    woken: AtomicBool,
    /// Imports that write files nobody has committed yet.
    pub imports: AtomicUsize,
    _lock: FolderLock,
}

/// One version of every table.
#[derive(Debug, Clone)]
pub(crate) struct View {
    pub tables: PerTable<Option<Table>>,
}

impl View {
    /// How much of the log each table holds.
    pub(crate) fn passed(&self) -> PerTable<Position> {
        self.tables.each_ref().map(|table| table.as_ref().map_or(Position(0), |table| table.passed))
    }

    /// How much of the log every table holds.
    pub(crate) fn lowest_passed(&self) -> Position {
        self.passed().into_iter().min().unwrap_or_default()
    }
}

impl Store {
    /// Opens the ledger in `dir` for writing, creating it if there is none. Replays the log, completes interrupted imports, and
    /// books attempts that never finished as estimates priced by `price`. `now` is only written down.
    ///
    /// # Errors
    /// [`StoreError::Locked`] when another process writes it, [`StoreError::Io`] when the folder cannot be used.
    pub async fn open(
        dir: &Path,
        options: Options,
        now: Timestamp,
        price: PriceOpened<'_>,
    ) -> Result<(Store, Recovery), StoreError> {
        fs::create_dir_all(dir).map_err(StoreError::io(format!("create {}", dir.display())))?;
        let lock = FolderLock::take(dir)?;
        let log_dir = dir.join("log");
        fs::create_dir_all(&log_dir).map_err(StoreError::io(format!("create {}", log_dir.display())))?;
        segment::check_format(dir, &log_dir)?;
        let log_id = log_id(&log_dir)?;
        let spill = dir.join("spill");
        // What an earlier process spilled helps nobody.
        let _ = fs::remove_dir_all(&spill);
        let engine = Engine::new(Some(&spill), options.query_memory_bytes)?;

        let mut tables = [const { None }; TABLES];
        for name in TableName::ALL {
            let table = match Table::open(dir, name, &log_id).await? {
                Some(table) => table,
                None => Table::create(dir, name).await?,
            };
            tables[name.index()] = Some(table);
        }
        let imports_finished = import::roll_forward(dir, &mut tables, &options.faults).await?;
        let view = View { tables };

        let replay = blocking({
            let log_dir = log_dir.clone();
            move || replay(&log_dir)
        })
        .await?;
        let highest = view.passed().into_iter().max().unwrap_or_default();
        let last = replay.found.last.max(highest).max(segment::passed(&log_dir));
        let writer_options = WriterOptions {
            segment_bytes_max: options.segment_bytes_max,
            record_bytes_max: options.record_bytes_max,
            sync_within: options.sync_within,
            faults: options.faults.clone(),
        };
        let log = LogWriter::start(&log_dir, last, HashMap::new(), writer_options)?;

        let memory = memory_of(&view);
        let writing = Writing {
            log,
            flush: Mutex::new(FlushState { memory, commits: [0; TABLES], unfinished_import: false }),
            much: Notify::new(),
            flushed_bytes: AtomicU64::new(0),
            woken: AtomicBool::new(false),
            imports: AtomicUsize::new(0),
            _lock: lock,
        };
        let control = control_log(dir, true)?;
        let view = RwLock::new(Arc::new(view));
        let inner = Inner { dir: dir.to_owned(), options, engine, log_id, control, view, writing: Some(writing) };
        let store = Store { inner: Arc::new(inner) };
        let crashed = store.book_crashed(replay.unfinished, now, price).await?;
        let Findings { segments, records, torn_bytes, damage, .. } = replay.found;
        Ok((store, Recovery { segments, records, torn_bytes, damaged: damage, crashed, imports_finished }))
    }

    /// Opens the ledger in `dir` for reading, beside a writer or without one. Every query sees the newest state.
    ///
    /// # Errors
    /// [`StoreError::NoLedger`] when there is none.
    pub async fn open_read_only(dir: &Path, options: Options) -> Result<Store, StoreError> {
        let log_dir = dir.join("log");
        let Ok(log_id) = fs::read_to_string(log_dir.join("id")) else {
            return Err(StoreError::NoLedger { dir: dir.to_owned() });
        };
        segment::check_format(dir, &log_dir)?;
        let engine = Engine::new(None, options.query_memory_bytes)?;
        let log_id = log_id.trim().to_owned();
        let mut tables = [const { None }; TABLES];
        for name in TableName::ALL {
            tables[name.index()] = Table::open(dir, name, &log_id).await?;
        }
        let view = RwLock::new(Arc::new(View { tables }));
        let control = control_log(dir, false)?;
        let inner = Inner { dir: dir.to_owned(), options, engine, log_id, control, view, writing: None };
        Ok(Store { inner: Arc::new(inner) })
    }

    /// The ledger's folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    /// Writes a fact down: it has reached the page cache when this returns, which survives the end of the process.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the disk refuses: nothing of it is in the log then, and the caller's policy decides.
    pub fn append(&self, fact: &Fact) -> Result<Position, StoreError> {
        self.append_all(std::slice::from_ref(fact))
    }

    /// Writes all of `facts` or none, in one write. Returns the position of the last.
    ///
    /// # Errors
    /// As [`append`](Store::append).
    pub fn append_all(&self, facts: &[Fact]) -> Result<Position, StoreError> {
        let writing = self.writing()?;
        let position = writing.log.append(facts)?;
        let unflushed = writing.log.bytes().saturating_sub(writing.flushed_bytes.load(Ordering::Relaxed));
        if unflushed < self.inner.options.flush_bytes {
            writing.woken.store(false, Ordering::Relaxed);
        } else if !writing.woken.swap(true, Ordering::Relaxed) {
            writing.much.notify_one();
        }
        Ok(position)
    }

    /// Ends when `position` is on the medium, which survives the machine.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the sync failed.
    pub fn synced(&self, position: Position) -> impl Future<Output = Result<(), StoreError>> + Send + 'static + use<> {
        let wait = self.writing().map(|writing| writing.log.synced(position));
        async move { wait?.await }
    }

    /// Notes that a request was served without its record being written. The gap is entered in the books with the next append or
    /// flush that works.
    pub fn record_lost(&self, now: Timestamp, cause: &str) {
        if let Ok(writing) = self.writing() {
            writing.log.record_lost(now, cause);
        }
    }

    /// Keeps a finished attempt whose append failed, within bounds, so that it is written with the next append or flush that works.
    /// False when it cannot be kept: then it is lost, and [`Store::record_lost`] is due.
    pub fn keep(&self, fact: &Fact) -> bool {
        self.writing().is_ok_and(|writing| writing.log.keep(fact))
    }

    /// Records lost since the store was opened.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.writing().map_or(0, |writing| writing.log.lost())
    }

    /// The newest record of the log.
    #[must_use]
    pub fn last_position(&self) -> Position {
        self.writing().map_or(Position(0), |writing| writing.log.last())
    }

    /// Records in the log that not every table holds yet. Sources that can wait should, when this grows large.
    #[must_use]
    pub fn unflushed(&self) -> u64 {
        self.last_position().0.saturating_sub(self.inner.current().lowest_passed().0)
    }

    /// The log of keys, prices and policies.
    #[must_use]
    pub fn control(&self) -> ControlLog {
        self.inner.control.clone()
    }

    pub(crate) fn writing(&self) -> Result<&Writing, StoreError> {
        self.inner.writing.as_ref().ok_or(StoreError::ReadOnly)
    }

    /// Books what was running when the process ended. Its finish may be in a table although its segment is gone, so tables are asked.
    async fn book_crashed(
        &self,
        unfinished: Vec<Opened>,
        now: Timestamp,
        price: PriceOpened<'_>,
    ) -> Result<Vec<Attempt>, StoreError> {
        if unfinished.is_empty() {
            return Ok(Vec::new());
        }
        let ids: Vec<AttemptId> = unfinished.iter().map(|opened| opened.id).collect();
        let days: BTreeSet<i32> = unfinished.iter().map(|opened| opened.received_at.day()).collect();
        let view = self.inner.current();
        let held = match &view.tables[TableName::Attempts.index()] {
            Some(table) => existing::attempts(&self.inner.engine, table, &ids, &days).await?,
            None => Default::default(),
        };
        let crashed: Vec<Attempt> = unfinished
            .into_iter()
            .filter(|opened| !held.contains(&opened.id))
            .map(|opened| crashed(opened, price))
            .collect();
        let facts: Vec<Fact> = crashed.iter().map(|attempt| Fact::Attempt(Box::new(attempt.clone()))).collect();
        if let Err(error) = self.append_all(&facts) {
            // The records stay opened in the log, so the next start tries again; serving does not wait for it.
            tracing::error!(%error, at = %now, "attempts that a crash interrupted cannot be booked yet");
            return Ok(Vec::new());
        }
        Ok(crashed)
    }
}

impl Inner {
    pub(crate) fn log_folder(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// The view as the flusher left it.
    pub(crate) fn current(&self) -> Arc<View> {
        Arc::clone(&self.view.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The newest view: the flusher's own, or read from the tables when somebody else writes them.
    pub(crate) async fn view(&self) -> Result<Arc<View>, StoreError> {
        if self.writing.is_some() {
            return Ok(self.current());
        }
        let mut tables = self.current().tables.clone();
        for name in TableName::ALL {
            let slot = &mut tables[name.index()];
            match slot {
                Some(table) => table.refresh(&self.log_id).await?,
                None => *slot = Table::open(&self.dir, name, &self.log_id).await?,
            }
        }
        let view = Arc::new(View { tables });
        *self.view.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&view);
        Ok(view)
    }

    /// Whether any table has a newer version than `view` has.
    pub(crate) async fn has_moved(&self, view: &Arc<View>) -> Result<bool, StoreError> {
        if self.writing.is_some() {
            return Ok(!Arc::ptr_eq(&self.current(), view));
        }
        for table in view.tables.iter().flatten() {
            if Some(table.delta.get_latest_version().await?) != table.delta.version() {
                return Ok(true);
            }
        }
        Ok(view.tables.iter().any(Option::is_none))
    }

    /// Makes a new version of one table visible.
    pub(crate) fn publish(&self, table: Table) {
        let mut view = self.view.write().unwrap_or_else(PoisonError::into_inner);
        let mut next = View::clone(&view);
        let name = table.name;
        next.tables[name.index()] = Some(table);
        *view = Arc::new(next);
    }

    /// The newest record that a reader should look for.
    pub(crate) fn newest_position(&self) -> Position {
        self.writing.as_ref().map_or(Position(u64::MAX), |writing| writing.log.last())
    }
}

fn control_log(dir: &Path, writable: bool) -> Result<ControlLog, StoreError> {
    let objects = LocalFileSystem::new_with_prefix(dir)?;
    Ok(ControlLog::new(Arc::new(objects), writable))
}

fn memory_of(view: &View) -> Memory {
    let newest = |name: TableName| view.tables[name.index()].as_ref().and_then(|table| table.newest);
    Memory { attempts: Recent::new(newest(TableName::Attempts)), charges: Recent::new(newest(TableName::Postings)) }
}

struct Replay {
    found: Findings,
    unfinished: Vec<Opened>,
}

/// Walks over the log, keeping only the records of attempts that were opened and not finished.
fn replay(log_dir: &Path) -> Result<Replay, StoreError> {
    let mut opened: HashMap<AttemptId, Vec<u8>> = HashMap::new();
    // Order does not matter, so a finish that comes before its opening counts as well.
    let mut finished: BTreeSet<AttemptId> = BTreeSet::new();
    let mut found = reader::visit(log_dir, Position(0), Position(u64::MAX), |_, payload| match peek(payload) {
        Peek::Opened(id) if finished.remove(&id) => {}
        Peek::Opened(id) => {
            opened.insert(id, payload.to_vec());
        }
        Peek::Finished(id) => {
            if opened.remove(&id).is_none() {
                finished.insert(id);
            }
        }
        Peek::Other => {}
    })?;
    let mut unfinished = Vec::with_capacity(opened.len());
    for payload in opened.into_values() {
        match postcard::from_bytes(&payload) {
            Ok(Fact::Opened(opened)) => unfinished.push(*opened),
            Ok(_) => {}
            Err(error) => {
                let reason = format!("an opened record cannot be read: {error}");
                found.damage.push(Damage { offset: 0, bytes: 0, records_lost: 1, reason });
            }
        }
    }
    unfinished.sort_by_key(|opened| opened.id);
    Ok(Replay { found, unfinished })
}

/// The attempt that stands for one whose end nobody saw: its usage is the estimate, and its timeline ends where it began.
fn crashed(opened: Opened, price: PriceOpened<'_>) -> Attempt {
    // Where nothing could be counted, nothing is known: that is no estimate of zero.
    let known = opened.estimate != TokenUsage::default();
    let free = matches!(opened.route.operation, Operation::CountTokens | Operation::Models);
    let charge = match price(&opened, &opened.estimate) {
        Charge::Priced { .. } | Charge::Estimated { .. } if !known && !free => {
            Charge::Unpriced { reason: UnpricedReason::NoUsage }
        }
        charge => charge,
    };
    Attempt {
        id: opened.id,
        source: ledger::Source::Gateway,
        context: opened.context,
        route: opened.route,
        timeline: Timeline { received_at: opened.received_at, ..Timeline::default() },
        outcome: Outcome::Crashed,
        status: None,
        usage: opened.estimate,
        usage_quality: if known || free { UsageQuality::Estimated } else { UsageQuality::Missing },
        charge,
    }
}

/// The log's name in the tables' commits, made once.
fn log_id(log_dir: &Path) -> Result<String, StoreError> {
    let path = log_dir.join("id");
    if let Ok(id) = fs::read_to_string(&path)
        && !id.trim().is_empty()
    {
        return Ok(id.trim().to_owned());
    }
    let mut random = [0u8; 16];
    getrandom::fill(&mut random).map_err(|error| StoreError::io("read random bytes")(std::io::Error::other(error)))?;
    let id = uuid::Builder::from_random_bytes(random).into_uuid().to_string();
    segment::replace(&path, id.as_bytes())?;
    Ok(id)
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| StoreError::io("read the log")(std::io::Error::other(error)))?
}
