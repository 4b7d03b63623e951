//! Several engines on one GPU: how its cost divides among them before each divides its part among its requests.

use serde::{Deserialize, Serialize};

/// A MIG slice of a GPU, in the vendor's units: sevenths of the compute and eighths of the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigSlice {
    /// Compute slices of 7.
    pub compute: u32,
    /// Memory slices of 8.
    pub memory: u32,
}

impl MigSlice {
    /// Reads a profile name such as `1g.10gb` or `3g.40gb`, given the memory of one eighth in GB. `None` when it is none.
    #[must_use]
    pub fn of_profile(profile: &str, gb_per_slice: u32) -> Option<MigSlice> {
        let (compute, memory) = profile.split_once('.')?;
        let compute: u32 = compute.strip_suffix('g')?.parse().ok()?;
        let digits = memory.split_once("gb").map(|(digits, _)| digits)?;
        let gb: u32 = digits.parse().ok()?;
        let memory = gb.div_ceil(gb_per_slice.max(1));
        (compute <= 7 && memory <= 8).then_some(MigSlice { compute, memory })
    }

    /// Its part of the GPU's price: `alpha x compute / 7 + (1 - alpha) x memory / 8`.
    #[must_use]
    pub fn part(&self, alpha: f64) -> f64 {
        alpha * f64::from(self.compute) / 7.0 + (1.0 - alpha) * f64::from(self.memory) / 8.0
    }
}

/// The weight of compute against memory in a slice's price unless configured otherwise.
pub const MIG_ALPHA: f64 = 0.5;

/// Parts of a GPU's price for its slices, and what no slice has: `stranded`. Slices that add up to more than one GPU are
/// scaled down to it.
#[must_use]
pub fn mig(slices: &[MigSlice], alpha: f64) -> (Vec<f64>, f64) {
    let parts: Vec<f64> = slices.iter().map(|slice| slice.part(alpha)).collect();
    let all: f64 = parts.iter().sum();
    let scale = if all > 1.0 { 1.0 / all } else { 1.0 };
    (parts.iter().map(|part| part * scale).collect(), (1.0 - all).max(0.0))
}

/// Seconds of the GPU for each engine under time slicing: every moment goes in equal parts to the engines active then.
/// `busy[engine]` are its busy stretches in seconds, ordered and not overlapping. Adds up to the union of all stretches.
#[must_use]
pub fn time_sliced(busy: &[Vec<(f64, f64)>]) -> Vec<f64> {
    by_moment(busy, &vec![1.0; busy.len()])
}

/// Seconds of the GPU for each engine under MPS: every moment goes to the engines active then in proportion to what each
/// demands alone (`demand`, such as its predicted share of the GPU when it runs by itself).
#[must_use]
pub fn mps(busy: &[Vec<(f64, f64)>], demand: &[f64]) -> Vec<f64> {
    by_moment(busy, demand)
}

fn by_moment(busy: &[Vec<(f64, f64)>], weights: &[f64]) -> Vec<f64> {
    let mut events: Vec<(f64, usize, bool)> = busy
        .iter()
        .enumerate()
        .flat_map(|(engine, stretches)| {
            let proper = stretches.iter().filter(|(from, until)| from < until);
            proper.flat_map(move |&(from, until)| [(from, engine, true), (until, engine, false)])
        })
        .collect();
    // At the same moment ends come before starts, so that an engine is never counted twice.
    events.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.2.cmp(&b.2)).then(a.1.cmp(&b.1)));
    let mut active = vec![false; busy.len()];
    let mut seconds = vec![0.0; busy.len()];
    let mut since = 0.0;
    for (at, engine, starts) in events {
        let running: Vec<usize> = (0..active.len()).filter(|&other| active[other]).collect();
        let all: f64 = running.iter().map(|&other| weights[other].max(0.0)).sum();
        for &other in &running {
            let part = if all > 0.0 { weights[other].max(0.0) / all } else { 1.0 / running.len() as f64 };
            seconds[other] += (at - since) * part;
        }
        active[engine] = starts;
        since = at;
    }
    seconds
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn slices_pay_for_compute_and_memory_and_the_rest_is_stranded() {
        let one = MigSlice::of_profile("1g.10gb", 10).unwrap();
        let three = MigSlice::of_profile("3g.40gb", 10).unwrap();
        assert_eq!((one, three), (MigSlice { compute: 1, memory: 1 }, MigSlice { compute: 3, memory: 4 }));
        let (parts, stranded) = mig(&[one, three], MIG_ALPHA);
        assert!((parts[0] - 0.5 * (1.0 / 7.0 + 1.0 / 8.0)).abs() < 1e-12);
        assert!((parts.iter().sum::<f64>() + stranded - 1.0).abs() < 1e-12 && stranded > 0.4);
        let (all, none) = mig(&[MigSlice { compute: 1, memory: 1 }; 8], MIG_ALPHA);
        assert!((all.iter().sum::<f64>() - 1.0).abs() < 1e-12 && none == 0.0);
        assert_eq!(MigSlice::of_profile("8g.80gb", 10), None);
        assert_eq!(MigSlice::of_profile("whole", 10), None);
    }

    #[test]
    fn moments_are_shared_by_who_is_active() {
        let busy = [vec![(0.0, 4.0)], vec![(2.0, 6.0)], vec![]];
        assert_eq!(time_sliced(&busy), [3.0, 3.0, 0.0]);
        assert_eq!(mps(&busy, &[3.0, 1.0, 5.0]), [3.5, 2.5, 0.0]);
    }

    proptest! {
        #[test]
        fn time_slices_add_up_to_the_union(
            lengths in prop::collection::vec(prop::collection::vec((0.0f64..3.0, 0.0f64..3.0), 0..8), 1..6),
        ) {
            let busy: Vec<Vec<(f64, f64)>> = lengths
                .iter()
                .map(|engine| {
                    let mut at = 0.0;
                    engine.iter().map(|&(gap, length)| { let from = at + gap; at = from + length; (from, at) }).collect()
                })
                .collect();
            let mut all: Vec<(f64, f64)> = busy.iter().flatten().copied().collect();
            all.sort_by(|a, b| a.0.total_cmp(&b.0));
            let mut union = 0.0;
            let mut upto = 0.0f64;
            for (from, until) in all {
                union += (until - from.max(upto)).max(0.0);
                upto = upto.max(until);
            }
            prop_assert!((time_sliced(&busy).iter().sum::<f64>() - union).abs() < 1e-9);
        }
    }
}
