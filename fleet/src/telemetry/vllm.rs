//! vLLM, `/metrics`, versions 0.19 to 0.32.
//!
//! ```
//! let scrape = fleet::prometheus::parse("vllm:num_requests_running{engine=\"0\",model_name=\"m\"} 3.0\n");
//! assert_eq!(fleet::telemetry::vllm::read(&scrape).reading.running, Some(3));
//! ```
//!
//! Data-parallel ranks are told apart by the label `engine`. One reading is one process, so requests, tokens, steps and
//! KV tokens are added over its ranks, and the part of the KV cache in use is their mean: the ranks' caches are equal.

use ledger::EngineReading;

use super::values::{Page, count, few, part, quantity};
use super::{Found, Loss};
use crate::prometheus::{Sample, Scrape};

/// Reads what vLLM says. Prompt tokens include those found in the cache; tokens of aborted requests are counted, and
/// aborted requests are not among the finished ones.
#[must_use]
pub fn read(scrape: &Scrape) -> Found {
    let mut page = Page::new(scrape);
    let running = page.sum(&["vllm:num_requests_running"]).and_then(few);
    let waiting = page.sum(&["vllm:num_requests_waiting"]).and_then(few);
    let kv_used = page.mean(&["vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"]).and_then(part);
    let prompt_tokens = page.sum(&["vllm:prompt_tokens_total", "vllm:prompt_tokens"]).and_then(count);
    let generation_tokens = page.sum(&["vllm:generation_tokens_total", "vllm:generation_tokens"]).and_then(count);
    let cached =
        ["vllm:prompt_tokens_cached_total", "vllm:prefix_cache_hits_total", "vllm:gpu_prefix_cache_hits_total"];
    let steps = page.sum(&["vllm:iteration_tokens_total_count"]).and_then(count);
    let preemptions = page.sum(&["vllm:num_preemptions_total", "vllm:num_preemptions"]).and_then(count);
    let reading = EngineReading {
        running: page.need("vllm:num_requests_running", Loss::Series, running),
        waiting: page.need("vllm:num_requests_waiting", Loss::Series, waiting),
        kv_used: page.need("vllm:kv_cache_usage_perc", Loss::Series, kv_used),
        asleep: asleep(scrape),
        prompt_tokens: page.need("vllm:prompt_tokens_total", Loss::Counts, prompt_tokens),
        cached_tokens: page.sum(&cached).and_then(count),
        generation_tokens: page.need("vllm:generation_tokens_total", Loss::Counts, generation_tokens),
        steps: page.need("vllm:iteration_tokens_total_count", Loss::Steps, steps),
        preemptions: page.need("vllm:num_preemptions_total", Loss::Preemptions, preemptions),
        finished: page.sum(&["vllm:request_success_total", "vllm:request_success"]).and_then(count),
        drafted_tokens: page.sum(&["vllm:spec_decode_num_draft_tokens_total"]).and_then(count),
        accepted_tokens: page.sum(&["vllm:spec_decode_num_accepted_tokens_total"]).and_then(count),
        kv_tokens: page.need("vllm:cache_config_info", Loss::Capacity, kv_tokens(scrape)),
        ..EngineReading::default()
    };
    page.found(reading)
}

/// Asleep when no rank is awake. Servers without sleep mode do not say.
fn asleep(scrape: &Scrape) -> Option<bool> {
    let awake = scrape.named("vllm:engine_sleep_state").filter(|sample| sample.label("sleep_state") == Some("awake"));
    awake.map(|sample| quantity(sample.value).map(|value| value == 0.0)).reduce(|all, one| Some(all? && one?))?
}

/// `num_gpu_blocks x block_size` of each rank, or the number of tokens where the server gives it: models that mix kinds
/// of attention have caches that are not blocks times size.
fn kv_tokens(scrape: &Scrape) -> Option<u64> {
    let of_rank = |sample: &Sample| {
        let number = |label| sample.label(label).and_then(|text| text.parse::<u64>().ok());
        let blocks = || number("num_gpu_blocks")?.checked_mul(number("block_size")?);
        number("kv_cache_size_tokens").or_else(blocks).filter(|&tokens| tokens > 0)
    };
    scrape.named("vllm:cache_config_info").map(of_rank).reduce(|all, one| all?.checked_add(one?))?
}

#[cfg(test)]
mod tests {
    use super::super::{Missing, restarted};
    use super::*;
    use crate::prometheus::parse;

    fn at_work() -> EngineReading {
        EngineReading {
            running: Some(3),
            waiting: Some(1),
            kv_used: Some(125_000),
            asleep: Some(false),
            prompt_tokens: Some(216),
            cached_tokens: Some(64),
            generation_tokens: Some(40),
            steps: Some(40),
            preemptions: Some(2),
            finished: Some(5),
            kv_tokens: Some(524_288),
            ..EngineReading::default()
        }
    }

    /// What a server of version 0.32 writes, shortened.
    const AT_WORK: &str = r#"
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 1.0
vllm:engine_sleep_state{engine="0",model_name="m",sleep_state="awake"} 1.0
vllm:engine_sleep_state{engine="0",model_name="m",sleep_state="weights_offloaded"} 0.0
vllm:engine_sleep_state{engine="0",model_name="m",sleep_state="discard_all"} 0.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.125
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 216.0
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 70.0
vllm:num_preemptions_total{engine="0",model_name="m"} 2.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 216.0
vllm:prompt_tokens_created{engine="0",model_name="m"} 1.79e+09
vllm:prompt_tokens_cached_total{engine="0",model_name="m"} 64.0
vllm:generation_tokens_total{engine="0",model_name="m"} 40.0
vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 3.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="m"} 2.0
vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="m"} 38.0
vllm:iteration_tokens_total_count{engine="0",model_name="m"} 40.0
vllm:iteration_tokens_total_sum{engine="0",model_name="m"} 256.0
vllm:cache_config_info{block_size="128",engine="0",kv_cache_size_tokens="524288",num_gpu_blocks="4096"} 1.0
vllm:some_name_of_the_future{engine="0"} 7.0
process_resident_memory_bytes 1e9
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
    fn reads_a_server_at_work() {
        check(str::to_owned, at_work(), &[]);
    }

    #[test]
    fn older_names_and_plain_block_counts_are_read() {
        let older = |text: &str| {
            let text = text.replace("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc");
            without(&text, "vllm:prompt_tokens_cached").replace("kv_cache_size_tokens=\"524288\",", "")
        };
        check(older, EngineReading { cached_tokens: Some(70), ..at_work() }, &[]);
    }

    #[test]
    fn missing_names_are_reported_with_their_price() {
        type Without = fn(EngineReading) -> EngineReading;
        let cases: [(&str, Without, Loss); 4] = [
            ("vllm:num_requests_waiting", |all| EngineReading { waiting: None, ..all }, Loss::Series),
            ("vllm:generation_tokens_total", |all| EngineReading { generation_tokens: None, ..all }, Loss::Counts),
            ("vllm:iteration_tokens_total_count", |all| EngineReading { steps: None, ..all }, Loss::Steps),
            ("vllm:cache_config_info", |all| EngineReading { kv_tokens: None, ..all }, Loss::Capacity),
        ];
        for (name, expected, loss) in cases {
            let found = read(&parse(&without(AT_WORK, name)));
            assert_eq!(found.reading, expected(at_work()));
            assert_eq!(found.missing, [Missing { name, loss }]);
            assert!(found.missing[0].to_string().starts_with(&format!("`{name}`: tier ")));
        }
        assert_eq!(read(&Scrape::default()).missing.len(), 8);
    }

    #[test]
    fn what_is_optional_may_be_absent() {
        let no_sleep_mode = |text: &str| without(text, "vllm:engine_sleep_state");
        check(no_sleep_mode, EngineReading { asleep: None, ..at_work() }, &[]);
    }

    #[test]
    fn values_that_are_none_are_unknown() {
        let nan = |text: &str| {
            text.replace("kv_cache_usage_perc{engine=\"0\",model_name=\"m\"} 0.125", "kv_cache_usage_perc NaN")
        };
        check(nan, EngineReading { kv_used: None, ..at_work() }, &["vllm:kv_cache_usage_perc"]);
        let negative =
            |text: &str| text.replace("running{engine=\"0\",model_name=\"m\"} 3.0", "running{engine=\"0\"} -3.0");
        check(negative, EngineReading { running: None, ..at_work() }, &["vllm:num_requests_running"]);
    }

    #[test]
    fn a_sleeping_server_says_so() {
        let sleeping = |text: &str| text.replace("sleep_state=\"awake\"} 1.0", "sleep_state=\"awake\"} 0.0");
        check(sleeping, EngineReading { asleep: Some(true), ..at_work() }, &[]);
    }

    #[test]
    fn data_parallel_ranks_add_up_and_their_cache_is_averaged() {
        let second = AT_WORK
            .replace("engine=\"0\"", "engine=\"1\"")
            .replace("perc{engine=\"1\",model_name=\"m\"} 0.125", "perc{engine=\"1\"} 0.375");
        let both = move |text: &str| format!("{text}{second}");
        let expected = EngineReading {
            running: Some(6),
            waiting: Some(2),
            kv_used: Some(250_000),
            prompt_tokens: Some(432),
            cached_tokens: Some(128),
            generation_tokens: Some(80),
            steps: Some(80),
            preemptions: Some(4),
            finished: Some(10),
            kv_tokens: Some(1_048_576),
            ..at_work()
        };
        check(both, expected, &[]);
    }

    #[test]
    fn speculation_is_counted() {
        let drafts = "vllm:spec_decode_num_draft_tokens_total{engine=\"0\"} 30\nvllm:spec_decode_num_accepted_tokens_total{engine=\"0\"} 21\n";
        let speculating = |text: &str| format!("{text}{drafts}");
        check(speculating, EngineReading { drafted_tokens: Some(30), accepted_tokens: Some(21), ..at_work() }, &[]);
    }

    #[test]
    fn a_counter_that_fell_is_a_restart() {
        let later = |generation| EngineReading { generation_tokens: generation, ..at_work() };
        for (generation, expected) in [(Some(41), false), (Some(40), false), (None, false), (Some(7), true)] {
            assert_eq!(restarted(&at_work(), &later(generation)), expected, "{generation:?}");
        }
        assert!(!restarted(&at_work(), &EngineReading { running: Some(0), ..at_work() }), "gauges fall all the time");
    }
}
