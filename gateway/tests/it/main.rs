//! The gateway over real sockets on loopback: a scripted upstream behind it, a journal in memory beneath it.

#![expect(clippy::unwrap_used, reason = "a test that cannot set up its world should stop where it stands")]

mod cases;
mod faults;
mod http;
mod ledgering;
mod property;
mod running;
mod scaling;
mod speed;
mod upstream;
mod world;
