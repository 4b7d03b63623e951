//! Farthing as its users meet it: a binary, a configuration file, a data folder, and an HTTP port.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::clock::now;
use crate::process::{Process, free_address, output};
use crate::wire::{Connection, Keep};

/// How an instance is to be run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `process` or `power`.
    pub durability: &'static str,
    /// `fail_open` or `fail_closed`.
    pub when_log_fails: &'static str,
    /// Milliseconds between moves of the log into the tables.
    pub flush_every_ms: u64,
    /// The provider to send requests to.
    pub upstream: SocketAddr,
}

/// One instance: its files, its ports, its key. The process itself comes and goes.
#[derive(Debug)]
pub struct Farthing {
    binary: PathBuf,
    config: PathBuf,
    data: PathBuf,
    log: PathBuf,
    key: String,
    gateway: SocketAddr,
}

impl Farthing {
    /// Writes the configuration into `folder`, makes the ledger in `data`, and creates the key that requests will carry.
    ///
    /// # Errors
    /// One line that says which step failed and how.
    pub fn prepare(binary: &Path, folder: &Path, data: &Path, settings: &Settings) -> Result<Farthing, String> {
        let ports = || free_address().map_err(|error| format!("no free port: {error}"));
        let (gateway, admin) = (ports()?, ports()?);
        fs::create_dir_all(folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        let config = folder.join("farthing.toml");
        let secret = folder.join("provider-key");
        fs::write(&secret, "sk-mock").map_err(|error| format!("{}: {error}", secret.display()))?;
        let text = configuration(settings, gateway, admin, &secret);
        fs::write(&config, text).map_err(|error| format!("{}: {error}", config.display()))?;
        let mut farthing = Farthing {
            binary: binary.to_owned(),
            config,
            data: data.to_owned(),
            log: folder.join("farthing.log"),
            key: String::new(),
            gateway,
        };
        let created = farthing.run(&["key", "create", "--consumer", "bench", "--team", "bench"])?;
        farthing.key = find_key(&created).ok_or_else(|| format!("`key create` printed no key: {created}"))?;
        Ok(farthing)
    }

    /// Where the gateway listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.gateway
    }

    /// The header lines that a client sends.
    #[must_use]
    pub fn headers(&self) -> String {
        format!("authorization: Bearer {}\r\n", self.key)
    }

    /// The file with everything the server wrote to its standard streams.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Starts `farthing serve`.
    ///
    /// # Errors
    /// When the binary cannot be started.
    pub fn start(&self) -> io::Result<Process> {
        let mut command = Command::new(&self.binary);
        command.arg("serve").arg("--config").arg(&self.config).arg("--data").arg(&self.data);
        Process::start(&mut command, &self.log)
    }

    /// Sends `request` until it is answered with 200, and returns how long that took.
    ///
    /// # Errors
    /// When it was not within `patience`, with the last thing that was seen and the end of the server's log.
    pub fn wait_until_served(&self, request: &[u8], patience: Duration) -> Result<Duration, String> {
        let start = now();
        let mut last = String::new();
        while start.elapsed() < patience {
            match Connection::new(self.gateway, patience).call(request, Keep::Body) {
                Ok(answer) if answer.status == 200 => return Ok(start.elapsed()),
                Ok(answer) => last = format!("status {}: {}", answer.status, String::from_utf8_lossy(&answer.body)),
                Err(broken) => last = broken.error.to_string(),
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Err(format!("not serving after {patience:?}; last seen: {last}; its log ends: {}", tail(&self.log)))
    }

    /// Runs another subcommand with `--json` and returns the document it printed.
    ///
    /// # Errors
    /// When the command fails or prints no JSON.
    pub fn run(&self, args: &[&str]) -> Result<Value, String> {
        let (config, data) = (self.config.to_string_lossy(), self.data.to_string_lossy());
        let all: Vec<&str> = args.iter().copied().chain(["--json", "--config", &config, "--data", &data]).collect();
        let text = output(&self.binary, &all)?;
        serde_json::from_str(&text).map_err(|error| format!("`{}` printed no JSON ({error}): {text}", args.join(" ")))
    }

    /// The rows of an SQL query.
    ///
    /// # Errors
    /// When the query fails.
    pub fn sql(&self, query: &str) -> Result<Vec<Map<String, Value>>, String> {
        Ok(rows(&self.run(&["sql", query])?))
    }

    /// One number out of a query of one row and one column.
    ///
    /// # Errors
    /// When the query fails or gives something else.
    pub fn count(&self, query: &str) -> Result<u64, String> {
        let rows = self.sql(query)?;
        let cell = rows.first().and_then(|row| row.values().next());
        cell.and_then(whole).ok_or_else(|| format!("`{query}` gave {rows:?}, not one number"))
    }
}

/// Rows in a JSON document: itself when it is a list of objects, else the first such list in it.
fn rows(document: &Value) -> Vec<Map<String, Value>> {
    match document {
        Value::Array(items) => items.iter().filter_map(|item| item.as_object().cloned()).collect(),
        Value::Object(fields) => fields.values().find(|value| value.is_array()).map(rows).unwrap_or_default(),
        _ => Vec::new(),
    }
}

/// A whole number that may be written as text, as amounts and 64-bit counts are in JSON.
#[must_use]
pub fn whole(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_str()?.parse().ok())
}

/// The first boolean of this name anywhere in a document.
#[must_use]
pub fn find_flag(document: &Value, name: &str) -> Option<bool> {
    match document {
        Value::Array(items) => items.iter().find_map(|item| find_flag(item, name)),
        Value::Object(fields) => fields
            .get(name)
            .and_then(Value::as_bool)
            .or_else(|| fields.values().find_map(|value| find_flag(value, name))),
        _ => None,
    }
}

fn find_key(document: &Value) -> Option<String> {
    match document {
        Value::String(text) if text.starts_with("fk-") => Some(text.clone()),
        Value::Array(items) => items.iter().find_map(find_key),
        Value::Object(fields) => fields.values().find_map(find_key),
        _ => None,
    }
}

fn configuration(settings: &Settings, gateway: SocketAddr, admin: SocketAddr, secret: &Path) -> String {
    let Settings { durability, when_log_fails, flush_every_ms, upstream } = settings;
    let secret = secret.display();
    format!(
        r#"[ledger]
durability = "{durability}"
when_log_fails = "{when_log_fails}"
flush_every_ms = {flush_every_ms}

[gateway]
listen = "{gateway}"
anonymous = "never"

[admin]
listen = "{admin}"

[[upstream]]
name = "mock"
kind = "openai"
base_url = "http://{upstream}"
api_key = {{ file = "{secret}" }}
"#
    )
}

/// The last lines of a log file, on one line.
#[must_use]
pub fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().rev().take(5).collect();
    lines.into_iter().rev().collect::<Vec<_>>().join(" / ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn rows_and_keys_are_found_wherever_they_are() {
        let list = json!([{ "n": 3 }]);
        assert_eq!(rows(&list), rows(&json!({ "columns": "n", "rows": list })));
        assert_eq!(whole(&rows(&list)[0]["n"]), Some(3));
        assert_eq!(whole(&json!("18446744073709551615")), Some(u64::MAX));
        assert_eq!(find_key(&json!({ "id": "x", "secret": { "key": "fk-1" } })).as_deref(), Some("fk-1"));
    }
}
