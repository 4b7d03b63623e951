//! The command line: what can be asked of the binary, and nothing about how it is done.

mod commit;
mod simulate;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ledger::allocate::policy::Method;
use ledger::{GpuHourRate, Timestamp};

pub use commit::{Commit, Scaler};
pub use simulate::{Fault, Policies, Simulate, SimulateFleet, SimulateOne, Workload};

/// Where help lists what every command takes.
const EVERY: &str = "Options of every command";

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
    #[arg(long, global = true, value_name = "FILE", env = "FARTHING_CONFIG", hide_env_values = true, help_heading = EVERY)]
    pub config: Option<PathBuf>,
    /// The ledger's folder [default: ./farthing-data].
    #[arg(long, global = true, value_name = "DIR", env = "FARTHING_DATA", hide_env_values = true, help_heading = EVERY)]
    pub data: Option<PathBuf>,
    /// One JSON document on standard output, amounts as decimal strings.
    #[arg(long, global = true, help_heading = EVERY)]
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
    /// Write usage out, as `farthing import requests` reads it back.
    Export(Export),
    /// Attribute what an engine's GPUs cost to its single requests: files in, files out, no ledger needed.
    Allocate(Box<Allocate>),
    /// Allocate pool cost that is not settled yet, or not as its facts are now.
    Settle(Settle),
    /// Cost and unit economics.
    Report(Report),
    /// One request: every term of its cost, and the rows that prove it.
    Explain {
        /// The request's id, as in the `x-farthing-request-id` header.
        request_id: String,
    },
    /// Play a trace, or the ledger's own history, against scaling policies: what they cost and what they miss.
    Simulate(Box<Simulate>),
    /// How many GPUs to commit to: level, coverage, regret, and what interruptible ones would break.
    Commit(Box<Commit>),
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
    /// Farthing's own rows: JSON Lines, or Parquet with the columns of the `attempts` table.
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
    /// Write a Parquet file instead of JSON Lines on standard output.
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    pub parquet: Option<PathBuf>,
}

/// What can be written out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ExportKind {
    /// Attempts, one a row.
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
    ///
    /// # Errors
    /// One sentence for people when nothing lies between the ends.
    pub fn period(self) -> Result<ledger::Period, String> {
        let all = ledger::Period::ALL;
        let (start, end) = (self.from.unwrap_or(all.start), self.to.unwrap_or(all.end));
        if start >= end {
            return Err(format!(
                "nothing lies between {start} and {end}: `to` is the first moment outside and comes after `from`"
            ));
        }
        Ok(ledger::Period { start, end })
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

/// `farthing allocate`
#[derive(Debug, Clone, Args)]
pub struct Allocate {
    /// Per-request times of one engine: JSON Lines as `farthing import vllm-timeline` reads them.
    #[arg(long, value_name = "FILE")]
    pub timeline: PathBuf,
    /// The model's Hugging Face `config.json`.
    #[arg(long, value_name = "FILE")]
    pub model_config: PathBuf,
    /// The GPU, as its data sheet or its driver names it.
    #[arg(long, value_name = "NAME")]
    pub gpu: String,
    /// GPUs that work as one (tensor or pipeline parallel).
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub gpus: u32,
    /// USD for one GPU for one hour.
    #[arg(long, value_name = "USD")]
    pub rate: GpuHourRate,
    /// How busy time is divided.
    #[arg(long, default_value = "roofline", value_parser = method())]
    pub method: Method,
    /// The time that is paid for [default: from the first arrival to the last token].
    #[command(flatten)]
    pub span: Span,
    /// Tokens that fit the engine's KV cache; without it no preemption is noticed.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub kv_tokens: Option<u64>,
    /// Requests that the engine runs at once at the most.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_sequences: Option<u32>,
    /// The engine's own settings as JSON (`started_at`, `engine_kwargs`, `kv_cache`); options above win.
    #[arg(long, value_name = "FILE")]
    pub meta: Option<PathBuf>,
    /// The engine's own series to compare with: CSV `t,running,waiting,kv_cache_pct`.
    #[arg(long, value_name = "FILE")]
    pub series: Option<PathBuf>,
    /// When the series' `t` is zero.
    #[arg(long, value_name = "TIME", requires = "series")]
    pub series_start: Option<Timestamp>,
    /// Who caused which request: CSV `request_id` and any of team, consumer, application, cost_centre, customer, feature,
    /// task, environment.
    #[arg(long, value_name = "FILE")]
    pub context_from: Option<PathBuf>,
    /// The model's name on the postings.
    #[arg(long)]
    pub model: Option<String>,
    /// The pool's name on the postings.
    #[arg(long, default_value = "pool")]
    pub pool: String,
    /// Write all postings with the columns of the `postings` table: `.parquet` or `.jsonl`.
    #[arg(long, value_name = "FILE")]
    pub out: Option<PathBuf>,
}

fn method() -> impl clap::builder::TypedValueParser<Value = Method> {
    use clap::builder::{PossibleValuesParser, TypedValueParser};
    PossibleValuesParser::new(Method::ALL.map(Method::name))
        .map(|name| Method::named(&name).expect("only names of methods are possible"))
}

/// `farthing settle`
#[derive(Debug, Clone, Args)]
pub struct Settle {
    /// The time to settle [default: all]. Where only imports tell what ran, configured GPUs are taken to have been there from
    /// and until then.
    #[command(flatten)]
    pub span: Span,
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

/// What is wrong with a command line, on one line.
#[must_use]
pub fn usage_error(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let mut line = String::new();
    for part in text.lines().map(str::trim).filter(|part| !part.is_empty()) {
        let is_usage = part.starts_with("Usage:");
        if part.starts_with("For more") || (is_usage && error.kind() != clap::error::ErrorKind::MissingRequiredArgument)
        {
            continue;
        }
        let part = part.trim_start_matches("error: ").trim_start_matches("tip: ");
        let part = match part.strip_prefix("[possible values: ").and_then(|rest| rest.strip_suffix(']')) {
            Some(values) => format!("write one of {values}"),
            None => part.replace("Usage:", "usage:").replace("invalid digit found in string", "not a whole number"),
        };
        match line.chars().last() {
            None => {}
            Some(':') => line.push(' '),
            Some(_) => line.push_str("; "),
        }
        line.push_str(&part);
    }
    line
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
    fn a_wrong_command_line_is_one_line() {
        let cases: [(&[&str], &str); 4] = [
            (&["report", "--form", "x"], "unexpected argument '--form' found; a similar argument exists: '--from'"),
            (&["report", "--unit", "tokn"], "write one of request, task, million_tokens"),
            (&["explain"], "not provided: <REQUEST_ID>; usage: farthing explain"),
            (&["rport"], "unrecognized subcommand 'rport'"),
        ];
        for (args, part) in cases {
            let error = Cli::try_parse_from([&["farthing"], args].concat()).unwrap_err();
            let line = usage_error(&error);
            assert!(line.contains(part) && !line.contains('\n'), "{line}");
        }
    }

    #[test]
    fn a_span_that_holds_nothing_is_refused() {
        let at = |micros| Some(Timestamp::from_micros(micros));
        assert!(Span { from: at(1), to: at(2) }.period().is_ok() && Span::default().period().is_ok());
        assert!(Span { from: at(2), to: at(2) }.period().unwrap_err().contains("nothing lies between"));
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
