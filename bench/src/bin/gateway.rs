//! Measures what Farthing costs a request: added latency, throughput, processor time and memory, beside a plain reverse proxy built from
//! the same libraries and, when `bench/peers` has installed them, beside other gateways. All parts run on loopback, in one run, in turns.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program that prints a table and its progress")]

use std::collections::BTreeMap;
use std::error::Error;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use bench::driver::{Farthing, Settings};
use bench::load::{self, Outcome, Pace, Target};
use bench::process::{Process, run_role};
use bench::text::{median, number, table};
use bench::{peers, wire};
use clap::Parser;
use serde_json::{Value, json};

const CONNECTIONS: [usize; 4] = [1, 16, 64, 256];
/// At half of saturation, this many connections share the arrivals.
const CONNECTIONS_HALF: usize = 64;
const STREAMS_FOR_MEMORY: usize = 256;
const START_PATIENCE: Duration = Duration::from_secs(60);

const DIRECT: usize = 0;
const PLAIN: usize = 1;

/// Compares gateways on loopback and prints Markdown tables.
#[derive(Debug, Parser)]
struct Args {
    /// The binary under test [default: `farthing` beside this program].
    #[arg(long, env = "FARTHING_BIN")]
    farthing: Option<PathBuf>,
    /// Rounds; every round measures every target once, and medians are reported.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=100))]
    rounds: u64,
    /// Seconds of each single measurement.
    #[arg(long, default_value_t = 1.5)]
    seconds: f64,
    /// About 20 seconds in all, without the other gateways: one short round, for a first impression.
    #[arg(long)]
    quick: bool,
    /// Leave out the other gateways even when they are installed.
    #[arg(long)]
    no_peers: bool,
    /// One JSON document instead of tables.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    if let Some(done) = run_role() {
        return done;
    }
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench/gateway: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<bool, Box<dyn Error>> {
    load::sharpen_timers();
    let folder = tempfile::tempdir()?;
    let mut lab = Lab::start(args, &folder)?;
    let plan = Plan::new(args);
    let mut results = Results::default();
    saturate(&lab, &plan, &mut results);
    half(&lab, &plan, &mut results);
    memory(&lab, &plan, &mut results);
    let metered = lab.check_metering()?;
    let errors = results.errors(&lab);
    lab.note_errors(&errors);
    let whole =
        metered.iter().all(|line| line.wanted == line.found) && errors.iter().all(|(name, _)| lab.is_peer(name));
    if args.json {
        println!("{}", serde_json::to_string_pretty(&results.json(&lab, &metered))?);
    } else {
        print!("{}", results.markdown(&lab, &metered, &plan));
    }
    Ok(whole)
}

/// How long and how often.
struct Plan {
    rounds: u64,
    duration: Duration,
}

impl Plan {
    fn new(args: &Args) -> Plan {
        if args.quick {
            return Plan { rounds: 1, duration: Duration::from_millis(250) };
        }
        Plan { rounds: args.rounds, duration: Duration::from_secs_f64(args.seconds.clamp(0.1, 60.0)) }
    }
}

/// Something to send requests to.
struct Subject {
    name: String,
    address: SocketAddr,
    headers: String,
    process: Option<Process>,
    farthing: Option<Farthing>,
    /// Somebody else's gateway, whose errors are not ours.
    peer: bool,
    /// Requests that it answered whole, warm-ups and readiness probes included.
    answered: std::cell::Cell<u64>,
}

impl Subject {
    fn new(name: &str, address: SocketAddr, process: Option<Process>) -> Subject {
        Subject {
            name: name.to_owned(),
            address,
            headers: "authorization: Bearer sk-mock\r\n".to_owned(),
            process,
            farthing: None,
            peer: false,
            answered: std::cell::Cell::new(0),
        }
    }

    fn target(&self, kind: Kind) -> Target {
        let request = wire::post("/v1/chat/completions", self.address, &self.headers, &kind.body());
        Target { address: self.address, request: request.into(), body_bytes_min: kind.body_bytes_min() }
    }

    fn load(&self, kind: Kind, connections: usize, duration: Duration, pace: Pace) -> (Outcome, Option<f64>) {
        let before = self.process.as_ref().map(Process::processor_time);
        let outcome = load::run(&self.target(kind), connections, duration, pace);
        let used =
            self.process.as_ref().zip(before).map(|(process, before)| process.processor_time().saturating_sub(before));
        self.answered.set(self.answered.get() + outcome.answered);
        let each_us =
            used.filter(|_| outcome.answered > 0).map(|used| used.as_secs_f64() * 1e6 / outcome.answered as f64);
        (outcome, each_us)
    }
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Json,
    Stream,
    /// A stream with pauses between its tokens, so that many are open at once.
    SlowStream,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Json => "json",
            Kind::Stream => "stream",
            Kind::SlowStream => "slow_stream",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Kind::Json => "JSON answer of 0.7 kB",
            Kind::Stream => "stream of 64 tokens, each written on its own",
            Kind::SlowStream => "stream of 64 tokens, 25 ms apart",
        }
    }

    fn body(self) -> String {
        let stream = if self == Kind::Json { "" } else { r#""stream":true,"stream_options":{"include_usage":true},"# };
        let pace = if self == Kind::SlowStream { r#""user":"pace:0:25000","# } else { "" };
        format!(
            r#"{{"model":"gpt-4o",{stream}{pace}"max_tokens":64,"seed":42,"messages":[{{"role":"system","content":"You keep accounts, tersely."}},{{"role":"user","content":"Who used the shared pool between ten and eleven, and what did it cost?"}}]}}"#
        )
    }

    fn body_bytes_min(self) -> usize {
        if self == Kind::Json { 300 } else { 64 * 100 }
    }
}

/// Everything that runs.
struct Lab {
    subjects: Vec<Subject>,
    notes: Vec<String>,
    _mock: Process,
}

impl Lab {
    fn start(args: &Args, folder: &tempfile::TempDir) -> Result<Lab, Box<dyn Error>> {
        let (mock, upstream) = Process::start_role("mock", None)?;
        let (plain, plain_address) = Process::start_role("plain", Some(upstream))?;
        let mut subjects =
            vec![Subject::new("direct", upstream, None), Subject::new("plain hyper proxy", plain_address, Some(plain))];
        let mut notes = Vec::new();
        let binary = match &args.farthing {
            Some(path) => path.clone(),
            None => std::env::current_exe()?.with_file_name("farthing"),
        };
        for durability in ["process", "power"] {
            subjects.push(start_farthing(&binary, folder, durability, upstream)?);
        }
        if !args.quick && !args.no_peers {
            for peer in peers::start_all(folder.path(), upstream, &Kind::Json.body()) {
                match peer {
                    Ok(peer) => {
                        let mut subject = Subject::new(&peer.name, peer.address, Some(peer.process));
                        subject.headers = peer.headers;
                        subject.peer = true;
                        subjects.push(subject);
                    }
                    Err(why) => notes.push(why),
                }
            }
        }
        Ok(Lab { subjects, notes, _mock: mock })
    }

    fn is_peer(&self, name: &str) -> bool {
        self.subjects.iter().any(|subject| subject.peer && subject.name == name)
    }

    fn note_errors(&mut self, errors: &[(String, u64)]) {
        self.notes.extend(
            errors.iter().map(|(name, count)| {
                format!("{count} requests to {name} that were not answered whole with status 200")
            }),
        );
    }

    /// Stops both instances of Farthing and counts what their ledgers hold: a fast gateway that forgets has measured nothing.
    fn check_metering(&mut self) -> Result<Vec<Metered>, Box<dyn Error>> {
        let mut lines = Vec::new();
        for subject in &mut self.subjects {
            let (Some(farthing), Some(process)) = (&subject.farthing, &mut subject.process) else { continue };
            process.stop(START_PATIENCE)?;
            let found = farthing.count("SELECT count(*) AS n FROM attempts WHERE outcome = 'completed' AND input_tokens = 42 AND output_tokens = 64")?;
            lines.push(Metered { name: subject.name.clone(), wanted: subject.answered.get(), found });
        }
        Ok(lines)
    }
}

struct Metered {
    name: String,
    wanted: u64,
    found: u64,
}

fn start_farthing(
    binary: &std::path::Path,
    folder: &tempfile::TempDir,
    durability: &'static str,
    upstream: SocketAddr,
) -> Result<Subject, Box<dyn Error>> {
    let files = folder.path().join(durability);
    let settings = Settings { durability, when_log_fails: "fail_open", flush_every_ms: 2_000, upstream };
    let farthing = Farthing::prepare(binary, &files, &files.join("data"), &settings)?;
    let process = farthing.start()?;
    let mut subject = Subject::new(&format!("Farthing, {durability}"), farthing.address(), Some(process));
    subject.headers = farthing.headers();
    farthing.wait_until_served(&subject.target(Kind::Json).request, START_PATIENCE)?;
    subject.answered.set(1);
    subject.farthing = Some(farthing);
    Ok(subject)
}

fn saturate(lab: &Lab, plan: &Plan, results: &mut Results) {
    for round in 0..plan.rounds {
        for kind in [Kind::Json, Kind::Stream] {
            for connections in CONNECTIONS {
                eprintln!("round {}/{}: {}, {connections} connections", round + 1, plan.rounds, kind.name());
                for (index, subject) in lab.subjects.iter().enumerate() {
                    let (outcome, cpu_us) = subject.load(kind, connections, plan.duration, Pace::Saturate);
                    results.saturated.entry((kind, connections, index)).or_default().add(&outcome, cpu_us);
                }
            }
        }
    }
}

fn half(lab: &Lab, plan: &Plan, results: &mut Results) {
    for round in 0..plan.rounds {
        for kind in [Kind::Json, Kind::Stream] {
            eprintln!("round {}/{}: {}, half of saturation", round + 1, plan.rounds, kind.name());
            for (index, subject) in lab.subjects.iter().enumerate().skip(PLAIN) {
                let rate = results.saturation(kind, index) / 2.0;
                // The same rate against the upstream itself, right before, so that both see the same machine.
                for (of, who) in [(&mut results.half_direct, &lab.subjects[DIRECT]), (&mut results.half, subject)] {
                    let (outcome, cpu_us) =
                        who.load(kind, CONNECTIONS_HALF, plan.duration, Pace::PerSecond(rate.max(1.0)));
                    of.entry((kind, index)).or_default().add(&outcome, cpu_us);
                }
            }
        }
    }
}

fn memory(lab: &Lab, plan: &Plan, results: &mut Results) {
    let duration = plan.duration.min(Duration::from_secs(2));
    for (index, subject) in lab.subjects.iter().enumerate() {
        let Some(process) = &subject.process else { continue };
        eprintln!("{STREAMS_FOR_MEMORY} open streams: {}", subject.name);
        let target = subject.target(Kind::SlowStream);
        let (outcome, most) = std::thread::scope(|scope| {
            let load = scope.spawn(|| load::run(&target, STREAMS_FOR_MEMORY, duration, Pace::Saturate));
            let mut most = 0;
            while !load.is_finished() {
                most = most.max(process.resident_bytes());
                std::thread::sleep(Duration::from_millis(100));
            }
            (load.join().expect("the load does not panic"), most)
        });
        subject.answered.set(subject.answered.get() + outcome.answered);
        results.memory.insert(index, most);
    }
}

/// The measurements of one cell of a table, one value a round.
#[derive(Default)]
struct Cell {
    rate: Vec<f64>,
    p50: Vec<f64>,
    p99: Vec<f64>,
    first50: Vec<f64>,
    first99: Vec<f64>,
    late50: Vec<f64>,
    cpu_us: Vec<f64>,
    errors: u64,
}

impl Cell {
    fn add(&mut self, outcome: &Outcome, cpu_us: Option<f64>) {
        self.rate.push(outcome.rate());
        self.p50.extend(outcome.total.quantile_ms(0.5));
        self.p99.extend(outcome.total.quantile_ms(0.99));
        self.first50.extend(outcome.first_byte.quantile_ms(0.5));
        self.first99.extend(outcome.first_byte.quantile_ms(0.99));
        self.late50.extend(outcome.lateness.quantile_ms(0.5));
        self.cpu_us.extend(cpu_us);
        self.errors += outcome.errors;
    }

    fn json(&self) -> Value {
        json!({
            "requests_per_s": median(&self.rate), "p50_ms": median(&self.p50), "p99_ms": median(&self.p99),
            "first_byte_p50_ms": median(&self.first50), "first_byte_p99_ms": median(&self.first99),
            "processor_us_per_request": median(&self.cpu_us), "generator_late_p50_ms": median(&self.late50), "errors": self.errors,
        })
    }
}

fn minus(a: &[f64], b: &[f64]) -> Option<f64> {
    // Round by round, because the rounds were run side by side.
    let differences: Vec<f64> = a.iter().zip(b).map(|(a, b)| a - b).collect();
    median(&differences)
}

#[derive(Default)]
struct Results {
    saturated: BTreeMap<(Kind, usize, usize), Cell>,
    half: BTreeMap<(Kind, usize), Cell>,
    half_direct: BTreeMap<(Kind, usize), Cell>,
    memory: BTreeMap<usize, u64>,
}

impl Results {
    /// The highest median rate over all numbers of connections, requests a second.
    fn saturation(&self, kind: Kind, index: usize) -> f64 {
        let rates = CONNECTIONS
            .iter()
            .filter_map(|&connections| median(&self.saturated.get(&(kind, connections, index))?.rate));
        rates.fold(0.0, f64::max)
    }

    /// Requests that were not answered, by target, where there were any.
    fn errors(&self, lab: &Lab) -> Vec<(String, u64)> {
        let of = |index: usize| -> u64 {
            let saturated = self.saturated.iter().filter(|&(&(_, _, at), _)| at == index).map(|(_, cell)| cell.errors);
            let half = self.half.iter().filter(|&(&(_, at), _)| at == index).map(|(_, cell)| cell.errors);
            saturated.chain(half).sum()
        };
        let counts = lab.subjects.iter().enumerate().map(|(index, subject)| (subject.name.clone(), of(index)));
        counts.filter(|&(_, errors)| errors > 0).collect()
    }

    fn markdown(&self, lab: &Lab, metered: &[Metered], plan: &Plan) -> String {
        let mut text = format!("{}\n\n", setting(plan));
        for kind in [Kind::Json, Kind::Stream] {
            text.push_str(&format!(
                "### {}\n\nAs fast as it answers; latencies in milliseconds, `+` over the upstream itself.\n\n",
                kind.title()
            ));
            text.push_str(&self.saturated_table(kind, lab));
            text.push_str(&format!(
                "\nAt half of its own saturation, arrivals at a fixed rate over {CONNECTIONS_HALF} connections, latency from the moment a request was due.\n\n"
            ));
            text.push_str(&self.half_table(kind, lab));
            text.push('\n');
        }
        text.push_str(&self.memory_table(lab));
        for Metered { name, wanted, found } in metered {
            let verdict =
                if wanted == found { "every one is in the ledger with its tokens" } else { "LOST OR DOUBLED ROWS" };
            text.push_str(&format!("\n{name}: {wanted} whole answers seen by clients, {found} completed attempts in the ledger: {verdict}.\n"));
        }
        for note in &lab.notes {
            text.push_str(&format!("\nNot measured: {note}.\n"));
        }
        text
    }

    fn saturated_table(&self, kind: Kind, lab: &Lab) -> String {
        let mut rows = Vec::new();
        for connections in CONNECTIONS {
            for (index, subject) in lab.subjects.iter().enumerate() {
                let at = |index| self.saturated.get(&(kind, connections, index));
                let (Some(cell), Some(direct), Some(plain)) = (at(index), at(DIRECT), at(PLAIN)) else { continue };
                let share = median(&cell.rate).zip(median(&plain.rate)).map(|(mine, plain)| 100.0 * mine / plain);
                let added = |mine: &[f64], direct: &[f64]| if index == DIRECT { None } else { minus(mine, direct) };
                rows.push(vec![
                    subject.name.clone(),
                    connections.to_string(),
                    number(median(&cell.rate)),
                    number(share),
                    number(median(&cell.p50)),
                    number(median(&cell.p99)),
                    number(added(&cell.p50, &direct.p50)),
                    number(added(&cell.p99, &direct.p99)),
                    number(median(&cell.first50)),
                    number(median(&cell.cpu_us)),
                ]);
            }
        }
        table(
            &[
                "target",
                "conn.",
                "requests/s",
                "% of plain",
                "p50",
                "p99",
                "+p50",
                "+p99",
                "first byte p50",
                "cpu us/request",
            ],
            &rows,
        )
    }

    fn half_table(&self, kind: Kind, lab: &Lab) -> String {
        let mut rows = Vec::new();
        for (index, subject) in lab.subjects.iter().enumerate().skip(PLAIN) {
            let (Some(cell), Some(direct)) = (self.half.get(&(kind, index)), self.half_direct.get(&(kind, index)))
            else {
                continue;
            };
            rows.push(vec![
                subject.name.clone(),
                number(Some(self.saturation(kind, index) / 2.0)),
                number(median(&cell.rate)),
                number(median(&cell.p50)),
                number(median(&cell.p99)),
                number(minus(&cell.p50, &direct.p50)),
                number(minus(&cell.p99, &direct.p99)),
                number(minus(&cell.first50, &direct.first50)),
                number(minus(&cell.first99, &direct.first99)),
                number(median(&cell.late50)),
            ]);
        }
        let headers = [
            "target",
            "asked/s",
            "answered/s",
            "p50",
            "p99",
            "+p50",
            "+p99",
            "+first byte p50",
            "+first byte p99",
            "generator late p50",
        ];
        table(&headers, &rows)
    }

    fn memory_table(&self, lab: &Lab) -> String {
        let rows: Vec<Vec<String>> = self
            .memory
            .iter()
            .map(|(&index, &bytes)| vec![lab.subjects[index].name.clone(), number(Some(bytes as f64 / 1e6))])
            .collect();
        format!("### Memory with {STREAMS_FOR_MEMORY} open streams\n\n{}", table(&["process", "resident MB"], &rows))
    }

    fn json(&self, lab: &Lab, metered: &[Metered]) -> Value {
        let name = |index: usize| lab.subjects[index].name.as_str();
        let cell = |kind: Kind, index: usize, cell: &Cell, more: Value| json!({ "kind": kind.name(), "target": name(index), "measured": cell.json(), "at": more });
        json!({
            "saturated": self.saturated.iter().map(|(&(kind, connections, index), found)| cell(kind, index, found, json!({ "connections": connections }))).collect::<Vec<_>>(),
            "half": self.half.iter().map(|(&(kind, index), found)| cell(kind, index, found, json!({ "direct": self.half_direct.get(&(kind, index)).map(Cell::json) }))).collect::<Vec<_>>(),
            "resident_bytes_at_256_streams": self.memory.iter().map(|(&index, &bytes)| (name(index).to_owned(), json!(bytes))).collect::<serde_json::Map<_, _>>(),
            "metered": metered.iter().map(|line| json!({ "target": line.name, "answered": line.wanted, "in_ledger": line.found })).collect::<Vec<_>>(),
            "not_measured": lab.notes, "optimised": !cfg!(debug_assertions),
        })
    }
}

fn setting(plan: &Plan) -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let build = if cfg!(debug_assertions) { "development build (not optimised for speed)" } else { "release build" };
    let Plan { rounds, duration } = plan;
    format!(
        "{build}, {cores} cores shared by load generator, proxies and mock upstream, {rounds} rounds of {:.2} s each, taken in turns, medians; kernel {}.",
        duration.as_secs_f64(),
        std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_taken_round_by_round() {
        assert_eq!(minus(&[2.0, 12.0, 3.0], &[1.0, 10.0, 2.5]), Some(1.0));
    }

    #[test]
    fn a_slow_stream_is_a_stream() {
        let body: Value = serde_json::from_str(&Kind::SlowStream.body()).unwrap();
        assert_eq!((body["stream"].as_bool(), body["user"].as_str()), (Some(true), Some("pace:0:25000")));
    }
}
