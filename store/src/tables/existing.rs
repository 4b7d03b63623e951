//! Which of some ids a table already holds, reading as few files and pages as the ids' times allow.

use std::collections::{BTreeSet, HashSet};

use arrow::array::RecordBatch;
use datafusion::common::ScalarValue;
use datafusion::dataframe::DataFrame;
use datafusion::prelude::{Expr, col, lit};
use futures_util::TryStreamExt;
use ledger::{AttemptId, Fact, PostingId, RequestId};

use crate::engine::Engine;
use crate::error::StoreError;
use crate::tables::delta::Table;
use crate::tables::read;
use crate::tables::schema::{DAY, TableName};

/// Up to this many ids are looked for by name; more are found by reading the range they span.
const NAMED_MAX: usize = 500;

/// What makes a row of a small table the same row: its posting id, or a hash of all of it.
pub(crate) type RowKey = u128;

/// The key of a fact that is no attempt.
pub(crate) fn key_of(fact: &Fact) -> RowKey {
    match fact {
        Fact::Posting(posting) => posting.id.uuid().as_u128(),
        other => {
            let bytes = postcard::to_stdvec(other).expect("facts are plain values, which always have an encoding");
            let mut first = [0; 16];
            first.copy_from_slice(&blake3::hash(&bytes).as_bytes()[..16]);
            u128::from_le_bytes(first)
        }
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

/// The keys of every row that a small table, or the explicit part of `postings`, has on one day.
pub(crate) async fn keys_of_day(engine: &Engine, table: &Table, day: i32) -> Result<HashSet<RowKey>, StoreError> {
    let mut rows = engine.look_up(table).await?.filter(on_days(&BTreeSet::from([day])))?;
    if table.name == TableName::Postings {
        rows = rows.filter(col("origin_kind").not_eq(lit("provider_charge")))?.select_columns(&["posting_id"])?;
    }
    let mut keys = HashSet::new();
    each_batch(rows, |batch| {
        match table.name {
            TableName::Attempts => {}
            TableName::Postings => keys.extend(read::posting_ids_of(batch)?.into_iter().map(posting_key)),
            TableName::Capacity => {
                let facts = read::capacity_of(batch)?.into_iter().map(|fact| Fact::Capacity(Box::new(fact)));
                keys.extend(facts.map(|fact| key_of(&fact)));
            }
            TableName::Gaps => keys.extend(read::gaps_of(batch)?.into_iter().map(|gap| key_of(&Fact::Gap(gap)))),
        }
        Ok(())
    })
    .await?;
    Ok(keys)
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
