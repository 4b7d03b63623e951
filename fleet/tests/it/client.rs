//! A plain HTTP client and a clock for the tests.

use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use ledger::{Clock, Timestamp};
use serde_json::Value;

pub struct SystemClock(Instant);

impl Clock for SystemClock {
    #[expect(clippy::disallowed_methods, reason = "a test over real time needs a real clock")]
    fn now(&self) -> Timestamp {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        Timestamp::from_micros(i64::try_from(since.as_micros()).unwrap())
    }

    fn monotonic_us(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_micros()).unwrap()
    }
}

#[expect(clippy::disallowed_methods, reason = "a test over real time needs a real clock")]
pub fn clock() -> Arc<dyn Clock> {
    Arc::new(SystemClock(Instant::now()))
}

pub type HttpClient = Client<HttpConnector, Full<Bytes>>;

pub fn client() -> HttpClient {
    Client::builder(TokioExecutor::new()).build_http()
}

pub async fn post(client: &HttpClient, url: &str, body: impl Into<Bytes>) -> (StatusCode, Incoming) {
    let request = Request::post(url).header("content-type", "application/json").body(Full::new(body.into())).unwrap();
    let response = client.request(request).await.unwrap();
    (response.status(), response.into_body())
}

pub async fn post_json(client: &HttpClient, url: &str, body: &Value) -> (StatusCode, Value) {
    let (status, body) = post(client, url, body.to_string()).await;
    let bytes = body.collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&bytes).unwrap())
}

pub async fn get(client: &HttpClient, url: &str) -> (StatusCode, String) {
    let request = Request::get(url).body(Full::default()).unwrap();
    let response = client.request(request).await.unwrap();
    let status = response.status();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(bytes.to_vec()).unwrap())
}

/// The `data:` payloads of a stream read to its end.
pub async fn events(body: Incoming) -> Vec<String> {
    let bytes = body.collect().await.unwrap().to_bytes();
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    text.lines().filter_map(|line| line.strip_prefix("data: ")).map(str::to_owned).collect()
}
