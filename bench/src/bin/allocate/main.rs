//! How fast shared GPUs are carried down to requests, and what that takes: the sweep over timelines at three sizes, a month's
//! settlement to the picodollar, and the same shares as SQL in DuckDB and in Polars over the same files.
//!
//! ```text
//! bench/allocate/setup.sh                               # once: DuckDB and Polars in an environment of their own
//! cargo run --release -p bench --bin allocate           # everything; --quick for a first impression, --json for machines
//! ```
//!
//! Every measurement is a process of its own, so that each has its own peak of memory.

mod files;
mod report;
mod settle;
mod shares;
mod sweep;

use std::error::Error;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use bench::process::output;
use clap::{Parser, Subcommand};
use ledger::allocate::replica::Replica;
use ledger::allocate::timeline::Limits;
use ledger::step::{GpuSheet, ModelShape};
use serde_json::{Value, json};

type Failure = Box<dyn Error + Send + Sync>;

/// Pools that the engines are divided into, each on a thread and in a file of its own.
const POOLS: u32 = 2;

#[derive(Debug, Parser)]
#[command(about = "Measures the allocation of shared GPUs to requests")]
struct Arguments {
    /// Requests of the month; the sweep also runs over a tenth and a hundredth of them.
    #[arg(long, default_value_t = 100_000_000)]
    requests: u64,
    /// Requests that DuckDB and Polars are asked to divide, one run for each.
    #[arg(long, value_delimiter = ',', default_values_t = [1_000_000, 5_000_000])]
    beside: Vec<u64>,
    /// A hundredth of everything.
    #[arg(long)]
    quick: bool,
    /// One JSON document instead of tables.
    #[arg(long)]
    json: bool,
    /// Where the files of the run go; they are removed afterwards. A temporary folder by default.
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Seed of the requests.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Leave out DuckDB and Polars.
    #[arg(long)]
    alone: bool,
    #[command(subcommand)]
    role: Option<Role>,
}

/// One measurement; the program starts itself with these.
#[derive(Debug, Subcommand)]
enum Role {
    /// The sweep on one core.
    Sweep { requests: u64 },
    /// A month's settlement on two cores, without files.
    Settle { requests: u64 },
    /// Writes the requests as Parquet.
    Write { requests: u64, dir: PathBuf },
    /// A month's settlement on two cores, from files to files.
    SettleFiles { dir: PathBuf },
    /// The shares of all requests on two cores, from files to files.
    Shares { dir: PathBuf },
}

fn main() -> Result<(), Failure> {
    let arguments = Arguments::parse();
    let seed = arguments.seed;
    let found = match &arguments.role {
        None => everything(&arguments)?,
        Some(Role::Sweep { requests }) => sweep::run(seed, *requests)?,
        Some(Role::Settle { requests }) => settle::in_memory(seed, *requests)?,
        Some(Role::Write { requests, dir }) => files::write(seed, *requests, dir)?,
        Some(Role::SettleFiles { dir }) => settle::with_files(dir)?,
        Some(Role::Shares { dir }) => shares::run(dir)?,
    };
    let text = if arguments.role.is_some() || arguments.json { format!("{found}\n") } else { report::tables(&found) };
    std::io::stdout().lock().write_all(text.as_bytes())?;
    // Answers that differ are no comparison of speed.
    let differ = found["beside"].as_array().into_iter().flatten().find_map(|one| one["differences"]["error"].as_str());
    differ.map_or(Ok(()), |differ| Err(differ.into()))
}

fn everything(arguments: &Arguments) -> Result<Value, Failure> {
    let part = if arguments.quick { 100 } else { 1 };
    let (requests, seed) = (arguments.requests / part, arguments.seed.to_string());
    let temporary = tempfile::tempdir()?;
    let dir = arguments.dir.clone().unwrap_or_else(|| temporary.path().to_owned());
    let role = |words: &[&str]| -> Result<Value, Failure> {
        progress(words);
        let words: Vec<&str> = ["--seed", &seed].iter().chain(words).copied().collect();
        Ok(serde_json::from_str(&output(&std::env::current_exe()?, &words)?)?)
    };

    let sizes = [requests / 100, requests / 10, requests].map(|size| size.to_string());
    let sweeps: Vec<Value> = sizes.iter().map(|size| role(&["sweep", size])).collect::<Result<_, _>>()?;
    let settled = role(&["settle", &sizes[2]])?;
    let month = Scratch::create(&dir.join("month"))?;
    let written = role(&["write", &sizes[2], month.path()])?;
    let settled_files = role(&["settle-files", month.path()])?;
    drop(month);

    let mut beside = Vec::new();
    for size in arguments.beside.iter().map(|size| (size / part).to_string()) {
        if arguments.alone {
            break;
        }
        let scratch = Scratch::create(&dir.join("beside"))?;
        let written = role(&["write", &size, scratch.path()])?;
        let ours = role(&["shares", scratch.path()])?;
        let [duckdb, polars] = ["duckdb", "polars"].map(|engine| python(&[engine, scratch.path()]));
        let differences = python(&["compare", scratch.path()]);
        // A peer that runs out of memory is a result too.
        let or_error =
            |found: Result<Value, Failure>| found.unwrap_or_else(|error| json!({"error": error.to_string()}));
        beside.push(json!({
            "requests": written["requests"], "bytes": written["bytes"], "farthing": ours,
            "duckdb": or_error(duckdb), "polars": or_error(polars), "differences": or_error(differences),
        }));
    }
    Ok(json!({
        "machine": machine(), "profile": if cfg!(debug_assertions) { "dev" } else { "release" },
        "sweep": sweeps, "settle": settled, "write": written, "settle_files": settled_files, "beside": beside,
    }))
}

/// Runs `shares.py`; its last line is JSON.
fn python(words: &[&str]) -> Result<Value, Failure> {
    progress(words);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("allocate/shares.py");
    let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    let home = std::env::var_os("BENCH_ALLOCATE_HOME").map_or(home.join(".cache/farthing-allocate"), PathBuf::from);
    let constants = shares::constants().to_string();
    let run = Command::new(home.join("venv/bin/python"))
        .arg(script)
        .args(words)
        .args(["--constants", &constants])
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("DuckDB and Polars are not there ({error}); run bench/allocate/setup.sh"))?;
    if !run.status.success() {
        let complaint = String::from_utf8_lossy(&run.stderr);
        return Err(format!("{}: {}", run.status, complaint.trim().lines().last().unwrap_or("no word of why")).into());
    }
    Ok(serde_json::from_slice(&run.stdout)?)
}

fn progress(words: &[&str]) {
    // Losing a line of progress is no failure.
    let _ = writeln!(std::io::stderr().lock(), "allocate: {}", words.join(" "));
}

/// A folder that goes with its scope.
struct Scratch(PathBuf);

impl Scratch {
    fn create(path: &Path) -> Result<Scratch, Failure> {
        std::fs::create_dir_all(path)?;
        Ok(Scratch(path.to_owned()))
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed is left to whoever owns the folder.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The engine of every measurement.
fn replica() -> Replica {
    Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 1)
}

fn limits() -> Limits {
    Limits::default()
}

fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or("\t: unknown processor");
    format!("{cores} cores, {}, {}", model.trim_start_matches(['\t', ' ', ':']), std::env::consts::OS)
}
