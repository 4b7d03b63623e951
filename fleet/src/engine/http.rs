//! The engine's HTTP server: the OpenAI and Anthropic protocols, `/health`, `/v1/models` and `/metrics`.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use ledger::Clock;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::driver::{Engine, SharedGpus};
use super::metrics::Counters;
use super::protocol::{Body, Refusal, text};
use super::scheduler::Finished;
use super::text::mix;
use super::{EngineSpec, anthropic, openai};
use crate::FleetError;

/// Longest request body that is read.
const BODY_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Connections served at once; more wait to be accepted.
const CONNECTIONS_MAX: usize = 4096;

/// An engine that serves until this is dropped. Dropping it cuts its connections.
pub struct RunningEngine {
    engine: Arc<Engine>,
    address: SocketAddr,
    _tasks: JoinSet<()>,
}

impl RunningEngine {
    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its address as a URL without a path: `http://127.0.0.1:PORT`.
    #[must_use]
    pub fn base_url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// A copy of its counters.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.engine.counters()
    }

    /// Requests that ended, the latest 65,536 of them, oldest first.
    #[must_use]
    pub fn finished(&self) -> Vec<Finished> {
        self.engine.finished()
    }

    /// Requests in the batch and in the queue.
    #[must_use]
    pub fn load(&self) -> usize {
        self.engine.load()
    }
}

/// Starts an engine on these GPUs, listening on a free port of 127.0.0.1.
///
/// # Errors
/// [`FleetError`] when the description cannot work or no port is free.
pub async fn start(spec: EngineSpec, gpus: SharedGpus, clock: Arc<dyn Clock>) -> Result<RunningEngine, FleetError> {
    start_on(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), spec, gpus, clock).await
}

/// The same at an address of the caller's choice: a replica that was stopped comes back where it was.
///
/// # Errors
/// [`FleetError`] when the description cannot work or somebody else listens there.
pub async fn start_on(
    address: SocketAddr,
    spec: EngineSpec,
    gpus: SharedGpus,
    clock: Arc<dyn Clock>,
) -> Result<RunningEngine, FleetError> {
    spec.check()?;
    let failed = |source| FleetError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let engine = Arc::new(Engine::new(spec, gpus, clock));
    let mut tasks = JoinSet::new();
    let (accepting, loading) = (engine.clone(), Duration::try_from_secs_f64(engine.spec().load_s).unwrap_or_default());
    tasks.spawn(async move {
        load(&listener, loading).await;
        accept(listener, accepting).await;
    });
    let driven = engine.clone();
    tasks.spawn(async move { driven.drive().await });
    Ok(RunningEngine { engine, address, _tasks: tasks })
}

/// While the model loads nobody is answered: whoever connects is cut off at once.
async fn load(listener: &TcpListener, time: Duration) {
    // A timeout looks at what it bounds once before it looks at the time.
    if time.is_zero() {
        return;
    }
    let refuse = async {
        loop {
            if listener.accept().await.is_err() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    };
    let _loaded = tokio::time::timeout(time, refuse).await;
}

async fn accept(listener: TcpListener, engine: Arc<Engine>) {
    let served = Arc::new(AtomicU64::new(0));
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => match accepted {
                Ok((stream, _)) => drop(connections.spawn(serve(stream, engine.clone(), served.clone()))),
                // Out of file descriptors, most likely: let some connections end.
                Err(error) => {
                    tracing::warn!(%error, "a simulated engine could not accept a connection");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn serve(stream: TcpStream, engine: Arc<Engine>, served: Arc<AtomicU64>) {
    // Tokens are small and late ones are what clients measure, so they are not held back.
    let _best_effort = stream.set_nodelay(true);
    let service = service_fn(move |request| {
        let engine = engine.clone();
        let number = served.fetch_add(1, Ordering::Relaxed);
        async move { Ok::<_, io::Error>(route(&engine, number, request).await) }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a client of a simulated engine went away");
    }
}

async fn route(engine: &Engine, number: u64, request: Request<Incoming>) -> Response<Body> {
    let path = request.uri().path().to_owned();
    match (request.method(), path.as_str()) {
        (&Method::GET, "/health" | "/ping") => text(StatusCode::OK, "text/plain", String::new()),
        (&Method::GET, "/metrics") => {
            text(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", engine.metrics())
        }
        (&Method::GET, "/v1/models") => openai::models(engine),
        (&Method::POST, "/v1/messages" | "/v1/messages/count_tokens") => {
            messages(engine, number, &path, request).await.unwrap_or_else(anthropic::error)
        }
        (&Method::POST, "/v1/chat/completions" | "/v1/completions") => {
            completions(engine, number, &path, request).await.unwrap_or_else(openai::error)
        }
        _ => openai::error(Refusal::NotFound(format!("{} {path} is not served here", request.method()))),
    }
}

async fn completions(engine: &Engine, number: u64, path: &str, request: Request<Incoming>) -> Answer {
    let body = read_body(request).await?;
    let shape = if path == "/v1/completions" { openai::Shape::Text } else { openai::Shape::Chat };
    openai::answer(engine, shape, answer_id(engine, number), &body).await
}

async fn messages(engine: &Engine, number: u64, path: &str, request: Request<Incoming>) -> Answer {
    let body = read_body(request).await?;
    if path == "/v1/messages" {
        anthropic::messages(engine, answer_id(engine, number), &body).await
    } else {
        anthropic::count_tokens(engine, &body)
    }
}

type Answer = Result<Response<Body>, Refusal>;

async fn read_body(request: Request<Incoming>) -> Result<bytes::Bytes, Refusal> {
    let body = Limited::new(request.into_body(), BODY_BYTES_MAX).collect().await;
    body.map(http_body_util::Collected::to_bytes)
        .map_err(|error| Refusal::Bad(format!("the body could not be read: {error}")))
}

/// Unlike the ids of other engines and of earlier runs, because it stirs in the time.
fn answer_id(engine: &Engine, number: u64) -> u128 {
    let time = u64::try_from(engine.clock().now().micros()).unwrap_or(0);
    let high = mix(mix(engine.spec().seed, time), number);
    (u128::from(high) << 64) | u128::from(mix(high, engine.clock().monotonic_us()))
}
