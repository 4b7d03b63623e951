//! What the gateway is told to do: upstreams, routes, limits, policies. Plain values; the server reads them from TOML.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use http::Uri;
use http::uri::{Authority, PathAndQuery, Scheme};
use ledger::Label;
use serde::{Deserialize, Serialize};

use crate::journal::{Durability, WhenLogFails};
use crate::provider::Kind;

/// One snapshot of the configuration. A request keeps the one it started with.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// Where requests can go.
    pub upstreams: Vec<Arc<Upstream>>,
    /// Which model goes where. Without any, a request goes to the first upstream that speaks its surface.
    pub routes: Vec<ModelRoute>,
    /// Bounds on everything.
    pub limits: Limits,
    /// What a released answer survives.
    pub durability: Durability,
    /// What happens when a record cannot be written.
    pub when_log_fails: WhenLogFails,
    /// What happens to a stream whose client went away.
    pub on_client_abort: OnClientAbort,
    /// Who may ask without a key.
    pub anonymous: Anonymous,
}

impl Settings {
    /// The upstream of this name.
    #[must_use]
    pub fn upstream(&self, name: &str) -> Option<&Arc<Upstream>> {
        self.upstreams.iter().find(|upstream| &*upstream.name == name)
    }

    /// Finds contradictions that would otherwise show up at the first request.
    ///
    /// # Errors
    /// One sentence that names the upstream or the route.
    pub fn check(&self) -> Result<(), String> {
        for (index, upstream) in self.upstreams.iter().enumerate() {
            if self.upstreams.iter().take(index).any(|earlier| earlier.name == upstream.name) {
                return Err(format!("two upstreams are called `{}`", upstream.name));
            }
        }
        for (index, route) in self.routes.iter().enumerate() {
            if route.targets.is_empty() {
                return Err(format!("the route for model `{}` has no targets", route.model));
            }
            if self.routes.iter().take(index).any(|earlier| earlier.model == route.model) {
                return Err(format!("two routes are for model `{}`", route.model));
            }
            for target in route.targets.iter().chain(&route.fallbacks) {
                if self.upstream(&target.upstream).is_none() {
                    return Err(format!(
                        "the route for model `{}` names an unknown upstream `{}`",
                        route.model, target.upstream
                    ));
                }
            }
        }
        Ok(())
    }
}

/// A provider's API or an engine of our own.
#[derive(Debug, Clone)]
pub struct Upstream {
    /// Its name in the configuration.
    pub name: Label,
    /// How it wants to be spoken to.
    pub kind: Kind,
    /// The only place that is ever contacted for it.
    pub base_url: BaseUrl,
    /// The credential for it. Without one the client's own passes through.
    pub api_key: Option<Secret>,
    /// The provider whose prices apply.
    pub provider: Label,
    /// The pool of GPUs behind it.
    pub pool: Option<Label>,
    /// The deployment on that pool.
    pub deployment: Option<Label>,
}

impl Upstream {
    /// An upstream without credential or pool, priced as its kind's provider.
    #[must_use]
    pub fn new(name: &str, kind: Kind, base_url: BaseUrl) -> Upstream {
        let provider = kind.default_provider().into();
        Upstream { name: name.into(), kind, base_url, api_key: None, provider, pool: None, deployment: None }
    }
}

/// A text that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Arc<str>);

impl Secret {
    /// The text, for the one header it goes into.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Secret {
        Secret(text.into())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// Scheme, host and path prefix of an upstream, such as `https://api.openai.com` (without `/v1`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseUrl {
    scheme: Scheme,
    authority: Authority,
    prefix: String,
}

impl BaseUrl {
    /// The address of a path under this base. Host and scheme cannot be changed by what the path says.
    ///
    /// # Errors
    /// When `path_and_query` is not one.
    pub fn join(&self, path_and_query: &str) -> Result<Uri, http::Error> {
        let path = if self.prefix.is_empty() {
            PathAndQuery::try_from(path_and_query)?
        } else {
            PathAndQuery::try_from(format!("{}{path_and_query}", self.prefix))?
        };
        Uri::builder().scheme(self.scheme.clone()).authority(self.authority.clone()).path_and_query(path).build()
    }
}

impl FromStr for BaseUrl {
    type Err = String;
    fn from_str(text: &str) -> Result<BaseUrl, String> {
        let wrong = |why: &str| format!("`{text}` is not a base URL: {why}");
        let parts = text.parse::<Uri>().map_err(|_| wrong("write https://host or http://host:port"))?.into_parts();
        let scheme = parts.scheme.ok_or_else(|| wrong("it has no scheme"))?;
        if scheme != Scheme::HTTP && scheme != Scheme::HTTPS {
            return Err(wrong("only http and https are spoken"));
        }
        let authority = parts.authority.ok_or_else(|| wrong("it has no host"))?;
        if authority.as_str().contains('@') {
            // The text is not repeated: there is a password in it.
            return Err("a base URL must not contain a user or password; use api_key".into());
        }
        let path = parts.path_and_query.as_ref().map_or("", PathAndQuery::path).trim_end_matches('/');
        if parts.path_and_query.as_ref().is_some_and(|path| path.query().is_some()) || path.contains("..") {
            return Err(wrong("no query and no `..`"));
        }
        Ok(BaseUrl { scheme, authority, prefix: path.to_owned() })
    }
}

impl fmt::Display for BaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", self.scheme, self.authority, self.prefix)
    }
}

/// Which targets serve a model.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelRoute {
    /// The model as clients name it; a trailing `*` matches any ending. The longest match counts.
    pub model: String,
    /// One of those that take requests is chosen as `balance` says.
    pub targets: Vec<RouteTarget>,
    /// Tried in order when the chosen one fails.
    #[serde(default)]
    pub fallbacks: Vec<RouteTarget>,
    /// Further tries on the chosen target before falling back.
    #[serde(default)]
    pub retries: u16,
    /// How one of the targets is chosen.
    #[serde(default)]
    pub balance: Balance,
}

/// How one of a route's targets is chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Balance {
    /// By chance, in the proportion of the weights.
    #[default]
    Weighted,
    /// The one with the fewest requests in flight for its weight: for replicas that do the same work.
    LeastOutstanding,
}

/// An upstream, and the model to ask of it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RouteTarget {
    /// The upstream's name.
    pub upstream: String,
    /// The model to ask for instead of the one the client named.
    #[serde(default)]
    pub model: Option<String>,
    /// Share of the requests, relative to the other targets.
    #[serde(default = "one")]
    pub weight: u32,
}

fn one() -> u32 {
    1
}

/// Bounds, all of them with working defaults. Names say the unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Longest request head.
    pub header_bytes_max: usize,
    /// Longest request body.
    pub body_bytes_max: usize,
    /// A client must have sent a request's head in this time.
    pub header_ms_max: u64,
    /// A connection to an upstream must stand in this time.
    pub connect_ms_max: u64,
    /// The head of an upstream's answer must arrive in this time.
    pub first_byte_ms_max: u64,
    /// Longest silence in the middle of a body, in either direction.
    pub stream_idle_ms_max: u64,
    /// Longest request, all attempts together.
    pub request_ms_max: u64,
    /// Longest time an answer is read on after its client went away.
    pub drain_ms_max: u64,
    /// Most that is read on after the client went away.
    pub drain_bytes_max: u64,
    /// Most answers read on at once. Fixed when the gateway is made.
    pub drains_max: usize,
    /// Most client connections at once. Fixed when the listener starts.
    pub connections_max: usize,
    /// Most attempts of one request.
    pub attempts_max: usize,
    /// Longest wait that an upstream may ask for before a retry; a longer one goes to the next upstream at once.
    pub retry_after_ms_max: u64,
    /// Most bytes of request bodies kept for another try, all requests together. A request beyond that is tried once.
    pub retained_bytes_max: usize,
    /// How long running requests may finish after the order to stop.
    pub shutdown_ms_max: u64,
    /// Longest time that a request waits while nothing that serves it takes requests.
    pub hold_ms_max: u64,
    /// Most requests that wait so for one deployment.
    pub hold_requests_max: u32,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            header_bytes_max: 65_536,
            body_bytes_max: 67_108_864,
            header_ms_max: 30_000,
            connect_ms_max: 10_000,
            first_byte_ms_max: 600_000,
            stream_idle_ms_max: 120_000,
            request_ms_max: 3_600_000,
            drain_ms_max: 60_000,
            drain_bytes_max: 16_777_216,
            drains_max: 1_024,
            connections_max: 16_384,
            attempts_max: 6,
            retry_after_ms_max: 5_000,
            retained_bytes_max: 268_435_456,
            shutdown_ms_max: 30_000,
            hold_ms_max: 120_000,
            hold_requests_max: 256,
        }
    }
}

/// What happens to a stream whose client went away.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnClientAbort {
    /// The upstream is told to stop, and what was delivered is counted.
    #[default]
    Cancel,
    /// The upstream is read to its end, within bounds, for the usage it reports there.
    Drain,
}

/// Who may ask without a key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Anonymous {
    /// Everybody, as long as no key was ever made.
    #[default]
    WhenNoKeys,
    /// Nobody.
    Never,
    /// Everybody.
    Always,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn upstream(name: &str, kind: Kind) -> Arc<Upstream> {
        Arc::new(Upstream::new(name, kind, "http://127.0.0.1:1".parse().unwrap()))
    }

    fn target(upstream: &str, model: Option<&str>, weight: u32) -> RouteTarget {
        RouteTarget { upstream: upstream.into(), model: model.map(Into::into), weight }
    }

    fn settings(routes: Vec<ModelRoute>) -> Settings {
        let upstreams = vec![
            upstream("a", Kind::OpenAi),
            upstream("b", Kind::Vllm),
            upstream("c", Kind::OpenAi),
            upstream("d", Kind::Anthropic),
        ];
        Settings { upstreams, routes, ..Settings::default() }
    }

    #[test]
    fn a_base_url_fixes_scheme_host_and_prefix() {
        let base: BaseUrl = "http://127.0.0.1:8000/prefix/".parse().unwrap();
        assert_eq!(base.join("/v1/models?x=1").unwrap().to_string(), "http://127.0.0.1:8000/prefix/v1/models?x=1");
        let plain: BaseUrl = "https://api.example.com".parse().unwrap();
        assert_eq!(plain.join("//evil.example/x").unwrap().host(), Some("api.example.com"));
        for wrong in ["api.example.com", "ftp://x/", "http://u:p@x/", "http://x/?a=b", "http://x/../y", ""] {
            let error = wrong.parse::<BaseUrl>().unwrap_err();
            assert!(!error.contains("u:p"), "{error}");
        }
        assert_eq!(format!("{:?}", Secret::from("sk-1".to_owned())), "Secret(…)");
    }

    #[test]
    fn contradictions_are_found() {
        let route = |targets| ModelRoute { model: "m".into(), targets, ..ModelRoute::default() };
        assert!(settings(vec![route(vec![target("a", None, 1)])]).check().is_ok());
        assert!(settings(vec![route(vec![target("nowhere", None, 1)])]).check().unwrap_err().contains("nowhere"));
        assert!(settings(vec![route(Vec::new())]).check().is_err());
    }
}
