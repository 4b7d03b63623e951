//! Files into the ledger: once is once, bad rows go aside, and the sums are the files' own.

use serde_json::Value;

use crate::support::{Books, lines};

const TRACE: &str = "TIMESTAMP,ContextTokens,GeneratedTokens\n\
    2026-11-02 10:00:00.0000000,1000,100\n\
    2026-11-02 10:00:00.0000000,1000,100\n\
    2026-11-02 11:30:00.5000000,250,40\n";

fn total<'a>(report: &'a Value, name: &str) -> &'a Value {
    &report["total"][name]
}

#[test]
fn a_trace_is_priced_and_importing_it_again_changes_nothing() {
    let books = Books::new();
    let file = books.write("conv.csv", TRACE);
    let args = ["import", "azure-llm-trace", &file, "--model", "gpt-4o"];
    let first = books.json(&args);
    assert_eq!((&first[0]["rows"], &first[0]["attempts"], &first[0]["rejected"]), (&3.into(), &3.into(), &0.into()));
    let copy = books.write("copy.csv", TRACE);
    for file in [&file, &copy] {
        let again = books.json(&["import", "azure-llm-trace", file, "--model", "gpt-4o"]);
        assert_eq!((&again[0]["attempts"], &again[0]["already_known"]), (&0.into(), &3.into()), "{again}");
    }
    // With other spelling of the same rows it is another file, but the same requests.
    let respelled = books.write("respelled.csv", TRACE.replace(".0000000", ".000").replace('\n', "\r\n"));
    let again = books.json(&["import", "azure-llm-trace", &respelled, "--model", "gpt-4o"]);
    assert_eq!((&again[0]["attempts"], &again[0]["already_known"]), (&0.into(), &3.into()), "{again}");

    let report = books.json(&["report", "--by", "consumer,model,hour"]);
    assert_eq!(total(&report, "requests"), 3);
    assert_eq!((total(&report, "input_tokens"), total(&report, "output_tokens")), (&2250.into(), &240.into()));
    // 2,250 at 2.50 and 240 at 10.00 USD a million.
    assert_eq!(total(&report, "effective_cost"), "0.008025");
    assert_eq!(report["rows"].as_array().unwrap().len(), 2, "{report}");
    assert_eq!(report["rows"][0]["key"][0], "conv");
    let span = books.json(&["report", "--from", "2026-11-02T11:00:00Z", "--to", "2026-11-02T11:30:00.5Z"]);
    assert_eq!(total(&span, "requests"), 0, "the end does not belong to the span");
    let verified = books.json(&["verify"]);
    assert_eq!((&verified["balanced"], &verified["attempts"]), (&true.into(), &3.into()));
}

#[test]
fn a_bad_row_in_the_middle_goes_aside_with_line_and_reason() {
    let books = Books::new();
    let file = books.write("conv.csv", TRACE.replace("1000,100\n2026-11-02 11", "ten,100\n2026-11-02 11"));
    let ran = books.run(&["import", "azure-llm-trace", &file, "--model", "gpt-4o"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.err.contains("1 row refused") && ran.err.contains("conv.csv.rejects.csv"), "{ran:?}");
    let rejects = lines(&books.path("conv.csv.rejects.csv"));
    assert_eq!(rejects[0], "line,reason,row");
    assert!(rejects[1].starts_with("3,ContextTokens `ten` is not a count of tokens,"), "{rejects:?}");
    assert_eq!(total(&books.json(&["report"]), "requests"), 2);
}

#[test]
fn a_file_of_another_kind_imports_nothing_and_says_so() {
    let books = Books::new();
    let file = books.write("other.csv", "a,b\n1,2\n3,4\n");
    books.run(&["import", "azure-llm-trace", &file]).fails_with("holds no row of kind azure-llm-trace");
    books.run(&["import", "requests", "/nowhere.jsonl"]).fails_with("there is no such file");
    assert_eq!(total(&books.json(&["report"]), "attempts"), 0);
}

#[test]
fn an_engines_timeline_keeps_its_times_and_has_no_price_of_its_own() {
    let books = Books::new();
    let rows = r#"{"request_id": "r-0", "input_toks": 100, "output_toks": 5, "arrival_time": 1777142984.5, "queued_ts": 500.0, "scheduled_ts": 500.02, "first_token_ts": 500.5, "last_token_ts": 501.25}
not json
{"request_id": "r-1", "input_toks": 7, "output_toks": 1, "arrival_time": 1777142985.5, "queued_ts": 501.0, "scheduled_ts": 501.0, "first_token_ts": 501.5, "last_token_ts": 501.5}
"#;
    let file = books.write("run.jsonl", rows);
    let args = ["import", "vllm-timeline", &file, "--model", "llama", "--pool", "shared"];
    for new in [2, 0] {
        assert_eq!(books.json(&args)[0]["attempts"], new);
    }
    assert!(lines(&books.path("run.jsonl.rejects.jsonl"))[0].contains("\"line\":2"));
    let report = books.json(&["report", "--by", "pool,model"]);
    assert_eq!((total(&report, "self_hosted_attempts"), total(&report, "effective_cost")), (&2.into(), &Value::Null));
    let times = books
        .json(&["sql", "SELECT sent_us, queued_us, first_token_us, last_token_us FROM attempts ORDER BY received_at"]);
    assert_eq!(
        times[0],
        serde_json::json!({ "sent_us": 0, "queued_us": 20_000, "first_token_us": 500_000, "last_token_us": 1_250_000 })
    );
}

#[test]
fn requests_written_out_read_back_the_same() {
    let books = Books::new();
    let rows = r#"{"received_at": "2026-11-03T09:00:00Z", "model": "gpt-4o", "usage": {"input": 10, "cache_read": 5, "output": 3}, "context": {"team": "search", "task": "t-1", "tags": {"a": "b"}}}
{"received_at": "2026-11-03T09:00:01Z", "model": "nobody-knows-this", "usage": {"input": 1}}
"#;
    let file = books.write("own.jsonl", rows);
    assert_eq!(books.json(&["import", "requests", &file])[0]["unpriced"], 1);
    let exported = books.run(&["export", "requests"]).out;
    assert_eq!(exported.lines().count(), 2);
    let other = Books::new();
    let file = other.write("exported.jsonl", &exported);
    assert_eq!(other.json(&["import", "requests", &file])[0]["attempts"], 2);
    assert_eq!(other.run(&["export", "requests"]).out, exported);
    let report = other.json(&["report", "--by", "team,task"]);
    assert_eq!(report, books.json(&["report", "--by", "team,task"]));
    assert_eq!(total(&report, "unpriced_attempts"), 1);
    assert_eq!(report["unattributed_attempts"], 1);
}

#[test]
fn reports_add_up_whatever_they_are_grouped_by() {
    let books = Books::new();
    let mut rows = String::new();
    for index in 0..200u32 {
        let team = ["\"a\"", "\"b\"", "null"][index as usize % 3];
        let model = ["gpt-4o", "gpt-4o-mini", "claude-sonnet-4-5", "mystery"][index as usize % 4];
        let provider = if model.starts_with("claude") { "anthropic" } else { "openai" };
        rows += &format!(
            "{{\"received_at\": \"2026-11-{:02}T{:02}:00:00Z\", \"provider\": \"{provider}\", \"model\": \"{model}\", \"usage\": \
             {{\"input\": {}, \"output\": {}}}, \"context\": {{\"team\": {team}, \"task\": \"t{}\"}}}}\n",
            1 + index % 5,
            index % 24,
            index * 7,
            index,
            index % 11
        );
    }
    let file = books.write("many.jsonl", rows);
    assert_eq!(books.json(&["import", "requests", &file])[0]["attempts"], 200);
    let totals = |by: &str| books.json(&["report", "--by", by])["total"].clone();
    let expected = totals("team");
    assert_eq!((&expected["requests"], &expected["unpriced_attempts"]), (&200.into(), &50.into()));
    for by in ["model", "team,model", "day,hour", "task,provider,line", "consumer,deployment,pool", "environment"] {
        let report = books.json(&["report", "--by", by]);
        assert_eq!(report["total"], expected, "{by}");
        let sum: ledger::Money = report["rows"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|row| row["effective_cost"].as_str())
            .map(|cost| cost.parse::<ledger::Money>().unwrap())
            .sum();
        assert_eq!(sum.to_string(), expected["effective_cost"].as_str().unwrap(), "{by}");
    }
    let text = books.run(&["report", "--by", "team,model", "--unit", "million_tokens"]);
    assert!(text.out.contains("unknown") && text.out.contains("unpriced: 50 attempts"), "{}", text.out);
    books.run(&["report", "--by", "teem"]).fails_with("did you mean `team`?");
}

#[test]
fn a_request_is_explained_term_by_term() {
    let books = Books::new();
    let row = r#"{"request_id": "019a4b2c-0000-7000-8000-000000000001", "received_at": "2026-11-03T09:00:00Z", "model": "gpt-4o", "usage": {"input": 1000, "cache_read": 500, "output": 100}, "finished_us": 2000000, "first_token_us": 400000, "context": {"team": "search"}}"#;
    let file = books.write("one.jsonl", row);
    books.json(&["import", "requests", &file]);
    let id = "019a4b2c-0000-7000-8000-000000000001";
    let text = books.run(&["explain", id]).out;
    for part in [
        "first token",
        "400.0 ms",
        "input",
        "2.50 USD/M = 0.0025 USD",
        "1.25 USD/M = 0.000625 USD",
        "price book",
        "0.004125 USD",
    ] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    let document = books.json(&["explain", id]);
    assert_eq!((&document["effective_cost"], &document["balanced"]), (&"0.004125".into(), &true.into()));
    books.run(&["explain", "019a4b2c-0000-7000-8000-00000000ffff"]).fails_with("has no request");
    books.run(&["explain", "x"]).fails_with("is not a request id");
}

#[test]
fn sql_reads_and_does_nothing_else() {
    let books = Books::new();
    let file = books.write("conv.csv", TRACE);
    books.json(&["import", "azure-llm-trace", &file, "--model", "gpt-4o"]);
    let csv = books.run(&["sql", "SELECT count(*) AS n, sum(effective_cost) AS usd FROM attempts", "--csv"]);
    assert_eq!(csv.out, "n,usd\n3,0.008025\n");
    let writes = [
        "DELETE FROM attempts",
        "INSERT INTO gaps SELECT * FROM gaps",
        "UPDATE attempts SET team = 'x'",
        "DROP TABLE attempts",
        "CREATE TABLE x AS SELECT 1",
        "CREATE EXTERNAL TABLE x STORED AS CSV LOCATION '/etc/passwd'",
        "COPY attempts TO 'out.csv'",
        "SET datafusion.execution.batch_size = 1",
        "SELECT 1; DROP TABLE attempts",
    ];
    for query in writes {
        let ran = books.run(&["sql", query]);
        assert_ne!(ran.code, 0, "{query}: {ran:?}");
        assert_eq!(ran.err.lines().count(), 1, "{ran:?}");
    }
    assert_eq!(total(&books.json(&["report"]), "attempts"), 3);
}

#[test]
fn an_empty_place_is_no_ledger() {
    let books = Books::new();
    for args in
        [&["report"][..], &["verify"], &["sql", "SELECT 1"], &["settle"], &["key", "list"], &["export", "requests"]]
    {
        books.run(args).fails_with("there is no ledger in");
    }
    assert!(!books.data().exists());
}

#[test]
fn another_price_map_is_compared_on_past_usage() {
    let books = Books::new();
    let file = books.write("conv.csv", TRACE);
    books.json(&["import", "azure-llm-trace", &file, "--model", "gpt-4o"]);
    let map = r#"{"gpt-4o": {"litellm_provider": "openai", "mode": "chat", "input_cost_per_token": 1e-06, "output_cost_per_token": 2e-06}}"#;
    let map = books.write("prices.json", map);
    let diff = books.json(&["price", "diff", &map]);
    assert_eq!(
        (&diff["total"]["old_cost"], &diff["total"]["new_cost"]),
        (&"0.008025".into(), &"0.00273".into()),
        "{diff}"
    );
    assert_eq!(books.json(&["price", "import", "litellm", &map])["cards"], 1);
    let shown = books.run(&["price", "show", "gpt-4o", "--provider", "openai"]).out;
    assert!(shown.contains("litellm@") && shown.contains("1.00"), "{shown}");
    books.run(&["price", "show", "gpt-4oo"]).fails_with("did you mean `gpt-4o`?");
}

#[test]
fn what_is_exported_reads_back_as_the_same_attempts_from_lines_and_from_parquet() {
    let books = Books::new();
    let trace = books.write("conv.csv", TRACE);
    books.json(&["import", "azure-llm-trace", &trace, "--model", "gpt-4o"]);
    let unattributed =
        r#"{"received_at": "2026-11-02T12:00:00Z", "source": "gateway", "model": "gpt-4o", "usage": {"input": 7}}"#;
    let own = books.write("own.jsonl", unattributed);
    books.json(&["import", "requests", &own]);
    let exported = books.run(&["export", "requests"]).out;
    let parquet = books.path("out.parquet").to_str().unwrap().to_owned();
    let ran = books.run(&["export", "requests", "--parquet", &parquet]);
    assert!(ran.code == 0 && ran.err.contains("4 attempts written"), "{ran:?}");

    for file in [books.write("out.jsonl", &exported), parquet] {
        let other = Books::new();
        let first = other.json(&["import", "requests", &file]);
        assert_eq!(
            (&first[0]["rows"], &first[0]["attempts"], &first[0]["rejected"]),
            (&4.into(), &4.into(), &0.into())
        );
        assert_eq!(other.run(&["export", "requests"]).out, exported, "{file}");
        assert_eq!(other.json(&["import", "requests", &file])[0]["already_known"], 4);
        let report = other.json(&["report", "--by", "consumer"]);
        assert_eq!(report["unattributed_attempts"], 1, "nobody is blamed for what nobody was held to: {report}");
        assert_eq!(other.json(&["verify"])["clean"], true);
    }
}

#[test]
fn parquet_of_something_else_is_refused_in_one_line() {
    let books = Books::new();
    let damaged = books.write("damaged.parquet", b"PAR1 and nothing more");
    books.run(&["import", "requests", &damaged]).fails_with("the Parquet file is damaged");
    let trace = books.write("conv.csv", TRACE);
    books.json(&["import", "azure-llm-trace", &trace, "--model", "gpt-4o"]);
    // The postings table is Parquet too, of other columns.
    let folder = std::fs::read_dir(books.data().join("postings")).unwrap().map(|entry| entry.unwrap().path());
    let day = folder.into_iter().find(|path| path.to_string_lossy().contains("day=")).unwrap();
    let files = std::fs::read_dir(day).unwrap().map(|entry| entry.unwrap().path());
    let file = files.into_iter().find(|path| path.extension().is_some_and(|ending| ending == "parquet")).unwrap();
    books.run(&["import", "requests", file.to_str().unwrap()]).fails_with("are not those of the attempts table");
}

#[test]
fn a_span_that_holds_nothing_is_a_mistake_and_an_empty_one_says_so() {
    let books = Books::new();
    let trace = books.write("conv.csv", TRACE);
    books.json(&["import", "azure-llm-trace", &trace, "--model", "gpt-4o"]);
    for command in [&["report"][..], &["export", "requests"]] {
        books
            .run(&[command, &["--from", "2026-11-03", "--to", "2026-11-02"]].concat())
            .fails_with("nothing lies between");
    }
    assert!(books.run(&["report", "--from", "2030-01-01"]).out.contains("nothing is booked"));
    let none = books.run(&["sql", "SELECT model FROM attempts WHERE false", "--csv"]);
    assert_eq!(none.out, "model\n", "an empty answer still names its columns");
    for (query, part) in [
        ("SELEC 1", "the query is not SQL"),
        ("SELECT modell FROM attempts", "there is no column `modell`; did you mean `model`?"),
        ("SELECT 1 FROM atempts", "there is no table `atempts`"),
        ("DELETE FROM attempts", "only reading is allowed"),
        ("SELECT 1; SELECT 2", "one statement at a time"),
    ] {
        books.run(&["sql", query]).fails_with(part);
    }
}
