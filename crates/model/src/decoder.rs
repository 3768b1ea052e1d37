//! The decoder that all architectures share: a pre-norm transformer over the op set.

use rudder_ops::{
    AttentionOptions, BLOCK_SIZE, Backend, Batch, OpError, QkNorm, Rank, SampleRow, Sampled, SamplingParams,
};

use crate::{KvBlock, Model, ModelConfig};

/// A loaded decoder: weights, KV cache and workspace on one backend; of a model that is cut, one rank's, with the sizes of its part.
pub(crate) struct Decoder<B: Backend> {
    pub backend: B,
    pub config: ModelConfig,
    pub limits: Limits,
    pub kv_block: Option<KvBlock>,
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
    pub window: Option<usize>,
    pub sinks: Option<B::Vector>,
    pub attn_output: B::Matrix,
    pub attn_output_bias: Option<B::Vector>,
    pub ffn_norm: B::Vector,
    pub mlp: Mlp<B>,
}

/// The second half of a layer.
pub(crate) enum Mlp<B: Backend> {
    /// Gate and up stacked, then down.
    Dense { gate_up: B::Matrix, down: B::Matrix },
    /// Router logits choose among experts.
    Moe { router: B::Matrix, router_bias: Option<B::Vector>, experts: B::Experts },
}

/// Activations of a step, allocated once. Rows: tokens of the batch, or its outputs where the name says so and
/// in the last half layer.
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
    output_heads: B::Tensor,
    /// The residual stream of the outputs.
    output: B::Tensor,
    output_normed: B::Tensor,
    /// Of this rank's part of the vocabulary.
    logits: B::Tensor,
    /// Of all of it, on rank 0 of several.
    all_logits: Option<B::Tensor>,
}

enum MlpWorkspace<B: Backend> {
    Dense { gate_up: B::Tensor, activated: B::Tensor },
    Moe { router_logits: B::Tensor },
}

impl<B: Backend> Workspace<B> {
    /// Allocates for steps within `limits` on a rank that computes the logits of `vocab` tokens.
    pub(crate) fn new(
        backend: &mut B,
        config: &ModelConfig,
        limits: &Limits,
        vocab: usize,
    ) -> Result<Self, OpError> {
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
            output_heads: backend.tensor(outputs, config.attention.out_width())?,
            output: backend.tensor(outputs, hidden)?,
            output_normed: backend.tensor(outputs, hidden)?,
            logits: backend.tensor(outputs, vocab)?,
            all_logits: match backend.rank() {
                Rank { index: 0, world: 2.. } => Some(backend.tensor(outputs, config.vocab)?),
                _ => None,
            },
        })
    }
}

impl<B: Backend> Layer<B> {
    /// Tells the norms what reads the rows that they make.
    pub fn tell_norms(&mut self) {
        B::norm_feeds(&mut self.attn_norm, &self.qkv);
        match &self.mlp {
            Mlp::Dense { gate_up, .. } => B::norm_feeds(&mut self.ffn_norm, gate_up),
            Mlp::Moe { router, experts, .. } => {
                B::norm_feeds(&mut self.ffn_norm, router);
                B::norm_feeds_experts(&mut self.ffn_norm, experts);
            }
        }
    }

    /// Projects to queries, keys and values, and puts keys and values into the cache.
    fn project(
        &self,
        index: usize,
        backend: &mut B,
        config: &ModelConfig,
        cache: &mut B::KvCache,
        w: &mut Workspace<B>,
    ) -> Result<(), OpError> {
        let (eps, weight) = (config.rms_eps, &self.attn_norm);
        match index {
            // The embedding is the whole residual stream as the first layer finds it.
            0 => backend.rms_norm(&mut w.residual, None, weight, eps, &mut w.normed)?,
            _ => backend.reduce_norm(&mut w.residual, &mut w.delta, weight, eps, &mut w.normed)?,
        }
        backend.linear(&w.normed, &self.qkv, self.qkv_bias.as_ref(), &mut w.qkv)?;
        let norm = self.qk_norm.as_ref().map(|(q, k)| QkNorm { q, k, eps });
        backend.rope_and_cache(&mut w.qkv, &config.attention, norm, index, cache)
    }

    /// Attention from `qkv` to `heads`, of all rows but in the last layer.
    fn attend(
        &self,
        index: usize,
        backend: &mut B,
        config: &ModelConfig,
        cache: &B::KvCache,
        w: &mut Workspace<B>,
    ) -> Result<(), OpError> {
        let outputs_only = index + 1 == config.layers;
        let options = AttentionOptions { window: self.window, sinks: self.sinks.as_ref(), outputs_only };
        backend.attention(&w.qkv, &config.attention, options, index, cache, &mut w.heads)
    }

    /// From attention's `heads` and the residual stream to what this layer's MLP adds to it:
    /// `residual += heads * o; delta = mlp(norm(residual))`. Ranks each hold a part of what the two matrices read: their deltas are yet to be
    /// added up.
    fn finish(
        &self,
        backend: &mut B,
        config: &ModelConfig,
        heads: &B::Tensor,
        residual: &mut B::Tensor,
        (normed, delta, mlp): (&mut B::Tensor, &mut B::Tensor, &mut MlpWorkspace<B>),
    ) -> Result<(), OpError> {
        backend.linear(heads, &self.attn_output, self.attn_output_bias.as_ref(), delta)?;
        backend.reduce_norm(residual, delta, &self.ffn_norm, config.rms_eps, normed)?;
        match (&self.mlp, mlp, &config.moe) {
            (Mlp::Dense { gate_up, down }, MlpWorkspace::Dense { gate_up: both, activated }, _) => {
                backend.mlp(normed, gate_up, down, (both, activated), delta)?;
            }
            (Mlp::Moe { router, router_bias, experts }, MlpWorkspace::Moe { router_logits }, Some(moe)) => {
                backend.linear(normed, router, router_bias.as_ref(), router_logits)?;
                backend.moe(normed, router_logits, experts, moe.top_k, moe.renormalise, delta)?;
            }
            _ => unreachable!("layers and workspace are made from one configuration"),
        }
        Ok(())
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
        if !batch.drawn.is_empty() && !self.draws_ahead() {
            return refuse(format!("{} needs to know every token", self.backend.name()));
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

impl<B: Backend> Decoder<B> {
    /// Runs a largest step, or as much of one as there are KV blocks for, so that everything that grows with steps has grown.
    pub(crate) fn rehearse(&mut self) -> Result<(), OpError> {
        let Limits { batch_tokens, outputs, context, .. } = self.limits;
        let mut batch = Batch::default();
        let mut free = 0..self.limits.kv_blocks as u32;
        while batch.rows() < batch_tokens {
            let len = context.min(batch_tokens - batch.rows()).min(BLOCK_SIZE * free.len());
            if len == 0 {
                break;
            }
            let blocks: Vec<u32> = free.by_ref().take(len.div_ceil(BLOCK_SIZE)).collect();
            let wanted = len.min(outputs - batch.outputs.len());
            batch.push(&vec![0; len], 0, &blocks, wanted);
        }
        self.forward(&batch)?;
        let params = SamplingParams { top_p: 0.9, logprobs: Some(20), ..Default::default() };
        let row =
            SampleRow { params: &params, counts: None, drafted: &[], position: 0, mask: None, forced: None };
        self.sample(&vec![row; batch.outputs.len()], &mut Vec::new())
    }

    /// Puts a KV cache of so many blocks in the place of the one there is.
    pub(crate) fn set_kv_blocks(&mut self, blocks: usize) -> Result<(), OpError> {
        self.cache = self.backend.kv_cache(self.config.layers, &self.config.attention, blocks)?;
        self.limits.kv_blocks = blocks;
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
        let (config, cache) = (&self.config, &mut self.cache);
        let Some((last, layers)) = self.layers.split_last() else { unreachable!("a model has layers") };
        for (index, layer) in layers.iter().enumerate() {
            layer.project(index, backend, config, cache, w)?;
            layer.attend(index, backend, config, cache, w)?;
            let buffers = (&mut w.normed, &mut w.delta, &mut w.mlp);
            layer.finish(backend, config, &w.heads, &mut w.residual, buffers)?;
        }
        // Of the last layer the other rows' keys and values are all that is ever read.
        last.project(layers.len(), backend, config, cache, w)?;
        backend.gather(&w.residual, None, &mut w.output)?;
        let wanted = !batch.outputs.is_empty();
        if wanted {
            last.attend(layers.len(), backend, config, cache, w)?;
            backend.gather(&w.heads, None, &mut w.output_heads)?;
            let buffers = (&mut w.output_normed, &mut w.delta, &mut w.mlp);
            last.finish(backend, config, &w.output_heads, &mut w.output, buffers)?;
        }
        let (eps, norm) = (config.rms_eps, &self.output_norm);
        match wanted {
            true => backend.reduce_norm(&mut w.output, &mut w.delta, norm, eps, &mut w.output_normed)?,
            false => backend.rms_norm(&mut w.output, None, norm, eps, &mut w.output_normed)?,
        }
        backend.linear(&w.output_normed, &self.output, None, &mut w.logits)?;
        if backend.rank().world > 1 {
            backend.gather_columns(&w.logits, w.all_logits.as_mut())?;
        }
        backend.end()
    }

    fn sample(&mut self, rows: &[SampleRow<'_>], out: &mut Vec<Sampled>) -> Result<(), OpError> {
        let w = &mut self.workspace;
        self.backend.sample(w.all_logits.as_mut().unwrap_or(&mut w.logits), rows, out)
    }

    fn draws_ahead(&self) -> bool {
        self.backend.draws_ahead()
    }

    fn draw(&mut self, rows: &[SampleRow<'_>]) -> Result<(), OpError> {
        let w = &mut self.workspace;
        self.backend.draw(w.all_logits.as_mut().unwrap_or(&mut w.logits), rows)
    }

    fn drawn(&mut self, out: &mut Vec<Sampled>) -> Result<(), OpError> {
        self.backend.drawn(out)
    }

    fn landed(&mut self) -> Result<(), OpError> {
        self.backend.landed()
    }

    fn recover(&mut self) -> Result<(), OpError> {
        self.backend.recover()
    }

    fn kv_block(&self) -> Option<KvBlock> {
        self.kv_block
    }

    fn export_block(&mut self, block: u32, out: &mut [u8]) -> Result<(), OpError> {
        self.backend.read_kv_block(&self.cache, block, out)
    }

    fn import_block(&mut self, block: u32, bytes: &[u8]) -> Result<(), OpError> {
        self.backend.write_kv_block(&mut self.cache, block, bytes)
    }

    fn logits(&mut self) -> Result<Vec<f32>, OpError> {
        let w = &self.workspace;
        self.backend.to_host(w.all_logits.as_ref().unwrap_or(&w.logits))
    }
}
