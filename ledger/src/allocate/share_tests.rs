//! Shares against Shapley's value by enumeration, and the properties that any fair share must have.

use proptest::prelude::*;

use super::*;
use crate::allocate::replica::Replica;
use crate::step::{Efficiencies, GpuSheet, ModelShape, Work};

/// Shapley's value by enumeration of all subsets: the definition, term for term.
fn exact(fixed: Fixed, demands: &[Demand]) -> Vec<f64> {
    let n = demands.len();
    let mut factorial = vec![1.0f64; n + 1];
    for k in 1..=n {
        factorial[k] = factorial[k - 1] * k as f64;
    }
    let value = |set: usize| {
        let present: Vec<Demand> = (0..n).filter(|i| set >> i & 1 == 1).map(|i| demands[i]).collect();
        fixed.step_s(&present)
    };
    let values: Vec<f64> = (0..1usize << n).map(value).collect();
    (0..n)
        .map(|i| {
            (0..1usize << n)
                .filter(|set| set >> i & 1 == 0)
                .map(|set| {
                    let size = set.count_ones() as usize;
                    let weight = factorial[size] * factorial[n - size - 1] / factorial[n];
                    weight * (values[set | 1 << i] - values[set])
                })
                .sum()
        })
        .collect()
}

/// `1/2 sum |phi - phi*| / t`: the part of the bill that reaches the wrong request.
fn misallocation(shares: &[f64], exact: &[f64]) -> f64 {
    let total: f64 = exact.iter().sum();
    shares.iter().zip(exact).map(|(a, b)| (a - b).abs()).sum::<f64>() / 2.0 / total
}

fn totals(shares: &[Share]) -> Vec<f64> {
    shares.iter().map(Share::total_s).collect()
}

/// A small seeded generator, so that the study below is the same on every machine.
struct Dice(u64);

impl Dice {
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    fn between(&mut self, low: u32, high: u32) -> u32 {
        let scaled = self.unit() * f64::from(high - low);
        low + u32::try_from(crate::allocate::timeline::whole_micros(scaled * 1e-6)).unwrap()
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Study {
    mean: f64,
    worst: f64,
}

impl Study {
    fn of(errors: &[f64]) -> Study {
        Study {
            mean: errors.iter().sum::<f64>() / errors.len() as f64,
            worst: errors.iter().copied().fold(0.0, f64::max),
        }
    }
}

/// Equal parts, flat tokens, tokens with an output token counting twice, the diagonal and the smoothed rule against the
/// exact value, over `rounds` random batches.
fn study(rounds: usize, mut batch: impl FnMut(&mut Dice) -> Vec<Work>) -> [Study; 5] {
    let replica = Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 1);
    let mut dice = Dice(42);
    let mut errors = [const { Vec::new() }; 5];
    for _ in 0..rounds {
        let works = batch(&mut dice);
        let demands: Vec<Demand> = works.iter().map(|&work| replica.demand(work)).collect();
        let tokens: f64 = works.iter().map(|work| f64::from(work.new_tokens)).sum();
        let fixed = replica.fixed(tokens);
        let truth = exact(fixed, &demands);
        let step_s = fixed.step_s(&demands);
        // A request that adds one token to the batch is decoding, all others compute their input.
        let by = |weight: &dyn Fn(Work) -> f64| -> Vec<f64> {
            let all: f64 = works.iter().map(|&work| weight(work)).sum();
            works.iter().map(|&work| step_s * weight(work) / all).collect()
        };
        let flat = by(&|work| f64::from(work.new_tokens));
        let weighted = by(&|work| if work.new_tokens == 1 { 2.0 } else { f64::from(work.new_tokens) });
        let rules = [diagonal, smoothed].map(|rule| totals(&rule(fixed, &demands)));
        let [diagonal, smoothed] = rules;
        for (errors, shares) in errors.iter_mut().zip([by(&|_| 1.0), flat, weighted, diagonal, smoothed]) {
            errors.push(misallocation(&shares, &truth));
        }
    }
    errors.map(|errors| Study::of(&errors))
}

/// Ten requests: decodes on contexts of 100 to 8,000 tokens and a few small chunks.
fn mild(dice: &mut Dice) -> Vec<Work> {
    (0..10)
        .map(|_| {
            let new_tokens = if dice.unit() < 0.7 { 1 } else { dice.between(16, 128) };
            Work { new_tokens, cached_tokens: dice.between(100, 8_000) }
        })
        .collect()
}

/// Eight requests, some of which prefill up to 2,048 tokens at once.
fn lumpy(dice: &mut Dice) -> Vec<Work> {
    (0..8)
        .map(|_| {
            if dice.unit() < 0.6 {
                Work { new_tokens: 1, cached_tokens: dice.between(100, 16_000) }
            } else {
                Work { new_tokens: dice.between(64, 2_048), cached_tokens: 0 }
            }
        })
        .collect()
}

/// Six requests around the ridge of the roofline: one chunk decides on which side the step lies.
fn ridge(dice: &mut Dice) -> Vec<Work> {
    (0..6)
        .map(|_| {
            if dice.unit() < 0.7 {
                Work { new_tokens: 1, cached_tokens: dice.between(1_000, 30_000) }
            } else {
                Work { new_tokens: dice.between(64, 512), cached_tokens: dice.between(0, 4_000) }
            }
        })
        .collect()
}

#[test]
fn misallocation_against_exact_shapley() {
    for (name, [equal, flat, weighted, diagonal, smoothed]) in
        [("mild", study(60, mild)), ("lumpy", study(60, lumpy)), ("ridge", study(60, ridge))]
    {
        for (method, Study { mean, worst }) in
            [("equal", equal), ("flat", flat), ("weighted", weighted), ("diagonal", diagonal), ("smoothed", smoothed)]
        {
            println!("against exact Shapley, {name}, {method}: mean {mean:.4} worst {worst:.4}");
        }
        assert!(diagonal.mean <= 0.03, "{name}: {diagonal:?}");
        assert!(smoothed.mean <= 0.01 && smoothed.worst <= 0.03, "{name}: {smoothed:?}");
        assert!(flat.mean > 3.0 * diagonal.mean, "{name}: flat {flat:?}");
    }
}

#[test]
fn a_linear_step_is_shared_exactly() {
    let replica = Replica { overlap: 0.0, ..Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 1) };
    let demands: Vec<Demand> = lumpy(&mut Dice(7)).into_iter().map(|work| replica.demand(work)).collect();
    let fixed = replica.fixed(1.0);
    let truth = exact(fixed, &demands);
    for shares in [diagonal(fixed, &demands), smoothed(fixed, &demands)] {
        assert!(misallocation(&totals(&shares), &truth) < 1e-9);
    }
}

#[test]
fn the_diagonal_is_not_monotone_at_the_ridge_and_the_smoothed_rule_is() {
    let fixed = Fixed { weights_s: 5.0, overlap: 1.0, ..Fixed::default() };
    let reader = |compute_s: f64| Demand { compute_s, memory_s: 10.0, new_tokens: 1 };
    let batch = |compute_s: f64| [reader(compute_s), Demand { compute_s: 16.0, memory_s: 0.0, new_tokens: 500 }];
    let own = |rule: fn(Fixed, &[Demand]) -> Vec<Share>, compute_s: f64| rule(fixed, &batch(compute_s))[0].total_s();
    assert!(own(diagonal, 1.1) < own(diagonal, 0.1) - 0.5);
    assert!(own(smoothed, 1.1) > own(smoothed, 0.1));
    assert!((own(smoothed, 0.1) - exact(fixed, &batch(0.1))[0]).abs() < 1e-6);
}

#[test]
fn the_normal_distribution_is_one() {
    for (z, below) in [(0.0, 0.5), (1.0, 0.841_344_746), (-1.96, 0.024_997_895), (6.0, 1.0)] {
        assert!((normal_below(z) - below).abs() < 1e-7, "{z}");
    }
    assert!((expected_positive(0.0, 1.0) - 0.398_942_280).abs() < 1e-7);
    assert_eq!(expected_positive(-3.0, 0.0), 0.0);
    assert!((NODES.iter().map(|(_, weight)| weight).sum::<f64>() - 1.0).abs() < 1e-12);
}

fn any_work() -> impl Strategy<Value = Work> {
    prop_oneof![
        (0u32..60_000).prop_map(|cached_tokens| Work { new_tokens: 1, cached_tokens }),
        (1u32..4_096, 0u32..8_000).prop_map(|(new_tokens, cached_tokens)| Work { new_tokens, cached_tokens }),
    ]
}

fn any_replica() -> impl Strategy<Value = Replica> {
    (0.05f64..1.0, 0.05f64..1.0, 0.0f64..0.01, 0.0f64..=1.0, 1u32..8).prop_map(
        |(compute, bandwidth, overhead_s, overlap, gpus)| {
            let efficiencies = Efficiencies { compute, bandwidth, overhead_s };
            Replica {
                efficiencies,
                overlap,
                ..Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, gpus)
            }
        },
    )
}

fn shared(replica: &Replica, batch: &[Work], rule: fn(Fixed, &[Demand]) -> Vec<Share>) -> Vec<f64> {
    let demands: Vec<Demand> = batch.iter().map(|&work| replica.demand(work)).collect();
    let tokens = batch.iter().map(|work| f64::from(work.new_tokens)).sum();
    totals(&rule(replica.fixed(tokens), &demands))
}

proptest! {
    #[test]
    fn shares_add_up_and_nobody_is_paid(replica in any_replica(), batch in prop::collection::vec(any_work(), 1..40)) {
        let step_s = replica.step_s(&batch);
        for rule in [diagonal, smoothed] {
            let shares = shared(&replica, &batch, rule);
            prop_assert!((shares.iter().sum::<f64>() - step_s).abs() <= 1e-9 * step_s);
            prop_assert!(shares.iter().all(|&share| share >= -1e-12 * step_s), "{shares:?}");
        }
    }

    #[test]
    fn equal_work_pays_equally_and_order_does_not_matter(
        replica in any_replica(), batch in prop::collection::vec(any_work(), 1..20), turn in any::<prop::sample::Index>(),
    ) {
        let mut batch = batch;
        batch.push(batch[0]);
        for rule in [diagonal, smoothed] {
            let shares = shared(&replica, &batch, rule);
            let step_s: f64 = shares.iter().sum();
            prop_assert!((shares[0] - shares[batch.len() - 1]).abs() <= 1e-9 * step_s);
            let by = turn.index(batch.len());
            let mut turned = batch.clone();
            turned.rotate_left(by);
            let mut again = shared(&replica, &turned, rule);
            again.rotate_right(by);
            for (a, b) in shares.iter().zip(&again) {
                prop_assert!((a - b).abs() <= 1e-9 * step_s);
            }
        }
    }

    #[test]
    fn more_work_never_lowers_the_own_share(
        replica in any_replica(), batch in prop::collection::vec(any_work(), 1..20),
        tokens in 0u32..1_000, context in 0u32..10_000,
    ) {
        let before = shared(&replica, &batch, smoothed)[0];
        let mut more = batch.clone();
        more[0].new_tokens += tokens;
        more[0].cached_tokens += context;
        let after = shared(&replica, &more, smoothed)[0];
        // What the approximation puts back may move a little the other way.
        prop_assert!(after >= before - 2e-3 * replica.step_s(&batch), "{before} -> {after}");
    }

    #[test]
    fn both_rules_stay_close_to_the_exact_value(
        replica in any_replica(), batch in prop::collection::vec(any_work(), 1..8),
    ) {
        let demands: Vec<Demand> = batch.iter().map(|&work| replica.demand(work)).collect();
        let tokens = batch.iter().map(|work| f64::from(work.new_tokens)).sum();
        let fixed = replica.fixed(tokens);
        let truth = exact(fixed, &demands);
        prop_assert!(misallocation(&totals(&smoothed(fixed, &demands)), &truth) <= 0.05);
    }
}
