//! How the demo's clients read answers: whole or as server-sent events, in OpenAI's shape or in Anthropic's.

use serde_json::Value;

use super::traffic::SeenUsage;
use super::workload::Surface;

/// Longest answer that a client keeps.
const ANSWER_BYTES_MAX: usize = 16 * 1024 * 1024;

/// The text of one streamed token.
#[derive(Debug, PartialEq, Eq)]
pub struct Piece(pub String);

/// An answer that came to its end.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// Its text, when it was not streamed.
    pub text: Option<String>,
    /// The usage it reported.
    pub usage: Option<SeenUsage>,
}

/// Reads one answer as its bytes arrive.
pub struct Reader {
    surface: Surface,
    stream: bool,
    /// The whole answer, or the line that is not complete yet.
    bytes: Vec<u8>,
    usage: Option<SeenUsage>,
    ended: bool,
}

impl Reader {
    /// A reader for an answer to a call on this surface.
    pub fn new(surface: Surface, stream: bool) -> Reader {
        Reader { surface, stream, bytes: Vec::new(), usage: None, ended: false }
    }

    /// Takes what arrived and gives the tokens in it, when the answer is streamed.
    pub fn read(&mut self, data: &[u8]) -> Vec<Piece> {
        if self.bytes.len() + data.len() <= ANSWER_BYTES_MAX {
            self.bytes.extend_from_slice(data);
        }
        let mut pieces = Vec::new();
        if self.stream {
            while let Some(end) = self.bytes.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.bytes.drain(..=end).collect();
                pieces.extend(self.line(line.trim_ascii()));
            }
        }
        pieces
    }

    /// The answer, if it was complete when the connection ended.
    pub fn end(self) -> Option<Answer> {
        if self.stream {
            return self.ended.then_some(Answer { text: None, usage: self.usage });
        }
        let whole: Value = serde_json::from_slice(&self.bytes).ok()?;
        let text = match self.surface {
            Surface::Chat => &whole["choices"][0]["message"]["content"],
            Surface::Completions => &whole["choices"][0]["text"],
            Surface::Messages => &whole["content"][0]["text"],
        };
        let text = Some(text.as_str()?.to_owned());
        Some(Answer { text, usage: usage(self.surface, &whole["usage"]) })
    }

    fn line(&mut self, line: &[u8]) -> Option<Piece> {
        let data = line.strip_prefix(b"data:")?.trim_ascii();
        if data == b"[DONE]" {
            self.ended = true;
            return None;
        }
        let event: Value = serde_json::from_slice(data).ok()?;
        let text = match self.surface {
            Surface::Chat => &event["choices"][0]["delta"]["content"],
            Surface::Completions => &event["choices"][0]["text"],
            Surface::Messages => return self.message_event(&event),
        };
        self.usage = usage(self.surface, &event["usage"]).or(self.usage);
        text.as_str().filter(|text| !text.is_empty()).map(|text| Piece(text.to_owned()))
    }

    fn message_event(&mut self, event: &Value) -> Option<Piece> {
        match event["type"].as_str()? {
            "message_start" => self.usage = usage(self.surface, &event["message"]["usage"]),
            "message_delta" => {
                if let (Some(usage), Some(output)) = (&mut self.usage, event["usage"]["output_tokens"].as_u64()) {
                    usage.output_tokens = output;
                }
            }
            "message_stop" => self.ended = true,
            "content_block_delta" => return event["delta"]["text"].as_str().map(|text| Piece(text.to_owned())),
            _ => {}
        }
        None
    }
}

fn usage(surface: Surface, usage: &Value) -> Option<SeenUsage> {
    let count = |name: &str| usage[name].as_u64();
    if surface != Surface::Messages {
        return Some(SeenUsage { input_tokens: count("prompt_tokens")?, output_tokens: count("completion_tokens")? });
    }
    let cached = count("cache_read_input_tokens").unwrap_or(0) + count("cache_creation_input_tokens").unwrap_or(0);
    Some(SeenUsage { input_tokens: count("input_tokens")? + cached, output_tokens: count("output_tokens")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHAT: &str = "data: {\"choices\":[{\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n\
        data: {\"choices\":[{\"delta\":{\"content\":\"one\"}}]}\n\n\
        data: {\"choices\":[{\"delta\":{\"content\":\" two\"}}]}\r\n\r\n\
        data: {\"choices\":[],\"usage\":{\"prompt_tokens\":7,\"completion_tokens\":2}}\n\ndata: [DONE]\n\n";

    const MESSAGES: &str = "event: message_start\n\
        data: {\"type\":\"message_start\",\"message\":{\"usage\":{\"input_tokens\":3,\"cache_read_input_tokens\":4,\"output_tokens\":1}}}\n\n\
        data: {\"type\":\"ping\"}\n\n\
        data: {\"type\":\"content_block_delta\",\"delta\":{\"type\":\"text_delta\",\"text\":\"one\"}}\n\n\
        data: {\"type\":\"content_block_delta\",\"delta\":{\"type\":\"text_delta\",\"text\":\" two\"}}\n\n\
        data: {\"type\":\"message_delta\",\"usage\":{\"output_tokens\":2}}\n\ndata: {\"type\":\"message_stop\"}\n\n";

    #[test]
    fn streams_are_read_at_every_chunk_boundary() {
        for (surface, stream) in [(Surface::Chat, CHAT), (Surface::Messages, MESSAGES)] {
            for size in 1..stream.len() {
                let mut reader = Reader::new(surface, true);
                let pieces: Vec<Piece> = stream.as_bytes().chunks(size).flat_map(|chunk| reader.read(chunk)).collect();
                assert_eq!(pieces, [Piece("one".into()), Piece(" two".into())], "{surface:?} by {size}");
                let usage = Some(SeenUsage { input_tokens: 7, output_tokens: 2 });
                assert_eq!(reader.end(), Some(Answer { text: None, usage }), "{surface:?} by {size}");
            }
        }
    }

    #[test]
    fn what_breaks_off_is_no_answer() {
        let mut reader = Reader::new(Surface::Chat, true);
        reader.read(&CHAT.as_bytes()[..CHAT.len() - 9]);
        assert_eq!(reader.end(), None);
        let mut reader = Reader::new(Surface::Chat, false);
        reader.read(b"{\"choices\": [{\"message\": {\"content\": \"o");
        assert_eq!(reader.end(), None);
    }

    #[test]
    fn an_answer_without_usage_has_none() {
        let mut reader = Reader::new(Surface::Completions, false);
        reader.read(b"{\"choices\": [{\"text\": \"one\"}]}");
        assert_eq!(reader.end(), Some(Answer { text: Some("one".into()), usage: None }));
    }
}
