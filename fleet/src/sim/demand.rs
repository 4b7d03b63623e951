//! Demand in the one unit that policies know, the load: how many replicas the arriving work would fill.

use ledger::Timestamp;

pub use super::capacity::Work;
use super::trace::{Trace, TraceError};

/// Bins of a [`Demand`] made from a trace, microseconds.
pub const BIN_US: u64 = 10_000_000;
/// Bins of a day's course, microseconds.
pub const MINUTE_US: u64 = 60_000_000;

/// What comes, in bins of equal length from `start` on.
#[derive(Debug, Clone, PartialEq)]
pub struct Demand {
    /// What it is called.
    pub name: String,
    /// What a reader of its results has to know.
    pub notes: Vec<String>,
    /// Start of the first bin.
    pub start: Timestamp,
    /// Length of a bin, microseconds; divides a minute.
    pub bin_us: u64,
    /// Mean load of each bin, replicas.
    pub load: Vec<f32>,
    /// Of that, the prefill's part.
    pub prefill: Vec<f32>,
    /// Requests that arrive in each bin.
    pub requests: Vec<u32>,
}

impl Demand {
    /// Reads a trace once.
    ///
    /// # Errors
    /// What reading the trace says.
    pub fn of(trace: &Trace, work: &Work) -> Result<Demand, TraceError> {
        let mut demand = Demand {
            name: trace.name().to_owned(),
            notes: trace.notes().to_vec(),
            start: trace.start(),
            bin_us: BIN_US,
            load: Vec::new(),
            prefill: Vec::new(),
            requests: Vec::new(),
        };
        let (mut total_s, mut prefill_s) = (Vec::<f64>::new(), Vec::<f64>::new());
        for arrival in trace.arrivals()? {
            let arrival = arrival?;
            let bin = usize::try_from(arrival.at_us / BIN_US).unwrap_or(usize::MAX);
            if bin >= demand.requests.len() {
                demand.requests.resize(bin + 1, 0);
                total_s.resize(bin + 1, 0.0);
                prefill_s.resize(bin + 1, 0.0);
            }
            demand.requests[bin] += 1;
            total_s[bin] += work.of(arrival.input_tokens, arrival.output_tokens);
            prefill_s[bin] += work.prefill(arrival.input_tokens);
        }
        // What lasts longer than its last request ends with nothing to do.
        let bins = usize::try_from(trace.len_us().unwrap_or(0).div_ceil(BIN_US)).unwrap_or(0).max(total_s.len());
        total_s.resize(bins, 0.0);
        prefill_s.resize(bins, 0.0);
        demand.requests.resize(bins, 0);
        if !trace.prefixes().ids.is_empty() {
            demand.notes.push("loads count whole prompts: what prefix caches save shows in the latencies".to_owned());
        }
        let bin_s = BIN_US as f64 / 1e6;
        demand.load = total_s.iter().map(|&s| narrow(s / bin_s)).collect();
        demand.prefill = prefill_s.iter().map(|&s| narrow(s / bin_s)).collect();
        Ok(demand)
    }

    /// Loads that are known already, in bins of `bin_s` seconds, without anything known of what is prefill.
    #[must_use]
    pub fn from_load(start: Timestamp, bin_s: f64, load: Vec<f32>, requests: Vec<u32>) -> Demand {
        let bin_us = super::startup::micros(bin_s).max(1);
        let prefill = vec![0.0; load.len()];
        Demand { name: "loads".to_owned(), notes: Vec::new(), start, bin_us, load, prefill, requests }
    }

    /// Its length, microseconds.
    #[must_use]
    pub fn len_us(&self) -> u64 {
        self.bin_us.saturating_mul(self.load.len() as u64)
    }

    /// Mean load of each minute; of a last minute that is not full, the mean of what there is of it.
    #[must_use]
    pub fn minutes(&self) -> Vec<f32> {
        self.per_minute(&self.load)
    }

    /// Of that, the prefill's part.
    #[must_use]
    pub fn prefill_minutes(&self) -> Vec<f32> {
        self.per_minute(&self.prefill)
    }

    /// Requests of each minute.
    #[must_use]
    pub fn request_minutes(&self) -> Vec<u32> {
        self.requests.chunks(self.bins_per_minute()).map(|bins| bins.iter().sum()).collect()
    }

    /// The same course with its highest minute at so many replicas.
    #[must_use]
    pub fn scaled_to_peak(mut self, replicas: f64) -> Demand {
        let peak = self.minutes().into_iter().fold(0.0_f32, f32::max);
        if peak > 0.0 {
            let factor = replicas / f64::from(peak);
            for load in self.load.iter_mut().chain(&mut self.prefill) {
                *load = narrow(f64::from(*load) * factor);
            }
        }
        self
    }

    fn bins_per_minute(&self) -> usize {
        usize::try_from(MINUTE_US / self.bin_us).unwrap_or(1).max(1)
    }

    fn per_minute(&self, bins: &[f32]) -> Vec<f32> {
        let mean = |bins: &[f32]| narrow(bins.iter().copied().map(f64::from).sum::<f64>() / bins.len() as f64);
        bins.chunks(self.bins_per_minute()).map(mean).collect()
    }
}

/// Sums of a course up to each bin's end, to have means over any span at once.
#[derive(Debug)]
pub(crate) struct Sums {
    bin_us: f64,
    upto: Vec<f64>,
}

impl Sums {
    pub(crate) fn new(bin_us: u64, values: impl Iterator<Item = f64>) -> Sums {
        let mut upto = vec![0.0];
        let mut sum = 0.0;
        upto.extend(values.map(|value| {
            sum += value;
            sum
        }));
        Sums { bin_us: bin_us as f64, upto }
    }

    /// The sum over `from_us..to_us`, with values spread evenly within their bins.
    pub(crate) fn between(&self, from_us: u64, to_us: u64) -> f64 {
        self.until(to_us) - self.until(from_us)
    }

    fn until(&self, at_us: u64) -> f64 {
        let position = at_us as f64 / self.bin_us;
        let last = self.upto.len() - 1;
        let bin = index(position);
        if bin >= last {
            return self.upto[last];
        }
        self.upto[bin] + (self.upto[bin + 1] - self.upto[bin]) * (position - bin as f64)
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float saturates at the integer's ends, and NaN becomes zero"
)]
pub(crate) fn index(position: f64) -> usize {
    position as usize
}

#[expect(clippy::cast_possible_truncation, reason = "loads need no more digits than a float of 32 bits has")]
pub(crate) fn narrow(value: f64) -> f32 {
    value as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::request::{Arrival, Prefixes};

    fn arrival(at_s: u64, input_tokens: u32, output_tokens: u32) -> Arrival {
        Arrival { at_us: at_s * 1_000_000, input_tokens, output_tokens, ..Arrival::default() }
    }

    #[test]
    fn load_is_work_over_time() {
        let arrivals = vec![arrival(0, 1000, 100), arrival(9, 1000, 100), arrival(65, 500, 0)];
        let trace = Trace::of_arrivals("three", Timestamp::from_micros(0), arrivals, Prefixes::default());
        let demand = Demand::of(&trace, &Work { per_input_token: 0.001, per_output_token: 0.01 }).unwrap();
        assert_eq!(demand.requests, [2, 0, 0, 0, 0, 0, 1]);
        assert!((demand.load[0] - 0.4).abs() < 1e-6, "{:?}", demand.load);
        assert!((demand.prefill[0] - 0.2).abs() < 1e-6);
        assert!((demand.load[6] - 0.05).abs() < 1e-6);
        let minutes = demand.minutes();
        assert_eq!(minutes.len(), 2);
        assert!((minutes[0] - 0.4 / 6.0).abs() < 1e-6);
        assert_eq!(demand.request_minutes(), [2, 1]);
        let quiet = Trace::rates("quiet", Timestamp::default(), 60.0, &[1.0, 0.0, 0.0], &[(9, 9)], 1);
        let demand_of_quiet = Demand::of(&quiet, &Work { per_input_token: 0.001, per_output_token: 0.01 }).unwrap();
        assert_eq!((demand_of_quiet.len_us(), demand_of_quiet.minutes().len()), (180_000_000, 3));
        let peak = demand.scaled_to_peak(40.0).minutes().into_iter().fold(0.0, f32::max);
        assert!((peak - 40.0).abs() < 1e-4);
    }

    #[test]
    fn sums_cut_bins_where_they_are_asked_to() {
        let sums = Sums::new(10, [1.0, 3.0].into_iter());
        assert_eq!(sums.between(0, 20), 4.0);
        assert_eq!(sums.between(5, 15), 2.0);
        assert_eq!(sums.between(15, 99), 1.5);
    }
}
