//! From a GPU pool's bill to single requests: who pays for which part of a step, a second, an interval.
//!
//! [`share`] divides one step. By what is known, [`steps`] (tier A), [`sweep`] over [`timeline`]s (tier B) and [`counters`] (tier C) turn
//! that into seconds for each request; [`colocated`] divides a GPU among engines and jobs, [`idle`] names what nobody used,
//! and [`pool`] makes postings of it all that add up to the pool's cost and to its GPU time. [`stream`] does the same for one
//! engine over a long stretch in one pass, [`adjust`] books what later facts and invoices change. The constants come from
//! [`fit`], the model's dimensions from [`shape`], the rules from [`policy`], and [`quality`] says how far to believe it;
//! [`calibrate`] does both for one engine's timelines. [`terms`] and [`full_load`] explain a bill.
//!
//! Inside [`pool`]: `parties` finds who was on which GPUs for how long; `engine_time` what each request weighs in its
//! engine's time, from `joined` steps, the `reconstruct`ed batch and what is only `counted`; `books` turns it into rows.
//!
//! The model decides shares, never totals: a bad model moves money between requests, it cannot create or lose any.

pub mod adjust;
mod books;
pub mod calibrate;
pub mod colocated;
mod counted;
pub mod counters;
mod engine_time;
pub mod fit;
pub mod full_load;
pub mod idle;
mod joined;
#[cfg(test)]
pub(crate) mod measured;
mod parties;
pub mod policy;
pub mod pool;
pub mod quality;
mod reconstruct;
pub mod replica;
pub mod shape;
pub mod share;
pub mod steps;
pub mod stream;
pub mod sweep;
pub mod terms;
pub mod timeline;

#[cfg(test)]
mod tiers_tests;
