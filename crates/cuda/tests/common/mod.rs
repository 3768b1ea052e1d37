//! What the tests share: a device to run on, and models.

#![allow(dead_code)] // every test binary uses a part

use rudder_cuda::Cuda;
use rudder_model::{KvSize, LoadOptions, Model, load};
use rudder_ops::Backend;
use std::path::{Path, PathBuf};

pub const OPTIONS: LoadOptions =
    LoadOptions { max_batch_tokens: 80, max_outputs: 80, kv: KvSize::Blocks(8), max_context: 64 };

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

/// A tiny checkpoint; RUDDER_FIXTURES says where they lie on a machine without the sources.
pub fn fixture(name: &str) -> PathBuf {
    let here = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures");
    std::env::var_os("RUDDER_FIXTURES").map_or_else(here, PathBuf::from).join(name)
}

pub fn model<B: Backend>(name: &str, backend: B, kv: KvSize) -> Box<dyn Model> {
    load(&fixture(name), backend, LoadOptions { kv, ..OPTIONS }, |_, _| ()).expect("the fixture loads").model
}
