//! FP8 weights: blocks of 64 numbers of eight bits (E4M3) that share a scale.
//!
//! The number format: Micikevicius et al. 2022 (arXiv:2209.05433), without infinities. In memory a block is the scale, an f32 that every
//! number is multiplied with, then the numbers' bytes. Scales for larger parts of a matrix are repeated.

/// Numbers of a block.
pub const BLOCK_LEN: usize = 64;
/// Bytes of a block.
pub const BLOCK_BYTES: usize = 4 + BLOCK_LEN;

/// The byte, beside its sign, that is no number.
pub const NAN: u8 = 0x7f;

/// Every number that a byte may stand for.
pub const NUMBERS: [f32; 256] = {
    let mut numbers = [0.0; 256];
    let mut byte = 0;
    while byte < 256 {
        numbers[byte] = number(byte as u32);
        byte += 1;
    }
    numbers
};

/// A sign, four bits of exponent with bias 7 and three of mantissa.
const fn number(byte: u32) -> f32 {
    let (sign, exponent, mantissa) = (byte >> 7, byte >> 3 & 15, byte & 7);
    let magnitude = match (exponent, mantissa) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa as f32 / 512.0,
        _ => f32::from_bits((exponent + 120) << 23 | mantissa << 20),
    };
    if sign == 1 { -magnitude } else { magnitude }
}

/// A block's scale, and the bytes of its numbers.
#[inline]
pub fn parts(block: &[u8; BLOCK_BYTES]) -> (f32, &[u8]) {
    let (scale, bytes) = block.split_at(4);
    (f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]), bytes)
}

/// Widens whole blocks to as many elements of `out`.
pub(crate) fn dequantize(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.as_chunks::<BLOCK_BYTES>().0.iter().zip(out.chunks_exact_mut(BLOCK_LEN)) {
        let (scale, bytes) = parts(block);
        for (y, byte) in out.iter_mut().zip(bytes) {
            *y = NUMBERS[usize::from(*byte)] * scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_stand_for_the_numbers_of_the_format() {
        // Table 1 of the format's paper: the largest, the least normal one, the subnormal ones' ends, and what is no number.
        for (byte, value) in [
            (0x00, 0.0),
            (0x01, 0.001_953_125),
            (0x07, 0.013_671_875),
            (0x08, 0.015_625),
            (0x38, 1.0),
            (0x7e, 448.0),
        ] {
            assert_eq!(NUMBERS[byte], value, "{byte:#x}");
            assert_eq!(NUMBERS[byte + 128], -value, "{byte:#x}, negative");
        }
        assert!(NUMBERS[usize::from(NAN)].is_nan() && NUMBERS[0xff].is_nan());
        assert!(NUMBERS[..0x7f].is_sorted_by(|a, b| a < b));
    }

    #[test]
    fn a_block_is_its_scale_times_its_numbers() {
        let mut block = [0x38; BLOCK_BYTES];
        block[..4].copy_from_slice(&0.75f32.to_le_bytes());
        block[4] = 0xc0;
        let mut out = [0.0; BLOCK_LEN];
        dequantize(&block, &mut out);
        assert_eq!((out[0], out[1], out[63]), (-1.5, 0.75, 0.75));
    }
}
