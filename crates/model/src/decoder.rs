//! The decoder that all architectures share: a pre-norm transformer over the op set.

use rudder_ops::{Backend, Batch, OpError, QkNorm, SampleRow, Sampled};

use crate::{Model, ModelConfig};

/// A loaded decoder: weights, KV cache and workspace on one backend.
pub(crate) struct Decoder<B: Backend> {
    pub backend: B,
    pub config: ModelConfig,
    pub limits: Limits,
    pub embedding: B::Embedding,
    pub layers: Vec<Layer<B>>,
    pub output_norm: B::Vector,
    pub output: B::Matrix,
    pub cache: B::KvCache,
    pub workspace: Workspace<B>,
}

/// The largest step that the workspace holds, and the largest position that rope is prepared for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub batch_tokens: usize,
    pub outputs: usize,
    pub context: usize,
    pub kv_blocks: usize,
}

/// One layer's weights.
pub(crate) struct Layer<B: Backend> {
    pub attn_norm: B::Vector,
    /// Q, K and V, stacked.
    pub qkv: B::Matrix,
    pub qkv_bias: Option<B::Vector>,
    pub qk_norm: Option<(B::Vector, B::Vector)>,
    pub attn_output: B::Matrix,
    pub ffn_norm: B::Vector,
    pub mlp: Mlp<B>,
}

/// The second half of a layer.
pub(crate) enum Mlp<B: Backend> {
    /// Gate and up stacked, then down.
    Dense { gate_up: B::Matrix, down: B::Matrix },
    /// Router logits choose among experts.
    Moe { router: B::Matrix, experts: B::Experts },
}

/// Activations of a step, allocated once. Rows: tokens of the batch; outputs in the last three.
pub(crate) struct Workspace<B: Backend> {
    /// The residual stream.
    residual: B::Tensor,
    /// The residual stream, normed.
    normed: B::Tensor,
    /// Queries, keys and values side by side.
    qkv: B::Tensor,
    /// Attention's output, all heads side by side.
    heads: B::Tensor,
    /// What the last half layer adds to the residual stream.
    delta: B::Tensor,
    mlp: MlpWorkspace<B>,
    output: B::Tensor,
    output_normed: B::Tensor,
    logits: B::Tensor,
}

enum MlpWorkspace<B: Backend> {
    Dense { gate_up: B::Tensor, activated: B::Tensor },
    Moe { router_logits: B::Tensor },
}

impl<B: Backend> Workspace<B> {
    /// Allocates for steps within `limits`.
    pub(crate) fn new(backend: &mut B, config: &ModelConfig, limits: &Limits) -> Result<Self, OpError> {
        let (tokens, outputs, hidden) = (limits.batch_tokens, limits.outputs, config.hidden);
        let mlp = match &config.moe {
            Some(moe) => MlpWorkspace::Moe { router_logits: backend.tensor(tokens, moe.experts)? },
            None => MlpWorkspace::Dense {
                gate_up: backend.tensor(tokens, 2 * config.intermediate)?,
                activated: backend.tensor(tokens, config.intermediate)?,
            },
        };
        Ok(Self {
            residual: backend.tensor(tokens, hidden)?,
            normed: backend.tensor(tokens, hidden)?,
            qkv: backend.tensor(tokens, config.attention.qkv_width())?,
            heads: backend.tensor(tokens, config.attention.out_width())?,
            delta: backend.tensor(tokens, hidden)?,
            mlp,
            output: backend.tensor(outputs, hidden)?,
            output_normed: backend.tensor(outputs, hidden)?,
            logits: backend.tensor(outputs, config.vocab)?,
        })
    }
}

impl<B: Backend> Layer<B> {
    /// `delta = mlp(norm(residual + delta + attention(norm(residual + delta))))`, the sums left in
    /// the residual stream.
    fn forward(
        &self,
        index: usize,
        backend: &mut B,
        config: &ModelConfig,
        cache: &mut B::KvCache,
        w: &mut Workspace<B>,
    ) -> Result<(), OpError> {
        let (shape, eps) = (&config.attention, config.rms_eps);
        // The embedding is the whole residual stream as the first layer finds it.
        let delta = (index > 0).then_some(&w.delta);
        backend.rms_norm(&mut w.residual, delta, &self.attn_norm, eps, &mut w.normed)?;
        backend.linear(&w.normed, &self.qkv, self.qkv_bias.as_ref(), &mut w.qkv)?;
        let norm = self.qk_norm.as_ref().map(|(q, k)| QkNorm { q, k, eps });
        backend.rope_and_cache(&mut w.qkv, shape, norm, index, cache)?;
        backend.attention(&w.qkv, shape, index, cache, &mut w.heads)?;
        backend.linear(&w.heads, &self.attn_output, None, &mut w.delta)?;

        backend.rms_norm(&mut w.residual, Some(&w.delta), &self.ffn_norm, eps, &mut w.normed)?;
        match (&self.mlp, &mut w.mlp, &config.moe) {
            (Mlp::Dense { gate_up, down }, MlpWorkspace::Dense { gate_up: both, activated }, _) => {
                backend.linear(&w.normed, gate_up, None, both)?;
                backend.silu_mul(both, activated)?;
                backend.linear(activated, down, None, &mut w.delta)
            }
            (Mlp::Moe { router, experts }, MlpWorkspace::Moe { router_logits }, Some(moe)) => {
                backend.linear(&w.normed, router, None, router_logits)?;
                backend.moe(&w.normed, router_logits, experts, moe.top_k, moe.renormalise, &mut w.delta)
            }
            _ => unreachable!("layers and workspace are made from one configuration"),
        }
    }
}

impl<B: Backend> Decoder<B> {
    /// Refuses what would read or write beyond the workspace or the tables: a defect of the caller's.
    fn check(&self, batch: &Batch) -> Result<(), OpError> {
        let Limits { batch_tokens, outputs, context, kv_blocks } = self.limits;
        let refuse = |what: String| Err(OpError::Backend(format!("step refused: {what}")));
        if batch.rows() > batch_tokens || batch.outputs.len() > outputs {
            let (rows, wanted) = (batch.rows(), batch.outputs.len());
            return refuse(format!("{rows} tokens, {wanted} outputs; room for {batch_tokens} and {outputs}"));
        }
        if let Some(token) = batch.tokens.iter().find(|&&token| token as usize >= self.config.vocab) {
            return refuse(format!("token {token} is beyond the vocabulary of {}", self.config.vocab));
        }
        if let Some(span) = batch.spans.iter().find(|span| span.context > context) {
            return refuse(format!("a sequence of {} tokens; the context is {context}", span.context));
        }
        if let Some(block) = batch.block_tables.iter().find(|&&block| block as usize >= kv_blocks) {
            return refuse(format!("KV block {block} of {kv_blocks}"));
        }
        Ok(())
    }
}

impl<B: Backend> Model for Decoder<B> {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn forward(&mut self, batch: &Batch) -> Result<(), OpError> {
        self.check(batch)?;
        let (backend, w) = (&mut self.backend, &mut self.workspace);
        backend.begin(batch)?;
        backend.embed(&self.embedding, &mut w.residual)?;
        for (index, layer) in self.layers.iter().enumerate() {
            layer.forward(index, backend, &self.config, &mut self.cache, w)?;
        }
        backend.gather(&w.residual, Some(&w.delta), &mut w.output)?;
        backend.rms_norm(
            &mut w.output,
            None,
            &self.output_norm,
            self.config.rms_eps,
            &mut w.output_normed,
        )?;
        backend.linear(&w.output_normed, &self.output, None, &mut w.logits)
    }

    fn sample(&mut self, rows: &[SampleRow<'_>], out: &mut Vec<Sampled>) -> Result<(), OpError> {
        self.backend.sample(&mut self.workspace.logits, rows, out)
    }

    fn logits(&mut self) -> Result<Vec<f32>, OpError> {
        self.backend.to_host(&self.workspace.logits)
    }
}
