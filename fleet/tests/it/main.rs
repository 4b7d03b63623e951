//! The simulated engine over real HTTP: what clients are told and what the engine counts is the same.

#![expect(clippy::unwrap_used, reason = "what fails in a test fails the test")]

mod actuate_keda;
mod actuate_kubernetes;
mod actuate_webhook;
mod client;
mod engine;
mod otlp;
mod scale_faults;
mod scale_faults_engines;
mod scale_week;
mod sim_engine;
mod sim_fleet;
mod telemetry;
