//! One view of a model's weights, whichever format they lie in, under canonical names (GGUF's).

use std::path::{Path, PathBuf};

use rudder_ops::RawTensor;

use crate::LoadError;
use crate::dummy::Dummy;
use crate::fingerprint::Fingerprint;
use crate::fp8;
use crate::fused_experts::FusedExperts;
use crate::gguf::Gguf;
use crate::int4::{self, Packing};
use crate::nvfp4;
use crate::safetensors::Checkpoint;

/// Canonical names of a layer's tensors, and Hugging Face's.
const LAYER_NAMES: [(&str, &str); 13] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
    ("ffn_gate_inp", "mlp.gate"),
    ("experts", "mlp.experts"),
];

/// What gpt-oss calls some of them: canonical names, GGUF's and Hugging Face's.
const OTHER_NAMES: [(&str, &str, &str); 2] = [
    ("ffn_norm", "post_attention_norm", "post_attention_layernorm"),
    ("ffn_gate_inp", "ffn_gate_inp", "mlp.router"),
];

/// A model's weights. Every tensor is handed out with its shape checked.
pub struct Weights {
    path: PathBuf,
    format: Format,
    /// Whether layers' matrices that are stored as numbers are handed out as FP8.
    fp8: bool,
}

enum Format {
    Gguf(Gguf),
    HuggingFace(Checkpoint, Stored),
    /// Random, under Hugging Face's names.
    Dummy(Dummy),
}

/// The tensor of a matrix `X.weight` that is packed and so stored under another name, whatever its format.
fn packed(checkpoint: &Checkpoint, name: &str) -> Option<String> {
    let matrix = name.strip_suffix("weight")?;
    let names = ["qweight", "weight_packed"].map(|packed| format!("{matrix}{packed}"));
    names.into_iter().find(|name| checkpoint.contains(name))
}

/// How a checkpoint stores matrices that it does not store as numbers.
struct Stored {
    /// Rows and columns that FP8 matrices have a scale for.
    fp8_block: [usize; 2],
    /// How matrices of four-bit integers are packed.
    int4: Option<Packing>,
}

impl Stored {
    fn tensor(&self, checkpoint: &Checkpoint, name: &str, shape: &[usize]) -> Result<RawTensor, LoadError> {
        if checkpoint.is_fp8(name) {
            return fp8::matrix(checkpoint, name, self.fp8_block);
        }
        // Before integers of four bits, which a mixture may have under the same name.
        if let &[n, k] = shape
            && let Some(matrix) = nvfp4::matrix(checkpoint, name, [n, k])?
        {
            return Ok(matrix);
        }
        if let (Some(packing), &[n, k]) = (self.int4, shape)
            && let Some(matrix) = int4::matrix(checkpoint, name, packing, [n, k])?
        {
            return Ok(matrix);
        }
        match packed(checkpoint, name).filter(|_| !checkpoint.contains(name)) {
            Some(packed) => Err(LoadError::invalid(
                checkpoint.folder(),
                format!(
                    "tensor {packed} is packed in a format that \"quantization_config\" of config.json does not name; \
                     use the GGUF or the original weights"
                ),
            )),
            None => checkpoint.tensor(name),
        }
    }
}

impl Weights {
    pub(crate) fn from_gguf(gguf: Gguf) -> Self {
        Self { path: gguf.path().to_owned(), format: Format::Gguf(gguf), fp8: false }
    }

    /// `fp8_block`: rows and columns that FP8 matrices have a scale for; `int4`: how matrices of four-bit integers are packed.
    pub(crate) fn from_checkpoint(
        folder: &Path,
        checkpoint: Checkpoint,
        fp8_block: [usize; 2],
        int4: Option<Packing>,
    ) -> Self {
        Self {
            path: folder.to_owned(),
            format: Format::HuggingFace(checkpoint, Stored { fp8_block, int4 }),
            fp8: false,
        }
    }

    pub(crate) fn dummy(dummy: Dummy) -> Self {
        Self { path: PathBuf::new(), format: Format::Dummy(dummy), fp8: false }
    }

    /// The same with layers' matrices that are stored as plain numbers as FP8, each row with a scale; the router's, the embedding table and the output
    /// matrix stay.
    pub(crate) fn with_fp8(self) -> Self {
        Self { fp8: true, ..self }
    }

    /// The GGUF file, if it is one.
    pub fn gguf(&self) -> Option<&Gguf> {
        match &self.format {
            Format::Gguf(gguf) => Some(gguf),
            Format::HuggingFace(..) | Format::Dummy(_) => None,
        }
    }

    /// Adds all tensors as they are stored to a fingerprint; of random ones, which follow from the configuration, none.
    pub(crate) fn add_to(&self, fingerprint: &mut Fingerprint) {
        match &self.format {
            Format::Gguf(gguf) => {
                let mut names: Vec<&str> = gguf.tensor_names().collect();
                names.sort_unstable();
                names.into_iter().filter_map(|name| gguf.tensor(name).ok()).for_each(|t| fingerprint.add(&t));
            }
            Format::HuggingFace(checkpoint, _) => {
                checkpoint.stored().iter().for_each(|(name, bytes)| fingerprint.add_stored(name, bytes));
            }
            Format::Dummy(_) => {}
        }
    }

    /// Of so many layers some that together have matrices of this name, or experts, in all formats that the layers have them in.
    pub fn layers_of_all_formats(&self, layers: usize, name: &str) -> Vec<usize> {
        match &self.format {
            Format::Gguf(_) => (0..layers).collect(),
            // Looking at a tensor may mean to convert it.
            Format::HuggingFace(checkpoint, _) => {
                let theirs =
                    LAYER_NAMES.iter().find(|(ours, _)| *ours == name).map_or(name, |(_, theirs)| theirs);
                checkpoint.layers_of_all_kinds(layers, theirs)
            }
            Format::Dummy(_) => (0..layers.min(1)).collect(),
        }
    }

    /// Bytes of all tensors together.
    pub fn bytes(&self) -> u64 {
        match &self.format {
            Format::Gguf(gguf) => gguf.tensor_bytes(),
            Format::HuggingFace(checkpoint, _) => checkpoint.tensor_bytes(),
            Format::Dummy(dummy) => dummy.bytes(),
        }
    }

    /// The same where matrices that only GPUs keep as they are have become BF16.
    pub fn widened_bytes(&self) -> u64 {
        match &self.format {
            Format::HuggingFace(checkpoint, _) => checkpoint.widened_bytes(),
            Format::Gguf(_) | Format::Dummy(_) => self.bytes(),
        }
    }

    /// The embedding table, `[vocab, hidden]`.
    pub fn embedding(&self, shape: [usize; 2]) -> Result<RawTensor, LoadError> {
        self.tensor(self.pick("token_embd.weight", "model.embed_tokens.weight"), &shape)
    }

    /// The weight of the last norm, `[hidden]`.
    pub fn output_norm(&self, hidden: usize) -> Result<RawTensor, LoadError> {
        self.tensor(self.pick("output_norm.weight", "model.norm.weight"), &[hidden])
    }

    /// Whether there is an output matrix apart from the embedding table, whatever its format.
    pub fn has_output(&self) -> bool {
        match &self.format {
            Format::HuggingFace(checkpoint, _) if packed(checkpoint, "lm_head.weight").is_some() => true,
            _ => self.contains(self.pick("output.weight", "lm_head.weight")),
        }
    }

    /// The output matrix, `[vocab, hidden]`.
    pub fn output(&self, shape: [usize; 2]) -> Result<RawTensor, LoadError> {
        self.tensor(self.pick("output.weight", "lm_head.weight"), &shape)
    }

    /// A layer's matrix, `[out, in]`.
    pub fn matrix(&self, layer: usize, name: &str, shape: [usize; 2]) -> Result<RawTensor, LoadError> {
        let tensor = self.tensor(&self.layer_name(layer, name, "weight"), &shape)?;
        Ok(if name == "ffn_gate_inp" { tensor } else { self.narrowed(tensor) })
    }

    /// As FP8, if that was asked for and can be.
    fn narrowed(&self, tensor: RawTensor) -> RawTensor {
        match self.fp8.then(|| tensor.to_fp8()).flatten() {
            Some(narrow) => {
                self.release(&tensor);
                narrow
            }
            None => tensor,
        }
    }

    /// The weight of a layer's norm.
    pub fn norm(&self, layer: usize, name: &str, len: usize) -> Result<RawTensor, LoadError> {
        self.tensor(&self.layer_name(layer, name, "weight"), &[len])
    }

    /// The bias of a layer's matrix.
    pub fn bias(&self, layer: usize, name: &str, len: usize) -> Result<RawTensor, LoadError> {
        self.tensor(&self.layer_name(layer, name, "bias"), &[len])
    }

    /// The attention sinks of a layer, `[heads]`.
    pub fn sinks(&self, layer: usize, heads: usize) -> Result<RawTensor, LoadError> {
        let name = match self.format {
            Format::Gguf(_) => format!("blk.{layer}.attn_sinks.weight"),
            Format::HuggingFace(..) | Format::Dummy(_) => format!("model.layers.{layer}.self_attn.sinks"),
        };
        self.tensor(&name, &[heads])
    }

    /// One matrix, `[out, in]`, of each of a layer's experts; `name` is `gate`, `up` or `down`.
    pub fn experts(
        &self,
        layer: usize,
        name: &str,
        count: usize,
        shape: [usize; 2],
    ) -> Result<Vec<RawTensor>, LoadError> {
        let experts: Vec<RawTensor> = match &self.format {
            Format::Gguf(_) => {
                let name = format!("blk.{layer}.ffn_{name}_exps.weight");
                let stacked = self.tensor(&name, &[count, shape[0], shape[1]])?;
                (0..count).map(|expert| stacked.index(expert)).collect()
            }
            Format::HuggingFace(..) | Format::Dummy(_) => match self.fused_experts(layer) {
                Some(fused) => fused.matrices(name, count, shape)?,
                None => self.each_expert(layer, count, &format!("{name}_proj.weight"), &shape)?,
            },
        };
        Ok(experts.into_iter().map(|expert| self.narrowed(expert)).collect())
    }

    /// The biases of [`Weights::experts`], `[len]` each.
    pub fn expert_biases(
        &self,
        layer: usize,
        name: &str,
        count: usize,
        len: usize,
    ) -> Result<Vec<RawTensor>, LoadError> {
        match &self.format {
            Format::Gguf(_) => {
                let stacked = self.tensor(&format!("blk.{layer}.ffn_{name}_exps.bias"), &[count, len])?;
                Ok((0..count).map(|expert| stacked.index(expert)).collect())
            }
            Format::HuggingFace(..) | Format::Dummy(_) => match self.fused_experts(layer) {
                Some(fused) => fused.biases(name, count, len),
                None => self.each_expert(layer, count, &format!("{name}_proj.bias"), &[len]),
            },
        }
    }

    fn fused_experts(&self, layer: usize) -> Option<FusedExperts<'_>> {
        let Format::HuggingFace(checkpoint, _) = &self.format else { return None };
        FusedExperts::find(checkpoint, format!("model.layers.{layer}.mlp.experts"))
    }

    /// One tensor of each expert, where each has its own.
    fn each_expert(
        &self,
        layer: usize,
        count: usize,
        kind: &str,
        shape: &[usize],
    ) -> Result<Vec<RawTensor>, LoadError> {
        let name = |expert: usize| self.layer_name(layer, "experts", &format!("{expert}.{kind}"));
        (0..count).map(|expert| self.tensor(&name(expert), shape)).collect()
    }

    /// Gives back the pages of a tensor that was uploaded: what a backend keeps of it, it has copied or
    /// will read again.
    pub(crate) fn release(&self, tensor: &RawTensor) {
        match &self.format {
            Format::Gguf(gguf) => gguf.release(tensor),
            Format::HuggingFace(checkpoint, _) => checkpoint.release(tensor),
            Format::Dummy(_) => {}
        }
    }

    fn pick<'a>(&self, gguf: &'a str, hugging_face: &'a str) -> &'a str {
        match self.format {
            Format::Gguf(_) => gguf,
            Format::HuggingFace(..) | Format::Dummy(_) => hugging_face,
        }
    }

    fn layer_name(&self, layer: usize, name: &str, kind: &str) -> String {
        let full = |gguf: &str, hugging_face: &str| match self.format {
            Format::Gguf(_) => format!("blk.{layer}.{gguf}.{kind}"),
            Format::HuggingFace(..) | Format::Dummy(_) => {
                format!("model.layers.{layer}.{hugging_face}.{kind}")
            }
        };
        let theirs = LAYER_NAMES.iter().find(|(ours, _)| *ours == name).map_or(name, |(_, theirs)| theirs);
        let usual = full(name, theirs);
        let other = OTHER_NAMES.iter().find(|(ours, ..)| *ours == name);
        match other.map(|(_, gguf, hugging_face)| full(gguf, hugging_face)) {
            Some(other) if !self.contains(&usual) && self.contains(&other) => other,
            _ => usual,
        }
    }

    fn contains(&self, name: &str) -> bool {
        match &self.format {
            Format::Gguf(gguf) => gguf.contains(name),
            Format::HuggingFace(checkpoint, _) => checkpoint.contains(name),
            Format::Dummy(dummy) => dummy.contains(name),
        }
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<RawTensor, LoadError> {
        let tensor = match &self.format {
            Format::Gguf(gguf) => gguf.tensor(name)?,
            Format::HuggingFace(checkpoint, stored) => stored.tensor(checkpoint, name, shape)?,
            Format::Dummy(dummy) => dummy.tensor(name, shape).ok_or_else(|| {
                LoadError::invalid(&self.path, format!("tensor {name} is larger than any was expected to be"))
            })?,
        };
        if tensor.shape != shape {
            let reason =
                format!("tensor {name} has shape {:?}, the configuration asks for {shape:?}", tensor.shape);
            return Err(LoadError::invalid(&self.path, reason));
        }
        Ok(tensor)
    }
}
