//! What goes wrong: by chance ([`Failures`]), and by the clock ([`Faults`]) to see what a policy makes of it.

use ledger::GpuHourRate;
use serde::{Deserialize, Serialize};

use super::random::Random;
use super::startup::{Start, Startup, micros};

/// What goes wrong by chance.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Failures {
    /// Mean hours that a replica serves until it crashes. `None`: it never does.
    pub mtbf_h: Option<f64>,
    /// Part of all started replicas that never get a place.
    pub never_schedules: f64,
    /// Part of all started replicas that take `slow_factor` times as long.
    pub slow_starts: f64,
    /// How much longer.
    pub slow_factor: f64,
    /// Replicas on spot nodes.
    pub spot: Option<Spot>,
    /// How often a request is tried again elsewhere after its replica crashed, before it fails.
    pub retries_max: u8,
}

impl Default for Failures {
    /// Nothing goes wrong.
    fn default() -> Failures {
        Failures { mtbf_h: None, never_schedules: 0.0, slow_starts: 0.0, slow_factor: 1.0, spot: None, retries_max: 3 }
    }
}

/// Nodes that are cheaper because they can be taken away.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spot {
    /// Part of all replicas that run on them, 0 to 1.
    pub share: f64,
    /// Mean hours that one serves until it is taken away.
    pub mean_hours: f64,
    /// Seconds between the notice and the end: it takes nothing new, and what is unfinished then starts again elsewhere.
    pub notice_s: f64,
    /// What one of their GPUs costs for an hour.
    pub rate: GpuHourRate,
}

impl Spot {
    /// How long a replica serves until the notice, microseconds.
    #[must_use]
    pub fn lifetime_us(&self, random: &mut Random) -> u64 {
        micros(self.mean_hours * 3600.0 * random.exponential())
    }
}

/// A span of simulated time, seconds since its start; half-open.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Window {
    /// The first moment inside.
    pub from_s: f64,
    /// The first moment outside; infinite for "until the end".
    pub to_s: f64,
}

impl Window {
    /// Whether a moment lies inside.
    #[must_use]
    pub fn contains(&self, at_us: u64) -> bool {
        micros(self.from_s) <= at_us && at_us < micros(self.to_s)
    }
}

/// What an outage of the metrics looks like to the scaler.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outage {
    /// Nothing new arrives: what is there grows old.
    Frozen,
    /// Looks arrive with every reading unknown.
    Blank,
}

/// What goes wrong by the clock.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Faults {
    /// Outages of the metrics.
    pub metrics: Vec<(Window, Outage)>,
    /// Replicas asked for meanwhile have no place to run until the window ends.
    pub unschedulable: Vec<Window>,
    /// Replicas asked for meanwhile take so many times as long to start.
    pub slow_starts: Vec<(Window, f64)>,
    /// Somebody sets the number of replicas by hand: seconds since the start, replicas.
    pub manual: Vec<(f64, u32)>,
    /// So many serving replicas crash at once: seconds since the start, replicas.
    pub crashes: Vec<(f64, u32)>,
}

impl Faults {
    /// The outage of the metrics that a moment lies in.
    #[must_use]
    pub fn outage(&self, at_us: u64) -> Option<Outage> {
        self.metrics.iter().find(|(window, _)| window.contains(at_us)).map(|&(_, outage)| outage)
    }
}

/// What one replica's life holds in store, decided when it is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fate {
    /// When there is a place for it; [`u64::MAX`] for never.
    pub placeable_us: u64,
    /// How long its start takes from then on.
    pub start: Start,
    /// Whether it has to wait for its place.
    pub waits: bool,
}

impl Failures {
    /// Decides it. A replica's fate depends on the seed and its number alone, and on when it is asked for.
    #[must_use]
    pub fn fate(&self, startup: &Startup, faults: &Faults, asked_us: u64, random: &mut Random) -> Fate {
        let mut start = startup.draw(random);
        let (never, slow) = (random.unit() < self.never_schedules, random.unit() < self.slow_starts);
        if slow {
            start = start.slowed(self.slow_factor);
        }
        for (_, factor) in faults.slow_starts.iter().filter(|(window, _)| window.contains(asked_us)) {
            start = start.slowed(*factor);
        }
        let closed = faults.unschedulable.iter().filter(|window| window.contains(asked_us));
        let opens_us = closed.map(|window| micros(window.to_s)).max();
        let placeable_us = if never { u64::MAX } else { opens_us.unwrap_or(asked_us) };
        Fate { placeable_us, start, waits: placeable_us > asked_us }
    }

    /// How long a replica serves until it crashes, microseconds.
    #[must_use]
    pub fn lifetime_us(&self, random: &mut Random) -> Option<u64> {
        self.mtbf_h.map(|hours| micros(hours * 3600.0 * random.exponential()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_asked_for_while_there_is_no_place_waits_until_there_is() {
        let faults = Faults { unschedulable: vec![Window { from_s: 10.0, to_s: 20.0 }], ..Faults::default() };
        let fate =
            |at_s: f64| Failures::default().fate(&Startup::fixed(10.0), &faults, micros(at_s), &mut Random::new(1));
        assert_eq!((fate(9.0).placeable_us, fate(9.0).waits), (9_000_000, false));
        assert_eq!((fate(10.0).placeable_us, fate(10.0).waits), (20_000_000, true));
        assert_eq!(fate(20.0).placeable_us, 20_000_000);
        let never = Failures { never_schedules: 1.0, ..Failures::default() };
        let fate = never.fate(&Startup::default(), &Faults::default(), 5, &mut Random::new(1));
        assert_eq!((fate.placeable_us, fate.waits), (u64::MAX, true));
    }

    #[test]
    fn slow_starts_multiply() {
        let window = Window { from_s: 0.0, to_s: f64::INFINITY };
        let faults = Faults { slow_starts: vec![(window, 3.0)], ..Faults::default() };
        let failures = Failures { slow_starts: 1.0, slow_factor: 2.0, ..Failures::default() };
        let fate = failures.fate(&Startup::fixed(100.0), &faults, 0, &mut Random::new(1));
        assert_eq!(fate.start.node_us, 240_000_000);
    }

    #[test]
    fn lifetimes_have_the_mean_that_is_given() {
        let failures = Failures { mtbf_h: Some(2.0), ..Failures::default() };
        let mut random = Random::new(5);
        let mean = (0..20_000).filter_map(|_| failures.lifetime_us(&mut random)).sum::<u64>() / 20_000;
        assert!((mean as f64 / 7200e6 - 1.0).abs() < 0.03, "{mean}");
        assert_eq!(Failures::default().lifetime_us(&mut random), None);
    }
}
