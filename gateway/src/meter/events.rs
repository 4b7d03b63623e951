//! Reads the events of one answer, or its whole body, and remembers what it says about itself.

use std::borrow::Cow;

use ledger::{Operation, ServiceClass};

use super::scan::{Glance, glance};
use crate::provider::{Answer, Envelope, Kind, RawUsage, Reading};

/// Most text kept for counting; what a longer answer used is extrapolated from its beginning.
pub(super) const TEXT_BYTES_MAX: usize = 64 * 1024;

/// Events at the start of a stream in which the answer's id and model are looked for.
const HEAD_EVENTS: u8 = 4;

/// What reached the client, for counting when the provider does not.
#[derive(Debug, Default)]
pub(super) struct Delivered {
    /// The beginning of the text. It lives as long as the stream and is never written anywhere.
    pub text: String,
    /// Bytes of all of it.
    pub bytes: u64,
    /// Events that carried text.
    pub deltas: u64,
}

/// What one event meant.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// It carried text.
    pub tokens: bool,
    /// It was the last of its stream.
    pub terminal: bool,
    /// It carried nothing but usage.
    pub only_usage: bool,
}

/// The memory of one answer.
#[derive(Debug)]
pub(super) struct Reader {
    kind: Kind,
    operation: Operation,
    streamed: bool,
    heads: u8,
    usage_json: Vec<u8>,
    usage: Option<RawUsage>,
    usage_final: bool,
    finished: bool,
    /// The body is a receipt: the answer is made later and read apart.
    pub pending: bool,
    pub terminal: bool,
    pub id: Option<String>,
    pub model: Option<String>,
    pub service_class: Option<ServiceClass>,
    pub error: Option<String>,
    pub broken: Option<String>,
    pub queued_us: Option<u64>,
    pub delivered: Delivered,
}

impl Reader {
    pub fn new(kind: Kind, operation: Operation, streamed: bool) -> Reader {
        Reader {
            kind,
            operation,
            streamed,
            heads: 0,
            usage_json: Vec::new(),
            usage: None,
            usage_final: false,
            finished: false,
            pending: false,
            terminal: false,
            id: None,
            model: None,
            service_class: None,
            error: None,
            broken: None,
            queued_us: None,
            delivered: Delivered::default(),
        }
    }

    /// What was asked of the model.
    pub fn operation(&self) -> Operation {
        self.operation
    }

    /// The data of one event of a stream.
    pub fn event(&mut self, data: &[u8]) -> Seen {
        let data = data.trim_ascii();
        if data == b"[DONE]" {
            self.terminal = true;
            // Usage that came before a proper end needs no further sign that it is complete.
            return Seen { terminal: true, ..Seen::default() };
        }
        if data.is_empty() {
            return Seen::default();
        }
        let look = self.look(data);
        let seen = Seen { tokens: look.tokens, ..Seen::default() };
        let head = self.heads < HEAD_EVENTS && (self.id.is_none() || self.model.is_none());
        if !look.worth_parsing && !head {
            return seen;
        }
        self.heads = self.heads.saturating_add(1);
        match Envelope::parse(data) {
            Ok(envelope) => {
                let answer = self.kind.adapter().answer(self.operation, &envelope);
                let seen = Seen { terminal: answer.terminal, only_usage: answer.only_usage, ..seen };
                self.absorb(answer);
                seen
            }
            Err(error) => {
                self.note(|| format!("an event of the stream is not valid JSON: {}", reason(&error)));
                seen
            }
        }
    }

    /// A whole body: one JSON object, or Gemini's list of them.
    pub fn body(&mut self, json: &[u8]) -> Result<(), serde_json::Error> {
        self.look(json);
        if json.trim_ascii_start().first() == Some(&b'[') {
            let parts: Vec<&serde_json::value::RawValue> = serde_json::from_slice(json)?;
            for part in parts.into_iter().filter(|part| part.get().starts_with('{')) {
                let envelope = Envelope::parse(part.get().as_bytes())?;
                self.absorb(self.kind.adapter().answer(self.operation, &envelope));
            }
        } else {
            let envelope = Envelope::parse(json)?;
            self.pending = self.operation == Operation::Responses && envelope.is_pending();
            self.absorb(self.kind.adapter().answer(self.operation, &envelope));
        }
        self.terminal = true;
        self.usage_final = true;
        Ok(())
    }

    /// The text of a body that is cut, binary or otherwise no JSON.
    pub fn look(&mut self, json: &[u8]) -> Glance {
        let delivered = &mut self.delivered;
        let keys = text_keys(self.kind, self.operation, self.streamed);
        let look = glance(json, keys, |text, escaped| delivered.add(text, escaped));
        self.finished |= look.finished;
        self.delivered.deltas += u64::from(look.tokens);
        look
    }

    /// A usage object found apart from its answer.
    pub fn usage_found(&mut self, json: &[u8]) {
        self.usage_json = json.to_vec();
        self.usage_final = true;
    }

    /// The provider's own count, and whether it is its last word.
    pub fn reading(&self) -> Option<(Reading, bool)> {
        let raw = match &self.usage {
            Some(usage) => Cow::Borrowed(usage),
            None => Cow::Owned(RawUsage::parse(std::str::from_utf8(&self.usage_json).ok()?)?),
        };
        let reading = self.kind.usage(self.operation, &raw);
        (reading.input_known || reading.output_known).then_some((reading, self.usage_final))
    }

    /// Whether the end of the answer was seen: its closing event, or all that a stream without one says last.
    pub fn complete(&self) -> bool {
        self.terminal || (self.finished && (self.usage_final || self.kind == Kind::Gemini))
    }

    /// Remembers the first thing that is wrong.
    pub fn note(&mut self, what: impl FnOnce() -> String) {
        if self.broken.is_none() {
            self.broken = Some(what());
        }
    }

    fn absorb(&mut self, answer: Answer<'_>) {
        self.id = self.id.take().or(answer.id);
        self.model = self.model.take().or(answer.model);
        self.service_class = answer.service_class.or(self.service_class);
        self.error = self.error.take().or(answer.error);
        self.queued_us = answer.queued_us.or(self.queued_us);
        self.terminal |= answer.terminal;
        // Some servers send an empty object first; only one with numbers in it is news.
        let Some(usage) =
            answer.usage.map(|raw| raw.get()).filter(|json| json.bytes().any(|byte| byte.is_ascii_digit()))
        else {
            return;
        };
        if !usage.starts_with('{') {
            self.note(|| "the usage is not a JSON object".to_owned());
        } else if self.kind.adapter().usage_is_incremental(self.operation) {
            let later = RawUsage::parse(usage).unwrap_or_default();
            self.usage.get_or_insert_default().update(later);
        } else {
            self.usage_json.clear();
            self.usage_json.extend_from_slice(usage.as_bytes());
        }
        self.usage_final |= self.finished || answer.terminal || answer.only_usage;
    }
}

impl Delivered {
    fn add(&mut self, raw: &[u8], escaped: bool) {
        let text = if escaped { unescaped(raw) } else { String::from_utf8_lossy(raw) };
        self.bytes = self.bytes.saturating_add(u64::try_from(text.len()).unwrap_or(u64::MAX));
        let room = TEXT_BYTES_MAX.saturating_sub(self.text.len());
        self.text.push_str(text.get(..text.floor_char_boundary(room)).unwrap_or_default());
    }
}

/// A JSON string's meaning; what cannot be one (a cut escape) is taken as it stands.
fn unescaped(raw: &[u8]) -> Cow<'_, str> {
    let quoted = [b"\"", raw, b"\""].concat();
    serde_json::from_slice::<String>(&quoted).map_or_else(|_| String::from_utf8_lossy(raw), Cow::Owned)
}

/// The position and kind of a fault, without the text around it.
pub(super) fn reason(error: &serde_json::Error) -> String {
    let kind = match error.classify() {
        serde_json::error::Category::Eof => "it ends early",
        serde_json::error::Category::Data => "it is not an object with the expected members",
        _ => "syntax",
    };
    format!("{kind} (line {}, column {})", error.line(), error.column())
}

/// Under which keys text is delivered. The responses API repeats finished text in later events, so only its deltas count.
fn text_keys(kind: Kind, operation: Operation, streamed: bool) -> &'static [&'static [u8]] {
    match (kind, operation) {
        (_, Operation::Responses) if streamed => &[b"delta"],
        (_, Operation::Responses) => &[b"text", b"arguments"],
        (_, Operation::Embeddings | Operation::CountTokens | Operation::Models) => &[],
        (_, Operation::Messages) => &[b"text", b"thinking", b"partial_json"],
        (Kind::Gemini, Operation::Generate) => &[b"text"],
        _ => &[
            b"content",
            b"text",
            b"reasoning_content",
            b"reasoning",
            b"arguments",
            b"refusal",
            b"thinking",
            b"partial_json",
        ],
    }
}
