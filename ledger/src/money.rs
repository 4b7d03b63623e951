//! Money in integer picodollars and the only two rates that make it.
//!
//! There is no conversion from a float. Two roundings exist and both are named: [`GpuHourRate::over`] and
//! [`Money::split`]; a [`TokenPrice`] times a token count is exact.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Neg, Sub};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::decimal::{DecimalError, format_scaled, parse_scaled};

/// Decimal places of a dollar that an amount can hold.
pub const SCALE: u32 = 12;
const MICROS_PER_HOUR: i128 = 3_600_000_000;

/// Arithmetic on money that has no exact answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MoneyError {
    /// The amount does not fit decimal(38,12).
    #[error("the amount is larger than the ledger can hold")]
    Overflow,
    /// [`Money::split`] needs at least one weight above zero.
    #[error("an amount cannot be split over weights that are all zero")]
    NoWeights,
}

/// An amount in picodollars (10^-12 USD), kept within decimal(38,12).
///
/// Sums of amounts use plain operators and panic on overflow: 10^26 dollars is a bug of ours, never an input.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Money(i128);

impl Money {
    /// No money. Not the same as an unknown amount, which is no `Money` at all.
    pub const ZERO: Money = Money(0);
    /// The largest amount that decimal(38,12) holds.
    pub const MAX: Money = Money(99_999_999_999_999_999_999_999_999_999_999_999_999);

    /// An amount of whole picodollars.
    #[must_use]
    pub const fn from_pico(pico: i128) -> Money {
        Money(pico)
    }

    /// The amount in picodollars.
    #[must_use]
    pub const fn pico(self) -> i128 {
        self.0
    }

    /// Adds without leaving the range of the ledger.
    ///
    /// # Errors
    /// [`MoneyError::Overflow`].
    pub fn checked_add(self, other: Money) -> Result<Money, MoneyError> {
        self.0.checked_add(other.0).map(Money).filter(|sum| sum.0.abs() <= Self::MAX.0).ok_or(MoneyError::Overflow)
    }

    /// Splits the amount in proportion to `weights` so that the parts add up exactly.
    ///
    /// Largest remainder: each part is rounded towards zero and the units left over go to the largest remainders,
    /// ties to the earlier index. Order the weights by a stable id to make the result independent of arrival.
    ///
    /// # Errors
    /// [`MoneyError::NoWeights`] when every weight is zero, [`MoneyError::Overflow`] when the weights' sum does not fit.
    pub fn split(self, weights: &[u64]) -> Result<Vec<Money>, MoneyError> {
        let total: u128 = weights.iter().map(|&weight| u128::from(weight)).sum();
        if total == 0 {
            return Err(MoneyError::NoWeights);
        }
        let magnitude = self.0.unsigned_abs();
        let mut parts = Vec::with_capacity(weights.len());
        let mut remainders = Vec::with_capacity(weights.len());
        let mut left = magnitude;
        for (index, &weight) in weights.iter().enumerate() {
            let (part, remainder) = mul_div(magnitude, u128::from(weight), total);
            left -= part;
            parts.push(part);
            remainders.push((remainder, index));
        }
        let extra = usize::try_from(left).map_err(|_| MoneyError::Overflow)?;
        // Which ones are the largest matters, not their order: a selection, linear where a sort is not.
        if 0 < extra && extra < remainders.len() {
            remainders.select_nth_unstable_by(extra - 1, |a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
        }
        for &(_, index) in &remainders[..extra] {
            parts[index] += 1;
        }
        let sign = self.0.signum();
        parts
            .into_iter()
            .map(|part| i128::try_from(part).map(|part| Money(sign * part)).map_err(|_| MoneyError::Overflow))
            .collect()
    }

    /// The amount with exactly `places` decimals for people, rounded half away from zero. Never used in arithmetic.
    #[must_use]
    pub fn rounded(self, places: u32) -> String {
        let unit = 10i128.pow(SCALE.saturating_sub(places));
        let half = unit / 2 * self.0.signum();
        let units = (self.0 + half) / unit;
        format_scaled(units, places.min(SCALE), places as usize)
    }
}

/// `a * b / divisor` and the remainder, exact for any operands with `b <= divisor`.
fn mul_div(a: u128, b: u128, divisor: u128) -> (u128, u128) {
    if let Some(product) = a.checked_mul(b) {
        return (product / divisor, product % divisor);
    }
    // Schoolbook in base 2^32: `a` is split so that every partial product fits, the remainder is carried down.
    let mut quotient = 0u128;
    let mut remainder = 0u128;
    for shift in [96u32, 64, 32, 0] {
        let digit = (a >> shift) & 0xffff_ffff;
        // remainder < divisor < 2^75 (a sum of u64 weights), so this fits in 128 bits.
        let partial = (remainder << 32) + digit * b;
        quotient = (quotient << 32) + partial / divisor;
        remainder = partial % divisor;
    }
    (quotient, remainder)
}

impl Add for Money {
    type Output = Money;
    fn add(self, other: Money) -> Money {
        Money(self.0 + other.0)
    }
}

impl Sub for Money {
    type Output = Money;
    fn sub(self, other: Money) -> Money {
        Money(self.0 - other.0)
    }
}

impl Neg for Money {
    type Output = Money;
    fn neg(self) -> Money {
        Money(-self.0)
    }
}

impl AddAssign for Money {
    fn add_assign(&mut self, other: Money) {
        self.0 += other.0;
    }
}

impl Sum for Money {
    fn sum<I: Iterator<Item = Money>>(amounts: I) -> Money {
        amounts.fold(Money::ZERO, Add::add)
    }
}

impl fmt::Display for Money {
    /// Dollars as a decimal number with at least two places: `0.0544`, `12.00`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format_scaled(self.0, SCALE, 2))
    }
}

impl FromStr for Money {
    type Err = DecimalError;
    fn from_str(text: &str) -> Result<Money, DecimalError> {
        let pico = parse_scaled(text, SCALE)?;
        if pico.abs() > Money::MAX.0 { Err(DecimalError::OutOfRange(text.to_owned())) } else { Ok(Money(pico)) }
    }
}

impl Serialize for Money {
    /// A decimal string for people and JSON, the integer for the write-ahead log.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() { serializer.collect_str(self) } else { self.0.serialize(serializer) }
    }
}

impl<'de> Deserialize<'de> for Money {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Money, D::Error> {
        if deserializer.is_human_readable() {
            let text = String::deserialize(deserializer)?;
            text.parse().map_err(serde::de::Error::custom)
        } else {
            i128::deserialize(deserializer).map(Money)
        }
    }
}

/// The price of one token in picodollars: 1 USD per million tokens is exactly 1,000,000.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TokenPrice(u64);

impl TokenPrice {
    /// Free of charge, which is a known price.
    pub const FREE: TokenPrice = TokenPrice(0);

    /// A price of whole picodollars a token.
    #[must_use]
    pub const fn from_pico(pico: u64) -> TokenPrice {
        TokenPrice(pico)
    }

    /// Picodollars a token.
    #[must_use]
    pub const fn pico(self) -> u64 {
        self.0
    }

    /// Reads USD per token, as LiteLLM writes it (`2.5e-06`).
    ///
    /// # Errors
    /// [`DecimalError`] when negative, too large, or finer than a picodollar a token.
    pub fn from_usd_per_token(text: &str) -> Result<TokenPrice, DecimalError> {
        Self::from_scaled(text, SCALE)
    }

    /// Reads USD per million tokens, as price lists write it (`2.50`).
    ///
    /// # Errors
    /// [`DecimalError`] when negative, too large, or finer than a picodollar a token.
    pub fn from_usd_per_million(text: &str) -> Result<TokenPrice, DecimalError> {
        Self::from_scaled(text, SCALE - 6)
    }

    fn from_scaled(text: &str, scale: u32) -> Result<TokenPrice, DecimalError> {
        let pico = parse_scaled(text, scale)?;
        u64::try_from(pico).map(TokenPrice).map_err(|_| DecimalError::OutOfRange(text.to_owned()))
    }

    /// USD per million tokens as a decimal number, for people.
    #[must_use]
    pub fn usd_per_million(self) -> String {
        format_scaled(i128::from(self.0), SCALE - 6, 2)
    }

    /// What `tokens` tokens cost: exact, no rounding.
    #[must_use]
    pub fn times(self, tokens: u64) -> Money {
        // Two u64 factors stay below 2^128 but can pass decimal(38,12); i128 holds every product of 63-bit counts.
        Money(i128::from(self.0).saturating_mul(i128::from(tokens)))
    }
}

/// The price of one GPU for one hour, in picodollars.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GpuHourRate(u64);

impl GpuHourRate {
    /// A rate of whole picodollars an hour.
    #[must_use]
    pub const fn from_pico(pico: u64) -> GpuHourRate {
        GpuHourRate(pico)
    }

    /// Picodollars a GPU-hour.
    #[must_use]
    pub const fn pico(self) -> u64 {
        self.0
    }

    /// What `gpus` GPUs cost for `micros` microseconds, rounded half up to the picodollar. One of the two roundings.
    #[must_use]
    pub fn over(self, gpus: u32, micros: u64) -> Money {
        let hourly = u128::from(self.0) * u128::from(gpus);
        let (whole, remainder) = mul_div_wide(hourly, u128::from(micros), MICROS_PER_HOUR.unsigned_abs());
        let rounded = whole + u128::from(remainder * 2 >= MICROS_PER_HOUR.unsigned_abs());
        Money(i128::try_from(rounded).unwrap_or(Money::MAX.0).min(Money::MAX.0))
    }
}

/// `a * b / divisor` for a product that may pass 128 bits; saturates when the quotient itself does.
fn mul_div_wide(a: u128, b: u128, divisor: u128) -> (u128, u128) {
    let whole_hours = b / divisor;
    let rest = b % divisor;
    let (quotient, remainder) = mul_div(a, rest, divisor);
    (a.saturating_mul(whole_hours).saturating_add(quotient), remainder)
}

impl fmt::Display for GpuHourRate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format_scaled(i128::from(self.0), SCALE, 2))
    }
}

impl FromStr for GpuHourRate {
    type Err = DecimalError;
    /// Reads USD per GPU-hour (`6.98`).
    fn from_str(text: &str) -> Result<GpuHourRate, DecimalError> {
        let pico = parse_scaled(text, SCALE)?;
        u64::try_from(pico).map(GpuHourRate).map_err(|_| DecimalError::OutOfRange(text.to_owned()))
    }
}

impl Serialize for GpuHourRate {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() { serializer.collect_str(self) } else { self.0.serialize(serializer) }
    }
}

impl<'de> Deserialize<'de> for GpuHourRate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<GpuHourRate, D::Error> {
        if deserializer.is_human_readable() {
            let text = String::deserialize(deserializer)?;
            text.parse().map_err(serde::de::Error::custom)
        } else {
            u64::deserialize(deserializer).map(GpuHourRate)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn one_dollar_per_million_is_a_million_pico() {
        assert_eq!(TokenPrice::from_usd_per_million("1").map(TokenPrice::pico), Ok(1_000_000));
        assert_eq!(TokenPrice::from_usd_per_token("2.5e-06").map(TokenPrice::pico), Ok(2_500_000));
        assert_eq!(TokenPrice::from_pico(2_500_000).times(1_000).to_string(), "0.0025");
    }

    #[test]
    fn an_hour_costs_the_rate_and_a_third_rounds_half_up() {
        let rate: GpuHourRate = "6.98".parse().expect("a rate");
        assert_eq!(rate.over(2, 3_600_000_000).to_string(), "13.96");
        assert_eq!(GpuHourRate::from_pico(1).over(1, 1_800_000_000).pico(), 1);
        assert_eq!(GpuHourRate::from_pico(1).over(1, 1_799_999_999).pico(), 0);
    }

    #[test]
    fn people_see_cents_and_machines_see_everything() {
        let amount: Money = "0.054449999999".parse().expect("an amount");
        assert_eq!(amount.to_string(), "0.054449999999");
        assert_eq!(amount.rounded(4), "0.0544");
        assert_eq!((-amount).rounded(2), "-0.05");
        assert_eq!(serde_json::to_string(&amount).expect("json"), "\"0.054449999999\"");
    }

    #[test]
    fn splitting_over_nothing_is_refused() {
        assert_eq!(Money::from_pico(5).split(&[0, 0]), Err(MoneyError::NoWeights));
        assert_eq!(Money::from_pico(5).split(&[]), Err(MoneyError::NoWeights));
    }

    proptest! {
        #[test]
        fn a_split_adds_up_and_follows_the_weights(
            pico in -Money::MAX.pico()..=Money::MAX.pico(),
            weights in prop::collection::vec(any::<u64>(), 1..40),
        ) {
            prop_assume!(weights.iter().any(|&weight| weight > 0));
            let amount = Money::from_pico(pico);
            let parts = amount.split(&weights).expect("a split");
            prop_assert_eq!(parts.iter().copied().sum::<Money>(), amount);
            for (part, &weight) in parts.iter().zip(&weights) {
                prop_assert!(part.pico() == 0 || part.pico().signum() == pico.signum());
                prop_assert!(weight > 0 || part.pico() == 0);
            }
            for (a, b) in [(0, weights.len() - 1)] {
                if weights[a] > weights[b] {
                    prop_assert!(parts[a].pico().abs() >= parts[b].pico().abs());
                }
            }
        }

        #[test]
        fn the_long_division_agrees_with_the_short_one(a in any::<u64>(), b in any::<u64>(), divisor in 1u64..) {
            let b = b.min(divisor);
            let (a, b, divisor) = (u128::from(a), u128::from(b), u128::from(divisor));
            let shifted = mul_div(a << 60, b, divisor);
            let (whole, rest) = mul_div(a, b, divisor);
            let (carry, remainder) = ((rest << 60) / divisor, (rest << 60) % divisor);
            prop_assert_eq!(shifted, ((whole << 60) + carry, remainder));
        }
    }
}
