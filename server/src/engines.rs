//! The engines on our own GPUs, as facts that grow while the server runs: what the configuration knows of each, corrected
//! by what it says of itself and by the constants that are fitted on the way.

use std::collections::BTreeMap;

use anyhow::Context as _;
use ledger::allocate::colocated::MigSlice;
use ledger::allocate::replica::Replica;
use ledger::allocate::shape::Model;
use ledger::allocate::timeline::Limits;
use ledger::gpu::GpuSheet;
use ledger::settle::interval_of;
use ledger::telemetry::Speculation;
use ledger::{Adapter, CapacityFact, EngineFact, EngineReading, EngineSetup, Label, Period, Timestamp};

use crate::config::{EngineSection, Loaded, PoolSection, UpstreamSection, gpu_sheet, mig_slice, nine_digits};

/// The end of 9999: when an engine is ready of which nobody has heard yet.
pub const NOT_YET: Timestamp = Timestamp::from_micros(253_402_300_799_000_000);

/// Steps of requests that make an average of speculation.
const STEPS_MIN: u64 = 1_000;
/// How far speculation has to move before the engine counts as changed.
const SPECULATION_MOVED: f64 = 0.1;

/// All engines.
#[derive(Debug, Clone, Default)]
pub struct Engines {
    known: BTreeMap<Label, Known>,
    /// Facts that ended and have to be written once more.
    ended: Vec<EngineFact>,
}

/// One engine of the configuration.
#[derive(Debug, Clone)]
struct Known {
    /// As the configuration has it; to see whether a changed file changes it.
    configured: EngineFact,
    /// Its constants are the configuration's and are not fitted.
    constants_are_set: bool,
    /// What it says of itself.
    learned: Learned,
    /// As it is; `None` while its replica is stopped.
    now: Option<EngineFact>,
    /// New constants and when they begin.
    next: Option<EngineFact>,
    /// Whether anything was heard of it.
    heard: bool,
}

/// What an engine says of itself.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Learned {
    /// Tokens that fit its KV cache.
    pub kv_tokens: Option<u64>,
    /// How many tokens it drafts and accepts in a step.
    pub speculation: Option<Speculation>,
}

impl Learned {
    /// What a reading tells. A step of a decoding request delivers one token and those that were accepted, so that there
    /// were `generated - accepted` such steps; speculation is told when there were enough of them to say.
    #[must_use]
    pub fn of(reading: &EngineReading) -> Learned {
        let speculation = || {
            let (drafted, accepted) = (reading.drafted_tokens?, reading.accepted_tokens?);
            let steps = reading.generation_tokens?.checked_sub(accepted).filter(|&steps| steps >= STEPS_MIN)?;
            let each = |tokens: u64| nine_digits(as_number(tokens) / as_number(steps));
            (drafted > 0).then(|| Speculation { drafted: each(drafted.max(accepted)), accepted: each(accepted) })
        };
        Learned { kv_tokens: reading.kv_tokens, speculation: speculation() }
    }
}

impl Engines {
    /// The engines that the configuration names, from `now` on.
    ///
    /// # Errors
    /// When a model's `config.json` cannot be read, naming the upstream, the file and the key.
    pub fn new(loaded: &Loaded, now: Timestamp) -> anyhow::Result<Engines> {
        let known = engine_facts(loaded)?
            .into_iter()
            .map(|(fact, constants_are_set)| (fact.engine.clone(), Known::starting(fact, constants_are_set, now)));
        Ok(Engines { known: known.collect(), ended: Vec::new() })
    }

    /// Takes a changed configuration: engines that are not as they were end, and start again as they are.
    ///
    /// # Errors
    /// As [`new`](Engines::new); nothing has changed then.
    pub fn change(&mut self, loaded: &Loaded, now: Timestamp) -> anyhow::Result<()> {
        let mut before = std::mem::take(&mut self.known);
        let facts = match engine_facts(loaded) {
            Ok(facts) => facts,
            Err(error) => {
                self.known = before;
                return Err(error);
            }
        };
        for (fact, constants_are_set) in facts {
            let name = fact.engine.clone();
            let known = match before.remove(&name) {
                Some(known) if known.configured == fact && known.constants_are_set == constants_are_set => known,
                Some(mut known) => {
                    self.ended.extend(known.end(now, now));
                    // The process is the one that ran before; only what is known of it changed.
                    Known { heard: known.heard, ..Known::starting(fact, constants_are_set, now) }
                }
                None => Known::starting(fact, constants_are_set, now),
            };
            self.known.insert(name, known);
        }
        for known in before.values_mut() {
            self.ended.extend(known.end(now, now));
        }
        Ok(())
    }

    /// Every engine as it has been until now, and what ended since the last look.
    pub fn observe(&mut self, now: Timestamp) -> Vec<EngineFact> {
        for known in self.known.values_mut() {
            if let Some(next) = known.next.take_if(|next| next.period.start <= now) {
                self.ended.extend(known.end(next.period.start, now));
                known.now = Some(next);
            }
            if let Some(fact) = &mut known.now {
                fact.period.end = now.max(fact.period.end);
                fact.observed_at = now;
            }
        }
        let grown = self.known.values().filter_map(|known| known.now.clone());
        self.ended.drain(..).chain(grown).filter(|fact| fact.period.start < fact.period.end).collect()
    }

    /// Every engine as it is, and whether its replica runs.
    pub fn all(&self) -> impl Iterator<Item = (&EngineFact, bool)> {
        self.known.values().map(|known| (known.now.as_ref().unwrap_or(&known.configured), known.now.is_some()))
    }

    /// Whether any engine was started and has not been heard of.
    #[must_use]
    pub fn any_awaited(&self) -> bool {
        self.known.values().any(|known| known.now.as_ref().is_some_and(|fact| fact.ready_at == Some(NOT_YET)))
    }

    /// The engine answered, be it a request or a scrape: it is ready since then at the latest. Harmless when repeated.
    pub fn answered(&mut self, engine: &str, at: Timestamp) {
        let Some(known) = self.known.get_mut(engine) else { return };
        known.heard = true;
        if let Some(fact) = &mut known.now
            && fact.ready_at == Some(NOT_YET)
        {
            fact.ready_at = Some(at.max(fact.period.start));
        }
    }

    /// The engine did not answer. One that was never heard of is starting; of one that was, nothing follows. Whether it
    /// is starting.
    pub fn silent(&mut self, engine: &str) -> bool {
        let Some(known) = self.known.get_mut(engine) else { return false };
        let Some(fact) = &mut known.now else { return false };
        if !known.heard {
            fact.ready_at = fact.ready_at.or(Some(NOT_YET));
        }
        fact.ready_at == Some(NOT_YET)
    }

    /// What the engine says of itself; the configuration's own numbers stay. The size of its cache holds for all of its
    /// time; speculation that moved holds from the next minute on.
    pub fn learn(&mut self, engine: &str, learned: Learned, now: Timestamp) {
        let Some(known) = self.known.get_mut(engine) else { return };
        known.learned.kv_tokens = learned.kv_tokens.or(known.learned.kv_tokens);
        known.learned.speculation = learned.speculation.or(known.learned.speculation);
        let kv_tokens = known.configured.setup.limits.kv_tokens.or(known.learned.kv_tokens.map(as_number));
        for fact in known.now.iter_mut().chain(&mut known.next) {
            fact.setup.limits.kv_tokens = kv_tokens;
        }
        let (Some(fact), Some(told)) = (&mut known.now, learned.speculation) else { return };
        match fact.setup.speculation {
            None => fact.setup.speculation = Some(told),
            Some(before) if moved(before, told) => {
                let start = interval_of(now).end;
                let fresh = || EngineFact { period: Period { start, end: start }, ready_at: None, ..fact.clone() };
                known.next.get_or_insert_with(fresh).setup.speculation = Some(told);
            }
            Some(_) => {}
        }
    }

    /// Takes constants that were fitted, from the fact's start on. Constants that the configuration sets stay.
    pub fn recalibrate(&mut self, fact: EngineFact) {
        let Some(known) = self.known.get_mut(&*fact.engine) else { return };
        if known.constants_are_set {
            return;
        }
        let Some(now) = &mut known.now else { return };
        if fact.period.start <= now.period.start {
            now.setup = fact.setup;
        } else {
            let start = fact.period.start;
            known.next = Some(EngineFact { ready_at: None, period: Period { start, end: start }, ..fact });
        }
    }

    /// Whether the engine's replica is known to be stopped.
    #[must_use]
    pub fn is_stopped(&self, engine: &str) -> bool {
        self.known.get(engine).is_some_and(|known| known.now.is_none())
    }

    /// A replica was started: its engines are loading until somebody hears of them.
    pub fn replica_started(&mut self, fact: &CapacityFact, now: Timestamp) {
        let start = fact.period.start;
        for known in self.known.values_mut().filter(|known| known.is_on(&fact.pool, &fact.replica)) {
            if known.now.as_ref().is_some_and(|running| running.period.start == start) {
                continue;
            }
            let ended = known.end(start, now);
            self.ended.extend(ended);
            known.next = None;
            known.heard = false;
            let mut fresh = known.fresh(start);
            fresh.ready_at = Some(NOT_YET);
            known.now = Some(fresh);
        }
    }

    /// A replica is ready: its engines can serve from then on.
    pub fn replica_ready(&mut self, pool: &Label, replica: &Label, at: Timestamp) {
        for known in self.known.values_mut().filter(|known| known.is_on(pool, replica)) {
            known.heard = true;
            if let Some(fact) = &mut known.now {
                fact.ready_at = Some(at.max(fact.period.start));
            }
        }
    }

    /// A replica was stopped, and its engines with it.
    pub fn replica_stopped(&mut self, pool: &Label, replica: &Label, at: Timestamp, now: Timestamp) {
        for known in self.known.values_mut().filter(|known| known.is_on(pool, replica)) {
            let ended = known.end(at, now);
            self.ended.extend(ended);
            known.next = None;
        }
    }
}

impl Known {
    fn starting(configured: EngineFact, constants_are_set: bool, now: Timestamp) -> Known {
        let mut known =
            Known { configured, constants_are_set, learned: Learned::default(), now: None, next: None, heard: false };
        known.now = Some(known.fresh(now));
        known
    }

    /// The engine from `start` on, as configuration and engine say.
    fn fresh(&self, start: Timestamp) -> EngineFact {
        let mut fact =
            EngineFact { period: Period { start, end: start }, observed_at: start, ..self.configured.clone() };
        fact.setup.limits.kv_tokens = fact.setup.limits.kv_tokens.or(self.learned.kv_tokens.map(as_number));
        fact.setup.speculation = self.learned.speculation;
        fact
    }

    fn is_on(&self, pool: &Label, replica: &Label) -> bool {
        self.configured.pool == *pool && self.configured.replica == *replica
    }

    fn end(&mut self, end: Timestamp, now: Timestamp) -> Option<EngineFact> {
        let mut fact = self.now.take()?;
        fact.period.end = end.max(fact.period.start);
        fact.observed_at = now;
        Some(fact)
    }
}

/// What the configuration knows of each engine, without a time, and whether its constants are set.
///
/// # Errors
/// As [`Engines::new`].
pub fn engine_facts(loaded: &Loaded) -> anyhow::Result<Vec<(EngineFact, bool)>> {
    let mut facts = Vec::new();
    for upstream in &loaded.config.upstream {
        let Some(pool) = loaded.config.pool.iter().find(|pool| Some(&pool.name) == upstream.pool.as_ref()) else {
            continue;
        };
        let model = model_of(loaded, upstream).with_context(|| format!("upstream `{}`", upstream.name))?;
        let default = EngineSection::default();
        facts.push(engine_fact(loaded, upstream, upstream.engine.as_ref().unwrap_or(&default), pool, model));
    }
    Ok(facts)
}

fn engine_fact(
    loaded: &Loaded,
    upstream: &UpstreamSection,
    engine: &EngineSection,
    pool: &PoolSection,
    model: Option<Model>,
) -> (EngineFact, bool) {
    let replica = upstream.replica(pool);
    let sheet = gpu_sheet(&loaded.config, &pool.gpu);
    let slice = sheet.zip(engine.slice.as_deref()).and_then(|(sheet, profile)| mig_slice(&sheet, profile));
    let gpus =
        pool.all_replicas().into_iter().find(|known| known.name == replica).map_or(pool.gpus, |known| known.gpus);
    let constants = model.zip(sheet).map(|(model, sheet)| {
        let whole = Replica::unfitted(model, slice.map_or(sheet, |slice| sliced(&sheet, slice)), gpus);
        let set = engine.efficiencies.map(|set| set.efficiencies());
        Replica { efficiencies: set.unwrap_or(whole.efficiencies), ..whole }
    });
    let usual = Limits::default();
    let limits = Limits {
        kv_tokens: engine.kv_tokens.map(as_number),
        block_tokens: engine.block_tokens.map_or(usual.block_tokens, f64::from),
        step_tokens_max: engine.max_num_batched_tokens.map_or(usual.step_tokens_max, f64::from),
    };
    let adapters = engine.adapters.iter().map(|adapter| Adapter {
        model: adapter.model.as_str().into(),
        bytes: adapter.bytes,
        flop_per_token: adapter.flop_per_token,
    });
    let start = Timestamp::from_micros(0);
    let fact = EngineFact {
        engine: upstream.name.as_str().into(),
        pool: pool.name.as_str().into(),
        replica: replica.into(),
        model: upstream.deployment.as_deref().map(Into::into),
        setup: EngineSetup { constants, limits, slice, ..EngineSetup::default() },
        adapters: adapters.collect(),
        ready_at: None,
        warm_for: engine.kept_warm_for.clone(),
        period: Period { start, end: start },
        observed_at: start,
    };
    (fact, engine.efficiencies.is_some())
}

fn model_of(loaded: &Loaded, upstream: &UpstreamSection) -> anyhow::Result<Option<Model>> {
    let Some(engine) = &upstream.engine else { return Ok(None) };
    let Some(file) = &engine.model_config else { return Ok(engine.model) };
    let path = loaded.beside(file);
    let text = std::fs::read_to_string(&path)
        .with_context(|| format!("engine.model_config: cannot read {}", path.display()))?;
    let model = Model::from_config(&text).with_context(|| format!("engine.model_config: {}", path.display()))?;
    Ok(Some(model))
}

/// The part of a card that a slice has to itself, as a card of its own.
fn sliced(sheet: &GpuSheet, slice: MigSlice) -> GpuSheet {
    let (compute, memory) = (f64::from(slice.compute) / 7.0, f64::from(slice.memory) / 8.0);
    let name = format!("{} {}/7 {}/8", sheet.name, slice.compute, slice.memory);
    GpuSheet::custom(
        &name,
        nine_digits(sheet.flop_per_s * compute),
        nine_digits(sheet.bytes_per_s * memory),
        sheet.memory_bytes * memory,
    )
}

fn moved(before: Speculation, after: Speculation) -> bool {
    let apart = |before: f64, after: f64| (after - before).abs() > SPECULATION_MOVED * before.max(SPECULATION_MOVED);
    apart(before.drafted, after.drafted) || apart(before.accepted, after.accepted)
}

/// A count for the step model; beyond 2^53 its last digits do not matter.
fn as_number(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    const LLAMA: &str = r#"{ "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "torch_dtype": "bfloat16" }"#;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_micros(seconds * 1_000_000)
    }

    fn loaded(folder: &tempfile::TempDir, engine: &str) -> Loaded {
        std::fs::write(folder.path().join("config.json"), LLAMA).unwrap();
        let text = format!(
            "[[pool]]\nname = \"shared\"\ngpu = \"H100\"\ngpus = 2\nusd_per_gpu_hour = \"3\"\n[[upstream]]\nname = \"a\"\nkind = \
             \"vllm\"\nbase_url = \"http://h\"\npool = \"shared\"\ndeployment = \"model-a\"\n{engine}\n"
        );
        Loaded { config: config::parse(&text).unwrap(), file: Some(folder.path().join("farthing.toml")) }
    }

    fn span(fact: &EngineFact) -> (i64, i64) {
        (fact.period.start.micros() / 1_000_000, fact.period.end.micros() / 1_000_000)
    }

    #[test]
    fn the_configuration_says_what_an_engine_is() {
        let folder = tempfile::tempdir().unwrap();
        let full = "engine = { model_config = \"config.json\", slice = \"3g.40gb\", kv_tokens = 1000, max_num_batched_tokens = \
                    512, efficiencies = { compute = 0.4, bandwidth = 0.7, overhead_us = 100 }, kept_warm_for = { team = \"t\" }, \
                    adapters = [{ model = \"lora\", bytes = 5, flop_per_token = 6 }] }";
        let mut engines = Engines::new(&loaded(&folder, full), at(0)).unwrap();
        assert!(engines.observe(at(0)).is_empty());
        let fact = engines.observe(at(60)).swap_remove(0);
        assert_eq!((&*fact.engine, &*fact.pool, &*fact.replica), ("a", "shared", "shared-0"));
        let constants = fact.setup.constants.unwrap();
        assert_eq!((constants.gpus, constants.efficiencies.compute, constants.efficiencies.overhead_s), (2, 0.4, 1e-4));
        assert!((constants.gpu.bytes_per_s / GpuSheet::H100.bytes_per_s - 0.5).abs() < 1e-9, "4 of 8 memory slices");
        assert_eq!((fact.setup.limits.kv_tokens, fact.setup.limits.step_tokens_max), (Some(1000.0), 512.0));
        assert_eq!((&*fact.adapters[0].model, fact.warm_for.clone().unwrap().team.as_deref()), ("lora", Some("t")));
        let text = serde_json::to_string(&fact).unwrap();
        assert_eq!(serde_json::from_str::<EngineFact>(&text).unwrap(), fact);
        engines.recalibrate(EngineFact { setup: EngineSetup::default(), ..fact.clone() });
        assert_eq!(engines.observe(at(60))[0].setup, fact.setup, "constants that are set are not fitted");

        let none = Engines::new(&loaded(&folder, ""), at(0)).unwrap().observe(at(1)).swap_remove(0);
        assert_eq!(none.setup, EngineSetup::default());
        let error = Engines::new(&loaded(&folder, "engine = { model_config = \"none.json\" }"), at(0)).unwrap_err();
        assert!(format!("{error:#}").contains("upstream `a`: engine.model_config: cannot read"), "{error:#}");
    }

    #[test]
    fn an_engine_is_ready_when_it_is_first_heard_of() {
        let folder = tempfile::tempdir().unwrap();
        let mut engines = Engines::new(&loaded(&folder, ""), at(0)).unwrap();
        assert_eq!(engines.observe(at(1))[0].ready_at, None, "it may have run for days");
        engines.silent("a");
        assert!(engines.any_awaited());
        assert_eq!(engines.observe(at(2))[0].ready_at, Some(NOT_YET));
        engines.answered("a", at(30));
        engines.answered("a", at(40));
        engines.silent("a");
        assert_eq!(engines.observe(at(50))[0].ready_at, Some(at(30)));
        assert!(!engines.any_awaited());

        let started = CapacityFact {
            pool: "shared".into(),
            replica: "shared-0".into(),
            period: Period { start: at(60), end: at(60) },
            ..CapacityFact::default()
        };
        engines.replica_started(&started, at(61));
        engines.replica_started(&started, at(62));
        let facts = engines.observe(at(70));
        assert_eq!(
            facts.iter().map(|fact| (span(fact), fact.ready_at)).collect::<Vec<_>>(),
            [((0, 60), Some(at(30))), ((60, 70), Some(NOT_YET))]
        );
        engines.replica_ready(&"shared".into(), &"shared-0".into(), at(80));
        engines.replica_stopped(&"shared".into(), &"shared-0".into(), at(90), at(91));
        let facts = engines.observe(at(100));
        assert_eq!((facts.len(), span(&facts[0]), facts[0].ready_at), (1, (60, 90), Some(at(80))));
        assert!(engines.observe(at(110)).is_empty());
    }

    #[test]
    fn speculation_is_averaged_and_starts_a_new_fact_when_it_moves() {
        let reading = |generated, drafted, accepted| EngineReading {
            generation_tokens: Some(generated),
            drafted_tokens: Some(drafted),
            accepted_tokens: Some(accepted),
            ..EngineReading::default()
        };
        assert_eq!(Learned::of(&reading(900, 1_800, 300)), Learned::default(), "too few steps");
        assert_eq!(Learned::of(&reading(9_000, 0, 0)), Learned::default(), "it does not speculate");
        let learned = Learned::of(&reading(3_000, 6_000, 1_000));
        assert_eq!(learned.speculation, Some(Speculation { drafted: 3.0, accepted: 0.5 }));

        let folder = tempfile::tempdir().unwrap();
        let mut engines = Engines::new(&loaded(&folder, ""), at(0)).unwrap();
        engines.learn("a", learned, at(5));
        engines.learn("a", Learned::of(&reading(3_000, 6_100, 1_000)), at(10));
        assert_eq!(engines.observe(at(20))[0].setup.speculation, learned.speculation, "it did not move");
        let other = Learned::of(&reading(4_000, 6_000, 2_000));
        engines.learn("a", other, at(30));
        let facts = engines.observe(at(70));
        assert_eq!(facts.iter().map(span).collect::<Vec<_>>(), [(0, 60), (60, 70)]);
        assert_eq!((facts[0].setup.speculation, facts[1].setup.speculation), (learned.speculation, other.speculation));
    }

    #[test]
    fn new_constants_begin_when_they_say_and_limits_are_learned() {
        let folder = tempfile::tempdir().unwrap();
        let known = loaded(&folder, "engine = { model_config = \"config.json\" }");
        let mut engines = Engines::new(&known, at(0)).unwrap();
        engines.learn("a", Learned { kv_tokens: Some(40_000), speculation: None }, at(1));
        let before = engines.observe(at(60)).swap_remove(0);
        assert_eq!(before.setup.limits.kv_tokens, Some(40_000.0));
        let mut fitted = before.clone();
        fitted.setup.constants.as_mut().unwrap().efficiencies.compute = 0.3;
        fitted.period = Period { start: at(120), end: at(120) };
        engines.recalibrate(fitted.clone());
        assert_eq!(engines.observe(at(100)).len(), 1);
        let facts = engines.observe(at(130));
        assert_eq!(facts.iter().map(span).collect::<Vec<_>>(), [(0, 120), (120, 130)]);
        assert_eq!(facts[1].setup, fitted.setup);

        // The same file again changes nothing; another one starts a new fact and forgets what was fitted for the old.
        engines.change(&known, at(140)).unwrap();
        assert_eq!(engines.observe(at(150)).iter().map(span).collect::<Vec<_>>(), [(120, 150)]);
        engines.change(&loaded(&folder, "engine = { kv_tokens = 7 }"), at(160)).unwrap();
        let facts = engines.observe(at(170));
        assert_eq!(facts.iter().map(span).collect::<Vec<_>>(), [(120, 160), (160, 170)]);
        assert_eq!(facts[1].setup.limits.kv_tokens, Some(7.0));
        assert!(engines.change(&loaded(&folder, "engine = { model_config = \"none.json\" }"), at(180)).is_err());
        assert_eq!(engines.observe(at(190)).iter().map(span).collect::<Vec<_>>(), [(160, 190)]);
    }
}
