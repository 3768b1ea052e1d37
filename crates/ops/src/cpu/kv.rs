//! The paged KV cache in memory.
//!
//! A layer is a run of blocks, a block a run of heads. A head of a block holds its 16 keys
//! transposed, `[head_dim, 16]`, so that one vector is one element of 16 keys and a query's 16
//! products come out without a horizontal sum; then its 16 values, `[16, head_dim]`, each padded
//! to whole vectors.

use std::ops::Range;

use super::simd::{LANES, Simd};
use super::zeros;
use crate::{AttentionShape, BLOCK_SIZE, OpError, Result};

// A vector of keys is a block.
const _: () = assert!(BLOCK_SIZE == LANES);

/// Names the layout above, for blocks that are kept outside the process. Changes whenever it does.
pub(super) const LAYOUT: &str = "keys transposed, values padded, 1";

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvDType {
    /// Half floats: half the memory and bandwidth; what servers use.
    F16,
    /// f32: for comparing logits closely.
    F32,
}

/// The keys and values of all layers.
pub struct KvCache {
    elements: Elements,
    layers: usize,
    blocks: usize,
    pub(super) layout: Layout,
}

enum Elements {
    F16(Vec<u16>),
    F32(Vec<f32>),
}

/// A layer's elements, by type.
pub(super) enum Layer<'a> {
    F16(&'a [u16]),
    F32(&'a [f32]),
}

/// The same to write to.
pub(super) enum LayerMut<'a> {
    F16(&'a mut [u16]),
    F32(&'a mut [f32]),
}

impl KvCache {
    pub(super) fn new(layers: usize, shape: &AttentionShape, blocks: usize, dtype: KvDType) -> Result<Self> {
        let layout = Layout::of(shape);
        let len = layers.checked_mul(blocks).and_then(|n| n.checked_mul(layout.block_len()));
        let too_large = || {
            OpError::Backend(format!("a KV cache of {blocks} blocks does not fit in memory; ask for fewer"))
        };
        let len = len.and_then(|n| n.checked_add(SPARE)).ok_or_else(too_large)?;
        let elements = match dtype {
            KvDType::F16 => Elements::F16(zeros(len, 0).ok_or_else(too_large)?),
            KvDType::F32 => Elements::F32(zeros(len, 0.0).ok_or_else(too_large)?),
        };
        Ok(Self { elements, layers, blocks, layout })
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
            Elements::F16(x) => Layer::F16(&aligned(x)[layer * len..][..len]),
            Elements::F32(x) => Layer::F32(&aligned(x)[layer * len..][..len]),
        }
    }

    pub(super) fn layer_mut(&mut self, layer: usize) -> LayerMut<'_> {
        let len = self.blocks * self.layout.block_len();
        match &mut self.elements {
            Elements::F16(x) => LayerMut::F16(&mut aligned_mut(x)[layer * len..][..len]),
            Elements::F32(x) => LayerMut::F32(&mut aligned_mut(x)[layer * len..][..len]),
        }
    }

    /// Copies a block of all layers to `out`, layer by layer.
    pub(super) fn read_block(&self, block: usize, out: &mut [u8]) -> Result<()> {
        let part = self.check_block(block, out.len())?;
        for (layer, out) in out.chunks_exact_mut(out.len() / self.layers).enumerate() {
            match self.layer(layer) {
                Layer::F16(x) => copy_out(&x[part.clone()], out, u16::to_le_bytes),
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
                LayerMut::F32(x) => copy_in(&mut x[part.clone()], bytes, f32::from_le_bytes),
            }
        }
        Ok(())
    }

    /// The elements of a block within a layer, if there is such a block and it has so many bytes.
    fn check_block(&self, block: usize, bytes: usize) -> Result<Range<usize>> {
        let len = self.layout.block_len();
        let element = match &self.elements {
            Elements::F16(_) => 2,
            Elements::F32(_) => 4,
        };
        let wanted = self.layers * len * element;
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

/// Elements to spare so that the first used one can lie on a cache line.
const SPARE: usize = 64;

fn aligned<T>(x: &[T]) -> &[T] {
    &x[x.as_ptr().align_offset(64).min(SPARE)..]
}

fn aligned_mut<T>(x: &mut [T]) -> &mut [T] {
    let start = x.as_ptr().align_offset(64).min(SPARE);
    &mut x[start..]
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
    /// Whether loading takes a conversion.
    const NARROW: bool;
    fn narrow(x: f32) -> Self;
    /// # Safety
    /// As for [`Simd::load`].
    unsafe fn load<S: Simd>(from: *const Self) -> S::V;
}

impl Element for u16 {
    const NARROW: bool = true;
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        half::f16::from_f32(x).to_bits()
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::V {
        // SAFETY: the caller's promise is the same.
        unsafe { S::load_f16(from) }
    }
}

impl Element for f32 {
    const NARROW: bool = false;
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        x
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::V {
        // SAFETY: the caller's promise is the same.
        unsafe { S::load(from) }
    }
}
