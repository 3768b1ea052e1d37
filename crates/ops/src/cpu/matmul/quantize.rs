//! Activations as the weights' formats want them: for quantised weights one f32 scale and int8 values for each
//! 32 inputs of a row, for BF16 weights rounded to pairs of bf16.

use super::layout::BLOCK;
use crate::cpu::memory::Number;
use crate::cpu::simd::{self, Kernel, Level, Simd};

/// 32 inputs of one row. One cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Activations {
    /// `round(x / scale)`, in `-127 ..= 127`.
    pub quants: [i8; BLOCK],
    /// Largest magnitude divided by 127; NaN if an input is not finite.
    pub scale: f32,
    /// Sum of the quants.
    pub sum: i32,
    /// `scale * sum`.
    pub scaled_sum: f32,
    /// Sums of the first and the last 16 quants.
    pub sums: [i32; 2],
    /// `scale * sums`.
    pub scaled_sums: [f32; 2],
}

// SAFETY: every pattern of bits is a value; it is a cache line.
unsafe impl Number for Activations {}

impl Activations {
    pub const ZERO: Self =
        Self { quants: [0; BLOCK], scale: 0.0, sum: 0, scaled_sum: 0.0, sums: [0; 2], scaled_sums: [0.0; 2] };
}

/// Quantises rows `x`; the widths are a multiple of [`BLOCK`].
pub(super) fn quantize(x: &[f32], out: &mut [Activations]) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the feature was just detected.
        unsafe { quantize_avx2(x, out) };
        return;
    }
    quantize_blocks(x, out);
}

/// The same code, compiled for AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn quantize_avx2(x: &[f32], out: &mut [Activations]) {
    quantize_blocks(x, out);
}

#[inline(always)]
fn quantize_blocks(x: &[f32], out: &mut [Activations]) {
    for (x, block) in x.as_chunks::<BLOCK>().0.iter().zip(out) {
        quantize_block(x, block);
    }
}

#[inline(always)]
fn quantize_block(x: &[f32; BLOCK], out: &mut Activations) {
    /// Adding it leaves a small float rounded to the nearest integer, ties to even, in the low bits.
    const ROUND: f32 = 12_582_912.0;
    /// Below this the inverse scale would overflow; such blocks count as zero.
    const SMALLEST: f32 = 1e-36;

    // The magnitude's bits order as the magnitudes do, and a NaN above all, which f32::max would lose.
    let largest = f32::from_bits(x.iter().fold(0, |m, v| m.max(v.to_bits() & 0x7fff_ffff)));
    if !largest.is_finite() {
        *out = Activations {
            scale: f32::NAN,
            scaled_sum: f32::NAN,
            scaled_sums: [f32::NAN; 2],
            ..Activations::ZERO
        };
        return;
    }
    if largest < SMALLEST {
        *out = Activations::ZERO;
        return;
    }
    let scale = largest / 127.0;
    let inverse = 127.0 / largest;
    let mut quants = [0i32; BLOCK];
    for (quant, v) in quants.iter_mut().zip(x) {
        *quant = (v * inverse + ROUND).to_bits() as i32 - ROUND.to_bits() as i32;
    }
    let sums = [quants[..16].iter().sum(), quants[16..].iter().sum()];
    let sum: i32 = sums[0] + sums[1];
    *out = Activations {
        quants: quants.map(|q| q as i8),
        scale,
        sum,
        scaled_sum: scale * sum as f32,
        sums,
        scaled_sums: sums.map(|s| scale * s as f32),
    };
}

/// Rounds rows of `width` inputs to [`Pairs`].
pub(super) fn to_bf16(x: &[f32], width: usize, out: &mut [u32]) {
    // Rows of whole pairs are one long row.
    let row = if width.is_multiple_of(2) { x.len() } else { width };
    Level::detect().run(Pairs { x, row, out });
}

/// Rounds rows of `row` inputs to pairs of bf16, the first in the low half; a row of odd width ends with a zero.
pub(in crate::cpu) struct Pairs<'a> {
    pub x: &'a [f32],
    pub row: usize,
    pub out: &'a mut [u32],
}

impl Kernel for Pairs<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for (row, out) in self.x.chunks_exact(self.row).zip(self.out.chunks_exact_mut(self.row.div_ceil(2))) {
            let (vectors, rest) = row.as_chunks::<{ 2 * simd::LANES }>();
            let (to, rest_out) = out.split_at_mut(vectors.len() * simd::LANES);
            for (two, to) in vectors.iter().zip(to.chunks_exact_mut(simd::LANES)) {
                // SAFETY: there are two vectors of numbers and one of pairs; the instructions are the caller's promise.
                unsafe {
                    let (a, b) = (S::load(two.as_ptr()), S::load(two.as_ptr().add(simd::LANES)));
                    S::store_pairs(to.as_mut_ptr(), S::pair(a, b));
                }
            }
            let (pairs, last) = rest.as_chunks::<2>();
            pair_bf16(pairs, rest_out);
            if let (&[a], Some(out)) = (last, rest_out.last_mut()) {
                *out = u32::from(round_bf16(a));
            }
        }
    }
}

/// Rounds pairs of numbers to pairs of bf16.
#[inline(always)]
pub(in crate::cpu) fn pair_bf16(pairs: &[[f32; 2]], out: &mut [u32]) {
    for (out, &[a, b]) in out.iter_mut().zip(pairs) {
        *out = u32::from(round_bf16(a)) | u32::from(round_bf16(b)) << 16;
    }
}

/// The nearest bf16, ties to even, as bits; subnormals are zeros and NaN stays NaN, as `vcvtneps2bf16` has it.
#[inline(always)]
pub(in crate::cpu) fn round_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    let high = (bits >> 16) as u16;
    match bits & 0x7fff_ffff {
        ..0x0080_0000 => high & 0x8000,
        0x7f80_0001.. => high | 0x40,
        _ => rounded,
    }
}

/// A bf16 with subnormals flushed to zero.
#[inline(always)]
pub(super) fn flush_bf16(bits: u16) -> u16 {
    if bits & 0x7f80 == 0 { bits & 0x8000 } else { bits }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_rounded_to_the_nearest_of_127_steps_and_summed() {
        let x: Vec<f32> = (0..32).map(|i| (i as f32 - 11.0) * 0.37).collect();
        let mut out = [Activations::ZERO];
        quantize(&x, &mut out);
        let [block] = out;
        assert_eq!(block.scale, 20.0 * 0.37 / 127.0);
        for (q, v) in block.quants.iter().zip(&x) {
            assert!((f32::from(*q) * block.scale - v).abs() <= block.scale * 0.5001);
        }
        assert_eq!(block.sums[0], block.quants[..16].iter().map(|&q| i32::from(q)).sum::<i32>());
        assert_eq!(block.sum, block.quants.iter().map(|&q| i32::from(q)).sum::<i32>());
        assert_eq!(block.scaled_sum, block.scale * block.sum as f32);
    }

    #[test]
    fn bf16_is_the_nearest_with_subnormals_as_zeros() {
        let mut x: Vec<f32> = (0..300u32).map(|i| f32::from_bits(0x3f7f_8000 + 0x80 * i)).collect();
        x.extend([0.0, -0.0, 1e-39, -1e-39, f32::MAX, f32::INFINITY, f32::NEG_INFINITY]);
        let mut out = vec![0; 2 * x.len()];
        let rows: Vec<f32> = x.iter().flat_map(|&v| [v, 1.0, v]).collect();
        to_bf16(&rows, 3, &mut out);
        for (&x, pairs) in x.iter().zip(out.chunks_exact(2)) {
            let nearest =
                half::bf16::from_f32(if x.abs() < f32::MIN_POSITIVE { 0.0 * x } else { x }).to_bits();
            assert_eq!(pairs, [u32::from(nearest) | 0x3f80 << 16, u32::from(nearest)], "{x}");
        }
        to_bf16(&[f32::NAN, f32::from_bits(0xff80_0001)], 2, &mut out);
        assert!([out[0], out[0] >> 16].iter().all(|&half| f32::from_bits(half << 16).is_nan()));
    }

    #[test]
    fn a_block_that_is_not_finite_is_marked_and_tiny_or_huge_ones_are_not() {
        for (value, nan) in [(f32::NAN, true), (f32::INFINITY, true), (1e-40, false), (3e38, false)] {
            let mut x = [0.5; 32];
            x[7] = value;
            x[9] = -value;
            let mut out = [Activations::ZERO];
            quantize(&x, &mut out);
            assert_eq!(out[0].scale.is_nan(), nan, "{value}");
            assert_eq!(out[0].scaled_sum.is_nan(), nan);
        }
    }
}
