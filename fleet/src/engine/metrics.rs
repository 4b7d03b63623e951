//! What an engine counts, rendered as Prometheus text under vLLM's names.

use std::fmt::{self, Write};

/// Why a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// The model said everything.
    Stop,
    /// The request's limit of tokens was reached.
    Length,
    /// The client went away.
    Abort,
}

impl FinishReason {
    /// Every reason.
    pub const ALL: [FinishReason; 3] = [FinishReason::Stop, FinishReason::Length, FinishReason::Abort];

    /// The name in metrics and answers.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Abort => "abort",
        }
    }
}

/// A Prometheus histogram.
#[derive(Debug, Clone, PartialEq)]
pub struct Histogram {
    bounds: &'static [f64],
    /// Observations by bucket, the last one unbounded; not cumulative.
    buckets: Vec<u64>,
    sum: f64,
    count: u64,
}

impl Histogram {
    /// An empty histogram with these upper bounds, which are rising.
    #[must_use]
    pub fn new(bounds: &'static [f64]) -> Histogram {
        Histogram { bounds, buckets: vec![0; bounds.len() + 1], sum: 0.0, count: 0 }
    }

    /// Counts one value.
    pub fn observe(&mut self, value: f64) {
        self.buckets[self.bounds.partition_point(|&bound| bound < value)] += 1;
        self.sum += value;
        self.count += 1;
    }

    /// Values counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Their mean, if there is any.
    #[must_use]
    pub fn mean(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / self.count as f64)
    }
}

const TTFT_S: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const GAP_S: &[f64] =
    &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
const LATENCY_S: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
const STEP_TOKENS: &[f64] = &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

/// Everything an engine counts since its start.
#[derive(Debug, Clone, PartialEq)]
pub struct Counters {
    /// Prompt tokens of requests that reached their first token.
    pub prompt_tokens: u64,
    /// Of those, tokens found in the prefix cache.
    pub prompt_tokens_cached: u64,
    /// Tokens generated, those of aborted requests included.
    pub generation_tokens: u64,
    /// Prompt tokens looked up in the prefix cache, once a request.
    pub prefix_cache_queries: u64,
    /// Prompt tokens found there.
    pub prefix_cache_hits: u64,
    /// Requests put back into the queue because memory ran out.
    pub preemptions: u64,
    /// Requests ended, by [`FinishReason`].
    pub finished: [u64; 3],
    /// Tokens processed by each step; its count is the number of steps.
    pub iteration_tokens: Histogram,
    /// Arrival to first token, seconds.
    pub time_to_first_token_s: Histogram,
    /// Token to token, seconds.
    pub inter_token_latency_s: Histogram,
    /// Arrival to end, seconds.
    pub e2e_latency_s: Histogram,
    /// Arrival to first scheduling, seconds.
    pub queue_time_s: Histogram,
    /// First scheduling to first token, seconds.
    pub prefill_time_s: Histogram,
    /// First token to last token, seconds.
    pub decode_time_s: Histogram,
}

impl Default for Counters {
    fn default() -> Counters {
        Counters {
            prompt_tokens: 0,
            prompt_tokens_cached: 0,
            generation_tokens: 0,
            prefix_cache_queries: 0,
            prefix_cache_hits: 0,
            preemptions: 0,
            finished: [0; 3],
            iteration_tokens: Histogram::new(STEP_TOKENS),
            time_to_first_token_s: Histogram::new(TTFT_S),
            inter_token_latency_s: Histogram::new(GAP_S),
            e2e_latency_s: Histogram::new(LATENCY_S),
            queue_time_s: Histogram::new(LATENCY_S),
            prefill_time_s: Histogram::new(LATENCY_S),
            decode_time_s: Histogram::new(LATENCY_S),
        }
    }
}

impl Counters {
    /// Counts an ended request.
    pub fn finish(&mut self, reason: FinishReason) {
        self.finished[reason as usize] += 1;
    }

    /// Requests that ended for this reason.
    #[must_use]
    pub fn finished(&self, reason: FinishReason) -> u64 {
        self.finished[reason as usize]
    }
}

/// What an engine holds at the moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gauges {
    /// Requests in the batch.
    pub running: usize,
    /// Requests in the queue.
    pub waiting: usize,
    /// Share of KV memory in use, 0 to 1.
    pub kv_usage: f64,
    /// Tokens in a block.
    pub block_size: u32,
    /// KV blocks in all.
    pub blocks: u32,
    /// Whether prefixes are cached.
    pub prefix_caching: bool,
}

/// The text of `/metrics` for a model of this name.
#[must_use]
pub fn render(model: &str, counters: &Counters, gauges: &Gauges) -> String {
    let mut page = Page { text: String::with_capacity(16 * 1024), labels: labels(model) };
    page.write(counters, gauges).expect("writing to a string does not fail");
    page.text
}

fn labels(model: &str) -> String {
    let model = model.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
    format!("engine=\"0\",model_name=\"{model}\"")
}

struct Page {
    text: String,
    labels: String,
}

impl Page {
    fn write(&mut self, counters: &Counters, gauges: &Gauges) -> fmt::Result {
        self.one("gauge", "num_requests_running", "Requests in the batch.", gauges.running as f64)?;
        self.one("gauge", "num_requests_waiting", "Requests in the queue.", gauges.waiting as f64)?;
        self.one("gauge", "kv_cache_usage_perc", "KV memory in use, 1 is all of it.", gauges.kv_usage)?;
        self.head("gauge", "engine_sleep_state", "Whether the engine sleeps; a simulated one never does.")?;
        for (state, value) in [("awake", 1.0), ("weights_offloaded", 0.0), ("discard_all", 0.0)] {
            self.sample("engine_sleep_state", &format!("sleep_state=\"{state}\""), value)?;
        }
        self.head("gauge", "cache_config_info", "Settings of the KV memory.")?;
        writeln!(
            self.text,
            "vllm:cache_config_info{{block_size=\"{}\",enable_prefix_caching=\"{}\",engine=\"0\",num_gpu_blocks=\"{}\"}} 1.0",
            gauges.block_size,
            if gauges.prefix_caching { "True" } else { "False" },
            gauges.blocks,
        )?;

        let totals = [
            ("prompt_tokens_total", "Prompt tokens processed.", counters.prompt_tokens),
            ("prompt_tokens_cached_total", "Prompt tokens found in the cache.", counters.prompt_tokens_cached),
            ("generation_tokens_total", "Tokens generated.", counters.generation_tokens),
            ("prefix_cache_queries_total", "Tokens looked up in the prefix cache.", counters.prefix_cache_queries),
            ("prefix_cache_hits_total", "Tokens found in the prefix cache.", counters.prefix_cache_hits),
            ("num_preemptions_total", "Requests put back for lack of memory.", counters.preemptions),
        ];
        for (name, help, value) in totals {
            self.one("counter", name, help, value as f64)?;
        }

        self.head("counter", "prompt_tokens_by_source_total", "Prompt tokens by where they came from.")?;
        let computed = counters.prompt_tokens - counters.prompt_tokens_cached;
        self.sample("prompt_tokens_by_source_total", "source=\"local_compute\"", computed as f64)?;
        self.sample(
            "prompt_tokens_by_source_total",
            "source=\"local_cache_hit\"",
            counters.prompt_tokens_cached as f64,
        )?;
        self.sample("prompt_tokens_by_source_total", "source=\"external_kv_transfer\"", 0.0)?;

        self.head("counter", "request_success_total", "Requests ended, by reason.")?;
        for reason in FinishReason::ALL {
            let label = format!("finished_reason=\"{}\"", reason.name());
            self.sample("request_success_total", &label, counters.finished(reason) as f64)?;
        }
        for never in ["error", "repetition"] {
            self.sample("request_success_total", &format!("finished_reason=\"{never}\""), 0.0)?;
        }

        self.histogram("iteration_tokens_total", "Tokens processed by a step.", &counters.iteration_tokens)?;
        self.histogram("time_to_first_token_seconds", "Arrival to first token.", &counters.time_to_first_token_s)?;
        self.histogram("inter_token_latency_seconds", "Token to token.", &counters.inter_token_latency_s)?;
        self.histogram("e2e_request_latency_seconds", "Arrival to end.", &counters.e2e_latency_s)?;
        self.histogram("request_queue_time_seconds", "Arrival to first scheduling.", &counters.queue_time_s)?;
        self.histogram("request_prefill_time_seconds", "Scheduling to first token.", &counters.prefill_time_s)?;
        self.histogram("request_decode_time_seconds", "First to last token.", &counters.decode_time_s)
    }

    fn head(&mut self, kind: &str, name: &str, help: &str) -> fmt::Result {
        writeln!(self.text, "# HELP vllm:{name} {help}\n# TYPE vllm:{name} {kind}")
    }

    fn one(&mut self, kind: &str, name: &str, help: &str, value: f64) -> fmt::Result {
        self.head(kind, name, help)?;
        self.sample(name, "", value)
    }

    fn sample(&mut self, name: &str, label: &str, value: f64) -> fmt::Result {
        let comma = if label.is_empty() { "" } else { "," };
        writeln!(self.text, "vllm:{name}{{{}{comma}{label}}} {value:?}", self.labels)
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) -> fmt::Result {
        self.head("histogram", name, help)?;
        let bucket = format!("{name}_bucket");
        let mut below = 0;
        for (bound, count) in histogram.bounds.iter().zip(&histogram.buckets) {
            below += count;
            self.sample(&bucket, &format!("le=\"{bound:?}\""), below as f64)?;
        }
        self.sample(&bucket, "le=\"+Inf\"", histogram.count as f64)?;
        self.sample(&format!("{name}_count"), "", histogram.count as f64)?;
        self.sample(&format!("{name}_sum"), "", histogram.sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prometheus;

    #[test]
    fn the_page_is_read_back_by_our_own_parser() {
        let mut counters = Counters { prompt_tokens: 120, prompt_tokens_cached: 48, ..Counters::default() };
        counters.finish(FinishReason::Length);
        for value in [0.3, 0.0, 1e9] {
            counters.e2e_latency_s.observe(value);
        }
        let gauges =
            Gauges { running: 2, waiting: 1, kv_usage: 0.25, block_size: 16, blocks: 40, prefix_caching: true };
        let scrape = prometheus::parse(&render("a \"quoted\" model", &counters, &gauges));

        assert_eq!(scrape.unknown_lines, 0);
        let value = |name: &str, labels: &[(&str, &str)]| scrape.value(name, labels).expect(name);
        assert_eq!(value("vllm:prompt_tokens_total", &[("model_name", "a \"quoted\" model"), ("engine", "0")]), 120.0);
        assert_eq!(value("vllm:prompt_tokens_by_source_total", &[("source", "local_compute")]), 72.0);
        assert_eq!(value("vllm:request_success_total", &[("finished_reason", "length")]), 1.0);
        assert_eq!(value("vllm:kv_cache_usage_perc", &[]), 0.25);
        assert_eq!(value("vllm:cache_config_info", &[("num_gpu_blocks", "40")]), 1.0);
        assert_eq!(value("vllm:e2e_request_latency_seconds_bucket", &[("le", "0.3")]), 2.0);
        assert_eq!(value("vllm:e2e_request_latency_seconds_bucket", &[("le", "7680.0")]), 2.0);
        assert_eq!(value("vllm:e2e_request_latency_seconds_bucket", &[("le", "+Inf")]), 3.0);
        assert_eq!(value("vllm:e2e_request_latency_seconds_count", &[]), 3.0);
    }
}
