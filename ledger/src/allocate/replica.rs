//! One engine process on its GPUs as the allocation sees it: what a request demands of a step, and what is there once
//! for all of them.

use serde::{Deserialize, Serialize};

use super::shape::Model;
use crate::step::{self, Efficiencies, GpuSheet, Work};

/// The experts of a mixture-of-experts model.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Experts {
    /// Experts of one layer, `E`.
    pub count: u32,
    /// Experts that one token meets in a layer, `k`.
    pub per_token: u32,
    /// Bytes of all routed experts of all layers; part of the model's weights.
    pub bytes: f64,
}

impl Experts {
    /// The part of all routed experts that at least one of `tokens` tokens meets: `1 - ((E - k) / E)^tokens`, as if every
    /// token chose its experts independently and evenly.
    #[must_use]
    pub fn touched(&self, tokens: f64) -> f64 {
        if self.count == 0 {
            return 0.0;
        }
        let missed = f64::from(self.count.saturating_sub(self.per_token)) / f64::from(self.count);
        1.0 - missed.powf(tokens.max(0.0))
    }
}

/// A model on `gpus` GPUs that work as one (tensor or pipeline parallel), with fitted constants.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Replica {
    /// The model.
    pub model: Model,
    /// The GPU.
    pub gpu: GpuSheet,
    /// GPUs of the replica, at least 1.
    pub gpus: u32,
    /// What the engine reaches of the data sheet.
    pub efficiencies: Efficiencies,
    /// How far compute and memory traffic hide behind one another: 1 is the roofline's `max(C, M0 + M)`, 0 their sum.
    /// In between, `overlap x max + (1 - overlap) x sum`; which one an engine follows is for the fit to say.
    pub overlap: f64,
}

/// What one request demands of one step, in seconds of the whole replica.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Demand {
    /// `c`, compute.
    pub compute_s: f64,
    /// `m`, reading what is its own: its KV cache, its part of its adapter.
    pub memory_s: f64,
    /// New tokens, `p`; decides who touched the experts.
    pub new_tokens: u32,
}

/// What one step costs whoever is in it, in seconds of the whole replica.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Fixed {
    /// `o`, launch and scheduling.
    pub overhead_s: f64,
    /// The weights that every token meets, read once.
    pub weights_s: f64,
    /// The routed experts that this step's tokens met, read once; shared by tokens, not by heads.
    pub experts_s: f64,
    /// As in [`Replica::overlap`].
    pub overlap: f64,
}

impl Replica {
    /// A dense or mixture-of-experts model as its data sheets promise, before any fit.
    #[must_use]
    pub fn unfitted(model: Model, gpu: GpuSheet, gpus: u32) -> Replica {
        Replica { model, gpu, gpus: gpus.max(1), efficiencies: Efficiencies::default(), overlap: 1.0 }
    }

    /// The same replica as if a step took the same time whatever is in it: every moment then goes in equal parts to the
    /// requests that run.
    #[must_use]
    pub fn overhead_only(&self) -> Replica {
        let efficiencies = Efficiencies { compute: f64::INFINITY, bandwidth: f64::INFINITY, overhead_s: 1.0 };
        Replica { efficiencies, overlap: 0.0, ..*self }
    }

    /// What `work` demands of a step.
    #[must_use]
    pub fn demand(&self, work: Work) -> Demand {
        Demand {
            compute_s: step::compute_s(&self.model.shape, &self.gpu, self.gpus, &self.efficiencies, work),
            memory_s: step::kv_s(&self.model.shape, &self.gpu, self.gpus, &self.efficiencies, work),
            new_tokens: work.new_tokens,
        }
    }

    /// What a step of `tokens` new tokens in all costs before anybody's own terms.
    #[must_use]
    pub fn fixed(&self, tokens: f64) -> Fixed {
        let bytes_per_s = self.gpu.bytes_per_s * f64::from(self.gpus) * self.efficiencies.bandwidth;
        let routed = self.model.experts.map_or(0.0, |experts| experts.bytes);
        let touched = self.model.experts.map_or(0.0, |experts| experts.touched(tokens));
        Fixed {
            overhead_s: self.efficiencies.overhead_s,
            weights_s: (self.model.weight_bytes - routed) / bytes_per_s,
            experts_s: routed * touched / bytes_per_s,
            overlap: self.overlap,
        }
    }

    /// Predicted seconds of a step with this batch; zero without work.
    #[must_use]
    pub fn step_s(&self, batch: &[Work]) -> f64 {
        let tokens: f64 = batch.iter().map(|work| f64::from(work.new_tokens)).sum();
        if tokens == 0.0 {
            return 0.0;
        }
        let demands: Vec<Demand> = batch.iter().map(|&work| self.demand(work)).collect();
        self.fixed(tokens).step_s(&demands)
    }

    /// Tokens that fit the KV cache when `memory_share` of the GPUs' memory is the engine's (vLLM:
    /// `gpu_memory_utilization`) and the weights lie in it; zero when not even they fit.
    #[must_use]
    pub fn kv_capacity_tokens(&self, memory_share: f64) -> f64 {
        let bytes = self.gpu.memory_bytes * f64::from(self.gpus) * memory_share - self.model.weight_bytes;
        (bytes / self.model.shape.kv_bytes_per_token()).max(0.0)
    }
}

impl Fixed {
    /// All that is read once, `M0`.
    #[must_use]
    pub fn read_once_s(&self) -> f64 {
        self.weights_s + self.experts_s
    }

    /// Seconds of a step with these demands: `o + overlap x max(C, M0 + M) + (1 - overlap) x (C + M0 + M)`.
    #[must_use]
    pub fn step_s(&self, demands: &[Demand]) -> f64 {
        if demands.is_empty() {
            return 0.0;
        }
        let compute_s: f64 = demands.iter().map(|demand| demand.compute_s).sum();
        let memory_s = self.read_once_s() + demands.iter().map(|demand| demand.memory_s).sum::<f64>();
        self.overhead_s + self.overlap * compute_s.max(memory_s) + (1.0 - self.overlap) * (compute_s + memory_s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::ModelShape;

    #[test]
    fn a_few_tokens_touch_few_experts_and_many_touch_all() {
        let experts = Experts { count: 8, per_token: 2, bytes: 1e9 };
        assert!((experts.touched(1.0) - 0.25).abs() < 1e-12);
        assert!((experts.touched(2.0) - 0.4375).abs() < 1e-12);
        assert!(experts.touched(100.0) > 0.999_999);
        assert_eq!(experts.touched(0.0), 0.0);
    }

    #[test]
    fn full_overlap_is_the_roofline_of_the_step_model() {
        let replica = Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 2);
        let batch = [Work { new_tokens: 1, cached_tokens: 900 }, Work { new_tokens: 700, cached_tokens: 30 }];
        let expected = step::step_time(&replica.model.shape, &replica.gpu, 2, &replica.efficiencies, &batch).total_s;
        assert!((replica.step_s(&batch) - expected).abs() < 1e-15);
        assert!(Replica { overlap: 0.0, ..replica }.step_s(&batch) > expected);
    }

    #[test]
    fn the_cache_of_a_known_machine_has_the_size_its_engine_reports() {
        // vLLM 0.19 reports 41,408 tokens for this model on a card of 25.25 GB at 0.9, after its own buffers.
        let gpu = GpuSheet { memory_bytes: 25.25e9, ..GpuSheet::L4 };
        let replica = Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), gpu, 1);
        let tokens = replica.kv_capacity_tokens(0.9);
        assert!((40_000.0..56_000.0).contains(&tokens), "{tokens}");
        assert_eq!(replica.kv_capacity_tokens(0.5), 0.0);
    }
}
