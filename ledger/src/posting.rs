//! Allocated amounts. Statements are sums of postings and of nothing else.

use serde::{Deserialize, Serialize};

use crate::attempt::Attempt;
use crate::charge::{Charge, Costs};
use crate::context::{Context, Label};
use crate::id::{AttemptId, PostingId};
use crate::money::Money;
use crate::time::{Period, Timestamp};

/// An amount to be allocated. The postings of one origin add up to it exactly.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// A provider's charge for one attempt.
    ProviderCharge(AttemptId),
    /// One pool's GPUs for one interval.
    Pool {
        /// The pool.
        pool: Label,
        /// Start of the interval; its length is the posting's period.
        start: Timestamp,
    },
    /// One line of an invoice.
    InvoiceLine(Label),
}

impl Origin {
    /// `provider_charge`, `pool` or `invoice_line`.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Origin::ProviderCharge(_) => "provider_charge",
            Origin::Pool { .. } => "pool",
            Origin::InvoiceLine(_) => "invoice_line",
        }
    }

    /// The origin's key within its kind, as the tables store it.
    #[must_use]
    pub fn key(&self) -> String {
        match self {
            Origin::ProviderCharge(attempt) => attempt.to_string(),
            Origin::Pool { pool, start } => format!("{pool}@{}", start.micros()),
            Origin::InvoiceLine(line) => line.to_string(),
        }
    }
}

/// What an amount is for. Idle is never merged into the price of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Line {
    /// A request's own share.
    Request,
    /// A pool's cost that nothing has allocated yet.
    Unallocated,
    /// Reserved and unused.
    IdleReserved,
    /// Kept free for the peak.
    Headroom,
    /// Kept running for an objective.
    Warm,
    /// Start-up and model load.
    ColdStart,
    /// Slices that cannot be used.
    Stranded,
    /// Work that reached nobody.
    Waste,
    /// Work that bypassed the gateway.
    Unobserved,
    /// The adjustment to the invoice.
    TrueUp,
    /// Work that is no request: training, batch, notebooks on the same GPUs.
    Job,
}

impl Line {
    /// Every line.
    pub const ALL: [Line; 11] = [
        Line::Request,
        Line::Job,
        Line::Unallocated,
        Line::IdleReserved,
        Line::Headroom,
        Line::Warm,
        Line::ColdStart,
        Line::Stranded,
        Line::Waste,
        Line::Unobserved,
        Line::TrueUp,
    ];

    /// The name used in tables and JSON.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Line::Request => "request",
            Line::Unallocated => "unallocated",
            Line::IdleReserved => "idle_reserved",
            Line::Headroom => "headroom",
            Line::Warm => "warm",
            Line::ColdStart => "cold_start",
            Line::Stranded => "stranded",
            Line::Waste => "waste",
            Line::Unobserved => "unobserved",
            Line::TrueUp => "true_up",
            Line::Job => "job",
        }
    }

    /// Whether GPUs stood still for it, for whatever reason.
    #[must_use]
    pub const fn is_idle(self) -> bool {
        matches!(self, Line::IdleReserved | Line::Headroom | Line::Warm | Line::ColdStart | Line::Stranded)
    }

    /// Whether somebody's own work was paid with it.
    #[must_use]
    pub const fn is_use(self) -> bool {
        matches!(self, Line::Request | Line::Job)
    }
}

/// How much was known when a pool's cost was allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Tier {
    /// Per step.
    A,
    /// Per-request timelines.
    B,
    /// Counters only.
    C,
}

/// An amount by the term of the step-time model that caused it. Adds up to the amount.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    /// Launching and scheduling steps.
    pub overhead: Money,
    /// Reading the weights.
    pub weights: Money,
    /// Reading the KV cache.
    pub kv: Money,
    /// Computing.
    pub compute: Money,
}

/// What stands behind an amount that a pool's allocation made. A correction carries the difference.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Basis {
    /// GPU-microseconds that the amount pays.
    pub gpu_us: i64,
    /// The amount by term, where the method has these terms.
    pub terms: Option<Terms>,
    /// How well the reconstruction follows the engine's own series, in millionths. `None` when it was never compared.
    pub quality: Option<u32>,
}

/// One allocated amount. Never changed: a correction is another posting.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Posting {
    /// Unique; derived from the origin for provider charges, so that booking twice books once.
    pub id: PostingId,
    /// What was allocated.
    pub origin: Origin,
    /// What this part of it is for.
    pub line: Line,
    /// When the cost arose.
    pub period: Period,
    /// The attempt that caused it, when one did.
    pub attempt: Option<AttemptId>,
    /// Who caused it.
    pub context: Context,
    /// The provider, `self_hosted` for pools.
    pub provider: Label,
    /// The model.
    pub model: Option<Label>,
    /// The pool.
    pub pool: Option<Label>,
    /// The amounts.
    pub costs: Costs,
    /// Whether any input was an estimate.
    pub estimated: bool,
    /// How much was known, for pools.
    pub tier: Option<Tier>,
    /// What stands behind it, for pools.
    pub basis: Option<Basis>,
    /// The price book or the allocation policy and its version.
    pub policy: Label,
    /// When this was booked.
    pub booked_at: Timestamp,
}

impl Posting {
    /// The posting of a provider's charge: all of it goes to whoever caused the attempt. `None` when it is unpriced.
    ///
    /// Deterministic: the same attempt always gives the same posting, id included.
    #[must_use]
    pub fn of_charge(attempt: &Attempt) -> Option<Posting> {
        let (costs, rates) = (attempt.charge.costs()?, attempt.charge.rates()?);
        let finished = attempt.timeline.finished_at();
        let guessed = matches!(attempt.charge, Charge::Estimated { .. });
        Some(Posting {
            id: charge_posting_id(attempt.id),
            origin: Origin::ProviderCharge(attempt.id),
            line: Line::Request,
            period: Period { start: attempt.timeline.received_at, end: finished.plus_micros(1) },
            attempt: Some(attempt.id),
            context: attempt.context.clone(),
            provider: attempt.route.provider.clone(),
            model: attempt.route.model().cloned(),
            pool: attempt.route.pool.clone(),
            costs,
            estimated: guessed,
            tier: None,
            basis: None,
            policy: rates.book().into(),
            booked_at: finished,
        })
    }
}

/// A UUIDv7 at the request's own time whose random bits carry the attempt's number, so that it is unique per attempt.
fn charge_posting_id(attempt: AttemptId) -> PostingId {
    let mut bytes = attempt.request.uuid().into_bytes();
    let [high, low] = attempt.number.to_be_bytes();
    bytes[14] ^= high;
    bytes[15] ^= low;
    PostingId::from_uuid(uuid::Uuid::from_bytes(bytes))
}
