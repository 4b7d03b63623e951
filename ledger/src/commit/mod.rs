//! How many GPUs to commit to: a commitment is paid whether it is used or not, everything above it is paid by the hour.
//!
//! The whole question lives in one curve, how long how many GPUs were in use ([`Demand`]): a GPU that is in use for more
//! than `r / p` of the time (`r` the committed price, `p` the price on demand) is cheaper committed. [`level`] finds the
//! level, [`layers`] does so for several products at once, [`regret`] asks what it would cost if the future is another,
//! and [`spot`] says what interruptible GPUs save and break. Spreading an upfront payment over its term is billing's.

pub mod demand;
pub mod layers;
pub mod level;
pub mod regret;
pub mod spot;
#[cfg(test)]
mod week_tests;

pub use demand::Demand;
pub use layers::{Layer, Plan, Product};
pub use level::{Bill, Rates, best_level};
pub use regret::{Regret, Scenario};
pub use spot::{Interruptions, Saving};
