//! The part of the configuration that speaks of scaling: what is scaled, by which policy, between which bounds, and who is told.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::PathBuf;

use fleet::actuate::{Local, Spec};
use fleet::scale::{Guards, Objective, Policy};
use ledger::{PurchaseOption, ScalingMode};
use serde::Deserialize;

use super::check::unknown;
use super::fleet::{PoolSection, gpu_sheet};
use super::sections::{Config, UpstreamSection};

/// `[scaling]`: what is common to all `[[scale]]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScalingSection {
    /// While this file exists nobody is told anything; beside the configuration.
    pub stop_file: Option<PathBuf>,
    /// Where KEDA asks over gRPC.
    pub keda_listen: Option<SocketAddr>,
}

/// `[[scale]]`: one deployment.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScaleSection {
    /// The deployment, as its upstreams name it.
    pub deployment: String,
    /// The pool that pays for its replicas.
    pub pool: String,
    /// Its replicas' upstreams in the order in which they start; all upstreams of the deployment when empty. One alone is a
    /// service in front of all replicas.
    #[serde(default)]
    pub upstreams: Vec<String>,
    /// Whether decisions are carried out.
    #[serde(default)]
    pub mode: ModeSection,
    /// How is decided.
    #[serde(default)]
    pub policy: Policy,
    /// Fewest replicas.
    #[serde(default = "one")]
    pub floor: u32,
    /// Most replicas; as many as there are upstreams when absent.
    pub ceiling: Option<u32>,
    /// What the plan without scaling has running; the ceiling when absent.
    pub static_replicas: Option<u32>,
    /// Replicas that are paid for whether they run or not.
    pub committed: Option<u32>,
    /// GPUs of one replica, where no replica of the pool says.
    pub gpus: Option<u32>,
    /// Seconds that a replica usually takes to start.
    #[serde(default = "five_minutes")]
    pub cold_start_s: f64,
    /// What users were promised.
    #[serde(default)]
    pub objective: ObjectiveSection,
    /// Milliseconds between decisions.
    #[serde(default = "five_seconds")]
    pub decide_every_ms: u64,
    /// Milliseconds that a replica which is to go may finish its requests in.
    #[serde(default = "two_minutes")]
    pub drain_ms_max: u64,
    /// What one replica can do, where no model says.
    pub capacity: Option<CapacitySection>,
    /// Changes to the guards.
    #[serde(default)]
    pub guards: Guards,
    /// Who is told.
    #[serde(default)]
    pub actuator: Spec,
}

const fn one() -> u32 {
    1
}

const fn five_minutes() -> f64 {
    300.0
}

const fn five_seconds() -> u64 {
    5_000
}

const fn two_minutes() -> u64 {
    120_000
}

/// `mode` of a `[[scale]]`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModeSection {
    /// Decisions are written down.
    #[default]
    Shadow,
    /// And carried out.
    Act,
}

impl From<ModeSection> for ScalingMode {
    fn from(mode: ModeSection) -> ScalingMode {
        match mode {
            ModeSection::Shadow => ScalingMode::Shadow,
            ModeSection::Act => ScalingMode::Act,
        }
    }
}

/// `objective` of a `[[scale]]`.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ObjectiveSection {
    /// Milliseconds to the first token.
    pub ttft_ms: f64,
    /// Milliseconds for each further token.
    pub tpot_ms: f64,
    /// The part of all requests that has to meet both.
    pub percentile: f64,
}

impl Default for ObjectiveSection {
    fn default() -> ObjectiveSection {
        let objective = Objective::default();
        ObjectiveSection {
            ttft_ms: objective.ttft_s * 1e3,
            tpot_ms: objective.tpot_s * 1e3,
            percentile: objective.percentile,
        }
    }
}

impl ObjectiveSection {
    /// As policies have it.
    #[must_use]
    pub fn objective(&self) -> Objective {
        Objective { ttft_s: self.ttft_ms / 1e3, tpot_s: self.tpot_ms / 1e3, percentile: self.percentile }
    }
}

/// `capacity` of a `[[scale]]`: what one replica sustains under the objective.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CapacitySection {
    /// Requests a second of the usual mix.
    pub requests_per_s: f64,
    /// Input tokens of a usual request.
    pub input_tokens: u32,
    /// Output tokens of a usual request.
    pub output_tokens: u32,
    /// Requests in the batch then.
    pub batch: Option<f64>,
}

impl ScaleSection {
    /// The upstreams of its replicas, in the order in which they start.
    #[must_use]
    pub fn upstreams<'a>(&self, config: &'a Config) -> Vec<&'a UpstreamSection> {
        let serves = |upstream: &&UpstreamSection| {
            upstream.pool.as_ref() == Some(&self.pool) && upstream.deployment.as_ref() == Some(&self.deployment)
        };
        match self.upstreams.as_slice() {
            [] => config.upstream.iter().filter(serves).collect(),
            named => named
                .iter()
                .filter_map(|name| config.upstream.iter().filter(serves).find(|upstream| upstream.name == *name))
                .collect(),
        }
    }

    /// Most replicas.
    #[must_use]
    pub fn ceiling(&self, config: &Config) -> u32 {
        let upstreams = u32::try_from(self.upstreams(config).len()).unwrap_or(u32::MAX);
        self.ceiling.unwrap_or(upstreams).max(self.floor)
    }

    /// What the plan without scaling has running.
    #[must_use]
    pub fn static_replicas(&self, config: &Config) -> u32 {
        self.static_replicas.unwrap_or_else(|| self.ceiling(config))
    }

    /// Replicas that are paid for in any case: as it says, else all of the plan where the pool's GPUs were committed or bought.
    #[must_use]
    pub fn committed(&self, config: &Config, pool: &PoolSection) -> u32 {
        self.committed.unwrap_or(match pool.purchase {
            PurchaseOption::Reserved | PurchaseOption::Owned => self.static_replicas(config),
            PurchaseOption::OnDemand | PurchaseOption::Spot => 0,
        })
    }
}

/// Everything that is wrong about scaling, one sentence each.
#[must_use]
pub fn check(config: &Config) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut seen = BTreeSet::new();
    for scale in &config.scale {
        if !seen.insert((&scale.pool, &scale.deployment)) {
            wrong.push(format!("{}: it is scaled twice; keep one [[scale]]", place(scale)));
        }
        one_scale(config, scale, &mut wrong);
    }
    if let Some(keda) = config.scaling.keda_listen {
        for (key, other) in [("gateway.listen", config.gateway.listen), ("admin.listen", config.admin.listen)] {
            if keda == other && keda.port() != 0 {
                wrong.push(format!("scaling.keda_listen and {key} are both {keda}; give each its own port"));
            }
        }
    }
    wrong
}

fn place(scale: &ScaleSection) -> String {
    format!("scale `{}` on pool `{}`", scale.deployment, scale.pool)
}

fn one_scale(config: &Config, scale: &ScaleSection, wrong: &mut Vec<String>) {
    let place = place(scale);
    let mut say = |text: String| wrong.push(format!("{place}: {text}"));
    let pools: BTreeSet<&str> = config.pool.iter().map(|pool| pool.name.as_str()).collect();
    let Some(pool) = config.pool.iter().find(|pool| pool.name == scale.pool) else {
        wrong.push(unknown("pool", &scale.pool, &pools, &place));
        return;
    };
    let known: BTreeSet<&str> = config.upstream.iter().map(|upstream| upstream.name.as_str()).collect();
    for name in &scale.upstreams {
        match config.upstream.iter().find(|upstream| upstream.name == *name) {
            None => {
                wrong.push(unknown("upstream", name, &known, &place));
                return;
            }
            Some(of) if of.pool.as_ref() != Some(&scale.pool) || of.deployment.as_ref() != Some(&scale.deployment) => {
                say(format!("upstream `{name}` serves another deployment; give it this pool and deployment"));
                return;
            }
            Some(_) => {}
        }
    }
    let upstreams = scale.upstreams(config);
    let ceiling = scale.ceiling(config);
    if upstreams.is_empty() {
        say("no upstream has this pool and deployment".to_owned());
        return;
    }
    if scale.floor > scale.ceiling.unwrap_or(u32::MAX) {
        say(format!("floor = {} is above ceiling = {ceiling}", scale.floor));
    }
    if ceiling == 0 {
        say("ceiling = 0 leaves nothing to scale".to_owned());
    }
    if upstreams.len() > 1 && upstreams.len() != usize::try_from(ceiling).unwrap_or(usize::MAX) {
        say(format!(
            "{} upstreams for up to {ceiling} replicas; name one for each, or one service in front of all",
            upstreams.len()
        ));
    }
    own_gpus(config, pool, scale, &upstreams, &mut say);
    numbers(scale, &mut say);
    let has_model = upstreams[0].engine.as_ref().is_some_and(|one| one.model_config.is_some() || one.model.is_some());
    if scale.capacity.is_none() && !(has_model && gpu_sheet(config, &pool.gpu).is_some()) {
        say("nothing says what one replica can do; set engine.model_config of its upstream, or capacity = { requests_per_s = 4, \
             input_tokens = 500, output_tokens = 200 }"
            .to_owned());
    }
    if let Err(reason) = scale.actuator.check() {
        say(format!("actuator: {reason}"));
    } else if let Spec::Local(local) = &scale.actuator
        && let Err(reason) = processes(local, &upstreams, ceiling)
    {
        say(format!("actuator: {reason}"));
    }
    if scale.actuator.kind() == "keda" && config.scaling.keda_listen.is_none() {
        say("actuator.kind = \"keda\" needs [scaling] keda_listen = \"127.0.0.1:6000\"".to_owned());
    }
}

/// Each process is one replica, in the order of the upstreams: another order would stop an engine while requests go there.
fn processes(local: &Local, upstreams: &[&UpstreamSection], ceiling: u32) -> Result<(), String> {
    let count = local.process.len();
    if count != usize::try_from(ceiling).unwrap_or(usize::MAX) {
        return Err(format!(
            "{count} [[scale.actuator.process]] for up to {ceiling} replicas; give each replica its own"
        ));
    }
    let mut seen = BTreeMap::new();
    for (at, process) in local.process.iter().enumerate() {
        if let Some(first) = seen.insert(authority(&process.url), at) {
            let url = &process.url;
            return Err(format!(
                "process {} and process {} both have url = \"{url}\"; give each its own port",
                first + 1,
                at + 1
            ));
        }
    }
    // One upstream alone is a service in front of all, with an address of its own.
    if upstreams.len() != count {
        return Ok(());
    }
    for (at, (process, upstream)) in local.process.iter().zip(upstreams).enumerate() {
        if authority(&process.url) != authority(&upstream.base_url) {
            return Err(format!(
                "process {} has url = \"{}\", but upstream `{}` in the same place has base_url = \"{}\"; give both the same host \
                 and port, in the order of the upstreams",
                at + 1,
                process.url,
                upstream.name,
                upstream.base_url
            ));
        }
    }
    Ok(())
}

/// Host and port of an address; its text where it is none, which is reported elsewhere.
fn authority(url: &str) -> (String, Option<u16>) {
    let Ok(uri) = url.parse::<http::Uri>() else { return (url.to_owned(), None) };
    let usual = if uri.scheme_str() == Some("https") { 443 } else { 80 };
    (uri.host().unwrap_or_default().to_ascii_lowercase(), Some(uri.port_u16().unwrap_or(usual)))
}

/// A replica that is stopped takes its GPUs with it, so that nobody else may work on them.
fn own_gpus(
    config: &Config,
    pool: &PoolSection,
    scale: &ScaleSection,
    upstreams: &[&UpstreamSection],
    say: &mut impl FnMut(String),
) {
    let replicas: BTreeSet<String> = upstreams.iter().map(|upstream| upstream.replica(pool)).collect();
    if replicas.len() < upstreams.len() {
        say("two of its upstreams share a replica of the pool; give each its own engine.replica".to_owned());
        return;
    }
    let others = config.upstream.iter().filter(|other| other.pool.as_ref() == Some(&scale.pool));
    for other in others.filter(|other| !upstreams.iter().any(|own| own.name == other.name)) {
        let replica = other.replica(pool);
        if replicas.contains(&replica) {
            say(format!(
                "upstream `{}` uses the GPUs of its replica `{replica}`; give it a replica of its own",
                other.name
            ));
        }
    }
}

fn numbers(scale: &ScaleSection, say: &mut impl FnMut(String)) {
    if !(100..=60_000).contains(&scale.decide_every_ms) {
        say(format!("decide_every_ms = {} is not from 100 to 60000", scale.decide_every_ms));
    }
    if !(scale.cold_start_s.is_finite() && scale.cold_start_s >= 0.0) {
        say(format!("cold_start_s = {} is no time", scale.cold_start_s));
    }
    if scale.gpus == Some(0) {
        say("gpus = 0; a replica has one at least".to_owned());
    }
    let objective = scale.objective;
    for (name, value) in [("ttft_ms", objective.ttft_ms), ("tpot_ms", objective.tpot_ms)] {
        if !(value.is_finite() && value > 0.0) {
            say(format!("objective.{name} = {value} is no time"));
        }
    }
    if !(objective.percentile > 0.0 && objective.percentile < 1.0) {
        say(format!("objective.percentile = {} is not between 0 and 1; 0.95 is usual", objective.percentile));
    }
    if let Some(capacity) = scale.capacity {
        let positive = |value: f64| value.is_finite() && value > 0.0;
        if !positive(capacity.requests_per_s) || capacity.batch.is_some_and(|batch| !positive(batch)) {
            say("capacity: requests_per_s and batch have to be above 0".to_owned());
        }
        if capacity.input_tokens == 0 || capacity.output_tokens == 0 {
            say("capacity: a usual request has input_tokens and output_tokens".to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse;

    fn text(scale: &str) -> String {
        let upstream = |number: u32| {
            format!(
                "[[upstream]]\nname = \"chat-{number}\"\nkind = \"vllm\"\nbase_url = \"http://h:800{number}\"\npool = \"shared\"\ndeployment = \
                 \"chat\"\nengine = {{ replica = \"r{number}\" }}\n"
            )
        };
        format!(
            "[[pool]]\nname = \"shared\"\ngpu = \"H100\"\ngpus = 2\nusd_per_gpu_hour = \"3\"\nreplicas = [{{ name = \"r0\", gpus = 1 \
             }}, {{ name = \"r1\", gpus = 1 }}]\n{}{}[[scale]]\ndeployment = \"chat\"\npool = \"shared\"\n{scale}\n",
            upstream(0),
            upstream(1)
        )
    }

    const KNOWN: &str = "capacity = { requests_per_s = 4, input_tokens = 500, output_tokens = 200 }\n";

    #[test]
    fn a_deployment_is_scaled_with_little_said() {
        let config = parse(&text(KNOWN)).unwrap();
        assert_eq!(check(&config), Vec::<String>::new());
        let scale = &config.scale[0];
        assert_eq!((scale.floor, scale.ceiling(&config), scale.static_replicas(&config)), (1, 2, 2));
        assert_eq!(scale.mode, ModeSection::Shadow, "nobody acts who was not told to");
        assert_eq!((scale.committed(&config, &config.pool[0]), scale.policy.clone()), (0, Policy::default()));
        let mut owned = config.pool[0].clone();
        owned.purchase = PurchaseOption::Owned;
        assert_eq!(scale.committed(&config, &owned), 2, "what was bought is paid for");
        let names: Vec<&str> = scale.upstreams(&config).iter().map(|upstream| upstream.name.as_str()).collect();
        assert_eq!(names, ["chat-0", "chat-1"]);
    }

    #[test]
    fn processes_are_the_replicas_in_their_order() {
        let local = |urls: &[&str]| {
            let process = |url: &&str| format!("[[scale.actuator.process]]\ncommand = [\"engine\"]\nurl = \"{url}\"\n");
            let processes: String = urls.iter().map(process).collect();
            text(&format!("{KNOWN}[scale.actuator]\nkind = \"local\"\n{processes}"))
        };
        let found = |text: &str| check(&parse(text).expect(text));
        let fine = local(&["http://h:8000", "http://H:8001/"]);
        assert_eq!(found(&fine), Vec::<String>::new());
        let default_port =
            fine.replace("\"http://h:8000\"\npool", "\"http://h\"\npool").replace("http://h:8000", "http://h:80");
        assert_eq!(found(&default_port), Vec::<String>::new());
        let place = "scale `chat` on pool `shared`: actuator: ";
        let cases = [
            (local(&["http://h:8000"]), "1 [[scale.actuator.process]] for up to 2 replicas; give each"),
            (local(&["http://h:8000", "http://h:8001", "http://h:8002"]), "3 [[scale.actuator.process]] for up to 2"),
            (local(&["http://h:8000", "http://h:8000/"]), "process 1 and process 2 both have url = \"http://h:8000/\""),
            (
                local(&["http://h:8001", "http://h:8000"]),
                "process 1 has url = \"http://h:8001\", but upstream `chat-0`",
            ),
            (local(&["http://h:8000", "http://other:8001"]), "process 2 has url = \"http://other:8001\", but upstream"),
        ];
        for (text, part) in cases {
            let found = found(&text);
            assert!(found.len() == 1 && found[0].starts_with(&format!("{place}{part}")), "{text}\ngave\n{found:?}");
        }
        // A service in front of all has an address of its own.
        let in_front = local(&["http://h:9000", "http://h:9001"])
            .replace(KNOWN, &format!("{KNOWN}upstreams = [\"chat-0\"]\nceiling = 2\n"));
        assert!(!found(&in_front).iter().any(|wrong| wrong.contains("actuator")));
    }

    #[test]
    fn each_mistake_is_named_with_its_fix() {
        let cases = [
            (text(""), "nothing says what one replica can do"),
            (text(&format!("{KNOWN}ceiling = 3")), "2 upstreams for up to 3 replicas"),
            (text(&format!("{KNOWN}floor = 3\nceiling = 2")), "floor = 3 is above ceiling"),
            (text(&format!("{KNOWN}upstreams = [\"chat-2\"]")), "no upstream named `chat-2`; did you mean"),
            (text(&format!("{KNOWN}decide_every_ms = 1")), "decide_every_ms = 1 is not from 100"),
            (text(&format!("{KNOWN}objective = {{ percentile = 95 }}")), "objective.percentile = 95 is not between"),
            (text(KNOWN).replace("\npool = \"shared\"\ncap", "\npool = \"shred\"\ncap"), "did you mean `shared`?"),
            (
                text(KNOWN).replace("deployment = \"chat\"\npool", "deployment = \"chit\"\npool"),
                "no upstream has this pool",
            ),
            (text(KNOWN).replace("replica = \"r1\"", "replica = \"r0\""), "share a replica of the pool"),
            (
                text(&format!("{KNOWN}upstreams = [\"chat-0\"]")).replace("\"r1\" }\n[[scale", "\"r0\" }\n[[scale"),
                "uses the GPUs",
            ),
            (text(&format!("{KNOWN}actuator = {{ kind = \"keda\" }}")), "needs [scaling] keda_listen"),
        ];
        for (text, part) in cases {
            let found = check(&parse(&text).expect(&text)).join("\n");
            assert!(found.contains(part), "{text}\ngave\n{found}");
        }
        let wrong = parse(&text(&format!("{KNOWN}flor = 1"))).unwrap_err().message;
        assert!(wrong.contains("did you mean `floor`?"), "{wrong}");
        assert!(parse(&text(&format!("{KNOWN}policy = \"magic\""))).is_err());
    }
}
