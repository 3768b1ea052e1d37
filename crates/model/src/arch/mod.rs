//! The architectures: each file states what one is, over the shared [decoder](crate::decoder).

mod llama;
mod qwen2;
mod qwen3;
mod qwen3_moe;

use rudder_ops::RopePairing;

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
    /// RMS norms on each query and key head.
    pub qk_norm: bool,
    /// A mixture of experts in place of the dense MLP.
    pub moe: bool,
}

const ALL: [&Architecture; 4] =
    [&llama::ARCHITECTURE, &qwen2::ARCHITECTURE, &qwen3::ARCHITECTURE, &qwen3_moe::ARCHITECTURE];

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
