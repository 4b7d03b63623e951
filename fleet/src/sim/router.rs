//! Which replica a request goes to.

use serde::{Deserialize, Serialize};

use super::random::Random;

/// How requests are spread over the replicas that serve.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Router {
    /// One after the other.
    RoundRobin,
    /// Where the fewest requests are unfinished; among equals one after the other.
    #[default]
    LeastOutstanding,
    /// Requests with the same beginning to the same replica, unless it has a quarter more to do than the mean: then, and
    /// without anything known of their beginning, as [`Router::LeastOutstanding`].
    PrefixAffinity,
}

impl Router {
    /// Every way, by name.
    pub const ALL: [(&'static str, Router); 3] = [
        ("round-robin", Router::RoundRobin),
        ("least-outstanding", Router::LeastOutstanding),
        ("prefix-affinity", Router::PrefixAffinity),
    ];
}

impl std::str::FromStr for Router {
    type Err = String;

    fn from_str(text: &str) -> Result<Router, String> {
        let found = Router::ALL.iter().find(|(name, _)| *name == text).map(|&(_, router)| router);
        found.ok_or_else(|| format!("`{text}` is no router; write {}", Router::ALL.map(|(name, _)| name).join(", ")))
    }
}

/// Marks a place that takes no requests.
const CLOSED: u32 = u32::MAX;

/// What is unfinished at each place, kept up to date request by request.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    outstanding: Vec<u32>,
    open: usize,
    /// Sum over the open places.
    total: u64,
    next: usize,
}

impl Routes {
    /// A place takes requests from now on; it has none.
    pub fn open(&mut self, place: usize) {
        if self.outstanding.len() <= place {
            self.outstanding.resize(place + 1, CLOSED);
        }
        self.outstanding[place] = 0;
        self.open += 1;
    }

    /// A place takes no more.
    pub fn close(&mut self, place: usize) {
        if let Some(outstanding) = self.outstanding.get_mut(place).filter(|outstanding| **outstanding != CLOSED) {
            self.total -= u64::from(*outstanding);
            *outstanding = CLOSED;
            self.open -= 1;
        }
    }

    /// Requests that are unfinished at an open place.
    pub fn outstanding(&self, place: usize) -> u64 {
        self.outstanding.get(place).filter(|&&outstanding| outstanding != CLOSED).map_or(0, |&count| u64::from(count))
    }

    /// One request less at a place, if it is open.
    pub fn ended(&mut self, place: usize) {
        if self.outstanding[place] != CLOSED {
            self.outstanding[place] -= 1;
            self.total -= 1;
        }
    }

    /// Where the next request goes, counted as unfinished there. `beginning` is its prompt's first block.
    pub fn choose(&mut self, router: Router, beginning: Option<u64>) -> Option<usize> {
        if self.open == 0 {
            return None;
        }
        let place = match (router, beginning) {
            (Router::RoundRobin, _) => self.first_from_next(|outstanding| outstanding != CLOSED),
            (Router::PrefixAffinity, Some(beginning)) => self.home(beginning).unwrap_or_else(|| self.least()),
            _ => self.least(),
        };
        self.next = place + 1;
        self.outstanding[place] += 1;
        self.total += 1;
        Some(place)
    }

    fn least(&self) -> usize {
        // The minimum alone is a loop without branches; where it is comes after.
        let least = self.outstanding.iter().copied().min().unwrap_or(CLOSED);
        self.first_from_next(|outstanding| outstanding == least)
    }

    fn first_from_next(&self, fits: impl Fn(u32) -> bool) -> usize {
        let start = self.next.min(self.outstanding.len());
        let found = |places: &[u32]| places.iter().position(|&outstanding| fits(outstanding));
        let after = found(&self.outstanding[start..]).map(|place| start + place);
        after.or_else(|| found(&self.outstanding[..start])).unwrap_or(0)
    }

    /// The place that a beginning belongs to (highest random weight), unless it has too much to do.
    fn home(&self, beginning: u64) -> Option<usize> {
        let weight = |place: usize| Random::of(beginning, 0, place as u64).bits();
        let open = (0..self.outstanding.len()).filter(|&place| self.outstanding[place] != CLOSED);
        let place = open.max_by_key(|&place| weight(place))?;
        let limit = (self.total + 1) as f64 / self.open as f64 * 1.25 + 1.0;
        (f64::from(self.outstanding[place]) < limit).then_some(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes() -> Routes {
        let mut routes = Routes::default();
        [4, 7, 9].into_iter().for_each(|place| routes.open(place));
        routes
    }

    #[test]
    fn round_robin_goes_round_and_least_outstanding_fills_the_gaps() {
        let mut round = routes();
        let chosen: Vec<_> = (0..5).filter_map(|_| round.choose(Router::RoundRobin, None)).collect();
        assert_eq!(chosen, [4, 7, 9, 4, 7]);
        let mut least = routes();
        let choose = |least: &mut Routes| least.choose(Router::LeastOutstanding, None);
        assert_eq!([choose(&mut least), choose(&mut least), choose(&mut least)], [Some(4), Some(7), Some(9)]);
        least.ended(7);
        assert_eq!(choose(&mut least), Some(7));
        least.close(4);
        least.close(4);
        assert_eq!([choose(&mut least), choose(&mut least)], [Some(9), Some(7)]);
        least.ended(4);
        assert_eq!((least.total, least.open, least.outstanding(7), least.outstanding(4)), (4, 2, 2, 0));
        assert_eq!(Routes::default().choose(Router::RoundRobin, None), None);
    }

    #[test]
    fn a_beginning_has_a_home_until_it_has_too_much_to_do_or_goes() {
        let mut routes = routes();
        let home = routes.choose(Router::PrefixAffinity, Some(46)).unwrap();
        assert_eq!(routes.choose(Router::PrefixAffinity, Some(46)), Some(home));
        let chosen = (0..20).filter_map(|_| routes.choose(Router::PrefixAffinity, Some(46)));
        assert!(chosen.filter(|&place| place != home).count() > 5);
        routes.close(home);
        assert_ne!(routes.choose(Router::PrefixAffinity, Some(46)), Some(home));
    }

    #[test]
    fn names_are_read_and_others_are_refused_with_the_choice() {
        assert!(Router::ALL.iter().all(|(name, router)| name.parse() == Ok(*router)));
        assert!("random".parse::<Router>().unwrap_err().contains("least-outstanding"));
    }
}
