//! Who pays for one step of a continuous batch.
//!
//! A step is a cost-sharing game: `v(S)` is how long the step takes with the requests of `S` alone, and with
//! `D(S) = sum over S of (c - m)` the roofline is
//!
//! ```text
//! v(S) = o + M0 + M(S) + max(D(S) - M0, 0)        for S not empty, v({}) = 0
//! ```
//!
//! The first two terms are there for whoever comes first: Shapley splits them equally. `M(S)` is linear: each pays its
//! own. Only the last term needs a rule, and this file has two.
//!
//! [`diagonal`] is Aumann and Shapley's: grow the batch proportionally from nothing to all of it. It is memory-bound up
//! to the fraction `tau = M0 / (C - M)` of the way and compute-bound after it, so a request pays `m` for the first part
//! and `c` for the second: `phi = (o + M0)/n + tau m + (1 - tau) c`. Constant work for each request, and the form that
//! the sweep over timelines can integrate.
//!
//! [`smoothed`] stays closer to Shapley's average over *random* subsets, which matters when one prefill is as large as
//! the rest of the batch. Shapley's value is the marginal cost of joining when every other request is present with
//! probability `u`, averaged over `u` from 0 to 1. For a given `u` the others' `D` is a sum of independent terms: the
//! few largest are enumerated, the rest is taken as normal with the exact mean and variance, the expected excess over
//! `M0` is then a closed form, and eight Gauss-Legendre nodes integrate over `u`. What the approximation leaves open
//! is put back in proportion, so that both rules add up to the step.
//!
//! Only the second is monotone: near the ridge of the roofline more compute of a request that mostly reads can lower what
//! it pays along the diagonal, because the whole step then counts as less memory-bound. Where steps are known one by one
//! the smoothed rule is therefore used; the sweep uses the diagonal, whose terms it can integrate.
//!
//! With `overlap` below 1 the step is a blend of the roofline and of a plain sum; the value is linear in the game, so the
//! shares blend in the same proportion, and with `overlap` 0 both rules *are* the exact Shapley value.

use super::replica::{Demand, Fixed};

/// What one request pays of a step, in seconds, term by term.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Share {
    /// Its part of launch and scheduling.
    pub overhead_s: f64,
    /// Its part of reading the weights, experts included.
    pub weights_s: f64,
    /// What it pays for reading its cache.
    pub memory_s: f64,
    /// What it pays for compute.
    pub compute_s: f64,
}

impl Share {
    /// All terms together.
    #[must_use]
    pub fn total_s(&self) -> f64 {
        self.overhead_s + self.weights_s + self.memory_s + self.compute_s
    }

    /// Every term times `factor`.
    #[must_use]
    pub fn scaled(&self, factor: f64) -> Share {
        Share {
            overhead_s: self.overhead_s * factor,
            weights_s: self.weights_s * factor,
            memory_s: self.memory_s * factor,
            compute_s: self.compute_s * factor,
        }
    }
}

impl std::ops::AddAssign for Share {
    fn add_assign(&mut self, other: Share) {
        self.overhead_s += other.overhead_s;
        self.weights_s += other.weights_s;
        self.memory_s += other.memory_s;
        self.compute_s += other.compute_s;
    }
}

/// The fraction of the way from an empty to the full batch that is memory-bound, `tau`.
#[must_use]
pub fn memory_bound_fraction(read_once_s: f64, memory_s: f64, compute_s: f64) -> f64 {
    if compute_s <= read_once_s + memory_s { 1.0 } else { read_once_s / (compute_s - memory_s) }
}

/// Aumann-Shapley on the roofline, Shapley on the fixed part. Adds up to the step's time.
#[must_use]
pub fn diagonal(fixed: Fixed, demands: &[Demand]) -> Vec<Share> {
    let compute_s: f64 = demands.iter().map(|demand| demand.compute_s).sum();
    let memory_s: f64 = demands.iter().map(|demand| demand.memory_s).sum();
    let tau = fixed.overlap * memory_bound_fraction(fixed.read_once_s(), memory_s, compute_s);
    let base = Base::of(fixed, demands);
    demands
        .iter()
        .map(|demand| Share {
            memory_s: (1.0 - fixed.overlap + tau) * demand.memory_s,
            compute_s: (1.0 - tau) * demand.compute_s,
            ..base.share(demand)
        })
        .collect()
}

/// The closer rule: the others' sum as normal with the largest of them enumerated. Adds up to the step's time.
#[must_use]
pub fn smoothed(fixed: Fixed, demands: &[Demand]) -> Vec<Share> {
    let excess: Vec<f64> = demands.iter().map(|demand| demand.compute_s - demand.memory_s).collect();
    let threshold = fixed.read_once_s();
    let all: f64 = excess.iter().sum();
    // Nobody can push the step over the ridge, or nobody can pull it back: the game is linear and exactly solved.
    let above: f64 = excess.iter().filter(|&&excess| excess > 0.0).sum();
    if above <= threshold {
        return diagonal(fixed, demands);
    }
    let mut parts: Vec<f64> = marginals(&excess, threshold);
    put_back(&mut parts, (all - threshold).max(0.0));
    let base = Base::of(fixed, demands);
    demands
        .iter()
        .zip(&parts)
        .map(|(demand, &part)| {
            // The excess is compute that memory did not hide; what was hidden was paid as memory. A request whose
            // presence shortens the excess pays less memory instead of negative compute.
            let memory_s = demand.memory_s + fixed.overlap * part.min(0.0);
            let compute_s = fixed.overlap * part.max(0.0) + (1.0 - fixed.overlap) * demand.compute_s;
            Share { memory_s, compute_s, ..base.share(demand) }
        })
        .collect()
}

/// The equal part of everyone and the experts by tokens.
struct Base {
    overhead_s: f64,
    weights_s: f64,
    experts_s_per_token: f64,
}

impl Base {
    fn of(fixed: Fixed, demands: &[Demand]) -> Base {
        let heads = demands.len().max(1) as f64;
        let tokens: f64 = demands.iter().map(|demand| f64::from(demand.new_tokens)).sum();
        Base {
            overhead_s: fixed.overhead_s / heads,
            weights_s: fixed.weights_s / heads,
            experts_s_per_token: if tokens > 0.0 { fixed.experts_s / tokens } else { 0.0 },
        }
    }

    fn share(&self, demand: &Demand) -> Share {
        let weights_s = self.weights_s + self.experts_s_per_token * f64::from(demand.new_tokens);
        Share { overhead_s: self.overhead_s, weights_s, ..Share::default() }
    }
}

/// Gauss-Legendre nodes and weights on [0, 1], eight points.
const NODES: [(f64, f64); 8] = [
    (0.019_855_071_751_231_9, 0.050_614_268_145_188_1),
    (0.101_666_761_293_186_6, 0.111_190_517_226_687_2),
    (0.237_233_795_041_835_5, 0.156_853_322_938_943_6),
    (0.408_282_678_752_175_1, 0.181_341_891_689_181),
    (0.591_717_321_247_824_8, 0.181_341_891_689_181),
    (0.762_766_204_958_164_5, 0.156_853_322_938_943_6),
    (0.898_333_238_706_813_4, 0.111_190_517_226_687_2),
    (0.980_144_928_248_768_1, 0.050_614_268_145_188_1),
];

/// Requests whose presence is enumerated rather than taken as normal.
const ENUMERATED: usize = 3;

/// Each request's expected marginal excess `E[max(X + d - M0, 0) - max(X - M0, 0)]` over a random batch `X` of the others.
fn marginals(excess: &[f64], threshold: f64) -> Vec<f64> {
    let mut order: Vec<usize> = (0..excess.len()).collect();
    order.sort_by(|&a, &b| excess[b].abs().total_cmp(&excess[a].abs()).then(a.cmp(&b)));
    let (sum, squares) = excess.iter().fold((0.0, 0.0), |(sum, squares), d| (sum + d, squares + d * d));
    let mut parts = vec![0.0; excess.len()];
    for (rank, &own) in order.iter().enumerate() {
        let large: Vec<f64> = order
            .iter()
            .take(ENUMERATED + usize::from(rank < ENUMERATED))
            .filter(|&&at| at != own)
            .map(|&at| excess[at])
            .collect();
        let d = excess[own];
        let rest_sum = sum - d - large.iter().sum::<f64>();
        let rest_squares = (squares - d * d - large.iter().map(|d| d * d).sum::<f64>()).max(0.0);
        parts[own] = NODES
            .iter()
            .map(|&(u, weight)| {
                let deviation = (u * (1.0 - u) * rest_squares).sqrt();
                weight
                    * over_subsets(&large, u, |present| {
                        let above = u * rest_sum + present - threshold;
                        expected_positive(above + d, deviation) - expected_positive(above, deviation)
                    })
            })
            .sum();
    }
    parts
}

/// The expectation of `f(sum of the present)` when each of `large` is present with probability `u`.
fn over_subsets(large: &[f64], u: f64, f: impl Fn(f64) -> f64) -> f64 {
    (0u32..1 << large.len())
        .map(|set| {
            let (mut chance, mut present) = (1.0, 0.0);
            for (bit, d) in large.iter().enumerate() {
                if set >> bit & 1 == 1 {
                    chance *= u;
                    present += d;
                } else {
                    chance *= 1.0 - u;
                }
            }
            chance * f(present)
        })
        .sum()
}

/// `E[max(X, 0)]` for a normal `X`.
fn expected_positive(mean: f64, deviation: f64) -> f64 {
    if deviation <= 1e-12 * mean.abs() || deviation == 0.0 {
        return mean.max(0.0);
    }
    let z = mean / deviation;
    let density = (-0.5 * z * z).exp() / (2.0 * std::f64::consts::PI).sqrt();
    mean * normal_below(z) + deviation * density
}

/// The standard normal distribution function; Abramowitz and Stegun 26.2.17, absolute error below 7.5e-8.
fn normal_below(z: f64) -> f64 {
    let t = 1.0 / (1.0 + 0.231_641_9 * z.abs());
    let polynomial =
        t * (0.319_381_530 + t * (-0.356_563_782 + t * (1.781_477_937 + t * (-1.821_255_978 + t * 1.330_274_429))));
    let tail = (-0.5 * z * z).exp() / (2.0 * std::f64::consts::PI).sqrt() * polynomial;
    if z >= 0.0 { 1.0 - tail } else { tail }
}

/// Moves `parts` to the sum that they must have, in proportion to their size.
fn put_back(parts: &mut [f64], target: f64) {
    let missing = target - parts.iter().sum::<f64>();
    let size: f64 = parts.iter().map(|part| part.abs()).sum();
    for part in parts.iter_mut() {
        *part += missing * part.abs() / size.max(f64::MIN_POSITIVE);
    }
}

#[cfg(test)]
#[path = "share_tests.rs"]
mod tests;
