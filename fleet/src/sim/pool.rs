//! The replicas of one deployment: how they come, serve, fail and go. Both modes of the simulator run this very code; only
//! where the readings come from differs.

use ledger::Timestamp;
use serde::Serialize;

use super::decider::Decider;
use super::failure::Fate;
use super::meter::{Counts, Meter};
use super::plan::Plan;
use super::random::Random;
use super::startup::micros;
use crate::scale::{Bounds, Objective, Pending, Sample};

/// What is drawn for replicas has sequences of its own.
const FATE: u64 = 1;
const LIFETIME: u64 = 2;
const PLACE: u64 = 3;
const NOTICE: u64 = 4;

/// What the replicas of a pool do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Everything.
    #[default]
    Both,
    /// Prompts only.
    Prefill,
    /// Answers only.
    Decode,
}

/// What happened to a replica that has an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Happening {
    /// It serves from now on.
    Ready(u32),
    /// What it had is lost; it starts again in its place.
    Crashed(u32),
    /// It takes nothing new. Say [`Pool::gone`] once it is empty.
    Draining(u32),
    /// It is gone, with whatever it still had.
    Lost(u32),
}

#[derive(Debug, Clone, Copy)]
struct Replica {
    id: u32,
    /// When it was asked for, or crashed last.
    since_us: u64,
    phase: Phase,
    /// What a restart in place takes, microseconds.
    restart_us: u64,
    crashes: u32,
    spot: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// There is no place for it until then.
    Unplaced { until_us: u64, fate: Fate },
    /// Its node is there at `node_us`, and it serves at `ready_us`.
    Starting { node_us: u64, ready_us: u64 },
    /// It crashes then, or is told then that its node is taken away.
    Ready { crash_us: u64, notice_us: u64 },
    /// Gone by then at the latest.
    Draining { until_us: u64 },
}

impl Phase {
    fn next_us(self) -> u64 {
        match self {
            Phase::Unplaced { until_us, .. } | Phase::Draining { until_us } => until_us,
            Phase::Starting { ready_us, .. } => ready_us,
            Phase::Ready { crash_us, notice_us } => crash_us.min(notice_us),
        }
    }

    fn is_pending(self) -> bool {
        matches!(self, Phase::Unplaced { .. } | Phase::Starting { .. })
    }
}

/// Something that the plan has at a fixed time.
#[derive(Debug, Clone, Copy)]
enum Planned {
    Manual(u32),
    Crash(u32),
}

/// What was counted in the whole run.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Tally {
    pub starts: u64,
    pub crashes: u64,
    pub cancelled: u64,
    pub unscheduled: u64,
    pub taken_away: u64,
}

pub(crate) struct Pool<'a> {
    pub role: Role,
    pub decider: Decider<'a>,
    pub meter: Meter,
    pub tally: Tally,
    plan: &'a Plan,
    replicas: Vec<Replica>,
    next_id: u32,
    /// How long a replica drains when nobody says that it is gone; nothing for ever.
    drain_us: Option<u64>,
    planned: Vec<(u64, Planned)>,
    next_us: u64,
}

impl<'a> Pool<'a> {
    /// A pool whose load is `minutes`, with its first replicas serving at once.
    pub fn new(
        plan: &'a Plan,
        role: Role,
        bounds: Bounds,
        start: Timestamp,
        minutes: Vec<f32>,
        end_us: u64,
    ) -> Pool<'a> {
        let faults = &plan.faults;
        let by_hand = faults.manual.iter().map(|&(at_s, replicas)| (micros(at_s), Planned::Manual(replicas)));
        let crashes = faults.crashes.iter().map(|&(at_s, count)| (micros(at_s), Planned::Crash(count)));
        let mut planned: Vec<(u64, Planned)> = by_hand.chain(crashes).collect();
        // Latest first: the next one is taken from the end.
        planned.sort_by_key(|&(at_us, _)| std::cmp::Reverse(at_us));
        let mut pool = Pool {
            role,
            decider: Decider::new(plan, role, bounds, start, minutes),
            meter: Meter::new(end_us, plan.judge_from_s, bounds.committed),
            tally: Tally::default(),
            plan,
            replicas: Vec::new(),
            next_id: 0,
            drain_us: None,
            planned,
            next_us: u64::MAX,
        };
        for _ in 0..plan.initial.unwrap_or(bounds.static_replicas) {
            let id = pool.take_id();
            let phase = pool.serving(id, 0, 0);
            pool.replicas.push(Replica { id, since_us: 0, phase, restart_us: 0, crashes: 0, spot: pool.on_spot(id) });
        }
        pool.changed(0);
        pool
    }

    /// Lets replicas drain for a fixed time instead of waiting for [`Pool::gone`].
    pub fn drains_for(mut self, seconds: f64) -> Pool<'a> {
        self.drain_us = Some(micros(seconds));
        self
    }

    /// Replicas that serve, in order of their numbers.
    pub fn ready_ids(&self) -> impl Iterator<Item = u32> + '_ {
        self.replicas.iter().filter(|replica| matches!(replica.phase, Phase::Ready { .. })).map(|replica| replica.id)
    }

    /// When something happens by itself next; [`u64::MAX`] for never.
    pub fn next_us(&self) -> u64 {
        self.next_us
    }

    /// What users were promised.
    pub fn objective(&self) -> &Objective {
        &self.plan.objective
    }

    /// How many replicas serve.
    pub fn ready(&self) -> u32 {
        self.count().ready
    }

    /// Lets everything happen that is due. `work` is what a replica has to do, to choose which ones go.
    pub fn upto(&mut self, now_us: u64, work: &dyn Fn(u32) -> u64, happenings: &mut Vec<Happening>) {
        while self.next_us <= now_us {
            let at_us = self.next_us;
            self.replicas_upto(at_us, happenings);
            while self.planned.last().is_some_and(|&(due_us, _)| due_us <= at_us) {
                match self.planned.pop() {
                    Some((_, Planned::Manual(replicas))) => self.by_hand(at_us, replicas, work, happenings),
                    Some((_, Planned::Crash(count))) => self.crash_some(at_us, count, happenings),
                    None => {}
                }
            }
            self.changed(at_us);
        }
    }

    /// A drained replica is empty.
    pub fn gone(&mut self, id: u32, now_us: u64) {
        self.replicas.retain(|replica| replica.id != id);
        self.changed(now_us);
    }

    /// Looks, asks the policy, and starts or stops replicas accordingly. `reading` is what the engines said since the look
    /// before; who it is from and when is filled in by the decider.
    pub fn decide(&mut self, now_us: u64, reading: Sample, work: &dyn Fn(u32) -> u64, happenings: &mut Vec<Happening>) {
        let counts = self.count();
        let pending = self.pending(now_us);
        let desired = self.decider.decide(now_us, counts, &pending, reading);
        if desired != counts.ready + counts.pending {
            self.apply(now_us, desired, work, happenings);
            self.changed(now_us);
        }
    }

    fn pending(&self, now_us: u64) -> Vec<Pending> {
        let mut pending: Vec<Pending> = self
            .replicas
            .iter()
            .filter(|replica| replica.phase.is_pending())
            .map(|replica| {
                let placed = matches!(replica.phase, Phase::Starting { node_us, .. } if node_us <= now_us);
                Pending { since: self.decider.at(replica.since_us), scheduled: Some(placed) }
            })
            .collect();
        pending.sort_by_key(|pending| pending.since);
        pending
    }

    fn by_hand(&mut self, now_us: u64, replicas: u32, work: &dyn Fn(u32) -> u64, happenings: &mut Vec<Happening>) {
        self.decider.by_hand(now_us, replicas);
        self.apply(now_us, replicas, work, happenings);
    }

    /// Starts or stops replicas until `desired` are there or on their way.
    fn apply(&mut self, now_us: u64, desired: u32, work: &dyn Fn(u32) -> u64, happenings: &mut Vec<Happening>) {
        let counts = self.count();
        let before = counts.ready + counts.pending;
        for _ in before..desired {
            self.begin(now_us);
        }
        for id in self.least_needed(before.saturating_sub(desired), work) {
            let Some(at) = self.replicas.iter().position(|replica| replica.id == id) else { continue };
            if self.replicas[at].phase.is_pending() {
                self.replicas.remove(at);
                self.tally.cancelled += 1;
            } else {
                let until_us = self.drain_us.map_or(u64::MAX, |drain_us| now_us.saturating_add(drain_us));
                self.replicas[at].phase = Phase::Draining { until_us };
                happenings.push(Happening::Draining(id));
            }
        }
    }

    /// Those without a place first, the oldest of them first; then those that start, the newest first; then those with the
    /// least to do, the newest first.
    fn least_needed(&self, count: u32, work: &dyn Fn(u32) -> u64) -> Vec<u32> {
        if count == 0 {
            return Vec::new();
        }
        let mut order: Vec<(u8, u64, u64, u32)> = self
            .replicas
            .iter()
            .filter_map(|replica| {
                let newest_first = u64::from(u32::MAX - replica.id);
                match replica.phase {
                    Phase::Unplaced { .. } => Some((0, replica.since_us, 0, replica.id)),
                    Phase::Starting { .. } => Some((1, newest_first, 0, replica.id)),
                    Phase::Ready { .. } => Some((2, work(replica.id), newest_first, replica.id)),
                    Phase::Draining { .. } => None,
                }
            })
            .collect();
        order.sort_unstable();
        order.into_iter().take(count as usize).map(|(.., id)| id).collect()
    }

    fn begin(&mut self, now_us: u64) {
        let id = self.take_id();
        let mut random = Random::of(self.plan.seed, FATE + 8 * self.role as u64, u64::from(id));
        let fate = self.plan.failures.fate(&self.plan.startup, &self.plan.faults, now_us, &mut random);
        let phase = if fate.waits {
            self.tally.unscheduled += 1;
            Phase::Unplaced { until_us: fate.placeable_us, fate }
        } else {
            starting(now_us, &fate)
        };
        self.tally.starts += 1;
        self.replicas.push(Replica {
            id,
            since_us: now_us,
            phase,
            restart_us: fate.start.engine_us,
            crashes: 0,
            spot: self.on_spot(id),
        });
    }

    fn replicas_upto(&mut self, now_us: u64, happenings: &mut Vec<Happening>) {
        self.replicas.retain(|replica| {
            let over = matches!(replica.phase, Phase::Draining { until_us } if until_us <= now_us);
            if over {
                happenings.push(Happening::Lost(replica.id));
            }
            !over
        });
        for index in 0..self.replicas.len() {
            let replica = self.replicas[index];
            match replica.phase {
                Phase::Unplaced { until_us, fate } if until_us <= now_us => {
                    self.replicas[index].phase = starting(now_us, &fate);
                }
                Phase::Starting { ready_us, .. } if ready_us <= now_us => {
                    self.replicas[index].phase = self.serving(replica.id, replica.crashes, now_us);
                    happenings.push(Happening::Ready(replica.id));
                }
                Phase::Ready { crash_us, .. } if crash_us <= now_us => self.crash(index, now_us, happenings),
                Phase::Ready { notice_us, .. } if notice_us <= now_us => {
                    let notice_s = self.plan.failures.spot.map_or(0.0, |spot| spot.notice_s);
                    let until_us = now_us.saturating_add(micros(notice_s).max(1));
                    self.replicas[index].phase = Phase::Draining { until_us };
                    self.tally.taken_away += 1;
                    happenings.push(Happening::Draining(replica.id));
                }
                _ => {}
            }
        }
    }

    fn crash_some(&mut self, now_us: u64, count: u32, happenings: &mut Vec<Happening>) {
        let mut left = count;
        for index in 0..self.replicas.len() {
            if left > 0 && matches!(self.replicas[index].phase, Phase::Ready { .. }) {
                self.crash(index, now_us, happenings);
                left -= 1;
            }
        }
    }

    /// A crashed engine starts again where it was: node and image are there.
    fn crash(&mut self, index: usize, now_us: u64, happenings: &mut Vec<Happening>) {
        let usual_us = micros(self.plan.startup.weights.usual_s() + self.plan.startup.warmup.usual_s());
        let replica = &mut self.replicas[index];
        let restart_us = if replica.restart_us > 0 { replica.restart_us } else { usual_us };
        replica.since_us = now_us;
        replica.crashes += 1;
        replica.phase = Phase::Starting { node_us: now_us, ready_us: now_us.saturating_add(restart_us) };
        self.tally.crashes += 1;
        happenings.push(Happening::Crashed(replica.id));
    }

    fn serving(&self, id: u32, crashes: u32, now_us: u64) -> Phase {
        let life = u64::from(id) << 32 | u64::from(crashes);
        let mut random = Random::of(self.plan.seed, LIFETIME + 8 * self.role as u64, life);
        let lifetime_us = self.plan.failures.lifetime_us(&mut random);
        let crash_us = lifetime_us.map_or(u64::MAX, |us| now_us.saturating_add(us.max(1)));
        let mut random = Random::of(self.plan.seed, NOTICE + 8 * self.role as u64, life);
        let spot = self.plan.failures.spot.filter(|_| self.on_spot(id));
        let notice_us = spot.map_or(u64::MAX, |spot| now_us.saturating_add(spot.lifetime_us(&mut random).max(1)));
        Phase::Ready { crash_us, notice_us }
    }

    fn on_spot(&self, id: u32) -> bool {
        let mut random = Random::of(self.plan.seed, PLACE + 8 * self.role as u64, u64::from(id));
        self.plan.failures.spot.is_some_and(|spot| random.unit() < spot.share)
    }

    fn take_id(&mut self) -> u32 {
        self.next_id += 1;
        self.next_id - 1
    }

    fn changed(&mut self, now_us: u64) {
        let counts = self.count();
        self.meter.set(now_us, counts);
        let replicas = self.replicas.iter().map(|replica| replica.phase.next_us());
        let planned = self.planned.last().map(|&(at_us, _)| at_us);
        self.next_us = replicas.chain(planned).min().unwrap_or(u64::MAX);
    }

    fn count(&self) -> Counts {
        let mut counts = Counts::default();
        for replica in &self.replicas {
            match replica.phase {
                Phase::Unplaced { .. } | Phase::Starting { .. } => counts.pending += 1,
                Phase::Ready { .. } => counts.ready += 1,
                Phase::Draining { .. } => counts.draining += 1,
            }
            let paid = !matches!(replica.phase, Phase::Unplaced { .. });
            counts.paid += u32::from(paid);
            counts.spot += u32::from(paid && replica.spot);
        }
        counts
    }
}

fn starting(now_us: u64, fate: &Fate) -> Phase {
    let node_us = now_us.saturating_add(fate.start.node_us);
    let ready_us = node_us.saturating_add(fate.start.image_us).saturating_add(fate.start.engine_us);
    Phase::Starting { node_us, ready_us }
}
