//! A gated MLP: gate and up, the activation, *down*.

use super::activation;
use super::matmul::{Isa, PackedMatrix, Rows, Scratch, gated, matmul, matmul_gated, takes_gated};
use super::pool::Pool;
use super::simd::Level;
use crate::Activation;

/// Its weights.
pub(super) struct Mlp<'a> {
    /// The gate's rows, then as many of up.
    pub gate_up: &'a PackedMatrix,
    pub down: &'a PackedMatrix,
    /// Of gate and up, and of *down*.
    pub biases: Option<[&'a [f32]; 2]>,
    pub activation: Activation,
}

/// Room for what stands between its steps where they are taken one by one.
pub(super) struct Room<'a> {
    /// `[rows, gate_up.rows()]`.
    pub gate_up: &'a mut [f32],
    /// `[rows, gate_up.rows() / 2]`.
    pub activated: &'a mut [f32],
}

impl Mlp<'_> {
    /// `out = activation(gate, up) * down^T` with gate and up the halves of `x * gate_up^T`, each with its bias. The bits
    /// are the same for any number of rows.
    pub fn run(
        &self,
        pool: &Pool,
        level: Level,
        scratch: &mut Scratch,
        x: Rows<'_>,
        room: Room<'_>,
        out: &mut [f32],
    ) {
        let Mlp { gate_up, down, activation, .. } = *self;
        let rows = out.len() / down.rows();
        let [bias, down_bias] = self.biases.map_or([None; 2], |biases| biases.map(Some));
        if takes_gated(rows, gate_up, down) {
            gated(Isa::widest(), pool, scratch, activation, x, rows, gate_up, bias);
            return matmul_gated(pool, scratch, rows, down, down_bias, out);
        }
        matmul(pool, scratch, x, rows, gate_up, bias, room.gate_up);
        activation::gated(pool, level, activation, room.gate_up, down.width(), room.activated);
        matmul(pool, scratch, Rows::from(&*room.activated), rows, down, down_bias, out);
    }
}
