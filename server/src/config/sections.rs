//! The configuration file as types: one struct a section, every field with its default.

use std::net::SocketAddr;
use std::path::PathBuf;

use gateway::provider::Kind;
use gateway::{Anonymous, Durability, ModelRoute, OnClientAbort, WhenLogFails};
use ledger::price::{Discount, PriceOverride};
use serde::Deserialize;

use super::fleet::{EngineSection, GpuSection, PoolSection, SettlementSection, TelemetrySection};
use super::scale::{ScaleSection, ScalingSection};
use super::secret::SecretRef;

/// The whole file.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// `[ledger]`
    pub ledger: LedgerSection,
    /// `[gateway]`
    pub gateway: GatewaySection,
    /// `[admin]`
    pub admin: AdminSection,
    /// `[[upstream]]`
    pub upstream: Vec<UpstreamSection>,
    /// `[[route]]`
    pub route: Vec<ModelRoute>,
    /// `[[pool]]`
    pub pool: Vec<PoolSection>,
    /// `[[gpu]]`
    pub gpu: Vec<GpuSection>,
    /// `[[price]]`
    pub price: Vec<PriceOverride>,
    /// `[[discount]]`
    pub discount: Vec<Discount>,
    /// `[telemetry]`
    pub telemetry: TelemetrySection,
    /// `[settlement]`
    pub settlement: SettlementSection,
    /// `[scaling]`
    pub scaling: ScalingSection,
    /// `[[scale]]`
    pub scale: Vec<ScaleSection>,
}

/// `[ledger]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LedgerSection {
    /// When a written record counts as safe.
    pub durability: Durability,
    /// What happens to requests while the log cannot be written.
    pub when_log_fails: WhenLogFails,
    /// Milliseconds between moves of the log into the tables.
    pub flush_every_ms: u64,
}

impl Default for LedgerSection {
    fn default() -> Self {
        LedgerSection {
            durability: Durability::default(),
            when_log_fails: WhenLogFails::default(),
            flush_every_ms: 2_000,
        }
    }
}

/// A certificate and its key, PEM files.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsSection {
    /// The certificate chain.
    pub certificate: PathBuf,
    /// The private key.
    pub key: PathBuf,
}

/// `[gateway]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GatewaySection {
    /// Where clients connect.
    pub listen: SocketAddr,
    /// TLS towards clients.
    pub tls: Option<TlsSection>,
    /// Largest request head, bytes.
    pub header_bytes_max: usize,
    /// Largest request body, bytes.
    pub body_bytes_max: usize,
    /// Longest wait for an upstream's first byte.
    pub first_byte_ms_max: u64,
    /// Longest silence within a stream.
    pub stream_idle_ms_max: u64,
    /// Longest request.
    pub request_ms_max: u64,
    /// What happens to the upstream when the client goes away.
    pub on_client_abort: OnClientAbort,
    /// Longest drain.
    pub drain_ms_max: u64,
    /// Largest drain, bytes.
    pub drain_bytes_max: u64,
    /// Longest time that a request waits while nothing that serves it takes requests.
    pub hold_ms_max: u64,
    /// Most requests that wait so for one deployment.
    pub hold_requests_max: u32,
    /// Who may call without a key.
    pub anonymous: Anonymous,
}

impl Default for GatewaySection {
    fn default() -> Self {
        GatewaySection {
            listen: SocketAddr::from(([127, 0, 0, 1], 4000)),
            tls: None,
            header_bytes_max: 65_536,
            body_bytes_max: 67_108_864,
            first_byte_ms_max: 600_000,
            stream_idle_ms_max: 120_000,
            request_ms_max: 3_600_000,
            on_client_abort: OnClientAbort::default(),
            drain_ms_max: 60_000,
            drain_bytes_max: 16_777_216,
            hold_ms_max: 120_000,
            hold_requests_max: 256,
            anonymous: Anonymous::default(),
        }
    }
}

/// `[admin]`
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdminSection {
    /// Where the API, the live page and the metrics are.
    pub listen: SocketAddr,
    /// The bearer token of the API.
    pub token: Option<SecretRef>,
}

impl Default for AdminSection {
    fn default() -> Self {
        AdminSection { listen: SocketAddr::from(([127, 0, 0, 1], 4001)), token: None }
    }
}

/// `[[upstream]]`
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpstreamSection {
    /// Its name in routes and tables.
    pub name: String,
    /// How it speaks.
    pub kind: Kind,
    /// Its address without `/v1`.
    pub base_url: String,
    /// The credential that replaces the client's.
    pub api_key: Option<SecretRef>,
    /// Whose prices apply; by kind when absent.
    pub provider: Option<String>,
    /// The GPU pool that serves it.
    pub pool: Option<String>,
    /// The deployment on that pool.
    pub deployment: Option<String>,
    /// What is known of the engine on that pool.
    pub engine: Option<EngineSection>,
}
