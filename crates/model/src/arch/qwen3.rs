//! Qwen3, dense: norms on query and key heads instead of Qwen2's biases. Yang et al. 2025 (arXiv:2505.09388).

use super::{Architecture, PLAIN};
use rudder_ops::RopePairing;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: "qwen3",
    hf_model_type: "qwen3",
    hf_head_dim: Some(128),
    gguf_pairing: RopePairing::Halves,
    qk_norm: true,
    ..PLAIN
};
