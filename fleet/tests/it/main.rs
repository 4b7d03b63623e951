//! The simulated engine over real HTTP: what clients are told and what the engine counts is the same.

#![expect(clippy::unwrap_used, reason = "what fails in a test fails the test")]

mod client;
mod engine;
mod otlp;
mod telemetry;
