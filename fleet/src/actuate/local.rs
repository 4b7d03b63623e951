//! Engine processes on this host: started, stopped, or put to sleep and woken.
//!
//! Each runs in a process group of its own, because engines have children that keep memory and ports. They end with this program,
//! unless it is killed: then they go on serving, and whoever starts next with the same configuration takes them over.

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

use super::group::{Mark, lives, signal};
use super::http::Said;
use super::{Actual, ActuateError, CALL_MAX, http};

/// A health check that takes longer is a no.
const HEALTH_MAX: Duration = Duration::from_secs(2);
/// Between looks at a process that was told to end.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Longest wait for what was killed: a process inside a driver ends when the driver lets it.
const KILLED_MAX: Duration = Duration::from_secs(5);
/// Wait before a process that ended by itself is started again: doubled each time, up to a minute.
const AGAIN: Duration = Duration::from_secs(1);
const AGAIN_MAX: Duration = Duration::from_secs(60);
/// Longest log of one engine; what was in it before is kept once.
const LOG_BYTES_MAX: u64 = 64 * 1024 * 1024;

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
    /// Milliseconds that one may take until it serves; then it is stopped and started again.
    #[serde(default = "half_an_hour")]
    pub start_ms_max: u64,
}

const fn twenty_seconds() -> u64 {
    20_000
}

const fn half_an_hour() -> u64 {
    1_800_000
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
    /// `None` until somebody said it.
    told: Option<u32>,
    slots: Vec<Slot>,
}

/// What runs for one replica.
#[derive(Debug, Default)]
struct Slot {
    running: Option<Running>,
    /// `None` of one that was taken over and not asked yet.
    asleep: Option<bool>,
    /// When it was started, until it serves.
    starting: Option<Instant>,
    /// Not before this is it started again, and how often it ended by itself in a row.
    again_at: Option<Instant>,
    ended: u32,
}

#[derive(Debug)]
enum Running {
    /// Started by us, with its group: the leader's number is gone as soon as it has ended, and others of the group may go on.
    Child(Child, Option<u32>),
    /// Started by this program in an earlier life.
    Adopted(Mark),
}

impl Running {
    fn has_ended(&mut self) -> bool {
        match self {
            Running::Child(child, _) => !matches!(child.try_wait(), Ok(None)),
            Running::Adopted(mark) => !mark.runs(),
        }
    }

    /// Its group, also after its leader has ended. A number that another process got since was free, so nobody is left.
    fn group(&self) -> Option<u32> {
        match self {
            Running::Child(_, group) => *group,
            Running::Adopted(mark) => Mark::of(mark.pid).is_none_or(|now| now == *mark).then_some(mark.pid),
        }
    }
}

impl Slot {
    /// Whether it runs. What one that ended by itself left behind is ended first: an engine's children hold the GPU's memory.
    async fn runs(&mut self) -> bool {
        let Some(running) = self.running.as_mut() else { return false };
        if !running.has_ended() {
            return true;
        }
        match running.group() {
            Some(group) if !kill(group).await => tracing::warn!(group, "its children do not end"),
            _ => self.running = None,
        }
        false
    }
}

impl Processes {
    /// Nothing is started. What an earlier life of this program left running is taken over.
    pub fn new(spec: Local, folder: &Path) -> Processes {
        let slots = spec.process.iter().map(|process| adopted(folder, process)).collect();
        let state = Mutex::new(State { told: None, slots });
        Processes { shared: Arc::new(Shared { spec, folder: folder.to_owned(), state }) }
    }

    /// What runs, and who of it serves. What ended by itself is started again.
    pub async fn read(&self) -> Actual {
        let wanted = {
            let mut state = self.shared.state.lock().await;
            self.shared.revive(&mut state).await;
            self.shared.wanted(&mut state).await
        };
        self.shared.bound_logs();
        let processes = self.shared.spec.process.iter().take(index(wanted));
        let serve = join_all(processes.map(serves)).await;
        let ready = serve.iter().filter(|&&serves| serves).count();
        self.shared.mind_starts(&serve).await;
        Actual { replicas: wanted, ready: u32::try_from(ready).ok(), serving: serve, pending: Vec::new() }
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
        state.told = Some(replicas);
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
        if !slot.runs().await {
            return self.start(slot, process);
        }
        if self.asleep(slot, process).await {
            let url = format!("{}/wake_up", process.url);
            http::call(Method::POST, &url, Said::default(), CALL_MAX).await?;
            slot.asleep = Some(false);
        }
        Ok(())
    }

    /// Whether it sleeps. One that was taken over is asked; one that does not answer that is awake.
    async fn asleep(&self, slot: &mut Slot, process: &Process) -> bool {
        if let Some(asleep) = slot.asleep {
            return asleep;
        }
        #[derive(Deserialize)]
        struct Sleeping {
            is_sleeping: bool,
        }
        let mut asleep = false;
        if self.spec.idle == Idle::Sleep {
            let url = format!("{}/is_sleeping", process.url);
            let answer = http::call(Method::GET, &url, Said::default(), HEALTH_MAX).await;
            let said = answer.ok().and_then(|answer| serde_json::from_slice::<Sleeping>(&answer).ok());
            asleep = said.is_some_and(|said| said.is_sleeping);
        }
        slot.asleep = Some(asleep);
        asleep
    }

    /// What was told; before that, how many of the first were taken over awake.
    async fn wanted(&self, state: &mut State) -> u32 {
        if let Some(told) = state.told {
            return told;
        }
        let mut wanted = 0;
        for (slot, process) in state.slots.iter_mut().zip(&self.spec.process) {
            if !slot.runs().await || self.asleep(slot, process).await {
                break;
            }
            wanted += 1;
        }
        wanted
    }

    fn start(&self, slot: &mut Slot, process: &Process) -> Result<(), ActuateError> {
        let what = process.command.first().cloned().unwrap_or_default();
        let failed = |error: std::io::Error| ActuateError::Unreachable { what: what.clone(), cause: error.to_string() };
        if slot.running.is_some() {
            let cause = "what the last one left behind does not end".to_owned();
            return Err(ActuateError::Unreachable { what, cause });
        }
        let mut command = Command::new(&what);
        command.args(process.command.get(1..).unwrap_or_default()).envs(&process.environment);
        command.current_dir(&self.folder).process_group(0);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        if let Some(log) = &process.log {
            // Appending, so that it can be cut while the engine writes.
            let log = OpenOptions::new().create(true).append(true).open(self.folder.join(log)).map_err(failed)?;
            command.stdout(log.try_clone().map_err(failed)?).stderr(log);
        }
        let child = command.spawn().map_err(failed)?;
        let group = child.id();
        self.remember(process, group.and_then(Mark::of));
        slot.running = Some(Running::Child(child, group));
        (slot.asleep, slot.starting) = (Some(false), Some(Instant::now()));
        Ok(())
    }

    async fn end(&self, slot: &mut Slot, process: &Process) {
        (slot.again_at, slot.ended) = (None, 0);
        if self.spec.idle == Idle::Sleep && slot.runs().await {
            if self.asleep(slot, process).await {
                return;
            }
            let url = format!("{}/sleep?level=1", process.url);
            match http::call(Method::POST, &url, Said::default(), CALL_MAX).await {
                Ok(_) => {
                    slot.asleep = Some(true);
                    return;
                }
                Err(error) => tracing::warn!(%error, "it does not sleep; it is stopped"),
            }
        }
        self.stop(slot, process).await;
    }

    async fn stop(&self, slot: &mut Slot, process: &Process) {
        slot.starting = None;
        if !slot.runs().await {
            self.remember(process, None);
            return;
        }
        let Some(mut running) = slot.running.take() else { return };
        let group = running.group();
        if let Some(group) = group {
            signal("TERM", group);
        }
        let until = Instant::now() + Duration::from_millis(self.spec.stop_ms_max);
        // The group outlives its leader by a moment, and the next start needs what it holds.
        while !running.has_ended() || group.is_some_and(lives) {
            if Instant::now() >= until {
                tracing::warn!(url = process.url, "it did not end in time; it is killed");
                if let Some(group) = group {
                    kill(group).await;
                }
                if let Running::Child(child, _) = &mut running {
                    let _ = child.kill().await;
                }
                break;
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
        self.remember(process, None);
    }

    /// Stops what has been starting for too long; it is started again like all that ended by itself.
    async fn mind_starts(&self, serve: &[bool]) {
        let mut state = self.state.lock().await;
        let patience = Duration::from_millis(self.spec.start_ms_max);
        for ((slot, process), serves) in state.slots.iter_mut().zip(&self.spec.process).zip(serve) {
            if *serves {
                (slot.starting, slot.ended) = (None, 0);
            } else if slot.starting.is_some_and(|since| since.elapsed() > patience) {
                tracing::warn!(url = process.url, "it did not serve within start_ms_max; it is started again");
                self.stop(slot, process).await;
            }
        }
    }

    /// Writes down which process is this replica, for a later life of this program, or that there is none.
    fn remember(&self, process: &Process, mark: Option<Mark>) {
        let path = mark_of(&self.folder, process);
        let written = match mark.and_then(|mark| serde_json::to_vec(&mark).ok()) {
            Some(mark) => std::fs::write(&path, mark),
            None => match std::fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            },
        };
        if let Err(error) = written {
            tracing::warn!(%error, path = %path.display(), "after a crash this engine would not be found again");
        }
    }

    fn bound_logs(&self) {
        let logs = self.spec.process.iter().filter_map(|process| process.log.as_ref());
        for log in logs.map(|log| self.folder.join(log)) {
            if let Err(error) = bound(&log, LOG_BYTES_MAX)
                && error.kind() != std::io::ErrorKind::NotFound
            {
                tracing::warn!(%error, log = %log.display(), "this log grows");
            }
        }
    }

    /// Starts again what is wanted and ended by itself, after a pause.
    async fn revive(&self, state: &mut State) {
        let wanted = index(state.told.unwrap_or(0));
        for (slot, process) in state.slots.iter_mut().zip(&self.spec.process).take(wanted) {
            if slot.runs().await {
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
        let ends = |slot: &mut Slot| {
            let running = slot.running.as_mut()?;
            // Nobody tells the children of a leader that has ended how to end well.
            let signal = if running.has_ended() { "KILL" } else { "TERM" };
            Some((signal, running.group()?))
        };
        let ends: Vec<_> = self.state.get_mut().slots.iter_mut().map(ends).collect();
        for (end, process) in ends.into_iter().zip(&self.spec.process) {
            if let Some((name, group)) = end {
                signal(name, group);
                self.remember(process, None);
            }
        }
    }
}

/// Kills a group and waits until nobody of it is left; no when some are all the same.
async fn kill(group: u32) -> bool {
    signal("KILL", group);
    let until = Instant::now() + KILLED_MAX;
    while lives(group) {
        if Instant::now() >= until {
            return false;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    true
}

/// What an earlier life of this program left running of a replica.
fn adopted(folder: &Path, process: &Process) -> Slot {
    let written = std::fs::read(mark_of(folder, process)).ok();
    let mark = written.and_then(|written| serde_json::from_slice::<Mark>(&written).ok()).filter(Mark::runs);
    let Some(mark) = mark else { return Slot::default() };
    tracing::info!(url = process.url, pid = mark.pid, "an engine that runs already is taken over");
    Slot { running: Some(Running::Adopted(mark)), ..Slot::default() }
}

/// The file that says which process a replica is. Its address is what two engines cannot share.
fn mark_of(folder: &Path, process: &Process) -> PathBuf {
    let address = process.url.split_once("://").map_or(process.url.as_str(), |(_, address)| address);
    let name: String =
        address.chars().map(|letter| if letter.is_ascii_alphanumeric() { letter } else { '-' }).collect();
    folder.join(format!("engine-{name}.pid"))
}

/// Keeps a log below so many bytes: what it says is moved to a second file, which loses what it said before.
fn bound(log: &Path, bytes_max: u64) -> std::io::Result<()> {
    if std::fs::metadata(log)?.len() <= bytes_max {
        return Ok(());
    }
    let mut before = log.as_os_str().to_owned();
    before.push(".1");
    std::fs::copy(log, before)?;
    OpenOptions::new().write(true).open(log)?.set_len(0)
}

async fn serves(process: &Process) -> bool {
    let url = format!("{}{}", process.url, process.health);
    http::call(Method::GET, &url, Said::default(), HEALTH_MAX).await.is_ok()
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
        Local {
            process: urls.iter().enumerate().map(process).collect(),
            idle,
            stop_ms_max: 5_000,
            start_ms_max: 60_000,
        }
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
        assert_eq!(processes.read().await, Actual { ready: Some(0), ..Actual::default() });
        processes.tell(2).await.unwrap();
        processes.tell(2).await.unwrap();
        let (first, second) = (pids(folder.path(), 0, 1).await, pids(folder.path(), 1, 1).await);
        assert_eq!((first.len(), second.len()), (1, 1), "told twice, started once");
        assert!(lives(first[0]) && lives(second[0]));
        let read = processes.read().await;
        assert_eq!((read.replicas, read.ready, read.serving.len()), (2, Some(1), 2));
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

    /// Starts one that leaves a child behind and ends; gives its group when only the child is left.
    async fn left_behind(folder: &Path) -> (Processes, u32) {
        let mut spec = of(&["http://127.0.0.1:1"], Idle::Stop);
        spec.process[0].command = ["sh", "-c", "echo $$ >> pids-0; sleep 60 & exit 1"].map(str::to_owned).to_vec();
        let processes = Processes::new(spec, folder);
        processes.tell(1).await.unwrap();
        let group = pids(folder, 0, 1).await[0];
        let begun = Instant::now();
        while Mark::of(group).is_some() {
            assert!(begun.elapsed() < Duration::from_secs(5), "it does not end");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(lives(group), "its child goes on");
        (processes, group)
    }

    #[tokio::test]
    async fn what_an_engine_leaves_behind_is_ended_before_it_starts_again() {
        let folder = tempfile::tempdir().unwrap();
        let (processes, first) = left_behind(folder.path()).await;
        processes.read().await;
        assert!(!lives(first), "its memory is free as soon as it is known");
        let begun = Instant::now();
        while std::fs::read_to_string(folder.path().join("pids-0")).unwrap().lines().count() < 2 {
            processes.read().await;
            assert!(begun.elapsed() < Duration::from_secs(10));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let second = pids(folder.path(), 0, 2).await[1];
        while Mark::of(second).is_some() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert!(lives(second));
        processes.tell(1).await.unwrap();
        assert!(!lives(second), "also when it is told again");
        assert_eq!(pids(folder.path(), 0, 3).await.len(), 3);
    }

    #[tokio::test]
    async fn what_an_engine_leaves_behind_ends_with_a_stop_and_with_the_actuator() {
        let folder = tempfile::tempdir().unwrap();
        let (processes, group) = left_behind(folder.path()).await;
        processes.tell(0).await.unwrap();
        assert!(!lives(group));

        let folder = tempfile::tempdir().unwrap();
        let (processes, group) = left_behind(folder.path()).await;
        drop(processes);
        let begun = Instant::now();
        while lives(group) {
            assert!(begun.elapsed() < Duration::from_secs(5), "it outlived its actuator");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
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

    #[tokio::test]
    async fn after_a_crash_engines_are_taken_over() {
        let (folder, (up, called)) = (tempfile::tempdir().unwrap(), answering().await);
        let spec = of(&[&up, "http://127.0.0.1:1"], Idle::Stop);
        let before = Processes::new(spec.clone(), folder.path());
        before.tell(2).await.unwrap();
        let (first, second) = (pids(folder.path(), 0, 1).await[0], pids(folder.path(), 1, 1).await[0]);
        // As `kill -9` does: nothing is cleaned up.
        std::mem::forget(before);
        let after = Processes::new(spec.clone(), folder.path());
        let read = after.read().await;
        assert_eq!((read.replicas, read.ready, read.serving.len()), (2, Some(1), 2));
        after.tell(2).await.unwrap();
        assert_eq!(pids(folder.path(), 0, 1).await, [first], "nothing is started a second time");
        after.tell(1).await.unwrap();
        assert!(lives(first) && !lives(second), "one that was taken over is stopped like any other");
        drop(after);
        let begun = Instant::now();
        while lives(first) {
            assert!(begun.elapsed() < Duration::from_secs(5), "it outlived its actuator");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let anew = Processes::new(spec, folder.path());
        assert_eq!(anew.read().await.replicas, 0, "what has ended is not taken over");
        assert!(called.lock().unwrap().iter().all(|path| path == "/health"));
    }

    #[tokio::test]
    async fn what_never_serves_is_started_again() {
        let folder = tempfile::tempdir().unwrap();
        let spec = Local { start_ms_max: 300, ..of(&["http://127.0.0.1:1"], Idle::Stop) };
        let processes = Processes::new(spec, folder.path());
        processes.tell(1).await.unwrap();
        let first = pids(folder.path(), 0, 1).await[0];
        let begun = Instant::now();
        while std::fs::read_to_string(folder.path().join("pids-0")).unwrap().lines().count() < 2 {
            processes.read().await;
            assert!(begun.elapsed() < Duration::from_secs(10));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(!lives(first) && begun.elapsed() >= AGAIN, "the first is gone, and the next did not come at once");
    }

    #[test]
    fn logs_are_bounded_while_they_are_written() {
        use std::io::Write;
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("engine.log");
        let mut writer = OpenOptions::new().create(true).append(true).open(&log).unwrap();
        writer.write_all(b"0123456789").unwrap();
        bound(&log, 10).unwrap();
        assert_eq!(std::fs::read(&log).unwrap(), b"0123456789");
        bound(&log, 9).unwrap();
        writer.write_all(b"more").unwrap();
        assert_eq!(std::fs::read(&log).unwrap(), b"more");
        assert_eq!(std::fs::read(folder.path().join("engine.log.1")).unwrap(), b"0123456789");
    }
}
