//! The CUDA backend of the op set.
//!
//! The kernels (`kernels/*.cu`) are compiled by build.rs and embedded; the driver, cuBLASLt and NCCL are loaded at run time, so that
//! one binary starts with and without a GPU. With the feature `emulate` the same kernels run on the CPU, slowly: that is how
//! all of this is tested where there is no GPU.

mod backend;
mod block_mover;
mod cublaslt;
mod dependent_launch;
mod device;
#[cfg(feature = "emulate")]
mod emulated;
mod fabric;
mod fp8;
mod gpu;
mod int4;
pub mod kernels;
mod kv;
mod mapping;
mod matmul;
mod moe;
mod multicast;
mod mxfp4;
mod nccl;
mod nvfp4;
mod peer_memory;
mod peers;
pub mod probe;
mod queue;
mod sample;
mod shared_prefix;
mod step;
mod tensor;
mod upload;
mod waiting;
mod weights;

pub use backend::{Cuda, Embedding};
pub use kv::{KvCache, KvDType, PrefillKernel};
pub use matmul::{Matrix, Vector};
pub use moe::Experts;
pub use peers::PeerAccess;
pub use shared_prefix::SharedPrefixes;
pub use tensor::Tensor;
