//! The way out: one pooled client, and the headers that may cross it in either direction.

use std::time::Duration;

use bytes::Bytes;
use http::header::{
    ACCEPT_ENCODING, CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderName, HeaderValue, PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use http::{HeaderMap, Request, Response, Uri};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use memchr::memmem;

use crate::attribute::{BAGGAGE_PREFIX, PRIVATE_PREFIX};
use crate::keys::{contains_key, looks_like_key};
use crate::provider::Kind;

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
/// Idle connections to providers are closed after this, before most of them do it.
const PROVIDER_IDLE: Duration = Duration::from_secs(50);
/// The same for engines of our own: vLLM's server closes after five seconds, and a request that meets the closing is lost.
const ENGINE_IDLE: Duration = Duration::from_secs(4);

/// Why an upstream gave no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SendError {
    /// No connection: name, network, TLS or refusal.
    #[error("could not be reached")]
    Unreachable,
    /// The connection broke, or what came was not HTTP.
    #[error("broke off before it answered")]
    Broken,
}

/// Connections to all upstreams.
#[derive(Debug, Clone)]
pub(crate) struct Outbound {
    providers: Connections,
    engines: Connections,
}

type Connections = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

impl Outbound {
    pub fn new(connect_ms_max: u64) -> Outbound {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(Duration::from_millis(connect_ms_max)));
        // Both sets of roots are trusted paths to the same providers: the machine's first, because a company may add its own.
        let provider = rustls::crypto::ring::default_provider();
        let https = match HttpsConnectorBuilder::new().with_provider_and_native_roots(provider.clone()) {
            Ok(tls) => tls,
            Err(error) => {
                tracing::warn!(%error, "no root certificates on this machine; the built-in ones are used");
                let built_in = HttpsConnectorBuilder::new().with_provider_and_webpki_roots(provider);
                built_in.expect("ring supports the default TLS versions")
            }
        };
        let connector = https.https_or_http().enable_all_versions().wrap_connector(tcp);
        let pool = |idle: Duration| {
            Client::builder(TokioExecutor::new())
                .timer(TokioTimer::new())
                .pool_timer(TokioTimer::new())
                .pool_idle_timeout(idle)
                .build(connector.clone())
        };
        Outbound { providers: pool(PROVIDER_IDLE), engines: pool(ENGINE_IDLE) }
    }

    /// Sends a request and waits for the head of the answer. Redirects are answers like any other: they are not followed.
    pub async fn send(&self, kind: Kind, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, SendError> {
        let connections = if kind == Kind::Vllm { &self.engines } else { &self.providers };
        connections.request(request).await.map_err(|error| {
            // The error's text names addresses and reasons, never headers or bodies.
            tracing::debug!(error = %chain(&error), "upstream gave no answer");
            if error.is_connect() { SendError::Unreachable } else { SendError::Broken }
        })
    }
}

/// An error and what caused it, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// The headers of a client's request that an upstream may see.
///
/// Left out: what belongs to the client's own connection, everything of ours, and every value that contains
/// a Farthing key, wherever the client put it. The answer is asked for uncompressed, or it could not be metered.
pub(crate) fn forwarded(headers: &HeaderMap, presented_key: Option<&str>) -> HeaderMap {
    let mut kept = HeaderMap::with_capacity(headers.len() + 2);
    let named = named_by_connection(headers);
    for (name, value) in headers {
        let ours = name.as_str().starts_with(PRIVATE_PREFIX);
        let dropped = matches!(*name, HOST | CONTENT_LENGTH | EXPECT | ACCEPT_ENCODING) || is_hop_by_hop(name);
        if ours || dropped || named.contains(name) || holds_key(value, presented_key) {
            continue;
        }
        if name.as_str() != "baggage" {
            kept.append(name.clone(), value.clone());
        } else if let Some(value) = without_our_members(value) {
            kept.append(name.clone(), value);
        }
    }
    kept.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    kept
}

/// W3C baggage without what was said to us; nothing when nothing is left.
fn without_our_members(baggage: &HeaderValue) -> Option<HeaderValue> {
    let Ok(text) = baggage.to_str() else { return Some(baggage.clone()) };
    let others: Vec<&str> = text.split(',').filter(|member| !member.trim_start().starts_with(BAGGAGE_PREFIX)).collect();
    HeaderValue::from_str(&others.join(",")).ok().filter(|left| !left.is_empty())
}

/// The headers of an upstream's answer that a client may see.
pub(crate) fn returned(headers: HeaderMap) -> HeaderMap {
    let mut headers = headers;
    for name in named_by_connection(&headers) {
        headers.remove(name);
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
    // What we say about a request is ours to say, not an upstream's.
    let ours: Vec<HeaderName> =
        headers.keys().filter(|name| name.as_str().starts_with(PRIVATE_PREFIX)).cloned().collect();
    for name in ours {
        headers.remove(name);
    }
    headers
}

const HOP_BY_HOP: [HeaderName; 9] = [
    CONNECTION,
    KEEP_ALIVE,
    PROXY_CONNECTION,
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
];

fn is_hop_by_hop(name: &HeaderName) -> bool {
    HOP_BY_HOP.contains(name)
}

/// Headers that `Connection` declares to be about this hop. `close` and `keep-alive` are not worth a list.
fn named_by_connection(headers: &HeaderMap) -> Vec<HeaderName> {
    let tokens = headers.get_all(CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let tokens = tokens.flat_map(|value| value.split(',')).map(str::trim);
    let names =
        tokens.filter(|token| !token.eq_ignore_ascii_case("close") && !token.eq_ignore_ascii_case("keep-alive"));
    names.filter_map(|token| token.parse().ok()).collect()
}

fn holds_key(value: &HeaderValue, presented_key: Option<&str>) -> bool {
    let bytes = value.as_bytes();
    let bare = bytes.strip_prefix(b"Bearer ").or_else(|| bytes.strip_prefix(b"bearer ")).unwrap_or(bytes);
    std::str::from_utf8(bare).is_ok_and(looks_like_key)
        || presented_key.is_some_and(|key| memmem::find(bytes, key.as_bytes()).is_some())
        || contains_key(bytes)
}

/// A request target that may be put behind a base URL, or why not.
///
/// The path must stay where it is put: no `..` in any spelling, no backslash.
pub(crate) fn check_target(uri: &Uri, absolute_form_allowed: bool) -> Result<&str, &'static str> {
    if uri.authority().is_some() && !absolute_form_allowed {
        return Err("this is no forward proxy: the request target must be a path");
    }
    let Some(target) = uri.path_and_query() else { return Err("the request target must be a path") };
    if !target.path().starts_with('/') {
        return Err("the request target must be a path");
    }
    if climbs(target.path()) {
        return Err("the path must not contain `..`");
    }
    Ok(target.as_str())
}

/// Whether a path has a dot segment, encoded or not. Decoded twice, because a server behind the upstream may do so too.
fn climbs(path: &str) -> bool {
    if !path.contains('.') && !path.contains('%') && !path.contains('\\') {
        return false;
    }
    let decode = |text: &str| {
        let lower = text.to_ascii_lowercase();
        lower.replace("%25", "%").replace("%2e", ".").replace("%2f", "/").replace("%5c", "\\")
    };
    let decoded = decode(&decode(path));
    decoded.contains('\\') || decoded.split('/').any(|segment| segment == "." || segment == "..")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        pairs.iter().map(|&(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn only_end_to_end_headers_without_our_secrets_cross() {
        let sent = map(&[
            ("host", "gateway"),
            ("connection", "close, x-hop"),
            ("x-hop", "1"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("content-length", "7"),
            ("expect", "100-continue"),
            ("accept-encoding", "gzip"),
            ("x-farthing-team", "a"),
            ("authorization", "Bearer fk-abc"),
            ("x-api-key", "fk-unknown"),
            ("x-note", "my key is fk-abc!"),
            ("cookie", "a=1; k=fk-0123456789012345678901234567890123456789012"),
            ("x-goog-api-key", "theirs"),
            ("anthropic-version", "2023-06-01"),
            ("baggage", "farthing.task=t1, other=1"),
        ]);
        let kept = forwarded(&sent, Some("fk-abc"));
        let mut names: Vec<_> = kept.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["accept-encoding", "anthropic-version", "baggage", "x-goog-api-key"]);
        assert_eq!(kept["baggage"], " other=1");
        assert_eq!(kept["accept-encoding"], "identity");
    }

    #[test]
    fn an_answer_loses_only_what_belongs_to_its_connection() {
        let kept = returned(map(&[
            ("connection", "x-hop"),
            ("x-hop", "1"),
            ("x-farthing-cost-usd", "0"),
            ("content-length", "3"),
        ]));
        assert_eq!(kept, map(&[("content-length", "3")]));
    }

    #[test]
    fn paths_stay_under_their_base() {
        for good in [
            "/v1/chat/completions",
            "/v1/models/gpt-4.1?x=../y",
            "/v1beta/models/gemini-2.5-pro:generateContent",
            "/a..b/.c",
        ] {
            assert_eq!(check_target(&good.parse().unwrap(), false), Ok(good), "{good}");
        }
        let bad = [
            "/v1/../admin",
            "/..",
            "/v1/%2e%2E/x",
            "/v1/%252e%252e/x",
            "/v1/..%2fx",
            "/v1/.%5c..",
            "/./x",
            "*",
            "http://evil/x",
            "evil:443",
        ];
        for bad in bad {
            assert!(check_target(&bad.parse().unwrap(), false).is_err(), "{bad}");
        }
    }
}
