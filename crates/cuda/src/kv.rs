//! Keys and values on a device, and attention over them.
//!
//! Keys and values of a layer are arrays `[blocks, kv_heads, BLOCK_SIZE, head_dim]` of bf16 or FP8; the layers of each lie one after
//! another.

use crate::device::{
    Arg, Buffer, Device, Grid, attention_prefill_shared, attention_tcgen05_shared, attention_wgmma_shared,
};
use crate::matmul::{Instructions, Vector};
use crate::step::{List, Step, blocks_of, most_splits};
use crate::tensor::{Format, Tensor, check};
use rudder_ops::{AttentionOptions, AttentionShape, BLOCK_SIZE, OpError, QkNorm, Result, Rope, RopePairing};

/// What parts of split contexts may take before rows are done in turns.
const PARTS: usize = 64 << 20;
/// The largest head that `attention_any` takes; `MOST_DIM` in attention.cu.
const MOST_DIM: usize = 512;

/// The kernels for heads of one size and one dtype.
struct Kernels {
    decode: &'static str,
    shared: &'static str,
    prefill: &'static str,
    wgmma: &'static str,
    tcgen05: &'static str,
}

/// Their names.
macro_rules! kernels {
    ($of:literal) => {
        Kernels {
            decode: concat!("attention_decode_", $of),
            shared: concat!("attention_shared_", $of),
            prefill: concat!("attention_prefill_", $of),
            wgmma: concat!("attention_wgmma_", $of),
            tcgen05: concat!("attention_tcgen05_", $of),
        }
    };
}

/// Which kernels compute prompts: their attention, and products of many rows that cuBLASLt does not do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PrefillKernel {
    /// Those made for the GPU.
    #[default]
    Auto,
    /// Those of warps (`mma.sync`), which every GPU runs.
    Mma,
    /// Those of Hopper's warpgroups (`wgmma`).
    Wgmma,
    /// Those of Blackwell's tensor cores (`tcgen05`).
    Tcgen05,
}

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum KvDType {
    /// bf16.
    #[default]
    Bf16,
    /// FP8 (E4M3) without a scale: half the memory and bandwidth, three bits of mantissa, magnitudes up to 448.
    Fp8,
}

impl KvDType {
    fn bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::Fp8 => 1,
        }
    }

    /// Names dtype and layout, for blocks that are kept outside the process.
    pub(crate) fn format(self) -> String {
        let dtype = match self {
            Self::Bf16 => "bf16",
            Self::Fp8 => "e4m3",
        };
        format!("cuda {dtype} [kv_heads, 16, head_dim], keys then values 1")
    }

    /// The kernel that writes keys and values.
    fn rope(self) -> &'static str {
        match self {
            Self::Bf16 => "rope_and_cache",
            Self::Fp8 => "rope_and_cache_fp8",
        }
    }

    /// The kernel for heads of any size.
    fn any(self) -> &'static str {
        match self {
            Self::Bf16 => "attention_any",
            Self::Fp8 => "attention_any_fp8",
        }
    }

    /// The kernels for heads of this size, where it has some of its own.
    fn kernels(self, head_dim: usize) -> Option<Kernels> {
        Some(match (self, head_dim) {
            (Self::Bf16, 64) => kernels!("64"),
            (Self::Bf16, 96) => kernels!("96"),
            (Self::Bf16, 128) => kernels!("128"),
            (Self::Bf16, 256) => kernels!("256"),
            (Self::Fp8, 64) => kernels!("64_fp8"),
            (Self::Fp8, 96) => kernels!("96_fp8"),
            (Self::Fp8, 128) => kernels!("128_fp8"),
            (Self::Fp8, 256) => kernels!("256_fp8"),
            _ => return None,
        })
    }
}

/// The paged keys and values of all layers.
pub struct KvCache {
    dtype: KvDType,
    keys: Buffer,
    values: Buffer,
    pub(crate) shape: AttentionShape,
    layers: usize,
    blocks: usize,
}

/// Bytes of one block's keys, or of its values, in one layer.
pub(crate) fn half_block(shape: &AttentionShape, dtype: KvDType) -> usize {
    dtype.bytes() * BLOCK_SIZE * shape.kv_heads * shape.head_dim
}

impl KvCache {
    pub(crate) fn new(
        device: &Device,
        layers: usize,
        shape: &AttentionShape,
        blocks: usize,
        dtype: KvDType,
    ) -> Result<Self> {
        let grouped = shape.kv_heads > 0 && shape.heads.is_multiple_of(shape.kv_heads);
        check(grouped, || format!("{} query heads cannot share {} key heads", shape.heads, shape.kv_heads))?;
        check(shape.head_dim <= MOST_DIM && shape.head_dim.is_multiple_of(2), || {
            format!("heads of {}; the kernels take even sizes up to {MOST_DIM}", shape.head_dim)
        })?;
        let bytes = layers.checked_mul(blocks).and_then(|n| n.checked_mul(half_block(shape, dtype)));
        let bytes = bytes.ok_or_else(|| {
            OpError::Backend(format!("no memory for {blocks} KV blocks of {layers} layers"))
        })?;
        let (keys, values) = (device.buffer(bytes)?, device.buffer(bytes)?);
        Ok(Self { dtype, keys, values, shape: *shape, layers, blocks })
    }

    /// Bytes of one block's keys, or of its values, in one layer.
    pub(crate) fn half_block(&self) -> usize {
        half_block(&self.shape, self.dtype)
    }

    fn layer(&self, layer: usize) -> [Arg; 2] {
        let offset = layer * self.blocks * self.half_block();
        [&self.keys, &self.values].map(|buffer| Arg::at(buffer, offset))
    }

    /// Bytes of one block in all layers.
    pub(crate) fn block(&self) -> usize {
        2 * self.half_block() * self.layers
    }

    /// Where a block of so many bytes lies: buffer and offset of each layer's keys, then values.
    pub(crate) fn pieces(
        &self,
        block: u32,
        bytes: usize,
    ) -> Result<impl Iterator<Item = (&Buffer, usize)> + '_> {
        let (half, block) = (self.half_block(), block as usize);
        check(block < self.blocks, || format!("KV block {block} of {}", self.blocks))?;
        check(bytes == self.block(), || format!("{bytes} bytes for a KV block of {}", self.block()))?;
        Ok((0..self.layers).flat_map(move |layer| {
            let offset = (layer * self.blocks + block) * half;
            [(&self.keys, offset), (&self.values, offset)]
        }))
    }

    /// Checks what the two ops on the cache need.
    fn check(&self, qkv: &Tensor, shape: &AttentionShape, layer: usize, step: &Step) -> Result<()> {
        check(self.shape == *shape && layer < self.layers, || {
            format!("layer {layer} with {shape:?} is not in the KV cache")
        })?;
        check(step.blocks <= self.blocks, || {
            format!("the batch uses KV block {}, the cache has {}", step.blocks - 1, self.blocks)
        })?;
        qkv.expect_f32("q, k and v")?;
        check(qkv.width == shape.qkv_width() && qkv.rows == step.rows, || {
            format!("q, k and v are [{}, {}], not as the batch and {shape:?} say", qkv.rows, qkv.width)
        })
    }
}

/// Rotations, as the kernel reads them.
pub(crate) struct Rotations {
    inv_freq: Buffer,
    len: usize,
    pairing: RopePairing,
}

impl Rotations {
    pub fn new(device: &Device, rope: &Rope) -> Result<Self> {
        let inv_freq = device.buffer(4 * rope.inv_freq.len())?;
        inv_freq.write(0, crate::step::bytes(&rope.inv_freq))?;
        Ok(Self { inv_freq, len: rope.inv_freq.len(), pairing: rope.pairing })
    }

    /// Normalises and rotates queries and keys in place; writes keys and values to their slots.
    pub fn apply(
        &self,
        device: &Device,
        step: &Step,
        qkv: &mut Tensor,
        norm: Option<QkNorm<'_, Vector>>,
        layer: usize,
        cache: &mut KvCache,
    ) -> Result<()> {
        let shape = cache.shape;
        cache.check(qkv, &shape, layer, step)?;
        let AttentionShape { heads, kv_heads, head_dim, .. } = shape;
        check(2 * self.len == head_dim, || format!("{} frequencies for heads of {head_dim}", self.len))?;
        check(norm.as_ref().is_none_or(|n| n.q.len == head_dim && n.k.len == head_dim), || {
            "a query or key norm of another length than a head".to_owned()
        })?;
        let [keys, values] = cache.layer(layer);
        let (q_norm, k_norm, eps) = match &norm {
            Some(n) => ((&n.q.buffer).into(), (&n.k.buffer).into(), n.eps),
            None => (Arg::NULL, Arg::NULL, 0.0),
        };
        let args = [
            (&*qkv).into(),
            step.arg(List::Positions),
            step.arg(List::Slots),
            (&self.inv_freq).into(),
            (self.pairing == RopePairing::Interleaved).into(),
            q_norm,
            k_norm,
            eps.into(),
            keys,
            values,
            heads.into(),
            kv_heads.into(),
            head_dim.into(),
        ];
        let grid = Grid::of([step.rows, (heads + 2 * kv_heads).div_ceil(4), 1], 128);
        device.launch(cache.dtype.rope(), grid, 0, &args)
    }
}

/// Where parts of split contexts meet, allocated with the cache.
pub(crate) struct Parts {
    sums: Buffer,
    outputs: Buffer,
    /// (head, split) pairs that they have room for.
    room: usize,
}

impl Parts {
    /// For contexts of up to `context` tokens, a row at a time at least.
    pub fn new(device: &Device, shape: &AttentionShape, context: usize) -> Result<Self> {
        // Decode steps round their splits up.
        let one = shape.heads * most_splits(context, blocks_of(shape)).next_power_of_two();
        let room = one.max(PARTS / (4 * shape.head_dim));
        let (sums, outputs) = (device.buffer(8 * room)?, device.buffer(4 * room * shape.head_dim)?);
        Ok(Self { sums, outputs, room })
    }
}

/// Causal attention of the step's rows, `out` in bf16.
#[allow(clippy::too_many_arguments)] // the op's, and what the backend keeps
pub(crate) fn attention(
    device: &Device,
    step: &Step,
    parts: &Parts,
    qkv: &Tensor,
    options: AttentionOptions<'_, Vector>,
    layer: usize,
    cache: &KvCache,
    out: &mut Tensor,
) -> Result<()> {
    let shape = cache.shape;
    cache.check(qkv, &shape, layer, step)?;
    let AttentionOptions { window, sinks, .. } = options;
    check(window.is_none_or(|window| (1..=i32::MAX as usize).contains(&window)), || {
        format!("attention within a window of {window:?} tokens")
    })?;
    check(sinks.is_none_or(|sinks| sinks.len == shape.heads), || {
        format!("attention sinks for other than {} heads", shape.heads)
    })?;
    out.set(qkv.rows, shape.out_width(), Format::Bf16)?;
    let sinks = sinks.map_or(Arg::NULL, |sinks| (&sinks.buffer).into());
    let (kv, dtype) = (cache.layer(layer), cache.dtype);
    let call = Call { device, step, parts, qkv, kv, dtype, out, shape, window, sinks };
    match dtype.kernels(shape.head_dim) {
        Some(kernels) => {
            call.prefill(&kernels)?;
            call.decode(&kernels)
        }
        None => call.any(),
    }
}

/// One call of attention.
struct Call<'a> {
    device: &'a Device,
    step: &'a Step,
    parts: &'a Parts,
    qkv: &'a Tensor,
    kv: [Arg; 2],
    dtype: KvDType,
    out: &'a Tensor,
    shape: AttentionShape,
    window: Option<usize>,
    sinks: Arg,
}

impl Call<'_> {
    /// The kernels' `window`: 0 where there is none.
    fn window(&self) -> Arg {
        self.window.unwrap_or(0).into()
    }

    /// The most splits of a row, of whose context a window leaves a part that begins with a block.
    fn splits(&self) -> usize {
        self.step.splits(self.window.map_or(usize::MAX, |window| window + BLOCK_SIZE - 1))
    }

    fn prefill(&self, kernels: &Kernels) -> Result<()> {
        let AttentionShape { heads, kv_heads, head_dim, scale } = self.shape;
        let args = [
            self.qkv.into(),
            self.kv[0],
            self.kv[1],
            self.step.arg(List::Tiles),
            self.step.arg(List::Tables),
            self.out.into(),
            heads.into(),
            kv_heads.into(),
            scale.into(),
            self.sinks,
            self.window(),
        ];
        let (kernel, threads, shared) = match self.step.instructions {
            Instructions::Mma => (kernels.prefill, 128, attention_prefill_shared(head_dim as u32)),
            Instructions::Wgmma => (kernels.wgmma, 256, attention_wgmma_shared(head_dim as u32)),
            Instructions::Tcgen05 => (kernels.tcgen05, 256, attention_tcgen05_shared(head_dim as u32)),
        };
        let grid = Grid::of([kv_heads, self.step.len(List::Tiles) / 4, 1], threads);
        self.device.launch(kernel, grid, shared, &args)
    }

    /// As many rows at a time as there is room for the parts of.
    fn decode(&self, kernels: &Kernels) -> Result<()> {
        let AttentionShape { heads, kv_heads, head_dim, scale } = self.shape;
        let (rows, splits) = (self.step.len(List::Alone), self.splits());
        let most = if splits == 1 { rows } else { self.parts.room / (heads * splits) };
        check(most > 0 || rows == 0, || {
            format!("a context in {splits} parts is longer than rope was loaded for")
        })?;
        let groups = blocks_of(&self.shape);
        for first in (0..rows).step_by(most.max(1)) {
            let rows = most.min(rows - first);
            let shared = self.shared(kernels.shared, first, rows)?;
            let args = [
                self.qkv.into(),
                self.kv[0],
                self.kv[1],
                self.step.arg_from(List::Alone, first),
                self.step.arg(List::Tables),
                self.step.arg(List::RowTables),
                self.step.arg(List::RowContexts),
                self.out.into(),
                (&self.parts.outputs).into(),
                (&self.parts.sums).into(),
                heads.into(),
                kv_heads.into(),
                scale.into(),
                self.sinks,
                self.window(),
                shared,
                self.step.split_blocks.into(),
            ];
            self.device.launch(kernels.decode, Grid::of([splits, groups, rows], 128), 0, &args)?;
            if splits > 1 {
                self.combine(first, rows, head_dim)?;
            }
        }
        Ok(())
    }

    /// What `rows` rows from `first` on share, if anything; returns how many splits of each that is.
    fn shared(&self, kernel: &'static str, first: usize, rows: usize) -> Result<Arg> {
        let AttentionShape { heads, kv_heads, scale, .. } = self.shape;
        let tiles = self.step.len(List::SharedTiles) / 4;
        // Within a window rows see different parts of what they share.
        if tiles == 0 || self.window.is_some() {
            return Ok(Arg::NULL);
        }
        let args = [
            self.qkv.into(),
            self.kv[0],
            self.kv[1],
            self.step.arg(List::Alone),
            self.step.arg(List::Tables),
            self.step.arg(List::SharedTiles),
            (&self.parts.outputs).into(),
            (&self.parts.sums).into(),
            first.into(),
            rows.into(),
            self.splits().into(),
            heads.into(),
            kv_heads.into(),
            scale.into(),
        ];
        let grid = Grid::of([tiles, self.step.prefix.splits, kv_heads], 256);
        self.device.launch(kernel, grid, 0, &args)?;
        Ok(self.step.arg_from(List::Shared, first))
    }

    fn combine(&self, first: usize, rows: usize, head_dim: usize) -> Result<()> {
        let args = [
            self.step.arg_from(List::Alone, first),
            self.step.arg(List::RowContexts),
            self.out.into(),
            (&self.parts.outputs).into(),
            (&self.parts.sums).into(),
            self.shape.heads.into(),
            head_dim.into(),
            self.splits().into(),
            self.sinks,
            self.window(),
            self.step.split_blocks.into(),
        ];
        self.device.launch("attention_combine", Grid::of([self.shape.heads, rows, 1], 256), 0, &args)
    }

    fn any(&self) -> Result<()> {
        let AttentionShape { heads, kv_heads, head_dim, scale } = self.shape;
        let args = [
            self.qkv.into(),
            self.kv[0],
            self.kv[1],
            self.step.arg(List::Alone),
            self.step.arg(List::Tables),
            self.step.arg(List::RowTables),
            self.step.arg(List::RowContexts),
            self.out.into(),
            heads.into(),
            kv_heads.into(),
            head_dim.into(),
            scale.into(),
            self.sinks,
            self.window(),
        ];
        let grid = Grid::of([heads, self.step.len(List::Alone), 1], 128);
        self.device.launch(self.dtype.any(), grid, 0, &args)
    }
}
