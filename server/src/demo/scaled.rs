//! What the demo's scaler did: its decisions, what its clients saw of it, and what was given back against the static plan.

use std::fmt::Write;

use ledger::{CapacityFact, Money, Period, ScalingDecision, ScalingMode, Timestamp, capacity};
use serde_json::{Value, json};
use store::Session;

use super::elastic::{MODEL, POOL};
use super::traffic::{Seen, SeenEnd};
use crate::render::{self, Align, Table};
use crate::scaling::{self, GivenBackRow};

/// Changes that are shown.
const CHANGES_MAX: usize = 15;
/// Sums in another order are rounded elsewhere: by half a picodollar for each fact, and the demo has few.
const ROUNDING_MAX: Money = Money::from_pico(1_000);

/// What scaling came to.
#[derive(Debug, Clone, Default)]
pub struct Scaled {
    decisions: Vec<ScalingDecision>,
    given_back: Vec<GivenBackRow>,
    recounted: Recounted,
    calls: usize,
    failed: usize,
}

/// What the decided time costs, counted again and another way than `given_back` does it: no sum of this is taken from that one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Recounted {
    /// All replicas of the static plan, all the time.
    planned: Money,
    /// Each replica that was there, as long as the ledger has it.
    ran: Money,
}

impl Recounted {
    /// From the first decision to the last look at the pool's GPUs, or as long after the last decision as it came after the one
    /// before it. Decisions of the demo follow each other without a gap, all of one plan.
    fn of(decisions: &[ScalingDecision], facts: &[CapacityFact]) -> Option<Recounted> {
        let [first, .., before, last] = decisions else { return None };
        let facts = capacity::latest(facts);
        let looked = facts.iter().map(|fact| fact.observed_at.max(fact.period.end)).max()?;
        let step = i64::try_from(last.at.micros_since(before.at)).ok()?;
        let covered = Period { start: first.at, end: last.at.plus_micros(step).min(looked) };
        let own = |fact: &&CapacityFact| &*fact.pool == POOL && fact.deployment.as_deref() == Some(MODEL);
        Some(Recounted {
            planned: first.rate.over(first.static_replicas.saturating_mul(first.gpus), covered.micros()),
            ran: facts.into_iter().filter(own).map(|fact| fact.cost_within(covered)).sum(),
        })
    }
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
        let mut facts = Vec::new();
        for batch in session.sql(&format!("SELECT * FROM capacity WHERE pool = '{POOL}'")).await? {
            facts.extend(store::capacity_of(&batch)?);
        }
        let calls = || seen.calls.iter().filter(|call| call.model == MODEL);
        let failed = |end: SeenEnd| matches!(end, SeenEnd::Refused(_) | SeenEnd::Broken);
        Ok(Scaled {
            recounted: Recounted::of(&decisions, &facts).unwrap_or_default(),
            decisions,
            given_back: scaling::given_back(session, Period::ALL).await?,
            calls: calls().count(),
            failed: calls().filter(|call| failed(call.end)).count(),
        })
    }

    /// Whether no request failed, every decision says why, something was given back, and what the static plan and the GPUs that
    /// ran cost is what it comes to when counted another way.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.failed == 0
            && self.calls > 0
            && !self.decisions.is_empty()
            && self.decisions.iter().all(|decision| !decision.reasons.is_empty())
            && self.is_given_back()
    }

    /// One deployment was scaled, so that all rows are its own; what it gave back is what the recount says, and more than nothing.
    fn is_given_back(&self) -> bool {
        let Recounted { planned, ran } = self.recounted;
        let near = |sum: Money, counted: Money| (sum - counted).pico().abs() <= ROUNDING_MAX.pico();
        self.given_back.iter().all(|row| row.pool == POOL && row.deployment == MODEL && !row.estimated)
            && ran > Money::ZERO
            && planned > ran
            && near(self.sum(|row| row.static_cost), planned)
            && near(self.sum(|row| row.actual_cost), ran)
            && near(self.sum(|row| row.given_back), planned - ran)
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
            "recounted": { "static_usd": self.recounted.planned, "actual_usd": self.recounted.ran },
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

#[cfg(test)]
mod tests {
    use ledger::PurchaseOption;

    use super::*;

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_micros(seconds * 1_000_000)
    }

    fn decision(second: i64) -> ScalingDecision {
        ScalingDecision {
            pool: POOL.into(),
            deployment: MODEL.into(),
            at: at(second),
            mode: ScalingMode::Act,
            static_replicas: 4,
            gpus: 1,
            rate: "3.60".parse().unwrap(),
            reasons: vec!["load".to_owned()],
            ..ScalingDecision::default()
        }
    }

    fn fact(replica: &str, start: i64, end: i64) -> CapacityFact {
        CapacityFact {
            pool: POOL.into(),
            replica: replica.into(),
            deployment: Some(MODEL.into()),
            owner: None,
            gpu: "L4".into(),
            gpus: 1,
            rate: "3.60".parse().unwrap(),
            purchase: PurchaseOption::OnDemand,
            period: Period { start: at(start), end: at(end) },
            observed_at: at(end),
        }
    }

    fn good() -> Scaled {
        let decisions: Vec<ScalingDecision> = (10..=19).map(decision).collect();
        let facts = [fact("elastic-0", 0, 30), fact("elastic-1", 12, 16)];
        let recounted = Recounted::of(&decisions, &facts).unwrap();
        let usd = |text: &str| text.parse::<Money>().unwrap();
        let row = GivenBackRow {
            pool: POOL.to_owned(),
            deployment: MODEL.to_owned(),
            mode: ScalingMode::Act,
            seconds: "10".to_owned(),
            static_cost: usd("0.04"),
            actual_cost: usd("0.014"),
            given_back: usd("0.026"),
            desired_cost: usd("0.014"),
            would_save: Money::ZERO,
            static_gpu_seconds: "40".to_owned(),
            actual_gpu_seconds: "14".to_owned(),
            freed_gpu_seconds: "0".to_owned(),
            estimated: false,
        };
        Scaled { decisions, given_back: vec![row], recounted, calls: 5, failed: 0 }
    }

    #[test]
    fn what_ran_is_counted_from_the_facts() {
        // A tenth of a cent is one GPU for a second: four for ten seconds, and one for ten and one for four.
        let expected = Recounted { planned: "0.04".parse().unwrap(), ran: "0.014".parse().unwrap() };
        assert_eq!(good().recounted, expected);
        assert!(good().is_good());
    }

    #[test]
    fn nothing_decided_nothing_given_back_a_failure_or_another_sum_is_not_good() {
        let wrong: [fn(&mut Scaled); 8] = [
            |scaled| scaled.decisions.clear(),
            |scaled| scaled.decisions[3].reasons.clear(),
            |scaled| scaled.given_back.clear(),
            |scaled| scaled.failed = 1,
            |scaled| scaled.calls = 0,
            |scaled| scaled.recounted = Recounted::default(),
            // Closed in itself, and not what ran.
            |scaled| {
                let row = &mut scaled.given_back[0];
                (row.actual_cost, row.given_back) = (row.given_back, row.actual_cost);
            },
            |scaled| {
                let all = scaled.recounted.planned;
                scaled.recounted.ran = all;
                (scaled.given_back[0].actual_cost, scaled.given_back[0].given_back) = (all, Money::ZERO);
            },
        ];
        for (number, spoil) in wrong.into_iter().enumerate() {
            let mut scaled = good();
            spoil(&mut scaled);
            assert!(!scaled.is_good(), "{number}");
        }
    }
}
