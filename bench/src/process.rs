//! The processes of a bench: started from here, watched through `/proc`, and never left behind.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use crate::clock::now;

/// What a bench program can become when it starts itself again, so that each part has a process of its own.
const ROLE_FLAG: &str = "--role";

/// The clock ticks in `/proc/PID/stat`: 100 a second on every Linux architecture.
const TICK: Duration = Duration::from_millis(10);

/// A child process that is killed when it goes out of scope.
#[derive(Debug)]
pub struct Process {
    child: Child,
}

impl Process {
    /// Starts a program with its output in `log`.
    ///
    /// # Errors
    /// When the program cannot be started or the log not be written.
    pub fn start(command: &mut Command, log: &Path) -> io::Result<Process> {
        let file = File::options().create(true).append(true).open(log)?;
        let child = command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).spawn()?;
        Ok(Process { child })
    }

    /// Starts this very program in another role and waits for its address.
    ///
    /// # Errors
    /// When it cannot be started or does not say where it listens.
    pub fn start_role(role: &str, upstream: Option<SocketAddr>) -> io::Result<(Process, SocketAddr)> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(ROLE_FLAG).arg(role).args(upstream.map(|address| address.to_string()));
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            BufReader::new(stdout).read_line(&mut line)?;
        }
        let process = Process { child };
        let address =
            line.trim().parse().map_err(|_| io::Error::other(format!("the {role} did not say where it listens")))?;
        Ok((process, address))
    }

    /// The process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// `kill -9`, and waits until it is gone.
    ///
    /// # Errors
    /// When the process cannot be waited for.
    pub fn kill(&mut self) -> io::Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop)
    }

    /// Asks it to stop, and kills it when it has not after `patience`. Says whether it stopped by itself with status 0.
    ///
    /// # Errors
    /// When the process cannot be signalled or waited for.
    pub fn stop(&mut self, patience: Duration) -> io::Result<bool> {
        Command::new("kill").args(["-TERM", &self.id().to_string()]).status()?;
        let until = now() + patience;
        while now() < until {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status.success());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.kill()?;
        Ok(false)
    }

    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Memory that it and its children occupy now, in bytes.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        tree(self.id()).into_iter().map(|pid| status_kib(pid, "VmRSS:") * 1024).sum()
    }

    /// Processor time that it and its children have used, to a hundredth of a second.
    #[must_use]
    pub fn processor_time(&self) -> Duration {
        tree(self.id()).into_iter().map(processor_time).sum()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        for pid in tree(self.id()).into_iter().skip(1) {
            // Whatever a child has started goes with it; one that is gone already is fine.
            let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).stderr(Stdio::null()).status();
        }
        let _ = self.kill();
    }
}

/// Runs the role that [`Process::start_role`] asked for, if this process is one. Call it first in `main`.
#[must_use]
pub fn run_role() -> Option<ExitCode> {
    let mut args = std::env::args().skip(1);
    if args.next()? != ROLE_FLAG {
        return None;
    }
    let (role, upstream) = (args.next().unwrap_or_default(), args.next());
    Some(match serve_role(&role, upstream) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    })
}

#[expect(clippy::print_stdout, reason = "the parent reads the address from standard output")]
fn serve_role(role: &str, upstream: Option<String>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        println!("{}", listener.local_addr()?);
        match (role, upstream) {
            ("mock", None) => crate::mock::serve(listener).await,
            ("plain", Some(upstream)) => crate::plain::serve(listener, upstream).await,
            _ => Err(io::Error::other("no such role")),
        }
    })
}

/// An address on loopback that was free a moment ago.
///
/// # Errors
/// When no port is free.
pub fn free_address() -> io::Result<SocketAddr> {
    TcpListener::bind("127.0.0.1:0")?.local_addr()
}

/// Runs a program to its end and returns its standard output, or its last line of complaint as the error.
///
/// # Errors
/// When it cannot be started or does not exit with status 0.
pub fn output<S: AsRef<OsStr>>(program: &Path, args: &[S]) -> Result<String, String> {
    let name = program.display();
    let run =
        Command::new(program).args(args).stdin(Stdio::null()).output().map_err(|error| format!("{name}: {error}"))?;
    let stdout = String::from_utf8_lossy(&run.stdout).into_owned();
    if run.status.success() {
        return Ok(stdout);
    }
    let stderr = String::from_utf8_lossy(&run.stderr).into_owned();
    let words: Vec<_> = args.iter().map(|arg| arg.as_ref().to_string_lossy()).collect();
    Err(format!("`{name} {}` ended with {}: {} {}", words.join(" "), run.status, stderr.trim(), stdout.trim()))
}

/// The most memory that this process has occupied so far, in bytes.
#[must_use]
pub fn own_peak_bytes() -> u64 {
    status_kib(std::process::id(), "VmHWM:") * 1024
}

/// A process and everything below it, itself first.
fn tree(root: u32) -> Vec<u32> {
    let mut found = vec![root];
    let mut next = 0;
    while let Some(&pid) = found.get(next) {
        next += 1;
        for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
            found.extend(children.split_whitespace().filter_map(|child| child.parse::<u32>().ok()));
        }
    }
    found
}

fn status_kib(pid: u32, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
    line.split_whitespace().next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

fn processor_time(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in parentheses may hold anything, so count the fields after it: user and system time are the 12th and 13th.
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let ticks: u32 = after_name.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<u32>().ok()).sum();
    TICK * ticks
}
