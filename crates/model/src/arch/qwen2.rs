//! Qwen2 and Qwen2.5: Llama with biases on query, key and value. Yang et al. 2024 (arXiv:2407.10671).

use super::{Architecture, PLAIN};
use rudder_ops::RopePairing;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: "qwen2",
    hf_model_type: "qwen2",
    gguf_pairing: RopePairing::Halves,
    qkv_bias: true,
    ..PLAIN
};
