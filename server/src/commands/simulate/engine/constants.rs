//! The simulated engine from files and names: the model's configuration, the GPU's data sheet, fitted constants.

use std::path::Path;

use anyhow::{Context as _, bail};
use fleet::sim::engine::{Constants, Limits, Spec};
use ledger::allocate::replica::{Experts, Replica};
use ledger::allocate::shape::Model;
use ledger::step::{Efficiencies, GpuSheet};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::nearest;

/// Weights of another width than the model's configuration says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Dtype {
    /// 16 bits.
    #[value(alias = "bfloat16")]
    Bf16,
    /// 16 bits.
    #[value(alias = "float16", alias = "half")]
    Fp16,
    /// 8 bits; computed at twice the rate where the GPU can.
    Fp8,
    /// 8 bits; computed at twice the rate.
    Int8,
    /// 4 bits, computed in 16.
    Int4,
}

impl Dtype {
    const fn bytes(self) -> f64 {
        match self {
            Dtype::Bf16 | Dtype::Fp16 => 2.0,
            Dtype::Fp8 | Dtype::Int8 => 1.0,
            Dtype::Int4 => 0.5,
        }
    }

    /// How many times the 16-bit rate such weights are multiplied at.
    fn faster(self, gpu: &GpuSheet) -> f64 {
        match self {
            Dtype::Int8 => 2.0,
            Dtype::Fp8 if gpu.name != GpuSheet::A100.name => 2.0,
            _ => 1.0,
        }
    }
}

/// An engine with vLLM's default settings. With a calibration its constants are in force, else the documented defaults.
///
/// # Errors
/// One line on what is wrong with a file or a name.
pub fn spec(config: &Path, gpu: &str, gpus: u32, calibration: Option<&Path>) -> anyhow::Result<Spec> {
    spec_of(config, gpu, gpus, None, calibration)
}

/// The same with weights of another width.
///
/// # Errors
/// As [`spec`].
pub fn spec_of(
    config: &Path,
    gpu: &str,
    gpus: u32,
    dtype: Option<Dtype>,
    calibration: Option<&Path>,
) -> anyhow::Result<Spec> {
    let file = config.display();
    let text = std::fs::read_to_string(config).with_context(|| format!("cannot read {file}"))?;
    let mut model = Model::from_config(&text).with_context(|| format!("{file}"))?;
    let mut gpu = sheet(gpu)?;
    if let Some(dtype) = dtype {
        model = with_weights(model, dtype.bytes());
        gpu.flop_per_s *= dtype.faster(&gpu);
    }
    let replica = Replica::unfitted(model, gpu, gpus);
    if replica.kv_capacity_tokens(Limits::of_gpu(&gpu).memory_share) < 1.0 {
        bail!(
            "{file}: weights of {:.1} GB leave no room for a KV cache on {gpus} {} with {:.0} GB each; give more --gpus, \
             or smaller weights by --dtype",
            model.weight_bytes / 1e9,
            gpu.name,
            gpu.memory_bytes / 1e9
        );
    }
    let constants = Constants::unfitted(replica);
    let constants = match calibration {
        Some(file) => read(file)?.applied(&constants),
        None => constants,
    };
    Ok(Spec::new(constants))
}

fn sheet(name: &str) -> anyhow::Result<GpuSheet> {
    let names = GpuSheet::ALL.map(|sheet| sheet.name);
    let Some(gpu) = GpuSheet::recognised(name) else {
        let upper = name.to_ascii_uppercase();
        let hint = nearest(&upper, names).map_or(String::new(), |near| format!("did you mean `{near}`? "));
        bail!("there is no data sheet for the GPU `{name}`; {hint}Known are {}", names.join(", "));
    };
    Ok(*gpu)
}

fn with_weights(model: Model, bytes: f64) -> Model {
    let factor = model.shape.total_parameters * bytes / model.weight_bytes;
    let experts = model.experts.map(|experts| Experts { bytes: experts.bytes * factor, ..experts });
    Model { weight_bytes: model.weight_bytes * factor, experts, ..model }
}

/// Constants as they are written down. Those of `farthing allocate --json` are read too: they know no time per request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Written {
    /// Share of the peak FLOP/s.
    #[serde(alias = "eta_c")]
    pub compute: f64,
    /// Share of the peak bandwidth.
    #[serde(alias = "eta_b")]
    pub bandwidth: f64,
    /// Launch and scheduling of a step, seconds.
    pub overhead_s: f64,
    /// How far compute and memory traffic hide behind one another, 0 to 1.
    pub overlap: f64,
    /// Processor time for each request in a step, seconds.
    #[serde(default)]
    pub sequence_s: f64,
    /// Time of a request outside of all steps, seconds.
    #[serde(default = "usual_request_s")]
    pub request_s: f64,
    /// What they were fitted to.
    #[serde(skip_deserializing, skip_serializing_if = "Option::is_none")]
    pub fitted: Option<Fitted>,
}

/// What constants were fitted to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Fitted {
    /// The GPU's data sheet.
    pub gpu: String,
    /// GPUs of the replica.
    pub gpus: u32,
    /// Requests or benchmark points that were compared.
    pub observations: usize,
    /// The file's name.
    pub from: String,
    /// What is left of the error, a weighted sum of squares.
    pub loss: f64,
}

fn usual_request_s() -> f64 {
    Constants::REQUEST_S
}

impl Written {
    /// The same constants, to be written down.
    #[must_use]
    pub fn of(constants: &Constants, fitted: Option<Fitted>) -> Written {
        let Efficiencies { compute, bandwidth, overhead_s } = constants.replica.efficiencies;
        let Constants { sequence_s, request_s, .. } = *constants;
        Written { compute, bandwidth, overhead_s, overlap: constants.replica.overlap, sequence_s, request_s, fitted }
    }

    /// These constants on a model and GPU.
    #[must_use]
    pub fn applied(&self, to: &Constants) -> Constants {
        let Written { compute, bandwidth, overhead_s, overlap, sequence_s, request_s, .. } = *self;
        let efficiencies = Efficiencies { compute, bandwidth, overhead_s };
        Constants { replica: Replica { efficiencies, overlap, ..to.replica }, sequence_s, request_s, ..*to }
    }

    /// The first value that cannot be.
    fn wrong(&self) -> Option<String> {
        let Written { compute, bandwidth, overhead_s, overlap, sequence_s, request_s, .. } = *self;
        let shares = [("compute", compute), ("bandwidth", bandwidth)];
        let share = shares.iter().find(|(_, share)| !(*share > 0.0 && *share <= 1.0));
        let times = [("overhead_s", overhead_s), ("sequence_s", sequence_s), ("request_s", request_s)];
        let time = times.iter().find(|(_, time)| !(*time >= 0.0 && time.is_finite()));
        share
            .map(|(name, share)| format!("`{name}` is {share}; it has to be above 0 and at most 1"))
            .or(time.map(|(name, time)| format!("`{name}` is {time}; it has to be seconds, 0 or more")))
            .or((!(0.0..=1.0).contains(&overlap)).then(|| format!("`overlap` is {overlap}; it has to be 0 to 1")))
    }
}

/// Reads constants.
///
/// # Errors
/// When the file is none or holds what cannot be.
pub fn read(file: &Path) -> anyhow::Result<Written> {
    let shown = file.display();
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {shown}"))?;
    let json: Value = serde_json::from_str(&text).with_context(|| format!("{shown} is not JSON"))?;
    let constants = json.get("constants").cloned().unwrap_or(json);
    let written: Written = serde_json::from_value(constants).with_context(|| {
        format!("{shown} holds no constants; --write-calibration and `farthing allocate --json` write them")
    })?;
    if let Some(wrong) = written.wrong() {
        bail!("{shown}: {wrong}");
    }
    Ok(written)
}

/// Writes constants.
///
/// # Errors
/// When the file cannot be written.
pub fn write(file: &Path, constants: &Written) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(constants)? + "\n";
    std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_are_read_as_they_are_written_and_as_allocate_prints_them() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("constants.json");
        let model = Model::from(ledger::step::ModelShape::LLAMA_3_1_8B);
        let constants = Constants::unfitted(Replica::unfitted(model, GpuSheet::H100, 1));
        let written = Written::of(&constants, None);
        write(&file, &written).unwrap();
        assert_eq!(read(&file).unwrap().applied(&constants), constants);

        let printed =
            r#"{"constants": {"fitted": true, "eta_c": 0.6, "eta_b": 0.7, "overhead_s": 0.001, "overlap": 0.5}}"#;
        std::fs::write(&file, printed).unwrap();
        let applied = read(&file).unwrap().applied(&constants);
        assert_eq!(
            (applied.replica.efficiencies.compute, applied.replica.overlap, applied.sequence_s),
            (0.6, 0.5, 0.0)
        );

        std::fs::write(&file, printed.replace("0.6", "1.6")).unwrap();
        assert!(read(&file).unwrap_err().to_string().contains("`compute` is 1.6"));
    }

    #[test]
    fn other_weights_are_smaller_and_faster() {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("config.json");
        std::fs::write(&config, include_str!("../../../../tests/fixtures/llama-3.1-8b.json")).unwrap();
        let of = |dtype| spec_of(&config, "H100", 1, dtype, None).unwrap().constants.replica;
        let (sheet, fp8) = (of(None), of(Some(Dtype::Fp8)));
        assert!((sheet.model.weight_bytes / fp8.model.weight_bytes - 2.0).abs() < 1e-9);
        assert_eq!(fp8.gpu.flop_per_s, 2.0 * sheet.gpu.flop_per_s);
        assert_eq!(fp8.model.shape, sheet.model.shape, "the cache stays as wide");
        assert_eq!(of(Some(Dtype::Bf16)), sheet);
        assert!(spec(&config, "H10", 1, None).unwrap_err().to_string().contains("did you mean `H100`?"));
    }
}
