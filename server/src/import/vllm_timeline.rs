//! Per-request times of a vLLM engine: JSON Lines `request_id, input_toks, output_toks, arrival_time, queued_ts,
//! scheduled_ts, first_token_ts, last_token_ts`, in seconds.
//!
//! `arrival_time` is wall clock, the `_ts` are the engine's monotonic clock, which counts from an arbitrary start. Both
//! tick alike, so one offset maps one onto the other. No request can be queued before it arrived: the offset is at
//! least `arrival_time - queued_ts` for each of them, and the smallest offset that keeps all in order, the largest of
//! these differences, is used. It assumes that at least one request was queued the moment it arrived.
//!
//! The engine's times have these places in the timeline: admitted and sent are when the engine queued the request, and
//! `queued_us` is how long it waited from there until it was scheduled into a batch.

use std::io::BufRead;

use ledger::decimal::parse_scaled;
use ledger::{
    Attempt, AttemptId, Context, Label, Operation, Outcome, Route, Source, Timeline, Timestamp, TokenUsage,
    UsageQuality,
};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::lines::{Lines, json_mistake};
use super::{Ids, Settings, UNPRICED_YET};

const KIND: &str = "vllm-timeline";
/// 1 January 2000 in seconds: an earlier arrival is no wall clock.
const WALL_CLOCK_SECONDS_MIN: i64 = 946_684_800;

/// Times keep their digits: a wall clock in a binary float is wrong in the seventh place.
#[derive(Debug, Deserialize)]
struct Row<'a> {
    request_id: String,
    input_toks: u32,
    output_toks: u32,
    #[serde(borrow)]
    arrival_time: &'a RawValue,
    #[serde(borrow)]
    queued_ts: &'a RawValue,
    #[serde(borrow)]
    scheduled_ts: &'a RawValue,
    #[serde(borrow)]
    first_token_ts: &'a RawValue,
    #[serde(borrow)]
    last_token_ts: &'a RawValue,
}

/// The times of a row in microseconds, each in its own clock.
#[derive(Debug, Clone, Copy)]
struct Times {
    arrival: i64,
    queued: i64,
    scheduled: i64,
    first_token: i64,
    last_token: i64,
}

/// Reads rows of one file, whose offset between the clocks is known.
#[derive(Debug)]
pub struct Rows {
    context: Context,
    route: Route,
    source: Source,
    offset_us: i64,
}

impl Rows {
    /// Rows with what the settings say about them; reads `input` once for the offset between the clocks.
    ///
    /// # Errors
    /// When the input cannot be read.
    pub fn new(settings: &Settings, input: impl BufRead) -> anyhow::Result<Rows> {
        let name: Label = settings.name.as_str().into();
        Ok(Rows {
            context: Context { consumer: Some(name.clone()), team: Some(name), ..Context::default() },
            route: Route {
                operation: Operation::Completions,
                provider: settings.provider.as_deref().unwrap_or("self_hosted").into(),
                upstream: KIND.into(),
                pool: settings.pool.as_deref().map(Label::from),
                deployment: settings.pool.as_ref().and(settings.model.as_deref()).map(Label::from),
                request_model: settings.model.as_deref().map(Label::from),
                streamed: true,
                ..Route::default()
            },
            source: Source::Import(format!("{KIND}:{}", settings.name).into()),
            offset_us: offset(input)?,
        })
    }

    /// Reads one line.
    ///
    /// # Errors
    /// Why it is no row.
    pub fn row(&self, line: &str, ids: &mut Ids) -> Result<Attempt, String> {
        let (row, times) = parse(line)?;
        let received_at = Timestamp::from_micros(times.arrival);
        let after =
            |monotonic: i64| u64::try_from(monotonic.saturating_add(self.offset_us).saturating_sub(times.arrival)).ok();
        let finished_us = after(times.last_token).ok_or("last_token_ts lies before arrival_time")?;
        let content = format!("{}\n{}\n{}\n{}", row.request_id, times.arrival, row.input_toks, row.output_toks);
        let request = ids.of_row(KIND, received_at, content.as_bytes());
        Ok(Attempt {
            id: AttemptId { request, number: 0 },
            source: self.source.clone(),
            context: self.context.clone(),
            route: Route { response_id: Some(label(&row.request_id)), ..self.route.clone() },
            timeline: Timeline {
                received_at,
                admitted_us: after(times.queued),
                sent_us: after(times.queued),
                queued_us: u64::try_from(times.scheduled - times.queued).ok(),
                first_byte_us: after(times.first_token),
                first_token_us: after(times.first_token),
                last_token_us: Some(finished_us),
                finished_us,
                ..Timeline::default()
            },
            outcome: Outcome::Completed,
            status: None,
            usage: TokenUsage { input: row.input_toks.into(), output: row.output_toks.into(), ..TokenUsage::default() },
            usage_quality: UsageQuality::Reported,
            charge: UNPRICED_YET,
        })
    }
}

/// The largest `arrival_time - queued_ts` of the good rows.
fn offset(input: impl BufRead) -> std::io::Result<i64> {
    let mut lines = Lines::new(input);
    let mut offset: Option<i64> = None;
    while let Some(line) = lines.next_line()? {
        let Some((_, times)) = line.text.as_deref().ok().and_then(|text| parse(text).ok()) else { continue };
        let difference = times.arrival.saturating_sub(times.queued);
        offset = Some(offset.map_or(difference, |so_far| so_far.max(difference)));
    }
    Ok(offset.unwrap_or(0))
}

fn parse(line: &str) -> Result<(Row<'_>, Times), String> {
    let row: Row<'_> = serde_json::from_str(line).map_err(|error| json_mistake(&error))?;
    let times = Times {
        arrival: micros("arrival_time", row.arrival_time)?,
        queued: micros("queued_ts", row.queued_ts)?,
        scheduled: micros("scheduled_ts", row.scheduled_ts)?,
        first_token: micros("first_token_ts", row.first_token_ts)?,
        last_token: micros("last_token_ts", row.last_token_ts)?,
    };
    if times.arrival < WALL_CLOCK_SECONDS_MIN * 1_000_000 {
        return Err(format!("arrival_time {} is not a wall-clock time in seconds since 1970", row.arrival_time));
    }
    if ![times.queued, times.scheduled, times.first_token, times.last_token].is_sorted() {
        return Err("queued_ts, scheduled_ts, first_token_ts and last_token_ts are not in order".to_owned());
    }
    Ok((row, times))
}

/// Seconds with any number of digits to microseconds, rounded half up.
fn micros(name: &str, seconds: &RawValue) -> Result<i64, String> {
    const FINER: u32 = 12;
    let wrong = || format!("{name} {seconds} is not a time in seconds");
    let fine = parse_scaled(seconds.get(), 6 + FINER).map_err(|_| wrong())?;
    let unit = 10i128.pow(FINER);
    i64::try_from((fine + unit / 2).div_euclid(unit)).map_err(|_| wrong())
}

fn label(text: &str) -> Label {
    let mut end = text.len().min(ledger::context::LABEL_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::ImportKind;

    const SAMPLE: &str = r#"{"request_id": "r-0", "input_toks": 100, "output_toks": 5, "arrival_time": 1777142984.5786855, "queued_ts": 500.01, "scheduled_ts": 500.02, "first_token_ts": 500.5, "last_token_ts": 501.25}
{"request_id": "r-1", "input_toks": 7, "output_toks": 1, "arrival_time": 1777142985.5786855, "queued_ts": 501.0, "scheduled_ts": 501.0, "first_token_ts": 501.5, "last_token_ts": 501.5}"#;

    fn rows() -> Rows {
        let settings = Settings {
            kind: ImportKind::VllmTimeline,
            name: "run".to_owned(),
            model: Some("m".to_owned()),
            provider: None,
            pool: Some("shared".to_owned()),
        };
        Rows::new(&settings, SAMPLE.as_bytes()).unwrap()
    }

    #[test]
    fn one_offset_maps_the_engines_clock_onto_the_wall() {
        let (rows, mut ids) = (rows(), Ids::default());
        let attempts: Vec<Attempt> = SAMPLE.lines().map(|line| rows.row(line, &mut ids).unwrap()).collect();
        assert_eq!(attempts[0].timeline.received_at.micros(), 1_777_142_984_578_686);
        assert_eq!(attempts[0].timeline.sent_us, Some(10_000), "the second request was queued on arrival");
        assert_eq!(attempts[0].timeline.queued_us, Some(10_000));
        assert_eq!(attempts[0].timeline.first_token_us, Some(500_000));
        assert_eq!(attempts[0].timeline.finished_us, 1_250_000);
        assert_eq!((attempts[1].timeline.sent_us, attempts[1].timeline.queued_us), (Some(0), Some(0)));
    }

    #[test]
    fn bad_rows_say_why() {
        let rows = rows();
        let cases = [
            ("{", "EOF"),
            (r#"{"request_id": "a"}"#, "input_toks"),
            (&SAMPLE.lines().next().unwrap().replace("100", "-1"), "-1"),
            (&SAMPLE.lines().next().unwrap().replace("1777142984.5786855", "12.5"), "wall-clock"),
            (&SAMPLE.lines().next().unwrap().replace("501.25", "400"), "not in order"),
            (&SAMPLE.lines().next().unwrap().replace("501.25", "\"x\""), "last_token_ts"),
        ];
        for (line, part) in cases {
            let reason = rows.row(line, &mut Ids::default()).unwrap_err();
            assert!(reason.contains(part), "{line}: {reason}");
        }
    }
}
