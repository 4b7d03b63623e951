//! The words and the arithmetic of the cost ledger: facts in, postings out, by pure functions.
//!
//! This crate does no IO, reads no clock and knows no runtime. Everything that decides about money lives here.
//! Facts ([`Attempt`], [`CapacityFact`], …) are never changed; they become [`Posting`]s through prices
//! ([`price`]) or allocation, and the postings of an origin always add up to the origin ([`closure`]).

pub mod allocate;
pub mod attempt;
pub mod bill;
pub mod capacity;
pub mod charge;
pub mod closure;
pub mod commit;
pub mod context;
pub mod decimal;
pub mod fact;
pub mod gpu;
pub mod gpu_price;
pub mod id;
pub mod money;
pub mod posting;
pub mod price;
pub mod scaling;
pub mod settle;
pub mod step;
pub mod telemetry;
pub mod time;
pub mod usage;

pub use attempt::{Attempt, Operation, Outcome, Route, Running, ServiceClass, Source, Timeline, TokenGaps};
pub use capacity::{CapacityFact, PurchaseOption};
pub use charge::{Charge, Costs, EstimateReason, ResolvedRates, UnpricedReason};
pub use context::{Context, ContextField, Label};
pub use decimal::DecimalError;
pub use fact::{Fact, Gap, Opened};
pub use id::{AttemptId, KeyId, PostingId, RequestId};
pub use money::{GpuHourRate, Money, MoneyError, TokenPrice};
pub use posting::{Basis, Line, Origin, Posting, Terms, Tier};
pub use scaling::{ScalingDecision, ScalingInputs, ScalingMode};
pub use telemetry::{
    Adapter, CallSpan, EngineFact, EngineReading, EngineSetup, EngineStep, GpuReading, JobFact, JobSource,
};
pub use time::{Clock, Period, Timestamp};
pub use usage::{TokenKind, TokenUsage, UsageQuality};
