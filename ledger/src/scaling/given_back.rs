//! What a scaler gave back: the GPUs that ran held against the static plan, and in shadow what it would have kept running.
//!
//! All three are sums over the same time, the time that decisions cover: from each to the next. What the static plan costs is
//! what ran plus what was given back, to the picodollar, and the same for every mode by itself. GPUs that are committed cost
//! the same whether they run or not, so that only what lies above the commitment is ever saved.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::{ScalingDecision, ScalingMode};
use crate::capacity::{self, CapacityFact};
use crate::context::Label;
use crate::money::{GpuHourRate, Money};
use crate::time::{Period, Timestamp};

/// A decision covers the time to the next one, but never more than this: a server that was away decided nothing.
const SILENCE_US_MAX: u64 = 300_000_000;

/// What of a decision matters to the sum.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Decided {
    /// The pool that pays.
    pub pool: Label,
    /// What is scaled.
    pub deployment: Label,
    /// When.
    pub at: Timestamp,
    /// Whether it was carried out.
    pub mode: ScalingMode,
    /// Replicas that were there or on their way.
    pub provisioned: u32,
    /// Replicas that should have been.
    pub desired: u32,
    /// Replicas of the static plan.
    pub static_replicas: u32,
    /// Replicas that are paid for in any case.
    pub committed: u32,
    /// GPUs of one replica.
    pub gpus: u32,
    /// The price of one for an hour.
    pub rate: GpuHourRate,
}

impl From<&ScalingDecision> for Decided {
    fn from(decision: &ScalingDecision) -> Decided {
        Decided {
            pool: decision.pool.clone(),
            deployment: decision.deployment.clone(),
            at: decision.at,
            mode: decision.mode,
            provisioned: decision.ready.saturating_add(decision.pending),
            desired: decision.desired,
            static_replicas: decision.static_replicas,
            committed: decision.committed,
            gpus: decision.gpus,
            rate: decision.rate,
        }
    }
}

/// The sums of the time in which a deployment was scaled in one mode.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Part {
    /// The mode.
    pub mode: ScalingMode,
    /// The time, microseconds.
    pub micros: u64,
    /// What the static plan would have cost.
    pub static_cost: Money,
    /// What the GPUs that were there cost.
    pub actual_cost: Money,
    /// The static plan's cost less the actual; negative where more ran than the plan has.
    pub given_back: Money,
    /// What the desired replicas would have cost.
    pub desired_cost: Money,
    /// The actual cost less that: in shadow what acting would have saved beyond what was given back.
    pub would_save: Money,
    /// GPU time of the static plan, microseconds.
    pub static_gpu_us: u128,
    /// GPU time that was there, microseconds.
    pub actual_gpu_us: u128,
    /// Committed GPU time that did not run, microseconds: it saved no cash and was free for other work.
    pub freed_gpu_us: u128,
}

/// One deployment's sums.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct GivenBack {
    /// The pool that pays.
    pub pool: Label,
    /// What was scaled.
    pub deployment: Label,
    /// Decisions that were taken.
    pub decisions: u64,
    /// Whether no GPU of the deployment is known by name, so that what ran is what the scaler saw.
    pub estimated: bool,
    /// The sums of each mode that there was.
    pub parts: Vec<Part>,
}

impl GivenBack {
    /// The sum over all modes.
    pub fn sum(&self, of: impl Fn(&Part) -> Money) -> Money {
        self.parts.iter().map(of).sum()
    }

    /// The part of one mode.
    #[must_use]
    pub fn part(&self, mode: ScalingMode) -> Option<&Part> {
        self.parts.iter().find(|part| part.mode == mode)
    }
}

/// What was given back within `period`, for each deployment that was decided about, by pool and name. Decisions and facts may
/// come in any order and more than once.
#[must_use]
pub fn given_back(
    decisions: impl IntoIterator<Item = Decided>,
    capacity: &[CapacityFact],
    period: Period,
) -> Vec<GivenBack> {
    let mut deployments: BTreeMap<(Label, Label), BTreeMap<Timestamp, Decided>> = BTreeMap::new();
    for decided in decisions {
        let key = (decided.pool.clone(), decided.deployment.clone());
        deployments.entry(key).or_default().insert(decided.at, decided);
    }
    let facts = capacity::latest(capacity);
    deployments
        .into_iter()
        .map(|((pool, deployment), decided)| of_one(pool, deployment, decided, &facts, period))
        .collect()
}

fn of_one(
    pool: Label,
    deployment: Label,
    decided: BTreeMap<Timestamp, Decided>,
    facts: &[&CapacityFact],
    period: Period,
) -> GivenBack {
    // What is known of GPUs ends with the last look at them; beyond it nothing that is missing was given back.
    let seen = facts.iter().filter(|fact| fact.pool == pool).map(|fact| fact.observed_at.max(fact.period.end)).max();
    let own: Vec<&CapacityFact> = facts
        .iter()
        .filter(|fact| fact.pool == pool && fact.deployment.as_ref() == Some(&deployment))
        .copied()
        .collect();
    let estimated = own.is_empty();
    let known = Period {
        end: if estimated { period.end } else { seen.map_or(period.end, |seen| seen.min(period.end)) },
        ..period
    };
    let count = decided.len();
    let mut sums: BTreeMap<ScalingMode, Sums> = BTreeMap::new();
    let mut running = Running::new(&own);
    for (decided, covered) in covered(decided.into_values().collect()) {
        let Some(covered) = covered.intersect(known) else { continue };
        let sums = sums.entry(decided.mode).or_default();
        if estimated {
            let ran = BTreeMap::from([(decided.rate, u64::from(decided.provisioned) * u64::from(decided.gpus))]);
            sums.add(&decided, &ran, covered.micros());
            continue;
        }
        running.pieces(covered, |ran, micros| sums.add(&decided, ran, micros));
    }
    let parts = sums.into_iter().map(|(mode, sums)| sums.part(mode)).collect();
    GivenBack { pool, deployment, decisions: u64::try_from(count).unwrap_or(u64::MAX), estimated, parts }
}

/// Each decision with the time to the next. The last one's is as long as that before it, for nobody knows more.
fn covered(decided: Vec<Decided>) -> Vec<(Decided, Period)> {
    let starts: Vec<Timestamp> = decided.iter().map(|decided| decided.at).collect();
    let mut before = 0;
    let length = |index: usize| starts.get(index + 1).map(|next| next.micros_since(starts[index]).min(SILENCE_US_MAX));
    decided
        .into_iter()
        .enumerate()
        .map(|(index, decided)| {
            let micros = length(index).unwrap_or(before);
            before = micros;
            let period = Period { start: decided.at, end: decided.at.plus_micros(i64::try_from(micros).unwrap_or(0)) };
            (decided, period)
        })
        .collect()
}

/// Which GPUs ran at each moment, asked for times that only go forward.
struct Running<'a> {
    /// Starts and ends, in order: when, whether it is a start, and whose.
    events: Vec<(Timestamp, bool, usize)>,
    next: usize,
    facts: &'a [&'a CapacityFact],
    now: BTreeSet<usize>,
}

impl<'a> Running<'a> {
    fn new(facts: &'a [&'a CapacityFact]) -> Running<'a> {
        let mut events: Vec<(Timestamp, bool, usize)> = facts
            .iter()
            .enumerate()
            .filter(|(_, fact)| fact.period.start < fact.period.end)
            .flat_map(|(index, fact)| [(fact.period.start, true, index), (fact.period.end, false, index)])
            .collect();
        events.sort_unstable();
        Running { events, next: 0, facts, now: BTreeSet::new() }
    }

    /// Cuts a time where anything starts or ends, and tells what ran in each piece: GPUs by their price, and microseconds.
    fn pieces(&mut self, period: Period, mut tell: impl FnMut(&BTreeMap<GpuHourRate, u64>, u64)) {
        self.until(period.start);
        let mut at = period.start;
        while at < period.end {
            let end = self.events.get(self.next).map_or(period.end, |event| event.0.min(period.end));
            let mut ran: BTreeMap<GpuHourRate, u64> = BTreeMap::new();
            for &index in &self.now {
                let fact = self.facts[index];
                *ran.entry(fact.rate).or_default() += u64::from(fact.gpus);
            }
            tell(&ran, end.micros_since(at));
            at = end;
            self.until(at);
        }
    }

    fn until(&mut self, at: Timestamp) {
        while let Some(&(when, starts, index)) = self.events.get(self.next)
            && when <= at
        {
            if starts {
                self.now.insert(index);
            } else {
                self.now.remove(&index);
            }
            self.next += 1;
        }
    }
}

/// GPU time by price, so that each sum is rounded once for each price and not once for each decision.
#[derive(Default)]
struct Sums {
    micros: u64,
    planned: Times,
    actual: Times,
    desired: Times,
    static_gpu_us: u128,
    actual_gpu_us: u128,
    freed_gpu_us: u128,
}

#[derive(Default)]
struct Times(BTreeMap<GpuHourRate, u128>);

impl Times {
    fn add(&mut self, rate: GpuHourRate, gpus: u64, micros: u64) {
        *self.0.entry(rate).or_default() += u128::from(gpus) * u128::from(micros);
    }

    fn cost(&self) -> Money {
        self.0.iter().map(|(rate, &time)| rate.over(1, u64::try_from(time).unwrap_or(u64::MAX))).sum()
    }
}

impl Sums {
    fn add(&mut self, decided: &Decided, ran: &BTreeMap<GpuHourRate, u64>, micros: u64) {
        let gpus = |replicas: u32| u64::from(replicas) * u64::from(decided.gpus);
        let committed = gpus(decided.committed);
        let running: u64 = ran.values().sum();
        let freed = committed.saturating_sub(running);
        self.micros += micros;
        self.planned.add(decided.rate, gpus(decided.static_replicas).max(committed), micros);
        self.desired.add(decided.rate, gpus(decided.desired).max(committed), micros);
        for (&rate, &gpus) in ran {
            self.actual.add(rate, gpus, micros);
        }
        self.actual.add(decided.rate, freed, micros);
        self.static_gpu_us += u128::from(gpus(decided.static_replicas)) * u128::from(micros);
        self.actual_gpu_us += u128::from(running) * u128::from(micros);
        // What stands reserved is paid for and in the books; what nothing ran on was free for other work all the same.
        let used = running.min(gpus(decided.provisioned));
        self.freed_gpu_us += u128::from(committed.saturating_sub(used)) * u128::from(micros);
    }

    fn part(self, mode: ScalingMode) -> Part {
        let (static_cost, actual_cost, desired_cost) = (self.planned.cost(), self.actual.cost(), self.desired.cost());
        Part {
            mode,
            micros: self.micros,
            static_cost,
            actual_cost,
            given_back: static_cost - actual_cost,
            desired_cost,
            would_save: actual_cost - desired_cost,
            static_gpu_us: self.static_gpu_us,
            actual_gpu_us: self.actual_gpu_us,
            freed_gpu_us: self.freed_gpu_us,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_micros(seconds * 1_000_000)
    }

    fn decided(seconds: i64, desired: u32) -> Decided {
        Decided {
            pool: "shared".into(),
            deployment: "chat".into(),
            at: at(seconds),
            mode: ScalingMode::Act,
            provisioned: 4,
            desired,
            static_replicas: 4,
            committed: 0,
            gpus: 2,
            rate: "3.60".parse().unwrap(),
        }
    }

    fn capacity(replica: &str, start: i64, end: i64) -> CapacityFact {
        CapacityFact {
            pool: "shared".into(),
            replica: replica.into(),
            deployment: Some("chat".into()),
            gpus: 2,
            rate: "3.60".parse().unwrap(),
            period: Period { start: at(start), end: at(end) },
            observed_at: at(end),
            ..CapacityFact::default()
        }
    }

    fn usd(text: &str) -> Money {
        text.parse().unwrap()
    }

    #[test]
    fn what_was_stopped_is_given_back() {
        // 2 GPUs at 3.60 USD are 0.002 USD a second.
        let decisions = [0, 100, 200].map(|second| decided(second, 1));
        let facts = [capacity("a", -50, 400), capacity("b", 0, 100), capacity("other", 0, 400)];
        let mut facts = facts.to_vec();
        facts[2].deployment = Some("batch".into());
        let found = given_back(decisions, &facts, Period { start: at(0), end: at(1_000) });
        let [one] = found.as_slice() else { panic!("{found:?}") };
        let part = one.part(ScalingMode::Act).unwrap();
        assert_eq!((part.micros, one.decisions, one.estimated), (300_000_000, 3, false));
        assert_eq!((part.static_cost, part.actual_cost, part.given_back), (usd("2.4"), usd("0.8"), usd("1.6")));
        assert_eq!((part.desired_cost, part.would_save), (usd("0.6"), usd("0.2")));
    }

    #[test]
    fn committed_gpus_save_no_cash() {
        let decisions = [0, 100].map(|second| Decided { committed: 3, ..decided(second, 0) });
        let facts = [capacity("a", 0, 100), capacity("gone", -10, 0), capacity("late", 190, 200)];
        let found = given_back(decisions, &facts, Period::ALL);
        let part = found[0].part(ScalingMode::Act).unwrap();
        assert_eq!((part.static_cost, part.actual_cost, part.given_back), (usd("1.6"), usd("1.2"), usd("0.4")));
        assert_eq!(part.freed_gpu_us, 400_000_000 + 540_000_000 + 40_000_000);
    }

    #[test]
    fn silence_and_what_nobody_looked_at_cover_nothing() {
        let decisions = [decided(0, 4), decided(5_000, 4), decided(5_100, 4)];
        let mut facts = [capacity("a", 0, 5_150)];
        facts[0].observed_at = at(5_150);
        let found = given_back(decisions, &facts, Period::ALL);
        assert_eq!(
            found[0].parts[0].micros,
            300_000_000 + 100_000_000 + 50_000_000,
            "five minutes, a step, half a step"
        );
    }

    #[test]
    fn without_named_gpus_the_scaler_is_believed_and_says_so() {
        let found = given_back([0, 10].map(|second| decided(second, 1)), &[], Period::ALL);
        assert!(found[0].estimated);
        assert_eq!(found[0].parts[0].given_back, Money::ZERO);
        assert_eq!(found[0].parts[0].would_save, usd("0.12"));
    }

    prop_compose! {
        fn any_decided()(second in 0i64..2_000, mode in 0usize..3, ready in 0u32..6, desired in 0u32..6, planned in 0u32..6,
                         committed in 0u32..4, gpus in 1u32..9, rate in 1u64..9_000_000_000_000) -> Decided {
            Decided {
                mode: ScalingMode::ALL[mode], provisioned: ready, static_replicas: planned, committed, gpus,
                rate: GpuHourRate::from_pico(rate), ..decided(second, desired)
            }
        }
    }

    prop_compose! {
        fn any_capacity()(replica in 0u8..4, start in -100i64..2_000, length in 0i64..900, gpus in 0u32..9,
                          rate in 1u64..9_000_000_000_000) -> CapacityFact {
            CapacityFact {
                gpus, rate: GpuHourRate::from_pico(rate), ..capacity(&replica.to_string(), start, start + length)
            }
        }
    }

    proptest! {
        #[test]
        fn sums_close_and_equal_a_slow_count(
            decisions in prop::collection::vec(any_decided(), 0..30), facts in prop::collection::vec(any_capacity(), 0..12),
        ) {
            let found = given_back(decisions.clone(), &facts, Period::ALL);
            let mut turned = decisions.clone();
            turned.reverse();
            let mut twice = facts.clone();
            twice.reverse();
            twice.extend(facts.clone());
            for one in &found {
                prop_assert_eq!(one.sum(|part| part.static_cost), one.sum(|part| part.actual_cost) + one.sum(|part| part.given_back));
                prop_assert_eq!(one.sum(|part| part.actual_cost), one.sum(|part| part.desired_cost) + one.sum(|part| part.would_save));
                let mut seconds = 0;
                let mut gpu_seconds = 0u128;
                let unique: BTreeMap<Timestamp, &Decided> = decisions.iter().map(|one| (one.at, one)).collect();
                let starts: Vec<Timestamp> = unique.keys().copied().collect();
                let kept = capacity::latest(&facts);
                let seen = kept.iter().map(|fact| fact.observed_at).max();
                for second in 0..5_000 {
                    let Some(index) = starts.iter().rposition(|start| *start <= at(second)) else { continue };
                    let step = |index: usize| starts.get(index + 1).map(|next| next.micros_since(starts[index]).min(SILENCE_US_MAX));
                    let length = step(index).or_else(|| index.checked_sub(1).and_then(step)).unwrap_or(0);
                    let since = at(second).micros_since(starts[index]);
                    if since >= length || seen.is_some_and(|seen| at(second) >= seen) {
                        continue;
                    }
                    seconds += 1;
                    let ran = kept.iter().filter(|fact| fact.period.contains(at(second))).map(|fact| u128::from(fact.gpus));
                    gpu_seconds += if kept.is_empty() {
                        let one = unique[&starts[index]];
                        u128::from(one.provisioned * one.gpus)
                    } else {
                        ran.sum::<u128>()
                    };
                }
                prop_assert_eq!(one.parts.iter().map(|part| part.micros).sum::<u64>(), seconds * 1_000_000);
                prop_assert_eq!(one.parts.iter().map(|part| part.actual_gpu_us).sum::<u128>(), gpu_seconds * 1_000_000);
            }
            if unique_times(&decisions) {
                prop_assert_eq!(given_back(turned, &twice, Period::ALL), found);
            }
        }
    }

    fn unique_times(decisions: &[Decided]) -> bool {
        decisions.iter().map(|one| one.at).collect::<BTreeSet<_>>().len() == decisions.len()
    }
}
