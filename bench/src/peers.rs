//! Other gateways to compare with, when `bench/peers` has installed them.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::clock::now;
use crate::driver::tail;
use crate::process::{Process, free_address};
use crate::wire::{Connection, Keep, post};

/// LiteLLM alone takes half a minute to start on a busy machine.
const START_PATIENCE: Duration = Duration::from_secs(120);

/// A gateway that runs and has answered once.
#[derive(Debug)]
pub struct Peer {
    /// Its name and version.
    pub name: String,
    /// Its process.
    pub process: Process,
    /// Where it listens.
    pub address: SocketAddr,
    /// The header lines that a client sends.
    pub headers: String,
}

/// Starts every peer that is installed. What is missing or does not start is a line of explanation instead.
#[must_use]
pub fn start_all(folder: &Path, upstream: SocketAddr, probe_body: &str) -> Vec<Result<Peer, String>> {
    vec![litellm(folder, upstream, probe_body), portkey(folder, upstream, probe_body)]
}

/// The folder that `bench/peers` installs into.
fn home() -> PathBuf {
    let default = || Path::new(&std::env::var_os("HOME").unwrap_or_default()).join(".cache/farthing-peers");
    std::env::var_os("BENCH_PEERS_HOME").map_or_else(default, PathBuf::from)
}

fn installed(variable: &str, default: &str, name: &str) -> Result<PathBuf, String> {
    let path = std::env::var_os(variable).map_or_else(|| home().join(default), PathBuf::from);
    if path.exists() {
        Ok(path)
    } else {
        Err(format!("{name} is not installed ({} is missing): run bench/peers", path.display()))
    }
}

fn litellm(folder: &Path, upstream: SocketAddr, probe_body: &str) -> Result<Peer, String> {
    let name = "LiteLLM 1.104.0";
    let binary = installed("BENCH_LITELLM", "litellm/bin/litellm", name)?;
    let address = free_address().map_err(|error| error.to_string())?;
    let config = folder.join("litellm.yaml");
    let text = format!(
        "model_list:\n  - model_name: gpt-4o\n    litellm_params:\n      model: openai/gpt-4o\n      api_base: http://{upstream}/v1\n      api_key: sk-mock\n\
         general_settings:\n  master_key: sk-bench\n"
    );
    std::fs::write(&config, text).map_err(|error| error.to_string())?;
    let mut command = Command::new(binary);
    command.arg("--config").arg(&config).args([
        "--host",
        "127.0.0.1",
        "--num_workers",
        "1",
        "--port",
        &address.port().to_string(),
    ]);
    // Neither a price list nor telemetry may be fetched: everything stays on loopback.
    command.envs([("LITELLM_LOCAL_MODEL_COST_MAP", "True"), ("LITELLM_TELEMETRY", "False"), ("LITELLM_LOG", "ERROR")]);
    let headers = "authorization: Bearer sk-bench\r\n".to_owned();
    start(name, command, &folder.join("litellm.log"), address, headers, probe_body)
}

fn portkey(folder: &Path, upstream: SocketAddr, probe_body: &str) -> Result<Peer, String> {
    let name = "Portkey 1.15.2";
    let script = installed("BENCH_PORTKEY", "portkey/node_modules/@portkey-ai/gateway/build/start-server.js", name)?;
    let address = free_address().map_err(|error| error.to_string())?;
    let mut command = Command::new("node");
    command
        .arg(script)
        .args([format!("--port={}", address.port()), "--headless".to_owned()])
        .env("TRUSTED_CUSTOM_HOSTS", "127.0.0.1");
    let headers = format!(
        "authorization: Bearer sk-mock\r\nx-portkey-provider: openai\r\nx-portkey-custom-host: http://{upstream}/v1\r\n"
    );
    start(name, command, &folder.join("portkey.log"), address, headers, probe_body)
}

fn start(
    name: &str,
    mut command: Command,
    log: &Path,
    address: SocketAddr,
    headers: String,
    probe_body: &str,
) -> Result<Peer, String> {
    let mut process = Process::start(&mut command, log).map_err(|error| format!("{name}: {error}"))?;
    let request = post("/v1/chat/completions", address, &headers, probe_body);
    let (started, mut last) = (now(), String::new());
    while started.elapsed() < START_PATIENCE && process.is_alive() {
        match Connection::new(address, Duration::from_secs(10)).call(&request, Keep::Body) {
            Ok(answer) if answer.status == 200 => return Ok(Peer { name: name.to_owned(), process, address, headers }),
            Ok(answer) => last = format!("status {}: {}", answer.status, String::from_utf8_lossy(&answer.body)),
            Err(broken) => last = broken.error.to_string(),
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    Err(format!("{name} did not answer: {last}; its log ends: {}", tail(log)))
}
