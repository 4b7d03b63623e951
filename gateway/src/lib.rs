//! The metering reverse proxy: who asks, what of, where it goes, what it used, what it cost.
//!
//! A request walks through `pipeline` from top to bottom. The pure halves are [`surface`] (what is being asked),
//! [`provider`] (how an upstream wants to be spoken to) and [`meter`] (what an answer used). The crate reads no
//! tables: facts leave through a [`Journal`], and settings, keys and prices come in as snapshots.

mod answer;
mod aside;
pub mod attribute;
mod background;
mod client_socket;
pub mod journal;
pub mod keys;
pub mod meter;
pub mod metrics;
mod pipeline;
pub mod provider;
mod refusal;
mod running;
pub mod server;
pub mod settings;
pub mod surface;
mod upstream;

pub use journal::{Durability, Journal, JournalError, WhenLogFails};
pub use keys::{KeyHash, KeyRecord, KeyRing, Network, PlainKey, mint};
pub use metrics::Metrics;
pub use provider::Kind;
pub use server::{Gateway, GatewayError, Parts, server_tls};
pub use settings::{
    Anonymous, BaseUrl, Limits, ModelRoute, OnClientAbort, RouteTarget, Secret, Settings, Target, Upstream, plan,
};
