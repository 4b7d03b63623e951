//! The proof that the books balance: closure, duplicates, gaps, checksums, every amount recomputed from its own row.
//!
//! Attempts and postings are read sorted by attempt, day by day, and walked side by side, so that memory is bounded by the
//! engine's limit whatever the ledger's size.

use std::collections::BTreeMap;

use arrow::array::AsArray;
use arrow::datatypes::{Date32Type, Int64Type};
use datafusion::execution::SendableRecordBatchStream;
use futures_util::TryStreamExt;
use ledger::closure::imbalances;
use ledger::{Attempt, CapacityFact, Money, Origin, Period, Posting, capacity};
use serde::Serialize;

use crate::error::StoreError;
use crate::log::{Position, reader};
use crate::sql::Session;
use crate::store::Store;
use crate::tables::facts::{self, capacity_of, gaps_of};
use crate::tables::read::{attempts_of, postings_of};
use crate::tables::schema::TableName;

/// Examples that a report holds at most.
const EXAMPLES_MAX: usize = 20;

/// What was found. Numbers are exact, examples are the first few.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Verification {
    /// No imbalance, duplicate, wrong amount or missing file.
    pub balanced: bool,
    /// Rows of `attempts`.
    pub attempts: u64,
    /// Rows of `postings`.
    pub postings: u64,
    /// Origins whose postings were added up.
    pub origins: u64,
    /// Origins with nothing to compare with yet: lines of invoices.
    pub unchecked_origins: u64,
    /// Origins whose postings do not add up to them.
    pub imbalances: u64,
    /// Rows whose id another row has.
    pub duplicates: u64,
    /// Attempts whose amounts are not what their rates and tokens make, and postings whose terms are not what they amount to.
    pub mispriced: u64,
    /// Files that a table names and that are not there.
    pub missing_files: u64,
    /// Records that a gap or damage in the log says are gone.
    pub lost: u64,
    /// Times in which metering was blind.
    pub gaps: u64,
    /// Damaged places in the log.
    pub damaged_frames: u64,
    /// Segments of the log that were read.
    pub segments: u64,
    /// The first few of everything that is wrong.
    pub examples: Vec<Example>,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Example {
    /// What: `imbalance`, `duplicate`, `mispriced`, `missing_file`, `damage`.
    pub kind: &'static str,
    /// Where: an origin, an id, a file.
    pub subject: String,
    /// How.
    pub detail: String,
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Attempts and postings checked.
    pub rows_done: u64,
    /// All of them.
    pub rows_total: u64,
}

impl Verification {
    /// Balanced, and nothing is damaged. Gaps are allowed: they are entries in the books.
    #[must_use]
    pub const fn is_clean(&self) -> bool {
        self.balanced && self.damaged_frames == 0
    }

    fn example(&mut self, kind: &'static str, subject: impl ToString, detail: impl ToString) {
        if self.examples.len() < EXAMPLES_MAX {
            self.examples.push(Example { kind, subject: subject.to_string(), detail: detail.to_string() });
        }
    }

    fn check_amounts(&mut self, attempt: &Attempt) {
        let (Some(costs), Some(rates)) = (attempt.charge.costs(), attempt.charge.rates()) else { return };
        let recomputed = rates.charge(&attempt.usage);
        if recomputed != Some(costs) {
            self.mispriced += 1;
            let should = recomputed.map_or("no amount".to_owned(), |costs| costs.effective_cost.to_string());
            self.example(
                "mispriced",
                attempt.id,
                format!("{} is stored, the rates make {should}", costs.effective_cost),
            );
        }
    }

    fn check_terms(&mut self, posting: &Posting) {
        let Some(terms) = posting.basis.and_then(|basis| basis.terms) else { return };
        let sum: Money = [terms.overhead, terms.weights, terms.kv, terms.compute].into_iter().sum();
        if sum != posting.costs.effective_cost {
            self.mispriced += 1;
            let detail = format!("{} is stored, its terms add up to {sum}", posting.costs.effective_cost);
            self.example("mispriced", format!("posting {}", posting.id), detail);
        }
    }

    /// Compares some origins with all of their postings.
    fn close(&mut self, origins: Vec<(Origin, Money)>, postings: &[Posting]) {
        for imbalance in imbalances(origins, postings) {
            self.imbalances += 1;
            let subject = format!("{} {}", imbalance.origin.kind(), imbalance.origin.key());
            self.example("imbalance", subject, format!("{} posted of {}", imbalance.posted, imbalance.expected));
        }
    }
}

impl Store {
    /// Checks everything that is stored. `progress` is told now and then.
    ///
    /// # Errors
    /// When something cannot be read at all; whatever can be read and is wrong is in the result.
    pub async fn verify(&self, progress: &(dyn Fn(Progress) + Send + Sync)) -> Result<Verification, StoreError> {
        let mut found = Verification::default();
        let session = self.session().await?;
        self.check_log(&mut found).await?;
        self.check_files(&mut found).await?;
        if found.missing_files > 0 {
            // What is left cannot be read to its end, and adding up a part proves nothing.
            return Ok(found);
        }

        let days = rows_by_day(&session).await?;
        let mut progress = Reporter { report: progress, done: 0, total: days.values().sum() };
        for day in days.keys() {
            check_day(&session, *day, &mut found, &mut progress).await?;
        }
        check_allocations(&session, &mut found).await?;
        check_facts(&session, &mut found).await?;
        for batch in session.sql("SELECT * FROM gaps").await? {
            for gap in gaps_of(&batch)? {
                found.gaps += 1;
                found.lost += gap.records_lost;
            }
        }
        found.balanced =
            found.imbalances == 0 && found.duplicates == 0 && found.mispriced == 0 && found.missing_files == 0;
        Ok(found)
    }

    async fn check_log(&self, found: &mut Verification) -> Result<(), StoreError> {
        let (folder, through) = (self.inner.log_folder(), self.inner.newest_position());
        let log = tokio::task::spawn_blocking(move || reader::visit(&folder, Position(0), through, |_, _| {}))
            .await
            .map_err(|error| StoreError::io("read the log")(std::io::Error::other(error)))??;
        found.segments = log.segments;
        for damage in log.damage {
            found.damaged_frames += 1;
            found.lost += damage.records_lost;
            found.example("damage", "log", format!("{} ({} records lost)", damage.reason, damage.records_lost));
        }
        Ok(())
    }

    async fn check_files(&self, found: &mut Verification) -> Result<(), StoreError> {
        let view = self.inner.view().await?;
        for table in view.tables.iter().flatten() {
            for (path, _) in table.files()? {
                let file = self.inner.dir.join(table.name.as_str()).join(&path);
                if !file.is_file() {
                    found.missing_files += 1;
                    found.example("missing_file", format!("{}/{path}", table.name.as_str()), "the table names it");
                }
            }
        }
        Ok(())
    }
}

struct Reporter<'a> {
    report: &'a (dyn Fn(Progress) + Send + Sync),
    done: u64,
    total: u64,
}

impl Reporter<'_> {
    fn add(&mut self, rows: usize) {
        self.done += u64::try_from(rows).unwrap_or(0);
        (self.report)(Progress { rows_done: self.done, rows_total: self.total.max(self.done) });
    }
}

async fn rows_by_day(session: &Session) -> Result<BTreeMap<i32, u64>, StoreError> {
    let query = "SELECT day, sum(n) AS n FROM (SELECT day, count(*) AS n FROM attempts GROUP BY day
        UNION ALL SELECT day, count(*) AS n FROM postings GROUP BY day) GROUP BY day";
    let mut days = BTreeMap::new();
    for batch in session.sql(query).await? {
        let (day, rows) = (batch.column(0).as_primitive::<Date32Type>(), batch.column(1).as_primitive::<Int64Type>());
        for row in 0..batch.num_rows() {
            days.insert(day.value(row), u64::try_from(rows.value(row)).unwrap_or(0));
        }
    }
    Ok(days)
}

/// Walks over one day's attempts and the postings of their charges, both in the order of attempts.
async fn check_day(
    session: &Session,
    day: i32,
    found: &mut Verification,
    progress: &mut Reporter<'_>,
) -> Result<(), StoreError> {
    let order = "ORDER BY request_id, attempt";
    let on = format!("day = arrow_cast({day}, 'Date32')");
    let mut attempts = session.sql_stream(&format!("SELECT * FROM attempts WHERE {on} {order}")).await?;
    let postings = session
        .sql_stream(&format!(
            "SELECT * FROM postings WHERE {on} AND origin_kind = 'provider_charge' {order}, posting_id"
        ))
        .await?;
    let mut postings = Postings { stream: postings, waiting: Vec::new() };
    let mut last = None;
    while let Some(batch) = attempts.try_next().await? {
        let rows = attempts_of(&batch)?;
        let mut origins = Vec::with_capacity(rows.len());
        for attempt in &rows {
            found.attempts += 1;
            if last == Some(attempt.id) {
                found.duplicates += 1;
                found.example("duplicate", attempt.id, "the attempt is there twice");
                continue;
            }
            last = Some(attempt.id);
            found.check_amounts(attempt);
            if let Some(costs) = attempt.charge.costs() {
                origins.push((Origin::ProviderCharge(attempt.id), costs.effective_cost));
            }
        }
        progress.add(rows.len());
        found.origins += u64::try_from(origins.len()).unwrap_or(0);
        let through = rows.last().map(|attempt| attempt.id);
        let theirs = postings.take(|posting| posting.attempt <= through, found, progress).await?;
        found.close(origins, &theirs);
    }
    // Postings that are left belong to no attempt.
    let orphans = postings.take(|_| true, found, progress).await?;
    found.close(Vec::new(), &orphans);
    Ok(())
}

/// A sorted stream of postings, taken in runs.
struct Postings {
    stream: SendableRecordBatchStream,
    waiting: Vec<Posting>,
}

impl Postings {
    async fn take(
        &mut self,
        wanted: impl Fn(&Posting) -> bool,
        found: &mut Verification,
        progress: &mut Reporter<'_>,
    ) -> Result<Vec<Posting>, StoreError> {
        while self.waiting.last().is_none_or(&wanted) {
            let Some(batch) = self.stream.try_next().await? else { break };
            progress.add(batch.num_rows());
            self.waiting.extend(postings_of(&batch)?);
        }
        let count = self.waiting.partition_point(&wanted);
        let taken: Vec<Posting> = self.waiting.drain(..count).collect();
        found.postings += u64::try_from(taken.len()).unwrap_or(0);
        for pair in taken.windows(2) {
            if let [one, two] = pair
                && one.id == two.id
            {
                found.duplicates += 1;
                found.example("duplicate", two.id, "the posting is there twice");
            }
        }
        Ok(taken)
    }
}

/// Facts that are rows as they are: none is there twice.
async fn check_facts(session: &Session, found: &mut Verification) -> Result<(), StoreError> {
    for table in TableName::ALL {
        let columns: Vec<String> = facts::columns(table).into_iter().map(|(name, _)| format!("\"{name}\"")).collect();
        if columns.is_empty() {
            continue;
        }
        let query = format!(
            "SELECT {}, count(*) AS copies FROM {} GROUP BY {} HAVING count(*) > 1",
            table.time(),
            table.as_str(),
            columns.join(", ")
        );
        for batch in session.sql(&query).await? {
            let copies = batch.column(1).as_primitive::<Int64Type>();
            for row in 0..batch.num_rows() {
                found.duplicates += u64::try_from(copies.value(row) - 1).unwrap_or(0);
                found.example("duplicate", table.as_str(), "the same row is there more than once");
            }
        }
    }
    Ok(())
}

/// Allocations: the postings of a pool's interval add up to what its GPUs cost in it.
async fn check_allocations(session: &Session, found: &mut Verification) -> Result<(), StoreError> {
    let twice = "SELECT posting_id, count(*) AS n FROM postings WHERE origin_kind <> 'provider_charge' GROUP BY posting_id HAVING count(*) > 1";
    for batch in session.sql(twice).await? {
        let (ids, counts) = (batch.column(0).as_string::<i32>(), batch.column(1).as_primitive::<Int64Type>());
        for row in 0..batch.num_rows() {
            found.duplicates += u64::try_from(counts.value(row) - 1).unwrap_or(0);
            found.example("duplicate", ids.value(row), "the posting is there more than once");
        }
    }

    let mut facts: Vec<CapacityFact> = Vec::new();
    for batch in session.sql("SELECT * FROM capacity").await? {
        facts.extend(capacity_of(&batch)?);
    }
    let holding = capacity::latest(&facts);
    let mut allocations = session
        .sql_stream("SELECT * FROM postings WHERE origin_kind <> 'provider_charge' ORDER BY origin_kind, origin_key")
        .await?;
    let mut open: Option<Allocation> = None;
    while let Some(batch) = allocations.try_next().await? {
        for posting in postings_of(&batch)? {
            found.postings += 1;
            found.check_terms(&posting);
            match &mut open {
                Some(allocation) if allocation.origin() == &posting.origin => allocation.add(posting),
                other => {
                    if let Some(done) = other.replace(Allocation::new(posting)) {
                        done.check(&holding, found);
                    }
                }
            }
        }
    }
    if let Some(done) = open {
        done.check(&holding, found);
    }
    Ok(())
}

/// The postings of one origin, added up as they come.
struct Allocation {
    sum: Posting,
    period: Period,
}

impl Allocation {
    fn new(first: Posting) -> Allocation {
        Allocation { period: first.period, sum: first }
    }

    fn origin(&self) -> &Origin {
        &self.sum.origin
    }

    fn add(&mut self, next: Posting) {
        self.sum.costs.effective_cost += next.costs.effective_cost;
        self.period.end = self.period.end.max(next.period.end);
    }

    fn check(self, facts: &[&CapacityFact], found: &mut Verification) {
        let Origin::Pool { pool, start } = self.origin().clone() else {
            found.unchecked_origins += 1;
            return;
        };
        let interval = Period { start, end: self.period.end };
        let cost = facts.iter().filter(|fact| fact.pool == pool).map(|fact| fact.cost_within(interval)).sum();
        found.origins += 1;
        found.close(vec![(self.origin().clone(), cost)], std::slice::from_ref(&self.sum));
    }
}
