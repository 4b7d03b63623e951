//! What the flusher remembers of the tables, so that it need not look for duplicates of rows it wrote a moment ago.

use std::collections::HashSet;

use ledger::{AttemptId, RequestId};

/// Ids kept at most; beyond it the older half is forgotten and looked up in the table when it comes again.
const IDS_MAX: usize = 200_000;

/// The newest ids of a table: every id above the floor that the table holds is in here.
#[derive(Debug)]
pub(crate) struct Recent {
    floor: Option<AttemptId>,
    ids: HashSet<AttemptId>,
}

impl Recent {
    /// Remembers nothing of a table whose rows go up to `newest`.
    pub(crate) fn new(newest: Option<RequestId>) -> Recent {
        Recent { floor: newest.map(last_attempt), ids: HashSet::new() }
    }

    /// Whether the table holds `id`; `None` when only the table knows.
    pub(crate) fn holds(&self, id: AttemptId) -> Option<bool> {
        if self.ids.contains(&id) {
            return Some(true);
        }
        (Some(id) > self.floor).then_some(false)
    }

    /// Notes rows that were committed.
    pub(crate) fn note(&mut self, ids: impl IntoIterator<Item = AttemptId>) {
        let floor = self.floor;
        self.ids.extend(ids.into_iter().filter(|&id| Some(id) > floor));
        if self.ids.len() > IDS_MAX {
            let mut sorted: Vec<_> = self.ids.iter().copied().collect();
            let middle = sorted.len() / 2;
            let (_, &mut floor, _) = sorted.select_nth_unstable(middle);
            self.raise(floor);
        }
    }

    /// Forgets everything up to the last attempt of `newest`, because rows up to there came from elsewhere.
    pub(crate) fn forget_through(&mut self, newest: RequestId) {
        self.raise(last_attempt(newest));
    }

    fn raise(&mut self, floor: AttemptId) {
        self.floor = self.floor.max(Some(floor));
        self.ids.retain(|&id| id > floor);
    }
}

fn last_attempt(request: RequestId) -> AttemptId {
    AttemptId { request, number: u16::MAX }
}

/// Everything the flusher remembers.
#[derive(Debug)]
pub(crate) struct Memory {
    pub attempts: Recent,
    pub charges: Recent,
}

#[cfg(test)]
mod tests {
    use super::*;
    use ledger::Timestamp;

    fn id(milli: u32) -> AttemptId {
        AttemptId { request: RequestId::new(Timestamp::from_micros(i64::from(milli) * 1_000), [1; 10]), number: 0 }
    }

    #[test]
    fn new_ids_are_new_noted_ids_are_held_and_old_ids_are_looked_up() {
        let mut recent = Recent::new(Some(id(10).request));
        assert_eq!(recent.holds(id(10)), None);
        assert_eq!(recent.holds(id(11)), Some(false));
        recent.note([id(11), id(12)]);
        assert_eq!(recent.holds(id(11)), Some(true));
        recent.forget_through(id(11).request);
        assert_eq!((recent.holds(id(11)), recent.holds(id(12))), (None, Some(true)));
    }

    #[test]
    fn memory_is_bounded_and_never_calls_a_held_id_new() {
        let mut recent = Recent::new(None);
        let all: Vec<_> = (0..u32::try_from(IDS_MAX).unwrap() + 10).map(id).collect();
        recent.note(all.iter().copied());
        assert!(recent.ids.len() <= IDS_MAX);
        assert!(all.iter().all(|&id| recent.holds(id) != Some(false)));
    }
}
