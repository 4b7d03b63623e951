//! Scaling decisions as pure functions: what was observed in, how many replicas there should be and why out.

pub mod observe;

pub use observe::{Bounds, Decision, ManualChange, Objective, Observation, Past, Pending, Sample};
