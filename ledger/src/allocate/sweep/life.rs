//! What happens to one request: it enters the batch, changes its phase, leaves, and is booked what it owes.

use std::cmp::Reverse;

use super::super::share::Share;
use super::stretch::Totals;
use super::{NONE, PHASE_S_MIN, Part, Phase, Slot, Sweep};

impl Sweep {
    /// The next event of the request in slot `at`.
    pub(super) fn happen(&mut self, at: u32, epoch: u32, emit: &mut impl FnMut(Part)) {
        let index = at as usize;
        if self.slots[index].epoch != epoch {
            return;
        }
        self.settle(index);
        match self.slots[index].phase {
            Phase::Prefill => {
                self.leave(index);
                self.start_decode(at, emit);
            }
            Phase::Recompute if self.slots[index].timeline.last_token > self.base.plus_micros(self.now_us) => {
                let held = self.slots[index].held;
                self.leave(index);
                self.join_decode(at, held);
            }
            Phase::Preempted => {
                // Its last token is there, so it cannot have been out: the reconstruction was wrong, the time is not charged.
                self.preempted.retain(|&other| other != at);
                self.release(at, emit);
            }
            Phase::Decode | Phase::Recompute => {
                self.leave(index);
                if self.slots[index].phase == Phase::Decode {
                    self.unlink(at);
                }
                self.release(at, emit);
            }
        }
        self.resume_what_fits();
    }

    fn start_decode(&mut self, at: u32, emit: &mut impl FnMut(Part)) {
        let slot = &self.slots[at as usize];
        let timeline = slot.timeline;
        if timeline.output_tokens < 2 || self.micros(timeline.last_token) <= self.now_us {
            self.release(at, emit);
            return;
        }
        self.join_decode(at, f64::from(timeline.input_tokens));
    }

    /// Puts a request into the batch as decoding, with `context` tokens in the cache now.
    fn join_decode(&mut self, at: u32, context: f64) {
        let now_s = self.now_s;
        let slot = &mut self.slots[at as usize];
        let length_s = (slot.timeline.last_token.micros() - slot.timeline.first_token.micros()) as f64 * 1e-6;
        slot.rate = f64::from(slot.timeline.output_tokens - 1) / length_s.max(PHASE_S_MIN);
        slot.phase = Phase::Decode;
        slot.b = slot.rate;
        slot.a = context - slot.b * now_s;
        slot.epoch = slot.epoch.wrapping_add(1);
        let event = Reverse((slot.timeline.last_token.micros() - self.base.micros(), at, slot.epoch));
        self.events.push(event);
        self.enter(at as usize);
        self.link(at);
    }

    /// Takes the request in `index` into the batch, in the phase that it is in.
    pub(super) fn enter(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        slot.since = self.integrals;
        slot.since_s = self.now_s;
        if let Some(tenants) = &mut self.tenants {
            tenants.join(slot.tenant, self.integrals.heads);
            slot.since_tenant = tenants.at(slot.tenant, self.integrals.heads);
        }
        if slot.adapter != NONE {
            self.totals.adapters_s += self.adapters.join(slot.adapter, self.integrals.memory);
            slot.since_adapter = self.adapters.at(slot.adapter, self.integrals.memory);
        }
        self.totals.add(slot, 1.0);
    }

    /// Takes the request in `index` out of the batch; it has been settled.
    pub(super) fn leave(&mut self, index: usize) {
        let slot = &self.slots[index];
        if let Some(tenants) = &mut self.tenants {
            tenants.leave(slot.tenant, self.integrals.heads);
        }
        if slot.adapter != NONE {
            self.totals.adapters_s -= self.adapters.leave(slot.adapter, self.integrals.memory);
        }
        self.totals.add(slot, -1.0);
        if self.totals.decoding + self.totals.prefilling < 0.5 {
            self.totals = Totals::default();
        }
    }

    fn release(&mut self, at: u32, emit: &mut impl FnMut(Part)) {
        let slot = &mut self.slots[at as usize];
        slot.epoch = slot.epoch.wrapping_add(1);
        emit(Part { ended: true, ..slot.part });
        self.free.push(at);
    }

    pub(super) fn link(&mut self, at: u32) {
        let last = self.tail;
        self.slots[at as usize].previous = last;
        self.slots[at as usize].next = NONE;
        if last == NONE {
            self.head = at;
        } else {
            self.slots[last as usize].next = at;
        }
        self.tail = at;
    }

    pub(super) fn unlink(&mut self, at: u32) {
        let Slot { previous, next, .. } = self.slots[at as usize];
        if previous == NONE {
            self.head = next;
        } else {
            self.slots[previous as usize].next = next;
        }
        if next == NONE {
            self.tail = previous;
        } else {
            self.slots[next as usize].previous = previous;
        }
    }

    /// Books what the request in `index` owes since it was last looked at.
    pub(super) fn settle(&mut self, index: usize) {
        let (now, now_s) = (self.integrals, self.now_s);
        let slot = &mut self.slots[index];
        let since = std::mem::replace(&mut slot.since, now);
        let from_s = std::mem::replace(&mut slot.since_s, now_s);
        if slot.phase == Phase::Preempted {
            slot.part.preempted_s += now_s - from_s;
            return;
        }
        let heads = match &self.tenants {
            None => now.heads - since.heads,
            Some(tenants) => {
                let at = tenants.at(slot.tenant, now.heads);
                at - std::mem::replace(&mut slot.since_tenant, at)
            }
        };
        let mut memory = self.gamma * (slot.a * (now.memory - since.memory) + slot.b * (now.memory_t - since.memory_t));
        if slot.adapter != NONE {
            let at = self.adapters.at(slot.adapter, now.memory);
            memory += self.adapters.once_s(slot.adapter) * (at - std::mem::replace(&mut slot.since_adapter, at));
        }
        let (compute, expert) = match slot.phase {
            Phase::Decode => {
                let (flat, grown) = (now.decode - since.decode, now.decode_t - since.decode_t);
                let drafts = self.beta * (self.computed - 1.0) / 2.0;
                let a_token = (slot.alpha + drafts) * flat + self.beta * (slot.a * flat + slot.b * grown);
                (self.computed * a_token, self.computed * (now.expert_steps - since.expert_steps))
            }
            _ => {
                let (flat, grown) = (now.prefill - since.prefill, now.prefill_t - since.prefill_t);
                let own = slot.alpha * flat + self.beta * (slot.a * flat + slot.b * grown);
                (slot.rate * own, slot.rate * (now.expert_tokens - since.expert_tokens))
            }
        };
        let share = Share {
            overhead_s: self.fixed.overhead_s * heads,
            weights_s: self.fixed.weights_s * heads + expert,
            memory_s: memory,
            compute_s: compute,
        };
        if slot.phase == Phase::Recompute {
            slot.part.waste_s += share.total_s();
        } else {
            slot.part.share += share;
        }
    }
}
