//! What no plan can beat, whoever makes it.

/// A lower bound of what a plan costs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bound {
    /// Replica-minutes, starts included.
    pub replica_minutes: f64,
    /// Part of the requests that may be in overloaded minutes.
    pub overload_share: f64,
}

/// Times that the price of a missed request is halved in on.
const ROUNDS: usize = 60;

/// The least that any plan pays which holds its replicas for whole minutes, starts each a cold start before it serves, and lets at most
/// `overload_share` of the requests arrive in minutes whose load is above the replicas that serve.
///
/// With no overload allowed it is exact. Otherwise it is the Lagrangian dual: `max over price p >= 0 of
/// min over plans of (cost + p · (missed - allowed))`, the inner minimum by dynamic programming over minutes and replicas; by weak duality no
/// plan that keeps to the share costs less. What replicas cost while they drain is left out, which only lowers it.
#[must_use]
pub fn bound(load: &[f32], requests: &[u32], cold_start_minutes: u32, overload_share: f64) -> Bound {
    let needs: Vec<usize> = load.iter().map(|&load| replicas(load)).collect();
    let total: f64 = requests.iter().copied().map(f64::from).sum();
    let shares: Vec<f64> = requests.iter().map(|&requests| f64::from(requests) / total.max(1.0)).collect();
    let cold_start = f64::from(cold_start_minutes);
    // A price at which no miss pays: every miss would cost more than holding the most for the whole time.
    let most = needs.iter().copied().max().unwrap_or(0) as f64;
    let smallest = shares.iter().copied().filter(|&share| share > 0.0).fold(1.0, f64::min);
    let (mut low, mut high) = (0.0, (most + 1.0) * (needs.len() as f64 + cold_start) / smallest);
    let mut best = dual(&needs, &shares, cold_start, high, overload_share).0;
    if overload_share > 0.0 {
        for _ in 0..ROUNDS {
            // Prices span many orders of magnitude.
            let price = (f64::max(low, 1e-3) * high).sqrt();
            let (value, missed) = dual(&needs, &shares, cold_start, price, overload_share);
            best = best.max(value);
            if missed > overload_share { low = price } else { high = price }
        }
        // With every request allowed to be missed nothing need be there.
        best = best.max(0.0);
    }
    Bound { replica_minutes: best, overload_share }
}

/// The dual's value at a price, and what the plan that it belongs to misses.
fn dual(needs: &[usize], shares: &[f64], cold_start: f64, price: f64, allowed: f64) -> (f64, f64) {
    let most = needs.iter().copied().max().unwrap_or(0);
    // Cost and miss from here to the end, by replicas that serve in the minute before.
    let mut ahead = vec![(0.0_f64, 0.0_f64); most + 1];
    for (&need, &share) in needs.iter().zip(shares).rev() {
        let mut here: Vec<(f64, f64)> = ahead
            .iter()
            .enumerate()
            .map(|(replicas, &(cost, missed))| {
                let miss = if replicas < need { share } else { 0.0 };
                (cost + replicas as f64 + price * miss, missed + miss)
            })
            .collect();
        // Fewer are free to have, one more costs its start.
        for replicas in 1..=most {
            if here[replicas - 1].0 < here[replicas].0 {
                here[replicas] = here[replicas - 1];
            }
        }
        for replicas in (0..most).rev() {
            if here[replicas + 1].0 + cold_start < here[replicas].0 {
                here[replicas] = (here[replicas + 1].0 + cold_start, here[replicas + 1].1);
            }
        }
        ahead = here;
    }
    let best = ahead.into_iter().min_by(|a, b| a.0.total_cmp(&b.0)).unwrap_or_default();
    (best.0 - price * allowed, best.1)
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float saturates at the integer's ends, and NaN becomes zero"
)]
fn replicas(load: f32) -> usize {
    (f64::from(load) - 1e-6).ceil() as usize
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(load: &[f32], cold_start: u32, replica_minutes: f64) {
        let requests = vec![1; load.len()];
        assert_eq!(bound(load, &requests, cold_start, 0.0).replica_minutes, replica_minutes, "{load:?}");
    }

    #[test]
    fn gaps_are_bridged_up_to_a_cold_start() {
        check(&[2.0, 2.0, 2.0], 5, 6.0);
        // Being there from the beginning is free to start, being started later is not.
        check(&[1.0, 2.0, 1.0], 5, 5.0);
        check(&[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0], 5, 9.0 + 5.0);
        // A gap of two minutes is held through, one of seven is not.
        check(&[2.0, 1.0, 1.0, 2.0], 5, 8.0);
        check(&[2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0], 5, 9.0 + 2.0 + 5.0);
        check(&[], 5, 0.0);
    }

    /// The cheapest of all plans, tried one by one.
    fn brute(load: &[f32], requests: &[u32], cold_start: u32, share: f64) -> f64 {
        let most = load.iter().copied().map(replicas).max().unwrap_or(0);
        let total: u32 = requests.iter().sum();
        let plans = (most + 1).pow(u32::try_from(load.len()).unwrap());
        (0..plans)
            .filter_map(|plan| {
                let mut rest = plan;
                let (mut cost, mut missed, mut before) = (0.0, 0, None);
                for (&load, &requests) in load.iter().zip(requests) {
                    let here = rest % (most + 1);
                    rest /= most + 1;
                    let started = here.saturating_sub(before.unwrap_or(here));
                    cost += (here + started * cold_start as usize) as f64;
                    missed += if here < replicas(load) { requests } else { 0 };
                    before = Some(here);
                }
                (f64::from(missed) <= share * f64::from(total) + 1e-9).then_some(cost)
            })
            .fold(f64::INFINITY, f64::min)
    }

    proptest! {
        #[test]
        fn no_plan_is_cheaper(
            minutes in prop::collection::vec((0.0_f32..3.0, 1_u32..9), 1..7),
            cold_start in 0_u32..4,
            share in 0.0_f64..0.5,
        ) {
            let (load, requests): (Vec<f32>, Vec<u32>) = minutes.into_iter().unzip();
            let exact = bound(&load, &requests, cold_start, 0.0).replica_minutes;
            prop_assert!((exact - brute(&load, &requests, cold_start, 0.0)).abs() < 1e-6);
            let some = bound(&load, &requests, cold_start, share).replica_minutes;
            prop_assert!(some <= brute(&load, &requests, cold_start, share) + 1e-6);
            prop_assert!(some <= exact + 1e-6);
        }
    }
}
