//! Drives the real binary: what a user types, what comes out, and what is in the ledger afterwards.

#![expect(clippy::unwrap_used, reason = "the helpers belong to tests: where they fail, the test fails")]

mod allocate;
mod api;
mod bills;
mod check;
mod commit;
mod demo;
mod fleet;
mod imports;
mod keys;
mod privacy;
mod scaling;
mod settle;
mod simulate;
mod simulate_engine;
mod support;
mod verify;
