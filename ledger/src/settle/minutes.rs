//! The minutes of a pool, and what becomes of one of which nothing is known: a posting of its own.
//!
//! Where nobody says who used a pool its cost is a named line, never hidden and never spread by a guess.

use crate::capacity::CapacityFact;
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

    proptest! {
        #[test]
        fn the_minutes_of_a_fact_add_up(start in -400i64..400, length in 1i64..400) {
            let (start, end) = (start * 1_000_003, (start + length) * 1_000_003);
            let capacity = fact("a", start, end);
            let mut minute = interval_of(capacity.period.start);
            let mut cost = Money::ZERO;
            while minute.start < capacity.period.end {
                cost += pool_cost(&[&capacity], "a", minute);
                minute = interval_of(minute.end);
            }
            prop_assert_eq!(cost_by_minute(&capacity, Period::ALL), cost);
        }
    }
}
