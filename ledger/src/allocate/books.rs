//! The rows that an allocation makes: one for each line, request and consumer of an origin, and what corrects them later.

use std::collections::BTreeMap;

use super::policy::{HeadroomRule, Policy};
use super::pool::Demand;
use crate::charge::Costs;
use crate::context::{Context, Label};
use crate::id::{AttemptId, PostingId};
use crate::money::{Money, MoneyError};
use crate::posting::{Line, Origin, Posting, Tier};
use crate::time::{Period, Timestamp};

/// What has to be booked so that `before` becomes `after`: a posting for each difference, of the same origin. Adds up to
/// the difference of both sums, which is zero when the origin's cost did not change.
#[must_use]
pub fn corrections(before: &[Posting], after: &[Posting]) -> Vec<Posting> {
    let mut net: BTreeMap<Key, (Money, Money, Option<&Posting>)> = BTreeMap::new();
    for posting in before {
        let entry = net.entry(Key::of(posting)).or_insert((Money::ZERO, Money::ZERO, Some(posting)));
        entry.0 += posting.costs.effective_cost;
    }
    for posting in after {
        let entry = net.entry(Key::of(posting)).or_insert((Money::ZERO, Money::ZERO, Some(posting)));
        entry.1 += posting.costs.effective_cost;
        entry.2 = Some(posting);
    }
    let booked_at = after.iter().map(|posting| posting.booked_at).max();
    net.into_iter()
        .filter(|(_, (was, is, _))| was != is)
        .filter_map(|(_, (was, is, posting))| {
            let posting = posting?;
            // The id follows from what it corrects, so that correcting twice from the same books books once.
            let revision = format!("{} {} {}", posting.id, was.pico(), is.pico());
            let id = posting_id(posting.period.start, &revision);
            let booked_at = booked_at.unwrap_or(posting.booked_at);
            Some(Posting { id, costs: Costs::flat(is - was), booked_at, ..posting.clone() })
        })
        .collect()
}

/// Seconds as whole picoseconds, so that a split by them is exact to far below the picodollar.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to a range that fits")]
pub(super) fn weight(seconds: f64) -> u64 {
    (seconds * 1e12).clamp(0.0, 1e18).round() as u64
}

/// [`Money::split`], except that an amount over no weights at all goes to the last part: time that nobody is known to have
/// used is idle.
pub(super) fn split_or_last(amount: Money, weights: &[u64]) -> Result<Vec<Money>, MoneyError> {
    match amount.split(weights) {
        Err(MoneyError::NoWeights) => {
            let mut parts = vec![Money::ZERO; weights.len()];
            if let Some(last) = parts.last_mut() {
                *last = amount;
            }
            Ok(parts)
        }
        split => split,
    }
}

/// What makes two amounts of one origin the same row.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) line: Line,
    pub(super) attempt: Option<AttemptId>,
    pub(super) model: Option<Label>,
    who: [Option<Label>; 6],
}

impl Key {
    fn who(context: &Context) -> [Option<Label>; 6] {
        [
            context.consumer.clone(),
            context.application.clone(),
            context.team.clone(),
            context.cost_centre.clone(),
            context.customer.clone(),
            context.feature.clone(),
        ]
    }

    pub(super) fn line(line: Line, context: Context) -> Key {
        Key { line, attempt: None, model: None, who: Key::who(&context) }
    }

    pub(super) fn of_model(self, model: Option<Label>) -> Key {
        Key { model, ..self }
    }

    pub(super) fn request(attempt: AttemptId, context: &Context, model: Option<Label>) -> Key {
        Key { line: Line::Request, attempt: Some(attempt), model, who: Key::who(context) }
    }

    fn of(posting: &Posting) -> Key {
        let Posting { line, attempt, model, context, .. } = posting;
        Key { line: *line, attempt: *attempt, model: model.clone(), who: Key::who(context) }
    }

    fn context(&self) -> Context {
        let [consumer, application, team, cost_centre, customer, feature] = self.who.clone();
        Context { consumer, application, team, cost_centre, customer, feature, ..Context::default() }
    }
}

#[derive(Default)]
pub(super) struct Books {
    rows: BTreeMap<Key, (Money, bool)>,
    pub(super) contexts: BTreeMap<AttemptId, Context>,
}

impl Books {
    pub(super) fn add(&mut self, key: Key, amount: Money, estimated: bool) {
        if amount == Money::ZERO && key.line != Line::Request {
            return;
        }
        let row = self.rows.entry(key).or_default();
        row.0 += amount;
        row.1 |= estimated;
    }

    pub(super) fn headroom(
        &mut self,
        amount: Money,
        demand: &Demand,
        rule: HeadroomRule,
        owner: &Context,
    ) -> Result<(), MoneyError> {
        let weights: Vec<(Key, u64)> = match rule {
            HeadroomRule::Line => Vec::new(),
            HeadroomRule::Airport => {
                let largest = demand.headroom.iter().map(|(_, owed)| *owed).fold(0.0, f64::max);
                let scaled = |owed: f64| if largest > 0.0 { weight(owed / largest * 1e3) } else { 0 };
                demand
                    .headroom
                    .iter()
                    .map(|(context, owed)| (Key::line(Line::Headroom, context.clone()), scaled(*owed)))
                    .collect()
            }
            HeadroomRule::Proportional => {
                let paid = |money: &Money| u64::try_from(money.pico()).unwrap_or(0);
                let requests = self.rows.iter().filter(|(key, _)| key.line == Line::Request);
                requests.map(|(key, (money, _))| (Key { line: Line::Headroom, ..key.clone() }, paid(money))).collect()
            }
        };
        if weights.iter().all(|(_, weight)| *weight == 0) {
            self.add(Key::line(Line::Headroom, owner.clone()), amount, false);
            return Ok(());
        }
        let parts = amount.split(&weights.iter().map(|(_, weight)| *weight).collect::<Vec<_>>())?;
        for ((key, _), part) in weights.into_iter().zip(parts) {
            self.add(key, part, false);
        }
        Ok(())
    }

    pub(super) fn postings(self, pool: &Label, period: Period, policy: &Policy, booked_at: Timestamp) -> Vec<Posting> {
        let label = policy.label();
        let Books { rows, contexts } = self;
        rows.into_iter()
            .map(|(key, (amount, estimated))| Posting {
                id: posting_id(period.start, &format!("{pool} {key:?}")),
                origin: Origin::Pool { pool: pool.clone(), start: period.start },
                line: key.line,
                period,
                attempt: key.attempt,
                context: key
                    .attempt
                    .and_then(|attempt| contexts.get(&attempt).cloned())
                    .unwrap_or_else(|| key.context()),
                provider: "self_hosted".into(),
                model: key.model.clone(),
                pool: Some(pool.clone()),
                costs: Costs::flat(amount),
                estimated,
                tier: Some(Tier::B),
                basis: None,
                policy: label.clone(),
                booked_at,
            })
            .collect()
    }
}

/// An id that follows from what the posting is for: FNV-1a over its key, at the interval's start.
fn posting_id(at: Timestamp, key: &str) -> PostingId {
    const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
    const START: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    let hash = key.bytes().fold(START, |hash, byte| (hash ^ u128::from(byte)).wrapping_mul(PRIME));
    let mut random = [0; 10];
    random.copy_from_slice(&hash.to_be_bytes()[..10]);
    PostingId::new(at, random)
}
