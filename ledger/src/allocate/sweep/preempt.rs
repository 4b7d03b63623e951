//! Preemption, reconstructed: timelines do not say when a request was thrown out of the batch, but a cache that would
//! have to hold more than it can does.
//!
//! Engines that serve first come first take the youngest request's cache, and bring the eldest back when it fits again.
//! So the running requests are always the first ones in the order of their schedule, and their number follows from the
//! cache's size. A request that is out waits and pays nothing; computing its cache again is waste, not its own work.

use std::cmp::Reverse;

use super::super::timeline::whole_micros;
use super::{NONE, Phase, Sweep};

impl Sweep {
    /// Tokens in the cache at `t` seconds.
    pub(super) fn kv_tokens(&self, t: f64) -> f64 {
        let totals = &self.totals;
        let rounding = (totals.decoding + totals.prefilling) * self.limits.block_tokens / 2.0;
        totals.decode_a + totals.decode_b * t + totals.reserved + rounding
    }

    /// When the batch outgrows the cache if nothing happens, in microseconds from the base.
    pub(super) fn full_at(&self) -> Option<i64> {
        let capacity = self.limits.kv_tokens?;
        // The last one alone cannot be preempted in favour of anybody.
        if self.totals.decoding < 1.5 {
            return None;
        }
        let room = capacity - self.kv_tokens(self.now_s);
        if room <= 0.0 {
            return Some(self.now_us);
        }
        let growth = self.totals.decode_b;
        if growth <= 0.0 || room / growth > 1e7 {
            return None;
        }
        Some(self.now_us + whole_micros(room / growth) + 1)
    }

    /// The youngest decoding request loses its cache and waits, as engines that serve first come first do.
    pub(super) fn preempt_last(&mut self) {
        let at = self.tail;
        if at == NONE {
            return;
        }
        let index = at as usize;
        self.settle(index);
        self.leave(index);
        self.unlink(at);
        let now_s = self.now_s;
        let slot = &mut self.slots[index];
        slot.held = slot.a + slot.b * now_s;
        slot.phase = Phase::Preempted;
        slot.epoch = slot.epoch.wrapping_add(1);
        let event = Reverse((slot.timeline.last_token.micros() - self.base.micros(), at, slot.epoch));
        self.events.push(event);
        self.preempted.push_front(at);
        self.preemptions += 1;
    }

    /// The eldest preempted requests come back while their caches fit. An empty batch takes the first in any case: its tokens
    /// came, so that a cache too small for it alone is a wrong number, and time in which it ran is not idle.
    pub(super) fn resume_what_fits(&mut self) {
        let Some(capacity) = self.limits.kv_tokens else { return };
        while let Some(&at) = self.preempted.front() {
            let held = self.slots[at as usize].held;
            let empty = self.totals.decoding + self.totals.prefilling < 0.5;
            if !empty && self.kv_tokens(self.now_s) + held + self.limits.block_tokens / 2.0 > capacity {
                return;
            }
            self.preempted.pop_front();
            self.resume(at, held);
        }
    }

    /// Computing the lost cache takes as long as the model says, at the most until the request's last token.
    fn resume(&mut self, at: u32, held: f64) {
        self.settle(at as usize);
        let now = (self.now_s, self.now_us);
        let slot = &mut self.slots[at as usize];
        let predicted_s = (slot.alpha + self.beta * held / 2.0) * held;
        let left_us = slot.timeline.last_token.micros() - self.base.micros() - now.1;
        let length_us = whole_micros(predicted_s).clamp(1, left_us.max(1));
        slot.phase = Phase::Recompute;
        slot.computing_s = length_us as f64 * 1e-6;
        slot.rate = held / slot.computing_s;
        slot.b = slot.rate;
        slot.a = -slot.rate * now.0;
        slot.epoch = slot.epoch.wrapping_add(1);
        let event = Reverse((now.1 + length_us, at, slot.epoch));
        self.events.push(event);
        self.enter(at as usize);
    }
}
