//! What arrives when: recorded traces in the formats they are published in, hybrids of two of them, and made-up courses.
//! Every trace can be read again and again, always the same, without being held in memory.
//!
//! | format | first line | what is taken |
//! |---|---|---|
//! | Azure 2023 | `TIMESTAMP,ContextTokens,GeneratedTokens` | a request a line |
//! | Azure 2024, binned | `Time,TIMESTAMP` | requests in each bin: the second column is the count, whatever its heading says |
//! | Mooncake | `{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}` | a request a line, milliseconds, blocks of 512 tokens |
//! | own lines | `{"at": 0.25, "input_tokens": 512, "output_tokens": 128}` | a request a line, seconds since the start or a date |
//! | own table | `at,input_tokens,output_tokens` | the same as comma-separated values |

mod adapt;
mod bins;
mod lines;
mod mooncake;
mod rates;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ledger::Timestamp;

use super::request::{Arrival, Prefixes};
use super::startup::micros;
use adapt::Adapted;
use lines::{Format, LineFeed};
use rates::{Counts, RateFeed};

/// Why a trace cannot be read; names the place and what to do.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file cannot be read; check its name and rights.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A line does not say what it should; correct it.
    #[error("{}:{line}: {problem}; {fix}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: u64,
        /// What is wrong with it.
        problem: String,
        /// What would be right.
        fix: &'static str,
    },
    /// The first line is that of no known format; convert the file.
    #[error(
        "{}:1: `{first}` begins no trace that is known; write lines such as \
         {{\"at\": 0.25, \"input_tokens\": 512, \"output_tokens\": 128}} or a table headed at,input_tokens,output_tokens",
        path.display()
    )]
    Unknown {
        /// The file.
        path: PathBuf,
        /// How it begins.
        first: String,
    },
    /// The file has no requests, or the window leaves none; choose another.
    #[error("{}: there are no requests in it{}", path.display(), if *window { " between the times that were asked for" } else { "" })]
    Empty {
        /// The file.
        path: PathBuf,
        /// Whether a window was asked for.
        window: bool,
    },
    /// The file counts requests and does not say how long they are; name a trace to draw them from, or a length for all.
    #[error("{} counts requests without their tokens: name a trace with tokens to draw them from, or one length for all", path.display())]
    NeedsTokens {
        /// The file.
        path: PathBuf,
    },
}

/// What to make of a trace.
#[derive(Debug, Clone, PartialEq)]
pub struct TraceOptions {
    /// So many times as many requests.
    pub scale: f64,
    /// Seconds since the trace's start from which it is played.
    pub from_s: Option<f64>,
    /// Seconds since the trace's start at which it ends.
    pub to_s: Option<f64>,
    /// What lengths and places within a bin are drawn from.
    pub seed: u64,
    /// For a trace that only counts: one to draw (input, output) pairs from.
    pub pairs: Option<PathBuf>,
    /// For a trace that only counts: input and output tokens of every request.
    pub tokens: Option<(u32, u32)>,
}

impl Default for TraceOptions {
    fn default() -> TraceOptions {
        TraceOptions { scale: 1.0, from_s: None, to_s: None, seed: 1, pairs: None, tokens: None }
    }
}

/// A trace that can be read any number of times.
#[derive(Debug, Clone)]
pub struct Trace {
    name: String,
    notes: Vec<String>,
    start: Timestamp,
    prefixes: Arc<Prefixes>,
    source: Source,
    /// Microseconds since the source's start; `start` is that of the window.
    from_us: u64,
    to_us: u64,
    scale: f64,
    seed: u64,
}

#[derive(Debug, Clone)]
enum Source {
    Memory(Arc<[Arrival]>),
    Lines { path: PathBuf, format: Format, origin_us: i64 },
    Rates { counts: Counts, bin_us: u64, mix: Arc<[(u32, u32)]> },
}

impl Trace {
    /// Opens a file in whatever format its first line shows.
    ///
    /// # Errors
    /// [`TraceError`], of what is wrong with its beginning; what is wrong further down comes while reading.
    pub fn open(path: &Path, options: &TraceOptions) -> Result<Trace, TraceError> {
        let first = lines::first_line(path)?;
        match lines::detect(&first) {
            Some(lines::Detected::Lines(format)) => Trace::of_lines(path, format, options),
            Some(lines::Detected::Mooncake) => Trace::of_mooncake(path, options),
            Some(lines::Detected::Bins) => Trace::of_bins(path, options),
            None => Err(TraceError::Unknown { path: path.to_owned(), first: first.chars().take(60).collect() }),
        }
    }

    /// Draws the tokens of every request from `pairs`, a trace with tokens, at the rates of `bins`, one that only counts.
    ///
    /// # Errors
    /// As [`Trace::open`].
    pub fn hybrid(pairs: &Path, bins: &Path, options: &TraceOptions) -> Result<Trace, TraceError> {
        Trace::of_bins(bins, &TraceOptions { pairs: Some(pairs.to_owned()), ..options.clone() })
    }

    /// Requests that are known already, in order of arrival.
    #[must_use]
    pub fn of_arrivals(name: &str, start: Timestamp, arrivals: Vec<Arrival>, prefixes: Prefixes) -> Trace {
        let source = Source::Memory(arrivals.into());
        Trace { prefixes: Arc::new(prefixes), ..Trace::new(name, start, source, &TraceOptions::default()) }
    }

    /// Made-up requests: Poisson arrivals at `rates` requests a second, one for each `bin_s` seconds, their tokens drawn
    /// from `mix`.
    #[must_use]
    pub fn rates(name: &str, start: Timestamp, bin_s: f64, rates: &[f64], mix: &[(u32, u32)], seed: u64) -> Trace {
        let counts = Counts::Mean(rates.iter().map(|rate| rate * bin_s).collect());
        let mix = if mix.is_empty() { Arc::from([(1, 1)]) } else { Arc::from(mix) };
        let source = Source::Rates { counts, bin_us: micros(bin_s).max(1), mix };
        Trace::new(name, start, source, &TraceOptions { seed, ..TraceOptions::default() })
    }

    /// The same trace between two times, seconds since its start, with so many times as many requests.
    #[must_use]
    pub fn between(mut self, from_s: f64, to_s: f64, scale: f64) -> Trace {
        let from_us = self.from_us.saturating_add(micros(from_s));
        self.start = later(self.start, micros(from_s));
        self.to_us = self.to_us.min(self.from_us.saturating_add(micros(to_s)));
        self.from_us = from_us;
        self.scale *= scale;
        self
    }

    /// What it is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What a reader of results has to know about it.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// When it begins; 1970 when only distances are known.
    #[must_use]
    pub fn start(&self) -> Timestamp {
        self.start
    }

    /// What its prompts have in common.
    #[must_use]
    pub fn prefixes(&self) -> &Arc<Prefixes> {
        &self.prefixes
    }

    /// Its requests in order of arrival, numbered from 0, with times since [`Trace::start`].
    ///
    /// # Errors
    /// When the file cannot be opened again.
    pub fn arrivals(&self) -> Result<Arrivals, TraceError> {
        let feed = match &self.source {
            Source::Memory(arrivals) => Feed::Memory { arrivals: Arc::clone(arrivals), next: 0 },
            Source::Lines { path, format, origin_us } => {
                Feed::Lines(Box::new(LineFeed::open(path, format.clone(), *origin_us)?))
            }
            Source::Rates { counts, bin_us, mix } => {
                let counts = counts.clone();
                let feed = RateFeed::new(counts, *bin_us, Arc::clone(mix), self.scale, self.seed, self.from_us);
                return Ok(Arrivals { inner: Adapted::plain(Feed::Rates(Box::new(feed)), self.from_us, self.to_us) });
            }
        };
        Ok(Arrivals { inner: Adapted::scaled(feed, self.from_us, self.to_us, self.scale, self.seed) })
    }

    /// How long it lasts where that is known beforehand, microseconds; else it ends with its last request.
    #[must_use]
    pub fn len_us(&self) -> Option<u64> {
        let Source::Rates { counts, bin_us, .. } = &self.source else { return None };
        Some((counts.len() as u64 * bin_us).min(self.to_us).saturating_sub(self.from_us))
    }

    /// Up to `count` of its (input, output) pairs, evenly over all that it draws from or that come first.
    ///
    /// # Errors
    /// What reading it says.
    pub fn mix(&self, count: usize) -> Result<Vec<(u32, u32)>, TraceError> {
        if let Source::Rates { mix, .. } = &self.source {
            let every = mix.len().div_ceil(count.max(1)).max(1);
            return Ok(mix.iter().copied().step_by(every).collect());
        }
        let pair = |arrival: Arrival| (arrival.input_tokens, arrival.output_tokens);
        self.arrivals()?.take(count).map(|arrival| arrival.map(pair)).collect()
    }

    fn new(name: &str, start: Timestamp, source: Source, options: &TraceOptions) -> Trace {
        let from_us = options.from_s.map_or(0, micros);
        Trace {
            name: name.to_owned(),
            notes: Vec::new(),
            start: later(start, from_us),
            prefixes: Arc::default(),
            source,
            from_us,
            to_us: options.to_s.map_or(u64::MAX, micros),
            scale: options.scale,
            seed: options.seed,
        }
    }

    fn of_lines(path: &Path, format: Format, options: &TraceOptions) -> Result<Trace, TraceError> {
        let origin_us = LineFeed::open(path, format.clone(), 0)?.first_us()?;
        let origin_us = origin_us.ok_or_else(|| TraceError::Empty { path: path.to_owned(), window: false })?;
        // Small numbers are seconds since the start of the trace, large ones since 1970.
        let origin_us = if lines::is_relative(origin_us) { 0 } else { origin_us };
        let source = Source::Lines { path: path.to_owned(), format, origin_us };
        Trace::new(&file_name(path), Timestamp::from_micros(origin_us), source, options).checked(path, options)
    }

    fn of_mooncake(path: &Path, options: &TraceOptions) -> Result<Trace, TraceError> {
        let (arrivals, prefixes) = mooncake::read(path)?;
        let source = Source::Memory(arrivals.into());
        let trace = Trace::new(&file_name(path), Timestamp::default(), source, options);
        Trace { prefixes: Arc::new(prefixes), ..trace }.checked(path, options)
    }

    fn of_bins(path: &Path, options: &TraceOptions) -> Result<Trace, TraceError> {
        let bins = bins::read(path)?;
        let (mix, note): (Arc<[(u32, u32)]>, String) = match (&options.pairs, options.tokens) {
            (Some(pairs), _) => {
                let drawn = Trace::open(pairs, &TraceOptions::default())?;
                let pair = |arrival: Arrival| (arrival.input_tokens, arrival.output_tokens);
                let mix = drawn.arrivals()?.map(|arrival| arrival.map(pair)).collect::<Result<Arc<[_]>, _>>()?;
                let note = format!(
                    "a hybrid: {} pairs of input and output tokens of {} drawn at the rates of {}, arrivals spread evenly \
                     at random within each {} s (seed {})",
                    mix.len(),
                    file_name(pairs),
                    file_name(path),
                    bins.bin_us as f64 / 1e6,
                    options.seed
                );
                (mix, note)
            }
            (None, Some((input, output))) => {
                let note = format!(
                    "the rates of {} with {input} input and {output} output tokens for every request, arrivals spread \
                     evenly at random within each {} s (seed {})",
                    file_name(path),
                    bins.bin_us as f64 / 1e6,
                    options.seed
                );
                (Arc::from([(input.max(1), output.max(1))]), note)
            }
            (None, None) => return Err(TraceError::NeedsTokens { path: path.to_owned() }),
        };
        let source = Source::Rates { counts: Counts::Exact(bins.counts.into()), bin_us: bins.bin_us, mix };
        let trace = Trace::new(&file_name(path), bins.start, source, options);
        Trace { notes: vec![note], ..trace }.checked(path, options)
    }

    /// A trace without any request is a mistake in the window or in the file.
    fn checked(mut self, path: &Path, options: &TraceOptions) -> Result<Trace, TraceError> {
        let window = options.from_s.is_some() || options.to_s.is_some();
        if options.scale != 1.0 {
            self.notes.push(format!("{} times as many requests as recorded", options.scale));
        }
        match self.arrivals()?.next() {
            Some(first) => first.map(|_| self),
            None => Err(TraceError::Empty { path: path.to_owned(), window }),
        }
    }
}

/// The requests of a trace.
#[derive(Debug)]
pub struct Arrivals {
    inner: Adapted,
}

impl Iterator for Arrivals {
    type Item = Result<Arrival, TraceError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.inner.next()
    }
}

/// Where requests come from, with times since the source's start.
#[derive(Debug)]
enum Feed {
    Memory { arrivals: Arc<[Arrival]>, next: usize },
    Lines(Box<LineFeed>),
    Rates(Box<RateFeed>),
}

impl Iterator for Feed {
    type Item = Result<Arrival, TraceError>;

    fn next(&mut self) -> Option<Self::Item> {
        match self {
            Feed::Memory { arrivals, next } => {
                let arrival = arrivals.get(*next).copied();
                *next += 1;
                arrival.map(Ok)
            }
            Feed::Lines(feed) => feed.next(),
            Feed::Rates(feed) => feed.next().map(Ok),
        }
    }
}

fn later(start: Timestamp, us: u64) -> Timestamp {
    start.plus_micros(i64::try_from(us).unwrap_or(i64::MAX))
}

fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests;
