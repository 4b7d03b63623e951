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

/// Who works on the same GPUs as others: an engine, or a job that is no request.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Party {
    /// When it works, in seconds; ordered and not overlapping.
    pub busy: Vec<(f64, f64)>,
    /// What it demands in proportion to the others, such as its predicted share of the GPU when it runs by itself.
    pub demand: f64,
    /// The part of the GPU that it uses at most, 0 to 1.
    pub cap: f64,
}

/// Seconds of the GPU for each engine under time slicing: every moment goes in equal parts to the engines active then.
/// `busy[engine]` are its busy stretches in seconds, ordered and not overlapping. Adds up to the union of all stretches.
#[must_use]
pub fn time_sliced(busy: &[Vec<(f64, f64)>]) -> Vec<f64> {
    mps(busy, &vec![1.0; busy.len()])
}

/// Seconds of the GPU for each engine under MPS: every moment goes to the engines active then in proportion to what each
/// demands alone.
#[must_use]
pub fn mps(busy: &[Vec<(f64, f64)>], demand: &[f64]) -> Vec<f64> {
    let party = |(busy, demand): (&Vec<(f64, f64)>, &f64)| Party { busy: busy.clone(), demand: *demand, cap: 1.0 };
    shared(&busy.iter().zip(demand).map(party).collect::<Vec<_>>())
}

/// Seconds of the GPU for each party: every moment goes to those that work then in proportion to what they demand, none
/// beyond its cap; what a capped one leaves goes to the others. A moment in which all are at their caps is partly idle.
#[must_use]
pub fn shared(parties: &[Party]) -> Vec<f64> {
    let mut events: Vec<(f64, usize, bool)> = parties
        .iter()
        .enumerate()
        .flat_map(|(party, Party { busy, .. })| {
            let proper = busy.iter().filter(|(from, until)| from < until);
            proper.flat_map(move |&(from, until)| [(from, party, true), (until, party, false)])
        })
        .collect();
    // At the same moment ends come before starts, so that a party is never counted twice.
    events.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.2.cmp(&b.2)).then(a.1.cmp(&b.1)));
    let mut active: Vec<usize> = Vec::with_capacity(parties.len());
    let mut seconds = vec![0.0; parties.len()];
    let mut since = 0.0;
    for (at, party, starts) in events {
        if at > since {
            for (other, part) in fair(parties, &active) {
                seconds[other] += (at - since) * part;
            }
        }
        if starts {
            active.push(party);
        } else {
            active.retain(|other| *other != party);
        }
        since = at;
    }
    seconds
}

/// The parts of one moment: in proportion to demand, and whoever would get more than its cap gets its cap.
fn fair(parties: &[Party], active: &[usize]) -> Vec<(usize, f64)> {
    let mut open: Vec<usize> = active.to_vec();
    let mut parts = Vec::with_capacity(active.len());
    let mut left = 1.0;
    while !open.is_empty() {
        let all: f64 = open.iter().map(|&at| parties[at].demand.max(0.0)).sum();
        let part =
            |at: usize| left * if all > 0.0 { parties[at].demand.max(0.0) / all } else { 1.0 / open.len() as f64 };
        let (capped, rest): (Vec<usize>, Vec<usize>) = open.iter().partition(|&&at| part(at) >= parties[at].cap);
        if capped.is_empty() {
            parts.extend(open.iter().map(|&at| (at, part(at))));
            break;
        }
        parts.extend(capped.iter().map(|&at| (at, parties[at].cap.max(0.0))));
        left = (left - capped.iter().map(|&at| parties[at].cap.max(0.0)).sum::<f64>()).max(0.0);
        open = rest;
    }
    parts
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

    #[test]
    fn a_capped_party_leaves_the_rest_to_the_others() {
        let party = |from: f64, until: f64, cap: f64| Party { busy: vec![(from, until)], demand: 1.0, cap };
        // A job that uses a tenth at most beside an engine, then two engines beside it, then the job alone.
        let parties = [party(0.0, 30.0, 0.1), party(0.0, 20.0, 1.0), party(10.0, 20.0, 1.0)];
        let seconds = shared(&parties);
        let expected = [3.0, 9.0 + 4.5, 4.5];
        assert!(seconds.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-9), "{seconds:?}");
    }

    proptest! {
        #[test]
        fn moments_never_go_beyond_the_gpu_or_a_cap(
            parties in prop::collection::vec((0.0f64..10.0, 0.1f64..10.0, 0.0f64..4.0, 0.0f64..=1.0), 1..7),
        ) {
            let parties: Vec<Party> = parties
                .into_iter()
                .map(|(from, length, demand, cap)| Party { busy: vec![(from, from + length)], demand, cap })
                .collect();
            let seconds = shared(&parties);
            for (party, got) in parties.iter().zip(&seconds) {
                let (from, until) = party.busy[0];
                prop_assert!(*got >= 0.0 && *got <= (until - from) * party.cap + 1e-9);
            }
            prop_assert!(seconds.iter().sum::<f64>() <= 20.0 + 1e-9);
            let whole: Vec<Party> = parties.iter().map(|party| Party { cap: 1.0, ..party.clone() }).collect();
            let busy: Vec<Vec<(f64, f64)>> = whole.iter().map(|party| party.busy.clone()).collect();
            let union: f64 = time_sliced(&busy).iter().sum();
            prop_assert!((shared(&whole).iter().sum::<f64>() - union).abs() < 1e-9);
        }

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
