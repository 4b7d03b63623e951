//! Which of some ids a table already holds, reading as few files and pages as the ids' times allow.

use std::collections::{BTreeSet, HashSet};

use arrow::array::RecordBatch;
use datafusion::common::ScalarValue;
use datafusion::dataframe::DataFrame;
use datafusion::prelude::{Expr, col, lit};
use futures_util::TryStreamExt;
use ledger::{AttemptId, Fact, PostingId, RequestId, Timestamp};

use crate::engine::Engine;
use crate::error::StoreError;
use crate::tables::delta::Table;
use crate::tables::facts::{self, RowKey};
use crate::tables::read;
use crate::tables::schema::{DAY, TableName};

/// Up to this many ids are looked for by name; more are found by reading the range they span.
const NAMED_MAX: usize = 500;

/// Rows further apart in time than this are looked for apart, in microseconds.
const APART_US: u64 = 600_000_000;
/// Stretches of time that are looked at one by one; more are looked at as one.
const STRETCHES_MAX: usize = 32;

/// When a posting or a fact with a table of its own is found, and its key.
pub(crate) fn time_and_key(fact: &Fact) -> Option<(Timestamp, RowKey)> {
    match fact {
        Fact::Posting(posting) => Some((posting.period.start, posting_key(posting.id))),
        other => facts::time_and_key(other),
    }
}

/// Those of `ids` that have a row in `table`: an attempt, or the posting of an attempt's charge.
pub(crate) async fn attempts(
    engine: &Engine,
    table: &Table,
    ids: &[AttemptId],
    days: &BTreeSet<i32>,
) -> Result<HashSet<AttemptId>, StoreError> {
    // Ids beyond the newest one in the table are new without looking.
    let asked: HashSet<AttemptId> = ids.iter().copied().filter(|id| Some(id.request) <= table.newest).collect();
    let (Some(first), Some(last)) = (asked.iter().min(), asked.iter().max()) else { return Ok(HashSet::new()) };
    let text = |id: RequestId| lit(id.to_string());
    let mut wanted = if asked.len() <= NAMED_MAX {
        col("request_id").in_list(asked.iter().map(|id| text(id.request)).collect(), false)
    } else {
        col("request_id").between(text(first.request), text(last.request))
    };
    if table.name == TableName::Postings {
        wanted = wanted.and(col("origin_kind").eq(lit("provider_charge")));
    }
    let rows =
        engine.look_up(table).await?.filter(wanted.and(on_days(days)))?.select_columns(&["request_id", "attempt"])?;
    let mut found = HashSet::new();
    each_batch(rows, |batch| {
        found.extend(read::attempt_ids_of(batch)?.into_iter().filter(|id| asked.contains(id)));
        Ok(())
    })
    .await?;
    Ok(found)
}

/// Those of `asked` that are the key of a row: of a table of facts, or of the explicit part of `postings`. Only files that
/// have rows of their times are read.
pub(crate) async fn keys(
    engine: &Engine,
    table: &Table,
    asked: &[(Timestamp, RowKey)],
) -> Result<HashSet<RowKey>, StoreError> {
    let wanted: HashSet<RowKey> = asked.iter().map(|&(_, key)| key).collect();
    let times = asked.iter().map(|&(at, _)| at);
    let Some(within) = stretches(times).into_iter().map(|ends| between(table.name, ends)).reduce(Expr::or) else {
        return Ok(HashSet::new());
    };
    let mut rows = engine.look_up(table).await?.filter(within)?;
    if table.name == TableName::Postings {
        rows = rows.filter(col("origin_kind").not_eq(lit("provider_charge")))?.select_columns(&["posting_id"])?;
    }
    let mut held = HashSet::new();
    each_batch(rows, |batch| {
        let keys = match table.name {
            TableName::Postings => read::posting_ids_of(batch)?.into_iter().map(posting_key).collect(),
            facts => facts::keys(facts, batch)?,
        };
        held.extend(keys.into_iter().filter(|key| wanted.contains(key)));
        Ok(())
    })
    .await?;
    Ok(held)
}

/// The stretches of time that hold these moments, first and last of each.
fn stretches(times: impl Iterator<Item = Timestamp>) -> Vec<(Timestamp, Timestamp)> {
    let mut times: Vec<Timestamp> = times.collect();
    times.sort_unstable();
    let mut stretches: Vec<(Timestamp, Timestamp)> = Vec::new();
    for at in times {
        match stretches.last_mut() {
            Some((_, last)) if at.micros_since(*last) <= APART_US => *last = at,
            _ => stretches.push((at, at)),
        }
    }
    match (stretches.first(), stretches.last()) {
        (Some(&(first, _)), Some(&(_, last))) if stretches.len() > STRETCHES_MAX => vec![(first, last)],
        _ => stretches,
    }
}

fn between(table: TableName, (first, last): (Timestamp, Timestamp)) -> Expr {
    let time = |at: Timestamp| lit(ScalarValue::TimestampMicrosecond(Some(at.micros()), Some("UTC".into())));
    let day = |at: Timestamp| lit(ScalarValue::Date32(Some(at.day())));
    col(DAY).between(day(first), day(last)).and(col(table.time()).between(time(first), time(last)))
}

async fn each_batch(
    rows: DataFrame,
    mut each: impl FnMut(&RecordBatch) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let mut stream = rows.execute_stream().await?;
    while let Some(batch) = stream.try_next().await? {
        each(&batch)?;
    }
    Ok(())
}

fn posting_key(id: PostingId) -> RowKey {
    id.uuid().as_u128()
}

fn on_days(days: &BTreeSet<i32>) -> Expr {
    col(DAY).in_list(days.iter().map(|&day| lit(ScalarValue::Date32(Some(day)))).collect(), false)
}
