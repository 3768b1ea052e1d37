//! The CPU backend: SIMD kernels chosen at run time over weights repacked at load.

pub mod matmul;
pub mod pool;
