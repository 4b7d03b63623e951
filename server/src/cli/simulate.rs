//! The command line of `farthing simulate` and `farthing commit`: what is played, on what, decided by whom.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Subcommand};
use fleet::scale::{Policy, PolicyError};
use fleet::sim::failure::{Faults, Outage, Window};
use fleet::sim::router::Router;
use fleet::sim::startup::{Startup, Takes};
use ledger::GpuHourRate;

use super::{Span, parse_span};

const TRACE: &str = "What arrives";
const REPLICA: &str = "What one replica does";
const PRICE: &str = "What it costs";
const DEPLOYMENT: &str = "The deployment";

/// `farthing simulate`
#[derive(Debug, Clone, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Simulate {
    /// One engine on its own.
    #[command(subcommand)]
    pub one: Option<SimulateOne>,
    /// A fleet under a policy.
    #[command(flatten)]
    pub fleet: SimulateFleet,
}

/// What can be simulated beside a fleet.
#[derive(Debug, Clone, Subcommand)]
pub enum SimulateOne {
    /// One engine under a steady or recorded load.
    Engine(Box<crate::commands::simulate::engine::Options>),
}

/// A fleet under a policy.
#[derive(Debug, Clone, Args)]
pub struct SimulateFleet {
    /// What is played, on what, at what price.
    #[command(flatten)]
    pub workload: Workload,
    /// Who decides, with parameters that differ from the published ones: `hpa`, `token-rate:headroom=0.3` [default: the
    /// one that `serve` uses].
    #[arg(long, value_name = "POLICY", conflicts_with = "compare")]
    pub policy: Option<Policy>,
    /// Several policies beside one another.
    #[arg(long, value_name = "POLICY,…", num_args = 0..=1, default_missing_value = ALL_POLICIES)]
    pub compare: Option<Policies>,
    /// Tune the policies' parameters on the days to learn, under the objective.
    #[arg(long)]
    pub search: bool,
    /// Largest share of requests in overloaded minutes that a tuned policy may have.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0008, requires = "search")]
    pub overload_max: f64,
    /// Something goes wrong at a time since the start, for a while: `metrics-outage@30h+20m`, `blank-metrics@30h+20m`,
    /// `unschedulable@30h+1h`, `slow-starts@30h+1h=3`, `manual@30h=12`, `crash@30h=2`.
    #[arg(long, value_name = "FAULT")]
    pub fault: Vec<Fault>,
    /// Replicas that crash, once in so many hours each on average.
    #[arg(long, value_name = "HOURS", value_parser = positive)]
    pub crash_every_h: Option<f64>,
    /// How requests find a replica, where engines are simulated.
    #[arg(long, value_name = "HOW", default_value = "least-outstanding", value_parser = router())]
    pub router: Router,
    /// Draw demand and capacity, or for several policies cost against misses: an SVG file.
    #[arg(long, value_name = "FILE.svg")]
    pub picture: Option<PathBuf>,
    /// List the decisions with their reasons.
    #[arg(long)]
    pub explain: bool,
}

/// What is played, on what, at what price: the same for simulations and commitments.
#[derive(Debug, Clone, Args)]
pub struct Workload {
    /// A trace: requests with tokens (Azure 2023, Mooncake, JSON lines or a table of at, input_tokens, output_tokens), or
    /// counts in bins (Azure 2024) [default: the ledger's own attempts].
    #[arg(long, value_name = "FILE", help_heading = TRACE)]
    pub trace: Option<PathBuf>,
    /// For a trace that only counts: the trace to draw tokens from.
    #[arg(long, value_name = "FILE", requires = "trace", help_heading = TRACE)]
    pub lengths: Option<PathBuf>,
    /// For a trace that only counts: input tokens of every request.
    #[arg(long, value_name = "N", requires = "output_tokens", conflicts_with = "lengths", help_heading = TRACE)]
    pub input_tokens: Option<u32>,
    /// For a trace that only counts: output tokens of every request.
    #[arg(long, value_name = "N", requires = "input_tokens", conflicts_with = "lengths", help_heading = TRACE)]
    pub output_tokens: Option<u32>,
    /// The part of the trace or of the ledger to play.
    #[command(flatten, next_help_heading = TRACE)]
    pub span: Span,
    /// Of the ledger: only attempts on these deployments.
    #[arg(long, value_name = "NAME", conflicts_with = "trace", help_heading = TRACE)]
    pub deployment: Vec<String>,
    /// So many times as many requests.
    #[arg(long, value_name = "FACTOR", default_value_t = 1.0, value_parser = positive, help_heading = TRACE)]
    pub scale: f64,
    /// Days at the beginning that are learnt from and not judged [default: 3 of five days or more, else none].
    #[arg(long, value_name = "DAYS", value_parser = not_negative, help_heading = TRACE)]
    pub learn_days: Option<f64>,

    /// Scale the demand so that its busiest minute fills so many replicas [default: 40 where nothing says what one does].
    #[arg(long, value_name = "N", value_parser = positive, help_heading = REPLICA)]
    pub replicas_at_peak: Option<f64>,
    /// Requests a second that one replica sustains under the objective; found by simulating it where the model is given.
    #[arg(long, value_name = "REQUESTS/S", value_parser = positive, conflicts_with = "model_config", help_heading = REPLICA)]
    pub capacity: Option<f64>,
    /// The model's Hugging Face `config.json`: with it engines are simulated, without it the load alone.
    #[arg(long, value_name = "FILE", requires = "gpu", help_heading = REPLICA)]
    pub model_config: Option<PathBuf>,
    /// The GPU, as its data sheet or its driver names it.
    #[arg(long, value_name = "NAME", help_heading = REPLICA)]
    pub gpu: Option<String>,
    /// GPUs of one replica.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096), help_heading = REPLICA)]
    pub gpus: u32,
    /// Fitted constants of the engine (JSON).
    #[arg(long, value_name = "FILE", requires = "model_config", help_heading = REPLICA)]
    pub calibration: Option<PathBuf>,
    /// Play the load alone even where engines could be simulated: much faster, without response times.
    #[arg(long, help_heading = REPLICA)]
    pub fluid: bool,

    /// USD for one GPU for one hour on demand [default: the price list's].
    #[arg(long, value_name = "USD", visible_alias = "on-demand-usd", help_heading = PRICE)]
    pub gpu_hour_usd: Option<GpuHourRate>,
    /// USD for one committed GPU for one hour [default: the price list's].
    #[arg(long, value_name = "USD", help_heading = PRICE)]
    pub committed_usd: Option<GpuHourRate>,
    /// A dated price list (TOML) instead of the public one that comes along.
    #[arg(long, value_name = "FILE", help_heading = PRICE)]
    pub prices: Option<PathBuf>,
    /// Whose price holds, where several sell the GPU.
    #[arg(long, value_name = "NAME", help_heading = PRICE)]
    pub provider: Option<String>,

    /// Seconds from asking for a replica until it serves, or its parts: `node=120,image=60,weights=90,warm-up=30`.
    #[arg(long, value_name = "S", default_value = "300", value_parser = start_up, help_heading = DEPLOYMENT)]
    pub start_up_s: Startup,
    /// How much starts vary: the standard deviation of the logarithm of each part.
    #[arg(long, value_name = "SIGMA", value_parser = not_negative, help_heading = DEPLOYMENT)]
    pub start_up_varies: Option<f64>,
    /// Fewest replicas.
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = DEPLOYMENT)]
    pub floor: u32,
    /// Most replicas [default: one and a half times what the peak needs].
    #[arg(long, value_name = "N", help_heading = DEPLOYMENT)]
    pub ceiling: Option<u32>,
    /// Seconds between decisions.
    #[arg(long, value_name = "S", default_value_t = 10.0, value_parser = positive, help_heading = DEPLOYMENT)]
    pub decide_every_s: f64,
    /// Promised time to the first token, milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 2_000.0, value_parser = positive, help_heading = DEPLOYMENT)]
    pub objective_ttft_ms: f64,
    /// Promised time per output token, milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 100.0, value_parser = positive, help_heading = DEPLOYMENT)]
    pub objective_tpot_ms: f64,
    /// The part of all requests that has to meet both.
    #[arg(long, value_name = "SHARE", default_value_t = 0.95, value_parser = share, help_heading = DEPLOYMENT)]
    pub objective_percentile: f64,
    /// What chance is drawn from; the same seed gives the same answer.
    #[arg(long, default_value_t = 1, help_heading = DEPLOYMENT)]
    pub seed: u64,
    /// Replicas that are paid for whether they run or not.
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = PRICE)]
    pub committed: u32,
}

/// What `--compare` without a list compares: every policy that needs no plan of its owner's.
const ALL_POLICIES: &str = "static,hpa,kpa,queue-kv,token-rate,forecast,cost-optimal,oracle";

/// Policies, separated by commas; so are the parameters of one policy, which belong to the name before them.
#[derive(Debug, Clone, PartialEq)]
pub struct Policies(pub Vec<Policy>);

impl FromStr for Policies {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Policies, PolicyError> {
        let mut texts: Vec<String> = Vec::new();
        for piece in text.split(',') {
            let name = piece.split(':').next().unwrap_or(piece).trim();
            match texts.last_mut().filter(|_| !Policy::NAMES.contains(&name) && piece.contains('=')) {
                Some(before) => {
                    before.push(',');
                    before.push_str(piece);
                }
                None => texts.push(piece.trim().to_owned()),
            }
        }
        texts.iter().map(|text| text.parse()).collect::<Result<_, _>>().map(Policies)
    }
}

/// Something that goes wrong at a time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Fault {
    /// What the scaler sees stands still, or is empty.
    Metrics(Window, Outage),
    /// Replicas asked for have no place.
    Unschedulable(Window),
    /// Replicas asked for take so many times as long.
    SlowStarts(Window, f64),
    /// Somebody sets the replicas.
    Manual(f64, u32),
    /// Replicas crash.
    Crash(f64, u32),
}

impl Fault {
    /// All of them together.
    #[must_use]
    pub fn all(faults: &[Fault]) -> Faults {
        let mut all = Faults::default();
        for &fault in faults {
            match fault {
                Fault::Metrics(window, outage) => all.metrics.push((window, outage)),
                Fault::Unschedulable(window) => all.unschedulable.push(window),
                Fault::SlowStarts(window, factor) => all.slow_starts.push((window, factor)),
                Fault::Manual(at_s, replicas) => all.manual.push((at_s, replicas)),
                Fault::Crash(at_s, replicas) => all.crashes.push((at_s, replicas)),
            }
        }
        all
    }
}

impl FromStr for Fault {
    type Err = String;

    fn from_str(text: &str) -> Result<Fault, String> {
        let usage = || {
            format!("`{text}` is no fault; write one like metrics-outage@30h+20m, slow-starts@30h+1h=3 or crash@30h=2")
        };
        let (kind, when) = text.split_once('@').ok_or_else(usage)?;
        let (when, value) = when.split_once('=').map_or((when, None), |(when, value)| (when, Some(value)));
        let (at, length) = when.split_once('+').map_or((when, None), |(at, length)| (at, Some(length)));
        let from_s = seconds(at)?;
        let window = || {
            let length = length.ok_or_else(|| format!("`{text}` does not say for how long; write {kind}@{at}+20m"))?;
            Ok::<Window, String>(Window { from_s, to_s: from_s + seconds(length)? })
        };
        let number = || {
            let value = value.ok_or_else(|| format!("`{text}` does not say how many; write {kind}@{at}=2"))?;
            value.parse().map_err(|_| format!("`{value}` in `{text}` is not a whole number"))
        };
        Ok(match kind {
            "metrics-outage" => Fault::Metrics(window()?, Outage::Frozen),
            "blank-metrics" => Fault::Metrics(window()?, Outage::Blank),
            "unschedulable" => Fault::Unschedulable(window()?),
            "slow-starts" => {
                let factor = value.ok_or_else(|| format!("`{text}` does not say how slow; write {text}=3"))?;
                Fault::SlowStarts(window()?, positive(factor)?)
            }
            "manual" => Fault::Manual(from_s, number()?),
            "crash" => Fault::Crash(from_s, number()?),
            _ => return Err(usage()),
        })
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    Ok(parse_span(text)? as f64 / 1e6)
}

fn router() -> impl clap::builder::TypedValueParser<Value = Router> {
    use clap::builder::{PossibleValuesParser, TypedValueParser};
    PossibleValuesParser::new(Router::ALL.map(|(name, _)| name)).map(|name| {
        let found = Router::ALL.into_iter().find(|(known, _)| *known == name);
        found.expect("only names of routers are possible").1
    })
}

/// Reads `300` or `node=120,image=60,weights=90,warm-up=30`.
fn start_up(text: &str) -> Result<Startup, String> {
    if !text.contains('=') {
        return not_negative(text).map(Startup::fixed);
    }
    let zero = Takes::Fixed(0.0);
    let mut parts = Startup { node: zero, image: zero, weights: zero, warmup: zero };
    for part in text.split(',') {
        let (name, value) =
            part.split_once('=').ok_or_else(|| format!("`{part}` is no part of a start; write node=120"))?;
        let place = match name.trim() {
            "node" => &mut parts.node,
            "image" => &mut parts.image,
            "weights" => &mut parts.weights,
            "warm-up" => &mut parts.warmup,
            other => return Err(format!("`{other}` is no part of a start; known are node, image, weights, warm-up")),
        };
        *place = Takes::Fixed(not_negative(value)?);
    }
    Ok(parts)
}

/// A number above zero.
///
/// # Errors
/// One sentence for people.
pub fn positive(text: &str) -> Result<f64, String> {
    number(text).filter(|value| *value > 0.0).ok_or_else(|| format!("`{text}` is not a number above 0"))
}

/// A number that is not below zero.
///
/// # Errors
/// One sentence for people.
pub fn not_negative(text: &str) -> Result<f64, String> {
    number(text).filter(|value| *value >= 0.0).ok_or_else(|| format!("`{text}` is not a number of 0 or more"))
}

/// A part of a whole, above zero and below one.
fn share(text: &str) -> Result<f64, String> {
    let share = number(text).filter(|value| *value > 0.0 && *value < 1.0);
    share.ok_or_else(|| format!("`{text}` is not a part between 0 and 1; 95 % is 0.95"))
}

fn number(text: &str) -> Option<f64> {
    text.trim().parse().ok().filter(|value: &f64| value.is_finite())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_belong_to_the_policy_before_them() {
        let names = |text: &str| -> Vec<String> {
            text.parse::<Policies>().unwrap().0.iter().map(|policy| policy.name().to_owned()).collect()
        };
        assert_eq!(names("static,hpa,token-rate"), ["static", "hpa", "token-rate"]);
        let schedule = "schedule:else=4,mon-fri/08:00-18:00=12,hpa";
        assert_eq!(names(schedule), ["schedule", "hpa"]);
        let without_schedule = Policy::NAMES.into_iter().filter(|name| *name != "schedule");
        assert_eq!(names(ALL_POLICIES), without_schedule.collect::<Vec<_>>());
        assert!("static,hpaa".parse::<Policies>().is_err());
    }

    #[test]
    fn faults_have_a_time_and_what_they_need() {
        let hour = 3_600.0;
        let cases = [
            (
                "metrics-outage@30h+20m",
                Fault::Metrics(Window { from_s: 30.0 * hour, to_s: 30.0 * hour + 1_200.0 }, Outage::Frozen),
            ),
            ("slow-starts@1d+1h=3", Fault::SlowStarts(Window { from_s: 24.0 * hour, to_s: 25.0 * hour }, 3.0)),
            ("manual@30h=12", Fault::Manual(30.0 * hour, 12)),
            ("crash@90m=2", Fault::Crash(1.5 * hour, 2)),
        ];
        for (text, fault) in cases {
            assert_eq!(text.parse(), Ok(fault), "{text}");
        }
        for (text, part) in [
            ("metrics-outage@30h", "does not say for how long"),
            ("crash@30h", "does not say how many"),
            ("crash@30h=two", "not a whole number"),
            ("slow-starts@1h+1h", "does not say how slow"),
            ("fire@1h", "is no fault"),
            ("crash@30=2", "not a span of time"),
        ] {
            assert!(text.parse::<Fault>().unwrap_err().contains(part), "{text}");
        }
    }

    #[test]
    fn a_start_is_one_number_or_its_parts() {
        assert!((start_up("420").unwrap().usual_s() - 420.0).abs() < 1e-9);
        let parts = start_up("node=100,weights=50").unwrap();
        assert_eq!((parts.node, parts.image, parts.usual_s()), (Takes::Fixed(100.0), Takes::Fixed(0.0), 150.0));
        assert!(start_up("nodes=1").unwrap_err().contains("known are node"));
        assert!(start_up("-3").is_err() && start_up("soon").is_err());
    }
}
