//! GPUs in use as a load-duration curve: for how long each number was in use. A commitment does not care about the order.

use std::collections::BTreeMap;

/// For how long how many GPUs were in use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Demand {
    /// Microseconds at each number of GPUs.
    micros: BTreeMap<u32, u64>,
}

impl Demand {
    /// The curve of intervals `(GPUs, microseconds)` in any order.
    #[must_use]
    pub fn of(intervals: impl IntoIterator<Item = (u32, u64)>) -> Demand {
        let mut micros: BTreeMap<u32, u64> = BTreeMap::new();
        for (gpus, length) in intervals.into_iter().filter(|(_, length)| *length > 0) {
            let place = micros.entry(gpus).or_default();
            *place = place.saturating_add(length);
        }
        Demand { micros }
    }

    /// The curve of intervals of one length each, such as hours.
    #[must_use]
    pub fn every(length_us: u64, gpus: impl IntoIterator<Item = u32>) -> Demand {
        Demand::of(gpus.into_iter().map(|gpus| (gpus, length_us)))
    }

    /// How long the curve is, in microseconds.
    #[must_use]
    pub fn duration_us(&self) -> u64 {
        self.micros.values().fold(0, |sum: u64, &length| sum.saturating_add(length))
    }

    /// Most GPUs at once.
    #[must_use]
    pub fn peak(&self) -> u32 {
        self.micros.keys().next_back().copied().unwrap_or(0)
    }

    /// Microseconds in which at least `gpus` were in use: `P(D >= gpus)` times the duration.
    #[must_use]
    pub fn at_least_us(&self, gpus: u32) -> u64 {
        self.micros.range(gpus..).fold(0, |sum: u64, (_, &length)| sum.saturating_add(length))
    }

    /// GPU-microseconds in use.
    #[must_use]
    pub fn gpu_us(&self) -> u64 {
        self.above_gpu_us(0)
    }

    /// GPU-microseconds in use above a level: what that level does not cover.
    #[must_use]
    pub fn above_gpu_us(&self, level: u32) -> u64 {
        let above = |(&gpus, &length): (&u32, &u64)| u64::from(gpus - level).saturating_mul(length);
        self.micros.range(level..).map(above).fold(0, u64::saturating_add)
    }

    /// The numbers of GPUs at which the curve steps, smallest first, each with the microseconds in which at least as many
    /// were in use.
    #[must_use]
    pub fn steps(&self) -> Vec<(u32, u64)> {
        let mut at_least = 0u64;
        let mut steps: Vec<(u32, u64)> = self
            .micros
            .iter()
            .rev()
            .map(|(&gpus, &length)| {
                at_least = at_least.saturating_add(length);
                (gpus, at_least)
            })
            .collect();
        steps.reverse();
        steps
    }

    /// Demand that is `percent` of this one at every moment, whole GPUs, rounded up: what is needed has to be there.
    #[must_use]
    pub fn scaled(&self, percent: u32) -> Demand {
        let scale = |gpus: u32| u32::try_from((u64::from(gpus) * u64::from(percent)).div_ceil(100)).unwrap_or(u32::MAX);
        Demand::of(self.micros.iter().map(|(&gpus, &length)| (scale(gpus), length)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_forgets_the_order_and_keeps_the_time() {
        let demand = Demand::of([(3, 10), (0, 5), (1, 20), (3, 5), (9, 0)]);
        assert_eq!(demand, Demand::of([(1, 20), (3, 15), (0, 5)]));
        assert_eq!((demand.duration_us(), demand.peak(), demand.gpu_us()), (40, 3, 65));
        assert_eq!([0, 1, 2, 3, 4].map(|gpus| demand.at_least_us(gpus)), [40, 35, 15, 15, 0]);
        assert_eq!([0, 1, 2, 3, 4].map(|level| demand.above_gpu_us(level)), [65, 30, 15, 0, 0]);
        assert_eq!(demand.steps(), [(0, 40), (1, 35), (3, 15)]);
    }

    #[test]
    fn scaled_demand_is_rounded_up_to_whole_gpus() {
        assert_eq!(Demand::of([(3, 1), (10, 2)]).scaled(130), Demand::of([(4, 1), (13, 2)]));
        assert_eq!(Demand::of([(3, 1), (0, 2)]).scaled(50), Demand::of([(2, 1), (0, 2)]));
    }

    #[test]
    fn nothing_is_an_empty_curve() {
        let nothing = Demand::default();
        assert_eq!((nothing.duration_us(), nothing.peak(), nothing.gpu_us(), nothing.at_least_us(0)), (0, 0, 0, 0));
    }
}
