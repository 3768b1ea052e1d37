//! Model architectures over the op set, and weight loading (GGUF, safetensors).

use rudder_ops::{Batch, SampleRow, Sampled};

/// A model loaded on some backend, ready to run steps. The engine knows nothing more of it.
pub trait Model: Send {
    /// What the model is.
    fn config(&self) -> &ModelConfig;
    /// Runs one step over `batch` and keeps the logits of `batch.outputs`.
    ///
    /// # Errors
    /// If the backend fails; the step's KV is then undefined, the model stays usable.
    fn forward(&mut self, batch: &Batch) -> Result<(), rudder_ops::OpError>;
    /// Draws one token for every output row of the last `forward`.
    ///
    /// # Errors
    /// If the backend fails.
    fn sample(&mut self, rows: &[SampleRow<'_>], out: &mut Vec<Sampled>) -> Result<(), rudder_ops::OpError>;
    /// Logits of the last `forward`, `[outputs, vocab]`; for tests.
    ///
    /// # Errors
    /// If the backend fails.
    fn logits(&mut self) -> Result<Vec<f32>, rudder_ops::OpError>;
}

/// What every architecture states of itself.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// `llama`, `qwen2`, `qwen3`, `qwen3moe`.
    pub architecture: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of a dense MLP.
    pub intermediate: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Attention sizes.
    pub attention: rudder_ops::AttentionShape,
    /// Vocabulary size.
    pub vocab: usize,
    /// Context length the model was trained for, scaling included.
    pub context_length: usize,
    /// Epsilon of the RMS norms.
    pub rms_eps: f32,
    /// Rotary embedding.
    pub rope: rudder_ops::Rope,
    /// Mixture of experts, if any.
    pub moe: Option<MoeConfig>,
}

/// Sizes of a mixture-of-experts layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MoeConfig {
    /// Experts in a layer.
    pub experts: usize,
    /// Experts used per token.
    pub top_k: usize,
    /// Width of one expert.
    pub intermediate: usize,
    /// Whether the chosen experts' weights are made to sum to one.
    pub renormalise: bool,
}
