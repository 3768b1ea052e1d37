//! Mixture of experts: routing rows to experts, and each expert's MLP over its rows.
//!
//! Every row adds up its experts in ascending order, whatever other rows are there.

use super::matmul::{PackedMatrix, Rows, Scratch};
use super::mlp::{self, Mlp};
use super::pool::Pool;
use super::simd::{self, Kernel, LANES, Level, Simd};
use crate::Activation;

/// The stacked experts of one layer.
pub struct Experts {
    pub(super) experts: Vec<Expert>,
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) activation: Activation,
}

/// One expert's MLP.
pub(super) struct Expert {
    /// Gate and up, stacked.
    pub gate_up: PackedMatrix,
    pub down: PackedMatrix,
    /// Of gate and up, stacked, and of down.
    pub biases: Option<[Vec<f32>; 2]>,
}

/// Buffers that the op reuses.
#[derive(Default)]
pub(super) struct Buffers {
    probabilities: Vec<f32>,
    routes: Vec<Route>,
    x: Vec<f32>,
    gate_up: Vec<f32>,
    activated: Vec<f32>,
    y: Vec<f32>,
}

/// A row sent to an expert.
#[derive(Clone, Copy)]
struct Route {
    expert: usize,
    row: usize,
    weight: f32,
}

/// What the op needs of the backend.
pub(super) struct Context<'a> {
    pub pool: &'a Pool,
    pub level: Level,
    pub scratch: &'a mut Scratch,
    pub buffers: &'a mut Buffers,
}

/// `out = sum of weight * expert(x)` over each row's `top_k` experts.
pub(super) fn moe(
    context: Context<'_>,
    x: &[f32],
    router_logits: &[f32],
    experts: &Experts,
    top_k: usize,
    renormalise: bool,
    out: &mut [f32],
) {
    let Context { pool, level, scratch, buffers } = context;
    buffers.route(level, router_logits, experts.experts.len(), top_k, renormalise);
    out.fill(0.0);
    let Buffers { routes, x: rows_in, gate_up, activated, y, .. } = buffers;
    let (hidden, intermediate) = (experts.hidden, experts.intermediate);
    for routes in routes.chunk_by(|a, b| a.expert == b.expert) {
        let (expert, n) = (&experts.experts[routes[0].expert], routes.len());
        rows_in.clear();
        routes.iter().for_each(|r| rows_in.extend_from_slice(&x[r.row * hidden..(r.row + 1) * hidden]));
        let mlp = Mlp {
            gate_up: &expert.gate_up,
            down: &expert.down,
            biases: expert.biases.as_ref().map(|[gate_up, down]| [&gate_up[..], &down[..]]),
            activation: experts.activation,
        };
        let room = mlp::Room {
            gate_up: sized(gate_up, n * 2 * intermediate),
            activated: sized(activated, n * intermediate),
        };
        let y = sized(y, n * hidden);
        mlp.run(pool, level, scratch, Rows::from(&rows_in[..]), room, y);
        for (route, y) in routes.iter().zip(y.chunks_exact(hidden)) {
            for (out, y) in out[route.row * hidden..(route.row + 1) * hidden].iter_mut().zip(y) {
                *out += route.weight * y;
            }
        }
    }
}

/// The first `len` elements, growing the buffer when it was never that long.
fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.resize(buffer.len().max(len), 0.0);
    &mut buffer[..len]
}

impl Buffers {
    /// Fills `routes`, by expert and then by row.
    fn route(&mut self, level: Level, logits: &[f32], experts: usize, top_k: usize, renormalise: bool) {
        self.routes.clear();
        self.probabilities.resize(experts.next_multiple_of(LANES), 0.0);
        for (row, logits) in logits.chunks_exact(experts).enumerate() {
            self.probabilities[..experts].copy_from_slice(logits);
            self.probabilities[experts..].fill(f32::NEG_INFINITY);
            let total = level.run(Softmax(&mut self.probabilities));
            let start = self.routes.len();
            for _ in 0..top_k {
                let expert = largest(&self.probabilities[..experts]);
                let weight = self.probabilities[expert] / total;
                self.routes.push(Route { expert, row, weight });
                self.probabilities[expert] = -1.0; // taken
            }
            if renormalise {
                let chosen = &mut self.routes[start..];
                let sum: f32 = chosen.iter().map(|r| r.weight).sum();
                chosen.iter_mut().for_each(|r| r.weight /= sum);
            }
        }
        self.routes.sort_unstable_by_key(|r| (r.expert, r.row));
    }
}

/// The largest element's lowest index; a NaN counts as zero probability.
fn largest(x: &[f32]) -> usize {
    let key = |i: usize| if x[i].is_nan() { 0.0 } else { x[i] };
    (1..x.len()).fold(0, |best, i| if key(i) > key(best) { i } else { best })
}

/// Exponentials in place; gives their sum.
struct Softmax<'a>(&'a mut [f32]);

impl Kernel for Softmax<'_> {
    type Output = f32;
    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> f32 {
        // SAFETY: the caller's promise is the same, and the buffer is whole vectors.
        unsafe { simd::softmax::<S>(self.0).1 }
    }
}
