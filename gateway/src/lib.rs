//! The metering reverse proxy: who asks, what of, where it goes, what it used, what it cost.
//!
//! A request walks through `pipeline` from top to bottom. The pure halves are [`surface`] (what is being asked),
//! [`provider`] (how an upstream wants to be spoken to) and [`meter`] (what an answer used). The crate reads no
//! tables: facts leave through a [`Journal`], and settings, keys and prices come in as snapshots.

mod answer;
mod aside;
pub mod attribute;
pub mod availability;
mod background;
mod client_socket;
pub mod demand;
pub mod journal;
pub mod keys;
pub mod meter;
pub mod metrics;
mod pipeline;
pub mod plan;
pub mod provider;
mod refusal;
mod running;
pub mod server;
pub mod settings;
pub mod surface;
mod upstream;

pub use availability::{Availability, Deployment, Look};
pub use demand::{Demand, Distribution};
pub use journal::{Durability, Journal, JournalError, WhenLogFails};
pub use keys::{KeyHash, KeyRecord, KeyRing, Network, PlainKey, mint};
pub use metrics::Metrics;
pub use plan::{Ask, Plan, Target, plan};
pub use provider::Kind;
pub use server::{Gateway, GatewayError, Parts, server_tls};
pub use settings::{
    Anonymous, Balance, BaseUrl, Limits, ModelRoute, OnClientAbort, RouteTarget, Secret, Settings, Upstream,
};
