//! The kill switch: who may not be told anything. Turned by the API, kept in the ledger's folder, and held by a file for whoever
//! has no API at hand.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context as _;
use gateway::Deployment;
use serde::{Deserialize, Serialize};

/// The file of the ledger's folder that keeps what the API said.
const FILE: &str = "scaling.json";

/// The switch. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub struct Switch(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    stopped: Mutex<Stopped>,
    file: PathBuf,
    held_by: Option<PathBuf>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Stopped {
    /// Everything is.
    all: bool,
    /// These are: pool and deployment.
    deployments: BTreeSet<(String, String)>,
}

/// Why nothing is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// The API said so.
    Api,
    /// The file is there.
    File,
}

impl Switch {
    /// The switch as it was left in the folder `data`. While the file `held_by` exists everything is stopped.
    ///
    /// # Errors
    /// When what was kept cannot be read.
    pub fn open(data: &Path, held_by: Option<PathBuf>) -> anyhow::Result<Switch> {
        let file = data.join(FILE);
        let stopped = match std::fs::read(&file) {
            Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| format!("{} is damaged", file.display()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Stopped::default(),
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", file.display())),
        };
        Ok(Switch(Arc::new(Inner { stopped: Mutex::new(stopped), file, held_by })))
    }

    /// Why this deployment is stopped, if it is.
    #[must_use]
    pub fn stopped(&self, of: &Deployment) -> Option<Why> {
        // A file that cannot be looked at may well be there.
        if self.0.held_by.as_deref().is_some_and(|file| file.try_exists().unwrap_or(true)) {
            return Some(Why::File);
        }
        let stopped = self.lock();
        (stopped.all || stopped.deployments.contains(&key(of))).then_some(Why::Api)
    }

    /// Stops one deployment, or everything. Taken when it returns: a restart does not forget it.
    ///
    /// # Errors
    /// When it cannot be kept. It is stopped all the same.
    pub fn stop(&self, of: Option<&Deployment>) -> std::io::Result<()> {
        let mut stopped = self.lock();
        match of {
            Some(of) => {
                stopped.deployments.insert(key(of));
            }
            None => stopped.all = true,
        }
        keep(&self.0.file, &stopped)
    }

    /// Lets one deployment act again, or everything.
    ///
    /// # Errors
    /// When it cannot be kept. Nothing has changed then.
    pub fn resume(&self, of: Option<&Deployment>) -> std::io::Result<()> {
        let mut stopped = self.lock();
        let mut after = stopped.clone();
        match of {
            Some(of) => {
                after.deployments.remove(&key(of));
            }
            None => after = Stopped::default(),
        }
        keep(&self.0.file, &after)?;
        *stopped = after;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Stopped> {
        self.0.stopped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn key(of: &Deployment) -> (String, String) {
    (of.pool.to_string(), of.name.to_string())
}

/// Replaces the file as a whole: a crash leaves the old one or the new one.
fn keep(file: &Path, stopped: &Stopped) -> std::io::Result<()> {
    use std::io::Write;
    let fresh = file.with_extension("json.new");
    let mut written = std::fs::File::create(&fresh)?;
    written.write_all(&serde_json::to_vec(stopped)?)?;
    written.sync_all()?;
    std::fs::rename(&fresh, file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_stopped_stays_so_until_somebody_says_otherwise() {
        let data = tempfile::tempdir().unwrap();
        let chat = Deployment { pool: "shared".into(), name: "chat".into() };
        let batch = Deployment { name: "batch".into(), ..chat.clone() };
        let file = data.path().join("stop");
        let open = || Switch::open(data.path(), Some(file.clone())).unwrap();
        let switch = open();
        assert_eq!(switch.stopped(&chat), None);
        switch.stop(Some(&chat)).unwrap();
        assert_eq!((open().stopped(&chat), open().stopped(&batch)), (Some(Why::Api), None));
        switch.stop(None).unwrap();
        assert_eq!(open().stopped(&batch), Some(Why::Api));
        switch.resume(None).unwrap();
        assert_eq!((open().stopped(&chat), switch.stopped(&batch)), (None, None));
        std::fs::write(&file, "").unwrap();
        assert_eq!(switch.stopped(&batch), Some(Why::File));
        switch.resume(None).unwrap();
        assert_eq!(switch.stopped(&batch), Some(Why::File), "the file holds it");
        std::fs::remove_file(&file).unwrap();
        assert_eq!(switch.stopped(&batch), None);
    }

    #[test]
    fn a_damaged_file_is_told() {
        let data = tempfile::tempdir().unwrap();
        std::fs::write(data.path().join(FILE), "{").unwrap();
        assert!(Switch::open(data.path(), None).unwrap_err().to_string().contains("is damaged"));
    }
}
