//! The command line of `farthing commit`.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use fleet::scale::{Policy, PolicyError};
use ledger::GpuHourRate;

use super::simulate::{Workload, not_negative, positive};

const SPOT: &str = "Interruptible GPUs";

/// `farthing commit`
#[derive(Debug, Clone, Args)]
pub struct Commit {
    /// What is played, on what, at what price.
    #[command(flatten)]
    pub workload: Workload,
    /// Who scales: the commitment is for what it keeps running. `none` takes the demand of each hour in whole replicas, as if
    /// scaling were perfect and free [default: the policy that `serve` uses].
    #[arg(long, value_name = "POLICY")]
    pub policy: Option<Scaler>,
    /// For how many months the need is believed to last; a longer term is paid to its end.
    #[arg(long, value_name = "MONTHS", value_parser = clap::value_parser!(u32).range(1..=600))]
    pub horizon_months: Option<u32>,
    /// Months that --committed-usd binds for.
    #[arg(long, value_name = "MONTHS", requires = "committed_usd", value_parser = clap::value_parser!(u32).range(1..=600))]
    pub term_months: Option<u32>,
    /// Show each level's regret if demand or prices change.
    #[arg(long)]
    pub scenarios: bool,
    /// Draw the load-duration curve with the level, and what each level costs: an SVG file.
    #[arg(long, value_name = "FILE.svg")]
    pub picture: Option<PathBuf>,

    /// USD for one interruptible GPU for one hour [default: the price list's, if it has one].
    #[arg(long, value_name = "USD", help_heading = SPOT)]
    pub spot_usd: Option<GpuHourRate>,
    /// Interruptions of one replica in an hour.
    #[arg(long, value_name = "N", default_value_t = 0.05, value_parser = not_negative, help_heading = SPOT)]
    pub interruptions_per_hour: f64,
    /// Seconds between an interruption's notice and its coming.
    #[arg(long, value_name = "S", default_value_t = 120.0, value_parser = not_negative, help_heading = SPOT)]
    pub notice_s: f64,
    /// The work can be repeated: batches, not people who wait.
    #[arg(long, help_heading = SPOT)]
    pub interruptible: bool,
    /// Seconds between two moments at which interruptible work is written down.
    #[arg(long, value_name = "S", default_value_t = 1_800.0, value_parser = positive, help_heading = SPOT)]
    pub checkpoint_s: f64,
    /// Seconds that a request takes, where no engine is simulated to say so.
    #[arg(long, value_name = "S", default_value_t = 15.0, value_parser = positive, help_heading = SPOT)]
    pub request_s: f64,
}

/// Who scales.
#[derive(Debug, Clone, PartialEq)]
pub enum Scaler {
    /// Nobody: the demand of each hour in whole replicas.
    Nobody,
    /// A policy.
    By(Policy),
}

impl FromStr for Scaler {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Scaler, PolicyError> {
        if text == "none" { Ok(Scaler::Nobody) } else { text.parse().map(Scaler::By) }
    }
}
