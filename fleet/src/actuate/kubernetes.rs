//! The `scale` subresource of a workload in a Kubernetes cluster: what `kubectl scale` writes, and all that is needed of rights.
//!
//! Read, change, write back with the version that was read: a write that somebody else overtook is refused by the API server, and
//! tried again only if they did not scale.

use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use k8s_openapi::api::autoscaling::v1::{Scale, ScaleSpec};
use k8s_openapi::api::core::v1::{Pod, PodCondition};
use kube::api::{Api, ApiResource, DynamicObject, ListParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::GroupVersionKind;
use kube::{Client, Config};
use ledger::Timestamp;
use serde::Deserialize;
use tokio::sync::OnceCell;

use super::{Actual, ActuateError, CALL_MAX, OnTheWay};

/// Tries of one write, when somebody else writes at the same time.
const TRIES: usize = 5;
/// Most pods that are looked at.
const PODS_MAX: u32 = 500;

/// What is scaled, and how the cluster is reached.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kubernetes {
    /// Its namespace.
    pub namespace: String,
    /// The kind of workload.
    #[serde(default)]
    pub resource: Resource,
    /// Its name.
    pub name: String,
    /// The API server, where neither a kubeconfig nor a service account says: `kubectl proxy` at `http://127.0.0.1:8001`.
    #[serde(default)]
    pub server: Option<String>,
    /// A kubeconfig other than the one that `kubectl` would take. Without any, the pod's own service account.
    #[serde(default)]
    pub kubeconfig: Option<PathBuf>,
    /// The context in it.
    #[serde(default)]
    pub context: Option<String>,
}

/// Workloads with a `scale` subresource.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Resource {
    /// `apps/v1`.
    #[default]
    Deployment,
    /// `apps/v1`.
    StatefulSet,
    /// `leaderworkerset.x-k8s.io/v1`: a replica is a group of pods over several nodes.
    LeaderWorkerSet,
}

impl Resource {
    fn api(self) -> ApiResource {
        let (group, kind, plural) = match self {
            Resource::Deployment => ("apps", "Deployment", "deployments"),
            Resource::StatefulSet => ("apps", "StatefulSet", "statefulsets"),
            Resource::LeaderWorkerSet => ("leaderworkerset.x-k8s.io", "LeaderWorkerSet", "leaderworkersets"),
        };
        ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, "v1", kind), plural)
    }
}

impl Kubernetes {
    pub(super) fn check(&self) -> Result<(), String> {
        let is_name = |text: &str| {
            let fits = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'.';
            (1..=253).contains(&text.len()) && text.bytes().all(fits)
        };
        for (key, name) in [("namespace", &self.namespace), ("name", &self.name)] {
            if !is_name(name) {
                return Err(format!("{key} = \"{name}\" is no name that Kubernetes knows"));
            }
        }
        if self.server.is_some() && (self.kubeconfig.is_some() || self.context.is_some()) {
            return Err("server and kubeconfig or context exclude each other".to_owned());
        }
        self.server.as_deref().map_or(Ok(()), super::http::check)
    }
}

/// A workload that is scaled.
pub(super) struct Workload {
    spec: Kubernetes,
    client: OnceCell<Client>,
    seen: Mutex<Seen>,
}

/// What is known of the number that is asked for.
#[derive(Debug, Default)]
struct Seen {
    /// What was asked for when it was last looked at, or what we asked for since.
    replicas: Option<u32>,
    /// What we asked for without hearing what became of it, because nobody waited any more: it may have been done, or be done yet.
    tried: Vec<u32>,
    /// The version that all of that was written against: under any other it is done or never will be.
    version: Option<String>,
    /// Writes that began and ended, so that a look from before one does not count after it.
    writes: u64,
}

impl Seen {
    /// Remembers what a look showed. Whether nobody but us scaled since the look before.
    fn look(&mut self, scale: &Scale) -> bool {
        let now = asked(scale);
        let same = self.replicas.replace(now).is_none_or(|before| before == now);
        let ours = same || self.tried.contains(&now);
        if scale.metadata.resource_version != self.version {
            self.tried.clear();
        }
        ours
    }

    fn begin(&mut self, replicas: u32, scale: &Scale) {
        self.writes += 1;
        self.version.clone_from(&scale.metadata.resource_version);
        if !self.tried.contains(&replicas) {
            self.tried.push(replicas);
        }
    }

    fn done(&mut self, replicas: u32) {
        self.writes += 1;
        self.replicas = Some(replicas);
        self.tried.clear();
    }
}

impl std::fmt::Debug for Workload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Workload").field("spec", &self.spec).finish_non_exhaustive()
    }
}

impl Workload {
    pub fn new(spec: Kubernetes) -> Workload {
        Workload { spec, client: OnceCell::new(), seen: Mutex::default() }
    }

    /// How many were asked for, how many serve, and which are on their way.
    pub async fn read(&self) -> Result<Actual, ActuateError> {
        self.in_time(async {
            let writes = self.seen().writes;
            let scale = self.scale().await?;
            {
                let mut seen = self.seen();
                if seen.writes == writes {
                    seen.look(&scale);
                }
            }
            let mut actual = Actual { replicas: asked(&scale), ..Actual::default() };
            let selector = scale.status.and_then(|status| status.selector).filter(|selector| !selector.is_empty());
            if let Some(selector) = selector {
                self.count_pods(&selector, &mut actual).await?;
            }
            Ok(actual)
        })
        .await
    }

    /// Asks for so many, unless that is what was asked for last.
    ///
    /// # Errors
    /// [`ActuateError::Overtaken`] once when somebody else scaled after we looked: whoever decided did not know of it.
    pub async fn tell(&self, replicas: u32) -> Result<(), ActuateError> {
        self.in_time(self.write(replicas)).await
    }

    async fn write(&self, replicas: u32) -> Result<(), ActuateError> {
        let api = self.api().await?;
        let by = PostParams { field_manager: Some("farthing".to_owned()), ..PostParams::default() };
        let wanted = i32::try_from(replicas).unwrap_or(i32::MAX);
        for _ in 0..TRIES {
            let mut scale = self.scale().await?;
            let now = asked(&scale);
            let ours = self.seen().look(&scale);
            if now == replicas {
                return Ok(());
            }
            if !ours {
                return Err(ActuateError::Overtaken { what: self.what(), replicas: now });
            }
            // Before it is sent: who stops waiting for the answer does not learn whether it was done.
            self.seen().begin(replicas, &scale);
            scale.spec = Some(ScaleSpec { replicas: Some(wanted) });
            match api.replace_scale(&self.spec.name, &by, &scale).await {
                Ok(_) => {
                    self.seen().done(replicas);
                    return Ok(());
                }
                // Its status was written meanwhile, or somebody scaled: the next look shows which.
                Err(kube::Error::Api(status)) if status.is_conflict() => {}
                Err(error) => return Err(self.failed(&error)),
            }
        }
        let cause = format!("{TRIES} writes were overtaken by others");
        Err(ActuateError::Refused { what: self.what(), cause })
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn scale(&self) -> Result<Scale, ActuateError> {
        self.api().await?.get_scale(&self.spec.name).await.map_err(|error| self.failed(&error))
    }

    /// Counts the pods that the workload's own selector finds. Who may not list pods knows less, and scales all the same.
    async fn count_pods(&self, selector: &str, actual: &mut Actual) -> Result<(), ActuateError> {
        let pods: Api<Pod> = Api::namespaced(self.client().await?.clone(), &self.spec.namespace);
        let pods = match pods.list(&ListParams::default().labels(selector).limit(PODS_MAX)).await {
            Ok(pods) => pods,
            Err(kube::Error::Api(status)) if status.is_forbidden() => {
                tracing::debug!(what = self.what(), "no right to list its pods: {}", status.message);
                return Ok(());
            }
            Err(error) => return Err(self.failed(&error)),
        };
        let staying: Vec<&Pod> = pods.items.iter().filter(|pod| stays(pod)).collect();
        let ready = staying.iter().filter(|pod| says(pod, "Ready") == Some(true)).count();
        actual.ready = u32::try_from(ready).ok();
        actual.pending = staying.iter().filter_map(|pod| on_the_way(pod)).collect();
        actual.pending.sort_by_key(|pod| pod.since);
        Ok(())
    }

    async fn api(&self) -> Result<Api<DynamicObject>, ActuateError> {
        let client = self.client().await?.clone();
        Ok(Api::namespaced_with(client, &self.spec.namespace, &self.spec.resource.api()))
    }

    async fn client(&self) -> Result<&Client, ActuateError> {
        self.client.get_or_try_init(|| self.connect()).await
    }

    async fn connect(&self) -> Result<Client, ActuateError> {
        let wrong = |error: &dyn std::error::Error| ActuateError::Configuration(super::http::causes(error));
        let options = KubeConfigOptions { context: self.spec.context.clone(), ..KubeConfigOptions::default() };
        let mut config = match (&self.spec.server, &self.spec.kubeconfig) {
            (Some(server), _) => Config::new(server.parse().map_err(|error| wrong(&error))?),
            (None, Some(path)) => {
                let file = Kubeconfig::read_from(path).map_err(|error| wrong(&error))?;
                Config::from_custom_kubeconfig(file, &options).await.map_err(|error| wrong(&error))?
            }
            (None, None) if self.spec.context.is_some() => {
                Config::from_kubeconfig(&options).await.map_err(|error| wrong(&error))?
            }
            (None, None) => Config::infer().await.map_err(|error| wrong(&error))?,
        };
        // The client takes the process's provider of TLS, and where two are built in there is none until somebody says which.
        if rustls::crypto::CryptoProvider::get_default().is_none() {
            // Somebody else may be faster; then theirs is as good.
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        // Our own time limit is shorter than its patience.
        config.default_retry = false;
        Client::try_from(config).map_err(|error| wrong(&error))
    }

    async fn in_time<T>(&self, work: impl Future<Output = Result<T, ActuateError>>) -> Result<T, ActuateError> {
        let timed_out = |_| ActuateError::TimedOut { what: self.what(), after: CALL_MAX };
        tokio::time::timeout(CALL_MAX, work).await.map_err(timed_out)?
    }

    fn failed(&self, error: &kube::Error) -> ActuateError {
        let what = self.what();
        match error {
            kube::Error::Api(status) => {
                ActuateError::Refused { what, cause: format!("{} {}", status.code, status.message) }
            }
            other => ActuateError::Unreachable { what, cause: super::http::causes(other) },
        }
    }

    fn what(&self) -> String {
        let Kubernetes { namespace, resource, name, .. } = &self.spec;
        format!("{resource:?} {namespace}/{name}").to_lowercase()
    }
}

fn asked(scale: &Scale) -> u32 {
    let asked = scale.spec.as_ref().and_then(|spec| spec.replicas);
    asked.and_then(|replicas| u32::try_from(replicas).ok()).unwrap_or(0)
}

/// Whether a pod is there to stay. One that ended or was evicted is listed on until somebody removes it, and never serves again.
fn stays(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    pod.metadata.deletion_timestamp.is_none() && !matches!(phase, Some("Failed" | "Succeeded"))
}

fn condition<'a>(pod: &'a Pod, name: &str) -> Option<&'a PodCondition> {
    pod.status.as_ref()?.conditions.as_ref()?.iter().find(|condition| condition.type_ == name)
}

/// What a condition of a pod says; `None` where it has none of this name, or does not know.
fn says(pod: &Pod, name: &str) -> Option<bool> {
    match condition(pod, name)?.status.as_str() {
        "True" => Some(true),
        "False" => Some(false),
        _ => None,
    }
}

/// A pod that does not serve, since it last did: one that served for days and fails one probe was not started days ago.
fn on_the_way(pod: &Pod) -> Option<OnTheWay> {
    let ready = condition(pod, "Ready");
    if ready.is_some_and(|ready| ready.status == "True") {
        return None;
    }
    let changed = ready.and_then(|ready| ready.last_transition_time.as_ref());
    let since = changed.or(pod.metadata.creation_timestamp.as_ref())?;
    Some(OnTheWay { since: Timestamp::from_micros(since.0.as_microsecond()), scheduled: says(pod, "PodScheduled") })
}
