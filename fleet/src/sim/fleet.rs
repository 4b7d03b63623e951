//! The whole simulator: requests of a trace go through a router to engines that come and go as a policy decides.
//!
//! Everything happens in order of time. At equal times engines come first, then replicas that start, crash or leave, then
//! KV caches that arrive, requests that were held too long, decisions, and arrivals last. Engines are only looked at when
//! something of theirs ended, when they are given a request, and when the scaler looks.

use std::collections::HashMap;
use std::sync::Arc;

use super::demand::{Demand, Work};
use super::engine::Spec;
use super::outcome::{Outcome, Requests, Stopwatch};
use super::plan::Plan;
use super::pool::{Happening, Pool, Role};
use super::request::{Arrival, Done};
use super::router::Router;
use super::side::Side;
use super::startup::micros;
use super::trace::{Trace, TraceError};
use super::transfer::Transfers;
use crate::scale::Bounds;

/// Requests between two reports of progress.
const PROGRESS_EVERY: u64 = 1 << 16;

/// A fleet: a deployment with its engines.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// Who decides, what it costs, how it starts and fails.
    pub plan: Plan,
    /// One replica's engine.
    pub engine: Spec,
    /// What a token weighs in loads.
    pub work: Work,
    /// How requests find a replica.
    pub router: Router,
    /// What happens to requests while no replica serves.
    pub hold: Hold,
    /// Prompts and answers on replicas of their own. The plan's bounds are those of the answers' then.
    pub split: Option<Split>,
}

impl Scenario {
    /// Engines with everything else as usual.
    #[must_use]
    pub fn new(plan: Plan, engine: Spec, work: Work) -> Scenario {
        Scenario { plan, engine, work, router: Router::default(), hold: Hold::default(), split: None }
    }
}

/// Requests that wait for the first replica.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hold {
    /// More than so many fail.
    pub requests_max: usize,
    /// They fail after so many seconds.
    pub seconds_max: f64,
}

impl Default for Hold {
    /// Ten thousand for up to ten minutes.
    fn default() -> Hold {
        Hold { requests_max: 10_000, seconds_max: 600.0 }
    }
}

/// Prompts are computed on other replicas than answers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Split {
    /// Between which numbers the prompts' replicas are kept.
    pub prefill: Bounds,
    /// Seconds that a KV cache takes to go over,
    pub transfer_s: f64,
    /// and so many more for each of its tokens.
    pub transfer_s_per_token: f64,
}

/// Plays a trace. `demand` is the same trace's, `progress` hears how many requests have arrived.
///
/// # Errors
/// What reading the trace says.
pub fn run(
    scenario: &Scenario,
    trace: &Trace,
    demand: &Demand,
    progress: &mut dyn FnMut(u64),
) -> Result<Outcome, TraceError> {
    let mut arrivals = trace.arrivals()?;
    let mut fleet = Fleet::new(scenario, trace, demand);
    let mut next = arrivals.next().transpose()?;
    let mut count = 0;
    while let Some(arrival) = next {
        while fleet.next_us <= arrival.at_us {
            fleet.step();
        }
        fleet.arrive(arrival);
        count += 1;
        if count % PROGRESS_EVERY == 0 {
            progress(count);
        }
        next = arrivals.next().transpose()?;
    }
    while fleet.next_us < fleet.end_us {
        fleet.step();
    }
    progress(count);
    Ok(fleet.finish(demand))
}

struct Fleet<'a> {
    scenario: &'a Scenario,
    /// Prompts (or everything) first, answers second.
    sides: Vec<Side<'a>>,
    transfers: Transfers,
    requests: Requests,
    watch: Stopwatch,
    every_us: u64,
    tick_us: u64,
    looked_us: u64,
    end_us: u64,
    judge_from_us: u64,
    /// When something other than an arrival or an engine is due.
    next_us: u64,
    retries: HashMap<u64, u8>,
    happenings: Vec<Happening>,
    dones: Vec<(usize, Done)>,
}

impl<'a> Fleet<'a> {
    fn new(scenario: &'a Scenario, trace: &Trace, demand: &Demand) -> Fleet<'a> {
        let plan = &scenario.plan;
        let end_us = demand.len_us();
        let side = |role, bounds, minutes| {
            let pool = Pool::new(plan, role, bounds, demand.start, minutes, end_us);
            Side::new(pool, scenario.engine, Arc::clone(trace.prefixes()), &scenario.hold)
        };
        let sides = match &scenario.split {
            None => vec![side(Role::Both, plan.bounds, demand.minutes())],
            Some(split) => {
                let prefill = demand.prefill_minutes();
                let decode = demand.minutes().iter().zip(&prefill).map(|(all, prefill)| all - prefill).collect();
                vec![side(Role::Prefill, split.prefill, prefill), side(Role::Decode, plan.bounds, decode)]
            }
        };
        let every_us = micros(plan.decide_every_s).max(1);
        let mut fleet = Fleet {
            scenario,
            sides,
            transfers: Transfers::default(),
            requests: Requests::default(),
            watch: Stopwatch::new(&plan.objective),
            every_us,
            tick_us: every_us,
            looked_us: 0,
            end_us,
            judge_from_us: micros(plan.judge_from_s),
            next_us: 0,
            retries: HashMap::new(),
            happenings: Vec::new(),
            dones: Vec::new(),
        };
        fleet.reckon();
        fleet
    }

    /// Lets happen what is due next, arrivals aside.
    fn step(&mut self) {
        let now_us = self.next_us;
        self.engines_upto(now_us);
        for side in 0..self.sides.len() {
            self.replicas_upto(side, now_us);
        }
        while let Some(done) = self.transfers.take(now_us) {
            self.begin_answer(done, now_us);
        }
        self.give_up_held(now_us);
        if now_us == self.tick_us {
            for side in 0..self.sides.len() {
                self.decide(side, now_us);
            }
            self.looked_us = now_us;
            self.tick_us += self.every_us;
        }
        self.reckon();
    }

    /// A request comes in.
    fn arrive(&mut self, arrival: Arrival) {
        let now_us = arrival.at_us;
        self.engines_upto(now_us);
        self.requests.arrived += u64::from(now_us >= self.judge_from_us);
        for side in &mut self.sides {
            side.window.arrive(&arrival);
        }
        self.submit(arrival, now_us);
    }

    fn submit(&mut self, arrival: Arrival, now_us: u64) {
        let split = self.scenario.split.is_some();
        let side = &mut self.sides[0];
        let Some(place) = side.choose(self.scenario.router, &arrival) else { return self.hold(arrival, now_us) };
        // A prompt's replica makes the first token; what is still to come is remembered.
        let asked = if split { Arrival { output_tokens: 1, ..arrival } } else { arrival };
        if split {
            self.transfers.expect(&arrival);
        }
        let taken = side.submit(place, asked, now_us, &mut self.dones);
        self.ended(0, now_us);
        if !taken {
            self.fail(&arrival);
        }
        if split {
            self.reckon();
        }
    }

    fn hold(&mut self, arrival: Arrival, now_us: u64) {
        let side = &mut self.sides[0];
        if side.hold(arrival, now_us) {
            self.requests.held += u64::from(arrival.at_us >= self.judge_from_us);
            self.reckon();
        } else {
            self.fail(&arrival);
        }
    }

    fn fail(&mut self, arrival: &Arrival) {
        self.requests.failed += u64::from(arrival.at_us >= self.judge_from_us);
        self.transfers.forget(arrival.id);
        self.retries.remove(&arrival.id);
    }

    fn give_up_held(&mut self, now_us: u64) {
        while let Some(arrival) = self.sides[0].held_too_long(now_us) {
            self.fail(&arrival);
        }
    }

    /// Lets every engine whose next event is due come so far.
    fn engines_upto(&mut self, now_us: u64) {
        for side in 0..self.sides.len() {
            if self.sides[side].due_us() <= now_us {
                self.sides[side].upto(now_us, &mut self.dones);
                self.ended(side, now_us);
            }
        }
    }

    /// What engines finished becomes measurements, or goes over to the answers' replicas.
    fn ended(&mut self, side: usize, now_us: u64) {
        let mut dones = std::mem::take(&mut self.dones);
        for (place, done) in dones.drain(..) {
            self.sides[side].ended(place, &done);
            let wanted = if side == 0 { self.transfers.arrived(done.arrival.id) } else { None };
            match wanted.filter(|&wanted| wanted > 1) {
                Some(output_tokens) => {
                    let split = self.scenario.split.as_ref().expect("only a split deployment expects transfers");
                    let arrival = Arrival { output_tokens, ..done.arrival };
                    let seconds = split.transfer_s + split.transfer_s_per_token * f64::from(arrival.input_tokens);
                    // A client is told of a token a little later than the engine has it.
                    let told_us = micros(self.scenario.engine.constants.request_s);
                    let made_us = done.last_token_us.saturating_sub(told_us).max(now_us);
                    self.transfers.send(made_us + micros(seconds), Done { arrival, ..done });
                }
                None => self.completed(&done),
            }
        }
        self.dones = dones;
        self.sides[side].say_gone(now_us);
    }

    fn completed(&mut self, done: &Done) {
        if !self.retries.is_empty() {
            self.retries.remove(&done.arrival.id);
        }
        for side in &mut self.sides {
            side.window.complete(done);
        }
        if done.arrival.at_us >= self.judge_from_us {
            self.requests.done += 1;
            self.watch.record(done);
        }
    }

    /// A KV cache has arrived where answers are made.
    fn begin_answer(&mut self, done: Done, now_us: u64) {
        let side = &mut self.sides[1];
        let Some(place) = side.choose(self.scenario.router, &done.arrival) else { return self.transfers.wait(done) };
        let taken = side.submit_decoding(place, done, now_us, &mut self.dones);
        self.ended(1, now_us);
        if !taken {
            self.fail(&done.arrival);
        }
    }

    fn replicas_upto(&mut self, side: usize, now_us: u64) {
        self.sides[side].replicas_upto(now_us, &mut self.happenings);
        self.happened(side, now_us);
    }

    fn decide(&mut self, side: usize, now_us: u64) {
        self.sides[side].all_upto(now_us, &mut self.dones);
        self.ended(side, now_us);
        let since_us = now_us - self.looked_us;
        let waits = if side == 0 { 0 } else { self.transfers.waiting() };
        self.sides[side].decide(now_us, since_us, waits, &self.scenario.work, &mut self.happenings);
        self.happened(side, now_us);
    }

    fn happened(&mut self, side: usize, now_us: u64) {
        if self.happenings.is_empty() {
            return;
        }
        let mut happenings = std::mem::take(&mut self.happenings);
        for happening in happenings.drain(..) {
            match happening {
                Happening::Ready(id) => self.ready(side, id, now_us),
                Happening::Draining(id) => self.sides[side].drain(id, now_us),
                Happening::Crashed(id) | Happening::Lost(id) => {
                    for arrival in self.sides[side].crash(id) {
                        self.again(arrival, now_us);
                    }
                }
            }
        }
        self.happenings = happenings;
    }

    /// A replica serves: what waited for it comes first.
    fn ready(&mut self, side: usize, id: u32, now_us: u64) {
        self.sides[side].seat(id);
        if side == 0 {
            for arrival in self.sides[0].release() {
                self.submit(arrival, now_us);
            }
        } else {
            for done in self.transfers.release() {
                self.begin_answer(done, now_us);
            }
        }
    }

    /// A request whose replica crashed starts from the beginning elsewhere.
    fn again(&mut self, arrival: Arrival, now_us: u64) {
        let output_tokens = self.transfers.arrived(arrival.id).unwrap_or(arrival.output_tokens);
        let arrival = Arrival { output_tokens, ..arrival };
        let tried = self.retries.entry(arrival.id).or_insert(0);
        *tried = tried.saturating_add(1);
        if *tried > self.scenario.plan.failures.retries_max {
            return self.fail(&arrival);
        }
        self.requests.retried += u64::from(arrival.at_us >= self.judge_from_us);
        self.submit(arrival, now_us);
    }

    /// When something is due next that no arrival brings about.
    fn reckon(&mut self) {
        let pools = self.sides.iter().map(Side::pool_next_us).min().unwrap_or(u64::MAX);
        let held = self.sides[0].hold_ends_us();
        // Answers begin where prompts end, so their ends are events of their own.
        let prompts = if self.scenario.split.is_some() { self.sides[0].due_us() } else { u64::MAX };
        self.next_us = pools.min(held).min(prompts).min(self.transfers.next_us()).min(self.tick_us);
    }

    /// The trace is over: what runs comes to its end, and nobody decides any more.
    fn finish(mut self, demand: &Demand) -> Outcome {
        loop {
            let engines = self.sides.iter().map(Side::due_us).min().unwrap_or(u64::MAX);
            let now_us = engines.min(self.transfers.next_us());
            if now_us == u64::MAX {
                break;
            }
            self.engines_upto(now_us);
            while let Some(done) = self.transfers.take(now_us) {
                self.begin_answer(done, now_us);
            }
        }
        let judged = |arrival: &Arrival| arrival.at_us >= self.judge_from_us;
        let unfinished = self.sides[0].release().iter().filter(|arrival| judged(arrival)).count()
            + self.transfers.release().iter().filter(|done| judged(&done.arrival)).count();
        self.requests.unfinished = unfinished as u64;
        self.requests.preemptions = self.sides.iter().map(Side::preemptions).sum();
        let pools = self.sides.into_iter().map(|side| side.into_pool(self.end_us)).collect();
        Outcome::of(&self.scenario.plan, demand, pools, self.requests, &self.watch)
    }
}
