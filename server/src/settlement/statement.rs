//! What a pool cost and on which lines that stands, from the ledger's own rows.

use std::collections::BTreeMap;

use anyhow::Context as _;
use ledger::settle::{cost_by_minute, interval_of};
use ledger::{CapacityFact, Label, Line, Money, Period};
use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use store::Session;

use crate::render::{self, Align, Table};
use crate::rows;

/// One pool's cost and its lines.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Statement {
    /// The pool.
    pub pool: Label,
    /// Who pays for what nobody used.
    pub owner: Option<Label>,
    /// The kind of GPU, by its newest fact.
    pub gpu: Label,
    /// How many were there at the end.
    pub gpus: u32,
    /// `gpus x rate x seconds`, known before anything is allocated.
    pub cost: Money,
    /// What is booked on each line.
    #[serde(serialize_with = "by_name")]
    pub lines: BTreeMap<Line, Money>,
    /// The sum of the lines.
    pub sum: Money,
    /// Whether the lines are the cost, to the last unit.
    pub balanced: bool,
    /// Requests that pay a part.
    pub requests: u64,
    /// GPU-seconds that requests pay, with six digits. `None` where no row says.
    pub request_gpu_s: Option<String>,
    /// How much was known, by the requests' amounts: tier to sum.
    #[serde(serialize_with = "by_text")]
    pub tiers: BTreeMap<String, Money>,
}

/// Every line, also those on which nothing stands: zero here is known.
fn by_name<S: Serializer>(lines: &BTreeMap<Line, Money>, serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(None)?;
    for line in Line::ALL {
        map.serialize_entry(line.name(), &lines.get(&line).copied().unwrap_or_default())?;
    }
    map.end()
}

fn by_text<S: Serializer>(tiers: &BTreeMap<String, Money>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(tiers)
}

impl Statement {
    /// What stands on one line.
    #[must_use]
    pub fn line(&self, line: Line) -> Money {
        self.lines.get(&line).copied().unwrap_or_default()
    }
}

/// The statement of each pool that cost anything, or has anything booked, in the minutes that `period` touches.
///
/// # Errors
/// When the ledger cannot be read.
pub async fn statements(session: &Session, period: Period) -> anyhow::Result<Vec<Statement>> {
    let period = whole_minutes(period);
    let mut statements: BTreeMap<Label, Statement> = BTreeMap::new();
    for fact in super::read::newest_capacity(session, period).await? {
        let pool = statements.entry(fact.pool.clone()).or_insert_with(|| empty(&fact));
        pool.cost += cost_by_minute(&fact, period);
        (pool.owner, pool.gpu, pool.gpus) = (fact.owner.clone(), fact.gpu.clone(), fact.gpus);
    }
    let query = format!(
        "SELECT pool, line, tier, sum(effective_cost) AS amount, count(DISTINCT request_id) AS requests, \
         CAST(sum(gpu_us) AS BIGINT) AS gpu_us \
         FROM postings WHERE origin_kind = 'pool' AND {} GROUP BY pool, line, tier",
        rows::within("period_start", period)
    );
    for batch in session.sql(&query).await? {
        let column = |name| rows::column(&batch, name);
        let [pools, lines, tiers] = [column("pool")?, column("line")?, column("tier")?];
        let [amounts, requests, gpu_us] = [column("amount")?, column("requests")?, column("gpu_us")?];
        for row in 0..batch.num_rows() {
            let name = rows::plain(lines, row)?;
            let line = Line::ALL.into_iter().find(|line| line.name() == name);
            let line = line.with_context(|| format!("`{name}` is no line"))?;
            let pool: Label = rows::plain(pools, row)?.into();
            let amount = rows::money(amounts, row)?.unwrap_or_default();
            let statement = statements.entry(pool.clone()).or_insert_with(|| unknown(&pool));
            *statement.lines.entry(line).or_default() += amount;
            statement.sum += amount;
            if line != Line::Request {
                continue;
            }
            statement.requests += rows::count(requests, row)?.unwrap_or(0);
            if let Some(micros) = rows::text(gpu_us, row)?.and_then(|text| text.parse::<i64>().ok()) {
                let before = statement.request_gpu_s.take().and_then(|text| micros_of(&text)).unwrap_or(0);
                statement.request_gpu_s = Some(seconds(before.saturating_add(micros)));
            }
            if let Some(tier) = rows::text(tiers, row)? {
                *statement.tiers.entry(tier).or_default() += amount;
            }
        }
    }
    Ok(statements
        .into_values()
        .map(|statement| Statement { balanced: statement.sum == statement.cost, ..statement })
        .filter(|statement| statement.cost != Money::ZERO || !statement.lines.is_empty())
        .collect())
}

/// Postings are of whole minutes, and so is what they are held against.
fn whole_minutes(period: Period) -> Period {
    let all = Period::ALL;
    let start = if period.start == all.start { all.start } else { interval_of(period.start).start };
    let end = if period.end == all.end { all.end } else { interval_of(period.end.plus_micros(-1)).end };
    Period { start, end }
}

fn empty(fact: &CapacityFact) -> Statement {
    Statement { owner: fact.owner.clone(), gpu: fact.gpu.clone(), gpus: fact.gpus, ..unknown(&fact.pool) }
}

fn unknown(pool: &Label) -> Statement {
    Statement {
        pool: pool.clone(),
        owner: None,
        gpu: "".into(),
        gpus: 0,
        cost: Money::ZERO,
        lines: BTreeMap::new(),
        sum: Money::ZERO,
        balanced: false,
        requests: 0,
        request_gpu_s: None,
        tiers: BTreeMap::new(),
    }
}

fn seconds(micros: i64) -> String {
    let (sign, micros) = if micros < 0 { ("-", micros.unsigned_abs()) } else { ("", micros.unsigned_abs()) };
    format!("{sign}{}.{:06}", micros / 1_000_000, micros % 1_000_000)
}

fn micros_of(seconds: &str) -> Option<i64> {
    seconds.replace('.', "").parse().ok()
}

/// Lines that are shown even when nothing stands on them.
const ALWAYS: [Line; 7] =
    [Line::Request, Line::Headroom, Line::IdleReserved, Line::Warm, Line::ColdStart, Line::Waste, Line::Unobserved];

/// One table for all pools: a row a line, a column a pool, then the sum, the cost, and whether they are the same.
#[must_use]
pub fn table(statements: &[Statement]) -> Table {
    let heads: Vec<String> = statements.iter().map(|one| format!("{} USD", one.pool)).collect();
    let columns = std::iter::once(("line", Align::Left)).chain(heads.iter().map(|head| (head.as_str(), Align::Right)));
    let mut table = Table::new(columns);
    let shown = statements.iter().flat_map(|one| one.lines.values().copied().chain([one.cost]));
    let places = render::places_for(shown).max(6);
    let dollars = |amount: Money| render::dollars_to(amount, places);
    for line in Line::ALL {
        let used = statements.iter().any(|one| one.line(line) != Money::ZERO);
        if used || ALWAYS.contains(&line) {
            let amounts = statements.iter().map(|one| dollars(one.line(line)));
            table.row(std::iter::once(said(line).to_owned()).chain(amounts));
        }
    }
    let mut total = |name: &str, cell: &dyn Fn(&Statement) -> String| {
        table.total(std::iter::once(name.to_owned()).chain(statements.iter().map(cell)));
    };
    total("sum", &|one| dollars(one.sum));
    total("pool cost", &|one| dollars(one.cost));
    total("balanced", &|one| if one.balanced { "yes".to_owned() } else { format!("off by {}", one.sum - one.cost) });
    table
}

/// A line as people say it.
const fn said(line: Line) -> &'static str {
    match line {
        Line::Request => "requests",
        Line::Job => "jobs",
        other => other.name(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ledger::Timestamp;

    #[test]
    fn a_period_is_taken_to_whole_minutes() {
        let at = |seconds: i64| Timestamp::from_micros(seconds * 1_000_000);
        let taken = whole_minutes(Period { start: at(30), end: at(61) });
        assert_eq!(taken, Period { start: at(0), end: at(120) });
        assert_eq!(whole_minutes(Period { start: at(60), end: at(120) }), Period { start: at(60), end: at(120) });
        assert_eq!(whole_minutes(Period::ALL), Period::ALL);
    }

    #[test]
    fn seconds_are_written_and_read() {
        for micros in [0, 1, 999_999, 61_000_000, -1_500_000] {
            assert_eq!(micros_of(&seconds(micros)), Some(micros), "{}", seconds(micros));
        }
    }

    #[test]
    fn every_pool_has_a_column_and_says_whether_it_closes() {
        let usd = |text: &str| text.parse::<Money>().unwrap();
        let open = Statement { cost: usd("1.00"), sum: usd("0.75"), ..unknown(&"open".into()) };
        let lines = BTreeMap::from([(Line::Request, usd("0.25")), (Line::IdleReserved, usd("0.75"))]);
        let closed =
            Statement { cost: usd("1.00"), sum: usd("1.00"), balanced: true, lines, ..unknown(&"closed".into()) };
        let text = table(&[closed.clone(), open]).to_string();
        for part in ["closed USD", "open USD", "requests", "0.250000", "cold_start", "yes", "off by -0.25"] {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        assert!(!text.contains("stranded"), "lines without anything are left out\n{text}");
        let json = serde_json::to_value(&closed).unwrap();
        assert_eq!(json["lines"]["idle_reserved"], "0.75");
        assert_eq!(json["lines"]["stranded"], "0.00", "in JSON every line is there");
    }
}
