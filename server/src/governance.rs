//! Keys and prices as the fold of the control log, and the changes that are written to it.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, bail};
use gateway::keys::{KeyRecord, KeyRing};
use ledger::price::Imported;
use ledger::{KeyId, Timestamp};
use store::{ControlLog, Entry};

/// The kind of entries that hold a key.
pub const KEY: &str = "key";
/// The kind of entries that hold an imported price map.
pub const PRICE_MAP: &str = "price_map";

/// What the control log says up to an entry.
#[derive(Debug, Clone, Default)]
pub struct Governance {
    /// The number of the last entry that was folded in.
    pub through: u64,
    /// Every key that was ever made, by id.
    pub keys: BTreeMap<KeyId, KeyRecord>,
    /// The newest imported price map.
    pub price_map: Option<Imported>,
}

impl Governance {
    /// Reads the whole control log.
    ///
    /// # Errors
    /// When it cannot be read, its chain is broken, or an entry is not what its kind says.
    pub async fn load(log: &ControlLog) -> anyhow::Result<Governance> {
        let mut state = Governance::default();
        state.fold(log.load().await?)?;
        Ok(state)
    }

    /// Folds in what was added since; whether anything was.
    ///
    /// # Errors
    /// As [`Governance::load`].
    pub async fn catch_up(&mut self, log: &ControlLog) -> anyhow::Result<bool> {
        let entries = log.load_after(self.through).await?;
        let news = !entries.is_empty();
        self.fold(entries)?;
        Ok(news)
    }

    fn fold(&mut self, entries: Vec<Entry>) -> anyhow::Result<()> {
        for entry in entries {
            let place = || format!("control log entry {} ({})", entry.number, entry.kind);
            match entry.kind.as_str() {
                KEY => {
                    let record: KeyRecord = serde_json::from_value(entry.body.clone()).with_context(place)?;
                    self.keys.insert(record.id, record);
                }
                PRICE_MAP => self.price_map = Some(serde_json::from_value(entry.body.clone()).with_context(place)?),
                // Kinds of later versions (budgets, policies) are theirs to read.
                _ => {}
            }
            self.through = entry.number;
        }
        Ok(())
    }

    /// The keys as the gateway looks them up.
    #[must_use]
    pub fn key_ring(&self, secret: [u8; 32]) -> KeyRing {
        KeyRing::new(secret, self.keys.values().cloned())
    }

    /// Keys that count at `now`.
    #[must_use]
    pub fn valid_keys(&self, now: Timestamp) -> usize {
        self.keys.values().filter(|key| key.is_valid_at(now)).count()
    }

    /// The key with this id, or the one whose id starts like this when only one does.
    ///
    /// # Errors
    /// When there is none, or more than one.
    pub fn key(&self, id: &str) -> anyhow::Result<&KeyRecord> {
        let mut like = self.keys.values().filter(|key| key.id.to_string().starts_with(id));
        match (like.next(), like.next()) {
            (Some(key), None) => Ok(key),
            (None, _) => bail!("there is no key `{id}`; `farthing key list` shows them"),
            (Some(_), Some(_)) => bail!("several keys start with `{id}`; write more of it"),
        }
    }
}

/// Writes a key's record to the control log.
///
/// # Errors
/// When the log cannot be written.
pub async fn put_key(log: &ControlLog, record: &KeyRecord, author: &str, now: Timestamp) -> anyhow::Result<()> {
    log.append(KEY, serde_json::to_value(record)?, author, now).await?;
    Ok(())
}

/// The installation's secret that key hashes are made with; made on first use, readable by its owner alone.
///
/// # Errors
/// When the file cannot be read or written, or is not ours.
pub fn hashing_secret(data: &Path) -> anyhow::Result<[u8; 32]> {
    let path = data.join("secret");
    match std::fs::read_to_string(&path) {
        Ok(text) => from_hex(text.trim()).with_context(|| format!("{} is not a secret of Farthing's", path.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => make_secret(data, &path),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

fn make_secret(data: &Path, path: &Path) -> anyhow::Result<[u8; 32]> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;

    std::fs::create_dir_all(data).with_context(|| format!("cannot create {}", data.display()))?;
    let secret = random::<32>()?;
    // Linked into place whole, so that two processes that start at once agree on one secret.
    let draft = data.join(format!("secret.{}", std::process::id()));
    let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
    file.write_all(blake3::Hash::from_bytes(secret).to_hex().as_bytes())?;
    file.sync_all()?;
    let linked = std::fs::hard_link(&draft, path);
    std::fs::remove_file(&draft)?;
    match linked {
        Ok(()) => Ok(secret),
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => hashing_secret(data),
        Err(error) => Err(error).with_context(|| format!("cannot create {}", path.display())),
    }
}

fn from_hex(text: &str) -> anyhow::Result<[u8; 32]> {
    Ok(*blake3::Hash::from_hex(text)?.as_bytes())
}

/// Random bytes from the operating system.
///
/// # Errors
/// When it has none.
pub fn random<const N: usize>() -> anyhow::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| anyhow::anyhow!("the system gives no random bytes: {error}"))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_secret_is_made_once_and_is_private() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        let secret = hashing_secret(&data).unwrap();
        assert_eq!(hashing_secret(&data).unwrap(), secret);
        let mode = std::fs::metadata(data.join("secret")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        std::fs::write(data.join("secret"), "not hex").unwrap();
        assert!(hashing_secret(&data).is_err());
    }

    #[test]
    fn keys_are_found_by_the_start_of_their_id() {
        let mut state = Governance::default();
        for random in [[1; 10], [2; 10]] {
            let id = KeyId::new(Timestamp::from_micros(0), random);
            let (_, hash) = gateway::keys::mint([random[0]; 32], &[0; 32]);
            state.keys.insert(id, KeyRecord::new(id, hash));
        }
        let first = state.keys.keys().next().unwrap().to_string();
        assert_eq!(state.key(&first).unwrap().id.to_string(), first);
        assert!(state.key("00000000").unwrap_err().to_string().contains("several"));
        assert!(state.key("ffff").unwrap_err().to_string().contains("no key"));
    }
}
