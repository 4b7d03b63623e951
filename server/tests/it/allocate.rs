//! `farthing allocate`: every method closes, order and repetition change nothing, and what is wrong is said in one line.

use std::fmt::Write as _;

use ledger::Money;
use serde_json::Value;

use crate::support::{Books, lines};

const LLAMA: &str = include_str!("../fixtures/llama-3.1-8b.json");
const METHODS: [&str; 4] = ["roofline", "tokens", "weighted-tokens", "equal-time"];
/// The wall clock at the engine's zero.
const WALL: f64 = 1_787_267_000.0;

/// Requests that overlap, idle between two bursts, long documents beside long answers.
fn timeline() -> Vec<String> {
    let mut rows = Vec::new();
    for index in 0..60u32 {
        let arrived = 100.0 + f64::from(index) * 0.31 + if index >= 30 { 20.0 } else { 0.0 };
        let (input, output) = if index % 3 == 0 { (3_000 + 17 * index, 20) } else { (90 + index, 250 + 3 * index) };
        let prefill = 0.02 + f64::from(input) * 6e-5;
        let decode = f64::from(output - 1) * (0.021 + 1e-6 * f64::from(input));
        let queued = arrived + 0.001 * f64::from(index % 2);
        let mut row = String::new();
        write!(
            row,
            r#"{{"request_id": "r-{index}", "input_toks": {input}, "output_toks": {output}, "arrival_time": {:.6}, "queued_ts": {queued:.6}, "scheduled_ts": {:.6}, "first_token_ts": {:.6}, "last_token_ts": {:.6}}}"#,
            WALL + arrived,
            queued + 0.002,
            queued + 0.002 + prefill,
            queued + 0.002 + prefill + decode,
        )
        .unwrap();
        rows.push(row);
    }
    rows
}

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

    fn args<'a>(&'a self, timeline: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        let own =
            ["allocate", "--timeline", timeline, "--model-config", &self.config, "--gpu", "RTX 4090", "--rate", "0.69"];
        [&own, more].concat()
    }

    fn json(&self, rows: &[String], more: &[&str]) -> Value {
        let file = self.books.write("requests.jsonl", rows.join("\n"));
        self.books.json(&self.args(&file, more))
    }

    #[track_caller]
    fn refused(&self, rows: &[String], more: &[&str], part: &str) {
        let file = self.books.write("bad.jsonl", rows.join("\n"));
        self.books.run(&self.args(&file, more)).fails_with(part);
    }
}

fn usd(value: &Value) -> Money {
    value.as_str().unwrap_or_else(|| panic!("{value} is no amount")).parse().unwrap()
}

#[test]
fn every_method_closes_to_the_picodollar_and_explains_each_request() {
    let files = Files::new();
    let mut paid = Vec::new();
    for method in METHODS {
        let found = files.json(&timeline(), &["--method", method]);
        let totals = &found["totals"];
        assert_eq!(totals["closed"], true, "{method}");
        assert_eq!(totals["origin_usd"], totals["posted_usd"], "{method}");
        let lines: Money = totals["lines"].as_object().unwrap().values().map(usd).sum();
        assert_eq!(lines, usd(&totals["origin_usd"]), "{method}");
        let postings = found["postings"].as_array().unwrap();
        assert_eq!(postings.len(), 60);
        let requests: Money = postings.iter().map(|posting| usd(&posting["usd"])).sum();
        assert_eq!(requests, usd(&totals["lines"]["request"]), "{method}");
        for posting in postings {
            let terms: Money = posting["terms_usd"].as_object().unwrap().values().map(usd).sum();
            assert_eq!(terms, usd(&posting["usd"]), "{method}: {posting}");
            assert!(usd(&posting["usd"]) > Money::ZERO);
        }
        // What the GPU costs does not depend on the method: 0.69 an hour for the window, idle between the bursts.
        let seconds = found["window"]["seconds"].as_f64().unwrap();
        let origin: f64 = totals["origin_usd"].as_str().unwrap().parse().unwrap();
        assert!((origin - 0.69 * seconds / 3_600.0).abs() < 1e-11);
        let used = &found["gpu_seconds"];
        assert!(used["idle"].as_f64().unwrap() > 5.0, "{used}");
        let prices = &found["usd_per_million_output_tokens"];
        assert!(usd(&prices["busy"]) < usd(&prices["with_idle"]), "{prices}");
        paid.push(usd(&postings[0]["usd"]));
    }
    paid.sort();
    paid.dedup();
    assert_eq!(paid.len(), 4, "each method divides in its own way");
}

#[test]
fn order_and_repetition_change_nothing() {
    let files = Files::new();
    let rows = timeline();
    let first = files.json(&rows, &[]);
    assert_eq!(files.json(&rows, &[]), first, "the same files, the same document");
    let mut turned: Vec<String> = rows.iter().rev().cloned().collect();
    turned.rotate_left(13);
    assert_eq!(files.json(&turned, &[]), first);

    turned.extend_from_slice(&rows[5..12]);
    let mut repeated = files.json(&turned, &[]);
    assert_eq!(repeated["requests"]["duplicates"], 7);
    repeated["requests"]["duplicates"] = 0.into();
    assert_eq!(repeated, first);

    // Seen while it ran and again when it had ended: the later observation holds, wherever it stands.
    let cut = rows[1].replace(r#""output_toks": 253"#, r#""output_toks": 3"#);
    assert_ne!(cut, rows[1]);
    let (head, _) = cut.split_once(r#""last_token_ts""#).unwrap();
    let running = format!("{head}\"last_token_ts\": 100.4}}");
    for at in [0, rows.len()] {
        let mut with = rows.clone();
        with.insert(at, running.clone());
        let mut found = files.json(&with, &[]);
        assert_eq!(found["requests"]["duplicates"], 1);
        found["requests"]["duplicates"] = 0.into();
        assert_eq!(found, first);
    }
}

#[test]
fn windows_add_up_to_the_whole() {
    let files = Files::new();
    let rows = timeline();
    let (start, middle, end) = ("2026-08-20T23:05:00Z", "2026-08-20T23:05:07Z", "2026-08-20T23:06:30Z");
    let part = |from: &str, to: &str| files.json(&rows, &["--from", from, "--to", to]);
    let whole = part(start, end);
    let halves = [part(start, middle), part(middle, end)];
    let origin: Money = halves.iter().map(|half| usd(&half["totals"]["origin_usd"])).sum();
    let pico = |amount: Money| amount.pico();
    assert!((pico(origin) - pico(usd(&whole["totals"]["origin_usd"]))).abs() <= 1);
    let of = |found: &Value, name: &str| -> i128 {
        let postings = found["postings"].as_array().unwrap().iter();
        postings.filter(|posting| posting["engine_request_id"] == name).map(|posting| pico(usd(&posting["usd"]))).sum()
    };
    for name in ["r-0", "r-20", "r-59"] {
        let sum: i128 = halves.iter().map(|half| of(half, name)).sum();
        // The sums of an interval start anew; shares of seconds agree to their last digits.
        assert!((sum - of(&whole, name)).abs() <= of(&whole, name) / 1_000, "{name}");
    }
}

#[test]
fn postings_are_written_with_the_columns_of_their_table() {
    let files = Files::new();
    let names = files.books.write("who.csv", "request_id,team,consumer\nr-0,search,alice\nr-1,support,\n");
    let file = files.books.path("out.jsonl");
    let found =
        files.json(&timeline(), &["--context-from", &names, "--out", file.to_str().unwrap(), "--pool", "shared"]);
    assert_eq!(found["requests"]["without_context"], 58);
    let rows: Vec<Value> = lines(&file).iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(rows.len(), 61, "sixty requests and what was idle");
    let sum: Money = rows.iter().map(|row| usd(&row["effective_cost"])).sum();
    assert_eq!(sum, usd(&found["totals"]["origin_usd"]));
    let teams: Vec<&Value> = rows.iter().map(|row| &row["team"]).filter(|team| !team.is_null()).collect();
    assert!(teams.len() == 2 && teams.contains(&&Value::from("search")), "{teams:?}");
    assert!(rows.iter().all(|row| row["pool"] == "shared" && row["tier"] == "B"));

    let parquet = files.books.path("out.parquet");
    files.json(&timeline(), &["--out", parquet.to_str().unwrap()]);
    let read = store::parquet::Reader::open(std::fs::File::open(&parquet).unwrap()).unwrap();
    assert_eq!((read.rows(), read.schema()), (61, store::tables::schema::TableName::Postings.schema()));
    let booked: Money = read
        .flat_map(|batch| store::postings_of(&batch.unwrap()).unwrap())
        .map(|posting| posting.costs.effective_cost)
        .sum();
    assert_eq!(booked, sum);
    files.refused(&timeline(), &["--out", "postings.csv"], "ends neither in .parquet nor in .jsonl");
}

#[test]
fn the_engines_own_series_lowers_or_confirms_the_quality() {
    let files = Files::new();
    let running = |factor: f64| {
        let mut text = "t,running,waiting\n".to_owned();
        for second in 1..20u32 {
            let t = 100.0 + f64::from(second);
            // Of the arithmetic of `timeline`: who has been scheduled and has not ended.
            let count = timeline()
                .iter()
                .filter(|row| {
                    let row: Value = serde_json::from_str(row).unwrap();
                    row["scheduled_ts"].as_f64().unwrap() <= t && t < row["last_token_ts"].as_f64().unwrap()
                })
                .count();
            writeln!(text, "{second},{},0", f64::from(u32::try_from(count).unwrap()) * factor).unwrap();
        }
        text
    };
    let score = |factor: f64| {
        let series = files.books.write("series.csv", running(factor));
        let found = files.json(&timeline(), &["--series", &series, "--series-start", "2026-08-20T23:05:00Z"]);
        assert_eq!(found["quality"]["samples"], 19);
        found["quality"]["score"].as_f64().unwrap()
    };
    let (right, wrong) = (score(1.0), score(3.0));
    assert!(right > 0.95 && wrong < 0.5, "{right} {wrong}");

    let series = files.books.write("series.csv", running(1.0));
    files.refused(&timeline(), &["--series", &series], "give --series-start or --meta");
    let other = ["--series", &series, "--series-start", "2026-01-01"];
    files.refused(&timeline(), &other, "the clocks do not match");
}

#[test]
fn a_full_cache_is_noticed_and_lowers_the_quality() {
    let files = Files::new();
    let roomy = files.json(&timeline(), &["--kv-tokens", "400000"]);
    let tight = files.json(&timeline(), &["--kv-tokens", "9000"]);
    assert_eq!(roomy["quality"]["preempted_requests"], 0);
    assert_eq!(files.json(&timeline(), &[])["quality"]["preempted_requests"], Value::Null, "unknown is not none");
    assert!(tight["quality"]["preempted_requests"].as_u64().unwrap() > 0);
    assert!(tight["quality"]["score"].as_f64() < roomy["quality"]["score"].as_f64());
    assert_eq!(tight["totals"]["closed"], true);
    assert!(usd(&tight["totals"]["lines"]["waste"]) > Money::ZERO);
}

#[test]
fn bad_rows_are_counted_and_bad_files_refused_in_one_line() {
    let files = Files::new();
    let rows = timeline();
    let with = |bad: String| [&rows[..], &[bad]].concat();
    let file = files.books.write("one-bad.jsonl", with("not json".to_owned()).join("\n"));
    let ran = files.books.run(&files.args(&file, &["--json"]));
    assert!(ran.code == 0 && ran.err.contains("1 lines refused") && ran.err.contains("line 61"), "{ran:?}");

    files.refused(&["{}".to_owned()], &[], "holds no vllm-timeline row; line 1: missing field `request_id`");
    files.refused(&[], &[], "is empty");
    files.refused(&rows, &["--from", "2027-01-01"], "no request ran between");
    let late = rows[3].replace("17872671", "17879671");
    assert_ne!(late, rows[3]);
    let early = rows[3].replace("\"queued_ts\": 100", "\"queued_ts\": 90");
    assert_ne!(early, rows[3]);
    // One line whose engine clock is hours away from its arrival: the others would be mapped with a wrong offset.
    files.refused(&with(late), &[], "mix the clocks of several engine processes");
    let milliseconds = rows[3].replacen("17872671", "17872671000", 1);
    files.refused(&[milliseconds], &[], "is it in milliseconds?");

    let run = |gpu: &str, config: &str| {
        let file = files.books.write("good.jsonl", rows.join("\n"));
        files.books.run(&["allocate", "--timeline", &file, "--model-config", config, "--gpu", gpu, "--rate", "1"])
    };
    run("RTX 4080", &files.config).fails_with("did you mean `RTX 4090`?");
    run("abacus", &files.config).fails_with("Known are L4, L40S,");
    let missing = files.books.write("missing.json", LLAMA.replace("num_hidden_layers", "layers_of_cake"));
    run("H100", &missing).fails_with("has no `num_hidden_layers`");
    let huge = files.books.write("huge.json", LLAMA.replace("\"num_hidden_layers\": 32", "\"num_hidden_layers\": 400"));
    run("L4", &huge).fails_with("do not fit 1 L4");
    run("H100", "/nowhere.json").fails_with("cannot read /nowhere.json");
    files.refused(&rows, &["--kv-tokens", "1000"], "cannot have held request `r-0` with 3020 tokens");
    files.refused(&rows, &["--meta", &files.config], "says none of `model`, `started_at`");
    let who = files.books.write("who.csv", "request_id,tema\n");
    files.refused(&rows, &["--context-from", &who], "`tema` is no field of a context");
}

#[test]
fn people_get_a_summary_the_dearest_requests_and_three_prices() {
    let files = Files::new();
    let file = files.books.write("requests.jsonl", timeline().join("\n"));
    let ran = files.books.run(&files.args(&file, &[]));
    assert_eq!(ran.code, 0, "{ran:?}");
    for part in [
        "60 requests on 1 x RTX 4090",
        "held out of the fit",
        "pool cost, closed",
        "busy only",
        "with idle",
        "at full load",
        "idle GPU-s, not charged",
        "compute USD",
    ] {
        assert!(ran.out.contains(part), "{part} is not in\n{}", ran.out);
    }
    assert!(!files.books.data().exists(), "no ledger is made");

    // Four GPUs where there was one: the model promises steps that the requests did not have.
    let wrong = files.books.run(&files.args(&file, &["--gpus", "4"]));
    assert!(
        wrong.code == 0 && wrong.out.contains("pool cost, closed"),
        "a bad model cannot make or lose money: {wrong:?}"
    );
}
