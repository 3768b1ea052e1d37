//! A fingerprint of what keys and values depend on beside the tokens.
//!
//! Of a large tensor the ends and the middle are hashed, not all of it: that takes no time when the
//! weights are loaded anyway, and no two sets of weights that anybody trains, merges or quantises
//! agree in all of these. A file whose damage misses the samples has the same fingerprint as the
//! whole one; who fears that has checked the file's SHA-256, as the catalog does.

use rudder_ops::{BLOCK_SIZE, RawTensor};
use sha2::{Digest, Sha256};

use crate::ModelConfig;

/// Bytes hashed at each place of a large tensor.
const SAMPLE: usize = 1024;
/// Tensors up to this size are hashed whole.
const WHOLE: usize = 16 * SAMPLE;

/// Gathers what is hashed while a model is loaded.
pub(crate) struct Fingerprint(Sha256);

impl Fingerprint {
    /// Begins with the configuration.
    pub fn new(config: &ModelConfig) -> Self {
        let mut hash = Sha256::new();
        hash.update(format!("{config:?} {BLOCK_SIZE}"));
        Self(hash)
    }

    /// Adds a tensor that the model uses.
    pub fn add(&mut self, tensor: &RawTensor) {
        self.add_stored(&format!("{tensor:?}"), tensor.bytes());
    }

    /// Adds bytes of a file, which are what `name` says.
    pub fn add_stored(&mut self, name: &str, bytes: &[u8]) {
        self.0.update(format!("{name} {}", bytes.len()));
        if bytes.len() <= WHOLE {
            return self.0.update(bytes);
        }
        for start in [0, bytes.len() / 2, bytes.len() - SAMPLE] {
            self.0.update(&bytes[start..start + SAMPLE]);
        }
    }

    /// Of a model that is cut, from the fingerprints of its ranks in order.
    pub fn of_ranks(ranks: impl Iterator<Item = [u8; 32]>) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update("ranks");
        ranks.for_each(|rank| hash.update(rank));
        hash.finalize().into()
    }

    /// Ends with the backend's name for dtype and layout.
    pub fn finish(mut self, kv_format: &str) -> [u8; 32] {
        self.0.update(kv_format);
        self.0.finalize().into()
    }
}
