//! The control log: keys, prices and policies change by numbered small objects, each created only if it is absent and
//! each carrying the hash of the one before. The state is their fold, and the log is the audit log.

use std::sync::Arc;

use futures_util::{StreamExt, TryStreamExt, stream};
use ledger::Timestamp;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutPayload};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::StoreError;

/// How often an append is tried again when others append at the same time.
const RACES_MAX: u32 = 64;
/// Objects read at once when loading.
const READS_AT_ONCE: usize = 16;

/// One change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Counts from 1 without holes.
    pub number: u64,
    /// The hash of the entry before, empty for the first.
    pub previous: String,
    /// When it was made.
    pub at: Timestamp,
    /// Who made it.
    pub author: String,
    /// What kind of change it is, such as `key_created`.
    pub kind: String,
    /// The change.
    pub body: Value,
    /// BLAKE3 of everything above, as 64 hexadecimal digits.
    pub hash: String,
}

impl Entry {
    /// The hash that this entry should carry. Fields are separated by their lengths, so that no two entries look alike.
    #[must_use]
    pub fn expected_hash(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        let body = self.body.to_string();
        let (number, at) = (self.number.to_string(), self.at.micros().to_string());
        for field in [&number, &self.previous, &at, &self.author, &self.kind, &body] {
            hasher.update(field.len().to_string().as_bytes());
            hasher.update(b":");
            hasher.update(field.as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }
}

/// The control log of one ledger. Cheap to clone; several processes may append to one log.
#[derive(Debug, Clone)]
pub struct ControlLog {
    objects: Arc<dyn ObjectStore>,
    writable: bool,
}

impl ControlLog {
    /// The log kept under `control/` of `objects`.
    #[must_use]
    pub fn new(objects: Arc<dyn ObjectStore>, writable: bool) -> ControlLog {
        ControlLog { objects, writable }
    }

    /// Appends a change, after whatever others append meanwhile.
    ///
    /// # Errors
    /// [`StoreError::ReadOnly`], [`StoreError::Io`], [`StoreError::ChainBroken`] when the newest entry does not fit its own hash.
    pub async fn append(&self, kind: &str, body: Value, author: &str, now: Timestamp) -> Result<Entry, StoreError> {
        let mut newest = self.newest().await?;
        for _ in 0..RACES_MAX {
            match self.put(newest.as_ref(), kind, body.clone(), author, now).await {
                Err(StoreError::Conflict { .. }) => newest = self.newest().await?,
                outcome => return outcome,
            }
        }
        Err(StoreError::Conflict { newest: newest.map_or(0, |entry| entry.number) })
    }

    /// Appends a change only if the newest entry is still number `after` (0 for an empty log).
    ///
    /// # Errors
    /// [`StoreError::Conflict`] when it is not; else as [`append`](ControlLog::append).
    pub async fn append_after(
        &self,
        after: u64,
        kind: &str,
        body: Value,
        author: &str,
        now: Timestamp,
    ) -> Result<Entry, StoreError> {
        let newest = self.newest().await?;
        let number = newest.as_ref().map_or(0, |entry| entry.number);
        if number != after {
            return Err(StoreError::Conflict { newest: number });
        }
        self.put(newest.as_ref(), kind, body, author, now).await
    }

    /// Every entry in order.
    ///
    /// # Errors
    /// [`StoreError::ChainBroken`] at the first entry that is missing, changed or does not carry the hash of the one before.
    pub async fn load(&self) -> Result<Vec<Entry>, StoreError> {
        let entries = self.read(0).await?;
        check_chain(&entries)?;
        Ok(entries)
    }

    /// The entries after `number`, for those who already have the rest.
    ///
    /// # Errors
    /// As [`load`](ControlLog::load), for what is read.
    pub async fn load_after(&self, number: u64) -> Result<Vec<Entry>, StoreError> {
        let mut entries = self.read(number.saturating_sub(1)).await?;
        check_links(&entries)?;
        entries.retain(|entry| entry.number > number);
        Ok(entries)
    }

    async fn put(
        &self,
        newest: Option<&Entry>,
        kind: &str,
        body: Value,
        author: &str,
        now: Timestamp,
    ) -> Result<Entry, StoreError> {
        if !self.writable {
            return Err(StoreError::ReadOnly);
        }
        let mut entry = Entry {
            number: newest.map_or(0, |entry| entry.number) + 1,
            previous: newest.map(|entry| entry.hash.clone()).unwrap_or_default(),
            at: now,
            author: author.to_owned(),
            kind: kind.to_owned(),
            body,
            hash: String::new(),
        };
        entry.hash = entry.expected_hash();
        let bytes = serde_json::to_vec(&entry).map_err(|error| StoreError::corrupt("a control entry", error))?;
        match self.objects.put_opts(&path_of(entry.number), PutPayload::from(bytes), PutMode::Create.into()).await {
            Ok(_) => Ok(entry),
            Err(object_store::Error::AlreadyExists { .. }) => Err(StoreError::Conflict { newest: entry.number }),
            Err(error) => Err(error.into()),
        }
    }

    async fn newest(&self) -> Result<Option<Entry>, StoreError> {
        let Some(number) = self.numbers(0).await?.into_iter().max() else { return Ok(None) };
        let entry = self.get(number).await?;
        check_links(std::slice::from_ref(&entry))?;
        Ok(Some(entry))
    }

    async fn read(&self, after: u64) -> Result<Vec<Entry>, StoreError> {
        let mut numbers = self.numbers(after).await?;
        numbers.sort_unstable();
        stream::iter(numbers).map(|number| self.get(number)).buffered(READS_AT_ONCE).try_collect().await
    }

    async fn numbers(&self, after: u64) -> Result<Vec<u64>, StoreError> {
        let folder = Path::from("control");
        let listed: Vec<_> = self.objects.list(Some(&folder)).try_collect().await?;
        let number = |path: &Path| path.filename()?.strip_suffix(".json")?.parse::<u64>().ok();
        Ok(listed.iter().filter_map(|object| number(&object.location)).filter(|&number| number > after).collect())
    }

    async fn get(&self, number: u64) -> Result<Entry, StoreError> {
        let bytes = self.objects.get(&path_of(number)).await?.bytes().await?;
        serde_json::from_slice(&bytes).map_err(|error| broken(number, format!("it cannot be read: {error}")))
    }
}

/// Checks a whole log: numbers from 1 without holes, hashes, links.
fn check_chain(entries: &[Entry]) -> Result<(), StoreError> {
    match entries.first() {
        Some(first) if first.number != 1 => return Err(broken(1, "it is missing")),
        Some(first) if !first.previous.is_empty() => return Err(broken(1, "it refers to an entry before the first")),
        _ => {}
    }
    check_links(entries)
}

fn check_links(entries: &[Entry]) -> Result<(), StoreError> {
    for entry in entries {
        if entry.hash != entry.expected_hash() {
            return Err(broken(entry.number, "its content does not match its hash"));
        }
    }
    for pair in entries.windows(2) {
        let [before, after] = pair else { continue };
        if after.number != before.number + 1 {
            return Err(broken(before.number + 1, "it is missing"));
        }
        if after.previous != before.hash {
            return Err(broken(after.number, "it does not follow the entry before it"));
        }
    }
    Ok(())
}

fn broken(number: u64, reason: impl Into<String>) -> StoreError {
    StoreError::ChainBroken { number, reason: reason.into() }
}

fn path_of(number: u64) -> Path {
    Path::from(format!("control/{number:020}.json"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use object_store::memory::InMemory;
    use serde_json::json;

    fn at(micros: i64) -> Timestamp {
        Timestamp::from_micros(micros)
    }

    async fn filled() -> (Arc<InMemory>, ControlLog) {
        let objects = Arc::new(InMemory::new());
        let log = ControlLog::new(objects.clone(), true);
        for number in 1..=3 {
            log.append("key_created", json!({ "key": number }), "ada", at(number)).await.unwrap();
        }
        (objects, log)
    }

    #[tokio::test]
    async fn entries_come_back_in_order_and_chained() {
        let (_, log) = filled().await;
        let entries = log.load().await.unwrap();
        assert_eq!(entries.iter().map(|entry| entry.number).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(entries[1].previous, entries[0].hash);
        assert_eq!(log.load_after(2).await.unwrap(), entries[2..]);
        assert_eq!(log.load_after(3).await.unwrap(), []);
    }

    #[tokio::test]
    async fn a_changed_or_missing_object_is_detected() {
        for victim in 1..=3u64 {
            let (objects, log) = filled().await;
            let mut entry = log.get(victim).await.unwrap();
            entry.author = "mallory".to_owned();
            let bytes = serde_json::to_vec(&entry).unwrap();
            objects.put(&path_of(victim), bytes.into()).await.unwrap();
            assert!(matches!(log.load().await, Err(StoreError::ChainBroken { number, .. }) if number == victim));
            // Even with a hash of its own that fits, the next entry does not follow it.
            entry.hash = entry.expected_hash();
            objects.put(&path_of(victim), serde_json::to_vec(&entry).unwrap().into()).await.unwrap();
            let broken = log.load().await;
            assert_eq!(broken.is_err(), victim < 3, "{victim}");
        }
        let (objects, log) = filled().await;
        objects.delete(&path_of(2)).await.unwrap();
        assert!(matches!(log.load().await, Err(StoreError::ChainBroken { number: 2, .. })));
    }

    #[tokio::test]
    async fn many_writers_take_turns_and_a_stale_decision_is_refused() {
        let (_, log) = filled().await;
        let appends = (0..20).map(|number| {
            let log = log.clone();
            tokio::spawn(async move { log.append("price_set", json!(number), "bob", at(9)).await })
        });
        for append in appends.collect::<Vec<_>>() {
            append.await.unwrap().unwrap();
        }
        assert_eq!(log.load().await.unwrap().len(), 23);
        let stale = log.append_after(3, "price_set", json!(1), "bob", at(9)).await;
        assert!(matches!(stale, Err(StoreError::Conflict { newest: 23 })));
    }
}
