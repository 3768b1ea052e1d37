//! FP8 on its way to a device: codes in order, scales apart from them.

use crate::upload::{Uploader, row};
use crate::weights::{Packed, WHOLE_ROW};
use rudder_ops::fp8::{BLOCK_BYTES, BLOCK_LEN, NAN, parts};
use rudder_ops::{OpError, RawTensor, Result};
use std::sync::atomic::{AtomicBool, Ordering};

impl Uploader {
    /// Uploads a matrix of FP8 behind `before` rows of `to`, whose scales are as [`crate::weights::scales_of`] says.
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
