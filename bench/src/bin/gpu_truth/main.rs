//! Judges the step-time model and the shares by what `bench/gpu/ground_truth.py` measured on an accelerator.
//!
//! ```text
//! cargo run -p bench --bin gpu_truth -- raw.jsonl [--out summary.json]
//! ```
//!
//! The model is fitted to every other step of the continuous-batching loop and judged on the steps in between. Each game holds
//! the measured time of every sub-batch, so Shapley's value follows from its definition and from no model; the shares of the
//! fitted model, scaled to the measured step, are held against it, and so are flat tokens, weighted tokens and equal parts.

mod game;
mod raw;

use std::error::Error;
use std::io::Write;
use std::path::PathBuf;

use bench::text::table;
use clap::Parser;
use ledger::allocate::fit::{Fit, FitError, Observed};
use ledger::allocate::replica::Replica;
use serde_json::{Value, json};

use crate::game::{METHODS, Misallocation};
use crate::raw::{Measured, Raw};

type Failure = Box<dyn Error + Send + Sync>;

/// The goals of `docs/attribution.md`: held-out error at the median and at the 95th percentile.
const GOALS: (f64, f64) = (0.05, 0.15);

#[derive(Debug, Parser)]
#[command(about = "Judges fit and shares by measured steps and measured sub-batches")]
struct Arguments {
    /// What ground_truth.py wrote.
    raw: PathBuf,
    /// Where the summary goes as JSON.
    #[arg(long)]
    out: Option<PathBuf>,
}

fn main() -> Result<(), Failure> {
    let arguments = Arguments::parse();
    let raw = Raw::read(&std::fs::read_to_string(&arguments.raw)?)?;
    let judged = judge(&raw)?;
    if let Some(out) = &arguments.out {
        std::fs::write(out, format!("{:#}\n", judged.json(&raw)))?;
    }
    Ok(std::io::stdout().lock().write_all(judged.text(&raw).as_bytes())?)
}

/// What the measurements say of the model.
struct Judged {
    fit: Fit,
    held_out: FitError,
    /// Held-out errors of steps that only decode, and of those that prefill too.
    by_kind: [(&'static str, usize, FitError); 2],
    misallocation: Vec<(String, Vec<Misallocation>)>,
}

fn judge(raw: &Raw) -> Result<Judged, Failure> {
    let sheet = Replica::unfitted(raw.setup.model(), raw.setup.gpu(), 1);
    let observed = |step: &&Measured| Observed { loads: vec![sheet.load(&step.batch)], seconds: step.seconds };
    let (fitted, held): (Vec<_>, Vec<_>) = raw.steps.iter().enumerate().partition(|(index, _)| index % 2 == 0);
    let [fitted, held] = [fitted, held].map(|half| half.into_iter().map(|(_, step)| step).collect::<Vec<&Measured>>());
    let fit = Fit::of(&fitted.iter().map(observed).collect::<Vec<_>>()).ok_or("too few steps to fit the model")?;
    let error_on = |steps: &[&Measured]| fit.error_on(&steps.iter().map(observed).collect::<Vec<_>>());
    let (decoding, mixed): (Vec<&Measured>, Vec<&Measured>) =
        held.iter().partition(|step| step.batch.iter().all(|work| work.new_tokens == 1));
    let replica = sheet.fitted(&fit);
    let mut misallocation: Vec<(String, Vec<Misallocation>)> = Vec::new();
    for game in &raw.games {
        let of = game.judged(&replica)?;
        match misallocation.iter_mut().find(|(mix, _)| *mix == game.mix) {
            Some((_, games)) => games.push(of),
            None => misallocation.push((game.mix.clone(), vec![of])),
        }
    }
    Ok(Judged {
        fit,
        held_out: error_on(&held),
        by_kind: [
            ("only decoding", decoding.len(), error_on(&decoding)),
            ("with prefills", mixed.len(), error_on(&mixed)),
        ],
        misallocation,
    })
}

impl Judged {
    fn text(&self, raw: &Raw) -> String {
        let setup = &raw.setup;
        let Fit { efficiencies, overlap, observations, error } = self.fit;
        let mut text = format!(
            "{}, {}, {:.2} billion parameters, attention {}; the sheet: {}\n\n\
             fitted to {observations} steps: eta_c {:.3}, eta_b {:.3}, o {:.3} ms, overlap {overlap}; error there: {}\n\
             held out, {} steps: {} (goal {} and {})\n",
            setup.device,
            setup.dtype,
            setup.model.parameters / 1e9,
            setup.attention,
            setup.gpu().source,
            efficiencies.compute,
            efficiencies.bandwidth,
            efficiencies.overhead_s * 1e3,
            errors(&error),
            raw.steps.len() / 2,
            errors(&self.held_out),
            percent(GOALS.0),
            percent(GOALS.1),
        );
        for (kind, steps, error) in &self.by_kind {
            text += &format!("  {kind}, {steps} steps: {}\n", errors(error));
        }
        let rows: Vec<Vec<String>> = self
            .misallocation
            .iter()
            .map(|(mix, games)| {
                let mut row = vec![mix.clone(), games.len().to_string()];
                row.extend((0..METHODS.len()).map(|at| {
                    let (mean, worst) = mean_and_worst(games, at);
                    format!("{}, {}", percent(mean), percent(worst))
                }));
                row
            })
            .collect();
        let headers: Vec<&str> = ["batches", "number"].into_iter().chain(METHODS).collect();
        text + "\nmisallocation against Shapley's value of the measured sub-batches, mean and worst:\n\n"
            + &table(&headers, &rows)
    }

    fn json(&self, raw: &Raw) -> Value {
        let error = |error: &FitError| json!({"median": error.median, "p95": error.p95, "bias": error.bias});
        let mixes: Vec<Value> = self
            .misallocation
            .iter()
            .map(|(mix, games)| {
                let methods = METHODS.iter().enumerate().map(|(at, method)| {
                    let (mean, worst) = mean_and_worst(games, at);
                    ((*method).to_owned(), json!({"mean": mean, "worst": worst}))
                });
                json!({"mix": mix, "games": games.len(), "misallocation": methods.collect::<serde_json::Map<_, _>>()})
            })
            .collect();
        let efficiencies = self.fit.efficiencies;
        json!({
            "device": raw.setup.device, "dtype": raw.setup.dtype, "attention": raw.setup.attention,
            "torch": raw.setup.torch, "sheet": raw.setup.gpu().source,
            "steps": raw.steps.len(), "games": raw.games.len(),
            "fit": {
                "compute": efficiencies.compute, "bandwidth": efficiencies.bandwidth,
                "overhead_s": efficiencies.overhead_s, "overlap": self.fit.overlap, "error": error(&self.fit.error),
            },
            "held_out": error(&self.held_out),
            "held_out_by_kind": self.by_kind.iter().map(|(kind, steps, of)| {
                json!({"kind": kind, "steps": steps, "error": error(of)})
            }).collect::<Vec<_>>(),
            "mixes": mixes,
        })
    }
}

fn mean_and_worst(games: &[Misallocation], method: usize) -> (f64, f64) {
    let of: Vec<f64> = games.iter().map(|game| game.0[method]).collect();
    (of.iter().sum::<f64>() / of.len().max(1) as f64, of.iter().copied().fold(0.0, f64::max))
}

fn errors(error: &FitError) -> String {
    format!("median {}, 95th percentile {}, bias {}", percent(error.median), percent(error.p95), percent(error.bias))
}

fn percent(part: f64) -> String {
    format!("{:.1} %", part * 100.0)
}
