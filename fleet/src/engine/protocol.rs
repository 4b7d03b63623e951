//! What the protocols have in common: starting a generation, and sending it as JSON or as server-sent events.

use std::convert::Infallible;
use std::io;

use bytes::Bytes;
use futures_util::stream;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::mpsc;

use super::driver::Engine;
use super::metrics::FinishReason;
use super::scheduler::{Event, Finished, Rejection, Submission};
use super::text::{Token, answer_word, mix, natural_length, role_token, tokens};

pub(super) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// Why a request gets an error instead of an answer. Each protocol has its own shape for it.
#[derive(Debug)]
pub(super) enum Refusal {
    /// The request makes no sense.
    Bad(String),
    /// There is no such model, or no such path.
    NotFound(String),
    /// Not now.
    Overloaded,
}

/// A message of a conversation.
#[derive(Debug, Deserialize)]
pub(super) struct Message {
    role: String,
    content: Option<Content>,
}

/// Text, plain or in parts.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Debug, Deserialize)]
pub(super) struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

impl Content {
    fn add_to(&self, prompt: &mut Vec<Token>) -> Result<(), Refusal> {
        match self {
            Content::Text(text) => prompt.extend(tokens(text)),
            Content::Parts(parts) => {
                for part in parts {
                    let text = part.text.as_deref().filter(|_| part.kind == "text").ok_or_else(|| {
                        Refusal::Bad(format!("content parts of type `{}` are not supported by this model", part.kind))
                    })?;
                    prompt.extend(tokens(text));
                }
            }
        }
        Ok(())
    }
}

/// The prompt of a conversation: a token for each role, the words of each message, and a token that opens the answer.
pub(super) fn conversation(system: Option<&Content>, messages: &[Message]) -> Result<Vec<Token>, Refusal> {
    if messages.is_empty() {
        return Err(Refusal::Bad("messages must not be empty".to_owned()));
    }
    let mut prompt = Vec::new();
    if let Some(system) = system {
        prompt.push(role_token("system"));
        system.add_to(&mut prompt)?;
    }
    for message in messages {
        prompt.push(role_token(&message.role));
        if let Some(content) = &message.content {
            content.add_to(&mut prompt)?;
        }
    }
    prompt.push(role_token("assistant"));
    Ok(prompt)
}

/// A request under way.
pub(super) struct Generation {
    events: mpsc::Receiver<Event>,
    answer_seed: u64,
    pub output_tokens: u32,
    pub ends_by: FinishReason,
    pub prompt_tokens: u32,
}

/// Submits a prompt. Equal prompts get equal answers, as from a model at temperature zero.
pub(super) fn generate(
    engine: &Engine,
    prompt: Vec<Token>,
    max_tokens: Option<u32>,
    ignore_end: bool,
) -> Result<Generation, Refusal> {
    let tokens_max = engine.tokens_max();
    let prompt_tokens = u32::try_from(prompt.len()).unwrap_or(u32::MAX);
    let room = tokens_max.saturating_sub(prompt_tokens);
    let limit = max_tokens.unwrap_or(room);
    if limit > room || room == 0 {
        return Err(too_long(tokens_max));
    }
    let answer_seed = prompt.iter().fold(engine.spec().seed, |seed, &token| mix(seed, token));
    let natural = natural_length(answer_seed, engine.spec().answer_tokens_mean);
    let (output_tokens, ends_by) =
        if ignore_end || natural > limit { (limit, FinishReason::Length) } else { (natural, FinishReason::Stop) };
    let events =
        engine.submit(Submission { prompt, output_tokens, ends_by, answer_seed }).map_err(
            |rejection| match rejection {
                Rejection::Empty => Refusal::Bad("prompt and max_tokens must not be empty".to_owned()),
                Rejection::TooLong { tokens_max } => too_long(tokens_max),
                Rejection::QueueFull => Refusal::Overloaded,
            },
        )?;
    Ok(Generation { events, answer_seed, output_tokens, ends_by, prompt_tokens })
}

fn too_long(tokens_max: u32) -> Refusal {
    Refusal::Bad(format!(
        "This model's maximum context length is {tokens_max} tokens, prompt and answer together; please ask for less."
    ))
}

impl Generation {
    /// The text of the token at this position of the answer, with the space that parts it from the one before.
    fn piece(answer_seed: u64, index: u32) -> String {
        let space = if index == 0 { "" } else { " " };
        format!("{space}{}", answer_word(answer_seed, index))
    }

    /// Waits for the whole answer. `None` when the engine stopped.
    pub async fn collect(mut self) -> Option<(String, Finished)> {
        let mut text = String::new();
        while let Some(event) = self.events.recv().await {
            match event {
                Event::Token { index, .. } => text.push_str(&Self::piece(self.answer_seed, index)),
                Event::Finished(finished) => return Some((text, finished)),
            }
        }
        None
    }

    /// Sends server-sent events, one body frame for each event of the engine. `render` gets the event and, for a
    /// token, its text.
    pub fn stream(self, render: impl FnMut(&Event, &str) -> String + Send + 'static) -> Response<Body> {
        let state = Some((self.events, self.answer_seed, render));
        let frames = stream::unfold(state, |state| async move {
            let (mut events, answer_seed, mut render) = state?;
            // An engine that stops in the middle of an answer cuts the connection, as a crash would.
            let Some(event) = events.recv().await else {
                return Some((Err(io::Error::from(io::ErrorKind::UnexpectedEof)), None));
            };
            let piece = match event {
                Event::Token { index, .. } => Self::piece(answer_seed, index),
                Event::Finished(_) => String::new(),
            };
            let frame = Frame::data(Bytes::from(render(&event, &piece)));
            let last = matches!(event, Event::Finished(_));
            Some((Ok(frame), (!last).then_some((events, answer_seed, render))))
        });
        let mut response = Response::new(StreamBody::new(frames).boxed_unsync());
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, http::HeaderValue::from_static("text/event-stream; charset=utf-8"));
        headers.insert(CACHE_CONTROL, http::HeaderValue::from_static("no-cache"));
        response
    }
}

pub(super) fn json(status: StatusCode, value: &Value) -> Response<Body> {
    text(status, "application/json", value.to_string())
}

pub(super) fn text(status: StatusCode, kind: &'static str, body: String) -> Response<Body> {
    let body = Full::new(Bytes::from(body)).map_err(|never: Infallible| match never {}).boxed_unsync();
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static(kind));
    response
}
