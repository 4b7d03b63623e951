//! Who owes what nobody used: the waterfall over a pool's idle GPUs, each step a line of its own.
//!
//! 1. Reserved GPUs without an engine: the reservation's owner. 2. GPUs that an objective keeps warm: the objective's
//!    owner. 3. Up to the peak: headroom, owed by those whose demand makes the peak. 4. Above the peak: the pool's owner.
//!
//! Headroom is the airport game: a runway is built for the largest plane, and each plane pays for the length that it
//! needs together with all that need it too. With slot demands `D1 <= … <= DT` in GPUs and `D0 = 0`, slot `j` owes
//! `sum over q <= j of (Dq - Dq-1)/(T - q + 1)` of the capacity's price over the whole time, of which it has paid its own
//! busy part already. A slot never owes less than it paid: the sum is at least `Dj / T`.

use std::collections::BTreeMap;

/// What each slot owes for headroom, in GPU-slots (one GPU for the length of one slot), beyond its own busy part.
/// Slots in any order; negative or unknown demands count as none. Adds up to `T x max(D) - sum(D)`.
#[must_use]
pub fn airport(demands: &[f64]) -> Vec<f64> {
    let demand = |slot: usize| if demands[slot] > 0.0 { demands[slot] } else { 0.0 };
    let mut order: Vec<usize> = (0..demands.len()).collect();
    order.sort_by(|&a, &b| demand(a).total_cmp(&demand(b)).then(a.cmp(&b)));
    let slots = demands.len() as f64;
    let mut owed = vec![0.0; demands.len()];
    let (mut below, mut sum) = (0.0, 0.0);
    for (rank, &slot) in order.iter().enumerate() {
        sum += (demand(slot) - below) * slots / (slots - rank as f64);
        below = demand(slot);
        owed[slot] = (sum - demand(slot)).max(0.0);
    }
    owed
}

/// What each user owes for headroom: each slot's part in proportion to use within the slot. `uses[slot]` holds GPU-slots
/// by user; a slot's demand is their sum. Users without use owe nothing.
#[must_use]
pub fn headroom<U: Ord + Clone>(uses: &[BTreeMap<U, f64>]) -> BTreeMap<U, f64> {
    let demands: Vec<f64> = uses.iter().map(|slot| slot.values().sum()).collect();
    let mut owed: BTreeMap<U, f64> = BTreeMap::new();
    for ((slot, demand), slot_owes) in uses.iter().zip(&demands).zip(airport(&demands)) {
        for (user, used) in slot.iter().filter(|(_, used)| **used > 0.0) {
            *owed.entry(user.clone()).or_default() += slot_owes * used / demand;
        }
    }
    owed
}

/// A pool's idle GPU time in one interval and what is known about why it was there. In GPU-seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Idle {
    /// Of reserved GPUs on which no engine ran.
    pub without_engine_reserved: f64,
    /// Of replicas that an objective keeps, used or not.
    pub standby: f64,
    /// Of all other GPUs.
    pub other: f64,
    /// Busy GPU-seconds in the interval.
    pub busy: f64,
    /// The largest demand that the pool is kept for, in GPU-seconds for an interval of this length. Unknown: no headroom
    /// is taken for the peak's, all of it is above.
    pub peak: Option<f64>,
}

/// Idle GPU-seconds by line, adding up to all idle time.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Waterfall {
    /// 1. Reserved and unused.
    pub reserved: f64,
    /// 2. Kept warm.
    pub warm: f64,
    /// 3. Up to the peak.
    pub headroom: f64,
    /// 4. Above the peak.
    pub above_peak: f64,
}

impl Idle {
    /// Runs the waterfall. Warm replicas are part of what serves a peak, so they use up headroom first.
    #[must_use]
    pub fn waterfall(&self) -> Waterfall {
        let reserved = self.without_engine_reserved.max(0.0);
        let warm = self.standby.max(0.0);
        let other = self.other.max(0.0);
        let needed = self.peak.map_or(0.0, |peak| (peak - self.busy - warm).max(0.0));
        let headroom = other.min(needed);
        Waterfall { reserved, warm, headroom, above_peak: other - headroom }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_airport_by_hand() {
        // Runways of 1, 2 and 4: the first third is shared by three, the second by two, the rest is the last one's.
        let owed = airport(&[2.0, 1.0, 4.0]);
        let whole: Vec<f64> = [2.0, 1.0, 4.0].iter().zip(&owed).map(|(used, owed)| used + owed).collect();
        assert_eq!(whole, [2.5, 1.0, 8.5]);
        assert_eq!(airport(&[]), Vec::<f64>::new());
        assert_eq!(airport(&[3.0, 3.0]), [0.0, 0.0]);
    }

    #[test]
    fn who_makes_the_peak_pays_for_it() {
        let slot = |night: f64, day: f64| BTreeMap::from([("night", night), ("day", day)]);
        let owed = headroom(&[slot(1.0, 0.0), slot(1.0, 3.0)]);
        assert_eq!(owed["night"], 0.75);
        assert_eq!(owed["day"], 2.25);
    }

    #[test]
    fn the_waterfall_in_its_order() {
        let idle = Idle { without_engine_reserved: 10.0, standby: 20.0, other: 100.0, busy: 50.0, peak: Some(110.0) };
        assert_eq!(idle.waterfall(), Waterfall { reserved: 10.0, warm: 20.0, headroom: 40.0, above_peak: 60.0 });
        assert_eq!(Idle { peak: None, ..idle }.waterfall().above_peak, 100.0);
        assert_eq!(Idle { peak: Some(1e9), ..idle }.waterfall().headroom, 100.0);
    }

    proptest! {
        #[test]
        fn headroom_adds_up_and_follows_demand(demands in prop::collection::vec(0.0f64..100.0, 1..50)) {
            let owed = airport(&demands);
            let peak = demands.iter().copied().fold(0.0, f64::max);
            let expected = peak * demands.len() as f64 - demands.iter().sum::<f64>();
            prop_assert!((owed.iter().sum::<f64>() - expected).abs() <= 1e-6 * expected.max(1.0));
            for (a, owed_a) in demands.iter().zip(&owed) {
                prop_assert!(*owed_a >= 0.0);
                for (b, owed_b) in demands.iter().zip(&owed) {
                    prop_assert!(a > b || owed_a + a <= owed_b + b + 1e-9);
                }
            }
        }

        #[test]
        fn the_waterfall_loses_nothing(
            without in 0.0f64..100.0, standby in 0.0f64..100.0, other in 0.0f64..100.0, busy in 0.0f64..100.0,
            peak in prop::option::of(0.0f64..400.0),
        ) {
            let Waterfall { reserved, warm, headroom, above_peak } =
                Idle { without_engine_reserved: without, standby, other, busy, peak }.waterfall();
            prop_assert!((reserved + warm + headroom + above_peak - without - standby - other).abs() < 1e-9);
            prop_assert!(headroom >= 0.0 && above_peak >= 0.0);
        }
    }
}
