//! The gated activation of an MLP.

use super::pool::Pool;
use super::rows::{Disjoint, for_rows};
use super::simd::{self, Kernel, LANES, Level, Simd};
use crate::Activation;

/// What `activation` makes of rows `[gate | up]`, `out` being `[rows, width]`.
pub(super) fn gated(
    pool: &Pool,
    level: Level,
    activation: Activation,
    gate_up: &[f32],
    width: usize,
    out: &mut [f32],
) {
    let rows = out.len() / width;
    let out = Disjoint::new(out);
    for_rows(pool, rows, 4 * width, |range| {
        for row in range {
            let (gate, up) = gate_up[row * 2 * width..(row + 1) * 2 * width].split_at(width);
            // SAFETY: every row is in one range.
            let out = unsafe { out.part(row * width..(row + 1) * width) };
            level.run(Gated { activation, gate, up, out });
        }
    });
}

struct Gated<'a> {
    activation: Activation,
    gate: &'a [f32],
    up: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for Gated<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let whole = self.out.len() / LANES * LANES;
        let (out, out_rest) = self.out.split_at_mut(whole);
        let chunks = self.gate.chunks_exact(LANES).zip(self.up.chunks_exact(LANES));
        // SAFETY: every chunk is a vector, the rests shorter than one.
        unsafe {
            for ((gate, up), out) in chunks.zip(out.chunks_exact_mut(LANES)) {
                let y = gated_vector::<S>(self.activation, S::load(gate.as_ptr()), S::load(up.as_ptr()));
                S::store(out.as_mut_ptr(), y);
            }
            let gate = simd::load_part::<S>(&self.gate[whole..], 0.0);
            let up = simd::load_part::<S>(&self.up[whole..], 0.0);
            let last = simd::lanes::<S>(gated_vector::<S>(self.activation, gate, up));
            out_rest.copy_from_slice(&last[..out_rest.len()]);
        }
    }
}

/// What `activation` makes of a gate and an up.
///
/// # Safety
/// The CPU has the instructions of `S`.
#[inline(always)]
pub(super) unsafe fn gated_vector<S: Simd>(activation: Activation, gate: S::V, up: S::V) -> S::V {
    // SAFETY: the caller's promise is the same.
    unsafe {
        match activation {
            Activation::Silu => S::mul(times_sigmoid::<S>(gate, gate), up),
            Activation::ClampedSwiglu { alpha, limit } => {
                // A NaN stays one: it is the second operand.
                let gate = S::min(S::splat(limit), gate);
                let up = S::max(S::splat(-limit), S::min(S::splat(limit), up));
                let glu = times_sigmoid::<S>(gate, S::mul(S::splat(alpha), gate));
                S::mul(glu, S::add(up, S::splat(1.0)))
            }
        }
    }
}

/// `x / (1 + e^-y)`.
#[inline(always)]
unsafe fn times_sigmoid<S: Simd>(x: S::V, y: S::V) -> S::V {
    // SAFETY: the caller's promise is the same.
    unsafe {
        let e = simd::exp::<S>(S::sub(S::splat(0.0), y));
        S::div(x, S::add(S::splat(1.0), e))
    }
}
