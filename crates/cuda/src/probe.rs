//! Looks for GPUs, and says why there is none to use. Safe to call on a machine without CUDA.

use crate::kernels::CUDA;
use cudarc::driver::{result, sys};
use std::fmt;

/// A GPU that CUDA's driver reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// Its number, as in `cuda:0`.
    pub index: usize,
    /// What its maker calls it.
    pub name: String,
    /// Major and minor number of its architecture: 9.0 is Hopper, 10.0 and 10.3 are Blackwell.
    pub compute_capability: (i32, i32),
    /// Its memory in bytes.
    pub memory: u64,
    /// Streaming multiprocessors.
    pub multiprocessors: i32,
}

/// Why CUDA cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NoCuda {
    /// The binary was built where there was no nvcc.
    NoKernels,
    /// libcuda.so.1 cannot be loaded.
    NoDriver,
    /// The driver is there and fails.
    Driver(String),
    /// The driver is older than the kernels ask for: the major and minor number of CUDA that it supports.
    OldDriver(i32, i32),
    /// The driver finds no GPU.
    NoGpu,
}

impl fmt::Display for NoCuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NoCuda::NoKernels => {
                f.write_str("built without CUDA kernels (run scripts/get-nvcc before cargo build)")
            }
            NoCuda::NoDriver => f.write_str("no NVIDIA driver (libcuda.so.1 cannot be loaded)"),
            NoCuda::Driver(error) => write!(f, "the NVIDIA driver fails: {error}"),
            NoCuda::OldDriver(major, minor) => write!(
                f,
                "the NVIDIA driver supports CUDA {major}.{minor}, and the kernels were made by CUDA {CUDA}: install a driver that \
                 supports it (R580 or newer for CUDA 13)"
            ),
            NoCuda::NoGpu => f.write_str("the NVIDIA driver finds no GPU"),
        }
    }
}

impl std::error::Error for NoCuda {}

impl Gpu {
    /// Whether the embedded kernels run on it: Hopper and what came later.
    pub fn supported(&self) -> bool {
        self.compute_capability >= (9, 0)
    }
}

impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ((major, minor), gib) = (self.compute_capability, self.memory >> 30);
        write!(f, "cuda:{}: {}, {gib} GiB, compute capability {major}.{minor}", self.index, self.name)
    }
}

/// The GPUs of this machine, unsupported ones among them.
///
/// # Errors
/// If there is none, or CUDA cannot be used at all.
pub fn probe() -> Result<Vec<Gpu>, NoCuda> {
    if !crate::kernels::built() {
        return Err(NoCuda::NoKernels);
    }
    let gpus = gpus()?;
    cuda_version().map_or(Ok(()), |version| new_enough(version, CUDA))?;
    Ok(gpus)
}

/// Refuses a driver that supports no CUDA of the major number that made the kernels, nor a later one: it loads none of them.
fn new_enough((major, minor): (i32, i32), made_by: i32) -> Result<(), NoCuda> {
    if major < made_by { Err(NoCuda::OldDriver(major, minor)) } else { Ok(()) }
}

/// The major and minor number of CUDA that the driver supports, if there is one and it says.
pub fn cuda_version() -> Option<(i32, i32)> {
    let mut version = 0;
    // SAFETY: loads libcuda, whose initialisers are the driver's own, and has it write a number.
    let told = unsafe { sys::is_culib_present() && sys::cuDriverGetVersion(&mut version).result().is_ok() };
    told.then_some((version / 1000, version % 1000 / 10))
}

/// The GPUs of this machine, whether or not this binary has kernels for them.
///
/// # Errors
/// As [`probe`].
pub fn gpus() -> Result<Vec<Gpu>, NoCuda> {
    // SAFETY: loads libcuda, whose initialisers are the driver's own.
    if !unsafe { sys::is_culib_present() } {
        return Err(NoCuda::NoDriver);
    }
    let gpus = list().map_err(|e| match e.0 {
        sys::cudaError_enum::CUDA_ERROR_NO_DEVICE => NoCuda::NoGpu,
        _ => NoCuda::Driver(e.to_string()),
    })?;
    if gpus.is_empty() { Err(NoCuda::NoGpu) } else { Ok(gpus) }
}

fn list() -> Result<Vec<Gpu>, result::DriverError> {
    result::init()?;
    (0..result::device::get_count()?)
        .map(|index| {
            let device = result::device::get(index)?;
            use sys::CUdevice_attribute_enum as Attribute;
            // SAFETY: the device was just got from the driver.
            let attribute = |a| unsafe { result::device::get_attribute(device, a) };
            Ok(Gpu {
                index: index as usize,
                name: result::device::get_name(device)?,
                compute_capability: (
                    attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                    attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
                ),
                // SAFETY: as above.
                memory: unsafe { result::device::total_mem(device)? } as u64,
                multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_cuda_gets_a_reason_and_no_panic() {
        match gpus() {
            Ok(gpus) => assert!(!gpus.is_empty()),
            Err(reason) => assert!(!reason.to_string().is_empty()),
        }
        if !crate::kernels::built() {
            assert_eq!(probe(), Err(NoCuda::NoKernels));
        }
    }

    #[test]
    fn a_driver_that_is_too_old_is_refused_with_what_to_do() {
        assert!([(13, 0), (13, 2), (14, 0)].into_iter().all(|version| new_enough(version, 13).is_ok()));
        let reason = new_enough((12, 8), 13).expect_err("it is too old").to_string();
        assert!(reason.contains("CUDA 12.8") && reason.contains("R580"), "{reason}");
    }

    #[test]
    fn hopper_and_later_are_supported() {
        let gpu = |compute_capability| Gpu {
            index: 0,
            name: "GPU".into(),
            compute_capability,
            memory: 0,
            multiprocessors: 1,
        };
        assert!([(9, 0), (10, 3), (12, 0)].into_iter().all(|c| gpu(c).supported()));
        assert!(!gpu((8, 9)).supported());
    }
}
