//! How long steps take: one of them from its parts, and many alike in a closed form.
//!
//! While nobody comes and nobody leaves, every step of a batch of `n` decoding requests adds one token to each context. Compute
//! and memory traffic are then linear in the number of the step, so a step takes the larger of two straight lines (or a
//! blend of the larger and the sum), and any number of steps takes a sum of at most two quadratic pieces. Times are
//! microseconds.

use ledger::allocate::shape::Model;

use super::spec::Constants;

/// A replica's constants in the form in which steps need them, microseconds.
#[derive(Debug, Clone)]
pub(super) struct Cost {
    constants: Constants,
    /// Compute of one new token, without its attention.
    token_us: f64,
    /// Compute of one new token attending to one other.
    pair_us: f64,
    /// Reading one token of somebody's cache.
    read_us: f64,
    overhead_us: f64,
    sequence_us: f64,
    /// What the GPUs exchange for each new token.
    link_us: f64,
    overlap: f64,
    /// Reading the weights that every step reads.
    weights_us: f64,
}

/// What the prefilling requests of a step add to it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Chunks {
    requests: u32,
    tokens: u32,
    compute_us: f64,
    memory_us: f64,
}

impl Cost {
    pub(super) fn new(constants: &Constants) -> Cost {
        use ledger::step::Work;
        // Contexts so long that differences keep their digits.
        const FAR: u32 = 1 << 24;
        let replica = &constants.replica;
        let near = replica.demand(Work { new_tokens: 1, cached_tokens: 0 });
        let far = replica.demand(Work { new_tokens: 1, cached_tokens: FAR });
        let pair_us = (far.compute_s - near.compute_s) / f64::from(FAR) * 1e6;
        let fixed = replica.fixed(1.0);
        Cost {
            token_us: near.compute_s * 1e6 - pair_us / 2.0,
            pair_us,
            read_us: far.memory_s / f64::from(FAR) * 1e6,
            overhead_us: fixed.overhead_s * 1e6,
            sequence_us: constants.sequence_s * 1e6,
            link_us: constants.link_s_per_token() * 1e6,
            overlap: replica.overlap,
            weights_us: fixed.weights_s * 1e6 * part_read(&replica.model),
            constants: *constants,
        }
    }

    /// Reading the routed experts that so many tokens meet; nothing for a dense model.
    fn experts_us(&self, tokens: f64) -> f64 {
        let replica = &self.constants.replica;
        if replica.model.experts.is_none() { 0.0 } else { replica.fixed(tokens).experts_s * 1e6 }
    }

    /// One more request that computes `new` tokens after `cached` ones.
    pub(super) fn add(&self, chunks: &mut Chunks, new: u32, cached: u32) {
        let (tokens, seen) = (f64::from(new), f64::from(cached));
        chunks.requests += 1;
        chunks.tokens += new;
        chunks.compute_us += tokens * (self.token_us + self.pair_us * (seen + tokens / 2.0));
        chunks.memory_us += self.read_us * seen;
    }

    /// The steps of `decoding` requests with `context` cached tokens together in the first step, beside `chunks` if there is only
    /// one step.
    pub(super) fn stretch(&self, decoding: u32, context: f64, chunks: &Chunks) -> Stretch {
        let n = f64::from(decoding);
        let tokens = n + f64::from(chunks.tokens);
        let weights_us = self.weights_us + self.experts_us(tokens);
        let compute = Line {
            at: n * (self.token_us + self.pair_us / 2.0) + self.pair_us * context + chunks.compute_us,
            rise: self.pair_us * n,
        };
        let memory = Line { at: weights_us + self.read_us * context + chunks.memory_us, rise: self.read_us * n };
        let base = self.overhead_us + self.sequence_us * (n + f64::from(chunks.requests)) + self.link_us * tokens;
        Stretch::new(base, self.overlap, compute, memory)
    }
}

/// The part of all weights beside the routed experts that a step reads: not the input embedding, of which a token looks up one
/// row. It is what is neither multiplied by every token nor a routed expert.
fn part_read(model: &Model) -> f64 {
    let bytes_each = model.weight_bytes / model.shape.total_parameters;
    let (routed, met) = model.experts.map_or((0.0, 0.0), |experts| {
        let met = f64::from(experts.per_token) / f64::from(experts.count.max(1));
        (experts.bytes, experts.bytes * met)
    });
    let read = (model.shape.active_parameters * bytes_each - met) / (model.weight_bytes - routed);
    if read.is_finite() { read.clamp(0.0, 1.0) } else { 1.0 }
}

/// `at + rise x step`.
#[derive(Debug, Clone, Copy, Default)]
struct Line {
    at: f64,
    rise: f64,
}

impl Line {
    /// Sum over the steps `from..from + steps`.
    fn sum(self, from: f64, steps: f64) -> f64 {
        steps * (self.at + self.rise * (from + (steps - 1.0) / 2.0))
    }

    /// How many steps from `from` on take `us` together; not whole.
    fn steps(self, from: f64, us: f64) -> f64 {
        let first = self.at + self.rise * from - self.rise / 2.0;
        // The root of `rise/2 s^2 + first s = us` in the form that loses no digits when `rise` is small.
        2.0 * us / (first + (first * first + 2.0 * self.rise * us).max(0.0).sqrt())
    }
}

/// Steps that follow one another with nothing changing but the contexts.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Stretch {
    before: Line,
    after: Line,
    /// The first step on the other side of the roofline; infinite when there is none.
    cross: f64,
}

impl Stretch {
    fn new(base: f64, overlap: f64, compute: Line, memory: Line) -> Stretch {
        let both = 1.0 - overlap;
        let blend = |larger: Line| Line {
            at: base + overlap * larger.at + both * (compute.at + memory.at),
            rise: overlap * larger.rise + both * (compute.rise + memory.rise),
        };
        let ahead = Line { at: compute.at - memory.at, rise: compute.rise - memory.rise };
        let (first, second) = if ahead.at > 0.0 { (compute, memory) } else { (memory, compute) };
        let turns = ahead.at * ahead.rise < 0.0 || (ahead.at == 0.0 && ahead.rise > 0.0);
        let cross = if turns { (-ahead.at / ahead.rise).ceil() } else { f64::INFINITY };
        Stretch { before: blend(first), after: blend(second), cross }
    }

    /// Microseconds of its first `steps` steps.
    pub(super) fn us(&self, steps: u64) -> f64 {
        let steps = count(steps);
        if steps <= self.cross {
            return self.before.sum(0.0, steps);
        }
        self.before.sum(0.0, self.cross) + self.after.sum(self.cross, steps - self.cross)
    }

    /// The fewest steps that take at least `us`.
    pub(super) fn steps_until(&self, us: f64) -> u64 {
        if us <= 0.0 {
            return 0;
        }
        let turn_us = if self.cross.is_finite() { self.before.sum(0.0, self.cross) } else { f64::INFINITY };
        let guess = if us <= turn_us {
            self.before.steps(0.0, us)
        } else {
            self.cross + self.after.steps(self.cross, us - turn_us)
        };
        let mut steps = whole(guess.ceil());
        while steps > 0 && self.us(steps - 1) >= us {
            steps -= 1;
        }
        while self.us(steps) < us {
            steps += 1;
        }
        steps
    }

    /// The most steps that take no longer than `us`.
    pub(super) fn steps_within(&self, us: f64) -> u64 {
        let steps = self.steps_until(us);
        if self.us(steps) > us { steps.saturating_sub(1) } else { steps }
    }
}

/// A count as a float: steps and microseconds are far below 2^52.
#[expect(clippy::cast_precision_loss, reason = "steps and microseconds of a simulation are far below 2^52")]
pub(super) fn count(value: u64) -> f64 {
    value as f64
}

/// A float that is not negative as a count; saturates.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "float to integer casts saturate")]
pub(super) fn whole(value: f64) -> u64 {
    value as u64
}

#[cfg(test)]
mod tests {
    use ledger::allocate::replica::Replica;
    use ledger::step::{Efficiencies, GpuSheet, ModelShape, Work};
    use proptest::prelude::*;

    use super::*;

    fn constants(compute: f64, overlap: f64) -> Constants {
        let efficiencies = Efficiencies { compute, bandwidth: 0.8, overhead_s: 0.5e-3 };
        let replica = Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 1);
        Constants {
            replica: Replica { efficiencies, overlap, ..replica },
            sequence_s: 3e-6,
            request_s: 0.0,
            link_bytes_per_s: None,
        }
    }

    #[test]
    fn one_step_is_the_ledgers_step() {
        let constants = Constants { sequence_s: 0.0, ..constants(0.5, 0.75) };
        let cost = Cost::new(&constants);
        let mut chunks = Chunks::default();
        cost.add(&mut chunks, 700, 1_000);
        let us = cost.stretch(2, 3_000.0, &chunks).us(1);
        let work = |new_tokens, cached_tokens| Work { new_tokens, cached_tokens };
        let expected = constants.replica.step_s(&[work(1, 1_000), work(1, 2_000), work(700, 1_000)]) * 1e6;
        assert!((us / expected - 1.0).abs() < 1e-9, "{us} {expected}");
    }

    #[test]
    fn a_step_of_experts_is_the_ledgers_step() {
        let config = r#"{ "hidden_size": 1000, "num_hidden_layers": 10, "num_attention_heads": 10, "vocab_size": 50000,
            "intermediate_size": 2000, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "num_experts": 64,
            "num_experts_per_tok": 4, "moe_intermediate_size": 500 }"#;
        let replica = Replica::unfitted(Model::from_config(config).unwrap(), GpuSheet::H100, 1);
        let cost = Cost::new(&Constants::bare(Replica { overlap: 0.25, ..replica }));
        let mut chunks = Chunks::default();
        cost.add(&mut chunks, 30, 100);
        let us = cost.stretch(2, 700.0, &chunks).us(1);
        let work = |new_tokens, cached_tokens| Work { new_tokens, cached_tokens };
        let batch = [work(1, 300), work(1, 400), work(30, 100)];
        let expected = Replica { overlap: 0.25, ..replica }.step_s(&batch) * 1e6;
        assert!((us / expected - 1.0).abs() < 1e-9, "{us} {expected}");
    }

    #[test]
    fn the_input_embedding_is_not_read() {
        let config = |experts: &str| {
            Model::from_config(&format!(
                r#"{{ "hidden_size": 1000, "num_hidden_layers": 10, "num_attention_heads": 10, "num_key_value_heads": 10,
                "intermediate_size": 2000, "vocab_size": 50000, "tie_word_embeddings": false, "torch_dtype": "float16" {experts} }}"#
            ))
            .unwrap()
        };
        // Attention 4e7, feed-forward 6e7 and the output embedding 5e7 are read of those and another 5e7.
        assert!((part_read(&config("")) - 0.75).abs() < 1e-12);
        let sparse = config(r#", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 500"#);
        let beside = sparse.weight_bytes - sparse.experts.unwrap().bytes;
        assert!((part_read(&sparse) * beside - (beside - 5e7 * 2.0)).abs() < 1e-3 * beside, "{}", part_read(&sparse));
        assert_eq!(part_read(&ModelShape::LLAMA_3_1_8B.into()), 1.0);
    }

    proptest! {
        #[test]
        fn the_closed_form_is_the_sum_of_its_steps(
            decoding in 1u32..400, context in 0.0..200_000.0f64, steps in 1u64..3_000, compute in 0.002..1.0f64,
            overlap in 0.0..=1.0f64, part in 0.0..1.0f64,
        ) {
            let constants = constants(compute, overlap);
            let cost = Cost::new(&constants);
            let stretch = cost.stretch(decoding, context, &Chunks::default());
            let mut sum = 0.0;
            for step in 0..steps {
                let now = context + f64::from(decoding) * count(step);
                sum += cost.stretch(decoding, now, &Chunks::default()).us(1);
            }
            prop_assert!((stretch.us(steps) / sum - 1.0).abs() < 1e-9, "{} {sum}", stretch.us(steps));
            let until = stretch.steps_until(part * sum);
            prop_assert!(stretch.us(until) >= part * sum);
            prop_assert!(until == 0 || stretch.us(until - 1) < part * sum);
            prop_assert!(stretch.us(stretch.steps_within(part * sum)) <= part * sum);
        }
    }
}
