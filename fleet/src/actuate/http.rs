//! Small HTTP calls, bounded in time and size. No redirects are followed, no connection is kept.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::Duration;

use ::http::{HeaderValue, Method, Request, StatusCode, Uri, header};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;

use super::ActuateError;

/// Longest answer that is read.
const ANSWER_BYTES_MAX: usize = 65_536;
/// Most of an answer that is repeated in an error.
const REPEATED_CHARS_MAX: usize = 200;

/// Reading the machine's root certificates takes a while, so it is done once, and only where TLS is spoken.
static SECURE: LazyLock<Client<HttpsConnector<HttpConnector>, Full<Bytes>>> = LazyLock::new(secure);

/// Where a secret is kept. It is read for each call, so that one that was renewed counts at once.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Secret {
    /// In this environment variable.
    Env(String),
    /// In this file, surrounding white space removed.
    File(PathBuf),
}

impl Secret {
    /// The same with a file's path relative to `folder`.
    pub(super) fn beside(self, folder: &Path) -> Secret {
        match self {
            Secret::File(path) => Secret::File(folder.join(path)),
            Secret::Env(name) => Secret::Env(name),
        }
    }

    fn bearer(&self) -> Result<HeaderValue, ActuateError> {
        let wrong = |what: String| Err(ActuateError::Configuration(what));
        let read = match self {
            Secret::Env(name) => std::env::var(name).map_err(|_| format!("the environment variable {name} is not set")),
            Secret::File(path) => {
                std::fs::read_to_string(path).map_err(|error| format!("cannot read {}: {error}", path.display()))
            }
        };
        let secret = match read {
            Ok(secret) if !secret.trim().is_empty() => secret,
            Ok(_) => return wrong(format!("the secret in {self:?} is empty")),
            Err(error) => return wrong(error),
        };
        let Ok(mut value) = HeaderValue::from_str(&format!("Bearer {}", secret.trim())) else {
            return wrong(format!("the secret in {self:?} has characters that no header can carry"));
        };
        value.set_sensitive(true);
        Ok(value)
    }
}

/// What goes with a call.
#[derive(Debug, Default)]
pub(super) struct Said<'a> {
    /// The same for each try.
    pub key: Option<&'a str>,
    pub token: Option<&'a Secret>,
    /// JSON.
    pub body: Option<String>,
}

/// Whether this is an address that can be called.
pub(super) fn check(url: &str) -> Result<(), String> {
    let shown = shown(url);
    let uri: Uri = url.parse().map_err(|_| format!("`{shown}` is no address; write http://host:port/path"))?;
    if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        return Err("credentials do not belong into an address; use token = { env = \"NAME\" }".to_owned());
    }
    if matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some() {
        return Ok(());
    }
    Err(format!("`{shown}`: an address begins with http:// or https://"))
}

/// Calls an address and gives the body of an answer of success.
pub(super) async fn call(method: Method, url: &str, said: Said<'_>, patience: Duration) -> Result<Bytes, ActuateError> {
    let timed_out = |_| ActuateError::TimedOut { what: shown(url), after: patience };
    tokio::time::timeout(patience, call_patiently(method, url, said)).await.map_err(timed_out)?
}

async fn call_patiently(method: Method, url: &str, said: Said<'_>) -> Result<Bytes, ActuateError> {
    let unreachable = |cause: String| ActuateError::Unreachable { what: shown(url), cause };
    let mut request = Request::builder().method(method).uri(url);
    if let Some(key) = said.key {
        request = request.header("idempotency-key", key.as_bytes());
    }
    if let Some(token) = said.token {
        request = request.header(header::AUTHORIZATION, token.bearer()?);
    }
    if said.body.is_some() {
        request = request.header(header::CONTENT_TYPE, "application/json");
    }
    let request = request.body(Full::new(Bytes::from(said.body.unwrap_or_default())));
    let request = request.map_err(|error| ActuateError::Configuration(format!("`{}`: {error}", shown(url))))?;
    let answer = if url.starts_with("https") {
        SECURE.request(request).await
    } else {
        let plain: Client<HttpConnector, _> =
            Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build_http();
        plain.request(request).await
    };
    let answer = answer.map_err(|error| unreachable(causes(&error)))?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
    let body = body.map_err(|error| unreachable(error.to_string()))?.to_bytes();
    if status.is_success() {
        return Ok(body);
    }
    let words: String = String::from_utf8_lossy(&body).chars().take(REPEATED_CHARS_MAX).collect();
    let cause = format!("{status} {words}").trim_end().to_owned();
    if status.is_redirection() {
        let cause = format!("{cause}: redirects are not followed; write the address that it leads to");
        return Err(ActuateError::Refused { what: shown(url), cause });
    }
    // These say nothing about the order: the same may be done when it is asked for again.
    let passes = matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS);
    if status.is_server_error() || passes {
        return Err(unreachable(cause));
    }
    Err(ActuateError::Refused { what: shown(url), cause })
}

fn secure() -> Client<HttpsConnector<HttpConnector>, Full<Bytes>> {
    let provider = rustls::crypto::ring::default_provider();
    let https = match HttpsConnectorBuilder::new().with_provider_and_native_roots(provider.clone()) {
        Ok(https) => https,
        Err(error) => {
            tracing::warn!(%error, "no root certificates on this machine; the built-in ones are used");
            let built_in = HttpsConnectorBuilder::new().with_provider_and_webpki_roots(provider);
            built_in.expect("ring supports the default TLS versions")
        }
    };
    let connector = https.https_only().enable_all_versions().build();
    Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector)
}

/// The address without what may be a secret.
fn shown(url: &str) -> String {
    let (address, query) = url.split_once('?').unwrap_or((url, ""));
    let (scheme, rest) = address.split_once("://").unwrap_or(("", address));
    let (authority, path) = rest.find('/').map_or((rest, ""), |slash| rest.split_at(slash));
    let address = match authority.rsplit_once('@') {
        Some((_, host)) => format!("{scheme}://…@{host}{path}"),
        None => address.to_owned(),
    };
    if query.is_empty() { address } else { format!("{address}?…") }
}

pub(super) fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked_and_shown_without_secrets() {
        let cases = [
            ("http://127.0.0.1:8000/scale", true),
            ("https://scale.example/hook?team=a", true),
            ("https://me:secret@host/", false),
            ("127.0.0.1:8000", false),
            ("ftp://host/", false),
            ("/scale", false),
        ];
        for (url, usable) in cases {
            let checked = check(url);
            assert_eq!(checked.is_ok(), usable, "{url}");
            assert!(!format!("{checked:?}").contains("secret"));
        }
        assert_eq!(shown("http://me:secret@host:1/hook?a=b@c"), "http://…@host:1/hook?…");
        assert_eq!(shown("http://host/a@b"), "http://host/a@b");
    }

    #[test]
    fn a_secret_is_read_where_it_is_and_shown_nowhere() {
        let folder = tempfile::tempdir().unwrap();
        let secret = Secret::File("token".into()).beside(folder.path());
        assert!(matches!(secret.bearer(), Err(ActuateError::Configuration(_))));
        std::fs::write(folder.path().join("token"), " hush \n").unwrap();
        let value = secret.bearer().unwrap();
        assert_eq!(value.to_str().unwrap(), "Bearer hush");
        assert!(!format!("{value:?} {secret:?}").contains("hush"));
        std::fs::write(folder.path().join("token"), "hu\nsh").unwrap();
        let error = secret.bearer().unwrap_err().to_string();
        assert!(error.contains("no header can carry") && !error.contains("hu\nsh"), "{error}");
    }
}
