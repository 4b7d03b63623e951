//! The OpenAI protocol: chat completions and completions, streaming and not.

use http::{Response, StatusCode};
use serde::Deserialize;
use serde_json::{Value, json};

use super::driver::Engine;
use super::protocol::{self, Body, Generation, Message, Refusal, conversation, generate};
use super::scheduler::{Event, Finished};
use super::text::{Token, mix, tokens};

/// Which of the two shapes is spoken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    Chat,
    Text,
}

#[derive(Debug, Deserialize)]
struct Request {
    model: Option<String>,
    messages: Option<Vec<Message>>,
    prompt: Option<Prompt>,
    max_tokens: Option<u32>,
    max_completion_tokens: Option<u32>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    n: Option<u32>,
    ignore_eos: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
}

#[derive(Debug, Default, Deserialize)]
struct StreamOptions {
    include_usage: Option<bool>,
}

/// What stays the same in every chunk of one answer.
struct Envelope {
    shape: Shape,
    id: String,
    model: String,
    created: i64,
}

/// Answers a request of this shape.
pub(super) async fn answer(engine: &Engine, shape: Shape, id: u128, body: &[u8]) -> Result<Response<Body>, Refusal> {
    let request: Request = serde_json::from_slice(body).map_err(|error| Refusal::Bad(error.to_string()))?;
    let model = served_model(engine, request.model.as_deref())?;
    if request.n.unwrap_or(1) != 1 {
        return Err(Refusal::Bad("n must be 1".to_owned()));
    }
    let prompt = prompt(shape, &request)?;
    if engine.draw_failure() {
        return Err(Refusal::Overloaded);
    }
    // Completions stop after 16 tokens unless told otherwise; chats go on to their natural end.
    let default_max = (shape == Shape::Text).then_some(16);
    let max_tokens = request.max_completion_tokens.or(request.max_tokens).or(default_max);
    let generation = generate(engine, prompt, max_tokens, request.ignore_eos.unwrap_or(false))?;
    let prefix = if shape == Shape::Chat { "chatcmpl" } else { "cmpl" };
    let created = engine.clock().now().micros().div_euclid(1_000_000);
    let envelope = Envelope { shape, id: format!("{prefix}-{id:032x}"), model, created };

    if request.stream.unwrap_or(false) {
        let include_usage = request.stream_options.unwrap_or_default().include_usage.unwrap_or(false);
        return Ok(envelope.stream(generation, include_usage));
    }
    let prompt_tokens = generation.prompt_tokens;
    let (text, finished) = generation.collect().await.ok_or(Refusal::Overloaded)?;
    Ok(protocol::json(StatusCode::OK, &envelope.whole(&text, prompt_tokens, &finished)))
}

/// An error in OpenAI's shape.
pub(super) fn error(refusal: Refusal) -> Response<Body> {
    let (status, kind, message) = match refusal {
        Refusal::Bad(message) => (StatusCode::BAD_REQUEST, "BadRequestError", message),
        Refusal::NotFound(message) => (StatusCode::NOT_FOUND, "NotFoundError", message),
        Refusal::Overloaded => {
            (StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailableError", "The engine is overloaded, try again.".into())
        }
    };
    let error = json!({ "message": message, "type": kind, "param": null, "code": status.as_u16() });
    protocol::json(status, &json!({ "error": error }))
}

/// The answer to `GET /v1/models`.
pub(super) fn models(engine: &Engine) -> Response<Body> {
    let created = engine.clock().now().micros().div_euclid(1_000_000);
    let tokens_max = engine.tokens_max();
    let models: Vec<Value> = engine
        .spec()
        .models
        .iter()
        .map(|model| {
            json!({ "id": model, "object": "model", "created": created, "owned_by": "farthing",
                    "max_model_len": tokens_max })
        })
        .collect();
    protocol::json(StatusCode::OK, &json!({ "object": "list", "data": models }))
}

/// The name under which a model is served, the first one when the request names none.
pub(super) fn served_model(engine: &Engine, asked: Option<&str>) -> Result<String, Refusal> {
    let models = &engine.spec().models;
    match asked {
        None => models.first().cloned(),
        Some(asked) => models.iter().find(|model| *model == asked).cloned(),
    }
    .ok_or_else(|| Refusal::NotFound(format!("The model `{}` does not exist.", asked.unwrap_or_default())))
}

fn prompt(shape: Shape, request: &Request) -> Result<Vec<Token>, Refusal> {
    if shape == Shape::Chat {
        return conversation(None, request.messages.as_deref().unwrap_or_default());
    }
    match &request.prompt {
        Some(Prompt::Text(text)) => Ok(tokens(text).collect()),
        Some(Prompt::Texts(texts)) if texts.len() == 1 => Ok(tokens(&texts[0]).collect()),
        Some(Prompt::Tokens(ids)) => Ok(ids.iter().map(|&id| mix(0x6964, u64::from(id))).collect()),
        Some(Prompt::Texts(_)) => Err(Refusal::Bad("exactly one prompt is supported".to_owned())),
        None => Err(Refusal::Bad("prompt is required".to_owned())),
    }
}

impl Envelope {
    fn stream(self, generation: Generation, include_usage: bool) -> Response<Body> {
        let (last, reason) = (generation.output_tokens - 1, generation.ends_by.name());
        let prompt_tokens = generation.prompt_tokens;
        generation.stream(move |event, piece| match event {
            Event::Token { index, .. } => {
                let finish_reason = if *index == last { json!(reason) } else { Value::Null };
                let role = if *index == 0 { self.opening() } else { String::new() };
                role + &self.chunk(&json!([self.piece(piece, &finish_reason)]), None)
            }
            Event::Finished(finished) => {
                let usage = usage(prompt_tokens, finished);
                let usage = if include_usage { self.chunk(&json!([]), Some(&usage)) } else { String::new() };
                usage + "data: [DONE]\n\n"
            }
        })
    }

    /// Chats begin with a chunk that names the role.
    fn opening(&self) -> String {
        if self.shape == Shape::Text {
            return String::new();
        }
        let delta = json!({ "role": "assistant", "content": "" });
        self.chunk(&json!([{ "index": 0, "delta": delta, "logprobs": null, "finish_reason": null }]), None)
    }

    fn piece(&self, piece: &str, finish_reason: &Value) -> Value {
        match self.shape {
            Shape::Chat => {
                json!({ "index": 0, "delta": { "content": piece }, "logprobs": null, "finish_reason": finish_reason })
            }
            Shape::Text => json!({ "index": 0, "text": piece, "logprobs": null, "finish_reason": finish_reason }),
        }
    }

    fn chunk(&self, choices: &Value, usage: Option<&Value>) -> String {
        let object = if self.shape == Shape::Chat { "chat.completion.chunk" } else { "text_completion" };
        let mut chunk = json!({ "id": self.id, "object": object, "created": self.created, "model": self.model,
                                "choices": choices });
        if let Some(usage) = usage {
            chunk["usage"] = usage.clone();
        }
        format!("data: {chunk}\n\n")
    }

    fn whole(&self, text: &str, prompt_tokens: u32, finished: &Finished) -> Value {
        let (object, choice) = match self.shape {
            Shape::Chat => ("chat.completion", json!({ "message": { "role": "assistant", "content": text } })),
            Shape::Text => ("text_completion", json!({ "text": text })),
        };
        let mut choice = choice;
        choice["index"] = json!(0);
        choice["logprobs"] = Value::Null;
        choice["finish_reason"] = json!(finished.reason.name());
        json!({ "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": [choice],
                "usage": usage(prompt_tokens, finished) })
    }
}

fn usage(prompt_tokens: u32, finished: &Finished) -> Value {
    json!({
        "prompt_tokens": prompt_tokens,
        "completion_tokens": finished.output_tokens,
        "total_tokens": prompt_tokens + finished.output_tokens,
        "prompt_tokens_details": { "cached_tokens": finished.cached_tokens },
    })
}
