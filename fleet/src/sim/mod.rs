//! The simulator: engines, replicas, a router and policies on a trace, as fast as the processor goes. Pure and seeded.
//!
//! [`fleet`] plays a trace with engines, [`fluid`] plays its mean rates without. Both run the same [`plan`], whose replicas come
//! and go by one code and whose [`outcome`] is counted in one way.

pub mod capacity;
pub mod compare;
mod decider;
pub mod demand;
pub mod engine;
pub mod failure;
pub mod fleet;
pub mod fluid;
pub mod histogram;
mod meter;
pub mod outcome;
pub mod plan;
mod pool;
pub mod random;
mod recent;
pub mod request;
pub mod router;
pub mod search;
mod side;
pub mod startup;
pub mod trace;
mod transfer;

pub use pool::Role;
pub use request::{Arrival, Done, Prefixes};
pub use trace::{Trace, TraceError, TraceOptions};
