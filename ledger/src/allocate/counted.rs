//! Tier C of a pool's interval: requests of which only the tokens are known, and traffic that no gateway saw.
//!
//! Their tokens become seconds by the model's rates for a batch of the size that ran. What the engine itself says of the time
//! in which it worked decides where those seconds lie: outside the metered requests' time, where an engine that worked
//! looked idle, and beside them, where the busy time is shared by what each group's tokens come to. An engine that says
//! nothing of itself is taken as working for as long as all tokens together need: what the metered requests' time does
//! not hold lies outside it.
//!
//! No tokens, no seconds: an engine that counted what was metered has no unobserved traffic, to the last digit.

use super::counters::{Counted, Rates};
use super::policy::Method;
use super::pool::Engine;
use super::reconstruct::Ran;
use super::replica::Replica;
use super::timeline::EngineTimeline;
use crate::time::{Period, Timestamp};

/// Requests of a batch when neither the engine nor its tokens say how many ran at once.
const HEADS_MAX: f64 = 256.0;

/// What only tokens are known of, on one engine in one span.
#[derive(Debug, Clone, Default)]
pub(super) struct Beside {
    /// Weight of each item in what all of them get.
    pub(super) weights: Vec<f64>,
    /// Seconds outside the metered requests' time; at most what is idle there.
    pub(super) outside_s: f64,
    /// The part of the metered requests' time that is the items'.
    pub(super) part: f64,
}

/// What an engine did in a span, as far as it is known from elsewhere than its items' tokens.
#[derive(Debug, Clone, Copy)]
pub(super) struct Metered {
    /// Tokens of the requests with timelines.
    pub(super) counted: Counted,
    /// Seconds in which one of them was in the batch.
    pub(super) busy_s: f64,
    /// Seconds in which the engine worked, by its own word.
    pub(super) worked_s: Option<f64>,
    /// How many requests ran at once, by its own word.
    pub(super) running: Option<f64>,
    /// Length of the span in seconds.
    pub(super) span_s: f64,
    /// Whether all items are requests of ours: then time of which nothing else is known is theirs.
    pub(super) all_ours: bool,
}

/// Places `items` on the engine. Nothing when they have no tokens.
pub(super) fn place(engine: &Engine, items: &[Counted], metered: &Metered, method: Method) -> Beside {
    let rates = engine.constants.map(|constants| {
        let all = items.iter().fold(metered.counted, plus);
        let context = context(&all);
        let heads = metered.running.unwrap_or_else(|| heads(&constants, &all, context, metered.span_s));
        [heads, 1.0].map(|heads| Rates::of_model(&constants, heads, context))
    });
    // By the method's own measure, where it has one that tokens can tell.
    let divide = match (method, rates) {
        (Method::Roofline | Method::EqualTime, Some([rates, _])) => rates,
        (Method::Tokens, _) => by_tokens(1.0),
        _ => by_tokens(Method::WeightedTokens.output_weight()),
    };
    let weights: Vec<f64> = items.iter().map(|item| divide.seconds(item)).collect();
    let all: f64 = weights.iter().sum();
    if all <= 0.0 {
        return Beside { weights: vec![0.0; items.len()], ..Beside::default() };
    }
    let seconds = |rates: &Rates| items.iter().map(|item| rates.seconds(item)).sum::<f64>();
    let seen_s = metered.worked_s.map(|worked_s| (worked_s - metered.busy_s).max(0.0));
    let (outside_s, inside) = match (rates, seen_s) {
        (Some([rates, alone]), Some(seen_s)) => {
            let outside_s = seen_s.min(seconds(&alone));
            (outside_s, left(outside_s, seconds(&rates)))
        }
        (Some([rates, _]), None) => {
            let outside_s = (rates.seconds(&metered.counted) + seconds(&rates) - metered.busy_s).max(0.0);
            let outside_s = outside_s.min(seconds(&rates));
            (outside_s, left(outside_s, seconds(&rates)))
        }
        (None, Some(seen_s)) => (seen_s, 1.0),
        // Nothing says how long: beside the others where there are any, and all the time when it can only be theirs.
        (None, None) if metered.busy_s > 0.0 => (0.0, 1.0),
        (None, None) => (if metered.all_ours { metered.span_s } else { 0.0 }, 0.0),
    };
    let others = divide.seconds(&metered.counted);
    let part = if others + all * inside > 0.0 { all * inside / (others + all * inside) } else { 0.0 };
    Beside { weights, outside_s, part }
}

/// The part of `all_s` seconds that is not outside; all of it when the rates give the tokens no time.
fn left(outside_s: f64, all_s: f64) -> f64 {
    if all_s > 0.0 { (1.0 - outside_s / all_s).max(0.0) } else { 1.0 }
}

/// The same traffic in a part of the time.
pub(super) fn scaled(counted: Counted, part: f64) -> Counted {
    Counted {
        prompt_tokens: counted.prompt_tokens * part,
        cached_tokens: counted.cached_tokens * part,
        generation_tokens: counted.generation_tokens * part,
        steps: counted.steps * part,
    }
}

/// What of a request's tokens lies within `span`, its phases taken as even.
pub(super) fn counted_within(timeline: &EngineTimeline, span: Period) -> Counted {
    let [input, output] = super::terms::tokens_within(timeline, span);
    let cached = input * f64::from(timeline.cached_tokens) / f64::from(timeline.input_tokens.max(1));
    Counted { prompt_tokens: input - cached, cached_tokens: cached, generation_tokens: output, steps: 0.0 }
}

/// All tokens of a request of which nothing else is known.
pub(super) fn counted(timeline: &EngineTimeline) -> Counted {
    let cached = timeline.cached_tokens.min(timeline.input_tokens);
    Counted {
        prompt_tokens: f64::from(timeline.input_tokens - cached),
        cached_tokens: f64::from(cached),
        generation_tokens: f64::from(timeline.output_tokens),
        steps: 0.0,
    }
}

/// The tokens of all requests with timelines.
pub(super) fn counted_of(order: &[Ran<'_>], span: Period) -> Counted {
    order.iter().fold(Counted::default(), |sum, ran| plus(sum, &counted_within(&ran.timeline, span)))
}

/// Seconds in which an engine worked and how many requests ran then, by its own samples within `span`.
pub(super) fn own_word(engine: &Engine, start: Timestamp, span: Period) -> (Option<f64>, Option<f64>) {
    let running: Vec<f64> = engine
        .samples
        .iter()
        .filter(|sample| span.contains(start.plus_micros(super::timeline::whole_micros(sample.at_s))))
        .filter_map(|sample| sample.running)
        .collect();
    let working: Vec<f64> = running.iter().copied().filter(|running| *running > 0.0).collect();
    let span_s = span.micros() as f64 * 1e-6;
    let share = |of: usize| (!running.is_empty()).then(|| of as f64 / running.len() as f64 * span_s);
    let mean = (!working.is_empty()).then(|| working.iter().sum::<f64>() / working.len() as f64);
    (share(working.len()), mean)
}

fn plus(sum: Counted, other: &Counted) -> Counted {
    Counted {
        prompt_tokens: sum.prompt_tokens + other.prompt_tokens,
        cached_tokens: sum.cached_tokens + other.cached_tokens,
        generation_tokens: sum.generation_tokens + other.generation_tokens,
        steps: sum.steps + other.steps,
    }
}

/// Tokens as they are, not seconds.
fn by_tokens(output_weight: f64) -> Rates {
    Rates { prompt_token_s: 1.0, cached_token_s: 1.0, generation_token_s: output_weight, step_s: 0.0, error: None }
}

/// A context for the rates: how long inputs are is not counted, only how many tokens there were for each generated one.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to a range that fits")]
fn context(all: &Counted) -> u32 {
    const ANSWER: f64 = 256.0;
    let input = (all.prompt_tokens + all.cached_tokens) / all.generation_tokens.max(1.0) * ANSWER;
    (input + ANSWER / 2.0).clamp(1.0, 32_768.0) as u32
}

/// How many requests decode at once when tokens are spread evenly over `span_s`. With `f` seconds of a step whoever is in it,
/// `m` for each request in it, `G` generated tokens and `P` seconds of prefill, each token takes `f + n m` and so
/// `n span = G (f + n m) + P`.
fn heads(constants: &Replica, all: &Counted, context: u32, span_s: f64) -> f64 {
    let alone = Rates::of_model(constants, 1.0, context);
    let many = Rates::of_model(constants, 1e9, context);
    let own = many.generation_token_s;
    let once = alone.generation_token_s - own;
    let prefill_s = alone.prompt_token_s * all.prompt_tokens;
    let room_s = span_s - all.generation_tokens * own;
    if room_s <= 0.0 {
        return HEADS_MAX;
    }
    ((all.generation_tokens * once + prefill_s) / room_s).clamp(1.0, HEADS_MAX)
}
