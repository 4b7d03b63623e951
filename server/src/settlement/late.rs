//! Which minutes have to be settled again: those that a fact touched after they had been settled.
//!
//! Facts are noted right after they are appended, wherever that happens, and the driver moves the line between settled and
//! open *before* it takes its view of the ledger. So whatever a view does not hold is noted as late, and no fact is missed.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ledger::settle::{INTERVAL_US, interval_of};
use ledger::{Fact, Label, Period, Timestamp};

/// Single minutes that are remembered; beyond it everything since the earliest of them is settled again.
const MINUTES_MAX: usize = 10_000;
/// Facts that grow and are remembered to know by how much; an unknown one touches all of its time.
const GROWING_MAX: usize = 10_000;
/// A reading tells of the time since the one before, at the most of so much.
const READING_REACH_US: i64 = 3_600_000_000;

/// The minutes that late facts touched, shared by all who append facts.
#[derive(Debug, Clone, Default)]
pub struct Late(Arc<Mutex<Noted>>);

#[derive(Debug, Default)]
struct Noted {
    /// Minutes that begin before this have been settled; later ones come anyway.
    settled: Option<Timestamp>,
    /// Starts of minutes to settle again.
    minutes: BTreeSet<Timestamp>,
    /// Everything since here is to be settled again: there were too many minutes.
    since: Option<Timestamp>,
    growing: HashMap<Identity, Fact>,
    /// When each engine was last read.
    readings: HashMap<Label, Timestamp>,
}

/// What makes two facts speak of the same thing that grows.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Identity {
    Capacity(Label, Label, Timestamp),
    Engine(Label, Timestamp),
    Job(Label, Label, Timestamp),
}

impl Late {
    /// Takes note of a fact that was appended a moment ago.
    pub fn note(&self, fact: &Fact) {
        if matches!(fact, Fact::Opened(_) | Fact::Posting(_) | Fact::Gap(_) | Fact::Gpu(_) | Fact::Decision(_)) {
            return;
        }
        let mut noted = self.lock();
        if let Some(touched) = noted.touched(fact) {
            noted.mark(touched);
        }
    }

    /// Moves the line to `until`, the start of the first open minute, and takes the late minutes before it.
    pub(super) fn take(&self, until: Timestamp) -> Vec<Period> {
        let mut noted = self.lock();
        noted.settled = Some(noted.settled.map_or(until, |settled| settled.max(until)));
        let since = noted.since.take().map(|start| Period { start, end: until });
        let minutes = std::mem::take(&mut noted.minutes);
        joined(since.into_iter().chain(minutes.into_iter().map(interval_of)))
    }

    /// Puts back what could not be settled.
    pub(super) fn put_back(&self, periods: &[Period]) {
        let mut noted = self.lock();
        for period in periods {
            noted.mark(*period);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Noted> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Noted {
    /// The time about which the fact says something new.
    fn touched(&mut self, fact: &Fact) -> Option<Period> {
        match fact {
            Fact::Attempt(attempt) => {
                attempt.route.pool.as_ref()?;
                Some(Period { start: attempt.timeline.received_at, end: attempt.timeline.finished_at().plus_micros(1) })
            }
            Fact::Span(span) => Some(Period { end: span.period.end.plus_micros(1), ..span.period }),
            Fact::Step(step) => {
                Some(Period { start: step.at, end: step.at.plus_micros(signed(step.wall_us).saturating_add(1)) })
            }
            Fact::Reading(reading) => {
                let before = self.readings.insert(reading.engine.clone(), reading.at).unwrap_or(reading.at);
                let start = before.min(reading.at).max(reading.at.plus_micros(-READING_REACH_US));
                Some(Period { start, end: reading.at.max(before).plus_micros(1) })
            }
            Fact::Capacity(of) => self.grown(identity(fact)?, fact, of.period),
            Fact::Engine(of) => self.grown(identity(fact)?, fact, of.period),
            Fact::Job(of) => self.grown(identity(fact)?, fact, of.period),
            Fact::Opened(_) | Fact::Posting(_) | Fact::Gap(_) | Fact::Gpu(_) | Fact::Decision(_) => None,
        }
    }

    /// What is new in a fact that replaces an earlier one: the time by which it grew or shrank, or all of it.
    fn grown(&mut self, identity: Identity, fact: &Fact, period: Period) -> Option<Period> {
        if self.growing.len() >= GROWING_MAX && !self.growing.contains_key(&identity) {
            self.forget_ended();
        }
        let Some(before) = self.growing.insert(identity, fact.clone()) else { return Some(period) };
        let (end, same) = differs_in_end_only(&before, fact)?;
        if same {
            Some(Period { start: period.end.min(end), end: period.end.max(end) })
        } else {
            Some(Period { start: period.start, end: period.end.max(end) })
        }
    }

    /// Forgets the half that ended first: what still grows is in the other.
    fn forget_ended(&mut self) {
        let mut ends: Vec<Timestamp> = self.growing.values().filter_map(end_of).collect();
        let middle = ends.len() / 2;
        let Some((_, &mut limit, _)) = (middle < ends.len()).then(|| ends.select_nth_unstable(middle)) else { return };
        self.growing.retain(|_, fact| end_of(fact) > Some(limit));
    }

    fn mark(&mut self, touched: Period) {
        // Until a first settlement has run everything is open.
        let Some(settled) = self.settled else { return };
        if touched.start >= settled || touched.start >= touched.end {
            return;
        }
        if self.since.is_some_and(|since| since <= touched.start) {
            return;
        }
        let mut minute = interval_of(touched.start);
        while minute.start < touched.end.min(settled) {
            self.minutes.insert(minute.start);
            if self.minutes.len() > MINUTES_MAX {
                let earliest = self.minutes.first().copied();
                self.since = self.since.into_iter().chain(earliest).min();
                self.minutes.clear();
                return;
            }
            minute = interval_of(minute.end);
        }
    }
}

fn end_of(fact: &Fact) -> Option<Timestamp> {
    match fact {
        Fact::Capacity(fact) => Some(fact.period.end),
        Fact::Engine(fact) => Some(fact.period.end),
        Fact::Job(fact) => Some(fact.period.end),
        _ => None,
    }
}

/// The end of the earlier fact, and whether both say the same but for their ends and when they were observed.
fn differs_in_end_only(before: &Fact, after: &Fact) -> Option<(Timestamp, bool)> {
    match (before, after) {
        (Fact::Capacity(before), Fact::Capacity(after)) => {
            let mut grown = before.as_ref().clone();
            (grown.period, grown.observed_at) = (after.period, after.observed_at);
            Some((before.period.end, grown == **after))
        }
        (Fact::Engine(before), Fact::Engine(after)) => {
            let mut grown = before.as_ref().clone();
            (grown.period, grown.observed_at) = (after.period, after.observed_at);
            Some((before.period.end, grown == **after))
        }
        (Fact::Job(before), Fact::Job(after)) => {
            let mut grown = before.as_ref().clone();
            (grown.period, grown.observed_at) = (after.period, after.observed_at);
            Some((before.period.end, grown == **after))
        }
        _ => None,
    }
}

/// Whether two facts speak of the same thing that grows.
pub(super) fn same_thing(a: &Fact, b: &Fact) -> bool {
    matches!((identity(a), identity(b)), (Some(a), Some(b)) if a == b)
}

/// What the fact is about, when it is about something that grows.
fn identity(fact: &Fact) -> Option<Identity> {
    match fact {
        Fact::Capacity(fact) => Some(Identity::Capacity(fact.pool.clone(), fact.replica.clone(), fact.period.start)),
        Fact::Engine(fact) => Some(Identity::Engine(fact.engine.clone(), fact.period.start)),
        Fact::Job(fact) => Some(Identity::Job(fact.job.clone(), fact.replica.clone(), fact.period.start)),
        _ => None,
    }
}

/// Whole minutes, overlapping and adjacent ones as one, in order.
pub(super) fn joined(periods: impl IntoIterator<Item = Period>) -> Vec<Period> {
    let mut all: Vec<Period> = periods
        .into_iter()
        .filter(|period| period.start < period.end)
        .map(|period| Period { start: interval_of(period.start).start, end: minute_end(period.end) })
        .collect();
    all.sort_by_key(|period| (period.start, period.end));
    let mut joined: Vec<Period> = Vec::new();
    for period in all {
        match joined.last_mut() {
            Some(last) if period.start <= last.end => last.end = last.end.max(period.end),
            _ => joined.push(period),
        }
    }
    joined
}

/// The end of the minute that the moment before `end` lies in.
fn minute_end(end: Timestamp) -> Timestamp {
    interval_of(end.plus_micros(-1)).end
}

/// Cuts a time at the borders of stretches of `minutes` minutes, counted from 1970.
pub(super) fn stretches(period: Period, minutes: i64) -> impl Iterator<Item = Period> {
    let length = minutes.max(1).saturating_mul(INTERVAL_US);
    let mut at = period.start;
    std::iter::from_fn(move || {
        if at >= period.end {
            return None;
        }
        let border = at.micros().div_euclid(length).saturating_add(1).saturating_mul(length);
        let stretch = Period { start: at, end: Timestamp::from_micros(border).min(period.end) };
        at = stretch.end;
        Some(stretch)
    })
}

fn signed(micros: u64) -> i64 {
    i64::try_from(micros).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ledger::{Attempt, AttemptId, CapacityFact, Charge, EngineReading, Outcome, PurchaseOption, RequestId, Route};
    use ledger::{Source, Timeline, TokenUsage, UnpricedReason, UsageQuality};
    use proptest::prelude::*;

    const MINUTE: i64 = INTERVAL_US;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_micros(seconds * 1_000_000)
    }

    fn minutes(from: i64, to: i64) -> Period {
        Period { start: Timestamp::from_micros(from * MINUTE), end: Timestamp::from_micros(to * MINUTE) }
    }

    fn attempt(start: i64, seconds: u64, pool: Option<&str>) -> Fact {
        Fact::Attempt(Box::new(Attempt {
            id: AttemptId { request: RequestId::new(at(start), [0; 10]), number: 0 },
            source: Source::Gateway,
            context: ledger::Context::default(),
            route: Route { pool: pool.map(Into::into), ..Route::default() },
            timeline: Timeline { received_at: at(start), finished_us: seconds * 1_000_000, ..Timeline::default() },
            outcome: Outcome::Completed,
            status: None,
            usage: TokenUsage::default(),
            usage_quality: UsageQuality::Missing,
            charge: Charge::Unpriced { reason: UnpricedReason::NoUsage },
        }))
    }

    fn capacity(start: i64, end: i64, gpus: u32) -> Fact {
        Fact::Capacity(Box::new(CapacityFact {
            pool: "shared".into(),
            replica: "shared-0".into(),
            deployment: None,
            owner: None,
            gpu: "A100".into(),
            gpus,
            rate: "2.50".parse().unwrap(),
            purchase: PurchaseOption::OnDemand,
            period: Period { start: at(start), end: at(end) },
            observed_at: at(end),
        }))
    }

    #[test]
    fn only_facts_about_settled_time_are_late() {
        let late = Late::default();
        late.note(&attempt(0, 600, Some("shared")));
        assert!(late.take(at(600)).is_empty(), "nothing was settled before");
        late.note(&attempt(590, 60, Some("shared")));
        late.note(&attempt(100, 30, Some("shared")));
        late.note(&attempt(300, 30, None));
        late.note(&attempt(605, 30, Some("shared")));
        assert_eq!(late.take(at(660)), [minutes(1, 3), minutes(9, 10)]);
        assert!(late.take(at(660)).is_empty());
        late.put_back(&[minutes(9, 10)]);
        assert_eq!(late.take(at(660)), [minutes(9, 10)], "what failed is tried again");
    }

    #[test]
    fn a_fact_that_grows_touches_what_is_new_in_it() {
        let late = Late::default();
        late.take(at(0));
        late.note(&capacity(0, 60, 2));
        late.take(at(600));
        late.note(&capacity(0, 120, 2));
        assert_eq!(late.take(at(600)), [minutes(1, 2)]);
        late.note(&capacity(0, 120, 2));
        assert!(late.take(at(600)).is_empty(), "the same once more");
        late.note(&capacity(0, 180, 4));
        assert_eq!(late.take(at(600)), [minutes(0, 3)], "other GPUs all along");
        late.note(&capacity(0, 60, 4));
        assert_eq!(late.take(at(600)), [minutes(1, 3)], "it ended earlier than was thought");
    }

    #[test]
    fn what_still_grows_is_remembered_among_many_that_ended() {
        let late = Late::default();
        late.take(at(0));
        late.note(&capacity(0, 3_600, 2));
        for number in 0..=i64::try_from(GROWING_MAX).unwrap() {
            late.note(&capacity(number + 1, number + 2, 1));
            late.note(&capacity(0, 3_600 + number, 2));
        }
        assert!(late.lock().growing.len() <= GROWING_MAX);
        late.take(at(100_000));
        late.note(&capacity(0, 3_600 + 10_060, 2));
        assert!(late.take(at(100_000)).iter().all(|period| period.micros() <= 120_000_000), "only what is new in it");
    }

    #[test]
    fn a_late_reading_tells_of_the_time_since_the_one_before() {
        let late = Late::default();
        late.take(at(0));
        let reading = |seconds| {
            Fact::Reading(Box::new(EngineReading { engine: "e".into(), at: at(seconds), ..EngineReading::default() }))
        };
        late.note(&reading(50));
        late.take(at(180));
        late.note(&reading(200));
        assert_eq!(late.take(at(180)), [minutes(0, 3)]);
        late.note(&reading(205));
        assert!(late.take(at(180)).is_empty());
    }

    #[test]
    fn too_many_minutes_become_everything_since_the_earliest() {
        let late = Late::default();
        late.take(minutes(0, 30_000).end);
        for number in 0..=MINUTES_MAX {
            let start = i64::try_from(number).unwrap() * 120 + 60;
            late.note(&attempt(start, 1, Some("shared")));
        }
        late.note(&attempt(90_000, 1, Some("shared")));
        late.note(&attempt(0, 1, Some("shared")));
        assert_eq!(late.take(minutes(0, 30_000).end), [minutes(0, 30_000)]);
    }

    #[test]
    fn time_is_cut_at_the_borders_of_hours() {
        let cut: Vec<Period> = stretches(minutes(59, 121), 60).collect();
        assert_eq!(cut, [minutes(59, 60), minutes(60, 120), minutes(120, 121)]);
        assert_eq!(stretches(minutes(5, 5), 60).count(), 0);
    }

    proptest! {
        #[test]
        fn joined_periods_cover_the_same_minutes_once(spans in prop::collection::vec((-50i64..200, 1i64..30), 0..20)) {
            let spans: Vec<Period> =
                spans.iter().map(|&(start, length)| Period { start: at(start), end: at(start + length) }).collect();
            let joined = joined(spans.clone());
            for pair in joined.windows(2) {
                prop_assert!(pair[0].end < pair[1].start);
            }
            for second in -120..320 {
                let minute = interval_of(at(second));
                let touched = spans.iter().any(|span| span.intersect(minute).is_some());
                prop_assert_eq!(touched, joined.iter().any(|period| period.contains(at(second))));
            }
        }
    }
}
