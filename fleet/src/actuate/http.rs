//! Small HTTP calls, bounded in time and size. No redirects are followed, no connection is kept.

use std::time::Duration;

use ::http::{Method, Request, Uri, header};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

use super::ActuateError;

/// Longest answer that is read.
const ANSWER_BYTES_MAX: usize = 65_536;
/// Most of an answer that is repeated in an error.
const REPEATED_CHARS_MAX: usize = 200;

/// Whether this is an address that can be called.
pub(super) fn check(url: &str) -> Result<(), String> {
    let uri: Uri = url.parse().map_err(|_| format!("`{url}` is no address; write http://host:port/path"))?;
    if uri.scheme_str() == Some("http") && uri.host().is_some() {
        return Ok(());
    }
    Err(format!("`{url}`: only http://host:port/path is spoken here; put a proxy in front for https"))
}

/// Calls an address and gives the body of an answer of success.
pub(super) async fn call(
    method: Method,
    url: &str,
    key: Option<&str>,
    body: Option<String>,
    patience: Duration,
) -> Result<Bytes, ActuateError> {
    let timed_out = |_| ActuateError::TimedOut { what: url.to_owned(), after: patience };
    tokio::time::timeout(patience, call_patiently(method, url, key, body)).await.map_err(timed_out)?
}

async fn call_patiently(
    method: Method,
    url: &str,
    key: Option<&str>,
    body: Option<String>,
) -> Result<Bytes, ActuateError> {
    let unreachable = |cause: String| ActuateError::Unreachable { what: url.to_owned(), cause };
    let mut request = Request::builder().method(method).uri(url);
    if let Some(key) = key {
        request = request.header("idempotency-key", key);
    }
    if body.is_some() {
        request = request.header(header::CONTENT_TYPE, "application/json");
    }
    let request = request.body(Full::new(Bytes::from(body.unwrap_or_default())));
    let request = request.map_err(|error| ActuateError::Configuration(format!("`{url}`: {error}")))?;
    let client: Client<HttpConnector, Full<Bytes>> =
        Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build_http();
    let answer = client.request(request).await.map_err(|error| unreachable(causes(&error)))?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
    let body = body.map_err(|error| unreachable(error.to_string()))?.to_bytes();
    if status.is_success() {
        return Ok(body);
    }
    let words: String = String::from_utf8_lossy(&body).chars().take(REPEATED_CHARS_MAX).collect();
    Err(ActuateError::Refused { what: url.to_owned(), cause: format!("{status} {words}").trim_end().to_owned() })
}

/// An error and what caused it, in one line.
pub(super) fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
