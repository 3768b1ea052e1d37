//! How a model is cut into ranks: which part of every weight a rank holds.
//!
//! The usual cut (Shoeybi et al. 2019, arXiv:1909.08053): Q, K, V, gate and up by outputs, attention's output and down by inputs, so
//! that a layer has two sums over the ranks; the output matrix by vocabulary. Norms, router and embedding are whole on every rank.
//! Query heads are dealt out with the KV heads that they read; where there are more ranks than KV heads, each KV head lies on
//! several. A matrix is cut by outputs anywhere, by inputs only between the blocks of its format: an MLP of 19 blocks is cut into 10
//! and 9.

use std::ops::Range;

use rudder_ops::{AttentionShape, OpError, Rank, RawTensor};

use crate::weights::Weights;
use crate::{LoadError, ModelConfig};

/// A rank's part of a model: rows of matrices, or columns of those that read them.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Shard {
    /// Of Q, and of what attention's output reads.
    pub q: Range<usize>,
    /// Of K and of V.
    pub kv: Range<usize>,
    /// Of gate and of up, and of what down reads; of every expert's where there are experts.
    pub inner: Range<usize>,
    /// Of the output matrix.
    pub vocab: Range<usize>,
}

impl Shard {
    /// All of it.
    pub fn whole(config: &ModelConfig) -> Self {
        Self::of(config, Rank::ALONE, 1)
    }

    /// A rank's part, with the MLP cut between blocks of `block` of its inner elements.
    fn of(config: &ModelConfig, rank: Rank, block: usize) -> Self {
        let Rank { index, world } = rank;
        let AttentionShape { heads, kv_heads, head_dim, .. } = config.attention;
        let share =
            |units: usize, size: usize| units * index / world * size..units * (index + 1) / world * size;
        let first_kv = kv_heads * index / world;
        Self {
            q: share(heads, head_dim),
            kv: first_kv * head_dim..(first_kv + kv_heads.div_ceil(world)) * head_dim,
            inner: share(inner(config) / block, block),
            vocab: share(config.vocab, 1),
        }
    }

    /// The sizes of the part, as if it were a model.
    pub fn config(&self, whole: &ModelConfig) -> ModelConfig {
        let mut config = whole.clone();
        let attention = &mut config.attention;
        attention.heads = self.q.len() / attention.head_dim;
        attention.kv_heads = self.kv.len() / attention.head_dim;
        match &mut config.moe {
            Some(moe) => moe.intermediate = self.inner.len(),
            None => config.intermediate = self.inner.len(),
        }
        config
    }
}

/// Width of an MLP, or of each expert's.
fn inner(config: &ModelConfig) -> usize {
    config.moe.map_or(config.intermediate, |moe| moe.intermediate)
}

/// What decides how a model can be cut.
pub(crate) struct Cut<'a> {
    config: &'a ModelConfig,
    /// The matrix after attention whose format has the largest blocks.
    attn_output: RawTensor,
    /// The same of the MLPs' second halves.
    down: RawTensor,
}

impl<'a> Cut<'a> {
    /// Looks at the formats of the weights.
    ///
    /// # Errors
    /// If one is missing or misshapen.
    pub fn new(config: &'a ModelConfig, weights: &Weights) -> Result<Self, LoadError> {
        let (hidden, q, inner) = (config.hidden, config.attention.out_width(), inner(config));
        let attn_output = |layer| Ok(vec![weights.matrix(layer, "attn_output", [hidden, q])?]);
        let down = |layer| match &config.moe {
            Some(moe) => weights.experts(layer, "down", moe.experts, [hidden, inner]),
            None => Ok(vec![weights.matrix(layer, "ffn_down", [hidden, inner])?]),
        };
        let ffn = if config.moe.is_some() { "experts" } else { "ffn_down" };
        let layers = |name| weights.layers_of_all_formats(config.layers, name);
        Ok(Self {
            config,
            attn_output: coarsest(layers("attn_output"), attn_output)?,
            down: coarsest(layers(ffn), down)?,
        })
    }

    /// Whether the model can be cut for `world` ranks; if not, why, and for how many it can.
    pub fn check(&self, world: usize) -> Result<(), String> {
        let Some(obstacle) = self.obstacle(world) else { return Ok(()) };
        // No more ranks than heads.
        let possible = (1..=self.config.attention.heads).filter(|&world| self.obstacle(world).is_none());
        let possible: Vec<_> = possible.map(|world| world.to_string()).collect();
        Err(format!("{obstacle}; a tensor_parallel_size of {} will do", possible.join(", ")))
    }

    /// A rank's part, of a number of ranks that the model can be cut for.
    pub fn shard(&self, rank: Rank) -> Shard {
        Shard::of(self.config, rank, self.down.dtype.block_len())
    }

    /// What keeps the model from being cut for `world` ranks.
    fn obstacle(&self, world: usize) -> Option<String> {
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.config.attention;
        let even = |n: usize| n.checked_rem(world) == Some(0);
        if !even(heads) || !(even(kv_heads) || world.is_multiple_of(kv_heads)) {
            return Some(format!("{heads} query heads and {kv_heads} KV heads do not divide among them"));
        }
        let (columns, block) = (heads / world * head_dim, self.attn_output.dtype.block_len());
        if !columns.is_multiple_of(block) {
            return Some(format!(
                "{columns} columns each of tensor {} would end inside its blocks of {block} ({:?})",
                self.attn_output.name, self.attn_output.dtype
            ));
        }
        let block = self.down.dtype.block_len();
        let blocks = inner(self.config) / block;
        if blocks < world {
            let (name, dtype) = (&self.down.name, self.down.dtype);
            return Some(format!("a row of tensor {name} has {blocks} blocks of {block} ({dtype:?})"));
        }
        (self.config.vocab < world).then(|| format!("there are {} tokens", self.config.vocab))
    }
}

/// The matrix with the largest blocks of these layers, the first of them.
fn coarsest(
    layers: Vec<usize>,
    of: impl Fn(usize) -> Result<Vec<RawTensor>, LoadError>,
) -> Result<RawTensor, LoadError> {
    let mut coarsest: Option<RawTensor> = None;
    for layer in layers {
        for tensor in of(layer)? {
            if coarsest.as_ref().is_none_or(|c| c.dtype.block_len() < tensor.dtype.block_len()) {
                coarsest = Some(tensor);
            }
        }
    }
    coarsest.ok_or_else(|| LoadError::Options("the model has no layers".into()))
}

/// The part of a matrix, or of its bias, that computes `outputs`.
pub(crate) fn outputs(tensor: RawTensor, outputs: &Range<usize>) -> Result<RawTensor, LoadError> {
    tensor.rows(outputs.clone()).ok_or_else(|| uncut(&tensor))
}

/// A tensor that cannot be cut as the others are.
pub(crate) fn uncut(tensor: &RawTensor) -> LoadError {
    let (name, dtype) = (tensor.name.clone(), tensor.dtype);
    LoadError::Backend(OpError::Backend(format!("tensor {name} ({dtype:?}) cannot be cut for several ranks")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MoeConfig;
    use rudder_ops::{Activation, DType, Rope, RopePairing};
    use std::sync::Arc;

    fn config(heads: usize, kv_heads: usize, head_dim: usize, intermediate: usize) -> ModelConfig {
        ModelConfig {
            architecture: "llama".into(),
            hidden: 4,
            intermediate,
            layers: 1,
            attention: AttentionShape { heads, kv_heads, head_dim, scale: 1.0 },
            windows: vec![None],
            vocab: 11,
            context_length: 64,
            rms_eps: 1e-6,
            rope: Rope { inv_freq: vec![1.0; head_dim / 2], pairing: RopePairing::Halves },
            moe: None,
        }
    }

    fn tensor(name: &str, dtype: DType, width: usize) -> RawTensor {
        let bytes = Arc::new(vec![0u8; 4 * dtype.bytes(width).expect("whole blocks")]);
        RawTensor::new(name, vec![4, width], dtype, bytes, 0).expect("as long as it says")
    }

    fn cut(config: &ModelConfig, attn_output: DType, down: DType) -> Cut<'_> {
        Cut {
            config,
            attn_output: tensor("o", attn_output, config.attention.out_width()),
            down: tensor("down", down, inner(config)),
        }
    }

    #[test]
    fn ranks_hold_all_of_a_model_and_each_query_head_lies_with_its_kv_head() {
        for (heads, kv_heads) in [(8, 8), (8, 4), (8, 2), (12, 3), (8, 1)] {
            let config = config(heads, kv_heads, 2, 10);
            let cut = cut(&config, DType::F32, DType::F32);
            let group = heads / kv_heads;
            for world in (1..=heads).filter(|&world| cut.check(world).is_ok()) {
                let shards: Vec<_> = (0..world).map(|index| cut.shard(Rank { index, world })).collect();
                for part in
                    [|s: &Shard| s.q.clone(), |s: &Shard| s.inner.clone(), |s: &Shard| s.vocab.clone()]
                {
                    let ends: Vec<_> = shards.iter().map(part).collect();
                    assert!(ends.windows(2).all(|w| w[0].end == w[1].start) && ends[0].start == 0);
                    assert!(ends.iter().all(|range| !range.is_empty()));
                }
                let last = &shards[world - 1];
                assert_eq!((last.q.end, last.inner.end, last.vocab.end), (heads * 2, 10, 11));
                for shard in &shards {
                    let part = shard.config(&config).attention;
                    assert_eq!((part.heads, part.heads % part.kv_heads), (heads / world, 0));
                    for head in 0..part.heads {
                        let read = shard.kv.start / 2 + head / (part.heads / part.kv_heads);
                        assert_eq!(read, (shard.q.start / 2 + head) / group, "{heads} {kv_heads} {world}");
                    }
                }
            }
            assert!(cut.check(kv_heads).is_ok() && cut.check(5).is_err());
        }
    }

    #[test]
    fn blocks_stay_whole_and_may_be_dealt_out_unevenly() {
        let config = config(14, 2, 64, 19 * 256);
        let cut = cut(&config, DType::Q5_0, DType::Q6_K);
        assert_eq!(cut.check(2), Ok(()));
        let shards = [0, 1].map(|index| cut.shard(Rank { index, world: 2 }));
        assert_eq!(shards.map(|s| s.inner.len()), [9 * 256, 10 * 256]);
    }

    #[test]
    fn what_cannot_be_cut_says_why_and_what_can() {
        let plain = config(12, 2, 64, 512);
        let refused = |config: &ModelConfig, o, down, world| cut(config, o, down).check(world).unwrap_err();
        let message = refused(&plain, DType::F32, DType::F32, 5);
        assert!(message.contains("12 query heads and 2 KV heads"), "{message}");
        assert!(message.ends_with("a tensor_parallel_size of 1, 2, 4, 6 will do"), "{message}");
        let message = refused(&plain, DType::Q4_K, DType::F32, 2);
        assert!(
            message.contains("384 columns each of tensor o would end inside its blocks of 256"),
            "{message}"
        );
        let message = refused(&plain, DType::F32, DType::Q6_K, 4);
        assert!(message.contains("tensor down has 2 blocks of 256 (Q6_K)"), "{message}");
        assert!(message.ends_with("of 1, 2 will do"), "{message}");
        assert!(refused(&plain, DType::F32, DType::F32, 0).contains("do not divide"));
        assert!(refused(&plain, DType::F32, DType::F32, 24).contains("do not divide"));
        let activation = Activation::Silu;
        let moe = MoeConfig { experts: 8, top_k: 2, intermediate: 64, renormalise: true, activation };
        let moe = ModelConfig { moe: Some(moe), ..plain };
        assert!(refused(&moe, DType::F32, DType::Q8_0, 4).contains("2 blocks of 32"));
        assert_eq!(cut(&moe, DType::F32, DType::Q8_0).shard(Rank { index: 1, world: 2 }).inner, 32..64);
    }
}
