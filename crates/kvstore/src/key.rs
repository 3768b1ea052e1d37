//! What names a block: a chain of SHA-256 over the model and all tokens up to the block's end.

use sha2::{Digest, Sha256};

/// Tokens in one block; the engine checks that it equals the op set's.
pub const BLOCK_TOKENS: usize = 16;

/// What keys and values depend on beside the tokens: configuration, weights, dtype and layout, hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 32]);

/// Names the block that ends a token prefix; see the module.
///
/// A cryptographic hash, since a collision would hand one conversation the keys and values of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockKey(pub [u8; 32]);

impl BlockKey {
    /// What the first block of every prefix continues.
    pub fn root(fingerprint: &Fingerprint) -> Self {
        Self(fingerprint.0)
    }

    /// The key of the block that continues this one with `tokens`.
    pub fn child(&self, tokens: &[u32; BLOCK_TOKENS]) -> Self {
        let mut bytes = [0; 32 + 4 * BLOCK_TOKENS];
        bytes[..32].copy_from_slice(&self.0);
        for (to, token) in bytes[32..].chunks_exact_mut(4).zip(tokens) {
            to.copy_from_slice(&token.to_le_bytes());
        }
        Self(Sha256::digest(bytes).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_depends_on_the_model_every_token_and_their_order() {
        let root = BlockKey::root(&Fingerprint([1; 32]));
        let (a, b) = ([3; BLOCK_TOKENS], [4; BLOCK_TOKENS]);
        assert_eq!(root.child(&a).child(&b), root.child(&a).child(&b));
        assert_ne!(root.child(&a).child(&b), root.child(&b).child(&a));
        assert_ne!(root.child(&a), BlockKey::root(&Fingerprint([2; 32])).child(&a));
        for at in 0..BLOCK_TOKENS {
            let mut other = a;
            other[at] ^= 1 << 31;
            assert_ne!(root.child(&a), root.child(&other), "token {at}");
        }
    }
}
