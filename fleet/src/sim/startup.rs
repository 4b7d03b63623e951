//! How long a replica takes from being asked for until it serves, part by part: a node must be found or started, the image
//! pulled, the weights loaded, the engine warmed up.

use serde::{Deserialize, Serialize};

use super::random::Random;

/// How long something takes, seconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Takes {
    /// Always the same.
    Fixed(f64),
    /// Mostly about the same, sometimes much longer: `median_s x exp(sigma x N(0, 1))`.
    LogNormal {
        /// Half of all take no longer.
        median_s: f64,
        /// Standard deviation of the logarithm; 0.3 makes one in twenty take 1.6 times the median.
        sigma: f64,
    },
}

impl Takes {
    /// One of them, microseconds.
    #[must_use]
    pub fn draw_us(&self, random: &mut Random) -> u64 {
        match *self {
            Takes::Fixed(seconds) => micros(seconds),
            Takes::LogNormal { median_s, sigma } => micros(median_s * (sigma * random.normal()).exp()),
        }
    }

    /// What it takes usually: the median, seconds.
    #[must_use]
    pub fn usual_s(&self) -> f64 {
        match *self {
            Takes::Fixed(seconds) => seconds,
            Takes::LogNormal { median_s, .. } => median_s,
        }
    }
}

/// The parts of a start, one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Startup {
    /// Until there is a node with free GPUs.
    pub node: Takes,
    /// Until the image is there.
    pub image: Takes,
    /// Until the weights are in the GPUs' memory.
    pub weights: Takes,
    /// Until the engine answers: compilation, captured graphs, a first request.
    pub warmup: Takes,
}

impl Default for Startup {
    /// Five minutes: two for the node, one for the image, one and a half for the weights, half a minute to warm up.
    fn default() -> Startup {
        Startup {
            node: Takes::Fixed(120.0),
            image: Takes::Fixed(60.0),
            weights: Takes::Fixed(90.0),
            warmup: Takes::Fixed(30.0),
        }
    }
}

impl Startup {
    /// Every start takes so many seconds, divided among the parts as in the default.
    #[must_use]
    pub fn fixed(seconds: f64) -> Startup {
        let part = |share: f64| Takes::Fixed(seconds * share);
        Startup { node: part(0.4), image: part(0.2), weights: part(0.3), warmup: part(0.1) }
    }

    /// The same with every part's length drawn from around its usual one.
    #[must_use]
    pub fn varied(&self, sigma: f64) -> Startup {
        let vary = |takes: Takes| Takes::LogNormal { median_s: takes.usual_s(), sigma };
        Startup {
            node: vary(self.node),
            image: vary(self.image),
            weights: vary(self.weights),
            warmup: vary(self.warmup),
        }
    }

    /// Seconds that a start takes usually.
    #[must_use]
    pub fn usual_s(&self) -> f64 {
        [self.node, self.image, self.weights, self.warmup].iter().map(Takes::usual_s).sum()
    }

    /// One start.
    #[must_use]
    pub fn draw(&self, random: &mut Random) -> Start {
        let node_us = self.node.draw_us(random);
        let image_us = self.image.draw_us(random);
        let engine_us = self.weights.draw_us(random) + self.warmup.draw_us(random);
        Start { node_us, image_us, engine_us }
    }
}

/// One replica's start, microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Start {
    /// Until it has a place.
    pub node_us: u64,
    /// Then until the image is there.
    pub image_us: u64,
    /// Then until it serves; a restart in place takes this again.
    pub engine_us: u64,
}

impl Start {
    /// All of it times `factor`.
    #[must_use]
    pub fn slowed(&self, factor: f64) -> Start {
        let slow = |us: u64| micros(us as f64 / 1e6 * factor);
        Start { node_us: slow(self.node_us), image_us: slow(self.image_us), engine_us: slow(self.engine_us) }
    }
}

/// Whole microseconds of so many seconds; nothing is shorter than no time, and what is not a number takes none.
#[must_use]
pub fn micros(seconds: f64) -> u64 {
    if seconds == f64::INFINITY {
        return u64::MAX;
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a float saturates at the integer's ends, and NaN becomes zero"
    )]
    let micros = (seconds * 1e6).round() as u64;
    micros
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_add_up_and_a_fixed_start_is_always_the_same() {
        let startup = Startup::fixed(300.0);
        assert!((startup.usual_s() - 300.0).abs() < 1e-9);
        let start = startup.draw(&mut Random::new(1));
        assert_eq!(start, startup.draw(&mut Random::new(2)));
        assert_eq!(start.node_us + start.image_us + start.engine_us, 300_000_000);
        assert_eq!(start.slowed(2.0).engine_us, 2 * start.engine_us);
        assert!((Startup::default().usual_s() - 300.0).abs() < 1e-9);
    }

    #[test]
    fn varied_starts_have_the_same_median() {
        let startup = Startup::default().varied(0.4);
        let mut random = Random::new(3);
        let mut nodes: Vec<u64> = (0..2001).map(|_| startup.draw(&mut random).node_us).collect();
        nodes.sort_unstable();
        assert!((nodes[1000] as f64 / 120e6 - 1.0).abs() < 0.05, "{}", nodes[1000]);
        assert!(nodes[1990] > 2 * nodes[1000]);
    }

    #[test]
    fn odd_lengths_take_no_time_or_for_ever() {
        assert_eq!([micros(-1.0), micros(f64::NAN), micros(f64::INFINITY)], [0, 0, u64::MAX]);
    }
}
