//! What a bill shows beside its amounts: the batch that a request shared, what its cached tokens spared, its part of what
//! stood idle, and prices of a million tokens. None of it is booked.

use crate::allocate::full_load::FullLoad;
use crate::allocate::replica::Replica;
use crate::money::{GpuHourRate, Money};
use crate::step::Work;

/// Requests at once on average while a request ran, itself included: `together_us` is how long it ran beside each of the
/// others, added up over them and itself. `None` when it ran for no time at all.
#[must_use]
pub fn mean_batch(own_us: u64, together_us: u64) -> Option<f64> {
    (own_us > 0).then(|| together_us as f64 / own_us as f64)
}

/// What the prefix cache spared a request, in microseconds of its replica: computing all of its input, less computing
/// the part that was not cached and reading the part that was. Negative where reading takes longer.
#[must_use]
pub fn spared_us(replica: &Replica, input_tokens: u32, cached_tokens: u32) -> i64 {
    let cached_tokens = cached_tokens.min(input_tokens);
    let whole = replica.demand(Work { new_tokens: input_tokens, cached_tokens: 0 });
    let rest = replica.demand(Work { new_tokens: input_tokens - cached_tokens, cached_tokens });
    whole_micros(whole.compute_s + whole.memory_s - rest.compute_s - rest.memory_s)
}

/// The cost of some microseconds of `gpus` GPUs, of the microseconds' sign.
#[must_use]
pub fn cost_of(rate: GpuHourRate, gpus: u32, micros: i64) -> Money {
    let cost = rate.over(gpus, micros.unsigned_abs());
    if micros < 0 { Money::ZERO - cost } else { cost }
}

/// The part of what stood idle that would be a request's if idle followed what is used: `idle x own / used`, rounded
/// half up. `None` where nobody used anything, or beyond any real amount.
#[must_use]
pub fn idle_part(own: Money, used: Money, idle: Money) -> Option<Money> {
    let used = used.pico();
    if used <= 0 {
        return None;
    }
    let whole = idle.pico().checked_mul(own.pico())?.checked_mul(2)?;
    Some(Money::from_pico(whole.checked_add(used)?.div_euclid(2 * used)))
}

/// What a million tokens cost when `tokens` cost `amount`, rounded half up. `None` of no tokens.
#[must_use]
pub fn per_million(amount: Money, tokens: u64) -> Option<Money> {
    let tokens = i128::from(tokens);
    if tokens == 0 {
        return None;
    }
    let whole = amount.pico().checked_mul(2_000_000)?;
    Some(Money::from_pico(whole.checked_add(tokens)?.div_euclid(2 * tokens)))
}

/// GPUs that work as one, and what each of the engines that take turns on them would deliver without ever waiting.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded {
    /// The price of one GPU.
    pub rate: GpuHourRate,
    /// How many GPUs.
    pub gpus: u32,
    /// Each engine's throughput alone; they get equal parts of the time.
    pub engines: Vec<FullLoad>,
}

/// What a million output tokens would cost if every engine always had enough to do. `None` when nothing is known of some
/// of the GPUs.
#[must_use]
pub fn per_million_at_full_load(replicas: &[Loaded]) -> Option<Money> {
    let mut tokens_per_s = 0.0;
    let mut hourly = Money::ZERO;
    for replica in replicas {
        if replica.engines.is_empty() {
            return None;
        }
        let sum: f64 = replica.engines.iter().map(|engine| engine.output_tokens_per_s).sum();
        tokens_per_s += sum / replica.engines.len() as f64;
        hourly += replica.rate.over(replica.gpus, 3_600_000_000);
    }
    let tokens = whole(tokens_per_s * 3_600.0)?;
    per_million(hourly, tokens)
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to be in the range")]
fn whole(number: f64) -> Option<u64> {
    (1.0..1e18).contains(&number).then(|| number.round() as u64)
}

#[expect(clippy::cast_possible_truncation, reason = "clamped to a range that fits")]
fn whole_micros(seconds: f64) -> i64 {
    (seconds * 1e6).round().clamp(-1e17, 1e17) as i64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::step::{GpuSheet, ModelShape};

    fn money(text: &str) -> Money {
        text.parse().unwrap()
    }

    #[test]
    fn idle_follows_use_and_is_rounded_once() {
        assert_eq!(idle_part(money("1"), money("4"), money("2")), Some(money("0.5")));
        assert_eq!(idle_part(Money::from_pico(1), Money::from_pico(3), Money::from_pico(5)), Some(Money::from_pico(2)));
        assert_eq!(idle_part(money("1"), Money::ZERO, money("2")), None);
        // Amounts of a large pool's day stay in range.
        assert_eq!(idle_part(money("5000"), money("10000"), money("20000")), Some(money("10000")));
    }

    #[test]
    fn a_million_tokens_of_nothing_cost_nothing_known() {
        assert_eq!(per_million(money("3"), 1_500_000), Some(money("2")));
        assert_eq!(per_million(money("3"), 0), None);
        assert_eq!(mean_batch(10, 25), Some(2.5));
        assert_eq!(mean_batch(0, 0), None);
    }

    #[test]
    fn a_cache_spares_compute_and_costs_reading() {
        let replica = Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 1);
        assert_eq!(spared_us(&replica, 4_000, 0), 0);
        let (some, more) = (spared_us(&replica, 4_000, 1_000), spared_us(&replica, 4_000, 4_000));
        assert!(0 < some && some < more, "{some} {more}");
        let seconds = |new_tokens, cached_tokens| replica.demand(Work { new_tokens, cached_tokens });
        let by_hand = seconds(4_000, 0).compute_s - seconds(3_000, 1_000).compute_s - seconds(3_000, 1_000).memory_s;
        assert_eq!(some, whole_micros(by_hand));
        let rate: GpuHourRate = "3.60".parse().unwrap();
        assert_eq!(cost_of(rate, 2, 1_000), money("0.000002"));
        assert_eq!(cost_of(rate, 2, -1_000), money("-0.000002"));
    }

    #[test]
    fn engines_that_take_turns_share_the_time() {
        let load = |output_tokens_per_s| FullLoad { batch: 1.0, step_s: 1.0, output_tokens_per_s };
        let rate: GpuHourRate = "3.60".parse().unwrap();
        let alone = Loaded { rate, gpus: 1, engines: vec![load(1_000.0)] };
        assert_eq!(per_million_at_full_load(std::slice::from_ref(&alone)), Some(money("1")));
        let two = Loaded { engines: vec![load(1_000.0), load(3_000.0)], ..alone.clone() };
        assert_eq!(per_million_at_full_load(&[two]), Some(money("0.5")));
        assert_eq!(per_million_at_full_load(&[alone.clone(), Loaded { engines: vec![], ..alone }]), None);
        assert_eq!(per_million_at_full_load(&[]), None);
    }
}
