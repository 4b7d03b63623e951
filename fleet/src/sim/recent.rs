//! The last hour of something that is added to at the end, as a slice.

/// Microseconds that are kept.
const KEPT_US: u64 = 3_600_000_000;

/// Values with their times; old ones are forgotten in large portions.
#[derive(Debug)]
pub(crate) struct Recent<T> {
    values: Vec<T>,
    times_us: Vec<u64>,
    from: usize,
}

impl<T> Default for Recent<T> {
    fn default() -> Recent<T> {
        Recent { values: Vec::new(), times_us: Vec::new(), from: 0 }
    }
}

impl<T> Recent<T> {
    /// Adds a value; times never go back.
    pub fn push(&mut self, at_us: u64, value: T) {
        self.values.push(value);
        self.times_us.push(at_us);
    }

    /// Forgets what is older than an hour.
    pub fn forget(&mut self, now_us: u64) {
        let oldest_us = now_us.saturating_sub(KEPT_US);
        while self.times_us.get(self.from).is_some_and(|&at_us| at_us < oldest_us) {
            self.from += 1;
        }
        if self.from > self.values.len() / 2 {
            self.values.drain(..self.from);
            self.times_us.drain(..self.from);
            self.from = 0;
        }
    }

    /// What is left, oldest first.
    pub fn slice(&self) -> &[T] {
        &self.values[self.from..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_hour_is_kept_and_no_more() {
        let mut recent = Recent::default();
        for minute in 0..200_u64 {
            recent.push(minute * 60_000_000, minute);
            recent.forget(minute * 60_000_000);
            let expected: Vec<u64> = (minute.saturating_sub(60)..=minute).collect();
            assert_eq!(recent.slice(), expected);
        }
    }
}
