//! `farthing settle`: books pool cost that nothing has booked yet.

use std::process::ExitCode;

use serde_json::json;

use super::App;
use crate::{books, clock, pools, render};

/// Settles every minute that has ended.
///
/// # Errors
/// When a server is writing to the ledger, which settles by itself, or the ledger cannot be written.
pub async fn run(app: &App) -> anyhow::Result<ExitCode> {
    let loaded = app.load()?;
    let data = app.global.data_dir();
    books::read(&data).await?;
    let (store, ..) = books::write(&data, &loaded).await?;
    let now = clock::now();
    let settled = pools::settle(&store, Vec::new(), ledger::Period { end: now, ..ledger::Period::ALL }, now).await?;
    store.flush(now).await?;
    if app.global.json {
        render::say_json(&json!({ "postings": settled.postings, "unallocated_usd": settled.amount }))?;
    } else if settled.postings == 0 {
        render::say("nothing to settle: every pool's cost is booked")?;
    } else {
        let (postings, amount) = (render::counted(settled.postings, "posting"), render::dollars(settled.amount));
        render::say(&format!("booked {amount} USD of pool cost in {postings}, on the line `unallocated`"))?;
    }
    Ok(ExitCode::SUCCESS)
}
