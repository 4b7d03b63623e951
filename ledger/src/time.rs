//! Points and spans of time. Nothing here reads a clock: `now` is always an argument or comes through [`Clock`].

use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, NaiveDateTime, SecondsFormat, Utc};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

const MICROS_PER_DAY: i64 = 86_400_000_000;

/// A point in time: UTC microseconds since 1970.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

impl Timestamp {
    /// From UTC microseconds since 1970.
    #[must_use]
    pub const fn from_micros(micros: i64) -> Timestamp {
        Timestamp(micros)
    }

    /// UTC microseconds since 1970.
    #[must_use]
    pub const fn micros(self) -> i64 {
        self.0
    }

    /// This moment plus `micros`, saturating at the ends of time.
    #[must_use]
    pub const fn plus_micros(self, micros: i64) -> Timestamp {
        Timestamp(self.0.saturating_add(micros))
    }

    /// Microseconds from `earlier` to this moment; zero when `earlier` is later.
    #[must_use]
    pub fn micros_since(self, earlier: Timestamp) -> u64 {
        u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0)
    }

    /// Days since 1970, the partition of every table.
    #[must_use]
    pub fn day(self) -> i32 {
        i32::try_from(self.0.div_euclid(MICROS_PER_DAY)).unwrap_or(i32::MAX)
    }
}

impl fmt::Display for Timestamp {
    /// RFC 3339 in UTC with as many sub-second digits as needed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match DateTime::<Utc>::from_timestamp_micros(self.0) {
            Some(at) => f.pad(&at.to_rfc3339_opts(SecondsFormat::AutoSi, true)),
            None => write!(f, "{}us", self.0),
        }
    }
}

impl FromStr for Timestamp {
    type Err = String;

    /// Reads RFC 3339 (`2026-11-23T18:00:00Z`), `2026-11-23 18:00:00.5` in UTC, or a plain day at midnight UTC.
    fn from_str(text: &str) -> Result<Timestamp, String> {
        if let Ok(at) = DateTime::parse_from_rfc3339(text) {
            return Ok(Timestamp(at.timestamp_micros()));
        }
        let midnight = format!("{text} 00:00:00");
        ["%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M:%S%.f"]
            .iter()
            .find_map(|format| NaiveDateTime::parse_from_str(text, format).ok())
            .or_else(|| NaiveDateTime::parse_from_str(&midnight, "%Y-%m-%d %H:%M:%S").ok())
            .map(|at| Timestamp(at.and_utc().timestamp_micros()))
            .ok_or_else(|| format!("`{text}` is not a time; write 2026-11-23 or 2026-11-23T18:00:00Z"))
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() { serializer.collect_str(self) } else { self.0.serialize(serializer) }
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Timestamp, D::Error> {
        if deserializer.is_human_readable() {
            let text = String::deserialize(deserializer)?;
            text.parse().map_err(serde::de::Error::custom)
        } else {
            i64::deserialize(deserializer).map(Timestamp)
        }
    }
}

/// A half-open span of time: `start` belongs to it, `end` does not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Period {
    /// The first moment inside.
    pub start: Timestamp,
    /// The first moment outside.
    pub end: Timestamp,
}

impl Period {
    /// Everything that can be expressed.
    pub const ALL: Period = Period { start: Timestamp(i64::MIN), end: Timestamp(i64::MAX) };

    /// Whether `at` lies inside.
    #[must_use]
    pub fn contains(self, at: Timestamp) -> bool {
        self.start <= at && at < self.end
    }

    /// Length in microseconds; zero when the ends are the wrong way round.
    #[must_use]
    pub fn micros(self) -> u64 {
        self.end.micros_since(self.start)
    }

    /// The part both periods share, if it is longer than nothing.
    #[must_use]
    pub fn intersect(self, other: Period) -> Option<Period> {
        let both = Period { start: self.start.max(other.start), end: self.end.min(other.end) };
        (both.start < both.end).then_some(both)
    }
}

/// Where time comes from. The system's clocks implement it in `server/src/clock.rs`, simulations bring their own.
pub trait Clock: Send + Sync {
    /// The wall clock, which can jump.
    fn now(&self) -> Timestamp;
    /// Microseconds of a clock that never goes backwards, from an arbitrary start. For latencies.
    fn monotonic_us(&self) -> u64;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_usual_spellings_of_a_time() {
        let cases = [
            ("2023-11-16T18:15:46.680590Z", 1_700_158_546_680_590),
            ("2023-11-16 18:15:46.6805900", 1_700_158_546_680_590),
            ("2023-11-16T19:15:46+01:00", 1_700_158_546_000_000),
            ("2023-11-16", 1_700_092_800_000_000),
        ];
        for (text, micros) in cases {
            assert_eq!(text.parse::<Timestamp>().map(Timestamp::micros), Ok(micros), "{text}");
        }
        assert!("16.11.2023".parse::<Timestamp>().is_err());
    }

    #[test]
    fn periods_are_half_open() {
        let (a, b) = (Timestamp::from_micros(10), Timestamp::from_micros(20));
        let period = Period { start: a, end: b };
        assert!(period.contains(a) && !period.contains(b));
        assert_eq!(period.intersect(Period { start: b, end: Timestamp::from_micros(30) }), None);
        assert_eq!(period.micros(), 10);
    }
}
