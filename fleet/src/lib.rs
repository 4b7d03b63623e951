//! The GPU side of the ledger: engines simulated from the step-time model, the telemetry that engines expose, and how many
//! of them there should be.
//!
//! [`engine`] serves simulated inference engines over real HTTP. [`telemetry`] reads engines and GPUs ([`prometheus`] is the
//! parser), [`steps`] follows the single steps of engines that publish them, [`jobs`] finds work that is no request.
//! [`sim`] plays whole fleets on a trace, [`scale`] decides how many replicas there should be.

pub mod actuate;
pub mod engine;
mod grpc;
pub mod jobs;
pub mod otlp;
pub mod prometheus;
pub mod scale;
pub mod sim;
pub mod steps;
pub mod telemetry;

/// What can go wrong with an engine that is to be started.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// No socket could be opened; choose another address or free the port.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address asked for.
        address: std::net::SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The description of the engine cannot work; correct it.
    #[error("this engine cannot run: {0}")]
    Spec(&'static str),
}
