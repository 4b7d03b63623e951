//! One engine with continuous batching, as fast as the processor goes.
//!
//! It schedules as [`crate::engine::scheduler`] does, which takes one step after the other: running requests first, prompts in
//! chunks beside them, the request admitted last put back and recomputed when memory runs out, a prefix cache. But a batch
//! in which everybody decodes goes on unchanged until somebody comes or leaves, so all those steps are taken at once:
//! their time has a closed form (`cost`), who leaves next is the top of a heap of step numbers, and a ring counts the
//! requests by the step in which their next block is due. Work is done per request, not per token.

pub mod calibrate;
mod cost;
mod memory;
mod play;
mod spec;
mod summary;

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::sync::Arc;

use self::cost::{Chunks, Cost, Stretch, count, whole};
use self::memory::{Aside, Memory};
pub use self::play::{Load, play};
pub use self::spec::{Constants, Limits, Spec, TooLong, link_bytes_per_s};
pub use self::summary::{Stats, Summary, percentile};
use super::{Arrival, Done, Prefixes};

/// No request.
const NONE: u32 = u32::MAX;

/// One engine on simulated time, in microseconds. Time is told to it by [`advance`](Engine::advance) and
/// [`submit`](Engine::submit) and never goes back.
#[derive(Debug, Clone)]
pub struct Engine {
    cost: Cost,
    request_us: f64,
    max_num_seqs: u32,
    budget: u32,
    block_tokens: u32,
    reserve_full_prompt: bool,
    /// Tokens of a named unit, whole blocks; zero when prompts have no names.
    unit_tokens: u32,
    prefixes: Arc<Prefixes>,
    memory: Memory,

    requests: Vec<Request>,
    vacant: Vec<u32>,
    waiting: VecDeque<u32>,
    /// The request admitted last; the others follow by [`Request::before`].
    last: u32,
    running: u32,
    /// The one request whose prompt is computed in part, always the one admitted last.
    partial: u32,

    /// Steps taken.
    step: u64,
    decoding: u32,
    /// Sum over decoding requests of cached tokens less the step number: what it takes to know all contexts in any step.
    context: i64,
    /// Decoding requests by the step, modulo the tokens of a block, in which they need their next block.
    due: Vec<u32>,
    /// When decoding requests end: step, order of admission, request. Entries of requests put back are stale.
    ends: BinaryHeap<Reverse<(u64, u64, u32)>>,
    admissions: u64,

    clock_us: f64,
    seen_us: f64,
    plan: Option<Plan>,
    /// Prompts in the planned step: request and tokens.
    chunks: Vec<(u32, u32)>,
    totals: Totals,
}

/// Steps that are under way.
#[derive(Debug, Clone, Copy)]
struct Plan {
    stretch: Stretch,
    steps: u64,
    end_us: f64,
    /// Blocks taken already, for the first of the steps.
    taken: u32,
}

#[derive(Debug, Clone, Copy, Default)]
struct Totals {
    busy_us: f64,
    preemptions: u64,
    output_tokens: u64,
    input_tokens: u64,
}

#[derive(Debug, Clone)]
struct Request {
    done: Done,
    /// When it was first scheduled; `None` before.
    was_scheduled: bool,
    /// Output tokens made when it last began to decode or to wait.
    outputs: u32,
    /// Tokens in the cache at that moment.
    computed: u32,
    /// The step number at that moment, while it decodes.
    since: u64,
    decodes: bool,
    admission: u64,
    before: u32,
    after: u32,
    /// Named units in use.
    named: u32,
    aside: Option<Aside>,
    /// Tokens whose cache came with it from another engine.
    received: u32,
}

impl Engine {
    /// An idle engine whose prompts have nothing in common.
    #[must_use]
    pub fn new(spec: &Spec) -> Engine {
        Engine::with_prefixes(spec, Arc::default())
    }

    /// An idle engine whose prompts share what `prefixes` says. A unit there is used in whole KV blocks.
    #[must_use]
    pub fn with_prefixes(spec: &Spec, prefixes: Arc<Prefixes>) -> Engine {
        let limits = &spec.limits;
        let block_tokens = limits.block_tokens.max(1);
        let budget = limits.max_num_batched_tokens.max(1);
        let unit_blocks = if limits.prefix_caching { prefixes.block_tokens / block_tokens } else { 0 };
        Engine {
            cost: Cost::new(&spec.constants),
            request_us: spec.constants.request_s * 1e6,
            max_num_seqs: limits.max_num_seqs.max(1),
            budget,
            block_tokens,
            reserve_full_prompt: limits.reserve_full_prompt,
            unit_tokens: unit_blocks * block_tokens,
            prefixes,
            memory: Memory::new(spec.kv_blocks(), limits.prefix_caching, unit_blocks),
            requests: Vec::new(),
            vacant: Vec::new(),
            waiting: VecDeque::new(),
            last: NONE,
            running: 0,
            partial: NONE,
            step: 0,
            decoding: 0,
            context: 0,
            due: vec![0; block_tokens as usize],
            ends: BinaryHeap::new(),
            admissions: 0,
            clock_us: 0.0,
            seen_us: 0.0,
            plan: None,
            chunks: Vec::new(),
            totals: Totals::default(),
        }
    }

    /// Queues a request at `now_us`, to which the engine must have [`advance`](Engine::advance)d. Requests without input or output
    /// are given one token of it.
    ///
    /// # Errors
    /// [`TooLong`] when the cache can never hold it; nothing is queued then.
    pub fn submit(&mut self, arrival: Arrival, now_us: u64) -> Result<(), TooLong> {
        self.enqueue(Done { arrival, ..Done::default() }, 0, 0, now_us)
    }

    /// Queues a request that another engine prefilled: `prefilled` is what that one gave, with all wanted output tokens. Its
    /// first token is there and its cache has arrived.
    ///
    /// # Errors
    /// [`TooLong`] as in [`submit`](Engine::submit).
    pub fn submit_decoding(&mut self, prefilled: Done, now_us: u64) -> Result<(), TooLong> {
        self.enqueue(prefilled, 1, prefilled.arrival.input_tokens.max(1), now_us)
    }

    /// The earliest time at which something may end if nothing more arrives. `None` when there is nothing to do.
    #[must_use]
    pub fn next_us(&self) -> Option<u64> {
        match &self.plan {
            Some(plan) => Some(whole(plan.end_us.ceil()).max(whole(self.seen_us) + 1)),
            None if self.is_idle() => None,
            None => Some(whole(self.clock_us.max(self.seen_us)) + 1),
        }
    }

    /// Goes on until `to_us` and tells every request whose last step has ended by then.
    pub fn advance(&mut self, to_us: u64, done: &mut impl FnMut(Done)) {
        let to = count(to_us);
        loop {
            match self.plan {
                Some(plan) if plan.end_us <= to => self.end_steps(plan, done),
                None if self.clock_us < to && !self.is_idle() => self.plan_steps(),
                _ => break,
            }
        }
        self.seen_us = self.seen_us.max(to);
    }

    /// Goes on until nothing is left to do, and gives the time.
    pub fn finish(&mut self, done: &mut impl FnMut(Done)) -> u64 {
        while let Some(next_us) = self.next_us() {
            self.advance(next_us, done);
        }
        whole(self.clock_us)
    }

    /// Requests in the batch.
    #[must_use]
    pub fn running(&self) -> u32 {
        self.running
    }

    /// Requests in the queue.
    #[must_use]
    pub fn waiting(&self) -> u32 {
        u32::try_from(self.waiting.len()).unwrap_or(u32::MAX)
    }

    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.running == 0 && self.waiting.is_empty()
    }

    /// The part of the KV cache that requests hold, 0 to 1.
    #[must_use]
    pub fn kv_used(&self) -> f64 {
        let grown = self.plan.map_or(0, |plan| self.growth(self.steps_seen(&plan)).saturating_sub(plan.taken.into()));
        count(u64::from(self.memory.used()) + grown) / f64::from(self.memory.total().max(1))
    }

    /// Microseconds in which it was in a step so far.
    #[must_use]
    pub fn busy_us(&self) -> u64 {
        let under_way = self.plan.map_or(0.0, |plan| self.seen_us.min(plan.end_us) - self.clock_us);
        whole(self.totals.busy_us + under_way.max(0.0))
    }

    /// Steps ended so far.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.step + self.plan.map_or(0, |plan| self.steps_seen(&plan))
    }

    /// How often a request was put back for lack of memory.
    #[must_use]
    pub fn preemptions(&self) -> u64 {
        self.totals.preemptions
    }

    /// Output tokens made so far.
    #[must_use]
    pub fn output_tokens(&self) -> u64 {
        let under_way = self.plan.map_or(0, |plan| self.steps_seen(&plan) * u64::from(self.decoding));
        self.totals.output_tokens + under_way
    }

    /// Tokens computed in prompts so far: those found in the cache do not count, those computed again do.
    #[must_use]
    pub fn input_tokens(&self) -> u64 {
        self.totals.input_tokens
    }

    /// Input tokens of a request that the prefix cache holds at this moment, as a router that knows would ask.
    #[must_use]
    pub fn cached_tokens(&self, arrival: &Arrival) -> u32 {
        let units = self.units(arrival);
        self.memory.find(&self.prefixes.of(arrival)[..units as usize]) * self.unit_tokens
    }

    /// The engine breaks: everything unfinished is given back, running requests in order of admission and then the queue,
    /// and its memory is empty.
    pub fn fail(&mut self) -> Vec<Arrival> {
        let mut order = Vec::with_capacity(self.running as usize);
        let mut at = self.last;
        while at != NONE {
            order.push(at);
            at = self.requests[at as usize].before;
        }
        order.reverse();
        order.extend(self.waiting.drain(..));
        let unfinished = order.iter().map(|&at| self.requests[at as usize].done.arrival).collect();
        self.totals.busy_us += self.plan.take().map_or(0.0, |plan| self.seen_us.min(plan.end_us) - self.clock_us);
        self.memory = self.memory.emptied();
        self.requests.clear();
        self.vacant.clear();
        self.chunks.clear();
        self.ends.clear();
        self.due.fill(0);
        (self.last, self.partial, self.running, self.decoding, self.context) = (NONE, NONE, 0, 0, 0);
        self.clock_us = self.clock_us.max(self.seen_us);
        unfinished
    }

    fn enqueue(&mut self, mut done: Done, outputs: u32, received: u32, now_us: u64) -> Result<(), TooLong> {
        done.arrival.input_tokens = done.arrival.input_tokens.max(1);
        done.arrival.output_tokens = done.arrival.output_tokens.max(outputs + 1);
        let tokens_max = u64::from(self.memory.total()) * u64::from(self.block_tokens);
        spec::check(&done.arrival, tokens_max)?;
        let now = count(now_us);
        self.seen_us = self.seen_us.max(now);
        if self.is_idle() {
            self.clock_us = self.clock_us.max(now);
        } else if self.waiting.is_empty() && self.running < self.max_num_seqs {
            self.cut(now);
        }
        let request = Request {
            done,
            was_scheduled: outputs > 0,
            outputs,
            computed: 0,
            since: 0,
            decodes: false,
            admission: 0,
            before: NONE,
            after: NONE,
            named: 0,
            aside: None,
            received,
        };
        let at = match self.vacant.pop() {
            Some(at) => {
                self.requests[at as usize] = request;
                at
            }
            None => {
                self.requests.push(request);
                u32::try_from(self.requests.len() - 1)
                    .expect("fewer requests than a u32 counts are in one engine at once")
            }
        };
        self.waiting.push_back(at);
        Ok(())
    }

    /// Lets the stretch under way end with the step that runs, so that whoever arrives now is seen by the next one.
    fn cut(&mut self, now: f64) {
        let clock_us = self.clock_us;
        if let Some(plan) = self.plan.as_mut().filter(|plan| plan.steps > 1 && plan.end_us > now) {
            plan.steps = plan.stretch.steps_until(now - clock_us).clamp(1, plan.steps);
            plan.end_us = clock_us + plan.stretch.us(plan.steps);
        }
    }

    /// Plans what happens from now on until somebody comes or leaves: one step if there are prompts in it, else as many as go.
    fn plan_steps(&mut self) {
        let (needed, preempted) = self.make_room();
        self.memory.take(needed);
        let mut left = self.budget - self.decoding;
        self.chunks.clear();
        if self.partial != NONE {
            let tokens = self.next_chunk(self.partial, left);
            self.chunks.push((self.partial, tokens));
            left -= tokens;
        }
        if !preempted {
            self.admit(left);
        }
        let mut chunks = Chunks::default();
        for &(at, tokens) in &self.chunks {
            self.cost.add(&mut chunks, tokens, self.requests[at as usize].computed);
        }
        let stretch = self.cost.stretch(self.decoding, self.contexts(), &chunks);
        let steps = if self.chunks.is_empty() && !preempted { self.steps_alike(needed) } else { 1 };
        let end_us = self.clock_us + stretch.us(steps);
        self.plan = Some(Plan { stretch, steps, end_us, taken: needed });
    }

    /// Puts requests back until those left have the blocks that their next step needs. Gives the blocks, and whether somebody
    /// had to go.
    fn make_room(&mut self) -> (u32, bool) {
        let mut preempted = false;
        loop {
            let mut needed = self.due[self.phase(self.step)];
            if self.partial != NONE {
                let tokens = self.next_chunk(self.partial, self.budget - self.decoding);
                let computed = self.requests[self.partial as usize].computed;
                needed += self.blocks(computed + tokens) - self.blocks(computed);
            }
            if needed <= self.memory.free() {
                return (needed, preempted);
            }
            self.preempt_last();
            preempted = true;
        }
    }

    /// Steps in which nobody ends but in the last and for which there is memory; the blocks of the first are taken.
    fn steps_alike(&mut self, taken: u32) -> u64 {
        while let Some(&Reverse((_, admission, at))) = self.ends.peek() {
            let request = &self.requests[at as usize];
            if request.decodes && request.admission == admission {
                break;
            }
            self.ends.pop();
        }
        let Some(&Reverse((end, _, _))) = self.ends.peek() else {
            debug_assert!(false, "somebody decodes when there are no prompts");
            return 1;
        };
        let steps = end - self.step;
        let room = self.memory.free() + taken;
        if self.growth(steps) <= u64::from(room) {
            return steps;
        }
        let cycles = u64::from(room / self.decoding);
        let mut fits = cycles * u64::from(self.block_tokens);
        let mut room = room % self.decoding;
        while let Some(left) = room.checked_sub(self.due[self.phase(self.step + fits)]) {
            room = left;
            fits += 1;
        }
        fits.clamp(1, steps)
    }

    /// Blocks that the decoding requests need for their next `steps` steps.
    fn growth(&self, steps: u64) -> u64 {
        let size = u64::from(self.block_tokens);
        let cycles = steps / size * u64::from(self.decoding);
        (0..steps % size).fold(cycles, |sum, ahead| sum + u64::from(self.due[self.phase(self.step + ahead)]))
    }

    fn end_steps(&mut self, plan: Plan, done: &mut impl FnMut(Done)) {
        if plan.steps > 1 {
            let more = self.growth(plan.steps) - u64::from(plan.taken);
            self.memory.take(u32::try_from(more).expect("what fits the memory is counted in a u32"));
        }
        self.totals.busy_us += plan.end_us - self.clock_us;
        self.totals.output_tokens += plan.steps * u64::from(self.decoding);
        self.plan = None;
        self.step += plan.steps;
        self.clock_us = plan.end_us;
        while let Some(&Reverse((end, admission, at))) = self.ends.peek() {
            if end > self.step {
                break;
            }
            self.ends.pop();
            let request = &self.requests[at as usize];
            if request.decodes && request.admission == admission {
                self.stop_decoding(at);
                self.end(at, done);
            }
        }
        self.partial = NONE;
        for index in 0..self.chunks.len() {
            let (at, tokens) = self.chunks[index];
            self.end_chunk(at, tokens, done);
        }
        self.chunks.clear();
    }

    fn end_chunk(&mut self, at: u32, tokens: u32, done: &mut impl FnMut(Done)) {
        let now_us = self.told(self.clock_us);
        let request = &mut self.requests[at as usize];
        request.computed += tokens;
        self.totals.input_tokens += u64::from(tokens);
        let length = request.done.arrival.input_tokens + request.outputs;
        let whole_prompt = request.computed >= length;
        if whole_prompt {
            if request.outputs == 0 {
                request.done.first_token_us = now_us;
            }
            request.outputs += 1;
            self.totals.output_tokens += 1;
        } else {
            self.partial = at;
        }
        self.publish(at);
        if whole_prompt {
            let request = &self.requests[at as usize];
            if request.outputs >= request.done.arrival.output_tokens {
                self.end(at, done);
            } else {
                self.start_decoding(at);
            }
        }
    }

    fn publish(&mut self, at: u32) {
        let request = &mut self.requests[at as usize];
        if self.unit_tokens == 0 || request.done.arrival.prefix_blocks == 0 {
            return;
        }
        let arrival = request.done.arrival;
        let computed = (request.computed / self.unit_tokens).min(units(&self.prefixes, self.unit_tokens, &arrival));
        let from = request.named;
        request.named = computed.max(from);
        self.memory.publish(&self.prefixes.of(&arrival)[from as usize..computed.max(from) as usize]);
    }

    fn start_decoding(&mut self, at: u32) {
        let step = self.step;
        let request = &mut self.requests[at as usize];
        request.decodes = true;
        request.since = step;
        let end = step + u64::from(request.done.arrival.output_tokens - request.outputs);
        self.ends.push(Reverse((end, request.admission, at)));
        let (phase, context) = self.standing(at);
        self.due[phase] += 1;
        self.context += context;
        self.decoding += 1;
    }

    /// Takes a request out of the decoding ones and brings its numbers up to date.
    fn stop_decoding(&mut self, at: u32) {
        let (phase, context) = self.standing(at);
        self.due[phase] -= 1;
        self.context -= context;
        self.decoding -= 1;
        let step = self.step;
        let request = &mut self.requests[at as usize];
        let passed =
            u32::try_from(step - request.since).expect("nobody decodes more steps than it wants tokens, a u32");
        request.decodes = false;
        request.computed += passed;
        request.outputs += passed;
    }

    /// Where a decoding request stands in `due` and what it adds to `context`.
    fn standing(&self, at: u32) -> (usize, i64) {
        let request = &self.requests[at as usize];
        let size = u64::from(self.block_tokens);
        let due = request.since + size - u64::from(request.computed) % size;
        let since = i64::try_from(request.since).expect("steps are counted in far less than an i64");
        (self.phase(due), i64::from(request.computed) - since)
    }

    fn end(&mut self, at: u32, done: &mut impl FnMut(Done)) {
        let last_token_us = self.told(self.clock_us);
        let request = &mut self.requests[at as usize];
        request.done.last_token_us = last_token_us;
        let ended = request.done;
        let (partly, own) = self.held(at);
        self.memory.give_back(partly);
        self.memory.retire(own);
        self.stop_using_named(at);
        self.leave(at);
        self.vacant.push(at);
        done(ended);
    }

    fn preempt_last(&mut self) {
        let at = self.last;
        assert!(at != NONE, "blocks are only short while somebody holds them");
        if self.partial == at {
            self.partial = NONE;
        } else {
            self.stop_decoding(at);
        }
        let (partly, own) = self.held(at);
        self.memory.give_back(partly);
        self.requests[at as usize].aside = self.memory.put_aside(own);
        self.stop_using_named(at);
        self.leave(at);
        let request = &mut self.requests[at as usize];
        (request.computed, request.received) = (0, 0);
        request.done.preemptions += 1;
        self.totals.preemptions += 1;
        self.waiting.push_front(at);
    }

    /// Blocks of its own that a request holds: the one that is not full, and the full ones.
    fn held(&self, at: u32) -> (u32, u32) {
        let request = &self.requests[at as usize];
        let full = request.computed / self.block_tokens;
        let named = request.named * (self.unit_tokens / self.block_tokens);
        (self.blocks(request.computed) - full, full - named)
    }

    fn stop_using_named(&mut self, at: u32) {
        let request = &mut self.requests[at as usize];
        let named = std::mem::take(&mut request.named);
        if named > 0 {
            self.memory.stop_using(&self.prefixes.of(&request.done.arrival)[..named as usize]);
        }
    }

    /// Takes a request out of the order of admission.
    fn leave(&mut self, at: u32) {
        let Request { before, after, .. } = self.requests[at as usize];
        if let Some(request) = self.requests.get_mut(before as usize) {
            request.after = after;
        }
        match self.requests.get_mut(after as usize) {
            Some(request) => request.before = before,
            None => self.last = before,
        }
        self.running -= 1;
    }

    /// Admits waiting requests, first come first served, while there are tokens, places and blocks.
    fn admit(&mut self, mut left: u32) {
        while left > 0 && self.running < self.max_num_seqs {
            let Some(&at) = self.waiting.front() else { return };
            let Some(tokens) = self.admit_one(at, left) else { return };
            self.waiting.pop_front();
            self.chunks.push((at, tokens));
            left -= tokens;
        }
    }

    /// Gives a waiting request what the cache still has of it and the blocks of its first chunk. `None` when they are not there.
    fn admit_one(&mut self, at: u32, left: u32) -> Option<u32> {
        let request = &mut self.requests[at as usize];
        let arrival = request.done.arrival;
        let length = arrival.input_tokens + request.outputs;
        let units = units(&self.prefixes, self.unit_tokens, &arrival);
        let mut found = 0;
        if units > 0 {
            // At least one token is computed, because a step must yield something to sample from.
            let names = &self.prefixes.of(&arrival)[..units.min((length - 1) / self.unit_tokens) as usize];
            found = self.memory.find(names);
            self.memory.use_named(&names[..found as usize]);
        }
        let own = match request.aside.take() {
            Some(aside) if found == units => self.memory.take_back(aside),
            _ => 0,
        };
        let cached = found * self.unit_tokens + own * self.block_tokens;
        let computed = cached.max(request.received);
        let tokens = (length - computed).min(left);
        let needed = (computed + tokens).div_ceil(self.block_tokens) - cached / self.block_tokens;
        let wanted = if self.reserve_full_prompt { length } else { computed + tokens };
        if wanted.div_ceil(self.block_tokens) - cached / self.block_tokens > self.memory.free() {
            if own > 0 {
                request.aside = self.memory.put_aside(own);
            }
            self.memory.stop_using(&self.prefixes.of(&arrival)[..found as usize]);
            return None;
        }
        self.memory.take(needed);
        request.computed = computed;
        request.named = found;
        if !request.was_scheduled {
            request.was_scheduled = true;
            request.done.scheduled_us = whole(self.clock_us.round());
            request.done.cached_tokens = cached;
        }
        self.admissions += 1;
        (request.admission, request.before, request.after) = (self.admissions, self.last, NONE);
        let before = std::mem::replace(&mut self.last, at);
        if let Some(request) = self.requests.get_mut(before as usize) {
            request.after = at;
        }
        self.running += 1;
        Some(tokens)
    }

    fn units(&self, arrival: &Arrival) -> u32 {
        units(&self.prefixes, self.unit_tokens, arrival)
    }

    fn next_chunk(&self, at: u32, left: u32) -> u32 {
        let request = &self.requests[at as usize];
        (request.done.arrival.input_tokens + request.outputs - request.computed).min(left)
    }

    fn blocks(&self, tokens: u32) -> u32 {
        tokens.div_ceil(self.block_tokens)
    }

    /// Cached tokens of all decoding requests before the next step.
    fn contexts(&self) -> f64 {
        let steps = i64::try_from(self.step).expect("steps are counted in far less than an i64");
        count(u64::try_from(self.context + steps * i64::from(self.decoding)).unwrap_or(0))
    }

    fn phase(&self, step: u64) -> usize {
        usize::try_from(step % u64::from(self.block_tokens)).expect("a phase is smaller than a block")
    }

    fn steps_seen(&self, plan: &Plan) -> u64 {
        plan.stretch.steps_within((self.seen_us - self.clock_us).max(0.0)).min(plan.steps)
    }

    /// When a client learns what happens now.
    fn told(&self, now_us: f64) -> u64 {
        whole((now_us + self.request_us).round())
    }
}

/// Units of a prompt that can be found and made findable: whole ones.
fn units(prefixes: &Prefixes, unit_tokens: u32, arrival: &Arrival) -> u32 {
    let named = u32::try_from(prefixes.of(arrival).len()).unwrap_or(u32::MAX);
    arrival.input_tokens.checked_div(unit_tokens).unwrap_or(0).min(named)
}

#[cfg(test)]
mod tests;
