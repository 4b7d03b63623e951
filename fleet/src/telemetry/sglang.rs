//! SGLang, `/metrics` of a server started with `--enable-metrics`.
//!
//! ```
//! let scrape = fleet::prometheus::parse("sglang:num_queue_reqs{tp_rank=\"0\"} 2.0\nsglang:num_queue_reqs{tp_rank=\"1\"} 2.0\n");
//! assert_eq!(fleet::telemetry::sglang::read(&scrape).reading.waiting, Some(2));
//! ```
//!
//! Ranks of one model (`tp_rank`, `pp_rank`, `moe_ep_rank`, …) each tell the same story, so one of them is taken, the
//! furthest; data-parallel ranks (`dp_rank`) serve requests of their own and are added. With priority scheduling a metric
//! has one series for all requests (`priority=""`) and one a priority; the first is the whole.

use std::collections::BTreeMap;

use ledger::EngineReading;

use super::values::{Page, count, few, micros, part, quantity};
use super::{Found, Loss};
use crate::prometheus::{Sample, Scrape};

const REALTIME: &str = "sglang:realtime_tokens_total";

/// Reads what SGLang says. `realtime_tokens_total` counts as steps run, in units of the server's log interval, and
/// leaves out the first token of each answer, which prefill makes; servers without it count tokens when a request ends.
#[must_use]
pub fn read(scrape: &Scrape) -> Found {
    let mut page = Page::new(scrape);
    let running = all(scrape, "sglang:num_running_reqs").and_then(few);
    let waiting = all(scrape, "sglang:num_queue_reqs").and_then(few);
    let kv_used = mean(&ranks(scrape, "sglang:token_usage", |_| true)).and_then(part);
    let prompt_tokens = realtime(scrape, &["prefill_compute", "prefill_cache"])
        .or_else(|| all(scrape, "sglang:prompt_tokens_total"))
        .and_then(count);
    let generation_tokens =
        realtime(scrape, &["decode"]).or_else(|| all(scrape, "sglang:generation_tokens_total")).and_then(count);
    let cached_tokens = realtime(scrape, &["prefill_cache"]).or_else(|| all(scrape, "sglang:cached_tokens_total"));
    let steps = all(scrape, "sglang:cuda_graph_passes_total").and_then(count);
    let busy_us = busy(scrape);
    let preemptions = all(scrape, "sglang:num_retracted_requests_total").and_then(count);
    let kv_tokens = all(scrape, "sglang:max_total_num_tokens").and_then(count).filter(|&tokens| tokens > 0);
    let reading = EngineReading {
        running: page.need("sglang:num_running_reqs", Loss::Series, running),
        waiting: page.need("sglang:num_queue_reqs", Loss::Series, waiting),
        kv_used: page.need("sglang:token_usage", Loss::Series, kv_used),
        prompt_tokens: page.need("sglang:prompt_tokens_total", Loss::Counts, prompt_tokens),
        cached_tokens: cached_tokens.and_then(count),
        generation_tokens: page.need("sglang:generation_tokens_total", Loss::Counts, generation_tokens),
        steps,
        // Counters with labels appear only once they have counted, so their absence is not worth a warning.
        preemptions,
        finished: all(scrape, "sglang:num_requests_total").and_then(count),
        busy_us: page.need("sglang:gpu_execution_seconds_total", Loss::Steps, busy_us),
        kv_tokens: page.need("sglang:max_total_num_tokens", Loss::Capacity, kv_tokens),
        ..EngineReading::default()
    };
    page.found(reading)
}

/// The sum over the data-parallel ranks.
fn all(scrape: &Scrape, name: &str) -> Option<f64> {
    total(&ranks(scrape, name, |_| true))
}

/// Tokens of these modes; the first mode must be there, the others appear once they have counted.
fn realtime(scrape: &Scrape, modes: &[&str]) -> Option<f64> {
    let has = |mode| scrape.named(REALTIME).any(|sample| sample.label("mode") == Some(mode));
    let first = modes.first().is_some_and(|&mode| has(mode));
    let wanted = |sample: &Sample| sample.label("mode").is_some_and(|mode| modes.contains(&mode));
    first.then(|| total(&ranks(scrape, REALTIME, wanted)))?
}

/// Time in which the GPU worked, over all categories of work. Data-parallel ranks work side by side, so the busiest of
/// them is taken: the engine was busy at least as long.
fn busy(scrape: &Scrape) -> Option<u64> {
    let names = ["sglang:gpu_execution_seconds_total", "sglang:forward_execution_seconds_total"];
    let seconds = names.into_iter().map(|name| ranks(scrape, name, |_| true)).find(|ranks| !ranks.is_empty())?;
    seconds.into_values().flatten().reduce(f64::max).and_then(micros)
}

/// A data-parallel rank, and which of the ranks that tell its story.
type Teller<'a> = (&'a str, Vec<(&'a str, &'a str)>);

/// For each data-parallel rank the furthest of the ranks that tell the same story; `None` when none of them says.
fn ranks(scrape: &Scrape, name: &str, wanted: impl Fn(&Sample) -> bool) -> BTreeMap<String, Option<f64>> {
    let for_all = |sample: &Sample| sample.label("priority").unwrap_or("").is_empty();
    let has_whole = scrape.named(name).any(for_all);
    let mut told: BTreeMap<Teller<'_>, Option<f64>> = BTreeMap::new();
    for sample in scrape.named(name).filter(|sample| wanted(sample) && (for_all(sample) || !has_whole)) {
        let is_copy = |label: &str| label.ends_with("_rank") && label != "dp_rank";
        let mut copy: Vec<(&str, &str)> =
            sample.labels.iter().filter(|(label, _)| is_copy(label)).map(|(l, v)| (l.as_str(), v.as_str())).collect();
        copy.sort_unstable();
        let sum = told.entry((sample.label("dp_rank").unwrap_or(""), copy)).or_insert(Some(0.0));
        *sum = sum.zip(quantity(sample.value)).map(|(sum, value)| sum + value);
    }
    let mut furthest: BTreeMap<String, Option<f64>> = BTreeMap::new();
    for ((rank, _), value) in told {
        let best = furthest.entry(rank.to_owned()).or_insert(None);
        *best = best.map_or(value, |best| Some(value.map_or(best, |value| value.max(best))));
    }
    furthest
}

fn total(ranks: &BTreeMap<String, Option<f64>>) -> Option<f64> {
    ranks.values().copied().reduce(|sum, value| Some(sum? + value?))?
}

fn mean(ranks: &BTreeMap<String, Option<f64>>) -> Option<f64> {
    total(ranks).map(|sum| sum / ranks.len() as f64)
}

#[cfg(test)]
mod tests {
    use super::super::restarted;
    use super::*;
    use crate::prometheus::parse;

    fn at_work() -> EngineReading {
        EngineReading {
            running: Some(5),
            waiting: Some(3),
            kv_used: Some(280_000),
            prompt_tokens: Some(1_000),
            cached_tokens: Some(900),
            generation_tokens: Some(150),
            steps: Some(110),
            preemptions: Some(2),
            finished: Some(9),
            busy_us: Some(3_500_000),
            kv_tokens: Some(161_721),
            ..EngineReading::default()
        }
    }

    /// What a server on two GPUs in tensor parallel writes when every scheduler reports, shortened.
    const AT_WORK: &str = r#"
sglang:num_running_reqs{engine_type="unified",model_name="m",moe_ep_rank="0",pp_rank="0",priority="",tp_rank="0"} 5.0
sglang:num_running_reqs{engine_type="unified",model_name="m",moe_ep_rank="0",pp_rank="0",priority="3",tp_rank="0"} 4.0
sglang:num_running_reqs{engine_type="unified",model_name="m",moe_ep_rank="0",pp_rank="0",priority="",tp_rank="1"} 5.0
sglang:num_queue_reqs{engine_type="unified",model_name="m",pp_rank="0",tp_rank="0"} 3.0
sglang:num_queue_reqs{engine_type="unified",model_name="m",pp_rank="0",tp_rank="1"} 3.0
sglang:token_usage{engine_type="unified",model_name="m",pp_rank="0",tp_rank="0"} 0.28
sglang:token_usage{engine_type="unified",model_name="m",pp_rank="0",tp_rank="1"} 0.28
sglang:max_total_num_tokens{engine_type="unified",model_name="m",pp_rank="0",tp_rank="0"} 161721.0
sglang:realtime_tokens_total{mode="prefill_compute",model_name="m",tp_rank="0"} 100.0
sglang:realtime_tokens_total{mode="prefill_cache",model_name="m",tp_rank="0"} 900.0
sglang:realtime_tokens_total{mode="decode",model_name="m",tp_rank="0"} 150.0
sglang:realtime_tokens_total{mode="prefill_compute",model_name="m",tp_rank="1"} 100.0
sglang:realtime_tokens_total{mode="prefill_cache",model_name="m",tp_rank="1"} 900.0
sglang:realtime_tokens_total{mode="decode",model_name="m",tp_rank="1"} 140.0
sglang:gpu_execution_seconds_total{category="forward_extend",model_name="m",tp_rank="0"} 1.25
sglang:gpu_execution_seconds_total{category="forward_decode",model_name="m",tp_rank="0"} 2.25
sglang:gpu_execution_seconds_total{category="forward_decode",model_name="m",tp_rank="1"} 3.0
sglang:cuda_graph_passes_total{mode="decode_cuda_graph",model_name="m",tp_rank="0"} 100.0
sglang:cuda_graph_passes_total{mode="prefill_none",model_name="m",tp_rank="0"} 10.0
sglang:num_retracted_requests_total{model_name="m",tp_rank="0"} 2.0
sglang:prompt_tokens_total{model_name="m"} 950.0
sglang:generation_tokens_total{model_name="m"} 120.0
sglang:cached_tokens_total{cache_source="device",model_name="m"} 850.0
sglang:num_requests_total{model_name="m"} 9.0
sglang:utilization{model_name="m",tp_rank="0"} -1.0
"#;

    fn check(change: impl Fn(&str) -> String, expected: EngineReading, missing: &[&str]) {
        let found = read(&parse(&change(AT_WORK)));
        assert_eq!(found.reading, expected);
        assert_eq!(found.missing.iter().map(|missing| missing.name).collect::<Vec<_>>(), missing);
    }

    fn without(text: &str, name: &str) -> String {
        text.lines().filter(|line| !line.starts_with(name)).fold(String::new(), |text, line| text + line + "\n")
    }

    #[test]
    fn ranks_of_one_model_are_counted_once() {
        check(str::to_owned, at_work(), &[]);
    }

    #[test]
    fn data_parallel_ranks_add_up() {
        let ranks = |text: &str| {
            let of_rank = |rank: u32| text.replace("model_name=", &format!("dp_rank=\"{rank}\",model_name="));
            let second = without(&of_rank(1), "sglang:num_requests_total");
            format!("{}{}", of_rank(0), second.replace("} 0.28", "} 0.48"))
        };
        let expected = EngineReading {
            running: Some(10),
            waiting: Some(6),
            kv_used: Some(380_000),
            prompt_tokens: Some(2_000),
            cached_tokens: Some(1_800),
            generation_tokens: Some(300),
            steps: Some(220),
            preemptions: Some(4),
            kv_tokens: Some(323_442),
            ..at_work()
        };
        check(ranks, expected, &[]);
    }

    #[test]
    fn older_servers_count_tokens_when_requests_end() {
        let older = |text: &str| without(text, REALTIME).replace("gpu_execution", "forward_execution");
        let expected = EngineReading {
            prompt_tokens: Some(950),
            cached_tokens: Some(850),
            generation_tokens: Some(120),
            ..at_work()
        };
        check(older, expected, &[]);
    }

    #[test]
    fn a_fresh_server_has_counted_nothing_and_says_nothing() {
        let fresh = |text: &str| {
            let counters = |line: &&str| line.contains("_total{") && !line.contains("max_total_num");
            text.lines().filter(|line| !counters(line)).fold(String::new(), |text, line| text + line + "\n")
        };
        let expected = EngineReading {
            running: Some(5),
            waiting: Some(3),
            kv_used: Some(280_000),
            kv_tokens: Some(161_721),
            ..EngineReading::default()
        };
        let missing =
            ["sglang:prompt_tokens_total", "sglang:generation_tokens_total", "sglang:gpu_execution_seconds_total"];
        check(fresh, expected, &missing);
        assert_eq!(read(&Scrape::default()).missing.len(), 7);
    }

    #[test]
    fn one_rank_that_does_not_know_does_not_hide_the_other() {
        let nan = |text: &str| text.replace("pp_rank=\"0\",tp_rank=\"0\"} 0.28", "pp_rank=\"0\",tp_rank=\"0\"} NaN");
        check(nan, at_work(), &[]);
        let both = |text: &str| text.replace("} 0.28", "} NaN");
        check(both, EngineReading { kv_used: None, ..at_work() }, &["sglang:token_usage"]);
    }

    #[test]
    fn a_restart_is_seen() {
        let fresh = read(&parse(
            &AT_WORK.replace("mode=\"decode\",model_name=\"m\",tp_rank=\"0\"} 150.0", "mode=\"decode\"} 3.0"),
        ));
        assert!(!restarted(&at_work(), &at_work()));
        assert!(restarted(&at_work(), &EngineReading { generation_tokens: Some(3), ..fresh.reading }));
    }
}
