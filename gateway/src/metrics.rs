//! Counters of the gateway, cheap enough to be always on. `/metrics` prints them.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that many threads change.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds one and returns the number before.
    pub fn up(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }

    /// Takes one away.
    pub fn down(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }

    /// The number now.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What the gateway counted since it started.
#[derive(Debug, Default)]
pub struct Metrics {
    /// Requests whose head arrived.
    pub requests: Counter,
    /// Requests that were refused before any upstream was called.
    pub refused: Counter,
    /// Attempts that were opened.
    pub attempts: Counter,
    /// Attempts after the first of their request.
    pub retries: Counter,
    /// Attempts whose client went away first.
    pub aborted: Counter,
    /// Journal records that could not be written.
    pub lost_records: Counter,
    /// Connections that broke or spoke nonsense.
    pub broken_connections: Counter,
    /// Connections open now.
    pub connections: Counter,
    /// Attempts that are opened and not finished now.
    pub in_flight: Counter,
    /// Upstream answers being read to their end for clients that went away, now.
    pub draining: Counter,
    /// Requests that had to wait because nothing took them.
    pub holds: Counter,
    /// Requests that wait so now.
    pub held: Counter,
}

impl Metrics {
    /// Every number with its name and whether it only grows.
    #[must_use]
    pub fn snapshot(&self) -> [(&'static str, u64, bool); 12] {
        [
            ("requests", self.requests.get(), true),
            ("refused", self.refused.get(), true),
            ("attempts", self.attempts.get(), true),
            ("retries", self.retries.get(), true),
            ("aborted", self.aborted.get(), true),
            ("lost_records", self.lost_records.get(), true),
            ("broken_connections", self.broken_connections.get(), true),
            ("connections", self.connections.get(), false),
            ("in_flight", self.in_flight.get(), false),
            ("draining", self.draining.get(), false),
            ("holds", self.holds.get(), true),
            ("held", self.held.get(), false),
        ]
    }
}
