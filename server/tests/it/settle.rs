//! `farthing settle` on imports: pools as configured, amounts that close, corrections for what comes late.

use std::fmt::Write as _;

use ledger::Money;
use serde_json::Value;

use crate::support::Books;

/// The dimensions of a small dense model as its publisher writes them.
const MODEL: &str = r#"{ "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "torch_dtype": "bfloat16" }"#;

const CONFIG: &str = r#"
[[pool]]
name = "shared"
gpu = "RTX 4090"
gpus = 1
usd_per_gpu_hour = "3.60"
owner = "platform"

[[upstream]]
name = "llama"
kind = "vllm"
base_url = "http://127.0.0.1:9"
pool = "shared"
deployment = "llama"
engine = { model_config = "model.json", kv_tokens = 41408 }
"#;

/// Lines of a timeline: request `n` of `numbers` arrives `n` quarters of a second after the first and takes some seconds.
fn timeline(numbers: impl Iterator<Item = u32>) -> String {
    let mut lines = String::new();
    for number in numbers {
        let queued = f64::from(number) * 0.25;
        let (scheduled, first, output) = (queued + 0.01, queued + 0.15, 60 + number * 7 % 90);
        let last = first + f64::from(output) * 0.025;
        let _ = writeln!(
            lines,
            "{{\"request_id\": \"r-{number}\", \"input_toks\": {}, \"output_toks\": {output}, \"arrival_time\": {:.6}, \
             \"queued_ts\": {queued:.6}, \"scheduled_ts\": {scheduled:.6}, \"first_token_ts\": {first:.6}, \"last_token_ts\": {last:.6}}}",
            100 + number * 13 % 400,
            1_777_142_984.5 + queued,
        );
    }
    lines
}

fn configured() -> (Books, String) {
    let books = Books::new();
    books.write("model.json", MODEL);
    let config = books.write("farthing.toml", CONFIG);
    (books, config)
}

fn import(books: &Books, name: &str, rows: &str) {
    let file = books.write(name, rows);
    let args = ["import", "vllm-timeline", &file, "--model", "llama", "--pool", "shared", "--name", "team-of-the-run"];
    books.json(&args);
}

fn usd(value: &Value) -> Money {
    value.as_str().unwrap().parse().unwrap()
}

/// The lines of each pool are its cost, to the last unit, and the ledger says so itself.
#[track_caller]
fn closes(books: &Books, settled: &Value) {
    assert_eq!(settled["balanced"], true, "{settled}");
    for pool in settled["pools"].as_array().unwrap() {
        let lines: Money = pool["lines"].as_object().unwrap().values().map(usd).sum();
        assert_eq!((lines, usd(&pool["sum"])), (usd(&pool["cost"]), usd(&pool["cost"])), "{pool}");
    }
    assert_eq!(books.json(&["verify"])["clean"], true);
}

#[test]
fn an_imported_timeline_is_allocated_once_and_closes() {
    let (books, config) = configured();
    import(&books, "run.jsonl", &timeline(0..120));
    let settled = books.json(&["settle", "--config", &config]);
    closes(&books, &settled);
    let pool = &settled["pools"][0];
    assert!(usd(&pool["lines"]["request"]) > Money::ZERO, "{pool}");
    assert_eq!((&pool["requests"], &pool["lines"]["unallocated"]), (&120.into(), &"0.00".into()), "{pool}");
    assert_eq!(pool["tiers"].as_object().unwrap().keys().collect::<Vec<_>>(), ["B"], "{pool}");
    let assumed = &settled["assumed"];
    assert_eq!((&assumed["gpus"][0]["gpus"], &assumed["gpus"][0]["gpu"]), (&1.into(), &"RTX 4090".into()), "{assumed}");
    assert_eq!(
        (&assumed["engines"][0]["engine"], &assumed["engines"][0]["model_known"]),
        (&"llama".into(), &true.into())
    );

    let again = books.json(&["settle", "--config", &config]);
    assert_eq!((&again["postings"], &again["corrected_minutes"]), (&0.into(), &0.into()), "{again}");
    assert_eq!((&again["pools"], &again["assumed"]["gpus"]), (&settled["pools"], &serde_json::json!([])));
    // Without the configuration too: what was assumed is in the ledger now.
    let without = books.json(&["settle"]);
    assert_eq!((&without["postings"], &without["pools"]), (&0.into(), &settled["pools"]), "{without}");

    let text = books.run(&["settle"]).out;
    for part in ["nothing to settle", "requests", "idle_reserved", "pool cost", "balanced", "yes"] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
}

#[test]
fn requests_that_are_imported_late_correct_the_books() {
    let (books, config) = configured();
    import(&books, "first.jsonl", &timeline((0..120).filter(|number| number % 3 != 1)));
    let first = books.json(&["settle", "--config", &config]);
    closes(&books, &first);
    // The rest of the same run, which began before and ended after what was known.
    import(&books, "rest.jsonl", &timeline((0..125).filter(|number| number % 3 == 1 || *number >= 120)));
    let second = books.json(&["settle", "--config", &config]);
    closes(&books, &second);
    assert!(second["corrected_minutes"].as_u64().unwrap() > 0 && second["postings"].as_u64().unwrap() > 0, "{second}");
    assert_eq!(second["pools"][0]["requests"], 125);
    assert!(usd(&second["pools"][0]["cost"]) > usd(&first["pools"][0]["cost"]), "the run took longer than was known");
    assert_eq!(books.json(&["settle", "--config", &config])["postings"], 0);

    // Whoever imports all at once pays the same for the same GPUs.
    let (whole, config) = configured();
    import(&whole, "all.jsonl", &timeline(0..125));
    let at_once = whole.json(&["settle", "--config", &config]);
    closes(&whole, &at_once);
    assert_eq!(at_once["pools"][0]["requests"], 125);
    let report = books.json(&["report", "--by", "team", "--unit", "request"]);
    assert_eq!(report["unallocated_pool_cost"], "0.00", "{report}");
}

#[test]
fn a_given_time_is_what_the_gpus_are_paid_for() {
    let (books, config) = configured();
    import(&books, "run.jsonl", &timeline(0..40));
    let span = ["--from", "2026-04-25T18:45:00Z", "--to", "2026-04-25T19:00:00Z"];
    let settled = books.json(&[&["settle", "--config", &config][..], &span].concat());
    closes(&books, &settled);
    // A quarter of an hour at 3.60.
    assert_eq!(settled["pools"][0]["cost"], "0.90", "{settled}");
    books.run(&["settle", "--from", "2026-04-26", "--to", "2026-04-25"]).fails_with("nothing lies between");
}

#[test]
fn a_trace_of_counts_is_allocated_from_counters_alone() {
    let (books, config) = configured();
    let trace = "TIMESTAMP,ContextTokens,GeneratedTokens\n\
        2026-11-02 10:00:00.0,1000,100\n2026-11-02 10:00:20.0,1000,100\n2026-11-02 10:01:30.5,250,40\n";
    let file = books.write("conv.csv", trace);
    books.json(&[
        "import",
        "azure-llm-trace",
        &file,
        "--model",
        "llama",
        "--pool",
        "shared",
        "--provider",
        "self_hosted",
    ]);
    let settled =
        books.json(&["settle", "--config", &config, "--from", "2026-11-02T10:00:00Z", "--to", "2026-11-02T10:02:00Z"]);
    closes(&books, &settled);
    let pool = &settled["pools"][0];
    assert_eq!((&pool["cost"], &pool["requests"]), (&"0.12".into(), &3.into()), "{pool}");
    assert_eq!(pool["tiers"].as_object().unwrap().keys().collect::<Vec<_>>(), ["C"], "{pool}");
    let costs = books.json(&[
        "sql",
        "SELECT sum(effective_cost) AS cost FROM postings WHERE line = 'request' GROUP BY request_id ORDER BY min(request_id)",
    ]);
    // What cannot be divided goes to one of them: a picodollar.
    let apart = usd(&costs[0]["cost"]) - usd(&costs[1]["cost"]);
    assert!(apart.pico().abs() <= 1, "equal work pays equally: {costs}");
}

#[test]
fn a_pool_that_is_known_nowhere_has_no_cost_and_says_so() {
    let books = Books::new();
    import(&books, "run.jsonl", &timeline(0..5));
    let ran = books.run(&["settle"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.out.contains("pool `shared` is named by 5 imported requests and known nowhere"), "{ran:?}");
    let settled = books.json(&["settle"]);
    assert_eq!((&settled["pools"], &settled["postings"]), (&serde_json::json!([]), &0.into()));
}

#[test]
fn without_a_model_time_is_divided_by_tokens_and_the_policy_says_so() {
    let books = Books::new();
    let config = books.write("farthing.toml", CONFIG.replace("model_config = \"model.json\", ", ""));
    import(&books, "run.jsonl", &timeline(0..20));
    let settled = books.json(&["settle", "--config", &config]);
    closes(&books, &settled);
    assert_eq!(settled["assumed"]["engines"][0]["model_known"], false);
    let policies = books.json(&["sql", "SELECT DISTINCT policy FROM postings WHERE line = 'request'"]);
    assert!(!policies[0]["policy"].as_str().unwrap().starts_with("roofline/"), "{policies}");
}
