//! The store as its users see it: facts in, crashes and failures in between, the same books out.

mod books;
mod crash;
mod failures;
mod imports;
mod queries;
mod sample;
