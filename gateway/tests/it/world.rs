//! A gateway, its journal and a client, ready to be used by a test.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use gateway::settings::Upstream as Place;
use gateway::{Gateway, Journal, JournalError, KeyRecord, KeyRing, Kind, Parts, PlainKey, Settings};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use ledger::price::PriceBook;
use ledger::{Attempt, AttemptId, Clock, Fact, KeyId, Opened, Timestamp};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::upstream::Upstream;

/// 2026-11-20T00:00:00Z, the date of the acceptance cases.
pub const CASE_DAY: i64 = 1_795_132_800_000_000;
pub const KEY_SECRET: [u8; 32] = [9; 32];

/// Real time for latencies, a fixed day for prices.
pub struct TestClock {
    start: Instant,
}

impl TestClock {
    #[expect(clippy::disallowed_methods, reason = "tests over real sockets need real time")]
    pub fn new() -> TestClock {
        TestClock { start: Instant::now() }
    }
}

impl Clock for TestClock {
    fn now(&self) -> Timestamp {
        Timestamp::from_micros(CASE_DAY).plus_micros(i64::try_from(self.monotonic_us()).unwrap())
    }

    fn monotonic_us(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_micros()).unwrap()
    }
}

/// Which appends fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fails {
    Nothing,
    Opened,
    Finished,
    Everything,
    Sync,
}

/// A journal in memory that fails on demand.
pub struct MemoryJournal {
    facts: Mutex<Vec<Fact>>,
    fails: Mutex<Fails>,
    pub sync_delay_ms: AtomicU64,
    pub append_delay_ms: AtomicU64,
    pub lost: AtomicU64,
}

impl MemoryJournal {
    pub fn fail(&self, fails: Fails) {
        *self.fails.lock().unwrap() = fails;
    }

    pub fn opened(&self) -> Vec<Opened> {
        let facts = self.facts.lock().unwrap();
        facts
            .iter()
            .filter_map(|fact| if let Fact::Opened(opened) = fact { Some((**opened).clone()) } else { None })
            .collect()
    }

    pub fn attempts(&self) -> Vec<Attempt> {
        let facts = self.facts.lock().unwrap();
        facts
            .iter()
            .filter_map(|fact| if let Fact::Attempt(attempt) = fact { Some((**attempt).clone()) } else { None })
            .collect()
    }
}

impl Journal for MemoryJournal {
    fn append(&self, fact: &Fact) -> Result<u64, JournalError> {
        let fails = *self.fails.lock().unwrap();
        let fails = match fact {
            _ if fails == Fails::Everything => true,
            Fact::Opened(_) => fails == Fails::Opened,
            Fact::Attempt(_) => fails == Fails::Finished,
            _ => false,
        };
        if fails {
            return Err(JournalError { cause: "no space left on device".into() });
        }
        let delay = self.append_delay_ms.load(Ordering::Relaxed);
        if delay > 0 {
            std::thread::sleep(Duration::from_millis(delay));
        }
        let mut facts = self.facts.lock().unwrap();
        facts.push(fact.clone());
        Ok(facts.len() as u64)
    }

    fn synced(&self, _position: u64) -> BoxFuture<'static, Result<(), JournalError>> {
        let delay = self.sync_delay_ms.load(Ordering::Relaxed);
        let fails = *self.fails.lock().unwrap() == Fails::Sync;
        Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(delay)).await;
            if fails { Err(JournalError { cause: "input/output error".into() }) } else { Ok(()) }
        })
    }

    fn keep(&self, _fact: &Fact) -> bool {
        false
    }

    fn lost(&self, _cause: &JournalError) {
        self.lost.fetch_add(1, Ordering::Relaxed);
    }
}

/// Everything a test talks to.
pub struct World {
    pub address: SocketAddr,
    pub gateway: Gateway,
    pub journal: Arc<MemoryJournal>,
    pub settings: Arc<ArcSwap<Settings>>,
    pub prices: Arc<ArcSwap<PriceBook>>,
    pub client: TestClient,
    pub stop: Option<oneshot::Sender<()>>,
    pub serving: Option<JoinHandle<()>>,
}

pub type TestClient = Client<HttpConnector, Full<Bytes>>;

/// Settings with one upstream of each given kind, named after it.
pub fn settings(upstreams: &[(&str, Kind, &Upstream)]) -> Settings {
    let place = |(name, kind, upstream): &(&str, Kind, &Upstream)| {
        let base = format!("http://{}", upstream.address).parse().unwrap();
        Arc::new(Place::new(name, *kind, base))
    };
    Settings { upstreams: upstreams.iter().map(place).collect(), ..Settings::default() }
}

pub fn key(change: impl FnOnce(&mut KeyRecord)) -> (PlainKey, KeyRing) {
    let (plain, hash) = gateway::mint([5; 32], &KEY_SECRET);
    let mut record = KeyRecord::new(KeyId::new(Timestamp::from_micros(CASE_DAY), [1; 10]), hash);
    record.team = Some("search".into());
    change(&mut record);
    (plain, KeyRing::new(KEY_SECRET, [record]))
}

impl World {
    pub async fn start(settings: Settings) -> World {
        World::with(settings, KeyRing::new(KEY_SECRET, []), None).await
    }

    pub async fn with(settings: Settings, keys: KeyRing, tls: Option<Arc<rustls::ServerConfig>>) -> World {
        settings.check().unwrap();
        let journal = Arc::new(MemoryJournal {
            facts: Mutex::default(),
            fails: Mutex::new(Fails::Nothing),
            sync_delay_ms: AtomicU64::new(0),
            append_delay_ms: AtomicU64::new(0),
            lost: AtomicU64::new(0),
        });
        let settings = Arc::new(ArcSwap::from_pointee(settings));
        let prices = Arc::new(ArcSwap::from_pointee(PriceBook::base()));
        let gateway = Gateway::new(Parts {
            settings: Arc::clone(&settings),
            keys: Arc::new(ArcSwap::from_pointee(keys)),
            prices: Arc::clone(&prices),
            journal: Arc::clone(&journal) as Arc<dyn Journal>,
            clock: Arc::new(TestClock::new()),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        let running = gateway.clone();
        let serving = tokio::spawn(async move {
            running.serve(listener, tls, async { stopped.await.unwrap_or(()) }).await.unwrap();
        });
        let client = Client::builder(TokioExecutor::new()).build_http();
        World { address, gateway, journal, settings, prices, client, stop: Some(stop), serving: Some(serving) }
    }

    pub fn post(&self, path: &str) -> http::request::Builder {
        Request::post(format!("http://{}{path}", self.address)).header("content-type", "application/json")
    }

    pub async fn send(&self, path: &str, body: &str) -> Answered {
        let request = self.post(path).body(Full::from(body.to_owned())).unwrap();
        self.ask(request).await
    }

    pub async fn ask(&self, request: Request<Full<Bytes>>) -> Answered {
        let response = self.client.request(request).await.expect("an answer");
        read(response).await
    }

    /// The head of an answer, its body still to be read or dropped.
    pub async fn begin(&self, path: &str, body: &str) -> Response<Incoming> {
        let request = self.post(path).body(Full::from(body.to_owned())).unwrap();
        self.client.request(request).await.expect("an answer")
    }

    /// Waits until nothing runs any more and checks that the books are complete: one attempt for each opened record.
    pub async fn settled(&self) -> Vec<Attempt> {
        for _ in 0..1_000 {
            let metrics = self.gateway.metrics();
            if metrics.in_flight.get() == 0 && metrics.draining.get() == 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(self.gateway.metrics().in_flight.get(), 0, "an attempt never ended");
        let (opened, attempts) = (self.journal.opened(), self.journal.attempts());
        let mut booked: BTreeMap<AttemptId, usize> = opened.iter().map(|opened| (opened.id, 0)).collect();
        for attempt in &attempts {
            *booked.entry(attempt.id).or_default() += 1;
        }
        assert!(booked.values().all(|&times| times == 1), "{booked:?}");
        attempts
    }

    pub async fn one(&self) -> Attempt {
        let mut attempts = self.settled().await;
        assert_eq!(attempts.len(), 1, "{attempts:#?}");
        attempts.remove(0)
    }
}

/// An answer as its client saw it.
#[derive(Debug)]
pub struct Answered {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub trailers: HeaderMap,
    pub text: String,
    /// Whether the body ended as it should.
    pub whole: bool,
}

pub async fn read(response: Response<Incoming>) -> Answered {
    let (head, mut body) = response.into_parts();
    let (mut bytes, mut trailers, mut whole) = (Vec::new(), HeaderMap::new(), true);
    while let Some(frame) = body.frame().await {
        match frame {
            Ok(frame) => match frame.into_data() {
                Ok(data) => bytes.extend_from_slice(&data),
                Err(frame) => trailers = frame.into_trailers().unwrap(),
            },
            Err(_) => {
                whole = false;
                break;
            }
        }
    }
    let text = String::from_utf8_lossy(&bytes).into_owned();
    Answered { status: head.status, headers: head.headers, trailers, text, whole }
}

pub const CHAT: &str =
    r#"{"model":"gpt-4o","messages":[{"role":"user","content":"Say hello to everyone in the room."}]}"#;
pub const CHAT_STREAM: &str =
    r#"{"model":"gpt-4o","stream":true,"messages":[{"role":"user","content":"Say hello to everyone in the room."}]}"#;

pub fn usd(attempt: &Attempt) -> Option<String> {
    attempt.charge.costs().map(|costs| costs.effective_cost.to_string())
}
