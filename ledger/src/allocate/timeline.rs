//! One request's life on one engine, and what the engine can hold.

use serde::{Deserialize, Serialize};

use super::replica::Replica;
use crate::step::Work;
use crate::time::Timestamp;

/// One request on one engine, as the engine or the gateway saw it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineTimeline {
    /// When the engine got it; it waits from here until it is scheduled.
    pub arrived: Timestamp,
    /// When its prefill began.
    pub scheduled: Timestamp,
    /// When its first token was there.
    pub first_token: Timestamp,
    /// When its last token was there.
    pub last_token: Timestamp,
    /// Input tokens, cached ones included.
    pub input_tokens: u32,
    /// Input tokens found in the prefix cache: read, not computed.
    pub cached_tokens: u32,
    /// Tokens generated.
    pub output_tokens: u32,
}

impl EngineTimeline {
    /// What can be said of a request that was only seen from outside, by a gateway that knows when it sent it and when the
    /// tokens came: its prefill took as long as the model predicts for it alone, at the most since it was sent. What lies
    /// before is waiting. A guess, and to be marked as one.
    #[must_use]
    pub fn seen_from_outside(
        replica: &Replica,
        sent: Timestamp,
        first_token: Timestamp,
        last_token: Timestamp,
        (input_tokens, cached_tokens, output_tokens): (u32, u32, u32),
    ) -> EngineTimeline {
        let work = Work { new_tokens: input_tokens.saturating_sub(cached_tokens).max(1), cached_tokens };
        let predicted_us = whole_micros(replica.step_s(&[work]));
        let scheduled = first_token.plus_micros(-predicted_us).max(sent);
        EngineTimeline { arrived: sent, scheduled, first_token, last_token, input_tokens, cached_tokens, output_tokens }
            .ordered()
    }

    /// The same timeline with its moments in order: a clock that ran backwards gives a phase of no length.
    #[must_use]
    pub fn ordered(mut self) -> EngineTimeline {
        self.scheduled = self.scheduled.max(self.arrived);
        self.first_token = self.first_token.max(self.scheduled);
        self.last_token = self.last_token.max(self.first_token);
        self.cached_tokens = self.cached_tokens.min(self.input_tokens);
        self
    }
}

/// What the engine can hold; decides when requests must have been preempted.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// Tokens that fit the KV cache. Unknown is no limit.
    pub kv_tokens: Option<f64>,
    /// Tokens of one cache block; a request wastes half of one on average.
    pub block_tokens: f64,
    /// New tokens that one step can take (vLLM: `max_num_batched_tokens`).
    pub step_tokens_max: f64,
}

impl Default for Limits {
    /// No limit on the cache, blocks of 16 and steps of 2,048 tokens, as vLLM has them by default.
    fn default() -> Limits {
        Limits { kv_tokens: None, block_tokens: 16.0, step_tokens_max: 2_048.0 }
    }
}

/// Seconds as whole microseconds, at the most some thousand years.
#[expect(clippy::cast_possible_truncation, reason = "clamped to a range that fits")]
pub(super) fn whole_micros(seconds: f64) -> i64 {
    (seconds * 1e6).clamp(0.0, 1e17) as i64
}
