//! Answers that come as one body: forwarded as they come, with a bounded memory of what passed.

use std::collections::VecDeque;

use bytes::Bytes;
use ledger::Operation;
use memchr::memmem;
use serde_json::value::RawValue;

use super::events::{Reader, reason};

/// Largest body that is read whole.
pub const BODY_BYTES_MAX: usize = 16 * 1024 * 1024;

/// How much of a larger body's end is kept: embeddings put their usage there.
const TAIL_BYTES: usize = 64 * 1024;

/// The memory of one body. It shares the chunks that were forwarded and copies nothing until the end.
#[derive(Debug, Default)]
pub(super) struct Body {
    chunks: VecDeque<Bytes>,
    kept: usize,
    cut: bool,
}

impl Body {
    /// Remembers a chunk that is being forwarded.
    pub fn feed(&mut self, chunk: &Bytes) {
        self.kept += chunk.len();
        self.chunks.push_back(chunk.clone());
        self.cut |= self.kept > BODY_BYTES_MAX;
        while self.cut && self.kept.saturating_sub(self.chunks.front().map_or(0, Bytes::len)) >= TAIL_BYTES {
            self.kept -= self.chunks.pop_front().map_or(0, |chunk| chunk.len());
        }
    }

    /// Reads what was kept.
    pub fn finish(&mut self, reader: &mut Reader) {
        let chunks = std::mem::take(&mut self.chunks);
        let joined = match chunks.len() {
            0 | 1 => chunks.into_iter().next().unwrap_or_default(),
            _ => Bytes::from(chunks.iter().flat_map(|chunk| chunk.iter().copied()).collect::<Vec<u8>>()),
        };
        if self.cut {
            reader.note(|| format!("an answer of more than {BODY_BYTES_MAX} bytes was not read whole"));
            if let (Operation::Embeddings, Some(usage)) = (reader.operation(), last_usage(&joined)) {
                reader.usage_found(usage.as_bytes());
            }
        } else if let Some(encoding) = encoded(&joined) {
            reader.note(|| format!("the answer is {encoding}-encoded and was not read"));
        } else if let Err(error) = reader.body(&joined) {
            // Files and speech are no JSON and need not be.
            if reader.operation() != Operation::Other || joined.trim_ascii_start().starts_with(b"{") {
                reader.note(|| format!("the answer is not valid JSON: {}", reason(&error)));
            }
        }
    }
}

/// The last usage object in the tail of a body of numbers. Not for answers with text or arguments in them, where a
/// model could write one.
fn last_usage(tail: &[u8]) -> Option<&str> {
    const KEY: &[u8] = b"\"usage\"";
    let after = tail.get(memmem::rfind(tail, KEY)? + KEY.len()..)?.trim_ascii_start();
    let value = after.strip_prefix(b":")?;
    let raw: &RawValue = serde_json::Deserializer::from_slice(value).into_iter().next()?.ok()?;
    Some(raw.get())
}

/// What every gzip stream starts with.
pub(super) const GZIP_FIRST_BYTE: u8 = 0x1f;

/// The name of a compression that shows in the first bytes.
fn encoded(start: &[u8]) -> Option<&'static str> {
    const MAGIC: [(&[u8], &str); 2] = [(b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd")];
    MAGIC.into_iter().find(|(magic, _)| start.starts_with(magic)).map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::provider::Kind;

    #[test]
    fn the_usage_of_a_body_too_large_to_keep_is_read_from_its_end() {
        let mut body = Body::default();
        let mut reader = Reader::new(Kind::OpenAi, Operation::Embeddings, false);
        body.feed(&Bytes::from_static(b"{\"object\":\"list\",\"data\":[{\"embedding\":["));
        for _ in 0..17 {
            body.feed(&Bytes::from("0.25,".repeat(200_000)));
        }
        body.feed(&Bytes::from_static(b"1]}],\"usage\":{\"prompt_tokens\":8,\"total_tokens\":8}}"));
        assert!(body.kept < 2 * 1024 * 1024, "kept {}", body.kept);
        body.finish(&mut reader);
        let (reading, last) = reader.reading().unwrap();
        assert_eq!((reading.usage.input, reading.output_known, last), (8, true, true));
        assert!(reader.broken.unwrap().contains("not read whole"));
    }

    #[test]
    fn compressed_answers_are_named() {
        assert_eq!(encoded(b"\x1f\x8b\x08\0"), Some("gzip"));
        assert_eq!(encoded(b"{\"a\":1}"), None);
    }
}
