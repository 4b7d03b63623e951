//! Usage from files. Rows become attempts with ids that follow from their content, bad rows go into a rejects file, and
//! a file is applied whole or not at all.

mod azure_llm_trace;
pub mod lines;
mod parquet;
mod rejects;
pub mod requests;
pub mod vllm_timeline;

use std::collections::HashMap;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use ledger::price::{PriceBook, PriceQuery};
use ledger::{Attempt, Charge, Fact, Money, RequestId, Timestamp};
use serde::Serialize;
use store::{Begun, ImportId, ImportSummary, Store};

use crate::cli::ImportKind;
use lines::Lines;
use rejects::Rejects;

/// Facts that are handed to the store at a time.
const CHUNK: usize = 16_384;

/// What the rows of a file do not say themselves.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What the file holds.
    pub kind: ImportKind,
    /// Who rows without a consumer are attributed to.
    pub name: String,
    /// The model of rows that name none.
    pub model: Option<String>,
    /// Whose prices apply to rows that name no provider.
    pub provider: Option<String>,
    /// The GPU pool that served rows that name none.
    pub pool: Option<String>,
}

/// What an import did.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// The file.
    pub file: PathBuf,
    /// The file's kind.
    pub kind: &'static str,
    /// Who its rows are attributed to where they do not say.
    pub name: String,
    /// Whether this very file had been imported before, so that nothing was done.
    pub already_imported: bool,
    /// Rows read.
    pub rows: u64,
    /// Attempts that are new in the ledger.
    pub attempts: u64,
    /// Attempts that the ledger knew already.
    pub already_known: u64,
    /// Rows that were refused.
    pub rejected: u64,
    /// Where the refused rows are, with line and reason.
    pub rejects_file: Option<PathBuf>,
    /// Input tokens of the rows taken.
    pub input_tokens: u64,
    /// Output tokens of the rows taken.
    pub output_tokens: u64,
    /// Rows taken whose price is unknown.
    pub unpriced: u64,
    /// At the public price.
    pub list_cost: Money,
    /// At our price.
    pub effective_cost: Money,
}

/// One kind's reading of a row.
enum Reader {
    Requests(requests::Rows),
    AzureLlmTrace(azure_llm_trace::Rows),
    VllmTimeline(vllm_timeline::Rows),
}

impl Reader {
    fn open(file: &Path, settings: &Settings) -> anyhow::Result<Reader> {
        Ok(match settings.kind {
            ImportKind::Requests => Reader::Requests(requests::Rows::new(settings)),
            ImportKind::AzureLlmTrace => Reader::AzureLlmTrace(azure_llm_trace::Rows::new(settings)),
            ImportKind::VllmTimeline => Reader::VllmTimeline(vllm_timeline::Rows::new(settings, open(file)?)?),
        })
    }

    /// `None` for lines that are no rows, such as a heading.
    fn row(&mut self, number: u64, line: &str, ids: &mut Ids) -> Result<Option<Attempt>, String> {
        match self {
            Reader::Requests(rows) => rows.row(line, ids).map(Some),
            Reader::AzureLlmTrace(rows) => rows.row(number, line, ids),
            Reader::VllmTimeline(rows) => rows.row(line, ids).map(Some),
        }
    }
}

/// Ids that follow from content: the same row gives the same id whenever it is imported.
#[derive(Debug, Default)]
pub struct Ids {
    seen: HashMap<[u8; 8], u64>,
}

impl Ids {
    /// The id of a row: its time, and a hash of kind, content and how often the content was seen before in this file.
    pub fn of_row(&mut self, kind: &str, at: Timestamp, content: &[u8]) -> RequestId {
        let mut short = [0; 8];
        short.copy_from_slice(&blake3::hash(content).as_bytes()[..8]);
        let occurrence = self.seen.entry(short).or_default();
        let mut hasher = blake3::Hasher::new();
        hasher.update(kind.as_bytes()).update(&[0]).update(content).update(&occurrence.to_be_bytes());
        *occurrence += 1;
        let mut random = [0; 10];
        random.copy_from_slice(&hasher.finalize().as_bytes()[..10]);
        RequestId::new(at, random)
    }
}

/// Imports one file. Either all its good rows are in the ledger afterwards, or none.
///
/// # Errors
/// When the file cannot be read, is not of its kind, holds no good row, or the ledger cannot be written.
pub async fn import(
    store: &Store,
    file: &Path,
    settings: &Settings,
    book: &PriceBook,
    now: Timestamp,
    progress: &indicatif::ProgressBar,
) -> anyhow::Result<Outcome> {
    let source = format!("{}:{}", settings.kind.name(), settings.name);
    let outcome = Outcome {
        file: file.to_owned(),
        kind: settings.kind.name(),
        name: settings.name.clone(),
        already_imported: false,
        rows: 0,
        attempts: 0,
        already_known: 0,
        rejected: 0,
        rejects_file: None,
        input_tokens: 0,
        output_tokens: 0,
        unpriced: 0,
        list_cost: Money::ZERO,
        effective_cost: Money::ZERO,
    };
    let import = match store.begin_import(content_id(file, settings)?, &source, now).await? {
        Begun::AlreadyDone(summary) => return Ok(already(outcome, &summary)),
        Begun::Import(import) => import,
    };

    let rejects = Rejects::beside(file, settings.kind);
    let mut taking = Taking { import, book, outcome, rejects, chunk: Vec::with_capacity(CHUNK) };
    progress.set_length(std::fs::metadata(file)?.len());
    if settings.kind == ImportKind::Requests && parquet::is_parquet(file)? {
        taking.parquet(file, progress).await?;
    } else {
        taking.lines(file, settings, progress).await?;
    }
    let Taking { mut import, mut outcome, rejects, chunk, .. } = taking;
    outcome.rejected = rejects.count();
    outcome.rejects_file = rejects.finish()?;
    if outcome.rows == outcome.rejected {
        let where_ = outcome.rejects_file.as_ref().map_or(String::new(), |file| format!("; see {}", file.display()));
        bail!("{} holds no row of kind {}{where_}; nothing was imported", file.display(), settings.kind.name());
    }
    import.push(chunk).await?;
    let summary = import.commit(now).await?;
    outcome.attempts = summary.attempts;
    outcome.already_known = summary.skipped;
    Ok(outcome)
}

/// An import under way.
struct Taking<'a> {
    import: store::Import,
    book: &'a PriceBook,
    outcome: Outcome,
    rejects: Rejects,
    chunk: Vec<Fact>,
}

impl Taking<'_> {
    async fn lines(
        &mut self,
        file: &Path,
        settings: &Settings,
        progress: &indicatif::ProgressBar,
    ) -> anyhow::Result<()> {
        let mut reader = Reader::open(file, settings)?;
        let mut ids = Ids::default();
        let mut lines = Lines::new(open(file)?);
        while let Some(line) = lines.next_line().with_context(|| format!("cannot read {}", file.display()))? {
            progress.inc(line.bytes);
            let read = match &line.text {
                Ok(text) if text.trim().is_empty() => continue,
                Ok(text) => reader.row(line.number, text, &mut ids).transpose(),
                Err(reason) => Some(Err(reason.clone())),
            };
            let Some(read) = read else { continue };
            self.take(line.number, read, || line.text.as_deref().unwrap_or_default().to_owned()).await?;
        }
        Ok(())
    }

    async fn parquet(&mut self, file: &Path, progress: &indicatif::ProgressBar) -> anyhow::Result<()> {
        let reader = parquet::open(file)?;
        let bytes_per_row = progress.length().unwrap_or(0) / reader.rows().max(1);
        let mut number = 0;
        for batch in reader {
            let batch = batch?;
            for (row, read) in parquet::rows(&batch).into_iter().enumerate() {
                number += 1;
                self.take(number, read, || parquet::shown(&batch, row)).await?;
            }
            progress.set_position(number.saturating_mul(bytes_per_row));
        }
        Ok(())
    }

    /// Takes a row, or puts it aside with its number and the reason.
    async fn take(
        &mut self,
        number: u64,
        row: Result<Attempt, String>,
        text: impl FnOnce() -> String,
    ) -> anyhow::Result<()> {
        self.outcome.rows += 1;
        match row {
            Ok(attempt) => {
                let attempt = priced(attempt, self.book);
                self.outcome.count(&attempt);
                self.chunk.push(Fact::Attempt(Box::new(attempt)));
            }
            Err(reason) => self.rejects.add(number, &reason, &text())?,
        }
        if self.chunk.len() == CHUNK {
            self.import.push(std::mem::replace(&mut self.chunk, Vec::with_capacity(CHUNK))).await?;
        }
        Ok(())
    }
}

impl Outcome {
    fn count(&mut self, attempt: &Attempt) {
        self.input_tokens = self.input_tokens.saturating_add(attempt.usage.input_tokens());
        self.output_tokens = self.output_tokens.saturating_add(attempt.usage.output_tokens());
        match attempt.charge.costs() {
            Some(costs) => {
                self.list_cost += costs.list_cost;
                self.effective_cost += costs.effective_cost;
            }
            None => self.unpriced += 1,
        }
    }
}

fn already(outcome: Outcome, summary: &ImportSummary) -> Outcome {
    let known = summary.attempts + summary.skipped;
    Outcome { already_imported: true, rows: known, already_known: known, ..outcome }
}

/// The content's address: the same bytes read with the same settings are the same import.
fn content_id(file: &Path, settings: &Settings) -> anyhow::Result<ImportId> {
    use std::io::Read;
    // The name is left out on purpose: a renamed copy is the same usage.
    let salt = format!("{:?}\n", (settings.kind.name(), &settings.model, &settings.provider, &settings.pool));
    let mut input = salt.as_bytes().chain(open(file)?);
    ImportId::of_reader(&mut input).with_context(|| format!("cannot read {}", file.display()))
}

/// Opens a file to import.
///
/// # Errors
/// When it cannot be read or is a folder.
pub fn open(file: &Path) -> anyhow::Result<BufReader<File>> {
    let opened = File::open(file).with_context(|| format!("cannot read {}", file.display()))?;
    if opened.metadata()?.is_dir() {
        bail!("{} is a folder; name the files in it", file.display());
    }
    Ok(BufReader::with_capacity(1 << 18, opened))
}

/// Rows that bring a charge keep it, the others are priced by the book.
fn priced(mut attempt: Attempt, book: &PriceBook) -> Attempt {
    if attempt.charge == UNPRICED_YET {
        attempt.charge = book.charge(&PriceQuery {
            provider: &attempt.route.provider,
            model: attempt.route.model().map(|model| &**model),
            operation: attempt.route.operation,
            service_class: attempt.route.service_class,
            usage: &attempt.usage,
            quality: attempt.usage_quality,
            at: attempt.timeline.received_at,
        });
    }
    attempt
}

/// What rows without a charge of their own carry until they are priced.
const UNPRICED_YET: Charge = Charge::Unpriced { reason: ledger::UnpricedReason::UnknownModel };

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_rows_get_different_ids_and_the_same_ones_next_time() {
        let at = Timestamp::from_micros(1_700_000_000_000_000);
        let three = |content: [&[u8]; 3]| {
            let mut ids = Ids::default();
            content.map(|content| ids.of_row("k", at, content))
        };
        let first = three([b"a", b"a", b"b"]);
        assert_eq!(first, three([b"a", b"a", b"b"]));
        assert!(first[0] != first[1] && first[1] != first[2]);
        assert_eq!(three([b"b", b"a", b"a"])[0], first[2], "order does not matter");
        assert_ne!(Ids::default().of_row("other", at, b"a"), first[0]);
        assert_eq!(first[0].at(), at);
    }
}
