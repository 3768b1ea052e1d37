//! MXFP4: blocks of 32 numbers of four bits (E2M1) that share a scale, a power of two (E8M0).
//!
//! OCP Microscaling Formats (MX) Specification, version 1.0, sections 5.2 and 5.3. In memory a block is GGML's
//! `block_mxfp4`: the scale's byte, then 16 bytes whose low nibbles are elements 0 to 15 and whose high ones are 16 to 31.

/// Elements of a block.
pub const BLOCK_LEN: usize = 32;
/// Bytes of a block.
pub const BLOCK_BYTES: usize = 17;

/// Twice the number that each code stands for: sign, two bits of exponent, one of mantissa.
pub(crate) const DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// What is added to [`DOUBLED`] so that no number is negative.
pub(crate) const OFFSET: i32 = 12;

/// Twice the number that each code stands for, plus [`OFFSET`].
pub(crate) const UNSIGNED: [u8; 16] = {
    let mut table = [0; 16];
    let mut code = 0;
    while code < 16 {
        table[code] = (DOUBLED[code] as i32 + OFFSET) as u8;
        code += 1;
    }
    table
};

/// A block in this layout, from codes in order and the scale's byte.
pub fn block(scale: u8, codes: &[u8; BLOCK_LEN]) -> [u8; BLOCK_BYTES] {
    let mut block = [scale; BLOCK_BYTES];
    for (i, byte) in block[1..].iter_mut().enumerate() {
        *byte = codes[i] & 15 | codes[i + 16] << 4;
    }
    block
}

/// The codes of a block in order.
#[inline(always)]
pub fn codes(block: &[u8; BLOCK_BYTES]) -> [u8; BLOCK_LEN] {
    let mut codes = [0; BLOCK_LEN];
    for (i, byte) in block[1..].iter().enumerate() {
        codes[i] = byte & 15;
        codes[i + 16] = byte >> 4;
    }
    codes
}

/// `2^(byte - 127)`; 255 is no number.
fn scale(byte: u8) -> f32 {
    match byte {
        0 => f32::from_bits(1 << 22), // subnormal
        255 => f32::NAN,
        exponent => f32::from_bits(u32::from(exponent) << 23),
    }
}

/// Widens whole blocks to as many elements of `out`.
pub(crate) fn dequantize(bytes: &[u8], out: &mut [f32]) {
    for (block, out) in bytes.as_chunks::<BLOCK_BYTES>().0.iter().zip(out.chunks_exact_mut(BLOCK_LEN)) {
        let scale = scale(block[0]);
        for (y, code) in out.iter_mut().zip(codes(block)) {
            *y = f32::from(DOUBLED[usize::from(code)]) * 0.5 * scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_and_scale_is_what_the_specification_says() {
        // Table 2 of the specification's E2M1: the positive half, then the negative one.
        let positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        let values: Vec<f32> = positive.iter().copied().chain(positive.iter().map(|x| -x)).collect();
        let in_order: [u8; 32] = std::array::from_fn(|i| i as u8 % 16);
        let mut out = [0.0; 32];
        for (byte, exponent) in [(0, -127), (1, -126), (118, -9), (127, 0), (130, 3), (250, 123)] {
            dequantize(&block(byte, &in_order), &mut out);
            for (i, y) in out.iter().enumerate() {
                assert_eq!(*y, values[i % 16] * 2f32.powi(exponent), "code {}, scale {byte}", i % 16);
            }
        }
        dequantize(&block(255, &in_order), &mut out);
        assert!(out.iter().all(|y| y.is_nan()));
    }

    #[test]
    fn a_blocks_codes_come_back_in_order() {
        let in_order: [u8; 32] = std::array::from_fn(|i| (i * 7 % 16) as u8);
        let block = block(99, &in_order);
        assert_eq!((block[0], block[1], block[16]), (99, 0, 9 | 9 << 4));
        assert_eq!(codes(&block), in_order);
    }
}
