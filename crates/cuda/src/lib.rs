//! The CUDA backend of the op set.
//!
//! The kernels (`kernels/*.cu`) are compiled by build.rs and embedded; the driver and cuBLASLt are loaded at run time, so that
//! one binary starts with and without a GPU.

pub mod kernels;
pub mod probe;
