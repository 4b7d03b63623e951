//! The simulator's random numbers: the same under a seed on every machine and with every version of every dependency, and
//! cheap enough to draw three of them for each of fifty million requests.

/// SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Random(u64);

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

impl Random {
    /// The sequence of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Random {
        Random(mix(seed.wrapping_add(GOLDEN)))
    }

    /// A sequence of its own for something that is numbered, so that what one thing draws changes nothing for the others.
    #[must_use]
    pub fn of(seed: u64, kind: u64, number: u64) -> Random {
        Random::new(mix(seed.wrapping_add(kind.wrapping_mul(GOLDEN))) ^ mix(number.wrapping_add(GOLDEN)))
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mix(self.0)
    }

    /// Evenly in 0 (included) to 1 (excluded).
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Evenly among `0..count`; 0 when there is nothing to choose from.
    pub fn below(&mut self, count: u64) -> u64 {
        let product = u128::from(self.bits()) * u128::from(count);
        u64::try_from(product >> 64).unwrap_or(0)
    }

    /// From the standard normal distribution (Box and Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// From the exponential distribution with mean 1.
    pub fn exponential(&mut self) -> f64 {
        -(1.0 - self.unit()).ln()
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_have_the_moments_they_promise() {
        let mut random = Random::new(7);
        let count = 100_000;
        let mean = |draw: &mut dyn FnMut() -> f64| (0..count).map(|_| draw()).sum::<f64>() / f64::from(count);
        let mut again = random.clone();
        assert!((mean(&mut || random.unit()) - 0.5).abs() < 0.005);
        assert!((mean(&mut || random.exponential()) - 1.0).abs() < 0.02);
        assert!(mean(&mut || random.normal()).abs() < 0.02);
        assert!((mean(&mut || random.normal().powi(2)) - 1.0).abs() < 0.03);
        assert!((0..1000).all(|_| again.below(7) < 7));
        assert_eq!(again.below(0), 0);
    }

    #[test]
    fn sequences_of_other_seeds_and_other_things_differ() {
        let first = |mut random: Random| random.bits();
        assert_eq!(first(Random::new(1)), first(Random::new(1)));
        assert_ne!(first(Random::new(1)), first(Random::new(2)));
        assert_ne!(first(Random::of(1, 0, 5)), first(Random::of(1, 0, 6)));
        assert_ne!(first(Random::of(1, 0, 5)), first(Random::of(1, 1, 5)));
    }
}
