//! Everything that runs at once and what it hands over to whom, in one place.
//!
//! ```text
//! clients ─> gateway ── Fact ──> store (log ─ flusher ─> tables)
//!               ^                  │     ^
//!   settings, keys, prices         │     └─ Fact ── telemetry <── engines, GPUs, spans
//!               ^                  │     └─ Fact ── declared pools, engines, jobs <── configuration, API, scaling
//! configuration, control log       │     └─ Posting ── settlement
//!               ^                  │     └─ Fact ── scaling ──> actuators
//!               └── which replicas serve ──────────┘
//!                                  └─> API, live page, metrics
//! ```

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use arc_swap::ArcSwap;
use fleet::otlp::{Receiver, serve_grpc};
use futures_util::future::{BoxFuture, FutureExt};
use gateway::{Gateway, Journal, JournalError, KeyRing, Parts, Settings};
use ledger::price::PriceBook;
use ledger::{Clock, Fact, Outcome};
use store::{Flusher, Position, Store};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_rustls::rustls;

use crate::config::{self, Loaded, Standing, price_book};
use crate::declared::Declared;
use crate::facts::Facts;
use crate::governance::{Governance, hashing_secret};
use crate::scaling::{Means, Scaling};
use crate::settlement::{self, Driver, Late, Rules, Sources};
use crate::telemetry::{Parts as TelemetryParts, Status, Telemetry, receiver};
use crate::{api, books};

/// How often the control log is looked at for new keys and prices.
const GOVERNANCE_EVERY: Duration = Duration::from_secs(1);

/// The store as the gateway's journal.
struct LedgerJournal {
    store: Store,
    declared: Arc<Declared>,
    late: Late,
    clock: Arc<dyn Clock>,
}

impl Journal for LedgerJournal {
    fn append(&self, fact: &Fact) -> Result<u64, JournalError> {
        let position = self.store.append(fact).map_err(|error| JournalError { cause: error.to_string() })?;
        self.late.note(fact);
        if let Fact::Attempt(attempt) = fact
            && attempt.route.pool.is_some()
            && attempt.outcome == Outcome::Completed
        {
            // An engine that answers is ready, whatever its metrics say.
            self.declared.answered(&attempt.route.upstream, attempt.timeline.received_at);
        }
        Ok(position.0)
    }

    fn synced(&self, position: u64) -> BoxFuture<'static, Result<(), JournalError>> {
        let synced = self.store.synced(Position(position));
        synced.map(|outcome| outcome.map_err(|error| JournalError { cause: error.to_string() })).boxed()
    }

    fn keep(&self, fact: &Fact) -> bool {
        let kept = self.store.keep(fact);
        self.late.note(fact);
        kept
    }

    fn lost(&self, cause: &JournalError) {
        self.store.record_lost(self.clock.now(), &cause.cause);
    }
}

/// Tells everything that runs to stop.
#[derive(Debug, Clone)]
pub struct Shutdown(watch::Receiver<bool>);

impl Shutdown {
    /// A switch and what listens to it.
    #[must_use]
    pub fn new() -> (watch::Sender<bool>, Shutdown) {
        let (switch, receiver) = watch::channel(false);
        (switch, Shutdown(receiver))
    }

    /// Resolves when it is time to stop, or nobody is left to say so.
    pub async fn requested(&self) {
        let mut receiver = self.0.clone();
        let _ = receiver.wait_for(|&stop| stop).await;
    }
}

/// Asks the running server to settle what there is, without waiting for the minute to end.
#[derive(Debug, Clone)]
pub struct SettleNow(mpsc::Sender<oneshot::Sender<()>>);

impl SettleNow {
    /// Resolves when everything so far is settled and in the tables.
    ///
    /// # Errors
    /// When the server has stopped.
    pub async fn request(&self) -> anyhow::Result<()> {
        let (done, settled) = oneshot::channel();
        self.0.send(done).await.context("the server has stopped")?;
        settled.await.context("the server stopped while it settled")
    }
}

/// A server that is bound and has its ledger open, but does not accept yet.
pub struct Server {
    /// The ledger.
    pub store: Store,
    /// The gateway.
    pub gateway: Gateway,
    /// Where clients connect.
    pub gateway_address: SocketAddr,
    /// Where the API and the live page are.
    pub admin_address: SocketAddr,
    state: State,
    driver: Driver,
    gateway_listener: TcpListener,
    admin_listener: TcpListener,
    /// Where spans come in over gRPC, when the configuration says so.
    grpc_listener: Option<TcpListener>,
    scaling: Scaling,
    tls: Option<Arc<rustls::ServerConfig>>,
    token: Option<Arc<str>>,
    flusher: Flusher,
    settle_now: SettleNow,
    orders: mpsc::Receiver<oneshot::Sender<()>>,
}

/// What changes while the server runs.
struct State {
    loaded: Loaded,
    governance: Governance,
    secret: [u8; 32],
    settings: Arc<ArcSwap<Settings>>,
    keys: Arc<ArcSwap<KeyRing>>,
    prices: Arc<ArcSwap<PriceBook>>,
    clock: Arc<dyn Clock>,
    declared: Arc<Declared>,
    facts: Facts,
    rules: Arc<ArcSwap<Rules>>,
}

impl Server {
    /// Opens the ledger, binds both listeners and connects the parts.
    ///
    /// # Errors
    /// When the configuration cannot be acted on, the ledger is in use, or an address is taken.
    pub async fn start(data: &std::path::Path, loaded: Loaded, clock: Arc<dyn Clock>) -> anyhow::Result<Server> {
        let settings = config::settings(&loaded)?;
        let tls = tls(&loaded)?;
        let token =
            loaded.config.admin.token.as_ref().map(|token| loaded.secret(token)).transpose().context("admin.token")?;
        let (store, governance, recovery) = books::write(data, &loaded).await?;
        if recovery.records > 0 || !recovery.damaged.is_empty() {
            tracing::info!(
                records = recovery.records,
                crashed = recovery.crashed.len(),
                damaged = recovery.damaged.len(),
                "the log was replayed"
            );
        }
        let gateway_listener = bind("gateway.listen", loaded.config.gateway.listen).await?;
        let admin_listener = bind("admin.listen", loaded.config.admin.listen).await?;
        let grpc_listener = match loaded.config.telemetry.otlp_grpc {
            Some(address) => Some(bind("telemetry.otlp_grpc", address).await?),
            None => None,
        };
        let declared = Arc::new(Declared::open(data, &loaded, clock.now())?);
        let scaling = Scaling::open(data, &loaded)?;
        let late = Late::default();
        let facts = Facts::new(store.clone(), late.clone());

        let secret = hashing_secret(data)?;
        let settings = Arc::new(ArcSwap::from_pointee(settings));
        let keys = Arc::new(ArcSwap::from_pointee(governance.key_ring(secret)));
        let prices = Arc::new(ArcSwap::from_pointee(price_book(&loaded.config, governance.price_map.as_ref())));
        let gateway = Gateway::new(Parts {
            settings: Arc::clone(&settings),
            keys: Arc::clone(&keys),
            prices: Arc::clone(&prices),
            journal: Arc::new(LedgerJournal {
                store: store.clone(),
                declared: Arc::clone(&declared),
                late: late.clone(),
                clock: Arc::clone(&clock),
            }),
            clock: Arc::clone(&clock),
        });
        let rules = Arc::new(ArcSwap::from_pointee(Rules::of(&loaded.config)));
        let sources = sources(&gateway, &declared);
        let driver = Driver::new(store.clone(), Arc::clone(&rules), Arc::clone(&prices), sources, late);
        let flusher =
            store.spawn_flusher(Arc::clone(&clock), Duration::from_millis(loaded.config.ledger.flush_every_ms))?;
        let (orders_in, orders) = mpsc::channel(1);
        Ok(Server {
            gateway_address: gateway_listener.local_addr()?,
            admin_address: admin_listener.local_addr()?,
            state: State { loaded, governance, secret, settings, keys, prices, clock, declared, facts, rules },
            driver,
            store,
            gateway,
            gateway_listener,
            admin_listener,
            grpc_listener,
            scaling,
            tls,
            token: token.map(Into::into),
            flusher,
            settle_now: SettleNow(orders_in),
            orders,
        })
    }

    /// A handle that asks for a settlement between minutes.
    #[must_use]
    pub fn settle_now(&self) -> SettleNow {
        self.settle_now.clone()
    }

    /// Serves until told to stop, then drains: running requests finish, pools are settled, the log is flushed.
    ///
    /// # Errors
    /// When a listener fails or the ledger cannot be written to its end.
    pub async fn run(self, shutdown: Shutdown) -> anyhow::Result<()> {
        let status = Status::default();
        let spans = self.spans();
        let telemetry = Telemetry::start(
            &self.state.loaded,
            TelemetryParts {
                facts: self.state.facts.clone(),
                declared: Arc::clone(&self.state.declared),
                status: status.clone(),
                clock: Arc::clone(&self.state.clock),
            },
        );
        let scaled = Means {
            store: self.store.clone(),
            facts: self.state.facts.clone(),
            gateway: self.gateway.clone(),
            declared: Arc::clone(&self.state.declared),
            telemetry: status.clone(),
            clock: Arc::clone(&self.state.clock),
        };
        // Before anybody is served: a replica that does not run yet must not be sent to.
        let scaled = self.scaling.start(&self.state.loaded, scaled, &shutdown).await?;
        let api = api::State {
            store: self.store.clone(),
            gateway: self.gateway.clone(),
            prices: Arc::clone(&self.state.prices),
            token: self.token,
            clock: Arc::clone(&self.state.clock),
            declared: Arc::clone(&self.state.declared),
            telemetry: status,
            facts: self.state.facts.clone(),
            spans: spans.clone().filter(|_| self.state.loaded.config.telemetry.otlp),
            cache: api::Cache::default(),
            scaling: self.scaling,
        };
        let (last_switch, last) = Shutdown::new();
        let admin = tokio::spawn(api::serve(self.admin_listener, api, last.clone()));
        let told = tokio::spawn(take_spans(self.grpc_listener, spans, last.clone()));
        let settling = settlement::keep(self.driver, Arc::clone(&self.state.clock), self.orders, last.clone());
        let settling = tokio::spawn(settling);
        let governing = tokio::spawn(govern(self.state, telemetry, self.store.clone(), last));
        let accepted =
            self.gateway.serve(self.gateway_listener, self.tls, async move { shutdown.requested().await }).await;

        scaled.stop().await;
        // The gateway has drained; what watches it stops after it, so that the last requests are seen and settled.
        let _ = last_switch.send(true);
        settling.await?;
        governing.await?;
        admin.await??;
        told.await??;
        tokio::task::spawn_blocking(move || self.flusher.stop()).await?.context("the last flush")?;
        accepted.context("gateway")
    }
}

impl Server {
    /// What takes spans, over HTTP and gRPC alike; `None` when neither is wanted.
    fn spans(&self) -> Option<Receiver> {
        let telemetry = &self.state.loaded.config.telemetry;
        let wanted = telemetry.otlp || self.grpc_listener.is_some();
        wanted.then(|| receiver(self.state.facts.clone(), Arc::clone(&self.state.clock), self.token.as_deref()))
    }
}

/// Spans over gRPC until the last moment, where a listener is configured.
async fn take_spans(
    listener: Option<TcpListener>,
    receiver: Option<Receiver>,
    shutdown: Shutdown,
) -> anyhow::Result<()> {
    let (Some(listener), Some(receiver)) = (listener, receiver) else { return Ok(()) };
    serve_grpc(listener, receiver, async move { shutdown.requested().await }).await.context("telemetry.otlp_grpc")
}

async fn bind(key: &str, address: SocketAddr) -> anyhow::Result<TcpListener> {
    let bound = TcpListener::bind(address).await;
    bound.with_context(|| format!("cannot listen on {address}; stop what does, or set {key} to another address"))
}

/// TLS towards clients, when the configuration asks for it.
///
/// # Errors
/// When a file cannot be read or is no certificate or key.
pub fn tls(loaded: &Loaded) -> anyhow::Result<Option<Arc<rustls::ServerConfig>>> {
    let Some(section) = &loaded.config.gateway.tls else { return Ok(None) };
    let read = |path: &std::path::Path| {
        let path = loaded.beside(path);
        std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    Ok(Some(gateway::server_tls(&read(&section.certificate)?, &read(&section.key)?)?))
}

/// What settlement asks the gateway and the declared pools for.
fn sources(gateway: &Gateway, declared: &Arc<Declared>) -> Sources {
    let (gateway, observed, fitted) = (gateway.clone(), Arc::clone(declared), Arc::clone(declared));
    Sources {
        running: Box::new(move || gateway.running()),
        observe: Box::new(move |now| observed.observe(now)),
        recalibrate: Box::new(move |fact| fitted.recalibrate(fact)),
    }
}

/// Keeps settings, keys, prices and rules as configuration and control log say.
async fn govern(mut state: State, mut telemetry: Telemetry, store: Store, shutdown: Shutdown) {
    let mut hangups = hangups();
    let mut governance = tokio::time::interval(GOVERNANCE_EVERY);
    governance.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shutdown.requested() => break,
            () = hangups.next() => complain("reload", state.reload(&mut telemetry)),
            _ = governance.tick() => complain("control log", state.catch_up(&store).await),
        }
    }
}

impl State {
    async fn catch_up(&mut self, store: &Store) -> anyhow::Result<()> {
        if self.governance.catch_up(&store.control()).await? {
            self.publish();
            tracing::info!(through = self.governance.through, "keys and prices are as the control log says");
        }
        Ok(())
    }

    fn publish(&self) {
        self.keys.store(Arc::new(self.governance.key_ring(self.secret)));
        self.prices.store(Arc::new(price_book(&self.loaded.config, self.governance.price_map.as_ref())));
    }

    /// Reads the configuration again; a wrong one changes nothing.
    fn reload(&mut self, telemetry: &mut Telemetry) -> anyhow::Result<()> {
        let file = self.loaded.file.as_deref().context("there is no configuration file to read again")?;
        let loaded = config::load(Some(file))?;
        let keys = self.governance.valid_keys(self.clock.now());
        let wrong = config::check(&loaded.config, Standing { keys });
        anyhow::ensure!(wrong.is_empty(), "the configuration was not taken: {}", wrong.join("; "));
        let (old, new) = (&self.loaded.config, &loaded.config);
        if old.gateway.listen != new.gateway.listen
            || old.admin != new.admin
            || old.gateway.tls != new.gateway.tls
            || old.telemetry.otlp_grpc != new.telemetry.otlp_grpc
            || old.telemetry.otlp != new.telemetry.otlp
        {
            tracing::warn!("listeners, TLS, the admin token and the receiving of spans change with the next start");
        }
        if old.scale != new.scale || old.scaling != new.scaling {
            tracing::warn!("what is scaled and how changes with the next start");
        }
        let listened = |config: &config::Config| (config.upstream.clone(), config.telemetry.clone());
        let heard_otherwise = listened(old) != listened(new);
        let settings = config::settings(&loaded)?;
        self.declared.change(&loaded, self.clock.now())?;
        self.settings.store(Arc::new(settings));
        // Minutes of a pool that is gone are settled by the rules that it had.
        let mut rules = Rules::of(&loaded.config);
        for (pool, policy) in &self.rules.load().policies {
            rules.policies.entry(pool.clone()).or_insert(*policy);
        }
        self.rules.store(Arc::new(rules));
        if heard_otherwise {
            telemetry.change(&loaded);
        }
        self.loaded = loaded;
        self.publish();
        tracing::info!("the configuration was read again");
        Ok(())
    }
}

fn complain<T>(what: &str, outcome: anyhow::Result<T>) {
    if let Err(error) = outcome {
        tracing::error!("{what}: {error:#}");
    }
}

/// Signals that ask to read the configuration again.
struct Hangups(Option<tokio::signal::unix::Signal>);

fn hangups() -> Hangups {
    Hangups(tokio::signal::unix::signal(tokio::signal::unix::SignalKind::hangup()).ok())
}

impl Hangups {
    async fn next(&mut self) {
        match &mut self.0 {
            Some(signal) => {
                signal.recv().await;
            }
            None => std::future::pending().await,
        }
    }
}
