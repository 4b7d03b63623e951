//! One deployment from look to look: observe, decide, write down, and hand over what is to be told.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use fleet::actuate::Wanted;
use fleet::scale::shadow::imagined;
use fleet::scale::{Observation, Past, Sample, judge};
use fleet::sim::capacity::{Capacity, Work};
use gateway::Demand;
use ledger::{Fact, GpuHourRate, Label, ScalingDecision, ScalingMode, Timestamp};
use tokio::sync::mpsc;

use super::Means;
use super::carry::{Carried, Carrier};
use super::history::{self, HOUR_US, History};
use super::observe::{Eye, Heard, Looked, Seen, Usual, inputs};
use super::plan::Plan;
use super::roster::{self, Roster};
use super::shown::{Board, Shown};
use super::switch::{Switch, Why};
use crate::wiring::Shutdown;

/// How often the gateway is told which replicas serve, and a request that waits for the first of them is noticed.
const OFFER_EVERY: Duration = Duration::from_millis(250);
/// How long to wait until what a replica can do is worked out again, after it failed.
const AGAIN: Duration = Duration::from_secs(60);
/// How often what a replica can do is worked out again: its constants are fitted while it runs, and the mix of requests moves.
const REWORKED_EVERY: Duration = Duration::from_secs(3_600);
/// The configuration's usual request counts as so many that were seen.
const SUPPOSED: f64 = 10.0;

/// What a deployment's task works with.
#[derive(Clone)]
pub struct Parts {
    /// What all of scaling works with.
    pub means: Means,
    /// The kill switch.
    pub switch: Switch,
    /// What people are shown.
    pub board: Board,
    /// What KEDA reads, where it does the scaling.
    pub keda: Option<Wanted>,
}

/// A deployment that is scaled.
pub struct Scaled {
    plan: Arc<Plan>,
    parts: Parts,
    carrier: Arc<Carrier>,
    eye: Eye,
    capacity: Capacity,
    history: History,
    samples: Vec<Sample>,
    decisions: Vec<Past>,
    looked_us: Option<u64>,
}

impl Scaled {
    /// Reads what is known from before and works out what a replica can do.
    ///
    /// # Errors
    /// When the ledger cannot be read, or nothing says what a replica can do.
    pub async fn new(plan: Arc<Plan>, parts: Parts, carrier: Arc<Carrier>) -> anyhow::Result<Scaled> {
        let session = parts.means.store.session().await?;
        let mix = history::mix(&session, &plan.id).await.context("the requests so far")?;
        let (input, output) = plan.usual();
        let usual = match mix.len() {
            0 => Usual::of(SUPPOSED, f64::from(input), f64::from(output)),
            seen => {
                let seen = f64::from(u32::try_from(seen)?);
                let sum = |of: fn(&(u32, u32)) -> u32| mix.iter().map(|pair| f64::from(of(pair))).sum::<f64>();
                Usual::of(seen, sum(|pair| pair.0) / seen, sum(|pair| pair.1) / seen)
            }
        };
        let capacity = match reach(&plan, &parts, mix).await {
            Ok(capacity) => capacity,
            Err(error) => {
                // Requests of late that no replica serves in time are no reason to serve none.
                tracing::warn!(deployment = %plan.id.name, "a usual request is taken for what a replica can do: {error:#}");
                reach(&plan, &parts, Vec::new()).await?
            }
        };
        let now = parts.means.clock.now();
        let history = history::load(&session, &plan.id, &capacity.work, now).await.context("the load so far")?;
        let (decisions, _) = history::decisions(&session, &plan.id, now).await.context("the decisions so far")?;
        let fresh = u64::try_from(plan.fresh.as_micros()).unwrap_or(u64::MAX);
        let eye = Eye::new(capacity.work, plan.objective, fresh, usual);
        Ok(Scaled { eye, capacity, history, decisions, samples: Vec::new(), looked_us: None, plan, parts, carrier })
    }

    /// Decides every few seconds until told to stop, and at once for a request that waits for the first replica.
    async fn run(mut self, shutdown: &Shutdown) {
        let mut deciding = tokio::time::interval(self.plan.every);
        let mut offering = tokio::time::interval(OFFER_EVERY.min(self.plan.every));
        for interval in [&mut deciding, &mut offering] {
            interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        }
        let mut woken = false;
        let (reworked, mut fresh) = mpsc::channel(1);
        let reworking = tokio::spawn(rework(Arc::clone(&self.plan), self.parts.clone(), reworked));
        loop {
            tokio::select! {
                () = shutdown.requested() => break,
                Some(capacity) = fresh.recv() => self.take(capacity),
                _ = deciding.tick() => self.decide(),
                _ = offering.tick() => {
                    // The first request that waits is decided about at once; if the answer is no, the next look is due in its time.
                    let waits = self.offer();
                    if waits && !woken {
                        self.decide();
                        deciding.reset();
                    }
                    woken = waits;
                }
            }
        }
        reworking.abort();
    }

    /// Takes what a replica can do as it is now known; what was known in replicas before is so many of the new ones.
    fn take(&mut self, capacity: Capacity) {
        let (input, output) = self.eye.usual.tokens().unwrap_or((1.0, 1.0));
        let of = |work: &Work| work.per_input_token * input + work.per_output_token * output;
        self.history.scale(of(&capacity.work) / of(&self.eye.work));
        self.eye.work = capacity.work;
        self.capacity = capacity;
    }

    /// Whether decisions are carried out now, and if not though they were to be, why.
    fn mode(&self) -> (ScalingMode, Option<Why>) {
        match (self.plan.mode, self.parts.switch.stopped(&self.plan.id)) {
            (ScalingMode::Act, Some(why)) => (ScalingMode::Stopped, Some(why)),
            (mode, why) => (mode, why),
        }
    }

    /// Lets the gateway send to what serves. Says whether somebody waits while nothing is on its way.
    fn offer(&self) -> bool {
        if self.plan.mode != ScalingMode::Act {
            return false;
        }
        let (mode, _) = self.mode();
        if mode == ScalingMode::Stopped {
            // The switch holds at once, not from the next decision on.
            self.carrier.stop();
            self.parts.keda.iter().for_each(|keda| keda.forget(&self.plan.id.pool, &self.plan.id.name));
        }
        let now = self.parts.means.clock.now();
        let carried = self.carrier.carried();
        let roster = self.roster(&carried, now);
        roster::declare_ready(&self.plan, &self.parts.means.declared, &roster, now);
        self.carrier.offer(&roster);
        let held = self.demand().held;
        self.parts.keda.iter().for_each(|keda| keda.hold(&self.plan.id.pool, &self.plan.id.name, held.into()));
        mode == ScalingMode::Act
            && held > 0
            && roster.ready() == 0
            && roster.pending.is_empty()
            && carried.order.is_none()
    }

    /// The price of a GPU as the pool's replicas are booked now; the configuration's while there is none.
    fn rate(&self) -> GpuHourRate {
        let gpus = self.parts.means.declared.replicas();
        gpus.iter().find(|fact| fact.pool == self.plan.id.pool).map_or(self.plan.rate, |fact| fact.rate)
    }

    fn demand(&self) -> Demand {
        self.parts.means.gateway.demand().remove(&self.plan.id).unwrap_or_default()
    }

    fn roster(&self, carried: &Carried, now: Timestamp) -> Roster {
        let fresh = u64::try_from(self.plan.fresh.as_micros()).unwrap_or(u64::MAX);
        let actual = carried.actual.as_ref().filter(|(at, _)| now.micros_since(*at) <= fresh).map(|(_, actual)| actual);
        let mut roster = roster::roster(&self.plan, &self.parts.means.declared, actual, now);
        roster.without_silent(|index| {
            let replica = self.plan.replicas.get(index).filter(|replica| replica.metrics)?;
            let reading = self.parts.means.telemetry.reading(replica.upstream.as_ref()?)?;
            (now.micros_since(reading.at) > fresh).then_some(reading.at)
        });
        roster
    }

    /// What the engines that serve last said.
    fn heard(&self, roster: &Roster) -> Vec<Heard> {
        let reading = |upstream: &Label| Heard {
            engine: upstream.clone(),
            reading: self.parts.means.telemetry.reading(upstream),
        };
        match &self.plan.service {
            Some(service) => vec![reading(service)],
            None => {
                let ready = self.plan.replicas.iter().zip(&roster.ready).filter(|(_, ready)| **ready);
                ready.filter_map(|(replica, _)| replica.upstream.as_ref()).map(reading).collect()
            }
        }
    }

    fn look(&mut self, roster: &Roster, now: Timestamp) -> Looked {
        let heard = self.heard(roster);
        let demand = self.demand();
        let monotonic_us = self.parts.means.clock.monotonic_us();
        let looked = self.eye.look(&Seen {
            now,
            monotonic_us,
            ready: roster.ready(),
            pending: u32::try_from(roster.pending.len()).unwrap_or(u32::MAX),
            demand: &demand,
            engines: &heard,
            behind_one_service: self.plan.service.is_some() && self.plan.bounds.ceiling > 1,
        });
        let since = self.looked_us.replace(monotonic_us);
        if let Some(since) = since {
            let seconds = super::observe::number(monotonic_us.saturating_sub(since)) * 1e-6;
            self.history.see(now, looked.sample.load, seconds);
        }
        let hour = now.plus_micros(-HOUR_US);
        self.samples.retain(|sample| sample.at >= hour && sample.at < now);
        self.decisions.retain(|past| past.at >= hour && past.at < now);
        self.samples.push(looked.sample);
        looked
    }

    /// One decision: seen, decided, handed over, written down, shown.
    fn decide(&mut self) {
        let now = self.parts.means.clock.now();
        let (mode, why) = self.mode();
        if mode == ScalingMode::Stopped {
            self.carrier.stop();
        }
        let carried = self.carrier.carried();
        let mut roster = self.roster(&carried, now);
        roster.without(&carried.draining);
        let looked = self.look(&roster, now);
        let bounds = self.plan.bounds(&self.capacity);
        // In shadow the next step starts from what the steps before would have led to, not from the static plan.
        let imagined = match mode {
            ScalingMode::Shadow => imagined(&self.decisions, bounds.cold_start_s, now),
            ScalingMode::Act | ScalingMode::Stopped => None,
        };
        if let (Some(fleet), Some(newest)) = (&imagined, self.samples.last_mut()) {
            *newest = fleet.look(newest);
        }
        let (ready, pending) = imagined
            .as_ref()
            .map_or((roster.ready(), roster.pending.as_slice()), |fleet| (fleet.ready, fleet.pending.as_slice()));
        let observation = Observation {
            samples: &self.samples,
            history: &self.history.bins,
            history_start: self.history.start,
            future: &[],
            ready,
            pending,
            draining: u32::try_from(carried.draining.len()).unwrap_or(u32::MAX),
            decisions: &self.decisions,
            manual: carried.manual,
            objective: self.plan.objective,
            bounds,
        };
        let verdict = judge(&observation, &self.plan.policy, &self.plan.guards, now);
        let decided = verdict.decision;
        self.decisions.push(Past { at: now, wanted: verdict.wanted, desired: decided.replicas });
        let told = if mode == ScalingMode::Act { self.carrier.ask(decided.replicas, now) } else { None };
        if let Some(keda) = &self.parts.keda {
            let (pool, name) = (&self.plan.id.pool, &self.plan.id.name);
            match mode {
                ScalingMode::Act => {
                    // Who is to go drains first: until then KEDA keeps what there was.
                    let after = self.carrier.carried();
                    let before = after.order.and(after.asked).unwrap_or(decided.replicas);
                    keda.tell(pool, name, decided.replicas.max(before), now);
                }
                ScalingMode::Stopped | ScalingMode::Shadow => keda.forget(pool, name),
            }
        }
        let decision = ScalingDecision {
            pool: self.plan.id.pool.clone(),
            deployment: self.plan.id.name.clone(),
            at: now,
            mode,
            policy: self.plan.policy.to_string().into(),
            ready: roster.ready(),
            pending: u32::try_from(roster.pending.len()).unwrap_or(u32::MAX),
            wanted: verdict.wanted,
            desired: decided.replicas,
            told,
            static_replicas: self.plan.bounds.static_replicas,
            committed: self.plan.bounds.committed,
            gpus: self.plan.gpus,
            rate: self.rate(),
            reasons: decided.reasons,
            guards: decided.guards.into_iter().map(Into::into).collect(),
            inputs: inputs(&looked, decided.forecast),
            failure: carried.failure.clone().or_else(|| carried.blind.clone()),
        };
        if let Err(error) = self.parts.means.facts.append(&[Fact::Decision(Box::new(decision.clone()))]) {
            tracing::error!(deployment = %self.plan.id.name, "a scaling decision could not be written: {error}");
        }
        self.parts.board.decided(&self.plan.id, Shown::of(&self.plan, &self.capacity, &carried, &decision, why));
    }
}

/// While nothing can be decided: the floor is asked for, and the gateway sends to what serves.
async fn offer_meanwhile(plan: &Arc<Plan>, parts: &Parts, carrier: &Arc<Carrier>) {
    if plan.mode != ScalingMode::Act || parts.switch.stopped(&plan.id).is_some() {
        return tokio::time::sleep(AGAIN).await;
    }
    let means = &parts.means;
    let carried = carrier.carried();
    let asked = carried.asked.unwrap_or(0).max(plan.bounds.floor).max(1).min(plan.bounds.ceiling);
    carrier.ask(asked, means.clock.now());
    let until = tokio::time::Instant::now() + AGAIN;
    while tokio::time::Instant::now() < until {
        let actual = carrier.carried().actual;
        let now = means.clock.now();
        carrier.offer(&roster::roster(plan, &means.declared, actual.as_ref().map(|(_, actual)| actual), now));
        tokio::time::sleep(OFFER_EVERY).await;
    }
}

/// What a replica can do with such requests, by the constants that are in force.
async fn reach(plan: &Arc<Plan>, parts: &Parts, mix: Vec<(u32, u32)>) -> anyhow::Result<Capacity> {
    let own = |upstream: &Label| plan.replicas.iter().any(|one| one.upstream.as_ref() == Some(upstream));
    let engines = parts.means.declared.engines();
    let fitted = engines.into_iter().find(|(fact, _)| own(&fact.engine) || plan.service.as_ref() == Some(&fact.engine));
    let constants = fitted.and_then(|(fact, _)| fact.setup.constants);
    let planned = Arc::clone(plan);
    tokio::task::spawn_blocking(move || planned.reach(&mix, constants)).await?
}

/// Works out again and again what a replica can do.
async fn rework(plan: Arc<Plan>, parts: Parts, reworked: mpsc::Sender<Capacity>) {
    loop {
        tokio::time::sleep(REWORKED_EVERY).await;
        let again = async {
            let session = parts.means.store.session().await?;
            let mix = history::mix(&session, &plan.id).await?;
            reach(&plan, &parts, mix).await
        };
        match again.await {
            Ok(capacity) => {
                if reworked.send(capacity).await.is_err() {
                    return;
                }
            }
            Err(error) => {
                tracing::warn!(deployment = %plan.id.name, "what a replica can do stays as it was: {error:#}")
            }
        }
    }
}

/// Scales one deployment until told to stop. What cannot begin is shown and tried again.
pub async fn keep(plan: Arc<Plan>, parts: Parts, carrier: Arc<Carrier>, shutdown: Shutdown) {
    loop {
        match Scaled::new(Arc::clone(&plan), parts.clone(), Arc::clone(&carrier)).await {
            Ok(scaled) => return scaled.run(&shutdown).await,
            Err(error) => {
                tracing::warn!(deployment = %plan.id.name, "it is not scaled yet: {error:#}");
                parts.board.not_yet(&plan, &format!("{error:#}"));
            }
        }
        tokio::select! {
            () = shutdown.requested() => return,
            () = offer_meanwhile(&plan, &parts, &carrier) => {}
        }
    }
}
