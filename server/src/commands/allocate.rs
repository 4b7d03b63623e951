//! `farthing allocate`: what one engine's requests cost, from files.

use std::collections::BTreeMap;
use std::process::ExitCode;

use ledger::{Line, Money};

use super::{App, FOUND_WRONG};
use crate::allocate::outcome::{Bill, Ending};
use crate::allocate::{self, Allocated};
use crate::cli::Allocate as Options;
use crate::render::{self, Align, Table};

/// Requests that are shown.
const DEAREST: usize = 10;
/// Median error of held-out decode times above which the constants are doubtful.
const DOUBTFUL: f64 = 0.10;

/// Allocates and writes the answer.
///
/// # Errors
/// One line on what is wrong with a file or an option.
pub fn run(app: &App, options: &Options) -> anyhow::Result<ExitCode> {
    // Before the work: a wrong ending should not cost it.
    options.out.as_deref().map(Ending::of).transpose()?;
    let allocated = allocate::run(options, &super::progress)?;
    warn(&allocated, options);
    if let Some(file) = &options.out {
        allocated.write(file)?;
    }
    if app.global.json {
        render::say_json(&allocated.document()?)?;
    } else {
        render::say(&text(&allocated, options)?)?;
    }
    Ok(if allocated.closed { ExitCode::SUCCESS } else { FOUND_WRONG })
}

/// What was left out of the bill; the requests that are in it pay for it.
fn warn(allocated: &Allocated, options: &Options) {
    let file = options.timeline.display();
    if let Some((line, reason)) = &allocated.requests.first_refused {
        let refused = allocated.requests.refused;
        crate::complain(&format!(
            "farthing: {file}: {refused} lines refused, what they used falls on the others; line {line}: {}",
            render::printable(reason)
        ));
    }
    if !allocated.closed {
        crate::complain("farthing: the postings do not add up to what the GPUs cost; please report this");
    }
}

fn text(allocated: &Allocated, options: &Options) -> anyhow::Result<String> {
    let bills = allocated.bills()?;
    let mut parts = vec![summary(allocated, options), lines(allocated), prices(allocated)];
    if options.context_from.is_some() {
        parts.push(by_team(&bills));
    }
    parts.push(dearest(allocated, bills));
    if let Some(file) = &options.out {
        parts.push(format!("{} postings in {}\n", render::count(count(allocated.postings.len())), file.display()));
    }
    Ok(parts.join("\n"))
}

fn summary(allocated: &Allocated, options: &Options) -> String {
    let Allocated { requests, window, constants, calibration, seconds, .. } = allocated;
    let mut said = vec![format!(
        "{} requests on {} x {} from {} to {} ({:.1} s), method {}",
        render::count(count(allocated.used.len())),
        constants.gpus,
        constants.gpu.name,
        window.start,
        window.end,
        seconds.window,
        allocated.method.name(),
    )];
    if requests.duplicates > 0 {
        said.push(format!("{} lines said again what others had said", render::count(requests.duplicates)));
    }
    if requests.without_context > 0 {
        let without = render::count(requests.without_context);
        said.push(format!(
            "{without} requests are not in the file of --context-from: nobody is named on their postings"
        ));
    }
    let used = &constants.efficiencies;
    let values = format!(
        "{:.1} % of the compute, {:.1} % of the bandwidth, {:.3} ms a step, overlap {}",
        used.compute * 100.0,
        used.bandwidth * 100.0,
        used.overhead_s * 1e3,
        constants.overlap
    );
    said.push(match (calibration.fit, calibration.held_out) {
        (Some(fit), Some(held_out)) => format!(
            "constants: {values}\n  fitted to {} requests; on requests held out of the fit the decode time is off by {:.1} % \
             (median), {:.1} % (95th percentile)",
            fit.observations,
            held_out.median * 100.0,
            held_out.p95 * 100.0
        ),
        (Some(fit), None) => format!("constants: {values}\n  fitted to {} requests, too few to judge", fit.observations),
        (None, _) => format!("constants: {values}\n  NOT fitted, too few requests decoded undisturbed: defaults"),
    });
    if calibration.held_out.is_some_and(|error| error.median > DOUBTFUL) {
        said.push("  that is much: check --gpu, --gpus, the model's configuration and --kv-tokens".to_owned());
    }
    said.push(quality(allocated, options));
    said.into_iter().map(|line| line + "\n").collect()
}

fn quality(allocated: &Allocated, options: &Options) -> String {
    let quality = &allocated.calibration.quality;
    let preempted = match (allocated.limits.kv_tokens, allocated.calibration.preempted_requests) {
        (None, _) => "preemptions unknown without --kv-tokens".to_owned(),
        (Some(_), 0) => "no request preempted".to_owned(),
        (Some(_), preempted) => format!(
            "{preempted} requests preempted, {:.1} % of their scheduled time waiting",
            quality.preempted_share * 100.0
        ),
    };
    if options.series.is_none() {
        return format!("quality {:.3}: not compared with the engine's own series; {preempted}", quality.score);
    }
    let off = |error: Option<f64>, unit: &str, scale: f64| match error {
        Some(error) => format!("{:.2}{unit}", error * scale),
        None => "unknown".to_owned(),
    };
    format!(
        "quality {:.3}: off from the engine's series by {} running, {} waiting, {} of the KV cache (mean of {} samples); {preempted}",
        quality.score,
        off(quality.running_error, "", 1.0),
        off(quality.waiting_error, "", 1.0),
        off(quality.kv_error, " %", 100.0),
        allocated.calibration.samples,
    )
}

fn lines(allocated: &Allocated) -> String {
    let gpus = f64::from(allocated.constants.gpus);
    let seconds = &allocated.seconds;
    let mut table = Table::new([("line", Align::Left), ("GPU-seconds", Align::Right), ("USD", Align::Right)]);
    let amounts: Vec<(Line, Money)> = Line::ALL
        .into_iter()
        .map(|line| (line, allocated.line(line)))
        .filter(|(line, amount)| *line == Line::Request || *amount != Money::ZERO)
        .collect();
    let places = render::places_for(amounts.iter().map(|(_, amount)| *amount));
    for (line, amount) in amounts {
        let used = match line {
            Line::Request => format!("{:.1}", seconds.busy * gpus),
            Line::Waste => format!("{:.1}", seconds.waste * gpus),
            Line::IdleReserved => format!("{:.1}", seconds.idle * gpus),
            _ => String::new(),
        };
        table.row([super::report::line_label(line.name()), used, render::dollars_to(amount, places)]);
    }
    let closed = if allocated.closed { "pool cost, closed" } else { "pool cost, NOT CLOSED" };
    let all = format!("{:.1}", seconds.window * gpus);
    table.total([closed.to_owned(), all, render::dollars_to(allocated.origin, places)]);
    table.to_string()
}

fn prices(allocated: &Allocated) -> String {
    let per_million = allocated.per_million();
    let shown = |amount: Option<Money>| amount.map_or("unknown".to_owned(), render::dollars);
    let mut table = Table::new([("a million output tokens", Align::Left), ("USD", Align::Right)]);
    table.row(["busy only: what requests paid".to_owned(), shown(per_million.busy)]);
    table.row(["with idle: all that the GPUs cost".to_owned(), shown(per_million.with_idle)]);
    let full = match allocated.full_load {
        Some(load) => {
            format!("at full load: {:.0} requests at once, {:.0} tokens/s", load.batch, load.output_tokens_per_s)
        }
        None => "at full load".to_owned(),
    };
    table.row([full, shown(per_million.full_load)]);
    table.to_string()
}

fn by_team(bills: &[Bill<'_>]) -> String {
    let mut teams: BTreeMap<&str, (u64, f64, Money)> = BTreeMap::new();
    for bill in bills {
        let sums = teams.entry(bill.posting.context.team.as_deref().unwrap_or("–")).or_default();
        *sums = (sums.0 + 1, sums.1 + bill.busy_s, sums.2 + bill.posting.costs.effective_cost);
    }
    let all: f64 = teams.values().map(|(_, busy_s, _)| busy_s).sum();
    let mut table = Table::new([
        ("team", Align::Left),
        ("requests", Align::Right),
        ("of busy time", Align::Right),
        ("USD", Align::Right),
    ]);
    let places = render::places_for(teams.values().map(|(_, _, amount)| *amount));
    for (team, (requests, busy_s, amount)) in teams {
        let part = if all > 0.0 { format!("{:.1} %", busy_s / all * 100.0) } else { String::new() };
        table.row([team.to_owned(), render::count(requests), part, render::dollars_to(amount, places)]);
    }
    table.to_string()
}

fn dearest(allocated: &Allocated, mut bills: Vec<Bill<'_>>) -> String {
    let gpus = f64::from(allocated.constants.gpus);
    bills.sort_by(|a, b| {
        let paid = |bill: &Bill<'_>| bill.posting.costs.effective_cost;
        paid(b).cmp(&paid(a)).then(a.posting.attempt.cmp(&b.posting.attempt))
    });
    bills.truncate(DEAREST);
    let terms: Vec<&str> =
        bills.first().map(|bill| bill.terms.iter().map(|(name, _)| *name).collect()).unwrap_or_default();
    let fixed = [
        ("dearest", Align::Left),
        ("input tokens", Align::Right),
        ("output tokens", Align::Right),
        ("busy GPU-s", Align::Right),
        ("idle GPU-s, not charged", Align::Right),
    ];
    let headings: Vec<String> = terms.iter().map(|term| format!("{term} USD")).collect();
    let own = headings.iter().map(|heading| (heading.as_str(), Align::Right));
    let mut table = Table::new(fixed.into_iter().chain(own).chain([("USD", Align::Right)]));
    let places = render::places_for(bills.iter().map(|bill| bill.posting.costs.effective_cost)).max(6);
    for bill in &bills {
        let timeline = &allocated.requests.served[bill.place].timeline;
        let cells = [
            bill.name.to_owned(),
            render::count(timeline.input_tokens.into()),
            render::count(timeline.output_tokens.into()),
            format!("{:.3}", bill.busy_s * gpus),
            format!("{:.3}", bill.idle_s * gpus),
        ];
        let amounts = bill.terms.iter().map(|(_, amount)| *amount).chain([bill.posting.costs.effective_cost]);
        table.row(cells.into_iter().chain(amounts.map(|amount| render::dollars_to(amount, places))));
    }
    table.to_string()
}

fn count(number: usize) -> u64 {
    u64::try_from(number).unwrap_or(u64::MAX)
}
