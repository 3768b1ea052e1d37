//! `x * w^T + bias`: which kernel multiplies, and the weights it reads.

use crate::device::{
    Arg, Buffer, Device, Grid, MATMUL_FP8_SHARED, MATMUL_FP8_TCGEN05_SHARED, MATMUL_MXFP4_MXFP8_SHARED,
    MATMUL_NVFP4_NVFP4_SHARED, MATMUL_TCGEN05_SHARED, MATMUL_TILES_SHARED, MATMUL_WGMMA_SHARED,
};
use crate::queue::{Product, ProductShape};
use crate::sample::room;
use crate::tensor::{Format, Tensor, check};
use crate::weights::{Packed, Packing, TileKernels, Weights};
use rudder_ops::Result;

/// Rows of weights and activations are padded with zeros to a multiple of this.
const STEP: usize = 64;
/// Most rows that the kernels for few rows take.
pub(crate) const FEW: usize = 16;
/// Rows and features of a tile of `matmul_tiles`.
pub(crate) const TILE: usize = 128;

/// Elements of k that a part has at least where k is split: below that what splitting saves is not worth the adding up.
const PART: usize = 512;

/// From so many rows on, weights of a narrow format are widened in memory and multiplied by cuBLASLt. Below that the writing and reading of
/// what is widened, some 5 bytes a weight where its cache does not help, costs more than the plain kernel's arithmetic.
const WIDEN: usize = 512;
/// Bytes that are widened at a time: they are still in the second cache when they are multiplied. Emulated less, so that tests see
/// several slices.
const SLICE: usize = if cfg!(feature = "emulate") { 1 << 16 } else { 32 << 20 };

/// Elements of a row of FP8 that share a scale.
const FP8_BLOCK: usize = 128;

/// A weight matrix `[n, k]`.
pub struct Matrix {
    pub(crate) weights: Weights,
    pub(crate) n: usize,
    pub(crate) k: usize,
}

/// A vector of f32.
pub struct Vector {
    pub(crate) buffer: Buffer,
    pub(crate) len: usize,
    /// Of a norm: whether what reads its rows can read them in FP8.
    pub(crate) feeds_fp8: bool,
}

/// Elements of a row of `k` with its padding.
pub(crate) const fn padded(k: usize) -> usize {
    k.next_multiple_of(STEP)
}

/// The instructions of tensor cores that tiles are multiplied by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Instructions {
    /// `mma.sync`, which every GPU has.
    Mma,
    /// Hopper's.
    Wgmma,
    /// Blackwell's.
    Tcgen05,
}

impl Instructions {
    /// The best that a device has.
    pub fn of(device: &Device) -> Self {
        match (device.has_wgmma(), device.has_tcgen05()) {
            (true, _) => Self::Wgmma,
            (_, true) => Self::Tcgen05,
            _ => Self::Mma,
        }
    }

    /// Which of the kernels does it by them, and its shared memory.
    fn kernel(self, kernels: TileKernels) -> (&'static str, u32) {
        match self {
            Self::Mma => (kernels.mma, MATMUL_TILES_SHARED),
            Self::Wgmma => (kernels.wgmma, MATMUL_WGMMA_SHARED),
            Self::Tcgen05 => (kernels.tcgen05, MATMUL_TCGEN05_SHARED),
        }
    }
}

/// What multiplications need beside their operands.
pub(crate) struct Multiplier {
    device: Device,
    packed: Option<Buffer>,
    widened: Option<Buffer>,
    /// Sums of parts of k.
    parts: Option<Buffer>,
    /// Rows in MXFP8: codes, then scales `[k / 128, rows]`, a word for four blocks. Or in NVFP4: codes, then scales `[k / 256, rows]`, four words for
    /// sixteen blocks, then factors.
    microscaled: Option<Buffer>,
    /// What tiles are multiplied by.
    pub instructions: Instructions,
    /// Whether rows of x too are rounded to FP8, where weights are FP8 or, on Blackwell, MXFP4.
    pub fp8_products: bool,
    /// Whether they are rounded to NVFP4 where weights are, on Blackwell.
    pub fp4_products: bool,
}

/// Rows of bf16, padded: what the matrix kernels read. Behind them is room for the same in FP8: codes, then scales `[k / 128, rows]`.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    pub data: Arg,
    pub rows: usize,
    pub k: usize,
    /// Whether they are there in FP8.
    pub in_fp8: bool,
}

impl Rows {
    /// What they take with that room, as a tensor has: scales are a sixteenth of the codes at most.
    pub const fn bytes(rows: usize, k: usize) -> usize {
        4 * rows * k
    }

    /// Codes and scales.
    fn fp8(self) -> [Arg; 2] {
        let elements = self.rows * self.k;
        [self.data.after(2 * elements), self.data.after(3 * elements)]
    }

    /// What kernels that make rows are told to write: bf16, and FP8 or not.
    pub fn targets(self) -> [Arg; 3] {
        let [codes, scales] = if self.in_fp8 { self.fp8() } else { [Arg::NULL; 2] };
        [self.data, codes, scales]
    }

    /// The grid of kernels that give a warp 128 elements of a row.
    pub fn blocks(self) -> Grid {
        Grid::new((self.rows * self.k.div_ceil(FP8_BLOCK)).div_ceil(8), 256)
    }
}

/// A tensor of bf16 whose width is padding enough, or that no matrix reads.
impl From<&Tensor> for Rows {
    fn from(tensor: &Tensor) -> Self {
        Self { data: tensor.into(), rows: tensor.rows, k: tensor.width, in_fp8: tensor.in_fp8 }
    }
}

/// What the tiles of a product are: rows in order, or groups of rows of one expert each.
pub(crate) struct Tiles {
    pub count: usize,
    /// Rows of the output.
    pub rows: usize,
    /// As the kernels take it: a tile's expert and rows; nothing for rows in order.
    pub groups: Arg,
    /// Row i of the output is made of row `index[i] / share` of x, if there is one.
    pub index: Arg,
    pub share: usize,
}

impl Tiles {
    fn dense(rows: usize) -> Self {
        Self { count: rows.div_ceil(TILE), rows, groups: Arg::NULL, index: Arg::NULL, share: 1 }
    }
}

impl Multiplier {
    pub fn new(device: &Device) -> Self {
        Self {
            device: device.clone(),
            packed: None,
            widened: None,
            parts: None,
            microscaled: None,
            instructions: Instructions::of(device),
            fp8_products: false,
            fp4_products: false,
        }
    }

    /// A tensor as the matrix kernels read it: itself, or a copy in bf16 with padding.
    pub fn pack(&mut self, x: &Tensor) -> Result<Rows> {
        let k = padded(x.width);
        if x.format == Format::Bf16 && x.width == k {
            return Ok(x.into());
        }
        let packed = room(&mut self.packed, &self.device, Rows::bytes(x.rows, k))?;
        let args = [x.into(), x.is_f32(), packed.into(), x.width.into(), k.into()];
        self.device.launch("pack_rows", Grid::new(x.rows, 256), 0, &args)?;
        Ok(Rows { data: packed.into(), rows: x.rows, k, in_fp8: false })
    }

    /// Whether rows that are read by matrices of FP8 are made in FP8 too.
    pub fn reads_fp8(&self, rows: usize, width: usize) -> bool {
        self.fp8_products && rows > FEW && width == padded(width)
    }

    /// `out = x * w^T + bias`.
    pub fn linear(&mut self, x: &Tensor, w: &Matrix, bias: Option<&Vector>, out: &mut Tensor) -> Result<()> {
        check(x.width == w.k, || format!("rows of {} for a matrix of width {}", x.width, w.k))?;
        check(bias.is_none_or(|b| b.len == w.n), || "a bias of another length than the output".to_owned())?;
        out.set(x.rows, w.n, Format::F32)?;
        let x = self.pack(x)?;
        if x.rows <= FEW {
            return self.few(x, w, bias, out);
        }
        let multiplied = match &w.weights {
            Weights::Bf16(buffer) => self.product(x, buffer, w.n, out)?,
            Weights::Packed(packed) if self.rounds(packed, x.rows) => false,
            Weights::Packed(packed) => x.rows >= WIDEN && self.widened_product(x, packed, w.n, out)?,
        };
        if !multiplied {
            let bias = bias.map_or(Arg::NULL, |bias| (&bias.buffer).into());
            return self.tiles(x, &w.weights, bias, (&*out).into(), w.n, Tiles::dense(x.rows));
        }
        let Some(bias) = bias else { return Ok(()) };
        let args = [(&*out).into(), (&bias.buffer).into(), w.n.into(), out.elements().into()];
        self.device.launch("add_bias", Grid::elements(out.elements()), 0, &args)
    }

    /// Up to [`FEW`] rows.
    fn few(&self, x: Rows, w: &Matrix, bias: Option<&Vector>, out: &Tensor) -> Result<()> {
        let grid = Grid::new(if x.rows == 0 { 0 } else { w.n.div_ceil(16) }, 256);
        let kernel = w.weights.few_kernels().dense[usize::from(x.rows > 8)];
        let bias = bias.map_or(Arg::NULL, |bias| (&bias.buffer).into());
        let last = [bias, out.into(), x.rows.into(), w.n.into(), x.k.into()];
        w.weights.launch_few(&self.device, kernel, grid, x.data, &last)
    }

    /// `out = silu(x * gate^T) * (x * up^T)` of up to [`FEW`] rows, where `w` is gate, then up.
    pub fn gated_few(&mut self, x: &Tensor, w: &Matrix, out: &mut Tensor) -> Result<()> {
        let width = w.n / 2;
        check(x.width == w.k, || format!("rows of {} for a matrix of width {}", x.width, w.k))?;
        out.set(x.rows, width, Format::Bf16)?;
        let x = self.pack(x)?;
        let grid = Grid::new(if x.rows == 0 { 0 } else { width.div_ceil(8) }, 256);
        let kernel = w.weights.few_kernels().gated[usize::from(x.rows > 8)];
        let last = [(&*out).into(), x.rows.into(), width.into(), x.k.into()];
        w.weights.launch_few(&self.device, kernel, grid, x.data, &last)
    }

    /// Whether so many rows of x become FP8, 128 elements with a scale, for such weights.
    pub fn multiplies_fp8(&self, w: &Weights, rows: usize) -> bool {
        self.fp8_products && rows > FEW && w.takes_fp8()
    }

    /// Whether so many rows of x are rounded for such weights.
    fn rounds(&self, w: &Packed, rows: usize) -> bool {
        let rounds = match w.packing {
            Packing::Fp8 => self.fp8_products && w.shift > 0,
            Packing::Mxfp4 => self.fp8_products && self.rounds_for_tcgen05(),
            Packing::Nvfp4 => self.fp4_products && self.rounds_for_tcgen05(),
            Packing::Int4 => false,
        };
        rounds && rows > FEW
    }

    /// Whether Blackwell's kernels multiply what is rounded, not Hopper's: always where there are no others.
    fn rounds_for_tcgen05(&self) -> bool {
        self.instructions == Instructions::Tcgen05 || !self.device.has_wgmma()
    }

    /// Any number of rows, of experts too, on a kernel of ours: `out = x * w^T + bias`, `n` features of it.
    pub fn tiles(&mut self, x: Rows, w: &Weights, bias: Arg, out: Arg, n: usize, tiles: Tiles) -> Result<()> {
        let Tiles { rows, groups, index, share, .. } = tiles;
        let shape = [n, x.k];
        let (rows, n, k, share) = (rows.into(), n.into(), x.k.into(), share.into());
        match w {
            Weights::Bf16(w) => {
                let args = |out| [x.data, w.into(), bias, out, rows, n, k, groups, index, share];
                self.in_parts(self.instructions.kernel(TileKernels::BF16), STEP, shape, &tiles, out, args)
            }
            Weights::Packed(packed) if self.rounds(packed, x.rows) => {
                let (kernel, step) = self.rounding_kernel(packed);
                let [codes, x_scales] = match packed.packing {
                    Packing::Mxfp4 => self.in_mxfp8(x)?,
                    Packing::Nvfp4 => self.in_nvfp4(x)?,
                    _ => self.in_fp8(x)?,
                };
                let ([w, scales, stride, shift], x_rows) = (packed.args(), x.rows.into());
                #[rustfmt::skip]
                let args = |out| [
                    codes, x_scales, x_rows, w, scales, stride, shift, bias, out, rows, n, k, groups, index, share,
                ];
                self.in_parts(kernel, step, shape, &tiles, out, args)
            }
            // Widened on their way to the tensor cores.
            Weights::Packed(packed) => {
                let [w, scales, stride, shift] = packed.args();
                let args =
                    |out| [x.data, w, scales, stride, shift, bias, out, rows, n, k, groups, index, share];
                let kernel = self.instructions.kernel(packed.packing.kernels().tiles);
                self.in_parts(kernel, STEP, shape, &tiles, out, args)
            }
        }
    }

    /// What multiplies rows that are rounded: a kernel, its bytes of shared memory, and the elements of k in a step of it.
    fn rounding_kernel(&self, w: &Packed) -> ((&'static str, u32), usize) {
        match w.packing {
            Packing::Mxfp4 => (("matmul_mxfp4_mxfp8", MATMUL_MXFP4_MXFP8_SHARED), FP8_BLOCK),
            Packing::Nvfp4 => (("matmul_nvfp4_nvfp4", MATMUL_NVFP4_NVFP4_SHARED), 2 * FP8_BLOCK),
            _ if self.rounds_for_tcgen05() => (("matmul_fp8_tcgen05", MATMUL_FP8_TCGEN05_SHARED), FP8_BLOCK),
            _ => (("matmul_fp8_fp8", MATMUL_FP8_SHARED), FP8_BLOCK),
        }
    }

    /// Launches a kernel of tiles with `args` for where its sums go. Where its blocks are few, each takes some of the `step`s of k, and their sums
    /// are added up.
    fn in_parts<const N: usize>(
        &mut self,
        (kernel, shared): (&'static str, u32),
        step: usize,
        [n, k]: [usize; 2],
        tiles: &Tiles,
        out: Arg,
        args: impl Fn(Arg) -> [Arg; N],
    ) -> Result<()> {
        let (elements, features) = (tiles.rows * n, n.div_ceil(TILE));
        let parts = self.parts_of_k(tiles.count * features, k.div_ceil(step), PART / step);
        let to = match parts {
            1 => out,
            _ => room(&mut self.parts, &self.device, 4 * parts * elements)?.into(),
        };
        self.device.launch(kernel, Grid::of([tiles.count, features, parts], 256), shared, &args(to))?;
        if parts == 1 {
            return Ok(());
        }
        let args = [to, parts.into(), out, elements.into()];
        self.device.launch("add_parts", Grid::elements(elements), 0, &args)
    }

    /// In how many parts, each of at least so many steps, k's steps are taken: few tiles in as many as there are multiprocessors for.
    fn parts_of_k(&self, tiles: usize, steps: usize, least: usize) -> usize {
        let wanted = (self.device.multiprocessors() / tiles.max(1)).max(1);
        steps.div_ceil(steps.div_ceil(wanted).max(least)).max(1)
    }

    /// Codes and scales of rows, which become FP8 here if they are not yet.
    fn in_fp8(&self, x: Rows) -> Result<[Arg; 2]> {
        let [codes, scales] = x.fp8();
        if !x.in_fp8 {
            let args = [x.data, codes, scales, x.rows.into(), x.k.into()];
            self.device.launch("quantise_rows", x.blocks(), 0, &args)?;
        }
        Ok([codes, scales])
    }

    /// Codes and scales of rows in MXFP8.
    fn in_mxfp8(&mut self, x: Rows) -> Result<[Arg; 2]> {
        let (elements, blocks) = (x.rows * x.k, x.rows * x.k.div_ceil(FP8_BLOCK));
        let buffer = room(&mut self.microscaled, &self.device, elements + 4 * blocks)?;
        let [codes, scales] = [buffer.into(), Arg::at(buffer, elements)];
        let args = [x.data, codes, scales, x.rows.into(), x.k.into()];
        // Sixteen threads make 128 elements.
        self.device.launch("quantise_rows_mx", Grid::new(blocks.div_ceil(16), 256), 0, &args)?;
        Ok([codes, scales])
    }

    /// Codes and scales of rows in NVFP4, behind which their factors lie.
    fn in_nvfp4(&mut self, x: Rows) -> Result<[Arg; 2]> {
        let (codes, scales) = (x.rows * x.k / 2, x.rows * x.k.div_ceil(256) * 16);
        let buffer = room(&mut self.microscaled, &self.device, codes + scales + 4 * x.rows)?;
        let [to_codes, to_scales] = [buffer.into(), Arg::at(buffer, codes)];
        let args = [x.data, to_codes, to_scales, x.rows.into(), x.k.into()];
        self.device.launch("quantise_rows_nvfp4", Grid::new(x.rows, 256), 0, &args)?;
        Ok([to_codes, to_scales])
    }

    /// `out = x * w^T` through cuBLASLt; false if that cannot.
    fn product(&self, x: Rows, w: &Buffer, n: usize, out: &Tensor) -> Result<bool> {
        let shape = ProductShape { rows: x.rows, n, k: x.k, stride: n };
        if !self.device.can_multiply(shape) {
            return Ok(false);
        }
        let (w, out) = (w.address(), out.buffer.address());
        self.device.multiply(Product { shape, x: x.data.value(), w, out })?;
        Ok(true)
    }

    /// `out = x * w^T` through cuBLASLt of weights that are widened first, some features at a time.
    fn widened_product(&mut self, x: Rows, w: &Packed, n: usize, out: &Tensor) -> Result<bool> {
        let slices = slices(n, x.k);
        let shape = |n_of: usize| ProductShape { rows: x.rows, n: n_of, k: x.k, stride: n };
        if !slices.clone().all(|(_, count)| self.device.can_multiply(shape(count))) {
            return Ok(false);
        }
        let most = slices.clone().map(|(_, count)| count).max().unwrap_or(0);
        let widened = room(&mut self.widened, &self.device, 2 * most * x.k)?;
        for (first, count) in slices {
            w.widen(&self.device, first, count, x.k, widened.into())?;
            let out = out.buffer.address() + 4 * first as u64;
            let (x, w) = (x.data.value(), widened.address());
            self.device.multiply(Product { shape: shape(count), x, w, out })?;
        }
        Ok(true)
    }
}

/// First feature and number of those that are widened together. All but the last are a multiple of a tile, so that outputs begin on as many
/// bytes as cuBLASLt counts on.
fn slices(n: usize, k: usize) -> impl Iterator<Item = (usize, usize)> + Clone {
    let most = (SLICE / (2 * k.max(1)) / TILE).max(1) * TILE;
    (0..n).step_by(most).map(move |first| (first, most.min(n - first)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_hold_all_features_in_order() {
        for (n, k) in [(1, 64), (128, 64), (1000, 64), (300, 192), (129, 1 << 20)] {
            let all: Vec<_> = slices(n, k).collect();
            assert!(all.windows(2).all(|w| w[0].0 + w[0].1 == w[1].0) && all[0].0 == 0);
            assert_eq!(all.iter().map(|(_, count)| count).sum::<usize>(), n);
            assert!(all.iter().all(|(first, _)| first.is_multiple_of(TILE)));
        }
    }
}
