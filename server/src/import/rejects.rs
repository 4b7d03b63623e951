//! Rows that an import refused, with line and reason, in a file beside the one they came from.

use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::cli::ImportKind;

/// The rejects file of one import; it is made when the first row is refused.
#[derive(Debug)]
pub struct Rejects {
    path: PathBuf,
    format: Format,
    out: Option<Out>,
    count: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Csv,
    JsonLines,
}

#[derive(Debug)]
enum Out {
    Csv(Box<csv::Writer<File>>),
    JsonLines(BufWriter<File>),
}

impl Rejects {
    /// `<file>.rejects.csv` for tables, `<file>.rejects.jsonl` for JSON Lines.
    #[must_use]
    pub fn beside(file: &Path, kind: ImportKind) -> Rejects {
        let (format, ending) = match kind {
            ImportKind::AzureLlmTrace => (Format::Csv, ".rejects.csv"),
            ImportKind::Requests | ImportKind::VllmTimeline => (Format::JsonLines, ".rejects.jsonl"),
        };
        let mut path = file.as_os_str().to_owned();
        path.push(ending);
        Rejects { path: path.into(), format, out: None, count: 0 }
    }

    /// Writes down a refused row.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn add(&mut self, line: u64, reason: &str, row: &str) -> anyhow::Result<()> {
        self.count += 1;
        let whole = || format!("cannot write {}", self.path.display());
        let out = match &mut self.out {
            Some(out) => out,
            none => none.insert(create(&self.path, self.format).with_context(whole)?),
        };
        match out {
            Out::Csv(writer) => writer.write_record([line.to_string().as_str(), reason, row]).with_context(whole),
            Out::JsonLines(writer) => {
                use std::io::Write;
                let entry = serde_json::json!({ "line": line, "reason": reason, "row": row });
                writeln!(writer, "{entry}").with_context(whole)
            }
        }
    }

    /// Rows refused so far.
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// The file, if a row was refused.
    ///
    /// # Errors
    /// When the file cannot be written to its end.
    pub fn finish(self) -> anyhow::Result<Option<PathBuf>> {
        let Some(out) = self.out else { return Ok(None) };
        match out {
            Out::Csv(mut writer) => writer.flush()?,
            Out::JsonLines(mut writer) => std::io::Write::flush(&mut writer)?,
        }
        Ok(Some(self.path))
    }
}

fn create(path: &Path, format: Format) -> anyhow::Result<Out> {
    let file = File::create(path)?;
    Ok(match format {
        Format::Csv => {
            let mut writer = csv::Writer::from_writer(file);
            writer.write_record(["line", "reason", "row"])?;
            Out::Csv(Box::new(writer))
        }
        Format::JsonLines => Out::JsonLines(BufWriter::new(file)),
    })
}
