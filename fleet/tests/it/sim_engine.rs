//! The engine simulator against real engines: what it was calibrated on is never what it is judged by.
//!
//! The measured material lies beside the checkout; without it these tests say that they are skipped.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use fleet::sim::engine::calibrate::{Errors, Point, calibrate, calibrate_points, compare};
use fleet::sim::engine::{Constants, Limits, Load, Spec, Summary, play};
use fleet::sim::{Arrival, Done};
use ledger::allocate::replica::Replica;
use ledger::allocate::shape::Model;
use ledger::step::GpuSheet;
use serde_json::Value;

/// The folder named by `FARTHING_DATA`, else `shared/data` beside the checkout.
fn folder() -> Option<PathBuf> {
    let beside = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/data");
    let folder = std::env::var_os("FARTHING_DATA").map_or_else(beside, PathBuf::from);
    if folder.is_dir() {
        return Some(folder);
    }
    eprintln!("SKIPPED: no measured material in {}; set FARTHING_DATA to its folder", folder.display());
    None
}

const LLAMA: &str = r#"{ "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": false, "torch_dtype": "bfloat16" }"#;
const QWEN: &str = r#"{ "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8,
    "head_dim": 128, "intermediate_size": 25600, "vocab_size": 151936, "tie_word_embeddings": false, "torch_dtype": "bfloat16" }"#;

struct Run {
    spec: Spec,
    measured: Vec<Done>,
}

impl Run {
    fn read(name: &str, config: &str, gpu: GpuSheet, gpus: u32) -> Option<Run> {
        let folder = folder()?.join("vllm-runs").join(name);
        let read = |file: &str| std::fs::read_to_string(folder.join(file)).unwrap();
        let meta: Value = serde_json::from_str(&read("meta.json")).unwrap();
        let rows: Vec<Value> = read("requests.jsonl").lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let seconds = |row: &Value, key: &str| row[key].as_f64().unwrap();
        let number = |value: &Value| u32::try_from(value.as_u64().unwrap()).unwrap();
        // The request that the engine saw soonest after its arrival ties the two clocks together.
        let behind = |row: &Value| seconds(row, "queued_ts") - seconds(row, "arrival_time");
        let offset = rows.iter().map(behind).fold(f64::MAX, f64::min);
        let begin = rows.iter().map(|row| seconds(row, "arrival_time")).fold(f64::MAX, f64::min) + offset;
        let us = |at: f64| -> u64 { Duration::from_secs_f64((at - begin).max(0.0)).as_micros().try_into().unwrap() };
        let mut measured: Vec<Done> = (0u64..)
            .zip(&rows)
            .map(|(id, row)| Done {
                arrival: Arrival {
                    id,
                    at_us: us(seconds(row, "arrival_time") + offset),
                    input_tokens: number(&row["input_toks"]),
                    output_tokens: number(&row["output_toks"]),
                    ..Arrival::default()
                },
                scheduled_us: us(seconds(row, "scheduled_ts")),
                first_token_us: us(seconds(row, "first_token_ts")),
                last_token_us: us(seconds(row, "last_token_ts")),
                ..Done::default()
            })
            .collect();
        measured.sort_by_key(|one| one.arrival.at_us);
        let replica = Replica::unfitted(Model::from_config(config).unwrap(), gpu, gpus);
        let kwargs = &meta["engine_kwargs"];
        let limits = Limits {
            max_num_seqs: number(&kwargs["max_num_seqs"]),
            max_num_batched_tokens: number(&kwargs["max_num_batched_tokens"]),
            kv_tokens: meta["kv_cache"]["num_kv_tokens"].as_u64(),
            ..Limits::of_gpu(&gpu)
        };
        Some(Run { spec: Spec { constants: Constants::unfitted(replica), limits }, measured })
    }

    fn llama() -> Option<Run> {
        Run::read("RTX4090_Llama-3.1-8B", LLAMA, GpuSheet::RTX_4090, 1)
    }

    fn qwen() -> Option<Run> {
        Run::read("RTXPRO6000_Qwen3-32B", QWEN, GpuSheet::RTX_PRO_6000, 2)
    }

    fn half(&self, second: bool) -> impl Fn(&Done) -> bool + use<> {
        let middle_us = self.measured[self.measured.len() / 2].arrival.at_us;
        move |one: &Done| (one.arrival.at_us >= middle_us) == second
    }

    fn calibrated(&self, on_second: bool) -> Constants {
        let found = calibrate(&self.spec, &self.measured, self.half(on_second)).unwrap();
        eprintln!(
            "{:?} overlap {} sequence {:.1} us, loss {:.5}",
            found.constants.replica.efficiencies,
            found.constants.replica.overlap,
            found.constants.sequence_s * 1e6,
            found.loss
        );
        found.constants
    }

    fn errors(&self, constants: Constants, judged: impl Fn(&Done) -> bool) -> Errors {
        compare(&Spec { constants, ..self.spec }, &self.measured, judged).unwrap()
    }
}

#[track_caller]
fn within(what: &str, errors: Errors, tpot: f64, ttft: f64) {
    eprintln!(
        "{what}: TPOT {:+.1} %, TTFT {:+.1} %, end {:+.1} %",
        errors.tpot * 100.0,
        errors.ttft * 100.0,
        errors.e2e * 100.0
    );
    assert!(errors.tpot.abs() <= tpot && errors.ttft.abs() <= ttft, "{what}: {errors:?}");
}

/// The same constants on another model and GPU.
fn carried(constants: Constants, to: &Run) -> Constants {
    let target = to.spec.constants;
    let replica =
        Replica { efficiencies: constants.replica.efficiencies, overlap: constants.replica.overlap, ..target.replica };
    Constants { replica, link_bytes_per_s: target.link_bytes_per_s, ..constants }
}

#[test]
fn half_of_a_run_predicts_the_other_half() {
    let Some((llama, qwen)) = Run::llama().zip(Run::qwen()) else { return };
    for (name, run) in [("Llama 8B on RTX 4090", &llama), ("Qwen 32B on 2 RTX PRO 6000", &qwen)] {
        for second in [false, true] {
            let constants = run.calibrated(second);
            let errors = run.errors(constants, run.half(!second));
            let half = if second { "second" } else { "first" };
            within(&format!("{name}, calibrated on the {half} half"), errors, 0.05, 0.10);
        }
    }
}

#[test]
fn one_run_predicts_the_other_with_only_model_and_gpu_changed() {
    let Some((llama, qwen)) = Run::llama().zip(Run::qwen()) else { return };
    for (name, from, to) in [("Llama to Qwen", &llama, &qwen), ("Qwen to Llama", &qwen, &llama)] {
        let constants = carried(from.calibrated(false), to);
        within(name, to.errors(constants, |_| true), 0.15, 0.15);
    }
}

/// The published curve: output tokens a second and the median time per token at each rate.
fn curve() -> Option<Vec<(f64, Point)>> {
    let path = folder()?.join("llm-cost-vs-load/llama-3.1-8b-fp16-h100.csv");
    let text = std::fs::read_to_string(path).unwrap();
    let mut lines = text.lines().map(|line| line.split(',').collect::<Vec<_>>());
    let heads = lines.next().unwrap();
    let rows = lines.map(|row| {
        let value = |name: &str| row[heads.iter().position(|head| *head == name).unwrap()].parse::<f64>().ok();
        let rate = value("rps").unwrap();
        // 500 prompts of 512 tokens: requests / (requests / rate + the last one's time) is the published throughput at each rate.
        let load = Load { requests_per_s: rate, requests: 500, input_tokens: 512, output_tokens: 256, seed: 1 };
        let point = Point {
            load,
            tps_output: value("tps_output"),
            ttft_ms: ["ttft_mean_ms", "ttft_p50_ms", "ttft_p99_ms"].map(value),
            tpot_ms: ["tpot_p50_ms", "tpot_p90_ms"].map(value),
            e2e_ms: ["e2el_p50_ms", "e2el_p99_ms"].map(value),
        };
        (rate, point)
    });
    let mut points: Vec<(f64, Point)> = rows.collect();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    Some(points)
}

fn h100() -> Spec {
    let replica = Replica::unfitted(Model::from_config(LLAMA).unwrap(), GpuSheet::H100, 1);
    let spec = Spec::new(Constants::unfitted(replica));
    Spec { limits: Limits { prefix_caching: false, ..spec.limits }, ..spec }
}

/// Relative errors of throughput and median time per token, means over ten seeds.
fn off(spec: &Spec, point: &Point) -> (f64, f64) {
    const SEEDS: u32 = 10;
    let mut sums = (0.0, 0.0);
    for seed in 0..SEEDS {
        let mut done = Vec::new();
        let load = Load { seed: 100 + u64::from(seed), ..point.load };
        play(spec, &load.arrivals(), Arc::default(), &mut |one| done.push(one)).unwrap();
        let found = Summary::of(&done);
        sums.0 += (found.tps_output / point.tps_output.unwrap() - 1.0) / f64::from(SEEDS);
        sums.1 += (found.tpot_ms.p50 / point.tpot_ms[0].unwrap() - 1.0) / f64::from(SEEDS);
    }
    sums
}

#[test]
fn two_rates_predict_the_whole_curve() {
    let Some(curve) = curve() else { return };
    let seen: Vec<Point> =
        curve.iter().filter(|(rate, _)| [1.0, 200.0].contains(rate)).map(|(_, point)| *point).collect();
    assert_eq!((curve.len(), seen.len()), (7, 2));
    let found = calibrate_points(&h100(), &seen).unwrap();
    eprintln!("{:?}", found);
    let spec = Spec { constants: found.constants, ..h100() };
    for (rate, point) in &curve {
        let (tps, tpot) = off(&spec, point);
        eprintln!("{rate} requests/s: throughput {:+.1} %, TPOT {:+.1} %", tps * 100.0, tpot * 100.0);
        assert!(tps.abs() <= 0.10 && tpot.abs() <= 0.15, "{rate}: {tps} {tpot}");
    }
}

#[test]
fn the_data_sheet_alone_comes_close_in_throughput() {
    let Some(curve) = curve() else { return };
    for (rate, point) in &curve {
        let (tps, tpot) = off(&h100(), point);
        eprintln!("{rate} requests/s, not calibrated: throughput {:+.1} %, TPOT {:+.1} %", tps * 100.0, tpot * 100.0);
        assert!(tps.abs() <= 0.25, "{rate}: {tps}");
    }
}
