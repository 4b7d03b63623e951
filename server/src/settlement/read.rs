//! What the ledger knows of a stretch of time, read from one view of its tables and of the log that is in none yet.

use std::collections::BTreeMap;

use anyhow::Context as _;
use arrow::array::RecordBatch;
use ledger::allocate::pool::Demand;
use ledger::settle::{INTERVAL_US, Known, LOOK_BACK_US, interval_of};
use ledger::{
    Attempt, CallSpan, CapacityFact, EngineFact, EngineReading, EngineStep, JobFact, Label, Period, Posting, Running,
    Timestamp,
};
use store::{Session, StoreError};

use super::Rules;
use crate::rows::{self, moment, within};

/// Attempts that are in memory at once, as far as single minutes allow. One takes about a kilobyte.
pub const ATTEMPTS_MAX: u64 = 200_000;

/// Attempts that constants are fitted to at the most.
pub const FIT_ATTEMPTS_MAX: u64 = 50_000;

/// A stretch to settle, and how far back the facts around it are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// The minutes to settle.
    pub window: Period,
    /// Attempts, spans and readings that touch the time since here belong to it.
    pub since: Timestamp,
}

/// Everything about one stretch.
#[derive(Debug, Default)]
pub struct Facts {
    pub capacity: Vec<CapacityFact>,
    pub engines: Vec<EngineFact>,
    pub attempts: Vec<Attempt>,
    pub running: Vec<Running>,
    pub spans: Vec<CallSpan>,
    pub readings: Vec<EngineReading>,
    pub steps: Vec<EngineStep>,
    pub jobs: Vec<JobFact>,
    pub posted: Vec<Posting>,
    /// Peaks and who makes them, of pools where that is known from a longer time.
    pub demand: BTreeMap<Label, Demand>,
}

impl Facts {
    /// Reads what is known of `stretch`. A request takes `request_us_max` at the most.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub async fn read(session: &Session, stretch: Stretch, request_us_max: i64) -> anyhow::Result<Facts> {
        let Stretch { window, since } = stretch;
        let around = Period { start: since, end: window.end };
        let spans = spans(session, around, request_us_max).await?;
        let posted =
            format!("SELECT * FROM postings WHERE origin_kind = 'pool' AND {}", within("period_start", window));
        let readings = format!("SELECT * FROM readings WHERE {}", within("read_at", around));
        let reaching = Period { start: window.start.plus_micros(-INTERVAL_US), end: window.end };
        let steps = format!(
            "SELECT * FROM steps WHERE {} AND CAST(started_at AS BIGINT) + wall_us > {}",
            within("started_at", reaching),
            window.start.micros()
        );
        Ok(Facts {
            // Spans can only be joined with all attempts, those at providers included.
            attempts: attempts(session, around, request_us_max, !spans.is_empty()).await?,
            running: Vec::new(),
            demand: BTreeMap::new(),
            capacity: newest_capacity(session, window).await?,
            engines: newest_engines(session, window).await?,
            jobs: all(session, &newest("jobs", "job, replica", window), store::jobs_of).await?,
            readings: all(session, &readings, store::readings_of).await?,
            steps: all(session, &steps, store::steps_of).await?,
            posted: all(session, &posted, store::postings_of).await?,
            spans,
        })
    }

    /// The same as the settlement takes it.
    pub fn known<'a>(&'a self, rules: &'a Rules) -> Known<'a> {
        Known {
            capacity: &self.capacity,
            engines: &self.engines,
            attempts: &self.attempts,
            running: &self.running,
            spans: &self.spans,
            readings: &self.readings,
            steps: &self.steps,
            jobs: &self.jobs,
            posted: &self.posted,
            policies: &rules.policies,
            demand: &self.demand,
        }
    }
}

/// Spans that touch `around`.
pub async fn spans(session: &Session, around: Period, longest_us: i64) -> anyhow::Result<Vec<CallSpan>> {
    let reaching = Period { start: around.start.plus_micros(-longest_us), end: around.end };
    let query = format!(
        "SELECT * FROM spans WHERE {} AND period_end >= {}",
        within("period_start", reaching),
        moment(around.start)
    );
    all(session, &query, store::spans_of).await
}

/// The time of all spans that begin within `window`, if there are any.
pub async fn spans_time(session: &Session, window: Period) -> anyhow::Result<Option<Period>> {
    let told = within("period_start", window);
    let first = format!("SELECT CAST(min(period_start) AS BIGINT) AS at FROM spans WHERE {told}");
    let last = format!("SELECT CAST(max(period_end) AS BIGINT) AS at FROM spans WHERE {told}");
    let start = micros(session, &first, "at").await?.pop();
    let end = micros(session, &last, "at").await?.pop();
    Ok(start.zip(end).map(|(start, end)| Period { start, end: end.plus_micros(1) }))
}

/// Attempts that touch `around`: those on pools, or all.
pub async fn attempts(
    session: &Session,
    around: Period,
    request_us_max: i64,
    everywhere: bool,
) -> anyhow::Result<Vec<Attempt>> {
    let reaching = Period { start: around.start.plus_micros(-request_us_max), end: around.end };
    let on_pools = if everywhere { "" } else { " AND pool IS NOT NULL" };
    let query = format!(
        "SELECT * FROM attempts WHERE {}{on_pools} AND CAST(received_at AS BIGINT) + finished_us >= {}",
        within("received_at", reaching),
        around.start.micros()
    );
    all(session, &query, store::attempts_of).await
}

/// The newest observation of each thing that grows, of those that touch `window`. What makes two rows speak of the same
/// thing is `identity` and their start.
fn newest(table: &str, identity: &str, window: Period) -> String {
    let (start, end) = (moment(window.start), moment(window.end));
    let (mut begun, mut reaching, mut told) = ("true".to_owned(), "true".to_owned(), "true".to_owned());
    if window.end != Period::ALL.end {
        begun = format!("period_start < {end}");
    }
    if window.start != Period::ALL.start {
        reaching = format!("period_end > {start}");
        // A later observation may have ended it before the window, so that it is chosen first and looked at afterwards.
        told = format!("(period_end > {start} OR observed_at > {start})");
    }
    format!(
        "SELECT * FROM (SELECT *, row_number() OVER (PARTITION BY {identity}, period_start \
         ORDER BY observed_at DESC, period_end DESC) AS newest FROM {table} WHERE {begun} AND {told}) \
         WHERE newest = 1 AND {reaching}"
    )
}

async fn all<T>(
    session: &Session,
    query: &str,
    of: impl Fn(&RecordBatch) -> Result<Vec<T>, StoreError>,
) -> anyhow::Result<Vec<T>> {
    let mut rows = Vec::new();
    for batch in session.sql(query).await? {
        rows.extend(of(&batch)?);
    }
    Ok(rows)
}

/// Attempts on pools by the minute they were received in, counted from 1970.
pub async fn load(session: &Session, period: Period) -> anyhow::Result<BTreeMap<i64, u64>> {
    let query = format!(
        "SELECT CAST(received_at AS BIGINT) / {INTERVAL_US} AS minute, count(*) AS attempts FROM attempts \
         WHERE pool IS NOT NULL AND {} GROUP BY 1",
        within("received_at", period)
    );
    let mut load = BTreeMap::new();
    for batch in session.sql(&query).await? {
        let (minutes, counts) = (rows::column(&batch, "minute")?, rows::column(&batch, "attempts")?);
        for row in 0..batch.num_rows() {
            let minute = rows::count(minutes, row)?.context("an attempt without a time")?;
            load.insert(i64::try_from(minute)?, rows::count(counts, row)?.unwrap_or(0));
        }
    }
    Ok(load)
}

/// The engines that were there at any time of `window`, each by its newest observation.
pub async fn newest_engines(session: &Session, window: Period) -> anyhow::Result<Vec<EngineFact>> {
    all(session, &newest("engines", "engine", window), store::engines_of).await
}

/// The GPUs that were there at any time of `window`, each by its newest observation.
pub async fn newest_capacity(session: &Session, window: Period) -> anyhow::Result<Vec<CapacityFact>> {
    all(session, &newest("capacity", "pool, replica", window), store::capacity_of).await
}

/// When the newest minute of any pool that has been settled begins.
pub async fn newest_settled(session: &Session) -> anyhow::Result<Option<Timestamp>> {
    let query = "SELECT CAST(max(period_start) AS BIGINT) AS newest FROM postings WHERE origin_kind = 'pool'";
    micros(session, query, "newest").await.map(|found| found.into_iter().next())
}

/// The pools of which anything is booked.
pub async fn settled_pools(session: &Session) -> anyhow::Result<Vec<Label>> {
    let query = "SELECT DISTINCT pool FROM postings WHERE origin_kind = 'pool' AND pool IS NOT NULL ORDER BY pool";
    let mut pools = Vec::new();
    for batch in session.sql(query).await? {
        let column = rows::column(&batch, "pool")?;
        for row in 0..batch.num_rows() {
            pools.push(rows::plain(column, row)?.into());
        }
    }
    Ok(pools)
}

/// The minutes of `window` in which anything is booked of a pool; they may have cost something once.
pub async fn booked_minutes(session: &Session, window: Period) -> anyhow::Result<Vec<Period>> {
    let query = format!(
        "SELECT DISTINCT CAST(period_start AS BIGINT) AS minute FROM postings WHERE origin_kind = 'pool' AND {}",
        within("period_start", window)
    );
    let minutes = micros(session, &query, "minute").await?;
    Ok(super::late::joined(minutes.into_iter().map(interval_of)))
}

/// A column of moments.
pub async fn micros(session: &Session, query: &str, column: &str) -> anyhow::Result<Vec<Timestamp>> {
    let mut found = Vec::new();
    for batch in session.sql(query).await? {
        let values = rows::column(&batch, column)?;
        for row in 0..batch.num_rows() {
            if let Some(text) = rows::text(values, row)? {
                found.push(Timestamp::from_micros(text.parse()?));
            }
        }
    }
    Ok(found)
}

/// Cuts `hour` so that no stretch has more than `most` attempts, single minutes aside, and decides how far back each of
/// them reads: an hour, or as far as `most` attempts reach.
pub fn cut(hour: Period, load: &BTreeMap<i64, u64>, most: u64) -> Vec<Stretch> {
    let minute_of = |at: Timestamp| at.micros().div_euclid(INTERVAL_US);
    let in_minute = |minute: i64| load.get(&minute).copied().unwrap_or(0);
    let start_of = |minute: i64| Timestamp::from_micros(minute.saturating_mul(INTERVAL_US));
    let (first, end) = (minute_of(hour.start), minute_of(hour.end.plus_micros(-1)) + 1);
    let mut stretches = Vec::new();
    let (mut from, mut held) = (first, 0);
    let mut finish = |from: i64, to: i64, held: u64| {
        let window = Period { start: start_of(from).max(hour.start), end: start_of(to).min(hour.end) };
        let (mut since, mut held) = (from, held);
        while since > from - LOOK_BACK_US / INTERVAL_US && held + in_minute(since - 1) <= most {
            since -= 1;
            held += in_minute(since);
        }
        stretches.push(Stretch { window, since: start_of(since) });
    };
    for minute in first..end {
        let more = in_minute(minute);
        if minute > from && held + more > most {
            finish(from, minute, held);
            (from, held) = (minute, 0);
        }
        held += more;
    }
    finish(from, end, held);
    stretches
}

#[cfg(test)]
mod tests {
    use super::*;

    fn minutes(from: i64, to: i64) -> Period {
        Period { start: Timestamp::from_micros(from * INTERVAL_US), end: Timestamp::from_micros(to * INTERVAL_US) }
    }

    #[test]
    fn quiet_hours_are_one_stretch_and_look_back_an_hour() {
        let stretches = cut(minutes(60, 120), &BTreeMap::from([(70, 5)]), 10);
        assert_eq!(stretches, [Stretch { window: minutes(60, 120), since: minutes(0, 1).start }]);
    }

    #[test]
    fn busy_hours_are_cut_and_look_back_as_far_as_there_is_room() {
        let load: BTreeMap<i64, u64> = (0..63).map(|minute| (minute, 4)).chain([(61, 100)]).collect();
        let stretches = cut(minutes(60, 63), &load, 10);
        let expected = [
            // One minute of four: room for one more.
            Stretch { window: minutes(60, 61), since: minutes(59, 60).start },
            Stretch { window: minutes(61, 62), since: minutes(61, 62).start },
            Stretch { window: minutes(62, 63), since: minutes(62, 63).start },
        ];
        assert_eq!(stretches, expected);
        let whole: u64 = stretches.iter().map(|stretch| stretch.window.micros()).sum();
        assert_eq!(whole, minutes(60, 63).micros());
    }
}
