//! Reads what an answer used while it passes: never a byte changed, never a chunk delayed.
//!
//! Feed an [`AnswerMeter`] every chunk of an answer and forward what it releases. When a chunk ends the answer, finish first,
//! write the record, and only then let the chunk go.

mod body;
pub mod count;
mod events;
pub mod exercise;
mod scan;
mod sse;

use bytes::Bytes;
use ledger::{Operation, ServiceClass, TokenGaps, TokenUsage, UsageQuality};

pub use body::BODY_BYTES_MAX;
pub use sse::{EVENT_BYTES_MAX, HELD_EVENT_BYTES_MAX};

use crate::provider::Kind;
use body::Body;
use events::Reader;
use sse::Sse;

/// Meters one answer of an upstream.
#[derive(Debug)]
pub struct AnswerMeter {
    reader: Reader,
    kind: Kind,
    operation: Operation,
    streamed: bool,
    form: Form,
    requested_model: Option<String>,
    times: TokenTimes,
}

#[derive(Debug)]
enum Form {
    /// Not sure yet whether the stream can be read: its first bytes have not come.
    Unopened {
        hide: bool,
    },
    Stream(Box<Sse>),
    Body(Body),
    Unread,
}

/// What may go to the client now.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Fed {
    /// Slices of the chunks that came in, in order.
    pub release: Vec<Bytes>,
    /// Whether the stream's last event is among them. Bodies and Gemini's streams never say so: they end where they end.
    pub ends: bool,
}

/// How far an answer got, counted without reading anything twice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SoFar {
    /// When the first chunk with text came, on the caller's scale.
    pub first_token_us: Option<u64>,
    /// When the last chunk with text came.
    pub last_token_us: Option<u64>,
    /// The gaps between chunks with text.
    pub gaps: TokenGaps,
    /// Events with text, or the text's length in tokens where events carry more than one. No tokenizer runs for this.
    pub output_tokens: u64,
}

/// What an answer used and how it went.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Metered {
    /// Bytes that were held back and must still go to the client.
    pub trailing: Vec<Bytes>,
    /// Tokens by kind.
    pub usage: TokenUsage,
    /// How they are known.
    pub quality: UsageQuality,
    /// The model that answered.
    pub response_model: Option<String>,
    /// The upstream's id of the answer.
    pub response_id: Option<String>,
    /// The class of service that the answer names.
    pub service_class: Option<ServiceClass>,
    /// When the first chunk with text came, on the caller's scale. Only streams have tokens one by one.
    pub first_token_us: Option<u64>,
    /// When the last chunk with text came.
    pub last_token_us: Option<u64>,
    /// The gaps between chunks with text.
    pub gaps: TokenGaps,
    /// Microseconds that the request waited in the engine's queue, when the engine says so.
    pub queued_us: Option<u64>,
    /// Bytes of text delivered, JSON escapes undone.
    pub delivered_text_bytes: u64,
    /// Events that carried text.
    pub delivered_deltas: u64,
    /// Output tokens counted from the text, when the provider did not say all.
    pub delivered_tokens_counted: Option<u64>,
    /// Whether the end of the answer was seen, whatever it said.
    pub complete: bool,
    /// The code or type of an error inside an answer that began well. Never its message.
    pub error: Option<String>,
    /// What was wrong with the answer's form. Never quotes it.
    pub broken: Option<String>,
}

#[derive(Debug, Default)]
struct TokenTimes {
    first_us: Option<u64>,
    last_us: Option<u64>,
    gaps: TokenGaps,
}

impl AnswerMeter {
    /// A meter for the answer of an upstream of this kind. `streamed` says that the answer's type is
    /// `text/event-stream`; `hide_usage_chunk` that we asked for a usage chunk which the client did not.
    #[must_use]
    pub fn new(kind: Kind, operation: Operation, streamed: bool, hide_usage_chunk: bool) -> AnswerMeter {
        AnswerMeter {
            reader: Reader::new(kind, operation, streamed),
            kind,
            operation,
            streamed,
            form: if streamed { Form::Unopened { hide: hide_usage_chunk } } else { Form::Body(Body::default()) },
            requested_model: None,
            times: TokenTimes::default(),
        }
    }

    /// Names the model that was asked, whose vocabulary is used if the answer names none.
    #[must_use]
    pub fn with_model(mut self, requested: Option<&str>) -> AnswerMeter {
        self.requested_model = requested.map(str::to_owned);
        self
    }

    /// A meter that forwards everything and reads nothing: for answers that repeat what is booked already, and for
    /// encodings we cannot read. `note` says why, if something is wrong.
    #[must_use]
    pub fn unmetered(note: Option<String>) -> AnswerMeter {
        let mut meter = AnswerMeter::new(Kind::OpenAi, Operation::Other, false, false);
        meter.form = Form::Unread;
        meter.reader.broken = note;
        meter
    }

    /// Takes a chunk that came at `at_us` and says what may go to the client.
    pub fn feed(&mut self, chunk: Bytes, at_us: u64) -> Fed {
        if let (Form::Unopened { hide }, false) = (&self.form, chunk.is_empty()) {
            // The first byte alone decides, because a stream means the same wherever it is cut; no text starts like gzip.
            self.form = if chunk.first() == Some(&body::GZIP_FIRST_BYTE) {
                self.reader.note(|| "the stream is gzip-encoded and was not read".to_owned());
                Form::Unread
            } else {
                Form::Stream(Box::new(Sse::new(*hide)))
            };
        }
        match &mut self.form {
            Form::Stream(sse) => {
                let passed = sse.feed(&chunk, &mut self.reader);
                self.times.note(passed.tokens, at_us);
                return Fed { release: passed.release, ends: passed.ends };
            }
            Form::Body(body) => body.feed(&chunk),
            Form::Unopened { .. } | Form::Unread => {}
        }
        Fed { release: if chunk.is_empty() { Vec::new() } else { vec![chunk] }, ends: false }
    }

    /// How far the answer got. Of a body that comes in one piece nothing is known before its end.
    #[must_use]
    pub fn so_far(&self) -> SoFar {
        SoFar {
            first_token_us: self.times.first_us,
            last_token_us: self.times.last_us,
            gaps: self.times.gaps,
            output_tokens: count::passed(self.kind, &self.reader.delivered),
        }
    }

    /// The end of the answer, or as far as it got. `input_tokens` counts the request's text; it is called only when
    /// the provider did not report the input. Where nothing ran (an error status), give `|| None`.
    pub fn finish(&mut self, at_us: u64, input_tokens: impl FnOnce() -> Option<u64>) -> Metered {
        let mut trailing = Vec::new();
        match &mut self.form {
            Form::Stream(sse) => {
                let tokens;
                (trailing, tokens) = sse.finish(&mut self.reader);
                self.times.note(tokens, at_us);
            }
            Form::Body(body) => {
                body.finish(&mut self.reader);
                self.form = Form::Unread;
            }
            Form::Unopened { .. } | Form::Unread => {}
        }
        let counts = self.counts(input_tokens);
        let reader = &self.reader;
        Metered {
            trailing,
            usage: counts.usage,
            quality: counts.quality,
            response_model: reader.model.clone(),
            response_id: reader.id.clone(),
            service_class: reader.service_class,
            first_token_us: self.times.first_us,
            last_token_us: self.times.last_us,
            gaps: self.times.gaps,
            queued_us: reader.queued_us,
            delivered_text_bytes: reader.delivered.bytes,
            delivered_deltas: reader.delivered.deltas,
            delivered_tokens_counted: counts.delivered,
            complete: reader.complete(),
            error: reader.error.clone(),
            broken: reader.broken.clone(),
        }
    }

    fn counts(&self, input_tokens: impl FnOnce() -> Option<u64>) -> Counts {
        if matches!(self.operation, Operation::CountTokens | Operation::Models) {
            // Known to use nothing.
            return Counts { usage: TokenUsage::default(), quality: UsageQuality::Reported, delivered: None };
        }
        if self.reader.pending {
            // What a background response will use is unknown: neither nothing nor just its input.
            return Counts { usage: TokenUsage::default(), quality: UsageQuality::Missing, delivered: None };
        }
        let read = self.reader.reading();
        let (reading, last_word) = read.unwrap_or_default();
        if read.is_some() && last_word && reading.input_known && reading.output_known {
            return Counts { usage: reading.usage, quality: UsageQuality::Reported, delivered: None };
        }
        let mut usage = reading.usage;
        let input = if reading.input_known || self.operation == Operation::Other { None } else { input_tokens() };
        usage.input = usage.input.saturating_add(input.unwrap_or(0));
        let mut delivered = None;
        if self.reader.delivered.bytes > 0 {
            let model = self.reader.model.as_deref().or(self.requested_model.as_deref());
            let counted = count::delivered(self.kind, self.streamed, model, &self.reader.delivered);
            // What the provider counted so far is a lower bound, and so is what the client got.
            usage.output = usage.output.saturating_add(counted.saturating_sub(usage.output_tokens()));
            delivered = Some(counted);
        }
        let known = read.is_some() || input.is_some() || delivered.is_some();
        Counts { usage, quality: if known { UsageQuality::Estimated } else { UsageQuality::Missing }, delivered }
    }
}

struct Counts {
    usage: TokenUsage,
    quality: UsageQuality,
    delivered: Option<u64>,
}

impl TokenTimes {
    fn note(&mut self, tokens: bool, at_us: u64) {
        if !tokens {
            return;
        }
        if let Some(last_us) = self.last_us {
            let gap = at_us.saturating_sub(last_us);
            self.gaps.count = self.gaps.count.saturating_add(1);
            self.gaps.total_us = self.gaps.total_us.saturating_add(gap);
            self.gaps.max_us = self.gaps.max_us.max(gap);
        }
        self.first_us.get_or_insert(at_us);
        self.last_us = Some(at_us);
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
