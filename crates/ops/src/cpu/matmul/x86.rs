//! The kernels' vector operations on x86-64: AVX-512 with VNNI, with or without BF16, and AVX2 with or without
//! VNNI.

#![allow(clippy::undocumented_unsafe_blocks)] // every block rests on the safety section of `Unit`

use super::unit::Unit;
use crate::cpu::simd;
use std::arch::x86_64::*;

/// AVX-512 F, BW and VNNI: one register is one vector. `BF16` adds AVX-512 BF16.
pub(super) struct Avx512<const BF16: bool>;

impl<const BF16: bool> Unit for Avx512<BF16> {
    type Ints = __m512i;
    type Floats = __m512;
    type Bytes = __m512i;
    type Simd = simd::Avx512<BF16>;
    const MANY: bool = true;

    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> __m512i {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn store_bytes(bytes: __m512i, to: *mut u8) {
        unsafe { _mm512_storeu_si512(to.cast(), bytes) }
    }
    #[inline(always)]
    unsafe fn field<const SHIFT: i32>(a: __m512i, mask: u8) -> __m512i {
        unsafe {
            let shifted = match SHIFT {
                -4 => _mm512_slli_epi16::<4>(a),
                -3 => _mm512_slli_epi16::<3>(a),
                -2 => _mm512_slli_epi16::<2>(a),
                -1 => _mm512_slli_epi16::<1>(a),
                0 => a,
                1 => _mm512_srli_epi16::<1>(a),
                2 => _mm512_srli_epi16::<2>(a),
                3 => _mm512_srli_epi16::<3>(a),
                4 => _mm512_srli_epi16::<4>(a),
                6 => _mm512_srli_epi16::<6>(a),
                _ => unreachable!(),
            };
            _mm512_and_si512(shifted, _mm512_set1_epi8(mask as i8))
        }
    }
    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn splat_int(value: i32) -> __m512i {
        unsafe { _mm512_set1_epi32(value) }
    }
    #[inline(always)]
    unsafe fn dot<const WIDE: bool>(sum: __m512i, quants: __m512i, x: i32) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(sum, quants, _mm512_set1_epi32(x)) }
    }
    #[inline(always)]
    unsafe fn to_floats(ints: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(ints) }
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        unsafe { _mm512_set1_ps(value) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fused(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn load_f32(from: *const u8) -> __m512 {
        unsafe { _mm512_loadu_ps(from.cast()) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    #[inline(always)]
    unsafe fn dot_bf16(sum: __m512, weights: __m512i, x: u32) -> __m512 {
        unsafe {
            let x = _mm512_set1_epi32(x as i32);
            if BF16 {
                let as_bf16 = std::mem::transmute::<__m512i, __m512bh>;
                return _mm512_dpbf16_ps(sum, as_bf16(weights), as_bf16(x));
            }
            let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            let second = |pair| _mm512_castsi512_ps(_mm512_and_si512(pair, high));
            let first = |pair| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pair));
            let sum = _mm512_fmadd_ps(second(weights), second(x), sum);
            _mm512_fmadd_ps(first(weights), first(x), sum)
        }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_exponents(from: *const u8) -> __m512 {
        unsafe {
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(bytes))
        }
    }
    #[inline(always)]
    unsafe fn lookup(table: &[u8; 16], codes: __m512i) -> __m512i {
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, codes)
        }
    }
    #[inline(always)]
    unsafe fn interleave(low: __m512i, high: __m512i) -> [__m512i; 2] {
        unsafe { [_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)] }
    }
    #[inline(always)]
    unsafe fn store(values: __m512, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, values) }
    }
}

/// AVX2, FMA and F16C: two registers are one vector. `VNNI` adds AVX-VNNI.
pub(super) struct Avx2<const VNNI: bool>;

#[inline(always)]
unsafe fn field<const SHIFT: i32>(a: __m256i, mask: u8) -> __m256i {
    unsafe {
        let shifted = match SHIFT {
            -4 => _mm256_slli_epi16::<4>(a),
            -3 => _mm256_slli_epi16::<3>(a),
            -2 => _mm256_slli_epi16::<2>(a),
            -1 => _mm256_slli_epi16::<1>(a),
            0 => a,
            1 => _mm256_srli_epi16::<1>(a),
            2 => _mm256_srli_epi16::<2>(a),
            3 => _mm256_srli_epi16::<3>(a),
            4 => _mm256_srli_epi16::<4>(a),
            6 => _mm256_srli_epi16::<6>(a),
            _ => unreachable!(),
        };
        _mm256_and_si256(shifted, _mm256_set1_epi8(mask as i8))
    }
}

#[inline(always)]
unsafe fn dot<const VNNI: bool, const WIDE: bool>(sum: __m256i, quants: __m256i, x: i32) -> __m256i {
    unsafe {
        let x = _mm256_set1_epi32(x);
        if VNNI {
            _mm256_dpbusd_avx_epi32(sum, quants, x)
        } else if WIDE {
            // Pairs of products would saturate 16 bits, so multiply even and odd bytes as 16 bits.
            let low = _mm256_set1_epi16(0xff);
            let even = _mm256_madd_epi16(
                _mm256_and_si256(quants, low),
                _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x)),
            );
            let odd = _mm256_madd_epi16(_mm256_srli_epi16::<8>(quants), _mm256_srai_epi16::<8>(x));
            _mm256_add_epi32(sum, _mm256_add_epi32(even, odd))
        } else {
            let pairs = _mm256_maddubs_epi16(quants, x);
            _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }
}

#[inline(always)]
unsafe fn half(from: *const u8) -> __m256 {
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
}

#[inline(always)]
unsafe fn dot_bf16(sum: __m256, weights: __m256i, x: u32) -> __m256 {
    unsafe {
        let (second, first) =
            (_mm256_set1_epi32((x & 0xffff_0000) as i32), _mm256_set1_epi32((x << 16) as i32));
        let high = _mm256_and_si256(weights, _mm256_set1_epi32(0xffff_0000_u32 as i32));
        let low = _mm256_slli_epi32::<16>(weights);
        let sum = _mm256_fmadd_ps(_mm256_castsi256_ps(high), _mm256_castsi256_ps(second), sum);
        _mm256_fmadd_ps(_mm256_castsi256_ps(low), _mm256_castsi256_ps(first), sum)
    }
}

#[inline(always)]
unsafe fn signed(from: *const u8) -> __m256 {
    unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) }
}

#[inline(always)]
unsafe fn unsigned(from: *const u8) -> __m256 {
    unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()))) }
}

#[inline(always)]
unsafe fn exponents(from: *const u8) -> __m256 {
    unsafe {
        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()))))
    }
}

impl<const VNNI: bool> Unit for Avx2<VNNI> {
    type Ints = [__m256i; 2];
    type Floats = [__m256; 2];
    type Bytes = [__m256i; 2];
    type Simd = simd::Avx2;

    #[inline(always)]
    unsafe fn load_bytes(from: *const u8) -> [__m256i; 2] {
        unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())] }
    }
    #[inline(always)]
    unsafe fn store_bytes(bytes: [__m256i; 2], to: *mut u8) {
        unsafe {
            _mm256_storeu_si256(to.cast(), bytes[0]);
            _mm256_storeu_si256(to.add(32).cast(), bytes[1]);
        }
    }
    #[inline(always)]
    unsafe fn field<const SHIFT: i32>(a: [__m256i; 2], mask: u8) -> [__m256i; 2] {
        unsafe { [field::<SHIFT>(a[0], mask), field::<SHIFT>(a[1], mask)] }
    }
    #[inline(always)]
    unsafe fn or(a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        unsafe { [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn splat_int(value: i32) -> [__m256i; 2] {
        unsafe { [_mm256_set1_epi32(value); 2] }
    }
    #[inline(always)]
    unsafe fn dot<const WIDE: bool>(sum: [__m256i; 2], quants: [__m256i; 2], x: i32) -> [__m256i; 2] {
        unsafe { [dot::<VNNI, WIDE>(sum[0], quants[0], x), dot::<VNNI, WIDE>(sum[1], quants[1], x)] }
    }
    #[inline(always)]
    unsafe fn to_floats(ints: [__m256i; 2]) -> [__m256; 2] {
        unsafe { [_mm256_cvtepi32_ps(ints[0]), _mm256_cvtepi32_ps(ints[1])] }
    }
    #[inline(always)]
    unsafe fn splat(value: f32) -> [__m256; 2] {
        unsafe { [_mm256_set1_ps(value); 2] }
    }
    #[inline(always)]
    unsafe fn add(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn mul(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn fused(a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
    #[inline(always)]
    unsafe fn load_f32(from: *const u8) -> [__m256; 2] {
        unsafe { [_mm256_loadu_ps(from.cast()), _mm256_loadu_ps(from.add(32).cast())] }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> [__m256; 2] {
        unsafe { [half(from), half(from.add(16))] }
    }
    #[inline(always)]
    unsafe fn dot_bf16(sum: [__m256; 2], weights: [__m256i; 2], x: u32) -> [__m256; 2] {
        unsafe { [dot_bf16(sum[0], weights[0], x), dot_bf16(sum[1], weights[1], x)] }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> [__m256; 2] {
        unsafe { [signed(from), signed(from.add(8))] }
    }
    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> [__m256; 2] {
        unsafe { [unsigned(from), unsigned(from.add(8))] }
    }
    #[inline(always)]
    unsafe fn load_exponents(from: *const u8) -> [__m256; 2] {
        unsafe { [exponents(from), exponents(from.add(8))] }
    }
    #[inline(always)]
    unsafe fn lookup(table: &[u8; 16], codes: [__m256i; 2]) -> [__m256i; 2] {
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            [_mm256_shuffle_epi8(table, codes[0]), _mm256_shuffle_epi8(table, codes[1])]
        }
    }
    #[inline(always)]
    unsafe fn interleave(low: [__m256i; 2], high: [__m256i; 2]) -> [[__m256i; 2]; 2] {
        unsafe {
            [
                [_mm256_unpacklo_epi8(low[0], high[0]), _mm256_unpacklo_epi8(low[1], high[1])],
                [_mm256_unpackhi_epi8(low[0], high[0]), _mm256_unpackhi_epi8(low[1], high[1])],
            ]
        }
    }
    #[inline(always)]
    unsafe fn store(values: [__m256; 2], to: *mut f32) {
        unsafe {
            _mm256_storeu_ps(to, values[0]);
            _mm256_storeu_ps(to.add(8), values[1]);
        }
    }
}
