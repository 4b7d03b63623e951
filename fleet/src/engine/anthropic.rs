//! The Anthropic protocol: messages, streaming and not, and counting tokens. Input tokens exclude cache reads here.

use http::{Response, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::driver::Engine;
use super::metrics::FinishReason;
use super::openai::served_model;
use super::protocol::{self, Body, Content, Generation, Message, Refusal, conversation, generate};
use super::scheduler::Event;

#[derive(Debug, Deserialize)]
struct Request {
    model: Option<String>,
    system: Option<Content>,
    messages: Vec<Message>,
    max_tokens: Option<u32>,
    stream: Option<bool>,
}

/// Answers `POST /v1/messages`.
pub(super) async fn messages(engine: &Engine, id: u128, body: &[u8]) -> Result<Response<Body>, Refusal> {
    let request = read(body)?;
    let model = served_model(engine, request.model.as_deref())?;
    let max_tokens = request.max_tokens.ok_or_else(|| Refusal::Bad("max_tokens: Field required".to_owned()))?;
    let prompt = conversation(request.system.as_ref(), &request.messages)?;
    if engine.draw_failure() {
        return Err(Refusal::Overloaded);
    }
    let generation = generate(engine, prompt, Some(max_tokens), false)?;
    let message = Envelope { id: format!("msg_{id:032x}"), model, prompt_tokens: generation.prompt_tokens };
    if request.stream.unwrap_or(false) {
        return Ok(message.stream(generation));
    }
    let (text, finished) = generation.collect().await.ok_or(Refusal::Overloaded)?;
    let whole = message.whole(
        &json!([{ "type": "text", "text": text }]),
        &json!(stop_reason(finished.reason)),
        finished.cached_tokens,
        finished.output_tokens,
    );
    Ok(protocol::json(StatusCode::OK, &whole))
}

/// Answers `POST /v1/messages/count_tokens`.
pub(super) fn count_tokens(engine: &Engine, body: &[u8]) -> Result<Response<Body>, Refusal> {
    let request = read(body)?;
    served_model(engine, request.model.as_deref())?;
    let prompt = conversation(request.system.as_ref(), &request.messages)?;
    Ok(protocol::json(StatusCode::OK, &json!({ "input_tokens": prompt.len() })))
}

/// An error in Anthropic's shape.
pub(super) fn error(refusal: Refusal) -> Response<Body> {
    let (status, kind, message) = match refusal {
        Refusal::Bad(message) => (StatusCode::BAD_REQUEST, "invalid_request_error", message),
        Refusal::NotFound(message) => (StatusCode::NOT_FOUND, "not_found_error", message),
        Refusal::Overloaded => {
            let status = StatusCode::from_u16(529).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
            (status, "overloaded_error", "Overloaded".to_owned())
        }
    };
    protocol::json(status, &json!({ "type": "error", "error": { "type": kind, "message": message } }))
}

fn read(body: &[u8]) -> Result<Request, Refusal> {
    serde_json::from_slice(body).map_err(|error| Refusal::Bad(error.to_string()))
}

fn stop_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Length => "max_tokens",
        FinishReason::Stop | FinishReason::Abort => "end_turn",
    }
}

struct Envelope {
    id: String,
    model: String,
    prompt_tokens: u32,
}

impl Envelope {
    fn whole(&self, content: &Value, stop_reason: &Value, cached_tokens: u32, output_tokens: u32) -> Value {
        json!({
            "id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content,
            "stop_reason": stop_reason, "stop_sequence": null,
            "usage": {
                "input_tokens": self.prompt_tokens - cached_tokens,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": cached_tokens,
                "output_tokens": output_tokens,
            },
        })
    }

    fn stream(self, generation: Generation) -> Response<Body> {
        generation.stream(move |event, piece| match event {
            Event::Token { index, cached_tokens, .. } => {
                let opening = if *index == 0 { self.opening(*cached_tokens) } else { String::new() };
                opening
                    + &sse(&json!({ "type": "content_block_delta", "index": 0,
                                    "delta": { "type": "text_delta", "text": piece } }))
            }
            Event::Finished(finished) => [
                json!({ "type": "content_block_stop", "index": 0 }),
                json!({ "type": "message_delta",
                        "delta": { "stop_reason": stop_reason(finished.reason), "stop_sequence": null },
                        "usage": { "output_tokens": finished.output_tokens } }),
                json!({ "type": "message_stop" }),
            ]
            .iter()
            .map(sse)
            .collect(),
        })
    }

    fn opening(&self, cached_tokens: u32) -> String {
        let message = self.whole(&json!([]), &Value::Null, cached_tokens, 1);
        let block = json!({ "type": "text", "text": "" });
        [
            json!({ "type": "message_start", "message": message }),
            json!({ "type": "content_block_start", "index": 0, "content_block": block }),
            json!({ "type": "ping" }),
        ]
        .iter()
        .map(sse)
        .collect()
    }
}

/// One server-sent event, named by its own type.
fn sse(value: &Value) -> String {
    format!("event: {}\ndata: {value}\n\n", value["type"].as_str().unwrap_or_default())
}
