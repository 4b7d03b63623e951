//! One batch with the measured time of every sub-batch: Shapley's value from its definition, and how far the rules are from it.

use ledger::allocate::replica::{Demand, Replica};
use ledger::allocate::share::{Share, diagonal, smoothed};
use ledger::step::Work;

use crate::Failure;

/// The rules that are judged, in the order of [`Misallocation`].
pub const METHODS: [&str; 5] = ["smoothed (tier A)", "diagonal", "equal parts", "tokens 1:2", "flat tokens"];

/// The part of the step that each of [`METHODS`] charges to another request than Shapley's value does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Misallocation(pub [f64; 5]);

/// A batch that was replayed in all its sub-batches.
#[derive(Debug, Clone, PartialEq)]
pub struct Game {
    /// What kind of batch.
    pub mix: String,
    batch: Vec<Work>,
    /// Seconds by the bit mask of who is there; the empty batch takes none.
    values: Vec<f64>,
}

impl Game {
    /// # Errors
    /// When there is not one positive time for each sub-batch.
    pub fn new(mix: String, batch: Vec<Work>, seconds: Vec<f64>) -> Result<Game, Failure> {
        let complete = batch.len() < 20 && seconds.len() + 1 == 1 << batch.len();
        if !complete || !seconds.iter().all(|&seconds| seconds > 0.0) {
            return Err(format!("{} requests have {} times of sub-batches", batch.len(), seconds.len()).into());
        }
        let values = std::iter::once(0.0).chain(seconds).collect();
        Ok(Game { mix, batch, values })
    }

    /// Shapley's value: what each request adds, averaged over all orders of joining.
    #[must_use]
    pub fn exact(&self) -> Vec<f64> {
        let n = self.batch.len();
        let mut factorial = vec![1.0f64; n + 1];
        for k in 1..=n {
            factorial[k] = factorial[k - 1] * k as f64;
        }
        (0..n)
            .map(|own| {
                (0..self.values.len())
                    .filter(|set| set >> own & 1 == 0)
                    .map(|set| {
                        let before = set.count_ones() as usize;
                        let orders = factorial[before] * factorial[n - before - 1] / factorial[n];
                        orders * (self.values[set | 1 << own] - self.values[set])
                    })
                    .sum()
            })
            .collect()
    }

    /// How far each rule is from [`exact`](Game::exact), with the model's shares scaled to the measured step as tier A does.
    ///
    /// # Errors
    /// When the batch is empty.
    pub fn judged(&self, replica: &Replica) -> Result<Misallocation, Failure> {
        let step_s = *self.values.last().filter(|&&seconds| seconds > 0.0).ok_or("a game without requests")?;
        let demands: Vec<Demand> = self.batch.iter().map(|&work| replica.demand(work)).collect();
        let fixed = replica.fixed(self.batch.iter().map(|work| f64::from(work.new_tokens)).sum());
        let exact = self.exact();
        let off = |weights: Vec<f64>| {
            let all: f64 = weights.iter().sum();
            let moved = weights.iter().zip(&exact).map(|(weight, exact)| (step_s * weight / all - exact).abs());
            moved.sum::<f64>() / 2.0 / step_s
        };
        let totals = |shares: Vec<Share>| shares.iter().map(Share::total_s).collect::<Vec<f64>>();
        let by = |weight: &dyn Fn(&Work) -> f64| self.batch.iter().map(weight).collect::<Vec<f64>>();
        // A request that adds one token is decoding, all others compute their input.
        let twice = |work: &Work| if work.new_tokens == 1 { 2.0 } else { f64::from(work.new_tokens) };
        Ok(Misallocation([
            off(totals(smoothed(fixed, &demands))),
            off(totals(diagonal(fixed, &demands))),
            off(by(&|_| 1.0)),
            off(by(&twice)),
            off(by(&|work| f64::from(work.new_tokens))),
        ]))
    }
}

#[cfg(test)]
mod tests {
    use ledger::step::{GpuSheet, ModelShape};

    use super::*;

    fn replica() -> Replica {
        Replica::unfitted(ModelShape::LLAMA_3_1_8B.into(), GpuSheet::H100, 1)
    }

    /// A game whose times are the model's own.
    fn modelled(batch: Vec<Work>) -> Game {
        let present = |set: usize| -> Vec<Work> {
            (0..batch.len()).filter(|bit| set >> bit & 1 == 1).map(|bit| batch[bit]).collect()
        };
        let seconds = (1..1 << batch.len()).map(|set| replica().step_s(&present(set))).collect();
        Game::new("modelled".to_owned(), batch, seconds).unwrap()
    }

    #[test]
    fn the_value_of_a_game_that_follows_the_model_is_what_the_model_shares() {
        let decode = |cached_tokens| Work { new_tokens: 1, cached_tokens };
        let game = modelled(vec![decode(100), decode(5_000), decode(9_000), decode(400)]);
        let paid: f64 = game.exact().iter().sum();
        assert!((paid - game.values[15]).abs() < 1e-12);
        let Misallocation([smoothed, diagonal, equal, _, flat]) = game.judged(&replica()).unwrap();
        assert!(smoothed < 1e-9 && diagonal < 1e-9, "memory-bound decoding is linear: {smoothed}, {diagonal}");
        assert!(equal > 1e-3 && (equal - flat).abs() < 1e-12);
    }

    #[test]
    fn a_prefill_pays_for_itself_and_flat_tokens_overcharge_nobody_else() {
        let mut batch = vec![Work { new_tokens: 1, cached_tokens: 2_000 }; 5];
        batch.push(Work { new_tokens: 1_500, cached_tokens: 0 });
        let Misallocation([smoothed, _, equal, _, _]) = modelled(batch).judged(&replica()).unwrap();
        assert!(smoothed < 0.01 && equal > 0.2, "{smoothed}, {equal}");
    }

    #[test]
    fn a_game_with_a_time_too_few_is_refused() {
        let batch = vec![Work { new_tokens: 1, cached_tokens: 10 }; 3];
        assert!(Game::new(String::new(), batch, vec![0.01; 6]).is_err());
    }
}
