//! Four-bit integers on their way to a device: codes in the order that the kernels widen them in, and words of scale and zero point apart.

use crate::upload::{Uploader, row};
use crate::weights::{Packed, WHOLE_ROW};
use rudder_ops::int4::BLOCK_BYTES;
use rudder_ops::{RawTensor, Result};

/// Eight codes, the first in the lowest bits, with even ones in the lower half of the word and odd ones in the upper: elements `2p` and `2p + 1` are
/// nibbles `p` and `p + 4`.
pub(crate) fn apart(codes: u32) -> u32 {
    let gather = |nibbles: u32| {
        let bytes = (nibbles | nibbles >> 4) & 0x00ff_00ff;
        (bytes | bytes >> 8) & 0xffff
    };
    gather(codes & 0x0f0f_0f0f) | gather(codes >> 4 & 0x0f0f_0f0f) << 16
}

impl Uploader {
    /// Uploads a matrix of four-bit integers behind `before` rows of `to`, whose scales are as [`crate::weights::scales_of`] says.
    ///
    /// # Errors
    /// If the copy fails.
    pub fn matrix_int4(&mut self, raw: &RawTensor, to: &Packed, before: usize) -> Result<()> {
        let (rows, width) = (raw.shape[0], raw.shape[1]);
        let bytes = width / 2;
        self.rows(&to.codes, before * bytes, rows, bytes, |first, out| {
            for (i, out) in out.chunks_exact_mut(bytes).enumerate() {
                let (blocks, _) = row(raw, first + i, width).as_chunks::<BLOCK_BYTES>();
                for (block, out) in blocks.iter().zip(out.chunks_exact_mut(BLOCK_BYTES - 4)) {
                    for (word, out) in block[4..].as_chunks().0.iter().zip(out.as_chunks_mut().0) {
                        *out = apart(u32::from_le_bytes(*word)).to_le_bytes();
                    }
                }
            }
        })?;
        self.rows(&to.scales, before * to.stride, rows, to.stride, |first, out| {
            for (i, out) in out.chunks_exact_mut(to.stride).enumerate() {
                let (blocks, _) = row(raw, first + i, width).as_chunks::<BLOCK_BYTES>();
                for (scale, out) in out.chunks_exact_mut(4).enumerate() {
                    out.copy_from_slice(&blocks[scale << (to.shift % WHOLE_ROW)][..4]);
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_codes_lie_below_odd_ones() {
        assert_eq!(apart(0x7654_3210), 0x7531_6420);
        assert_eq!(apart(0xfedc_ba98), 0xfdb9_eca8);
    }
}
