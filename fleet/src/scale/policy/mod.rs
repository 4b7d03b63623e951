//! The policies behind one function: [`desired_replicas`]. One file each, with the published algorithm, its parameters and
//! where they come from. All are pure: windows and panic modes are read off the last hour's samples and decisions.

pub mod cost_optimal;
pub mod fixed;
pub mod forecast;
pub mod hpa;
pub mod kpa;
pub mod oracle;
pub mod parameters;
pub mod queue_kv;
pub mod schedule;
pub mod token_rate;

use std::fmt;
use std::str::FromStr;

use ledger::Timestamp;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub use cost_optimal::CostOptimal;
pub use fixed::Static;
pub use forecast::Forecast;
pub use hpa::Hpa;
pub use kpa::Kpa;
pub use oracle::Oracle;
pub use queue_kv::QueueKv;
pub use schedule::Schedule;
pub use token_rate::TokenRate;

use super::observe::{Decision, Observation, Sample};
use parameters::Parameters;

/// How many replicas there should be, as one of the known ways says it.
///
/// As text it is its name and the parameters that differ from the published ones: `token-rate:headroom=0.3`.
#[derive(Debug, Clone, PartialEq)]
pub enum Policy {
    /// Always the same.
    Static(Static),
    /// By weekday and hour.
    Schedule(Schedule),
    /// Kubernetes' horizontal pod autoscaler.
    Hpa(Hpa),
    /// Knative's pod autoscaler.
    Kpa(Kpa),
    /// Saturation of queues and KV caches.
    QueueKv(QueueKv),
    /// Arriving tokens with headroom.
    TokenRate(TokenRate),
    /// Seasonal forecast and reaction.
    Forecast(Forecast),
    /// Fewest replicas whose predicted tail meets the objective.
    CostOptimal(CostOptimal),
    /// Knows the future.
    Oracle(Oracle),
}

/// Why a text is no policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// Nobody knows this policy.
    #[error(
        "`{0}` is no policy; there are static, schedule, hpa, kpa, queue-kv, token-rate, forecast, cost-optimal and oracle"
    )]
    Unknown(String),
    /// It has no such parameter.
    #[error("the policy {policy} has no parameter `{name}`; it has {known}")]
    NoParameter {
        /// The policy.
        policy: &'static str,
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// A parameter has no such value.
    #[error("the policy {policy} cannot have {name} = {value}; {name} is {expected}")]
    Value {
        /// The policy.
        policy: &'static str,
        /// The parameter.
        name: String,
        /// What was asked for.
        value: String,
        /// What would do.
        expected: String,
    },
}

/// How many replicas there should be and why, before any guard and without regard to floor and ceiling.
#[must_use]
pub fn desired_replicas(observation: &Observation, policy: &Policy, now: Timestamp) -> Decision {
    match policy {
        Policy::Static(policy) => policy.desired(observation, now),
        Policy::Schedule(policy) => policy.desired(observation, now),
        Policy::Hpa(policy) => policy.desired(observation, now),
        Policy::Kpa(policy) => policy.desired(observation, now),
        Policy::QueueKv(policy) => policy.desired(observation, now),
        Policy::TokenRate(policy) => policy.desired(observation, now),
        Policy::Forecast(policy) => policy.desired(observation, now),
        Policy::CostOptimal(policy) => policy.desired(observation, now),
        Policy::Oracle(policy) => policy.desired(observation, now),
    }
}

/// The same expression for whichever policy it is.
macro_rules! each {
    ($policy:expr, $of:ident => $then:expr) => {
        match $policy {
            Policy::Static($of) => $then,
            Policy::Schedule($of) => $then,
            Policy::Hpa($of) => $then,
            Policy::Kpa($of) => $then,
            Policy::QueueKv($of) => $then,
            Policy::TokenRate($of) => $then,
            Policy::Forecast($of) => $then,
            Policy::CostOptimal($of) => $then,
            Policy::Oracle($of) => $then,
        }
    };
}

impl Policy {
    /// Every policy's name.
    pub const NAMES: [&'static str; 9] =
        ["static", "schedule", "hpa", "kpa", "queue-kv", "token-rate", "forecast", "cost-optimal", "oracle"];

    /// The policy of this name with its published parameters.
    fn named(name: &str) -> Option<Policy> {
        Some(match name {
            "static" => Policy::Static(Static::default()),
            "schedule" => Policy::Schedule(Schedule::default()),
            "hpa" => Policy::Hpa(Hpa::default()),
            "kpa" => Policy::Kpa(Kpa::default()),
            "queue-kv" => Policy::QueueKv(QueueKv::default()),
            "token-rate" => Policy::TokenRate(TokenRate::default()),
            "forecast" => Policy::Forecast(Forecast::default()),
            "cost-optimal" => Policy::CostOptimal(CostOptimal::default()),
            "oracle" => Policy::Oracle(Oracle::default()),
            _ => return None,
        })
    }

    /// Its name on the command line.
    #[must_use]
    pub fn name(&self) -> &'static str {
        fn name<P: Parameters>(_: &P) -> &'static str {
            P::NAME
        }
        each!(self, policy => name(policy))
    }

    /// Its numbers: name, value, least and most that make sense.
    #[must_use]
    pub fn parameters(&self) -> Vec<(&'static str, f64, f64, f64)> {
        fn list<P: Parameters>(policy: &P) -> Vec<(&'static str, f64, f64, f64)> {
            let row = |one: &parameters::Parameter<P>| (one.name, (one.get)(policy), one.min, one.max);
            P::parameters().iter().map(row).collect()
        }
        each!(self, policy => list(policy))
    }

    /// The same policy with one number changed.
    ///
    /// # Errors
    /// When it has no such parameter, or the value makes no sense for it.
    pub fn with(&self, name: &str, value: f64) -> Result<Policy, PolicyError> {
        fn set<P: Parameters>(policy: &mut P, name: &str, value: f64) -> Result<(), PolicyError> {
            let Some(parameter) = P::parameters().iter().find(|parameter| parameter.name == name) else {
                let known: Vec<&str> = P::parameters().iter().map(|parameter| parameter.name).collect();
                return Err(PolicyError::NoParameter { policy: P::NAME, name: name.into(), known: known.join(", ") });
            };
            if !(parameter.min..=parameter.max).contains(&value) {
                let expected = format!("{}, from {} to {}", parameter.meaning, parameter.min, parameter.max);
                let value = value.to_string();
                return Err(PolicyError::Value { policy: P::NAME, name: name.into(), value, expected });
            }
            (parameter.set)(policy, value);
            Ok(())
        }
        let mut changed = self.clone();
        each!(&mut changed, policy => set(policy, name, value))?;
        Ok(changed)
    }
}

impl Default for Policy {
    /// The seasonal forecast: what won on the traces of docs/scaling.md.
    fn default() -> Policy {
        Policy::Forecast(Forecast::default())
    }
}

impl FromStr for Policy {
    type Err = PolicyError;

    fn from_str(text: &str) -> Result<Policy, PolicyError> {
        let (name, settings) = text.split_once(':').unwrap_or((text, ""));
        let mut policy = Policy::named(name.trim()).ok_or_else(|| PolicyError::Unknown(name.trim().to_owned()))?;
        for setting in settings.split(',').map(str::trim).filter(|setting| !setting.is_empty()) {
            let wrong = |expected: &str| PolicyError::Value {
                policy: policy.name(),
                name: setting.into(),
                value: "nothing".into(),
                expected: expected.into(),
            };
            let (key, value) = setting.split_once('=').ok_or_else(|| wrong("written NAME=NUMBER"))?;
            if let Policy::Schedule(schedule) = &mut policy
                && key != "else"
            {
                schedule.add(key, value)?;
                continue;
            }
            let number = value.trim().parse().map_err(|_| PolicyError::Value {
                policy: policy.name(),
                name: key.into(),
                value: value.into(),
                expected: "a number".into(),
            })?;
            policy = policy.with(key.trim(), number)?;
        }
        Ok(policy)
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let published = Policy::named(self.name()).expect("every policy is found under its own name");
        let mut parts: Vec<String> = Vec::new();
        for ((name, value, ..), (_, usual, ..)) in self.parameters().into_iter().zip(published.parameters()) {
            if f.alternate() || value != usual {
                parts.push(format!("{name}={value}"));
            }
        }
        if let Policy::Schedule(schedule) = self {
            parts.extend(schedule.spans().iter().map(ToString::to_string));
        }
        f.write_str(self.name())?;
        if parts.is_empty() { Ok(()) } else { write!(f, ":{}", parts.join(",")) }
    }
}

impl Serialize for Policy {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Policy {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Policy, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The samples of the last `seconds`, the newest one in any case.
fn recent<'a>(observation: &Observation<'a>, now: Timestamp, seconds: f64) -> &'a [Sample] {
    let since = super::earlier(now, seconds);
    let from = observation.samples.partition_point(|sample| sample.at <= since);
    &observation.samples[from.min(observation.samples.len().saturating_sub(1))..]
}

/// The mean of what is known; `None` when nothing is.
fn mean(values: impl Iterator<Item = Option<f64>>) -> Option<f64> {
    let (sum, count) = values.flatten().fold((0.0, 0_u32), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / f64::from(count))
}

/// What there is stays, because nothing is known.
fn unknown(observation: &Observation, what: &str) -> Decision {
    let replicas = observation.provisioned();
    Decision {
        replicas,
        reasons: vec![format!("{what} is unknown, so the {replicas} replicas stay")],
        ..Decision::default()
    }
}

#[cfg(test)]
mod tests;
