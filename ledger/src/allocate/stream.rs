//! Settlement of a long stretch in one pass: requests in, in the order of their schedule; each minute's amounts out.
//!
//! One replica with one engine and everything known of it from timelines, which is what a month of a pool mostly consists
//! of. The same sweep and the same split as [`pool`](super::pool) uses: each minute is an origin of its own and its
//! amounts add up to `gpus x rate x 60 s` to the picodollar. Nothing but the requests that run at once and one minute's
//! amounts is kept.

use super::books::weight;
use super::replica::Replica;
use super::sweep::{Belongs, Part, Sweep};
use super::timeline::{EngineTimeline, Limits};
use crate::money::{GpuHourRate, Money, MoneyError};
use crate::time::{Period, Timestamp};

/// The length of an origin in microseconds.
const MINUTE_US: i64 = 60_000_000;

/// Whose an amount is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Whose {
    /// The request with this number of the caller's.
    Request(u64),
    /// Nobody's: computed again after preemptions.
    Waste,
    /// Nobody's: no request was there.
    Idle,
}

/// One amount of one minute.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Owed {
    /// Whose it is. A request has at most one amount in a minute.
    pub whose: Whose,
    /// Start of the minute.
    pub minute: Timestamp,
    /// Seconds of the replica.
    pub seconds: f64,
    /// What they cost.
    pub amount: Money,
}

/// What a stretch came to.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Totals {
    /// Minutes settled.
    pub minutes: u64,
    /// All amounts together: what the replica cost.
    pub cost: Money,
    /// Seconds in which a request was in the batch.
    pub busy_s: f64,
    /// Preemptions that the cache's size made necessary.
    pub preemptions: u64,
    /// The most requests that were held at once.
    pub held_max: usize,
}

/// A settlement on its way through time.
#[derive(Debug, Clone)]
pub struct Stream {
    sweep: Sweep,
    gpus: u32,
    rate: GpuHourRate,
    minute: Period,
    /// What the open minute's requests used so far, and what a minute is divided with; kept for their memory.
    parts: Vec<(u64, f64)>,
    waste_s: f64,
    weights: Vec<u64>,
    totals: Totals,
}

impl Stream {
    /// A replica of `gpus` GPUs at `rate`, paid for from `start`, where nothing runs. Minutes are those of the clock: the
    /// first one ends at the next full minute.
    #[must_use]
    pub fn new(replica: Replica, limits: Limits, gpus: u32, rate: GpuHourRate, start: Timestamp) -> Stream {
        Stream::of(Sweep::new(replica, limits, start), gpus, rate, start)
    }

    /// The same with a sweep that begins at `start` and has its own rules (speculation, tenants, adapters).
    #[must_use]
    pub fn of(sweep: Sweep, gpus: u32, rate: GpuHourRate, start: Timestamp) -> Stream {
        let before = start.micros().div_euclid(MINUTE_US);
        let end = Timestamp::from_micros(before.saturating_add(1).saturating_mul(MINUTE_US));
        Stream {
            sweep,
            gpus,
            rate,
            minute: Period { start, end },
            parts: Vec::new(),
            waste_s: 0.0,
            weights: Vec::new(),
            totals: Totals::default(),
        }
    }

    /// Takes the next request; requests come in the order of `scheduled`. Every minute that ends before it comes out.
    ///
    /// # Errors
    /// [`MoneyError`] when the amounts leave the range of the ledger.
    pub fn push(&mut self, tag: u64, timeline: &EngineTimeline, out: &mut impl FnMut(Owed)) -> Result<(), MoneyError> {
        self.push_of(tag, timeline, Belongs::default(), out)
    }

    /// Takes the next request, of a tenant or with an adapter.
    ///
    /// # Errors
    /// [`MoneyError`] when the amounts leave the range of the ledger.
    pub fn push_of(
        &mut self,
        tag: u64,
        timeline: &EngineTimeline,
        of: Belongs,
        out: &mut impl FnMut(Owed),
    ) -> Result<(), MoneyError> {
        while timeline.scheduled.max(timeline.arrived) >= self.minute.end {
            self.settle(self.minute.end, out)?;
        }
        let Stream { sweep, parts, waste_s, .. } = self;
        sweep.push_of(tag, timeline, of, &mut |part| keep(parts, waste_s, part));
        Ok(())
    }

    /// Settles up to `until`, in the middle of a minute if need be. Requests that still run then owe the rest to nobody.
    ///
    /// # Errors
    /// [`MoneyError`] when the amounts leave the range of the ledger.
    pub fn finish(mut self, until: Timestamp, out: &mut impl FnMut(Owed)) -> Result<Totals, MoneyError> {
        while self.minute.end < until {
            self.settle(self.minute.end, out)?;
        }
        if self.minute.start < until {
            self.settle(until, out)?;
        }
        let (busy_s, preemptions) = (self.sweep.busy_s(), self.sweep.preemptions());
        Ok(Totals { busy_s, preemptions, ..self.totals })
    }

    /// Divides the open minute, which ends at `end`, and opens the next one.
    fn settle(&mut self, end: Timestamp, out: &mut impl FnMut(Owed)) -> Result<(), MoneyError> {
        let minute = Period { end, ..self.minute };
        self.totals.held_max = self.totals.held_max.max(self.sweep.active());
        let Stream { sweep, parts, waste_s, weights, .. } = self;
        sweep.cut(end, &mut |part| keep(parts, waste_s, part));
        let used_s = parts.iter().map(|(_, seconds)| seconds).sum::<f64>() + *waste_s;
        let idle_s = (minute.micros() as f64 * 1e-6 - used_s).max(0.0);
        weights.clear();
        weights.extend(parts.iter().map(|(_, seconds)| weight(*seconds)));
        weights.extend([weight(*waste_s), weight(idle_s)]);
        let cost = self.rate.over(self.gpus, minute.micros());
        let lines = [(Whose::Waste, *waste_s), (Whose::Idle, idle_s)];
        let whose = parts.iter().map(|&(tag, seconds)| (Whose::Request(tag), seconds)).chain(lines);
        for ((whose, seconds), amount) in whose.zip(cost.split(weights)?) {
            if seconds > 0.0 || amount != Money::ZERO {
                out(Owed { whose, minute: minute.start, seconds, amount });
            }
        }
        self.totals.minutes += 1;
        self.totals.cost += cost;
        self.parts.clear();
        self.waste_s = 0.0;
        self.minute = Period { start: end, end: end.plus_micros(MINUTE_US) };
        Ok(())
    }
}

/// A request leaves the sweep or is cut once in a minute, so that each part is the whole of what it owes there.
fn keep(parts: &mut Vec<(u64, f64)>, waste_s: &mut f64, part: Part) {
    *waste_s += part.waste_s;
    parts.push((part.tag, part.share.total_s()));
}

#[cfg(test)]
#[path = "stream_tests.rs"]
mod tests;
