//! Kills Farthing with SIGKILL again and again under load, and then holds its ledger against what the clients saw. After that it takes the
//! disk away. Exits with a failure on any request that was answered and lost, booked twice, or booked with other tokens.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program that prints a table and its progress")]

use std::error::Error;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use bench::audit::{Client, Findings, Notebook, audit};
use bench::clock::now;
use bench::disk::SmallDisk;
use bench::driver::{Farthing, Settings, tail, whole};
use bench::histogram::Histogram;
use bench::mock::COUNT_PATH;
use bench::process::{Process, run_role};
use bench::text::{number, table};
use bench::wire::{Connection, Keep, get};
use clap::Parser;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Enough connections for 200 requests a second of which each takes up to 80 ms, and some to spare.
const CLIENTS: u32 = 32;
const RESTART_MAX: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(30);

/// Kills Farthing at random moments under load and checks that nothing acknowledged is lost.
#[derive(Debug, Parser)]
struct Args {
    /// The binary under test [default: `farthing` beside this program].
    #[arg(long, env = "FARTHING_BIN")]
    farthing: Option<PathBuf>,
    /// How often to kill it.
    #[arg(long, default_value_t = 200)]
    rounds: u32,
    /// Requests a second.
    #[arg(long, default_value_t = 200)]
    rate: u32,
    /// Seed of the moments at which it is killed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// `process` or `power`.
    #[arg(long, default_value = "process", value_parser = ["process", "power"])]
    durability: String,
    /// Keep the ledger and the logs in this folder, which must not exist yet [default: a temporary folder, kept after a failure].
    #[arg(long)]
    keep: Option<PathBuf>,
    /// Leave out the full and the read-only disk.
    #[arg(long)]
    no_disk: bool,
    /// Size of the disk that is filled up.
    #[arg(long, default_value_t = 64)]
    disk_mib: u32,
}

fn main() -> ExitCode {
    if let Some(done) = run_role() {
        return done;
    }
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench/crash: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<bool, Box<dyn Error>> {
    let binary = match &args.farthing {
        Some(path) => path.clone(),
        None => std::env::current_exe()?.with_file_name("farthing"),
    };
    let folder = match &args.keep {
        Some(folder) => folder.clone(),
        None => tempfile::tempdir()?.keep(),
    };
    let mut report = Report::default();
    if args.rounds > 0 {
        kill_under_load(args, &binary, &folder.join("crash"), &mut report)?;
    }
    if !args.no_disk {
        for policy in ["fail_open", "fail_closed"] {
            take_the_disk(args, &binary, &folder.join(policy), policy, &mut report)?;
        }
    }
    print!("{}", report.markdown());
    let good = report.failures() == 0;
    match (&args.keep, good) {
        (None, true) => std::fs::remove_dir_all(&folder)?,
        _ => println!("\nThe ledger and the logs are in {}.", folder.display()),
    }
    Ok(good)
}

/// One line of the report: what was checked, what came out, and whether that is right.
struct Line {
    what: String,
    found: String,
    good: bool,
}

#[derive(Default)]
struct Report {
    lines: Vec<Line>,
    details: Vec<String>,
}

impl Report {
    fn check(&mut self, what: impl Into<String>, found: impl ToString, good: bool) {
        self.lines.push(Line { what: what.into(), found: found.to_string(), good });
    }

    fn none(&mut self, what: impl Into<String>, count: u64) {
        self.check(what, count, count == 0);
    }

    fn state(&mut self, what: impl Into<String>, found: impl ToString) {
        self.check(what, found, true);
    }

    fn findings(&mut self, scenario: &str, findings: &Findings) {
        self.none(format!("{scenario}: answered to the end, not in the ledger"), findings.missing);
        self.none(format!("{scenario}: answered to the end, other tokens or outcome in the ledger"), findings.wrong);
        self.none(format!("{scenario}: ids with more than one row"), findings.doubled);
        self.check(format!("{scenario}: books balance"), findings.balanced, findings.balanced);
        self.details.extend(findings.examples.iter().map(|example| format!("{scenario}: {example}")));
    }

    fn failures(&self) -> usize {
        self.lines.iter().filter(|line| !line.good).count()
    }

    fn markdown(&self) -> String {
        let cells = |line: &Line| {
            vec![line.what.clone(), line.found.clone(), if line.good { "ok" } else { "FAILED" }.to_owned()]
        };
        let rows: Vec<Vec<String>> = self.lines.iter().map(cells).collect();
        let details: String = self.details.iter().map(|detail| format!("- {detail}\n")).collect();
        let failed = self.failures();
        format!(
            "{}\n{details}{} passed, {failed} failed\n",
            table(&["what", "found", "verdict"], &rows),
            self.lines.len() - failed
        )
    }
}

fn kill_under_load(args: &Args, binary: &Path, folder: &Path, report: &mut Report) -> Result<(), Box<dyn Error>> {
    let (_mock, upstream) = Process::start_role("mock", None)?;
    let durability = if args.durability == "power" { "power" } else { "process" };
    // The log moves into the tables ten times a second, so that many kills hit the move itself.
    let settings = Settings { durability, when_log_fails: "fail_closed", flush_every_ms: 100, upstream };
    let farthing = Farthing::prepare(binary, folder, &folder.join("data"), &settings)?;
    let (notebook, next, stop) = (Notebook::default(), AtomicU64::new(0), AtomicBool::new(false));
    let mut restarts = Restarts::default();
    let last = thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (farthing, notebook, next, stop) = (&farthing, &notebook, &next, &stop);
            scope.spawn(move || keep_asking(farthing, notebook, next, stop, args.rate, client));
        }
        let end = kill_rounds(args, &farthing, &notebook, &mut restarts);
        stop.store(true, Ordering::Relaxed);
        end
    });
    let mut last = last?;
    let stopped = last.stop(PATIENCE)?;
    report.check("crash: a last start stops by itself when asked to", stopped, stopped);
    let findings = audit(&farthing, &notebook.seen())?;
    let asked = upstream_count(upstream)?;
    let seen = notebook.seen();
    report.state("crash: kills, of these during start-up", format!("{}, {}", args.rounds, restarts.impatient));
    report.state(
        "crash: requests sent, answers begun, answers that ended",
        format!("{}, {}, {}", notebook.sent(), seen.len(), findings.ended),
    );
    let outcomes: Vec<String> = findings.outcomes.iter().map(|(outcome, count)| format!("{outcome} {count}")).collect();
    report.state("crash: rows in the ledger by outcome", outcomes.join(", "));
    report.findings("crash", &findings);
    report.none("crash: answers begun, not in the ledger", findings.head_missing);
    report.none(
        "crash: requests that reached the upstream beyond the rows in the ledger",
        asked.saturating_sub(findings.rows),
    );
    report.none("crash: rows in the ledger beyond the requests sent", findings.rows.saturating_sub(notebook.sent()));
    complaints("crash", &notebook, report);
    let quantiles = [0.5, 0.99, 1.0].map(|at| number(restarts.times.quantile_ms(at)));
    report.state("crash: restart to first answer, p50 / p99 / longest (ms)", quantiles.join(" / "));
    report.none("crash: restarts that took longer than 2 s", restarts.slow);
    Ok(())
}

fn complaints(scenario: &str, notebook: &Notebook, report: &mut Report) {
    let complaints = notebook.complaints();
    report.none(format!("{scenario}: whole answers with missing or extra content"), complaints.len() as u64);
    report.details.extend(complaints.into_iter().take(3));
}

#[derive(Default)]
struct Restarts {
    times: Histogram,
    slow: u64,
    impatient: u32,
}

fn kill_rounds(
    args: &Args,
    farthing: &Farthing,
    notebook: &Notebook,
    restarts: &mut Restarts,
) -> Result<Process, String> {
    let mut random = StdRng::seed_from_u64(args.seed);
    let mut probe = Client::new(farthing, notebook);
    let began = now();
    for round in 0..args.rounds {
        let mut process = farthing.start().map_err(|error| format!("round {round}: {error}"))?;
        if round > 0 && random.random_range(0..12) == 0 {
            // A crash while it recovers from the last crash.
            thread::sleep(Duration::from_millis(random.random_range(0..60)));
            restarts.impatient += 1;
        } else {
            let took =
                first_answer(farthing, &mut process, &mut probe).map_err(|error| format!("round {round}: {error}"))?;
            restarts.times.record(took);
            restarts.slow += u64::from(took > RESTART_MAX && round > 0);
            thread::sleep(Duration::from_micros(random.random_range(20_000..350_000)));
        }
        process.kill().map_err(|error| format!("round {round}: {error}"))?;
        if round % 10 == 9 {
            let ended = notebook.seen().iter().filter(|seen| seen.ended).count();
            eprintln!(
                "killed {} times in {:.0} s, {ended} answers seen to their end",
                round + 1,
                began.elapsed().as_secs_f64()
            );
        }
    }
    let mut process = farthing.start().map_err(|error| error.to_string())?;
    let took = first_answer(farthing, &mut process, &mut probe)?;
    restarts.times.record(took);
    thread::sleep(Duration::from_millis(300));
    Ok(process)
}

/// How long it takes from the start of the process to a whole answer with status 200.
fn first_answer(farthing: &Farthing, process: &mut Process, probe: &mut Client<'_>) -> Result<Duration, String> {
    let start = now();
    while start.elapsed() < PATIENCE {
        if probe.ask(2) == Some(200) {
            return Ok(start.elapsed());
        }
        if !process.is_alive() {
            return Err(format!("farthing ended by itself; its log ends: {}", tail(farthing.log())));
        }
        thread::sleep(Duration::from_millis(2));
    }
    Err(format!("no answer within {PATIENCE:?}; its log ends: {}", tail(farthing.log())))
}

/// Sends what is due, and lets go of what cannot be sent: the server is down every now and then.
fn keep_asking(farthing: &Farthing, notebook: &Notebook, next: &AtomicU64, stop: &AtomicBool, rate: u32, client: u32) {
    // Clients start one after another, so that arrivals are spread evenly.
    let gap = Duration::from_secs(1) * CLIENTS / rate.max(1);
    thread::sleep(gap * client / CLIENTS);
    let mut client = Client::new(farthing, notebook);
    while !stop.load(Ordering::Relaxed) {
        let start = now();
        client.ask(next.fetch_add(1, Ordering::Relaxed));
        thread::sleep(gap.saturating_sub(start.elapsed()));
    }
}

fn upstream_count(upstream: SocketAddr) -> Result<u64, String> {
    let answer = Connection::new(upstream, PATIENCE)
        .call(&get(COUNT_PATH, upstream, ""), Keep::Body)
        .map_err(|broken| broken.error.to_string())?;
    String::from_utf8_lossy(&answer.body)
        .parse()
        .map_err(|_| "the mock does not say how many requests it got".to_owned())
}

/// Fills the ledger's disk while requests arrive, frees it, and at last makes it read-only.
fn take_the_disk(
    args: &Args,
    binary: &Path,
    folder: &Path,
    policy: &'static str,
    report: &mut Report,
) -> Result<(), Box<dyn Error>> {
    let disk = match SmallDisk::mount(&folder.join("disk"), args.disk_mib) {
        Ok(disk) => disk,
        Err(why) => {
            println!("SKIPPED {policy} on a full disk: no tmpfs can be mounted here ({why}); it needs root.");
            return Ok(());
        }
    };
    let (_mock, upstream) = Process::start_role("mock", None)?;
    let settings = Settings { durability: "process", when_log_fails: policy, flush_every_ms: 200, upstream };
    let farthing = Farthing::prepare(binary, folder, &disk.folder().join("data"), &settings)?;
    let notebook = Notebook::default();
    let mut client = Client::new(&farthing, &notebook);
    let mut process = farthing.start()?;
    first_answer(&farthing, &mut process, &mut client)?;

    let before = ask_many(&mut client, 0..40, None);
    report.check(format!("{policy}: served while there is space"), before.describe(), before.served == 40);
    let filled = disk.fill()?;
    eprintln!("{policy}: took the last {filled} bytes of the disk");
    let full = ask_many(&mut client, 40..400, Some(&disk));
    disk.free()?;
    let recovered = until_served(&mut client);
    let after = ask_many(&mut client, 1_000..1_040, None);
    thread::sleep(Duration::from_millis(500));
    let alive = process.is_alive();
    let stopped = process.stop(PATIENCE)?;
    // What was opened and could not be finished is booked by the next start.
    let mut process = farthing.start()?;
    first_answer(&farthing, &mut process, &mut client)?;
    process.stop(PATIENCE)?;

    let open = policy == "fail_open";
    if open {
        report.check(format!("{policy}: served on a full disk"), full.describe(), full.served == 360);
    } else {
        // One that runs when the disk fills up is cut before its last byte: its end cannot be written down, so it is not shown either.
        let good = full.refused > 0 && full.other <= 1 && full.last_refused;
        report.check(format!("{policy}: refused with 503 on a full disk"), full.describe(), good);
    }
    report.check(format!("{policy}: serves again after space is freed"), recovered, recovered && after.served == 40);
    report.check(
        format!("{policy}: the process lives through it and stops when asked to"),
        alive && stopped,
        alive && stopped,
    );
    let seen = notebook.seen();
    let findings = audit(&farthing, &seen)?;
    let gaps = farthing.sql("SELECT * FROM gaps")?;
    let asked = upstream_count(upstream)?;
    report.state(
        format!("{policy}: answers that ended, rows, requests at the upstream, gaps"),
        format!("{}, {}, {asked}, {}", findings.ended, findings.rows, gaps.len()),
    );
    if open {
        // Finished attempts waited in memory for the disk; the opened records that were not written are in a gap.
        report.findings(policy, &findings);
        let lost: u64 = gaps.iter().filter_map(|gap| whole(&gap["records_lost"])).sum();
        report.check(format!("{policy}: opened records that the gaps say are lost"), lost, lost > 0);
        report.details.extend(gaps.first().map(|gap| format!("{policy}: the first gap: {gap:?}")));
    } else {
        report.findings(policy, &findings);
        report.none(format!("{policy}: answers begun and cut, not in the ledger"), findings.head_missing);
        let reached = asked == findings.ended + full.other;
        report.check(format!("{policy}: refused requests did not reach the upstream"), asked, reached);
        report.state(format!("{policy}: gaps"), gaps.len());
    }
    complaints(policy, &notebook, report);
    read_only(&disk, &farthing, policy, report)
}

fn read_only(disk: &SmallDisk, farthing: &Farthing, policy: &str, report: &mut Report) -> Result<(), Box<dyn Error>> {
    disk.make_read_only()?;
    let mut process = farthing.start()?;
    let start = now();
    while process.is_alive() && start.elapsed() < Duration::from_secs(5) {
        thread::sleep(Duration::from_millis(20));
    }
    let refused = !process.is_alive();
    report.check(format!("{policy}: refuses to start on a read-only disk"), refused, refused);
    report.details.push(format!("{policy}, read-only disk: {}", tail(farthing.log())));
    let verified = farthing.run(&["verify"]);
    report.check(format!("{policy}: a read-only ledger can be verified"), verified.is_ok(), verified.is_ok());
    report.details.extend(verified.err());
    Ok(())
}

#[derive(Default)]
struct Answers {
    served: u64,
    refused: u64,
    other: u64,
    last_refused: bool,
}

impl Answers {
    fn describe(&self) -> String {
        format!("{} served, {} refused, {} other", self.served, self.refused, self.other)
    }
}

/// Sends these requests one after another; a given disk is filled up again before each, whatever the server has freed.
fn ask_many(client: &mut Client<'_>, numbers: std::ops::Range<u64>, full: Option<&SmallDisk>) -> Answers {
    let mut answers = Answers::default();
    for number in numbers {
        if let Some(disk) = full {
            // A filler that cannot be written any more has done its work.
            let _ = disk.fill();
        }
        let status = client.ask(number);
        answers.last_refused = status == Some(503);
        *match status {
            Some(200) => &mut answers.served,
            Some(503) => &mut answers.refused,
            _ => &mut answers.other,
        } += 1;
    }
    answers
}

fn until_served(client: &mut Client<'_>) -> bool {
    let start = now();
    while start.elapsed() < Duration::from_secs(10) {
        if client.ask(2) == Some(200) {
            return true;
        }
        thread::sleep(Duration::from_millis(20));
    }
    false
}
