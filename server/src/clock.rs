//! The system's clocks. The only file that reads them; everything else is given a [`Clock`] or a [`Timestamp`].

use std::sync::LazyLock;
use std::time::{Instant, SystemTime};

use ledger::{Clock, Timestamp};

static START: LazyLock<Instant> = LazyLock::new(monotonic);

/// The wall clock and the monotonic clock of this machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        now()
    }

    fn monotonic_us(&self) -> u64 {
        u64::try_from(START.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
}

/// The wall clock, to the microsecond. Before 1970 it reads as 1970.
#[must_use]
#[expect(clippy::disallowed_methods, reason = "this file is the one place where the wall clock is read")]
pub fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp::from_micros(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
}

#[expect(clippy::disallowed_methods, reason = "this file is the one place where the monotonic clock is read")]
fn monotonic() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_monotonic_clock_never_goes_back() {
        let clock = SystemClock;
        let readings: Vec<u64> = (0..100).map(|_| clock.monotonic_us()).collect();
        assert!(readings.is_sorted());
        assert!(clock.now().micros() > 1_700_000_000_000_000);
    }
}
