//! Carrying decisions out beside deciding: an actuator that is slow or fails holds up no decision, the newest order is the one
//! that counts, and the same order keeps its key however often it has to be tried.
//!
//! On the way down the gateway stops sending first, the requests end, and only then the replica is stopped. On the way up the
//! actuator is told at once, and the gateway sends when the replica serves.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use fleet::actuate::{Actual, ActuateError, Actuator, Spec};
use fleet::scale::ManualChange;
use futures_util::future::join_all;
use gateway::{Availability, Gateway};
use ledger::{Clock, Label, ScalingMode, Timestamp};
use tokio::sync::watch;

use super::Means;
use super::observe::whole;
use super::plan::Plan;
use super::roster;
use crate::declared::Declared;
use crate::facts::Facts;

/// Pauses between tries of an order: doubled from the first to the last.
const PAUSE: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// A change by somebody else is remembered for so long.
const MANUAL_US: u64 = 3_600_000_000;

/// What is to be told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// How many replicas there should be.
    pub replicas: u32,
    /// The same for every try.
    pub key: String,
}

/// How carrying out goes.
#[derive(Debug, Clone, Default)]
pub struct Carried {
    /// What was asked for last, by us or by others; `None` while nobody knows.
    pub asked: Option<u32>,
    /// What is under way.
    pub order: Option<Order>,
    /// Why the last try failed; `None` when it did not.
    pub failure: Option<String>,
    /// Why the actuator could not be read; `None` when it could, or cannot be.
    pub blind: Option<String>,
    /// Tries that failed.
    pub failures: u64,
    /// Orders that were carried out.
    pub done: u64,
    /// Replicas that finish what they have.
    pub draining: BTreeSet<usize>,
    /// Whether an order is being told at this moment.
    pub telling: bool,
    /// What the actuator last said, and when.
    pub actual: Option<(Timestamp, Actual)>,
    /// The last change by somebody else.
    pub manual: Option<ManualChange>,
}

/// What both loops work with.
pub struct Carrier {
    plan: Arc<Plan>,
    actuator: Actuator,
    gateway: Gateway,
    declared: Arc<Declared>,
    facts: Facts,
    clock: Arc<dyn Clock>,
    state: Mutex<Carried>,
    orders: watch::Sender<Option<Order>>,
    acts: bool,
}

impl Carrier {
    /// One for a deployment. Where it does not act it only reads.
    #[must_use]
    pub fn new(plan: Arc<Plan>, actuator: Actuator, means: &Means) -> Arc<Carrier> {
        let (orders, _) = watch::channel(None);
        Arc::new(Carrier {
            acts: plan.mode == ScalingMode::Act,
            plan,
            actuator,
            gateway: means.gateway.clone(),
            declared: Arc::clone(&means.declared),
            facts: means.facts.clone(),
            clock: Arc::clone(&means.clock),
            state: Mutex::default(),
            orders,
        })
    }

    /// How it goes.
    #[must_use]
    pub fn carried(&self) -> Carried {
        let mut carried = self.lock().clone();
        let now = self.clock.now();
        let respected_us = MANUAL_US.max(whole(self.plan.guards.manual_s * 1e6).unwrap_or(MANUAL_US));
        carried.manual = carried.manual.filter(|change| now.micros_since(change.at) < respected_us);
        carried
    }

    /// Asks for so many replicas, unless that is what was asked for last. Gives what is told now or is being told.
    pub fn ask(&self, replicas: u32, at: Timestamp) -> Option<u32> {
        let order = {
            let mut state = self.lock();
            match &state.order {
                Some(order) if order.replicas == replicas => return Some(replicas),
                None if state.asked == Some(replicas) => return None,
                _ => {}
            }
            let key = format!("{}/{}/{}/{replicas}", self.plan.id.pool, self.plan.id.name, at.micros());
            let order = Order { replicas, key };
            state.order = Some(order.clone());
            order
        };
        self.orders.send_replace(Some(order));
        Some(replicas)
    }

    /// Lets the gateway send to what serves and is to stay.
    pub fn offer(&self, roster: &roster::Roster) {
        let state = self.lock();
        roster::offer(&self.plan, &self.gateway, roster, &state.draining);
    }

    /// Drops what is under way: somebody pulled the switch. What was draining serves again.
    pub fn stop(&self) {
        let mut state = self.lock();
        // What is being told already is told to its end; who was to go may be gone.
        if !state.telling {
            state.draining.clear();
        }
        if state.order.take().is_some() {
            drop(state);
            self.orders.send_replace(None);
        }
    }

    /// Reads the actuator once.
    pub async fn read(&self) {
        let before = self.lock().done;
        let read = self.actuator.read().await;
        let now = self.clock.now();
        let asked = {
            let mut state = self.lock();
            let actual = match read {
                Ok(Some(actual)) => actual,
                Ok(None) => return,
                Err(error) => {
                    state.blind = Some(error.to_string());
                    return;
                }
            };
            state.blind = None;
            let asked = actual.replicas;
            state.actual = Some((now, actual));
            // What was read while we were telling may be older than what was told.
            if state.order.is_some() || state.done != before {
                return;
            }
            if self.acts && state.asked.is_some_and(|ours| ours != asked) {
                tracing::warn!(deployment = %self.plan.id.name, replicas = asked, "somebody else scaled; that is respected");
                state.manual = Some(ManualChange { at: now, replicas: asked });
            }
            state.asked = Some(asked);
            asked
        };
        if self.acts {
            roster::declare(&self.plan, &self.declared, &self.facts, asked, now);
        }
    }

    /// Reads the actuator again and again.
    pub async fn keep_reading(self: Arc<Carrier>, every: Duration) {
        loop {
            tokio::time::sleep(every).await;
            self.read().await;
        }
    }

    /// Carries orders out, the newest first and only that.
    pub async fn keep_carrying(self: Arc<Carrier>) {
        let mut orders = self.orders.subscribe();
        let mut pause = PAUSE;
        loop {
            let order = orders.borrow_and_update().clone();
            let Some(order) = order else {
                if orders.changed().await.is_err() {
                    return;
                }
                continue;
            };
            let drained = tokio::select! {
                biased;
                () = self.drain(order.replicas) => true,
                // A newer order: what drains for the old one may be wanted again.
                _ = superseded(&mut orders, &order) => false,
            };
            // Told to its end: of what was broken off nobody would know whether it was done.
            let outcome = if drained && self.still_wanted(&order) { Some(self.carry(&order).await) } else { None };
            self.lock().telling = false;
            match outcome {
                None => pause = PAUSE,
                Some(Ok(())) => {
                    pause = PAUSE;
                    self.finished(&order);
                    if orders.changed().await.is_err() {
                        return;
                    }
                }
                Some(Err(ActuateError::Overtaken { replicas, .. })) => {
                    pause = PAUSE;
                    self.overtaken(replicas);
                    if orders.changed().await.is_err() {
                        return;
                    }
                }
                Some(Err(error)) => {
                    let error = error.to_string();
                    tracing::warn!(deployment = %self.plan.id.name, "the actuator was not told of {} replicas: {error}", order.replicas);
                    {
                        let mut state = self.lock();
                        state.failure = Some(error);
                        state.failures += 1;
                    }
                    tokio::select! {
                        () = tokio::time::sleep(pause) => {}
                        _ = orders.changed() => {}
                    }
                    pause = (2 * pause).min(PAUSE_MAX);
                }
            }
        }
    }

    async fn carry(&self, order: &Order) -> Result<(), ActuateError> {
        self.actuator.tell(order.replicas, &order.key).await?;
        // Where nobody is told, whoever acts on the metrics says through the API what becomes of GPUs. KEDA does as it reads.
        if self.plan.actuator == Spec::None {
            return Ok(());
        }
        let now = self.clock.now();
        roster::declare(&self.plan, &self.declared, &self.facts, order.replicas, now);
        for replica in self.plan.replicas.iter().skip(index(order.replicas)) {
            if let Some(upstream) = &replica.upstream {
                self.gateway.set_available(upstream, Availability::Away);
            }
        }
        Ok(())
    }

    /// Whether nobody has taken the order back; from here on it is being told.
    fn still_wanted(&self, order: &Order) -> bool {
        let mut state = self.lock();
        state.telling = state.order.as_ref() == Some(order);
        state.telling
    }

    /// Waits until the replicas beyond the first so many have nothing left to do, as long as they may take.
    async fn drain(&self, replicas: u32) {
        let roster = roster::roster(&self.plan, &self.declared, None, self.clock.now());
        let going: Vec<usize> = (index(replicas)..self.plan.replicas.len()).filter(|&at| roster.running[at]).collect();
        let upstreams: Vec<Label> = {
            // Under the lock, so that no offer made from an older look says that they serve.
            let mut state = self.lock();
            state.draining = going.iter().copied().collect();
            let own = going.iter().filter_map(|&at| self.plan.replicas[at].upstream.clone());
            let service = self.plan.service.clone().filter(|_| replicas == 0 && !going.is_empty());
            let upstreams: Vec<Label> = own.chain(service).collect();
            for upstream in &upstreams {
                self.gateway.set_available(upstream, Availability::Draining);
            }
            upstreams
        };
        let drained = join_all(upstreams.iter().map(|upstream| self.gateway.drained(upstream)));
        if tokio::time::timeout(self.plan.drain, drained).await.is_err() {
            tracing::warn!(deployment = %self.plan.id.name, "requests did not end within drain_ms_max; their replica is stopped");
        }
    }

    fn finished(&self, order: &Order) {
        let mut state = self.lock();
        state.draining.clear();
        state.failure = None;
        state.done += 1;
        state.asked = Some(order.replicas);
        state.manual = None;
        // What was said before is about replicas as they were.
        state.actual = None;
        if state.order.as_ref() == Some(order) {
            state.order = None;
        }
    }

    /// Somebody else scaled after we last looked: their number stands.
    fn overtaken(&self, replicas: u32) {
        let now = self.clock.now();
        tracing::warn!(deployment = %self.plan.id.name, replicas, "somebody else scaled meanwhile; that is respected");
        {
            let mut state = self.lock();
            (state.order, state.failure, state.asked) = (None, None, Some(replicas));
            state.draining.clear();
            state.done += 1;
            state.manual = Some(ManualChange { at: now, replicas });
        }
        roster::declare(&self.plan, &self.declared, &self.facts, replicas, now);
    }

    fn lock(&self) -> MutexGuard<'_, Carried> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Resolves when another order has come.
async fn superseded(orders: &mut watch::Receiver<Option<Order>>, order: &Order) {
    // Nobody can send any more: then nothing else comes either.
    if orders.wait_for(|newest| newest.as_ref() != Some(order)).await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn index(replicas: u32) -> usize {
    usize::try_from(replicas).unwrap_or(usize::MAX)
}
