//! What a model is: sizes, rope and experts, read from GGUF metadata or from Hugging Face's config.json.

use rudder_ops::{Activation, AttentionShape, Rope};

use crate::arch::Architecture;
use crate::gguf::Gguf;
use crate::rope::{Scaling, Yarn, inverse_frequencies};

/// What every architecture states of itself.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// `llama`, `qwen2`, `qwen3`, `qwen3moe`, `gpt-oss`.
    pub architecture: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of a dense MLP.
    pub intermediate: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Attention sizes. YaRN's factors on rotated queries and keys are part of their products' scale.
    pub attention: AttentionShape,
    /// How many of the latest tokens each layer sees; `None`: all. The KV cache keeps all of them in any case.
    pub windows: Vec<Option<usize>>,
    /// Vocabulary size.
    pub vocab: usize,
    /// Context length the model was trained for, scaling included.
    pub context_length: usize,
    /// Epsilon of the RMS norms.
    pub rms_eps: f32,
    /// Rotary embedding.
    pub rope: Rope,
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
    /// What stands between an expert's matrices.
    pub activation: Activation,
}

/// The sizes as a file states them, before they are checked against each other.
pub(crate) struct Stated {
    pub hidden: usize,
    pub intermediate: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: Option<usize>,
    pub vocab: usize,
    pub context_length: usize,
    pub rms_eps: f32,
    pub rope_theta: f64,
    pub scaling: Scaling,
    /// Size of the sliding window.
    pub window: Option<usize>,
    /// Which layers have it; every other one, from the first on, where the file does not say.
    pub sliding: Option<Vec<bool>>,
    pub moe: Option<MoeConfig>,
}

impl Stated {
    /// Checks that the sizes are sane and fit each other. The bounds lie far above any known model; they
    /// keep products of two of them from overflowing and damaged files from asking for absurd memory.
    pub(crate) fn check(
        self,
        arch: &Architecture,
        pairing: rudder_ops::RopePairing,
    ) -> Result<ModelConfig, String> {
        let bounded = |what: &str, value: usize, most: usize| match value {
            v if (1..=most).contains(&v) => Ok(v),
            v => Err(format!("{what} is {v}; from 1 to {most} is possible")),
        };
        bounded("the hidden size", self.hidden, 1 << 17)?;
        bounded("the MLP's width", self.intermediate, 1 << 20)?;
        bounded("the number of layers", self.layers, 1 << 10)?;
        bounded("the number of attention heads", self.heads, 1 << 10)?;
        bounded("the number of KV heads", self.kv_heads, self.heads)?;
        bounded("the vocabulary size", self.vocab, 1 << 22)?;
        let context_length = match &self.scaling {
            // Whoever lengthens a model by YaRN often leaves the length that it was trained for.
            Scaling::Yarn(yarn) => self.context_length.max((yarn.original_context * yarn.factor) as usize),
            _ => self.context_length,
        };
        bounded("the context length", context_length, 1 << 28)?;
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(format!(
                "{} attention heads do not divide among {} KV heads",
                self.heads, self.kv_heads
            ));
        }
        let head_dim = match self.head_dim {
            Some(dim) => dim,
            None if self.hidden.is_multiple_of(self.heads) => self.hidden / self.heads,
            None => {
                return Err(format!("hidden size {} is no multiple of {} heads", self.hidden, self.heads));
            }
        };
        bounded("the head dimension", head_dim, 1 << 10)?;
        if !head_dim.is_multiple_of(2) {
            return Err(format!("the head dimension {head_dim} is odd; rope needs pairs"));
        }
        if !(self.rms_eps.is_finite() && self.rms_eps >= 0.0) {
            return Err(format!("the RMS norm's epsilon is {}", self.rms_eps));
        }
        if let Some(moe) = &self.moe {
            bounded("the number of experts", moe.experts, 1 << 12)?;
            bounded("the number of experts per token", moe.top_k, moe.experts)?;
            bounded("the experts' width", moe.intermediate, 1 << 20)?;
        }
        if let Some(window) = self.window {
            bounded("the sliding window", window, 1 << 28)?;
        }
        let inv_freq = inverse_frequencies(head_dim, self.rope_theta, &self.scaling)?;
        let scale = self.scaling.attention_factor().powi(2) as f32 / (head_dim as f32).sqrt();
        if !(scale.is_finite() && scale > 0.0) {
            return Err(format!("{:?} makes attention's scale {scale}", self.scaling));
        }
        let windows = self.windows()?;
        Ok(ModelConfig {
            architecture: arch.name.to_owned(),
            hidden: self.hidden,
            intermediate: self.intermediate,
            layers: self.layers,
            attention: AttentionShape { heads: self.heads, kv_heads: self.kv_heads, head_dim, scale },
            windows,
            vocab: self.vocab,
            context_length,
            rms_eps: self.rms_eps,
            rope: Rope { inv_freq, pairing },
            moe: self.moe,
        })
    }

    /// Each layer's window.
    fn windows(&self) -> Result<Vec<Option<usize>>, String> {
        match &self.sliding {
            None => Ok((0..self.layers).map(|layer| self.window.filter(|_| layer % 2 == 0)).collect()),
            Some(sliding) if sliding.len() == self.layers => {
                Ok(sliding.iter().map(|&slides| self.window.filter(|_| slides)).collect())
            }
            Some(sliding) => Err(format!("types of {} layers for {}", sliding.len(), self.layers)),
        }
    }
}

/// Reads the configuration of a GGUF file. Keys: the format's "LLM" section, prefixed by the architecture.
pub(crate) fn from_gguf(gguf: &Gguf, arch: &Architecture) -> Result<ModelConfig, String> {
    refuse_biases(gguf, arch)?;
    let keys = Keys { gguf, prefix: arch.name };
    let vocab = match gguf.tensor("token_embd.weight") {
        Ok(table) if table.shape.len() == 2 => table.shape[0],
        Ok(table) => {
            return Err(format!(
                "tensor token_embd.weight has shape {:?}; expected two dimensions",
                table.shape
            ));
        }
        Err(_) => return Err("tensor token_embd.weight is missing".to_owned()),
    };
    let heads = keys.required("attention.head_count")?;
    let head_dim = keys.optional("attention.key_length")?;
    let value_dim = keys.optional("attention.value_length")?;
    if head_dim.is_some() && value_dim.is_some() && head_dim != value_dim {
        return Err(format!(
            "keys and values of different widths ({0}.attention.key_length, {0}.attention.value_length) \
             are not supported",
            arch.name
        ));
    }
    let stated = Stated {
        hidden: keys.required("embedding_length")?,
        intermediate: match arch.moe {
            // Some converters leave the unused dense width out.
            true => keys.optional("feed_forward_length")?.unwrap_or(1),
            false => keys.required("feed_forward_length")?,
        },
        layers: keys.required("block_count")?,
        heads,
        kv_heads: keys.optional("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        vocab,
        context_length: keys.required("context_length")?,
        rms_eps: keys
            .float("attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| keys.missing("attention.layer_norm_rms_epsilon"))?,
        rope_theta: keys.float("rope.freq_base")?.unwrap_or(10_000.0).into(),
        scaling: gguf_scaling(&keys, arch)?,
        window: match arch.sliding {
            true => Some(keys.required("attention.sliding_window")?),
            false => None,
        },
        sliding: None,
        moe: match arch.moe {
            true => Some(MoeConfig {
                experts: keys.required("expert_count")?,
                top_k: keys.required("expert_used_count")?,
                intermediate: keys.required("expert_feed_forward_length")?,
                renormalise: keys.bool("expert_weights_norm")?.unwrap_or(true),
                activation: arch.activation,
            }),
            false => None,
        },
    };
    let rope_dims = keys.optional("rope.dimension_count")?;
    let config = stated.check(arch, arch.gguf_pairing)?;
    match rope_dims {
        Some(dims) if dims != config.attention.head_dim => Err(format!(
            "rope over {dims} of {} elements of a head ({}.rope.dimension_count) is not supported",
            config.attention.head_dim, arch.name
        )),
        _ => Ok(config),
    }
}

/// Says no to a layer's biases that are not read, without which every answer would be another.
fn refuse_biases(gguf: &Gguf, arch: &Architecture) -> Result<(), String> {
    let reads = |part: &str| match part {
        "attn_q" | "attn_k" | "attn_v" => arch.qkv_bias,
        "attn_output" => arch.output_bias,
        "ffn_gate_inp" | "ffn_gate_exps" | "ffn_up_exps" | "ffn_down_exps" => arch.expert_biases,
        _ => false,
    };
    let unread = |name: &&str| {
        let bias = name.strip_prefix("blk.").and_then(|name| name.strip_suffix(".bias"));
        bias.and_then(|name| name.split_once('.')).is_some_and(|(_, part)| !reads(part))
    };
    match gguf.tensor_names().find(unread) {
        Some(name) => Err(format!("tensor {name}: a {} model with this bias is not supported", arch.name)),
        None => Ok(()),
    }
}

/// Rope scaling of a GGUF file: a `rope_freqs.weight` tensor (llama3's, worked out by the converter), or
/// `rope.scaling.type` with its factor.
fn gguf_scaling(keys: &Keys<'_>, arch: &Architecture) -> Result<Scaling, String> {
    const TENSOR: &str = "rope_freqs.weight";
    if let Ok(tensor) = keys.gguf.tensor(TENSOR) {
        if tensor.dtype != rudder_ops::DType::F32 || tensor.elements() > 1 << 10 {
            return Err(format!("tensor {TENSOR} is {tensor:?}; expected at most 1024 elements of F32"));
        }
        let (values, _) = tensor.bytes().as_chunks::<4>();
        return Ok(Scaling::Divisors(values.iter().map(|&b| f32::from_le_bytes(b)).collect()));
    }
    let kind = keys.gguf.str(&keys.key("rope.scaling.type"));
    match kind.as_deref() {
        Some("none") => Ok(Scaling::None),
        // Older files name no type, and the factor by another key.
        None | Some("linear") => {
            let factor = keys.float("rope.scaling.factor")?.or(keys.float("rope.scale_linear")?);
            Ok(match factor {
                None | Some(0.0 | 1.0) => Scaling::None,
                Some(factor) => Scaling::Linear { factor: factor.into() },
            })
        }
        Some("yarn") => {
            let factor = keys.required_float("rope.scaling.factor")?;
            let beta = |name, default| keys.float(name).map(|beta| beta.map_or(default, f64::from));
            let [fast, slow] = Yarn::BETAS;
            let attention_factor = keys.float("rope.scaling.yarn_attn_factor")?;
            let times = keys.float("rope.scaling.attn_factor")?.map_or(1.0, f64::from);
            Ok(Scaling::Yarn(Yarn {
                factor,
                beta_fast: beta("rope.scaling.yarn_beta_fast", fast)?,
                beta_slow: beta("rope.scaling.yarn_beta_slow", slow)?,
                original_context: keys.required("rope.scaling.original_context_length")? as f64,
                truncate: arch.yarn_truncates,
                attention_factor: times * attention_factor.map_or(Yarn::mscale(factor, 1.0), f64::from),
            }))
        }
        Some(other) => Err(format!(
            "rope scaling type {other:?} is not supported (supported: none, linear, llama3, yarn)"
        )),
    }
}

/// An architecture's metadata keys. A key that is there with another type is an error that names it.
struct Keys<'a> {
    gguf: &'a Gguf,
    prefix: &'a str,
}

impl Keys<'_> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    fn missing(&self, key: &str) -> String {
        format!("metadata key {} is missing", self.key(key))
    }

    fn typed<T>(
        &self,
        key: &str,
        what: &str,
        value: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, String> {
        let key = self.key(key);
        match (value(&key), self.gguf.value(&key)) {
            (None, Some(_)) => Err(format!("metadata key {key} is not {what}")),
            (found, _) => Ok(found),
        }
    }

    fn optional(&self, key: &str) -> Result<Option<usize>, String> {
        self.typed(key, "a count", |key| self.gguf.u64(key)?.try_into().ok())
    }

    fn required(&self, key: &str) -> Result<usize, String> {
        self.optional(key)?.ok_or_else(|| self.missing(key))
    }

    fn float(&self, key: &str) -> Result<Option<f32>, String> {
        self.typed(key, "a float", |key| self.gguf.f32(key))
    }

    fn required_float(&self, key: &str) -> Result<f64, String> {
        Ok(self.float(key)?.ok_or_else(|| self.missing(key))?.into())
    }

    fn bool(&self, key: &str) -> Result<Option<bool>, String> {
        self.typed(key, "a boolean", |key| self.gguf.bool(key))
    }
}
