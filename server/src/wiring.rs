//! Everything that runs at once and what it hands over to whom, in one place.
//!
//! ```text
//! clients ─> gateway ── Fact ──> store (log ─ flusher ─> tables)
//!               ^                  │
//!   settings, keys, prices         └─> API, live page, metrics
//!               ^
//! configuration, control log       pools ── CapacityFact, Posting ──> store
//! ```

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use arc_swap::ArcSwap;
use futures_util::future::{BoxFuture, FutureExt};
use gateway::{Gateway, Journal, JournalError, KeyRing, Parts, Settings};
use ledger::price::PriceBook;
use ledger::{Clock, Fact, Period, Timestamp};
use store::{Flusher, Position, Store};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_rustls::rustls;

use crate::config::{self, Loaded, Standing, price_book};
use crate::governance::{Governance, hashing_secret};
use crate::pools::{Pools, settle};
use crate::{api, books};

/// How often the control log is looked at for new keys and prices.
const GOVERNANCE_EVERY: Duration = Duration::from_secs(1);
/// How far back a minute's settlement looks; what is older was settled at the start.
const SETTLE_BACK_US: i64 = 2 * 3_600_000_000;

/// The store as the gateway's journal.
struct LedgerJournal {
    store: Store,
    clock: Arc<dyn Clock>,
}

impl Journal for LedgerJournal {
    fn append(&self, fact: &Fact) -> Result<u64, JournalError> {
        self.store.append(fact).map(|position| position.0).map_err(|error| JournalError { cause: error.to_string() })
    }

    fn synced(&self, position: u64) -> BoxFuture<'static, Result<(), JournalError>> {
        let synced = self.store.synced(Position(position));
        synced.map(|outcome| outcome.map_err(|error| JournalError { cause: error.to_string() })).boxed()
    }

    fn keep(&self, fact: &Fact) -> bool {
        self.store.keep(fact)
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
    gateway_listener: TcpListener,
    admin_listener: TcpListener,
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
    pools: Pools,
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

        let secret = hashing_secret(data)?;
        let settings = Arc::new(ArcSwap::from_pointee(settings));
        let keys = Arc::new(ArcSwap::from_pointee(governance.key_ring(secret)));
        let prices = Arc::new(ArcSwap::from_pointee(price_book(&loaded.config, governance.price_map.as_ref())));
        let gateway = Gateway::new(Parts {
            settings: Arc::clone(&settings),
            keys: Arc::clone(&keys),
            prices: Arc::clone(&prices),
            journal: Arc::new(LedgerJournal { store: store.clone(), clock: Arc::clone(&clock) }),
            clock: Arc::clone(&clock),
        });
        let flusher =
            store.spawn_flusher(Arc::clone(&clock), Duration::from_millis(loaded.config.ledger.flush_every_ms))?;
        let pools = Pools::new(&loaded, clock.now());
        let (orders_in, orders) = mpsc::channel(1);
        Ok(Server {
            gateway_address: gateway_listener.local_addr()?,
            admin_address: admin_listener.local_addr()?,
            state: State { loaded, governance, secret, settings, keys, prices, clock, pools },
            store,
            gateway,
            gateway_listener,
            admin_listener,
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
        let api = api::State {
            store: self.store.clone(),
            gateway: self.gateway.clone(),
            prices: Arc::clone(&self.state.prices),
            token: self.token,
            clock: Arc::clone(&self.state.clock),
            cache: api::Cache::default(),
        };
        let (last_switch, last) = Shutdown::new();
        let admin = tokio::spawn(api::serve(self.admin_listener, api, last.clone()));
        let governing = tokio::spawn(govern(self.state, self.store.clone(), self.orders, last));
        let accepted =
            self.gateway.serve(self.gateway_listener, self.tls, async move { shutdown.requested().await }).await;

        // The gateway has drained; what watches it stops after it, so that the last requests are seen and settled.
        let _ = last_switch.send(true);
        governing.await?;
        admin.await??;
        tokio::task::spawn_blocking(move || self.flusher.stop()).await?.context("the last flush")?;
        accepted.context("gateway")
    }
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

/// Keeps settings, keys, prices and pools as configuration and control log say, minute by minute.
async fn govern(mut state: State, store: Store, mut orders: mpsc::Receiver<oneshot::Sender<()>>, shutdown: Shutdown) {
    let mut hangups = hangups();
    let mut governance = tokio::time::interval(GOVERNANCE_EVERY);
    governance.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // What an earlier run left unsettled, before the new minutes.
    let now = state.clock.now();
    complain("settling", settle(&store, Vec::new(), Period { end: now, ..Period::ALL }, now).await);
    let mut settled = ledger::settle::interval_of(now);
    loop {
        tokio::select! {
            () = shutdown.requested() => break,
            Some(done) = orders.recv() => {
                let now = state.clock.now();
                complain("settling", state.settle(&store, now, ledger::settle::interval_of(now).end).await);
                complain("flush", store.flush(now).await.map_err(Into::into));
                let _ = done.send(());
            }
            () = hangups.next() => complain("reload", state.reload()),
            _ = governance.tick() => {
                complain("control log", state.catch_up(&store).await);
                let now = state.clock.now();
                if now >= settled.end {
                    settled = ledger::settle::interval_of(now);
                    complain("settling", state.settle(&store, now, now).await);
                }
            }
        }
    }
    // The minute that runs is settled as far as it went; should the server start again within it, the rest follows.
    let now = state.clock.now();
    complain("settling", state.settle(&store, now, ledger::settle::interval_of(now).end).await);
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
    fn reload(&mut self) -> anyhow::Result<()> {
        let file = self.loaded.file.as_deref().context("there is no configuration file to read again")?;
        let loaded = config::load(Some(file))?;
        let keys = self.governance.valid_keys(self.clock.now());
        let wrong = config::check(&loaded.config, Standing { keys });
        anyhow::ensure!(wrong.is_empty(), "the configuration was not taken: {}", wrong.join("; "));
        let (old, new) = (&self.loaded.config, &loaded.config);
        if old.gateway.listen != new.gateway.listen || old.admin != new.admin || old.gateway.tls != new.gateway.tls {
            tracing::warn!("listeners, TLS and the admin token change with the next start");
        }
        self.settings.store(Arc::new(config::settings(&loaded)?));
        self.pools.change(&loaded, self.clock.now());
        self.loaded = loaded;
        self.publish();
        tracing::info!("the configuration was read again");
        Ok(())
    }

    async fn settle(&mut self, store: &Store, now: Timestamp, until: Timestamp) -> anyhow::Result<()> {
        let observed = self.pools.observe(now);
        let start = now.plus_micros(-SETTLE_BACK_US);
        settle(store, observed, Period { start, end: until }, now).await?;
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
