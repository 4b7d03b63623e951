//! Appending to the log: encode outside the lock, one `write` inside it, and nothing ever follows garbage.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use ledger::{AttemptId, Fact, Gap, Period, Timestamp};

use crate::error::StoreError;
use crate::faults::Faults;
use crate::log::frame::{self, FRAME_HEADER_BYTES, HEADER_BYTES, Position};
use crate::log::segment::{self, Segment};
use crate::log::sync::{Pending, SyncSignal, Synced};

/// How to write.
#[derive(Debug, Clone)]
pub(crate) struct WriterOptions {
    pub segment_bytes_max: u64,
    pub record_bytes_max: usize,
    pub sync_within: Duration,
    pub faults: Faults,
}

/// The one writer of a log.
#[derive(Debug)]
pub(crate) struct LogWriter {
    core: Arc<Core>,
    syncer: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Core {
    dir: PathBuf,
    options: WriterOptions,
    state: Mutex<State>,
    signal: SyncSignal,
    last: AtomicU64,
    bytes: AtomicU64,
    lost_total: AtomicU64,
    /// Whether something waits to be written once the disk takes it: a gap, or kept attempts.
    owing: AtomicBool,
}

#[derive(Debug)]
struct State {
    next: Position,
    /// The segment that is being written; opened by the first append that needs it.
    open: Option<OpenSegment>,
    /// Full segments that are not synced yet.
    full: Vec<Arc<File>>,
    /// Attempts that were opened and have not finished, with the position of their record.
    running: HashMap<AttemptId, Position>,
    lost: Option<Lost>,
    /// Finished attempts that could not be written and wait until the disk takes them.
    kept: Vec<Fact>,
}

#[derive(Debug)]
struct OpenSegment {
    first: Position,
    file: Arc<File>,
    len: u64,
}

/// Records that were served and not written.
#[derive(Debug, Clone)]
struct Lost {
    since: Timestamp,
    records: u64,
    cause: String,
}

/// Most finished attempts that wait in memory for a disk that takes nothing: about 20 MB.
const KEPT_MAX: usize = 10_000;

thread_local! {
    /// Frames are built here, so that an append allocates nothing once a thread has warmed up.
    static FRAMES: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl LogWriter {
    /// Starts writing after `last`, in a segment of its own: older ones are evidence and are not touched.
    pub(crate) fn start(
        dir: &Path,
        last: Position,
        running: HashMap<AttemptId, Position>,
        options: WriterOptions,
    ) -> Result<LogWriter, StoreError> {
        fs::create_dir_all(dir).map_err(StoreError::io(format!("create {}", dir.display())))?;
        let state = State { next: last.next(), open: None, full: Vec::new(), running, lost: None, kept: Vec::new() };
        let core = Arc::new(Core {
            dir: dir.to_owned(),
            state: Mutex::new(state),
            signal: SyncSignal::new(),
            last: AtomicU64::new(last.0),
            bytes: AtomicU64::new(0),
            lost_total: AtomicU64::new(0),
            owing: AtomicBool::new(false),
            options,
        });
        core.signal.synced.send_modify(|synced| synced.through = last);
        let worker = Arc::clone(&core);
        let syncer = std::thread::Builder::new()
            .name("log-sync".to_owned())
            .spawn(move || {
                let options = &worker.options;
                worker.signal.run(options.sync_within, &options.faults, || worker.pending(), || worker.abandon());
            })
            .map_err(StoreError::io("start the log's sync thread"))?;
        Ok(LogWriter { core, syncer: Some(syncer) })
    }

    /// Writes all of `facts` or none. They have reached the page cache when this returns.
    pub(crate) fn append(&self, facts: &[Fact]) -> Result<Position, StoreError> {
        if facts.is_empty() {
            return Ok(self.last());
        }
        FRAMES.with_borrow_mut(|frames| {
            frames.clear();
            let encoded = self.core.append(facts, frames);
            // One unusually large batch must not stay in memory for the thread's life.
            frames.shrink_to(self.core.options.record_bytes_max);
            encoded
        })
    }

    /// The newest record.
    pub(crate) fn last(&self) -> Position {
        Position(self.core.last.load(Ordering::Acquire))
    }

    /// Bytes appended since the start.
    pub(crate) fn bytes(&self) -> u64 {
        self.core.bytes.load(Ordering::Relaxed)
    }

    /// Counts a record that was served without being written.
    pub(crate) fn record_lost(&self, now: Timestamp, cause: &str) {
        let mut state = self.core.lock();
        let lost =
            state.lost.get_or_insert_with(|| Lost { since: now, records: 0, cause: cause.chars().take(300).collect() });
        lost.since = lost.since.min(now);
        lost.records += 1;
        self.core.lost_total.fetch_add(1, Ordering::Relaxed);
        self.core.owing.store(true, Ordering::Release);
    }

    /// Keeps a finished attempt that could not be written, so that it is written before the next append that works.
    /// False when there is no more room: then it is lost.
    pub(crate) fn keep(&self, fact: &Fact) -> bool {
        let mut state = self.core.lock();
        let room = state.kept.len() < KEPT_MAX && matches!(fact, Fact::Attempt(_));
        if room {
            state.kept.push(fact.clone());
            self.core.owing.store(true, Ordering::Release);
        }
        room
    }

    /// Records lost since the start.
    pub(crate) fn lost(&self) -> u64 {
        self.core.lost_total.load(Ordering::Relaxed)
    }

    /// Writes down what earlier failures left owing, if anything, and if the disk takes it.
    pub(crate) fn settle_debts(&self, now: Timestamp) -> Result<(), StoreError> {
        if !self.core.owing.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut state = self.core.lock();
        self.core.settle_debts(&mut state, now)
    }

    /// A future that ends when `position` is on the medium.
    pub(crate) fn synced(
        &self,
        position: Position,
    ) -> impl Future<Output = Result<(), StoreError>> + Send + 'static + use<> {
        let core = Arc::clone(&self.core);
        async move {
            let mut synced = core.signal.synced.subscribe();
            core.signal.urge();
            let failed = |synced: &Synced| synced.failed.0 < position && position <= synced.failed.1;
            let reached = synced.wait_for(|synced| synced.through >= position || failed(synced)).await;
            match reached {
                Ok(synced) if !failed(&synced) => Ok(()),
                Ok(synced) => Err(StoreError::io("sync the log")(io::Error::other(synced.cause.clone()))),
                Err(_) => Err(StoreError::io("sync the log")(io::Error::other("the log was closed"))),
            }
        }
    }

    /// Deletes segments that every table has passed and that no running attempt needs.
    pub(crate) fn delete_passed(&self, passed: Position) -> Result<u64, StoreError> {
        let segments = segment::list(&self.core.dir)?;
        let deletable: Vec<(Segment, Position)> = {
            let state = self.core.lock();
            let open = state.open.as_ref().map(|open| open.first);
            let ends = segments.iter().skip(1).map(|next| Position(next.first.0 - 1)).chain([self.last()]);
            let with_ends: Vec<_> = segments.iter().cloned().zip(ends).collect();
            with_ends
                .into_iter()
                .filter(|(segment, end)| *end <= passed && Some(segment.first) != open)
                .filter(|(segment, end)| !state.running.values().any(|at| (segment.first..=*end).contains(at)))
                .collect()
        };
        let Some(newest) = deletable.iter().map(|(_, end)| *end).max() else { return Ok(0) };
        segment::note_passed(&self.core.dir, newest)?;
        for (segment, _) in &deletable {
            match fs::remove_file(&segment.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(StoreError::io(format!("delete {}", segment.path.display()))(error));
                }
                _ => {}
            }
        }
        Ok(u64::try_from(deletable.len()).unwrap_or(u64::MAX))
    }
}

impl Drop for LogWriter {
    fn drop(&mut self) {
        self.core.signal.stop();
        if let Some(syncer) = self.syncer.take()
            && syncer.join().is_err()
        {
            tracing::error!("the log's sync thread panicked");
        }
    }
}

impl Core {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while holding the lock leaves at worst an unwritten frame, never a half-registered one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn append(&self, facts: &[Fact], frames: &mut Vec<u8>) -> Result<Position, StoreError> {
        for fact in facts {
            encode(fact, frames, self.options.record_bytes_max)?;
        }
        let mut state = self.lock();
        if self.owing.load(Ordering::Acquire) {
            let ends = facts.first().map_or(Timestamp::default(), time_of);
            self.settle_debts(&mut state, ends)?;
        }
        self.put(&mut state, facts, frames)
    }

    /// Writes encoded facts and notes which attempts run.
    fn put(&self, state: &mut State, facts: &[Fact], frames: &mut [u8]) -> Result<Position, StoreError> {
        let last = seal(frames, state.next);
        self.write(state, frames)?;
        for (index, fact) in (0u64..).zip(facts) {
            match fact {
                Fact::Opened(opened) => {
                    let at = Position(state.next.0 + index);
                    state.running.insert(opened.id, at);
                }
                Fact::Attempt(attempt) => {
                    state.running.remove(&attempt.id);
                }
                _ => {}
            }
        }
        self.written(state, last, frames.len());
        Ok(last)
    }

    /// Attempts that were kept first, then the gap that the lost ones leave.
    fn settle_debts(&self, state: &mut State, now: Timestamp) -> Result<(), StoreError> {
        if !state.kept.is_empty() {
            let kept = std::mem::take(&mut state.kept);
            let mut frames = Vec::new();
            let encoded = kept.iter().try_for_each(|fact| encode(fact, &mut frames, usize::MAX));
            if let Err(error) = encoded.and_then(|()| self.put(state, &kept, &mut frames)) {
                state.kept = kept;
                return Err(error);
            }
        }
        self.write_gap(state, now)?;
        self.owing.store(false, Ordering::Release);
        Ok(())
    }

    fn write_gap(&self, state: &mut State, now: Timestamp) -> Result<(), StoreError> {
        let Some(lost) = state.lost.clone() else { return Ok(()) };
        let period = Period { start: lost.since, end: now.max(lost.since.plus_micros(1)) };
        let mut frames = Vec::new();
        encode(&Fact::Gap(Gap { period, records_lost: lost.records, cause: lost.cause }), &mut frames, usize::MAX)?;
        let last = seal(&mut frames, state.next);
        self.write(state, &frames)?;
        state.lost = None;
        self.written(state, last, frames.len());
        Ok(())
    }

    fn written(&self, state: &mut State, last: Position, bytes: usize) {
        state.next = last.next();
        self.last.store(last.0, Ordering::Release);
        self.bytes.fetch_add(u64::try_from(bytes).unwrap_or(0), Ordering::Relaxed);
        self.signal.written();
    }

    /// Writes frames to the current segment, which is the next one when the current one is full.
    fn write(&self, state: &mut State, frames: &[u8]) -> Result<(), StoreError> {
        let len = u64::try_from(frames.len()).unwrap_or(u64::MAX);
        let full =
            |open: &OpenSegment| open.len > as_u64(HEADER_BYTES) && open.len + len > self.options.segment_bytes_max;
        if state.open.as_ref().is_some_and(full) {
            state.full.extend(state.open.take().map(|open| open.file));
        }
        let open = match &mut state.open {
            Some(open) => open,
            none => none.insert(self.create_segment(state.next)?),
        };
        let outcome = write_all(&open.file, frames, &self.options.faults);
        if outcome.is_ok() {
            open.len += len;
            return Ok(());
        }
        // Nothing may follow a half-written frame. If it cannot even be cut off, the segment ends here and the next
        // append starts another one, which the reader takes for what it is: a torn tail.
        if open.file.set_len(open.len).is_err() {
            state.full.extend(state.open.take().map(|open| open.file));
        }
        outcome.map_err(StoreError::io("write to the log"))
    }

    fn create_segment(&self, first: Position) -> Result<OpenSegment, StoreError> {
        let path = segment::path_of(&self.dir, first);
        let action = format!("create {}", path.display());
        // A file of this name can only hold torn bytes: its first record would have taken this position.
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(StoreError::io(action.clone()))?;
        let written = file.set_len(0).and_then(|()| write_all(&file, &frame::header(first), &self.options.faults));
        if let Err(error) = written {
            // An empty or half header is a torn segment without records; removing it is tidiness.
            let _ = fs::remove_file(&path);
            return Err(StoreError::io(action)(error));
        }
        // The directory entry must survive the machine as well before anybody is told that a record did.
        if let Ok(dir) = File::open(&self.dir)
            && let Err(error) = dir.sync_all()
        {
            tracing::warn!(%error, "cannot sync the log's folder");
        }
        Ok(OpenSegment { first, file: Arc::new(file), len: as_u64(HEADER_BYTES) })
    }

    /// What the sync thread has to sync.
    fn pending(&self) -> Pending {
        let mut state = self.lock();
        let mut files = std::mem::take(&mut state.full);
        files.extend(state.open.as_ref().map(|open| Arc::clone(&open.file)));
        (files, Position(state.next.0 - 1))
    }

    /// After a failed sync the kernel may have dropped the pages, so later records go to another file.
    fn abandon(&self) {
        self.lock().open = None;
    }
}

/// Appends a frame with a blank position and checksum.
fn encode(fact: &Fact, frames: &mut Vec<u8>, bytes_max: usize) -> Result<(), StoreError> {
    let start = frames.len();
    frames.extend_from_slice(&[0; FRAME_HEADER_BYTES]);
    *frames =
        postcard::to_extend(fact, std::mem::take(frames)).map_err(|error| StoreError::corrupt("a fact", error))?;
    let bytes = frames.len() - start - FRAME_HEADER_BYTES;
    let length = u32::try_from(bytes).ok().filter(|_| bytes <= bytes_max.min(frame::PAYLOAD_BYTES_MAX));
    let Some(length) = length else { return Err(StoreError::TooLarge { bytes, bytes_max }) };
    frames[start..start + 4].copy_from_slice(&length.to_le_bytes());
    Ok(())
}

/// Fills in positions from `next` on and the checksums; returns the last position.
fn seal(frames: &mut [u8], next: Position) -> Position {
    let (mut start, mut position) = (0, next);
    let mut last = next;
    while start < frames.len() {
        let [a, b, c, d] = [frames[start], frames[start + 1], frames[start + 2], frames[start + 3]];
        let length = usize::try_from(u32::from_le_bytes([a, b, c, d])).expect("a frame we just built fits memory");
        let end = start + FRAME_HEADER_BYTES + length;
        frames[start + 8..start + 16].copy_from_slice(&position.0.to_le_bytes());
        let checksum = crc32fast::hash(&frames[start + 8..end]);
        frames[start + 4..start + 8].copy_from_slice(&checksum.to_le_bytes());
        last = position;
        position = position.next();
        start = end;
    }
    last
}

fn write_all(mut file: &File, mut bytes: &[u8], faults: &Faults) -> io::Result<()> {
    while !bytes.is_empty() {
        let room = faults.room(bytes.len());
        if room == 0 {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "No space left on device (injected)"));
        }
        match file.write(&bytes[..room]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// When a fact happened: the end of a gap is the first record after it.
fn time_of(fact: &Fact) -> Timestamp {
    match fact {
        Fact::Opened(opened) => opened.received_at,
        Fact::Attempt(attempt) => attempt.timeline.finished_at(),
        Fact::Capacity(capacity) => capacity.observed_at,
        Fact::Posting(posting) => posting.booked_at,
        Fact::Gap(gap) => gap.period.end,
        Fact::Engine(engine) => engine.observed_at,
        Fact::Reading(reading) => reading.at,
        Fact::Step(step) => step.at,
        Fact::Span(span) => span.observed_at,
        Fact::Job(job) => job.observed_at,
        Fact::Gpu(gpu) => gpu.at,
        Fact::Decision(decision) => decision.at,
    }
}

fn as_u64(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}
