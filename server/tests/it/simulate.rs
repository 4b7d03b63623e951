//! `farthing simulate`: policies on a trace, the ledger's own history as one, pictures, and mistakes in one line.

use std::fmt::Write as _;
use std::path::PathBuf;

use ledger::Money;
use serde_json::Value;

use crate::support::Books;

const LLAMA: &str = include_str!("../fixtures/llama-3.1-8b.json");

/// Requests counted every ten seconds, in a daily course: busy by day, quiet by night.
pub fn bins(days: u32) -> String {
    let mut text = "Time,TIMESTAMP\n".to_owned();
    for bin in 0..days * 8_640 {
        let hour = f64::from(bin % 8_640) / 360.0;
        let rate = 60.0 - 50.0 * ((hour - 2.0) / 24.0 * std::f64::consts::TAU).cos() + f64::from(bin % 7);
        let at = ledger::Timestamp::from_micros(1_715_299_200_000_000 + i64::from(bin) * 10_000_000);
        writeln!(text, "{},{}", at.to_string().replace('T', " ").trim_end_matches('Z'), rate.round()).unwrap();
    }
    text
}

/// A few hundred requests with tokens.
fn requests(count: u32) -> String {
    (0..count)
        .map(|index| {
            let at = f64::from(index) * 0.4;
            let (input, output) = (200 + 37 * (index % 11), 20 + 13 * (index % 17));
            format!("{{\"at\": {at}, \"input_tokens\": {input}, \"output_tokens\": {output}}}\n")
        })
        .collect()
}

fn usd(value: &Value) -> Money {
    value.as_str().unwrap_or_else(|| panic!("{value} is no amount")).parse().unwrap()
}

/// The measured material, where it is present.
#[expect(clippy::print_stdout, reason = "a test that is skipped says so")]
pub fn measured(name: &str) -> Option<String> {
    let beside = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/data");
    let folder = std::env::var_os("FARTHING_DATA").map_or_else(beside, PathBuf::from);
    let file = folder.join(name);
    if file.is_file() {
        return Some(file.to_str().unwrap().to_owned());
    }
    println!("SKIPPED: {} is not there; set FARTHING_DATA to the folder of the measured material", file.display());
    None
}

#[test]
fn policies_stand_beside_the_static_plan_and_the_oracle() {
    let books = Books::new();
    let trace = books.write("bins.csv", bins(2));
    let picture = books.path("frontier.svg");
    let args = [
        "simulate",
        "--trace",
        &trace,
        "--compare",
        "static,hpa,token-rate,oracle",
        "--replicas-at-peak",
        "12",
        "--gpu-hour-usd",
        "2.50",
        "--learn-days",
        "1",
        "--picture",
        picture.to_str().unwrap(),
    ];
    let found = books.json(&args);
    assert_eq!((found["mode"].as_str(), found["judged_hours"].as_f64()), (Some("fluid"), Some(24.0)));
    let policies = found["policies"].as_array().unwrap();
    let names: Vec<&str> = policies.iter().map(|one| one["policy"].as_str().unwrap()).collect();
    assert_eq!(names, ["static", "hpa", "token-rate", "oracle"]);
    let cost = |index: usize| usd(&policies[index]["outcome"]["usd"]);
    let hours = |index: usize| policies[index]["outcome"]["gpu_hours"].as_f64().unwrap();
    for (index, name) in names.iter().enumerate() {
        // Nothing is committed, so dollars are GPU-hours times the price.
        let expected = hours(index) * 2.5;
        assert!((cost(index).pico() as f64 / 1e12 - expected).abs() < 0.01, "{name}: {} {expected}", cost(index));
    }
    assert!(cost(3) < cost(1) && cost(1) < cost(0), "{} < {} < {}", cost(3), cost(1), cost(0));
    assert!(policies[0]["outcome"].get("minutes").is_none(), "several policies come without their minutes");
    assert!(found["frontier"].as_array().unwrap().iter().all(|name| name != "oracle"));
    let svg = std::fs::read_to_string(&picture).unwrap();
    assert!(svg.starts_with("<svg") && names.iter().all(|name| svg.contains(name)));
    assert_eq!(svg.matches("<circle").count(), 4);

    let text = books.run(&args).out;
    for part in ["static peak:", "saved of hpa", "over oracle", "in overload", "picture in", "Nothing else costs less"]
    {
        assert!(text.contains(part), "`{part}` is not in\n{text}");
    }
}

#[test]
fn one_policy_is_drawn_and_explained() {
    let books = Books::new();
    let trace = books.write("bins.csv", bins(1));
    let picture = books.path("day.svg");
    let more = ["--policy", "token-rate", "--gpu", "H100", "--provider", "aws", "--explain", "--replicas-at-peak", "8"];
    let args = [&["simulate", "--trace", &trace, "--picture", picture.to_str().unwrap()][..], &more].concat();
    let ran = books.run(&args);
    assert_eq!(ran.code, 0, "{ran:?}");
    for part in [
        "█ demand",
        "static peak: 8 replicas",
        "token-rate",
        "6.88 USD for a GPU-hour",
        "read on 2026-11-09",
        "desired",
        "why",
    ] {
        assert!(ran.out.contains(part), "`{part}` is not in\n{}", ran.out);
    }
    assert!(std::fs::read_to_string(&picture).unwrap().contains("demand"));
    let found = books.json(&args);
    let outcome = &found["policies"][0]["outcome"];
    assert_eq!(outcome["minutes"].as_array().unwrap().len(), 1_440);
    assert!(!outcome["log"].as_array().unwrap().is_empty());
}

#[test]
fn engines_measure_response_times_and_repeat_under_a_seed() {
    let books = Books::new();
    let trace = books.write("requests.jsonl", requests(400));
    let config = books.write("config.json", LLAMA);
    let args = [
        "simulate",
        "--trace",
        &trace,
        "--model-config",
        &config,
        "--gpu",
        "H100",
        "--gpu-hour-usd",
        "6.98",
        "--policy",
        "hpa",
        "--replicas-at-peak",
        "3",
    ];
    let found = books.json(&args);
    assert_eq!(found["mode"], "engines");
    let latency = &found["policies"][0]["outcome"]["latency"];
    let attained = latency["attained"].as_f64().unwrap();
    assert!((0.0..=1.0).contains(&attained) && latency["ttft"]["p50_s"].as_f64().unwrap() > 0.0, "{latency}");
    assert_eq!(found, books.json(&args), "the same seed gives the same answer");
    let text = books.run(&args).out;
    assert!(text.contains("time to first token") && text.contains("promised"), "{text}");
}

#[test]
fn the_ledgers_own_history_is_a_trace() {
    let books = Books::new();
    let mut csv = "TIMESTAMP,ContextTokens,GeneratedTokens\n".to_owned();
    for index in 0..600 {
        writeln!(
            csv,
            "2026-11-01 {:02}:{:02}:{:02}.000,{},{}",
            index / 60 % 24,
            index % 60,
            index % 60,
            100 + index,
            20
        )
        .unwrap();
    }
    let file = books.write("azure.csv", csv);
    let imported = books.run(&[
        "import",
        "azure-llm-trace",
        &file,
        "--model",
        "llama",
        "--provider",
        "self_hosted",
        "--pool",
        "shared",
    ]);
    assert_eq!(imported.code, 0, "{imported:?}");
    let own = ["simulate", "--gpu-hour-usd", "2", "--policy", "hpa", "--replicas-at-peak", "4"];
    let found = books.json(&own);
    assert_eq!(found["policies"][0]["outcome"]["requests"], 600);
    assert!(found["trace"].as_str().unwrap().starts_with("the ledger in "));
    let part = books.json(&[&own[..], &["--from", "2026-11-01T02:00:00Z", "--to", "2026-11-01T04:00:00Z"]].concat());
    assert_eq!(part["policies"][0]["outcome"]["requests"], 120);
    books.run(&[&own[..], &["--deployment", "chat"]].concat()).fails_with("has no attempts on chat");
    Books::new().run(&own).fails_with("there is no ledger in");
}

#[test]
fn tuning_keeps_to_the_goal_on_the_days_to_learn() {
    let books = Books::new();
    let trace = books.write("bins.csv", bins(1));
    let found = books.json(&[
        "simulate",
        "--trace",
        &trace,
        "--policy",
        "token-rate",
        "--search",
        "--learn-days",
        "0.25",
        "--replicas-at-peak",
        "8",
        "--gpu-hour-usd",
        "2",
        "--decide-every-s",
        "120",
    ]);
    let tuned = &found["tuned"][0];
    assert_eq!(tuned["asked"], "token-rate");
    assert!(tuned["tried"].as_u64().unwrap() > 20 && tuned["policy"] == found["policies"][0]["policy"], "{tuned}");
}

#[test]
fn faults_and_commitments_are_played() {
    let books = Books::new();
    let trace = books.write("bins.csv", bins(1));
    let args =
        ["simulate", "--trace", &trace, "--policy", "token-rate", "--replicas-at-peak", "8", "--gpu-hour-usd", "2"];
    let plain = books.json(&args);
    let crashed = books.json(&[&args[..], &["--fault", "crash@12h=3", "--fault", "metrics-outage@14h+20m"]].concat());
    let count = |found: &Value, what: &str| found["policies"][0]["outcome"][what].as_u64().unwrap();
    assert_eq!((count(&plain, "crashes"), count(&crashed, "crashes")), (0, 3));
    let committed = books.json(&[&args[..], &["--committed", "3", "--committed-usd", "1.20"]].concat());
    let outcome = &committed["policies"][0]["outcome"];
    assert!(
        outcome["ready_min"].as_u64().unwrap() >= 3,
        "committed replicas run in any case: {}",
        outcome["ready_min"]
    );
    assert!(usd(&outcome["usd"]) > "86.40".parse().unwrap(), "three of them for a day are paid at least");
}

#[test]
fn mistakes_are_one_line() {
    let books = Books::new();
    let trace = books.write("bins.csv", bins(1));
    let config = books.write("config.json", LLAMA);
    let strange = books.write("strange.csv", "a,b\n1,2\n");
    let broken = books.write("broken.csv", "at,input_tokens,output_tokens\n0.5,10,20\n0.7,ten,20\n");
    let cases: [(&[&str], &str); 13] = [
        (&["--trace", "nowhere.csv", "--gpu-hour-usd", "2"], "cannot read nowhere.csv"),
        (&["--trace", &strange, "--gpu-hour-usd", "2"], "begins no trace that is known"),
        (&["--trace", &broken, "--gpu-hour-usd", "2"], "broken.csv:3:"),
        (&["--trace", &trace], "say what a GPU costs: --gpu-hour-usd USD"),
        (&["--trace", &trace, "--gpu", "H100"], "choose one with --provider"),
        (&["--trace", &trace, "--gpu-hour-usd", "2", "--policy", "hppa"], "hppa"),
        (&["--trace", &trace, "--gpu-hour-usd", "2", "--policy", "hpa:targett=3"], "targett"),
        (&["--trace", &trace, "--gpu-hour-usd", "2", "--fault", "fire@1h"], "is no fault"),
        (&["--trace", &trace, "--gpu-hour-usd", "2", "--picture", "day.png"], "pictures are SVG"),
        (&["--trace", &trace, "--gpu-hour-usd", "2", "--learn-days", "3"], "leaves nothing to judge"),
        (&["--trace", &trace, "--gpu-hour-usd", "2", "--search"], "nothing to tune on"),
        (&["--trace", &trace, "--gpu-hour-usd", "2", "--floor", "50", "--ceiling", "4"], "--ceiling 4 is below"),
        (&["--trace", &trace, "--model-config", &config, "--gpu", "H100", "--gpu-hour-usd", "2"], "--lengths FILE"),
    ];
    for (args, part) in cases {
        books.run(&[&["simulate"], args].concat()).fails_with(part);
    }
}

#[test]
fn a_hybrid_says_that_it_is_one() {
    let books = Books::new();
    let trace = books.write("bins.csv", bins(1));
    let mut pairs = "TIMESTAMP,ContextTokens,GeneratedTokens\n".to_owned();
    for index in 0..50 {
        writeln!(pairs, "2023-11-16 18:17:{index:02}.979960,{},{}", 400 + index, 10 + index).unwrap();
    }
    let pairs = books.write("pairs.csv", pairs);
    let args = ["simulate", "--trace", &trace, "--lengths", &pairs, "--policy", "hpa", "--gpu-hour-usd", "2"];
    let found = books.json(&args);
    let notes = found["notes"].to_string();
    assert!(notes.contains("hybrid") && notes.contains("50 pairs"), "{notes}");
}
