//! KV caches on their way from the replicas that compute prompts to those that make answers.

use std::collections::{BTreeMap, HashMap, VecDeque};

use super::request::{Arrival, Done};

/// What has left and not arrived, by time and then by number; and what found no replica to go to.
#[derive(Debug, Default)]
pub(crate) struct Transfers {
    /// Output tokens that requests in their prompts want in all.
    wanted: HashMap<u64, u32>,
    on_the_way: BTreeMap<(u64, u64), Done>,
    waiting: VecDeque<Done>,
}

impl Transfers {
    /// A prompt has begun whose answer is made elsewhere.
    pub fn expect(&mut self, arrival: &Arrival) {
        self.wanted.insert(arrival.id, arrival.output_tokens);
    }

    /// The output tokens of a request whose prompt has ended; `None` when none was expected.
    pub fn arrived(&mut self, id: u64) -> Option<u32> {
        if self.wanted.is_empty() {
            return None;
        }
        self.wanted.remove(&id)
    }

    /// A request that will never come.
    pub fn forget(&mut self, id: u64) {
        self.arrived(id);
    }

    /// Puts a cache on its way.
    pub fn send(&mut self, arrives_us: u64, done: Done) {
        self.on_the_way.insert((arrives_us, done.arrival.id), done);
    }

    /// When the next one arrives; [`u64::MAX`] for never.
    pub fn next_us(&self) -> u64 {
        self.on_the_way.first_key_value().map_or(u64::MAX, |(&(at_us, _), _)| at_us)
    }

    /// The next one that has arrived.
    pub fn take(&mut self, now_us: u64) -> Option<Done> {
        let first = self.on_the_way.first_entry()?;
        (first.key().0 <= now_us).then(|| first.remove())
    }

    /// It found no replica.
    pub fn wait(&mut self, done: Done) {
        self.waiting.push_back(done);
    }

    /// How many found none.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// All that found none, in order of arrival.
    pub fn release(&mut self) -> Vec<Done> {
        self.waiting.drain(..).collect()
    }
}
