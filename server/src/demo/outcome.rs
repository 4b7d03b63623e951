//! What the demo came to, from the ledger and from what the clients saw; nothing here is known beforehand.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use ledger::{Line, Money, Period};
use serde_json::{Value, json};
use store::{Session, Store, Verification};

use super::aside::Bypassed;
use super::engines::EngineTotals;
use super::scaled::Scaled;
use super::traffic::{Seen, SeenEnd};
use crate::commands::{report as reports, verify};
use crate::render::{self, Align, Table};
use crate::report::{Dimension, Report, report};
use crate::rows;
use crate::settlement::{self, Statement, statements};

/// Tasks that the bill shows.
const TASKS_MAX: usize = 10;

/// The demo's result.
pub struct Outcome {
    /// A request on a pool, whose share can be explained.
    pub some_request: Option<String>,
    costs: Report,
    tasks: Vec<Value>,
    pools: Vec<Statement>,
    bypassed: Bypassed,
    verification: Verification,
    engines: Vec<EngineTotals>,
    compared: Compared,
    aborted: u64,
    refused: u64,
    scaled: Scaled,
}

/// The clients' calls held against the ledger.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Compared {
    /// Calls sent.
    calls: u64,
    /// Calls whose client saw the end of the answer.
    finished: u64,
    /// Of these, those that the ledger does not know.
    lost: u64,
    /// Of these, those whose tokens differ from what the client was told.
    different: u64,
    /// Attempts that are in the ledger more than once.
    duplicates: u64,
}

/// What the ledger says of a request: rows per attempt, and the tokens of the last.
#[derive(Debug, Clone, Default)]
struct Booked {
    rows: BTreeMap<u64, u64>,
    tokens: (u64, u64),
}

impl Outcome {
    /// Reads the ledger and compares.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub async fn of(
        store: &Store,
        seen: &Seen,
        bypassed: Bypassed,
        engines: Vec<EngineTotals>,
    ) -> anyhow::Result<Outcome> {
        let booked = booked(store).await?;
        let session = &store.session().await?;
        let costs = report(session, &[Dimension::Team, Dimension::Model], Period::ALL).await?;
        let count = |end: fn(&SeenEnd) -> bool| seen.calls.iter().filter(|call| end(&call.end)).count();
        Ok(Outcome {
            some_request: dearest(session).await?,
            tasks: tasks(session).await?,
            verification: store.verify(&|_| {}).await?,
            compared: compare(seen, &booked),
            aborted: u64::try_from(count(|end| *end == SeenEnd::Aborted))?,
            refused: u64::try_from(count(|end| matches!(end, SeenEnd::Refused(_) | SeenEnd::Broken)))?,
            scaled: Scaled::of(session, seen).await?,
            costs,
            pools: statements(session, Period::ALL).await?,
            bypassed,
            engines,
        })
    }

    /// Whether the promises held.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.is_balanced()
            && self.is_allocated()
            && self.compared.lost == 0
            && self.duplicates() == 0
            && self.scaled.is_good()
    }

    /// The books are closed, and the lines of each pool are its cost to the last unit.
    fn is_balanced(&self) -> bool {
        self.verification.is_clean() && !self.pools.is_empty() && self.pools.iter().all(|pool| pool.balanced)
    }

    /// Nothing that a pool cost is left without a reason.
    fn is_allocated(&self) -> bool {
        self.pools.iter().all(|pool| pool.line(Line::Unallocated) == Money::ZERO)
    }

    fn pools_sum(&self, of: impl Fn(&Statement) -> Money) -> Money {
        self.pools.iter().map(of).sum()
    }

    fn duplicates(&self) -> u64 {
        self.compared.duplicates + self.verification.duplicates
    }

    /// The result as one JSON document.
    #[must_use]
    pub fn document(&self, data: &Path) -> Value {
        let total = &self.costs.total;
        json!({
            "requests": total.requests,
            "attempts": total.attempts,
            "input_tokens": total.input_tokens,
            "output_tokens": total.output_tokens,
            "charged_usd": self.costs.request_cost,
            "pool_cost_usd": self.pools_sum(|pool| pool.cost),
            "pool_requests_usd": self.pools_sum(|pool| pool.line(Line::Request)),
            "pool_idle_usd": self.pools_sum(idle),
            "unallocated_pool_cost_usd": self.costs.unallocated_pool_cost,
            "allocated": self.is_allocated(),
            "unattributed_share": self.costs.unattributed_share,
            "unattributed_attempts": self.costs.unattributed_attempts,
            "unpriced_attempts": total.unpriced_attempts,
            "self_hosted_attempts": total.self_hosted_attempts,
            "estimated_attempts": total.estimated_attempts,
            "duplicates": self.duplicates(),
            "lost": self.compared.lost,
            "lost_records": self.verification.lost,
            "balanced": self.is_balanced(),
            "clients": {
                "calls": self.compared.calls, "finished": self.compared.finished, "aborted": self.aborted,
                "refused_or_broken": self.refused, "tokens_differ": self.compared.different,
            },
            "costs": self.costs,
            "tasks": self.tasks,
            "pools": self.pools,
            "bypassed": self.bypassed,
            "scaling": self.scaled.document(),
            "engines": self.engines,
            "verification": self.verification,
            "data": data,
        })
    }

    /// The result for people.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = format!("\ncost by team and model\n{}", reports::text(&self.costs, None));
        text.push_str("\ndearest tasks\n");
        text.push_str(&self.tasks_table().to_string());
        text.push_str("\npools: what their GPUs cost, and for what\n");
        text.push_str(&settlement::table(&self.pools).to_string());
        text.push_str(&self.scaled.text());
        let _ = writeln!(
            text,
            "\na script sent {} with {} input and {} output tokens past the gateway; what of it is certain is unobserved",
            render::counted(self.bypassed.calls, "call"),
            render::count(self.bypassed.input_tokens),
            render::count(self.bypassed.output_tokens)
        );
        let compared = &self.compared;
        let _ = write!(
            text,
            "\nclients saw {} calls: {} finished, {} aborted, {} refused or broken; {} lost, {} booked twice, {} with other \
             tokens\n\nverification\n{}",
            compared.calls,
            compared.finished,
            self.aborted,
            self.refused,
            compared.lost,
            self.duplicates(),
            compared.different,
            verify::text(&self.verification)
        );
        text
    }

    fn tasks_table(&self) -> Table {
        let mut table = Table::new([
            ("task", Align::Left),
            ("team", Align::Left),
            ("feature", Align::Left),
            ("requests", Align::Right),
            ("input tokens", Align::Right),
            ("output tokens", Align::Right),
            ("cost USD", Align::Right),
        ]);
        let words = |task: &Value, name: &str| task[name].as_str().unwrap_or("–").to_owned();
        let number = |task: &Value, name: &str| render::count(task[name].as_u64().unwrap_or(0));
        let cost = |task: &Value| task["effective_cost"].as_str().and_then(|cost| cost.parse().ok());
        let places = render::places_for(self.tasks.iter().filter_map(cost));
        for task in &self.tasks {
            let cost = cost(task);
            table.row([
                words(task, "task"),
                words(task, "team"),
                words(task, "feature"),
                number(task, "requests"),
                number(task, "input_tokens"),
                number(task, "output_tokens"),
                cost.map_or("unknown".to_owned(), |cost| render::dollars_to(cost, places)),
            ]);
        }
        table
    }
}

/// What a pool cost beside requests and jobs.
fn idle(pool: &Statement) -> Money {
    pool.sum - pool.line(Line::Request) - pool.line(Line::Job) - pool.line(Line::Unobserved)
}

fn compare(seen: &Seen, ledger: &BTreeMap<String, Booked>) -> Compared {
    let mut compared = Compared { calls: u64::try_from(seen.calls.len()).unwrap_or(u64::MAX), ..Compared::default() };
    for call in seen.calls.iter().filter(|call| call.end == SeenEnd::Finished) {
        compared.finished += 1;
        // An answer without an id cannot be looked up, so that nothing proves it was booked.
        match call.request_id.as_ref().and_then(|id| ledger.get(id)) {
            None => compared.lost += 1,
            Some(booked) => {
                let told = call.usage.map(|usage| (usage.input_tokens, usage.output_tokens));
                compared.different += u64::from(told.is_some_and(|told| told != booked.tokens));
            }
        }
    }
    let counts = ledger.values().flat_map(|booked| booked.rows.values());
    compared.duplicates = counts.map(|&rows| rows - 1).sum();
    compared
}

async fn booked(store: &Store) -> anyhow::Result<BTreeMap<String, Booked>> {
    let query = "SELECT request_id, attempt, count(*) AS copies, max(input_tokens) AS input_tokens, \
                 max(output_tokens) AS output_tokens FROM attempts GROUP BY request_id, attempt ORDER BY request_id, attempt";
    let mut booked: BTreeMap<String, Booked> = BTreeMap::new();
    for batch in store.sql(query).await? {
        let count = |name: &str, row| anyhow::Ok(rows::count(rows::column(&batch, name)?, row)?.unwrap_or(0));
        for row in 0..batch.num_rows() {
            let id = rows::plain(rows::column(&batch, "request_id")?, row)?;
            let request = booked.entry(id).or_default();
            request.rows.insert(count("attempt", row)?, count("copies", row)?);
            request.tokens = (count("input_tokens", row)?, count("output_tokens", row)?);
        }
    }
    Ok(booked)
}

/// The request with the dearest share of a pool: the one worth explaining.
async fn dearest(session: &Session) -> anyhow::Result<Option<String>> {
    let query = "SELECT request_id FROM postings WHERE origin_kind = 'pool' AND line = 'request' AND request_id IS NOT NULL \
                 GROUP BY request_id ORDER BY sum(effective_cost) DESC, request_id LIMIT 1";
    let batches = session.sql(query).await?;
    let Some(batch) = batches.iter().find(|batch| batch.num_rows() > 0) else { return Ok(None) };
    rows::text(rows::column(batch, "request_id")?, 0)
}

/// The dearest tasks: providers' charges and shares of pools together.
async fn tasks(session: &Session) -> anyhow::Result<Vec<Value>> {
    let query = format!(
        "SELECT used.task, used.team, used.feature, used.requests, used.input_tokens, used.output_tokens, \
         paid.effective_cost FROM (SELECT task, min(team) AS team, min(feature) AS feature, \
         sum(CASE WHEN attempt = 0 THEN 1 ELSE 0 END) AS requests, sum(input_tokens) AS input_tokens, \
         sum(output_tokens) AS output_tokens FROM attempts WHERE task IS NOT NULL GROUP BY task) AS used \
         LEFT JOIN (SELECT task, sum(effective_cost) AS effective_cost FROM postings \
         WHERE line = 'request' AND task IS NOT NULL GROUP BY task) AS paid ON used.task = paid.task \
         ORDER BY paid.effective_cost DESC NULLS LAST, used.task LIMIT {TASKS_MAX}"
    );
    crate::commands::sql::documents(&session.sql(&query).await?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::traffic::{SeenCall, SeenUsage};

    #[test]
    fn lost_doubled_and_different_calls_are_counted() {
        let call = |id: Option<&str>, end, tokens: Option<(u64, u64)>| SeenCall {
            request_id: id.map(str::to_owned),
            consumer: "c",
            model: "m",
            task: "t".to_owned(),
            end,
            usage: tokens.map(|(input_tokens, output_tokens)| SeenUsage { input_tokens, output_tokens }),
        };
        let seen = Seen {
            calls: vec![
                call(Some("a"), SeenEnd::Finished, Some((1, 2))),
                call(Some("b"), SeenEnd::Finished, Some((1, 3))),
                call(Some("gone"), SeenEnd::Finished, None),
                call(None, SeenEnd::Finished, None),
                call(Some("gone"), SeenEnd::Aborted, None),
            ],
            ..Seen::default()
        };
        let booked = |copies| Booked { rows: [(0, copies)].into(), tokens: (1, 2) };
        let ledger = [("a".to_owned(), booked(1)), ("b".to_owned(), booked(2))].into();
        let expected = Compared { calls: 5, finished: 4, lost: 2, different: 1, duplicates: 1 };
        assert_eq!(compare(&seen, &ledger), expected);
    }
}
