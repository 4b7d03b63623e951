//! Triton Inference Server with the TensorRT-LLM backend, `/metrics` of port 8002.
//!
//! ```
//! let scrape = fleet::prometheus::parse("nv_trt_llm_request_metrics{model=\"tensorrt_llm\",request_type=\"waiting\"} 2\n");
//! assert_eq!(fleet::telemetry::triton::read(&scrape).reading.waiting, Some(2));
//! ```
//!
//! The backend's metrics are gauges told apart by a label. Tokens are the sums of two histograms that newer backends
//! have; older ones do not count tokens at all.

use ledger::EngineReading;

use super::values::{Page, count, few, part, quantity, sum};
use super::{Found, Loss};
use crate::prometheus::Scrape;

const REQUESTS: &str = "nv_trt_llm_request_metrics";
const BLOCKS: &str = "nv_trt_llm_kv_cache_block_metrics";
const INFLIGHT: &str = "nv_trt_llm_inflight_batcher_metrics";

/// Reads what the backend says. One process may load several models; their requests, blocks and tokens are added.
#[must_use]
pub fn read(scrape: &Scrape) -> Found {
    let mut page = Page::new(scrape);
    let requests = |kind| labelled(scrape, REQUESTS, "request_type", kind);
    let blocks = |kind| labelled(scrape, BLOCKS, "kv_cache_block_type", kind);
    let running = requests("scheduled").or_else(|| in_batch(scrape)).and_then(few);
    let waiting = requests("waiting").and_then(few);
    let most = blocks("max").filter(|&blocks| blocks > 0.0);
    let kv_used = blocks("used").zip(most).and_then(|(used, most)| part(used / most));
    let prompt_tokens = page.sum(&["nv_llm_input_token_len_sum"]).and_then(count);
    let generation_tokens = page.sum(&["nv_llm_output_token_len_sum"]).and_then(count);
    let reading = EngineReading {
        running: page.need(REQUESTS, Loss::Series, running),
        waiting: page.need(REQUESTS, Loss::Series, waiting),
        kv_used: page.need(BLOCKS, Loss::Series, kv_used),
        prompt_tokens: page.need("nv_llm_input_token_len_sum", Loss::Counts, prompt_tokens),
        generation_tokens: page.need("nv_llm_output_token_len_sum", Loss::Counts, generation_tokens),
        finished: finished(scrape),
        kv_tokens: page.need(BLOCKS, Loss::Capacity, kv_tokens(scrape)),
        ..EngineReading::default()
    };
    page.found(reading)
}

fn labelled(scrape: &Scrape, name: &str, label: &str, kind: &str) -> Option<f64> {
    sum(scrape.named(name).filter(|sample| sample.label(label) == Some(kind)))
}

/// Requests in prefill and those that generate, where the number scheduled is not given.
fn in_batch(scrape: &Scrape) -> Option<f64> {
    let generating = labelled(scrape, INFLIGHT, "inflight_batcher_specific_metric", "generation_requests")?;
    Some(labelled(scrape, REQUESTS, "request_type", "context")? + generating)
}

/// `max x tokens_per` blocks of each model.
fn kv_tokens(scrape: &Scrape) -> Option<u64> {
    let kind = |sample: &crate::prometheus::Sample, kind| sample.label("kv_cache_block_type") == Some(kind);
    let tokens = scrape.named(BLOCKS).filter(|sample| kind(sample, "max")).map(|blocks| {
        let same_model = |sample: &&crate::prometheus::Sample| {
            kind(sample, "tokens_per") && sample.label("model") == blocks.label("model")
        };
        let each = scrape.named(BLOCKS).find(same_model)?;
        count(quantity(blocks.value)? * quantity(each.value)?)
    });
    tokens.reduce(|all, one| all?.checked_add(one?))?.filter(|&tokens| tokens > 0)
}

/// Requests of the backend's own models; an ensemble counts each of them once more under its own name.
fn finished(scrape: &Scrape) -> Option<u64> {
    let models: Vec<Option<&str>> = scrape.named(REQUESTS).map(|sample| sample.label("model")).collect();
    let of = |name| sum(scrape.named(name).filter(|sample| models.contains(&sample.label("model"))));
    count(of("nv_inference_request_success")? + of("nv_inference_request_failure").unwrap_or(0.0))
}

#[cfg(test)]
mod tests {
    use super::super::restarted;
    use super::*;
    use crate::prometheus::parse;

    const AT_WORK: &str = r#"
nv_inference_request_success{model="ensemble",version="1"} 40
nv_inference_request_success{model="tensorrt_llm",version="1"} 40
nv_inference_request_failure{model="tensorrt_llm",reason="OTHER",version="1"} 2
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="waiting",version="1"} 3
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="context",version="1"} 1
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="scheduled",version="1"} 9
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="max",version="1"} 512
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="active",version="1"} 12
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction",model="tensorrt_llm",version="1"} 0.5
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="tokens_per",model="tensorrt_llm",version="1"} 64
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used",model="tensorrt_llm",version="1"} 3120
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="free",model="tensorrt_llm",version="1"} 3120
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="tensorrt_llm",version="1"} 6240
nv_trt_llm_inflight_batcher_metrics{inflight_batcher_specific_metric="generation_requests",model="tensorrt_llm",version="1"} 7
nv_trt_llm_inflight_batcher_metrics{inflight_batcher_specific_metric="total_context_tokens",model="tensorrt_llm",version="1"} 300
nv_llm_input_token_len_sum{model="tensorrt_llm",response_metric_type="total_input_tokens",version="1"} 9000
nv_llm_output_token_len_sum{model="tensorrt_llm",response_metric_type="total_output_tokens",version="1"} 1200
"#;

    fn at_work() -> EngineReading {
        EngineReading {
            running: Some(9),
            waiting: Some(3),
            kv_used: Some(500_000),
            prompt_tokens: Some(9_000),
            generation_tokens: Some(1_200),
            finished: Some(42),
            kv_tokens: Some(399_360),
            ..EngineReading::default()
        }
    }

    #[test]
    fn reads_a_server_at_work_and_what_it_does_not_say() {
        let cases: [(&str, EngineReading, &[&str]); 4] = [
            ("-", at_work(), &[]),
            ("request_type=\"scheduled\"", EngineReading { running: Some(8), ..at_work() }, &[]),
            ("\"tokens_per\"", EngineReading { kv_tokens: None, ..at_work() }, &[BLOCKS]),
            (
                "nv_llm_",
                EngineReading { prompt_tokens: None, generation_tokens: None, ..at_work() },
                &["nv_llm_input_token_len_sum", "nv_llm_output_token_len_sum"],
            ),
        ];
        for (dropped, reading, missing) in cases {
            let kept: Vec<&str> = AT_WORK.lines().filter(|line| !line.contains(dropped) || dropped == "-").collect();
            let found = read(&parse(&kept.join("\n")));
            assert_eq!(found.reading, reading, "without {dropped}");
            assert_eq!(found.missing.iter().map(|missing| missing.name).collect::<Vec<_>>(), missing);
        }
        assert_eq!(read(&Scrape::default()).missing.len(), 6);
    }

    #[test]
    fn a_restart_is_seen() {
        let fresh = read(&parse(&AT_WORK.replace("} 1200", "} 12"))).reading;
        assert!(restarted(&at_work(), &fresh));
    }
}
