//! `farthing explain`: one request, every term of its cost, and the rows that prove it.

mod pool;
mod pool_text;

use std::fmt::Write;
use std::process::ExitCode;

use anyhow::bail;
use ledger::{Attempt, Charge, Money, Posting, RequestId};
use serde_json::{Value, json};
use store::{Found, Session, Store};

use self::pool::{PoolBill, bills};
use super::App;
use crate::books;
use crate::render::{self, printable};

/// Explains the request.
///
/// # Errors
/// When the ledger has no such request.
pub async fn run(app: &App, request_id: &str) -> anyhow::Result<ExitCode> {
    let Ok(id) = request_id.trim().parse::<RequestId>() else {
        bail!(
            "`{request_id}` is not a request id; one looks like 019abcde-0000-7000-8000-000000000000 and is in the \
             header x-farthing-request-id of every answer"
        );
    };
    let store = books::read(&app.global.data_dir()).await?;
    let found = store.find_request(id).await?;
    if found.attempts.is_empty() && found.postings.is_empty() {
        bail!("the ledger in {} has no request {id}", app.global.data_dir().display());
    }
    let bills = bills(&store.session().await?, &found).await?;
    if app.global.json {
        render::say_json(&described(id, &found, &bills))?
    } else {
        render::say(&text(id, &found, &bills))?
    }
    Ok(ExitCode::SUCCESS)
}

/// The request as a JSON document; `None` when the ledger has none of this id.
///
/// # Errors
/// When the ledger cannot be read.
pub async fn document(store: &Store, id: RequestId) -> anyhow::Result<Option<Value>> {
    let found = store.find_request(id).await?;
    if found.attempts.is_empty() && found.postings.is_empty() {
        return Ok(None);
    }
    let session: Session = store.session().await?;
    let bills = bills(&session, &found).await?;
    Ok(Some(described(id, &found, &bills)))
}

/// One term of an attempt's cost: tokens of a kind times their rate.
struct Term {
    kind: &'static str,
    tokens: u64,
    rate: Option<ledger::TokenPrice>,
    amount: Option<Money>,
}

fn terms(attempt: &Attempt) -> Vec<Term> {
    let rates = attempt.charge.rates();
    let term = |(kind, tokens): (ledger::TokenKind, u64)| {
        let rate = rates.and_then(|rates| rates.rate(kind));
        Term { kind: kind.name(), tokens, rate, amount: rate.map(|rate| rate.times(tokens)) }
    };
    attempt.usage.iter().map(term).collect()
}

fn described(id: RequestId, found: &Found, bills: &[PoolBill<'_>]) -> Value {
    let attempts: Vec<Value> = found
        .attempts
        .iter()
        .map(|attempt| {
            let terms: Vec<Value> = terms(attempt)
                .iter()
                .map(|term| {
                    json!({
                        "kind": term.kind, "tokens": term.tokens,
                        "usd_per_million": term.rate.map(ledger::TokenPrice::usd_per_million), "amount": term.amount,
                    })
                })
                .collect();
            json!({
                "attempt": attempt.id.number,
                "source": attempt.source, "context": attempt.context, "route": attempt.route, "timeline": attempt.timeline,
                "outcome": attempt.outcome.name(), "status": attempt.status,
                "usage": attempt.usage, "usage_quality": attempt.usage_quality.name(),
                "charge": attempt.charge.name(), "charge_reason": attempt.charge.reason(),
                "costs": attempt.charge.costs(), "terms": terms,
                "rates": attempt.charge.rates().map(ledger::ResolvedRates::as_str),
                "price_book": attempt.charge.rates().map(ledger::ResolvedRates::book),
            })
        })
        .collect();
    let (sum, unpriced) = totals(found);
    json!({
        "request_id": id, "attempts": attempts, "postings": found.postings,
        "pools": bills.iter().map(PoolBill::document).collect::<Vec<_>>(),
        "effective_cost": sum, "unpriced_attempts": unpriced, "balanced": is_balanced(found),
    })
}

/// The sum of the postings, and the attempts whose cost is unknown.
fn totals(found: &Found) -> (Money, usize) {
    let sum = found.postings.iter().map(|posting| posting.costs.effective_cost).sum();
    // The cost of an attempt on a pool is known as soon as it is posted.
    let posted = |attempt: &Attempt| found.postings.iter().any(|posting| posting.attempt == Some(attempt.id));
    let unknown = |attempt: &&Attempt| attempt.charge.costs().is_none() && !posted(attempt);
    (sum, found.attempts.iter().filter(unknown).count())
}

/// Whether each attempt's charge has postings that add up to it.
fn is_balanced(found: &Found) -> bool {
    found.attempts.iter().all(|attempt| {
        let own = found.postings.iter().filter(|posting| posting.origin == ledger::Origin::ProviderCharge(attempt.id));
        let posted: Money = own.map(|posting| posting.costs.effective_cost).sum();
        posted == attempt.charge.costs().map_or(Money::ZERO, |costs| costs.effective_cost)
    })
}

fn text(id: RequestId, found: &Found, bills: &[PoolBill<'_>]) -> String {
    let mut text = format!("request {id}\n");
    if let Some(first) = found.attempts.first() {
        let _ = writeln!(text, "received {}", first.timeline.received_at);
        context(&mut text, first);
    }
    for attempt in &found.attempts {
        one_attempt(&mut text, attempt);
    }
    for bill in bills {
        pool_text::write(&mut text, bill);
    }
    // Those of pools stand with their minutes.
    let others = found.postings.iter().filter(|posting| !matches!(posting.origin, ledger::Origin::Pool { .. }));
    let others: Vec<&Posting> = others.collect();
    if !others.is_empty() || bills.is_empty() {
        postings(&mut text, &others);
    }
    let (sum, unpriced) = totals(found);
    let _ = writeln!(text, "\nsum of postings   {sum} USD");
    if unpriced > 0 {
        let _ = writeln!(
            text,
            "unknown           {} without an amount, which is not zero",
            render::counted(u64::try_from(unpriced).unwrap_or(u64::MAX), "attempt")
        );
    }
    let closed = is_balanced(found) && bills.iter().all(PoolBill::closes);
    let proof = if closed { "every charge is posted exactly" } else { "THE POSTINGS DO NOT ADD UP to the charges" };
    let _ = writeln!(text, "{proof}");
    text
}

fn context(text: &mut String, attempt: &Attempt) {
    let context = &attempt.context;
    let fields = [
        ("team", &context.team),
        ("consumer", &context.consumer),
        ("application", &context.application),
        ("cost centre", &context.cost_centre),
        ("customer", &context.customer),
        ("feature", &context.feature),
        ("task", &context.task),
        ("session", &context.session),
        ("environment", &context.environment),
        ("trace", &context.trace_id),
    ];
    let mut shown = fields.iter().filter_map(|(name, value)| Some((name, value.as_deref()?))).peekable();
    if shown.peek().is_none() {
        text.push_str("unattributed: nobody said who caused it\n");
    }
    for (name, value) in shown {
        let _ = writeln!(text, "  {name:<12} {}", printable(value));
    }
    for (name, value) in &context.tags {
        let _ = writeln!(text, "  tag {:<8} {}", printable(name), printable(value));
    }
}

fn one_attempt(text: &mut String, attempt: &Attempt) {
    let route = &attempt.route;
    let label = |label: &Option<ledger::Label>| label.as_deref().map_or("–".to_owned(), printable);
    let status = attempt.status.map_or(String::new(), |status| format!(", status {status}"));
    let _ = writeln!(
        text,
        "\nattempt {}: {} {} at {} ({}), asked for {}, answered by {}\n  {}{status}; usage {}; class {}{}",
        attempt.id.number,
        route.operation.name(),
        if route.streamed { "streamed" } else { "whole" },
        printable(&route.upstream),
        printable(&route.provider),
        label(&route.request_model),
        label(&route.response_model),
        attempt.outcome.name(),
        attempt.usage_quality.name(),
        route.service_class.name(),
        route.pool.as_deref().map_or(String::new(), |pool| format!("; pool {}", printable(pool))),
    );
    timeline(text, attempt);
    for term in terms(attempt) {
        let price = match (term.rate, term.amount) {
            (Some(rate), Some(amount)) => format!(" x {:>10} USD/M = {amount} USD", rate.usd_per_million()),
            _ if attempt.route.pool.is_some() => String::new(),
            _ => " x unknown rate".to_owned(),
        };
        let _ = writeln!(text, "  {:<17} {:>12} tokens{price}", term.kind, render::count(term.tokens));
    }
    match &attempt.charge {
        Charge::Unpriced { .. } if attempt.route.pool.is_some() => {
            text.push_str("  on our own GPUs: its cost comes by allocation, below\n");
        }
        Charge::Unpriced { reason } => {
            let _ = writeln!(text, "  unpriced: {}; the amount is unknown", reason.name());
        }
        Charge::Priced { costs, rates } | Charge::Estimated { costs, rates, .. } => {
            let share = match rates.contracted_millionths() {
                1_000_000 => String::new(),
                millionths => format!(" (x {} of list)", ledger::decimal::format_scaled(millionths.into(), 6, 1)),
            };
            let quality = attempt.charge.reason().map_or(String::new(), |reason| format!(", estimated ({reason})"));
            let _ = writeln!(
                text,
                "  list {} USD, contracted {} USD{share}, effective {} USD{quality}",
                costs.list_cost, costs.contracted_cost, costs.effective_cost
            );
            let _ = writeln!(
                text,
                "  price book {}\n  rates {} (picodollars a token)",
                printable(rates.book()),
                printable(rates.as_str())
            );
        }
    }
}

/// The attempt's moments on one scale, each with its distance from the start.
fn timeline(text: &mut String, attempt: &Attempt) {
    const WIDTH: u64 = 40;
    let line = &attempt.timeline;
    let end = line.finished_us.max(1);
    let moments = [
        ("admitted", line.admitted_us),
        ("sent", line.sent_us),
        ("first byte", line.first_byte_us),
        ("first token", line.first_token_us),
        ("last token", line.last_token_us),
        ("finished", Some(line.finished_us)),
    ];
    for (name, at) in moments.into_iter().filter_map(|(name, at)| Some((name, at?))) {
        let column = usize::try_from(u128::from(at.min(end)) * u128::from(WIDTH) / u128::from(end)).unwrap_or(0);
        let rest = usize::try_from(WIDTH).unwrap_or(0).saturating_sub(column);
        let _ = writeln!(text, "  {name:<12} |{}●{}| {}", "─".repeat(column), " ".repeat(rest), render::duration(at));
    }
    if line.gaps.count > 0 {
        let mean = line.gaps.total_us / u64::from(line.gaps.count);
        let (mean, max) = (render::duration(mean), render::duration(line.gaps.max_us));
        let _ = writeln!(text, "  {} gaps between tokens: {mean} mean, {max} longest", line.gaps.count);
    }
}

fn postings(text: &mut String, postings: &[&Posting]) {
    if postings.is_empty() {
        text.push_str("\nno postings: nothing of it has an amount yet\n");
        return;
    }
    text.push_str("\npostings\n");
    for posting in postings {
        let _ = writeln!(
            text,
            "  {} {} {} {} USD by {}{}",
            posting.id,
            posting.origin.kind(),
            posting.line.name(),
            posting.costs.effective_cost,
            printable(&posting.policy),
            if posting.estimated { " (estimated)" } else { "" }
        );
    }
}
