//! Root-mean-square norm of a row.

use super::matmul::Pairs;
use super::simd::{self, Kernel, LANES, Simd};

/// `row = row / sqrt(mean(row^2) + eps) * weight`, from `x` to `out`, and to pairs of bf16 where they are wanted.
pub(super) struct RmsNorm<'a> {
    pub x: &'a [f32],
    pub weight: &'a [f32],
    pub eps: f32,
    pub out: &'a mut [f32],
    pub pairs: Option<&'a mut [u32]>,
}

impl Kernel for RmsNorm<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's promise is the same.
        let scale = unsafe { inverse_rms::<S>(self.x, self.eps) };
        for ((y, x), w) in self.out.iter_mut().zip(self.x).zip(self.weight) {
            *y = x * scale * w;
        }
        if let Some(pairs) = self.pairs {
            // SAFETY: the caller's promise is the same.
            unsafe { Pairs { x: self.out, row: self.out.len(), out: pairs }.run::<S>() };
        }
    }
}

/// [`RmsNorm`] in place.
pub(super) struct RmsNormInPlace<'a> {
    pub x: &'a mut [f32],
    pub weight: &'a [f32],
    pub eps: f32,
}

impl Kernel for RmsNormInPlace<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's promise is the same.
        let scale = unsafe { inverse_rms::<S>(self.x, self.eps) };
        for (x, w) in self.x.iter_mut().zip(self.weight) {
            *x = *x * scale * w;
        }
    }
}

#[inline(always)]
unsafe fn inverse_rms<S: Simd>(x: &[f32], eps: f32) -> f32 {
    // SAFETY: every chunk is four vectors, every piece of the rest at most one.
    let sum = unsafe {
        let mut sums = [S::splat(0.0); 4];
        let chunks = x.chunks_exact(4 * LANES);
        let rest = chunks.remainder();
        for chunk in chunks {
            for (i, sum) in sums.iter_mut().enumerate() {
                let v = S::load(chunk.as_ptr().add(i * LANES));
                *sum = S::fma(v, v, *sum);
            }
        }
        for (part, sum) in rest.chunks(LANES).zip(&mut sums) {
            let v = simd::load_part::<S>(part, 0.0);
            *sum = S::fma(v, v, *sum);
        }
        simd::sum::<S>(S::add(S::add(sums[0], sums[1]), S::add(sums[2], sums[3])))
    };
    1.0 / (sum / x.len() as f32 + eps).sqrt()
}
