//! By weekday and hour, UTC: what people write who know their week.

use std::fmt;

use ledger::Timestamp;

use super::PolicyError;
use super::parameters::parameters;
use crate::scale::forecast::whole;
use crate::scale::observe::{Decision, Observation};

const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
const MINUTE_US: i64 = 60_000_000;
const DAY_MINUTES: i64 = 1_440;

/// Spans of the week with their replicas, as `mon-fri/08:00-18:00=12`; the first that holds the moment decides.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Schedule {
    spans: Vec<Span>,
    /// Replicas outside of every span; 0 is the floor.
    otherwise: f64,
}

/// Some hours of some days.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    days: (usize, usize),
    /// Minutes of the day, the second one excluded. A span that ends before it begins goes on past midnight.
    minutes: (i64, i64),
    replicas: u32,
}

parameters!(Schedule "schedule" { otherwise "else" 0.0..=1e6 "replicas outside of every span" });

impl Schedule {
    /// Its spans.
    #[must_use]
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// Adds a span such as `mon-fri/08:00-18:00` with its replicas.
    ///
    /// # Errors
    /// When either is not written like that.
    pub fn add(&mut self, span: &str, replicas: &str) -> Result<(), PolicyError> {
        let parsed = parse(span.trim()).zip(replicas.trim().parse().ok());
        let ((days, minutes), replicas) = parsed.ok_or_else(|| PolicyError::Value {
            policy: "schedule",
            name: span.into(),
            value: replicas.into(),
            expected: "written mon-fri/08:00-18:00=12 (UTC)".into(),
        })?;
        self.spans.push(Span { days, minutes, replicas });
        Ok(())
    }

    /// The replicas of this hour.
    #[must_use]
    pub fn desired(&self, observation: &Observation, now: Timestamp) -> Decision {
        let minute = now.micros().div_euclid(MINUTE_US);
        // 1 January 1970 was a Thursday.
        let day = usize::try_from((minute.div_euclid(DAY_MINUTES) + 3).rem_euclid(7)).unwrap_or(0);
        let minute = minute.rem_euclid(DAY_MINUTES);
        let span = self.spans.iter().find(|span| span.holds(day, minute));
        let (replicas, reason) = match span {
            Some(span) => (span.replicas, format!("scheduled: {span}")),
            None => {
                let otherwise = whole(self.otherwise).max(observation.bounds.floor);
                (otherwise, format!("scheduled: {otherwise} at all other times"))
            }
        };
        Decision { replicas, reasons: vec![reason], planned: true, ..Decision::default() }
    }
}

impl Span {
    fn holds(&self, day: usize, minute: i64) -> bool {
        let (from, to) = self.minutes;
        if from < to {
            return self.on(day) && (from..to).contains(&minute);
        }
        (self.on(day) && minute >= from) || (self.on((day + 6) % 7) && minute < to)
    }

    fn on(&self, day: usize) -> bool {
        let (first, last) = self.days;
        if first <= last { (first..=last).contains(&day) } else { day >= first || day <= last }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Span { days: (first, last), minutes: (from, to), replicas } = self;
        write!(f, "{}", DAYS[*first])?;
        if first != last {
            write!(f, "-{}", DAYS[*last])?;
        }
        write!(f, "/{:02}:{:02}-{:02}:{:02}={replicas}", from / 60, from % 60, to / 60, to % 60)
    }
}

type Parsed = ((usize, usize), (i64, i64));

fn parse(text: &str) -> Option<Parsed> {
    let (days, hours) = text.split_once('/')?;
    let day = |name: &str| DAYS.iter().position(|day| *day == name);
    let (first, last) = days.split_once('-').unwrap_or((days, days));
    let (from, to) = hours.split_once('-')?;
    Some(((day(first)?, day(last)?), (minute_of_day(from)?, minute_of_day(to)?)))
}

fn minute_of_day(text: &str) -> Option<i64> {
    let (hours, minutes) = text.split_once(':')?;
    let (hours, minutes): (i64, i64) = (hours.parse().ok()?, minutes.parse().ok()?);
    ((0..=24).contains(&hours) && (0..60).contains(&minutes) && hours * 60 + minutes <= DAY_MINUTES)
        .then_some(hours * 60 + minutes)
}
