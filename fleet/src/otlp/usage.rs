//! Token counts of a span as disjoint kinds.
//!
//! The conventions say that cache reads and writes are part of the input, and reasoning of the output. Not every
//! instrumentation keeps to that; where the numbers themselves show that a part is counted apart, it is taken apart.

use ledger::{Operation, TokenUsage, UsageQuality};

use super::names::{self, Attributes};

/// What a span says of its tokens.
#[derive(Debug, Clone, Copy, Default)]
struct Said {
    input: Option<u64>,
    output: Option<u64>,
    total: Option<u64>,
    /// Input from a cache, or written to one.
    cached: u64,
    reasoning: u64,
}

/// Tokens by kind, and how they are known. Without any count they are missing, which is not zero.
pub(super) fn usage(attributes: &Attributes<'_>, operation: Operation) -> (TokenUsage, UsageQuality) {
    let count = |names| attributes.count(names);
    let part = |names| attributes.count(names).unwrap_or(0);
    let (cache_read, cache_write) = (part(names::CACHE_READ), part(names::CACHE_WRITE));
    let mut said = Said {
        input: count(names::INPUT),
        output: count(names::OUTPUT),
        total: count(names::TOTAL),
        cached: cache_read.saturating_add(cache_write),
        reasoning: part(names::REASONING),
    };
    said.complete(operation);
    if said.input.is_none() && said.output.is_none() {
        return (TokenUsage::default(), UsageQuality::Missing);
    }
    let (mut input, mut output) = said.totals();
    let mut usage = TokenUsage::default();
    let mut read = take(&mut input, cache_read);
    let audio = part(names::AUDIO_INPUT);
    usage.cache_read_audio = take(&mut read, part(names::AUDIO_CACHE_READ).min(audio));
    usage.cache_read = read;
    usage.cache_write_5m = take(&mut input, cache_write);
    usage.input_audio = take(&mut input, audio - usage.cache_read_audio);
    usage.input_image = take(&mut input, part(names::IMAGE_INPUT));
    usage.input = input;
    usage.reasoning = take(&mut output, said.reasoning);
    usage.output_audio = take(&mut output, part(names::AUDIO_OUTPUT));
    usage.output_image = take(&mut output, part(names::IMAGE_OUTPUT));
    usage.output = output;
    let whole = said.input.is_some() && said.output.is_some();
    (usage, if whole { UsageQuality::Reported } else { UsageQuality::Estimated })
}

impl Said {
    /// What follows from the rest: one side from the total, and that embeddings have no output.
    fn complete(&mut self, operation: Operation) {
        if operation == Operation::Embeddings {
            self.input = self.input.or(self.total);
            self.output = self.output.or(self.input.map(|_| 0));
        }
        let Some(total) = self.total else { return };
        match (self.input, self.output) {
            (Some(input), None) => self.output = total.checked_sub(input),
            (None, Some(output)) => self.input = total.checked_sub(output),
            _ => {}
        }
    }

    /// Everything that went in and everything that came out. Parts are included, unless the total or their size says that
    /// they are not.
    fn totals(&self) -> (u64, u64) {
        let (input, output) = (self.input.unwrap_or(0), self.output.unwrap_or(0));
        let (with_cached, with_reasoning) = (input.saturating_add(self.cached), output.saturating_add(self.reasoning));
        let readings = [(input, output), (with_cached, output), (input, with_reasoning), (with_cached, with_reasoning)];
        let possible = |&(went_in, came_out): &(u64, u64)| went_in >= self.cached && came_out >= self.reasoning;
        let adds_up = |&(went_in, came_out): &(u64, u64)| self.total == Some(went_in.saturating_add(came_out));
        let exact = readings.into_iter().find(|reading| possible(reading) && adds_up(reading));
        let included = readings.into_iter().find(possible);
        exact.or(included).unwrap_or((with_cached, with_reasoning))
    }
}

/// Takes at most `wanted` out of `left`.
fn take(left: &mut u64, wanted: u64) -> u64 {
    let taken = wanted.min(*left);
    *left -= taken;
    taken
}
