//! Qwen3-MoE: Qwen3 whose every MLP is a mixture of experts, without shared experts.
//! Yang et al. 2025 (arXiv:2505.09388).

use super::{Architecture, PLAIN};
use rudder_ops::RopePairing;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: "qwen3moe",
    hf_model_type: "qwen3_moe",
    gguf_pairing: RopePairing::Halves,
    qk_norm: true,
    moe: true,
    ..PLAIN
};
