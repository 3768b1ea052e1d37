//! What the tests share: a device to run on.

#![allow(dead_code)] // every test binary uses a part

use rudder_cuda::Cuda;
use rudder_ops::Backend;

/// The first GPU; without one the CPU in its place, where the feature `emulate` is on; else nothing, and the reason on stderr.
pub fn cuda() -> Option<Cuda> {
    match Cuda::new(0) {
        Ok(cuda) => Some(cuda),
        #[cfg(feature = "emulate")]
        Err(_) => Some(Cuda::emulated().expect("memory for an emulated device")),
        #[cfg(not(feature = "emulate"))]
        Err(reason) => {
            eprintln!("skipped: {reason}; with --features emulate the kernels run on the CPU");
            None
        }
    }
}

/// Whether a GPU runs the kernels, not the CPU in its place.
pub fn on_gpu(cuda: &Cuda) -> bool {
    cuda.name() != "cuda emulated"
}

/// Whether shapes may be large: on a GPU, unless RUDDER_SMALL_SHAPES is set, as it is under checkers that slow it down.
pub fn large(cuda: &Cuda) -> bool {
    on_gpu(cuda) && std::env::var_os("RUDDER_SMALL_SHAPES").is_none()
}
