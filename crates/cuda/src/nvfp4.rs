//! NVFP4 on its way to a device: codes in the order that the kernels widen them in; a row's factor and scales apart.

use crate::int4::apart;
use crate::upload::{Uploader, row};
use crate::weights::Packed;
use rudder_ops::fp8::NAN;
use rudder_ops::nvfp4::{BLOCK_BYTES, BLOCK_LEN, GROUP, parts};
use rudder_ops::{OpError, RawTensor, Result};
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes of a row's factor and scales.
pub(crate) const fn scale_bytes(padded: usize) -> usize {
    4 + padded / GROUP
}

impl Uploader {
    /// Uploads a matrix of NVFP4 behind `before` rows of `to`.
    ///
    /// # Errors
    /// If a scale is no positive number, a row has several factors, or the copy fails.
    pub fn matrix_nvfp4(&mut self, raw: &RawTensor, to: &Packed, before: usize) -> Result<()> {
        let (rows, width) = (raw.shape[0], raw.shape[1]);
        let refused = AtomicBool::new(false);
        let bytes = width / 2;
        self.rows(&to.codes, before * bytes, rows, bytes, |first, out| {
            for (i, out) in out.chunks_exact_mut(bytes).enumerate() {
                let (blocks, _) = row(raw, first + i, width).as_chunks::<BLOCK_BYTES>();
                for (block, out) in blocks.iter().zip(out.chunks_exact_mut(BLOCK_LEN / 2)) {
                    let (_, scales, codes) = parts(block);
                    if block[..4] != blocks[0][..4] || scales.iter().any(|&scale| scale >= NAN) {
                        refused.store(true, Ordering::Relaxed);
                    }
                    for (word, out) in codes.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
                        *out = apart(u32::from_le_bytes(*word)).to_le_bytes();
                    }
                }
            }
        })?;
        if refused.into_inner() {
            return Err(OpError::Backend(format!(
                "tensor {} has an NVFP4 scale that is not a positive number, or several factors in a row",
                raw.name
            )));
        }
        self.rows(&to.scales, before * to.stride, rows, to.stride, |first, out| {
            for (i, out) in out.chunks_exact_mut(to.stride).enumerate() {
                let (blocks, _) = row(raw, first + i, width).as_chunks::<BLOCK_BYTES>();
                let (factor, scales) = out.split_at_mut(4);
                factor.copy_from_slice(&blocks[0][..4]);
                for (block, out) in blocks.iter().zip(scales.chunks_exact_mut(BLOCK_LEN / GROUP)) {
                    out.copy_from_slice(parts(block).1);
                }
            }
        })
    }
}
