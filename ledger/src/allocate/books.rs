//! The rows that an allocation makes: one for each line, request and consumer of an origin.

use std::collections::BTreeMap;

use super::policy::{HeadroomRule, Method, Policy};
use super::pool::{Demand, Served};
use super::share::Share;
use crate::charge::Costs;
use crate::context::{Context, Label};
use crate::id::{AttemptId, PostingId};
use crate::money::{Money, MoneyError};
use crate::posting::{Basis, Line, Origin, Posting, Terms, Tier};
use crate::time::{Period, Timestamp};

/// Money and the GPU time that it pays; both are divided by the same weights, each exactly.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Amount {
    pub(super) money: Money,
    pub(super) gpu_us: i64,
}

impl Amount {
    /// Parts in proportion to `weights` that add up to the whole. Over no weights at all everything goes to the last part:
    /// time that nobody is known to have used is idle.
    pub(super) fn split_or_last(self, weights: &[u64]) -> Result<Vec<Amount>, MoneyError> {
        let money = split_or_last(self.money, weights)?;
        let time = split_or_last(Money::from_pico(i128::from(self.gpu_us)), weights)?;
        Ok(money.into_iter().zip(time).map(|(money, time)| Amount { money, gpu_us: micros(time) }).collect())
    }
}

impl std::ops::AddAssign for Amount {
    fn add_assign(&mut self, other: Amount) {
        self.money += other.money;
        self.gpu_us += other.gpu_us;
    }
}

/// A part of a number of microseconds, which was one before it was divided.
fn micros(part: Money) -> i64 {
    i64::try_from(part.pico()).expect("a part is no larger than the whole")
}

/// Seconds as whole picoseconds, so that a split by them is exact to far below the picodollar.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to a range that fits")]
pub(super) fn weight(seconds: f64) -> u64 {
    (seconds * 1e12).clamp(0.0, 1e18).round() as u64
}

/// [`Money::split`], except that an amount over no weights at all goes to the last part.
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

/// An amount by the terms of the step-time model, which add up to it. What rounding leaves stands under compute.
fn terms(amount: Money, share: &Share) -> Result<Terms, MoneyError> {
    let parts = [share.overhead_s, share.weights_s, share.memory_s, share.compute_s];
    let largest = parts.iter().copied().fold(0.0, f64::max);
    let scaled = parts.map(|part| if largest > 0.0 { weight(part / largest) } else { 0 });
    let split = split_or_last(amount, &scaled)?;
    Ok(Terms { overhead: split[0], weights: split[1], kv: split[2], compute: split[3] })
}

/// How an amount was found: what a posting says beside it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Found {
    pub(super) estimated: bool,
    pub(super) tier: Option<Tier>,
    pub(super) quality: Option<u32>,
    /// The method in force where it is another than the policy's.
    pub(super) instead: Option<Method>,
}

impl Found {
    /// What is said of two amounts together: the worse of each.
    fn and(self, other: Found) -> Found {
        Found {
            estimated: self.estimated || other.estimated,
            tier: self.tier.max(other.tier),
            quality: match (self.quality, other.quality) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            },
            instead: self.instead.or(other.instead),
        }
    }
}

#[derive(Debug, Clone, Default)]
struct Row {
    amount: Amount,
    /// `None` as soon as one part of the amount has no terms.
    terms: Option<Terms>,
    found: Found,
    model: Option<Label>,
}

impl Row {
    fn add(&mut self, amount: Amount, terms: Option<Terms>, found: Found) {
        self.amount += amount;
        self.terms = self.terms.zip(terms).map(|(a, b)| Terms {
            overhead: a.overhead + b.overhead,
            weights: a.weights + b.weights,
            kv: a.kv + b.kv,
            compute: a.compute + b.compute,
        });
        self.found = self.found.and(found);
    }

    /// A row of no amount yet, to which terms can be added.
    fn open() -> Row {
        Row { terms: Some(Terms::default()), ..Row::default() }
    }
}

/// What makes two amounts of one origin, for no request, the same row.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) line: Line,
    pub(super) model: Option<Label>,
    who: [Option<Label>; 6],
}

impl Key {
    pub(super) fn line(line: Line, context: &Context) -> Key {
        Key { line, model: None, who: dimensions(context).map(Option::<&Label>::cloned) }
    }

    pub(super) fn of_model(self, model: Option<Label>) -> Key {
        Key { model, ..self }
    }

    fn context(self) -> Context {
        let [consumer, application, team, cost_centre, customer, feature] = self.who;
        Context { consumer, application, team, cost_centre, customer, feature, ..Context::default() }
    }
}

/// The dimensions that rows are kept apart by.
pub(super) fn dimensions(context: &Context) -> [Option<&Label>; 6] {
    [
        context.consumer.as_ref(),
        context.application.as_ref(),
        context.team.as_ref(),
        context.cost_centre.as_ref(),
        context.customer.as_ref(),
        context.feature.as_ref(),
    ]
}

/// The open books of one interval. Requests are rows by their place in `served`, which is cheap where there are many.
pub(super) struct Books<'a> {
    served: &'a [&'a Served],
    requests: Vec<Option<Row>>,
    /// What requests pay for headroom beside their own.
    kept_free: BTreeMap<usize, Row>,
    lines: BTreeMap<Key, Row>,
}

impl<'a> Books<'a> {
    pub(super) fn of(served: &'a [&'a Served]) -> Books<'a> {
        let requests = vec![None; served.len()];
        Books { served, requests, kept_free: BTreeMap::new(), lines: BTreeMap::new() }
    }

    /// What the request at `at` pays, by the seconds of each term where the method has terms.
    pub(super) fn request(
        &mut self,
        at: usize,
        amount: Amount,
        share: Option<&Share>,
        found: Found,
        model: Option<&Label>,
    ) -> Result<(), MoneyError> {
        let terms = share.map(|share| terms(amount.money, share)).transpose()?;
        let row = self.requests[at].get_or_insert_with(Row::open);
        row.add(amount, terms, found);
        row.model = model.cloned();
        Ok(())
    }

    /// What is no request's. Nothing of nothing is no row.
    pub(super) fn line(&mut self, key: Key, amount: Amount, found: Found) {
        if amount != Amount::default() {
            self.lines.entry(key).or_default().add(amount, None, found);
        }
    }

    pub(super) fn headroom(
        &mut self,
        amount: Amount,
        demand: &Demand,
        rule: HeadroomRule,
        owner: &Context,
        found: Found,
    ) -> Result<(), MoneyError> {
        match rule {
            HeadroomRule::Line => {}
            HeadroomRule::Airport => {
                let largest = demand.headroom.iter().map(|(_, owed)| *owed).fold(0.0, f64::max);
                let scaled = |owed: f64| if largest > 0.0 { weight(owed / largest * 1e3) } else { 0 };
                let weights: Vec<u64> = demand.headroom.iter().map(|(_, owed)| scaled(*owed)).collect();
                if weights.iter().any(|weight| *weight > 0) {
                    for ((context, _), part) in demand.headroom.iter().zip(amount.split_or_last(&weights)?) {
                        self.line(Key::line(Line::Headroom, context), part, found);
                    }
                    return Ok(());
                }
            }
            HeadroomRule::Proportional => {
                let paid = |row: &Option<Row>| row.as_ref().map_or(0, |row| row.amount.money.pico());
                let weights: Vec<u64> = self.requests.iter().map(|row| u64::try_from(paid(row)).unwrap_or(0)).collect();
                if weights.iter().any(|weight| *weight > 0) {
                    for (at, part) in amount.split_or_last(&weights)?.into_iter().enumerate() {
                        if part != Amount::default() {
                            let model = self.requests[at].as_ref().and_then(|row| row.model.clone());
                            let row = self.kept_free.entry(at).or_default();
                            row.add(part, None, found);
                            row.model = model;
                        }
                    }
                    return Ok(());
                }
            }
        }
        self.line(Key::line(Line::Headroom, owner), amount, found);
        Ok(())
    }

    /// Closes the books: requests in the order of their attempts, then the lines.
    pub(super) fn postings(self, pool: &Label, period: Period, policy: &Policy, booked_at: Timestamp) -> Vec<Posting> {
        let Books { served, requests, kept_free, lines } = self;
        let seed = Hash::default().text(pool);
        let provider: Label = "self_hosted".into();
        let labels = Method::ALL.map(|method| Policy { method, ..*policy }.label());
        let label = |found: &Found| {
            let method = found.instead.unwrap_or(policy.method);
            Method::ALL
                .iter()
                .position(|other| *other == method)
                .map_or_else(|| policy.label(), |at| labels[at].clone())
        };
        let post = |line: Line, attempt: Option<AttemptId>, context: Context, row: Row| Posting {
            id: seed.row(line, attempt, row.model.as_ref(), &context).id(period.start),
            origin: Origin::Pool { pool: pool.clone(), start: period.start },
            line,
            period,
            attempt,
            context,
            provider: provider.clone(),
            pool: Some(pool.clone()),
            costs: Costs::flat(row.amount.money),
            estimated: row.found.estimated,
            tier: row.found.tier,
            basis: Some(Basis { gpu_us: row.amount.gpu_us, terms: row.terms, quality: row.found.quality }),
            policy: label(&row.found),
            model: row.model,
            booked_at,
        };
        let of =
            |at: usize, line: Line, row: Row| post(line, Some(served[at].attempt), served[at].context.clone(), row);
        let mut postings = Vec::with_capacity(served.len() + kept_free.len() + lines.len());
        let rows = requests.into_iter().enumerate();
        postings.extend(rows.filter_map(|(at, row)| row.map(|row| of(at, Line::Request, row))));
        postings.extend(kept_free.into_iter().map(|(at, row)| of(at, Line::Headroom, row)));
        postings.extend(lines.into_iter().map(|(key, row)| {
            let row = Row { model: key.model.clone(), ..row };
            post(key.line, None, key.context(), row)
        }));
        postings
    }
}

/// A running hash of what a posting is for: the same facts give the same ids. Words of eight bytes, each multiplied into
/// all 128 bits; nothing here has to withstand anybody who wants two rows to collide.
#[derive(Debug, Clone, Copy)]
pub(super) struct Hash(u128);

impl Default for Hash {
    fn default() -> Hash {
        Hash(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }
}

impl Hash {
    pub(super) fn word(self, word: u64) -> Hash {
        // An odd multiplier with bits everywhere; the upper half is folded back so that it reaches the lower one too.
        let mixed = (self.0 ^ u128::from(word)).wrapping_mul(0xda94_2042_e4dd_58b5_9e37_79b9_7f4a_7c15);
        Hash(mixed ^ (mixed >> 64))
    }

    pub(super) fn wide(self, words: u128) -> Hash {
        let [high, low] = [words >> 64, words & u128::from(u64::MAX)];
        self.word(u64::try_from(high).unwrap_or(0)).word(u64::try_from(low).unwrap_or(0))
    }

    /// A text with its length, so that two texts in a row are told apart from one.
    pub(super) fn text(self, text: &str) -> Hash {
        let hash = self.word(text.len() as u64);
        text.as_bytes().chunks(8).fold(hash, |hash, chunk| {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            hash.word(u64::from_le_bytes(word))
        })
    }

    fn label(self, label: Option<&Label>) -> Hash {
        label.map_or_else(|| self.word(u64::MAX), |label| self.text(label))
    }

    fn row(self, line: Line, attempt: Option<AttemptId>, model: Option<&Label>, context: &Context) -> Hash {
        let hash = attempt.map_or_else(
            || self.word(0),
            |attempt| self.word(1 + u64::from(attempt.number)).wide(attempt.request.uuid().as_u128()),
        );
        dimensions(context).into_iter().fold(hash.text(line.name()).label(model), Hash::label)
    }

    /// A UUIDv7 at `at` that follows from everything hashed so far.
    pub(super) fn id(self, at: Timestamp) -> PostingId {
        let mut random = [0; 10];
        random.copy_from_slice(&self.word(0).0.to_be_bytes()[..10]);
        PostingId::new(at, random)
    }
}
