//! Which upstreams take requests now, and what each of them and each deployment has to do: written by whoever scales
//! them, read on the request path without a lock.
//!
//! It is kept by name beside the settings, so that reading the configuration again forgets none of it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

use arc_swap::ArcSwap;
use ledger::Label;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use crate::demand::{Demand, Tally};
use crate::settings::Upstream;

/// Whether an upstream may be sent anything new.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Availability {
    /// It takes requests.
    #[default]
    Serving,
    /// It finishes what it has.
    Draining,
    /// It is not there.
    Away,
}

/// What is scaled: upstreams of one pool that serve the same thing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Deployment {
    /// The pool that pays for it. Empty for an upstream that belongs to none.
    pub pool: Label,
    /// Its name on the pool. The upstream's own name where it has none.
    pub name: Label,
}

impl Deployment {
    /// The deployment that an upstream is a replica of.
    #[must_use]
    pub fn of(upstream: &Upstream) -> Deployment {
        Deployment {
            pool: upstream.pool.clone().unwrap_or_default(),
            name: upstream.deployment.clone().unwrap_or_else(|| Arc::clone(&upstream.name)),
        }
    }
}

/// What a plan may know of an upstream.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Look {
    /// Whether it takes requests.
    pub availability: Availability,
    /// Attempts at it that have not ended.
    pub in_flight: u32,
    /// Whether it refused a connection a moment ago: others come first, lest all requests go where the fewest are because nobody
    /// is there.
    pub doubtful: bool,
}

/// How long a refused connection makes others come first, microseconds. Then one request tries.
const DOUBT_US: u64 = 2_000_000;

/// Everything that is known at run time of upstreams and deployments.
#[derive(Debug, Default)]
pub(crate) struct Board {
    upstreams: ArcSwap<HashMap<Label, Arc<Replica>>>,
    deployments: ArcSwap<HashMap<Deployment, Arc<Group>>>,
    /// Told whenever an upstream's availability changed.
    changed: Notify,
    /// Whether nothing is worth waiting for any more.
    closed: AtomicBool,
}

/// One upstream as it is now.
#[derive(Debug, Default)]
pub(crate) struct Replica {
    availability: AtomicU8,
    entered: AtomicU64,
    in_flight: AtomicU32,
    /// Until when others come first, on the monotonic clock.
    doubted_until_us: AtomicU64,
    /// Whether anybody ever said that it comes or goes.
    comes_and_goes: AtomicBool,
    idle: Notify,
    pub tally: Tally,
}

/// One deployment as it is now.
#[derive(Debug, Default)]
pub(crate) struct Group {
    arrived: AtomicU64,
    held: AtomicU32,
    in_flight: AtomicU32,
    pub tally: Tally,
}

/// An attempt's place at its upstream. It leaves when this is dropped.
#[derive(Debug)]
pub(crate) struct Seat {
    replica: Arc<Replica>,
    group: Arc<Group>,
}

/// A waiting request's place at the deployment it wants. It leaves when this is dropped.
#[derive(Debug)]
pub(crate) struct Held {
    group: Arc<Group>,
}

impl Board {
    pub fn look(&self, upstream: &Upstream, now_us: u64) -> Look {
        let upstreams = self.upstreams.load();
        upstreams.get(&upstream.name).map_or_else(Look::default, |replica| replica.look(now_us))
    }

    /// The upstream refused a connection.
    pub fn refused(&self, upstream: &Upstream, now_us: u64) {
        let replica = self.replica(&upstream.name);
        replica.doubted_until_us.store(now_us.saturating_add(DOUBT_US), Ordering::Relaxed);
    }

    /// It answered.
    pub fn answered(&self, upstream: &Upstream) {
        let upstreams = self.upstreams.load();
        let doubted = upstreams.get(&upstream.name).map(|replica| &replica.doubted_until_us);
        if let Some(doubted) = doubted.filter(|doubted| doubted.load(Ordering::Relaxed) > 0) {
            doubted.store(0, Ordering::Relaxed);
        }
    }

    /// Takes a place at an upstream, unless it takes nothing new.
    ///
    /// First counted, then looked at: whoever drains first says so and then counts. Either they see this attempt or it sees them.
    pub fn enter(&self, upstream: &Upstream) -> Option<Seat> {
        let replica = self.replica(&upstream.name);
        let group = self.group(&Deployment::of(upstream));
        replica.in_flight.fetch_add(1, Ordering::SeqCst);
        group.in_flight.fetch_add(1, Ordering::Relaxed);
        let seat = Seat { replica, group };
        if seat.replica.availability() != Availability::Serving {
            return None;
        }
        seat.replica.entered.fetch_add(1, Ordering::Relaxed);
        Some(seat)
    }

    /// A request that wants this deployment was planned for the first time.
    pub fn arrived(&self, deployment: &Deployment) {
        self.group(deployment).arrived.fetch_add(1, Ordering::Relaxed);
    }

    /// Takes a place among those that wait for this deployment, unless `most` do so already.
    pub fn hold(&self, deployment: &Deployment, most: u32) -> Option<Held> {
        let group = self.group(deployment);
        let up = |held: u32| held.checked_add(1).filter(|&held| held <= most);
        group.held.try_update(Ordering::Relaxed, Ordering::Relaxed, up).ok()?;
        Some(Held { group })
    }

    /// Where those that wait learn that it is worth planning again.
    pub fn changed(&self) -> &Notify {
        &self.changed
    }

    /// Whether the upstream was ever said to come or go: then it may be going when it breaks off.
    pub fn comes_and_goes(&self, upstream: &Upstream) -> bool {
        let upstreams = self.upstreams.load();
        upstreams.get(&upstream.name).is_some_and(|replica| replica.comes_and_goes.load(Ordering::Relaxed))
    }

    pub fn set(&self, upstream: &str, availability: Availability) {
        let replica = self.replica(&upstream.into());
        replica.comes_and_goes.store(true, Ordering::Relaxed);
        let before = replica.availability.swap(availability.number(), Ordering::SeqCst);
        if before != availability.number() {
            // What was so before says nothing about what comes now.
            replica.doubted_until_us.store(0, Ordering::Relaxed);
            self.changed.notify_waiters();
        }
    }

    /// The gateway stops: nobody waits any longer.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
        self.changed.notify_waiters();
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    pub fn available(&self, upstream: &str) -> Availability {
        self.upstreams.load().get(upstream).map_or_else(Availability::default, |replica| replica.availability())
    }

    pub fn in_flight(&self, upstream: &str) -> u32 {
        self.upstreams.load().get(upstream).map_or(0, |replica| replica.in_flight.load(Ordering::SeqCst))
    }

    /// Resolves when no attempt is at the upstream.
    pub async fn drained(&self, upstream: &str) {
        let replica = self.replica(&upstream.into());
        loop {
            let idle = replica.idle.notified();
            if replica.in_flight.load(Ordering::SeqCst) == 0 {
                return;
            }
            idle.await;
        }
    }

    pub fn held(&self) -> BTreeMap<Deployment, u32> {
        let deployments = self.deployments.load();
        let held = deployments.iter().map(|(name, group)| (name.clone(), group.held.load(Ordering::Relaxed)));
        held.filter(|&(_, held)| held > 0).collect()
    }

    pub fn demand(&self) -> BTreeMap<Deployment, Demand> {
        let deployments = self.deployments.load();
        let look = |group: &Group| Demand {
            arrived: group.arrived.load(Ordering::Relaxed),
            held: group.held.load(Ordering::Relaxed),
            in_flight: group.in_flight.load(Ordering::Relaxed),
            ..group.tally.read()
        };
        deployments.iter().map(|(name, group)| (name.clone(), look(group))).collect()
    }

    pub fn served(&self) -> BTreeMap<Label, Demand> {
        let upstreams = self.upstreams.load();
        let look = |replica: &Replica| Demand {
            arrived: replica.entered.load(Ordering::Relaxed),
            in_flight: replica.in_flight.load(Ordering::SeqCst),
            ..replica.tally.read()
        };
        upstreams.iter().map(|(name, replica)| (Arc::clone(name), look(replica))).collect()
    }

    fn replica(&self, name: &Label) -> Arc<Replica> {
        found_or_made(&self.upstreams, name)
    }

    fn group(&self, deployment: &Deployment) -> Arc<Group> {
        found_or_made(&self.deployments, deployment)
    }
}

/// What is kept under a name. Only the first that asks for a name pays for making it.
fn found_or_made<K, V>(kept: &ArcSwap<HashMap<K, Arc<V>>>, name: &K) -> Arc<V>
where
    K: Clone + Eq + std::hash::Hash,
    V: Default,
{
    if let Some(found) = kept.load().get(name) {
        return Arc::clone(found);
    }
    let made = Arc::new(V::default());
    kept.rcu(|kept| {
        let mut kept = HashMap::clone(kept);
        kept.entry(name.clone()).or_insert_with(|| Arc::clone(&made));
        kept
    });
    // Somebody else may have been first; who is in the map counts.
    kept.load().get(name).map_or(made, Arc::clone)
}

impl Availability {
    const fn number(self) -> u8 {
        match self {
            Availability::Serving => 0,
            Availability::Draining => 1,
            Availability::Away => 2,
        }
    }
}

impl Replica {
    fn availability(&self) -> Availability {
        match self.availability.load(Ordering::SeqCst) {
            0 => Availability::Serving,
            1 => Availability::Draining,
            _ => Availability::Away,
        }
    }

    fn look(&self, now_us: u64) -> Look {
        Look {
            availability: self.availability(),
            in_flight: self.in_flight.load(Ordering::Relaxed),
            doubtful: self.doubted_until_us.load(Ordering::Relaxed) > now_us,
        }
    }
}

impl Seat {
    /// The first token of a streamed answer came, so long after the request.
    pub fn first_token(&self, after_us: u64) {
        self.replica.tally.first_token(after_us);
        self.group.tally.first_token(after_us);
    }

    /// Counts what an attempt came to, for its upstream and for its deployment.
    pub fn ended(&self, attempt: &ledger::Attempt) {
        self.replica.tally.add(attempt);
        self.group.tally.add(attempt);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.group.in_flight.fetch_sub(1, Ordering::Relaxed);
        if self.replica.in_flight.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.replica.idle.notify_waiters();
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.group.held.fetch_sub(1, Ordering::Relaxed);
    }
}
