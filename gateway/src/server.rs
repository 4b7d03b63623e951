//! The way in: accepts connections, speaks HTTP/1.1 and HTTP/2 on them, and lets go of them in good order.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use ledger::price::PriceBook;
use ledger::{Clock, Label, Running};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use crate::availability::{Availability, Board, Deployment};
use crate::background::Background;
use crate::client_socket::ClientSocket;
use crate::demand::Demand;
use crate::journal::Journal;
use crate::keys::KeyRing;
use crate::metrics::Metrics;
use crate::pipeline::{self, Core, Room};
use crate::running::Registry;
use crate::settings::{Limits, Settings};
use crate::upstream::{Outbound, chain};

/// Most headers of one request.
const HEADERS_MAX: usize = 128;
/// The least that hyper accepts as a bound on a request's head.
const HEADER_BYTES_MIN: usize = 8_192;
/// Streams that one HTTP/2 connection may have open.
const STREAMS_MAX: u32 = 256;
/// Wait after the system had no more sockets to give.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);
/// Time for background work to book itself after it was told to stop.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Why a gateway does not start, or stops.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// The certificate or its key cannot be used.
    #[error("the TLS certificate cannot be used: {0}")]
    Certificate(String),
    /// The listening socket is gone.
    #[error("connections can no longer be accepted: {0}")]
    Listener(#[source] io::Error),
}

/// What a gateway is made of. Snapshots can be replaced while it runs.
pub struct Parts {
    /// Upstreams, routes, limits, policies.
    pub settings: Arc<ArcSwap<Settings>>,
    /// Virtual keys.
    pub keys: Arc<ArcSwap<KeyRing>>,
    /// Prices.
    pub prices: Arc<ArcSwap<PriceBook>>,
    /// Where facts go.
    pub journal: Arc<dyn Journal>,
    /// Where time comes from.
    pub clock: Arc<dyn Clock>,
}

/// The metering reverse proxy. Clones share everything.
#[derive(Clone)]
pub struct Gateway {
    core: Arc<Core>,
}

impl Gateway {
    /// A gateway that listens nowhere yet.
    #[must_use]
    pub fn new(parts: Parts) -> Gateway {
        let limits = parts.settings.load().limits;
        let Parts { settings, keys, prices, journal, clock } = parts;
        let (outbound, background) = (Outbound::new(limits.connect_ms_max), Background::new(limits.drains_max));
        let (metrics, running) = (Metrics::default(), Arc::new(Registry::default()));
        let room = Arc::new(Room::default());
        let board = Board::default();
        let core = Core { settings, keys, prices, journal, clock, metrics, outbound, background, running, room, board };
        Gateway { core: Arc::new(core) }
    }

    /// What was counted since it started.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.core.metrics
    }

    /// Every attempt that was sent and has not ended, as far as it got, in the order of their ids.
    ///
    /// Tokens are counted cheaply: the input by the length of the request's text, the output by the events that carried text
    /// (one is one token of vLLM's; elsewhere their text may stand for more). Of an answer that comes in one piece no output
    /// is known before its end, and none is claimed.
    ///
    /// An attempt leaves after its finished record is in the journal. Who looks here first and at the journal's records then
    /// misses none, and finds some in both: there the record is what counts.
    #[must_use]
    pub fn running(&self) -> Vec<Running> {
        self.core.running.look(&*self.core.clock)
    }

    /// Says whether the upstream of this name takes requests from now on. All do until somebody says otherwise. It is remembered by
    /// name, over every change of the settings, and may be said of an upstream before it is configured.
    ///
    /// Requests for which nothing takes requests are held, within [`Limits::hold_requests_max`] and [`Limits::hold_ms_max`], and
    /// go on when this says [`Availability::Serving`] of something that serves them.
    pub fn set_available(&self, upstream: &str, availability: Availability) {
        self.core.board.set(upstream, availability);
    }

    /// Whether the upstream of this name takes requests.
    #[must_use]
    pub fn available(&self, upstream: &str) -> Availability {
        self.core.board.available(upstream)
    }

    /// Attempts at this upstream that have not ended.
    ///
    /// When [`set_available`](Gateway::set_available) returned with anything but serving, each request that was planned for the
    /// upstream before is counted here or goes elsewhere: zero then means that nobody needs it any more.
    #[must_use]
    pub fn in_flight(&self, upstream: &str) -> u32 {
        self.core.board.in_flight(upstream)
    }

    /// Resolves when no attempt is at this upstream. It has no time limit of its own.
    pub async fn drained(&self, upstream: &str) {
        self.core.board.drained(upstream).await;
    }

    /// Requests that wait because nothing takes them, by the deployment they want; deployments that nobody waits for are left out.
    #[must_use]
    pub fn held(&self) -> BTreeMap<Deployment, u32> {
        self.core.board.held()
    }

    /// What came for each deployment and what became of it, since the gateway was made.
    #[must_use]
    pub fn demand(&self) -> BTreeMap<Deployment, Demand> {
        self.core.board.demand()
    }

    /// The same for each upstream.
    #[must_use]
    pub fn served(&self) -> BTreeMap<Label, Demand> {
        self.core.board.served()
    }

    /// Serves `listener` until `shutdown` resolves, then lets running requests end for [`Limits::shutdown_ms_max`].
    /// What is still running then is cut, and booked.
    ///
    /// # Errors
    /// [`GatewayError::Listener`] when the socket itself fails; a broken connection is counted and served around.
    pub async fn serve(
        &self,
        listener: TcpListener,
        tls: Option<Arc<rustls::ServerConfig>>,
        shutdown: impl Future<Output = ()>,
    ) -> Result<(), GatewayError> {
        let limits = self.core.settings.load().limits;
        let room = Arc::new(Semaphore::new(limits.connections_max.min(Semaphore::MAX_PERMITS)));
        let acceptor = tls.map(TlsAcceptor::from);
        let (stop, stopping) = watch::channel(());
        let mut connections = JoinSet::new();
        let mut shutdown = pin!(shutdown);
        let served = loop {
            let next = async {
                // Nobody is accepted whom there is no room for: the backlog waits, and the memory is bounded.
                let permit = Arc::clone(&room).acquire_owned().await.expect("the semaphore is never closed");
                (permit, listener.accept().await)
            };
            let (permit, accepted) = tokio::select! {
                biased;
                () = &mut shutdown => break Ok(()),
                Some(_) = connections.join_next(), if !connections.is_empty() => continue,
                next = next => next,
            };
            match accepted {
                Ok((stream, peer)) => {
                    let (core, acceptor, stopping) = (Arc::clone(&self.core), acceptor.clone(), stopping.clone());
                    connections.spawn(async move {
                        connection(core, stream, peer.ip(), acceptor, stopping, limits).await;
                        drop(permit);
                    });
                }
                Err(error) if is_fatal(&error) => break Err(GatewayError::Listener(error)),
                Err(error) => {
                    tracing::warn!(%error, "a connection was not accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        };
        drop(listener);
        drop(stopping);
        let _ = stop.send(());
        // What waits for a replica would wait in vain; it is told so while there is time.
        self.core.board.close();
        self.wind_down(connections, Duration::from_millis(limits.shutdown_ms_max)).await;
        served
    }

    async fn wind_down(&self, mut connections: JoinSet<()>, patience: Duration) {
        let all_ended = async {
            while connections.join_next().await.is_some() {}
            self.core.background.ended(patience).await
        };
        if tokio::time::timeout(patience, all_ended).await == Ok(true) {
            return;
        }
        tracing::warn!(connections = connections.len(), "cutting what did not end in time");
        // Attempts book themselves when they are dropped; from here on none moves to the background instead.
        self.core.background.stop();
        connections.shutdown().await;
        self.core.background.ended(LAST_WORDS).await;
    }
}

/// Whether the listener itself is broken, rather than one connection or the moment.
fn is_fatal(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::NotConnected | io::ErrorKind::Unsupported)
}

async fn connection(
    core: Arc<Core>,
    stream: TcpStream,
    peer: IpAddr,
    acceptor: Option<TlsAcceptor>,
    stopping: watch::Receiver<()>,
    limits: Limits,
) {
    core.metrics.connections.up();
    let _open = OnDrop(|| core.metrics.connections.down());
    // Small frames of a stream must not wait for each other.
    if stream.set_nodelay(true).is_err() {
        return;
    }
    let ended = match acceptor {
        None => speak(&core, stream, peer, stopping, limits).await,
        Some(acceptor) => {
            let patience = Duration::from_millis(limits.header_ms_max);
            match tokio::time::timeout(patience, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => speak(&core, stream, peer, stopping, limits).await,
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err("no TLS handshake in time".to_owned()),
            }
        }
    };
    if let Err(reason) = ended {
        core.metrics.broken_connections.up();
        tracing::debug!(%peer, reason, "connection broken");
    }
}

struct OnDrop<F: Fn()>(F);

impl<F: Fn()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

async fn speak<S>(
    core: &Arc<Core>,
    stream: S,
    peer: IpAddr,
    mut stopping: watch::Receiver<()>,
    limits: Limits,
) -> Result<(), String>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let patience = Duration::from_millis(limits.header_ms_max);
    let started = AtomicBool::new(false);
    let service = service_fn(|request| {
        started.store(true, Ordering::Relaxed);
        let core = Arc::clone(core);
        async move { Ok::<_, Infallible>(pipeline::serve(core, peer, request).await) }
    });
    let builder = http(limits, patience);
    let socket = ClientSocket::new(stream, Duration::from_millis(limits.stream_idle_ms_max));
    let mut serving = pin!(builder.serve_connection(TokioIo::new(socket), service));
    let mut first_request = pin!(tokio::time::sleep(patience));
    let mut waiting = true;
    loop {
        tokio::select! {
            biased;
            ended = serving.as_mut() => return ended.map_err(|error| chain(&*error)),
            // hyper's own time limit starts when it knows the protocol; a client may never get that far.
            () = first_request.as_mut(), if waiting => {
                if !started.load(Ordering::Relaxed) {
                    return Err("no request in time".to_owned());
                }
                waiting = false;
            }
            _ = stopping.changed() => break,
        }
    }
    serving.as_mut().graceful_shutdown();
    serving.await.map_err(|error| chain(&*error))
}

fn http(limits: Limits, patience: Duration) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(patience)
        .max_buf_size(limits.header_bytes_max.max(HEADER_BYTES_MIN))
        .max_headers(HEADERS_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .keep_alive_interval(patience)
        .max_header_list_size(u32::try_from(limits.header_bytes_max).unwrap_or(u32::MAX));
    builder
}

/// A TLS configuration for [`Gateway::serve`] from a certificate chain and its private key, both PEM.
///
/// # Errors
/// [`GatewayError::Certificate`] says what is wrong; it never contains the key.
pub fn server_tls(certificate_pem: &[u8], key_pem: &[u8]) -> Result<Arc<rustls::ServerConfig>, GatewayError> {
    let wrong = |reason: String| GatewayError::Certificate(reason);
    let chain: Vec<_> = CertificateDer::pem_slice_iter(certificate_pem)
        .collect::<Result<_, _>>()
        .map_err(|_| wrong("the certificate is not PEM".to_owned()))?;
    if chain.is_empty() {
        return Err(wrong("there is no certificate in the file".to_owned()));
    }
    let key =
        PrivateKeyDer::from_pem_slice(key_pem).map_err(|_| wrong("there is no private key in the file".to_owned()))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| wrong(error.to_string()))?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|error| wrong(error.to_string()))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
