//! The vector operations the kernels are written in, and their portable form.
//!
//! A unit works on the 16 outputs of a tile side by side, so every lane sees the same operations in
//! the same order on all units, and all give the same bits: integer sums are exact, and floats
//! are multiplied, added or fused exactly as the method says.

use super::layout::LANES;
use crate::cpu::simd::{self, Simd};

/// Bytes in a vector of quants: four inputs of each lane.
pub(super) const VECTOR: usize = 4 * LANES;

/// One way to compute with tiles.
///
/// # Safety
/// Of all methods: the processor has the unit's features, and pointers are valid for the bytes
/// that are read or written (they need no alignment).
pub(super) trait Unit {
    /// 16 i32.
    type Ints: Copy;
    /// 16 f32.
    type Floats: Copy;
    /// 64 bytes.
    type Bytes: Copy;
    /// What computes on 16 f32 with the same features, or some of them.
    type Simd: Simd;
    /// Whether 24 vectors of sums fit the registers, and so [`super::bf16`] has a loop for many rows.
    const MANY: bool = false;
    /// Whether loops over 8, 3 and 2 rows are compiled beside those over 4 and 1 rows, for every format.
    const ALL_PASSES: bool = true;

    unsafe fn load_bytes(from: *const u8) -> Self::Bytes;
    unsafe fn store_bytes(bytes: Self::Bytes, to: *mut u8);
    /// Bytes `a >> SHIFT & mask`; `SHIFT` may be negative.
    unsafe fn field<const SHIFT: i32>(a: Self::Bytes, mask: u8) -> Self::Bytes;
    unsafe fn or(a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    unsafe fn splat_int(value: i32) -> Self::Ints;
    /// Adds to each lane the products of its four unsigned bytes with the four signed bytes of `x`.
    /// `WIDE` tells that the unsigned bytes may exceed 127.
    unsafe fn dot<const WIDE: bool>(sum: Self::Ints, quants: Self::Bytes, x: i32) -> Self::Ints;
    unsafe fn to_floats(ints: Self::Ints) -> Self::Floats;
    unsafe fn splat(value: f32) -> Self::Floats;
    unsafe fn add(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    unsafe fn mul(a: Self::Floats, b: Self::Floats) -> Self::Floats;
    /// `a * b + c`, rounded once.
    unsafe fn fused(a: Self::Floats, b: Self::Floats, c: Self::Floats) -> Self::Floats;
    unsafe fn load_f32(from: *const u8) -> Self::Floats;
    unsafe fn load_f16(from: *const u8) -> Self::Floats;
    /// Adds to each lane the products of its two bf16 weights with the two of `x` (the first in the low
    /// half): the second product, then the first, each fused. That is what `vdpbf16ps` does.
    unsafe fn dot_bf16(sum: Self::Floats, weights: Self::Bytes, x: u32) -> Self::Floats;
    unsafe fn load_i8(from: *const u8) -> Self::Floats;
    unsafe fn load_u8(from: *const u8) -> Self::Floats;
    /// `2^(byte - 127)` of 16 bytes; 0 for 0, infinity for 255.
    unsafe fn load_exponents(from: *const u8) -> Self::Floats;
    /// Bytes `table[code]`; the codes are below 16.
    unsafe fn lookup(table: &[u8; 16], codes: Self::Bytes) -> Self::Bytes;
    /// In each 16 bytes, those of `low` and `high` by turns: the first eight of both, then the others.
    unsafe fn interleave(low: Self::Bytes, high: Self::Bytes) -> [Self::Bytes; 2];
    unsafe fn store(values: Self::Floats, to: *mut f32);
}

/// Plain Rust.
pub(super) struct Portable;

#[inline(always)]
unsafe fn load<T: Copy>(from: *const u8) -> [T; LANES] {
    // SAFETY: the caller's pointer is valid for 16 values.
    unsafe { from.cast::<[T; LANES]>().read_unaligned() }
}

impl Unit for Portable {
    type Ints = [i32; LANES];
    type Floats = [f32; LANES];
    type Bytes = [u8; VECTOR];
    type Simd = simd::Plain;
    /// They lie in memory either way; so a checker of memory that knows no AVX-512 sees that loop too.
    const MANY: bool = true;
    /// Without vector registers to speak of, more rows gain little, and took most of the time this crate took to build.
    const ALL_PASSES: bool = false;

    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> [u8; VECTOR] {
        // SAFETY: the caller's pointer is valid for 64 bytes.
        unsafe { from.cast::<[u8; VECTOR]>().read() }
    }
    #[inline(always)]
    unsafe fn store_bytes(bytes: [u8; VECTOR], to: *mut u8) {
        // SAFETY: the caller's pointer is valid for 64 bytes.
        unsafe { to.cast::<[u8; VECTOR]>().write(bytes) }
    }
    #[inline(always)]
    unsafe fn field<const SHIFT: i32>(a: [u8; VECTOR], mask: u8) -> [u8; VECTOR] {
        a.map(|byte| if SHIFT < 0 { byte << -SHIFT } else { byte >> SHIFT } & mask)
    }
    #[inline(always)]
    unsafe fn or(a: [u8; VECTOR], b: [u8; VECTOR]) -> [u8; VECTOR] {
        std::array::from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    unsafe fn splat_int(value: i32) -> [i32; LANES] {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn dot<const WIDE: bool>(sum: [i32; LANES], quants: [u8; VECTOR], x: i32) -> [i32; LANES] {
        let x = x.to_ne_bytes().map(|byte| i32::from(byte as i8));
        std::array::from_fn(|lane| {
            (0..4).fold(sum[lane], |sum, i| sum + i32::from(quants[4 * lane + i]) * x[i])
        })
    }
    #[inline(always)]
    unsafe fn to_floats(ints: [i32; LANES]) -> [f32; LANES] {
        ints.map(|v| v as f32)
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> [f32; LANES] {
        [value; LANES]
    }
    #[inline(always)]
    unsafe fn add(a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn fused(a: [f32; LANES], b: [f32; LANES], c: [f32; LANES]) -> [f32; LANES] {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn load_f32(from: *const u8) -> [f32; LANES] {
        // SAFETY: as the trait demands.
        unsafe { load::<u32>(from) }.map(|bits| f32::from_bits(u32::from_le(bits)))
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> [f32; LANES] {
        // SAFETY: as the trait demands.
        unsafe { load::<u16>(from) }.map(|bits| half::f16::from_bits(u16::from_le(bits)).to_f32())
    }
    #[inline(always)]
    unsafe fn dot_bf16(sum: [f32; LANES], weights: [u8; VECTOR], x: u32) -> [f32; LANES] {
        let halves = |pair: u32| (f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000));
        let (x0, x1) = halves(x);
        std::array::from_fn(|lane| {
            let pair = std::array::from_fn(|i| weights[4 * lane + i]);
            let (w0, w1) = halves(u32::from_le_bytes(pair));
            w0.mul_add(x0, w1.mul_add(x1, sum[lane]))
        })
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> [f32; LANES] {
        // SAFETY: as the trait demands.
        unsafe { load::<i8>(from) }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> [f32; LANES] {
        // SAFETY: as the trait demands.
        unsafe { load::<u8>(from) }.map(f32::from)
    }
    #[inline(always)]
    unsafe fn load_exponents(from: *const u8) -> [f32; LANES] {
        // SAFETY: as the trait demands.
        unsafe { load::<u8>(from) }.map(|byte| f32::from_bits(u32::from(byte) << 23))
    }
    #[inline(always)]
    unsafe fn lookup(table: &[u8; 16], codes: [u8; VECTOR]) -> [u8; VECTOR] {
        codes.map(|code| table[usize::from(code & 15)])
    }
    #[inline(always)]
    unsafe fn interleave(low: [u8; VECTOR], high: [u8; VECTOR]) -> [[u8; VECTOR]; 2] {
        std::array::from_fn(|half| {
            std::array::from_fn(|i| {
                let from = i / 16 * 16 + 8 * half + i % 16 / 2;
                if i % 2 == 0 { low[from] } else { high[from] }
            })
        })
    }
    #[inline(always)]
    unsafe fn store(values: [f32; LANES], to: *mut f32) {
        // SAFETY: the caller's pointer is valid for 16 floats.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(values) }
    }
}
