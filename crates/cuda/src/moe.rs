//! A mixture of experts: few rows pair by pair, many rows sorted by expert.

use crate::device::{Arg, Buffer, Device, Grid};
use crate::matmul::{Multiplier, Rows, TILE, Tiles, Vector, padded};
use crate::sample::room;
use crate::tensor::{Format, Tensor, check};
use crate::weights::Weights;
use rudder_ops::{Activation, Result};

/// Most experts of a layer; `MOST_EXPERTS` in moe.cu.
pub(crate) const MOST_EXPERTS: usize = 512;
/// (row, expert) pairs that a block of the sort takes; `CHUNK` in moe.cu.
const CHUNK: usize = 256;
/// Up to so many pairs each reads its expert's weights for itself: sorting would cost more than it saves.
const FEW_PAIRS: usize = 64;

/// One layer's experts, rows padded as a [`crate::matmul::Matrix`]'s.
pub struct Experts {
    /// `[experts, 2 * intermediate, hidden]`: gate, then up.
    pub(crate) gate_up: Stack,
    /// `[experts, hidden, intermediate]`.
    pub(crate) down: Stack,
    pub(crate) activation: Activation,
    pub(crate) experts: usize,
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
}

/// A matrix of each expert, one after another.
pub(crate) struct Stack {
    pub(crate) weights: Weights,
    /// `[experts, rows of a matrix]`.
    pub(crate) bias: Option<Vector>,
}

/// The kernels' alpha, and their limit or 0.
fn gate_args(activation: Activation) -> [Arg; 2] {
    match activation {
        Activation::Silu => [1.0f32.into(), 0.0f32.into()],
        Activation::ClampedSwiglu { alpha, limit } => [alpha.into(), limit.into()],
    }
}

/// Queues the gate: of rows `[gate | up]` of f32, each `width` wide, to what matrices read.
pub(crate) fn gate(
    device: &Device,
    gate_up: Arg,
    width: usize,
    activation: Activation,
    to: Rows,
) -> Result<()> {
    let [alpha, limit] = gate_args(activation);
    let [out, codes, scales] = to.targets();
    let (rows, padded) = (to.rows.into(), to.k.into());
    let args = [gate_up, out, codes, scales, rows, width.into(), padded, alpha, limit];
    device.launch("silu_mul", to.blocks(), 0, &args)
}

/// What lies between the op's kernels; grows to the largest step and stays.
#[derive(Default)]
pub(crate) struct Buffers {
    /// Experts chosen, a pair each.
    chosen: Option<Buffer>,
    /// Their weights.
    weights: Option<Buffer>,
    /// Pairs of each expert in each chunk, then where they begin.
    counts: Option<Buffer>,
    groups: Option<Buffer>,
    sorted: Option<Buffer>,
    places: Option<Buffer>,
    /// Gates and ups of sorted pairs, f32.
    gate_up: Option<Buffer>,
    /// Gated, bf16, padded.
    gated: Option<Buffer>,
    /// What each pair's expert made, f32.
    made: Option<Buffer>,
}

/// The sorted order of a step's pairs.
struct Order {
    groups: Arg,
    /// Groups that there may be.
    most: usize,
    sorted: Arg,
    places: Arg,
}

/// What one call works with.
pub(crate) struct Moe<'a> {
    pub device: &'a Device,
    pub multiplier: &'a mut Multiplier,
    pub buffers: &'a mut Buffers,
    pub experts: &'a Experts,
    pub top_k: usize,
}

impl Moe<'_> {
    pub fn run(
        &mut self,
        x: &Tensor,
        router_logits: &Tensor,
        renormalise: bool,
        out: &mut Tensor,
    ) -> Result<()> {
        let (experts, top_k) = (self.experts, self.top_k);
        let (rows, count, hidden) = (x.rows, experts.experts, experts.hidden);
        router_logits.expect_f32("the router's logits")?;
        check(x.width == hidden && router_logits.width == count && router_logits.rows == rows, || {
            format!("{count} experts of width {hidden} for other inputs")
        })?;
        check((1..=count).contains(&top_k), || format!("{top_k} of {count} experts"))?;
        out.set(rows, hidden, Format::F32)?;
        let pairs = rows * top_k;
        let chosen: Arg = room(&mut self.buffers.chosen, self.device, 4 * pairs)?.into();
        let weights: Arg = room(&mut self.buffers.weights, self.device, 4 * pairs)?.into();
        let args = [
            router_logits.into(),
            rows.into(),
            count.into(),
            top_k.into(),
            renormalise.into(),
            chosen,
            weights,
        ];
        self.device.launch("moe_route", Grid::new(rows.div_ceil(4), 128), 0, &args)?;
        let x = self.multiplier.pack(x)?;
        let order = if pairs <= FEW_PAIRS { None } else { Some(self.sort(chosen, pairs)?) };
        let made = self.multiply(x, pairs, chosen, order.as_ref())?;
        let places = order.map_or(Arg::NULL, |order| order.places);
        let args = [made, places, weights, top_k.into(), (&*out).into(), hidden.into()];
        self.device.launch("moe_combine", Grid::new(rows, 256), 0, &args)
    }

    /// Sorts pairs by expert, in tiles of one expert each.
    fn sort(&mut self, chosen: Arg, pairs: usize) -> Result<Order> {
        let (device, experts) = (self.device, self.experts.experts);
        let chunks = pairs.div_ceil(CHUNK);
        // Every expert may end with a group that is not full.
        let most = pairs / TILE + experts.min(pairs);
        let counts: Arg = room(&mut self.buffers.counts, device, 4 * chunks * experts)?.into();
        let groups: Arg = room(&mut self.buffers.groups, device, 16 * most)?.into();
        let sorted: Arg = room(&mut self.buffers.sorted, device, 4 * pairs)?.into();
        let places: Arg = room(&mut self.buffers.places, device, 4 * pairs)?.into();
        let args = [chosen, pairs.into(), experts.into(), counts];
        device.launch("moe_count", Grid::new(chunks, CHUNK as u32), 0, &args)?;
        let args = [counts, chunks.into(), experts.into(), groups, most.into()];
        device.launch("moe_offsets", Grid::new(1, MOST_EXPERTS as u32), 0, &args)?;
        let args = [chosen, pairs.into(), experts.into(), counts, sorted, places];
        device.launch("moe_sort", Grid::new(chunks, CHUNK as u32), 0, &args)?;
        Ok(Order { groups, most, sorted, places })
    }

    /// Every pair's gated MLP, in sorted order where there is one.
    fn multiply(&mut self, x: Rows, pairs: usize, chosen: Arg, order: Option<&Order>) -> Result<Arg> {
        let (device, experts) = (self.device, self.experts);
        let (hidden, intermediate) = (experts.hidden, experts.intermediate);
        let width = padded(intermediate);
        // What few pairs read is bf16.
        let in_fp8 = order.is_some() && self.multiplier.multiplies_fp8(&experts.down.weights, pairs);
        let bytes = if in_fp8 { Rows::bytes(pairs, width) } else { 2 * pairs * width };
        let gated = room(&mut self.buffers.gated, device, bytes)?.into();
        let gated = Rows { data: gated, rows: pairs, k: width, in_fp8 };
        let made: Arg = room(&mut self.buffers.made, device, 4 * pairs * hidden)?.into();
        let mut product = Product { device, multiplier: &mut *self.multiplier, pairs, chosen, order };
        // The pairs of a row share its activations.
        if order.is_none() {
            product.gated_few(x, self.top_k, experts, gated)?;
        } else {
            let gate_up: Arg = room(&mut self.buffers.gate_up, device, 8 * pairs * intermediate)?.into();
            product.run(x, Some(self.top_k), &experts.gate_up, 2 * intermediate, gate_up)?;
            gate(device, gate_up, intermediate, experts.activation, gated)?;
        }
        product.run(gated, None, &experts.down, hidden, made)?;
        Ok(made)
    }
}

/// Products of each pair's activations with its expert's matrix.
struct Product<'a> {
    device: &'a Device,
    multiplier: &'a mut Multiplier,
    pairs: usize,
    chosen: Arg,
    order: Option<&'a Order>,
}

impl Product<'_> {
    /// `out[pair] = x[pair] * w[expert of pair]^T + bias[expert of pair]`, pairs in sorted order where there is one. `shared_by`: `x` has a row for so
    /// many consecutive pairs, in the order of rows; else one a pair, in the order of `out`.
    fn run(&mut self, x: Rows, shared_by: Option<usize>, w: &Stack, n: usize, out: Arg) -> Result<()> {
        let bias = w.bias.as_ref().map_or(Arg::NULL, |bias| (&bias.buffer).into());
        let share = shared_by.unwrap_or(1);
        let Some(order) = self.order else {
            let grid = Grid::of([n.div_ceil(16), self.pairs, 1], 256);
            let kernel = w.weights.few_kernels().experts;
            let last = [bias, self.chosen, out, share.into(), n.into(), x.k.into()];
            return w.weights.launch_few(self.device, kernel, grid, x.data, &last);
        };
        let index = shared_by.map_or(Arg::NULL, |_| order.sorted);
        let tiles = Tiles { count: order.most, rows: self.pairs, groups: order.groups, index, share };
        self.multiplier.tiles(x, &w.weights, bias, out, n, tiles)
    }

    /// Of pairs that are not sorted: what the gate of each pair's expert lets through, made of row `pair / share` of `x`.
    fn gated_few(&self, x: Rows, share: usize, experts: &Experts, out: Rows) -> Result<()> {
        let Stack { weights, bias } = &experts.gate_up;
        let grid = Grid::of([out.k.div_ceil(8), self.pairs, 1], 256);
        let bias = bias.as_ref().map_or(Arg::NULL, |bias| (&bias.buffer).into());
        let [alpha, limit] = gate_args(experts.activation);
        let (width, padded) = (experts.intermediate.into(), out.k.into());
        let last = [bias, self.chosen, out.data, share.into(), width, padded, x.k.into(), alpha, limit];
        weights.launch_few(self.device, weights.few_kernels().gated_experts, grid, x.data, &last)
    }
}
