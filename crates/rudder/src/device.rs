//! Which device a model runs on, and why.

use anyhow::{Result, bail};
use rudder_cuda::probe::{Gpu, NoCuda, probe};

use crate::gpu_check;
use crate::settings::Device;

/// A device that was picked, and the reason in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The GPU, or none for the CPU.
    pub gpu: Option<Gpu>,
    /// Why, for the startup summary and `doctor`.
    pub reason: String,
}

/// Picks the device that `asked` wants. A GPU that nobody named must compute what the CPU does.
///
/// # Errors
/// If a GPU is asked for and cannot be used; says why.
pub fn choose(asked: Device) -> Result<Choice> {
    Ok(checked(asked, pick(asked, probe)?, gpu_check::in_process))
}

fn checked(asked: Device, choice: Choice, check: impl FnOnce(usize) -> Result<()>) -> Choice {
    match (asked, &choice.gpu) {
        (Device::Auto, Some(gpu)) => match check(gpu.index) {
            Ok(()) => choice,
            Err(error) => Choice { reason: format!("cpu: {gpu} is there, but {error:#}"), gpu: None },
        },
        _ => choice,
    }
}

fn pick(asked: Device, probe: impl FnOnce() -> Result<Vec<Gpu>, NoCuda>) -> Result<Choice> {
    let cpu = |reason: String| Ok(Choice { gpu: None, reason });
    let index = match asked {
        Device::Cpu => return cpu("cpu, as asked for".into()),
        Device::Auto => None,
        Device::Cuda(index) => Some(index),
    };
    let gpus = match (probe(), index) {
        (Ok(gpus), _) => gpus,
        (Err(reason), None) => return cpu(format!("cpu: {reason}")),
        (Err(reason), Some(index)) => bail!("device cuda:{index} cannot be used: {reason}"),
    };
    let Some(index) = index else {
        return match gpus.iter().find(|gpu| gpu.supported()) {
            Some(gpu) => Ok(Choice { reason: gpu.to_string(), gpu: Some(gpu.clone()) }),
            None => cpu(format!("cpu: {} is older than the kernels support (9.0)", gpus[0])),
        };
    };
    match gpus.iter().find(|gpu| gpu.index == index) {
        Some(gpu) if gpu.supported() => {
            Ok(Choice { reason: format!("{gpu}, as asked for"), gpu: Some(gpu.clone()) })
        }
        Some(gpu) => bail!("device {gpu} cannot be used: the kernels support 9.0 and later"),
        None => bail!("device cuda:{index} does not exist; there are {}", gpus.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gpu(index: usize, compute_capability: (i32, i32)) -> Gpu {
        Gpu { index, name: "GPU".into(), compute_capability, memory: 1 << 30, multiprocessors: 1 }
    }

    #[test]
    fn auto_takes_the_first_gpu_that_there_are_kernels_for() {
        let two = || Ok(vec![gpu(0, (8, 0)), gpu(1, (9, 0))]);
        assert_eq!(pick(Device::Auto, two).unwrap().gpu, Some(gpu(1, (9, 0))));
        let old = pick(Device::Auto, || Ok(vec![gpu(0, (8, 0))])).unwrap();
        assert!(old.gpu.is_none() && old.reason.contains("older"), "{}", old.reason);
        let none = pick(Device::Auto, || Err(NoCuda::NoDriver)).unwrap();
        assert!(none.gpu.is_none() && none.reason.contains("no NVIDIA driver"), "{}", none.reason);
    }

    #[test]
    fn auto_takes_a_gpu_that_computes_what_the_cpu_does_and_cuda_any() {
        let found = || pick(Device::Auto, || Ok(vec![gpu(0, (9, 0))])).unwrap();
        assert_eq!(checked(Device::Auto, found(), |_| Ok(())), found());
        let failed = checked(Device::Auto, found(), |_| bail!("its check failed"));
        assert!(failed.gpu.is_none() && failed.reason.contains("its check failed"), "{}", failed.reason);
        let asked = pick(Device::Cuda(0), || Ok(vec![gpu(0, (9, 0))])).unwrap();
        let taken = checked(Device::Cuda(0), asked.clone(), |_| unreachable!("it was asked for"));
        assert_eq!(taken, asked);
    }

    #[test]
    fn what_is_asked_for_is_used_or_refused_with_the_reason() {
        let two = || Ok(vec![gpu(0, (8, 0)), gpu(1, (9, 0))]);
        let refusal = |device| pick(device, two).unwrap_err().to_string();
        assert_eq!(pick(Device::Cuda(1), two).unwrap().gpu.map(|g| g.index), Some(1));
        assert!(refusal(Device::Cuda(0)).contains("9.0 and later"));
        assert!(refusal(Device::Cuda(2)).contains("there are 2"));
        let none = pick(Device::Cuda(0), || Err(NoCuda::NoKernels)).unwrap_err().to_string();
        assert!(none.contains("without CUDA kernels"), "{none}");
        let cpu = pick(Device::Cpu, || unreachable!("the CPU was asked for")).unwrap();
        assert!(cpu.gpu.is_none());
    }
}
