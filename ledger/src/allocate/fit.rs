//! How much of the data sheet an engine reaches, from what it was seen to do.
//!
//! An observation says how long a number of steps took together and what they had to compute and to read. With
//! `x = 1/eta_c`, `y = 1/eta_b` the step model is linear in `(o, x, y)` once it is known on which side of the roofline
//! each step lies, so the fit alternates: sides from the constants, constants by non-negative least squares on relative
//! errors. No engine beats its data sheet, so it is `x - 1` and `y - 1` that must not be negative. How far compute and
//! memory overlap is chosen among a few blends by the same error. The error is part of the result: a fit without one is
//! an opinion.

use serde::{Deserialize, Serialize};

use super::replica::Replica;
use crate::step::{Efficiencies, Work};

/// What some steps had to do, as seconds on a machine that reaches its data sheet.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Load {
    /// How many such steps; need not be whole.
    pub steps: f64,
    /// Compute of one of them.
    pub compute_s: f64,
    /// Memory traffic of one of them, weights included.
    pub memory_s: f64,
}

/// How long a number of steps took together.
#[derive(Debug, Clone, PartialEq)]
pub struct Observed {
    /// The steps.
    pub loads: Vec<Load>,
    /// Their time in seconds, above 0.
    pub seconds: f64,
}

/// Fitted constants and how well they explain the observations.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Fit {
    /// `eta_c`, `eta_b`, `o`.
    pub efficiencies: Efficiencies,
    /// As in [`Replica::overlap`].
    pub overlap: f64,
    /// How well the fit explains the observations it was made from.
    pub error: FitError,
    /// Observations used.
    pub observations: usize,
}

/// Relative errors of predicted seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct FitError {
    /// Half of the observations are closer than this.
    pub median: f64,
    /// 95 % of the observations are closer than this.
    pub p95: f64,
    /// Mean of predicted / observed, less 1: what the fit is off by on the whole.
    pub bias: f64,
}

/// Fewest observations that give a fit: one for each constant and one that can disagree.
pub const OBSERVATIONS_MIN: usize = 4;

const OVERLAPS: [f64; 5] = [1.0, 0.75, 0.5, 0.25, 0.0];
const ROUNDS: usize = 24;

impl Replica {
    /// What one step with this batch has to do.
    #[must_use]
    pub fn load(&self, batch: &[Work]) -> Load {
        let ideal = self.ideal();
        let demands = batch.iter().map(|&work| ideal.demand(work));
        let tokens = batch.iter().map(|work| f64::from(work.new_tokens)).sum();
        let (compute_s, memory_s) = demands
            .fold((0.0, 0.0), |(compute, memory), demand| (compute + demand.compute_s, memory + demand.memory_s));
        Load { steps: 1.0, compute_s, memory_s: ideal.fixed(tokens).read_once_s() + memory_s }
    }

    /// The same replica if it reached its data sheet.
    #[must_use]
    pub fn ideal(&self) -> Replica {
        Replica { efficiencies: Efficiencies { compute: 1.0, bandwidth: 1.0, overhead_s: 0.0 }, ..*self }
    }

    /// The same replica with fitted constants.
    #[must_use]
    pub fn fitted(&self, fit: &Fit) -> Replica {
        Replica { efficiencies: fit.efficiencies, overlap: fit.overlap, ..*self }
    }
}

impl Fit {
    /// Fits the constants. `None` with fewer than [`OBSERVATIONS_MIN`] usable observations: the data sheet's defaults
    /// then stay in force and say so.
    #[must_use]
    pub fn of(observations: &[Observed]) -> Option<Fit> {
        let usable: Vec<&Observed> = observations.iter().filter(|observed| observed.is_usable()).collect();
        if usable.len() < OBSERVATIONS_MIN {
            return None;
        }
        let fits = OVERLAPS.iter().map(|&overlap| Fit::with_overlap(&usable, overlap));
        fits.min_by(|a, b| (a.error.median + a.error.p95).total_cmp(&(b.error.median + b.error.p95)))
    }

    /// Constants that are in force already, as a fit that was made from nothing.
    #[must_use]
    pub fn in_force(replica: &Replica) -> Fit {
        let Replica { efficiencies, overlap, .. } = *replica;
        Fit { efficiencies, overlap, error: FitError::default(), observations: 0 }
    }

    fn with_overlap(observations: &[&Observed], overlap: f64) -> Fit {
        let start = Efficiencies::default();
        let mut fit =
            Fit { efficiencies: start, overlap, error: FitError::default(), observations: observations.len() };
        let mut best = Fit { error: FitError { median: f64::INFINITY, p95: f64::INFINITY, bias: 0.0 }, ..fit };
        for _ in 0..ROUNDS {
            fit.efficiencies = fit.refined(observations);
            fit.error = fit.error_on(observations.iter().copied());
            if fit.error.median + fit.error.p95 >= best.error.median + best.error.p95 {
                break;
            }
            best = fit;
        }
        best
    }

    /// One round: sides of the roofline by the present constants, then constants by least squares.
    fn refined(&self, observations: &[&Observed]) -> Efficiencies {
        let mut columns = [const { Vec::new() }; 3];
        let mut target = Vec::with_capacity(observations.len());
        for observed in observations {
            let (mut steps, mut compute_s, mut memory_s) = (0.0, 0.0, 0.0);
            for load in &observed.loads {
                let bound_by_compute =
                    load.compute_s / self.efficiencies.compute > load.memory_s / self.efficiencies.bandwidth;
                let (compute, memory) =
                    if bound_by_compute { (1.0, 1.0 - self.overlap) } else { (1.0 - self.overlap, 1.0) };
                steps += load.steps;
                compute_s += load.steps * load.compute_s * compute;
                memory_s += load.steps * load.memory_s * memory;
            }
            // Relative errors, and constants counted from the data sheet's: a 1 ms step matters as a 100 ms step does.
            let scale = 1.0 / observed.seconds;
            for (column, value) in columns.iter_mut().zip([steps, compute_s, memory_s]) {
                column.push(value * scale);
            }
            target.push(1.0 - (compute_s + memory_s) * scale);
        }
        let found = non_negative_least_squares(&columns, &target);
        Efficiencies { overhead_s: found[0], compute: 1.0 / (1.0 + found[1]), bandwidth: 1.0 / (1.0 + found[2]) }
    }

    /// Predicted seconds of these steps.
    #[must_use]
    pub fn predict(&self, loads: &[Load]) -> f64 {
        loads
            .iter()
            .map(|load| {
                let compute_s = load.compute_s / self.efficiencies.compute;
                let memory_s = load.memory_s / self.efficiencies.bandwidth;
                let blend = self.overlap * compute_s.max(memory_s) + (1.0 - self.overlap) * (compute_s + memory_s);
                load.steps * (self.efficiencies.overhead_s + blend)
            })
            .sum()
    }

    /// How well the fit predicts other observations. Zero errors when there are none to judge by.
    #[must_use]
    pub fn error_on<'a>(&self, observations: impl IntoIterator<Item = &'a Observed>) -> FitError {
        let ratios: Vec<f64> = observations
            .into_iter()
            .filter(|observed| observed.is_usable())
            .map(|observed| self.predict(&observed.loads) / observed.seconds - 1.0)
            .collect();
        let mut errors: Vec<f64> = ratios.iter().map(|ratio| ratio.abs()).collect();
        errors.sort_by(f64::total_cmp);
        let count = errors.len();
        let Some(last) = count.checked_sub(1) else { return FitError::default() };
        FitError {
            median: errors[count / 2],
            p95: errors[(count * 95 / 100).min(last)],
            bias: ratios.iter().sum::<f64>() / count as f64,
        }
    }
}

impl Observed {
    fn is_usable(&self) -> bool {
        self.seconds.is_finite() && self.seconds > 0.0 && self.loads.iter().any(|load| load.steps > 0.0)
    }
}

/// The `x >= 0` that makes `|A x - b|` least, for a matrix of a few `columns` (Lawson and Hanson's active set).
///
/// # Panics
/// When a column is shorter than `target`: a bug of ours.
#[must_use]
pub fn non_negative_least_squares(columns: &[Vec<f64>], target: &[f64]) -> Vec<f64> {
    let n = columns.len();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    assert!(columns.iter().all(|column| column.len() == target.len()), "columns and target have one row each");
    // Columns of length one, so that one tolerance and one ridge serve all units.
    let lengths: Vec<f64> = columns.iter().map(|column| dot(column, column).sqrt()).collect();
    let gram: Vec<Vec<f64>> = (0..n)
        .map(|i| {
            (0..n).map(|j| dot(&columns[i], &columns[j]) / (lengths[i] * lengths[j]).max(f64::MIN_POSITIVE)).collect()
        })
        .collect();
    let right: Vec<f64> = (0..n).map(|i| dot(&columns[i], target) / lengths[i].max(f64::MIN_POSITIVE)).collect();
    let tolerance = 1e-10 * dot(target, target).sqrt().max(f64::MIN_POSITIVE);

    let mut x = vec![0.0; n];
    let mut free = vec![false; n];
    // Each round frees one variable; 3 n rounds are the customary bound on the cycles that rounding could cause.
    for _ in 0..3 * n {
        let gradient = |i: usize| right[i] - dot(&gram[i], &x);
        let candidate = (0..n)
            .filter(|&i| !free[i] && lengths[i] > 0.0)
            .max_by(|&a, &b| gradient(a).total_cmp(&gradient(b)))
            .filter(|&i| gradient(i) > tolerance);
        let Some(candidate) = candidate else { break };
        free[candidate] = true;
        loop {
            let trial = solve_free(&gram, &right, &free);
            if (0..n).all(|i| !free[i] || trial[i] > 0.0) {
                x = trial;
                break;
            }
            // Walk towards the trial until the first variable reaches zero, and hold that one there.
            let step = (0..n)
                .filter(|&i| free[i] && trial[i] <= 0.0)
                .map(|i| x[i] / (x[i] - trial[i]).max(f64::MIN_POSITIVE))
                .fold(1.0, f64::min);
            for i in 0..n {
                x[i] += step * (trial[i] - x[i]);
                if free[i] && (x[i] <= 1e-14 || (trial[i] <= 0.0 && x[i] <= 1e-12)) {
                    x[i] = 0.0;
                    free[i] = false;
                }
            }
            if !free.contains(&true) {
                break;
            }
        }
    }
    (0..n).map(|i| if lengths[i] > 0.0 { x[i] / lengths[i] } else { 0.0 }).collect()
}

/// Least squares over the free variables alone, by Cholesky with a ridge so small that only dependent columns feel it.
fn solve_free(gram: &[Vec<f64>], right: &[f64], free: &[bool]) -> Vec<f64> {
    let at: Vec<usize> = (0..free.len()).filter(|&i| free[i]).collect();
    let m = at.len();
    let mut lower = vec![vec![0.0; m]; m];
    for i in 0..m {
        for j in 0..=i {
            let known: f64 = (0..j).map(|k| lower[i][k] * lower[j][k]).sum();
            let entry = gram[at[i]][at[j]] + if i == j { 1e-12 } else { 0.0 } - known;
            lower[i][j] = if i == j { entry.max(1e-12).sqrt() } else { entry / lower[j][j] };
        }
    }
    let mut y = vec![0.0; m];
    for i in 0..m {
        let known: f64 = (0..i).map(|k| lower[i][k] * y[k]).sum();
        y[i] = (right[at[i]] - known) / lower[i][i];
    }
    let mut solution = vec![0.0; free.len()];
    for i in (0..m).rev() {
        let known: f64 = (i + 1..m).map(|k| lower[k][i] * solution[at[k]]).sum();
        solution[at[i]] = (y[i] - known) / lower[i][i];
    }
    solution
}

#[cfg(test)]
#[path = "fit_tests.rs"]
mod tests;
