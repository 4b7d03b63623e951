//! NVIDIA's management library, loaded when the program runs: on a machine without the driver there is nothing to read
//! and nothing to complain about. All calls block for a moment; call them where blocking is allowed.

use ledger::telemetry::Millionths;
use ledger::{GpuReading, Label, Timestamp};
use nvml_wrapper::Device;
use nvml_wrapper::enums::device::UsedGpuMemory;

use super::values::part;

/// The library, loaded and started.
#[derive(Debug)]
pub struct Nvml(nvml_wrapper::Nvml);

/// A process that has a compute context on a GPU.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GpuProcess {
    /// The GPU's UUID.
    pub uuid: Label,
    /// The MIG slice that it runs on, when it is one, as [`GpuReading::slice`] names it.
    pub slice: Option<Label>,
    /// Its number on this machine.
    pub pid: u32,
    /// The path of its program, where the driver may see it.
    pub name: Option<Label>,
    /// Bytes of GPU memory that it holds.
    pub memory_bytes: Option<u64>,
}

/// A GPU or a slice of one, with the names that readings carry.
struct Part<'nvml> {
    device: Device<'nvml>,
    uuid: Label,
    gpu: Option<Label>,
    slice: Option<Label>,
}

impl Nvml {
    /// Loads the library. `None` where there is no driver, which is no error.
    #[must_use]
    pub fn load() -> Option<Nvml> {
        match nvml_wrapper::Nvml::init() {
            Ok(nvml) => Some(Nvml(nvml)),
            Err(reason) => {
                tracing::debug!(%reason, "no NVIDIA driver to ask");
                None
            }
        }
    }

    /// A reading for each GPU of this machine, or for each of its slices where it is cut. GPUs that fail to answer are
    /// left out; what a GPU does not know stays unknown. NVML has no activity counters, only `utilisation`.
    #[must_use]
    pub fn read(&self, host: Option<&Label>, pool: Option<&Label>, at: Timestamp) -> Vec<GpuReading> {
        let reading = |part: Part<'_>| {
            let memory = part.device.memory_info().ok();
            GpuReading {
                host: host.cloned(),
                uuid: part.uuid,
                gpu: part.gpu,
                slice: part.slice,
                pool: pool.cloned(),
                at,
                utilisation: part.device.utilization_rates().ok().and_then(|rates| percent(rates.gpu)),
                memory_used_bytes: memory.as_ref().map(|memory| memory.used),
                memory_total_bytes: memory.as_ref().map(|memory| memory.total),
                power_mw: part.device.power_usage().ok().map(u64::from),
                energy_mj: part.device.total_energy_consumption().ok(),
                ..GpuReading::default()
            }
        };
        self.parts().into_iter().map(reading).collect()
    }

    /// The processes that compute on this machine's GPUs.
    #[must_use]
    pub fn processes(&self) -> Vec<GpuProcess> {
        let of_part = |part: Part<'_>| {
            let running = part.device.running_compute_processes().unwrap_or_default();
            let process = move |process: nvml_wrapper::struct_wrappers::device::ProcessInfo| GpuProcess {
                uuid: part.uuid.clone(),
                slice: part.slice.clone(),
                pid: process.pid,
                name: self.0.sys_process_name(process.pid, 256).ok().map(Label::from),
                memory_bytes: match process.used_gpu_memory {
                    UsedGpuMemory::Used(bytes) => Some(bytes),
                    UsedGpuMemory::Unavailable => None,
                },
            };
            running.into_iter().map(process).collect::<Vec<_>>()
        };
        self.parts().into_iter().flat_map(of_part).collect()
    }

    fn parts(&self) -> Vec<Part<'_>> {
        let gpus = self.0.device_count().unwrap_or(0);
        (0..gpus).filter_map(|index| self.0.device_by_index(index).ok()).flat_map(Part::all_of).collect()
    }
}

impl<'nvml> Part<'nvml> {
    /// The slices of the GPU, or the GPU itself when it is not cut. Empty when it does not even tell its UUID.
    fn all_of(device: Device<'nvml>) -> Vec<Part<'nvml>> {
        let Ok(uuid) = device.uuid().map(Label::from) else { return Vec::new() };
        let gpu = device.name().ok().map(Label::from);
        let is_cut = device.mig_mode().is_ok_and(|mode| mode.current == 1);
        if !is_cut {
            return vec![Part { device, uuid, gpu, slice: None }];
        }
        let slices = device.mig_device_count().unwrap_or(0);
        let slice = |index| {
            let cut = device.mig_device_by_index(index).ok()?;
            let slice = slice_name(&cut.name().ok()?, index);
            Some(Part { device: cut, uuid: uuid.clone(), gpu: gpu.clone(), slice: Some(slice) })
        };
        (0..slices).filter_map(slice).collect()
    }
}

/// `3g.40gb#0` of the name `NVIDIA H100 80GB HBM3 MIG 3g.40gb`.
fn slice_name(device: &str, index: u32) -> Label {
    let profile = device.rsplit_once("MIG ").map_or(device, |(_, profile)| profile.trim());
    format!("{profile}#{index}").into()
}

fn percent(percent: u32) -> Option<Millionths> {
    part(f64::from(percent) / 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Machines that build this have no GPU as a rule: then nothing is read, and nothing fails. Where there is one, its
    /// readings must make sense.
    #[test]
    fn without_a_driver_there_is_nothing_and_no_error() {
        let Some(nvml) = Nvml::load() else { return };
        for reading in nvml.read(None, None, Timestamp::from_micros(0)) {
            assert!(reading.uuid.starts_with("GPU-"), "{reading:?}");
            let (used, all) = (reading.memory_used_bytes.unwrap(), reading.memory_total_bytes.unwrap());
            assert!(used <= all, "{reading:?}");
        }
        for process in nvml.processes() {
            assert!(process.pid > 0, "{process:?}");
        }
    }

    #[test]
    fn slices_are_named_by_their_profile() {
        assert_eq!(&*slice_name("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 1), "3g.40gb#1");
        assert_eq!(&*slice_name("unheard of", 0), "unheard of#0");
        assert_eq!((percent(100), percent(7), percent(900)), (Some(1_000_000), Some(70_000), None));
    }
}
