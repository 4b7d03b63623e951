//! Who is told how many replicas there should be, and asked how many there are.
//!
//! An actuator decides nothing. Each call is bounded in time, and told the same twice it changes nothing the second time.

mod command;
mod group;
mod http;
pub mod keda;
mod kubernetes;
mod local;
mod wanted;
mod webhook;

use std::path::Path;
use std::time::Duration;

use ledger::Timestamp;
use serde::Deserialize;

pub use command::Command;
pub use http::Secret;
pub use keda::serve_keda;
pub use kubernetes::{Kubernetes, Resource};
pub use local::{Idle, Local, Process};
pub use wanted::{Standing, Unknown, Wanted};

/// Longest time that one call to a service of somebody else takes.
const CALL_MAX: Duration = Duration::from_secs(10);

/// Who is told, as the configuration says it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Spec {
    /// Nobody: metrics are there for whoever reads them.
    #[default]
    None,
    /// KEDA asks over gRPC.
    Keda,
    /// An address: `POST {"replicas": 3, "key": "…"}`, answered with any status of success, and `GET`, answered with
    /// `{"replicas": 3, "ready": 2}`.
    Webhook {
        /// Where.
        url: String,
        /// What it is shown as `authorization: Bearer …`.
        #[serde(default)]
        token: Option<Secret>,
    },
    /// Programs: one that is told, one that is asked.
    Command(Command),
    /// The `scale` subresource of a workload in a cluster.
    Kubernetes(Kubernetes),
    /// Processes on this host.
    Local(Local),
}

impl Spec {
    /// Its name in the configuration.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Spec::None => "none",
            Spec::Keda => "keda",
            Spec::Webhook { .. } => "webhook",
            Spec::Command(_) => "command",
            Spec::Kubernetes(_) => "kubernetes",
            Spec::Local(_) => "local",
        }
    }

    /// Finds what cannot work.
    ///
    /// # Errors
    /// One sentence.
    pub fn check(&self) -> Result<(), String> {
        match self {
            Spec::None | Spec::Keda => Ok(()),
            Spec::Webhook { url, .. } => http::check(url),
            Spec::Command(command) => command.check(),
            Spec::Kubernetes(kubernetes) => kubernetes.check(),
            Spec::Local(local) => local.check(),
        }
    }
}

/// What an actuator says there is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Actual {
    /// Replicas that were asked for.
    pub replicas: u32,
    /// Replicas that serve, where it knows.
    pub ready: Option<u32>,
    /// Which of the first replicas serve, where it knows each by itself; empty where it does not.
    pub serving: Vec<bool>,
    /// Replicas on their way, where it knows more than their number.
    pub pending: Vec<OnTheWay>,
}

/// A replica that was asked for and does not serve yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OnTheWay {
    /// When it was asked for.
    pub since: Timestamp,
    /// Whether it has a place to run.
    pub scheduled: Option<bool>,
}

/// Why an actuator did not do as it was told.
#[derive(Debug, thiserror::Error)]
pub enum ActuateError {
    /// It cannot work as it is configured.
    #[error("{0}")]
    Configuration(String),
    /// It could not be reached; it may be later.
    #[error("{what} could not be reached: {cause}")]
    Unreachable {
        /// The actuator.
        what: String,
        /// What the system said.
        cause: String,
    },
    /// It took too long; it may have been done.
    #[error("{what} took longer than {} s", .after.as_secs())]
    TimedOut {
        /// The actuator.
        what: String,
        /// How long it was waited for.
        after: Duration,
    },
    /// Somebody else scaled since it was last looked at: their number stands, and nothing was written.
    #[error("somebody else asked {what} for {replicas} replicas meanwhile")]
    Overtaken {
        /// What is scaled.
        what: String,
        /// What they asked for.
        replicas: u32,
    },
    /// It said no.
    #[error("{what} refused: {cause}")]
    Refused {
        /// The actuator.
        what: String,
        /// Its words, cut short.
        cause: String,
    },
}

/// An actuator at work.
#[derive(Debug)]
pub struct Actuator(Kind);

#[derive(Debug)]
enum Kind {
    Pulled,
    Webhook(webhook::Webhook),
    Command(Command, std::path::PathBuf),
    Kubernetes(Box<kubernetes::Workload>),
    Local(local::Processes),
}

impl Actuator {
    /// One as it is configured; paths are relative to `folder`. Nothing is told yet.
    ///
    /// # Errors
    /// [`ActuateError::Configuration`].
    pub fn new(spec: &Spec, folder: &Path) -> Result<Actuator, ActuateError> {
        spec.check().map_err(ActuateError::Configuration)?;
        Ok(Actuator(match spec {
            Spec::None | Spec::Keda => Kind::Pulled,
            Spec::Webhook { url, token } => {
                let token = token.clone().map(|token| token.beside(folder));
                Kind::Webhook(webhook::Webhook::new(url, token))
            }
            Spec::Command(command) => Kind::Command(command.clone(), folder.to_owned()),
            Spec::Kubernetes(kubernetes) => {
                let mut spec = kubernetes.clone();
                spec.kubeconfig = spec.kubeconfig.map(|path| folder.join(path));
                Kind::Kubernetes(Box::new(kubernetes::Workload::new(spec)))
            }
            Spec::Local(local) => Kind::Local(local::Processes::new(local.clone(), folder)),
        }))
    }

    /// Whether it asks us rather than being told.
    #[must_use]
    pub const fn pulls(&self) -> bool {
        matches!(self.0, Kind::Pulled)
    }

    /// What there is; `None` of an actuator that cannot be asked.
    ///
    /// # Errors
    /// When it could not be asked, or said nothing that can be understood.
    pub async fn read(&self) -> Result<Option<Actual>, ActuateError> {
        match &self.0 {
            Kind::Pulled => Ok(None),
            Kind::Webhook(webhook) => webhook.read().await.map(Some),
            Kind::Command(command, folder) => command.read(folder).await,
            Kind::Kubernetes(workload) => workload.read().await.map(Some),
            Kind::Local(processes) => Ok(Some(processes.read().await)),
        }
    }

    /// Tells it how many replicas there should be. `key` is the same for each try of one order.
    ///
    /// # Errors
    /// When it was not done, or nobody knows whether it was; it can be told again.
    pub async fn tell(&self, replicas: u32, key: &str) -> Result<(), ActuateError> {
        match &self.0 {
            Kind::Pulled => Ok(()),
            Kind::Webhook(webhook) => webhook.tell(replicas, key).await,
            Kind::Command(command, folder) => command.tell(folder, replicas, key).await,
            Kind::Kubernetes(workload) => workload.tell(replicas).await,
            Kind::Local(processes) => processes.tell(replicas).await,
        }
    }
}
