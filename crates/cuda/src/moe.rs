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

impl Stack {
    fn bias(&self) -> Arg {
        self.bias.as_ref().map_or(Arg::NULL, |bias| (&bias.buffer).into())
    }
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

/// What the router chose: (row, expert) pairs, those of a row one after another.
struct Choice {
    pairs: usize,
    experts: Arg,
    weights: Arg,
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
        let choice = self.route(router_logits, renormalise)?;
        let x = self.multiplier.pack(x)?;
        if rows * top_k <= FEW_PAIRS { self.few(x, &choice, out) } else { self.many(x, &choice, out) }
    }

    /// The experts of every row, and their weights.
    fn route(&mut self, logits: &Tensor, renormalise: bool) -> Result<Choice> {
        let pairs = logits.rows * self.top_k;
        let experts: Arg = room(&mut self.buffers.chosen, self.device, 4 * pairs)?.into();
        let weights: Arg = room(&mut self.buffers.weights, self.device, 4 * pairs)?.into();
        let (count, top_k) = (self.experts.experts.into(), self.top_k.into());
        let args = [logits.into(), count, top_k, renormalise.into(), experts, weights];
        self.device.launch("moe_route", Grid::new(logits.rows, 128), 0, &args)?;
        Ok(Choice { pairs, experts, weights })
    }

    /// Few pairs, each by itself: a row's sum over its experts is made with the second product.
    fn few(&mut self, x: Rows, choice: &Choice, out: &Tensor) -> Result<()> {
        let (device, top_k) = (self.device, self.top_k);
        let Experts { gate_up, down, hidden, intermediate, .. } = self.experts;
        let width = padded(*intermediate);
        let gated: Arg = room(&mut self.buffers.gated, device, 2 * choice.pairs * width)?.into();
        let grid = Grid::of([width.div_ceil(8), choice.pairs, 1], 256);
        let [alpha, limit] = gate_args(self.experts.activation);
        let (share, inner) = (top_k.into(), (*intermediate).into());
        let last =
            [gate_up.bias(), choice.experts, gated, share, inner, width.into(), x.k.into(), alpha, limit];
        let weights = &gate_up.weights;
        weights.launch_few(device, weights.few_kernels().gated_experts, grid, x.data, &last)?;
        let grid = Grid::of([hidden.div_ceil(16), x.rows, 1], 256);
        let (n, k) = ((*hidden).into(), width.into());
        let last = [down.bias(), choice.experts, choice.weights, out.into(), top_k.into(), n, k];
        let weights = &down.weights;
        weights.launch_few(device, weights.few_kernels().experts, grid, gated, &last)
    }

    /// Many pairs, sorted by expert.
    fn many(&mut self, x: Rows, choice: &Choice, out: &Tensor) -> Result<()> {
        let (device, experts, pairs) = (self.device, self.experts, choice.pairs);
        let (hidden, intermediate) = (experts.hidden, experts.intermediate);
        let Order { groups, most, sorted, places } = self.sort(choice)?;
        let gate_up: Arg = room(&mut self.buffers.gate_up, device, 8 * pairs * intermediate)?.into();
        // The pairs of a row share its activations.
        let tiles = Tiles { count: most, rows: pairs, groups, index: sorted, share: self.top_k };
        let Stack { weights, .. } = &experts.gate_up;
        self.multiplier.tiles(x, weights, experts.gate_up.bias(), gate_up, 2 * intermediate, tiles)?;
        let width = padded(intermediate);
        let in_fp8 = self.multiplier.multiplies_fp8(&experts.down.weights, pairs);
        let bytes = if in_fp8 { Rows::bytes(pairs, width) } else { 2 * pairs * width };
        let gated = room(&mut self.buffers.gated, device, bytes)?.into();
        let gated = Rows { data: gated, rows: pairs, k: width, in_fp8 };
        gate(device, gate_up, intermediate, experts.activation, gated)?;
        let made: Arg = room(&mut self.buffers.made, device, 4 * pairs * hidden)?.into();
        let tiles = Tiles { count: most, rows: pairs, groups, index: Arg::NULL, share: 1 };
        self.multiplier.tiles(gated, &experts.down.weights, experts.down.bias(), made, hidden, tiles)?;
        let args = [made, places, choice.weights, self.top_k.into(), out.into(), hidden.into()];
        device.launch("moe_combine", Grid::new(x.rows, 256), 0, &args)
    }

    /// Sorts pairs by expert, in tiles of one expert each.
    fn sort(&mut self, choice: &Choice) -> Result<Order> {
        let (device, experts) = (self.device, self.experts.experts);
        let Choice { pairs, experts: chosen, .. } = *choice;
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
}
