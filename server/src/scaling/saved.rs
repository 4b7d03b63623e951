//! What was given back, from the ledger: decisions and the GPUs that were there, held against the static plan.

use ledger::scaling::{Decided, GivenBack};
use ledger::{CapacityFact, GpuHourRate, Money, Period, ScalingMode, Timestamp};
use serde::Serialize;
use store::Session;
use utoipa::ToSchema;

use crate::render::{self, Align, Table};
use crate::rows;

/// The sums of one deployment in one mode, amounts in USD.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct GivenBackRow {
    /// The pool that pays.
    pub pool: String,
    /// What was scaled.
    pub deployment: String,
    /// `shadow`, `act` or `stopped`.
    #[schema(value_type = String)]
    pub mode: ScalingMode,
    /// The time that decisions cover, seconds.
    pub seconds: String,
    /// What the static plan would have cost: the actual cost and what was given back.
    #[schema(value_type = String)]
    pub static_cost: Money,
    /// What the GPUs that were there cost.
    #[schema(value_type = String)]
    pub actual_cost: Money,
    /// The static plan's cost less the actual; negative where more ran.
    #[schema(value_type = String)]
    pub given_back: Money,
    /// What the desired replicas would have cost.
    #[schema(value_type = String)]
    pub desired_cost: Money,
    /// The actual cost less that: in shadow, what acting would have saved.
    #[schema(value_type = String)]
    pub would_save: Money,
    /// GPU-seconds of the static plan.
    pub static_gpu_seconds: String,
    /// GPU-seconds that were there.
    pub actual_gpu_seconds: String,
    /// Committed GPU-seconds that did not run: they saved no cash and were free for other work.
    pub freed_gpu_seconds: String,
    /// Whether what ran is only what the scaler saw: no GPU is known by its deployment.
    pub estimated: bool,
}

/// What was given back within a period, by pool, deployment and mode.
///
/// # Errors
/// When the ledger cannot be read.
pub async fn given_back(session: &Session, period: Period) -> anyhow::Result<Vec<GivenBackRow>> {
    let decisions = decided(session, period).await?;
    if decisions.is_empty() {
        return Ok(Vec::new());
    }
    let mut capacity: Vec<CapacityFact> = Vec::new();
    for batch in session.sql("SELECT * FROM capacity WHERE pool IN (SELECT DISTINCT pool FROM decisions)").await? {
        capacity.extend(store::capacity_of(&batch)?);
    }
    let found = ledger::scaling::given_back(decisions, &capacity, period);
    Ok(found.iter().flat_map(rows_of).collect())
}

/// What was given back as a table, with what it means below; nothing where nothing was scaled.
#[must_use]
pub fn text(rows: &[GivenBackRow]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let amounts = ["static plan USD", "actual USD", "given back USD", "desired USD", "would save USD"];
    let columns = [("GPUs given back", Align::Left), ("mode", Align::Left), ("seconds", Align::Right)];
    let mut table = Table::new(columns.into_iter().chain(amounts.map(|name| (name, Align::Right))));
    let of = |row: &GivenBackRow| [row.static_cost, row.actual_cost, row.given_back, row.desired_cost, row.would_save];
    let places = render::places_for(rows.iter().flat_map(of));
    let mut totals = [Money::ZERO; 5];
    for row in rows {
        let seconds = row.seconds.split('.').next().unwrap_or_default().to_owned();
        let names = [format!("{} on {}", row.deployment, row.pool), row.mode.name().to_owned(), seconds];
        table.row(names.into_iter().chain(of(row).map(|amount| render::dollars_to(amount, places))));
        totals.iter_mut().zip(of(row)).for_each(|(sum, amount)| *sum += amount);
    }
    let names = ["total".to_owned(), String::new(), String::new()];
    table.total(names.into_iter().chain(totals.map(|amount| render::dollars_to(amount, places))));
    let mut notes = vec![
        "static plan = actual + given back, over the time that decisions cover; desired is what the scaler decided, would save what \
         acting on it takes off the actual"
            .to_owned(),
    ];
    let freed: Vec<&GivenBackRow> = rows.iter().filter(|row| row.freed_gpu_seconds != "0").collect();
    for row in freed {
        notes.push(format!(
            "{} on {}: {} committed GPU-seconds did not run; they save no cash and were free for other work",
            row.deployment, row.pool, row.freed_gpu_seconds
        ));
    }
    if rows.iter().any(|row| row.estimated) {
        notes.push("no GPU of the ledger names the deployment: what ran is what the scaler saw".to_owned());
    }
    format!("\n{table}{}\n", notes.join("\n"))
}

fn rows_of(found: &GivenBack) -> Vec<GivenBackRow> {
    let seconds = |micros: u128| ledger::decimal::format_scaled(i128::try_from(micros).unwrap_or(i128::MAX), 6, 0);
    let row = |part: &ledger::scaling::Part| GivenBackRow {
        pool: found.pool.to_string(),
        deployment: found.deployment.to_string(),
        mode: part.mode,
        seconds: seconds(part.micros.into()),
        static_cost: part.static_cost,
        actual_cost: part.actual_cost,
        given_back: part.given_back,
        desired_cost: part.desired_cost,
        would_save: part.would_save,
        static_gpu_seconds: seconds(part.static_gpu_us),
        actual_gpu_seconds: seconds(part.actual_gpu_us),
        freed_gpu_seconds: seconds(part.freed_gpu_us),
        estimated: found.estimated,
    };
    found.parts.iter().map(row).collect()
}

/// Only the columns that matter to the sums: a month of decisions every few seconds has many.
async fn decided(session: &Session, period: Period) -> anyhow::Result<Vec<Decided>> {
    let query = format!(
        "SELECT pool, deployment, CAST(decided_at AS BIGINT) AS at, mode, ready + pending AS provisioned, desired, static_replicas, \
         committed_replicas, gpus, usd_per_gpu_hour FROM decisions WHERE {}",
        rows::within("decided_at", period)
    );
    let mut decisions = Vec::new();
    for batch in session.sql(&query).await? {
        for row in 0..batch.num_rows() {
            let text = |name| rows::plain(rows::column(&batch, name)?, row);
            let count = |name| anyhow::Ok(u32::try_from(rows::count(rows::column(&batch, name)?, row)?.unwrap_or(0))?);
            let named = text("mode")?;
            let Some(mode) = ScalingMode::ALL.into_iter().find(|mode| mode.name() == named) else { continue };
            let rate = rows::money(rows::column(&batch, "usd_per_gpu_hour")?, row)?.unwrap_or_default();
            decisions.push(Decided {
                pool: text("pool")?.into(),
                deployment: text("deployment")?.into(),
                at: Timestamp::from_micros(rows::signed(rows::column(&batch, "at")?, row)?.unwrap_or(0)),
                mode,
                provisioned: count("provisioned")?,
                desired: count("desired")?,
                static_replicas: count("static_replicas")?,
                committed: count("committed_replicas")?,
                gpus: count("gpus")?,
                rate: GpuHourRate::from_pico(u64::try_from(rate.pico())?),
            });
        }
    }
    Ok(decisions)
}
