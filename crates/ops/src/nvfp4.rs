//! NVFP4 weights: blocks of 64 numbers of four bits (E2M1), each 16 of which share a scale of eight bits (E4M3), and all a factor.
//!
//! NVIDIA's format ("Pretraining Large Language Models with NVFP4", arXiv:2509.25149, section 2): a number is `code * scale * factor`, the factor one f32
//! for a matrix. In memory a block is the factor, four scales, then 32 bytes of codes in order, the lower half of a byte first.

use crate::fp8;
use crate::mxfp4::DOUBLED;

/// Numbers of a block.
pub const BLOCK_LEN: usize = 64;
/// Bytes of a block.
pub const BLOCK_BYTES: usize = 4 + BLOCK_LEN / GROUP + BLOCK_LEN / 2;
/// Numbers that share a scale.
pub const GROUP: usize = 16;

/// A block's factor, its scales and its codes.
#[inline]
pub fn parts(block: &[u8; BLOCK_BYTES]) -> (f32, &[u8], &[u8]) {
    let (factor, rest) = block.split_at(4);
    let (scales, codes) = rest.split_at(BLOCK_LEN / GROUP);
    (f32::from_le_bytes([factor[0], factor[1], factor[2], factor[3]]), scales, codes)
}

/// Widens whole blocks to as many elements of `out`.
pub(crate) fn dequantize(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.as_chunks::<BLOCK_BYTES>().0.iter().zip(out.chunks_exact_mut(BLOCK_LEN)) {
        let (factor, scales, codes) = parts(block);
        let groups = out.chunks_exact_mut(GROUP).zip(codes.chunks_exact(GROUP / 2)).zip(scales);
        for ((out, codes), scale) in groups {
            let number = |code: u8| {
                f32::from(DOUBLED[usize::from(code)]) * 0.5 * fp8::NUMBERS[usize::from(*scale)] * factor
            };
            for (pair, byte) in out.chunks_exact_mut(2).zip(codes) {
                (pair[0], pair[1]) = (number(byte & 15), number(byte >> 4));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_its_code_times_scale_and_factor() {
        let mut block = [0x72; BLOCK_BYTES];
        block[..4].copy_from_slice(&0.25f32.to_le_bytes());
        // 1, the least and the largest scale, and 0.
        block[4..8].copy_from_slice(&[0x38, 0x01, 0x7e, 0x00]);
        block[8] = 0xf9;
        let mut out = [0.0; BLOCK_LEN];
        dequantize(&block, &mut out);
        assert_eq!((out[0], out[1], out[2], out[3]), (-0.125, -1.5, 0.25, 1.5));
        assert_eq!((out[16], out[17]), (0.25 / 512.0, 1.5 / 512.0));
        assert_eq!((out[32], out[33], out[48]), (112.0, 672.0, 0.0));
    }
}
