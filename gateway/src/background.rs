//! Work that outlives its client: bounded in number, and waited for at the end.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Semaphore;

/// Runs a bounded number of tasks.
#[derive(Debug)]
pub(crate) struct Background {
    permits: Arc<Semaphore>,
    tasks_max: u32,
    stopped: AtomicBool,
}

impl Background {
    pub fn new(tasks_max: usize) -> Background {
        let tasks_max = u32::try_from(tasks_max.min(Semaphore::MAX_PERMITS)).unwrap_or(u32::MAX);
        let permits = Arc::new(Semaphore::new(usize::try_from(tasks_max).unwrap_or(Semaphore::MAX_PERMITS)));
        Background { permits, tasks_max, stopped: AtomicBool::new(false) }
    }

    /// Runs `work`, or drops it when there is no room, no runtime, or no time left. Attempts book themselves when dropped.
    pub fn run(&self, work: impl Future<Output = ()> + Send + 'static) {
        if self.stopped.load(Ordering::Relaxed) {
            return;
        }
        let (Ok(runtime), Ok(permit)) =
            (tokio::runtime::Handle::try_current(), Arc::clone(&self.permits).try_acquire_owned())
        else {
            return;
        };
        runtime.spawn(async move {
            work.await;
            drop(permit);
        });
    }

    /// Nothing more is started from here on.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// Waits until all tasks ended, at most for `patience`. Returns whether they did.
    pub async fn ended(&self, patience: Duration) -> bool {
        tokio::time::timeout(patience, self.permits.acquire_many(self.tasks_max)).await.is_ok()
    }
}
