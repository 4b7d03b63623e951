//! Who decides in a simulation: what is seen, the policy behind its guards, and what of it is kept.

use ledger::Timestamp;

use super::demand::MINUTE_US;
use super::failure::Outage;
use super::meter::Counts;
use super::outcome::Logged;
use super::plan::{Log, Plan};
use super::pool::Role;
use super::recent::Recent;
use super::startup::micros;
use crate::scale::{self, Bounds, ManualChange, Observation, Past, Pending, Sample};

/// Decisions that are kept at most.
const LOGGED_MAX: usize = 100_000;
/// How long a change by hand is told to policies, microseconds.
const MANUAL_SHOWN_US: u64 = 3_600_000_000;

/// The scaler of one pool.
pub(crate) struct Decider<'a> {
    /// Mean load of each minute of the whole trace.
    pub minutes: Vec<f32>,
    /// Judged decisions, and those of them that changed the number of replicas.
    pub decisions: u64,
    pub changes: u64,
    /// When the direction turned, in the judged time.
    pub reversals_us: Vec<u64>,
    pub log: Vec<Logged>,
    pub log_dropped: u64,
    plan: &'a Plan,
    role: Role,
    bounds: Bounds,
    start: Timestamp,
    judge_from_us: u64,
    samples: Recent<Sample>,
    past: Recent<Past>,
    history: Vec<f32>,
    /// Minutes of the trace that are in the history.
    learnt: usize,
    manual: Option<(u64, ManualChange)>,
    rising: Option<bool>,
    guards_before: Vec<&'static str>,
}

impl<'a> Decider<'a> {
    pub fn new(plan: &'a Plan, role: Role, bounds: Bounds, start: Timestamp, minutes: Vec<f32>) -> Decider<'a> {
        Decider {
            minutes,
            decisions: 0,
            changes: 0,
            reversals_us: Vec::new(),
            log: Vec::new(),
            log_dropped: 0,
            plan,
            role,
            bounds,
            start,
            judge_from_us: micros(plan.judge_from_s),
            samples: Recent::default(),
            past: Recent::default(),
            history: plan.history.to_vec(),
            learnt: 0,
            manual: None,
            rising: None,
            guards_before: Vec::new(),
        }
    }

    /// The moment that a time of the simulation is.
    pub fn at(&self, at_us: u64) -> Timestamp {
        self.start.plus_micros(i64::try_from(at_us).unwrap_or(i64::MAX))
    }

    /// Somebody else has set the number of replicas.
    pub fn by_hand(&mut self, now_us: u64, replicas: u32) {
        self.manual = Some((now_us, ManualChange { at: self.at(now_us), replicas }));
    }

    /// How many replicas there should be, pending ones included. `reading` is what the engines said since the last time.
    pub fn decide(&mut self, now_us: u64, counts: Counts, pending: &[Pending], reading: Sample) -> u32 {
        let at = self.at(now_us);
        let unread = Sample { at, ready: counts.ready, pending: counts.pending, ..Sample::default() };
        match self.plan.faults.outage(now_us) {
            None => self.samples.push(now_us, Sample { at, ready: counts.ready, pending: counts.pending, ..reading }),
            Some(Outage::Blank) => self.samples.push(now_us, unread),
            Some(Outage::Frozen) => {}
        }
        self.samples.forget(now_us);
        self.past.forget(now_us);
        self.learn(now_us);
        let verdict = self.judge(now_us, counts, pending);
        let desired = verdict.decision.replicas;
        self.keep(now_us, counts, reading.load, &verdict);
        self.count(now_us, desired, counts.ready + counts.pending);
        self.past.push(now_us, Past { at, wanted: verdict.wanted, desired });
        desired
    }

    fn judge(&self, now_us: u64, counts: Counts, pending: &[Pending]) -> scale::Verdict {
        let minute = usize::try_from(now_us / MINUTE_US).unwrap_or(usize::MAX);
        let before_us = i64::try_from(self.plan.history.len() as u64 * MINUTE_US).unwrap_or(i64::MAX);
        let shown = |&(at_us, _): &(u64, ManualChange)| now_us.saturating_sub(at_us) < MANUAL_SHOWN_US;
        let observation = Observation {
            samples: self.samples.slice(),
            history: &self.history,
            history_start: self.start.plus_micros(-before_us),
            future: self.minutes.get(minute..).unwrap_or_default(),
            ready: counts.ready,
            pending,
            draining: counts.draining,
            decisions: self.past.slice(),
            manual: self.manual.filter(shown).map(|(_, change)| change),
            objective: self.plan.objective,
            bounds: self.bounds,
        };
        scale::judge(&observation, &self.plan.policy, &self.plan.guards, self.at(now_us))
    }

    fn count(&mut self, now_us: u64, desired: u32, before: u32) {
        let judged = now_us >= self.judge_from_us;
        self.decisions += u64::from(judged);
        self.changes += u64::from(judged && desired != before);
        let Some(last) = self.past.slice().last().map(|past| past.desired) else { return };
        if desired == last {
            return;
        }
        let rising = desired > last;
        if judged && self.rising.is_some_and(|before| before != rising) {
            self.reversals_us.push(now_us);
        }
        self.rising = Some(rising);
    }

    fn keep(&mut self, now_us: u64, counts: Counts, load: Option<f64>, verdict: &scale::Verdict) {
        let decision = &verdict.decision;
        let new_guards = decision.guards != self.guards_before;
        let wanted = match self.plan.log {
            Log::None => false,
            Log::Changes => decision.replicas != counts.ready + counts.pending || new_guards,
            Log::All => true,
        };
        if new_guards {
            self.guards_before.clone_from(&decision.guards);
        }
        if !wanted {
            return;
        }
        if self.log.len() >= LOGGED_MAX {
            self.log_dropped += 1;
            return;
        }
        self.log.push(Logged {
            at: self.at(now_us),
            role: self.role,
            wanted: verdict.wanted,
            desired: decision.replicas,
            ready: counts.ready,
            pending: counts.pending,
            load,
            forecast: decision.forecast,
            reasons: decision.reasons.clone(),
            guards: decision.guards.clone(),
        });
    }

    /// Adds the minutes that are over to the history; unknown where nothing could be seen.
    fn learn(&mut self, now_us: u64) {
        let complete = usize::try_from(now_us / MINUTE_US).unwrap_or(usize::MAX).min(self.minutes.len());
        while self.learnt < complete {
            let minute_us = self.learnt as u64 * MINUTE_US;
            let faults = &self.plan.faults;
            let dark = faults.outage(minute_us).or_else(|| faults.outage(minute_us + MINUTE_US - 1));
            self.history.push(if dark.is_some() { f32::NAN } else { self.minutes[self.learnt] });
            self.learnt += 1;
        }
    }
}
