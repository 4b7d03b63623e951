//! The command line: what can be asked of the binary, and nothing about how it is done.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ledger::Timestamp;

/// The cost ledger for AI inference.
#[derive(Debug, Parser)]
#[command(name = "farthing", version, about, max_term_width = 110, propagate_version = true)]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Configuration file (TOML). Everything has a working default.
    #[arg(long, global = true, value_name = "FILE", env = "FARTHING_CONFIG")]
    pub config: Option<PathBuf>,
    /// The ledger's folder [default: ./farthing-data].
    #[arg(long, global = true, value_name = "DIR", env = "FARTHING_DATA")]
    pub data: Option<PathBuf>,
    /// One JSON document on standard output, amounts as decimal strings.
    #[arg(long, global = true)]
    pub json: bool,
}

impl Global {
    /// The ledger's folder: the one asked for, else the default.
    #[must_use]
    pub fn data_dir(&self) -> PathBuf {
        self.data.clone().unwrap_or_else(|| PathBuf::from("./farthing-data"))
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start everything on loopback with three simulated engines, send traffic, and print the bill.
    Demo(Demo),
    /// Run the server: gateway, settlement, API and live page.
    Serve,
    /// Check the configuration file and say what is wrong.
    Check,
    /// Take usage in from files. Importing a file twice books it once.
    Import(Import),
    /// Write usage out as JSON Lines that `farthing import requests` reads back.
    Export(Export),
    /// Book pool cost that nothing has booked yet.
    Settle,
    /// Cost and unit economics.
    Report(Report),
    /// One request: every term of its cost, and the rows that prove it.
    Explain {
        /// The request's id, as in the `x-farthing-request-id` header.
        request_id: String,
    },
    /// SQL over the ledger. Reads only.
    Sql(Sql),
    /// Prove that the books balance: closure, duplicates, gaps, checksums.
    Verify,
    /// Virtual keys.
    #[command(subcommand)]
    Key(KeyCommand),
    /// The price book.
    #[command(subcommand)]
    Price(PriceCommand),
}

/// `farthing demo`
#[derive(Debug, Clone, Args)]
pub struct Demo {
    /// How long traffic is sent.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub seconds: u64,
    /// Stop after the bill instead of keeping the live page open.
    #[arg(long)]
    pub headless: bool,
    /// Seed of the traffic; the same seed plans the same requests.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

/// `farthing import KIND FILE…`
#[derive(Debug, Clone, Args)]
pub struct Import {
    /// What the files hold.
    #[arg(value_enum)]
    pub kind: ImportKind,
    /// The files.
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// The model that a trace without one is priced as.
    #[arg(long)]
    pub model: Option<String>,
    /// Whose prices apply to that model [default: openai for azure-llm-trace, self_hosted for vllm-timeline].
    #[arg(long)]
    pub provider: Option<String>,
    /// The GPU pool that served it.
    #[arg(long)]
    pub pool: Option<String>,
    /// The name of the import, which rows without a consumer are attributed to [default: the file's name].
    #[arg(long)]
    pub name: Option<String>,
}

/// What a file to import holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ImportKind {
    /// Farthing's own JSON Lines.
    Requests,
    /// CSV `TIMESTAMP,ContextTokens,GeneratedTokens`.
    AzureLlmTrace,
    /// JSON Lines with per-request times of a vLLM engine.
    VllmTimeline,
}

impl ImportKind {
    /// The kind's name on the command line and in the ledger.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            ImportKind::Requests => "requests",
            ImportKind::AzureLlmTrace => "azure-llm-trace",
            ImportKind::VllmTimeline => "vllm-timeline",
        }
    }
}

/// `farthing export requests`
#[derive(Debug, Clone, Args)]
pub struct Export {
    /// What to write.
    #[arg(value_enum)]
    pub kind: ExportKind,
    /// The time to write.
    #[command(flatten)]
    pub span: Span,
}

/// What can be written out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExportKind {
    /// One JSON line per attempt.
    Requests,
}

/// A half-open span of time.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct Span {
    /// The first moment inside (`2026-11-01` or RFC 3339).
    #[arg(long, value_name = "TIME")]
    pub from: Option<Timestamp>,
    /// The first moment outside.
    #[arg(long, value_name = "TIME")]
    pub to: Option<Timestamp>,
}

impl Span {
    /// The span as a period, open ends at the ends of time.
    #[must_use]
    pub fn period(self) -> ledger::Period {
        let all = ledger::Period::ALL;
        ledger::Period { start: self.from.unwrap_or(all.start), end: self.to.unwrap_or(all.end) }
    }
}

/// `farthing report`
#[derive(Debug, Clone, Args)]
pub struct Report {
    /// Dimensions to group by, in order: team, consumer, application, cost_centre, customer, feature, task, environment,
    /// provider, model, pool, deployment, day, hour, line.
    #[arg(long, value_name = "DIM,…", value_delimiter = ',', default_value = "team,model")]
    pub by: Vec<String>,
    /// The time to report.
    #[command(flatten)]
    pub span: Span,
    /// Also show the cost per unit.
    #[arg(long, value_enum)]
    pub unit: Option<Unit>,
}

/// What a unit cost is per.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Unit {
    /// Per request.
    Request,
    /// Per user task.
    Task,
    /// Per million tokens, input and output.
    MillionTokens,
}

/// `farthing sql`
#[derive(Debug, Clone, Args)]
pub struct Sql {
    /// A `SELECT` over attempts, postings, capacity and gaps.
    pub query: String,
    /// Comma-separated values instead of a table.
    #[arg(long, conflicts_with = "json")]
    pub csv: bool,
}

/// `farthing key …`
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Make a key. It is shown once and stored as a keyed hash.
    Create(Box<KeyCreate>),
    /// All keys, without their secrets.
    List,
    /// Stop accepting a key.
    Revoke {
        /// The key's id.
        id: String,
    },
    /// Replace a key; the old one works until the overlap has passed.
    Rotate {
        /// The key's id.
        id: String,
        /// How long both keys work: `90m`, `24h`, `7d`.
        #[arg(long, default_value = "24h", value_parser = parse_span)]
        overlap: i64,
    },
}

/// `farthing key create`
#[derive(Debug, Clone, Args)]
pub struct KeyCreate {
    /// Who holds the key.
    #[arg(long)]
    pub consumer: String,
    /// The team that pays.
    #[arg(long)]
    pub team: String,
    /// The application.
    #[arg(long)]
    pub application: Option<String>,
    /// Where finance books it.
    #[arg(long)]
    pub cost_centre: Option<String>,
    /// The environment.
    #[arg(long)]
    pub environment: Option<String>,
    /// Context that the holder may set through `x-farthing-*` headers.
    #[arg(long, value_name = "FIELD,…", value_delimiter = ',')]
    pub may_set: Vec<String>,
    /// Models the key may ask for; none means all. A trailing `*` matches any ending.
    #[arg(long, value_name = "MODEL,…", value_delimiter = ',')]
    pub models: Vec<String>,
    /// When the key stops working: a time, or a span from now such as `90d`.
    #[arg(long, value_name = "WHEN")]
    pub expires: Option<String>,
    /// Networks it may be used from (`10.0.0.0/8`); none means all.
    #[arg(long, value_name = "CIDR,…", value_delimiter = ',')]
    pub networks: Vec<String>,
}

/// `farthing price …`
#[derive(Debug, Subcommand)]
pub enum PriceCommand {
    /// The rates of a model.
    Show {
        /// The model's name.
        model: String,
        /// Whose model it is, where several sell it.
        #[arg(long)]
        provider: Option<String>,
        /// The time at which the rates hold [default: now].
        #[arg(long, value_name = "TIME")]
        at: Option<Timestamp>,
    },
    /// Take a public price map into the price book.
    Import {
        /// The map's format.
        #[arg(value_enum)]
        kind: PriceMapKind,
        /// The file.
        file: PathBuf,
    },
    /// What past usage would have cost with another price map.
    Diff {
        /// A price map to compare with.
        file: PathBuf,
        /// The usage to re-rate.
        #[command(flatten)]
        span: Span,
    },
}

/// A format of public price maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PriceMapKind {
    /// LiteLLM's `model_prices_and_context_window.json`.
    Litellm,
}

/// Reads `45s`, `90m`, `24h` or `7d` as microseconds.
///
/// # Errors
/// What is wrong with the text, for people.
pub fn parse_span(text: &str) -> Result<i64, String> {
    let usage = || format!("`{text}` is not a span of time; write 45s, 90m, 24h or 7d");
    let unit = text.chars().last().ok_or_else(usage)?;
    let seconds: i64 = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3_600,
        'd' => 86_400,
        _ => return Err(usage()),
    };
    let count: i64 = text[..text.len() - 1].parse().map_err(|_| usage())?;
    if count < 0 {
        return Err(usage());
    }
    count.checked_mul(seconds * 1_000_000).ok_or_else(usage)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn spans_of_time_have_a_unit() {
        assert_eq!(parse_span("24h"), Ok(86_400_000_000));
        assert_eq!(parse_span("45s"), Ok(45_000_000));
        for bad in ["", "h", "24", "-1h", "1w", "99999999999999d", "ä"] {
            assert!(parse_span(bad).is_err(), "{bad}");
        }
    }
}
