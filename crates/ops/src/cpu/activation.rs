//! The gated activation of an MLP.

use super::pool::Pool;
use super::rows::{Disjoint, for_rows};
use super::simd::{self, Kernel, LANES, Level, Simd};

/// `out = gate / (1 + e^-gate) * up` for rows `[gate | up]`, `out` being `[rows, width]`.
pub(super) fn silu_mul(pool: &Pool, level: Level, gate_up: &[f32], width: usize, out: &mut [f32]) {
    let rows = out.len() / width;
    let out = Disjoint::new(out);
    for_rows(pool, rows, 4 * width, |range| {
        for row in range {
            let (gate, up) = gate_up[row * 2 * width..(row + 1) * 2 * width].split_at(width);
            // SAFETY: every row is in one range.
            let out = unsafe { out.part(row * width..(row + 1) * width) };
            level.run(SiluMul { gate, up, out });
        }
    });
}

struct SiluMul<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for SiluMul<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let whole = self.out.len() / LANES * LANES;
        let (out, out_rest) = self.out.split_at_mut(whole);
        let chunks = self.gate.chunks_exact(LANES).zip(self.up.chunks_exact(LANES));
        // SAFETY: every chunk is a vector, the rests shorter than one.
        unsafe {
            for ((gate, up), out) in chunks.zip(out.chunks_exact_mut(LANES)) {
                S::store(
                    out.as_mut_ptr(),
                    silu_mul_vector::<S>(S::load(gate.as_ptr()), S::load(up.as_ptr())),
                );
            }
            let gate = simd::load_part::<S>(&self.gate[whole..], 0.0);
            let up = simd::load_part::<S>(&self.up[whole..], 0.0);
            let last = simd::lanes::<S>(silu_mul_vector::<S>(gate, up));
            out_rest.copy_from_slice(&last[..out_rest.len()]);
        }
    }
}

#[inline(always)]
unsafe fn silu_mul_vector<S: Simd>(gate: S::V, up: S::V) -> S::V {
    // SAFETY: the caller's promise is the same.
    unsafe {
        let e = simd::exp::<S>(S::sub(S::splat(0.0), gate));
        S::mul(S::div(gate, S::add(S::splat(1.0), e)), up)
    }
}
