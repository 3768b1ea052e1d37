//! Which unit this processor has, and the kernels compiled for it.

use super::bf16::bf16;
use super::gated::{self, gated};
use super::kernel::{Format, Job, Kernel, plain, quantized};
use super::unit::Portable;
use crate::DType;
use std::sync::OnceLock;

#[cfg(target_arch = "aarch64")]
use super::neon::Neon;
#[cfg(target_arch = "x86_64")]
use super::x86::{Avx2, Avx512};

/// A unit the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::cpu) enum Isa {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    #[cfg(target_arch = "aarch64")]
    Neon,
}

impl Isa {
    /// All units of this processor, the widest last.
    pub fn available() -> Vec<Self> {
        #[allow(unused_mut)] // where there is one only
        let mut units = vec![Isa::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vnni");
            let found = [
                (avx2, Isa::Avx2),
                (avx2 && is_x86_feature_detected!("avxvnni"), Isa::AvxVnni),
                (avx2 && avx512, Isa::Avx512),
                (avx2 && avx512 && is_x86_feature_detected!("avx512bf16"), Isa::Avx512Bf16),
            ];
            units.extend(found.into_iter().filter_map(|(has, isa)| has.then_some(isa)));
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("dotprod") {
            units.push(Isa::Neon);
        }
        units
    }

    /// The widest unit of this processor.
    pub fn widest() -> Self {
        static WIDEST: OnceLock<Isa> = OnceLock::new();
        *WIDEST.get_or_init(|| Self::available().pop().unwrap_or(Isa::Portable))
    }

    /// The kernel for weights stored as `dtype`; to be called only on a processor with this unit.
    pub(super) fn kernel(self, dtype: DType) -> Kernel {
        match self {
            Isa::Portable => portable::kernel(dtype),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::kernel(dtype),
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => avx_vnni::kernel(dtype),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::kernel(dtype),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => avx512_bf16::kernel(dtype),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::kernel(dtype),
        }
    }

    /// The kernel for gate and up in one; as above.
    pub(super) fn gated(self) -> gated::Kernel {
        match self {
            Isa::Portable => portable::run_gated,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::run_gated,
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => avx_vnni::run_gated,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => avx512::run_gated,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512Bf16 => avx512_bf16::run_gated,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::run_gated,
        }
    }
}

macro_rules! formats {
    ($($name:ident)*) => {
        $(
            #[allow(non_camel_case_types, clippy::upper_case_acronyms)] // the specification's names
            struct $name;
            impl Format for $name {
                const DTYPE: DType = DType::$name;
            }
        )*
    };
}
formats!(F32 F16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K MXFP4);

/// Compiles all kernels for a unit, with its features.
macro_rules! unit {
    ($module:ident, $unit:ty $(, #[$features:meta])?) => {
        mod $module {
            use super::*;

            /// # Safety
            /// See [`Kernel`].
            $(#[$features])?
            unsafe fn run_quantized<F: Format>(job: &Job<'_>) {
                // SAFETY: as the caller promises.
                unsafe { quantized::<$unit, F>(job) }
            }

            /// # Safety
            /// See [`Kernel`].
            $(#[$features])?
            unsafe fn run_plain<F: Format>(job: &Job<'_>) {
                // SAFETY: as the caller promises.
                unsafe { plain::<$unit, F>(job) }
            }

            /// # Safety
            /// See [`Kernel`].
            $(#[$features])?
            unsafe fn run_bf16(job: &Job<'_>) {
                // SAFETY: as the caller promises.
                unsafe { bf16::<$unit>(job) }
            }

            /// # Safety
            /// See [`gated::Kernel`].
            $(#[$features])?
            pub(super) unsafe fn run_gated(job: &gated::Job<'_>) {
                // SAFETY: as the caller promises.
                unsafe { gated::<$unit>(job) }
            }

            pub(super) fn kernel(dtype: DType) -> Kernel {
                match dtype {
                    DType::F32 => run_plain::<F32>,
                    DType::F16 => run_plain::<F16>,
                    // The others are widened before they are packed.
                    DType::BF16 | DType::F8_E4M3 | DType::INT4 | DType::NVFP4 => run_bf16,
                    DType::Q4_0 => run_quantized::<Q4_0>,
                    DType::Q4_1 => run_quantized::<Q4_1>,
                    DType::Q5_0 => run_quantized::<Q5_0>,
                    DType::Q5_1 => run_quantized::<Q5_1>,
                    DType::Q8_0 => run_quantized::<Q8_0>,
                    DType::Q2_K => run_quantized::<Q2_K>,
                    DType::Q3_K => run_quantized::<Q3_K>,
                    DType::Q4_K => run_quantized::<Q4_K>,
                    DType::Q5_K => run_quantized::<Q5_K>,
                    DType::Q6_K => run_quantized::<Q6_K>,
                    DType::MXFP4 => run_quantized::<MXFP4>,
                }
            }
        }
    };
}

unit!(portable, Portable);
#[cfg(target_arch = "x86_64")]
unit!(avx2, Avx2<false>, #[target_feature(enable = "avx2,fma,f16c")]);
#[cfg(target_arch = "x86_64")]
unit!(avx_vnni, Avx2<true>, #[target_feature(enable = "avx2,fma,f16c,avxvnni")]);
#[cfg(target_arch = "x86_64")]
unit!(avx512, Avx512<false>, #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vnni")]);
#[cfg(target_arch = "x86_64")]
unit!(
    avx512_bf16,
    Avx512<true>,
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vnni,avx512bf16")]
);
#[cfg(target_arch = "aarch64")]
unit!(neon, Neon, #[target_feature(enable = "neon,dotprod")]);
