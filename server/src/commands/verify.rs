//! `farthing verify`: proves that the books balance, or fails loudly.

use std::fmt::Write;
use std::process::ExitCode;

use store::Verification;

use super::{App, FOUND_WRONG};
use crate::{books, render};

/// Checks closure, duplicates, gaps and checksums; exit code 1 when anything is wrong.
///
/// # Errors
/// When the ledger cannot be read.
pub async fn run(app: &App) -> anyhow::Result<ExitCode> {
    let store = books::read(&app.global.data_dir()).await?;
    let bar = super::progress("verifying {wide_bar} {human_pos}/{human_len} rows {eta}");
    let seen = bar.clone();
    let verification = store
        .verify(&move |progress| {
            seen.set_length(progress.rows_total);
            seen.set_position(progress.rows_done);
        })
        .await?;
    bar.finish_and_clear();
    let chain = store.control().load().await;
    if app.global.json {
        let mut document = serde_json::to_value(&verification)?;
        document["control_log"] = match &chain {
            Ok(entries) => serde_json::json!({ "intact": true, "entries": entries.len() }),
            Err(error) => serde_json::json!({ "intact": false, "error": error.to_string() }),
        };
        document["clean"] = (verification.is_clean() && chain.is_ok()).into();
        render::say_json(&document)?;
    } else {
        render::say(&text(&verification))?;
        match &chain {
            Ok(entries) => render::say(&format!(
                "control log     {}, chain intact",
                render::counted(u64::try_from(entries.len())?, "entry")
            ))?,
            Err(error) => render::say(&format!("control log     BROKEN: {error}"))?,
        }
    }
    if verification.is_clean() && chain.is_ok() {
        return Ok(ExitCode::SUCCESS);
    }
    crate::complain("farthing: THE BOOKS DO NOT BALANCE; the list above says where");
    Ok(FOUND_WRONG)
}

/// The result for people, one check a line.
#[must_use]
pub fn text(found: &Verification) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<15} {value}");
    };
    let n = render::count;
    line("balanced", if found.balanced { "yes".to_owned() } else { "NO".to_owned() });
    line("attempts", n(found.attempts));
    line("postings", n(found.postings));
    line("origins", format!("{} ({} without anything to compare with)", n(found.origins), n(found.unchecked_origins)));
    line("imbalances", n(found.imbalances));
    line("duplicates", n(found.duplicates));
    line("mispriced", n(found.mispriced));
    line("missing files", n(found.missing_files));
    line("damaged frames", n(found.damaged_frames));
    line("gaps", format!("{} ({} lost)", n(found.gaps), render::counted(found.lost, "record")));
    for example in &found.examples {
        let (kind, subject) = (render::printable(example.kind), render::printable(&example.subject));
        line(&format!("! {kind}"), format!("{subject}: {}", render::printable(&example.detail)));
    }
    text
}
