//! The store as its users see it: facts in, crashes and failures in between, the same books out.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by panicking")]

mod books;
mod crash;
mod failures;
mod imports;
mod queries;
mod sample;
mod telemetry;
