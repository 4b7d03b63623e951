//! NVIDIA's dcgm-exporter, `/metrics` of port 9400: a reading for each GPU, each MIG slice of one and each pod that holds it.
//!
//! ```
//! use ledger::Timestamp;
//! let text = "DCGM_FI_DEV_POWER_USAGE{gpu=\"0\",UUID=\"GPU-1\",pod=\"train-0\",namespace=\"lab\"} 312.5\n";
//! let found = fleet::telemetry::dcgm::read(&fleet::prometheus::parse(text), None, Timestamp::from_micros(0));
//! assert_eq!((found.readings[0].power_mw, found.readings[0].pod.as_deref()), (Some(312_500), Some("train-0")));
//! ```
//!
//! Units at the source are W, MiB, mJ and ratios; `GPU_UTIL` is in percent. When pods share a GPU by time slicing each has
//! a reading with the same values, which are the whole GPU's. On a GPU cut by MIG, power and energy are repeated for every
//! slice and are the whole GPU's too.

use std::collections::BTreeMap;

use ledger::{GpuReading, Label, Timestamp};

use super::values::{Page, count, part, quantity};
use super::{FoundGpus, Loss};
use crate::prometheus::{Sample, Scrape};

const PREFIX: &str = "DCGM_FI_";
const ENGINE: &str = "DCGM_FI_PROF_GR_ENGINE_ACTIVE";
const TENSOR: &str = "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE";
const MEMORY: &str = "DCGM_FI_PROF_DRAM_ACTIVE";
const UTILISATION: &str = "DCGM_FI_DEV_GPU_UTIL";
const USED: &str = "DCGM_FI_DEV_FB_USED";
const FREE: &str = "DCGM_FI_DEV_FB_FREE";
const RESERVED: &str = "DCGM_FI_DEV_FB_RESERVED";
const TOTAL: &str = "DCGM_FI_DEV_FB_TOTAL";
const POWER: &str = "DCGM_FI_DEV_POWER_USAGE";
const ENERGY: &str = "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION";

const MIB: f64 = 1_048_576.0;

/// Whether the scrape is one of dcgm-exporter at all.
#[must_use]
pub fn speaks(scrape: &Scrape) -> bool {
    scrape.samples.iter().any(|sample| sample.name.starts_with(PREFIX))
}

/// Reads what dcgm-exporter says about the GPUs of a pool.
#[must_use]
pub fn read(scrape: &Scrape, pool: Option<&Label>, at: Timestamp) -> FoundGpus {
    let mut rows: BTreeMap<Holder<'_>, Row<'_>> = BTreeMap::new();
    for sample in scrape.samples.iter().filter(|sample| sample.name.starts_with(PREFIX)) {
        if let Some(holder) = Holder::of(sample) {
            let row = rows.entry(holder).or_default();
            row.model = row.model.or_else(|| labelled(sample, &["modelName"]));
            row.values.insert(&sample.name, sample.value);
        }
    }
    let readings = rows.iter().map(|(holder, row)| row.reading(holder, pool, at)).collect();
    FoundGpus { readings, missing: missing(scrape) }
}

/// The profile of a slice's name, such as `3g.40gb` of `3g.40gb#2`.
#[must_use]
pub fn profile_of(slice: &str) -> &str {
    slice.split('#').next().unwrap_or(slice)
}

/// What the exporter was told to leave out, which is reported once and not once a GPU.
fn missing(scrape: &Scrape) -> Vec<super::Missing> {
    let mut page = Page::new(scrape);
    let wanted = [
        (ENGINE, Loss::Activity),
        (MEMORY, Loss::Activity),
        (TENSOR, Loss::Upkeep),
        (USED, Loss::Upkeep),
        (POWER, Loss::Upkeep),
        (ENERGY, Loss::Upkeep),
    ];
    for (name, loss) in wanted {
        let usable = scrape.named(name).find_map(|sample| quantity(sample.value));
        page.need(name, loss, usable);
    }
    page.missing()
}

/// Whose values these are.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Holder<'a> {
    host: Option<&'a str>,
    uuid: &'a str,
    instance: Option<&'a str>,
    profile: Option<&'a str>,
    namespace: Option<&'a str>,
    pod: Option<&'a str>,
    container: Option<&'a str>,
}

impl<'a> Holder<'a> {
    /// `None` when the sample does not say which GPU it is about.
    fn of(sample: &'a Sample) -> Option<Holder<'a>> {
        Some(Holder {
            host: labelled(sample, &["Hostname", "hostname"]),
            uuid: labelled(sample, &["UUID", "uuid", "gpu"])?,
            instance: labelled(sample, &["GPU_I_ID"]),
            profile: labelled(sample, &["GPU_I_PROFILE"]),
            // The second names are those of `--use-old-namespace`, the third those of a Prometheus that federates.
            namespace: labelled(sample, &["namespace", "pod_namespace", "exported_namespace"]),
            pod: labelled(sample, &["pod", "pod_name", "exported_pod"]),
            container: labelled(sample, &["container", "container_name", "exported_container"]),
        })
    }

    fn slice(&self) -> Option<Label> {
        match (self.profile, self.instance) {
            (Some(profile), Some(instance)) => Some(format!("{profile}#{instance}").into()),
            (one, other) => one.or(other).map(Label::from),
        }
    }
}

fn labelled<'a>(sample: &'a Sample, names: &[&str]) -> Option<&'a str> {
    names.iter().find_map(|name| sample.label(name)).filter(|text| !text.is_empty())
}

#[derive(Debug, Default)]
struct Row<'a> {
    model: Option<&'a str>,
    values: BTreeMap<&'a str, f64>,
}

impl Row<'_> {
    fn reading(&self, holder: &Holder<'_>, pool: Option<&Label>, at: Timestamp) -> GpuReading {
        let value = |name: &str| self.values.get(name).copied().and_then(quantity);
        let bytes = |name| value(name).and_then(|mib| count(mib * MIB));
        // Some drivers do not tell reserved memory apart, and then it is part of what is used.
        let parts = || Some(bytes(USED)? + bytes(FREE)? + bytes(RESERVED).unwrap_or(0));
        GpuReading {
            host: holder.host.map(Label::from),
            uuid: holder.uuid.into(),
            gpu: self.model.map(Label::from),
            slice: holder.slice(),
            pool: pool.cloned(),
            namespace: holder.namespace.map(Label::from),
            pod: holder.pod.map(Label::from),
            container: holder.container.map(Label::from),
            at,
            engine_active: value(ENGINE).and_then(part),
            tensor_active: value(TENSOR).and_then(part),
            memory_active: value(MEMORY).and_then(part),
            utilisation: value(UTILISATION).and_then(|percent| part(percent / 100.0)),
            memory_used_bytes: bytes(USED),
            memory_total_bytes: bytes(TOTAL).or_else(parts),
            power_mw: value(POWER).and_then(|watts| count(watts * 1e3)),
            energy_mj: value(ENERGY).and_then(count),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prometheus::parse;

    const AT: Timestamp = Timestamp::from_micros(7);

    fn whole(labels: &str) -> String {
        let values = [
            (UTILISATION, "99"),
            (USED, "1000"),
            (FREE, "80000"),
            (RESERVED, "559"),
            (POWER, "311.25"),
            (ENERGY, "4242424242"),
            (ENGINE, "0.75"),
            (TENSOR, "0.5"),
            (MEMORY, "0.25"),
        ];
        values.iter().map(|(name, value)| format!("{name}{{{labels}}} {value}\n")).collect()
    }

    const GPU: &str = r#"gpu="0",UUID="GPU-a",pci_bus_id="00000000:31:00.0",device="nvidia0",modelName="NVIDIA H100 80GB HBM3",Hostname="node-1""#;

    fn expected() -> GpuReading {
        GpuReading {
            host: Some("node-1".into()),
            uuid: "GPU-a".into(),
            gpu: Some("NVIDIA H100 80GB HBM3".into()),
            pool: Some("shared".into()),
            at: AT,
            engine_active: Some(750_000),
            tensor_active: Some(500_000),
            memory_active: Some(250_000),
            utilisation: Some(990_000),
            memory_used_bytes: Some(1_000 << 20),
            memory_total_bytes: Some(81_559 << 20),
            power_mw: Some(311_250),
            energy_mj: Some(4_242_424_242),
            ..GpuReading::default()
        }
    }

    fn readings(text: &str) -> FoundGpus {
        read(&parse(text), Some(&"shared".into()), AT)
    }

    #[test]
    fn units_become_the_ledger_s() {
        let found = readings(&whole(GPU));
        assert_eq!(found, FoundGpus { readings: vec![expected()], missing: Vec::new() });
    }

    #[test]
    fn pods_slices_and_older_label_names_are_told_apart() {
        let cases = [
            (r#"namespace="lab",pod="train-0",container="main""#, (None, Some("lab"), Some("train-0"), Some("main"))),
            (r#"namespace="",pod="",container="""#, (None, None, None, None)),
            (r#"pod_namespace="lab",pod_name="p",container_name="c""#, (None, Some("lab"), Some("p"), Some("c"))),
            (r#"GPU_I_PROFILE="3g.40gb",GPU_I_ID="2""#, (Some("3g.40gb#2"), None, None, None)),
        ];
        for (labels, (slice, namespace, pod, container)) in cases {
            let found = readings(&whole(&format!("{GPU},{labels}")));
            let label = |text: Option<&str>| text.map(Label::from);
            let reading = GpuReading {
                slice: label(slice),
                namespace: label(namespace),
                pod: label(pod),
                container: label(container),
                ..expected()
            };
            assert_eq!(found.readings, [reading], "{labels}");
        }
        let shared = whole(&format!("{GPU},pod=\"a\"")) + &whole(&format!("{GPU},pod=\"b\""));
        assert_eq!(readings(&shared).readings.len(), 2, "pods that share a GPU");
        assert_eq!(profile_of("3g.40gb#2"), "3g.40gb");
        assert_eq!(profile_of("1g.10gb"), "1g.10gb");
    }

    #[test]
    fn what_is_off_or_blank_is_unknown_and_said_once() {
        let text = whole(GPU) + &whole(&GPU.replace("GPU-a", "GPU-b"));
        let off: String =
            text.lines().filter(|line| !line.starts_with("DCGM_FI_PROF")).map(|line| format!("{line}\n")).collect();
        let found = readings(&off);
        assert_eq!(found.readings.len(), 2);
        assert_eq!(found.readings[0].engine_active, None);
        let missing: Vec<_> = found.missing.iter().map(|missing| (missing.name, missing.loss)).collect();
        assert_eq!(missing, [(ENGINE, Loss::Activity), (MEMORY, Loss::Activity), (TENSOR, Loss::Upkeep)]);

        let blank = whole(GPU).replace("} 4242424242", "} 9223372036854775794").replace("} 0.75", "} NaN");
        assert_eq!(readings(&blank).readings, [GpuReading { energy_mj: None, engine_active: None, ..expected() }]);
        assert!(!speaks(&parse("node_load1 1\n")) && speaks(&parse(&off)));
        assert_eq!(readings(&format!("{POWER}{{nothing=\"known\"}} 3\n")).readings, []);
    }
}
