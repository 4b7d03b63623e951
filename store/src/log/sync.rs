//! Group sync: one thread syncs what all writers wrote, at once when somebody waits for it and within a few milliseconds anyway.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use crate::faults::Faults;
use crate::log::frame::Position;

/// How far the log is on the medium.
#[derive(Debug, Clone, Default)]
pub(crate) struct Synced {
    /// Everything up to here is.
    pub through: Position,
    /// Records after the first and up to the second may never be: a sync failed.
    pub failed: (Position, Position),
    /// Why.
    pub cause: String,
}

/// What there is to sync: files in the order they were written, and the last position in them.
pub(crate) type Pending = (Vec<Arc<File>>, Position);

/// The signal between writers and the syncing thread.
#[derive(Debug)]
pub(crate) struct SyncSignal {
    dirty: AtomicBool,
    state: Mutex<Wishes>,
    changed: Condvar,
    pub(crate) synced: watch::Sender<Synced>,
}

#[derive(Debug, Default)]
struct Wishes {
    urgent: bool,
    stop: bool,
}

impl SyncSignal {
    pub(crate) fn new() -> SyncSignal {
        SyncSignal {
            dirty: AtomicBool::new(false),
            state: Mutex::default(),
            changed: Condvar::new(),
            synced: watch::Sender::new(Synced::default()),
        }
    }

    /// Something was written. Wakes the thread only if it slept, so that a busy log pays one atomic per record.
    pub(crate) fn written(&self) {
        if !self.dirty.swap(true, Ordering::AcqRel) {
            let _guard = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            self.changed.notify_one();
        }
    }

    /// Somebody waits.
    pub(crate) fn urge(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).urgent = true;
        self.changed.notify_one();
    }

    pub(crate) fn stop(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).stop = true;
        self.changed.notify_one();
    }

    /// The thread's whole life. `pending` hands over what was written; `failed` is told when a sync did not work.
    pub(crate) fn run(&self, within: Duration, faults: &Faults, pending: impl Fn() -> Pending, failed: impl Fn()) {
        loop {
            let stopping = self.wait(within);
            self.dirty.store(false, Ordering::Release);
            let (files, through) = pending();
            let outcome = files.iter().try_for_each(|file| faults.sync().and_then(|()| file.sync_data()));
            match outcome {
                Ok(()) => self.synced.send_modify(|synced| synced.through = synced.through.max(through)),
                Err(error) => {
                    tracing::error!(%error, "the log cannot be synced");
                    failed();
                    self.synced.send_modify(|synced| {
                        synced.failed = (synced.through, through);
                        synced.cause = error.to_string();
                    });
                }
            }
            if stopping {
                return;
            }
        }
    }

    /// Waits for something to sync. True when this is the last round.
    fn wait(&self, within: Duration) -> bool {
        let guard = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = |wishes: &mut Wishes| !wishes.urgent && !wishes.stop && !self.dirty.load(Ordering::Acquire);
        let guard = self.changed.wait_while(guard, idle).unwrap_or_else(PoisonError::into_inner);
        let calm = |wishes: &mut Wishes| !wishes.urgent && !wishes.stop;
        let (mut guard, _) =
            self.changed.wait_timeout_while(guard, within, calm).unwrap_or_else(PoisonError::into_inner);
        guard.urgent = false;
        guard.stop
    }
}
