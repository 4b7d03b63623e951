//! The laws that any bytes must keep, as ordinary functions: the property tests and the fuzz targets call the same ones.

use bytes::Bytes;
use ledger::Operation;

use super::{AnswerMeter, Metered};
use crate::provider::{Kind, RawUsage};
use crate::surface;

/// Feeds an answer in pieces cut at `cuts` and gives back what the client got, all of it, and what was metered.
#[must_use]
pub fn replay(mut meter: AnswerMeter, answer: &[u8], cuts: &[usize]) -> (Vec<u8>, Metered) {
    let mut client = Vec::new();
    let mut start = 0;
    for end in cuts.iter().copied().chain([answer.len()]) {
        let end = end.clamp(start, answer.len());
        let piece = Bytes::copy_from_slice(answer.get(start..end).unwrap_or_default());
        for bytes in meter.feed(piece, 0).release {
            client.extend_from_slice(&bytes);
        }
        start = end;
    }
    let metered = meter.finish(0, || None);
    for bytes in &metered.trailing {
        client.extend_from_slice(bytes);
    }
    (client, metered)
}

/// Any bytes as a stream: cut or whole they mean the same, and nothing is added, lost or changed for the client.
///
/// The first bytes choose the provider, the operation, whether the usage chunk is hidden, and where the answer is cut.
///
/// # Panics
/// When a law is broken; that is what it is for.
pub fn sse_meter(data: &[u8]) {
    let [choice, cut, answer @ ..] = data else { return };
    let kind = pick(&Kind::ALL, *choice);
    let operation = pick(&Operation::ALL, choice >> 2);
    let hide = choice >> 7 == 1;
    let meter = |hide| AnswerMeter::new(kind, operation, true, hide);
    let stride = usize::from(*cut % 16) + 1;
    let cuts: Vec<usize> = (0..answer.len()).step_by(stride).collect();
    let (whole, at_once) = replay(meter(hide), answer, &[]);
    let (pieces, cut_up) = replay(meter(hide), answer, &cuts);
    assert_eq!(whole, pieces, "the client's bytes depend on where the answer is cut");
    assert_eq!(unheld(at_once), unheld(cut_up), "what is metered depends on where the answer is cut");
    if hide {
        assert!(whole.len() <= answer.len(), "bytes were added");
    } else {
        assert_eq!(whole, answer, "the client's bytes were changed");
    }
    let (body, _) = replay(AnswerMeter::new(kind, operation, false, hide), answer, &cuts);
    assert_eq!(body, answer, "a body was changed");
}

/// Any bytes as a usage object, as a request and as an answer: every adapter survives, and no part exceeds its total.
///
/// # Panics
/// When a law is broken; that is what it is for.
pub fn usage_adapters(data: &[u8]) {
    for (kind, operation) in Kind::ALL.into_iter().flat_map(|kind| Operation::ALL.map(|operation| (kind, operation))) {
        if let Some(raw) = std::str::from_utf8(data).ok().and_then(RawUsage::parse) {
            let reading = kind.usage(operation, &raw);
            check_totals(&raw, &reading.usage);
        }
        let _ = replay(AnswerMeter::new(kind, operation, false, false), data, &[]);
    }
    for path in
        ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1beta/models/m:streamGenerateContent?alt=sse"]
    {
        let request = surface::inspect(&http::Method::POST, path, Some("application/json"), data);
        let prepared = Kind::OpenAi.prepare(&request, path, Bytes::copy_from_slice(data), Some("other"));
        assert!(request.malformed.is_some() || is_json(&prepared.body), "an edit broke the body");
        let _ = super::count::input(request.operation, None, data);
    }
}

fn check_totals(raw: &RawUsage, usage: &ledger::TokenUsage) {
    let openai = raw.any(&["prompt_tokens"]).is_some() && raw.count("promptTokenCount").is_none();
    if let (true, Some(prompt), None) = (openai, raw.count("prompt_tokens"), raw.count("input_tokens")) {
        assert!(usage.input_tokens() == prompt || usage.input_tokens() == 0, "input kinds do not add up to the prompt");
    }
}

/// The bytes still held at the end depend on the cuts; what the client got in all does not.
fn unheld(metered: Metered) -> Metered {
    Metered { trailing: Vec::new(), gaps: ledger::TokenGaps::default(), ..metered }
}

fn is_json(body: &[u8]) -> bool {
    serde_json::from_slice::<serde::de::IgnoredAny>(body).is_ok()
}

fn pick<T: Copy>(from: &[T], choice: u8) -> T {
    let index = usize::from(choice) % from.len().max(1);
    *from.get(index).or_else(|| from.first()).expect("the lists of kinds and operations are not empty")
}
