//! `x * w^T + bias`: which kernel multiplies, and the weights it reads.

use crate::device::{Arg, Buffer, Device, Grid, MATMUL_TILES_SHARED};
use crate::queue::Product;
use crate::sample::room;
use crate::tensor::{Format, Tensor, check};
use rudder_ops::Result;

/// Rows of weights and activations are padded with zeros to a multiple of this.
const STEP: usize = 64;
/// Most rows that the kernels for few rows take.
const FEW: usize = 16;
/// Rows and features of a tile of `matmul_tiles`.
pub(crate) const TILE: usize = 128;

/// A weight matrix `[n, k]` in bf16, rows padded to [`padded`] elements.
pub struct Matrix {
    pub(crate) buffer: Buffer,
    pub(crate) n: usize,
    pub(crate) k: usize,
}

/// A vector of f32.
pub struct Vector {
    pub(crate) buffer: Buffer,
    pub(crate) len: usize,
}

/// Elements of a row of `k` with its padding.
pub(crate) const fn padded(k: usize) -> usize {
    k.next_multiple_of(STEP)
}

/// What multiplications need beside their operands.
pub(crate) struct Multiplier {
    device: Device,
    packed: Option<Buffer>,
}

/// Rows of bf16, padded: what the matrix kernels read.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    pub data: Arg,
    pub rows: usize,
    pub k: usize,
}

impl Multiplier {
    pub fn new(device: &Device) -> Self {
        Self { device: device.clone(), packed: None }
    }

    /// A tensor as the matrix kernels read it: itself, or a copy in bf16 with padding.
    pub fn pack(&mut self, x: &Tensor) -> Result<Rows> {
        let k = padded(x.width);
        if x.format == Format::Bf16 && x.width == k {
            return Ok(Rows { data: x.into(), rows: x.rows, k });
        }
        let packed = room(&mut self.packed, &self.device, 2 * x.rows * k)?;
        let args = [x.into(), x.is_f32(), packed.into(), x.width.into(), k.into()];
        self.device.launch("pack_rows", Grid::new(x.rows, 256), 0, &args)?;
        Ok(Rows { data: packed.into(), rows: x.rows, k })
    }

    /// `out = x * w^T + bias`.
    pub fn linear(&mut self, x: &Tensor, w: &Matrix, bias: Option<&Vector>, out: &mut Tensor) -> Result<()> {
        check(x.width == w.k, || format!("rows of {} for a matrix of width {}", x.width, w.k))?;
        check(bias.is_none_or(|b| b.len == w.n), || "a bias of another length than the output".to_owned())?;
        out.set(x.rows, w.n, Format::F32)?;
        let x = self.pack(x)?;
        if x.rows <= FEW {
            let kernel = if x.rows <= 8 { "matmul_few_8" } else { "matmul_few_16" };
            let grid = Grid::new(if x.rows == 0 { 0 } else { w.n.div_ceil(16) }, 256);
            return self.device.launch(kernel, grid, 0, &args(x, w, bias, out));
        }
        // In the terms of cuBLASLt where that is there.
        let product = Product {
            shape: [x.rows, w.n, x.k],
            x: x.data.value(),
            w: w.buffer.address(),
            out: out.buffer.address(),
        };
        if self.device.multiply(product)? {
            let Some(bias) = bias else { return Ok(()) };
            let args = [(&*out).into(), (&bias.buffer).into(), w.n.into(), out.elements().into()];
            return self.device.launch("add_bias", Grid::elements(out.elements()), 0, &args);
        }
        let mut args = args(x, w, bias, out).to_vec();
        args.extend([Arg::NULL, Arg::NULL, 1usize.into()]);
        let grid = Grid::of([x.rows.div_ceil(TILE), w.n.div_ceil(TILE), 1], 256);
        self.device.launch("matmul_tiles", grid, MATMUL_TILES_SHARED, &args)
    }
}

/// The arguments that all matrix kernels begin with.
fn args(x: Rows, w: &Matrix, bias: Option<&Vector>, out: &Tensor) -> [Arg; 7] {
    let bias = bias.map_or(Arg::NULL, |bias| (&bias.buffer).into());
    [x.data, (&w.buffer).into(), bias, out.into(), x.rows.into(), w.n.into(), x.k.into()]
}
