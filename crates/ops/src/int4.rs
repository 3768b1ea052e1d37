//! Weights of four bits: blocks of 128 integers from 0 to 15 that share a scale and a zero point.
//!
//! A number is `scale * (code - zero)`: what GPTQ (arXiv:2210.17323), AWQ (arXiv:2306.00978) and compressed-tensors store, each in an order of
//! its own. In memory a block is a word, the scale as f32 with the zero point, 0 to 16, in its five lowest bits, then 64 bytes of
//! codes in order, the lower half of a byte first. Those bits are free: scales are stored as f16 or bf16.

/// Numbers of a block.
pub const BLOCK_LEN: usize = 128;
/// Bytes of a block.
pub const BLOCK_BYTES: usize = 4 + BLOCK_LEN / 2;

/// Bits of a word that hold the zero point.
const ZERO: u32 = 31;

/// A block's word. What the scale's lowest bits were is rounded away.
pub fn word(scale: f32, zero: u8) -> [u8; 4] {
    let bits = scale.to_bits();
    // What is no finite number stays so.
    let rounded = if scale.is_finite() { bits.saturating_add(16) & !ZERO } else { bits & !ZERO };
    (rounded | u32::from(zero) & ZERO).to_le_bytes()
}

/// A word's scale and zero point.
pub fn parts(word: [u8; 4]) -> (f32, u8) {
    let bits = u32::from_le_bytes(word);
    (f32::from_bits(bits & !ZERO), (bits & ZERO) as u8)
}

/// Widens whole blocks to as many elements of `out`.
pub(crate) fn dequantize(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.as_chunks::<BLOCK_BYTES>().0.iter().zip(out.chunks_exact_mut(BLOCK_LEN)) {
        let (scale, zero) = parts([block[0], block[1], block[2], block[3]]);
        let number = |code: u8| scale * (f32::from(code) - f32::from(zero));
        for (pair, byte) in out.chunks_exact_mut(2).zip(&block[4..]) {
            (pair[0], pair[1]) = (number(byte & 15), number(byte >> 4));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    #[test]
    fn scales_that_checkpoints_store_and_every_zero_point_come_back() {
        for scale in [
            f16::from_f32(0.0123).to_f32(),
            bf16::from_f32(-3.3e-5).to_f32(),
            f16::MIN_POSITIVE_SUBNORMAL.to_f32(),
            0.0,
        ] {
            for zero in 0..=16 {
                assert_eq!(parts(word(scale, zero)), (scale, zero));
            }
        }
        assert!((parts(word(0.1, 8)).0 / 0.1 - 1.0).abs() < 4e-6);
    }

    #[test]
    fn a_block_is_its_scale_times_codes_from_the_zero_point_on() {
        let mut block = [0x70; BLOCK_BYTES];
        block[..4].copy_from_slice(&word(0.5, 5));
        block[4] = 0xf3;
        let mut out = [0.0; BLOCK_LEN];
        dequantize(&block, &mut out);
        assert_eq!((out[0], out[1], out[2], out[3], out[127]), (-1.0, 5.0, -2.5, 1.0, 1.0));
    }
}
