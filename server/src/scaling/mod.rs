//! Scaling while the server runs: one task for each deployment that looks, decides and writes down, and beside it one that
//! carries out. In shadow, which is the default, nothing is carried out and everything is written down all the same.
//!
//! ```text
//! gateway, engines, declared replicas, actuator ─> look ─> fleet::scale ─> decision ─> ledger
//!                                                                            └─ in mode act ─> actuator
//! ```

mod carry;
mod deployment;
mod history;
mod observe;
mod plan;
mod roster;
mod saved;
mod shown;
mod switch;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use fleet::actuate::{Actuator, Spec, Wanted, serve_keda};
use gateway::Gateway;
use ledger::{Clock, ScalingMode};
use store::Store;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

use crate::config::Loaded;
use crate::declared::Declared;
use crate::facts::Facts;
use crate::telemetry::Status;
use crate::wiring::Shutdown;
use carry::Carrier;
use deployment::Parts;

pub use saved::{GivenBackRow, given_back, text};
pub use shown::{Board, Shown};
pub use switch::Switch;

/// After so many decisions that did not come KEDA is told that nothing is known, and after this time at least.
const KEDA_STALE: u32 = 6;
const KEDA_STALE_MIN: Duration = Duration::from_secs(60);

/// What scaling works with.
#[derive(Clone)]
pub struct Means {
    /// The ledger.
    pub store: Store,
    /// Where decisions go.
    pub facts: Facts,
    /// What comes in, and who may be sent to.
    pub gateway: Gateway,
    /// GPUs and engines as they are declared.
    pub declared: Arc<Declared>,
    /// What the engines last said.
    pub telemetry: Status,
    /// Where time comes from.
    pub clock: Arc<dyn Clock>,
}

/// Scaling as the API and the metrics see it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Scaling {
    /// The kill switch.
    pub switch: Switch,
    /// Every deployment as it stands.
    pub board: Board,
}

impl Scaling {
    /// Scaling for the ledger in the folder `data`, with nothing decided yet.
    ///
    /// # Errors
    /// When the kill switch cannot be read.
    pub fn open(data: &Path, loaded: &Loaded) -> anyhow::Result<Scaling> {
        let held_by = loaded.config.scaling.stop_file.as_deref().map(|file| loaded.beside(file));
        Ok(Scaling { switch: Switch::open(data, held_by)?, board: Board::default() })
    }

    /// Starts a task for each deployment. Returns when the gateway knows which replicas may be sent to.
    ///
    /// # Errors
    /// When the configuration cannot be acted on.
    pub async fn start(&self, loaded: &Loaded, means: Means, shutdown: &Shutdown) -> anyhow::Result<Running> {
        let mut running = Running { tasks: JoinSet::new(), deciding: Vec::new() };
        let plans = plan::plans(loaded, means.clock.now())?;
        let slowest = plans.iter().map(|plan| plan.every).max().unwrap_or_default();
        let keda = Wanted::new((KEDA_STALE * slowest).max(KEDA_STALE_MIN));
        if let Some(address) = loaded.config.scaling.keda_listen {
            let listener = TcpListener::bind(address).await;
            let listener = listener.with_context(|| format!("scaling.keda_listen: cannot listen on {address}"))?;
            running.tasks.spawn(ask_keda(listener, keda.clone(), Arc::clone(&means.clock), shutdown.clone()));
        }
        for plan in plans {
            let plan = Arc::new(plan);
            let keda = (plan.actuator == Spec::Keda).then(|| keda.clone());
            keda.iter().for_each(|keda| keda.declare(&plan.id.pool, &plan.id.name));
            let acts = plan.mode == ScalingMode::Act;
            let actuator = Actuator::new(&plan.actuator, loaded.folder())
                .with_context(|| format!("scale `{}`: its actuator", plan.id.name))?;
            let carrier = Carrier::new(Arc::clone(&plan), actuator, &means);
            carrier.read().await;
            if acts {
                let carried = carrier.carried();
                let actual = carried.actual.as_ref().map(|(_, actual)| actual);
                let roster = roster::roster(&plan, &means.declared, actual, means.clock.now());
                roster::offer(&plan, &means.gateway, &roster, &carried.draining);
                running.tasks.spawn(Arc::clone(&carrier).keep_carrying());
            }
            running.tasks.spawn(Arc::clone(&carrier).keep_reading(plan.every));
            let parts = Parts { means: means.clone(), switch: self.switch.clone(), board: self.board.clone(), keda };
            running.deciding.push(tokio::spawn(deployment::keep(plan, parts, carrier, shutdown.clone())));
        }
        Ok(running)
    }
}

/// Answers KEDA until told to stop.
async fn ask_keda(listener: TcpListener, wanted: Wanted, clock: Arc<dyn Clock>, shutdown: Shutdown) {
    if let Err(error) = serve_keda(listener, wanted, clock, async move { shutdown.requested().await }).await {
        tracing::error!("KEDA is not answered any more: {error}");
    }
}

/// The tasks of all deployments; those that carry out end when this is dropped.
#[derive(Debug)]
pub struct Running {
    tasks: JoinSet<()>,
    deciding: Vec<tokio::task::JoinHandle<()>>,
}

impl Running {
    /// Waits until the last decision is written, and lets go of what is under way: replicas stay as they are.
    pub async fn stop(mut self) {
        for task in self.deciding {
            // A task that panicked has said so.
            let _ = task.await;
        }
        self.tasks.shutdown().await;
    }
}
