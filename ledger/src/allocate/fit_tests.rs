//! Fits on samples with known constants, and on measured material judged on its other half.

use proptest::prelude::*;

use super::*;
use crate::allocate::measured;
use crate::allocate::shape::Model;
use crate::allocate::timeline::whole_micros;
use crate::step::{GpuSheet, ModelShape};

const QWEN3_32B: ModelShape = ModelShape {
    layers: 64,
    hidden: 5120,
    heads: 64,
    kv_heads: 8,
    head_dim: 128,
    active_parameters: 31.98e9,
    total_parameters: 32.76e9,
    bytes_per_element: 2.0,
};

fn works(decodes: u32, context: u32, chunk: u32) -> Vec<Work> {
    let mut batch = vec![Work { new_tokens: 1, cached_tokens: context }; decodes as usize];
    batch.extend((chunk > 0).then_some(Work { new_tokens: chunk, cached_tokens: 0 }));
    batch
}

#[test]
fn known_constants_are_found_again_for_every_overlap() {
    let sheet = Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::A100, 1);
    for overlap in [1.0, 0.5, 0.0] {
        let truth = Replica {
            efficiencies: Efficiencies { compute: 0.55, bandwidth: 0.7, overhead_s: 2e-3 },
            overlap,
            ..sheet
        };
        let mut observations = Vec::new();
        for decodes in [1, 8, 40, 120] {
            for context in [100, 2_000] {
                for chunk in [0, 512, 2_048] {
                    let batch = works(decodes, context, chunk);
                    observations.push(Observed { loads: vec![sheet.load(&batch)], seconds: truth.step_s(&batch) });
                }
            }
        }
        let fit = Fit::of(&observations).unwrap();
        assert!((fit.efficiencies.compute - 0.55).abs() < 1e-3, "{overlap}: {fit:?}");
        assert!((fit.efficiencies.bandwidth - 0.7).abs() < 1e-3, "{overlap}: {fit:?}");
        assert!((fit.efficiencies.overhead_s - 2e-3).abs() < 1e-5, "{overlap}: {fit:?}");
        assert!(fit.error.p95 < 1e-3 && fit.overlap == overlap, "{fit:?}");
    }
}

#[test]
fn too_little_to_go_by_gives_no_fit() {
    let load = Load { steps: 1.0, compute_s: 1.0, memory_s: 1.0 };
    let one = Observed { loads: vec![load], seconds: 2.0 };
    let broken = Observed { loads: vec![load], seconds: f64::NAN };
    assert_eq!(Fit::of(&[one.clone(), one.clone(), one.clone(), broken]), None);
    assert!(Fit::of(&vec![one; 4]).is_some());
}

/// A steady state: `batch` decodes on the mean context; each finishes after `output` steps and makes room for a prefill,
/// so a fraction of the steps carries one.
fn steady(replica: &Replica, batch: f64, input: f64, output: f64) -> Vec<Load> {
    let whole = |value: f64| u32::try_from(whole_micros(value * 1e-6)).unwrap();
    let decode = Work { new_tokens: 1, cached_tokens: whole(input + output / 2.0) };
    let (alone, one) = (replica.load(&[]), replica.load(&[decode]));
    let prefill = replica.load(&[Work { new_tokens: whole(input), cached_tokens: 0 }]);
    let decoding = Load {
        steps: 1.0,
        compute_s: batch * one.compute_s,
        memory_s: alone.memory_s + batch * (one.memory_s - alone.memory_s),
    };
    let a_step = batch / output;
    let carried = a_step.max(1.0);
    let with_prefill =
        Load { steps: a_step.min(1.0), compute_s: decoding.compute_s + carried * prefill.compute_s, ..decoding };
    vec![Load { steps: 1.0 - a_step.min(1.0), ..decoding }, with_prefill]
}

/// Errors of both halves, each judged by the fit on the other.
fn held_out(observations: &[Observed]) -> Vec<f64> {
    let mut errors = Vec::new();
    for half in [0, 1] {
        let (train, test): (Vec<_>, Vec<_>) = observations.iter().enumerate().partition(|(row, _)| row % 2 == half);
        let train: Vec<Observed> = train.into_iter().map(|(_, observed)| observed.clone()).collect();
        let fit = Fit::of(&train).expect("half of the rows");
        println!("{fit:.4?}");
        errors.extend(test.iter().map(|(_, observed)| (fit.predict(&observed.loads) / observed.seconds - 1.0).abs()));
    }
    errors.sort_by(f64::total_cmp);
    errors
}

#[test]
fn step_times_of_a_32b_model_on_h100_are_predicted_on_held_out_rows() {
    let Some(rows) = measured::table("step-times/h100-sxm_vllm_qwen3-32b_bf16.csv") else { return };
    let mut all = Vec::new();
    for gpus in [2u32, 4, 8] {
        let replica = Replica::unfitted(QWEN3_32B.into(), GpuSheet::H100, gpus);
        let observations: Vec<Observed> = rows
            .iter()
            .filter(|row| row["tensor_parallel"] == gpus.to_string())
            .map(|row| {
                let value = |key: &str| row[key].parse::<f64>().unwrap();
                let (input, output) = (value("input_tokens"), value("output_tokens"));
                let fits = replica.kv_capacity_tokens(0.9) / (input + output / 2.0);
                let batch = value("concurrency").min(fits);
                Observed { loads: steady(&replica, batch, input, output), seconds: value("tpot_ms") / 1e3 }
            })
            .collect();
        let errors = held_out(&observations);
        println!("tensor parallel {gpus}: median {:.4}", errors[errors.len() / 2]);
        all.extend(errors);
    }
    all.sort_by(f64::total_cmp);
    println!(
        "step-times: {} rows, held-out median {:.4}, p90 {:.4}",
        all.len(),
        all[all.len() / 2],
        all[all.len() * 9 / 10]
    );
    assert!(all[all.len() / 2] <= 0.08);
}

#[test]
fn step_times_against_load_are_predicted_on_held_out_rows() {
    let Some(mut rows) = measured::table("llm-cost-vs-load/llama-3.1-8b-fp16-h100.csv") else { return };
    rows.sort_by_key(|row| row["rps"].parse::<u32>().unwrap());
    let replica = Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 1);
    let observations: Vec<Observed> = rows
        .iter()
        .map(|row| {
            let value = |key: &str| row[key].parse::<f64>().unwrap();
            let seconds = value("tpot_p50_ms") / 1e3;
            // Little: requests decoding at once = throughput x decode time. The inputs' length is not published; 512
            // tokens, the benchmark's default, only scales `eta_c`.
            let batch = value("request_throughput") * seconds * 256.0;
            Observed { loads: steady(&replica, batch, 512.0, 256.0), seconds }
        })
        .collect();
    // Seven rows give halves of four and three; a fit needs four, so the small half borrows the row in the middle.
    let mut errors = Vec::new();
    for train in [[0, 2, 4, 6], [1, 3, 5, 4]] {
        let rows: Vec<Observed> = train.iter().map(|&row: &usize| observations[row].clone()).collect();
        let fit = Fit::of(&rows).expect("four rows");
        println!("{fit:.4?}");
        let rest = (0..observations.len()).filter(|row| !train.contains(row)).map(|row| &observations[row]);
        errors.extend(rest.map(|observed| (fit.predict(&observed.loads) / observed.seconds - 1.0).abs()));
    }
    errors.sort_by(f64::total_cmp);
    println!(
        "llm-cost-vs-load: held-out median {:.4}, worst {:.4}",
        errors[errors.len() / 2],
        errors[errors.len() - 1]
    );
    assert!(errors[errors.len() / 2] <= 0.08);
}

proptest! {
    #[test]
    fn least_squares_is_never_negative_and_never_beaten(
        columns in prop::collection::vec(prop::collection::vec(-10.0f64..10.0, 8), 1..4),
        target in prop::collection::vec(-10.0f64..10.0, 8),
        others in prop::collection::vec(prop::collection::vec(0.0f64..5.0, 3), 20),
    ) {
        let x = non_negative_least_squares(&columns, &target);
        prop_assert!(x.iter().all(|&value| value >= 0.0 && value.is_finite()));
        let residual = |x: &[f64]| -> f64 {
            (0..8).map(|row| (columns.iter().zip(x).map(|(column, x)| column[row] * x).sum::<f64>() - target[row]).powi(2)).sum()
        };
        let best = residual(&x);
        for other in &others {
            prop_assert!(best <= residual(&other[..columns.len()]) + 1e-6);
        }
    }

    #[test]
    fn a_fit_is_physical_whatever_was_observed(
        rows in prop::collection::vec((0u32..200, 1u32..5_000, 0u32..4_000, 1e-4f64..10.0), 4..30),
    ) {
        let replica = Replica::unfitted(Model::from(ModelShape::LLAMA_3_1_8B), GpuSheet::H100, 1);
        let observations: Vec<Observed> = rows
            .iter()
            .map(|&(decodes, context, chunk, seconds)| Observed { loads: vec![replica.load(&works(decodes, context, chunk))], seconds })
            .collect();
        let fit = Fit::of(&observations).unwrap();
        let Efficiencies { compute, bandwidth, overhead_s } = fit.efficiencies;
        prop_assert!(compute > 0.0 && compute <= 1.0 && bandwidth > 0.0 && bandwidth <= 1.0 && overhead_s >= 0.0);
        prop_assert!(fit.error.median <= fit.error.p95);
    }
}
