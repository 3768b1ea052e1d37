//! Llama 2 and 3, and what shares their form (SmolLM2, Mistral without a window): no biases, no head norms.
//!
//! Touvron et al. 2023 (arXiv:2307.09288), Grattafiori et al. 2024 (arXiv:2407.21783).

use super::{Architecture, PLAIN};
use rudder_ops::RopePairing;

pub(super) const ARCHITECTURE: Architecture = Architecture {
    name: "llama",
    hf_model_type: "llama",
    // GGUF's converter permutes the rows of Q and K so that neighbours rotate together.
    gguf_pairing: RopePairing::Interleaved,
    ..PLAIN
};
