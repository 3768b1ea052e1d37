//! From a path to a model: opens a GGUF file or a Hugging Face folder, uploads the weights to a backend.

use std::fmt::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

use rudder_ops::{AttentionShape, BLOCK_SIZE, Backend, ExpertWeights, Rank, RawTensor};

use crate::arch::{self, Architecture};
use crate::decoder::{Decoder, Layer, Limits, Mlp, Workspace};
use crate::dummy::{self, Dummy};
use crate::fingerprint::Fingerprint;
use crate::gguf::Gguf;
use crate::hf_config::HfConfig;
use crate::safetensors::Checkpoint;
use crate::shard::{Cut, Shard, outputs, uncut};
use crate::weights::Weights;
use crate::{KvBlock, LoadError, Model, ModelConfig, MoeConfig, config, hf_config};

/// Slots are numbered in 32 bits, and the last number means none.
const MOST_KV_BLOCKS: usize = u32::MAX as usize / BLOCK_SIZE;

/// How large a loaded model's steps and KV cache are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoadOptions {
    /// Most tokens in a step.
    pub max_batch_tokens: usize,
    /// Most rows of a step whose logits are kept.
    pub max_outputs: usize,
    /// Size of the KV cache.
    pub kv: KvSize,
    /// Longest sequence in tokens; at most the model's context length.
    pub max_context: usize,
}

/// Size of a KV cache.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum KvSize {
    /// So many blocks of [`rudder_ops::BLOCK_SIZE`] tokens.
    Blocks(usize),
    /// As many blocks as fit in so many bytes.
    Bytes(u64),
    /// As many blocks as this share of the device's memory has room for beside all else, measured after a largest step.
    DeviceShare(f64),
}

impl KvSize {
    /// Whether a largest step is run at the load: then what grows with steps is there before memory is measured, and no device looks for room in
    /// the middle of a later step, where giving some back may wait for other devices that wait for it.
    pub(crate) fn is_rehearsed(self) -> bool {
        !matches!(self, Self::Blocks(_))
    }
}

/// A loaded model and what it takes.
pub struct Loaded {
    /// The model.
    pub model: Box<dyn Model>,
    /// Blocks in its KV cache.
    pub kv_blocks: usize,
    /// Bytes of its KV cache.
    pub kv_bytes: u64,
    /// Bytes of its weights as they lie in the file.
    pub weight_bytes: u64,
}

/// A model's files, opened and checked but not yet loaded.
pub struct ModelSource {
    path: PathBuf,
    arch: &'static Architecture,
    config: ModelConfig,
    weights: Weights,
    /// Whether the output matrix is the embedding table.
    tied: bool,
    fp4_activations: bool,
    declared_activations: String,
}

/// Opens `path` and loads it. `progress` is told the bytes of weights done and to do.
///
/// # Errors
/// See [`ModelSource::open`] and [`ModelSource::load`].
pub fn load<B: Backend>(
    path: &Path,
    backend: B,
    options: LoadOptions,
    progress: impl FnMut(u64, u64),
) -> Result<Loaded, LoadError> {
    ModelSource::open(path)?.load(backend, options, progress)
}

impl ModelSource {
    /// Opens a GGUF file or a Hugging Face folder (config.json, safetensors).
    ///
    /// # Errors
    /// If files are missing or damaged, or the architecture is not supported; the message names the file
    /// and the tensor or key.
    pub fn open(path: &Path) -> Result<Self, LoadError> {
        match path.is_dir() {
            true => Self::open_folder(path),
            false => Self::open_gguf(path),
        }
    }

    /// A model of random weights: of the configuration compiled in under this name, or of a folder's config.json. It
    /// is as fast as the real one and says nothing.
    ///
    /// # Errors
    /// If there is neither, or the architecture is not supported.
    pub fn dummy(name: &str) -> Result<Self, LoadError> {
        let file = Path::new(name).join("config.json");
        let hf = match (dummy::preset(name), std::fs::read(&file)) {
            (Some(json), _) => hf_config::parse(json.as_bytes()),
            (None, Ok(json)) => hf_config::parse(&json),
            (None, Err(e)) => Err(format!(
                "no configuration to fill with random weights ({e}; compiled in: {})",
                dummy::preset_names()
            )),
        };
        let hf = hf.map_err(|reason| LoadError::invalid(&file, reason))?;
        let tied = hf.tied.unwrap_or(false);
        let quantised = match hf.quantised[..] {
            [] => None,
            [one] => Some(one),
            _ => {
                let reason = "matrices of several formats, which cannot be random weights";
                return Err(LoadError::invalid(&file, reason));
            }
        };
        let weights = Weights::dummy(Dummy::new(&hf.config, hf.arch, tied, quantised));
        Ok(Self::of_config(name.into(), hf, weights, tied))
    }

    fn open_gguf(path: &Path) -> Result<Self, LoadError> {
        let gguf = Gguf::open(path)?;
        let invalid = |reason: String| LoadError::invalid(path, reason);
        if gguf.u64("split.count").is_some_and(|parts| parts > 1) {
            return Err(invalid(
                "one part of a split model; merge the parts with llama.cpp's gguf-split".into(),
            ));
        }
        let name = gguf.str("general.architecture");
        let name = name.ok_or_else(|| invalid("metadata key general.architecture is missing".into()))?;
        let arch = arch::by_name(&name).map_err(invalid)?;
        let config = config::from_gguf(&gguf, arch).map_err(invalid)?;
        let weights = Weights::from_gguf(gguf);
        let tied = !weights.has_output();
        let (path, declared_activations) = (path.to_owned(), "none".to_owned());
        Ok(Self { path, arch, config, weights, tied, fp4_activations: false, declared_activations })
    }

    fn of_config(path: PathBuf, hf: HfConfig, weights: Weights, tied: bool) -> Self {
        let HfConfig { arch, config, fp4_activations, declared_activations, .. } = hf;
        Self { path, arch, config, weights, tied, fp4_activations, declared_activations }
    }

    fn open_folder(path: &Path) -> Result<Self, LoadError> {
        let file = path.join("config.json");
        let json = std::fs::read(&file).map_err(|e| LoadError::io(&file, e))?;
        let hf = hf_config::parse(&json).map_err(|reason| LoadError::invalid(&file, reason))?;
        let weights = Weights::from_checkpoint(path, Checkpoint::open(path)?, hf.fp8_block, hf.int4);
        let tied = hf.tied.unwrap_or(!weights.has_output());
        Ok(Self::of_config(path.to_owned(), hf, weights, tied))
    }

    /// The same with the layers' matrices that are stored as plain numbers as FP8 (E4M3), each row with a scale: for backends that multiply those as
    /// they are. Others would only lose by it.
    pub fn with_fp8(self) -> Self {
        Self { weights: self.weights.with_fp8(), ..self }
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The GGUF file, with its metadata, if it is one.
    pub fn gguf(&self) -> Option<&Gguf> {
        self.weights.gguf()
    }

    /// A hash of the configuration and of samples of every tensor in the files: the same for processes that have opened the same model.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut fingerprint = Fingerprint::new(&self.config);
        self.weights.add_to(&mut fingerprint);
        fingerprint.finish("stored")
    }

    /// What processes that share the model must have alike of it, as names and values: the model, and what its files declare of activations,
    /// which no tensor shows.
    pub fn terms(&self) -> [(&'static str, String); 2] {
        let mut model = format!("{} ", self.config.architecture);
        for byte in &self.fingerprint()[..8] {
            let _ = write!(model, "{byte:02x}"); // writing to a string does not fail
        }
        [("model", model), ("activations in config.json", self.declared_activations.clone())]
    }

    /// Bytes of the weights as they lie in the files.
    pub fn weight_bytes(&self) -> u64 {
        self.weights.bytes()
    }

    /// Bytes that the weights take where FP8 and four-bit matrices are widened to BF16, as on the CPU.
    pub fn widened_bytes(&self) -> u64 {
        self.weights.widened_bytes()
    }

    /// Whether its NVFP4 matrices were made to be multiplied with activations in NVFP4, as its files say.
    pub fn fp4_activations(&self) -> bool {
        self.fp4_activations
    }

    /// Bytes that one KV block takes in all layers together, on all ranks of the model that `backend` runs one of.
    pub fn kv_block_bytes<B: Backend>(&self, backend: &B) -> u64 {
        let (world, attention) = (backend.rank().world, self.config.attention);
        // Where there are more ranks than KV heads, each has one.
        let part = AttentionShape { kv_heads: attention.kv_heads.div_ceil(world), ..attention };
        backend.kv_block_bytes(&part) as u64 * self.config.layers as u64 * world as u64
    }

    /// How the model is cut for `world` ranks.
    pub(crate) fn cut(&self, world: usize) -> Result<Cut<'_>, LoadError> {
        let cut = Cut::new(&self.config, &self.weights)?;
        cut.check(world).map_err(|reason| {
            LoadError::Options(format!("{world} ranks cannot share {}: {reason}", self.path.display()))
        })?;
        Ok(cut)
    }

    /// Uploads the weights to `backend` and allocates its KV cache and workspace.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape than the configuration says, the backend cannot take
    /// it, or the options do not fit the model.
    pub fn load<B: Backend>(
        &self,
        backend: B,
        options: LoadOptions,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<Loaded, LoadError> {
        if backend.rank() != Rank::ALONE {
            return Err(LoadError::Options("a rank is loaded together with the others of its group".into()));
        }
        let mut decoder = self.decoder(backend, &Shard::whole(&self.config), options, &mut progress)?;
        let weight_bytes = self.weight_bytes();
        progress(weight_bytes, weight_bytes);
        let block_bytes = self.kv_block_bytes(&decoder.backend);
        if options.kv.is_rehearsed() {
            decoder.rehearse()?;
        }
        if let KvSize::DeviceShare(share) = options.kv {
            let blocks = kv_blocks_in(share, decoder.backend.memory()?, block_bytes)?;
            decoder.set_kv_blocks(blocks)?;
        }
        let kv_blocks = decoder.limits.kv_blocks;
        let kv_bytes = block_bytes.saturating_mul(kv_blocks as u64);
        Ok(Loaded { model: Box::new(decoder), kv_blocks, kv_bytes, weight_bytes })
    }

    /// Uploads one rank's part of the weights and allocates its part of the KV cache and its workspace.
    pub(crate) fn decoder<B: Backend>(
        &self,
        mut backend: B,
        shard: &Shard,
        options: LoadOptions,
        progress: impl FnMut(u64, u64),
    ) -> Result<Decoder<B>, LoadError> {
        let limits = self.limits(&backend, options)?;
        let config = shard.config(&self.config);
        let fingerprint = Fingerprint::new(&config);
        let mut loader =
            Loader { source: self, shard, backend: &mut backend, done: 0, progress, fingerprint };
        let embedding = loader.embedding()?;
        let layers = (0..self.config.layers).map(|layer| loader.layer(layer)).collect::<Result<_, _>>()?;
        let (mut output_norm, output) = (loader.output_norm()?, loader.output()?);
        B::norm_feeds(&mut output_norm, &output);
        let fingerprint = loader.fingerprint;
        let block_bytes = backend.kv_block_bytes(&config.attention) * config.layers;
        let kv_block = backend
            .kv_format()
            .map(|format| KvBlock { bytes: block_bytes, fingerprint: fingerprint.finish(&format) });

        backend.load_rope(&config.rope, limits.context)?;
        let cache = backend.kv_cache(config.layers, &config.attention, limits.kv_blocks)?;
        let workspace = Workspace::new(&mut backend, &config, &limits, shard.vocab.len())?;
        Ok(Decoder {
            backend,
            config,
            limits,
            kv_block,
            embedding,
            layers,
            output_norm,
            output,
            cache,
            workspace,
        })
    }

    fn limits<B: Backend>(&self, backend: &B, options: LoadOptions) -> Result<Limits, LoadError> {
        let LoadOptions { max_batch_tokens, max_outputs, kv, max_context } = options;
        let longest = self.config.context_length;
        if max_context == 0 || max_context > longest {
            let path = self.path.display();
            let reason =
                format!("a context of {max_context} tokens is not possible: {path} has at most {longest}");
            return Err(LoadError::Options(reason));
        }
        if max_batch_tokens == 0 || max_outputs == 0 {
            return Err(LoadError::Options("a step needs room for at least one token and one output".into()));
        }
        let block_bytes = self.kv_block_bytes(backend).max(1);
        let kv_blocks = match kv {
            KvSize::Blocks(blocks) => blocks,
            KvSize::Bytes(bytes) => usize::try_from(bytes / block_bytes).unwrap_or(usize::MAX),
            // For the largest step, whose sequences each fill their last block in part.
            KvSize::DeviceShare(_) => {
                max_batch_tokens.div_ceil(BLOCK_SIZE) + max_batch_tokens.div_ceil(max_context)
            }
        };
        if kv_blocks == 0 || kv_blocks > MOST_KV_BLOCKS {
            let reason =
                format!("a KV cache of {kv_blocks} blocks ({block_bytes} bytes each) is not possible");
            return Err(LoadError::Options(reason));
        }
        Ok(Limits { batch_tokens: max_batch_tokens, outputs: max_outputs, context: max_context, kv_blocks })
    }
}

/// KV blocks of `block_bytes` that `share` of a device's memory (free and total) has room for beside what is in use.
pub(crate) fn kv_blocks_in(
    share: f64,
    memory: Option<(u64, u64)>,
    block_bytes: u64,
) -> Result<usize, LoadError> {
    let (free, total) =
        memory.ok_or_else(|| LoadError::Options("this device does not say how much memory it has".into()))?;
    let room = ((total as f64 * share) as u64).saturating_sub(total - free.min(total));
    match usize::try_from(room / block_bytes.max(1)).unwrap_or(usize::MAX).min(MOST_KV_BLOCKS) {
        0 => Err(LoadError::Options(format!(
            "{share} of the device's memory ({total} bytes) has no room for a KV cache: {free} bytes are free after \
             weights and workspace; use more of it, a smaller model or fewer max_batch_tokens"
        ))),
        blocks => Ok(blocks),
    }
}

/// Uploads tensor by tensor and counts the bytes.
struct Loader<'a, B: Backend, P: FnMut(u64, u64)> {
    source: &'a ModelSource,
    /// The part of the weights that is uploaded.
    shard: &'a Shard,
    backend: &'a mut B,
    done: u64,
    progress: P,
    fingerprint: Fingerprint,
}

impl<B: Backend, P: FnMut(u64, u64)> Loader<'_, B, P> {
    /// Counts tensors that were uploaded, and lets go of their pages.
    fn uploaded(&mut self, parts: &[RawTensor]) {
        parts.iter().for_each(|part| self.fingerprint.add(part));
        parts.iter().for_each(|part| self.source.weights.release(part));
        self.done += parts.iter().map(|part| part.bytes().len() as u64).sum::<u64>();
        // A tied embedding table is uploaded twice, some tensors never.
        let total = self.source.weight_bytes();
        (self.progress)(self.done.min(total), total);
    }

    /// The part of a matrix that reads `inputs`. It is a copy, so the tensor's own pages are given back at once.
    fn inputs(&self, tensor: RawTensor, inputs: &Range<usize>) -> Result<RawTensor, LoadError> {
        if *inputs == (0..tensor.shape[1]) {
            return Ok(tensor);
        }
        let part = tensor.columns(inputs.clone()).ok_or_else(|| uncut(&tensor))?;
        self.source.weights.release(&tensor);
        Ok(part)
    }

    /// Whether this is the rank that adds what is added once, or the only one.
    fn is_first(&self) -> bool {
        self.backend.rank().index == 0
    }

    /// Biases of products that are summed over the ranks: zeros on all ranks but the first.
    fn added_once(&self, biases: Vec<RawTensor>) -> Vec<RawTensor> {
        let zeros = |bias: RawTensor| {
            RawTensor::from_f32(bias.name.clone(), bias.shape.clone(), &vec![0.0; bias.elements()])
        };
        if self.is_first() { biases } else { biases.into_iter().map(zeros).collect() }
    }

    fn matrix(&mut self, parts: &[RawTensor]) -> Result<B::Matrix, LoadError> {
        let matrix = self.backend.load_matrix(parts)?;
        self.uploaded(parts);
        Ok(matrix)
    }

    fn vector(&mut self, parts: &[RawTensor]) -> Result<B::Vector, LoadError> {
        let vector = self.backend.load_vector(parts)?;
        self.uploaded(parts);
        Ok(vector)
    }

    fn embedding(&mut self) -> Result<B::Embedding, LoadError> {
        let ModelConfig { vocab, hidden, .. } = self.source.config;
        let table = self.source.weights.embedding([vocab, hidden])?;
        let embedding = self.backend.load_embedding(&table)?;
        self.uploaded(&[table]);
        Ok(embedding)
    }

    fn output_norm(&mut self) -> Result<B::Vector, LoadError> {
        let weight = self.source.weights.output_norm(self.source.config.hidden)?;
        self.vector(&[weight])
    }

    fn output(&mut self) -> Result<B::Matrix, LoadError> {
        let ModelConfig { vocab, hidden, .. } = self.source.config;
        let (weights, shape) = (&self.source.weights, [vocab, hidden]);
        let matrix = if self.source.tied { weights.embedding(shape)? } else { weights.output(shape)? };
        self.matrix(&[outputs(matrix, &self.shard.vocab)?])
    }

    fn layer(&mut self, layer: usize) -> Result<Layer<B>, LoadError> {
        let (weights, config, arch) = (&self.source.weights, &self.source.config, self.source.arch);
        let shard = self.shard;
        let (hidden, head_dim) = (config.hidden, config.attention.head_dim);
        let q = config.attention.heads * head_dim;
        let kv = config.attention.kv_heads * head_dim;

        let qkv = [
            outputs(weights.matrix(layer, "attn_q", [q, hidden])?, &shard.q)?,
            outputs(weights.matrix(layer, "attn_k", [kv, hidden])?, &shard.kv)?,
            outputs(weights.matrix(layer, "attn_v", [kv, hidden])?, &shard.kv)?,
        ];
        let qkv_bias = match arch.qkv_bias {
            true => Some(self.vector(&[
                outputs(weights.bias(layer, "attn_q", q)?, &shard.q)?,
                outputs(weights.bias(layer, "attn_k", kv)?, &shard.kv)?,
                outputs(weights.bias(layer, "attn_v", kv)?, &shard.kv)?,
            ])?),
            false => None,
        };
        let qk_norm = match arch.qk_norm {
            true => {
                let q = self.vector(&[weights.norm(layer, "attn_q_norm", head_dim)?])?;
                let k = self.vector(&[weights.norm(layer, "attn_k_norm", head_dim)?])?;
                Some((q, k))
            }
            false => None,
        };
        let attn_output = self.inputs(weights.matrix(layer, "attn_output", [hidden, q])?, &shard.q)?;
        let attn_output_bias = match arch.output_bias {
            // Added once: the ranks' products are summed.
            true if self.is_first() => Some(self.vector(&[weights.bias(layer, "attn_output", hidden)?])?),
            _ => None,
        };
        let sinks = match arch.sinks {
            true => {
                let heads = shard.q.start / head_dim..shard.q.end / head_dim;
                let sinks = weights.sinks(layer, config.attention.heads)?;
                Some(self.vector(&[outputs(sinks, &heads)?])?)
            }
            false => None,
        };
        let mut loaded = Layer {
            attn_norm: self.vector(&[weights.norm(layer, "attn_norm", hidden)?])?,
            qkv: self.matrix(&qkv)?,
            qkv_bias,
            qk_norm,
            window: config.windows[layer],
            sinks,
            attn_output: self.matrix(&[attn_output])?,
            attn_output_bias,
            ffn_norm: self.vector(&[weights.norm(layer, "ffn_norm", hidden)?])?,
            mlp: self.mlp(layer)?,
        };
        loaded.tell_norms();
        Ok(loaded)
    }

    fn mlp(&mut self, layer: usize) -> Result<Mlp<B>, LoadError> {
        let (weights, config, inner) = (&self.source.weights, &self.source.config, &self.shard.inner);
        let hidden = config.hidden;
        let Some(moe) = config.moe else {
            let width = config.intermediate;
            let gate = outputs(weights.matrix(layer, "ffn_gate", [width, hidden])?, inner)?;
            let up = outputs(weights.matrix(layer, "ffn_up", [width, hidden])?, inner)?;
            let down = self.inputs(weights.matrix(layer, "ffn_down", [hidden, width])?, inner)?;
            return Ok(Mlp::Dense { gate_up: self.matrix(&[gate, up])?, down: self.matrix(&[down])? });
        };
        let count = moe.experts;
        let router = self.matrix(&[weights.matrix(layer, "ffn_gate_inp", [count, hidden])?])?;
        let router_bias = match self.source.arch.expert_biases {
            true => Some(self.vector(&[weights.bias(layer, "ffn_gate_inp", count)?])?),
            false => None,
        };
        Ok(Mlp::Moe { router, router_bias, experts: self.experts(layer, moe)? })
    }

    /// A part of every expert, so that all ranks have the same to do whatever the router says.
    fn experts(&mut self, layer: usize, moe: MoeConfig) -> Result<B::Experts, LoadError> {
        let (weights, hidden, inner) = (&self.source.weights, self.source.config.hidden, &self.shard.inner);
        let (count, width) = (moe.experts, moe.intermediate);
        let rows = |experts: Vec<RawTensor>| -> Result<Vec<_>, LoadError> {
            experts.into_iter().map(|expert| outputs(expert, inner)).collect()
        };
        let gate = rows(weights.experts(layer, "gate", count, [width, hidden])?)?;
        let up = rows(weights.experts(layer, "up", count, [width, hidden])?)?;
        let down = weights.experts(layer, "down", count, [hidden, width])?;
        let down: Vec<_> =
            down.into_iter().map(|expert| self.inputs(expert, inner)).collect::<Result<_, _>>()?;
        let biases = match self.source.arch.expert_biases {
            true => {
                let of = |name, len| weights.expert_biases(layer, name, count, len);
                Some([
                    rows(of("gate", width)?)?,
                    rows(of("up", width)?)?,
                    self.added_once(of("down", hidden)?),
                ])
            }
            false => None,
        };
        let experts = self.backend.load_experts(&ExpertWeights {
            gate: &gate,
            up: &up,
            down: &down,
            biases: biases.as_ref().map(|biases| biases.each_ref().map(Vec::as_slice)),
            activation: moe.activation,
        })?;
        for parts in [gate, up, down].iter().chain(biases.iter().flatten()) {
            self.uploaded(parts);
        }
        Ok(experts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_of_the_memory_holds_what_is_not_in_use() {
        // 20 of 100 in use: 70 of 90 are left.
        assert_eq!(kv_blocks_in(0.9, Some((80, 100)), 7).unwrap(), 10);
        let refusal = kv_blocks_in(0.5, Some((50, 100)), 7).unwrap_err().to_string();
        assert!(refusal.contains("no room for a KV cache"), "{refusal}");
        assert!(kv_blocks_in(0.9, None, 7).is_err());
    }

    #[test]
    fn random_weights_fit_every_architecture() {
        for name in ["llama", "qwen2", "qwen3", "qwen3moe", "gptoss", "gptoss-mxfp4"] {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
            let source = ModelSource::dummy(&folder.to_string_lossy()).expect("a configuration");
            let checkpoint = ModelSource::open(&folder).expect("a checkpoint");
            // Checkpoints of f32 are twice as large; MXFP4 is as large as it is.
            let mxfp4 = if name.ends_with("mxfp4") { 2 * 4 * 3 * 64 * 128 / 32 * 17 } else { 0 };
            assert_eq!(2 * (source.weight_bytes() - mxfp4), checkpoint.weight_bytes() - mxfp4, "{name}");
            let options =
                LoadOptions { max_batch_tokens: 8, max_outputs: 8, kv: KvSize::Blocks(2), max_context: 32 };
            let loaded = source.load(rudder_ops::reference::Reference::new(), options, |_, _| ());
            let mut model = loaded.expect("every tensor is there").model;
            let mut batch = rudder_ops::Batch::default();
            batch.push(&[1, 2, 3], 0, &[1], 1);
            model.forward(&batch).expect("a step");
            let logits = model.logits().expect("logits");
            assert!(logits.iter().all(|x| x.is_finite()) && logits.iter().any(|x| *x != logits[0]), "{name}");
        }
        let refusal = ModelSource::dummy("nowhere").err().expect("nothing there").to_string();
        assert!(refusal.contains("qwen3-coder-30b-a3b"), "{refusal}");
    }
}
