//! GGML's quantised blocks taken apart into integers: the one place that knows their bit layouts.
//!
//! Layouts are those of `ggml-common.h` and `ggml-quants.c` (<https://github.com/ggml-org/ggml>).
//! Every format is brought to one form: element `i` of a block is
//! `(d * scales[i / 16]) * (quants[i] - offset) + min * mins[i / 16]`.

use crate::{DType, mxfp4};
use half::f16;

/// One block of 32 or 256 elements.
#[derive(Clone)]
pub(crate) struct Block {
    /// Unsigned quants.
    pub quants: [u8; 256],
    /// Scale of the block.
    pub d: f16,
    /// What is added per unit of `mins`; zero in formats without minimums.
    pub min: f16,
    /// Scale of each 16 elements, in units of `d`.
    pub scales: [i8; 16],
    /// Minimum of each 16 elements, in units of `min`.
    pub mins: [u8; 16],
    /// Of MXFP4 the scale's byte; its quants are codes ([`mxfp4::UNSIGNED`]), and the form above does not hold.
    pub exponent: u8,
}

impl Block {
    /// A block of zeros.
    pub const fn zero() -> Self {
        Self { quants: [0; 256], d: f16::ZERO, min: f16::ZERO, scales: [1; 16], mins: [1; 16], exponent: 0 }
    }

    /// Reads one block of a quantised format from exactly its bytes. Inlined, as all below it, so that
    /// callers compiled for wide vectors get them.
    #[inline(always)]
    pub fn read(&mut self, dtype: DType, bytes: &[u8]) {
        match dtype {
            DType::F32 | DType::F16 | DType::BF16 | DType::F8_E4M3 | DType::INT4 | DType::NVFP4 => {
                unreachable!("{dtype:?} is none of GGML's quantised formats")
            }
            DType::Q4_0 => {
                self.d = half_at(bytes, 0);
                nibbles(&bytes[2..18], &mut self.quants);
            }
            DType::Q4_1 => {
                (self.d, self.min) = (half_at(bytes, 0), half_at(bytes, 2));
                nibbles(&bytes[4..20], &mut self.quants);
            }
            DType::Q5_0 => {
                self.d = half_at(bytes, 0);
                nibbles(&bytes[6..22], &mut self.quants);
                fifth_bits(&bytes[2..6], &mut self.quants);
            }
            DType::Q5_1 => {
                (self.d, self.min) = (half_at(bytes, 0), half_at(bytes, 2));
                nibbles(&bytes[8..24], &mut self.quants);
                fifth_bits(&bytes[4..8], &mut self.quants);
            }
            DType::Q8_0 => {
                self.d = half_at(bytes, 0);
                for (quant, &byte) in self.quants.iter_mut().zip(&bytes[2..34]) {
                    *quant = byte ^ 0x80; // signed to offset 128
                }
            }
            DType::Q2_K => self.read_q2_k(bytes),
            DType::Q3_K => self.read_q3_k(bytes),
            DType::Q4_K => {
                self.read_k_scales(bytes);
                k_nibbles(&bytes[16..144], &mut self.quants);
            }
            DType::Q5_K => {
                self.read_k_scales(bytes);
                k_nibbles(&bytes[48..176], &mut self.quants);
                for (group, quants) in self.quants.chunks_exact_mut(32).enumerate() {
                    for (quant, high) in quants.iter_mut().zip(&bytes[16..48]) {
                        *quant |= (high >> group & 1) << 4;
                    }
                }
            }
            DType::Q6_K => self.read_q6_k(bytes),
            DType::MXFP4 => {
                self.exponent = bytes[0];
                nibbles(&bytes[1..17], &mut self.quants);
            }
        }
    }

    /// Scale and minimum of each 16 elements in a nibble each; two bits an element.
    #[inline(always)]
    fn read_q2_k(&mut self, bytes: &[u8]) {
        (self.d, self.min) = (half_at(bytes, 80), -half_at(bytes, 82));
        for (i, &byte) in bytes[..16].iter().enumerate() {
            self.scales[i] = (byte & 15) as i8;
            self.mins[i] = byte >> 4;
        }
        two_bits(&bytes[16..80], &mut self.quants);
    }

    /// Two bits of each element, and a third from a mask; six-bit scales in twelve bytes.
    #[inline(always)]
    fn read_q3_k(&mut self, bytes: &[u8]) {
        self.d = half_at(bytes, 108);
        two_bits(&bytes[32..96], &mut self.quants);
        for (group, quants) in self.quants.chunks_exact_mut(32).enumerate() {
            for (quant, high) in quants.iter_mut().zip(&bytes[..32]) {
                *quant |= (high >> group & 1) << 2;
            }
        }
        let packed = &bytes[96..108];
        for i in 0..16 {
            let low = if i < 8 { packed[i] & 15 } else { packed[i - 8] >> 4 };
            let high = packed[8 + i % 4] >> (2 * (i / 4)) & 3;
            self.scales[i] = (low | high << 4) as i8 - 32;
        }
    }

    /// Four low bits and two high bits of each element; eight-bit scales.
    #[inline(always)]
    fn read_q6_k(&mut self, bytes: &[u8]) {
        self.d = half_at(bytes, 208);
        for (scale, &byte) in self.scales.iter_mut().zip(&bytes[192..208]) {
            *scale = byte as i8;
        }
        for (half, quants) in self.quants.chunks_exact_mut(128).enumerate() {
            let (low, high) = (&bytes[half * 64..][..64], &bytes[128 + half * 32..][..32]);
            for i in 0..32 {
                quants[i] = (low[i] & 15) | (high[i] & 3) << 4;
                quants[i + 32] = (low[i + 32] & 15) | (high[i] >> 2 & 3) << 4;
                quants[i + 64] = low[i] >> 4 | (high[i] >> 4 & 3) << 4;
                quants[i + 96] = low[i + 32] >> 4 | (high[i] >> 6) << 4;
            }
        }
    }

    /// The head of Q4_K and Q5_K: two halves and eight six-bit scales and minimums in twelve bytes.
    #[inline(always)]
    fn read_k_scales(&mut self, bytes: &[u8]) {
        (self.d, self.min) = (half_at(bytes, 0), -half_at(bytes, 2));
        let packed = &bytes[4..16];
        for i in 0..8 {
            let (scale, min) = if i < 4 {
                (packed[i] & 63, packed[i + 4] & 63)
            } else {
                ((packed[i + 4] & 15) | (packed[i - 4] >> 6) << 4, packed[i + 4] >> 4 | (packed[i] >> 6) << 4)
            };
            self.scales[2 * i..2 * i + 2].fill(scale as i8);
            self.mins[2 * i..2 * i + 2].fill(min);
        }
    }
}

/// What is subtracted from a format's unsigned quants.
pub(crate) const fn offset(dtype: DType) -> i32 {
    match dtype {
        DType::Q4_0 => 8,
        DType::Q5_0 => 16,
        DType::Q8_0 => 128,
        DType::Q3_K => 4,
        DType::Q6_K => 32,
        DType::MXFP4 => mxfp4::OFFSET,
        _ => 0,
    }
}

#[inline(always)]
fn half_at(bytes: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// 32 elements: the low nibbles, then the high ones.
#[inline(always)]
fn nibbles(bytes: &[u8], quants: &mut [u8; 256]) {
    for (i, byte) in bytes.iter().enumerate() {
        quants[i] = byte & 15;
        quants[i + 16] = byte >> 4;
    }
}

#[inline(always)]
fn fifth_bits(bytes: &[u8], quants: &mut [u8; 256]) {
    let bits = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    for (i, quant) in quants[..32].iter_mut().enumerate() {
        *quant |= ((bits >> i & 1) as u8) << 4;
    }
}

/// 256 elements: for each 32 bytes, 32 low nibbles, then the 32 high ones.
#[inline(always)]
fn k_nibbles(bytes: &[u8], quants: &mut [u8; 256]) {
    for (bytes, quants) in bytes.chunks_exact(32).zip(quants.chunks_exact_mut(64)) {
        let (low, high) = quants.split_at_mut(32);
        for i in 0..32 {
            low[i] = bytes[i] & 15;
            high[i] = bytes[i] >> 4;
        }
    }
}

/// 256 elements: for each 32 bytes, their lowest bit pairs, then the next ones.
#[inline(always)]
fn two_bits(bytes: &[u8], quants: &mut [u8; 256]) {
    for (bytes, quants) in bytes.chunks_exact(32).zip(quants.chunks_exact_mut(128)) {
        for (pair, quants) in quants.chunks_exact_mut(32).enumerate() {
            for (quant, byte) in quants.iter_mut().zip(bytes) {
                *quant = byte >> (2 * pair) & 3;
            }
        }
    }
}
