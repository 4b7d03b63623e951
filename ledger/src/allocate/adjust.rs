//! What changes booked amounts: postings on top of postings, never other ones in their place.
//!
//! [`corrections`] make what was booked into what later facts say; [`true_up`] makes what was booked at a rate into what
//! was billed. With `kappa = billed / booked`, a posting of `x` gets one of `(kappa - 1) x` beside it, and all of them
//! together are `billed - booked` to the picodollar.

use std::collections::BTreeMap;

use super::books::{Hash, dimensions};
use crate::charge::Costs;
use crate::context::Label;
use crate::id::AttemptId;
use crate::money::{Money, MoneyError};
use crate::posting::{Basis, Line, Origin, Posting, Terms};
use crate::time::{Period, Timestamp};

/// What has to be booked so that `before` becomes `after`: a posting for each difference, of the same origin, with the
/// difference of its GPU time and of its terms. Adds up to the difference of both sums, which is zero when the origin's
/// cost did not change.
#[must_use]
pub fn corrections(before: &[Posting], after: &[Posting]) -> Vec<Posting> {
    let mut net: BTreeMap<Key<'_>, (Booked, Booked, &Posting)> = BTreeMap::new();
    for posting in before {
        net.entry(Key::of(posting)).or_insert((Booked::NOTHING, Booked::NOTHING, posting)).0.add(posting);
    }
    for posting in after {
        let entry = net.entry(Key::of(posting)).or_insert((Booked::NOTHING, Booked::NOTHING, posting));
        entry.1.add(posting);
        entry.2 = posting;
    }
    let latest = after.iter().map(|posting| posting.booked_at).max();
    net.into_values()
        .filter(|(was, is, _)| was.differs(is))
        .map(|(was, is, posting)| {
            // The id follows from what it corrects, so that correcting twice from the same books books once.
            let revision = Hash::default().wide(posting.id.uuid().as_u128());
            let revision = [was, is].iter().fold(revision, |hash, one| {
                hash.wide(one.money.pico().cast_unsigned()).word(one.gpu_us.cast_unsigned())
            });
            let quality = posting.basis.and_then(|basis| basis.quality);
            Posting {
                id: revision.id(posting.period.start),
                costs: Costs::flat(is.money - was.money),
                basis: Some(Basis { gpu_us: is.gpu_us - was.gpu_us, terms: is.terms_beyond(&was), quality }),
                booked_at: latest.unwrap_or(posting.booked_at),
                ..posting.clone()
            }
        })
        .collect()
}

/// Spreads what was `billed` for `postings` beyond what they add up to over them, in proportion to their amounts (to their
/// GPU time where they were booked at no rate): one [`Line::TrueUp`] posting for each request and line of an interval, of
/// the origin `invoice`. With them the effective and the billed cost add up to `billed` exactly; list and contracted cost
/// stay what they were.
///
/// True-ups among `postings` count as booked already, so that a second invoice books the difference and the same one
/// nothing.
///
/// # Errors
/// [`MoneyError::NoWeights`] when there is something to spread and nothing to spread it over.
pub fn true_up(
    postings: &[Posting],
    billed: Money,
    invoice: &Label,
    booked_at: Timestamp,
) -> Result<Vec<Posting>, MoneyError> {
    let booked: Money = postings.iter().map(|posting| posting.costs.effective_cost).sum();
    let open = billed - booked;
    if open == Money::ZERO {
        return Ok(Vec::new());
    }
    let mut rows: BTreeMap<(Timestamp, Timestamp, Key<'_>), (Booked, &Posting)> = BTreeMap::new();
    for posting in postings.iter().filter(|posting| posting.line != Line::TrueUp) {
        let Period { start, end } = posting.period;
        rows.entry((start, end, Key::of(posting))).or_insert((Booked::NOTHING, posting)).0.add(posting);
    }
    // Picodollars of a month fit 64 bits up to 18 million dollars for one row; above, the proportion alone matters.
    let largest = rows.values().map(|(row, _)| row.money.pico()).max().unwrap_or(0);
    let shift = (128 - largest.max(1).leading_zeros()).saturating_sub(60);
    let mut weights: Vec<u64> =
        rows.values().map(|(row, _)| u64::try_from(row.money.pico().max(0) >> shift).unwrap_or(0)).collect();
    if weights.iter().all(|weight| *weight == 0) {
        weights = rows.values().map(|(row, _)| u64::try_from(row.gpu_us).unwrap_or(0)).collect();
    }
    let parts = open.split(&weights)?;
    let origin = Origin::InvoiceLine(invoice.clone());
    let seed = Hash::default().text(invoice).wide(booked.pico().cast_unsigned()).wide(billed.pico().cast_unsigned());
    Ok(rows
        .into_values()
        .zip(parts)
        .filter(|(_, part)| *part != Money::ZERO)
        .map(|((_, posting), part)| Posting {
            id: seed.wide(posting.id.uuid().as_u128()).id(posting.period.start),
            origin: origin.clone(),
            line: Line::TrueUp,
            costs: Costs { effective_cost: part, billed_cost: part, ..Costs::default() },
            basis: None,
            policy: "true-up/1".into(),
            booked_at,
            ..posting.clone()
        })
        .collect())
}

/// What makes two postings of one origin the same row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key<'a> {
    line: Line,
    attempt: Option<AttemptId>,
    pool: Option<&'a Label>,
    model: Option<&'a Label>,
    who: [Option<&'a Label>; 6],
}

impl<'a> Key<'a> {
    fn of(posting: &'a Posting) -> Key<'a> {
        let Posting { line, attempt, pool, model, context, .. } = posting;
        Key { line: *line, attempt: *attempt, pool: pool.as_ref(), model: model.as_ref(), who: dimensions(context) }
    }
}

/// What one row comes to over all its postings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Booked {
    money: Money,
    gpu_us: i64,
    /// `None` when a posting has none.
    terms: Option<Terms>,
}

impl Booked {
    const NOTHING: Booked = Booked {
        money: Money::ZERO,
        gpu_us: 0,
        terms: Some(Terms { overhead: Money::ZERO, weights: Money::ZERO, kv: Money::ZERO, compute: Money::ZERO }),
    };

    fn add(&mut self, posting: &Posting) {
        let basis = posting.basis.unwrap_or_default();
        self.money += posting.costs.effective_cost;
        self.gpu_us += basis.gpu_us;
        self.terms = self.terms.zip(basis.terms).map(|(a, b)| combined(a, b, |a, b| a + b));
    }

    fn differs(&self, other: &Booked) -> bool {
        let terms = self.terms.zip(other.terms).is_some_and(|(a, b)| a != b);
        self.money != other.money || self.gpu_us != other.gpu_us || terms
    }

    /// The difference of the terms, where both have them.
    fn terms_beyond(&self, before: &Booked) -> Option<Terms> {
        self.terms.zip(before.terms).map(|(is, was)| combined(is, was, |is, was| is - was))
    }
}

fn combined(a: Terms, b: Terms, of: impl Fn(Money, Money) -> Money) -> Terms {
    Terms {
        overhead: of(a.overhead, b.overhead),
        weights: of(a.weights, b.weights),
        kv: of(a.kv, b.kv),
        compute: of(a.compute, b.compute),
    }
}

#[cfg(test)]
#[path = "adjust_tests.rs"]
mod tests;
