//! gpt-oss: experts with biases and a clamped gate, attention sinks, and a sliding window in every other layer.
//!
//! OpenAI 2025, gpt-oss-120b & gpt-oss-20b Model Card (arXiv:2508.10925).

use super::{Architecture, PLAIN};
use rudder_ops::{Activation, RopePairing};

pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: "gpt-oss",
    hf_model_type: "gpt_oss",
    hf_head_dim: Some(64),
    gguf_pairing: RopePairing::Halves,
    qkv_bias: true,
    output_bias: true,
    sinks: true,
    sliding: true,
    yarn_truncates: false,
    moe: true,
    expert_biases: true,
    softmax_of_chosen: true,
    activation: Activation::ClampedSwiglu { alpha: 1.702, limit: 7.0 },
    ..PLAIN
};
