//! FP8 on its way to a device: codes in order, scales apart from them, as few as say the same.

use crate::upload::{Uploader, row};
use crate::weights::Packed;
use rudder_ops::fp8::{BLOCK_BYTES, BLOCK_LEN, NAN, parts};
use rudder_ops::{OpError, RawTensor, Result};
use std::sync::atomic::{AtomicBool, Ordering};

/// Bits that leave nothing of a block's number.
const WHOLE_ROW: u32 = 31;

/// Bytes of a row's scales on the device, and the shift of a block's number to its scale's: one scale for a row where that will do, one for
/// two blocks (128 elements, as most checkpoints have them) or one for each.
pub(crate) fn scales_of(matrices: &[RawTensor], width: usize) -> (usize, u32) {
    let blocks = width / BLOCK_LEN;
    let agree = |count: usize| {
        matrices.iter().all(|matrix| {
            let (blocks_of, _) = matrix.bytes().as_chunks::<BLOCK_BYTES>();
            let mut rows = blocks_of.chunks_exact(blocks.max(1));
            rows.all(|row| row.chunks(count).all(|some| some.iter().all(|block| block[..4] == some[0][..4])))
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

impl Uploader {
    /// Uploads a matrix of FP8 behind `before` rows of `to`, whose scales are as [`scales_of`] says.
    ///
    /// # Errors
    /// If it holds what is no number, or the copy fails.
    pub fn matrix_fp8(&mut self, raw: &RawTensor, to: &Packed, before: usize) -> Result<()> {
        let (rows, width) = (raw.shape[0], raw.shape[1]);
        // The kernels would take it for 480.
        let no_number = AtomicBool::new(false);
        self.rows(&to.codes, before * width, rows, width, |first, out| {
            let mut found = false;
            for (i, out) in out.chunks_exact_mut(width).enumerate() {
                let (blocks, _) = row(raw, first + i, width).as_chunks::<BLOCK_BYTES>();
                for (block, out) in blocks.iter().zip(out.chunks_exact_mut(BLOCK_LEN)) {
                    let (_, codes) = parts(block);
                    found |= codes.iter().any(|code| code & NAN == NAN);
                    out.copy_from_slice(codes);
                }
            }
            if found {
                no_number.store(true, Ordering::Relaxed);
            }
        })?;
        if no_number.into_inner() {
            return Err(OpError::Backend(format!("tensor {} holds what is no number", raw.name)));
        }
        self.rows(&to.scales, before * to.stride, rows, to.stride, |first, out| {
            for (i, out) in out.chunks_exact_mut(to.stride).enumerate() {
                let (blocks, _) = row(raw, first + i, width).as_chunks::<BLOCK_BYTES>();
                for (scale, out) in out.chunks_exact_mut(4).enumerate() {
                    out.copy_from_slice(&parts(&blocks[scale << (to.shift % WHOLE_ROW)]).0.to_le_bytes());
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rudder_ops::DType;
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
        let of = |scales: [&[f32]; 2]| scales_of(&[matrix(scales)], 64 * scales[0].len());
        assert_eq!(of([&[2.0, 2.0, 2.0], &[3.0, 3.0, 3.0]]), (4, WHOLE_ROW));
        assert_eq!(of([&[2.0, 2.0, 2.0], &[3.0, 3.0, 5.0]]), (8, 1));
        assert_eq!(of([&[2.0, 2.0, 2.0], &[3.0, 4.0, 4.0]]), (12, 0));
        assert_eq!(of([&[2.0], &[3.0]]), (4, WHOLE_ROW));
        // Not of one row alone.
        let several = [matrix([&[1.0, 1.0], &[1.0, 1.0]]), matrix([&[1.0, 2.0], &[1.0, 1.0]])];
        assert_eq!(scales_of(&several, 128), (8, 0));
    }
}
