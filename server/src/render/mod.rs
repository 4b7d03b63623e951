//! Output for people and for programs: tables and amounts on one side, one JSON document on the other.

pub mod chart;
pub mod picture;
mod table;

use std::io::Write;

use ledger::Money;
use serde::Serialize;

pub use table::{Align, Table, printable};

/// Writes one line of text to standard output. A closed pipe ends the output quietly.
///
/// # Errors
/// Whatever else the operating system says.
pub fn say(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    let written =
        out.write_all(text.as_bytes()).and_then(|()| if text.ends_with('\n') { Ok(()) } else { out.write_all(b"\n") });
    match written.and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// Writes one JSON document to standard output.
///
/// # Errors
/// When the document cannot be written.
pub fn say_json(document: &impl Serialize) -> anyhow::Result<()> {
    Ok(say(&serde_json::to_string_pretty(document)?)?)
}

/// An error with its causes on one line, each said once.
#[must_use]
pub fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let text = cause.to_string().lines().map(str::trim).collect::<Vec<_>>().join(" ");
        let text = without_number(&text);
        if line.is_empty() {
            line = text;
        } else if !line.contains(&text) {
            line = format!("{line}: {text}");
        }
    }
    line
}

/// The operating system's number says nothing that its words do not.
fn without_number(text: &str) -> String {
    let Some((before, rest)) = text.split_once(" (os error ") else { return text.to_owned() };
    match rest.split_once(')') {
        Some((number, after)) if number.bytes().all(|byte| byte.is_ascii_digit()) => format!("{before}{after}"),
        _ => text.to_owned(),
    }
}

/// A number with its noun: `1 row`, `2 rows`.
#[must_use]
pub fn counted(number: u64, noun: &str) -> String {
    let noun = match (number, noun.strip_suffix('y')) {
        (1, _) => noun.to_owned(),
        (_, Some(stem)) => format!("{stem}ies"),
        (_, None) => format!("{noun}s"),
    };
    format!("{} {noun}", count(number))
}

/// Dollars for people: at least cents, and four significant digits where the amount is smaller than a dollar.
#[must_use]
pub fn dollars(amount: Money) -> String {
    const DOLLAR: u128 = 1_000_000_000_000;
    let pico = amount.pico().unsigned_abs();
    if pico == 0 || pico >= DOLLAR {
        return grouped(&amount.rounded(2));
    }
    // Digits after the point until four significant ones are shown: 0.0544 has four places, 0.0000425 has seven.
    let leading_zeros = 12 - pico.to_string().len();
    let places = u32::try_from(leading_zeros + 4).unwrap_or(12).clamp(4, 12);
    amount.rounded(places)
}

/// Dollars with a fixed number of places, for columns whose amounts are compared.
#[must_use]
pub fn dollars_to(amount: Money, places: u32) -> String {
    grouped(&amount.rounded(places))
}

/// Places that show the smallest amount of a column with at least two significant digits, between 2 and 9.
#[must_use]
pub fn places_for(amounts: impl IntoIterator<Item = Money>) -> u32 {
    let smallest = amounts.into_iter().map(|amount| amount.pico().unsigned_abs()).filter(|&pico| pico > 0).min();
    let Some(smallest) = smallest else { return 2 };
    let digits = u32::try_from(smallest.to_string().len()).unwrap_or(0);
    (12 + 2u32).saturating_sub(digits).clamp(2, 9).max(4)
}

/// Microseconds of GPUs as seconds with three places: `1,234.568`.
#[must_use]
pub fn gpu_seconds(micros: i64) -> String {
    let half = 500 * micros.signum();
    grouped(&ledger::decimal::format_scaled(i128::from(micros.saturating_add(half) / 1_000), 3, 3))
}

/// A count with thousands separated: `27,303,999`.
#[must_use]
pub fn count(number: u64) -> String {
    grouped(&number.to_string())
}

/// A share as per cent with one digit: `12.5 %`.
#[must_use]
pub fn percent(part: u128, whole: u128) -> Option<String> {
    if whole == 0 {
        return None;
    }
    let tenths = (part.saturating_mul(2_000) / whole).div_ceil(2);
    Some(format!("{}.{} %", tenths / 10, tenths % 10))
}

/// Microseconds for people: `850 µs`, `12.3 ms`, `4.20 s`.
#[must_use]
pub fn duration(micros: u64) -> String {
    match micros {
        0..=999 => format!("{micros} µs"),
        1_000..=999_999 => format!("{}.{} ms", micros / 1_000, micros % 1_000 / 100),
        _ => format!("{}.{:02} s", micros / 1_000_000, micros % 1_000_000 / 10_000),
    }
}

fn grouped(number: &str) -> String {
    let (sign, digits) = number.strip_prefix('-').map_or(("", number), |rest| ("-", rest));
    let (whole, fraction) = digits.split_once('.').map_or((digits, None), |(whole, rest)| (whole, Some(rest)));
    let mut text = String::with_capacity(number.len() + whole.len() / 3 + 1);
    text.push_str(sign);
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    if let Some(fraction) = fraction {
        text.push('.');
        text.push_str(fraction);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn money(text: &str) -> Money {
        text.parse().unwrap()
    }

    #[test]
    fn amounts_show_as_many_digits_as_they_need() {
        let cases = [
            ("0", "0.00"),
            ("12", "12.00"),
            ("1234567.891", "1,234,567.89"),
            ("0.0544", "0.05440"),
            ("0.00000425", "0.000004250"),
            ("0.000000000001", "0.000000000001"),
            ("-0.5", "-0.5000"),
            ("-1234.5", "-1,234.50"),
        ];
        for (amount, shown) in cases {
            assert_eq!(dollars(money(amount)), shown);
        }
    }

    #[test]
    fn a_column_has_places_for_its_smallest_amount() {
        assert_eq!(places_for([]), 2);
        assert_eq!(places_for([money("12"), money("3.5")]), 4);
        assert_eq!(places_for([money("12"), money("0.00012")]), 5);
        assert_eq!(places_for([money("0.000000000001")]), 9);
    }

    #[test]
    fn errors_are_one_line_and_say_nothing_twice() {
        let inner = std::io::Error::from_raw_os_error(2);
        let middle = anyhow::anyhow!("cannot create a: {inner}");
        let error = anyhow::Error::from(inner).context(middle.to_string()).context("cannot open the ledger\nin a");
        assert_eq!(one_line(&error), "cannot open the ledger in a: cannot create a: No such file or directory");
    }

    #[test]
    fn counts_shares_and_durations_read_well() {
        assert_eq!([counted(1, "entry"), counted(0, "row")], ["1 entry", "0 rows"]);
        assert_eq!(counted(2_000, "entry"), "2,000 entries");
        assert_eq!([count(0), count(999), count(1_000), count(27_303_999)], ["0", "999", "1,000", "27,303,999"]);
        assert_eq!([gpu_seconds(1_234_567_800), gpu_seconds(-1_499)], ["1,234.568", "-0.001"]);
        assert_eq!(percent(1, 8), Some("12.5 %".to_owned()));
        assert_eq!(percent(0, 8), Some("0.0 %".to_owned()));
        assert_eq!(percent(1, 0), None);
        assert_eq!([duration(5), duration(12_345), duration(4_200_000)], ["5 µs", "12.3 ms", "4.20 s"]);
    }
}
