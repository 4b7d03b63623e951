//! A glance at a piece of JSON without parsing it: does it carry text, and is it worth a closer look?
//!
//! Most events of a stream hold a few characters of text and nothing else of interest. One pass over their strings finds
//! the text and the few keys that call for a real parse; nothing is allocated.

use memchr::{memchr, memchr2};

/// What a glance found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Glance {
    /// A usage, an engine's own times, an error or a closing event may be in it.
    pub worth_parsing: bool,
    /// A reason to finish is named.
    pub finished: bool,
    /// Text was found.
    pub tokens: bool,
}

/// Looks for strings under `text_keys` and hands each non-empty one on as it stands between its quotes, with
/// whether it contains escapes. Works on anything: what is not JSON finds nothing or little.
pub(super) fn glance(json: &[u8], text_keys: &[&[u8]], mut piece: impl FnMut(&[u8], bool)) -> Glance {
    let mut seen = Glance::default();
    let mut at = 0;
    while let Some(opening) = memchr(b'"', tail(json, at)) {
        let start = at + opening + 1;
        let Some((end, _)) = string_end(json, start) else { break };
        at = end + 1;
        let colon = past_space(json, at);
        if json.get(colon) != Some(&b':') {
            continue;
        }
        let key = json.get(start..end).unwrap_or_default();
        let value = past_space(json, colon + 1);
        at = value;
        match json.get(value) {
            Some(b'"') => {
                // A string that was cut off counts as far as it goes.
                let (end, escaped) = string_end(json, value + 1).unwrap_or((json.len(), true));
                let text = json.get(value + 1..end).unwrap_or_default();
                at = end + 1;
                if !text.is_empty() && text_keys.contains(&key) {
                    seen.tokens = true;
                    piece(text, escaped);
                } else {
                    note_word(key, text, &mut seen);
                }
            }
            Some(b'n') => {}
            Some(_) => seen.worth_parsing |= matches!(key, b"usage" | b"usageMetadata" | b"metrics" | b"error"),
            None => break,
        }
    }
    seen
}

fn note_word(key: &[u8], word: &[u8], seen: &mut Glance) {
    match key {
        b"finish_reason" | b"finishReason" | b"stop_reason" => seen.finished = true,
        b"error" => seen.worth_parsing = true,
        b"type" => seen.worth_parsing |= is_closing(word),
        _ => {}
    }
}

/// Types of events after which nothing comes.
pub(super) fn is_closing(event: &[u8]) -> bool {
    matches!(
        event,
        b"message_stop"
            | b"error"
            | b"response.completed"
            | b"response.failed"
            | b"response.incomplete"
            | b"response.cancelled"
    )
}

/// Where the string that starts at `start` has its closing quote, and whether there are escapes before it.
fn string_end(json: &[u8], start: usize) -> Option<(usize, bool)> {
    let (mut at, mut escaped) = (start, false);
    loop {
        let found = at + memchr2(b'"', b'\\', tail(json, at))?;
        if json.get(found) == Some(&b'"') {
            return Some((found, escaped));
        }
        escaped = true;
        at = found + 2;
    }
}

fn past_space(json: &[u8], at: usize) -> usize {
    at + tail(json, at).iter().take_while(|byte| byte.is_ascii_whitespace()).count()
}

fn tail(json: &[u8], at: usize) -> &[u8] {
    json.get(at..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(json: &str) -> (Glance, Vec<String>) {
        let mut texts = Vec::new();
        let seen =
            glance(json.as_bytes(), &[b"content"], |text, _| texts.push(String::from_utf8_lossy(text).into_owned()));
        (seen, texts)
    }

    #[test]
    fn text_is_found_and_keys_inside_text_are_not() {
        let (seen, texts) = look(r#"{"content" : "say \"usage\": {1} \\", "other":"content", "usage":null}"#);
        assert_eq!(texts, [r#"say \"usage\": {1} \\"#]);
        assert_eq!(seen, Glance { tokens: true, ..Glance::default() });
        assert_eq!(look(r#"{"content":""}"#), (Glance::default(), vec![]));
    }

    #[test]
    fn usage_errors_and_ends_call_for_a_parse() {
        assert!(look(r#"{"usage": {"prompt_tokens":1}}"#).0.worth_parsing);
        assert!(look(r#"{"error":"overloaded"}"#).0.worth_parsing);
        assert!(look(r#"{"type":"response.completed"}"#).0.worth_parsing);
        assert!(!look(r#"{"type":"text_delta"}"#).0.worth_parsing);
        assert!(look(r#"{"finish_reason":"stop"}"#).0.finished);
        assert!(!look(r#"{"finish_reason":null}"#).0.finished);
    }

    #[test]
    fn a_cut_string_counts_as_far_as_it_goes() {
        assert_eq!(look(r#"{"content":"hal"#).1, ["hal"]);
        assert_eq!(look(r#"{"content":"#).1, Vec::<String>::new());
        assert_eq!(look(r#"{"content":"a\"#).1, [r"a\"]);
    }
}
