//! What a well-formed configuration can still get wrong about GPUs, engines and telemetry, and what it leaves out at a
//! cost. Pure functions of the configuration.

use std::collections::{BTreeMap, BTreeSet};

use gateway::provider::Kind;
use ledger::allocate::colocated::MigSlice;
use ledger::gpu::GpuSheet;

use super::check::{address, unknown};
use super::fleet::{EngineSection, PoolSection, gpu_sheet};
use super::sections::{Config, UpstreamSection};

/// Everything that is wrong with pools, GPUs, engines and telemetry, one sentence each.
#[must_use]
pub fn check(config: &Config) -> Vec<String> {
    let mut wrong = Vec::new();
    gpus(config, &mut wrong);
    for pool in &config.pool {
        replicas(pool, &mut wrong);
    }
    for upstream in &config.upstream {
        let pool = upstream.pool.as_deref().and_then(|name| config.pool.iter().find(|pool| pool.name == name));
        if let Some(pool) = pool {
            engine(config, upstream, pool, &mut wrong);
        }
    }
    slices(config, &mut wrong);
    telemetry(config, &mut wrong);
    wrong
}

/// What is allowed and costs something, one sentence each: what it costs, and what to add.
#[must_use]
pub fn warnings(config: &Config) -> Vec<String> {
    let mut warnings = Vec::new();
    for pool in &config.pool {
        if gpu_sheet(config, &pool.gpu).is_none() {
            let known = GpuSheet::ALL.map(|sheet| sheet.name).join(", ");
            warnings.push(format!(
                "pool `{}`: there is no data sheet of the GPU `{}`, so that its engines' time is divided by tokens; add a \
                 [[gpu]] of that name with bf16_tflops, gb_per_s and memory_gb, or use one of {known}",
                pool.name, pool.gpu
            ));
        }
    }
    for upstream in config.upstream.iter().filter(|upstream| upstream.pool.is_some()) {
        let name = &upstream.name;
        let engine = upstream.engine.as_ref();
        if engine.is_none_or(|engine| engine.model_config.is_none() && engine.model.is_none()) {
            warnings.push(format!(
                "upstream `{name}`: the model's dimensions are unknown, so that the engine's time is divided by tokens; add \
                 engine = {{ model_config = \"config.json\" }} with the model's Hugging Face file"
            ));
        }
        if upstream.metrics_url().is_none() {
            warnings.push(format!(
                "upstream `{name}`: its metrics are not read, so that requests which bypass the gateway are not seen and the \
                 share of idle time is not checked; leave engine.metrics out, or set it to the metrics' URL"
            ));
        }
    }
    warnings
}

/// The slice that a MIG profile such as `3g.40gb` names on this GPU; `None` when it is no profile of it.
#[must_use]
pub fn mig_slice(sheet: &GpuSheet, profile: &str) -> Option<MigSlice> {
    // Vendors round an eighth of the memory up: a card of 141 GB has slices of 18 GB.
    let gb_per_slice = (1..=512u32).find(|&gb| f64::from(gb) * 8e9 >= sheet.memory_bytes)?;
    MigSlice::of_profile(profile, gb_per_slice).filter(|slice| slice.compute > 0 && slice.memory > 0)
}

fn gpus(config: &Config, wrong: &mut Vec<String>) {
    let mut names = BTreeSet::new();
    for gpu in &config.gpu {
        let name = &gpu.name;
        if !names.insert(name.as_str()) {
            wrong.push(format!("two [[gpu]] are named `{name}`"));
        }
        let numbers = [("bf16_tflops", gpu.bf16_tflops), ("gb_per_s", gpu.gb_per_s), ("memory_gb", gpu.memory_gb)];
        for (key, value) in numbers {
            if !(value.is_finite() && value > 0.0) {
                wrong.push(format!("gpu `{name}`: {key} = {value} cannot be; take it from the card's data sheet"));
            }
        }
    }
}

fn replicas(pool: &PoolSection, wrong: &mut Vec<String>) {
    let place = format!("pool `{}`", pool.name);
    if let Some(peak) = pool.peak_gpus
        && !(peak.is_finite() && peak >= 0.0 && peak <= f64::from(pool.gpus))
    {
        wrong.push(format!("{place}: peak_gpus = {peak} is not within its {} GPUs; set it from 0 to that", pool.gpus));
    }
    if pool.replicas.is_empty() {
        return;
    }
    let mut names = BTreeSet::new();
    for replica in &pool.replicas {
        if !names.insert(replica.name.as_str()) {
            wrong.push(format!("{place}: two replicas are named `{}`", replica.name));
        }
        if replica.name.trim().is_empty() {
            wrong.push(format!("{place}: a replica has an empty name"));
        }
        if replica.gpus == 0 {
            wrong.push(format!("{place}: replica `{}` has no GPUs; set gpus to 1 or more", replica.name));
        }
    }
    let sum: u64 = pool.replicas.iter().map(|replica| u64::from(replica.gpus)).sum();
    if sum != u64::from(pool.gpus) {
        wrong.push(format!(
            "{place}: its replicas have {sum} GPUs together and the pool has {}; make them add up, naming what stands idle \
             as a replica of its own",
            pool.gpus
        ));
    }
}

fn engine(config: &Config, upstream: &UpstreamSection, pool: &PoolSection, wrong: &mut Vec<String>) {
    let place = format!("upstream `{}`", upstream.name);
    let default = EngineSection::default();
    let engine = upstream.engine.as_ref().unwrap_or(&default);
    if upstream.runs().is_none() && upstream.kind == Kind::OpenAi {
        wrong.push(format!(
            "{place}: say what serves it on its pool, such as engine = {{ runs = \"sglang\" }}; kind = \"openai\" is only the protocol"
        ));
    }
    replica_of(engine, pool, &place, wrong);
    match engine.metrics.as_deref() {
        None | Some("none") => {}
        Some(url) => {
            if let Err(reason) = address(url, "leave it out") {
                wrong.push(format!("{place}: engine.metrics {reason}; or write \"none\""));
            }
        }
    }
    if let Some(endpoint) = &engine.forward_pass
        && !endpoint.strip_prefix("tcp://").is_some_and(|rest| rest.contains(':'))
    {
        wrong.push(format!("{place}: engine.forward_pass = \"{endpoint}\" is no address; write tcp://HOST:PORT"));
    }
    if let Some(profile) = &engine.slice {
        match gpu_sheet(config, &pool.gpu) {
            Some(sheet) if mig_slice(&sheet, profile).is_none() => wrong.push(format!(
                "{place}: engine.slice = \"{profile}\" is no MIG profile of a {} with {} GB; write it like \"3g.40gb\"",
                pool.gpu,
                sheet.memory_bytes / 1e9
            )),
            Some(_) => {}
            None => wrong.push(format!(
                "{place}: engine.slice needs the memory of the GPU `{}`; add a [[gpu]] of that name",
                pool.gpu
            )),
        }
    }
    let counts = [
        ("kv_tokens", engine.kv_tokens),
        ("block_tokens", engine.block_tokens.map(u64::from)),
        ("max_num_batched_tokens", engine.max_num_batched_tokens.map(u64::from)),
    ];
    for (key, value) in counts {
        if value == Some(0) {
            wrong.push(format!("{place}: engine.{key} = 0 cannot be; leave it out when it is unknown"));
        }
    }
    if let Some(known) = engine.efficiencies {
        for (key, value) in [("compute", known.compute), ("bandwidth", known.bandwidth)] {
            if !(value > 0.0 && value <= 1.0) {
                wrong
                    .push(format!("{place}: engine.efficiencies.{key} = {value} is not a share above 0 and at most 1"));
            }
        }
        if !(0.0..=1e6).contains(&known.overhead_us) {
            wrong.push(format!(
                "{place}: engine.efficiencies.overhead_us = {} is not from 0 to 1000000",
                known.overhead_us
            ));
        }
    }
    let mut adapters = BTreeSet::new();
    for adapter in &engine.adapters {
        if !adapters.insert(adapter.model.as_str()) {
            wrong.push(format!("{place}: two adapters are for model `{}`", adapter.model));
        }
    }
}

fn replica_of(engine: &EngineSection, pool: &PoolSection, place: &str, wrong: &mut Vec<String>) {
    let all = pool.all_replicas();
    let names: BTreeSet<&str> = all.iter().map(|replica| replica.name.as_str()).collect();
    match engine.replica.as_deref() {
        Some(name) if !names.contains(name) => {
            wrong.push(unknown("replica", name, &names, &format!("{place}, pool `{}`", pool.name)));
        }
        Some(_) => {}
        None if all.len() > 1 => wrong.push(format!(
            "{place}: pool `{}` has several replicas; say whose GPUs it uses: engine = {{ replica = \"{}\" }}",
            pool.name, all[0].name
        )),
        None => {}
    }
}

/// Slices of one replica have to fit one GPU, and either all of its engines have one or none.
fn slices(config: &Config, wrong: &mut Vec<String>) {
    let mut by_replica: BTreeMap<(&str, String), Vec<Option<MigSlice>>> = BTreeMap::new();
    for upstream in &config.upstream {
        let Some(pool) = config.pool.iter().find(|pool| Some(&pool.name) == upstream.pool.as_ref()) else { continue };
        let Some(sheet) = gpu_sheet(config, &pool.gpu) else { continue };
        let engine = upstream.engine.as_ref();
        let slice = engine.and_then(|engine| engine.slice.as_deref()).map(|profile| mig_slice(&sheet, profile));
        by_replica.entry((&pool.name, upstream.replica(pool))).or_default().push(slice.flatten());
    }
    for ((pool, replica), slices) in by_replica {
        let cut: Vec<MigSlice> = slices.iter().flatten().copied().collect();
        let (compute, memory) =
            cut.iter().fold((0, 0), |(compute, memory), slice| (compute + slice.compute, memory + slice.memory));
        if !cut.is_empty() && cut.len() < slices.len() {
            wrong.push(format!(
                "pool `{pool}`, replica `{replica}`: some engines have a slice and some have none; give each its engine.slice"
            ));
        }
        if compute > 7 || memory > 8 {
            wrong.push(format!(
                "pool `{pool}`, replica `{replica}`: its slices take {compute} of 7 compute slices and {memory} of 8 memory \
                 slices; make them fit one GPU or use another replica"
            ));
        }
    }
}

fn telemetry(config: &Config, wrong: &mut Vec<String>) {
    let telemetry = &config.telemetry;
    if telemetry.scrape_every_ms < 100 {
        wrong.push(format!("telemetry.scrape_every_ms = {} is too small; the least is 100", telemetry.scrape_every_ms));
    }
    let pools: BTreeSet<&str> = config.pool.iter().map(|pool| pool.name.as_str()).collect();
    for exporter in &telemetry.gpu_exporters {
        if let Err(reason) = address(&exporter.url, "leave it out") {
            wrong.push(format!("telemetry.gpu_exporters: url {reason}"));
        }
    }
    let named = telemetry.gpu_exporters.iter().map(|exporter| ("telemetry.gpu_exporters", exporter.pool.as_deref()));
    for (place, pool) in named.chain([("telemetry.nvml_pool", telemetry.nvml_pool.as_deref())]) {
        if let Some(pool) = pool
            && !pools.contains(pool)
        {
            wrong.push(unknown("pool", pool, &pools, place));
        }
    }
    let holders = telemetry.engines.iter().map(|one| ("telemetry.engines", [&one.namespace, &one.pod, &one.process]));
    let jobs = telemetry.jobs.iter().map(|one| ("telemetry.jobs", [&one.namespace, &one.pod, &one.process]));
    for (place, patterns) in holders.chain(jobs) {
        let given: Vec<&String> = patterns.into_iter().flatten().collect();
        if given.is_empty() || given.iter().any(|pattern| pattern.is_empty()) {
            wrong.push(format!("{place}: an entry says nobody; set namespace, pod or process, with * for anything"));
        }
    }
    if let Some(grpc) = telemetry.otlp_grpc {
        for (key, other) in [("gateway.listen", config.gateway.listen), ("admin.listen", config.admin.listen)] {
            if grpc == other && grpc.port() != 0 {
                wrong.push(format!("telemetry.otlp_grpc and {key} are both {grpc}; give each its own port"));
            }
        }
        if !grpc.ip().is_loopback() && config.admin.token.is_none() {
            wrong.push(format!(
                "telemetry.otlp_grpc = \"{grpc}\" is reachable from beyond this machine and admin.token is not set; set \
                 admin.token = {{ env = \"FARTHING_ADMIN_TOKEN\" }} or listen on 127.0.0.1"
            ));
        }
    }
    if config.settlement.look_back_h == 0 {
        wrong.push("settlement.look_back_h = 0 is too small; the least is 1".to_owned());
    }
    if config.settlement.lag_ms > 3_600_000 {
        wrong.push(format!("settlement.lag_ms = {} is too large; the most is 3600000", config.settlement.lag_ms));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse;

    const POOL: &str = "[[pool]]\nname = \"shared\"\ngpu = \"H100\"\ngpus = 2\nusd_per_gpu_hour = \"3\"\n";

    fn upstream(engine: &str) -> String {
        format!("[[upstream]]\nname = \"a\"\nkind = \"vllm\"\nbase_url = \"http://h\"\npool = \"shared\"\n{engine}\n")
    }

    #[test]
    fn each_mistake_is_named_with_its_fix() {
        let two = format!("{POOL}replicas = [{{ name = \"r0\", gpus = 1 }}, {{ name = \"r1\", gpus = 1 }}]\n");
        let cases = [
            (format!("{POOL}peak_gpus = 2.5"), "peak_gpus = 2.5 is not within its 2 GPUs"),
            (format!("{POOL}replicas = [{{ name = \"r0\", gpus = 1 }}]"), "have 1 GPUs together and the pool has 2"),
            (format!("{two}{}", upstream("")), "several replicas; say whose GPUs"),
            (
                format!("{two}{}", upstream("engine = { replica = \"r2\" }")),
                "no replica named `r2`; did you mean `r0`?",
            ),
            (
                format!("{POOL}{}", upstream("engine = { slice = \"9g.80gb\" }")),
                "is no MIG profile of a H100 with 80 GB",
            ),
            (format!("{POOL}{}", upstream("engine = { metrics = \"metrics\" }")), "or write \"none\""),
            (format!("{POOL}{}", upstream("engine = { forward_pass = \"host\" }")), "write tcp://HOST:PORT"),
            (format!("{POOL}{}", upstream("engine = { kv_tokens = 0 }")), "engine.kv_tokens = 0 cannot be"),
            (
                format!(
                    "{POOL}{}",
                    upstream("engine = { efficiencies = { compute = 1.5, bandwidth = 0.8, overhead_us = 9 } }")
                ),
                "engine.efficiencies.compute = 1.5 is not a share",
            ),
            (
                format!("{POOL}{}", upstream("").replace("vllm", "openai")),
                "say what serves it on its pool, such as engine = { runs = \"sglang\" }",
            ),
            (format!("{POOL}{}", upstream("").replace("vllm", "gemini")), "only kind = \"vllm\" or \"openai\""),
            (upstream("engine = {}").replace("pool = \"shared\"\n", ""), "an engine needs a pool whose GPUs it uses"),
            (
                format!(
                    "{POOL}{}{}",
                    upstream("engine = { slice = \"4g.40gb\" }"),
                    upstream("engine = { slice = \"4g.40gb\" }").replace("\"a\"", "\"b\"")
                ),
                "its slices take 8 of 7 compute slices",
            ),
            (
                format!(
                    "{POOL}{}{}",
                    upstream("engine = { slice = \"4g.40gb\" }"),
                    upstream("").replace("\"a\"", "\"b\"")
                ),
                "some engines have a slice and some have none",
            ),
            (
                "[[gpu]]\nname = \"x\"\nbf16_tflops = 0\ngb_per_s = 1\nmemory_gb = 1".to_owned(),
                "bf16_tflops = 0 cannot be",
            ),
            ("[telemetry]\nscrape_every_ms = 1".to_owned(), "the least is 100"),
            ("[telemetry]\njobs = [{ job = \"x\" }]".to_owned(), "telemetry.jobs: an entry says nobody"),
            ("[telemetry]\nengines = [{ pod = \"\" }]".to_owned(), "telemetry.engines: an entry says nobody"),
            ("[telemetry]\nnvml_pool = \"x\"".to_owned(), "there is no [[pool]]"),
            ("[telemetry]\ngpu_exporters = [{ url = \"x\" }]".to_owned(), "telemetry.gpu_exporters: url"),
            ("[telemetry]\notlp_grpc = \"0.0.0.0:4317\"".to_owned(), "admin.token is not set"),
            ("[telemetry]\notlp_grpc = \"127.0.0.1:4001\"".to_owned(), "telemetry.otlp_grpc and admin.listen are both"),
            ("[settlement]\nlook_back_h = 0".to_owned(), "look_back_h = 0"),
        ];
        for (text, part) in cases {
            let standing = crate::config::Standing { keys: 0 };
            let found = crate::config::check(&parse(&text).expect(&text), standing).join("\n");
            assert!(found.contains(part), "{text}\ngave\n{found}");
        }
    }

    #[test]
    fn what_costs_accuracy_is_said_and_allowed() {
        let text = format!("{}{}", POOL.replace("H100", "abacus"), upstream("engine = { metrics = \"none\" }"));
        let config = parse(&text).unwrap();
        assert_eq!(check(&config), Vec::<String>::new());
        let warned = warnings(&config).join("\n");
        for part in
            ["no data sheet of the GPU `abacus`", "the model's dimensions are unknown", "its metrics are not read"]
        {
            assert!(warned.contains(part), "{warned}");
        }
        let known = format!("{POOL}{}", upstream("engine = { model_config = \"config.json\" }"));
        assert_eq!(warnings(&parse(&known).unwrap()), Vec::<String>::new());
    }

    #[test]
    fn profiles_are_read_for_the_cards_memory() {
        let slice = |sheet: &GpuSheet, profile| mig_slice(sheet, profile).map(|slice| (slice.compute, slice.memory));
        assert_eq!(slice(&GpuSheet::H100, "3g.40gb"), Some((3, 4)));
        assert_eq!(slice(&GpuSheet::H200, "1g.18gb"), Some((1, 1)));
        assert_eq!(slice(&GpuSheet::H200, "7g.141gb"), Some((7, 8)));
        assert_eq!(slice(&GpuSheet::B200, "1g.23gb"), Some((1, 1)));
        assert_eq!(slice(&GpuSheet::H100, "0g.10gb"), None);
    }
}
