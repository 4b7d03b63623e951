//! `farthing settle`: allocates pool cost that is not settled, or not as its facts are now.

use std::process::ExitCode;
use std::sync::Arc;

use ledger::Period;
use serde_json::json;

use super::App;
use crate::cli::Settle;
use crate::commands::{FOUND_WRONG, progress};
use crate::config::price_book;
use crate::settlement::{self, Demands, Fresh, Late, Rules, Settled, Statement, imported::Assumed};
use crate::{books, clock, render};

/// Settles every minute of the time that was asked for.
///
/// # Errors
/// When a server is writing to the ledger, which settles by itself, or the ledger cannot be written.
pub async fn run(app: &App, options: &Settle) -> anyhow::Result<ExitCode> {
    let window = options.span.period().map_err(anyhow::Error::msg)?;
    let loaded = app.load()?;
    let data = app.global.data_dir();
    books::read(&data).await?;
    let (store, governance, _) = books::write(&data, &loaded).await?;
    let rules = Rules::of(&loaded.config);
    let prices = price_book(&loaded.config, governance.price_map.as_ref());
    let now = clock::now();

    let assumed = settlement::imported::assumed(&store.session().await?, &loaded, &rules, window, now).await?;
    let fresh = Fresh { facts: assumed.facts.clone(), running: Vec::new() };
    let rules = Arc::new(rules.for_ledger(&store.session().await?, &fresh).await?);
    let ended = Period { end: window.end.min(now), ..window };
    let calls = settlement::take_calls(&store, &rules, &prices, &fresh, &Late::default(), ended, now).await?;
    let session = store.session().await?;
    let minutes = settlement::minutes_of(&session, window, &fresh).await?;
    let bar = progress("settling {wide_bar} {pos}/{len} minutes {eta}");
    let settled = settlement::settle(&store, &rules, &minutes, fresh, &mut Demands::default(), now, &bar).await;
    bar.finish_and_clear();
    let settled = Settled { calls, ..settled? };
    store.flush(now).await?;

    let statements = settlement::statements(&store.session().await?, window).await?;
    say(app, &settled, &assumed, &rules, &statements)?;
    Ok(if statements.iter().all(|pool| pool.balanced) { ExitCode::SUCCESS } else { FOUND_WRONG })
}

fn say(app: &App, settled: &Settled, assumed: &Assumed, rules: &Rules, statements: &[Statement]) -> anyhow::Result<()> {
    if app.global.json {
        let balanced = statements.iter().all(|pool| pool.balanced);
        return render::say_json(&json!({
            "postings": settled.postings,
            "minutes": settled.minutes,
            "corrected_minutes": settled.corrected_minutes,
            "calls": settled.calls,
            "assumed": assumed,
            "left_as_they_are": rules.left_out,
            "pools": statements,
            "balanced": balanced,
        }));
    }
    for sentence in assumed.sentences() {
        render::say(&sentence)?;
    }
    for pool in &rules.left_out {
        render::say(&format!(
            "pool `{pool}` stays as it is booked: its rules are not in the configuration; describe it in a [[pool]] of --config to settle \
             it again"
        ))?;
    }
    if settled.calls > 0 {
        let calls = render::counted(settled.calls, "call");
        render::say(&format!("{calls} that spans told of and nobody had metered are attempts now"))?;
    }
    let minutes = render::counted(settled.minutes, "minute");
    render::say(&match (settled.postings, settled.corrected_minutes) {
        (0, _) => "nothing to settle: every pool's cost is booked as its facts are".to_owned(),
        (postings, 0) => format!("booked {} for {minutes} of pools", render::counted(postings, "posting")),
        (postings, corrected) => format!(
            "booked {} for {minutes} of pools, {} of them to correct what was booked before",
            render::counted(postings, "posting"),
            render::count(corrected)
        ),
    })?;
    if !statements.is_empty() {
        render::say(&format!("\n{}", settlement::table(statements)))?;
    }
    Ok(())
}
