//! llama.cpp's `llama-server`, `/metrics` when it was started with `--metrics`.
//!
//! ```
//! let scrape = fleet::prometheus::parse("llamacpp:requests_processing 2\nllamacpp:n_decode_total 80\n");
//! assert_eq!(fleet::telemetry::llama_cpp::read(&scrape).reading.steps, Some(80));
//! ```
//!
//! Its prompt tokens leave out those found in the cache, which only servers since August 2026 count: before, how many
//! tokens the prompts had is unknown. Its seconds add up over the requests of a batch, so they are not time worked.

use ledger::EngineReading;

use super::values::{Page, count, few, part};
use super::{Found, Loss};
use crate::prometheus::Scrape;

/// Reads what `llama-server` says.
#[must_use]
pub fn read(scrape: &Scrape) -> Found {
    let mut page = Page::new(scrape);
    let running = page.sum(&["llamacpp:requests_processing"]).and_then(few);
    let waiting = page.sum(&["llamacpp:requests_deferred"]).and_then(few);
    let computed = page.sum(&["llamacpp:prompt_tokens_total"]);
    let cached = page.sum(&["llamacpp:prompt_tokens_cached_total"]);
    let prompt_tokens = computed.zip(cached).and_then(|(computed, cached)| count(computed + cached));
    let whole = if computed.is_some() { "llamacpp:prompt_tokens_cached_total" } else { "llamacpp:prompt_tokens_total" };
    let generation_tokens = page.sum(&["llamacpp:tokens_predicted_total"]).and_then(count);
    let steps = page.sum(&["llamacpp:n_decode_total"]).and_then(count);
    let drafted = page.sum(&["llamacpp:spec_decode_num_draft_tokens_total"]).and_then(count);
    let accepted = page.sum(&["llamacpp:spec_decode_num_accepted_tokens_total"]).and_then(count);
    let reading = EngineReading {
        running: page.need("llamacpp:requests_processing", Loss::Series, running),
        waiting: page.need("llamacpp:requests_deferred", Loss::Series, waiting),
        // Removed from newer servers, so its absence is not worth a warning.
        kv_used: page.mean(&["llamacpp:kv_cache_usage_ratio"]).and_then(part),
        prompt_tokens: page.need(whole, Loss::Counts, prompt_tokens),
        cached_tokens: cached.and_then(count),
        generation_tokens: page.need("llamacpp:tokens_predicted_total", Loss::Counts, generation_tokens),
        steps: page.need("llamacpp:n_decode_total", Loss::Steps, steps),
        drafted_tokens: drafted,
        accepted_tokens: accepted,
        ..EngineReading::default()
    };
    page.found(reading)
}

#[cfg(test)]
mod tests {
    use super::super::restarted;
    use super::*;
    use crate::prometheus::parse;

    const AT_WORK: &str = "
llamacpp:prompt_tokens_total 5000
llamacpp:prompt_tokens_cached_total 15000
llamacpp:prompt_seconds_total 5.25
llamacpp:tokens_predicted_total 1000
llamacpp:tokens_predicted_seconds_total 20.5
llamacpp:n_decode_total 640
llamacpp:n_busy_slots_per_decode 1.6
llamacpp:prompt_tokens_seconds 950.1
llamacpp:requests_processing 2
llamacpp:requests_deferred 1
llamacpp:spec_decode_num_draft_tokens_total 300
llamacpp:spec_decode_num_accepted_tokens_total 150
";

    fn at_work() -> EngineReading {
        EngineReading {
            running: Some(2),
            waiting: Some(1),
            prompt_tokens: Some(20_000),
            cached_tokens: Some(15_000),
            generation_tokens: Some(1_000),
            steps: Some(640),
            drafted_tokens: Some(300),
            accepted_tokens: Some(150),
            ..EngineReading::default()
        }
    }

    #[test]
    fn reads_a_server_at_work_and_what_it_does_not_say() {
        let cases: [(&str, EngineReading, &[&str]); 4] = [
            ("-", at_work(), &[]),
            (
                "llamacpp:prompt_tokens_cached_total",
                EngineReading { prompt_tokens: None, cached_tokens: None, ..at_work() },
                &["llamacpp:prompt_tokens_cached_total"],
            ),
            (
                "llamacpp:prompt_tokens_total",
                EngineReading { prompt_tokens: None, ..at_work() },
                &["llamacpp:prompt_tokens_total"],
            ),
            (
                "llamacpp:requests",
                EngineReading { running: None, waiting: None, ..at_work() },
                &["llamacpp:requests_processing", "llamacpp:requests_deferred"],
            ),
        ];
        for (dropped, reading, missing) in cases {
            let kept: Vec<&str> = AT_WORK.lines().filter(|line| !line.starts_with(dropped)).collect();
            let found = read(&parse(&kept.join("\n")));
            assert_eq!(found.reading, reading, "without {dropped}");
            assert_eq!(found.missing.iter().map(|missing| missing.name).collect::<Vec<_>>(), missing);
        }
        assert_eq!(read(&Scrape::default()).missing.len(), 5);
    }

    #[test]
    fn older_servers_tell_how_full_the_cache_is() {
        let reading = read(&parse(&format!("{AT_WORK}llamacpp:kv_cache_usage_ratio 0.5\n"))).reading;
        assert_eq!(reading, EngineReading { kv_used: Some(500_000), ..at_work() });
    }

    #[test]
    fn a_restart_is_seen() {
        let fresh = read(&parse(&AT_WORK.replace("n_decode_total 640", "n_decode_total 64"))).reading;
        assert!(restarted(&at_work(), &fresh));
    }
}
