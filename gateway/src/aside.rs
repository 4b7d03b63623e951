//! Work that takes long enough to be noticed by whoever shares its thread.

use tokio::runtime::{Handle, RuntimeFlavor};

/// Reading this much JSON, or counting its tokens, takes a millisecond or so.
const BYTES_MIN: usize = 256 * 1024;
/// The same for tokens, which take a hundred times longer.
const TOKENIZED_BYTES_MIN: usize = 4 * 1024;

/// Reads a body of `bytes`, apart from the runtime's other tasks when it is a large one.
pub(crate) fn reading<T>(bytes: usize, work: impl FnOnce() -> T) -> T {
    if bytes < BYTES_MIN { work() } else { apart(work) }
}

/// The same for counting the tokens of `bytes`.
pub(crate) fn counting<T>(bytes: usize, work: impl FnOnce() -> T) -> T {
    if bytes < TOKENIZED_BYTES_MIN { work() } else { apart(work) }
}

/// Lets another thread take over the tasks that wait for this one. A runtime of one thread has none.
fn apart<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current() {
        Ok(runtime) if runtime.runtime_flavor() == RuntimeFlavor::MultiThread => tokio::task::block_in_place(work),
        _ => work(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    /// With a single worker, a task that waits for another can only go on if the other gets a thread meanwhile.
    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn others_run_while_a_large_body_is_read() {
        let ran_meanwhile = tokio::spawn(async {
            let (tell, told) = mpsc::channel();
            tokio::spawn(async move { tell.send(()).unwrap() });
            reading(BYTES_MIN, || told.recv_timeout(Duration::from_secs(5)).is_ok())
        });
        assert!(ran_meanwhile.await.unwrap());
    }

    #[tokio::test]
    async fn it_works_where_there_is_nobody_to_step_aside_for() {
        assert_eq!((reading(BYTES_MIN, || 1), counting(TOKENIZED_BYTES_MIN, || 2)), (1, 2));
        assert_eq!(std::thread::spawn(|| reading(BYTES_MIN, || 3)).join().unwrap(), 3);
    }
}
