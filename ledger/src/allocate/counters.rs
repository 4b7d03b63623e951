//! Tier C: only counters are known. Seconds a token by non-negative least squares over intervals, rescaled to the interval.

use super::fit::non_negative_least_squares;
use super::replica::Replica;
use crate::step::Work;

/// What an engine counted over an interval, or what was metered of one request in it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Counted {
    /// Prompt tokens computed (not those found in a cache).
    pub prompt_tokens: f64,
    /// Prompt tokens found in a cache.
    pub cached_tokens: f64,
    /// Tokens generated.
    pub generation_tokens: f64,
    /// Steps; zero where the engine does not count them.
    pub steps: f64,
}

/// An interval in which an engine counted and was busy for a known time.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Busy {
    /// What it counted.
    pub counted: Counted,
    /// Seconds it was busy.
    pub seconds: f64,
}

/// Seconds of the replica for each unit of what counters count.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rates {
    /// For a prompt token computed.
    pub prompt_token_s: f64,
    /// For a prompt token found in a cache.
    pub cached_token_s: f64,
    /// For a token generated.
    pub generation_token_s: f64,
    /// For a step, whoever is in it.
    pub step_s: f64,
    /// Median relative error on the intervals that the rates are from; `None` when they are from the model alone.
    pub error: Option<f64>,
}

/// Fewest intervals that give rates of their own.
pub const INTERVALS_MIN: usize = 8;

/// What a counter grew by. A counter that went backwards was restarted, and what it shows is what came after; `None`
/// when either reading is missing, because unknown is not zero.
#[must_use]
pub fn growth(before: Option<f64>, after: Option<f64>) -> Option<f64> {
    let (before, after) = (before?, after?);
    Some(if after >= before { after - before } else { after })
}

/// What the engine did beyond what was metered: traffic that bypassed the gateway. Never negative: a request metered in
/// this interval may have been counted in the one before.
#[must_use]
pub fn unobserved(engine: &Counted, metered: &Counted) -> Counted {
    Counted {
        prompt_tokens: (engine.prompt_tokens - metered.prompt_tokens).max(0.0),
        cached_tokens: (engine.cached_tokens - metered.cached_tokens).max(0.0),
        generation_tokens: (engine.generation_tokens - metered.generation_tokens).max(0.0),
        steps: 0.0,
    }
}

impl Rates {
    /// Rates from intervals. `None` with fewer than [`INTERVALS_MIN`] busy ones.
    #[must_use]
    pub fn of(intervals: &[Busy]) -> Option<Rates> {
        let busy: Vec<&Busy> = intervals.iter().filter(|interval| interval.seconds > 0.0).collect();
        if busy.len() < INTERVALS_MIN {
            return None;
        }
        // An interval's weight is one over its busy time, so that a quiet minute counts as much as a full one.
        let column =
            |of: fn(&Counted) -> f64| busy.iter().map(|interval| of(&interval.counted) / interval.seconds).collect();
        let columns: [Vec<f64>; 4] = [
            column(|c| c.prompt_tokens),
            column(|c| c.cached_tokens),
            column(|c| c.generation_tokens),
            column(|c| c.steps),
        ];
        let found = non_negative_least_squares(&columns, &vec![1.0; busy.len()]);
        let mut rates = Rates {
            prompt_token_s: found[0],
            cached_token_s: found[1],
            generation_token_s: found[2],
            step_s: found[3],
            error: None,
        };
        let mut errors: Vec<f64> =
            busy.iter().map(|interval| (rates.seconds(&interval.counted) / interval.seconds - 1.0).abs()).collect();
        errors.sort_by(f64::total_cmp);
        rates.error = Some(errors[errors.len() / 2]);
        Some(rates)
    }

    /// Rates from the step model alone, for a batch of `heads` requests with `context` tokens each.
    #[must_use]
    pub fn of_model(replica: &Replica, heads: f64, context: u32) -> Rates {
        let prompt = replica.demand(Work { new_tokens: 1, cached_tokens: 0 });
        let decode = replica.demand(Work { new_tokens: 1, cached_tokens: context });
        let fixed = replica.fixed(heads.max(1.0));
        let step_s = fixed.step_s(&[decode]) - decode.compute_s.max(decode.memory_s);
        Rates {
            prompt_token_s: prompt.compute_s,
            cached_token_s: prompt.memory_s,
            generation_token_s: decode.memory_s.max(decode.compute_s) + step_s.max(0.0) / heads.max(1.0),
            step_s: 0.0,
            error: None,
        }
    }

    /// Seconds that these counts come to.
    #[must_use]
    pub fn seconds(&self, counted: &Counted) -> f64 {
        self.prompt_token_s * counted.prompt_tokens
            + self.cached_token_s * counted.cached_tokens
            + self.generation_token_s * counted.generation_tokens
            + self.step_s * counted.steps
    }

    /// Divides `busy_s` seconds among `parts` by what they count for; steps, which nobody owns, raise everybody's rate
    /// alike. Equal parts when the rates say nothing. Adds up to `busy_s`.
    #[must_use]
    pub fn share(&self, parts: &[Counted], busy_s: f64) -> Vec<f64> {
        let weights: Vec<f64> = parts.iter().map(|part| self.seconds(&Counted { steps: 0.0, ..*part })).collect();
        let all: f64 = weights.iter().sum();
        if all > 0.0 {
            weights.into_iter().map(|weight| busy_s * weight / all).collect()
        } else {
            vec![busy_s / parts.len().max(1) as f64; parts.len()]
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::step::{GpuSheet, ModelShape};

    fn counted(prompt_tokens: f64, generation_tokens: f64) -> Counted {
        Counted { prompt_tokens, generation_tokens, ..Counted::default() }
    }

    #[test]
    fn rates_are_found_again() {
        let truth = Rates { prompt_token_s: 3e-5, generation_token_s: 4e-4, ..Rates::default() };
        let intervals: Vec<Busy> = (1..20)
            .map(|i| counted(f64::from(i * 977 % 5_000), f64::from(i * 613 % 3_000)))
            .map(|counted| Busy { counted, seconds: truth.seconds(&counted) })
            .collect();
        let rates = Rates::of(&intervals).unwrap();
        assert!(
            (rates.prompt_token_s / 3e-5 - 1.0).abs() < 1e-6 && (rates.generation_token_s / 4e-4 - 1.0).abs() < 1e-6
        );
        assert!(rates.error.unwrap() < 1e-6);
        assert_eq!(Rates::of(&intervals[..5]), None);
    }

    #[test]
    fn a_restart_is_no_negative_growth_and_unknown_is_not_zero() {
        assert_eq!(growth(Some(10.0), Some(25.0)), Some(15.0));
        assert_eq!(growth(Some(25.0), Some(10.0)), Some(10.0));
        assert_eq!(growth(None, Some(10.0)), None);
        assert_eq!(growth(Some(10.0), None), None);
    }

    #[test]
    fn what_bypassed_the_gateway_is_the_difference() {
        let engine = counted(1_000.0, 500.0);
        assert_eq!(unobserved(&engine, &engine), Counted::default());
        assert_eq!(unobserved(&engine, &counted(1_200.0, 400.0)), counted(0.0, 100.0));
    }

    #[test]
    fn the_model_alone_says_that_a_generated_token_costs_more_than_a_prompt_token() {
        let replica = Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 1);
        let rates = Rates::of_model(&replica, 16.0, 1_000);
        assert!(rates.generation_token_s > 5.0 * rates.prompt_token_s && rates.error.is_none());
    }

    proptest! {
        #[test]
        fn shares_add_up(parts in prop::collection::vec((0.0f64..1e5, 0.0f64..1e4), 1..30), busy_s in 0.0f64..60.0) {
            let parts: Vec<Counted> = parts.into_iter().map(|(prompt, generated)| counted(prompt, generated)).collect();
            let rates = Rates { prompt_token_s: 1e-5, generation_token_s: 1e-3, ..Rates::default() };
            let shares = rates.share(&parts, busy_s);
            prop_assert!((shares.iter().sum::<f64>() - busy_s).abs() <= 1e-9 * busy_s.max(1.0));
            prop_assert!(shares.iter().all(|&share| share >= 0.0));
        }
    }
}
