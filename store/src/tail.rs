//! From facts to the rows that are new: sorting by table, dropping duplicates, and the rows that are in the log only.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use arrow::array::RecordBatch;
use ledger::{Attempt, AttemptId, CapacityFact, Fact, Gap, Posting};

use crate::engine::Engine;
use crate::error::StoreError;
use crate::log::{Position, reader};
use crate::memory::{DayKeys, Memory, Recent};
use crate::store::{Inner, View};
use crate::tables::delta::Table;
use crate::tables::existing::{self, RowKey, key_of};
use crate::tables::rows;
use crate::tables::schema::TableName;

/// How often a view is taken again because the flusher overtook it.
const RETRIES_MAX: u32 = 20;

/// Rows of every table that are in none yet.
#[derive(Debug, Default)]
pub(crate) struct Rows {
    pub attempts: Vec<Attempt>,
    /// Derived from attempts, one for each that has an amount.
    pub charges: Vec<Posting>,
    /// Appended as they are.
    pub postings: Vec<Posting>,
    pub capacity: Vec<CapacityFact>,
    pub gaps: Vec<Gap>,
}

impl Rows {
    /// Sorts facts by table, leaving out what each table has passed. A fact that comes twice stays once.
    pub(crate) fn of(facts: impl IntoIterator<Item = (Position, Fact)>, passed: [Position; 4]) -> Rows {
        let mut rows = Rows::default();
        let (mut attempts, mut charges, mut keys) = (HashSet::new(), HashSet::new(), HashSet::new());
        let past = |table: TableName, position| position > passed[table.index()];
        for (position, fact) in facts {
            match fact {
                Fact::Opened(_) => {}
                Fact::Attempt(attempt) => {
                    if past(TableName::Postings, position) && charges.insert(attempt.id) {
                        rows.charges.extend(Posting::of_charge(&attempt));
                    }
                    if past(TableName::Attempts, position) && attempts.insert(attempt.id) {
                        rows.attempts.push(*attempt);
                    }
                }
                Fact::Posting(posting) => {
                    if past(TableName::Postings, position) && keys.insert(posting.id.uuid().as_u128()) {
                        rows.postings.push(*posting);
                    }
                }
                other => {
                    let table = if matches!(other, Fact::Gap(_)) { TableName::Gaps } else { TableName::Capacity };
                    if past(table, position) && keys.insert(key_of(&other)) {
                        match other {
                            Fact::Capacity(capacity) => rows.capacity.push(*capacity),
                            Fact::Gap(gap) => rows.gaps.push(gap),
                            _ => {}
                        }
                    }
                }
            }
        }
        rows
    }

    /// Drops rows that the tables already hold. `memory` spares looking for most of them. Returns how many were dropped.
    pub(crate) async fn drop_held(
        &mut self,
        engine: &Engine,
        tables: &[Option<Table>; 4],
        mut memory: Option<&mut Memory>,
    ) -> Result<u64, StoreError> {
        let before = self.len();
        if let Some(table) = &tables[TableName::Attempts.index()] {
            let asked = self.attempts.iter().map(|row| (row.id, row.timeline.received_at.day()));
            let held = held(engine, table, asked, memory.as_deref().map(|memory| &memory.attempts)).await?;
            self.attempts.retain(|row| !held.contains(&row.id));
        }
        if let Some(table) = &tables[TableName::Postings.index()] {
            let asked = self.charges.iter().filter_map(|row| Some((row.attempt?, row.period.start.day())));
            let held = held(engine, table, asked, memory.as_deref().map(|memory| &memory.charges)).await?;
            self.charges.retain(|row| row.attempt.is_none_or(|id| !held.contains(&id)));
            let cache = memory.as_deref_mut().map(|memory| &mut memory.postings);
            drop_keys(
                engine,
                table,
                &mut self.postings,
                |row| (row.period.start.day(), row.id.uuid().as_u128()),
                cache,
            )
            .await?;
        }
        if let Some(table) = &tables[TableName::Capacity.index()] {
            let cache = memory.as_deref_mut().map(|memory| &mut memory.capacity);
            drop_keys(engine, table, &mut self.capacity, capacity_key, cache).await?;
        }
        if let Some(table) = &tables[TableName::Gaps.index()] {
            let cache = memory.map(|memory| &mut memory.gaps);
            drop_keys(engine, table, &mut self.gaps, gap_key, cache).await?;
        }
        Ok(u64::try_from(before - self.len()).unwrap_or(0))
    }

    /// Rows that were committed to `table` are remembered.
    pub(crate) fn note(&self, table: TableName, memory: &mut Memory) {
        match table {
            TableName::Attempts => memory.attempts.note(self.attempts.iter().map(|row| row.id)),
            TableName::Postings => {
                memory.charges.note(self.charges.iter().filter_map(|row| row.attempt));
                self.postings
                    .iter()
                    .for_each(|row| memory.postings.note(row.period.start.day(), row.id.uuid().as_u128()));
            }
            TableName::Capacity => {
                self.capacity.iter().map(capacity_key).for_each(|(day, key)| memory.capacity.note(day, key))
            }
            TableName::Gaps => self.gaps.iter().map(gap_key).for_each(|(day, key)| memory.gaps.note(day, key)),
        }
    }

    /// The rows of one table.
    pub(crate) fn batch(&self, table: TableName) -> Result<RecordBatch, StoreError> {
        match table {
            TableName::Attempts => rows::attempts(&self.attempts),
            TableName::Postings if self.postings.is_empty() => rows::postings(&self.charges),
            TableName::Postings => rows::postings(&[&self.charges[..], &self.postings[..]].concat()),
            TableName::Capacity => rows::capacity(&self.capacity),
            TableName::Gaps => rows::gaps(&self.gaps),
        }
    }

    fn len(&self) -> usize {
        self.attempts.len() + self.charges.len() + self.postings.len() + self.capacity.len() + self.gaps.len()
    }
}

fn capacity_key(row: &CapacityFact) -> (i32, RowKey) {
    (row.period.start.day(), key_of(&Fact::Capacity(Box::new(row.clone()))))
}

fn gap_key(row: &Gap) -> (i32, RowKey) {
    (row.period.start.day(), key_of(&Fact::Gap(row.clone())))
}

/// Which attempts a table holds, asking the table only for those that memory does not know.
async fn held(
    engine: &Engine,
    table: &Table,
    asked: impl Iterator<Item = (AttemptId, i32)>,
    recent: Option<&Recent>,
) -> Result<HashSet<AttemptId>, StoreError> {
    let (mut held, mut unsure, mut days) = (HashSet::new(), Vec::new(), BTreeSet::new());
    for (id, day) in asked {
        match recent.and_then(|recent| recent.holds(id)) {
            Some(true) => {
                held.insert(id);
            }
            Some(false) => {}
            None => {
                unsure.push(id);
                days.insert(day);
            }
        }
    }
    if !unsure.is_empty() {
        held.extend(existing::attempts(engine, table, &unsure, &days).await?);
    }
    Ok(held)
}

async fn drop_keys<T>(
    engine: &Engine,
    table: &Table,
    rows: &mut Vec<T>,
    key: impl Fn(&T) -> (i32, RowKey),
    cache: Option<&mut DayKeys>,
) -> Result<(), StoreError> {
    let days: BTreeSet<i32> = rows.iter().map(|row| key(row).0).collect();
    let mut held: BTreeMap<i32, HashSet<RowKey>> = BTreeMap::new();
    let mut cache = cache;
    for day in days {
        let keys = match cache.as_deref().and_then(|cache| cache.get(day)) {
            Some(keys) => keys.clone(),
            None => {
                let keys = existing::keys_of_day(engine, table, day).await?;
                if let Some(cache) = cache.as_deref_mut() {
                    cache.put(day, keys.clone());
                }
                keys
            }
        };
        held.insert(day, keys);
    }
    rows.retain(|row| {
        let (day, key) = key(row);
        !held.get(&day).is_some_and(|keys| keys.contains(&key))
    });
    Ok(())
}

/// A view of all tables and the rows that are only in the log, both as of one moment.
pub(crate) async fn united(inner: &Inner) -> Result<(std::sync::Arc<View>, Rows), StoreError> {
    let mut tries = 0;
    loop {
        let view = inner.view().await?;
        let passed = view.passed();
        let after = passed.iter().copied().min().unwrap_or_default();
        let through = inner.newest_position();
        let folder = inner.log_folder();
        let (facts, found) = if after >= through {
            Default::default()
        } else {
            tokio::task::spawn_blocking(move || reader::facts(&folder, after, through))
                .await
                .map_err(|error| StoreError::io("read the log")(std::io::Error::other(error)))??
        };
        if found.vanished && tries < RETRIES_MAX && inner.has_moved(&view).await? {
            tries += 1;
            continue;
        }
        let mut rows = Rows::of(facts, passed);
        rows.drop_held(&inner.engine, &view.tables, None).await?;
        return Ok((view, rows));
    }
}
