//! Fetches metrics over HTTP: one connection a scrape, bounded in time and size, no redirects, gzip understood.
//!
//! A scrape that fails gives an error and no reading, so nothing downstream can mistake it for zero.

use std::io::Read;
use std::time::Duration;

use bytes::Bytes;
use flate2::read::MultiGzDecoder;
use http::{HeaderMap, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use ledger::{Label, Timestamp};

use super::{Bearer, EngineKind, Found, FoundGpus, GpuTarget, Target, dcgm, read};
use crate::prometheus::{Scrape, parse};

/// What a scrape may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Time to open a connection.
    pub connect: Duration,
    /// Time for the whole scrape.
    pub whole: Duration,
    /// Longest text that is read, unpacked.
    pub bytes_max: usize,
    /// Samples that carry a time stamp older than this are unknown.
    pub stale_after: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connect: Duration::from_secs(2),
            whole: Duration::from_secs(4),
            bytes_max: 8 * 1024 * 1024,
            stale_after: Duration::from_secs(60),
        }
    }
}

/// Why there is no reading, naming the engine, the address and what to do.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the metrics of `{name}` at {url}: {cause}")]
pub struct ScrapeError {
    /// The engine or exporter.
    pub name: Label,
    /// The address, without credentials.
    pub url: String,
    /// What went wrong.
    pub cause: ScrapeCause,
}

/// What can go wrong with a scrape.
#[derive(Debug, thiserror::Error)]
pub enum ScrapeCause {
    /// The address cannot be used; correct it.
    #[error("{0}")]
    Address(&'static str),
    /// Nobody answers; start the server or correct the address.
    #[error("nobody answers ({0}); is it running, and is this the right port?")]
    Unreachable(String),
    /// It takes too long; the engine may be overloaded.
    #[error("no complete answer within {} ms; the server may be overloaded, or this is not its metrics port", .0.as_millis())]
    TimedOut(Duration),
    /// It answered something else.
    #[error("it answered {status}; {fix}")]
    Status {
        /// The status.
        status: StatusCode,
        /// What to do.
        fix: String,
    },
    /// The text is too long to be metrics.
    #[error("its answer is longer than {0} bytes; this is not a metrics page, or it has too many label sets")]
    TooLong(usize),
    /// The text is packed in a way that was not asked for, or broken.
    #[error("its answer cannot be unpacked ({0}); turn compression off there")]
    Packing(String),
    /// The text has none of the names that were to be read.
    #[error("the page has no `{wanted}…` metric; {fix}")]
    Foreign {
        /// How the names begin.
        wanted: &'static str,
        /// What to do.
        fix: String,
    },
    /// All that it says is old.
    #[error("all it says is older than {} s; whatever copies these metrics there has stopped", .0.as_secs())]
    Stale(Duration),
}

/// Fetches and reads metrics. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Scraper {
    client: Client<HttpConnector, Empty<Bytes>>,
    limits: Limits,
}

impl Scraper {
    /// A scraper with these limits. Connections are not kept: engines close idle ones about as often as they are read.
    #[must_use]
    pub fn new(limits: Limits) -> Scraper {
        let mut tcp = HttpConnector::new();
        tcp.set_connect_timeout(Some(limits.connect));
        tcp.set_nodelay(true);
        let client = Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(tcp);
        Scraper { client, limits }
    }

    /// Reads an engine. `now` is the moment of the call.
    ///
    /// # Errors
    /// When it does not answer in time with metrics of its kind, not older than [`Limits::stale_after`].
    pub async fn engine(&self, target: &Target, now: Timestamp) -> Result<Found, ScrapeError> {
        let says = |scrape: &Scrape| scrape.samples.iter().any(|sample| sample.name.starts_with(target.kind.prefix()));
        let scraped = self.fresh(&target.url, target.bearer.as_ref(), now, says).await;
        let scrape = scraped.map_err(|failure| {
            let cause = failure.cause(target.kind.prefix(), |scrape| engine_fix(target.kind, scrape));
            error(&target.engine, &target.url, cause)
        })?;
        let mut found = read(target.kind, &scrape);
        found.reading.engine = target.engine.clone();
        found.reading.pool = target.pool.clone();
        found.reading.at = now;
        Ok(found)
    }

    /// Reads a dcgm-exporter. `now` is the moment of the call.
    ///
    /// # Errors
    /// When it does not answer in time with metrics of GPUs, not older than [`Limits::stale_after`].
    pub async fn gpus(&self, target: &GpuTarget, now: Timestamp) -> Result<FoundGpus, ScrapeError> {
        let scraped = self.fresh(&target.url, target.bearer.as_ref(), now, dcgm::speaks).await;
        let scrape = scraped.map_err(|failure| {
            let fix = |_: &Scrape| "is this a dcgm-exporter? It listens on port 9400 as a rule".to_owned();
            error(&target.name, &target.url, failure.cause("DCGM_FI_", fix))
        })?;
        Ok(dcgm::read(&scrape, target.pool.as_ref(), now))
    }

    /// The scrape without stale samples. It must say something both before and after they are gone.
    async fn fresh(
        &self,
        url: &str,
        bearer: Option<&Bearer>,
        now: Timestamp,
        says: impl Fn(&Scrape) -> bool,
    ) -> Result<Scrape, Failure> {
        let fetching = tokio::time::timeout(self.limits.whole, self.fetch(url, bearer));
        let text = fetching.await.unwrap_or(Err(ScrapeCause::TimedOut(self.limits.whole)))?;
        let mut scrape = parse(&text);
        if !says(&scrape) {
            return Err(Failure::Foreign(scrape));
        }
        scrape.forget_older_than(now, self.limits.stale_after);
        if !says(&scrape) {
            return Err(Failure::Cause(ScrapeCause::Stale(self.limits.stale_after)));
        }
        Ok(scrape)
    }

    async fn fetch(&self, url: &str, bearer: Option<&Bearer>) -> Result<String, ScrapeCause> {
        let mut request = Request::get(address(url)?)
            .header(header::ACCEPT, "text/plain;version=0.0.4, application/openmetrics-text;version=1.0.0;q=0.5")
            .header(header::ACCEPT_ENCODING, "gzip")
            .header(header::CONNECTION, "close");
        if let Some(bearer) = bearer {
            request = request.header(header::AUTHORIZATION, format!("Bearer {}", bearer.token()));
        }
        let request = request
            .body(Empty::new())
            .map_err(|_| ScrapeCause::Address("the token has characters that no header can carry"))?;
        let response =
            self.client.request(request).await.map_err(|error| ScrapeCause::Unreachable(innermost(&error)))?;
        let status = response.status();
        if !status.is_success() {
            let fix = status_fix(status, response.headers(), bearer.is_some());
            return Err(ScrapeCause::Status { status, fix });
        }
        let packing = packing(response.headers())?;
        let too_long = || ScrapeCause::TooLong(self.limits.bytes_max);
        let body = Limited::new(response.into_body(), self.limits.bytes_max).collect().await;
        let body = body.map_err(|error| match error.downcast_ref::<LengthLimitError>() {
            Some(_) => too_long(),
            None => ScrapeCause::Unreachable(format!("the answer broke off: {error}")),
        })?;
        let bytes = body.to_bytes();
        let bytes = match packing {
            Packing::Plain => bytes.to_vec(),
            Packing::Gzip => unpacked(&bytes, self.limits.bytes_max)?.ok_or_else(too_long)?,
        };
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

enum Failure {
    Cause(ScrapeCause),
    /// A page of something else.
    Foreign(Scrape),
}

impl From<ScrapeCause> for Failure {
    fn from(cause: ScrapeCause) -> Failure {
        Failure::Cause(cause)
    }
}

impl Failure {
    fn cause(self, wanted: &'static str, fix: impl Fn(&Scrape) -> String) -> ScrapeCause {
        match self {
            Failure::Cause(cause) => cause,
            Failure::Foreign(scrape) => ScrapeCause::Foreign { wanted, fix: fix(&scrape) },
        }
    }
}

fn engine_fix(kind: EngineKind, scrape: &Scrape) -> String {
    match EngineKind::detect(scrape) {
        Some(other) => format!("these are the metrics of {other}: write `runs = \"{other}\"`"),
        None => kind.hint().to_owned(),
    }
}

fn error(name: &Label, url: &str, cause: ScrapeCause) -> ScrapeError {
    ScrapeError { name: name.clone(), url: shown(url), cause }
}

/// The address without what may be a password or a token.
fn shown(url: &str) -> String {
    if let Some((address, _)) = url.split_once('?') {
        return format!("{}?…", shown(address));
    }
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let (authority, path) = rest.find('/').map_or((rest, ""), |slash| rest.split_at(slash));
    match authority.rsplit_once('@') {
        Some((_, host)) => format!("{scheme}://…@{host}{path}"),
        None => url.to_owned(),
    }
}

fn address(url: &str) -> Result<Uri, ScrapeCause> {
    let uri: Uri =
        url.parse().map_err(|_| ScrapeCause::Address("this is no address; write http://host:port/metrics"))?;
    let authority = uri.authority().map_or("", |authority| authority.as_str());
    match uri.scheme_str() {
        Some("http") if authority.contains('@') => {
            Err(ScrapeCause::Address("credentials do not belong into the address; use a bearer token"))
        }
        Some("http") => Ok(uri),
        Some("https") => Err(ScrapeCause::Address(
            "only http is spoken here; read it within the cluster, or put a local proxy before it",
        )),
        _ => Err(ScrapeCause::Address("the address must begin with http://")),
    }
}

fn status_fix(status: StatusCode, headers: &HeaderMap, has_bearer: bool) -> String {
    if status.is_redirection() {
        let location = headers.get(header::LOCATION).and_then(|location| location.to_str().ok()).unwrap_or("elsewhere");
        return format!("redirects are not followed, write the address it leads to: {location}");
    }
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if has_bearer => "it does not accept the token".to_owned(),
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => "it wants a bearer token".to_owned(),
        StatusCode::NOT_FOUND => "its metrics are at another path, or turned off".to_owned(),
        _ => "look into its log".to_owned(),
    }
}

enum Packing {
    Plain,
    Gzip,
}

fn packing(headers: &HeaderMap) -> Result<Packing, ScrapeCause> {
    match headers.get(header::CONTENT_ENCODING).map(|value| value.to_str().unwrap_or("?").trim()) {
        None | Some("" | "identity") => Ok(Packing::Plain),
        Some("gzip" | "x-gzip") => Ok(Packing::Gzip),
        Some(other) => Err(ScrapeCause::Packing(format!("`{other}` was not asked for"))),
    }
}

/// The bytes unpacked; `None` when they are more than `bytes_max`.
fn unpacked(packed: &[u8], bytes_max: usize) -> Result<Option<Vec<u8>>, ScrapeCause> {
    let mut bytes = Vec::new();
    let limit = u64::try_from(bytes_max).unwrap_or(u64::MAX).saturating_add(1);
    let read = MultiGzDecoder::new(packed).take(limit).read_to_end(&mut bytes);
    read.map_err(|error| ScrapeCause::Packing(error.to_string()))?;
    Ok((bytes.len() <= bytes_max).then_some(bytes))
}

/// The last of a chain of causes, which is the one that says what happened.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked_and_shown_without_secrets() {
        let cases = [
            ("http://127.0.0.1:8000/metrics", true),
            ("https://127.0.0.1:8000/metrics", false),
            ("http://me:secret@host/metrics", false),
            ("127.0.0.1:8000", false),
            ("/metrics", false),
            ("http://", false),
        ];
        for (url, usable) in cases {
            assert_eq!(address(url).is_ok(), usable, "{url}");
        }
        assert_eq!(shown("http://me:secret@host:1/metrics?a=b@c"), "http://…@host:1/metrics?…");
        assert_eq!(shown("http://host/metrics?token=secret"), "http://host/metrics?…");
        assert_eq!(shown("http://host/a@b"), "http://host/a@b");
    }

    #[test]
    fn tokens_are_not_printed() {
        assert_eq!(format!("{:?}", Bearer::new("secret")), "Bearer(…)");
    }
}
