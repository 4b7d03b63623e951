//! Tier B: from the requests' timelines alone to what each pays, in one pass over the events.
//!
//! Between two events (a prefill starts, a first token, a last token) the set of active requests is constant, and each
//! request's share is its own coefficients times functions of time that all share. With `s(t)` steps a second, `n(t)`
//! requests, `w_m` and `w_c` the blend of [`share::diagonal`](super::share::diagonal), and `W(t)` the sum of everybody's
//! terms, a decoding request with context `k(t) = a + b t` pays in a second
//!
//! ```text
//! (o + M0) s / (n W)  +  gamma k w_m s / W  +  (alpha + beta k) w_c s / W
//! ```
//!
//! and a prefilling one that computes `r` tokens a second pays `(alpha + beta k) r w_c / W` for compute instead. So the
//! sweep keeps running integrals of `s/(nW)`, `w_m s/W`, `w_c s/W` and `w_c/W`, the last three also times `t` because
//! contexts grow linearly; a request's charge is a difference of integrals at its ends times its own coefficients. That
//! is O(log n) an event for the heap that orders them and never a loop over the batch. Dividing by `W` makes the shares
//! of every moment add up to that moment: a wrong model moves money between requests and cannot make any.
//!
//! `s` is the decoding requests' mean rate of tokens while nobody prefills. Prefills make steps long, so while somebody
//! does, it is the number of steps that the prefills themselves take: full ones, or a single one for a short prompt.
//! (Taking the decodes' mean there too would charge them for weights in steps that never ran.)
//!
//! Memory is bounded by what runs at once: requests come in the order in which they were scheduled and leave as parts.

mod preempt;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use super::replica::{Experts, Fixed, Replica};
use super::share::{Share, memory_bound_fraction};
use super::timeline::{EngineTimeline, Limits};
use crate::step::Work;
use crate::time::Timestamp;

/// What one request pays between two cuts.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Part {
    /// The caller's number of the request.
    pub tag: u64,
    /// Seconds of the replica that it pays, term by term.
    pub share: Share,
    /// Seconds of the replica that went into computing again what a preemption threw away. Not in `share`.
    pub waste_s: f64,
    /// Seconds that it waited, scheduled once but preempted.
    pub preempted_s: f64,
    /// Whether this is its last part.
    pub ended: bool,
}

/// A stretch of time in which nothing started or ended, at its middle.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Segment {
    /// Seconds from the sweep's base.
    pub from_s: f64,
    /// Seconds from the sweep's base.
    pub until_s: f64,
    /// Requests decoding.
    pub decoding: f64,
    /// Requests prefilling.
    pub prefilling: f64,
    /// Requests preempted and waiting.
    pub preempted: f64,
    /// Tokens in the KV cache, blocks rounded up.
    pub kv_tokens: f64,
    /// Context tokens that the decoding requests read in each step.
    pub decode_context: f64,
    /// Prefill tokens computed in a second.
    pub prefill_tokens_per_s: f64,
    /// Prefill compute in seconds of the replica a second.
    pub prefill_compute: f64,
    /// Steps a second.
    pub steps_per_s: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Prefill,
    Decode,
    /// Out of the batch, cache lost.
    Preempted,
    /// Computing the lost cache again.
    Recompute,
}

/// Running integrals of the functions that all requests share.
#[derive(Debug, Clone, Copy, Default)]
struct Integrals {
    heads: f64,
    memory: f64,
    memory_t: f64,
    decode: f64,
    decode_t: f64,
    prefill: f64,
    prefill_t: f64,
    expert_steps: f64,
    expert_tokens: f64,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    tag: u64,
    timeline: EngineTimeline,
    phase: Phase,
    /// Context `a + b t`, `t` from the base.
    a: f64,
    b: f64,
    /// Tokens a second: computed when prefilling, delivered when decoding.
    rate: f64,
    since: Integrals,
    since_s: f64,
    /// Seconds of the phase in which it computes its input.
    computing_s: f64,
    /// Context when preempted.
    held: f64,
    part: Part,
    previous: u32,
    next: u32,
    /// Which of its events is the valid one: what was planned before a preemption is void.
    epoch: u32,
}

/// Sums over the active requests that give `W(t)`.
#[derive(Debug, Clone, Copy, Default)]
struct Totals {
    decoding: f64,
    prefilling: f64,
    decode_rate: f64,
    decode_a: f64,
    decode_b: f64,
    prefill_a: f64,
    prefill_b: f64,
    /// Sum of r, and of r k(t).
    prefill_rate: f64,
    prefill_ra: f64,
    prefill_rb: f64,
    /// Sum of 1 / length of prefill: steps a second when nobody decodes.
    prefill_turns: f64,
    /// Tokens that prefilling requests hold in the cache from the start.
    reserved: f64,
}

const NONE: u32 = u32::MAX;
/// Longest stretch that is taken at its middle, in seconds.
const STRETCH_S: f64 = 5.0;
/// Sums are made anew at the latest after this long, in seconds.
const AFRESH_S: f64 = 3_600.0;
/// A phase shorter than this is no measurement; it is taken as this long so that rates stay finite.
const PHASE_S_MIN: f64 = 1e-6;

/// The sweep over one replica's requests.
#[derive(Debug, Clone)]
pub struct Sweep {
    /// `alpha`, `beta`, `gamma`: compute of a new token, of a pair of tokens, reading one cached token.
    alpha: f64,
    beta: f64,
    gamma: f64,
    /// The fixed terms of a step, without experts.
    fixed: Fixed,
    /// The experts and the seconds of reading all of them.
    experts: Option<(Experts, f64)>,
    limits: Limits,
    base: Timestamp,
    now_us: i64,
    now_s: f64,
    slots: Vec<Slot>,
    free: Vec<u32>,
    events: BinaryHeap<Reverse<(i64, u32, u32)>>,
    totals: Totals,
    integrals: Integrals,
    /// The decoding requests in the order in which they joined, as a list through the slots; the last is preempted first.
    head: u32,
    tail: u32,
    preempted: VecDeque<u32>,
    preemptions: u64,
    busy_s: f64,
    segments: Option<Vec<Segment>>,
}

impl Sweep {
    /// A sweep that starts at `base`, where nothing runs.
    #[must_use]
    pub fn new(replica: Replica, limits: Limits, base: Timestamp) -> Sweep {
        let one = replica.demand(Work { new_tokens: 1, cached_tokens: 0 });
        let seen = replica.demand(Work { new_tokens: 1, cached_tokens: 1 });
        // c = alpha p + beta p (k + p/2): the first token alone costs alpha + beta/2, one cached token more costs beta.
        let beta = seen.compute_s - one.compute_s;
        Sweep {
            alpha: one.compute_s - beta / 2.0,
            beta,
            gamma: seen.memory_s,
            fixed: replica.fixed(0.0),
            experts: replica.model.experts.map(|experts| (experts, replica.fixed(f64::INFINITY).experts_s)),
            limits,
            base,
            now_us: 0,
            now_s: 0.0,
            slots: Vec::new(),
            free: Vec::new(),
            events: BinaryHeap::new(),
            totals: Totals::default(),
            integrals: Integrals::default(),
            head: NONE,
            tail: NONE,
            preempted: VecDeque::new(),
            preemptions: 0,
            busy_s: 0.0,
            segments: None,
        }
    }

    /// Keeps every [`Segment`], for fits and for comparing with the engine's own series. Memory then grows with time.
    #[must_use]
    pub fn recording(mut self) -> Sweep {
        self.segments = Some(Vec::new());
        self
    }

    /// Takes the next request. Requests must come in the order of `scheduled`; one that comes late starts now.
    pub fn push(&mut self, tag: u64, timeline: &EngineTimeline, emit: &mut impl FnMut(Part)) {
        let timeline = timeline.ordered();
        self.advance(timeline.scheduled, emit);
        if self.now_s > AFRESH_S {
            self.begin_afresh();
        }
        let start_s = self.now_s;
        let length_s = self.seconds(timeline.first_token).max(start_s + PHASE_S_MIN) - start_s;
        let computed = f64::from(timeline.input_tokens - timeline.cached_tokens).max(1.0);
        let rate = computed / length_s;
        let slot = Slot {
            tag,
            timeline,
            phase: Phase::Prefill,
            a: f64::from(timeline.cached_tokens) - rate * start_s,
            b: rate,
            rate,
            since: self.integrals,
            since_s: start_s,
            computing_s: length_s,
            held: 0.0,
            part: Part { tag, ..Part::default() },
            previous: NONE,
            next: NONE,
            epoch: 0,
        };
        let at = match self.free.pop() {
            Some(at) => {
                // Epochs go on counting, so that what was planned for the slot's last holder stays void.
                let epoch = self.slots[at as usize].epoch;
                self.slots[at as usize] = Slot { epoch, ..slot };
                at
            }
            None => {
                self.slots.push(slot);
                u32::try_from(self.slots.len() - 1).expect("fewer than four billion requests run at once")
            }
        };
        let slot = &self.slots[at as usize];
        self.totals.add(slot, 1.0);
        let first_us = self.micros(timeline.first_token).max(self.now_us + 1);
        self.events.push(Reverse((first_us, at, slot.epoch)));
    }

    /// Moves time to `until`; every request that ends before it is emitted. Time never goes back.
    pub fn advance(&mut self, until: Timestamp, emit: &mut impl FnMut(Part)) {
        let until_us = self.micros(until);
        loop {
            let next = self.events.peek().map(|Reverse((at, _, _))| *at).filter(|&at| at <= until_us);
            let stop = next.unwrap_or(until_us);
            if let Some(full_us) = self.full_at().filter(|&at| at < stop) {
                self.integrate(full_us);
                self.preempt_last();
                continue;
            }
            self.integrate(stop);
            if next.is_none() {
                return;
            }
            if let Some(Reverse((_, at, epoch))) = self.events.pop() {
                self.happen(at, epoch, emit);
            }
        }
    }

    /// Emits what every active request owes up to `at`, as at the end of a settled interval. They go on.
    pub fn cut(&mut self, at: Timestamp, emit: &mut impl FnMut(Part)) {
        self.advance(at, emit);
        self.begin_afresh();
        for index in self.held() {
            let slot = &mut self.slots[index];
            emit(std::mem::replace(&mut slot.part, Part { tag: slot.tag, ..Part::default() }));
        }
    }

    /// Settles every active request, makes the sums anew and moves the base to now. What rounding left behind in an hour
    /// of adding and taking away goes with the hour, and integrals over `t` never grow large against what is taken
    /// from them. A recording keeps its base, because its stretches count from there.
    fn begin_afresh(&mut self) {
        let held = self.held();
        for &index in &held {
            self.settle(index);
        }
        if self.segments.is_none() {
            let (by_us, by_s) = (self.now_us, self.now_s);
            self.base = self.base.plus_micros(by_us);
            (self.now_us, self.now_s) = (0, 0.0);
            self.integrals = Integrals::default();
            for &index in &held {
                let slot = &mut self.slots[index];
                slot.a += slot.b * by_s;
                slot.since = Integrals::default();
                slot.since_s = 0.0;
            }
            let events = std::mem::take(&mut self.events).into_vec();
            self.events =
                events.into_iter().map(|Reverse((at, slot, epoch))| Reverse((at - by_us, slot, epoch))).collect();
        }
        let mut totals = Totals::default();
        for &index in &held {
            let slot = &self.slots[index];
            totals.add(slot, 1.0);
        }
        self.totals = totals;
    }

    /// The slots in use.
    fn held(&self) -> Vec<usize> {
        let mut used = vec![true; self.slots.len()];
        for &at in &self.free {
            used[at as usize] = false;
        }
        (0..used.len()).filter(|&index| used[index]).collect()
    }

    /// Runs to the end of the last request and emits the rest.
    pub fn finish(&mut self, emit: &mut impl FnMut(Part)) {
        while let Some(&Reverse((at, _, _))) = self.events.peek() {
            self.advance(self.base.plus_micros(at), emit);
        }
    }

    /// Seconds so far in which at least one request was in the batch.
    #[must_use]
    pub fn busy_s(&self) -> f64 {
        self.busy_s
    }

    /// Preemptions that the cache's size made necessary so far.
    #[must_use]
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// Requests that are running or preempted now.
    #[must_use]
    pub fn active(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// The recorded stretches, in order; empty unless [`recording`](Sweep::recording).
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        self.segments.as_deref().unwrap_or_default()
    }

    /// Seconds from the base, as segments count them.
    #[must_use]
    pub fn seconds(&self, at: Timestamp) -> f64 {
        self.micros(at) as f64 * 1e-6
    }

    fn micros(&self, at: Timestamp) -> i64 {
        at.micros().saturating_sub(self.base.micros())
    }

    /// The next event of the request in slot `at`.
    fn happen(&mut self, at: u32, epoch: u32, emit: &mut impl FnMut(Part)) {
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
        slot.since = self.integrals;
        slot.since_s = now_s;
        self.totals.add(&self.slots[at as usize], 1.0);
        self.events.push(event);
        self.link(at);
    }

    fn leave(&mut self, index: usize) {
        let slot = &self.slots[index];
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

    fn link(&mut self, at: u32) {
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

    fn unlink(&mut self, at: u32) {
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
    fn settle(&mut self, index: usize) {
        let (now, now_s) = (self.integrals, self.now_s);
        let slot = &mut self.slots[index];
        let since = std::mem::replace(&mut slot.since, now);
        let from_s = std::mem::replace(&mut slot.since_s, now_s);
        if slot.phase == Phase::Preempted {
            slot.part.preempted_s += now_s - from_s;
            return;
        }
        let heads = now.heads - since.heads;
        let memory = slot.a * (now.memory - since.memory) + slot.b * (now.memory_t - since.memory_t);
        let (compute, expert) = match slot.phase {
            Phase::Decode => {
                let (flat, grown) = (now.decode - since.decode, now.decode_t - since.decode_t);
                (
                    self.alpha * flat + self.beta * (slot.a * flat + slot.b * grown),
                    now.expert_steps - since.expert_steps,
                )
            }
            _ => {
                let (flat, grown) = (now.prefill - since.prefill, now.prefill_t - since.prefill_t);
                let own = self.alpha * flat + self.beta * (slot.a * flat + slot.b * grown);
                (slot.rate * own, slot.rate * (now.expert_tokens - since.expert_tokens))
            }
        };
        let share = Share {
            overhead_s: self.fixed.overhead_s * heads,
            weights_s: self.fixed.weights_s * heads + expert,
            memory_s: self.gamma * memory,
            compute_s: compute,
        };
        if slot.phase == Phase::Recompute {
            slot.part.waste_s += share.total_s();
        } else {
            slot.part.share += share;
        }
    }

    /// Moves the integrals to `until_us`.
    fn integrate(&mut self, until_us: i64) {
        let until_s = until_us as f64 * 1e-6;
        if self.totals.decoding + self.totals.prefilling > 0.5 || self.segments.is_some() {
            while self.now_s < until_s {
                let stop = until_s.min(self.now_s + STRETCH_S);
                self.stretch(self.now_s, stop);
                self.now_s = stop;
            }
        }
        if until_us > self.now_us {
            self.now_us = until_us;
            self.now_s = until_s;
        }
    }

    /// One stretch, taken at its middle. Contexts grow linearly, so the shares' own integrals are exact there.
    fn stretch(&mut self, from_s: f64, until_s: f64) {
        let (dt, t) = (until_s - from_s, 0.5 * (from_s + until_s));
        let totals = &self.totals;
        let heads = totals.decoding + totals.prefilling;
        let decode_context = (totals.decode_a + totals.decode_b * t).max(0.0);
        let prefill_context = (totals.prefill_a + totals.prefill_b * t).max(0.0);
        let prefill_compute =
            self.alpha * totals.prefill_rate + self.beta * (totals.prefill_ra + totals.prefill_rb * t).max(0.0);
        let steps_per_s = if totals.prefilling > 0.5 {
            (totals.prefill_rate / self.limits.step_tokens_max).max(totals.prefill_turns / totals.prefilling)
        } else if totals.decoding > 0.5 {
            totals.decode_rate / totals.decoding
        } else {
            0.0
        };
        if let Some(segments) = &mut self.segments {
            segments.push(Segment {
                from_s,
                until_s,
                decoding: totals.decoding,
                prefilling: totals.prefilling,
                preempted: self.preempted.len() as f64,
                kv_tokens: totals.decode_a
                    + totals.decode_b * t
                    + totals.reserved
                    + heads * self.limits.block_tokens / 2.0,
                decode_context,
                prefill_tokens_per_s: totals.prefill_rate,
                prefill_compute,
                steps_per_s,
            });
        }
        if heads < 0.5 {
            return;
        }
        self.busy_s += dt;
        let mut fixed = self.fixed;
        let mut tokens_per_step = 1.0;
        if let Some((experts, all_s)) = self.experts {
            tokens_per_step = totals.decoding + totals.prefill_rate / steps_per_s.max(f64::MIN_POSITIVE);
            fixed.experts_s = all_s * experts.touched(tokens_per_step);
        }
        let compute = steps_per_s * (self.alpha * totals.decoding + self.beta * decode_context) + prefill_compute;
        let memory = steps_per_s * self.gamma * (decode_context + prefill_context);
        let read_once = steps_per_s * fixed.read_once_s();
        let tau = fixed.overlap * memory_bound_fraction(read_once, memory, compute);
        let (of_memory, of_compute) = (1.0 - fixed.overlap + tau, 1.0 - tau);
        let all = steps_per_s * fixed.overhead_s + read_once + of_memory * memory + of_compute * compute;
        let scale = dt / all.max(f64::MIN_POSITIVE);
        let integrals = &mut self.integrals;
        integrals.heads += steps_per_s / heads * scale;
        integrals.memory += of_memory * steps_per_s * scale;
        integrals.memory_t += of_memory * steps_per_s * scale * t;
        integrals.decode += of_compute * steps_per_s * scale;
        integrals.decode_t += of_compute * steps_per_s * scale * t;
        integrals.prefill += of_compute * scale;
        integrals.prefill_t += of_compute * scale * t;
        if fixed.experts_s > 0.0 {
            let a_token = fixed.experts_s / tokens_per_step * scale;
            integrals.expert_steps += a_token * steps_per_s;
            integrals.expert_tokens += a_token;
        }
    }
}

impl Totals {
    /// Adds (`sign` 1) or takes away (`sign` -1) what one request brings to the batch in its present phase.
    fn add(&mut self, slot: &Slot, sign: f64) {
        match slot.phase {
            Phase::Decode => {
                self.decoding += sign;
                self.decode_rate += sign * slot.rate;
                self.decode_a += sign * slot.a;
                self.decode_b += sign * slot.b;
            }
            Phase::Prefill | Phase::Recompute => {
                self.prefilling += sign;
                self.prefill_a += sign * slot.a;
                self.prefill_b += sign * slot.b;
                self.prefill_rate += sign * slot.rate;
                self.prefill_ra += sign * slot.rate * slot.a;
                self.prefill_rb += sign * slot.rate * slot.b;
                self.prefill_turns += sign / slot.computing_s.max(PHASE_S_MIN);
                let held = if slot.phase == Phase::Prefill { f64::from(slot.timeline.input_tokens) } else { slot.held };
                self.reserved += sign * held;
            }
            Phase::Preempted => {}
        }
    }
}

#[cfg(test)]
#[path = "sweep_tests.rs"]
mod tests;
