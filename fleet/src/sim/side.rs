//! The replicas of one pool with their engines: what the router and the scaler see of them.

use std::collections::VecDeque;
use std::sync::Arc;

use super::demand::Work;
use super::engine::{Engine, Spec};
use super::fleet::Hold;
use super::histogram::Histogram;
use super::outcome::{tpot_us, ttft_us};
use super::pool::{Happening, Pool, Role};
use super::request::{Arrival, Done, Prefixes};
use super::router::{Router, Routes};
use super::startup::micros;
use crate::scale::Sample;

pub(crate) struct Side<'a> {
    pub window: Window,
    pool: Pool<'a>,
    spec: Spec,
    prefixes: Arc<Prefixes>,
    seats: Vec<Option<Seat>>,
    /// When each seat's engine has to be looked at again; [`u64::MAX`] for an idle or missing one.
    due: Vec<u64>,
    /// Not later than the earliest of them.
    due_us: u64,
    routes: Routes,
    /// Seats that take nothing new.
    draining: Vec<usize>,
    hold: Hold,
    held: VecDeque<(u64, Arrival)>,
    /// Of engines that are gone.
    preemptions: u64,
}

struct Seat {
    id: u32,
    engine: Engine,
    last_done_us: u64,
    /// At the last look.
    busy_us: u64,
    output_tokens: u64,
}

/// What came and ended since the last look.
#[derive(Debug, Default)]
pub(crate) struct Window {
    arrivals: u64,
    input_tokens: u64,
    output_tokens: u64,
    cached_tokens: u64,
    ttft: Histogram,
    tpot: Histogram,
}

impl Window {
    pub fn arrive(&mut self, arrival: &Arrival) {
        self.arrivals += 1;
        self.input_tokens += u64::from(arrival.input_tokens);
        self.output_tokens += u64::from(arrival.output_tokens);
    }

    pub fn complete(&mut self, done: &Done) {
        self.cached_tokens += u64::from(done.cached_tokens);
        self.ttft.record(ttft_us(done));
        if let Some(tpot_us) = tpot_us(done) {
            self.tpot.record(tpot_us);
        }
    }

    fn clear(&mut self) {
        (self.arrivals, self.input_tokens, self.output_tokens, self.cached_tokens) = (0, 0, 0, 0);
        self.ttft.clear();
        self.tpot.clear();
    }
}

impl<'a> Side<'a> {
    /// A pool with an engine for each replica that serves already.
    pub fn new(pool: Pool<'a>, spec: Spec, prefixes: Arc<Prefixes>, hold: &Hold) -> Side<'a> {
        let first: Vec<u32> = pool.ready_ids().collect();
        let mut side = Side {
            window: Window::default(),
            pool,
            spec,
            prefixes,
            seats: Vec::new(),
            due: Vec::new(),
            due_us: u64::MAX,
            routes: Routes::default(),
            draining: Vec::new(),
            hold: *hold,
            held: VecDeque::new(),
            preemptions: 0,
        };
        first.into_iter().for_each(|id| side.seat(id));
        side
    }

    /// When an engine has to be looked at next; may be too early, never too late.
    pub fn due_us(&self) -> u64 {
        self.due_us
    }

    pub fn pool_next_us(&self) -> u64 {
        self.pool.next_us()
    }

    /// A replica serves from now on.
    pub fn seat(&mut self, id: u32) {
        let engine = Engine::with_prefixes(&self.spec, Arc::clone(&self.prefixes));
        let place = self.seats.iter().position(Option::is_none).unwrap_or(self.seats.len());
        if place == self.seats.len() {
            self.seats.push(None);
            self.due.push(u64::MAX);
        }
        self.seats[place] = Some(Seat { id, engine, last_done_us: 0, busy_us: 0, output_tokens: 0 });
        self.routes.open(place);
    }

    /// Where a request goes; `None` when nobody serves.
    pub fn choose(&mut self, router: Router, arrival: &Arrival) -> Option<usize> {
        let beginning = match router {
            Router::PrefixAffinity => self.prefixes.of(arrival).first().copied(),
            Router::RoundRobin | Router::LeastOutstanding => None,
        };
        self.routes.choose(router, beginning)
    }

    /// Gives a request to the engine that was chosen for it. False if it can never run there.
    pub fn submit(&mut self, place: usize, arrival: Arrival, now_us: u64, dones: &mut Vec<(usize, Done)>) -> bool {
        let engine = self.engine_at(place, now_us, dones);
        let taken = engine.submit(arrival, now_us).is_ok();
        self.submitted(place, taken)
    }

    /// The same for a request whose prompt was computed elsewhere.
    pub fn submit_decoding(&mut self, place: usize, done: Done, now_us: u64, dones: &mut Vec<(usize, Done)>) -> bool {
        let engine = self.engine_at(place, now_us, dones);
        let taken = engine.submit_decoding(done, now_us).is_ok();
        self.submitted(place, taken)
    }

    fn engine_at(&mut self, place: usize, now_us: u64, dones: &mut Vec<(usize, Done)>) -> &mut Engine {
        let seat = self.seats[place].as_mut().expect("requests are routed to open places, and those have engines");
        seat.engine.advance(now_us, &mut |done| dones.push((place, done)));
        &mut seat.engine
    }

    fn submitted(&mut self, place: usize, taken: bool) -> bool {
        let next_us = self.seats[place].as_ref().and_then(|seat| seat.engine.next_us()).unwrap_or(u64::MAX);
        self.due[place] = next_us;
        self.due_us = self.due_us.min(next_us);
        if !taken {
            self.routes.ended(place);
        }
        taken
    }

    /// Lets engines that have something due come so far.
    pub fn upto(&mut self, now_us: u64, dones: &mut Vec<(usize, Done)>) {
        let mut due_us = u64::MAX;
        for (place, due) in self.due.iter_mut().enumerate() {
            if *due <= now_us {
                *due = match &mut self.seats[place] {
                    Some(seat) => advance(seat, place, now_us, dones),
                    None => u64::MAX,
                };
            }
            due_us = due_us.min(*due);
        }
        self.due_us = due_us;
    }

    /// Lets all engines come so far, so that what they say is of now.
    pub fn all_upto(&mut self, now_us: u64, dones: &mut Vec<(usize, Done)>) {
        for (place, seat) in self.seats.iter_mut().enumerate() {
            if let Some(seat) = seat {
                self.due[place] = advance(seat, place, now_us, dones);
            }
        }
        self.due_us = self.due.iter().copied().min().unwrap_or(u64::MAX);
    }

    /// A request ended at a place.
    pub fn ended(&mut self, place: usize, done: &Done) {
        self.routes.ended(place);
        if let Some(seat) = &mut self.seats[place] {
            seat.last_done_us = done.last_token_us;
        }
    }

    /// Tells the pool of drained replicas that have nothing left.
    pub fn say_gone(&mut self, now_us: u64) {
        if self.draining.is_empty() {
            return;
        }
        let seats = &self.seats;
        let idle = |place: &usize| seats[*place].as_ref().is_none_or(|seat| seat.engine.is_idle());
        let (mut empty, busy): (Vec<usize>, Vec<usize>) = self.draining.iter().copied().partition(idle);
        self.draining = busy;
        empty.sort_by_key(|&place| seats[place].as_ref().map_or(0, |seat| seat.last_done_us));
        for place in empty {
            if let Some(seat) = self.vacate(place) {
                // What a client sees last may lie a little behind what the engine did.
                self.pool.gone(seat.id, seat.last_done_us.min(now_us));
            }
        }
    }

    /// A replica takes nothing new.
    pub fn drain(&mut self, id: u32, now_us: u64) {
        let Some(place) = self.place_of(id) else { return };
        self.routes.close(place);
        let Some(seat) = self.seats[place].as_mut() else { return };
        seat.last_done_us = now_us;
        self.draining.push(place);
        self.say_gone(now_us);
    }

    /// A replica lost what it had: the requests come back.
    pub fn crash(&mut self, id: u32) -> Vec<Arrival> {
        let Some(place) = self.place_of(id) else { return Vec::new() };
        self.vacate(place).map_or_else(Vec::new, |mut seat| seat.engine.fail())
    }

    fn vacate(&mut self, place: usize) -> Option<Seat> {
        self.routes.close(place);
        self.due[place] = u64::MAX;
        let seat = self.seats[place].take()?;
        self.preemptions += seat.engine.preemptions();
        Some(seat)
    }

    fn place_of(&self, id: u32) -> Option<usize> {
        place_of(&self.seats, id)
    }

    /// Lets replicas start, crash and leave.
    pub fn replicas_upto(&mut self, now_us: u64, happenings: &mut Vec<Happening>) {
        let Side { pool, seats, routes, .. } = self;
        let work = |id| place_of(seats, id).map_or(0, |place| routes.outstanding(place));
        pool.upto(now_us, &work, happenings);
    }

    /// Looks at the engines, which have come so far, and lets the policy decide.
    pub fn decide(
        &mut self,
        now_us: u64,
        since_us: u64,
        waits: usize,
        weights: &Work,
        happenings: &mut Vec<Happening>,
    ) {
        let reading = self.read(since_us, waits, weights);
        let Side { pool, seats, routes, .. } = self;
        let work = |id| place_of(seats, id).map_or(0, |place| routes.outstanding(place));
        pool.decide(now_us, reading, &work, happenings);
    }

    fn read(&mut self, since_us: u64, waits: usize, weights: &Work) -> Sample {
        let seconds = (since_us as f64 / 1e6).max(1e-6);
        let (mut running, mut waiting, mut output_tokens) = (0.0, 0.0, 0);
        let (mut ready, mut kv_used, mut busy_us) = (0.0, 0.0, 0);
        for (place, seat) in self.seats.iter_mut().enumerate() {
            let Some(seat) = seat else { continue };
            running += f64::from(seat.engine.running());
            waiting += f64::from(seat.engine.waiting());
            let (busy_before_us, made_before) = (seat.busy_us, seat.output_tokens);
            (seat.busy_us, seat.output_tokens) = (seat.engine.busy_us(), seat.engine.output_tokens());
            output_tokens += seat.output_tokens - made_before;
            if !self.draining.contains(&place) {
                ready += 1.0;
                kv_used += seat.engine.kv_used();
                busy_us += seat.busy_us - busy_before_us;
            }
        }
        let window = &self.window;
        let all_s = |input: f64, output: f64| input * weights.per_input_token + output * weights.per_output_token;
        let prefill = all_s(window.input_tokens as f64, 0.0) / seconds;
        let decode = all_s(0.0, window.output_tokens as f64) / seconds;
        let (load, prefill_load) = match self.pool.role {
            Role::Both => (prefill + decode, prefill),
            Role::Prefill => (prefill, prefill),
            Role::Decode => (decode, 0.0),
        };
        let percentile = self.pool.objective().percentile;
        let sample = Sample {
            running: Some(running),
            waiting: Some(waiting + (self.held.len() + waits) as f64),
            kv_used: (ready > 0.0).then(|| kv_used / ready),
            utilisation: (ready > 0.0).then(|| (busy_us as f64 / 1e6 / seconds / ready).min(1.0)),
            arrivals_per_s: Some(window.arrivals as f64 / seconds),
            input_tokens_per_s: Some(window.input_tokens.saturating_sub(window.cached_tokens) as f64 / seconds),
            output_tokens_per_s: Some(output_tokens as f64 / seconds),
            load: Some(load),
            prefill_load: Some(prefill_load),
            ttft_s: window.ttft.quantile_s(percentile),
            tpot_s: window.tpot.quantile_s(percentile),
            ..Sample::default()
        };
        self.window.clear();
        sample
    }

    /// Keeps a request until somebody serves. False if too many are kept already.
    pub fn hold(&mut self, arrival: Arrival, now_us: u64) -> bool {
        let room = self.held.len() < self.hold.requests_max;
        if room {
            self.held.push_back((now_us.saturating_add(micros(self.hold.seconds_max)), arrival));
        }
        room
    }

    /// When the first request that is kept has waited too long; [`u64::MAX`] for never.
    pub fn hold_ends_us(&self) -> u64 {
        self.held.front().map_or(u64::MAX, |&(ends_us, _)| ends_us)
    }

    /// The next one that has.
    pub fn held_too_long(&mut self, now_us: u64) -> Option<Arrival> {
        if self.hold_ends_us() > now_us {
            return None;
        }
        self.held.pop_front().map(|(_, arrival)| arrival)
    }

    /// All that are kept, in order.
    pub fn release(&mut self) -> Vec<Arrival> {
        self.held.drain(..).map(|(_, arrival)| arrival).collect()
    }

    /// Requests that were put back for lack of memory.
    pub fn preemptions(&self) -> u64 {
        self.preemptions + self.seats.iter().flatten().map(|seat| seat.engine.preemptions()).sum::<u64>()
    }

    /// What the pool has counted until `end_us`.
    pub fn into_pool(mut self, end_us: u64) -> Pool<'a> {
        self.pool.meter.upto(end_us);
        self.pool
    }
}

fn advance(seat: &mut Seat, place: usize, now_us: u64, dones: &mut Vec<(usize, Done)>) -> u64 {
    seat.engine.advance(now_us, &mut |done| dones.push((place, done)));
    seat.engine.next_us().unwrap_or(u64::MAX)
}

fn place_of(seats: &[Option<Seat>], id: u32) -> Option<usize> {
    seats.iter().position(|seat| seat.as_ref().is_some_and(|seat| seat.id == id))
}
