//! The paged KV cache in memory.
//!
//! A layer is a run of blocks, a block a run of heads. A head of a block holds its 16 keys
//! transposed, `[head_dim, 16]`, so that one vector is one element of 16 keys and a query's 16
//! products come out without a horizontal sum; then its 16 values, `[16, head_dim]`, each padded
//! to whole vectors. In BF16 two elements of a key and the same element of two values lie beside each other, as
//! dot products of bf16 pairs want them: keys `[head_dim / 2, 16, 2]`, values `[8, head_dim, 2]`.

use std::ops::Range;

use super::matmul::round_bf16;
use super::memory::{HUGE_PAGE, Numbers};
use super::pool::Pool;
use super::simd::{LANES, Level, Simd};
use crate::{AttentionShape, BLOCK_SIZE, OpError, Result};

// A vector of keys is a block.
const _: () = assert!(BLOCK_SIZE == LANES);

/// Names the layout above, for blocks that are kept outside the process. Changes whenever it does.
pub(super) const LAYOUT: &str = "keys transposed, values padded, 1";

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvDType {
    /// Half floats: half the memory and bandwidth; attention widens them to f32.
    F16,
    /// As large; attention multiplies them in pairs, queries and probabilities rounded likewise.
    BF16,
    /// f32: for comparing logits closely.
    F32,
}

impl KvDType {
    /// What attention is fastest on: BF16 where this CPU multiplies that in pairs, twice as many operations at a time as in f32.
    pub fn of_cpu() -> Self {
        if Level::detect().has_pairs() { Self::BF16 } else { Self::F16 }
    }
}

/// The keys and values of all layers.
pub struct KvCache {
    elements: Elements,
    layers: usize,
    blocks: usize,
    /// Of each layer, the blocks from the first on whose memory the system was asked to provide.
    provided: usize,
    pub(super) layout: Layout,
}

enum Elements {
    F16(Numbers<u16>),
    BF16(Numbers<Bf16>),
    F32(Numbers<f32>),
}

/// A layer's elements, by type.
pub(super) enum Layer<'a> {
    F16(&'a [u16]),
    BF16(&'a [Bf16]),
    F32(&'a [f32]),
}

/// The same to write to.
pub(super) enum LayerMut<'a> {
    F16(&'a mut [u16]),
    BF16(&'a mut [Bf16]),
    F32(&'a mut [f32]),
}

impl KvCache {
    pub(super) fn new(layers: usize, shape: &AttentionShape, blocks: usize, dtype: KvDType) -> Result<Self> {
        let layout = Layout::of(shape);
        let len = layers.checked_mul(blocks).and_then(|n| n.checked_mul(layout.block_len()));
        let too_large = || {
            OpError::Backend(format!("a KV cache of {blocks} blocks does not fit in memory; ask for fewer"))
        };
        let len = len.ok_or_else(too_large)?;
        let elements = match dtype {
            KvDType::F16 => Elements::F16(Numbers::new(len).map_err(|_| too_large())?),
            KvDType::BF16 => Elements::BF16(Numbers::new(len).map_err(|_| too_large())?),
            KvDType::F32 => Elements::F32(Numbers::new(len).map_err(|_| too_large())?),
        };
        Ok(Self { elements, layers, blocks, provided: 0, layout })
    }

    /// Has the system provide the memory of each layer's first `blocks` blocks, and of those in the same huge pages: at the load up to two
    /// a layer. Of threads that write to a new huge page at once each has one cleared, all but one in vain; so each thread provides another
    /// layer's pages. Layers smaller than a huge page share some, and there are few of those then.
    pub(super) fn provide(&mut self, pool: &Pool, blocks: usize) {
        if blocks <= self.provided {
            return;
        }
        let (block, most) = (self.layout.block_len(), self.blocks * self.layout.block_len());
        let step = HUGE_PAGE / self.element_bytes();
        let (from, to) = (self.provided * block, (blocks * block).next_multiple_of(step).min(most));
        pool.run(self.layers, |layer| {
            let range = layer * most + from..layer * most + to;
            match &self.elements {
                Elements::F16(x) => x.provide(range),
                Elements::BF16(x) => x.provide(range),
                Elements::F32(x) => x.provide(range),
            }
        });
        self.provided = to.checked_div(block).unwrap_or(self.blocks); // no heads take nothing
    }

    fn element_bytes(&self) -> usize {
        match &self.elements {
            Elements::F16(_) | Elements::BF16(_) => 2,
            Elements::F32(_) => 4,
        }
    }

    pub(super) fn layers(&self) -> usize {
        self.layers
    }

    pub(super) fn blocks(&self) -> usize {
        self.blocks
    }

    pub(super) fn layer(&self, layer: usize) -> Layer<'_> {
        let len = self.blocks * self.layout.block_len();
        match &self.elements {
            Elements::F16(x) => Layer::F16(&x[layer * len..][..len]),
            Elements::BF16(x) => Layer::BF16(&x[layer * len..][..len]),
            Elements::F32(x) => Layer::F32(&x[layer * len..][..len]),
        }
    }

    pub(super) fn layer_mut(&mut self, layer: usize) -> LayerMut<'_> {
        let len = self.blocks * self.layout.block_len();
        match &mut self.elements {
            Elements::F16(x) => LayerMut::F16(&mut x[layer * len..][..len]),
            Elements::BF16(x) => LayerMut::BF16(&mut x[layer * len..][..len]),
            Elements::F32(x) => LayerMut::F32(&mut x[layer * len..][..len]),
        }
    }

    /// Copies a block of all layers to `out`, layer by layer.
    pub(super) fn read_block(&self, block: usize, out: &mut [u8]) -> Result<()> {
        let part = self.check_block(block, out.len())?;
        for (layer, out) in out.chunks_exact_mut(out.len() / self.layers).enumerate() {
            match self.layer(layer) {
                Layer::F16(x) => copy_out(&x[part.clone()], out, u16::to_le_bytes),
                Layer::BF16(x) => copy_out(&x[part.clone()], out, |[x]| x.to_le_bytes()),
                Layer::F32(x) => copy_out(&x[part.clone()], out, f32::to_le_bytes),
            }
        }
        Ok(())
    }

    /// Fills a block of all layers with what [`Self::read_block`] gave.
    pub(super) fn write_block(&mut self, block: usize, bytes: &[u8]) -> Result<()> {
        let part = self.check_block(block, bytes.len())?;
        for (layer, bytes) in bytes.chunks_exact(bytes.len() / self.layers).enumerate() {
            match self.layer_mut(layer) {
                LayerMut::F16(x) => copy_in(&mut x[part.clone()], bytes, u16::from_le_bytes),
                LayerMut::BF16(x) => copy_in(&mut x[part.clone()], bytes, |x| [u16::from_le_bytes(x)]),
                LayerMut::F32(x) => copy_in(&mut x[part.clone()], bytes, f32::from_le_bytes),
            }
        }
        Ok(())
    }

    /// The elements of a block within a layer, if there is such a block and it has so many bytes.
    fn check_block(&self, block: usize, bytes: usize) -> Result<Range<usize>> {
        let len = self.layout.block_len();
        let wanted = self.layers * len * self.element_bytes();
        if block >= self.blocks || bytes != wanted || wanted == 0 {
            let there = self.blocks;
            let reason = format!("KV block {block} of {there} with {bytes} bytes; a block has {wanted}");
            return Err(OpError::Backend(reason));
        }
        Ok(block * len..(block + 1) * len)
    }
}

fn copy_out<E: Copy, const N: usize>(from: &[E], to: &mut [u8], bytes: impl Fn(E) -> [u8; N]) {
    for (to, &x) in to.as_chunks_mut::<N>().0.iter_mut().zip(from) {
        *to = bytes(x);
    }
}

fn copy_in<E, const N: usize>(to: &mut [E], from: &[u8], element: impl Fn([u8; N]) -> E) {
    for (to, &bytes) in to.iter_mut().zip(from.as_chunks::<N>().0) {
        *to = element(bytes);
    }
}

/// Where a head's keys and values lie in a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub kv_heads: usize,
    pub head_dim: usize,
}

impl Layout {
    pub fn of(shape: &AttentionShape) -> Self {
        Self { kv_heads: shape.kv_heads, head_dim: shape.head_dim }
    }

    /// Elements of a stored value: whole vectors.
    pub fn padded(&self) -> usize {
        self.head_dim.next_multiple_of(LANES)
    }

    /// Elements of a head of a block.
    pub fn head_len(&self) -> usize {
        BLOCK_SIZE * (self.head_dim + self.padded())
    }

    /// Elements of a block.
    pub fn block_len(&self) -> usize {
        self.kv_heads * self.head_len()
    }

    /// Where head `head` of block `block` begins: its keys, then its values.
    pub fn keys(&self, block: usize, head: usize) -> usize {
        block * self.block_len() + head * self.head_len()
    }

    /// Where its values begin.
    pub fn values(&self, block: usize, head: usize) -> usize {
        self.keys(block, head) + BLOCK_SIZE * self.head_dim
    }

    /// Writes the key and value of token `offset` of a block to a head of it.
    pub fn write<E: Element>(&self, head: &mut [E], offset: usize, key: &[f32], value: &[f32]) {
        let (keys, values) = head.split_at_mut(BLOCK_SIZE * self.head_dim);
        if E::PAIRED {
            for (keys, key) in keys.chunks_exact_mut(2 * BLOCK_SIZE).zip(key.chunks_exact(2)) {
                keys[2 * offset] = E::narrow(key[0]);
                keys[2 * offset + 1] = E::narrow(key[1]);
            }
            let two = &mut values[offset / 2 * 2 * self.padded()..];
            for (to, &x) in two[offset % 2..].iter_mut().step_by(2).zip(value) {
                *to = E::narrow(x);
            }
            return;
        }
        for (to, &x) in keys[offset..].iter_mut().step_by(BLOCK_SIZE).zip(key) {
            *to = E::narrow(x);
        }
        for (to, &x) in values[offset * self.padded()..].iter_mut().zip(value) {
            *to = E::narrow(x);
        }
    }
}

/// A stored element.
pub(super) trait Element: Copy + Send + Sync {
    /// Whether elements lie in pairs; head dimensions are even then.
    const PAIRED: bool = false;
    fn narrow(x: f32) -> Self;
}

/// One that is multiplied in f32.
pub(super) trait Loaded: Element {
    /// # Safety
    /// As for [`Simd::load`].
    unsafe fn load<S: Simd>(from: *const Self) -> S::V;
}

/// The bits of a bf16 that is not subnormal. An array, so that it is another type than the bits of a half float.
pub(super) type Bf16 = [u16; 1];

impl Element for Bf16 {
    const PAIRED: bool = true;
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        [round_bf16(x)]
    }
}

impl Element for u16 {
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        half::f16::from_f32(x).to_bits()
    }
}

impl Loaded for u16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::V {
        // SAFETY: the caller's promise is the same.
        unsafe { S::load_f16(from) }
    }
}

impl Element for f32 {
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        x
    }
}

impl Loaded for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::V {
        // SAFETY: the caller's promise is the same.
        unsafe { S::load(from) }
    }
}
