//! What a request's amount is made of: the seconds behind it, and the amount itself divided by term.

use super::policy::{Method, Policy};
use super::pool::{Engine, Served};
use super::reconstruct::{in_order, reconstruct};
use super::share::Share;
use super::timeline::EngineTimeline;
use crate::id::AttemptId;
use crate::money::{Money, MoneyError};
use crate::time::{Period, Timestamp};

/// What one request used of an engine within a span.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Used {
    /// The request.
    pub attempt: AttemptId,
    /// Seconds of the replica by the step-time model, whatever the method.
    pub share: Share,
    /// Seconds of the replica that computed again what a preemption threw away.
    pub waste_s: f64,
    /// Seconds that it waited, preempted.
    pub preempted_s: f64,
    /// Its input and output tokens that lie within the span.
    pub tokens: [f64; 2],
    /// What the method counted, in the order of [`names`].
    counted: [f64; 4],
}

/// The terms by which `method` divides, in a fixed order.
#[must_use]
pub const fn names(method: Method) -> &'static [&'static str] {
    match method {
        Method::Roofline => &["overhead", "weights", "kv", "compute"],
        Method::Tokens | Method::WeightedTokens => &["input", "output"],
        Method::EqualTime => &["time"],
    }
}

/// What each request of `engine` that ran within `span` used by its timeline, in the order in which they were scheduled.
/// `served` holds every request once. Without constants the seconds are zero and tokens are all there is.
#[must_use]
pub fn used(engine: &Engine, served: &[Served], span: Period, method: Method) -> Vec<Used> {
    let own: Vec<(usize, &Served)> = served.iter().enumerate().filter(|(_, one)| one.engine == engine.name).collect();
    let order = in_order(&own, span);
    let model = reconstruct(engine, &order, &[span], &Policy::default(), None).parts;
    order
        .iter()
        .zip(model)
        .map(|(ran, part)| {
            let [input, output] = tokens_within(&ran.timeline, span);
            let Share { overhead_s, weights_s, memory_s, compute_s } = part.share;
            let counted = match method {
                Method::Roofline => [overhead_s, weights_s, memory_s, compute_s],
                Method::Tokens | Method::WeightedTokens => [input, method.output_weight() * output, 0.0, 0.0],
                Method::EqualTime => [1.0, 0.0, 0.0, 0.0],
            };
            Used {
                attempt: ran.served.attempt,
                tokens: [input, output],
                share: part.share,
                waste_s: part.waste_s,
                preempted_s: part.preempted_s,
                counted,
            }
        })
        .collect()
}

impl Used {
    /// Divides what the request pays among the method's terms; the parts add up to `amount`.
    ///
    /// # Errors
    /// [`MoneyError`] when the amount leaves the range of the ledger.
    pub fn divide(&self, amount: Money, method: Method) -> Result<Vec<(&'static str, Money)>, MoneyError> {
        let names = names(method);
        let counted = &self.counted[..names.len()];
        let largest = counted.iter().copied().fold(0.0, f64::max);
        // A request that counted nothing pays nothing; whatever rounding left it stands under its last term.
        let weights: Vec<u64> =
            counted.iter().map(|count| if largest > 0.0 { super::books::weight(count / largest) } else { 0 }).collect();
        Ok(names.iter().copied().zip(super::books::split_or_last(amount, &weights)?).collect())
    }
}

/// Input and output tokens of a request within a span, its phases taken as even.
pub(super) fn tokens_within(timeline: &EngineTimeline, span: Period) -> [f64; 2] {
    let part = |start: Timestamp, end: Timestamp| {
        let phase = Period { start, end };
        match phase.intersect(span) {
            Some(both) => both.micros() as f64 / phase.micros() as f64,
            // A phase of no length lies inside or outside as a whole.
            None => f64::from(u8::from(start == end && span.contains(start))),
        }
    };
    [
        f64::from(timeline.input_tokens) * part(timeline.scheduled, timeline.first_token),
        f64::from(timeline.output_tokens) * part(timeline.first_token, timeline.last_token),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::allocate::pool::Known;
    use crate::allocate::replica::Replica;
    use crate::allocate::timeline::Limits;
    use crate::context::Context;
    use crate::id::RequestId;
    use crate::step::{GpuSheet, ModelShape};

    #[test]
    fn terms_are_the_methods_own_and_add_up() {
        let at = |seconds: i64| Timestamp::from_micros(seconds * 1_000_000);
        let engine = Engine {
            name: "e".into(),
            replica: "r".into(),
            model: None,
            constants: Some(Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 1)),
            limits: Limits::default(),
            slice: None,
            speculation: None,
            ready_at: None,
            kept_warm_for: None,
            unobserved: None,
            samples: Vec::new(),
            steps: Vec::new(),
        };
        let served = Served {
            attempt: AttemptId { request: RequestId::new(at(0), [1; 10]), number: 0 },
            context: Context::default(),
            engine: "e".into(),
            timeline: EngineTimeline {
                arrived: at(0),
                scheduled: at(0),
                first_token: at(1),
                last_token: at(10),
                input_tokens: 1_000,
                cached_tokens: 0,
                output_tokens: 500,
            },
            known: Known::Timeline,
            adapter: None,
            estimated: false,
            observed_at: at(10),
        };
        let amount = Money::from_pico(1_000_000_000_001);
        for method in Method::ALL {
            let all = used(&engine, std::slice::from_ref(&served), Period { start: at(0), end: at(20) }, method);
            assert!((all[0].share.total_s() - 10.0).abs() < 1e-6, "alone, it pays all its time");
            let divided = all[0].divide(amount, method).unwrap();
            assert_eq!(divided.iter().map(|(_, part)| *part).sum::<Money>(), amount);
            assert!(divided.iter().map(|(name, _)| *name).eq(names(method).iter().copied()));
        }
        let tokens = used(&engine, &[served], Period { start: at(0), end: at(20) }, Method::WeightedTokens)[0];
        let divided = tokens.divide(Money::from_pico(2_000), Method::WeightedTokens).unwrap();
        assert_eq!(divided, [("input", Money::from_pico(1_000)), ("output", Money::from_pico(1_000))]);
    }
}
