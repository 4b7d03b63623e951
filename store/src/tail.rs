//! From facts to the rows that are new: sorting by table, dropping duplicates, and the rows that are in the log only.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use arrow::array::RecordBatch;
use ledger::{Attempt, AttemptId, Fact, Posting, Timestamp};

use crate::engine::Engine;
use crate::error::StoreError;
use crate::log::{Position, reader};
use crate::memory::{Memory, Recent};
use crate::store::{Inner, View};
use crate::tables::delta::Table;
use crate::tables::existing::{self, time_and_key};
use crate::tables::facts::{self, RowKey};
use crate::tables::rows;
use crate::tables::schema::{PerTable, TableName};

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
    /// Facts that are rows as they are.
    pub facts: BTreeMap<TableName, Vec<Fact>>,
}

impl Rows {
    /// Sorts facts by table, leaving out what each table has passed. A fact that comes twice stays once.
    pub(crate) fn of(facts: impl IntoIterator<Item = (Position, Fact)>, passed: PerTable<Position>) -> Rows {
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
                    let Some(table) = facts::table_of(&other).filter(|&table| past(table, position)) else { continue };
                    if time_and_key(&other).is_some_and(|(_, key)| keys.insert(key)) {
                        rows.facts.entry(table).or_default().push(other);
                    }
                }
            }
        }
        rows
    }

    /// Drops rows that the tables already hold. `memory` spares looking for most of them. Returns how many were dropped
    /// that do not follow from others.
    pub(crate) async fn drop_held(
        &mut self,
        engine: &Engine,
        tables: &PerTable<Option<Table>>,
        memory: Option<&Memory>,
    ) -> Result<u64, StoreError> {
        let before = self.brought();
        if let Some(table) = &tables[TableName::Attempts.index()] {
            let asked = self.attempts.iter().map(|row| (row.id, row.timeline.received_at.day()));
            let held = held(engine, table, asked, memory.map(|memory| &memory.attempts)).await?;
            self.attempts.retain(|row| !held.contains(&row.id));
        }
        if let Some(table) = &tables[TableName::Postings.index()] {
            let asked = self.charges.iter().filter_map(|row| Some((row.attempt?, row.period.start.day())));
            let held = held(engine, table, asked, memory.map(|memory| &memory.charges)).await?;
            self.charges.retain(|row| row.attempt.is_none_or(|id| !held.contains(&id)));
            let of = |row: &Posting| (row.period.start, row.id.uuid().as_u128());
            drop_keys(engine, table, &mut self.postings, of).await?;
        }
        for (name, facts) in &mut self.facts {
            if let Some(table) = &tables[name.index()] {
                drop_keys(engine, table, facts, |fact| time_and_key(fact).unwrap_or_default()).await?;
            }
        }
        Ok(u64::try_from(before - self.brought()).unwrap_or(0))
    }

    /// Rows that were committed to `table` are remembered.
    pub(crate) fn note(&self, table: TableName, memory: &mut Memory) {
        match table {
            TableName::Attempts => memory.attempts.note(self.attempts.iter().map(|row| row.id)),
            TableName::Postings => memory.charges.note(self.charges.iter().filter_map(|row| row.attempt)),
            _ => {}
        }
    }

    /// The rows of one table.
    pub(crate) fn batch(&self, table: TableName) -> Result<RecordBatch, StoreError> {
        match table {
            TableName::Attempts => rows::attempts(&self.attempts),
            TableName::Postings if self.postings.is_empty() => rows::postings(&self.charges),
            TableName::Postings => rows::postings(&[&self.charges[..], &self.postings[..]].concat()),
            facts => facts::batch(facts, self.facts.get(&facts).map_or(&[], Vec::as_slice)),
        }
    }

    /// How many rows there are, those that follow from others left out.
    pub(crate) fn brought(&self) -> usize {
        self.attempts.len() + self.postings.len() + self.facts.values().map(Vec::len).sum::<usize>()
    }
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
    of: impl Fn(&T) -> (Timestamp, RowKey),
) -> Result<(), StoreError> {
    let asked: Vec<(Timestamp, RowKey)> = rows.iter().map(of).collect();
    let held = existing::keys(engine, table, &asked).await?;
    let mut asked = asked.into_iter();
    rows.retain(|_| asked.next().is_none_or(|(_, key)| !held.contains(&key)));
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
