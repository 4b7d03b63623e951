//! Lets a scheduler's steps take real time, and shares GPUs between engines.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ledger::Clock;
use tokio::sync::{Notify, mpsc};

use super::EngineSpec;
use super::metrics::{self, Counters};
use super::scheduler::{Event, Finished, Rejection, Scheduler, Step, Submission, micros};
use super::text::{mix, unit};

/// Ended requests that an engine remembers.
const FINISHED_MAX: usize = 65_536;
/// How far behind its own schedule an engine may fall before it gives the lost time up, microseconds.
const LAG_US_MAX: u64 = 100_000;

/// GPUs that several engines use by time slicing: each active engine gets an equal share of them.
#[derive(Debug, Clone, Default)]
pub struct SharedGpus {
    active: Arc<AtomicU32>,
}

impl SharedGpus {
    /// Engines at work at this moment.
    #[must_use]
    pub fn active(&self) -> u32 {
        self.active.load(Ordering::Relaxed)
    }

    fn enter(&self) -> Slice {
        self.active.fetch_add(1, Ordering::Relaxed);
        Slice(self.active.clone())
    }
}

/// One engine being active; its end, however it comes, gives the share back.
struct Slice(Arc<AtomicU32>);

impl Drop for Slice {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A scheduler with its clients.
pub struct Engine {
    spec: EngineSpec,
    gpus: SharedGpus,
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
    wake: Notify,
}

struct State {
    scheduler: Scheduler,
    clients: HashMap<u64, mpsc::Sender<Event>>,
    finished: VecDeque<Finished>,
    arrivals: u64,
}

impl Engine {
    /// An idle engine on these GPUs. It works while [`drive`](Engine::drive) is polled.
    #[must_use]
    pub fn new(spec: EngineSpec, gpus: SharedGpus, clock: Arc<dyn Clock>) -> Engine {
        let state = State {
            scheduler: Scheduler::new(spec.clone()),
            clients: HashMap::new(),
            finished: VecDeque::new(),
            arrivals: 0,
        };
        Engine { spec, gpus, clock, state: Mutex::new(state), wake: Notify::new() }
    }

    /// How it was described.
    #[must_use]
    pub fn spec(&self) -> &EngineSpec {
        &self.spec
    }

    /// Its clock.
    #[must_use]
    pub fn clock(&self) -> &dyn Clock {
        &*self.clock
    }

    /// Draws whether the request that arrives now is to fail.
    #[must_use]
    pub fn draw_failure(&self) -> bool {
        let mut state = self.state();
        state.arrivals += 1;
        unit(mix(self.spec.seed, state.arrivals)) < self.spec.failure_share
    }

    /// The most tokens that prompt and answer of one request may have.
    #[must_use]
    pub fn tokens_max(&self) -> u32 {
        self.state().scheduler.tokens_max()
    }

    /// Queues a request and gives what will happen to it. Dropping the receiver aborts it.
    ///
    /// # Errors
    /// [`Rejection`].
    pub fn submit(&self, submission: Submission) -> Result<mpsc::Receiver<Event>, Rejection> {
        // Every event has room, one for each token and one for the end, so a slow client never holds up a step.
        let room = (submission.output_tokens as usize).saturating_add(1);
        let mut state = self.state();
        let id = state.scheduler.submit(submission, self.clock.monotonic_us())?;
        let (sender, receiver) = mpsc::channel(room);
        state.clients.insert(id, sender);
        drop(state);
        self.wake.notify_one();
        Ok(receiver)
    }

    /// The text of `/metrics`.
    #[must_use]
    pub fn metrics(&self) -> String {
        let state = self.state();
        let model = self.spec.models.first().map_or("", String::as_str);
        metrics::render(model, state.scheduler.counters(), &state.scheduler.gauges())
    }

    /// A copy of its counters.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.state().scheduler.counters().clone()
    }

    /// Requests that ended, the latest 65,536 of them, oldest first.
    #[must_use]
    pub fn finished(&self) -> Vec<Finished> {
        self.state().finished.iter().copied().collect()
    }

    /// Requests in the batch and in the queue.
    #[must_use]
    pub fn load(&self) -> usize {
        let gauges = self.state().scheduler.gauges();
        gauges.running + gauges.waiting
    }

    /// Works until the future is dropped: sleeps while there is nothing to do, else one step after the other.
    pub async fn drive(&self) {
        loop {
            self.wake.notified().await;
            let _slice = self.gpus.enter();
            let mut until_us = self.clock.monotonic_us();
            while let Some(step) = self.begin_step() {
                // Timers are coarse, so the schedule counts from the step's planned beginning, not from waking up.
                until_us = until_us.saturating_add(self.wall_us(&step));
                self.sleep_until(&mut until_us).await;
                self.end_step();
            }
        }
    }

    fn wall_us(&self, step: &Step) -> u64 {
        let slices = f64::from(self.gpus.active().max(1));
        micros(step.time.total_s * slices / self.spec.speed).max(1)
    }

    async fn sleep_until(&self, until_us: &mut u64) {
        let now_us = self.clock.monotonic_us();
        *until_us = (*until_us).max(now_us.saturating_sub(LAG_US_MAX));
        match until_us.checked_sub(now_us) {
            Some(left_us) if left_us > 0 => tokio::time::sleep(Duration::from_micros(left_us)).await,
            _ => tokio::task::yield_now().await,
        }
    }

    fn begin_step(&self) -> Option<Step> {
        let now_us = self.clock.monotonic_us();
        let mut state = self.state();
        state.abort_departed(now_us);
        state.scheduler.begin_step(now_us)
    }

    fn end_step(&self) {
        let now_us = self.clock.monotonic_us();
        let mut state = self.state();
        for event in state.scheduler.end_step(now_us) {
            state.deliver(event);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn abort_departed(&mut self, now_us: u64) {
        let mut departed: Vec<u64> =
            self.clients.iter().filter(|(_, client)| client.is_closed()).map(|(&id, _)| id).collect();
        departed.sort_unstable();
        for id in departed {
            self.clients.remove(&id);
            if let Some(finished) = self.scheduler.abort(id, now_us) {
                self.remember(finished);
            }
        }
    }

    fn deliver(&mut self, event: Event) {
        // Sending fails only when the client is gone, which the next step notices.
        match event {
            Event::Token { id, .. } => {
                if let Some(client) = self.clients.get(&id) {
                    let _gone = client.try_send(event);
                }
            }
            Event::Finished(finished) => {
                if let Some(client) = self.clients.remove(&finished.id) {
                    let _gone = client.try_send(event);
                }
                self.remember(finished);
            }
        }
    }

    fn remember(&mut self, finished: Finished) {
        if self.finished.len() == FINISHED_MAX {
            self.finished.pop_front();
        }
        self.finished.push_back(finished);
    }
}
