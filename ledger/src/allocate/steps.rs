//! Tier A: the engine reports its steps, so each step is shared as it was and its measured time is what is paid.
//!
//! Reports come late, twice, with gaps and with overlapping times (an engine that prepares the next step while the GPU
//! runs this one counts both). A step is charged for the time that no earlier step covers, so that the union of all
//! steps is charged once; gaps in the sequence are counted and their time stays unclaimed for a lower tier.

use std::collections::BTreeMap;

use super::replica::{Demand, Fixed, Replica};
use super::share::{Share, smoothed};
use crate::step::Work;

/// An adapter (LoRA) that a request's tokens pass through.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Adapter {
    /// The caller's number of the adapter.
    pub id: u64,
    /// Bytes of its weights, read once in a step and shared among its users.
    pub bytes: f64,
    /// FLOP for one token: `2 r sum(d_in + d_out)` over the matrices it adapts.
    pub flop_per_token: f64,
}

/// What one request did in one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Entry {
    /// The caller's number of the request.
    pub tag: u64,
    /// Scheduled tokens, drafts of speculative decoding included, and cached ones.
    pub work: Work,
    /// The adapter it used.
    pub adapter: Option<Adapter>,
}

/// One step as the engine reported it.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    /// The engine's count of its steps; says what is missing.
    pub sequence: u64,
    /// Start in seconds of the engine's own clock.
    pub start_s: f64,
    /// Duration in seconds.
    pub seconds: f64,
    /// The batch.
    pub batch: Vec<Entry>,
}

/// What the steps come to.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Charged {
    /// Seconds of the replica that each request pays, by its tag; they add up to `busy_s`.
    pub shares: BTreeMap<u64, Share>,
    /// Length of the union of all steps with work in them.
    pub busy_s: f64,
    /// Steps that the sequence says are missing.
    pub missing: u64,
    /// Reports of a step that was there already.
    pub duplicates: u64,
}

/// Shares of one step in the order of its batch, scaled from the model's time to the measured one.
#[must_use]
pub fn share_step(replica: &Replica, batch: &[Entry], seconds: f64) -> Vec<Share> {
    scaled(replica, batch, seconds).0
}

/// [`share_step`], except that the fixed part (overhead, and the weights that every token meets) goes to the tenants with
/// requests in the batch first, in equal parts, and then to a tenant's requests. `tenants` has each request's tenant.
#[must_use]
pub fn share_step_among(replica: &Replica, batch: &[Entry], tenants: &[u32], seconds: f64) -> Vec<Share> {
    let mut sizes: BTreeMap<u32, f64> = BTreeMap::new();
    for tenant in tenants {
        *sizes.entry(*tenant).or_default() += 1.0;
    }
    let (mut shares, weights_s) = scaled(replica, batch, seconds);
    let overhead_s: f64 = shares.iter().map(|share| share.overhead_s).sum();
    for (share, tenant) in shares.iter_mut().zip(tenants) {
        let part = 1.0 / (sizes.len() as f64 * sizes[tenant]);
        share.overhead_s = overhead_s * part;
        share.weights_s += weights_s * (part - 1.0 / batch.len() as f64);
    }
    shares
}

/// Shares that add up to `seconds`, and what of them went to the weights that every token meets.
fn scaled(replica: &Replica, batch: &[Entry], seconds: f64) -> (Vec<Share>, f64) {
    let (fixed, demands) = game(replica, batch);
    let shares = smoothed(fixed, &demands);
    let predicted: f64 = shares.iter().map(Share::total_s).sum();
    if predicted <= 0.0 {
        let equal = seconds / batch.len().max(1) as f64;
        return (vec![Share { overhead_s: equal, ..Share::default() }; batch.len()], 0.0);
    }
    let scale = seconds / predicted;
    (shares.into_iter().map(|share| share.scaled(scale)).collect(), fixed.weights_s * scale)
}

/// Shares of all steps, whatever order they come in and however often.
#[must_use]
pub fn charge(replica: &Replica, steps: &[Step]) -> Charged {
    let mut once: BTreeMap<u64, &Step> = BTreeMap::new();
    let mut charged = Charged::default();
    for step in steps {
        if once.insert(step.sequence, step).is_some() {
            charged.duplicates += 1;
        }
    }
    if let (Some((first, _)), Some((last, _))) = (once.first_key_value(), once.last_key_value()) {
        charged.missing = (last - first).saturating_sub(once.len() as u64 - 1);
    }
    let mut ordered: Vec<&Step> = once.into_values().collect();
    ordered.sort_by(|a, b| a.start_s.total_cmp(&b.start_s).then(a.sequence.cmp(&b.sequence)));
    let mut covered_s = f64::NEG_INFINITY;
    for step in ordered {
        let worked = step.batch.iter().any(|entry| entry.work.new_tokens > 0);
        let end_s = step.start_s + step.seconds.max(0.0);
        if !worked || !end_s.is_finite() || end_s <= covered_s {
            continue;
        }
        let seconds = end_s - step.start_s.max(covered_s);
        covered_s = end_s;
        charged.busy_s += seconds;
        for (entry, share) in step.batch.iter().zip(share_step(replica, &step.batch, seconds)) {
            *charged.shares.entry(entry.tag).or_default() += share;
        }
    }
    charged
}

/// The step's game: adapters add compute to their users and their bytes, once, to all of their users together.
fn game(replica: &Replica, batch: &[Entry]) -> (Fixed, Vec<Demand>) {
    let mut users: BTreeMap<u64, f64> = BTreeMap::new();
    for adapter in batch.iter().filter_map(|entry| entry.adapter) {
        *users.entry(adapter.id).or_default() += 1.0;
    }
    let gpus = f64::from(replica.gpus);
    let flop_per_s = replica.gpu.flop_per_s * gpus * replica.efficiencies.compute;
    let bytes_per_s = replica.gpu.bytes_per_s * gpus * replica.efficiencies.bandwidth;
    let demands = batch
        .iter()
        .map(|entry| {
            let mut demand = replica.demand(entry.work);
            if let Some(adapter) = entry.adapter {
                demand.compute_s += adapter.flop_per_token * f64::from(entry.work.new_tokens) / flop_per_s;
                demand.memory_s += adapter.bytes / bytes_per_s / users[&adapter.id];
            }
            demand
        })
        .collect();
    let tokens = batch.iter().map(|entry| f64::from(entry.work.new_tokens)).sum();
    (replica.fixed(tokens), demands)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::step::{GpuSheet, ModelShape};

    fn replica() -> Replica {
        Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 1)
    }

    fn entry(tag: u64, new_tokens: u32, cached_tokens: u32) -> Entry {
        Entry { tag, work: Work { new_tokens, cached_tokens }, adapter: None }
    }

    #[test]
    fn overlapping_steps_are_charged_once_and_gaps_are_counted() {
        let step = |sequence: u64, start_s: f64| Step {
            sequence,
            start_s,
            seconds: 0.01,
            batch: vec![entry(1, 1, 100), entry(2, 1, 100)],
        };
        let steps = [step(7, 0.0), step(8, 0.005), step(8, 0.005), step(11, 1.0)];
        let charged = charge(&replica(), &steps);
        assert!((charged.busy_s - 0.025).abs() < 1e-12);
        assert_eq!((charged.missing, charged.duplicates), (2, 1));
        assert!((charged.shares[&1].total_s() - 0.0125).abs() < 1e-12);
        assert_eq!(charged.shares[&1], charged.shares[&2]);
    }

    #[test]
    fn an_adapter_is_paid_by_its_users_together() {
        let adapter = Adapter { id: 5, bytes: 3.35e9 * 0.8, flop_per_token: 1e9 };
        let user = |tag| Entry { adapter: Some(adapter), ..entry(tag, 1, 100) };
        let seconds = |batch: &[Entry]| -> Vec<f64> {
            let (fixed, demands) = game(&replica(), batch);
            smoothed(fixed, &demands).iter().map(Share::total_s).collect()
        };
        let alone = seconds(&[user(1), entry(2, 1, 100), entry(3, 1, 100)]);
        let both = seconds(&[user(1), user(2), entry(3, 1, 100)]);
        // Reading 2.68 GB at 2.68 TB/s takes a millisecond.
        assert!((alone[0] - alone[1] - 1e-3).abs() < 1e-6, "{alone:?}");
        assert!((both[0] - both[2] - 0.5e-3).abs() < 1e-6, "{both:?}");
    }

    proptest! {
        #[test]
        fn order_and_repetition_change_nothing(
            lengths in prop::collection::vec((0.001f64..0.05, 1u32..2_000, 0u32..9_000, 0u64..6), 1..30),
            seed in any::<prop::sample::Index>(),
        ) {
            let mut start_s = 0.0;
            let steps: Vec<Step> = lengths
                .iter()
                .enumerate()
                .map(|(index, &(seconds, new, cached, tag))| {
                    start_s += 0.02;
                    Step { sequence: index as u64, start_s, seconds, batch: vec![entry(tag, new, cached), entry(9, 1, cached)] }
                })
                .collect();
            let charged = charge(&replica(), &steps);
            let paid: f64 = charged.shares.values().map(Share::total_s).sum();
            prop_assert!((paid - charged.busy_s).abs() <= 1e-9 * charged.busy_s);
            let mut again = steps.clone();
            again.rotate_left(seed.index(steps.len()));
            again.push(steps[seed.index(steps.len())].clone());
            let repeated = charge(&replica(), &again);
            prop_assert_eq!(&repeated.shares, &charged.shares);
            prop_assert_eq!(repeated.duplicates, 1);
        }
    }
}
