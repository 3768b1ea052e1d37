//! MXFP4 on its way to a device: codes and scales apart, in the order that matmul.cu's fragments take them.

use crate::device::Buffer;
use crate::upload::{Uploader, row};
use rudder_ops::mxfp4::{BLOCK_BYTES, BLOCK_LEN, codes};
use rudder_ops::{OpError, RawTensor, Result};

/// The largest scale's byte that the kernels take, a factor of 2.
const MOST_SCALE: u8 = 128;

/// Bytes of a row's codes.
const fn code_bytes(padded: usize) -> usize {
    padded / 2
}

/// Bytes of a row's scales.
pub(crate) const fn scale_bytes(padded: usize) -> usize {
    padded / BLOCK_LEN
}

impl Uploader {
    /// Uploads a matrix `[rows, width]` of MXFP4 behind `before` rows of `to`, codes and scales, each row followed by zeros up to
    /// `padded` elements.
    ///
    /// # Errors
    /// If a scale is larger than the kernels take, or the copy fails.
    pub fn matrix_mxfp4(
        &mut self,
        raw: &RawTensor,
        padded: usize,
        [to_codes, to_scales]: [&Buffer; 2],
        before: usize,
    ) -> Result<()> {
        let (blocks, _) = raw.bytes().as_chunks::<BLOCK_BYTES>();
        if let Some(block) = blocks.iter().find(|block| block[0] > MOST_SCALE) {
            return Err(OpError::Backend(format!(
                "tensor {}: an MXFP4 scale of 2^{} is more than the GPU's kernels take (2^{})",
                raw.name,
                i32::from(block[0]) - 127,
                i32::from(MOST_SCALE) - 127
            )));
        }
        let (rows, width) = (raw.shape[0], raw.shape[1]);
        let bytes = code_bytes(padded);
        self.rows(to_codes, before * bytes, rows, bytes, |first, out| {
            for (i, out) in out.chunks_exact_mut(bytes).enumerate() {
                let (blocks, _) = row(raw, first + i, width).as_chunks::<BLOCK_BYTES>();
                let (out, zeros) = out.split_at_mut(code_bytes(width));
                for (block, out) in blocks.iter().zip(out.chunks_exact_mut(BLOCK_LEN / 2)) {
                    out.copy_from_slice(&as_words(&codes(block)));
                }
                zeros.fill(0);
            }
        })?;
        let bytes = scale_bytes(padded);
        self.rows(to_scales, before * bytes, rows, bytes, |first, out| {
            for (i, out) in out.chunks_exact_mut(bytes).enumerate() {
                let (blocks, _) = row(raw, first + i, width).as_chunks::<BLOCK_BYTES>();
                out.fill(0);
                for (block, out) in blocks.iter().zip(out) {
                    *out = block[0];
                }
            }
        })
    }
}

/// Four words of eight codes: elements `2p` and `2p + 1` of each eight are nibbles `p` and `p + 4`.
fn as_words(codes: &[u8; BLOCK_LEN]) -> [u8; BLOCK_LEN / 2] {
    let mut words = [0; BLOCK_LEN / 2];
    for (eight, word) in codes.chunks_exact(8).zip(words.chunks_exact_mut(4)) {
        let pairs = eight.chunks_exact(2).enumerate();
        let bits = pairs.fold(0u32, |bits, (p, pair)| {
            bits | u32::from(pair[0]) << (4 * p) | u32::from(pair[1]) << (4 * p + 16)
        });
        word.copy_from_slice(&bits.to_le_bytes());
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_holds_even_elements_below_odd_ones() {
        let codes: [u8; 32] = std::array::from_fn(|i| (i % 16) as u8);
        let words = as_words(&codes);
        assert_eq!(words[..4], 0x7531_6420u32.to_le_bytes());
        assert_eq!(words[4..8], 0xfdb9_eca8u32.to_le_bytes());
    }
}
