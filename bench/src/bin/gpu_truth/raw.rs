//! The raw lines: what was measured, and on what.

use ledger::allocate::shape::Model;
use ledger::step::{GpuSheet, ModelShape, Work};
use serde::Deserialize;

use crate::Failure;
use crate::game::Game;

/// All lines of one run.
#[derive(Debug)]
pub struct Raw {
    /// What ran, and on what.
    pub setup: Setup,
    /// The steps of the loop, in their order.
    pub steps: Vec<Measured>,
    /// The batches that were replayed.
    pub games: Vec<Game>,
}

/// One step: what was in it, and how long it took.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// The batch.
    pub batch: Vec<Work>,
    /// Its time in seconds.
    pub seconds: f64,
}

/// The first line.
#[derive(Debug, Deserialize)]
pub struct Setup {
    /// The device as its driver names it.
    pub device: String,
    /// The release of torch.
    pub torch: String,
    /// The type of weights and cache.
    pub dtype: String,
    /// How attention was computed.
    pub attention: String,
    /// The model's dimensions.
    pub model: Dimensions,
    /// What the device reached on one large product and one large copy.
    measured: Peaks,
}

/// The model's dimensions as the script names them.
#[derive(Debug, Deserialize)]
pub struct Dimensions {
    layers: u32,
    hidden: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    /// All parameters but the embedding's.
    pub parameters: f64,
    bytes_per_element: f64,
}

#[derive(Debug, Deserialize)]
struct Peaks {
    flop_per_s: f64,
    bytes_per_s: f64,
}

#[derive(Debug, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum Line {
    Setup(Setup),
    Step { seconds: f64, batch: Vec<(u64, u32, u32)> },
    Game { mix: String, batch: Vec<(u32, u32)>, seconds: Vec<f64> },
}

impl Raw {
    /// # Errors
    /// When a line is none of the three kinds, or the first is not the setup.
    pub fn read(text: &str) -> Result<Raw, Failure> {
        let (mut setup, mut steps, mut games) = (None, Vec::new(), Vec::new());
        for (number, line) in (1..).zip(text.lines()) {
            let work = |(new_tokens, cached_tokens)| Work { new_tokens, cached_tokens };
            match serde_json::from_str(line).map_err(|error| format!("line {number}: {error}"))? {
                Line::Setup(found) => setup = Some(found),
                Line::Step { seconds, batch } => {
                    let batch = batch.into_iter().map(|(_, new, cached)| work((new, cached))).collect();
                    steps.push(Measured { batch, seconds });
                }
                Line::Game { mix, batch, seconds } => {
                    games.push(Game::new(mix, batch.into_iter().map(work).collect(), seconds)?);
                }
            }
        }
        Ok(Raw { setup: setup.ok_or("there is no line of kind setup")?, steps, games })
    }
}

impl Setup {
    /// The model as the step-time model sees it.
    #[must_use]
    pub fn model(&self) -> Model {
        let Dimensions { layers, hidden, heads, kv_heads, head_dim, parameters, bytes_per_element } = self.model;
        ModelShape {
            layers,
            hidden,
            heads,
            kv_heads,
            head_dim,
            active_parameters: parameters,
            total_parameters: parameters,
            bytes_per_element,
        }
        .into()
    }

    /// Its data sheet, or what it reached when it has none here.
    #[must_use]
    pub fn gpu(&self) -> GpuSheet {
        GpuSheet::recognised(&self.device).copied().unwrap_or(GpuSheet {
            source: "none here; a large product and a large copy on the device itself",
            ..GpuSheet::custom(&self.device, self.measured.flop_per_s, self.measured.bytes_per_s, 0.0)
        })
    }
}
