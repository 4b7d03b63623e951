//! One engine's continuous batching, as a pure state machine: time goes in as a number, events come out.
//!
//! The manner is vLLM's. Every step has a budget of tokens. Running requests come first, in order of admission: one
//! token each when decoding, a chunk of what is missing when prefilling. When KV memory runs out the request admitted
//! last goes back to the queue and is recomputed later. What budget is left admits waiting requests, first come first
//! served, after finding how much of their text the prefix cache already holds. A request whose last known token has
//! been computed yields the next one.

use std::collections::VecDeque;
use std::time::Duration;

use ledger::step::{StepTime, Work, step_time};

use super::EngineSpec;
use super::blocks::{Blocks, extend_chain};
use super::metrics::{Counters, FinishReason, Gauges};
use super::text::{Token, answer_word, token};

/// What a client wants computed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Submission {
    /// The prompt; at least one token.
    pub prompt: Vec<Token>,
    /// Tokens to generate; at least one.
    pub output_tokens: u32,
    /// How it ends once they are generated.
    pub ends_by: FinishReason,
    /// Which answer the model gives.
    pub answer_seed: u64,
}

/// Why a submission is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rejection {
    /// There is nothing to compute.
    Empty,
    /// Prompt and answer together are longer than the model or its memory allows.
    TooLong {
        /// The most tokens a request may have.
        tokens_max: u32,
    },
    /// The queue is full; try again later.
    QueueFull,
}

/// A request as it ended, with the numbers that went into the counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finished {
    /// The request.
    pub id: u64,
    /// Why it ended.
    pub reason: FinishReason,
    /// Tokens of its prompt, zero if it ended before its first token, as then nothing was counted.
    pub prompt_tokens: u32,
    /// Of those, tokens found in the prefix cache when it was first scheduled.
    pub cached_tokens: u32,
    /// Tokens generated.
    pub output_tokens: u32,
}

/// What happened at the end of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// A request yielded a token.
    Token {
        /// The request.
        id: u64,
        /// Position in its answer, from zero.
        index: u32,
        /// Prompt tokens of it that were found in the prefix cache.
        cached_tokens: u32,
    },
    /// A request ended.
    Finished(Finished),
}

/// A step that has begun.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Step {
    /// Its duration when the engine has its GPUs for itself.
    pub time: StepTime,
    /// Requests in it.
    pub requests: u32,
    /// New tokens in it.
    pub new_tokens: u32,
}

impl Step {
    /// The duration in whole microseconds, at least one.
    #[must_use]
    pub fn micros(&self) -> u64 {
        micros(self.time.total_s).max(1)
    }
}

/// Whole microseconds of so many seconds; saturates, and nothing is shorter than no time.
#[must_use]
pub fn micros(seconds: f64) -> u64 {
    Duration::try_from_secs_f64(seconds).map_or(0, |time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX))
}

/// The scheduler of one engine.
#[derive(Debug)]
pub struct Scheduler {
    spec: EngineSpec,
    blocks: Blocks,
    waiting: VecDeque<Request>,
    /// In order of admission.
    running: Vec<Request>,
    counters: Counters,
    next_id: u64,
}

#[derive(Debug)]
struct Request {
    id: u64,
    /// Prompt and what was generated so far.
    tokens: Vec<Token>,
    prompt_tokens: u32,
    output_tokens: u32,
    output_target: u32,
    ends_by: FinishReason,
    answer_seed: u64,
    /// Tokens whose KV is in memory.
    computed: u32,
    /// Tokens being computed by the step that runs.
    planned: u32,
    /// Hashes of the full blocks of `tokens`.
    chain: Vec<u64>,
    /// How many of them it uses from the cache.
    shared: usize,
    /// Blocks of its own besides.
    private: u32,
    /// Prompt tokens found in the cache when first scheduled.
    cached_tokens: Option<u32>,
    arrived_us: u64,
    scheduled_us: u64,
    first_token_us: u64,
    last_token_us: u64,
}

impl Request {
    fn len(&self) -> u32 {
        self.prompt_tokens + self.output_tokens
    }

    fn ended(&self, reason: FinishReason) -> Finished {
        let counted = self.output_tokens > 0;
        Finished {
            id: self.id,
            reason,
            prompt_tokens: if counted { self.prompt_tokens } else { 0 },
            cached_tokens: if counted { self.cached_tokens.unwrap_or(0) } else { 0 },
            output_tokens: self.output_tokens,
        }
    }
}

impl Scheduler {
    /// An idle engine.
    #[must_use]
    pub fn new(spec: EngineSpec) -> Scheduler {
        let blocks = Blocks::new(spec.limits.kv_blocks, spec.limits.prefix_caching);
        Scheduler {
            spec,
            blocks,
            waiting: VecDeque::new(),
            running: Vec::new(),
            counters: Counters::default(),
            next_id: 0,
        }
    }

    /// What it counted so far.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// What it holds now.
    #[must_use]
    pub fn gauges(&self) -> Gauges {
        Gauges {
            running: self.running.len(),
            waiting: self.waiting.len(),
            kv_usage: f64::from(self.blocks.used()) / f64::from(self.blocks.total().max(1)),
            block_size: self.spec.limits.block_size,
            blocks: self.blocks.total(),
            prefix_caching: self.spec.limits.prefix_caching,
        }
    }

    /// The most tokens that prompt and answer of one request may have.
    #[must_use]
    pub fn tokens_max(&self) -> u32 {
        self.spec.limits.max_model_len.min(self.spec.limits.kv_blocks.saturating_mul(self.spec.limits.block_size))
    }

    /// Queues a request and gives its id.
    ///
    /// # Errors
    /// [`Rejection`] says why it cannot ever, or not now, be served.
    pub fn submit(&mut self, submission: Submission, now_us: u64) -> Result<u64, Rejection> {
        let tokens_max = self.tokens_max();
        let prompt_tokens = u32::try_from(submission.prompt.len()).map_err(|_| Rejection::TooLong { tokens_max })?;
        if prompt_tokens == 0 || submission.output_tokens == 0 {
            return Err(Rejection::Empty);
        }
        if prompt_tokens.checked_add(submission.output_tokens).is_none_or(|tokens| tokens > tokens_max) {
            return Err(Rejection::TooLong { tokens_max });
        }
        if self.waiting.len() >= self.spec.limits.waiting_max {
            return Err(Rejection::QueueFull);
        }
        let id = self.next_id;
        self.next_id += 1;
        self.waiting.push_back(Request {
            id,
            tokens: submission.prompt,
            prompt_tokens,
            output_tokens: 0,
            output_target: submission.output_tokens,
            ends_by: submission.ends_by,
            answer_seed: submission.answer_seed,
            computed: 0,
            planned: 0,
            chain: Vec::new(),
            shared: 0,
            private: 0,
            cached_tokens: None,
            arrived_us: now_us,
            scheduled_us: now_us,
            first_token_us: now_us,
            last_token_us: now_us,
        });
        Ok(id)
    }

    /// Forgets a request wherever it is; what it generated stays counted. `None` if it is not here.
    pub fn abort(&mut self, id: u64, now_us: u64) -> Option<Finished> {
        let mut request = if let Some(at) = self.running.iter().position(|request| request.id == id) {
            self.running.remove(at)
        } else {
            let at = self.waiting.iter().position(|request| request.id == id)?;
            self.waiting.remove(at)?
        };
        Some(self.end(&mut request, FinishReason::Abort, now_us))
    }

    /// Plans the next step. `None` when there is nothing to do. Ends with [`end_step`](Scheduler::end_step).
    pub fn begin_step(&mut self, now_us: u64) -> Option<Step> {
        let mut budget = self.spec.limits.max_num_batched_tokens;
        let preempted = self.plan_running(&mut budget);
        if !preempted {
            self.admit_waiting(&mut budget, now_us);
        }
        let batch: Vec<Work> = self
            .running
            .iter()
            .filter(|request| request.planned > 0)
            .map(|request| Work { new_tokens: request.planned, cached_tokens: request.computed })
            .collect();
        if batch.is_empty() {
            return None;
        }
        let new_tokens = batch.iter().map(|work| work.new_tokens).sum();
        self.counters.iteration_tokens.observe(f64::from(new_tokens));
        let spec = &self.spec;
        let time = step_time(&spec.shape, &spec.gpu, spec.gpus, &spec.efficiencies, &batch);
        Some(Step { time, requests: u32::try_from(batch.len()).unwrap_or(u32::MAX), new_tokens })
    }

    /// Applies the step that [`begin_step`](Scheduler::begin_step) planned: tokens appear, requests end.
    pub fn end_step(&mut self, now_us: u64) -> Vec<Event> {
        let mut events = Vec::with_capacity(self.running.len());
        let mut running = std::mem::take(&mut self.running);
        running.retain_mut(|request| {
            let computed = std::mem::take(&mut request.planned);
            if computed == 0 {
                return true;
            }
            request.computed += computed;
            self.publish_full_blocks(request);
            if request.computed < request.len() {
                return true;
            }
            events.push(self.generate(request, now_us));
            if request.output_tokens < request.output_target {
                return true;
            }
            events.push(Event::Finished(self.end(request, request.ends_by, now_us)));
            false
        });
        self.running = running;
        events
    }

    /// Gives every running request its share of the budget. True if somebody had to go back to the queue.
    fn plan_running(&mut self, budget: &mut u32) -> bool {
        let mut preempted = false;
        let mut index = 0;
        while index < self.running.len() && *budget > 0 {
            let new_tokens = (self.running[index].len() - self.running[index].computed).min(*budget);
            while index < self.running.len() && !self.grow(index, new_tokens) {
                self.preempt_last();
                preempted = true;
            }
            if let Some(request) = self.running.get_mut(index) {
                request.planned = new_tokens;
                *budget -= new_tokens;
            }
            index += 1;
        }
        preempted
    }

    fn admit_waiting(&mut self, budget: &mut u32, now_us: u64) {
        while *budget > 0 && self.running.len() < self.spec.limits.max_num_seqs {
            let Some(mut request) = self.waiting.pop_front() else { return };
            extend_chain(&mut request.chain, &request.tokens, self.spec.limits.block_size as usize);
            // At least one token is computed, because a step must yield something to sample from.
            let findable = (request.len() - 1) / self.spec.limits.block_size;
            let hits = self.blocks.find(&request.chain[..findable as usize]);
            let found = u32::try_from(hits).unwrap_or(findable) * self.spec.limits.block_size;
            self.blocks.use_cached(&request.chain[..hits]);
            request.shared = hits;
            request.computed = found;
            let new_tokens = (request.len() - found).min(*budget);
            self.running.push(request);
            if !self.grow(self.running.len() - 1, new_tokens) {
                let mut request = self.running.pop().expect("it was pushed above");
                self.release(&mut request);
                self.waiting.push_front(request);
                return;
            }
            *budget -= new_tokens;
            let request = self.running.last_mut().expect("it was pushed above");
            request.planned = new_tokens;
            if request.cached_tokens.is_none() {
                request.cached_tokens = Some(found);
                request.scheduled_us = now_us;
                self.counters.prefix_cache_queries += u64::from(request.prompt_tokens);
                self.counters.prefix_cache_hits += u64::from(found);
            }
        }
    }

    /// Takes the blocks that a running request needs for `new_tokens` more tokens.
    fn grow(&mut self, index: usize, new_tokens: u32) -> bool {
        let request = &mut self.running[index];
        let needed = (request.computed + new_tokens).div_ceil(self.spec.limits.block_size);
        let held = request.private + u32::try_from(request.shared).unwrap_or(u32::MAX);
        let missing = needed.saturating_sub(held);
        let taken = self.blocks.take(missing);
        if taken {
            request.private += missing;
        }
        taken
    }

    fn preempt_last(&mut self) {
        let mut request = self.running.pop().expect("only called while something runs");
        self.release(&mut request);
        self.counters.preemptions += 1;
        self.waiting.push_front(request);
    }

    fn release(&mut self, request: &mut Request) {
        self.blocks.stop_using(&request.chain[..request.shared]);
        self.blocks.give_back(request.private);
        (request.shared, request.private, request.computed, request.planned) = (0, 0, 0, 0);
    }

    fn publish_full_blocks(&mut self, request: &mut Request) {
        if !self.spec.limits.prefix_caching {
            return;
        }
        extend_chain(&mut request.chain, &request.tokens, self.spec.limits.block_size as usize);
        let full = (request.computed / self.spec.limits.block_size) as usize;
        while request.shared < full && self.blocks.publish(request.chain[request.shared]) {
            request.shared += 1;
            request.private -= 1;
        }
    }

    fn generate(&mut self, request: &mut Request, now_us: u64) -> Event {
        let index = request.output_tokens;
        let cached_tokens = request.cached_tokens.unwrap_or(0);
        if index == 0 {
            request.first_token_us = now_us;
            self.counters.prompt_tokens += u64::from(request.prompt_tokens);
            self.counters.prompt_tokens_cached += u64::from(cached_tokens);
            self.counters.time_to_first_token_s.observe(seconds(request.arrived_us, now_us));
        } else {
            self.counters.inter_token_latency_s.observe(seconds(request.last_token_us, now_us));
        }
        request.last_token_us = now_us;
        request.tokens.push(token(answer_word(request.answer_seed, index)));
        request.output_tokens += 1;
        self.counters.generation_tokens += 1;
        Event::Token { id: request.id, index, cached_tokens }
    }

    fn end(&mut self, request: &mut Request, reason: FinishReason, now_us: u64) -> Finished {
        self.release(request);
        self.counters.finish(reason);
        self.counters.e2e_latency_s.observe(seconds(request.arrived_us, now_us));
        if request.output_tokens > 0 {
            self.counters.queue_time_s.observe(seconds(request.arrived_us, request.scheduled_us));
            self.counters.prefill_time_s.observe(seconds(request.scheduled_us, request.first_token_us));
            self.counters.decode_time_s.observe(seconds(request.first_token_us, request.last_token_us));
        }
        request.ended(reason)
    }
}

fn seconds(from_us: u64, to_us: u64) -> f64 {
    to_us.saturating_sub(from_us) as f64 / 1e6
}

#[cfg(test)]
mod tests;
