//! The books balance: for every origin the postings add up to it, to the picodollar.

use std::collections::BTreeMap;

use crate::money::Money;
use crate::posting::{Origin, Posting};

/// An origin whose postings do not add up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imbalance {
    /// The origin.
    pub origin: Origin,
    /// What had to be allocated.
    pub expected: Money,
    /// What was.
    pub posted: Money,
}

/// Compares origins with the effective cost of their postings and returns every origin that does not close,
/// including postings whose origin does not exist (their expected amount is zero).
#[must_use]
pub fn imbalances<'a>(
    origins: impl IntoIterator<Item = (Origin, Money)>,
    postings: impl IntoIterator<Item = &'a Posting>,
) -> Vec<Imbalance> {
    let mut books: BTreeMap<Origin, (Money, Money)> = BTreeMap::new();
    for (origin, amount) in origins {
        books.entry(origin).or_default().0 += amount;
    }
    for posting in postings {
        books.entry(posting.origin.clone()).or_default().1 += posting.costs.effective_cost;
    }
    books
        .into_iter()
        .filter(|(_, (expected, posted))| expected != posted)
        .map(|(origin, (expected, posted))| Imbalance { origin, expected, posted })
        .collect()
}
