//! The architectures: each file states what one is, over the shared [decoder](crate::decoder).

mod gpt_oss;
mod llama;
mod qwen2;
mod qwen3;
mod qwen3_moe;

use rudder_ops::{Activation, RopePairing};

/// What distinguishes one decoder architecture from another.
pub(crate) struct Architecture {
    /// GGUF's `general.architecture`, also the prefix of its keys.
    pub name: &'static str,
    /// `model_type` in Hugging Face's config.json.
    pub hf_model_type: &'static str,
    /// Head dimension where config.json states none; `None`: hidden size over heads.
    pub hf_head_dim: Option<usize>,
    /// How rope pairs elements in GGUF files; Hugging Face checkpoints always pair halves.
    pub gguf_pairing: RopePairing,
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// A bias on attention's output projection.
    pub output_bias: bool,
    /// RMS norms on each query and key head.
    pub qk_norm: bool,
    /// A learnt logit for each query head that draws its share of the softmax.
    pub sinks: bool,
    /// Every other layer, from the first on, attends within a sliding window, whose size the file states.
    pub sliding: bool,
    /// Whether YaRN's blend of frequencies begins and ends at whole dimensions where the file does not say.
    pub yarn_truncates: bool,
    /// A mixture of experts in place of the dense MLP.
    pub moe: bool,
    /// Biases on the router and on the experts' matrices.
    pub expert_biases: bool,
    /// The router's softmax is over the logits of the chosen experts alone: over all, made to sum to one.
    pub softmax_of_chosen: bool,
    /// What stands between an expert's matrices.
    pub activation: Activation,
}

/// What the others are told apart from: Llama.
const PLAIN: Architecture = Architecture {
    name: "",
    hf_model_type: "",
    hf_head_dim: None,
    gguf_pairing: RopePairing::Halves,
    qkv_bias: false,
    output_bias: false,
    qk_norm: false,
    sinks: false,
    sliding: false,
    yarn_truncates: true,
    moe: false,
    expert_biases: false,
    softmax_of_chosen: false,
    activation: Activation::Silu,
};

const ALL: [&Architecture; 5] = [
    &llama::ARCHITECTURE,
    &qwen2::ARCHITECTURE,
    &qwen3::ARCHITECTURE,
    &qwen3_moe::ARCHITECTURE,
    &gpt_oss::ARCHITECTURE,
];

/// The architecture that a GGUF file names.
pub(crate) fn by_name(name: &str) -> Result<&'static Architecture, String> {
    by(|arch| arch.name, name)
}

/// The architecture that a config.json names.
pub(crate) fn by_hf_model_type(model_type: &str) -> Result<&'static Architecture, String> {
    by(|arch| arch.hf_model_type, model_type)
}

fn by(key: fn(&Architecture) -> &'static str, name: &str) -> Result<&'static Architecture, String> {
    ALL.into_iter().find(|arch| key(arch) == name).ok_or_else(|| {
        let names: Vec<_> = ALL.into_iter().map(key).collect();
        format!("architecture {name:?} is not supported (supported: {})", names.join(", "))
    })
}
