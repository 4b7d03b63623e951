//! What the demo's scaler did: its decisions, what its clients saw of it, and what was given back against the static plan.

use std::fmt::Write;

use ledger::{Money, ScalingDecision, ScalingMode, Timestamp};
use serde_json::{Value, json};
use store::Session;

use super::elastic::MODEL;
use super::traffic::{Seen, SeenEnd};
use crate::render::{self, Align, Table};
use crate::scaling::{self, GivenBackRow};

/// Changes that are shown.
const CHANGES_MAX: usize = 15;

/// What scaling came to.
#[derive(Debug, Clone, Default)]
pub struct Scaled {
    decisions: Vec<ScalingDecision>,
    given_back: Vec<GivenBackRow>,
    calls: usize,
    failed: usize,
}

impl Scaled {
    /// Reads the ledger and what the clients saw.
    ///
    /// # Errors
    /// When the ledger cannot be read.
    pub async fn of(session: &Session, seen: &Seen) -> anyhow::Result<Scaled> {
        let mut decisions = Vec::new();
        for batch in session.sql("SELECT * FROM decisions ORDER BY decided_at").await? {
            decisions.extend(store::decisions_of(&batch)?);
        }
        let calls = || seen.calls.iter().filter(|call| call.model == MODEL);
        let failed = |end: SeenEnd| matches!(end, SeenEnd::Refused(_) | SeenEnd::Broken);
        Ok(Scaled {
            decisions,
            given_back: scaling::given_back(session, ledger::Period::ALL).await?,
            calls: calls().count(),
            failed: calls().filter(|call| failed(call.end)).count(),
        })
    }

    /// Whether no request failed, every decision says why, and the static plan is what ran and what was given back.
    #[must_use]
    pub fn is_good(&self) -> bool {
        let closes = |row: &GivenBackRow| row.static_cost == row.actual_cost + row.given_back;
        self.failed == 0
            && self.calls > 0
            && !self.decisions.is_empty()
            && self.decisions.iter().all(|decision| !decision.reasons.is_empty())
            && self.given_back.iter().all(closes)
    }

    fn sum(&self, of: fn(&GivenBackRow) -> Money) -> Money {
        self.given_back.iter().map(of).sum()
    }

    fn peak(&self) -> u32 {
        self.decisions.iter().map(|decision| decision.ready).max().unwrap_or(0)
    }

    /// The result as JSON.
    #[must_use]
    pub fn document(&self) -> Value {
        json!({
            "deployment": MODEL,
            "decisions": self.decisions.len(),
            "told": self.decisions.iter().filter(|decision| decision.told.is_some()).count(),
            "ready_max": self.peak(),
            "desired_max": self.decisions.iter().map(|decision| decision.desired).max(),
            "desired_last": self.decisions.last().map(|decision| decision.desired),
            "calls": self.calls,
            "failed": self.failed,
            "static_usd": self.sum(|row| row.static_cost),
            "actual_usd": self.sum(|row| row.actual_cost),
            "given_back_usd": self.sum(|row| row.given_back),
            "acting": self.decisions.iter().all(|decision| decision.mode == ScalingMode::Act),
            "given_back": self.given_back,
            "changes": changes(&self.decisions).map(|decision| json!({
                "at": decision.at, "ready": decision.ready, "pending": decision.pending, "desired": decision.desired,
                "load_milli": decision.inputs.load_milli, "reasons": decision.reasons, "guards": decision.guards,
            })).collect::<Vec<_>>(),
        })
    }

    /// The result for people.
    #[must_use]
    pub fn text(&self) -> String {
        let Some(first) = self.decisions.first() else { return String::new() };
        let mut table = Table::new([
            ("second", Align::Right),
            ("load", Align::Right),
            ("ready", Align::Right),
            ("on the way", Align::Right),
            ("desired", Align::Right),
            ("why", Align::Left),
        ]);
        for decision in changes(&self.decisions).take(CHANGES_MAX) {
            table.row([
                seconds(first.at, decision.at),
                decision
                    .inputs
                    .load_milli
                    .map_or("unknown".to_owned(), |load| ledger::decimal::format_scaled(i128::from(load) / 10, 2, 2)),
                decision.ready.to_string(),
                decision.pending.to_string(),
                decision.desired.to_string(),
                decision.reasons.first().cloned().unwrap_or_default(),
            ]);
        }
        let mut text = format!("\nscaling of {MODEL}: what the scaler decided, where it changed its mind\n{table}");
        let _ = writeln!(
            text,
            "{} decisions; {} requests for {MODEL}, {} failed",
            self.decisions.len(),
            render::count(u64::try_from(self.calls).unwrap_or(u64::MAX)),
            self.failed
        );
        text + &scaling::text(&self.given_back)
    }
}

/// The first decision, and each that differs from the one before.
fn changes(decisions: &[ScalingDecision]) -> impl Iterator<Item = &ScalingDecision> {
    let differs = |index: &usize| *index == 0 || decisions[*index].desired != decisions[*index - 1].desired;
    (0..decisions.len()).filter(differs).map(|index| &decisions[index])
}

fn seconds(start: Timestamp, at: Timestamp) -> String {
    ledger::decimal::format_scaled(i128::from(at.micros_since(start)) / 100_000, 1, 1)
}
