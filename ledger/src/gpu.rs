//! What GPUs can do at best, by their data sheets.

use std::collections::BTreeSet;
use std::sync::Mutex;

use serde::{Deserialize, Deserializer, Serialize};

/// What one GPU can do at best, by its vendor's data sheet.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct GpuSheet {
    /// The name that capacity facts use.
    pub name: &'static str,
    /// Dense bf16 tensor throughput in FLOP/s, without sparsity.
    pub flop_per_s: f64,
    /// Memory bandwidth in bytes/s.
    pub bytes_per_s: f64,
    /// Memory in bytes, decimal as the data sheets count.
    pub memory_bytes: f64,
    /// Where the numbers are from.
    pub source: &'static str,
}

impl GpuSheet {
    /// NVIDIA L4.
    pub const L4: GpuSheet = GpuSheet {
        name: "L4",
        flop_per_s: 121e12,
        bytes_per_s: 300e9,
        memory_bytes: 24e9,
        source: "NVIDIA L4 Tensor Core GPU data sheet (bf16 242 TFLOPS with sparsity, half of it dense)",
    };
    /// NVIDIA L40S.
    pub const L40S: GpuSheet = GpuSheet {
        name: "L40S",
        flop_per_s: 362.05e12,
        bytes_per_s: 864e9,
        memory_bytes: 48e9,
        source: "NVIDIA L40S data sheet (bf16 362.05 TFLOPS dense, 733 with sparsity)",
    };
    /// NVIDIA A100 80 GB, SXM.
    pub const A100: GpuSheet = GpuSheet {
        name: "A100",
        flop_per_s: 312e12,
        bytes_per_s: 2.039e12,
        memory_bytes: 80e9,
        source: "NVIDIA A100 Tensor Core GPU data sheet, 80GB SXM (bf16 312 TFLOPS dense, 624 with sparsity)",
    };
    /// NVIDIA H100 80 GB, SXM.
    pub const H100: GpuSheet = GpuSheet {
        name: "H100",
        flop_per_s: 989e12,
        bytes_per_s: 3.35e12,
        memory_bytes: 80e9,
        source: "NVIDIA H100 Tensor Core GPU data sheet, SXM (bf16 1,979 TFLOPS with sparsity, half of it dense)",
    };
    /// NVIDIA H200 141 GB, SXM.
    pub const H200: GpuSheet = GpuSheet {
        name: "H200",
        flop_per_s: 989e12,
        bytes_per_s: 4.8e12,
        memory_bytes: 141e9,
        source: "NVIDIA H200 Tensor Core GPU data sheet, SXM (bf16 1,979 TFLOPS with sparsity, half of it dense)",
    };
    /// AMD Instinct MI300X.
    pub const MI300X: GpuSheet = GpuSheet {
        name: "MI300X",
        flop_per_s: 1307.4e12,
        bytes_per_s: 5.3e12,
        memory_bytes: 192e9,
        source: "AMD Instinct MI300X data sheet (bf16 1,307.4 TFLOPS dense)",
    };

    /// NVIDIA A10.
    pub const A10: GpuSheet = GpuSheet {
        name: "A10",
        flop_per_s: 125e12,
        bytes_per_s: 600e9,
        memory_bytes: 24e9,
        source: "NVIDIA A10 Tensor Core GPU data sheet (bf16 125 TFLOPS dense, 250 with sparsity)",
    };
    /// NVIDIA B200, SXM.
    pub const B200: GpuSheet = GpuSheet {
        name: "B200",
        flop_per_s: 2.25e15,
        bytes_per_s: 8e12,
        memory_bytes: 180e9,
        source: "NVIDIA DGX B200 data sheet, one GPU of eight (bf16 4.5 PFLOPS with sparsity, half of it dense)",
    };
    /// NVIDIA GeForce RTX 4090.
    pub const RTX_4090: GpuSheet = GpuSheet {
        name: "RTX 4090",
        flop_per_s: 165.2e12,
        bytes_per_s: 1.008e12,
        memory_bytes: 24e9,
        source: "NVIDIA Ada GPU Architecture white paper, appendix A (bf16 with fp32 accumulate: 165.2 TFLOPS dense, 330.4 with sparsity)",
    };
    /// NVIDIA RTX PRO 6000 Blackwell, Server Edition.
    pub const RTX_PRO_6000: GpuSheet = GpuSheet {
        name: "RTX PRO 6000",
        flop_per_s: 468e12,
        bytes_per_s: 1.597e12,
        memory_bytes: 96e9,
        source: "NVIDIA RTX PRO 6000 Blackwell Server Edition data sheet (fp32 117 TFLOPS; bf16 dense is four times that on this chip)",
    };

    /// Every sheet.
    pub const ALL: [GpuSheet; 10] = [
        GpuSheet::L4,
        GpuSheet::L40S,
        GpuSheet::A10,
        GpuSheet::A100,
        GpuSheet::H100,
        GpuSheet::H200,
        GpuSheet::B200,
        GpuSheet::RTX_4090,
        GpuSheet::RTX_PRO_6000,
        GpuSheet::MI300X,
    ];

    /// The sheet with this name, whatever its case.
    #[must_use]
    pub fn named(name: &str) -> Option<&'static GpuSheet> {
        const ALL: &[GpuSheet] = &GpuSheet::ALL;
        ALL.iter().find(|sheet| sheet.name.eq_ignore_ascii_case(name))
    }

    /// The sheet of a device as drivers and exporters name it (`NVIDIA H100 80GB HBM3`, `NVIDIA GeForce RTX 4090`,
    /// `NVIDIA A100-SXM4-80GB`): the longest sheet name whose words stand in it one after the other.
    #[must_use]
    pub fn recognised(device: &str) -> Option<&'static GpuSheet> {
        const ALL: &[GpuSheet] = &GpuSheet::ALL;
        let words = |text: &str| -> Vec<String> {
            text.split(|letter: char| !letter.is_ascii_alphanumeric())
                .filter(|word| !word.is_empty())
                .map(str::to_ascii_uppercase)
                .collect()
        };
        let device = words(device);
        ALL.iter()
            .filter(|sheet| {
                let name = words(sheet.name);
                device.windows(name.len()).any(|stretch| stretch == name)
            })
            .max_by_key(|sheet| sheet.name.len())
    }
}

impl GpuSheet {
    /// A device that is in no sheet here, with the numbers that its owner gives: FLOP/s of dense bf16, bytes/s, bytes.
    #[must_use]
    pub fn custom(name: &str, flop_per_s: f64, bytes_per_s: f64, memory_bytes: f64) -> GpuSheet {
        GpuSheet { name: kept(name), flop_per_s, bytes_per_s, memory_bytes, source: "configuration" }
    }
}

/// A sheet as it is written down; a name that is known here takes the numbers that were written all the same, so that
/// old postings can be explained after a sheet was corrected.
#[derive(Deserialize)]
struct Written {
    name: String,
    flop_per_s: f64,
    bytes_per_s: f64,
    memory_bytes: f64,
    source: String,
}

// By hand, because the derive would ask for text that lives as long as the process.
impl<'de> Deserialize<'de> for GpuSheet {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<GpuSheet, D::Error> {
        let Written { name, flop_per_s, bytes_per_s, memory_bytes, source } = Written::deserialize(from)?;
        Ok(GpuSheet { name: kept(&name), flop_per_s, bytes_per_s, memory_bytes, source: kept(&source) })
    }
}

/// The same text for as long as the process lives, kept once: sheets are copied everywhere and there are few of them.
fn kept(text: &str) -> &'static str {
    static KEPT: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
    let mut texts = KEPT.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(known) = texts.get(text) {
        return known;
    }
    let text: &'static str = Box::leak(text.to_owned().into_boxed_str());
    texts.insert(text);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sheets_are_read_back_as_written() {
        let own = GpuSheet::custom("abacus", 1e9, 2e9, 3e9);
        for sheet in GpuSheet::ALL.iter().copied().chain([own]) {
            let text = serde_json::to_string(&sheet).unwrap();
            assert_eq!(serde_json::from_str::<GpuSheet>(&text).unwrap(), sheet);
        }
    }
}
