//! Engine processes on this host: started, stopped, or put to sleep and woken.
//!
//! Each runs in a process group of its own, because engines have children that keep memory and ports. They end with this program.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use ::http::Method;
use futures_util::future::join_all;
use serde::Deserialize;
use tokio::process::{Child, Command};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::{Actual, ActuateError, CALL_MAX, http};

/// A health check that takes longer is a no.
const HEALTH_MAX: Duration = Duration::from_secs(2);
/// Between looks at a process that was told to end.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Wait before a process that ended by itself is started again: doubled each time, up to a minute.
const AGAIN: Duration = Duration::from_secs(1);
const AGAIN_MAX: Duration = Duration::from_secs(60);

/// Processes, in the order in which they start.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Local {
    /// One for each replica.
    pub process: Vec<Process>,
    /// What becomes of those that are not wanted.
    #[serde(default)]
    pub idle: Idle,
    /// Milliseconds that one may take to end after it was asked to; then it is killed.
    #[serde(default = "twenty_seconds")]
    pub stop_ms_max: u64,
}

const fn twenty_seconds() -> u64 {
    20_000
}

/// One engine.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// Program and arguments; no shell.
    pub command: Vec<String>,
    /// Its address, such as `http://127.0.0.1:8001`.
    pub url: String,
    /// The path that answers with success as soon as it serves.
    #[serde(default = "health")]
    pub health: String,
    /// Further environment.
    #[serde(default)]
    pub environment: BTreeMap<String, String>,
    /// Where its words go; nowhere when absent.
    #[serde(default)]
    pub log: Option<PathBuf>,
}

fn health() -> String {
    "/health".to_owned()
}

/// What becomes of a process that is not wanted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Idle {
    /// It is stopped.
    #[default]
    Stop,
    /// vLLM's `/sleep?level=1`: weights go to the host's memory, and come back with `/wake_up`.
    Sleep,
}

impl Local {
    pub(super) fn check(&self) -> Result<(), String> {
        if self.process.is_empty() {
            return Err("kind = \"local\" needs a [[process]] for each replica".to_owned());
        }
        for process in &self.process {
            if process.command.first().is_none_or(String::is_empty) {
                return Err("a process needs command = [\"program\", \"argument\"]".to_owned());
            }
            http::check(&process.url)?;
        }
        Ok(())
    }
}

/// The processes at work. They are ended when this is dropped.
#[derive(Debug)]
pub(super) struct Processes {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    spec: Local,
    folder: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    wanted: u32,
    slots: Vec<Slot>,
}

/// What runs for one replica.
#[derive(Debug, Default)]
struct Slot {
    child: Option<Child>,
    asleep: bool,
    /// Not before this is it started again, and how often it ended by itself in a row.
    again_at: Option<Instant>,
    ended: u32,
}

impl Processes {
    pub fn new(spec: Local, folder: &Path) -> Processes {
        let slots = spec.process.iter().map(|_| Slot::default()).collect();
        let state = Mutex::new(State { wanted: 0, slots });
        Processes { shared: Arc::new(Shared { spec, folder: folder.to_owned(), state }) }
    }

    /// What runs, and who of it serves. What ended by itself is started again.
    pub async fn read(&self) -> Actual {
        let wanted = {
            let mut state = self.shared.state.lock().await;
            self.shared.revive(&mut state);
            state.wanted
        };
        let processes = self.shared.spec.process.iter().take(index(wanted));
        let ready = join_all(processes.map(serves)).await.into_iter().filter(|&serves| serves).count();
        Actual { replicas: wanted, ready: u32::try_from(ready).ok(), pending: Vec::new() }
    }

    /// Runs the first so many. It returns when those that are to end have ended; the others are on their way then.
    pub async fn tell(&self, replicas: u32) -> Result<(), ActuateError> {
        let most = self.shared.spec.process.len();
        if index(replicas) > most {
            let cause = format!("{replicas} replicas were asked for, and there are {most} processes");
            return Err(ActuateError::Refused { what: "local".to_owned(), cause });
        }
        let shared = Arc::clone(&self.shared);
        // To its end, even if nobody waits any more: half a stop is none.
        let done = tokio::spawn(async move { shared.follow(replicas).await }).await;
        done.unwrap_or_else(|error| {
            Err(ActuateError::Refused { what: "local".to_owned(), cause: format!("it was broken off: {error}") })
        })
    }
}

impl Shared {
    async fn follow(&self, replicas: u32) -> Result<(), ActuateError> {
        let mut state = self.state.lock().await;
        state.wanted = replicas;
        let (wanted, rest) = state.slots.split_at_mut(index(replicas));
        let mut outcome = Ok(());
        for (slot, process) in wanted.iter_mut().zip(&self.spec.process) {
            if let Err(error) = self.begin(slot, process).await {
                outcome = Err(error);
            }
        }
        let unwanted = rest.iter_mut().zip(self.spec.process.iter().skip(index(replicas)));
        join_all(unwanted.map(|(slot, process)| self.end(slot, process))).await;
        outcome
    }

    async fn begin(&self, slot: &mut Slot, process: &Process) -> Result<(), ActuateError> {
        (slot.again_at, slot.ended) = (None, 0);
        if slot.child.as_mut().is_none_or(has_ended) {
            return self.start(slot, process);
        }
        if slot.asleep {
            let url = format!("{}/wake_up", process.url);
            http::call(Method::POST, &url, None, None, CALL_MAX).await?;
            slot.asleep = false;
        }
        Ok(())
    }

    fn start(&self, slot: &mut Slot, process: &Process) -> Result<(), ActuateError> {
        let what = process.command.first().cloned().unwrap_or_default();
        let failed = |error: std::io::Error| ActuateError::Unreachable { what: what.clone(), cause: error.to_string() };
        let mut command = Command::new(&what);
        command.args(process.command.get(1..).unwrap_or_default()).envs(&process.environment);
        command.current_dir(&self.folder).process_group(0);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        if let Some(log) = &process.log {
            let log = OpenOptions::new().create(true).append(true).open(self.folder.join(log)).map_err(failed)?;
            command.stdout(log.try_clone().map_err(failed)?).stderr(log);
        }
        slot.child = Some(command.spawn().map_err(failed)?);
        slot.asleep = false;
        Ok(())
    }

    async fn end(&self, slot: &mut Slot, process: &Process) {
        (slot.again_at, slot.ended) = (None, 0);
        let Some(child) = &mut slot.child else { return };
        if self.spec.idle == Idle::Sleep && !has_ended(child) {
            let url = format!("{}/sleep?level=1", process.url);
            match http::call(Method::POST, &url, None, None, CALL_MAX).await {
                Ok(_) => {
                    slot.asleep = true;
                    return;
                }
                Err(error) => tracing::warn!(%error, "it does not sleep; it is stopped"),
            }
        }
        let group = child.id();
        if let Some(group) = group {
            signal("TERM", group);
        }
        let until = Instant::now() + Duration::from_millis(self.spec.stop_ms_max);
        // The group outlives its leader by a moment, and the next start needs what it holds.
        while !has_ended(child) || group.is_some_and(lives) {
            if Instant::now() >= until {
                tracing::warn!(url = process.url, "it did not end in time; it is killed");
                group.into_iter().for_each(|group| signal("KILL", group));
                let _ = child.kill().await;
                break;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        slot.child = None;
    }

    /// Starts again what is wanted and ended by itself, after a pause.
    fn revive(&self, state: &mut State) {
        let wanted = index(state.wanted);
        for (slot, process) in state.slots.iter_mut().zip(&self.spec.process).take(wanted) {
            if !slot.child.as_mut().is_none_or(has_ended) {
                continue;
            }
            let now = Instant::now();
            let Some(again_at) = slot.again_at else {
                let pause = AGAIN.saturating_mul(1 << slot.ended.min(6)).min(AGAIN_MAX);
                tracing::warn!(url = process.url, "it ended by itself; it is started again in {} s", pause.as_secs());
                slot.again_at = Some(now + pause);
                slot.ended = slot.ended.saturating_add(1);
                continue;
            };
            if now >= again_at {
                slot.again_at = None;
                if let Err(error) = self.start(slot, process) {
                    tracing::warn!(%error, "it does not start");
                }
            }
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        for slot in &self.state.get_mut().slots {
            if let Some(group) = slot.child.as_ref().and_then(Child::id) {
                signal("TERM", group);
            }
        }
    }
}

fn has_ended(child: &mut Child) -> bool {
    !matches!(child.try_wait(), Ok(None))
}

async fn serves(process: &Process) -> bool {
    let url = format!("{}{}", process.url, process.health);
    http::call(Method::GET, &url, None, None, HEALTH_MAX).await.is_ok()
}

/// Sends a signal to a process group. The shell does it: its `kill` is everywhere, and needs no unsafe code here.
fn signal(name: &str, group: u32) {
    let mut command = std::process::Command::new("sh");
    command.args(["-c", &format!("kill -s {name} -- -{group}")]);
    // That nobody is left is no failure.
    let _ = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
}

/// Whether anybody of a process group still runs. Where there is no `/proc` only its leader counts.
fn lives(group: u32) -> bool {
    let Ok(processes) = std::fs::read_dir("/proc") else { return false };
    let stats = processes.flatten().filter_map(|process| std::fs::read_to_string(process.path().join("stat")).ok());
    stats.into_iter().any(|stat| is_of(&stat, group))
}

/// Whether a line of `/proc/PID/stat` is a process of this group that is more than a zombie.
fn is_of(stat: &str, group: u32) -> bool {
    // The name may contain anything, so only what follows its last bracket counts: state, parent, group.
    let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    let state = fields.next();
    fields.nth(1).and_then(|group| group.parse().ok()) == Some(group) && !matches!(state, Some("Z" | "X"))
}

fn index(replicas: u32) -> usize {
    usize::try_from(replicas).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use ::http::Response;
    use bytes::Bytes;
    use http_body_util::Full;
    use hyper::service::service_fn;
    use hyper_util::rt::TokioIo;
    use tokio::net::TcpListener;

    use super::*;

    /// Answers every call, and remembers what was called.
    async fn answering() -> (String, Arc<std::sync::Mutex<Vec<String>>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let called = Arc::new(std::sync::Mutex::new(Vec::new()));
        let remember = Arc::clone(&called);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let remember = Arc::clone(&remember);
                let service = service_fn(move |request: ::http::Request<hyper::body::Incoming>| {
                    remember.lock().unwrap().push(request.uri().to_string());
                    async { Ok::<_, Infallible>(Response::new(Full::new(Bytes::new()))) }
                });
                let connection =
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
                tokio::spawn(connection);
            }
        });
        (url, called)
    }

    /// Each writes its group into a file of its name, and has a child, as engines do.
    fn of(urls: &[&str], idle: Idle) -> Local {
        let process = |(number, url): (usize, &&str)| Process {
            command: ["sh", "-c", "echo $$ >> pids-$NUMBER; sleep 60 & sleep 60"].map(str::to_owned).to_vec(),
            url: (*url).to_owned(),
            health: health(),
            environment: BTreeMap::from([("NUMBER".to_owned(), number.to_string())]),
            log: Some("words.log".into()),
        };
        Local { process: urls.iter().enumerate().map(process).collect(), idle, stop_ms_max: 5_000 }
    }

    async fn pids(folder: &Path, number: u32, count: usize) -> Vec<u32> {
        for _ in 0..400 {
            let text = std::fs::read_to_string(folder.join(format!("pids-{number}"))).unwrap_or_default();
            let pids: Vec<u32> = text.lines().filter_map(|line| line.parse().ok()).collect();
            if pids.len() >= count {
                return pids;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("replica {number} never started {count} times");
    }

    #[tokio::test]
    async fn the_first_so_many_run_and_the_others_end_with_their_children() {
        let (folder, (up, _)) = (tempfile::tempdir().unwrap(), answering().await);
        let processes = Processes::new(of(&[&up, "http://127.0.0.1:1"], Idle::Stop), folder.path());
        assert_eq!(processes.read().await, Actual { replicas: 0, ready: Some(0), pending: Vec::new() });
        processes.tell(2).await.unwrap();
        processes.tell(2).await.unwrap();
        let (first, second) = (pids(folder.path(), 0, 1).await, pids(folder.path(), 1, 1).await);
        assert_eq!((first.len(), second.len()), (1, 1), "told twice, started once");
        assert!(lives(first[0]) && lives(second[0]));
        assert_eq!(processes.read().await, Actual { replicas: 2, ready: Some(1), pending: Vec::new() });
        processes.tell(1).await.unwrap();
        assert!(lives(first[0]) && !lives(second[0]), "its child ended too");
        assert!(processes.tell(3).await.is_err());
        drop(processes);
        for _ in 0..200 {
            if !lives(first[0]) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("it outlived its actuator");
    }

    #[tokio::test]
    async fn what_ends_by_itself_is_started_again() {
        let (folder, (up, _)) = (tempfile::tempdir().unwrap(), answering().await);
        let processes = Processes::new(of(&[&up], Idle::Stop), folder.path());
        processes.tell(1).await.unwrap();
        let first = pids(folder.path(), 0, 1).await[0];
        signal("KILL", first);
        let begun = Instant::now();
        while std::fs::read_to_string(folder.path().join("pids-0")).unwrap().lines().count() < 2 {
            processes.read().await;
            assert!(begun.elapsed() < Duration::from_secs(10));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(begun.elapsed() >= AGAIN, "not at once");
    }

    #[tokio::test]
    async fn sleep_and_wake_are_the_engines_own() {
        let (folder, (up, called)) = (tempfile::tempdir().unwrap(), answering().await);
        let processes = Processes::new(of(&[&up], Idle::Sleep), folder.path());
        processes.tell(1).await.unwrap();
        let pid = pids(folder.path(), 0, 1).await[0];
        processes.tell(0).await.unwrap();
        assert!(lives(pid), "it sleeps");
        processes.tell(1).await.unwrap();
        assert_eq!(*called.lock().unwrap(), ["/sleep?level=1", "/wake_up"]);
        // One that cannot sleep is stopped.
        let deaf = Processes::new(of(&["http://127.0.0.1:1"], Idle::Sleep), folder.path());
        deaf.tell(1).await.unwrap();
        let pid = pids(folder.path(), 0, 2).await[1];
        deaf.tell(0).await.unwrap();
        assert!(!lives(pid));
    }

    #[test]
    fn a_zombie_does_not_run() {
        let stat = |state: &str| format!("12 (a) b) {state} 1 77 12 0");
        assert!(is_of(&stat("S"), 77) && !is_of(&stat("Z"), 77) && !is_of(&stat("S"), 1));
    }
}
