//! Sixteen f32 lanes on whatever the CPU has, with the same bits on all of it.
//!
//! A kernel is written once over [`Simd`] and compiled for each [`Level`]. Every operation is a
//! correctly rounded one, lane by lane, and sums are reduced in one order, so that AVX-512, AVX2
//! and plain code agree bit for bit (but for [`Simd::exp2`] beyond its range).

use super::matmul::pair_bf16;

/// Lanes of a vector.
pub(super) const LANES: usize = 16;

/// What a kernel may do with [`LANES`] f32 values.
///
/// # Safety
/// All methods: the CPU has the instructions of the implementing type, which [`Level::run`]
/// ensures. Pointers are good for [`LANES`] elements; they need no alignment.
pub(super) trait Simd {
    /// A vector.
    type V: Copy;
    /// A vector of as many pairs of bf16, the first of each in the low half.
    type Pairs: Copy;
    /// How many accumulators fit the registers beside a kernel's other values.
    const TILE: usize;
    /// Whether twice as many fit.
    const PAIRS: bool;

    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    unsafe fn store(to: *mut f32, v: Self::V);
    /// Loads half floats, given as their bits, and widens them.
    unsafe fn load_f16(from: *const u16) -> Self::V;
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a > b ? a : b`: a NaN in `b` is kept, one in `a` is not.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// `a < b ? a : b`.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// The largest lane of a vector without NaN; of zeros of both signs, either.
    #[inline(always)]
    unsafe fn largest(v: Self::V) -> f32 {
        // SAFETY: the caller's promise is the same.
        let mut l = unsafe { lanes::<Self>(v) };
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                l[i] = if l[i + half] > l[i] { l[i + half] } else { l[i] };
            }
        }
        l[0]
    }
    /// `(bits + 127) << 23` on the bits of each lane.
    unsafe fn exponent(v: Self::V) -> Self::V;
    /// `2^x` within 4e-6 relative for `x` of -126 to 127, which is a hundredth of what rounding to bf16 adds; at most 2^-126
    /// below and 0 at minus infinity, NaN for NaN. Levels differ beyond: what is subnormal may be 0.
    ///
    /// `2^x = 2^n * 2^f` with `n` the nearest integer and `2^f` by [`exp2_fraction`].
    #[inline(always)]
    unsafe fn exp2(x: Self::V) -> Self::V {
        // SAFETY: the caller's promise is the same.
        unsafe {
            let x = Self::max(Self::splat(-127.0), x);
            // Adding 1.5 * 2^23 leaves the rounded integer in the lowest bits.
            let magic = Self::splat(12_582_912.0);
            let shifted = Self::add(x, magic);
            let f = Self::sub(x, Self::sub(shifted, magic));
            Self::mul(exp2_fraction::<Self>(f), Self::exponent(shifted))
        }
    }
    unsafe fn load_pairs(from: *const u32) -> Self::Pairs;
    /// `pairs & mask` on the bits of each pair.
    unsafe fn mask(pairs: Self::Pairs, mask: u32) -> Self::Pairs;
    /// Adds to each lane the products of its pair with the pair `x`: the second product, then the first, each fused.
    /// That is what `vdpbf16ps` does, to which subnormals are zeros.
    unsafe fn dot_pairs(sum: Self::V, pairs: Self::Pairs, x: u32) -> Self::V;
    /// Rounds to pairs of bf16, two neighbouring lanes each, first those of `a`.
    #[inline(always)]
    unsafe fn pair(a: Self::V, b: Self::V) -> Self::Pairs {
        // SAFETY: the caller's promise is the same.
        unsafe { pair_lanes::<Self>(a, b) }
    }
    unsafe fn store_pairs(to: *mut u32, pairs: Self::Pairs);
}

/// `2^f` for |f| <= 1/2: the polynomial of degree 4 with the least relative error (by Remez's algorithm) among those that are
/// 1 at 0, from its highest power down.
#[inline(always)]
unsafe fn exp2_fraction<S: Simd + ?Sized>(f: S::V) -> S::V {
    // SAFETY: the caller's promise is the same.
    unsafe {
        let mut p = S::splat(0.009_782_912);
        for c in [0.055_976_883, 0.240_207_1, 0.693_113_6, 1.0] {
            p = S::fma(p, f, S::splat(c));
        }
        p
    }
}

/// [`Simd::pair`] lane by lane.
#[inline(always)]
unsafe fn pair_lanes<S: Simd + ?Sized>(a: S::V, b: S::V) -> S::Pairs {
    let (mut lanes, mut pairs) = ([0.0; 2 * LANES], [0; LANES]);
    // SAFETY: there is room for two vectors and for one of pairs; the instructions are the caller's promise.
    unsafe {
        S::store(lanes.as_mut_ptr(), a);
        S::store(lanes.as_mut_ptr().add(LANES), b);
        pair_bf16(lanes.as_chunks::<2>().0, &mut pairs);
        S::load_pairs(pairs.as_ptr())
    }
}

/// The lanes in memory.
#[inline(always)]
pub(super) unsafe fn lanes<S: Simd + ?Sized>(v: S::V) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    // SAFETY: `lanes` has room; the instructions are the caller's promise.
    unsafe { S::store(lanes.as_mut_ptr(), v) };
    lanes
}

/// Loads up to [`LANES`] elements, the missing ones as `fill`.
#[inline(always)]
pub(super) unsafe fn load_part<S: Simd>(from: &[f32], fill: f32) -> S::V {
    let mut lanes = [fill; LANES];
    lanes[..from.len()].copy_from_slice(from);
    // SAFETY: as above.
    unsafe { S::load(lanes.as_ptr()) }
}

/// Sum of all lanes, by halves.
#[inline(always)]
pub(super) unsafe fn sum<S: Simd>(v: S::V) -> f32 {
    // SAFETY: the caller's promise is the same.
    let l = unsafe { lanes::<S>(v) };
    let mut four = [0.0; 4];
    for i in 0..4 {
        four[i] = (l[i] + l[i + 8]) + (l[i + 4] + l[i + 12]);
    }
    (four[0] + four[2]) + (four[1] + four[3])
}

/// The largest lane; NaN lanes are passed over.
#[inline(always)]
pub(super) unsafe fn max<S: Simd>(v: S::V) -> f32 {
    // SAFETY: the caller's promise is the same.
    unsafe { S::largest(S::max(v, S::splat(f32::NEG_INFINITY))) }
}

/// `e^x` within 3e-7 relative; 0 below -88 and infinite above 88.3, NaN for NaN.
///
/// `e^x = 2^n * e^r` with `n` the nearest integer to `x / ln 2`, `ln 2` in two parts (Cody and
/// Waite), and the Taylor polynomial of degree 6 for `e^r`, |r| <= ln(2) / 2.
#[inline(always)]
pub(super) unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    // SAFETY: the caller's promise is the same.
    unsafe {
        let x = S::min(S::splat(89.0), S::max(S::splat(-88.0), x));
        // Adding 1.5 * 2^23 leaves the rounded integer in the lowest bits.
        let magic = S::splat(12_582_912.0);
        let shifted = S::fma(x, S::splat(std::f32::consts::LOG2_E), magic);
        let n = S::sub(shifted, magic);
        let r = S::fma(n, S::splat(-0.693_359_4), x);
        let r = S::fma(n, S::splat(2.121_944_4e-4), r);
        let mut p = S::splat(1.0 / 720.0);
        for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            p = S::fma(p, r, S::splat(c));
        }
        S::mul(p, S::exponent(shifted))
    }
}

/// `x[i] = e^(x[i] - max)` in place; returns the maximum and the sum of the results.
///
/// # Safety
/// The CPU has the instructions of `S`. `x` is whole vectors; unused lanes hold minus infinity.
#[inline(always)]
pub(super) unsafe fn softmax<S: Simd>(x: &mut [f32]) -> (f32, f32) {
    debug_assert!(x.len().is_multiple_of(LANES));
    // SAFETY: every chunk is a whole vector; the instructions are the caller's promise.
    unsafe {
        let mut most = S::splat(f32::NEG_INFINITY);
        for chunk in x.chunks_exact(LANES) {
            most = S::max(S::load(chunk.as_ptr()), most);
        }
        let most = max::<S>(most);
        let mut total = S::splat(0.0);
        for chunk in x.chunks_exact_mut(LANES) {
            let e = exp::<S>(S::sub(S::load(chunk.as_ptr()), S::splat(most)));
            S::store(chunk.as_mut_ptr(), e);
            total = S::add(total, e);
        }
        (most, sum::<S>(total))
    }
}

/// Work that is compiled for every level.
pub(super) trait Kernel {
    /// What it gives.
    type Output;
    /// Does the work. Implementations are `#[inline(always)]`, so that they take on the
    /// instructions of the function that calls them.
    ///
    /// # Safety
    /// The CPU has the instructions of `S`.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

/// A set of instructions that this CPU was seen to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Level(Set);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Set {
    Plain,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
}

impl Level {
    /// All levels of this CPU, slowest first.
    pub fn supported() -> impl Iterator<Item = Level> {
        [
            Some(Set::Plain),
            #[cfg(target_arch = "x86_64")]
            (is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c"))
            .then_some(Set::Avx2),
            #[cfg(target_arch = "x86_64")]
            is_x86_feature_detected!("avx512f").then_some(Set::Avx512),
            #[cfg(target_arch = "x86_64")]
            (is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16"))
                .then_some(Set::Avx512Bf16),
        ]
        .into_iter()
        .flatten()
        .map(Level)
    }

    /// The fastest level of this CPU.
    pub fn detect() -> Self {
        Self::supported().last().unwrap_or(Level(Set::Plain))
    }

    /// Whether [`Simd::dot_pairs`] is one instruction.
    pub fn has_pairs(self) -> bool {
        match self.0 {
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Bf16 => true,
            _ => false,
        }
    }

    /// [`Simd::TILE`] of this level.
    pub fn tile(self) -> usize {
        match self.0 {
            Set::Plain => Plain::TILE,
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => Avx2::TILE,
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 | Set::Avx512Bf16 => Avx512::<false>::TILE,
        }
    }

    /// Runs a kernel with this level's instructions.
    #[inline]
    pub fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            // SAFETY: plain code needs nothing.
            Set::Plain => unsafe { kernel.run::<Plain>() },
            // SAFETY: a level is made only where its instructions were detected.
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 => unsafe { x86::avx2(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => unsafe { x86::avx512(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Set::Avx512Bf16 => unsafe { x86::avx512_bf16(kernel) },
        }
    }
}

/// Lanes as an array: what the compiler makes of it; NEON on aarch64.
pub(super) struct Plain;

// Every method is a line over arrays; only the loads and stores need the caller's promise.
#[allow(unsafe_op_in_unsafe_fn)]
impl Simd for Plain {
    type V = [f32; LANES];
    type Pairs = [u32; LANES];
    const TILE: usize = 4;
    const PAIRS: bool = false;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self::V {
        from.cast::<Self::V>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: Self::V) {
        to.cast::<Self::V>().write_unaligned(v);
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self::V {
        from.cast::<[u16; LANES]>().read_unaligned().map(|bits| half::f16::from_bits(bits).to_f32())
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] / b[i])
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn exponent(v: Self::V) -> Self::V {
        v.map(|x| f32::from_bits(x.to_bits().wrapping_add(127) << 23))
    }
    #[inline(always)]
    unsafe fn load_pairs(from: *const u32) -> Self::Pairs {
        from.cast::<Self::Pairs>().read_unaligned()
    }
    #[inline(always)]
    unsafe fn mask(pairs: Self::Pairs, mask: u32) -> Self::Pairs {
        pairs.map(|pair| pair & mask)
    }
    #[inline(always)]
    unsafe fn dot_pairs(sum: Self::V, pairs: Self::Pairs, x: u32) -> Self::V {
        let halves = |pair: u32| (f32::from_bits(pair << 16), f32::from_bits(pair & 0xffff_0000));
        let (first, second) = halves(x);
        std::array::from_fn(|i| {
            let (a, b) = halves(pairs[i]);
            a.mul_add(first, b.mul_add(second, sum[i]))
        })
    }
    #[inline(always)]
    unsafe fn store_pairs(to: *mut u32, pairs: Self::Pairs) {
        to.cast::<Self::Pairs>().write_unaligned(pairs);
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Kernel, Simd, exp2_fraction};
    use std::arch::x86_64::*;

    /// # Safety
    /// The CPU has AVX2, FMA and F16C.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn avx2<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: as the caller promises.
        unsafe { kernel.run::<Avx2>() }
    }

    /// # Safety
    /// The CPU has AVX-512 F.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn avx512<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: as the caller promises.
        unsafe { kernel.run::<Avx512<false>>() }
    }

    /// # Safety
    /// The CPU has AVX-512 F and BF16.
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub unsafe fn avx512_bf16<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: as the caller promises.
        unsafe { kernel.run::<Avx512<true>>() }
    }

    /// With AVX-512 BF16 or without.
    pub struct Avx512<const BF16: bool>;

    // Every method is one or two intrinsics under the trait's contract.
    #[allow(unsafe_op_in_unsafe_fn)]
    impl<const BF16: bool> Simd for Avx512<BF16> {
        type V = __m512;
        type Pairs = __m512i;
        const TILE: usize = 8;
        const PAIRS: bool = true;

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::V {
            _mm512_set1_ps(x)
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self::V {
            _mm512_loadu_ps(from)
        }
        #[inline(always)]
        unsafe fn store(to: *mut f32, v: Self::V) {
            _mm512_storeu_ps(to, v);
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const u16) -> Self::V {
            _mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))
        }
        #[inline(always)]
        unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
            _mm512_add_ps(a, b)
        }
        #[inline(always)]
        unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
            _mm512_sub_ps(a, b)
        }
        #[inline(always)]
        unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
            _mm512_mul_ps(a, b)
        }
        #[inline(always)]
        unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
            _mm512_div_ps(a, b)
        }
        #[inline(always)]
        unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            _mm512_fmadd_ps(a, b, c)
        }
        #[inline(always)]
        unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
            _mm512_max_ps(a, b)
        }
        #[inline(always)]
        unsafe fn largest(v: Self::V) -> f32 {
            _mm512_reduce_max_ps(v)
        }
        #[inline(always)]
        unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
            _mm512_min_ps(a, b)
        }
        #[inline(always)]
        unsafe fn exponent(v: Self::V) -> Self::V {
            let biased = _mm512_add_epi32(_mm512_castps_si512(v), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        }
        #[inline(always)]
        unsafe fn exp2(x: Self::V) -> Self::V {
            let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x);
            // Of minus infinity the fraction is NaN, which scaled by 2^-inf is 0 (Intel's manual, VSCALEFPS).
            _mm512_scalef_ps(exp2_fraction::<Self>(_mm512_sub_ps(x, n)), n)
        }
        #[inline(always)]
        unsafe fn load_pairs(from: *const u32) -> Self::Pairs {
            _mm512_loadu_si512(from.cast())
        }
        #[inline(always)]
        unsafe fn mask(pairs: Self::Pairs, mask: u32) -> Self::Pairs {
            _mm512_and_si512(pairs, _mm512_set1_epi32(mask as i32))
        }
        #[inline(always)]
        unsafe fn dot_pairs(sum: Self::V, pairs: Self::Pairs, x: u32) -> Self::V {
            let x = _mm512_set1_epi32(x as i32);
            if BF16 {
                let as_bf16 = std::mem::transmute::<__m512i, __m512bh>;
                return _mm512_dpbf16_ps(sum, as_bf16(pairs), as_bf16(x));
            }
            let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            let second = |pair| _mm512_castsi512_ps(_mm512_and_si512(pair, high));
            let first = |pair| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(pair));
            _mm512_fmadd_ps(first(pairs), first(x), _mm512_fmadd_ps(second(pairs), second(x), sum))
        }
        #[inline(always)]
        unsafe fn pair(a: Self::V, b: Self::V) -> Self::Pairs {
            if BF16 {
                return std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(b, a));
            }
            super::pair_lanes::<Self>(a, b)
        }
        #[inline(always)]
        unsafe fn store_pairs(to: *mut u32, pairs: Self::Pairs) {
            _mm512_storeu_si512(to.cast(), pairs);
        }
    }

    pub struct Avx2;

    #[inline(always)]
    fn both(a: [__m256; 2], b: [__m256; 2], op: impl Fn(__m256, __m256) -> __m256) -> [__m256; 2] {
        [op(a[0], b[0]), op(a[1], b[1])]
    }

    // As above, on two registers.
    #[allow(unsafe_op_in_unsafe_fn)]
    impl Simd for Avx2 {
        type V = [__m256; 2];
        type Pairs = [__m256i; 2];
        const TILE: usize = 4;
        const PAIRS: bool = false;

        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::V {
            [_mm256_set1_ps(x); 2]
        }
        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self::V {
            [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))]
        }
        #[inline(always)]
        unsafe fn store(to: *mut f32, v: Self::V) {
            _mm256_storeu_ps(to, v[0]);
            _mm256_storeu_ps(to.add(8), v[1]);
        }
        #[inline(always)]
        unsafe fn load_f16(from: *const u16) -> Self::V {
            let (low, high) = (_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(8).cast()));
            [_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)]
        }
        #[inline(always)]
        unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
            both(a, b, |a, b| _mm256_add_ps(a, b))
        }
        #[inline(always)]
        unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
            both(a, b, |a, b| _mm256_sub_ps(a, b))
        }
        #[inline(always)]
        unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
            both(a, b, |a, b| _mm256_mul_ps(a, b))
        }
        #[inline(always)]
        unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
            both(a, b, |a, b| _mm256_div_ps(a, b))
        }
        #[inline(always)]
        unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])]
        }
        #[inline(always)]
        unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
            both(a, b, |a, b| _mm256_max_ps(a, b))
        }
        #[inline(always)]
        unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
            both(a, b, |a, b| _mm256_min_ps(a, b))
        }
        #[inline(always)]
        unsafe fn exponent(v: Self::V) -> Self::V {
            v.map(|x| {
                let biased = _mm256_add_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
            })
        }
        #[inline(always)]
        unsafe fn load_pairs(from: *const u32) -> Self::Pairs {
            [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(8).cast())]
        }
        #[inline(always)]
        unsafe fn mask(pairs: Self::Pairs, mask: u32) -> Self::Pairs {
            let mask = _mm256_set1_epi32(mask as i32);
            [_mm256_and_si256(pairs[0], mask), _mm256_and_si256(pairs[1], mask)]
        }
        #[inline(always)]
        unsafe fn dot_pairs(sum: Self::V, pairs: Self::Pairs, x: u32) -> Self::V {
            [dot(sum[0], pairs[0], x), dot(sum[1], pairs[1], x)]
        }
        #[inline(always)]
        unsafe fn store_pairs(to: *mut u32, pairs: Self::Pairs) {
            _mm256_storeu_si256(to.cast(), pairs[0]);
            _mm256_storeu_si256(to.add(8).cast(), pairs[1]);
        }
    }

    #[inline(always)]
    unsafe fn dot(sum: __m256, pairs: __m256i, x: u32) -> __m256 {
        // SAFETY: the caller's promise is the same.
        unsafe {
            let high = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32 as i32));
            let low = _mm256_slli_epi32::<16>(pairs);
            let (second, first) = (f32::from_bits(x & 0xffff_0000), f32::from_bits(x << 16));
            let sum = _mm256_fmadd_ps(_mm256_castsi256_ps(high), _mm256_set1_ps(second), sum);
            _mm256_fmadd_ps(_mm256_castsi256_ps(low), _mm256_set1_ps(first), sum)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Applies `exp` to whole vectors.
    struct Exp<'a>(&'a mut [f32]);

    impl Kernel for Exp<'_> {
        type Output = ();
        #[inline(always)]
        unsafe fn run<S: Simd>(self) {
            for chunk in self.0.chunks_exact_mut(LANES) {
                // SAFETY: a chunk is a vector.
                unsafe { S::store(chunk.as_mut_ptr(), exp::<S>(S::load(chunk.as_ptr()))) };
            }
        }
    }

    /// Applies [`Simd::exp2`] to whole vectors.
    struct Exp2<'a>(&'a mut [f32]);

    impl Kernel for Exp2<'_> {
        type Output = ();
        #[inline(always)]
        unsafe fn run<S: Simd>(self) {
            for chunk in self.0.chunks_exact_mut(LANES) {
                // SAFETY: a chunk is a vector.
                unsafe { S::store(chunk.as_mut_ptr(), S::exp2(S::load(chunk.as_ptr()))) };
            }
        }
    }

    /// Sum of widened half floats.
    struct SumHalves<'a>(&'a [u16]);

    impl Kernel for SumHalves<'_> {
        type Output = f32;
        #[inline(always)]
        unsafe fn run<S: Simd>(self) -> f32 {
            // SAFETY: a chunk is a vector.
            unsafe {
                let mut total = S::splat(0.0);
                for chunk in self.0.chunks_exact(LANES) {
                    total = S::add(total, S::load_f16(chunk.as_ptr()));
                }
                sum::<S>(total)
            }
        }
    }

    #[test]
    fn exp_is_accurate_and_its_ends_are_zero_infinity_and_nan() {
        let grid: Vec<f32> = (-88_000..88_000).map(|i| i as f32 / 1000.0).collect();
        let ends = [f32::NEG_INFINITY, -1e30, -88.5, 0.0, 89.0, 1e30, f32::INFINITY, f32::NAN];
        for level in Level::supported() {
            let mut x = grid.clone();
            level.run(Exp(&mut x));
            for (&x, &y) in grid.iter().zip(&x).filter(|(x, _)| **x > -87.3) {
                let exact = f64::from(x).exp();
                assert!(
                    (f64::from(y) - exact).abs() <= 3e-7 * exact,
                    "{level:?}: exp({x}) = {y}, not {exact}"
                );
            }
            let mut y = [0.0; LANES];
            y[..8].copy_from_slice(&ends);
            level.run(Exp(&mut y));
            assert_eq!(y[..7], [0.0, 0.0, 0.0, 1.0, f32::INFINITY, f32::INFINITY, f32::INFINITY]);
            assert!(y[7].is_nan());
        }
    }

    #[test]
    fn all_levels_give_the_same_bits() {
        let mut expected = None;
        let halves: Vec<u16> = (0..0x7c00).collect(); // every positive finite half, subnormals too
        for level in Level::supported() {
            let mut x: Vec<f32> = (0..1600).map(|i| (i as f32 - 800.0) * 0.1237).collect();
            level.run(Exp(&mut x));
            let mut powers: Vec<f32> = (0..50_000).map(|i| i as f32 * 0.00506 - 126.0).collect();
            level.run(Exp2(&mut powers));
            x.extend(powers);
            x.push(level.run(SumHalves(&halves)));
            let bits: Vec<u32> = x.iter().map(|x| x.to_bits()).collect();
            assert_eq!(expected.get_or_insert_with(|| bits.clone()), &bits, "{level:?}");
        }
    }

    /// Rounds to pairs.
    struct Pair<'a>(&'a [f32], &'a mut [u32]);

    impl Kernel for Pair<'_> {
        type Output = ();
        #[inline(always)]
        unsafe fn run<S: Simd>(self) {
            for (x, pairs) in self.0.chunks_exact(2 * LANES).zip(self.1.chunks_exact_mut(LANES)) {
                // SAFETY: a chunk is two vectors, or one of pairs.
                unsafe {
                    let (a, b) = (S::load(x.as_ptr()), S::load(x.as_ptr().add(LANES)));
                    S::store_pairs(pairs.as_mut_ptr(), S::pair(a, b));
                }
            }
        }
    }

    #[test]
    fn all_levels_round_every_kind_of_number_to_the_same_bf16() {
        // All exponents, subnormals, infinities and NaN among them, with mantissas on both sides of a tie and at it.
        let x: Vec<f32> = (0..1u32 << 17)
            .map(|i| {
                let mantissa = [0, 0x7fff, 0x8000, 0x8001, 0x1_8000, 0x7f_8000, 0x7f_ffff, 1];
                f32::from_bits(i >> 3 << 23 | mantissa[i as usize % 8] ^ (i >> 12 & 0x1_0000))
            })
            .collect();
        let expected: Vec<u32> = x.chunks_exact(2).map(|x| rounded(x[0]) | rounded(x[1]) << 16).collect();
        for level in Level::supported() {
            let mut pairs = vec![0; x.len() / 2];
            level.run(Pair(&x, &mut pairs));
            assert!(pairs == expected, "{level:?}");
        }
    }

    fn rounded(x: f32) -> u32 {
        u32::from(crate::cpu::matmul::round_bf16(x))
    }

    #[test]
    fn exp2_is_accurate_on_every_level_and_nothing_for_what_is_not_seen() {
        let grid: Vec<f32> = (-12_600..=12_700).map(|i| i as f32 / 100.0).collect();
        for level in Level::supported() {
            let mut y = grid.clone();
            y.resize(grid.len().next_multiple_of(LANES), 0.0);
            level.run(Exp2(&mut y));
            for (&x, &y) in grid.iter().zip(&y) {
                let exact = f64::from(x).exp2();
                assert!((f64::from(y) - exact).abs() <= 4e-6 * exact, "{level:?}: {x}: {y}, not {exact}");
            }
            let mut ends = [f32::NEG_INFINITY; LANES];
            ends[..4].copy_from_slice(&[0.0, -1e30, -126.5, f32::NAN]);
            level.run(Exp2(&mut ends));
            assert_eq!(ends[..2], [1.0, 0.0]);
            assert!((0.0..=f32::MIN_POSITIVE).contains(&ends[2]));
            assert!(ends[3].is_nan() && ends[4..] == [0.0; LANES - 4]);
        }
    }
}
