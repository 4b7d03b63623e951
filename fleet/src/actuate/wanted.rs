//! How many replicas there should be, for those who ask rather than being told.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ledger::{Label, Timestamp};
use tokio::sync::watch;

/// What was decided for each deployment, and how long that holds. Clones share it.
#[derive(Debug, Clone)]
pub struct Wanted {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    stale_after: Duration,
    /// By deployment and pool.
    table: Mutex<BTreeMap<(Label, Label), Entry>>,
    changes: watch::Sender<()>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    told: Option<(u32, Timestamp)>,
    held: u64,
}

/// What is known of a deployment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// Replicas that there should be.
    pub replicas: u32,
    /// Requests that wait because there is no replica.
    pub held: u64,
}

/// Why nothing can be said. None of these means zero replicas.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unknown {
    /// No such deployment is scaled here.
    #[error("no deployment `{deployment}` is scaled here{}; it is the `deployment` of a [[scale]]", in_pool(.pool.as_deref()))]
    Nobody {
        /// The name asked for.
        deployment: String,
        /// The pool asked for.
        pool: Option<String>,
    },
    /// Several pools have a deployment of this name.
    #[error("several pools have a deployment `{0}`; name one as `pool` in the trigger's metadata")]
    Several(String),
    /// Nothing was decided that is to be carried out.
    #[error("nothing was decided yet for `{0}`, or it is not in mode \"act\"")]
    Undecided(String),
    /// What was decided is too old.
    #[error("the last decision for `{deployment}` is {age_s} s old")]
    Stale {
        /// The deployment.
        deployment: String,
        /// Seconds since it was decided.
        age_s: u64,
    },
}

fn in_pool(pool: Option<&str>) -> String {
    pool.map(|pool| format!(" in pool `{pool}`")).unwrap_or_default()
}

impl Wanted {
    /// A table without deployments. What was told longer ago than `stale_after` is not known any more.
    #[must_use]
    pub fn new(stale_after: Duration) -> Wanted {
        let shared = Shared { stale_after, table: Mutex::default(), changes: watch::channel(()).0 };
        Wanted { shared: Arc::new(shared) }
    }

    /// Makes a deployment known, of which nothing was decided yet.
    pub fn declare(&self, pool: &str, deployment: &str) {
        self.change(pool, deployment, |_| ());
    }

    /// Says how many replicas there should be. `now` is the moment of the decision.
    pub fn tell(&self, pool: &str, deployment: &str, replicas: u32, now: Timestamp) {
        self.change(pool, deployment, |entry| entry.told = Some((replicas, now)));
    }

    /// Takes back what was told, so that whoever asks is told that nothing is known.
    pub fn forget(&self, pool: &str, deployment: &str) {
        self.change(pool, deployment, |entry| entry.told = None);
    }

    /// Says how many requests wait because there is no replica.
    pub fn hold(&self, pool: &str, deployment: &str, held: u64) {
        self.change(pool, deployment, |entry| entry.held = held);
    }

    /// What is known of a deployment; its pool may be left out where one pool only has it.
    ///
    /// # Errors
    /// When nothing is known.
    pub fn standing(&self, pool: Option<&str>, deployment: &str, now: Timestamp) -> Result<Standing, Unknown> {
        let entry = self.entry(pool, deployment)?;
        let (replicas, at) = entry.told.ok_or_else(|| Unknown::Undecided(deployment.to_owned()))?;
        let age = Duration::from_micros(now.micros_since(at));
        if age > self.shared.stale_after {
            return Err(Unknown::Stale { deployment: deployment.to_owned(), age_s: age.as_secs() });
        }
        Ok(Standing { replicas, held: entry.held })
    }

    /// Whether a deployment is scaled here.
    ///
    /// # Errors
    /// When it is not, or more than one is meant.
    pub fn known(&self, pool: Option<&str>, deployment: &str) -> Result<(), Unknown> {
        self.entry(pool, deployment).map(|_| ())
    }

    /// Wakes up whenever anything was said.
    pub(super) fn changes(&self) -> watch::Receiver<()> {
        self.shared.changes.subscribe()
    }

    fn entry(&self, pool: Option<&str>, deployment: &str) -> Result<Entry, Unknown> {
        let table = self.table();
        let mut found = table
            .iter()
            .filter(|((name, of), _)| &**name == deployment && pool.is_none_or(|pool| pool == &**of))
            .map(|(_, entry)| *entry);
        let nobody = || Unknown::Nobody { deployment: deployment.to_owned(), pool: pool.map(str::to_owned) };
        let entry = found.next().ok_or_else(nobody)?;
        if found.next().is_some() { Err(Unknown::Several(deployment.to_owned())) } else { Ok(entry) }
    }

    fn change(&self, pool: &str, deployment: &str, change: impl FnOnce(&mut Entry)) {
        change(self.table().entry((deployment.into(), pool.into())).or_default());
        self.shared.changes.send_replace(());
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<(Label, Label), Entry>> {
        // Nothing panics while it is locked, and each entry is whole at any time.
        self.shared.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_decided_is_not_zero() {
        let wanted = Wanted::new(Duration::from_secs(30));
        let at = Timestamp::from_micros;
        let asked = |pool, now| wanted.standing(pool, "chat", at(now)).map(|standing| standing.replicas);
        assert!(matches!(asked(None, 0), Err(Unknown::Nobody { .. })));
        wanted.declare("shared", "chat");
        assert_eq!(asked(None, 0), Err(Unknown::Undecided("chat".to_owned())));
        wanted.tell("shared", "chat", 0, at(0));
        assert_eq!(asked(None, 30_000_000), Ok(0), "zero because it was decided");
        assert_eq!(asked(None, 30_000_001), Err(Unknown::Stale { deployment: "chat".to_owned(), age_s: 30 }));
        wanted.tell("shared", "chat", 4, at(40_000_000));
        assert_eq!(asked(Some("shared"), 50_000_000), Ok(4));
        assert!(matches!(asked(Some("other"), 50_000_000), Err(Unknown::Nobody { pool: Some(_), .. })));
        wanted.declare("other", "chat");
        assert_eq!(asked(None, 50_000_000), Err(Unknown::Several("chat".to_owned())));
        assert_eq!(asked(Some("other"), 50_000_000), Err(Unknown::Undecided("chat".to_owned())));
        wanted.forget("shared", "chat");
        assert_eq!(asked(Some("shared"), 50_000_000), Err(Unknown::Undecided("chat".to_owned())));
    }
}
