//! How fast the simulator is: one replica under a steady load against real time, and a recorded week of 44 million requests over
//! two fleets of about forty replicas on two cores.
//!
//! ```text
//! cargo run --release -p bench --bin simulate -- --traces FOLDER     # --quick for a day of the week, --json for machines
//! ```
//!
//! The folder holds `azure_llm_2023_{code,conv}.csv` and `azure_llm_2024_{code,conv}_10s.csv`; without it only the first
//! part runs. Each part is a process of its own, so that each has its own peak of memory.

use std::error::Error;
use std::io::Write;
use std::path::{Path, PathBuf};

use bench::clock::now;
use bench::process::{output, own_peak_bytes};
use bench::text::table;
use clap::{Parser, Subcommand};
use fleet::scale::{Bounds, Objective, Policy};
use fleet::sim::capacity::{Capacity, capacity};
use fleet::sim::demand::{Demand, Work};
use fleet::sim::engine::{Constants, Spec};
use fleet::sim::fleet::{Scenario, run};
use fleet::sim::plan::Plan;
use fleet::sim::trace::{Trace, TraceOptions};
use ledger::Timestamp;
use ledger::allocate::replica::Replica;
use ledger::step::{GpuSheet, ModelShape};
use serde_json::{Value, json};

type Failure = Box<dyn Error + Send + Sync>;

/// Replicas that the week's peak is to need: the GPU that comes nearest is taken.
const PEAK_REPLICAS: f64 = 40.0;
const DAY_S: f64 = 86_400.0;
/// Where the week's fleets are looked for.
const GPUS: [GpuSheet; 9] = [
    GpuSheet::L4,
    GpuSheet::A10,
    GpuSheet::RTX_4090,
    GpuSheet::L40S,
    GpuSheet::RTX_PRO_6000,
    GpuSheet::A100,
    GpuSheet::H100,
    GpuSheet::H200,
    GpuSheet::B200,
];
/// Pairs of tokens that a replica's capacity is measured with.
const MIX: usize = 2_000;

#[derive(Debug, Parser)]
#[command(about = "Measures the fleet simulator")]
struct Arguments {
    /// Where the recorded traces are.
    #[arg(long)]
    traces: Option<PathBuf>,
    /// Who decides in the week.
    #[arg(long, default_value = "token-rate")]
    policy: Policy,
    /// Requests a second at the one replica.
    #[arg(long, default_value_t = 10.0)]
    rate: f64,
    /// A day instead of a week, an hour instead of a day.
    #[arg(long)]
    quick: bool,
    /// One JSON document instead of tables.
    #[arg(long)]
    json: bool,
    /// Seed of everything.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    #[command(subcommand)]
    role: Option<Role>,
}

/// One measurement; the program starts itself with these.
#[derive(Debug, Subcommand)]
enum Role {
    /// One replica for so many seconds.
    One { seconds: f64 },
    /// Both traces, each on a thread, for so many days.
    Week { days: f64 },
}

fn main() -> Result<(), Failure> {
    let arguments = Arguments::parse();
    let found = match &arguments.role {
        None => everything(&arguments)?,
        Some(Role::One { seconds }) => one(&arguments, *seconds)?,
        Some(Role::Week { days }) => week(&arguments, *days)?,
    };
    let text = if arguments.role.is_some() || arguments.json { format!("{found}\n") } else { tables(&found) };
    Ok(std::io::stdout().lock().write_all(text.as_bytes())?)
}

fn everything(arguments: &Arguments) -> Result<Value, Failure> {
    let role = |words: &[String]| -> Result<Value, Failure> {
        // Losing a line of progress is no failure.
        let _ = writeln!(std::io::stderr().lock(), "simulate: {}", words.join(" "));
        let mut all =
            vec!["--seed".to_owned(), arguments.seed.to_string(), "--policy".to_owned(), arguments.policy.to_string()];
        all.extend(["--rate".to_owned(), arguments.rate.to_string()]);
        if let Some(folder) = &arguments.traces {
            all.extend(["--traces".to_owned(), folder.display().to_string()]);
        }
        all.extend_from_slice(words);
        let words: Vec<&str> = all.iter().map(String::as_str).collect();
        Ok(serde_json::from_str(&output(&std::env::current_exe()?, &words)?)?)
    };
    let (seconds, days) = if arguments.quick { (3_600.0, 1.0) } else { (DAY_S, 7.0) };
    let one = role(&["one".to_owned(), seconds.to_string()])?;
    let week = match &arguments.traces {
        Some(_) => role(&["week".to_owned(), days.to_string()])?,
        None => Value::Null,
    };
    Ok(json!({
        "machine": machine(), "profile": if cfg!(debug_assertions) { "dev" } else { "release" }, "one": one, "week": week,
    }))
}

/// One replica, 512 input and 256 output tokens a request.
fn one(arguments: &Arguments, seconds: f64) -> Result<Value, Failure> {
    let spec = spec(GpuSheet::H100);
    let trace = Trace::rates("steady", Timestamp::default(), seconds, &[arguments.rate], &[(512, 256)], arguments.seed);
    let found =
        capacity(&spec, &[(512, 256)], &Objective::default(), arguments.seed).ok_or("one H100 cannot serve this")?;
    let plan = Plan { log: fleet::sim::plan::Log::None, ..Plan::new("static".parse()?, bounds(&found, 1)) };
    let measured = measure(&Scenario::new(plan, spec, found.work), &trace)?;
    Ok(json!({ "trace": measured, "peak_bytes": own_peak_bytes() }))
}

/// Both traces at once, after a fleet has been found for each.
fn week(arguments: &Arguments, days: f64) -> Result<Value, Failure> {
    let folder = arguments.traces.as_deref().ok_or("the recorded traces are needed: --traces FOLDER")?;
    let fleets = both(["code", "conv"], |name| recorded(arguments, folder, name, days))?;
    let begin = now();
    let measured = both([0, 1], |at| measure(&fleets[at].0, &fleets[at].1))?;
    let took_s = begin.elapsed().as_secs_f64();
    let requests: u64 = measured.iter().filter_map(|one| one["requests"].as_u64()).sum();
    Ok(json!({
        "traces": measured, "requests": requests, "seconds": took_s, "requests_per_s": requests as f64 / took_s,
        "peak_bytes": own_peak_bytes(),
    }))
}

/// Does two things on a thread each.
fn both<A: Send, T: Send>(of: [A; 2], job: impl Fn(A) -> Result<T, Failure> + Sync) -> Result<Vec<T>, Failure> {
    let job = &job;
    std::thread::scope(|scope| {
        let threads = of.map(|one| scope.spawn(move || job(one)));
        let broke = || Err(Failure::from("a thread of the simulation broke off"));
        threads.map(|thread| thread.join().unwrap_or_else(|_| broke())).into_iter().collect()
    })
}

/// A recorded trace with a fleet whose peak is near [`PEAK_REPLICAS`].
fn recorded(arguments: &Arguments, folder: &Path, name: &str, days: f64) -> Result<(Scenario, Trace), Failure> {
    let options =
        TraceOptions { to_s: (days < 7.0).then_some(days * DAY_S), seed: arguments.seed, ..TraceOptions::default() };
    let pairs = folder.join(format!("azure_llm_2023_{name}.csv"));
    let trace = Trace::hybrid(&pairs, &folder.join(format!("azure_llm_2024_{name}_10s.csv")), &options)?;
    let mix = trace.mix(MIX)?;
    let counted = Demand::of(&trace, &Work { per_input_token: 0.0, per_output_token: 0.0 })?;
    let busiest_per_s = f64::from(counted.request_minutes().into_iter().max().unwrap_or(0)) / 60.0;
    let fitting = GPUS.into_iter().filter_map(|gpu| {
        let found = capacity(&spec(gpu), &mix, &Objective::default(), arguments.seed)?;
        Some((gpu, found, busiest_per_s / found.requests_per_s))
    });
    let distance = |replicas: f64| (replicas / PEAK_REPLICAS).ln().abs();
    let nearest = fitting.min_by(|a, b| distance(a.2).total_cmp(&distance(b.2)));
    let (gpu, found, replicas) = nearest.ok_or("no GPU serves this trace")?;
    let plan = Plan::new(arguments.policy.clone(), bounds(&found, format!("{:.0}", replicas.ceil()).parse()?));
    Ok((Scenario::new(plan, spec(gpu), found.work), trace))
}

/// Plays a trace twice over: once to know its demand, once to play it. Both are in the time.
fn measure(scenario: &Scenario, trace: &Trace) -> Result<Value, Failure> {
    let begin = now();
    let demand = Demand::of(trace, &scenario.work)?;
    let read_s = begin.elapsed().as_secs_f64();
    let outcome = run(scenario, trace, &demand, &mut |_| {})?;
    let seconds = begin.elapsed().as_secs_f64();
    let simulated_s = outcome.hours * 3600.0;
    let ready: f64 = outcome.minutes.iter().map(|minute| f64::from(minute.ready)).sum();
    let mean_ready = ready / outcome.minutes.len().max(1) as f64;
    let latency = outcome.latency.as_ref();
    Ok(json!({
        "trace": outcome.trace, "policy": outcome.policy, "gpu": scenario.engine.constants.replica.gpu.name,
        "requests": outcome.requests, "done": outcome.done, "failed": outcome.failed, "unfinished": outcome.unfinished,
        "simulated_s": simulated_s, "seconds": seconds, "read_s": read_s, "times_real_time": simulated_s / seconds,
        "requests_per_s": outcome.requests as f64 / seconds, "replicas_static_peak": outcome.static_peak.replicas,
        "replicas_mean": mean_ready, "saved": outcome.saved, "overload_share": outcome.overload.share,
        "attained": latency.map(|latency| latency.attained), "ttft_p95_s": latency.map(|latency| latency.ttft.p95_s),
        "preemptions": outcome.preemptions,
    }))
}

fn spec(gpu: GpuSheet) -> Spec {
    Spec::new(Constants::unfitted(Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), gpu, 1)))
}

fn bounds(found: &Capacity, static_replicas: u32) -> Bounds {
    Bounds {
        floor: 1,
        ceiling: static_replicas.saturating_mul(2).max(1),
        committed: 0,
        static_replicas,
        cold_start_s: 300.0,
        batch_at_capacity: found.batch,
        requests_per_s_at_capacity: found.requests_per_s,
        input_tokens_per_s_at_capacity: found.input_tokens_per_s,
        output_tokens_per_s_at_capacity: found.output_tokens_per_s,
    }
}

fn tables(found: &Value) -> String {
    let one = &found["one"];
    let mut rows = vec![row(&one["trace"], &one["peak_bytes"])];
    let week = &found["week"];
    rows.extend(week["traces"].as_array().into_iter().flatten().map(|trace| row(trace, &week["peak_bytes"])));
    let headers =
        ["trace", "GPU", "replicas, peak", "mean", "requests", "s", "requests/s", "x real time", "peak memory MB"];
    let mut text = format!("{}, {} build\n\n", word(&found["machine"]), word(&found["profile"]));
    text += &table(&headers, &rows);
    if let Some(requests) = week["requests"].as_u64() {
        text += &format!(
            "\n{requests} requests in {:.1} s on two threads, {:.0} requests/s\n",
            week["seconds"].as_f64().unwrap_or(f64::NAN),
            week["requests_per_s"].as_f64().unwrap_or(f64::NAN)
        );
    }
    text
}

fn row(one: &Value, peak_bytes: &Value) -> Vec<String> {
    let number =
        |value: &Value, places: usize| value.as_f64().map_or("-".to_owned(), |value| format!("{value:.places$}"));
    vec![
        word(&one["trace"]).to_owned(),
        word(&one["gpu"]).to_owned(),
        number(&one["replicas_static_peak"], 0),
        number(&one["replicas_mean"], 1),
        number(&one["requests"], 0),
        number(&one["seconds"], 2),
        number(&one["requests_per_s"], 0),
        number(&one["times_real_time"], 0),
        peak_bytes.as_f64().map_or("-".to_owned(), |bytes| format!("{:.0}", bytes / 1e6)),
    ]
}

fn word(value: &Value) -> &str {
    value.as_str().unwrap_or("-")
}

fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("\t: unknown processor");
    format!("{cores} cores, {}, {}", model.trim_start_matches(['\t', ' ', ':']), std::env::consts::OS)
}
