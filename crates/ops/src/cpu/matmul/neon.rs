//! The kernels' vector operations on 64-bit ARM with the dot product extension: four registers are one vector.

#![allow(clippy::undocumented_unsafe_blocks)] // every block rests on the safety section of `Unit`

use super::unit::Unit;
use std::arch::aarch64::*;
use std::arch::asm;

/// NEON with dot product.
pub(super) struct Neon;

#[inline(always)]
unsafe fn field<const SHIFT: i32>(a: uint8x16_t, mask: u8) -> uint8x16_t {
    unsafe {
        let shifted = match SHIFT {
            -4 => vshlq_n_u8::<4>(a),
            -3 => vshlq_n_u8::<3>(a),
            -2 => vshlq_n_u8::<2>(a),
            -1 => vshlq_n_u8::<1>(a),
            0 => a,
            1 => vshrq_n_u8::<1>(a),
            2 => vshrq_n_u8::<2>(a),
            3 => vshrq_n_u8::<3>(a),
            4 => vshrq_n_u8::<4>(a),
            6 => vshrq_n_u8::<6>(a),
            _ => unreachable!(),
        };
        vandq_u8(shifted, vdupq_n_u8(mask))
    }
}

/// `sdot`, whose intrinsic is not stable yet.
#[inline(always)]
unsafe fn sdot(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {sum:v}.4s, {a:v}.16b, {b:v}.16b",
            sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// Unsigned times signed bytes. `sdot` takes signed ones only, so where they may exceed 127 they are moved down by
/// 128 and 128 times the sum of `x` is added.
#[inline(always)]
unsafe fn dot<const WIDE: bool>(sum: int32x4_t, quants: uint8x16_t, x: int8x16_t) -> int32x4_t {
    unsafe {
        if !WIDE {
            return sdot(sum, vreinterpretq_s8_u8(quants), x);
        }
        let moved = vreinterpretq_s8_u8(veorq_u8(quants, vdupq_n_u8(0x80)));
        let back = sdot(vdupq_n_s32(0), vdupq_n_s8(-128), x);
        vsubq_s32(sdot(sum, moved, x), back)
    }
}

/// Sixteen 16-bit values widened to f32 lanes.
#[inline(always)]
unsafe fn widen(low: int16x8_t, high: int16x8_t) -> [float32x4_t; 4] {
    unsafe {
        [
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
            vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
            vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
            vcvtq_f32_s32(vmovl_s16(vget_high_s16(high))),
        ]
    }
}

#[inline(always)]
unsafe fn dot_bf16(sum: float32x4_t, weights: uint8x16_t, first: f32, second: f32) -> float32x4_t {
    unsafe {
        let pairs = vreinterpretq_u32_u8(weights);
        let high = vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff_0000)));
        let low = vreinterpretq_f32_u32(vshlq_n_u32::<16>(pairs));
        let sum = vfmaq_f32(sum, high, vdupq_n_f32(second));
        vfmaq_f32(sum, low, vdupq_n_f32(first))
    }
}

/// Applies an expression to the four registers of vectors.
macro_rules! each {
    (|$i:ident| $e:expr) => {{
        let quarter = |$i: usize| unsafe { $e };
        [quarter(0), quarter(1), quarter(2), quarter(3)]
    }};
}

impl Unit for Neon {
    type Ints = [int32x4_t; 4];
    type Floats = [float32x4_t; 4];
    type Bytes = [uint8x16_t; 4];
    type Simd = crate::cpu::simd::Plain;

    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> Self::Bytes {
        each!(|i| vld1q_u8(from.add(16 * i)))
    }
    #[inline(always)]
    unsafe fn store_bytes(bytes: Self::Bytes, to: *mut u8) {
        unsafe {
            for (i, quarter) in bytes.into_iter().enumerate() {
                vst1q_u8(to.add(16 * i), quarter);
            }
        }
    }
    #[inline(always)]
    unsafe fn field<const SHIFT: i32>(a: Self::Bytes, mask: u8) -> Self::Bytes {
        each!(|i| field::<SHIFT>(a[i], mask))
    }
    #[inline(always)]
    unsafe fn or(a: Self::Bytes, b: Self::Bytes) -> Self::Bytes {
        each!(|i| vorrq_u8(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn splat_int(value: i32) -> Self::Ints {
        unsafe { [vdupq_n_s32(value); 4] }
    }
    #[inline(always)]
    unsafe fn dot<const WIDE: bool>(sum: Self::Ints, quants: Self::Bytes, x: i32) -> Self::Ints {
        let x = unsafe { vreinterpretq_s8_s32(vdupq_n_s32(x)) };
        each!(|i| dot::<WIDE>(sum[i], quants[i], x))
    }
    #[inline(always)]
    unsafe fn to_floats(ints: Self::Ints) -> Self::Floats {
        each!(|i| vcvtq_f32_s32(ints[i]))
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self::Floats {
        unsafe { [vdupq_n_f32(value); 4] }
    }
    #[inline(always)]
    unsafe fn add(a: Self::Floats, b: Self::Floats) -> Self::Floats {
        each!(|i| vaddq_f32(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats {
        each!(|i| vmulq_f32(a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn fused(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats {
        each!(|i| vfmaq_f32(c[i], a[i], b[i]))
    }
    #[inline(always)]
    unsafe fn load_f32(from: *const u8) -> Self::Floats {
        each!(|i| vreinterpretq_f32_u8(vld1q_u8(from.add(16 * i))))
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> Self::Floats {
        each!(|i| vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(from.add(8 * i)))))
    }
    #[inline(always)]
    unsafe fn dot_bf16(sum: Self::Floats, weights: Self::Bytes, x: u32) -> Self::Floats {
        let (first, second) = (f32::from_bits(x << 16), f32::from_bits(x & 0xffff_0000));
        each!(|i| dot_bf16(sum[i], weights[i], first, second))
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> Self::Floats {
        unsafe {
            let bytes = vreinterpretq_s8_u8(vld1q_u8(from));
            widen(vmovl_s8(vget_low_s8(bytes)), vmovl_s8(vget_high_s8(bytes)))
        }
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> Self::Floats {
        unsafe {
            let bytes = vld1q_u8(from);
            let (low, high) = (vmovl_u8(vget_low_u8(bytes)), vmovl_u8(vget_high_u8(bytes)));
            widen(vreinterpretq_s16_u16(low), vreinterpretq_s16_u16(high))
        }
    }
    #[inline(always)]
    unsafe fn load_exponents(from: *const u8) -> Self::Floats {
        unsafe {
            let bytes = vld1q_u8(from);
            let halves = [vmovl_u8(vget_low_u8(bytes)), vmovl_u8(vget_high_u8(bytes))];
            let exponent = |quarter: uint16x4_t| vreinterpretq_f32_u32(vshlq_n_u32::<23>(vmovl_u16(quarter)));
            [
                exponent(vget_low_u16(halves[0])),
                exponent(vget_high_u16(halves[0])),
                exponent(vget_low_u16(halves[1])),
                exponent(vget_high_u16(halves[1])),
            ]
        }
    }
    #[inline(always)]
    unsafe fn lookup(table: &[u8; 16], codes: Self::Bytes) -> Self::Bytes {
        let table = unsafe { vld1q_u8(table.as_ptr()) };
        each!(|i| vqtbl1q_u8(table, codes[i]))
    }
    #[inline(always)]
    unsafe fn interleave(low: Self::Bytes, high: Self::Bytes) -> [Self::Bytes; 2] {
        [each!(|i| vzip1q_u8(low[i], high[i])), each!(|i| vzip2q_u8(low[i], high[i]))]
    }
    #[inline(always)]
    unsafe fn store(values: Self::Floats, to: *mut f32) {
        unsafe {
            for (i, quarter) in values.into_iter().enumerate() {
                vst1q_f32(to.add(4 * i), quarter);
            }
        }
    }
}
