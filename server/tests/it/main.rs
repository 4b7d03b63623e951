//! Drives the real binary: what a user types, what comes out, and what is in the ledger afterwards.

#![expect(clippy::unwrap_used, reason = "the helpers belong to tests: where they fail, the test fails")]

mod allocate;
mod api;
mod bills;
mod check;
mod demo;
mod fleet;
mod imports;
mod keys;
mod privacy;
mod settle;
mod support;
mod verify;
