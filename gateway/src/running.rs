//! What runs at this moment: an entry for each attempt that was opened and has not ended, so that a pool can be settled
//! while long answers are still being made.
//!
//! The request path writes with plain stores into its own entry and takes an uncontended lock twice, when an attempt
//! begins and when it ends. Whoever looks pays for looking.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ledger::{AttemptId, Clock, Opened, Running, Timeline, TokenGaps, TokenUsage};

use crate::meter::SoFar;

/// Locks that the attempts are spread over by the random end of their ids.
const SHARDS: usize = 16;

/// Every attempt that has not ended.
#[derive(Debug, Default)]
pub(crate) struct Registry {
    shards: [Mutex<Shard>; SHARDS],
}

/// Places for attempts; the empty ones are used again.
#[derive(Debug, Default)]
struct Shard {
    places: Vec<Option<Arc<Progress>>>,
    empty: Vec<usize>,
}

/// An attempt's place among the running ones. It leaves when this is dropped.
#[derive(Debug)]
pub(crate) struct Ticket {
    registry: Arc<Registry>,
    place: usize,
    progress: Arc<Progress>,
}

/// How far one attempt got. Times are microseconds after the request was received.
#[derive(Debug)]
struct Progress {
    opened: Box<Opened>,
    /// The monotonic clock when the request was received.
    anchor_us: u64,
    admitted_us: u64,
    streamed: AtomicBool,
    sent: Moment,
    first_byte: Moment,
    first_token: Moment,
    last_token: Moment,
    gaps: AtomicU32,
    gaps_total_us: AtomicU64,
    gap_max_us: AtomicU64,
    output_tokens: AtomicU64,
}

/// A time that may not have come yet.
#[derive(Debug)]
struct Moment(AtomicU64);

impl Default for Moment {
    fn default() -> Moment {
        Moment(AtomicU64::new(u64::MAX))
    }
}

impl Moment {
    fn set(&self, at_us: u64) {
        self.0.store(at_us, Ordering::Relaxed);
    }

    fn get(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|&at_us| at_us != u64::MAX)
    }
}

impl Registry {
    /// Takes in an attempt whose opened record is made.
    pub fn enter(self: &Arc<Registry>, opened: Box<Opened>, anchor_us: u64, admitted_us: u64) -> Ticket {
        let progress = Arc::new(Progress {
            streamed: AtomicBool::new(opened.route.streamed),
            opened,
            anchor_us,
            admitted_us,
            sent: Moment::default(),
            first_byte: Moment::default(),
            first_token: Moment::default(),
            last_token: Moment::default(),
            gaps: AtomicU32::new(0),
            gaps_total_us: AtomicU64::new(0),
            gap_max_us: AtomicU64::new(0),
            output_tokens: AtomicU64::new(0),
        });
        let place = self.shard(progress.opened.id).enter(Arc::clone(&progress));
        Ticket { registry: Arc::clone(self), place, progress }
    }

    /// The attempts that were sent and have not ended, in the order of their ids.
    pub fn look(&self, clock: &dyn Clock) -> Vec<Running> {
        let mut found = Vec::new();
        for shard in &self.shards {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            found.extend(shard.places.iter().flatten().cloned());
        }
        let now_us = clock.monotonic_us();
        let mut running: Vec<Running> = found.iter().filter_map(|progress| progress.so_far(now_us)).collect();
        running.sort_unstable_by_key(|running| running.id);
        running
    }

    fn shard(&self, id: AttemptId) -> MutexGuard<'_, Shard> {
        let [.., last] = *id.request.uuid().as_bytes();
        let shard = &self.shards[usize::from(last) % SHARDS];
        // Nothing between lock and unlock can leave a shard half changed.
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shard {
    fn enter(&mut self, progress: Arc<Progress>) -> usize {
        let Some(place) = self.empty.pop() else {
            self.places.push(Some(progress));
            return self.places.len() - 1;
        };
        self.places[place] = Some(progress);
        place
    }
}

impl Ticket {
    /// The request was handed to the upstream.
    pub fn sent(&self, at_us: u64) {
        self.progress.sent.set(at_us);
    }

    /// The head of the answer came.
    pub fn answered(&self, at_us: u64, streamed: bool) {
        self.progress.streamed.store(streamed, Ordering::Relaxed);
        self.progress.first_byte.set(at_us);
    }

    /// More of the answer came.
    pub fn progressed(&self, so_far: SoFar) {
        let (Some(first_us), Some(last_us)) = (so_far.first_token_us, so_far.last_token_us) else { return };
        let progress = &self.progress;
        progress.first_token.set(first_us);
        progress.last_token.set(last_us);
        progress.gaps.store(so_far.gaps.count, Ordering::Relaxed);
        progress.gaps_total_us.store(so_far.gaps.total_us, Ordering::Relaxed);
        progress.gap_max_us.store(so_far.gaps.max_us, Ordering::Relaxed);
        progress.output_tokens.store(so_far.output_tokens, Ordering::Relaxed);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut shard = self.registry.shard(self.progress.opened.id);
        shard.places[self.place] = None;
        shard.empty.push(self.place);
    }
}

impl Progress {
    /// What is known at `now_us` of the monotonic clock; nothing of an attempt that was not sent yet.
    fn so_far(&self, now_us: u64) -> Option<Running> {
        let sent_us = self.sent.get()?;
        // The stores of a chunk are not one: a later one may be seen before an earlier one, by at most that chunk.
        let last_token_us = self.last_token.get();
        let first_token_us = self.first_token.get().or(last_token_us);
        let seen_us = last_token_us.or(self.first_byte.get()).unwrap_or(sent_us);
        let mut route = self.opened.route.clone();
        route.streamed = self.streamed.load(Ordering::Relaxed);
        Some(Running {
            id: self.opened.id,
            context: self.opened.context.clone(),
            route,
            timeline: Timeline {
                received_at: self.opened.received_at,
                admitted_us: Some(self.admitted_us),
                sent_us: Some(sent_us),
                first_byte_us: self.first_byte.get(),
                first_token_us,
                last_token_us: last_token_us.or(first_token_us),
                queued_us: None,
                finished_us: now_us.saturating_sub(self.anchor_us).max(seen_us),
                gaps: TokenGaps {
                    count: self.gaps.load(Ordering::Relaxed),
                    total_us: self.gaps_total_us.load(Ordering::Relaxed),
                    max_us: self.gap_max_us.load(Ordering::Relaxed),
                },
            },
            usage: TokenUsage { output: self.output_tokens.load(Ordering::Relaxed), ..self.opened.estimate },
        })
    }
}

#[cfg(test)]
mod tests {
    use ledger::{Context, RequestId, Route, Timestamp};

    use super::*;

    struct At(u64);

    impl Clock for At {
        fn now(&self) -> Timestamp {
            Timestamp::default()
        }

        fn monotonic_us(&self) -> u64 {
            self.0
        }
    }

    fn opened(number: u8) -> Box<Opened> {
        Box::new(Opened {
            id: AttemptId { request: RequestId::new(Timestamp::from_micros(0), [number; 10]), number: 0 },
            received_at: Timestamp::from_micros(1_000),
            context: Context::default(),
            route: Route::default(),
            estimate: TokenUsage { input: 7, ..TokenUsage::default() },
        })
    }

    #[test]
    fn what_is_not_sent_or_has_ended_does_not_run() {
        let registry = Arc::new(Registry::default());
        let tickets: Vec<Ticket> = (0..40).map(|number| registry.enter(opened(number), 100, 5)).collect();
        assert!(registry.look(&At(200)).is_empty());
        tickets.iter().for_each(|ticket| ticket.sent(9));
        assert_eq!(registry.look(&At(200)).len(), 40);
        drop(tickets);
        assert!(registry.look(&At(200)).is_empty());
        let again: Vec<Ticket> = (0..40).map(|number| registry.enter(opened(number), 100, 5)).collect();
        let places: usize = registry.shards.iter().map(|shard| shard.lock().unwrap().places.len()).sum();
        assert_eq!((places, again.len()), (40, 40), "empty places are used again");
    }

    #[test]
    fn an_entry_says_how_far_its_attempt_got() {
        let registry = Arc::new(Registry::default());
        let ticket = registry.enter(opened(1), 100, 5);
        ticket.sent(9);
        let [waiting] = registry.look(&At(150)).try_into().unwrap();
        assert_eq!((waiting.timeline.sent_us, waiting.timeline.finished_us), (Some(9), 50));
        assert_eq!((waiting.timeline.first_byte_us, waiting.timeline.first_token_us), (None, None));
        ticket.answered(20, true);
        let gaps = TokenGaps { count: 2, total_us: 20, max_us: 12 };
        let so_far = SoFar { first_token_us: Some(25), last_token_us: Some(45), gaps, output_tokens: 3 };
        ticket.progressed(so_far);
        let [running] = registry.look(&At(140)).try_into().unwrap();
        let timeline = running.timeline;
        assert_eq!((timeline.first_byte_us, timeline.first_token_us), (Some(20), Some(25)));
        assert_eq!((timeline.last_token_us, timeline.gaps), (Some(45), gaps));
        assert_eq!(timeline.finished_us, 45, "never before what was seen");
        assert_eq!((running.usage.input, running.usage.output, running.route.streamed), (7, 3, true));
    }
}
