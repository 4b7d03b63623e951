//! What a simulated engine came to, for people and for programs.

use fleet::sim::engine::calibrate::Errors;
use fleet::sim::engine::{Constants, Stats, Summary};
use serde_json::{Map, Value, json};

use super::{Compared, Found, Options, Run};
use crate::render::{self, Align, Table};

/// One JSON document. Unknown is null.
pub(super) fn document(found: &Found) -> Value {
    let mut document = Map::new();
    if let Some(run) = &found.run {
        document = summary(&run.summary);
        document.insert("usd_per_million_output_tokens".to_owned(), json!(run.usd_per_million_output_tokens));
        document.insert("usd".to_owned(), json!(run.cost));
        document.insert("utilisation".to_owned(), json!(rounded(run.utilisation)));
        document.insert("batch_mean".to_owned(), json!(rounded(run.batch)));
        document.insert("preemptions".to_owned(), json!(run.preemptions));
        document.insert("cached_input_share".to_owned(), json!(rounded(run.cached_input_share)));
    }
    let limits = &found.spec.limits;
    let replica = &found.spec.constants.replica;
    document.insert("calibrated".to_owned(), json!(found.calibrated));
    document.insert("constants".to_owned(), constants(found));
    document.insert(
        "engine".to_owned(),
        json!({
            "gpu": replica.gpu.name,
            "gpus": replica.gpus,
            "max_num_seqs": limits.max_num_seqs,
            "max_num_batched_tokens": limits.max_num_batched_tokens,
            "kv_tokens": u64::from(found.spec.kv_blocks()) * u64::from(limits.block_tokens),
            "link_bytes_per_s": found.spec.constants.link_bytes_per_s.filter(|_| replica.gpus > 1),
        }),
    );
    if let Some(measured) = &found.measured {
        document.insert("measured".to_owned(), Value::Object(summary(measured)));
        document.insert("errors".to_owned(), json!(found.errors.as_ref().map(errors)));
    }
    if let Some((requests, held_out)) = &found.held_out {
        document.insert("held_out".to_owned(), json!({ "requests": requests, "errors": errors(held_out) }));
    }
    if !found.points.is_empty() {
        document.insert("benchmarks".to_owned(), found.points.iter().map(benchmark).collect());
    }
    Value::Object(document)
}

fn summary(of: &Summary) -> Map<String, Value> {
    let mut map = Map::new();
    map.insert("requests".to_owned(), json!(of.requests));
    map.insert("duration_s".to_owned(), json!(rounded(of.duration_s)));
    map.insert("requests_per_s".to_owned(), json!(rounded(of.requests_per_s)));
    map.insert("tps_output".to_owned(), json!(rounded(of.tps_output)));
    for (name, stats) in [("ttft_ms", &of.ttft_ms), ("tpot_ms", &of.tpot_ms), ("e2e_ms", &of.e2e_ms)] {
        let Stats { mean, p50, p90, p99 } = stats;
        let stats = json!({ "mean": rounded(*mean), "p50": rounded(*p50), "p90": rounded(*p90), "p99": rounded(*p99) });
        map.insert(name.to_owned(), stats);
    }
    map
}

fn constants(found: &Found) -> Value {
    let Constants { replica, sequence_s, request_s, .. } = &found.spec.constants;
    let of = &replica.efficiencies;
    json!({
        "compute": of.compute,
        "bandwidth": of.bandwidth,
        "overhead_s": of.overhead_s,
        "overlap": replica.overlap,
        "sequence_s": sequence_s,
        "request_s": request_s,
        "fitted": found.fitted,
    })
}

fn errors(of: &Errors) -> Value {
    json!({
        "tpot_mean": rounded(of.tpot),
        "ttft_mean": rounded(of.ttft),
        "e2e_mean": rounded(of.e2e),
        "tpot_each": rounded(of.tpot_each),
    })
}

fn benchmark(one: &Compared) -> Value {
    json!({
        "requests_per_s": one.point.load.requests_per_s,
        "fitted": one.fitted,
        "simulated": summary(&one.summary),
        "tps_output_error": one.point.tps_output.map(|real| rounded(one.summary.tps_output / real - 1.0)),
        "tpot_p50_error": one.point.tpot_ms[0].map(|real| rounded(one.summary.tpot_ms.p50 / real - 1.0)),
    })
}

/// Six places: a microsecond of a second.
fn rounded(value: f64) -> f64 {
    (value * 1e6).round() / 1e6
}

/// For people.
pub(super) fn text(found: &Found, options: &Options) -> String {
    let mut parts = vec![head(found)];
    if !found.points.is_empty() {
        parts.push(benchmarks(&found.points));
    }
    if let Some(run) = &found.run {
        parts.push(times(run, found.measured.as_ref()));
        parts.push(totals(run, found.measured.as_ref()));
    }
    if let Some((requests, held_out)) = &found.held_out {
        let n = render::count(*requests);
        parts.push(format!("off on the {n} requests that the constants were not fitted to: {}\n", off(held_out)));
    }
    if let Some(errors) = &found.errors {
        parts.push(format!("off on all requests: {}\n", off(errors)));
    }
    if let Some(out) = &options.write_calibration {
        parts.push(format!("constants in {}\n", out.display()));
    }
    parts.join("\n")
}

fn head(found: &Found) -> String {
    let Constants { replica, sequence_s, request_s, .. } = &found.spec.constants;
    let limits = &found.spec.limits;
    let of = &replica.efficiencies;
    let from = match &found.fitted {
        Some(fitted) => {
            format!("fitted to {} of {}", render::counted(fitted.observations as u64, "observation"), fitted.from)
        }
        None if found.calibrated => "from the calibration".to_owned(),
        None => "NOT calibrated: the data sheet with usual efficiencies".to_owned(),
    };
    let kv_tokens = u64::from(found.spec.kv_blocks()) * u64::from(limits.block_tokens);
    format!(
        "{} x {}, up to {} requests and {} tokens a step, {} tokens of KV cache\nconstants {from}\n  {:.1} % of the compute, \
         {:.1} % of the bandwidth, {:.3} ms a step, {:.1} µs a request and step, {:.1} ms a request, overlap {}\n",
        replica.gpus,
        replica.gpu.name,
        render::count(limits.max_num_seqs.into()),
        render::count(limits.max_num_batched_tokens.into()),
        render::count(kv_tokens),
        of.compute * 100.0,
        of.bandwidth * 100.0,
        of.overhead_s * 1e3,
        sequence_s * 1e6,
        request_s * 1e3,
        replica.overlap,
    )
}

fn times(run: &Run, measured: Option<&Summary>) -> String {
    let mut table = Table::new(
        [("milliseconds", Align::Left)]
            .into_iter()
            .chain(["mean", "p50", "p90", "p99"].map(|name| (name, Align::Right))),
    );
    let mut row = |name: String, stats: &Stats| {
        let cells = [stats.mean, stats.p50, stats.p90, stats.p99].map(|value| format!("{value:.1}"));
        table.row([name].into_iter().chain(cells));
    };
    let of = |summary: &Summary| [summary.ttft_ms, summary.tpot_ms, summary.e2e_ms];
    let names = ["to the first token", "per output token", "to the last token"];
    for (place, name) in names.into_iter().enumerate() {
        row(name.to_owned(), &of(&run.summary)[place]);
        if let Some(measured) = measured {
            row("  measured".to_owned(), &of(measured)[place]);
        }
    }
    table.to_string()
}

fn totals(run: &Run, measured: Option<&Summary>) -> String {
    let summary = &run.summary;
    let real = measured.map_or(String::new(), |real| format!(" (measured {:.1})", real.tps_output));
    let mut said = vec![
        format!(
            "{} in {:.1} s: {:.2} requests/s, {:.1} output tokens/s{real}",
            render::counted(summary.requests, "request"),
            summary.duration_s,
            summary.requests_per_s,
            summary.tps_output
        ),
        format!(
            "{:.1} requests in the batch on average, in a step {:.1} % of the time, {}",
            run.batch,
            run.utilisation * 100.0,
            render::counted(run.preemptions, "preemption")
        ),
    ];
    if run.cached_input_share > 0.0 {
        said.push(format!("{:.1} % of the input tokens found in the prefix cache", run.cached_input_share * 100.0));
    }
    said.push(match run.usd_per_million_output_tokens {
        Some(usd) => format!("{} USD a million output tokens", render::dollars(usd)),
        None => "cost unknown without --gpu-hour-usd".to_owned(),
    });
    said.into_iter().map(|line| line + "\n").collect()
}

fn benchmarks(points: &[Compared]) -> String {
    let mut table = Table::new([
        ("requests/s", Align::Right),
        ("output tokens/s", Align::Right),
        ("measured", Align::Right),
        ("off", Align::Right),
        ("ms per token, p50", Align::Right),
        ("measured", Align::Right),
        ("off", Align::Right),
        ("", Align::Left),
    ]);
    for Compared { point, fitted, summary } in points {
        let beside = |found: f64, real: Option<f64>| {
            let known = |real: f64| [format!("{real:.1}"), percent(found / real - 1.0)];
            let [real, off] = real.map_or_else(Default::default, known);
            [format!("{found:.1}"), real, off]
        };
        let rate = [point.load.requests_per_s.to_string()];
        let cells = [beside(summary.tps_output, point.tps_output), beside(summary.tpot_ms.p50, point.tpot_ms[0])];
        let fitted = if *fitted { "fitted to" } else { "" };
        table.row(rate.into_iter().chain(cells.into_iter().flatten()).chain([fitted.to_owned()]));
    }
    table.to_string()
}

fn off(errors: &Errors) -> String {
    format!(
        "{} per output token, {} to the first, {} to the last (means)",
        percent(errors.tpot),
        percent(errors.ttft),
        percent(errors.e2e)
    )
}

fn percent(part: f64) -> String {
    format!("{:+.1} %", part * 100.0)
}
