//! What is known from before: load in minutes, decisions of the last hour, and what a usual request is. Read from the ledger
//! when the server starts, and continued while it runs.

use fleet::scale::Past;
use fleet::scale::observe::HISTORY_BIN_US;
use fleet::sim::capacity::Work;
use gateway::Deployment;
use ledger::Timestamp;
use store::Session;

use super::observe::number;
use crate::rows;

/// Days of load that are kept: two of each weekday.
const DAYS: i64 = 14;
const DAY_US: i64 = 86_400_000_000;
/// Decisions and looks of the last hour are kept.
pub const HOUR_US: i64 = 3_600_000_000;
/// Requests that say what a usual mix is.
const MIX_MAX: usize = 400;

/// Load in minutes; `NAN` where nothing is known.
#[derive(Debug, Clone, Default)]
pub struct History {
    /// Start of the first bin.
    pub start: Timestamp,
    /// The bins.
    pub bins: Vec<f32>,
    /// The minute that is being filled: its start, load times seconds, and seconds.
    open: Option<(Timestamp, f64, f64)>,
}

impl History {
    /// These minutes and their load, the latest last; minutes in `known` without any have none, others are unknown. Ends with
    /// the minute before that of `now`.
    #[must_use]
    pub fn of(loads: &[(Timestamp, f64)], known: &[Timestamp], now: Timestamp) -> History {
        let first = loads.iter().map(|(at, _)| *at).chain(known.iter().copied()).min();
        let Some(start) = first.map(minute) else { return History { start: minute(now), ..History::default() } };
        let place = |at: Timestamp| usize::try_from((minute(at).micros() - start.micros()) / HISTORY_BIN_US).ok();
        let mut bins = vec![f32::NAN; place(now).unwrap_or(0)];
        for at in known {
            if let Some(bin) = place(*at).and_then(|place| bins.get_mut(place)) {
                *bin = 0.0;
            }
        }
        for (at, load) in loads {
            if let Some(bin) = place(*at).and_then(|place| bins.get_mut(place)) {
                *bin = narrow(*load);
            }
        }
        History { start, bins, open: None }
    }

    /// Takes a look: its load held since the look before, at most a minute.
    pub fn see(&mut self, at: Timestamp, load: Option<f64>, seconds: f64) {
        let now = minute(at);
        if let Some((open, sum, known)) = self.open
            && open != now
        {
            self.put(open, if known > 0.0 { sum / known } else { f64::NAN });
            self.open = None;
        }
        let (_, sum, known) = self.open.get_or_insert((now, 0.0, 0.0));
        if let Some(load) = load {
            *sum += load * seconds.min(60.0);
            *known += seconds.min(60.0);
        }
    }

    /// Counts in replicas that do `1 / factor` of what they did.
    pub fn scale(&mut self, factor: f64) {
        if factor.is_finite() && factor > 0.0 {
            self.bins.iter_mut().for_each(|bin| *bin *= narrow(factor));
        }
    }

    fn put(&mut self, at: Timestamp, load: f64) {
        let next = |history: &History| {
            let bins = i64::try_from(history.bins.len()).unwrap_or(i64::MAX);
            history.start.plus_micros(bins.saturating_mul(HISTORY_BIN_US))
        };
        if self.bins.is_empty() {
            self.start = at;
        }
        if at < next(self) || at > next(self).plus_micros(DAYS * DAY_US) {
            // The clock jumped: what was before has no place beside what comes.
            *self = History { start: at, ..History::default() };
        }
        while next(self) < at {
            self.bins.push(f32::NAN);
        }
        self.bins.push(narrow(load));
        let most = usize::try_from(DAYS * DAY_US / HISTORY_BIN_US).unwrap_or(usize::MAX);
        // A day at a time, so that not every minute moves all.
        let day = usize::try_from(DAY_US / HISTORY_BIN_US).unwrap_or(1);
        if self.bins.len() >= most + day {
            self.bins.drain(..day);
            self.start = self.start.plus_micros(DAY_US);
        }
    }
}

fn minute(at: Timestamp) -> Timestamp {
    Timestamp::from_micros(at.micros().div_euclid(HISTORY_BIN_US) * HISTORY_BIN_US)
}

#[expect(clippy::cast_possible_truncation, reason = "seven digits of a load are more than anybody measures")]
fn narrow(load: f64) -> f32 {
    load as f32
}

/// Recent requests as pairs of input tokens, cached ones left out, and output tokens.
///
/// # Errors
/// When the ledger cannot be read.
pub async fn mix(session: &Session, of: &Deployment) -> anyhow::Result<Vec<(u32, u32)>> {
    let query = format!(
        "SELECT input_tokens - cache_read_tokens AS input, output_tokens AS output FROM attempts WHERE {} AND outcome = \
         'completed' AND output_tokens > 0 ORDER BY received_at DESC LIMIT {MIX_MAX}",
        belongs(of)
    );
    let mut mix = Vec::new();
    for batch in session.sql(&query).await? {
        for row in 0..batch.num_rows() {
            let cell = |name| anyhow::Ok(rows::signed(rows::column(&batch, name)?, row)?.unwrap_or(0).max(1));
            mix.push((u32::try_from(cell("input")?)?, u32::try_from(cell("output")?)?));
        }
    }
    Ok(mix)
}

/// The load of the last days by minute.
///
/// # Errors
/// When the ledger cannot be read.
pub async fn load(session: &Session, of: &Deployment, work: &Work, now: Timestamp) -> anyhow::Result<History> {
    let since = now.plus_micros(-DAYS * DAY_US);
    let within = |column: &str| rows::within(column, ledger::Period { start: since, end: now });
    let minute_of = |column: &str| format!("CAST({column} AS BIGINT) / {HISTORY_BIN_US} * {HISTORY_BIN_US} AS minute");
    let query = format!(
        "SELECT {}, sum(input_tokens - cache_read_tokens) AS input, sum(output_tokens) AS output FROM attempts WHERE {} AND \
         attempt = 0 AND {} GROUP BY minute",
        minute_of("received_at"),
        belongs(of),
        within("received_at")
    );
    let mut loads = Vec::new();
    for batch in session.sql(&query).await? {
        for row in 0..batch.num_rows() {
            let cell = |name| anyhow::Ok(rows::signed(rows::column(&batch, name)?, row)?.unwrap_or(0));
            let tokens = |name| anyhow::Ok(number(u64::try_from(cell(name)?).unwrap_or(0)));
            let work = work.per_input_token * tokens("input")? + work.per_output_token * tokens("output")?;
            loads.push((Timestamp::from_micros(cell("minute")?), work / 60.0));
        }
    }
    // Somebody looked in these minutes: where no request came, there was none.
    let query = format!(
        "SELECT DISTINCT {} FROM readings WHERE pool = {} AND {} UNION SELECT DISTINCT {} FROM decisions WHERE pool = {} AND {}",
        minute_of("read_at"),
        rows::literal(&of.pool),
        within("read_at"),
        minute_of("decided_at"),
        rows::literal(&of.pool),
        within("decided_at"),
    );
    let mut known = Vec::new();
    for batch in session.sql(&query).await? {
        for row in 0..batch.num_rows() {
            known.extend(rows::signed(rows::column(&batch, "minute")?, row)?.map(Timestamp::from_micros));
        }
    }
    Ok(History::of(&loads, &known, now))
}

/// What was decided in the last hour, oldest first, and what was last told.
///
/// # Errors
/// When the ledger cannot be read.
pub async fn decisions(session: &Session, of: &Deployment, now: Timestamp) -> anyhow::Result<(Vec<Past>, Option<u32>)> {
    let query = format!(
        "SELECT * FROM decisions WHERE {} AND {} ORDER BY decided_at",
        belongs(of),
        rows::within("decided_at", ledger::Period { start: now.plus_micros(-HOUR_US), end: now })
    );
    let (mut past, mut told) = (Vec::new(), None);
    for batch in session.sql(&query).await? {
        for decision in store::decisions_of(&batch)? {
            past.push(Past { at: decision.at, wanted: decision.wanted, desired: decision.desired });
            told = decision.told.or(told);
        }
    }
    past.sort_by_key(|one| one.at);
    Ok((past, told))
}

fn belongs(of: &Deployment) -> String {
    format!("pool = {} AND deployment = {}", rows::literal(&of.pool), rows::literal(&of.name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_micros(seconds * 1_000_000)
    }

    #[test]
    fn minutes_without_requests_are_zero_only_where_somebody_looked() {
        let history = History::of(&[(at(60), 1.5)], &[at(0), at(60), at(185)], at(250));
        assert_eq!(history.start, at(0));
        assert_eq!(format!("{:?}", history.bins), "[0.0, 1.5, NaN, 0.0]");
        assert!(History::of(&[], &[], at(250)).bins.is_empty());
    }

    #[test]
    fn looks_become_minutes() {
        let mut history = History::of(&[], &[at(0)], at(60));
        for second in (60..180).step_by(10) {
            history.see(at(second), (second >= 90).then_some(2.0), 10.0);
        }
        history.see(at(300), None, 10.0);
        assert_eq!(format!("{:?}", history.bins), "[0.0, 2.0, 2.0]");
        history.see(at(370), Some(1.0), 10.0);
        assert_eq!(format!("{:?}", history.bins), "[0.0, 2.0, 2.0, NaN, NaN, NaN]");
        history.see(at(0), Some(1.0), 10.0);
        history.see(at(60), Some(1.0), 10.0);
        assert_eq!((history.start, history.bins.len()), (at(0), 1), "the clock jumped back");
    }
}
