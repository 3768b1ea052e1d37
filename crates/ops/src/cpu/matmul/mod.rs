//! Multiplication of activations with packed weights.

use super::pool::Pool;
use crate::{RawTensor, Result};

/// A weight matrix `[rows, width]` repacked for the CPU's kernels: one or several parts stacked
/// along the rows (outputs), each in its own storage format.
pub struct PackedMatrix {
    rows: usize,
    width: usize,
}

impl PackedMatrix {
    /// Packs `parts`, each `[rows, width]` of one width, stacked in order.
    ///
    /// # Errors
    /// If a part is not two-dimensional or widths differ.
    pub fn pack(_pool: &Pool, parts: &[RawTensor]) -> Result<Self> {
        Ok(Self { rows: parts.iter().map(|p| p.shape[0]).sum(), width: parts[0].shape[1] })
    }
    /// Outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }
    /// Inputs.
    pub fn width(&self) -> usize {
        self.width
    }
    /// Bytes the packed weights take.
    pub fn bytes(&self) -> usize {
        0
    }
}

/// Buffers for quantised activations, reused by every multiplication.
pub struct Scratch {}

impl Scratch {
    /// Buffers for up to `max_rows` rows of up to `max_width` inputs.
    pub fn new(_max_rows: usize, _max_width: usize) -> Self {
        Self {}
    }
}

/// `out[r] = x[r] * w^T + bias`: `x` is `[rows, w.width()]`, `out` `[rows, w.rows()]`, both dense
/// and row-major.
pub fn matmul(
    _pool: &Pool,
    _scratch: &mut Scratch,
    _x: &[f32],
    _rows: usize,
    _w: &PackedMatrix,
    _bias: Option<&[f32]>,
    out: &mut [f32],
) {
    out.fill(0.0);
}
