//! The simulator: engines, replicas, a router and policies on a trace, as fast as the processor goes. Pure and seeded.

pub mod request;

pub use request::{Arrival, Done, Prefixes};
