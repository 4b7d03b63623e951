//! A part of a trace, with more or fewer requests than it has.

use super::{Feed, TraceError};
use crate::sim::demand::index;
use crate::sim::random::Random;
use crate::sim::request::Arrival;

/// What is drawn for each request's copies has a sequence of its own.
const COPIES: u64 = 5;

/// A feed between two times, times counted from the first, requests numbered anew.
#[derive(Debug)]
pub(super) struct Adapted {
    feed: Feed,
    from_us: u64,
    to_us: u64,
    next_id: u64,
    copies: Option<Copies>,
}

/// Copies of a request come one after the other until the next request does, so that no burst is made.
#[derive(Debug)]
struct Copies {
    scale: f64,
    random: Random,
    of: Arrival,
    left: u64,
    gap_us: u64,
    ahead: Option<Arrival>,
}

impl Adapted {
    /// A feed that is scaled already.
    pub fn plain(feed: Feed, from_us: u64, to_us: u64) -> Adapted {
        Adapted { feed, from_us, to_us, next_id: 0, copies: None }
    }

    pub fn scaled(feed: Feed, from_us: u64, to_us: u64, scale: f64, seed: u64) -> Adapted {
        let random = Random::of(seed, COPIES, 0);
        let copies = Copies { scale, random, of: Arrival::default(), left: 0, gap_us: 0, ahead: None };
        Adapted { copies: (scale != 1.0).then_some(copies), ..Adapted::plain(feed, from_us, to_us) }
    }

    pub fn next(&mut self) -> Option<Result<Arrival, TraceError>> {
        let arrival = if self.copies.is_some() { self.copy() } else { self.inside() };
        let arrival = match arrival? {
            Ok(arrival) => arrival,
            Err(error) => return Some(Err(error)),
        };
        let id = self.next_id;
        self.next_id += 1;
        Some(Ok(Arrival { id, at_us: arrival.at_us - self.from_us, ..arrival }))
    }

    fn inside(&mut self) -> Option<Result<Arrival, TraceError>> {
        loop {
            let arrival = match self.feed.next()? {
                Ok(arrival) => arrival,
                Err(error) => return Some(Err(error)),
            };
            if arrival.at_us >= self.to_us {
                return None;
            }
            if arrival.at_us >= self.from_us {
                return Some(Ok(arrival));
            }
        }
    }

    fn copy(&mut self) -> Option<Result<Arrival, TraceError>> {
        loop {
            let copies = self.copies.as_mut()?;
            if copies.left > 0 {
                let arrival = copies.of;
                copies.left -= 1;
                copies.of.at_us += copies.gap_us;
                return Some(Ok(arrival));
            }
            let current = match copies.ahead.take().map_or_else(|| self.inside(), |arrival| Some(Ok(arrival)))? {
                Ok(arrival) => arrival,
                Err(error) => return Some(Err(error)),
            };
            let ahead = match self.inside() {
                Some(Ok(arrival)) => Some(arrival),
                Some(Err(error)) => return Some(Err(error)),
                None => None,
            };
            let copies = self.copies.as_mut()?;
            let count = index(copies.scale + copies.random.unit()) as u64;
            let until_us = ahead.map_or(current.at_us, |next| next.at_us);
            copies.gap_us = (until_us - current.at_us) / count.max(1);
            (copies.of, copies.left, copies.ahead) = (current, count, ahead);
        }
    }
}
