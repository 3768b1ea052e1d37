//! The op set that every model is written in, and the backends that run it.
//!
//! [`Backend`] is the one seam between a model and a device. A model calls some fifteen ops over
//! flat tokens (no padding; prefill chunks and decodes side by side) and never learns which
//! backend runs them. Three implement it: [`reference`] (candle, f32, the oracle of the
//! others), [`cpu`] (our kernels, quantised weights) and, in a crate of its own, `cuda`.
//!
//! Shapes are row-major and written `[rows, width]`.
//!
//! A model may be cut into ranks, each on a backend of its own; two ops then join what the ranks hold.

mod batch;
pub mod cpu;
pub mod dequant;
pub mod fp8;
mod ggml;
pub mod int4;
pub mod mxfp4;
pub mod nvfp4;
mod quantize;
mod raw;
pub mod reference;
mod sampling;
mod widen;

pub use batch::{BLOCK_SIZE, Batch, Span};
pub use raw::{DType, RawTensor, UnsupportedDType};
pub use rudder_comm::Rank;
pub use sampling::{
    LogitBias, MOST_DRAWN_AHEAD, SampleRow, Sampled, SamplerScratch, SamplingParams, TokenCounts,
    TokenLogprob, sample_row, uniform,
};

/// What an op or a weight upload can fail with.
#[derive(Debug, thiserror::Error)]
pub enum OpError {
    /// A weight has a shape the op cannot use; names the tensor and both shapes.
    #[error("tensor {name}: expected shape {expected}, found {found}")]
    Shape {
        /// The tensor's name in its file.
        name: String,
        /// What the op needs.
        expected: String,
        /// What the file holds.
        found: String,
    },
    /// A weight's storage format is not supported by this backend.
    #[error("tensor {name}: storage format {dtype:?} is not supported by the {backend} backend")]
    Unsupported {
        /// The tensor's name in its file.
        name: String,
        /// Its storage format.
        dtype: DType,
        /// The backend that was asked.
        backend: &'static str,
    },
    /// The backend itself failed (out of memory, a driver error).
    #[error("{0}")]
    Backend(String),
}

impl From<rudder_comm::Failed> for OpError {
    fn from(e: rudder_comm::Failed) -> Self {
        OpError::Backend(e.to_string())
    }
}

impl From<candle_core::Error> for OpError {
    fn from(e: candle_core::Error) -> Self {
        OpError::Backend(e.to_string())
    }
}

/// Result of ops and uploads.
pub type Result<T> = std::result::Result<T, OpError>;

/// How positions are turned into rotations of query and key pairs.
///
/// Rotary position embedding, Su et al. 2021 (arXiv:2104.09864).
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Inverse frequencies, `[head_dim / 2]`, with any context-length scaling already applied.
    pub inv_freq: Vec<f32>,
    /// Which two elements of a head form a pair.
    pub pairing: RopePairing,
}

/// Which two elements of a head rotate together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopePairing {
    /// Element `i` with `i + head_dim / 2` (Hugging Face checkpoints; GGUF of Qwen).
    Halves,
    /// Element `2i` with `2i + 1` (GGUF of Llama, whose converter permutes Q and K rows).
    Interleaved,
}

/// Sizes of an attention layer; the same for all layers of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Factor on query-key products, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

impl AttentionShape {
    /// Width of a fused row `[q | k | v]`.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
    /// Width of an attention output row.
    pub fn out_width(&self) -> usize {
        self.heads * self.head_dim
    }
}

/// RMS norms on each query and key head before rope (Qwen3), `[head_dim]` each.
pub struct QkNorm<'a, V> {
    /// Weight for query heads.
    pub q: &'a V,
    /// Weight for key heads.
    pub k: &'a V,
    /// Added to the mean square.
    pub eps: f32,
}

/// What a layer's attention has beside the causal mask.
pub struct AttentionOptions<'a, V> {
    /// How many of the latest tokens a row sees, its own included (a sliding window); `None`: all.
    pub window: Option<usize>,
    /// A learnt logit for each query head, `[heads]`, that draws its share of the softmax and brings no value: an
    /// attention sink (Xiao et al. 2023, arXiv:2309.17453, as gpt-oss has it).
    pub sinks: Option<&'a V>,
    /// Whether nobody reads other rows than the batch's outputs afterwards, as in the last layer: the others may then hold anything.
    pub outputs_only: bool,
}

// Derived, both would ask it of `V`.
impl<V> Default for AttentionOptions<'_, V> {
    fn default() -> Self {
        Self { window: None, sinks: None, outputs_only: false }
    }
}

/// What an expert makes of its gate and up rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Activation {
    /// `silu(gate) * up`.
    Silu,
    /// `g * sigmoid(alpha * g) * (u + 1)` with `g` the gate up to `limit` and `u` up within `limit` of 0 (gpt-oss).
    ClampedSwiglu {
        /// Factor in the sigmoid.
        alpha: f32,
        /// Largest gate and largest magnitude of up.
        limit: f32,
    },
}

/// The weights of a layer's experts, one tensor an expert, in order.
#[derive(Clone, Copy)]
pub struct ExpertWeights<'a> {
    /// `[intermediate, hidden]` each.
    pub gate: &'a [RawTensor],
    /// `[intermediate, hidden]` each.
    pub up: &'a [RawTensor],
    /// `[hidden, intermediate]` each.
    pub down: &'a [RawTensor],
    /// Of gate and up `[intermediate]`, of down `[hidden]` each.
    pub biases: Option<[&'a [RawTensor]; 3]>,
    /// What stands between them.
    pub activation: Activation,
}

impl<'a> ExpertWeights<'a> {
    /// Experts without biases, gated by SiLU.
    pub fn plain(gate: &'a [RawTensor], up: &'a [RawTensor], down: &'a [RawTensor]) -> Self {
        Self { gate, up, down, biases: None, activation: Activation::Silu }
    }
}

/// The op set. One value is one device; a step's ops are called in order from one thread.
///
/// Contract shared by all ops:
/// - [`Backend::begin`] opens a step and tells the backend its [`Batch`]; ops that need
///   positions, slots or block tables take them from there.
/// - A [`Backend::Tensor`] is allocated once (`tensor(max_rows, width)`) and carries a current row
///   count; an op sets its output's row count from its input's. No op allocates on the hot
///   path, except in `reference`.
/// - Row `i` of any output depends on row `i` of the inputs (and, in attention, its own
///   sequence's KV) alone, bit for bit, whatever the other rows are: answers do not depend on
///   neighbours. `reference` is an oracle within a tolerance and does not promise it; nor does `cuda`, which multiplies few rows
///   with another kernel than many: there neighbours move a result by roundings.
pub trait Backend: Send + Sized + 'static {
    /// Activations, `[rows <= max_rows, width]`.
    type Tensor: Send;
    /// A weight matrix `[out, in]` in any storage format, made for [`Backend::linear`].
    type Matrix: Send;
    /// An embedding table `[vocab, hidden]`, made for [`Backend::embed`].
    type Embedding: Send;
    /// A small f32 vector: a norm weight or a bias.
    type Vector: Send;
    /// The stacked experts of one MoE layer.
    type Experts: Send;
    /// The paged keys and values of all layers.
    type KvCache: Send;

    /// A short name for logs and errors: `cpu`, `reference`, `cuda:0`.
    fn name(&self) -> &str;

    /// Which rank of a model this backend runs.
    fn rank(&self) -> Rank {
        Rank::ALONE
    }

    /// Bytes free and in all of the memory that tensors and KV caches lie in, where that is the device's own.
    fn memory(&self) -> Result<Option<(u64, u64)>> {
        Ok(None)
    }

    // ---- load time -------------------------------------------------------------------------

    /// Uploads a matrix made of `parts` stacked along the output dimension (Q, K and V, or gate
    /// and up, in one multiplication). Parts may differ in storage format but not in width.
    fn load_matrix(&mut self, parts: &[RawTensor]) -> Result<Self::Matrix>;
    /// Uploads an embedding table.
    fn load_embedding(&mut self, table: &RawTensor) -> Result<Self::Embedding>;
    /// Uploads vectors concatenated in order, widened to f32.
    fn load_vector(&mut self, parts: &[RawTensor]) -> Result<Self::Vector>;
    /// Tells a norm's weight that `matrix` reads the rows that the norm makes, which may then be made in a format that it multiplies. Results
    /// are the same where nobody tells.
    fn norm_feeds(_norm: &mut Self::Vector, _matrix: &Self::Matrix) {}
    /// The same of experts.
    fn norm_feeds_experts(_norm: &mut Self::Vector, _experts: &Self::Experts) {}
    /// Uploads one layer's experts.
    fn load_experts(&mut self, weights: &ExpertWeights<'_>) -> Result<Self::Experts>;
    /// Allocates a workspace tensor.
    fn tensor(&mut self, max_rows: usize, width: usize) -> Result<Self::Tensor>;
    /// Allocates a KV cache of `blocks` blocks of [`BLOCK_SIZE`] tokens for `layers` layers.
    fn kv_cache(&mut self, layers: usize, shape: &AttentionShape, blocks: usize) -> Result<Self::KvCache>;
    /// Bytes that one KV block of one layer takes.
    fn kv_block_bytes(&self, shape: &AttentionShape) -> usize;
    /// Names the dtype and layout of the bytes that [`Backend::read_kv_block`] gives, its version
    /// included: bytes of one name fit every cache of the same shape. `None`: blocks stay where they are.
    fn kv_format(&self) -> Option<String> {
        None
    }
    /// Copies one KV block of all layers to `out`, layers times [`Backend::kv_block_bytes`] bytes.
    fn read_kv_block(&mut self, _cache: &Self::KvCache, _block: u32, _out: &mut [u8]) -> Result<()> {
        Err(OpError::Backend(format!("{} does not move KV blocks", self.name())))
    }
    /// Fills one KV block of all layers from what [`Backend::read_kv_block`] gave.
    fn write_kv_block(&mut self, _cache: &mut Self::KvCache, _block: u32, _bytes: &[u8]) -> Result<()> {
        Err(OpError::Backend(format!("{} does not move KV blocks", self.name())))
    }
    /// Prepares rotations for positions `0 .. max_positions`.
    fn load_rope(&mut self, rope: &Rope, max_positions: usize) -> Result<()>;

    // ---- a step ----------------------------------------------------------------------------

    /// Opens a step over `batch`.
    fn begin(&mut self, batch: &Batch) -> Result<()>;
    /// `out[i] = table[batch.tokens[i]]`.
    fn embed(&mut self, table: &Self::Embedding, out: &mut Self::Tensor) -> Result<()>;
    /// Adds `delta` to `x` in place when given (the residual), then
    /// `out = x / sqrt(mean(x^2) + eps) * weight` row by row. Zhang and Sennrich 2019
    /// (arXiv:1910.07467).
    fn rms_norm(
        &mut self,
        x: &mut Self::Tensor,
        delta: Option<&Self::Tensor>,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// `out = x * w^T + bias`.
    fn linear(
        &mut self,
        x: &Self::Tensor,
        w: &Self::Matrix,
        bias: Option<&Self::Vector>,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// Rotates the query and key parts of `qkv` (rows `[q | k | v]`) in place, after `norm` when
    /// given, and writes keys and values of every row to its slot of `layer` in `cache`.
    fn rope_and_cache(
        &mut self,
        qkv: &mut Self::Tensor,
        shape: &AttentionShape,
        norm: Option<QkNorm<'_, Self::Vector>>,
        layer: usize,
        cache: &mut Self::KvCache,
    ) -> Result<()>;
    /// Causal attention of every query row of `qkv` over its sequence's cached keys and values
    /// up to and including its own position, as far as `options` let it see; `out` is `[rows, heads * head_dim]`.
    /// Query head `h` reads KV head `h / (heads / kv_heads)`.
    fn attention(
        &mut self,
        qkv: &Self::Tensor,
        shape: &AttentionShape,
        options: AttentionOptions<'_, Self::Vector>,
        layer: usize,
        cache: &Self::KvCache,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// `gate_up` rows are `[gate | up]`; `out = silu(gate) * up` (Shazeer 2020, arXiv:2002.05202).
    fn silu_mul(&mut self, gate_up: &Self::Tensor, out: &mut Self::Tensor) -> Result<()>;
    /// A gated MLP: the rows of `gate_up` are the gate's, then as many of up, and `out = (silu(x * gate^T) * (x * up^T)) * down^T`. What
    /// the two tensors `room`, for both halves and for what the gate lets through, hold afterwards is not to be read.
    fn mlp(
        &mut self,
        x: &Self::Tensor,
        gate_up: &Self::Matrix,
        down: &Self::Matrix,
        room: (&mut Self::Tensor, &mut Self::Tensor),
        out: &mut Self::Tensor,
    ) -> Result<()> {
        let (both, activated) = room;
        self.linear(x, gate_up, None, both)?;
        self.silu_mul(both, activated)?;
        self.linear(activated, down, None, out)
    }
    /// Mixture of experts: softmax over `router_logits` rows, the `top_k` largest (ties to the
    /// lower index), weights renormalised to sum to one when `renormalise`, and the weighted sum
    /// of those experts' gated MLPs of `x`.
    fn moe(
        &mut self,
        x: &Self::Tensor,
        router_logits: &Self::Tensor,
        experts: &Self::Experts,
        top_k: usize,
        renormalise: bool,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// Copies the rows `batch.outputs` of `x` to `out`, adding the same rows of `delta` when given.
    fn gather(
        &mut self,
        x: &Self::Tensor,
        delta: Option<&Self::Tensor>,
        out: &mut Self::Tensor,
    ) -> Result<()>;
    /// Makes `x` the sum of all ranks' `x`, added in the order of the ranks, so that all hold the same bits. Nothing to do
    /// where there is one rank. Every rank calls it at the same places of a step.
    fn all_reduce(&mut self, _x: &mut Self::Tensor) -> Result<()> {
        Ok(())
    }
    /// [`Backend::all_reduce`] of `delta`, then [`Backend::rms_norm`] of it and `x`. What `delta` holds afterwards is not to be read.
    fn reduce_norm(
        &mut self,
        x: &mut Self::Tensor,
        delta: &mut Self::Tensor,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Tensor,
    ) -> Result<()> {
        self.all_reduce(delta)?;
        self.rms_norm(x, Some(delta), weight, eps, out)
    }
    /// Puts the ranks' `part`s side by side, in the order of the ranks, into `whole`, which rank 0 gives; the others give `None`
    /// and get nothing. Called where there are several ranks, at the same places of a step.
    fn gather_columns(&mut self, _part: &Self::Tensor, _whole: Option<&mut Self::Tensor>) -> Result<()> {
        Err(OpError::Backend(format!("{} runs a model on one rank", self.name())))
    }
    /// Ends the step after its last op: what was kept back of it is queued. It may still run.
    ///
    /// # Errors
    /// If the step failed; where it still runs, that is told when something of it is read.
    fn end(&mut self) -> Result<()> {
        Ok(())
    }
    /// Draws one token from every row of `logits` as `rows` ask; writes one [`Sampled`] a row.
    /// A row whose logits are not finite reports [`Sampled::fault`] and harms no other row.
    fn sample(
        &mut self,
        logits: &mut Self::Tensor,
        rows: &[SampleRow<'_>],
        out: &mut Vec<Sampled>,
    ) -> Result<()>;
    /// Whether [`Backend::draw`] works, so that a step can be queued while the one before it runs. It may begin and cease to between steps.
    fn draws_ahead(&self) -> bool {
        false
    }
    /// Queues what [`Backend::sample`] does and does not wait for it. Of several ranks rank 0 alone draws; all go on from that. The next step may
    /// be begun, and name the tokens ([`Batch::drawn`]), before [`Backend::drawn`] gives what was drawn; another draw may not. No row may ask
    /// for more than [`MOST_DRAWN_AHEAD`] alternatives.
    fn draw(&mut self, _logits: &mut Self::Tensor, _rows: &[SampleRow<'_>]) -> Result<()> {
        Err(OpError::Backend(format!("{} does not draw ahead", self.name())))
    }
    /// Waits for the draw on its way.
    fn drawn(&mut self, _out: &mut Vec<Sampled>) -> Result<()> {
        Err(OpError::Backend(format!("{} does not draw ahead", self.name())))
    }
    /// Of a rank: whether all went well here that led to what rank 0 drew, which has come. Only then can this be told of a step that
    /// [`Backend::end`] did not wait for.
    fn landed(&mut self) -> Result<()> {
        Ok(())
    }
    /// After an op failed: waits for what is queued, and tells whether the device goes on computing. After some faults no context of this process
    /// does.
    ///
    /// # Errors
    /// If it does not, for good.
    fn recover(&mut self) -> Result<()> {
        Ok(())
    }
    /// Copies a tensor's rows to the host; for tests and logit parity, not for the hot path.
    fn to_host(&mut self, x: &Self::Tensor) -> Result<Vec<f32>>;
}
