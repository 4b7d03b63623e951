//! `farthing simulate engine`: what it prints, what it refuses, and how close it comes to engines that were measured.

use std::fmt::Write as _;
use std::path::PathBuf;

use serde_json::Value;

use crate::support::Books;

const LLAMA: &str = include_str!("../fixtures/llama-3.1-8b.json");
const QWEN: &str = include_str!("../fixtures/qwen3-32b.json");
/// The wall clock at the engine's zero.
const WALL: f64 = 1_787_267_000.0;

struct Files {
    books: Books,
    config: String,
}

impl Files {
    fn new() -> Files {
        let books = Books::new();
        let config = books.write("config.json", LLAMA);
        Files { books, config }
    }

    fn args<'a>(&'a self, more: &[&'a str]) -> Vec<&'a str> {
        let own = ["simulate", "engine", "--model-config", &self.config, "--gpu", "H100", "--gpu-hour-usd", "6.98"];
        [&own, more].concat()
    }

    fn steady(&self, rate: &str, more: &[&str]) -> Value {
        let load = ["--rate", rate, "--input-tokens", "512", "--output-tokens", "256"];
        self.books.json(&self.args(&[&load, more].concat()))
    }

    #[track_caller]
    fn refused(&self, more: &[&str], part: &str) {
        self.books.run(&self.args(more)).fails_with(part);
    }
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// Requests that overlap, as a vLLM of some speed would have served them.
fn timeline() -> String {
    let mut rows = String::new();
    for index in 0..80u32 {
        let arrived = 100.0 + f64::from(index) * 0.31;
        let (input, output) = if index % 3 == 0 { (3_000 + 17 * index, 20) } else { (90 + index, 150 + 3 * index) };
        let prefill = 0.03 + f64::from(input) * 6e-5;
        let decode = f64::from(output - 1) * (0.011 + 1e-6 * f64::from(input));
        let first = arrived + 0.003 + prefill;
        writeln!(
            rows,
            r#"{{"request_id": "r-{index}", "input_toks": {input}, "output_toks": {output}, "arrival_time": {:.6}, "queued_ts": {arrived:.6}, "scheduled_ts": {:.6}, "first_token_ts": {first:.6}, "last_token_ts": {:.6}}}"#,
            WALL + arrived,
            arrived + 0.003,
            first + decode,
        )
        .unwrap();
    }
    rows
}

#[test]
fn a_steady_load_gives_throughput_times_and_cost() {
    let files = Files::new();
    let found = files.steady("10", &[]);
    assert_eq!((&found["requests"], &found["calibrated"]), (&500.into(), &false.into()));
    for times in ["ttft_ms", "tpot_ms", "e2e_ms"] {
        let of = |name: &str| number(&found[times][name]);
        assert!(0.0 < of("mean") && of("p50") <= of("p90") && of("p90") <= of("p99"), "{times}: {found}");
    }
    let (duration_s, tps) = (number(&found["duration_s"]), number(&found["tps_output"]));
    assert!((duration_s * tps / (500.0 * 256.0) - 1.0).abs() < 1e-6, "{found}");
    assert!((50.0..54.0).contains(&duration_s), "{found}");
    let usd: f64 = found["usd_per_million_output_tokens"].as_str().unwrap().parse().unwrap();
    assert!((usd / (6.98 / 3_600.0 / tps * 1e6) - 1.0).abs() < 1e-6, "{usd}");
    assert_eq!(files.steady("10", &[]), found, "the same seed, the same document");
    assert_ne!(files.steady("10", &["--seed", "2"])["ttft_ms"], found["ttft_ms"]);
}

#[test]
fn limits_and_weights_change_what_they_should() {
    let files = Files::new();
    let usual = files.steady("50", &[]);
    let tps = |found: &Value| number(&found["tps_output"]);
    let few = files.steady("50", &["--max-num-seqs", "16"]);
    assert!(tps(&few) < 0.6 * tps(&usual) && number(&few["ttft_ms"]["p99"]) > 5.0 * number(&usual["ttft_ms"]["p99"]));
    assert_eq!(few["engine"]["max_num_seqs"], 16);
    let small = files.steady("50", &["--kv-tokens", "20000"]);
    assert!(number(&small["preemptions"]) > 0.0 && tps(&small) < tps(&usual), "{small}");
    assert!(tps(&files.steady("50", &["--dtype", "fp8"])) > tps(&usual));
    let chunks = files.steady("50", &["--max-num-batched-tokens", "512"]);
    assert!(number(&chunks["tpot_ms"]["p99"]) != number(&usual["tpot_ms"]["p99"]));
    let free = files.books.json(&[
        "simulate",
        "engine",
        "--model-config",
        &files.config,
        "--gpu",
        "H100",
        "--rate",
        "1",
        "--input-tokens",
        "9",
        "--output-tokens",
        "9",
    ]);
    assert_eq!(free["usd_per_million_output_tokens"], Value::Null, "unknown is not zero");
}

#[test]
fn constants_are_fitted_written_and_used_again() {
    let files = Files::new();
    let file = files.books.write("requests.jsonl", timeline());
    let constants = files.books.path("constants.json");
    let constants = constants.to_str().unwrap();
    let args = files.args(&["--calibrate-from", &file, "--write-calibration", constants]);
    let fitted = files.books.json(&args);
    assert_eq!((&fitted["calibrated"], &fitted["held_out"]["requests"]), (&true.into(), &40.into()));
    assert_eq!((&fitted["requests"], &fitted["measured"]["requests"]), (&80.into(), &80.into()));
    let off = number(&fitted["held_out"]["errors"]["tpot_mean"]);
    let plain = files.books.json(&files.args(&["--timeline", &file]));
    assert!(off.abs() < number(&plain["errors"]["tpot_mean"]).abs(), "{off} {}", plain["errors"]);

    let again = files.books.json(&files.args(&["--timeline", &file, "--calibration", constants]));
    for name in ["tps_output", "ttft_ms", "tpot_ms", "e2e_ms", "usd_per_million_output_tokens"] {
        assert_eq!(again[name], fitted[name], "{name}");
    }
    let text = files.books.run(&files.args(&["--timeline", &file, "--calibration", constants]));
    for part in
        ["1 x H100", "constants from the calibration", "to the first token", "measured", "USD a million output tokens"]
    {
        assert!(text.code == 0 && text.out.contains(part), "{part} is not in\n{}", text.out);
    }

    let trace = files.books.write(
        "trace.csv",
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.680,374,44\n2023-11-16 18:15:50.995,396,109\n",
    );
    let found = files.books.json(&files.args(&["--timeline", &trace]));
    assert_eq!((&found["requests"], &found["measured"]), (&2.into(), &Value::Null));
    files.refused(&["--calibrate-from", &trace], "give --input-tokens and --output-tokens");
    let length = ["--input-tokens", "10", "--output-tokens", "10", "--calibrate-from"];
    files.refused(&[&length[..], &[&trace]].concat(), "has no column `rps`");
}

#[test]
fn what_is_wrong_is_said_in_one_line() {
    let files = Files::new();
    let load =
        |more: &[&'static str]| [&["--rate", "1", "--input-tokens", "512", "--output-tokens", "256"], more].concat();
    files.refused(&load(&["--kv-tokens", "600"]), "request 1: a request of 768 tokens does not fit a KV cache of 592");
    files.refused(&load(&["--calibration", "/nowhere.json"]), "cannot read /nowhere.json");
    files.refused(&["--timeline", "/nowhere.jsonl"], "cannot read /nowhere.jsonl");
    let other = |gpu: &str, config: &str| {
        let mut args = vec!["simulate", "engine", "--gpu", gpu, "--model-config", config];
        args.extend(load(&[]));
        files.books.run(&args)
    };
    other("H10", &files.config).fails_with("did you mean `H100`?");
    let huge = LLAMA.replace("\"num_hidden_layers\": 32", "\"num_hidden_layers\": 400");
    other("H100", &files.books.write("huge.json", huge)).fails_with("leave no room for a KV cache");
    let wrong = files.books.write("wrong.json", r#"{"compute": 0.5}"#);
    files.refused(&["--timeline", "x", "--calibration", &wrong], "holds no constants");
    let far = files.books.write("far.json", r#"{"compute": 3, "bandwidth": 0.5, "overhead_s": 0, "overlap": 1}"#);
    files.refused(&["--timeline", "x", "--calibration", &far], "`compute` is 3");
}

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

#[test]
fn the_command_comes_close_to_published_benchmarks() {
    let Some(folder) = folder() else { return };
    let files = Files::new();
    let curve = folder.join("llm-cost-vs-load/llama-3.1-8b-fp16-h100.csv");
    let text = std::fs::read_to_string(&curve).unwrap();
    let heads: Vec<&str> = text.lines().next().unwrap().split(',').collect();
    for line in text.lines().skip(1) {
        let cells: Vec<&str> = line.split(',').collect();
        let cell = |name: &str| cells[heads.iter().position(|head| *head == name).unwrap()];
        let found = files.steady(cell("rps"), &[]);
        let off = number(&found["tps_output"]) / cell("tps_output").parse::<f64>().unwrap() - 1.0;
        assert!(off.abs() < 0.25, "{} requests/s without a calibration: {off}", cell("rps"));
    }
    let curve = curve.to_str().unwrap();
    let lengths = ["--input-tokens", "512", "--output-tokens", "256", "--calibrate-rates", "1,200"];
    let found = files.books.json(&files.args(&[&["--calibrate-from", curve], &lengths[..]].concat()));
    let rates = found["benchmarks"].as_array().unwrap();
    assert_eq!((rates.len(), rates.iter().filter(|rate| rate["fitted"] == true).count()), (7, 2));
    for rate in rates {
        let (tps, tpot) = (number(&rate["tps_output_error"]), number(&rate["tpot_p50_error"]));
        assert!(tps.abs() < 0.10 && tpot.abs() < 0.15, "{rate}");
    }
}

#[test]
fn the_command_comes_close_to_recorded_runs() {
    let Some(folder) = folder() else { return };
    let books = Books::new();
    let (llama, qwen) = (books.write("llama.json", LLAMA), books.write("qwen.json", QWEN));
    let constants = books.path("constants.json");
    let constants = constants.to_str().unwrap();
    let path = |run: &str, file: &str| folder.join("vllm-runs").join(run).join(file).to_str().unwrap().to_owned();
    let json = |run: &str, config: &str, gpu: &str, gpus: &str, more: &[&str]| {
        let (timeline, meta) = (path(run, "requests.jsonl"), path(run, "meta.json"));
        let own = ["simulate", "engine", "--model-config", config, "--gpu", gpu, "--gpus", gpus, "--meta", &meta];
        let more: Vec<&str> = more.iter().map(|&word| if word == "TIMELINE" { &timeline } else { word }).collect();
        books.json(&[&own, &more[..]].concat())
    };
    let fit = ["--calibrate-from", "TIMELINE", "--write-calibration", constants];
    let found = json("RTX4090_Llama-3.1-8B", &llama, "RTX 4090", "1", &fit);
    let errors = &found["held_out"]["errors"];
    let (tpot, ttft) = (number(&errors["tpot_mean"]), number(&errors["ttft_mean"]));
    assert!(tpot.abs() < 0.05 && ttft.abs() < 0.10, "{errors}");

    let carried = ["--timeline", "TIMELINE", "--calibration", constants];
    let found = json("RTXPRO6000_Qwen3-32B", &qwen, "RTX PRO 6000", "2", &carried);
    let (tpot, ttft) = (number(&found["errors"]["tpot_mean"]), number(&found["errors"]["ttft_mean"]));
    assert!(tpot.abs() < 0.15 && ttft.abs() < 0.15, "{}", found["errors"]);
}
