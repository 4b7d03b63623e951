//! Traces with a request on each line: Azure's of 2023, and our own as JSON lines or as a table.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use ledger::Timestamp;
use serde::Deserialize;

use super::TraceError;
use crate::sim::request::Arrival;

/// A longer line is no request.
const LINE_BYTES_MAX: u64 = 1 << 20;
/// Numbers below this are seconds since a trace's start, those above since 1970 (this one is in 1973).
const RELATIVE_S_MAX: i64 = 100_000_000;

/// How a line is to be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Format {
    /// A JSON object a line.
    Json,
    /// Comma-separated values: which columns hold the time, the input and the output tokens.
    Table { at: usize, input: usize, output: usize },
}

/// What a first line shows.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Detected {
    Lines(Format),
    Mooncake,
    Bins,
}

/// What is wrong with a line.
#[derive(Debug)]
pub(super) struct Fault {
    problem: String,
    fix: &'static str,
}

impl Fault {
    pub fn at(self, path: &Path, line: u64) -> TraceError {
        TraceError::Line { path: path.to_owned(), line, problem: self.problem, fix: self.fix }
    }
}

pub(super) fn bad(problem: &str, fix: &'static str) -> Fault {
    Fault { problem: problem.to_owned(), fix }
}

/// A number of tokens that a request can have.
pub(super) fn tokens(count: u64, what: &str) -> Result<u32, Fault> {
    match u32::try_from(count) {
        Ok(0) => Err(bad(&format!("`{what}` is 0"), "leave out requests without tokens")),
        Ok(count) => Ok(count),
        Err(_) => Err(bad(&format!("`{what}` is {count}"), "a request has fewer than four billion tokens")),
    }
}

/// Whether a time is a distance from the start.
pub(super) fn is_relative(first_us: i64) -> bool {
    first_us < RELATIVE_S_MAX * 1_000_000
}

/// Which format a first line begins.
pub(super) fn detect(first: &str) -> Option<Detected> {
    if first.starts_with('{') {
        let keys = ["\"timestamp\"", "\"input_length\"", "\"output_length\""];
        let mooncake = keys.iter().all(|key| first.contains(key));
        let own = serde_json::from_str::<OwnLine>(first).is_ok() || first.contains("\"input_tokens\"");
        return if mooncake { Some(Detected::Mooncake) } else { own.then_some(Detected::Lines(Format::Json)) };
    }
    let headings: Vec<String> =
        first.split(',').map(|heading| heading.trim().trim_matches('"').to_lowercase()).collect();
    if headings == ["time", "timestamp"] {
        return Some(Detected::Bins);
    }
    let find = |names: &[&str]| headings.iter().position(|heading| names.contains(&heading.as_str()));
    let at = find(&["at", "arrival", "arrival_s", "arrival_time", "timestamp"])?;
    let input = find(&["input_tokens", "prompt_tokens", "contexttokens"])?;
    let output = find(&["output_tokens", "completion_tokens", "generatedtokens"])?;
    Some(Detected::Lines(Format::Table { at, input, output }))
}

/// The first line of a file.
pub(super) fn first_line(path: &Path) -> Result<String, TraceError> {
    let mut lines = Lines::open(path)?;
    let empty = || TraceError::Empty { path: path.to_owned(), window: false };
    Ok(lines.next_line()?.ok_or_else(empty)?.to_owned())
}

/// The lines of a file that are not empty, with their numbers.
#[derive(Debug)]
pub(super) struct Lines {
    path: PathBuf,
    reader: BufReader<File>,
    number: u64,
    text: String,
}

impl Lines {
    pub fn open(path: &Path) -> Result<Lines, TraceError> {
        let file = File::open(path).map_err(|source| TraceError::Read { path: path.to_owned(), source })?;
        let reader = BufReader::with_capacity(1 << 16, file);
        Ok(Lines { path: path.to_owned(), reader, number: 0, text: String::new() })
    }

    pub fn number(&self) -> u64 {
        self.number
    }

    pub fn next_line(&mut self) -> Result<Option<&str>, TraceError> {
        loop {
            self.text.clear();
            self.number += 1;
            let read = (&mut self.reader).take(LINE_BYTES_MAX).read_line(&mut self.text);
            let bytes = read.map_err(|source| match source.kind() {
                std::io::ErrorKind::InvalidData => {
                    bad("is not text", "save the file as UTF-8").at(&self.path, self.number)
                }
                _ => TraceError::Read { path: self.path.clone(), source },
            })?;
            if bytes == 0 {
                return Ok(None);
            }
            if bytes as u64 == LINE_BYTES_MAX {
                return Err(bad("is longer than a megabyte", "write one request a line").at(&self.path, self.number));
            }
            if !self.text.trim().is_empty() {
                // A mark of byte order is no part of the first heading.
                return Ok(Some(self.text.trim().trim_start_matches('\u{feff}')));
            }
        }
    }
}

/// Reads one request after the other.
#[derive(Debug)]
pub(super) struct LineFeed {
    lines: Lines,
    format: Format,
    origin_us: i64,
    before_us: i64,
    failed: bool,
}

impl LineFeed {
    pub fn open(path: &Path, format: Format, origin_us: i64) -> Result<LineFeed, TraceError> {
        let mut lines = Lines::open(path)?;
        if matches!(format, Format::Table { .. }) {
            lines.next_line()?;
        }
        Ok(LineFeed { lines, format, origin_us, before_us: i64::MIN, failed: false })
    }

    /// The first request's time as it is written, microseconds.
    pub fn first_us(&mut self) -> Result<Option<i64>, TraceError> {
        Ok(self.read()?.map(|(at_us, ..)| at_us))
    }

    pub fn next(&mut self) -> Option<Result<Arrival, TraceError>> {
        if self.failed {
            return None;
        }
        let request = self.read().transpose()?;
        self.failed = request.is_err();
        Some(request.map(|(at_us, input_tokens, output_tokens)| Arrival {
            at_us: at_us.abs_diff(self.origin_us),
            input_tokens,
            output_tokens,
            ..Arrival::default()
        }))
    }

    fn read(&mut self) -> Result<Option<(i64, u32, u32)>, TraceError> {
        let Some(text) = self.lines.next_line()? else { return Ok(None) };
        let parsed = match self.format {
            Format::Json => json(text),
            Format::Table { at, input, output } => table(text, at, input, output),
        };
        let in_order = parsed.and_then(|request| {
            if request.0 < self.before_us.max(self.origin_us) {
                return Err(bad("arrives before the line before", "sort the file by arrival"));
            }
            Ok(request)
        });
        let request = in_order.map_err(|fault| fault.at(&self.lines.path, self.lines.number))?;
        self.before_us = request.0;
        Ok(Some(request))
    }
}

#[derive(Deserialize)]
struct OwnLine {
    #[serde(alias = "arrival", alias = "arrival_s", alias = "arrival_time", alias = "timestamp")]
    at: When,
    #[serde(alias = "prompt_tokens", alias = "input_toks")]
    input_tokens: u64,
    #[serde(alias = "completion_tokens", alias = "output_toks")]
    output_tokens: u64,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum When {
    Seconds(f64),
    Date(String),
}

fn json(text: &str) -> Result<(i64, u32, u32), Fault> {
    const FIX: &str = r#"write {"at": 0.25, "input_tokens": 512, "output_tokens": 128}"#;
    let line: OwnLine = serde_json::from_str(text).map_err(|error| bad(&error.to_string(), FIX))?;
    let at_us = match &line.at {
        When::Seconds(seconds) => from_seconds(*seconds)?,
        When::Date(date) => from_date(date)?,
    };
    Ok((at_us, tokens(line.input_tokens, "input_tokens")?, tokens(line.output_tokens, "output_tokens")?))
}

fn table(text: &str, at: usize, input: usize, output: usize) -> Result<(i64, u32, u32), Fault> {
    const FIX: &str = "write what the first line announces";
    let field = |wanted: usize| {
        let value = text.split(',').nth(wanted).map(|value| value.trim().trim_matches('"'));
        value.ok_or_else(|| bad(&format!("has no column {}", wanted + 1), FIX))
    };
    let count = |value: &str, what: &str| {
        let count = value.parse().map_err(|_| bad(&format!("`{value}` is no number of tokens"), FIX))?;
        tokens(count, what)
    };
    let time = field(at)?;
    let at_us = match time.parse::<f64>() {
        Ok(seconds) => from_seconds(seconds)?,
        Err(_) => from_date(time)?,
    };
    Ok((at_us, count(field(input)?, "input tokens")?, count(field(output)?, "output tokens")?))
}

fn from_date(text: &str) -> Result<i64, Fault> {
    let at: Timestamp = text.parse().map_err(|problem: String| bad(&problem, "or write seconds since the start"))?;
    Ok(at.micros())
}

fn from_seconds(seconds: f64) -> Result<i64, Fault> {
    let us = crate::sim::startup::micros(seconds);
    if seconds.is_finite() && seconds >= 0.0 && us < u64::MAX / 4 {
        return Ok(i64::try_from(us).unwrap_or(i64::MAX));
    }
    Err(bad(&format!("`{seconds}` is no time"), "write seconds since the start"))
}
