//! TensorRT-LLM's own server, `trtllm-serve`, `/prometheus/metrics`.
//!
//! ```
//! let scrape = fleet::prometheus::parse("trtllm_kv_cache_max_blocks 100\ntrtllm_kv_cache_tokens_per_block 32\n");
//! assert_eq!(fleet::telemetry::tensorrt_llm::read(&scrape).reading.kv_tokens, Some(3_200));
//! ```
//!
//! It counts tokens when a request ends. The latency of an iteration is a gauge, so the time worked cannot be added up,
//! and blocks found in the cache are counted with those found in part, so cached tokens stay unknown.

use ledger::EngineReading;

use super::values::{Page, count, few, part};
use super::{Found, Loss};
use crate::prometheus::Scrape;

/// Reads what `trtllm-serve` says.
#[must_use]
pub fn read(scrape: &Scrape) -> Found {
    let mut page = Page::new(scrape);
    let in_prefill = page.sum(&["trtllm_num_context_requests"]);
    let in_decode = page.sum(&["trtllm_num_generation_requests"]);
    let scheduled = in_prefill.zip(in_decode).map(|(prefill, decode)| prefill + decode);
    let running = scheduled.or_else(|| page.sum(&["trtllm_num_requests_running"])).and_then(few);
    let waiting = page.sum(&["trtllm_num_requests_waiting"]).and_then(few);
    let blocks = page.sum(&["trtllm_kv_cache_max_blocks"]).filter(|&blocks| blocks > 0.0);
    let used = page.sum(&["trtllm_kv_cache_used_blocks"]);
    let filled = used.zip(blocks).map(|(used, blocks)| used / blocks);
    let kv_used = page.mean(&["trtllm_kv_cache_utilization"]).or(filled).and_then(part);
    let block_tokens = page.mean(&["trtllm_kv_cache_tokens_per_block"]);
    let kv_tokens = blocks.zip(block_tokens).and_then(|(blocks, tokens)| count(blocks * tokens));
    let prompt_tokens = page.sum(&["trtllm_prompt_tokens_total"]).and_then(count);
    let generation_tokens = page.sum(&["trtllm_generation_tokens_total"]).and_then(count);
    let ended = ["trtllm_num_requests_completed_total", "trtllm_request_success_total"];
    let reading = EngineReading {
        running: page.need("trtllm_num_requests_running", Loss::Series, running),
        waiting: page.need("trtllm_num_requests_waiting", Loss::Series, waiting),
        kv_used: page.need("trtllm_kv_cache_utilization", Loss::Series, kv_used),
        prompt_tokens: page.need("trtllm_prompt_tokens_total", Loss::Counts, prompt_tokens),
        generation_tokens: page.need("trtllm_generation_tokens_total", Loss::Counts, generation_tokens),
        finished: page.sum(&ended).and_then(count),
        drafted_tokens: page.sum(&["trtllm_spec_decode_num_draft_tokens_total"]).and_then(count),
        accepted_tokens: page.sum(&["trtllm_spec_decode_num_accepted_tokens_total"]).and_then(count),
        kv_tokens: page.need("trtllm_kv_cache_max_blocks", Loss::Capacity, kv_tokens),
        ..EngineReading::default()
    };
    page.found(reading)
}

#[cfg(test)]
mod tests {
    use super::super::restarted;
    use super::*;
    use crate::prometheus::parse;

    const AT_WORK: &str = r#"
trtllm_request_success_total{engine_type="trtllm",finished_reason="stop",model_name="m"} 7.0
trtllm_request_success_total{engine_type="trtllm",finished_reason="length",model_name="m"} 4.0
trtllm_prompt_tokens_total{engine_type="trtllm",model_name="m"} 5000.0
trtllm_generation_tokens_total{engine_type="trtllm",model_name="m"} 700.0
trtllm_kv_cache_utilization{engine_type="trtllm",model_name="m"} 0.0015
trtllm_kv_cache_reused_blocks_total{engine_type="trtllm",model_name="m"} 12.0
trtllm_num_requests_running{engine_type="trtllm",model_name="m"} 6.0
trtllm_num_requests_waiting{engine_type="trtllm",model_name="m"} 2.0
trtllm_iteration_latency_seconds{engine_type="trtllm",model_name="m"} 0.018
trtllm_kv_cache_max_blocks{engine_type="trtllm",model_name="m"} 5358.0
trtllm_kv_cache_used_blocks{engine_type="trtllm",model_name="m"} 8.0
trtllm_kv_cache_tokens_per_block{engine_type="trtllm",model_name="m"} 32.0
trtllm_num_context_requests{engine_type="trtllm",model_name="m"} 1.0
trtllm_num_generation_requests{engine_type="trtllm",model_name="m"} 4.0
trtllm_num_paused_requests{engine_type="trtllm",model_name="m"} 1.0
"#;

    fn at_work() -> EngineReading {
        EngineReading {
            running: Some(5),
            waiting: Some(2),
            kv_used: Some(1_500),
            prompt_tokens: Some(5_000),
            generation_tokens: Some(700),
            finished: Some(11),
            kv_tokens: Some(171_456),
            ..EngineReading::default()
        }
    }

    #[test]
    fn reads_a_server_at_work_and_what_it_does_not_say() {
        let cases: [(&str, EngineReading, &[&str]); 5] = [
            ("-", at_work(), &[]),
            ("trtllm_num_context", EngineReading { running: Some(6), ..at_work() }, &[]),
            ("trtllm_kv_cache_utilization", EngineReading { kv_used: Some(1_493), ..at_work() }, &[]),
            (
                "trtllm_kv_cache_tokens_per_block",
                EngineReading { kv_tokens: None, ..at_work() },
                &["trtllm_kv_cache_max_blocks"],
            ),
            (
                "trtllm_prompt_tokens",
                EngineReading { prompt_tokens: None, ..at_work() },
                &["trtllm_prompt_tokens_total"],
            ),
        ];
        for (dropped, reading, missing) in cases {
            let kept: Vec<&str> = AT_WORK.lines().filter(|line| !line.starts_with(dropped)).collect();
            let found = read(&parse(&kept.join("\n")));
            assert_eq!(found.reading, reading, "without {dropped}");
            assert_eq!(found.missing.iter().map(|missing| missing.name).collect::<Vec<_>>(), missing);
        }
        assert_eq!(read(&Scrape::default()).missing.len(), 6);
    }

    #[test]
    fn speculation_is_counted_and_a_restart_is_seen() {
        let drafts = "trtllm_spec_decode_num_draft_tokens_total 9\ntrtllm_spec_decode_num_accepted_tokens_total 6\n";
        let reading = read(&parse(&format!("{AT_WORK}{drafts}"))).reading;
        assert_eq!(reading, EngineReading { drafted_tokens: Some(9), accepted_tokens: Some(6), ..at_work() });
        let fresh = read(&parse(&AT_WORK.replace("} 5000.0", "} 5.0"))).reading;
        assert!(restarted(&at_work(), &fresh));
    }
}
