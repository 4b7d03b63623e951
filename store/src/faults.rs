//! Injected disk failures, for tests and for drills: the disk that fills up, the sync that fails, the commit that is lost.
//!
//! The default injects nothing and costs one relaxed load per write.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

/// A handle on the failures to inject. Clones share their state.
#[derive(Debug, Clone)]
pub struct Faults(Arc<State>);

#[derive(Debug)]
struct State {
    /// Bytes of the log that may still be written before the disk is full.
    log_bytes_left: AtomicI64,
    sync: AtomicBool,
    commit: AtomicBool,
    second_commit: AtomicBool,
}

impl Default for Faults {
    fn default() -> Faults {
        Faults(Arc::new(State {
            log_bytes_left: AtomicI64::new(i64::MAX),
            sync: AtomicBool::new(false),
            commit: AtomicBool::new(false),
            second_commit: AtomicBool::new(false),
        }))
    }
}

impl Faults {
    /// The log's disk is full after `bytes` more. The write that meets the end is cut short there, as a real disk does.
    pub fn fill_log_after(&self, bytes: u32) {
        self.0.log_bytes_left.store(i64::from(bytes), Ordering::SeqCst);
    }

    /// The log's disk has room again.
    pub fn free_log(&self) {
        self.0.log_bytes_left.store(i64::MAX, Ordering::SeqCst);
    }

    /// Syncs of the log fail, or work again.
    pub fn fail_sync(&self, fail: bool) {
        self.0.sync.store(fail, Ordering::SeqCst);
    }

    /// Commits to tables fail after their files were written, or work again.
    pub fn fail_commit(&self, fail: bool) {
        self.0.commit.store(fail, Ordering::SeqCst);
    }

    /// Every commit but that of `attempts` fails, which leaves a flush or an import half done, or works again.
    pub fn fail_later_commits(&self, fail: bool) {
        self.0.second_commit.store(fail, Ordering::SeqCst);
    }

    /// How many of `wanted` bytes fit.
    pub(crate) fn room(&self, wanted: usize) -> usize {
        let left = self.0.log_bytes_left.load(Ordering::Relaxed);
        if left == i64::MAX {
            return wanted;
        }
        let fits = usize::try_from(left).unwrap_or(0).min(wanted);
        self.0.log_bytes_left.fetch_sub(i64::try_from(fits).unwrap_or(0), Ordering::Relaxed);
        fits
    }

    pub(crate) fn sync(&self) -> io::Result<()> {
        refuse(self.0.sync.load(Ordering::Relaxed), "injected sync failure")
    }

    pub(crate) fn commit(&self, table: &str) -> io::Result<()> {
        let later = self.0.second_commit.load(Ordering::Relaxed) && table != "attempts";
        refuse(later || self.0.commit.load(Ordering::Relaxed), "injected commit failure")
    }
}

fn refuse(refused: bool, why: &str) -> io::Result<()> {
    if refused { Err(io::Error::other(why.to_owned())) } else { Ok(()) }
}
