//! What is scaled, resolved from the configuration: which replicas there are and in which order they start, whose GPUs they
//! take, and what one of them can do.

use std::time::Duration;

use anyhow::Context as _;
use fleet::actuate::Spec as Actuate;
use fleet::scale::{Bounds, Guards, Objective, Policy};
use fleet::sim::capacity::{self, Capacity, Work};
use fleet::sim::engine::{Constants, Limits, Spec};
use gateway::Deployment;
use ledger::allocate::replica::Replica as Engine;
use ledger::{EngineFact, GpuHourRate, Label, ScalingMode, Timestamp};

use super::observe::whole;
use crate::config::{CapacitySection, Config, Loaded, PoolSection, ScaleSection};
use crate::engines::engine_facts;

/// Input and output tokens of a usual request, where neither the configuration nor the ledger says.
const USUAL: (u32, u32) = (512, 256);
/// An output token is taken for so many input tokens of work, where no model says what each costs.
const OUTPUT_WEIGHT: f64 = 4.0;
/// A simulation's seed; another changes nothing but its noise.
const SEED: u64 = 1;

/// One replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replica {
    /// The upstream that sends to it; `None` where one service is in front of all.
    pub upstream: Option<Label>,
    /// Its GPUs, as the pool names them.
    pub name: Label,
    /// Whether anybody can tell from its metrics that it serves.
    pub metrics: bool,
}

/// One deployment as it is scaled.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What it is.
    pub id: Deployment,
    /// Its replicas, in the order in which they start.
    pub replicas: Vec<Replica>,
    /// The upstream in front of all replicas, where there is one.
    pub service: Option<Label>,
    /// Whether decisions are carried out.
    pub mode: ScalingMode,
    /// How is decided.
    pub policy: Policy,
    /// What holds whatever is decided.
    pub guards: Guards,
    /// What does not change; capacities are set by [`Plan::with`].
    pub bounds: Bounds,
    /// What users were promised.
    pub objective: Objective,
    /// GPUs of one replica.
    pub gpus: u32,
    /// The price of one.
    pub rate: GpuHourRate,
    /// Between decisions.
    pub every: Duration,
    /// Longest that a replica which is to go finishes its requests.
    pub drain: Duration,
    /// How old a reading may be.
    pub fresh: Duration,
    /// Who is told.
    pub actuator: Actuate,
    /// When the server began: what ran then served then, as far as anybody knows.
    pub since: Timestamp,
    /// What one replica can do, as the configuration says.
    said: Option<CapacitySection>,
    /// What runs on one, for a simulation.
    engine: Option<Box<EngineFact>>,
}

/// Everything that the configuration scales, from `now` on.
///
/// # Errors
/// When a model's `config.json` cannot be read.
pub fn plans(loaded: &Loaded, now: Timestamp) -> anyhow::Result<Vec<Plan>> {
    let engines = if loaded.config.scale.is_empty() { Vec::new() } else { engine_facts(loaded)? };
    let plan = |scale: &ScaleSection| {
        let pool = loaded.config.pool.iter().find(|pool| pool.name == scale.pool);
        let pool = pool.with_context(|| format!("there is no pool `{}`", scale.pool))?;
        let first = scale.upstreams(&loaded.config).first().map(|upstream| upstream.name.clone());
        let engine = engines.iter().find(|(fact, _)| Some(&*fact.engine) == first.as_deref());
        Ok(Plan::of(&loaded.config, scale, pool, engine.map(|(fact, _)| Box::new(fact.clone())), now))
    };
    loaded.config.scale.iter().map(plan).collect()
}

impl Plan {
    fn of(
        config: &Config,
        scale: &ScaleSection,
        pool: &PoolSection,
        engine: Option<Box<EngineFact>>,
        now: Timestamp,
    ) -> Plan {
        let upstreams = scale.upstreams(config);
        let ceiling = scale.ceiling(config);
        let named = pool.all_replicas();
        let gpus_of = |name: &str| named.iter().find(|replica| replica.name == name).map(|replica| replica.gpus);
        let service = (upstreams.len() == 1 && ceiling > 1).then(|| upstreams[0].name.as_str().into());
        let replicas: Vec<Replica> = if service.is_some() {
            let metrics = upstreams[0].metrics_url().is_some();
            let own = named.iter().map(|replica| replica.name.clone());
            let more = (named.len()..).map(|number| format!("{}-{number}", scale.deployment));
            let names = own.chain(more).take(usize::try_from(ceiling).unwrap_or(usize::MAX));
            names.map(|name| Replica { upstream: None, name: name.into(), metrics }).collect()
        } else {
            let of = |upstream: &&crate::config::UpstreamSection| Replica {
                upstream: Some(upstream.name.as_str().into()),
                name: upstream.replica(pool).into(),
                metrics: upstream.metrics_url().is_some(),
            };
            upstreams.iter().map(of).collect()
        };
        let gpus = scale.gpus.or_else(|| replicas.first().and_then(|replica| gpus_of(&replica.name))).unwrap_or(1);
        let every = Duration::from_millis(scale.decide_every_ms);
        let scraped = Duration::from_millis(config.telemetry.scrape_every_ms);
        Plan {
            id: Deployment { pool: scale.pool.as_str().into(), name: scale.deployment.as_str().into() },
            replicas,
            service,
            mode: scale.mode.into(),
            policy: scale.policy.clone(),
            guards: scale.guards,
            bounds: Bounds {
                floor: scale.floor,
                ceiling,
                committed: scale.committed(config, pool),
                static_replicas: scale.static_replicas(config),
                cold_start_s: scale.cold_start_s,
                batch_at_capacity: 0.0,
                requests_per_s_at_capacity: 0.0,
                input_tokens_per_s_at_capacity: 0.0,
                output_tokens_per_s_at_capacity: 0.0,
            },
            objective: scale.objective.objective(),
            gpus,
            rate: pool.usd_per_gpu_hour,
            every,
            drain: Duration::from_millis(scale.drain_ms_max),
            fresh: 3 * every.max(scraped) + Duration::from_secs(1),
            actuator: scale.actuator.clone(),
            since: now,
            said: scale.capacity,
            engine,
        }
    }

    /// How long a start usually takes, microseconds.
    #[must_use]
    pub fn cold_start_us(&self) -> i64 {
        whole(self.bounds.cold_start_s * 1e6).and_then(|micros| i64::try_from(micros).ok()).unwrap_or(i64::MAX)
    }

    /// The mix of requests that the configuration takes for usual.
    #[must_use]
    pub fn usual(&self) -> (u32, u32) {
        self.said.map_or(USUAL, |said| (said.input_tokens, said.output_tokens))
    }

    /// What one replica can do under the objective with requests such as those of `mix`: as the configuration says, else as a
    /// simulation of its engine does. Takes seconds.
    ///
    /// # Errors
    /// When the simulated engine cannot meet the objective at any rate.
    pub fn reach(&self, mix: &[(u32, u32)], constants: Option<Engine>) -> anyhow::Result<Capacity> {
        if let Some(said) = self.said {
            return Ok(as_said(said, &self.objective));
        }
        let engine = self.engine.as_ref().context("nothing says what one replica can do")?;
        let constants = constants.or(engine.setup.constants).context("the model of its engine is unknown")?;
        let mut limits = Limits::of_gpu(&constants.gpu);
        let known = &engine.setup.limits;
        limits.kv_tokens = known.kv_tokens.and_then(whole).or(limits.kv_tokens);
        let small = |count: f64| whole(count).and_then(|count| u32::try_from(count).ok());
        limits.block_tokens = small(known.block_tokens).unwrap_or(limits.block_tokens);
        limits.max_num_batched_tokens = small(known.step_tokens_max).unwrap_or(limits.max_num_batched_tokens);
        let spec = Spec { constants: Constants::unfitted(constants), limits };
        let usual = [self.usual()];
        let mix = if mix.is_empty() { &usual } else { mix };
        capacity::capacity(&spec, mix, &self.objective, SEED)
            .context("a simulated replica misses the objective at any rate; loosen it, or set capacity")
    }

    /// The bounds of a replica that can do so much.
    #[must_use]
    pub fn bounds(&self, capacity: &Capacity) -> Bounds {
        Bounds {
            batch_at_capacity: capacity.batch,
            requests_per_s_at_capacity: capacity.requests_per_s,
            input_tokens_per_s_at_capacity: capacity.input_tokens_per_s,
            output_tokens_per_s_at_capacity: capacity.output_tokens_per_s,
            ..self.bounds
        }
    }
}

/// What a replica can do, from what somebody says of it.
fn as_said(said: CapacitySection, objective: &Objective) -> Capacity {
    let (input, output) = (f64::from(said.input_tokens), f64::from(said.output_tokens));
    let per_input_token = 1.0 / (said.requests_per_s * (input + OUTPUT_WEIGHT * output));
    // A request stays for as long as its tokens may take, so that is how many there are at once.
    let batch = said.batch.unwrap_or(said.requests_per_s * output * objective.tpot_s);
    Capacity {
        requests_per_s: said.requests_per_s,
        batch: batch.max(1.0),
        input_tokens_per_s: said.requests_per_s * input,
        output_tokens_per_s: said.requests_per_s * output,
        work: Work { per_input_token, per_output_token: OUTPUT_WEIGHT * per_input_token },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    const LLAMA: &str = r#"{ "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "torch_dtype": "bfloat16" }"#;

    fn planned(upstreams: u32, scale: &str) -> Plan {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), LLAMA).unwrap();
        let mut text = "[[pool]]\nname = \"shared\"\ngpu = \"H100\"\ngpus = 4\nusd_per_gpu_hour = \"3\"\npurchase = \"reserved\"\nreplicas = [{ \
                        name = \"r0\", gpus = 2 }, { name = \"r1\", gpus = 2 }]\n"
            .to_owned();
        for number in 0..upstreams {
            text += &format!(
                "[[upstream]]\nname = \"chat-{number}\"\nkind = \"vllm\"\nbase_url = \"http://h\"\npool = \"shared\"\ndeployment = \
                 \"chat\"\nengine = {{ replica = \"r{number}\", model_config = \"config.json\" }}\n"
            );
        }
        text += &format!("[[scale]]\ndeployment = \"chat\"\npool = \"shared\"\n{scale}\n");
        let loaded = Loaded { config: config::parse(&text).unwrap(), file: Some(folder.path().join("farthing.toml")) };
        assert_eq!(config::check(&loaded.config, config::Standing { keys: 0 }), Vec::<String>::new());
        plans(&loaded, Timestamp::from_micros(0)).unwrap().swap_remove(0)
    }

    #[test]
    fn replicas_are_the_upstreams_in_their_order_or_stand_behind_one() {
        let plan = planned(2, "upstreams = [\"chat-1\", \"chat-0\"]");
        let names: Vec<(Option<&str>, &str)> =
            plan.replicas.iter().map(|replica| (replica.upstream.as_deref(), &*replica.name)).collect();
        assert_eq!(names, [(Some("chat-1"), "r1"), (Some("chat-0"), "r0")]);
        assert_eq!(
            (plan.gpus, plan.bounds.committed, plan.bounds.ceiling),
            (2, 2, 2),
            "what was reserved is committed"
        );
        let behind = planned(1, "ceiling = 3\ncommitted = 1");
        let names: Vec<&str> = behind.replicas.iter().map(|replica| &*replica.name).collect();
        assert_eq!((names, behind.service.as_deref()), (vec!["r0", "r1", "chat-2"], Some("chat-0")));
        assert!(behind.replicas.iter().all(|replica| replica.upstream.is_none()));
        assert_eq!(behind.bounds.committed, 1);
    }

    #[test]
    fn what_a_replica_can_do_is_said_or_simulated() {
        let said = planned(2, "capacity = { requests_per_s = 5, input_tokens = 100, output_tokens = 50 }");
        let capacity = said.reach(&[], None).unwrap();
        assert!((5.0 * capacity.work.of(100, 50) - 1.0).abs() < 1e-9, "{capacity:?}");
        assert!((said.bounds(&capacity).output_tokens_per_s_at_capacity - 250.0).abs() < 1e-9);
        let plan = planned(2, "");
        let long = plan.reach(&[(2_000, 400)], None).unwrap();
        let short = plan.reach(&[(200, 40)], None).unwrap();
        assert!(short.requests_per_s > 4.0 * long.requests_per_s && long.requests_per_s > 0.5, "{short:?} {long:?}");
        assert!((long.requests_per_s * long.work.of(2_000, 400) - 1.0).abs() < 1e-6, "{long:?}");
        let hopeless = planned(2, "objective = { ttft_ms = 0.001 }");
        assert!(hopeless.reach(&[(2_000, 400)], None).unwrap_err().to_string().contains("loosen it"));
    }
}
