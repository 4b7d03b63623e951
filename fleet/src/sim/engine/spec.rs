//! What a simulated engine is: fitted constants and the scheduler's limits.

use ledger::allocate::replica::Replica;
use ledger::step::GpuSheet;
use serde::{Deserialize, Serialize};

use super::cost::whole;
use crate::sim::Arrival;

/// How long an engine's steps take and what a request spends outside of them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Constants {
    /// The model on its GPUs, with what the engine reaches of the data sheet.
    pub replica: Replica,
    /// Processor time of the engine for each request in a step, seconds: scheduling, sampling, and handing its token on.
    pub sequence_s: f64,
    /// Time of a request outside of all steps, seconds: HTTP, tokenising, the ways between processes.
    pub request_s: f64,
    /// Bytes a second that a GPU exchanges with the others of its replica, each way. `None`: the exchange takes no time of its own,
    /// as with one GPU.
    pub link_bytes_per_s: Option<f64>,
}

impl Constants {
    /// Seconds that a request in a step costs the engine's processor when nothing was measured. At 500 requests a step of vLLM
    /// on an H100 takes some 45 ms where compute and memory explain 25 ms (arXiv 2606.11690, its C1 runs).
    pub const SEQUENCE_S: f64 = 40e-6;
    /// Seconds of a request outside of all steps when nothing was measured. The same source shows 38 ms to the first token on an
    /// idle engine, where the prefill explains 18 ms.
    pub const REQUEST_S: f64 = 20e-3;

    /// The data sheet with the default efficiencies of [`ledger::step::Efficiencies`] and the two defaults above.
    #[must_use]
    pub fn unfitted(replica: Replica) -> Constants {
        let link_bytes_per_s = Some(link_bytes_per_s(&replica.gpu));
        Constants { replica, sequence_s: Self::SEQUENCE_S, request_s: Self::REQUEST_S, link_bytes_per_s }
    }

    /// Constants of the step-time model alone: nothing per request, nothing outside of steps.
    #[must_use]
    pub fn bare(replica: Replica) -> Constants {
        Constants { replica, sequence_s: 0.0, request_s: 0.0, link_bytes_per_s: None }
    }

    /// Seconds in which the replica's GPUs exchange what one new token needs: under tensor parallelism two sums over all GPUs
    /// in each layer, each of `hidden` 16-bit values, of which a ring sends `2 (g - 1) / g` over every link.
    #[must_use]
    pub fn link_s_per_token(&self) -> f64 {
        let Replica { model, gpus, .. } = &self.replica;
        let gpus = f64::from(*gpus);
        let bytes = 2.0 * f64::from(model.shape.layers) * f64::from(model.shape.hidden) * 2.0;
        self.link_bytes_per_s.map_or(0.0, |link| bytes * 2.0 * (gpus - 1.0).max(0.0) / gpus / link)
    }
}

/// Bytes a second, each way, that sums over the GPUs of one replica reach when nothing is said: three quarters of the link,
/// as NCCL's ring commonly does. Links are half of the vendor's NVLink or Infinity Fabric figure, which counts both ways;
/// cards without such a fabric are taken to have 16 GB/s between them, as over PCIe without peer access.
#[must_use]
pub fn link_bytes_per_s(gpu: &GpuSheet) -> f64 {
    const REACHED: f64 = 0.75;
    const PCIE: f64 = 16e9;
    const FABRICS: [(&GpuSheet, f64); 5] = [
        (&GpuSheet::A100, 300e9),
        (&GpuSheet::H100, 450e9),
        (&GpuSheet::H200, 450e9),
        (&GpuSheet::B200, 900e9),
        (&GpuSheet::MI300X, 448e9),
    ];
    REACHED * FABRICS.iter().find(|(sheet, _)| sheet.name == gpu.name).map_or(PCIE, |(_, link)| *link)
}

/// The settings of the scheduler, under vLLM's names where it has them.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Requests that may run at once.
    pub max_num_seqs: u32,
    /// Tokens that one step may process.
    pub max_num_batched_tokens: u32,
    /// Tokens of a KV block.
    pub block_tokens: u32,
    /// Tokens that fit the KV cache. `None` is what the data sheet leaves beside the weights.
    pub kv_tokens: Option<u64>,
    /// Part of the GPUs' memory that is the engine's (vLLM: `gpu_memory_utilization`); used when `kv_tokens` is unknown.
    pub memory_share: f64,
    /// Whether computed prefixes are found again.
    pub prefix_caching: bool,
    /// Whether a request is admitted only when all of its known tokens fit the cache, not just its first chunk (vLLM:
    /// `scheduler_reserve_full_isl`, on by default since 0.19).
    pub reserve_full_prompt: bool,
}

impl Limits {
    /// Memory of a GPU from which vLLM takes larger batches by default.
    const LARGE_BYTES: f64 = 70.0 * (1u64 << 30) as f64;

    /// What `vllm serve` takes by default on this GPU: steps of 8,192 tokens and 1,024 requests with at least 70 GiB (A100
    /// excepted), else 2,048 and 256.
    #[must_use]
    pub fn of_gpu(gpu: &GpuSheet) -> Limits {
        let large = gpu.memory_bytes >= Self::LARGE_BYTES && gpu.name != GpuSheet::A100.name;
        let (max_num_batched_tokens, max_num_seqs) = if large { (8_192, 1_024) } else { (2_048, 256) };
        Limits {
            max_num_seqs,
            max_num_batched_tokens,
            block_tokens: 16,
            kv_tokens: None,
            memory_share: 0.9,
            prefix_caching: true,
            reserve_full_prompt: true,
        }
    }
}

/// Everything that decides how a simulated engine behaves.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Spec {
    /// How long steps take.
    pub constants: Constants,
    /// The scheduler's settings.
    pub limits: Limits,
}

/// A request that the engine can never serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a request of {tokens} tokens does not fit a KV cache of {tokens_max}")]
pub struct TooLong {
    /// Input and output tokens of the request.
    pub tokens: u64,
    /// The most it may have.
    pub tokens_max: u64,
}

impl Spec {
    /// An engine with vLLM's default settings for the GPU.
    #[must_use]
    pub fn new(constants: Constants) -> Spec {
        Spec { constants, limits: Limits::of_gpu(&constants.replica.gpu) }
    }

    /// Blocks of the KV cache.
    #[must_use]
    pub fn kv_blocks(&self) -> u32 {
        let tokens = self
            .limits
            .kv_tokens
            .unwrap_or_else(|| whole(self.constants.replica.kv_capacity_tokens(self.limits.memory_share)));
        u32::try_from(tokens / u64::from(self.limits.block_tokens.max(1))).unwrap_or(u32::MAX)
    }

    /// Whether a request can be served at all.
    ///
    /// # Errors
    /// [`TooLong`] when it does not fit the cache even alone.
    pub fn check(&self, arrival: &Arrival) -> Result<(), TooLong> {
        check(arrival, u64::from(self.kv_blocks()) * u64::from(self.limits.block_tokens))
    }
}

pub(super) fn check(arrival: &Arrival, tokens_max: u64) -> Result<(), TooLong> {
    let tokens = u64::from(arrival.input_tokens) + u64::from(arrival.output_tokens);
    if tokens > tokens_max { Err(TooLong { tokens, tokens_max }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use ledger::step::ModelShape;

    use super::*;

    #[test]
    fn the_defaults_are_those_of_the_gpu() {
        assert_eq!(Limits::of_gpu(&GpuSheet::H100).max_num_batched_tokens, 8_192);
        assert_eq!(Limits::of_gpu(&GpuSheet::A100).max_num_seqs, 256);
        assert_eq!(Limits::of_gpu(&GpuSheet::RTX_4090).max_num_batched_tokens, 2_048);
    }

    #[test]
    fn the_cache_is_what_is_left_or_what_is_said() {
        let replica = Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 1);
        let spec = Spec::new(Constants::unfitted(replica));
        assert!((25_000..28_000).contains(&spec.kv_blocks()), "{}", spec.kv_blocks());
        let small = Spec { limits: Limits { kv_tokens: Some(1_000), ..spec.limits }, ..spec };
        assert_eq!(small.kv_blocks(), 62);
        let arrival = |input_tokens| Arrival { input_tokens, output_tokens: 10, ..Arrival::default() };
        assert_eq!(small.check(&arrival(982)), Ok(()));
        let refused = small.check(&arrival(983)).unwrap_err();
        assert_eq!(refused.to_string(), "a request of 993 tokens does not fit a KV cache of 992");
    }
}
