//! The clock of the bench programs, which measure the real world and nothing else.

use std::time::Instant;

/// Now.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "a measuring program has to look at the clock, and does so here only")]
pub fn now() -> Instant {
    Instant::now()
}
