//! Constants from what a real engine was seen to do.
//!
//! The engine is simulated with trial constants, and the constants whose simulation comes closest to what was measured are
//! kept. Nothing has to be known of single steps, and queueing, preemption and the order of things are judged with
//! everything else. The search is Nelder and Mead's simplex over the logarithms of the constants, pulled weakly towards
//! where it began: what the measurement does not tell stays at its default. It draws nothing and always ends.

use serde::{Deserialize, Serialize};

use super::cost::{count, whole};
use super::{Constants, Load, Spec, Summary, play};
use crate::sim::{Arrival, Done};

/// Blends of compute and memory that are tried, as in [`ledger::allocate::fit`]. The first is the roofline.
const OVERLAPS: [f64; 5] = [1.0, 0.75, 0.5, 0.25, 0.0];
/// Steps of the simplex for each of them.
const STEPS: usize = 150;
/// How strongly a constant is held at its default: a factor of e off counts as much as an error of 4.5 %.
const PULL: f64 = 0.002;
/// Where the simplex begins, as logarithms of factors: at the defaults, and at an engine that reaches more of its GPU.
const STARTS: [[f64; 5]; 2] = [[0.3, 0.0, 0.0, 0.0, 0.0], [0.6, 0.1, -1.0, -1.0, 0.0]];
const SPREAD: [f64; 5] = [0.2, 0.1, -0.5, -0.5, 0.5];
/// Fewest requests that are compared.
const REQUESTS_MIN: usize = 8;

/// Relative errors of a simulation: simulated / measured, less 1, of means; and the spread over requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Errors {
    /// Of the mean time per output token.
    pub tpot: f64,
    /// Of the mean time to the first token.
    pub ttft: f64,
    /// Of the mean time to the last token.
    pub e2e: f64,
    /// Root mean square over requests of the logarithm of simulated / measured time per output token.
    pub tpot_each: f64,
    /// Root mean square over requests of how far the first token is off, in parts of the mean time to the last one.
    pub first_each: f64,
    /// The same of the last token.
    pub last_each: f64,
}

/// Constants and how well they explain what they were made from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Calibration {
    /// The constants.
    pub constants: Constants,
    /// How far off the best simulation still is; the smaller, the better.
    pub loss: f64,
    /// Requests or points that were compared.
    pub observations: usize,
}

/// Fits the constants of `spec` to measured requests: all of them arrive, those that `fitted` says are compared. `None` with
/// fewer than eight of these, or when one is too long for the engine.
#[must_use]
pub fn calibrate(spec: &Spec, measured: &[Done], fitted: impl Fn(&Done) -> bool) -> Option<Calibration> {
    let observations = measured.iter().filter(|one| fitted(one)).count();
    if observations < REQUESTS_MIN {
        return None;
    }
    let loss = |spec: &Spec| -> Option<f64> {
        let errors = compare(spec, measured, &fitted)?;
        let Errors { tpot, ttft, tpot_each, first_each, last_each, .. } = errors;
        Some(
            4.0 * tpot * tpot
                + 0.1 * ttft * ttft
                + tpot_each * tpot_each
                + first_each * first_each
                + last_each * last_each,
        )
    };
    let found = OVERLAPS.iter().filter_map(|&overlap| fit(spec, overlap, &loss));
    let (loss, constants) = found.min_by(|a, b| a.0.total_cmp(&b.0))?;
    Some(Calibration { constants, loss, observations })
}

/// Simulates measured requests and says how far off the simulation is on those that `judged` says. `None` when there are none
/// or one is too long for the engine.
#[must_use]
pub fn compare(spec: &Spec, measured: &[Done], judged: impl Fn(&Done) -> bool) -> Option<Errors> {
    let simulated = replay(spec, measured)?;
    let pairs = || simulated.iter().zip(measured).filter(|(_, real)| judged(real));
    let s = |from_us: u64, to_us: u64| count(to_us.saturating_sub(from_us)) / 1e6;
    let ttft = |one: &Done| s(one.arrival.at_us, one.first_token_us);
    let e2e = |one: &Done| s(one.arrival.at_us, one.last_token_us);
    let tpot = |one: &Done| s(one.first_token_us, one.last_token_us) / f64::from(one.arrival.output_tokens.max(2) - 1);
    let off = |of: &dyn Fn(&Done) -> f64| {
        let (found, real) = pairs().fold((0.0, 0.0), |sum, (found, real)| (sum.0 + of(found), sum.1 + of(real)));
        if real > 0.0 { found / real - 1.0 } else { 0.0 }
    };
    let number = count(pairs().count() as u64);
    if number == 0.0 {
        return None;
    }
    let mean_e2e_s = (pairs().map(|(_, real)| e2e(real)).sum::<f64>() / number).max(1e-6);
    let root = |sum: f64, number: f64| (sum / number.max(1.0)).sqrt();
    let late = |of: &dyn Fn(&Done) -> f64| {
        root(pairs().map(|(found, real)| ((of(found) - of(real)) / mean_e2e_s).powi(2)).sum(), number)
    };
    let logs =
        pairs().map(|(found, real)| (tpot(found), tpot(real))).filter(|(found, real)| *found > 0.0 && *real > 0.0);
    let (sum, decoded) = logs.fold((0.0, 0.0), |sum, (found, real)| (sum.0 + (found / real).ln().powi(2), sum.1 + 1.0));
    Some(Errors {
        tpot: off(&tpot),
        ttft: off(&ttft),
        e2e: off(&e2e),
        tpot_each: root(sum, decoded),
        first_each: late(&ttft),
        last_each: late(&e2e),
    })
}

/// What the engine would have made of the same requests, in the order in which they were given.
fn replay(spec: &Spec, measured: &[Done]) -> Option<Vec<Done>> {
    let mut arrivals: Vec<Arrival> =
        (0u64..).zip(measured).map(|(id, one)| Arrival { id, prefix_blocks: 0, ..one.arrival }).collect();
    arrivals.sort_by_key(|arrival| (arrival.at_us, arrival.id));
    let mut simulated = Vec::with_capacity(measured.len());
    play(spec, &arrivals, std::sync::Arc::default(), &mut |one| simulated.push(one)).ok()?;
    simulated.sort_unstable_by_key(|one| one.arrival.id);
    Some(simulated)
}

/// What a benchmark measured under a steady load. What it did not measure is `None`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// The load.
    pub load: Load,
    /// Output tokens a second.
    pub tps_output: Option<f64>,
    /// Times to the first token: mean, median, 99th percentile, milliseconds.
    pub ttft_ms: [Option<f64>; 3],
    /// Times per output token: median, 90th percentile, milliseconds.
    pub tpot_ms: [Option<f64>; 2],
    /// Times to the last token: median, 99th percentile, milliseconds.
    pub e2e_ms: [Option<f64>; 2],
}

/// Fits the constants to benchmarks under steady loads, two seeds of each. Percentiles of whole runs do not tell how compute
/// and memory overlap, so that stays as it is in `spec`. `None` without points.
#[must_use]
pub fn calibrate_points(spec: &Spec, points: &[Point]) -> Option<Calibration> {
    const SEEDS: u64 = 2;
    if points.is_empty() {
        return None;
    }
    let loads: Vec<(Vec<Arrival>, &Point)> = points
        .iter()
        .flat_map(|point| {
            (0..SEEDS)
                .map(move |more| (Load { seed: point.load.seed.wrapping_add(more), ..point.load }.arrivals(), point))
        })
        .collect();
    let loss = |spec: &Spec| -> Option<f64> {
        let mut sum = 0.0;
        for (arrivals, point) in &loads {
            let mut done = Vec::with_capacity(arrivals.len());
            play(spec, arrivals, std::sync::Arc::default(), &mut |one| done.push(one)).ok()?;
            sum += point.distance(&Summary::of(&done));
        }
        Some(sum / count(SEEDS))
    };
    let (loss, constants) = fit(spec, spec.constants.replica.overlap, &loss)?;
    Some(Calibration { constants, loss, observations: points.len() })
}

impl Point {
    /// Sum of squared logarithms of simulated / measured; throughput and the median time per token count most.
    fn distance(&self, found: &Summary) -> f64 {
        let terms = [
            (3.0, found.tps_output, self.tps_output),
            (2.0, found.tpot_ms.p50, self.tpot_ms[0]),
            (1.0, found.tpot_ms.p90, self.tpot_ms[1]),
            (1.0, found.ttft_ms.mean, self.ttft_ms[0]),
            (1.0, found.ttft_ms.p50, self.ttft_ms[1]),
            (0.5, found.ttft_ms.p99, self.ttft_ms[2]),
            (1.0, found.e2e_ms.p50, self.e2e_ms[0]),
            (0.5, found.e2e_ms.p99, self.e2e_ms[1]),
        ];
        let known = terms.iter().filter_map(|(weight, found, real)| real.map(|real| (weight, found, real)));
        known.map(|(weight, found, real)| weight * (found.max(1e-9) / real.max(1e-9)).ln().powi(2)).sum()
    }
}

/// The constants with the least loss at this overlap.
fn fit(spec: &Spec, overlap: f64, loss: &dyn Fn(&Spec) -> Option<f64>) -> Option<(f64, Constants)> {
    let base = Constants::unfitted(spec.constants.replica);
    let base = Constants { link_bytes_per_s: spec.constants.link_bytes_per_s, ..base };
    let at = |x: &[f64; 5]| Spec { constants: trial(&base, overlap, x), ..*spec };
    let value = |x: &[f64; 5]| {
        let pulled: f64 = x.iter().map(|x| x * x).sum();
        loss(&at(x)).map_or(f64::INFINITY, |loss| loss + PULL * pulled)
    };
    let (best, x) = STARTS
        .iter()
        .map(|start| simplex(&value, start))
        .min_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(best, _)| best.is_finite())?;
    Some((best, at(&x).constants))
}

/// Constants that differ from the defaults by these factors' logarithms. No engine beats its data sheet.
fn trial(base: &Constants, overlap: f64, x: &[f64; 5]) -> Constants {
    let usual = ledger::step::Efficiencies::default();
    let mut constants = *base;
    constants.replica.overlap = overlap;
    constants.replica.efficiencies = ledger::step::Efficiencies {
        compute: (usual.compute * x[0].exp()).min(1.0),
        bandwidth: (usual.bandwidth * x[1].exp()).min(1.0),
        overhead_s: usual.overhead_s * x[2].exp(),
    };
    constants.sequence_s = Constants::SEQUENCE_S * x[3].exp();
    constants.request_s = Constants::REQUEST_S * x[4].exp();
    constants
}

/// Nelder and Mead's simplex: the least value that was met and where.
fn simplex<const N: usize>(value: &dyn Fn(&[f64; N]) -> f64, start: &[f64; N]) -> (f64, [f64; N])
where
    [f64; N]: Copy,
{
    let mut corners = vec![(value(start), *start)];
    for axis in 0..N {
        let mut corner = *start;
        corner[axis] += SPREAD.get(axis).copied().unwrap_or(0.1);
        corners.push((value(&corner), corner));
    }
    for _ in 0..STEPS {
        corners.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (worst, last) = corners[N];
        let mut centre = [0.0; N];
        for (_, corner) in &corners[..N] {
            centre.iter_mut().zip(corner).for_each(|(sum, x)| *sum += x / count(N as u64));
        }
        let along = |t: f64| {
            let mut x = centre;
            x.iter_mut().zip(&last).for_each(|(x, last)| *x += t * (last - *x));
            (value(&x), x)
        };
        let turned = along(-1.0);
        corners[N] = if turned.0 < corners[0].0 {
            let further = along(-2.0);
            if further.0 < turned.0 { further } else { turned }
        } else if turned.0 < corners[N - 1].0 {
            turned
        } else {
            let nearer = along(if turned.0 < worst { -0.5 } else { 0.5 });
            if nearer.0 < turned.0.min(worst) {
                nearer
            } else {
                let best = corners[0].1;
                for corner in &mut corners[1..] {
                    corner.1.iter_mut().zip(&best).for_each(|(x, best)| *x = f64::midpoint(*x, *best));
                    corner.0 = value(&corner.1);
                }
                continue;
            }
        };
    }
    corners.into_iter().min_by(|a, b| a.0.total_cmp(&b.0)).expect("a simplex has corners")
}

/// The requests of a recording that ended before its last one was scheduled: if it was cut off there, others ran beside the
/// rest that are not in it. When that leaves fewer than a third, the recording is taken to be whole.
pub fn surely_whole(measured: &[Done]) -> impl Fn(&Done) -> bool + use<> {
    let last_us = measured.iter().map(|one| one.scheduled_us).max().unwrap_or(0);
    let ended = measured.iter().filter(|one| one.last_token_us <= last_us).count();
    let enough = ended * 3 >= measured.len();
    let until_us = if enough { last_us } else { whole(f64::MAX) };
    move |one: &Done| one.last_token_us <= until_us
}

#[cfg(test)]
mod tests {
    use ledger::allocate::replica::Replica;
    use ledger::step::{Efficiencies, GpuSheet, ModelShape};

    use super::*;

    fn truth() -> Spec {
        let sheet = Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 1);
        let efficiencies = Efficiencies { compute: 0.62, bandwidth: 0.71, overhead_s: 0.8e-3 };
        let constants = Constants::unfitted(Replica { efficiencies, ..sheet });
        Spec::new(Constants { sequence_s: 15e-6, request_s: 8e-3, ..constants })
    }

    #[test]
    fn an_engine_is_known_by_half_of_its_requests() {
        let load = Load { requests_per_s: 12.0, requests: 240, input_tokens: 700, output_tokens: 150, seed: 5 };
        let mut arrivals = load.arrivals();
        for (arrival, number) in arrivals.iter_mut().zip(0u32..) {
            arrival.input_tokens = 100 + number * 37 % 1_500;
            arrival.output_tokens = 20 + number * 53 % 300;
        }
        let mut measured = Vec::new();
        play(&truth(), &arrivals, std::sync::Arc::default(), &mut |one| measured.push(one)).unwrap();
        let sheet =
            Spec::new(Constants::unfitted(Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 1)));
        let first = |one: &Done| one.arrival.id < 120;
        let found = calibrate(&sheet, &measured, first).unwrap();
        assert_eq!(found.observations, 120);
        let fitted = Spec { constants: found.constants, ..sheet };
        let errors = compare(&fitted, &measured, |one| !first(one)).unwrap();
        assert!(
            errors.tpot.abs() < 0.02 && errors.ttft.abs() < 0.08 && errors.tpot_each < 0.03,
            "{errors:?} {found:?}"
        );
        let before = compare(&sheet, &measured, |one| !first(one)).unwrap();
        assert!(errors.tpot.abs() < before.tpot.abs() && errors.last_each < before.last_each, "{before:?}");
        assert_eq!(calibrate(&sheet, &measured[..5], |_| true), None);
        assert_eq!(compare(&sheet, &measured, |_| false), None);
    }

    #[test]
    fn an_engine_is_known_by_two_benchmarks() {
        let point = |requests_per_s: f64| {
            let load = Load { requests_per_s, requests: 300, input_tokens: 512, output_tokens: 128, seed: 1 };
            let mut done = Vec::new();
            play(&truth(), &load.arrivals(), std::sync::Arc::default(), &mut |one| done.push(one)).unwrap();
            let of = Summary::of(&done);
            Point {
                load,
                tps_output: Some(of.tps_output),
                ttft_ms: [Some(of.ttft_ms.mean), Some(of.ttft_ms.p50), Some(of.ttft_ms.p99)],
                tpot_ms: [Some(of.tpot_ms.p50), Some(of.tpot_ms.p90)],
                e2e_ms: [None, None],
            }
        };
        let sheet = Spec { constants: Constants::unfitted(truth().constants.replica.ideal()), ..truth() };
        let found = calibrate_points(&sheet, &[point(1.0), point(100.0)]).unwrap();
        let between = point(30.0);
        let mut done = Vec::new();
        let fitted = Spec { constants: found.constants, ..sheet };
        play(&fitted, &between.load.arrivals(), std::sync::Arc::default(), &mut |one| done.push(one)).unwrap();
        let off = Summary::of(&done).tpot_ms.p50 / between.tpot_ms[0].unwrap() - 1.0;
        assert!(off.abs() < 0.05, "{off} {found:?}");
        assert_eq!(calibrate_points(&sheet, &[]), None);
    }

    #[test]
    fn a_cut_recording_is_judged_by_what_it_surely_holds() {
        let done = |scheduled_us, last_token_us| Done { scheduled_us, last_token_us, ..Done::default() };
        let cut = [done(0, 5), done(1, 9), done(8, 30)];
        let kept: Vec<bool> = cut.iter().map(surely_whole(&cut)).collect();
        assert_eq!(kept, [true, false, false]);
        let at_once = [done(0, 5), done(0, 9), done(0, 30), done(0, 31)];
        assert!(at_once.iter().all(surely_whole(&at_once)));
    }
}
