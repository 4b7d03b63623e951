//! The minutes of a pool, and what becomes of one of which nothing is known: a posting of its own.
//!
//! Where nobody says who used a pool its cost is a named line, never hidden and never spread by a guess.

use std::collections::{BTreeMap, BTreeSet};

use crate::capacity::{CapacityFact, latest};
use crate::charge::Costs;
use crate::context::{Context, Label};
use crate::id::PostingId;
use crate::money::Money;
use crate::posting::{Line, Origin, Posting};
use crate::time::{Period, Timestamp};

/// The length of an origin of a pool.
pub const INTERVAL_US: i64 = 60_000_000;

/// The interval that `at` lies in.
#[must_use]
pub fn interval_of(at: Timestamp) -> Period {
    let start = at.micros().div_euclid(INTERVAL_US).saturating_mul(INTERVAL_US);
    Period { start: Timestamp::from_micros(start), end: Timestamp::from_micros(start.saturating_add(INTERVAL_US)) }
}

/// What `pool` cost within `period`: the sum over the capacity that holds.
#[must_use]
pub fn pool_cost(facts: &[&CapacityFact], pool: &str, period: Period) -> Money {
    facts.iter().filter(|fact| &*fact.pool == pool).map(|fact| fact.cost_within(period)).sum()
}

/// What one fact costs within `window`, added up minute by minute as it is booked: a minute is rounded to the picodollar,
/// so that this can differ from the cost of the whole span in the last digits.
#[must_use]
pub fn cost_by_minute(fact: &CapacityFact, window: Period) -> Money {
    let Some(mut left) = fact.period.intersect(window) else { return Money::ZERO };
    let mut cost = Money::ZERO;
    while left.start < left.end {
        let minute = interval_of(left.start);
        cost += fact.cost_within(Period { start: left.start, end: minute.end.min(left.end) });
        left.start = minute.end;
    }
    cost
}

/// One posting for each pool and minute within `window` whose cost exceeds what is `posted` already, by the difference.
///
/// Minutes that have not ended by `window.end` wait, because their capacity may still grow. The posting's id follows
/// from pool, minute and the amount posted before, so that settling twice from the same books books once.
#[must_use]
pub fn unallocated(
    capacity: &[CapacityFact],
    posted: &BTreeMap<Origin, Money>,
    window: Period,
    now: Timestamp,
) -> Vec<Posting> {
    let facts = latest(capacity);
    let pools: BTreeSet<&Label> = facts.iter().map(|fact| &fact.pool).collect();
    pools.into_iter().flat_map(|pool| of_pool(&facts, pool, posted, window, now)).collect()
}

fn of_pool(
    facts: &[&CapacityFact],
    pool: &Label,
    posted: &BTreeMap<Origin, Money>,
    window: Period,
    now: Timestamp,
) -> Vec<Posting> {
    let own: Vec<&CapacityFact> = facts.iter().copied().filter(|fact| fact.pool == *pool).collect();
    minutes(&own, window)
        .into_iter()
        .filter_map(|start| {
            let period = interval_of(start);
            let origin = Origin::Pool { pool: pool.clone(), start };
            let before = posted.get(&origin).copied().unwrap_or(Money::ZERO);
            let open = pool_cost(&own, pool, period) - before;
            (open != Money::ZERO).then(|| posting(origin, pool, period, open, before, now))
        })
        .collect()
}

/// Starts of the whole minutes in which any of these facts was there.
fn minutes(facts: &[&CapacityFact], window: Period) -> BTreeSet<Timestamp> {
    let mut starts = BTreeSet::new();
    for fact in facts {
        let Some(both) = fact.period.intersect(window) else { continue };
        let mut period = interval_of(both.start);
        while period.start < both.end && period.end <= window.end {
            starts.insert(period.start);
            period = interval_of(period.end);
        }
    }
    starts
}

/// The posting of a minute's cost that nobody is known to have caused, `before` having been posted of it so far.
pub(super) fn posting(
    origin: Origin,
    pool: &Label,
    period: Period,
    open: Money,
    before: Money,
    now: Timestamp,
) -> Posting {
    Posting {
        id: posting_id(pool, period.start, before),
        origin,
        line: Line::Unallocated,
        period,
        attempt: None,
        context: Context::default(),
        provider: "self_hosted".into(),
        model: None,
        pool: Some(pool.clone()),
        costs: Costs::flat(open),
        estimated: false,
        tier: None,
        basis: None,
        policy: "unallocated@1".into(),
        booked_at: now,
    }
}

/// A UUIDv7 at the minute whose other bits are a hash of what makes the posting unique.
fn posting_id(pool: &str, start: Timestamp, before: Money) -> PostingId {
    let bytes = pool.bytes().chain([0]).chain(start.micros().to_be_bytes()).chain(before.pico().to_be_bytes());
    let mut random = [0; 10];
    random.copy_from_slice(&hash(bytes).to_be_bytes()[6..]);
    PostingId::new(start, random)
}

/// FNV-1a in 128 bits.
pub(super) fn hash(bytes: impl IntoIterator<Item = u8>) -> u128 {
    const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    bytes.into_iter().fold(OFFSET, |hash, byte| (hash ^ u128::from(byte)).wrapping_mul(PRIME))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn fact(pool: &str, start: i64, end: i64) -> CapacityFact {
        CapacityFact {
            pool: pool.into(),
            replica: format!("{pool}-0").into(),
            deployment: None,
            owner: None,
            gpu: "A100".into(),
            gpus: 2,
            rate: "2.50".parse().expect("a rate"),
            purchase: crate::capacity::PurchaseOption::OnDemand,
            period: Period { start: Timestamp::from_micros(start), end: Timestamp::from_micros(end) },
            observed_at: Timestamp::from_micros(end),
        }
    }

    fn until(end: i64) -> Period {
        Period { start: Timestamp::from_micros(0), end: Timestamp::from_micros(end) }
    }

    fn book(posted: &mut BTreeMap<Origin, Money>, postings: &[Posting]) {
        for posting in postings {
            *posted.entry(posting.origin.clone()).or_default() += posting.costs.effective_cost;
        }
    }

    #[test]
    fn whole_minutes_are_booked_once_and_running_ones_wait() {
        let capacity = [fact("shared", 30_000_000, 150_000_000)];
        let mut posted = BTreeMap::new();
        let now = Timestamp::from_micros(150_000_000);
        let first = unallocated(&capacity, &posted, until(150_000_000), now);
        assert_eq!(first.len(), 2, "the third minute has not ended");
        assert_eq!(
            unallocated(&capacity, &posted, until(150_000_000), now),
            first,
            "the same books, the same postings"
        );
        book(&mut posted, &first);
        assert!(unallocated(&capacity, &posted, until(150_000_000), now).is_empty());
        let rest = unallocated(&capacity, &posted, until(180_000_000), now);
        book(&mut posted, &rest);
        let total: Money = posted.values().copied().sum();
        assert_eq!(total.rounded(9), "0.166666667", "two GPUs at 2.50 for two minutes");
    }

    #[test]
    fn capacity_that_is_seen_late_is_a_second_posting() {
        let early = vec![fact("shared", 0, 60_000_000)];
        let mut posted = BTreeMap::new();
        let first = unallocated(&early, &posted, until(60_000_000), Timestamp::from_micros(60_000_000));
        book(&mut posted, &first);
        let mut late = early;
        late.push(CapacityFact { replica: "shared-1".into(), ..fact("shared", 0, 60_000_000) });
        let second = unallocated(&late, &posted, until(60_000_000), Timestamp::from_micros(90_000_000));
        assert_eq!(second.len(), 1);
        assert_ne!(second[0].id, first[0].id);
        assert_eq!(second[0].costs, first[0].costs);
    }

    proptest! {
        #[test]
        fn what_is_booked_is_what_the_pools_cost(
            spans in prop::collection::vec((0usize..3, 0i64..400, 1i64..400), 1..12),
            cut in 0i64..900,
        ) {
            let names = ["a", "b", "c"];
            let capacity: Vec<CapacityFact> = spans
                .iter()
                .enumerate()
                .map(|(index, &(pool, start, length))| CapacityFact {
                    replica: format!("r{index}").into(),
                    ..fact(names[pool], start * 1_000_003, (start + length) * 1_000_003)
                })
                .collect();
            let mut posted = BTreeMap::new();
            for end in [cut * 1_000_003, 1_200_000_000] {
                let postings = unallocated(&capacity, &posted, until(end), Timestamp::from_micros(end));
                book(&mut posted, &postings);
            }
            let facts = latest(&capacity);
            for (origin, amount) in &posted {
                let Origin::Pool { pool, start } = origin else { panic!("a pool") };
                prop_assert_eq!(*amount, pool_cost(&facts, pool, interval_of(*start)));
            }
            let booked: Money = posted.values().copied().sum();
            let cost: Money = facts.iter().map(|fact| cost_by_minute(fact, Period::ALL)).sum();
            prop_assert_eq!(booked, cost);
        }
    }
}
