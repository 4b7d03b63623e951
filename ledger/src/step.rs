//! The step-time model of a continuous batch: how long one step of an engine takes, term by term.
//!
//! A roofline. Request `i` processes `p_i` new tokens and reads `k_i` cached ones; `N` are the active parameters, `L`
//! the layers, `F` and `B` the replica's FLOP/s and bytes/s, `b` the bytes of one element:
//!
//! ```text
//! c_i = (2 N p_i + 4 L n_h d_h p_i (k_i + p_i/2)) / (F eta_c)    compute, s
//! m_i = 2 L n_kv d_h b k_i / (B eta_b)                           reading its KV cache, s
//! M0  = weight_bytes / (B eta_b)                                 reading the weights once for all, s
//! t   = o + max(sum c_i, M0 + sum m_i)                           the step, s
//! ```
//!
//! `2 N` counts a multiply and an add for each parameter a token meets. Attention adds `4 L n_h d_h` FLOP for each
//! (new token, visible token) pair: the scores and the weighted sum, two FLOP each; a new token sees the `k_i` cached
//! ones and, on average, half of the new ones. The cache holds a key and a value for each token, hence the 2 in `m_i`.
//!
//! Floats are at home here: the model decides shares and latencies, never totals of money.

use serde::{Deserialize, Serialize};

pub use crate::gpu::GpuSheet;

/// The dimensions of a transformer that decide how much it computes and reads.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ModelShape {
    /// Transformer layers, `L`.
    pub layers: u32,
    /// Width of the residual stream.
    pub hidden: u32,
    /// Query heads, `n_h`.
    pub heads: u32,
    /// Key and value heads, `n_kv`; fewer than `heads` under grouped-query attention.
    pub kv_heads: u32,
    /// Elements of one head, `d_h`.
    pub head_dim: u32,
    /// Parameters that one token meets, `N`.
    pub active_parameters: f64,
    /// All parameters, as they lie in memory. Equal to the active ones unless the model is a mixture of experts.
    pub total_parameters: f64,
    /// Bytes of one weight or cache element, `b`: 2 for bf16 and fp16, 1 for fp8.
    pub bytes_per_element: f64,
}

impl ModelShape {
    /// Llama 3.1 8B in bf16; the dimensions of its public `config.json`.
    pub const LLAMA_3_1_8B: ModelShape = ModelShape {
        layers: 32,
        hidden: 4096,
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        active_parameters: 8.03e9,
        total_parameters: 8.03e9,
        bytes_per_element: 2.0,
    };

    /// Qwen2.5 7B in bf16; the dimensions of its public `config.json`.
    pub const QWEN_2_5_7B: ModelShape = ModelShape {
        layers: 28,
        hidden: 3584,
        heads: 28,
        kv_heads: 4,
        head_dim: 128,
        active_parameters: 7.62e9,
        total_parameters: 7.62e9,
        bytes_per_element: 2.0,
    };

    /// Bytes of all weights.
    #[must_use]
    pub fn weight_bytes(&self) -> f64 {
        self.total_parameters * self.bytes_per_element
    }

    /// Bytes that one token occupies in the KV cache: a key and a value in every layer.
    #[must_use]
    pub fn kv_bytes_per_token(&self) -> f64 {
        2.0 * f64::from(self.layers) * f64::from(self.kv_heads) * f64::from(self.head_dim) * self.bytes_per_element
    }

    /// FLOP for one pair of a new token and a token it attends to.
    fn attention_flop_per_pair(&self) -> f64 {
        4.0 * f64::from(self.layers) * f64::from(self.heads) * f64::from(self.head_dim)
    }
}

/// How much of the data sheet an engine reaches: the starting point that fits replace by measurement.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Efficiencies {
    /// Share of the peak FLOP/s, `eta_c`, above 0 and at most 1.
    pub compute: f64,
    /// Share of the peak bandwidth, `eta_b`, above 0 and at most 1.
    pub bandwidth: f64,
    /// Launch and scheduling overhead of one step in seconds, `o`.
    pub overhead_s: f64,
}

impl Default for Efficiencies {
    /// Half of the peak compute, 80 % of the bandwidth and 0.5 ms a step. The last two give 6.5 ms a token for an 8B
    /// fp16 model on one nearly idle H100, where arXiv 2606.11690 measured 6.6 ms.
    fn default() -> Efficiencies {
        Efficiencies { compute: 0.5, bandwidth: 0.8, overhead_s: 0.5e-3 }
    }
}

/// What one request does in one step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// Tokens computed, `p`: one when decoding, a chunk when prefilling.
    pub new_tokens: u32,
    /// Tokens already in the KV cache and read, `k`.
    pub cached_tokens: u32,
}

/// The predicted duration of one step and its terms, in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StepTime {
    /// `C`, compute of all requests.
    pub compute_s: f64,
    /// `M`, reading all requests' KV caches.
    pub kv_s: f64,
    /// `M0`, reading the weights once.
    pub weights_s: f64,
    /// `o`, launch and scheduling.
    pub overhead_s: f64,
    /// `o + max(C, M0 + M)`.
    pub total_s: f64,
}

impl StepTime {
    /// Whether memory, not compute, decides how long the step takes.
    #[must_use]
    pub fn is_memory_bound(&self) -> bool {
        self.compute_s <= self.weights_s + self.kv_s
    }
}

/// Compute time `c` of one request in seconds on a replica of `gpus` GPUs.
#[must_use]
pub fn compute_s(shape: &ModelShape, gpu: &GpuSheet, gpus: u32, efficiencies: &Efficiencies, work: Work) -> f64 {
    let (new, cached) = (f64::from(work.new_tokens), f64::from(work.cached_tokens));
    let flop = 2.0 * shape.active_parameters * new + shape.attention_flop_per_pair() * new * (cached + new / 2.0);
    flop / (gpu.flop_per_s * f64::from(gpus) * efficiencies.compute)
}

/// Time `m` to read one request's KV cache in seconds on a replica of `gpus` GPUs.
#[must_use]
pub fn kv_s(shape: &ModelShape, gpu: &GpuSheet, gpus: u32, efficiencies: &Efficiencies, work: Work) -> f64 {
    shape.kv_bytes_per_token() * f64::from(work.cached_tokens) / usable_bytes_per_s(gpu, gpus, efficiencies)
}

/// Time `M0` to read the weights once in seconds on a replica of `gpus` GPUs.
#[must_use]
pub fn weights_s(shape: &ModelShape, gpu: &GpuSheet, gpus: u32, efficiencies: &Efficiencies) -> f64 {
    shape.weight_bytes() / usable_bytes_per_s(gpu, gpus, efficiencies)
}

/// Predicts one step of a batch on a replica of `gpus` GPUs that work as one (at least 1). A step without work is no
/// step and takes no time.
#[must_use]
pub fn step_time(
    shape: &ModelShape,
    gpu: &GpuSheet,
    gpus: u32,
    efficiencies: &Efficiencies,
    batch: &[Work],
) -> StepTime {
    if batch.iter().all(|work| work.new_tokens == 0) {
        return StepTime::default();
    }
    let compute_s: f64 = batch.iter().map(|&work| compute_s(shape, gpu, gpus, efficiencies, work)).sum();
    let kv_s: f64 = batch.iter().map(|&work| kv_s(shape, gpu, gpus, efficiencies, work)).sum();
    let weights_s = weights_s(shape, gpu, gpus, efficiencies);
    let overhead_s = efficiencies.overhead_s;
    StepTime { compute_s, kv_s, weights_s, overhead_s, total_s: overhead_s + compute_s.max(weights_s + kv_s) }
}

fn usable_bytes_per_s(gpu: &GpuSheet, gpus: u32, efficiencies: &Efficiencies) -> f64 {
    gpu.bytes_per_s * f64::from(gpus) * efficiencies.bandwidth
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Round numbers, so that the expected values below can be checked on paper.
    const SHAPE: ModelShape = ModelShape {
        layers: 10,
        hidden: 1000,
        heads: 10,
        kv_heads: 5,
        head_dim: 100,
        active_parameters: 1e9,
        total_parameters: 2e9,
        bytes_per_element: 2.0,
    };
    const GPU: GpuSheet =
        GpuSheet { name: "round", flop_per_s: 1e14, bytes_per_s: 1e12, memory_bytes: 1e10, source: "this test" };
    const HALF: Efficiencies = Efficiencies { compute: 0.5, bandwidth: 0.5, overhead_s: 0.001 };

    fn work(new_tokens: u32, cached_tokens: u32) -> Work {
        Work { new_tokens, cached_tokens }
    }

    #[track_caller]
    fn check(actual: f64, expected: f64) {
        assert!((actual - expected).abs() <= 1e-12 + 1e-9 * expected.abs(), "{actual} is not {expected}");
    }

    #[test]
    fn one_decode_by_hand() {
        let step = step_time(&SHAPE, &GPU, 1, &HALF, &[work(1, 1000)]);
        // (2e9 * 1 + 4*10*10*100 * 1 * 1000.5) / 5e13 = 2_040_020_000 / 5e13
        check(step.compute_s, 4.080_04e-5);
        // 2*10*5*100*2 = 20_000 bytes a token, 1000 tokens, 5e11 bytes/s
        check(step.kv_s, 4e-5);
        // 4e9 bytes at 5e11 bytes/s
        check(step.weights_s, 8e-3);
        check(step.total_s, 0.001 + 8e-3 + 4e-5);
        assert!(step.is_memory_bound());
    }

    #[test]
    fn one_prefill_by_hand_on_two_gpus() {
        let step = step_time(&SHAPE, &GPU, 2, &HALF, &[work(1000, 0)]);
        // (2e9 * 1000 + 40_000 * 1000 * 500) / 1e14 = 2.02e12 / 1e14
        check(step.compute_s, 0.0202);
        check(step.kv_s, 0.0);
        check(step.weights_s, 4e-3);
        check(step.total_s, 0.0212);
        assert!(!step.is_memory_bound());
    }

    #[test]
    fn a_mixed_batch_adds_its_requests_and_reads_the_weights_once() {
        let step = step_time(&SHAPE, &GPU, 1, &HALF, &[work(1, 1000), work(500, 100)]);
        // The second: (2e9*500 + 40_000*500*350) / 5e13 = 1.007e12 / 5e13 = 0.02014; its cache 20_000*100/5e11 = 4e-6.
        check(step.compute_s, 4.080_04e-5 + 0.02014);
        check(step.kv_s, 4e-5 + 4e-6);
        check(step.weights_s, 8e-3);
        check(step.total_s, 0.001 + 0.020_180_800_4);
    }

    #[test]
    fn no_work_takes_no_time() {
        assert_eq!(step_time(&SHAPE, &GPU, 1, &HALF, &[]), StepTime::default());
        assert_eq!(step_time(&SHAPE, &GPU, 1, &HALF, &[work(0, 10)]), StepTime::default());
    }

    #[test]
    fn the_defaults_match_a_published_idle_point() {
        let step = step_time(&ModelShape::LLAMA_3_1_8B, &GpuSheet::H100, 1, &Efficiencies::default(), &[work(1, 500)]);
        assert!((0.0062..0.0070).contains(&step.total_s), "{step:?}");
    }

    #[test]
    fn sheets_are_found_by_name() {
        for sheet in GpuSheet::ALL {
            assert_eq!(GpuSheet::named(&sheet.name.to_lowercase()), Some(&sheet));
        }
        assert_eq!(GpuSheet::named("abacus"), None);
    }

    #[test]
    fn devices_are_recognised_as_drivers_name_them() {
        for (device, sheet) in [
            ("NVIDIA H100 80GB HBM3", "H100"),
            ("NVIDIA A100-SXM4-80GB", "A100"),
            ("NVIDIA GeForce RTX 4090", "RTX 4090"),
            ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000"),
            ("NVIDIA L40S", "L40S"),
            ("rtx 4090", "RTX 4090"),
        ] {
            assert_eq!(GpuSheet::recognised(device).map(|sheet| sheet.name), Some(sheet), "{device}");
        }
        assert_eq!(GpuSheet::recognised("NVIDIA L400"), None);
    }

    fn any_work() -> impl Strategy<Value = Work> {
        (1u32..4096, 0u32..100_000).prop_map(|(new, cached)| work(new, cached))
    }

    proptest! {
        #[test]
        fn more_work_never_takes_less_time(
            batch in prop::collection::vec(any_work(), 1..20), extra in any_work(), at in any::<prop::sample::Index>(),
        ) {
            let time = |batch: &[Work]| step_time(&SHAPE, &GPU, 1, &HALF, batch).total_s;
            let before = time(&batch);

            let mut more_requests = batch.clone();
            more_requests.push(extra);
            prop_assert!(time(&more_requests) >= before);

            let mut more_tokens = batch.clone();
            let index = at.index(batch.len());
            more_tokens[index].new_tokens += extra.new_tokens;
            prop_assert!(time(&more_tokens) >= before);

            let mut longer_context = batch.clone();
            longer_context[index].cached_tokens += extra.cached_tokens;
            prop_assert!(time(&longer_context) >= before);
        }

        #[test]
        fn the_terms_bound_the_total(batch in prop::collection::vec(any_work(), 1..20), gpus in 1u32..8) {
            let step = step_time(&SHAPE, &GPU, gpus, &HALF, &batch);
            prop_assert!(step.total_s >= step.overhead_s + step.compute_s.max(step.weights_s + step.kv_s) - 1e-12);
            let faster = step_time(&SHAPE, &GPU, gpus + 1, &HALF, &batch);
            prop_assert!(faster.total_s <= step.total_s);
        }
    }
}
