//! Exact decimal text: prices and amounts are read digit by digit, never through a binary float.

/// Why a decimal number could not be taken exactly.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecimalError {
    /// The text is not a decimal number such as `12`, `-0.0544` or `2.5e-06`.
    #[error("`{0}` is not a decimal number")]
    NotANumber(String),
    /// The number has more decimal places than the unit can hold.
    #[error("`{0}` has more than {1} decimal places")]
    TooPrecise(String, u32),
    /// The number is outside the range of the unit.
    #[error("`{0}` is out of range")]
    OutOfRange(String),
}

/// Reads `text` as an integer number of `10^-scale` units.
///
/// Accepts an optional sign, a fraction and an exponent (`2.5e-06`). Trailing zeros beyond `scale` are harmless.
///
/// # Errors
/// [`DecimalError`] when the text is no number, does not fit, or would have to be rounded.
pub fn parse_scaled(text: &str, scale: u32) -> Result<i128, DecimalError> {
    let not_a_number = || DecimalError::NotANumber(clip(text));
    let (negative, unsigned) = match text.as_bytes().first() {
        Some(b'-') => (true, &text[1..]),
        Some(b'+') => (false, &text[1..]),
        _ => (false, text),
    };
    let (mantissa, exponent) = match unsigned.find(['e', 'E']) {
        Some(at) => (&unsigned[..at], unsigned[at + 1..].parse::<i32>().map_err(|_| not_a_number())?),
        None => (unsigned, 0),
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let all_digits = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if (whole.is_empty() && fraction.is_empty()) || !all_digits(whole) || !all_digits(fraction) {
        return Err(not_a_number());
    }

    let digits: String = [whole, fraction].concat();
    let significant = digits.trim_start_matches('0');
    if significant.is_empty() {
        return Ok(0);
    }
    let out_of_range = || DecimalError::OutOfRange(clip(text));
    let fraction_places = i32::try_from(fraction.len()).map_err(|_| out_of_range())?;
    let scale_places = i32::try_from(scale).map_err(|_| out_of_range())?;
    let shift = exponent
        .checked_sub(fraction_places)
        .and_then(|places| places.checked_add(scale_places))
        .ok_or_else(out_of_range)?;

    let value = if shift >= 0 {
        let power = 10i128.checked_pow(shift.unsigned_abs()).ok_or_else(out_of_range)?;
        significant.parse::<i128>().ok().and_then(|digits| digits.checked_mul(power)).ok_or_else(out_of_range)?
    } else {
        let dropped = usize::try_from(shift.unsigned_abs()).map_err(|_| out_of_range())?;
        let kept = significant.len().saturating_sub(dropped);
        if significant[kept..].bytes().any(|byte| byte != b'0') {
            return Err(DecimalError::TooPrecise(clip(text), scale));
        }
        if kept == 0 { 0 } else { significant[..kept].parse::<i128>().map_err(|_| out_of_range())? }
    };
    Ok(if negative { -value } else { value })
}

/// Writes `value` units of `10^-scale` as a decimal number without trailing zeros, keeping at least `min_places`.
#[must_use]
pub fn format_scaled(value: i128, scale: u32, min_places: usize) -> String {
    let width = scale as usize + 1;
    let digits = format!("{:0width$}", value.unsigned_abs());
    let (whole, fraction) = digits.split_at(digits.len() - scale as usize);
    let kept = fraction.trim_end_matches('0').len().max(min_places.min(fraction.len()));
    let sign = if value < 0 { "-" } else { "" };
    if kept == 0 { format!("{sign}{whole}") } else { format!("{sign}{whole}.{}", &fraction[..kept]) }
}

fn clip(text: &str) -> String {
    text.chars().take(60).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_plain_signed_and_scientific_numbers() {
        let cases: [(&str, Result<i128, ()>); 14] = [
            ("1", Ok(1_000_000)),
            ("0.0544", Ok(54_400)),
            ("-2.5", Ok(-2_500_000)),
            ("+.5", Ok(500_000)),
            ("5.", Ok(5_000_000)),
            ("2.5e-06", Ok(2)),
            ("1E3", Ok(1_000_000_000)),
            ("0.1000000000", Ok(100_000)),
            ("0e999999999", Ok(0)),
            ("", Err(())),
            (".", Err(())),
            ("1e", Err(())),
            ("nan", Err(())),
            ("0.0000001", Err(())),
        ];
        for (text, expected) in cases {
            if text == "2.5e-06" {
                assert_eq!(parse_scaled(text, 12), Ok(2_500_000));
                continue;
            }
            assert_eq!(parse_scaled(text, 6).map_err(|_| ()), expected, "{text}");
        }
    }

    #[test]
    fn refuses_what_would_overflow_or_round() {
        assert!(matches!(parse_scaled("1e40", 12), Err(DecimalError::OutOfRange(_))));
        assert!(matches!(
            parse_scaled("1e-2147483648", 12),
            Err(DecimalError::OutOfRange(_) | DecimalError::TooPrecise(..))
        ));
        assert!(matches!(parse_scaled("1e-13", 12), Err(DecimalError::TooPrecise(_, 12))));
    }

    proptest! {
        #[test]
        fn formatting_and_reading_are_inverse(value in any::<i64>(), scale in 0u32..=12) {
            let text = format_scaled(i128::from(value), scale, 2);
            prop_assert_eq!(parse_scaled(&text, scale), Ok(i128::from(value)));
        }
    }
}
