//! The paged KV cache in memory.
//!
//! A layer is a run of blocks, a block a run of heads. A head of a block holds its 16 keys
//! transposed, `[head_dim, 16]`, so that one vector is one element of 16 keys and a query's 16
//! products come out without a horizontal sum; then its 16 values, `[16, head_dim]`, each padded
//! to whole vectors.

use super::simd::{LANES, Simd};
use super::zeros;
use crate::{AttentionShape, BLOCK_SIZE, OpError, Result};

// A vector of keys is a block.
const _: () = assert!(BLOCK_SIZE == LANES);

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
    fn narrow(x: f32) -> Self;
    /// # Safety
    /// As for [`Simd::load`].
    unsafe fn load<S: Simd>(from: *const Self) -> S::V;
}

impl Element for u16 {
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
