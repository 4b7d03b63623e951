//! Cost and use by any dimensions: two grouped queries over one view of the ledger, put together into rows that add up.
//!
//! A request counts where its first attempt went, so that requests add up over any grouping. Amounts come from postings
//! only. Costs that no request caused are rows of their own and never part of a request's.

mod pools;

use std::collections::BTreeMap;
use std::str::FromStr;

use ledger::{Line, Money, Period};
use serde::{Serialize, Serializer};
use store::Session;
use utoipa::ToSchema;

use crate::config::nearest;
use crate::rows;
use crate::scaling::{GivenBackRow, given_back};

pub use pools::{Part, PoolBooks, booked, engines_within, pools};

/// What costs can be grouped by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dimension {
    /// The team that pays.
    Team,
    /// The holder of the key.
    Consumer,
    /// The application.
    Application,
    /// Where finance books it.
    CostCentre,
    /// The end customer.
    Customer,
    /// The product feature.
    Feature,
    /// The user task.
    Task,
    /// Production, staging, …
    Environment,
    /// The provider, `self_hosted` for pools.
    Provider,
    /// The model that answered.
    Model,
    /// The GPU pool.
    Pool,
    /// The deployment on the pool.
    Deployment,
    /// The UTC day.
    Day,
    /// The UTC hour.
    Hour,
    /// What the amount is for.
    Line,
}

impl Dimension {
    /// Every dimension.
    pub const ALL: [Dimension; 15] = [
        Dimension::Team,
        Dimension::Consumer,
        Dimension::Application,
        Dimension::CostCentre,
        Dimension::Customer,
        Dimension::Feature,
        Dimension::Task,
        Dimension::Environment,
        Dimension::Provider,
        Dimension::Model,
        Dimension::Pool,
        Dimension::Deployment,
        Dimension::Day,
        Dimension::Hour,
        Dimension::Line,
    ];

    /// The name on the command line and in JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Dimension::Team => "team",
            Dimension::Consumer => "consumer",
            Dimension::Application => "application",
            Dimension::CostCentre => "cost_centre",
            Dimension::Customer => "customer",
            Dimension::Feature => "feature",
            Dimension::Task => "task",
            Dimension::Environment => "environment",
            Dimension::Provider => "provider",
            Dimension::Model => "model",
            Dimension::Pool => "pool",
            Dimension::Deployment => "deployment",
            Dimension::Day => "day",
            Dimension::Hour => "hour",
            Dimension::Line => "line",
        }
    }

    /// The expression in a query over attempts (`a`).
    fn of_attempt(self) -> String {
        match self {
            Dimension::Day => "CAST(a.day AS VARCHAR)".to_owned(),
            Dimension::Hour => hour("a.received_at"),
            Dimension::Line => "'request'".to_owned(),
            other => format!("a.{}", other.name()),
        }
    }

    /// The expression in a query over postings (`p`), with their attempts (`a`) where only those know.
    fn of_posting(self) -> String {
        match self {
            Dimension::Deployment => "a.deployment".to_owned(),
            Dimension::Day => "CAST(p.day AS VARCHAR)".to_owned(),
            Dimension::Hour => hour("p.period_start"),
            other => format!("p.{}", other.name()),
        }
    }
}

fn hour(column: &str) -> String {
    format!("CAST(date_bin(INTERVAL '1 hour', {column}) AS VARCHAR)")
}

impl FromStr for Dimension {
    type Err = String;
    fn from_str(text: &str) -> Result<Dimension, String> {
        let names = Dimension::ALL.map(Dimension::name);
        let text = text.trim();
        Dimension::ALL.into_iter().find(|dimension| dimension.name() == text).ok_or_else(|| {
            let hint = match nearest(text, names) {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("known are {}", names.join(", ")),
            };
            format!("`{text}` is not a dimension; {hint}")
        })
    }
}

/// Reads a list of dimensions; the same one twice is a mistake.
///
/// # Errors
/// One sentence for people.
pub fn dimensions<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<Vec<Dimension>, String> {
    let mut by = Vec::new();
    for name in names.into_iter().filter(|name| !name.trim().is_empty()) {
        let dimension: Dimension = name.parse()?;
        if by.contains(&dimension) {
            return Err(format!("`{}` is named twice", dimension.name()));
        }
        by.push(dimension);
    }
    if by.is_empty() { Err("name at least one dimension, such as team".to_owned()) } else { Ok(by) }
}

/// Counts and amounts of a group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Sums {
    /// Requests whose first attempt is in the group.
    pub requests: u64,
    /// Attempts.
    pub attempts: u64,
    /// Everything that went in.
    pub input_tokens: u64,
    /// Everything that came out.
    pub output_tokens: u64,
    /// Attempts without an amount, those on our own pools left out: their cost comes by allocation.
    pub unpriced_attempts: u64,
    /// Attempts on our own pools.
    pub self_hosted_attempts: u64,
    /// Attempts whose amount is an estimate.
    pub estimated_attempts: u64,
    /// At the public price; `null` when nothing in the group has an amount, which is not zero.
    #[schema(value_type = Option<String>)]
    pub list_cost: Option<Money>,
    /// What it really cost; `null` when nothing in the group has an amount, which is not zero.
    #[schema(value_type = Option<String>)]
    pub effective_cost: Option<Money>,
    /// GPU-seconds that the amounts of pools pay; `null` when none of them says.
    #[serde(rename = "gpu_seconds", serialize_with = "gpu_seconds")]
    #[schema(value_type = Option<String>)]
    pub gpu_us: Option<i64>,
}

/// Microseconds as seconds, in a decimal text.
fn gpu_seconds<S: Serializer>(micros: &Option<i64>, serializer: S) -> Result<S::Ok, S::Error> {
    micros.map(|micros| ledger::decimal::format_scaled(micros.into(), 6, 1)).serialize(serializer)
}

/// Known amounts add up; an unknown one adds nothing and makes nothing known.
fn plus(a: Option<Money>, b: Option<Money>) -> Option<Money> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a + b),
        (known, None) | (None, known) => known,
    }
}

impl Sums {
    fn add(&mut self, other: &Sums) {
        self.requests += other.requests;
        self.attempts += other.attempts;
        self.input_tokens += other.input_tokens;
        self.output_tokens += other.output_tokens;
        self.unpriced_attempts += other.unpriced_attempts;
        self.self_hosted_attempts += other.self_hosted_attempts;
        self.estimated_attempts += other.estimated_attempts;
        self.list_cost = plus(self.list_cost, other.list_cost);
        self.effective_cost = plus(self.effective_cost, other.effective_cost);
        self.gpu_us = match (self.gpu_us, other.gpu_us) {
            (Some(one), Some(two)) => Some(one.saturating_add(two)),
            (known, None) | (None, known) => known,
        };
    }
}

/// One group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Row {
    /// The values of the dimensions, in their order; `null` where nobody set one.
    pub key: Vec<Option<String>>,
    /// What the amounts are for.
    pub line: String,
    /// Counts and amounts.
    #[serde(flatten)]
    pub sums: Sums,
    /// Distinct tasks; they do not add up where one task is in several groups.
    pub tasks: u64,
}

/// A report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Report {
    /// Names of the dimensions.
    pub by: Vec<&'static str>,
    /// Requests' own rows, the dearest first, then every other line.
    pub rows: Vec<Row>,
    /// The sum of all rows.
    pub total: Sums,
    /// Distinct tasks in all.
    pub tasks: u64,
    /// What requests cost.
    #[schema(value_type = String)]
    pub request_cost: Money,
    /// The part of it that no team can be found for.
    #[schema(value_type = String)]
    pub unattributed_cost: Money,
    /// That part as a share between 0 and 1; `null` when nothing has a cost yet.
    pub unattributed_share: Option<String>,
    /// Attempts that no team can be found for.
    pub unattributed_attempts: u64,
    /// Pool cost that nothing has allocated yet.
    #[schema(value_type = String)]
    pub unallocated_pool_cost: Money,
    /// The books of each pool: what was used, what stood idle and why, and what a token costs.
    pub pools: Vec<PoolBooks>,
    /// What scaling gave back against the static plan, for each deployment and mode.
    pub gpus_given_back: Vec<GivenBackRow>,
}

type Key = (Vec<Option<String>>, String);

/// Groups the ledger by these dimensions within a period.
///
/// # Errors
/// When the ledger cannot be read.
pub async fn report(session: &Session, by: &[Dimension], period: Period) -> anyhow::Result<Report> {
    let mut groups: BTreeMap<Key, (Sums, u64)> = BTreeMap::new();
    let unattributed_attempts = attempts(session, by, period, &mut groups).await?;
    let unattributed_cost = postings(session, by, period, &mut groups).await?;
    let tasks = distinct_tasks(session, period).await?;
    let pools = pools(session, period).await?;
    let gpus_given_back = given_back(session, period).await?;

    let mut rows: Vec<Row> =
        groups.into_iter().map(|((key, line), (sums, tasks))| Row { key, line, sums, tasks }).collect();
    // Of nothing at all the cost is known: it is nothing.
    let of_nothing = rows.is_empty().then_some(Money::ZERO);
    let mut total = Sums { list_cost: of_nothing, effective_cost: of_nothing, ..Sums::default() };
    for row in &rows {
        total.add(&row.sums);
    }
    let of_line =
        |line: Line| rows.iter().filter(|row| row.line == line.name()).filter_map(|row| row.sums.effective_cost).sum();
    let request_cost: Money = of_line(Line::Request);
    let unallocated_pool_cost = of_line(Line::Unallocated);
    let is_time = by.first().is_some_and(|first| matches!(first, Dimension::Day | Dimension::Hour));
    rows.sort_by(|a, b| {
        let lines = (a.line != Line::Request.name()).cmp(&(b.line != Line::Request.name()));
        let dearest =
            if is_time { std::cmp::Ordering::Equal } else { b.sums.effective_cost.cmp(&a.sums.effective_cost) };
        lines.then(dearest).then_with(|| (&a.key, &a.line).cmp(&(&b.key, &b.line)))
    });
    Ok(Report {
        by: by.iter().map(|dimension| dimension.name()).collect(),
        rows,
        total,
        tasks,
        request_cost,
        unattributed_cost,
        unattributed_share: share(unattributed_cost, request_cost),
        unattributed_attempts,
        unallocated_pool_cost,
        pools,
        gpus_given_back,
    })
}

/// A share to six digits; `None` of nothing.
#[must_use]
pub fn share(part: Money, whole: Money) -> Option<String> {
    let whole = whole.pico();
    if whole <= 0 {
        return None;
    }
    let millionths = (part.pico().checked_mul(1_000_000)? + whole / 2) / whole;
    Some(ledger::decimal::format_scaled(millionths, 6, 1))
}

async fn attempts(
    session: &Session,
    by: &[Dimension],
    period: Period,
    groups: &mut BTreeMap<Key, (Sums, u64)>,
) -> anyhow::Result<u64> {
    let keys = keys(by.iter().map(|dimension| dimension.of_attempt()));
    let query = format!(
        "SELECT {keys}, a.team IS NULL AS no_team, \
         sum(CASE WHEN a.attempt = 0 THEN 1 ELSE 0 END) AS requests, count(*) AS attempts, count(DISTINCT a.task) AS tasks, \
         sum(a.input_tokens) AS input_tokens, sum(a.output_tokens) AS output_tokens, \
         sum(CASE WHEN a.charge = 'unpriced' AND a.charge_reason <> 'self_hosted' THEN 1 ELSE 0 END) AS unpriced, \
         sum(CASE WHEN a.charge = 'unpriced' AND a.charge_reason = 'self_hosted' THEN 1 ELSE 0 END) AS self_hosted, \
         sum(CASE WHEN a.charge = 'estimated' THEN 1 ELSE 0 END) AS estimated \
         FROM attempts a WHERE {} GROUP BY {}, a.team IS NULL",
        rows::within("a.received_at", period),
        positions(by.len()),
    );
    let mut unattributed = 0;
    for batch in session.sql(&query).await? {
        let no_team = rows::column(&batch, "no_team")?;
        let get = |name: &str, row| anyhow::Ok(rows::count(rows::column(&batch, name)?, row)?.unwrap_or(0));
        for row in 0..batch.num_rows() {
            let sums = Sums {
                requests: get("requests", row)?,
                attempts: get("attempts", row)?,
                input_tokens: get("input_tokens", row)?,
                output_tokens: get("output_tokens", row)?,
                unpriced_attempts: get("unpriced", row)?,
                self_hosted_attempts: get("self_hosted", row)?,
                estimated_attempts: get("estimated", row)?,
                ..Sums::default()
            };
            if rows::json(no_team, row)? == true {
                unattributed += sums.attempts;
            }
            let key = (key_of(&batch, by.len(), row)?, Line::Request.name().to_owned());
            let group = groups.entry(key).or_default();
            group.0.add(&sums);
            group.1 += get("tasks", row)?;
        }
    }
    Ok(unattributed)
}

async fn postings(
    session: &Session,
    by: &[Dimension],
    period: Period,
    groups: &mut BTreeMap<Key, (Sums, u64)>,
) -> anyhow::Result<Money> {
    let keys = keys(by.iter().map(|dimension| dimension.of_posting()));
    let with_attempts = if by.contains(&Dimension::Deployment) {
        "LEFT JOIN (SELECT request_id, attempt, deployment FROM attempts) a ON p.request_id = a.request_id AND p.attempt = a.attempt"
    } else {
        ""
    };
    let query = format!(
        "SELECT {keys}, p.line AS of_line, p.team IS NULL AS no_team, sum(p.list_cost) AS list_cost, \
         sum(p.effective_cost) AS effective_cost, sum(p.gpu_us) AS gpu_us \
         FROM postings p {with_attempts} WHERE {} GROUP BY {}, p.line, p.team IS NULL",
        rows::within("p.period_start", period),
        positions(by.len()),
    );
    let mut unattributed = Money::ZERO;
    for batch in session.sql(&query).await? {
        let (line, no_team) = (rows::column(&batch, "of_line")?, rows::column(&batch, "no_team")?);
        let (list, effective) = (rows::column(&batch, "list_cost")?, rows::column(&batch, "effective_cost")?);
        for row in 0..batch.num_rows() {
            let sums = Sums {
                list_cost: rows::money(list, row)?,
                effective_cost: rows::money(effective, row)?,
                gpu_us: rows::signed(rows::column(&batch, "gpu_us")?, row)?,
                ..Sums::default()
            };
            let line = rows::plain(line, row)?;
            if line == Line::Request.name() && rows::json(no_team, row)? == true {
                unattributed += sums.effective_cost.unwrap_or_default();
            }
            groups.entry((key_of(&batch, by.len(), row)?, line)).or_default().0.add(&sums);
        }
    }
    Ok(unattributed)
}

async fn distinct_tasks(session: &Session, period: Period) -> anyhow::Result<u64> {
    let query =
        format!("SELECT count(DISTINCT task) AS tasks FROM attempts WHERE {}", rows::within("received_at", period));
    let batches = session.sql(&query).await?;
    let Some(batch) = batches.iter().find(|batch| batch.num_rows() > 0) else { return Ok(0) };
    Ok(rows::count(rows::column(batch, "tasks")?, 0)?.unwrap_or(0))
}

fn keys(expressions: impl Iterator<Item = String>) -> String {
    let named = expressions.enumerate().map(|(index, expression)| format!("{expression} AS key_{index}"));
    named.collect::<Vec<_>>().join(", ")
}

/// `1, 2, …`: the key columns as SQL counts them.
fn positions(count: usize) -> String {
    (1..=count).map(|position| position.to_string()).collect::<Vec<_>>().join(", ")
}

fn key_of(batch: &arrow::array::RecordBatch, len: usize, row: usize) -> anyhow::Result<Vec<Option<String>>> {
    (0..len).map(|index| rows::text(batch.column(index), row)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dimensions_are_read_with_a_hint() {
        assert_eq!(dimensions(["team", " model"]), Ok(vec![Dimension::Team, Dimension::Model]));
        assert!(dimensions(["teem"]).unwrap_err().contains("did you mean `team`?"));
        assert!(dimensions(["team", "team"]).unwrap_err().contains("twice"));
        assert!(dimensions([""]).is_err());
    }

    #[test]
    fn shares_are_decimal_texts() {
        let money = |pico| Money::from_pico(pico);
        assert_eq!(share(money(1), money(8)), Some("0.125".to_owned()));
        assert_eq!(share(money(0), money(8)), Some("0.0".to_owned()));
        assert_eq!(share(money(1), money(0)), None);
    }
}
