//! `farthing report`: cost and unit economics by any dimensions.

use std::process::ExitCode;

use ledger::{Line, Money};

use super::App;
use crate::books;
use crate::cli::{Report as Options, Unit};
use crate::render::{self, Align, Table};
use crate::report::{Dimension, Part, PoolBooks, Report, Row, Sums, dimensions, report};

/// Writes the report.
///
/// # Errors
/// When a dimension is unknown or the ledger cannot be read.
pub async fn run(app: &App, options: &Options) -> anyhow::Result<ExitCode> {
    let by = dimensions(options.by.iter().map(String::as_str)).map_err(anyhow::Error::msg)?;
    let period = options.span.period().map_err(anyhow::Error::msg)?;
    let store = books::read(&app.global.data_dir()).await?;
    let report = report(&store.session().await?, &by, period).await?;
    if app.global.json {
        render::say_json(&document(&report, options.unit)?)?;
    } else {
        render::say(&text(&report, options.unit))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The report as a JSON document, with unit costs when asked for.
///
/// # Errors
/// When it cannot be written as JSON.
pub fn document(report: &Report, unit: Option<Unit>) -> anyhow::Result<serde_json::Value> {
    let mut document = serde_json::to_value(report)?;
    let Some(unit) = unit else { return Ok(document) };
    document["unit"] = unit_name(unit).into();
    document["total"]["unit_cost"] = unit_cost(&report.total, report.tasks, unit).map(|cost| cost.to_string()).into();
    if let Some(list) = document["rows"].as_array_mut() {
        for (document, row) in list.iter_mut().zip(&report.rows) {
            document["unit_cost"] = unit_cost(&row.sums, row.tasks, unit).map(|cost| cost.to_string()).into();
        }
    }
    Ok(document)
}

/// The report as a table with totals, and what stands beside them.
#[must_use]
pub fn text(report: &Report, unit: Option<Unit>) -> String {
    if report.rows.is_empty() {
        return "nothing is booked in this time\n".to_owned();
    }
    let columns = report.by.iter().map(|&name| (name, Align::Left)).chain([
        ("requests", Align::Right),
        ("attempts", Align::Right),
        ("input tokens", Align::Right),
        ("output tokens", Align::Right),
        ("unpriced", Align::Right),
        ("on pools", Align::Right),
        ("list USD", Align::Right),
        ("effective USD", Align::Right),
    ]);
    let on_pools = report.rows.iter().any(|row| row.sums.gpu_us.is_some());
    let columns = columns.chain(on_pools.then_some(("GPU-seconds", Align::Right)));
    let mut table = Table::new(columns.chain(unit.map(|unit| (unit_heading(unit), Align::Right))));
    let amounts = report.rows.iter().flat_map(|row| [row.sums.list_cost, row.sums.effective_cost]).flatten();
    let places = render::places_for(amounts);
    let units = report.rows.iter().filter_map(|row| unit_cost(&row.sums, row.tasks, unit?));
    let places = Places { cost: places, unit: render::places_for(units), on_pools };
    for row in &report.rows {
        table.row(names(report, row).into_iter().chain(cells(&row.sums, row.tasks, unit, places)));
    }
    let mut total = vec![String::new(); report.by.len()];
    "total".clone_into(&mut total[0]);
    table.total(total.into_iter().chain(cells(&report.total, report.tasks, unit, places)));
    format!("{table}\n{}{}{}", notes(report, unit), pools(&report.pools), crate::scaling::text(&report.gpus_given_back))
}

/// Places of a column's amounts, so that they can be compared, and which columns there are.
#[derive(Debug, Clone, Copy)]
struct Places {
    cost: u32,
    unit: u32,
    /// Whether GPU-seconds have a column.
    on_pools: bool,
}

fn names(report: &Report, row: &Row) -> Vec<String> {
    let mut names: Vec<String> = row.key.iter().map(|value| value.clone().unwrap_or_else(|| "–".to_owned())).collect();
    if row.line != Line::Request.name() && !report.by.contains(&Dimension::Line.name()) {
        // Costs of no request stand under their line's name, in the first column that has no value of its own.
        let label = format!("({})", line_label(&row.line));
        match row.key.iter().position(Option::is_none) {
            Some(free) => names[free] = label,
            None => names[0] = format!("{} {label}", names[0]),
        }
    }
    names
}

/// The line's name as people read it.
#[must_use]
pub fn line_label(line: &str) -> String {
    match line {
        "unallocated" => "pool cost not yet allocated".to_owned(),
        other => other.replace('_', " "),
    }
}

fn cells(sums: &Sums, tasks: u64, unit: Option<Unit>, places: Places) -> Vec<String> {
    // A group whose attempts all lack an amount shows none: unknown is not zero.
    let amount =
        |amount: Option<Money>| amount.map_or("unknown".to_owned(), |amount| render::dollars_to(amount, places.cost));
    let counts = [
        sums.requests,
        sums.attempts,
        sums.input_tokens,
        sums.output_tokens,
        sums.unpriced_attempts,
        sums.self_hosted_attempts,
    ];
    let mut cells: Vec<String> = counts.into_iter().map(render::count).collect();
    cells.extend([amount(sums.list_cost), amount(sums.effective_cost)]);
    if places.on_pools {
        // What is paid to providers takes no time of our GPUs.
        cells.push(sums.gpu_us.map_or("–".to_owned(), render::gpu_seconds));
    }
    if let Some(unit) = unit {
        cells.push(unit_cost(sums, tasks, unit).map_or("–".to_owned(), |cost| render::dollars_to(cost, places.unit)));
    }
    cells
}

/// What a unit cost, rounded half up to the picodollar; `None` of no units.
fn unit_cost(sums: &Sums, tasks: u64, unit: Unit) -> Option<Money> {
    let (scale, count) = match unit {
        Unit::Request => (1, sums.requests),
        Unit::Task => (1, tasks),
        Unit::MillionTokens => (1_000_000, sums.input_tokens.saturating_add(sums.output_tokens)),
    };
    let count = i128::from(count);
    let cost = sums.effective_cost?;
    (count > 0).then(|| {
        let whole = cost.pico().saturating_mul(scale);
        Money::from_pico((2 * whole + count).div_euclid(2 * count))
    })
}

const fn unit_name(unit: Unit) -> &'static str {
    match unit {
        Unit::Request => "request",
        Unit::Task => "task",
        Unit::MillionTokens => "million_tokens",
    }
}

const fn unit_heading(unit: Unit) -> &'static str {
    match unit {
        Unit::Request => "USD/request",
        Unit::Task => "USD/task",
        Unit::MillionTokens => "USD/M tokens",
    }
}

fn notes(report: &Report, unit: Option<Unit>) -> String {
    let mut notes = Vec::new();
    let pico = |amount: Money| u128::try_from(amount.pico()).unwrap_or(0);
    let share = render::percent(pico(report.unattributed_cost), pico(report.request_cost));
    notes.push(match share {
        Some(share) => format!(
            "unattributed: {share} of request cost ({} USD), {} without a team",
            render::dollars(report.unattributed_cost),
            render::counted(report.unattributed_attempts, "attempt")
        ),
        None => format!(
            "unattributed: {} without a team; no request has an amount yet",
            render::counted(report.unattributed_attempts, "attempt")
        ),
    });
    if report.unallocated_pool_cost != Money::ZERO {
        notes.push(format!("pool cost not yet allocated: {} USD", render::dollars(report.unallocated_pool_cost)));
    }
    if report.total.unpriced_attempts > 0 {
        let attempts = render::counted(report.total.unpriced_attempts, "attempt");
        notes.push(format!("unpriced: {attempts}, whose cost is unknown and in no amount above"));
    }
    if report.total.self_hosted_attempts > 0 {
        let attempts = render::counted(report.total.self_hosted_attempts, "attempt");
        notes.push(format!("on our own pools: {attempts}, whose cost comes by allocation"));
    }
    if report.total.estimated_attempts > 0 {
        let attempts = render::counted(report.total.estimated_attempts, "attempt");
        notes.push(format!("estimated: the amounts of {attempts}"));
    }
    if unit.is_some() && report.total.unpriced_attempts + report.total.self_hosted_attempts > 0 {
        notes.push("unit costs count every request and know only the amounts above: they are lower bounds".to_owned());
    }
    notes.into_iter().map(|note| note + "\n").collect()
}

/// The books of each pool: every line, and what a million tokens cost.
fn pools(pools: &[PoolBooks]) -> String {
    let mut text = String::new();
    for pool in pools {
        let mut table = Table::new([
            (&*format!("pool {}", pool.pool), Align::Left),
            ("GPU-seconds", Align::Right),
            ("USD", Align::Right),
            ("share", Align::Right),
        ]);
        let places = render::places_for(pool.lines.iter().map(|line| line.part.cost));
        let whole = u128::try_from(pool.all.cost.pico()).unwrap_or(0);
        let cells = |name: String, part: Part| {
            let share = u128::try_from(part.cost.pico()).ok().and_then(|part| render::percent(part, whole));
            let time = part.gpu_us.map_or("unknown".to_owned(), render::gpu_seconds);
            [name, time, render::dollars_to(part.cost, places), share.unwrap_or_else(|| "–".to_owned())]
        };
        table.row(cells("busy".to_owned(), pool.busy));
        let jobs = pool.lines.iter().any(|line| line.line == Line::Job.name());
        for line in pool.lines.iter().filter(|line| jobs && is_use(line.line)) {
            table.row(cells(format!("  {}s", line_label(line.line)), line.part));
        }
        table.row(cells("idle".to_owned(), pool.idle));
        for line in pool.lines.iter().filter(|line| is_idle(line.line)) {
            table.row(cells(format!("  {}", line_label(line.line)), line.part));
        }
        table.row(cells("waste".to_owned(), pool.waste));
        let others = |name: &str| !is_idle(name) && !is_use(name) && name != Line::Waste.name();
        for line in pool.lines.iter().filter(|line| others(line.line)) {
            table.row(cells(line_label(line.line), line.part));
        }
        table.total(cells("all".to_owned(), pool.all));
        let price = |price: Option<Money>| price.map_or("unknown".to_owned(), |price| render::dollars(price) + " USD");
        let prices = pool.usd_per_million_output_tokens;
        text += &format!(
            "\n{table}a million output tokens: {} busy only, {} with idle{}, {} at full load; {} were made\n",
            price(prices.busy),
            price(prices.with_idle),
            if jobs { " and without jobs" } else { "" },
            price(prices.full_load),
            render::count(pool.output_tokens)
        );
    }
    text
}

fn is_use(name: &str) -> bool {
    Line::ALL.into_iter().any(|line| line.name() == name && line.is_use())
}

fn is_idle(name: &str) -> bool {
    Line::ALL.into_iter().any(|line| line.name() == name && line.is_idle())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Report {
        let row = |key: Option<&str>, line: Line, cost: Option<&str>, unpriced: u64| Row {
            key: vec![key.map(str::to_owned)],
            line: line.name().to_owned(),
            sums: Sums {
                requests: 4,
                attempts: 4,
                input_tokens: 500_000,
                unpriced_attempts: unpriced,
                effective_cost: cost.map(|cost| cost.parse().unwrap()),
                ..Sums::default()
            },
            tasks: 2,
        };
        let rows = vec![
            row(Some("search"), Line::Request, Some("1.5"), 0),
            row(None, Line::Request, None, 4),
            row(None, Line::Unallocated, Some("2.25"), 0),
        ];
        Report {
            by: vec!["team"],
            total: Sums {
                requests: 8,
                effective_cost: Some("3.75".parse().unwrap()),
                unpriced_attempts: 4,
                ..Sums::default()
            },
            rows,
            tasks: 2,
            request_cost: "1.5".parse().unwrap(),
            unattributed_cost: Money::ZERO,
            unattributed_share: Some("0.0".to_owned()),
            unattributed_attempts: 4,
            unallocated_pool_cost: "2.25".parse().unwrap(),
            pools: Vec::new(),
            gpus_given_back: Vec::new(),
        }
    }

    #[test]
    fn unknown_amounts_are_not_zero_and_pool_cost_is_a_line_of_its_own() {
        let text = text(&sample(), Some(Unit::MillionTokens));
        let line =
            |start: &str| text.lines().find(|line| line.trim().starts_with(start)).unwrap_or_else(|| panic!("{text}"));
        assert!(line("search").contains("1.5000") && line("search").contains("3.00"));
        assert!(line("–").contains("unknown"));
        assert!(line("(pool cost not yet allocated)").contains("2.2500"));
        assert!(line("total").contains("3.7500"));
        assert!(text.contains("unpriced: 4 attempts"));
    }

    #[test]
    fn unit_costs_are_rounded_once() {
        let sums = Sums { requests: 3, effective_cost: Some(Money::from_pico(10)), ..Sums::default() };
        assert_eq!(unit_cost(&sums, 0, Unit::Request), Some(Money::from_pico(3)));
        assert_eq!(unit_cost(&sums, 4, Unit::Task), Some(Money::from_pico(3)));
        assert_eq!(unit_cost(&sums, 0, Unit::Task), None);
        let document = document(&sample(), Some(Unit::Request)).unwrap();
        assert_eq!(document["rows"][0]["unit_cost"], "0.375");
        assert_eq!(document["total"]["effective_cost"], "3.75");
    }
}
