//! The answer of a simulation: tables and a small chart for people, JSON for programs, pictures for both.

use fleet::sim::compare::Row;
use fleet::sim::histogram::Percentiles;
use fleet::sim::outcome::Outcome;
use serde_json::{Value, json};

use super::knows_the_future;
use super::play::Tuned;
use super::prepare::{self, Played};
use crate::cli::SimulateFleet;
use crate::render::picture::{self, Course, Moment, Point};
use crate::render::{self, Align, Table, chart};

/// Columns and rows of the chart in the terminal.
const CHART: (usize, usize) = (96, 10);
const MINUTE_US: u64 = 60_000_000;
/// Decisions that are listed.
const DECISIONS: usize = 40;

/// Everything for people.
#[must_use]
pub fn text(played: &Played, options: &SimulateFleet, rows: &[Row], tuned: &[Tuned]) -> String {
    let mut parts = vec![prepare::words(played)];
    if !tuned.is_empty() {
        parts.push(tuning(tuned));
    }
    match rows {
        [one] => {
            parts.push(chart::course(&course(played, &one.outcome), CHART.0, CHART.1));
            parts.push(costs(played, rows));
            parts.push(conduct(&one.outcome));
            parts.extend(latency(played, &one.outcome));
            if options.explain {
                parts.push(decisions(&one.outcome));
            }
        }
        several => {
            parts.push(costs(played, several));
            parts.push(frontier_words(several));
        }
    }
    if let Some(file) = &options.picture {
        parts.push(format!("picture in {}\n", file.display()));
    }
    parts.join("\n")
}

fn tuning(tuned: &[Tuned]) -> String {
    let mut table =
        Table::new([("tuned on the days to learn", Align::Left), ("tried", Align::Right), ("goal", Align::Left)]);
    for Tuned { asked, found } in tuned {
        let goal = if found.met { "met" } else { "NOT met, the closest" };
        let name = if found.policy == *asked { format!("{asked} (as it was)") } else { found.policy.to_string() };
        table.row([name, found.tried.to_string(), goal.to_owned()]);
    }
    table.to_string()
}

fn costs(played: &Played, rows: &[Row]) -> String {
    let with_engines = rows.iter().any(|row| row.outcome.latency.is_some());
    let relative = rows.len() > 1;
    let mut columns =
        vec![("policy", Align::Left), ("GPU-hours", Align::Right), ("USD", Align::Right), ("saved", Align::Right)];
    if relative {
        columns.extend([("saved of hpa", Align::Right), ("over oracle", Align::Right)]);
    }
    columns.push(("in overload", Align::Right));
    if with_engines {
        columns.extend([("objective met", Align::Right), ("TTFT p95", Align::Right), ("failed", Align::Right)]);
    }
    columns.extend([("changes/h", Align::Right), ("turns/h max", Align::Right)]);
    let mut table = Table::new(columns);
    if let Some(first) = rows.first() {
        let peak = &first.outcome.static_peak;
        let name = format!("static peak: {} replicas", peak.replicas);
        table.row([name, hours(peak.gpu_hours), render::dollars_to(peak.usd, 2), "–".to_owned()]);
    }
    for row in rows {
        let outcome = &row.outcome;
        let part = |part: Option<f64>| part.map_or("–".to_owned(), |part| format!("{:+.1} %", part * 100.0));
        let mut cells = vec![
            row.policy.to_string(),
            hours(outcome.gpu_hours),
            render::dollars_to(outcome.usd, 2),
            format!("{:.1} %", row.saved_static * 100.0),
        ];
        if relative {
            cells.extend([part(row.saved_hpa), part(row.over_oracle)]);
        }
        cells.push(format!("{:.3} %", outcome.overload.share * 100.0));
        if with_engines {
            let latency = outcome.latency.as_ref();
            let met = latency.map_or("–".to_owned(), |latency| format!("{:.2} %", latency.attained * 100.0));
            let ttft = latency.map_or("–".to_owned(), |latency| milliseconds(latency.ttft.p95_s));
            cells.extend([met, ttft, render::count(outcome.failed)]);
        }
        let an_hour = |count: u64| if outcome.hours > 0.0 { count as f64 / outcome.hours } else { 0.0 };
        cells.extend([format!("{:.2}", an_hour(outcome.changes)), outcome.direction_changes_per_hour_max.to_string()]);
        table.row(cells);
    }
    let committed = played.plan.bounds.committed;
    if committed == 0 {
        return table.to_string();
    }
    format!(
        "{table}{committed} committed replicas are paid for in every row, used or not; `saved` counts what lies above them\n"
    )
}

/// How it went beside the costs.
fn conduct(outcome: &Outcome) -> String {
    let mut said = vec![format!(
        "{} in {}, {} of {} requests ({:.3} %)",
        "overloaded",
        render::counted(outcome.overload.minutes, "minute"),
        render::count(outcome.overload.requests),
        render::count(outcome.requests),
        outcome.overload.share * 100.0
    )];
    said.push(format!(
        "{} taken, {} changed the number of replicas; between {} serving and {} there or on their way",
        render::counted(outcome.decisions, "decision"),
        render::count(outcome.changes),
        outcome.ready_min,
        outcome.provisioned_max
    ));
    let mut trouble = Vec::new();
    for (count, what) in [
        (outcome.failed, "requests failed"),
        (outcome.unfinished, "requests unfinished"),
        (outcome.held, "requests held until a replica served"),
        (outcome.retried, "requests tried again after a crash"),
        (outcome.crashes, "replicas crashed"),
        (outcome.unscheduled, "replicas found no place at first"),
        (outcome.cancelled, "replicas given up before they served"),
        (outcome.preemptions, "requests put back for lack of memory"),
    ] {
        if count > 0 {
            trouble.push(format!("{} {what}", render::count(count)));
        }
    }
    if !trouble.is_empty() {
        said.push(trouble.join(", "));
    }
    said.into_iter().map(|line| line + "\n").collect()
}

fn latency(played: &Played, outcome: &Outcome) -> Option<String> {
    let latency = outcome.latency.as_ref()?;
    let objective = &played.plan.objective;
    let mut table = Table::new([
        ("", Align::Left),
        ("mean", Align::Right),
        ("p50", Align::Right),
        ("p90", Align::Right),
        ("p95", Align::Right),
        ("p99", Align::Right),
        ("max", Align::Right),
        ("promised", Align::Right),
        ("kept", Align::Right),
    ]);
    let mut row = |name: &str, times: &Percentiles, promised: Option<f64>, kept: Option<f64>| {
        let each = [times.mean_s, times.p50_s, times.p90_s, times.p95_s, times.p99_s, times.max_s].map(milliseconds);
        let promised = promised.map_or(String::new(), milliseconds);
        let kept = kept.map_or(String::new(), |kept| format!("{:.2} %", kept * 100.0));
        table.row([name.to_owned()].into_iter().chain(each).chain([promised, kept]));
    };
    row("time to first token", &latency.ttft, Some(objective.ttft_s), Some(latency.attained_ttft));
    row("time per output token", &latency.tpot, Some(objective.tpot_s), Some(latency.attained_tpot));
    row("whole request", &latency.e2e, None, Some(latency.attained));
    let verdict = if latency.attained >= objective.percentile { "kept" } else { "NOT kept" };
    Some(format!(
        "{table}the objective of both for {:.1} % of all requests is {verdict}\n",
        objective.percentile * 100.0
    ))
}

fn decisions(outcome: &Outcome) -> String {
    let mut table = Table::new([
        ("at", Align::Left),
        ("ready", Align::Right),
        ("pending", Align::Right),
        ("wanted", Align::Right),
        ("desired", Align::Right),
        ("why", Align::Left),
    ]);
    for logged in outcome.log.iter().take(DECISIONS) {
        let guards = logged.guards.iter().map(|guard| format!("[{guard}]"));
        let why: Vec<String> = logged.reasons.iter().cloned().chain(guards).collect();
        table.row([
            logged.at.to_string(),
            logged.ready.to_string(),
            logged.pending.to_string(),
            logged.wanted.to_string(),
            logged.desired.to_string(),
            why.join("; "),
        ]);
    }
    let left = outcome.log.len().saturating_sub(DECISIONS) as u64 + outcome.log_dropped;
    let more =
        if left > 0 { format!("… and {} more; --json has them\n", render::count(left)) } else { String::new() };
    format!("{table}{more}")
}

fn frontier_words(rows: &[Row]) -> String {
    let points = points(rows);
    let best: Vec<&str> = picture::best(&points).iter().map(|point| point.label.as_str()).collect();
    format!("Nothing else costs less and misses less: {}\n", best.join(", "))
}

fn points(rows: &[Row]) -> Vec<Point> {
    let point = |row: &Row| Point {
        label: row.policy.to_string(),
        usd: row.outcome.usd.pico() as f64 / 1e12,
        missed: row.outcome.overload.share,
        oracle: knows_the_future(&row.policy),
    };
    rows.iter().map(point).collect()
}

/// Demand and capacity for one policy, cost against misses for several.
///
/// # Errors
/// When it cannot be drawn.
pub fn picture(played: &Played, rows: &[Row]) -> anyhow::Result<String> {
    match rows {
        [one] => picture::course(&course(played, &one.outcome)),
        several => {
            let title = format!("{}: what policies cost and miss", played.demand.name);
            let subtitle = format!(
                "{:.1} h judged, {:.0} s to start a replica",
                played.judged_hours(),
                played.plan.startup.usual_s()
            );
            picture::frontier(&title, &subtitle, &points(several))
        }
    }
}

fn course(played: &Played, outcome: &Outcome) -> Course {
    // The last minute may be a part of one, and would be drawn as a whole one.
    let whole = usize::try_from(played.demand.len_us() / MINUTE_US).unwrap_or(usize::MAX).max(1);
    let moments = outcome.minutes.iter().take(whole).map(|minute| Moment {
        load: minute.load.into(),
        ready: minute.ready.into(),
        paid: minute.paid.into(),
        overloaded: minute.overloaded,
    });
    let saved = outcome.saved * 100.0;
    Course {
        title: format!("{}: {}", outcome.trace, outcome.policy),
        subtitle: format!(
            "{} USD, {saved:.1} % less than the static plan; {:.3} % of requests in overloaded minutes",
            render::dollars(outcome.usd),
            outcome.overload.share * 100.0
        ),
        start: played.demand.start,
        every_s: 60.0,
        moments: moments.collect(),
        judged_from: judged_from(played),
        static_replicas: Some(outcome.static_peak.replicas),
        committed: played.plan.bounds.committed,
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "minutes of a trace")]
fn judged_from(played: &Played) -> usize {
    (played.plan.judge_from_s / 60.0).ceil() as usize
}

/// Everything for programs, amounts as decimal strings. One policy comes with its decisions and minutes.
///
/// # Errors
/// When it cannot be written as JSON.
pub fn document(played: &Played, rows: &[Row], tuned: &[Tuned]) -> anyhow::Result<Value> {
    let alone = rows.len() == 1;
    let mut policies = Vec::new();
    for row in rows {
        let mut document = serde_json::to_value(row)?;
        if !alone && let Some(outcome) = document["outcome"].as_object_mut() {
            outcome.remove("minutes");
            outcome.remove("log");
        }
        document["policy"] = row.policy.to_string().into();
        document["parameters"] = format!("{:#}", row.policy).into();
        policies.push(document);
    }
    let points = points(rows);
    let plan = &played.plan;
    Ok(json!({
        "trace": played.demand.name,
        "notes": played.demand.notes.iter().chain(&played.notes).collect::<Vec<_>>(),
        "mode": if played.engine.is_some() { "engines" } else { "fluid" },
        "judged_hours": played.judged_hours(),
        "learnt_hours": plan.judge_from_s / 3_600.0,
        "replicas_at_peak": played.demand.minutes().iter().copied().fold(0.0_f32, f32::max),
        "requests_per_s_per_replica": plan.bounds.requests_per_s_at_capacity,
        "gpus_per_replica": plan.gpus,
        "start_up_s": plan.startup.usual_s(),
        "prices": {
            "on_demand_usd": plan.prices.on_demand,
            "committed_usd": plan.prices.committed,
            "source": played.price.source,
        },
        "committed_replicas": plan.bounds.committed,
        "objective": {
            "ttft_s": plan.objective.ttft_s,
            "tpot_s": plan.objective.tpot_s,
            "percentile": plan.objective.percentile,
        },
        "seed": plan.seed,
        "policies": policies,
        "frontier": picture::best(&points).iter().map(|point| &point.label).collect::<Vec<_>>(),
        "tuned": tuned.iter().map(|one| json!({
            "asked": one.asked.to_string(),
            "policy": one.found.policy.to_string(),
            "met": one.found.met,
            "tried": one.found.tried,
        })).collect::<Vec<_>>(),
    }))
}

fn hours(hours: f64) -> String {
    if hours < 100.0 { format!("{hours:.2}") } else { render::count(rounded(hours)) }
}

fn milliseconds(seconds: f64) -> String {
    render::duration(rounded(seconds * 1e6))
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float saturates at the integer's ends")]
fn rounded(value: f64) -> u64 {
    value.round() as u64
}
