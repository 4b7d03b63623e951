//! Drives the real binary: what a user types, what comes out, and what is in the ledger afterwards.

mod api;
mod check;
mod demo;
mod imports;
mod keys;
mod support;
mod verify;
