//! Hugging Face text-generation-inference, `/metrics`.
//!
//! ```
//! let scrape = fleet::prometheus::parse("tgi_batch_current_size 4\ntgi_queue_size 1\n");
//! assert_eq!(fleet::telemetry::tgi::read(&scrape).reading.running, Some(4));
//! ```
//!
//! Its counters carry no `_total`. Tokens exist only as the sums of histograms over requests: prompts are counted when
//! they are accepted, answers when they end. It does not say how full its KV cache is.

use ledger::EngineReading;

use super::values::{Page, count, few, micros};
use super::{Found, Loss};
use crate::prometheus::Scrape;

/// Reads what TGI says. Steps are calls of prefill and decode; busy time is that of their forward passes and of the
/// decoding of their tokens.
#[must_use]
pub fn read(scrape: &Scrape) -> Found {
    let mut page = Page::new(scrape);
    let running = page.sum(&["tgi_batch_current_size"]).and_then(few);
    let waiting = page.sum(&["tgi_queue_size"]).and_then(few);
    let prompt_tokens = page.sum(&["tgi_request_input_length_sum"]).and_then(count);
    let generation_tokens = page.sum(&["tgi_request_generated_tokens_sum"]).and_then(count);
    let steps = page.sum(&["tgi_batch_forward_duration_count", "tgi_batch_inference_count"]).and_then(count);
    let forward = page.sum(&["tgi_batch_forward_duration_sum"]);
    let decode = page.sum(&["tgi_batch_decode_duration_sum"]);
    let busy_us = forward.zip(decode).and_then(|(forward, decode)| micros(forward + decode));
    let ended = page.sum(&["tgi_request_success"]);
    let failed = page.sum(&["tgi_request_failure"]).unwrap_or(0.0);
    let reading = EngineReading {
        running: page.need("tgi_batch_current_size", Loss::Series, running),
        waiting: page.need("tgi_queue_size", Loss::Series, waiting),
        prompt_tokens: page.need("tgi_request_input_length_sum", Loss::Counts, prompt_tokens),
        generation_tokens: page.need("tgi_request_generated_tokens_sum", Loss::Counts, generation_tokens),
        steps: page.need("tgi_batch_forward_duration_count", Loss::Steps, steps),
        finished: ended.and_then(|ended| count(ended + failed)),
        busy_us: page.need("tgi_batch_forward_duration_sum", Loss::Steps, busy_us),
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
# TYPE tgi_request_success counter
tgi_request_success 150
tgi_request_failure{err="validation"} 3
tgi_request_failure{err="overloaded"} 2
tgi_batch_current_size 8
tgi_batch_current_max_tokens 9000
tgi_queue_size 2
tgi_request_input_length_bucket{le="100"} 90
tgi_request_input_length_sum 18000
tgi_request_input_length_count 150
tgi_request_generated_tokens_sum 12500
tgi_request_generated_tokens_count 150
tgi_batch_inference_count{method="prefill"} 120
tgi_batch_inference_count{method="decode"} 4000
tgi_batch_forward_duration_sum{method="prefill"} 6.5
tgi_batch_forward_duration_count{method="prefill"} 118
tgi_batch_forward_duration_sum{method="decode"} 100.25
tgi_batch_forward_duration_count{method="decode"} 4000
tgi_batch_decode_duration_sum{method="prefill"} 0.05
tgi_batch_decode_duration_sum{method="decode"} 1.2
"#;

    fn at_work() -> EngineReading {
        EngineReading {
            running: Some(8),
            waiting: Some(2),
            prompt_tokens: Some(18_000),
            generation_tokens: Some(12_500),
            steps: Some(4_118),
            finished: Some(155),
            busy_us: Some(108_000_000),
            ..EngineReading::default()
        }
    }

    #[test]
    fn reads_a_server_at_work_and_what_it_does_not_say() {
        let dropping = |dropped: &str| {
            let kept = AT_WORK.lines().filter(|line| dropped.is_empty() || !line.starts_with(dropped));
            let found = read(&parse(&kept.collect::<Vec<_>>().join("\n")));
            (found.reading, found.missing.iter().map(|missing| missing.name).collect::<Vec<_>>())
        };
        let cases: [(&str, EngineReading, &[&str]); 5] = [
            ("", at_work(), &[]),
            ("tgi_queue_size", EngineReading { waiting: None, ..at_work() }, &["tgi_queue_size"]),
            ("tgi_request_failure", EngineReading { finished: Some(150), ..at_work() }, &[]),
            (
                "tgi_request_generated_tokens",
                EngineReading { generation_tokens: None, ..at_work() },
                &["tgi_request_generated_tokens_sum"],
            ),
            (
                "tgi_batch_forward_duration",
                EngineReading { steps: Some(4_120), busy_us: None, ..at_work() },
                &["tgi_batch_forward_duration_sum"],
            ),
        ];
        for (dropped, reading, missing) in cases {
            assert_eq!(dropping(dropped), (reading, missing.to_vec()), "without {dropped}");
        }
        assert_eq!(read(&Scrape::default()).missing.len(), 6);
    }

    #[test]
    fn a_restart_is_seen() {
        let fresh = read(&parse(&AT_WORK.replace("tokens_sum 12500", "tokens_sum 40"))).reading;
        assert!(restarted(&at_work(), &fresh));
        assert!(!restarted(&fresh, &at_work()));
    }
}
