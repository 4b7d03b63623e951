//! What was measured, as tables to paste into `docs/speed.md`.

use bench::text::table;
use serde_json::Value;

/// All tables of one run.
pub fn tables(found: &Value) -> String {
    let mut text = format!("{}, {} build\n\n", word(&found["machine"]), word(&found["profile"]));
    let sweeps: Vec<Vec<String>> = list(&found["sweep"])
        .map(|one| {
            vec![
                grouped(&one["requests"]),
                seconds(&one["seconds"]),
                millions(&one["requests_per_s"]),
                grouped(&one["held_max"]),
                megabytes(&one["peak_bytes"]),
            ]
        })
        .collect();
    text += &table(&["requests, one core", "s", "million/s", "held at once, most", "peak memory MB"], &sweeps);
    text += "\n";
    let settled: Vec<Vec<String>> = [("in memory", &found["settle"]), ("from files to files", &found["settle_files"])]
        .into_iter()
        .map(|(name, one)| {
            vec![
                name.to_owned(),
                grouped(&one["requests"]),
                seconds(&one["seconds"]),
                millions(&one["requests_per_s"]),
                grouped(&one["postings"]),
                grouped(&one["engine_minutes"]),
                megabytes(&one["peak_bytes"]),
            ]
        })
        .collect();
    let headers =
        ["settlement, two cores", "requests", "s", "million/s", "amounts", "engine-minutes closed", "peak memory MB"];
    text += &table(&headers, &settled);
    text += &format!(
        "\nread {} MB, written {} MB\n\n",
        megabytes(&found["settle_files"]["read_bytes"]),
        megabytes(&found["settle_files"]["written_bytes"])
    );
    let beside: Vec<Vec<String>> = list(&found["beside"]).flat_map(peers).collect();
    if !beside.is_empty() {
        let headers =
            ["requests", "shares from file to file", "s", "times Farthing's", "peak memory MB", "seconds of others"];
        text += &table(&headers, &beside);
    }
    text
}

fn peers(one: &Value) -> Vec<Vec<String>> {
    let ours = one["farthing"]["seconds"].as_f64();
    ["farthing", "duckdb", "polars"]
        .into_iter()
        .map(|engine| {
            let found = &one[engine];
            if let Some(error) = found["error"].as_str() {
                return vec![
                    grouped(&one["requests"]),
                    engine.to_owned(),
                    error.to_owned(),
                    "-".into(),
                    "-".into(),
                    "-".into(),
                ];
            }
            let ratio =
                ours.zip(found["seconds"].as_f64()).map_or("-".to_owned(), |(ours, own)| format!("{:.1}", own / ours));
            let difference = one["differences"][engine]["moved"]
                .as_f64()
                .map_or("-".to_owned(), |difference| format!("{difference:.1e}"));
            let name = found["name"].as_str().unwrap_or("Farthing").to_owned();
            vec![
                grouped(&one["requests"]),
                name,
                seconds(&found["seconds"]),
                ratio,
                megabytes(&found["peak_bytes"]),
                difference,
            ]
        })
        .collect()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn word(value: &Value) -> &str {
    value.as_str().unwrap_or("-")
}

fn seconds(value: &Value) -> String {
    value.as_f64().map_or("-".to_owned(), |seconds| format!("{seconds:.2}"))
}

fn millions(value: &Value) -> String {
    value.as_f64().map_or("-".to_owned(), |rate| format!("{:.2}", rate / 1e6))
}

fn megabytes(value: &Value) -> String {
    value.as_f64().map_or("-".to_owned(), |bytes| format!("{:.0}", bytes / 1e6))
}

/// A count with its thousands apart.
fn grouped(value: &Value) -> String {
    let Some(count) = value.as_u64() else { return "-".to_owned() };
    let digits = count.to_string();
    let lead = digits.len() % 3;
    let mut text = digits[..lead].to_owned();
    for at in (lead..digits.len()).step_by(3) {
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(&digits[at..at + 3]);
    }
    text
}
