//! Weight matrices on a device: in which format they lie there, and which kernels read them.
//!
//! MXFP4, NVFP4, FP8 and four-bit integers stay as they are, all other formats become bf16.

use crate::device::{Arg, Buffer, Device, Grid};
use crate::matmul::padded;
use crate::queue::MOST_ARGS;
use crate::upload::Uploader;
use crate::{mxfp4, nvfp4};
use rudder_ops::{DType, OpError, RawTensor, Result, fp8, int4};
use std::thread;

/// The weights of one matrix, or of several one below the other, rows padded to [`padded`] elements.
pub(crate) enum Weights {
    Bf16(Buffer),
    Packed(Packed),
}

/// Weights in a format that is narrower than bf16: what kernels/formats.cuh reads.
pub(crate) struct Packed {
    pub packing: Packing,
    pub codes: Buffer,
    pub scales: Buffer,
    /// Bytes of a row's scales.
    pub stride: usize,
    /// How many elements share a scale, where the format leaves that open: its least number, shifted left by this.
    pub shift: u32,
}

/// The formats that stay as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packing {
    Mxfp4,
    Fp8,
    Int4,
    Nvfp4,
}

/// The kernels for few rows of a format.
#[derive(Clone, Copy)]
pub(crate) struct FewKernels {
    /// For up to 8 rows and up to 16.
    pub dense: [&'static str; 2],
    pub gated: [&'static str; 2],
    pub experts: &'static str,
    pub gated_experts: &'static str,
}

/// Those of a format with this suffix.
macro_rules! few_kernels {
    ($suffix:literal) => {
        FewKernels {
            dense: [concat!("matmul_few_8", $suffix), concat!("matmul_few_16", $suffix)],
            gated: [concat!("matmul_few_gated_8", $suffix), concat!("matmul_few_gated_16", $suffix)],
            experts: concat!("matmul_few_experts", $suffix),
            gated_experts: concat!("matmul_few_gated_experts", $suffix),
        }
    };
}

/// The kernels that multiply a format's tiles, by the instructions that they do it with.
#[derive(Clone, Copy)]
pub(crate) struct TileKernels {
    pub mma: &'static str,
    pub wgmma: &'static str,
    pub tcgen05: &'static str,
}

/// Those of a format with this suffix.
macro_rules! tile_kernels {
    ($suffix:literal) => {
        TileKernels {
            mma: concat!("matmul_tiles", $suffix),
            wgmma: concat!("matmul_wgmma", $suffix),
            tcgen05: concat!("matmul_tcgen05", $suffix),
        }
    };
}

impl TileKernels {
    pub const BF16: Self = tile_kernels!("");
}

/// A format's kernels.
pub(crate) struct Kernels {
    pub few: FewKernels,
    pub tiles: TileKernels,
    pub widen: &'static str,
}

/// Those of a format with this suffix.
macro_rules! kernels {
    ($suffix:literal) => {
        Kernels {
            few: few_kernels!($suffix),
            tiles: tile_kernels!($suffix),
            widen: concat!("widen", $suffix),
        }
    };
}

impl Packing {
    /// What tensors that are all of `dtype` are kept as.
    fn of(dtype: DType) -> Option<Self> {
        match dtype {
            DType::MXFP4 => Some(Self::Mxfp4),
            DType::F8_E4M3 => Some(Self::Fp8),
            DType::INT4 => Some(Self::Int4),
            DType::NVFP4 => Some(Self::Nvfp4),
            _ => None,
        }
    }

    /// Bytes of a row's codes.
    fn code_bytes(self, padded: usize) -> usize {
        match self {
            Self::Mxfp4 | Self::Int4 | Self::Nvfp4 => padded / 2,
            Self::Fp8 => padded,
        }
    }

    pub fn kernels(self) -> Kernels {
        match self {
            Self::Mxfp4 => kernels!("_mxfp4"),
            Self::Fp8 => kernels!("_fp8"),
            Self::Int4 => kernels!("_int4"),
            Self::Nvfp4 => kernels!("_nvfp4"),
        }
    }
}

impl Packed {
    /// The arguments by which kernels know the weights.
    pub fn args(&self) -> [Arg; 4] {
        [(&self.codes).into(), (&self.scales).into(), self.stride.into(), (self.shift as usize).into()]
    }

    /// Queues the widening of `rows` rows of `k` elements, padding included, from row `first` on, to bf16.
    pub fn widen(&self, device: &Device, first: usize, rows: usize, k: usize, to: Arg) -> Result<()> {
        let codes = Arg::at(&self.codes, first * self.packing.code_bytes(k));
        let scales = Arg::at(&self.scales, first * self.stride);
        let (stride, shift) = (self.stride.into(), (self.shift as usize).into());
        let args = [codes, scales, stride, shift, to, rows.into(), k.into()];
        // A thread widens 32.
        device.launch(self.packing.kernels().widen, Grid::elements(rows * k / 32), 0, &args)
    }
}

/// Bytes of rows of `k` elements in bf16.
fn bf16_bytes(rows: usize, k: usize) -> Result<usize> {
    let bytes = k.checked_next_multiple_of(64).and_then(|k| rows.checked_mul(k)?.checked_mul(2));
    // Kernels count features, and elements of a row, in 31 bits.
    bytes
        .filter(|_| rows <= i32::MAX as usize && k <= i32::MAX as usize)
        .ok_or_else(|| OpError::Backend(format!("a matrix of [{rows}, {k}] is too large")))
}

impl Weights {
    /// The kernels that multiply few rows with them.
    pub fn few_kernels(&self) -> FewKernels {
        match self {
            Self::Bf16(_) => few_kernels!(""),
            Self::Packed(packed) => packed.packing.kernels().few,
        }
    }

    /// Queues a kernel for few rows, whose arguments are x, the weights, then `last`.
    pub fn launch_few(
        &self,
        device: &Device,
        kernel: &'static str,
        grid: Grid,
        x: Arg,
        last: &[Arg],
    ) -> Result<()> {
        let (mut args, mut count) = ([Arg::NULL; MOST_ARGS], 0);
        let mut put = |some: &[Arg]| {
            args[count..][..some.len()].copy_from_slice(some);
            count += some.len();
        };
        put(&[x]);
        match self {
            Self::Bf16(buffer) => put(&[buffer.into()]),
            Self::Packed(packed) => put(&packed.args()),
        }
        put(last);
        device.launch(kernel, grid, 0, &args[..count])
    }

    /// Whether they can be multiplied with rows in FP8: those of FP8 can, whose scales are for 128 inputs or more.
    pub fn takes_fp8(&self) -> bool {
        matches!(self, Self::Packed(packed) if packed.packing == Packing::Fp8 && packed.shift > 0)
    }

    /// Uploads matrices `[any, k]` one below the other: in their format if all are of one that stays as it is, else as bf16.
    ///
    /// # Errors
    /// If they are too large, hold what the kernels do not take, or the copy fails.
    pub fn load(device: &Device, uploader: &mut Uploader, parts: &[RawTensor], k: usize) -> Result<Self> {
        let rows = parts.iter().map(|part| part.shape[0]).sum();
        let bytes = bf16_bytes(rows, k)?;
        let dtype = parts.first().map(|part| part.dtype);
        let same = parts.iter().all(|part| Some(part.dtype) == dtype);
        let Some(packing) = dtype.filter(|_| same).and_then(Packing::of) else {
            let buffer = device.buffer(bytes)?;
            let mut offset = 0;
            for part in parts {
                uploader.matrix_bf16(part, padded(k), &buffer, offset)?;
                offset += 2 * padded(k) * part.shape[0];
            }
            return Ok(Self::Bf16(buffer));
        };
        let (stride, shift) = match packing {
            Packing::Mxfp4 => (mxfp4::scale_bytes(padded(k)), 0),
            Packing::Fp8 => scales_of::<{ fp8::BLOCK_BYTES }>(parts, k / fp8::BLOCK_LEN),
            Packing::Int4 => scales_of::<{ int4::BLOCK_BYTES }>(parts, k / int4::BLOCK_LEN),
            Packing::Nvfp4 => (nvfp4::scale_bytes(padded(k)), 0),
        };
        let codes = device.buffer(rows * packing.code_bytes(padded(k)))?;
        let packed = Packed { packing, codes, scales: device.buffer(rows * stride)?, stride, shift };
        let mut before = 0;
        for part in parts {
            match packing {
                Packing::Mxfp4 => {
                    uploader.matrix_mxfp4(part, padded(k), [&packed.codes, &packed.scales], before)?;
                }
                Packing::Fp8 => uploader.matrix_fp8(part, &packed, before)?,
                Packing::Int4 => uploader.matrix_int4(part, &packed, before)?,
                Packing::Nvfp4 => uploader.matrix_nvfp4(part, &packed, before)?,
            }
            before += part.shape[0];
        }
        Ok(Self::Packed(packed))
    }
}

/// Bits that leave nothing of a block's number.
pub(crate) const WHOLE_ROW: u32 = 31;

/// Of matrices whose rows are `blocks` blocks of `BYTES`, each with a scale in its first four: bytes of a row's scales on the device, and the shift of a
/// block's number to its scale's. One scale for a row where that will do, one for two blocks or one for each.
pub(crate) fn scales_of<const BYTES: usize>(matrices: &[RawTensor], blocks: usize) -> (usize, u32) {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let row_agrees = |row: &[[u8; BYTES]], count: usize| {
        row.chunks(count).all(|some| some.iter().all(|block| block[..4] == some[0][..4]))
    };
    let agree = |count: usize| {
        // Every thread looks at some rows of each matrix.
        let part = |first: usize| {
            matrices.iter().all(|matrix| {
                let rows = matrix.bytes().as_chunks::<BYTES>().0.chunks_exact(blocks.max(1));
                rows.skip(first).step_by(threads).all(|row| row_agrees(row, count))
            })
        };
        let part = &part;
        thread::scope(|scope| {
            let parts: Vec<_> = (0..threads).map(|first| scope.spawn(move || part(first))).collect();
            parts.into_iter().all(|part| part.join().unwrap_or(false))
        })
    };
    if agree(blocks.max(1)) {
        (4, WHOLE_ROW)
    } else if agree(2) {
        (4 * blocks.div_ceil(2), 1)
    } else {
        (4 * blocks, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    /// Two rows of blocks with these scales.
    fn matrix(scales: [&[f32]; 2]) -> RawTensor {
        let blocks = scales
            .concat()
            .into_iter()
            .flat_map(|scale| [scale.to_le_bytes().to_vec(), vec![0x38; 64]].concat());
        let shape = vec![2, 64 * scales[0].len()];
        RawTensor::new("w", shape, DType::F8_E4M3, Arc::new(blocks.collect::<Vec<u8>>()), 0)
            .expect("whole blocks")
    }

    #[test]
    fn scales_that_agree_are_kept_once() {
        let of = |scales: [&[f32]; 2]| scales_of::<{ fp8::BLOCK_BYTES }>(&[matrix(scales)], scales[0].len());
        assert_eq!(of([&[2.0, 2.0, 2.0], &[3.0, 3.0, 3.0]]), (4, WHOLE_ROW));
        assert_eq!(of([&[2.0, 2.0, 2.0], &[3.0, 3.0, 5.0]]), (8, 1));
        assert_eq!(of([&[2.0, 2.0, 2.0], &[3.0, 4.0, 4.0]]), (12, 0));
        assert_eq!(of([&[2.0], &[3.0]]), (4, WHOLE_ROW));
        // Not of one row alone.
        let several = [matrix([&[1.0, 1.0], &[1.0, 1.0]]), matrix([&[1.0, 2.0], &[1.0, 1.0]])];
        assert_eq!(scales_of::<{ fp8::BLOCK_BYTES }>(&several, 2), (8, 0));
    }
}
