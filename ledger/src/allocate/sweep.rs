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
//! What is shared by *some* of the batch needs one integral more for each such group, which stands still while the group's
//! size does. With `x(t)` the function that all groups share and `n_g` the members of group `g`, its virtual time is
//! `V_g = integral of x / n_g`; it is brought up to date only when `n_g` changes, and a member pays the difference of `V_g`
//! at its ends. Adapters are such groups (`x = w_m s / W`, times the seconds of reading the adapter once), and so are tenants
//! when the fixed part goes to them first: then `n(t)` above is the number of tenants and `x = s / (n W)`.
//!
//! An engine that speculates computes `p = 1 + drafted` tokens in a step of a request and delivers `1 + accepted`: its steps
//! are as many fewer than its tokens, and each computes `p (alpha + beta (k + (p - 1)/2))`. Drafts are charged, kept or not.
//!
//! Memory is bounded by what runs at once: requests come in the order in which they were scheduled and leave as parts.

mod groups;
mod life;
mod preempt;
mod stretch;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use super::replica::{Experts, Fixed, Replica};
use super::share::Share;
use super::timeline::{EngineTimeline, Limits};
use crate::step::Work;
use crate::telemetry::Speculation;
use crate::time::Timestamp;
use groups::Groups;
use stretch::{Integrals, Totals};

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

#[derive(Debug, Clone, Copy)]
struct Slot {
    tag: u64,
    timeline: EngineTimeline,
    phase: Phase,
    /// Whose it is, and which adapter's; `NONE` for none.
    tenant: u32,
    adapter: u32,
    /// Compute of a new token, its adapter's included.
    alpha: f64,
    /// Context `a + b t`, `t` from the base.
    a: f64,
    b: f64,
    /// Tokens a second: computed when prefilling, delivered when decoding.
    rate: f64,
    since: Integrals,
    since_s: f64,
    /// The virtual times of its tenant and its adapter when it was last looked at.
    since_tenant: f64,
    since_adapter: f64,
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

const NONE: u32 = u32::MAX;
/// Longest stretch that is taken at its middle, in seconds.
const STRETCH_S: f64 = 5.0;
/// Sums are made anew at the latest after this long, in seconds.
const AFRESH_S: f64 = 3_600.0;
/// A phase shorter than this is no measurement; it is taken as this long so that rates stay finite.
const PHASE_S_MIN: f64 = 1e-6;

/// What a request has in common with some of the others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Belongs {
    /// Whose it is, by the caller's number; matters only under [`Sweep::by_tenant`].
    pub tenant: u32,
    /// The adapter that it uses, as [`Sweep::adapter`] numbered it.
    pub adapter: Option<u32>,
}

/// The sweep over one replica's requests.
#[derive(Debug, Clone)]
pub struct Sweep {
    /// `alpha`, `beta`, `gamma`: compute of a new token, of a pair of tokens, reading one cached token.
    alpha: f64,
    beta: f64,
    gamma: f64,
    /// What the replica reaches of FLOP/s and bytes/s, for adapters.
    flop_per_s: f64,
    bytes_per_s: f64,
    /// Tokens that a decoding request computes and delivers in a step: 1 and 1 without speculation.
    computed: f64,
    delivered: f64,
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
    adapters: Groups,
    /// When the fixed part goes to tenants first.
    tenants: Option<Groups>,
    /// The decoding requests in the order in which they joined, as a list through the slots; the last is preempted first.
    head: u32,
    tail: u32,
    preempted: VecDeque<u32>,
    preemptions: u64,
    busy_s: f64,
    predicted_s: f64,
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
        let gpus = f64::from(replica.gpus);
        Sweep {
            alpha: one.compute_s - beta / 2.0,
            beta,
            gamma: seen.memory_s,
            flop_per_s: replica.gpu.flop_per_s * gpus * replica.efficiencies.compute,
            bytes_per_s: replica.gpu.bytes_per_s * gpus * replica.efficiencies.bandwidth,
            fixed: replica.fixed(0.0),
            experts: replica.model.experts.map(|experts| (experts, replica.fixed(f64::INFINITY).experts_s)),
            ..Sweep::equal_time(limits, base)
        }
    }

    /// A sweep to which a step takes the same time whatever is in it: every moment goes in equal parts to the requests that
    /// run. Needs no model.
    #[must_use]
    pub fn equal_time(limits: Limits, base: Timestamp) -> Sweep {
        Sweep {
            alpha: 0.0,
            beta: 0.0,
            gamma: 0.0,
            flop_per_s: f64::INFINITY,
            bytes_per_s: f64::INFINITY,
            computed: 1.0,
            delivered: 1.0,
            fixed: Fixed { overhead_s: 1.0, ..Fixed::default() },
            experts: None,
            limits,
            base,
            now_us: 0,
            now_s: 0.0,
            slots: Vec::new(),
            free: Vec::new(),
            events: BinaryHeap::new(),
            totals: Totals::default(),
            integrals: Integrals::default(),
            adapters: Groups::default(),
            tenants: None,
            head: NONE,
            tail: NONE,
            preempted: VecDeque::new(),
            preemptions: 0,
            busy_s: 0.0,
            predicted_s: 0.0,
            segments: None,
        }
    }

    /// Keeps every [`Segment`], for fits and for comparing with the engine's own series. Memory then grows with time.
    #[must_use]
    pub fn recording(mut self) -> Sweep {
        self.segments = Some(Vec::new());
        self
    }

    /// An engine that drafts tokens: more computed in a step, and more delivered.
    #[must_use]
    pub fn speculating(mut self, speculation: Option<Speculation>) -> Sweep {
        let Speculation { drafted, accepted } = speculation.unwrap_or_default();
        let drafted = if drafted.is_finite() { drafted.max(0.0) } else { 0.0 };
        self.computed = 1.0 + drafted;
        // Not a clamp, whose bounds must not be NaN: what is accepted was drafted.
        self.delivered = 1.0 + accepted.max(0.0).min(drafted);
        self
    }

    /// Divides the fixed part of each step among tenants first and then among a tenant's requests.
    #[must_use]
    pub fn by_tenant(mut self) -> Sweep {
        self.tenants = Some(Groups::default());
        self
    }

    /// A number for an adapter of `bytes` whose every new token costs `flop_per_token`.
    #[must_use]
    pub fn adapter(&mut self, bytes: f64, flop_per_token: f64) -> u32 {
        self.adapters.with(bytes / self.bytes_per_s, flop_per_token / self.flop_per_s)
    }

    /// Takes the next request. Requests must come in the order of `scheduled`; one that comes late starts now.
    pub fn push(&mut self, tag: u64, timeline: &EngineTimeline, emit: &mut impl FnMut(Part)) {
        self.push_of(tag, timeline, Belongs::default(), emit);
    }

    /// Takes the next request, as [`push`](Sweep::push) does, of a tenant or with an adapter.
    ///
    /// # Panics
    /// When the adapter has no number here: a bug of ours.
    pub fn push_of(&mut self, tag: u64, timeline: &EngineTimeline, of: Belongs, emit: &mut impl FnMut(Part)) {
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
            tenant: of.tenant,
            adapter: of.adapter.unwrap_or(NONE),
            alpha: self.alpha + of.adapter.map_or(0.0, |adapter| self.adapters.token_s(adapter)),
            a: f64::from(timeline.cached_tokens) - rate * start_s,
            b: rate,
            rate,
            since: self.integrals,
            since_s: start_s,
            since_tenant: 0.0,
            since_adapter: 0.0,
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
        let first_us = self.micros(timeline.first_token).max(self.now_us + 1);
        self.events.push(Reverse((first_us, at, self.slots[at as usize].epoch)));
        self.enter(at as usize);
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
            self.adapters.begin_afresh();
            self.tenants.iter_mut().for_each(Groups::begin_afresh);
            for &index in &held {
                let slot = &mut self.slots[index];
                slot.a += slot.b * by_s;
                slot.since = Integrals::default();
                (slot.since_s, slot.since_tenant, slot.since_adapter) = (0.0, 0.0, 0.0);
            }
            let events = std::mem::take(&mut self.events).into_vec();
            self.events =
                events.into_iter().map(|Reverse((at, slot, epoch))| Reverse((at - by_us, slot, epoch))).collect();
        }
        let mut totals = Totals::of_adapters(self.adapters.read_once_s());
        for &index in &held {
            totals.add(&self.slots[index], 1.0);
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

    /// Seconds that the model predicts for all steps so far: over [`busy_s`](Sweep::busy_s), what the engine demands of the
    /// replica when it has it to itself.
    #[must_use]
    pub fn predicted_s(&self) -> f64 {
        self.predicted_s
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
}

#[cfg(test)]
#[path = "sweep_tests.rs"]
mod tests;
