//! What can be appended to the ledger. Facts arrive in any order and may arrive twice; neither changes the books.

use serde::{Deserialize, Serialize};

use crate::attempt::{Attempt, Route};
use crate::capacity::CapacityFact;
use crate::context::Context;
use crate::id::AttemptId;
use crate::posting::Posting;
use crate::scaling::ScalingDecision;
use crate::telemetry::{CallSpan, EngineFact, EngineReading, EngineStep, GpuReading, JobFact};
use crate::time::{Period, Timestamp};
use crate::usage::TokenUsage;

/// An attempt that is about to be sent. If no finish follows, it is booked from this as an estimate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opened {
    /// The attempt.
    pub id: AttemptId,
    /// When the request was received.
    pub received_at: Timestamp,
    /// Who caused it.
    pub context: Context,
    /// Where it goes.
    pub route: Route,
    /// What it will use at least: the input, counted.
    pub estimate: TokenUsage,
}

/// A time in which the log could not be written and requests were served all the same.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// From the first lost record to the first one that could be written again.
    pub period: Period,
    /// Records that were lost.
    pub records_lost: u64,
    /// What the operating system said.
    pub cause: String,
}

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Fact {
    /// An attempt is about to be sent.
    Opened(Box<Opened>),
    /// An attempt ended.
    Attempt(Box<Attempt>),
    /// GPUs were there.
    Capacity(Box<CapacityFact>),
    /// An amount was allocated. Postings of provider charges are derived and never appended.
    Posting(Box<Posting>),
    /// Metering was blind for a while.
    Gap(Gap),
    /// An engine ran.
    Engine(Box<EngineFact>),
    /// An engine was read.
    Reading(Box<EngineReading>),
    /// An engine ran a step.
    Step(Box<EngineStep>),
    /// Somebody told of a call.
    Span(Box<CallSpan>),
    /// A job used GPUs.
    Job(Box<JobFact>),
    /// A GPU was read.
    Gpu(Box<GpuReading>),
    /// A scaler decided.
    Decision(Box<ScalingDecision>),
}
