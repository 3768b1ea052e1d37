//! Reasoning handed to clients for safe keeping: readable by this server alone, and unforgeable.
//!
//! `encrypted_content` is base64 of a version, a tag (HMAC-SHA-256, cut to 16 bytes) and the text. Clients
//! that may read reasoning get its text beside it, so it is authenticated and not hidden.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

const VERSION: u8 = 1;
const TAG: usize = 16;

/// The key of a data directory, or of a process without one.
pub(crate) struct Seal {
    key: [u8; 32],
}

impl Seal {
    /// Seals with `key`.
    pub fn new(key: [u8; 32]) -> Self {
        Self { key }
    }

    /// A key for as long as this process runs.
    ///
    /// # Errors
    /// If the system has no randomness to give.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut key = [0; 32];
        getrandom::fill(&mut key)?;
        Ok(Self { key })
    }

    /// Seals a text.
    pub fn close(&self, text: &str) -> String {
        let mut sealed = Vec::with_capacity(1 + TAG + text.len());
        sealed.push(VERSION);
        sealed.extend_from_slice(&self.tag(text));
        sealed.extend_from_slice(text.as_bytes());
        STANDARD.encode(sealed)
    }

    /// The text, if it was sealed here and has not been touched.
    pub fn open(&self, sealed: &str) -> Option<String> {
        let bytes = STANDARD.decode(sealed).ok()?;
        let (&version, rest) = bytes.split_first()?;
        let (tag, text) = rest.split_at_checked(TAG)?;
        let text = std::str::from_utf8(text).ok()?;
        let same = self.tag(text).iter().zip(tag).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0;
        (version == VERSION && same).then(|| text.to_owned())
    }

    fn tag(&self, text: &str) -> [u8; TAG] {
        // HMAC takes keys of any length.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&self.key) else { return [0; TAG] };
        mac.update(text.as_bytes());
        let whole = mac.finalize().into_bytes();
        std::array::from_fn(|index| whole[index])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_sealed_opens_under_the_same_key_alone() {
        let seal = Seal::random().unwrap();
        for text in ["", "a thought", "gedächtnis \u{1f9e0}\n"] {
            let sealed = seal.close(text);
            assert_eq!(seal.open(&sealed).as_deref(), Some(text));
            assert_eq!(Seal::random().unwrap().open(&sealed), None);
        }
    }

    #[test]
    fn no_changed_byte_goes_unnoticed() {
        let seal = Seal::new([7; 32]);
        let whole = STANDARD.decode(seal.close("think")).unwrap();
        for index in 0..whole.len() {
            let mut changed = whole.clone();
            changed[index] ^= 1;
            assert_eq!(seal.open(&STANDARD.encode(&changed)), None, "{index}");
            assert_eq!(seal.open(&STANDARD.encode(&whole[..index])), None, "{index}");
        }
        assert_eq!(seal.open("no base64!"), None);
    }
}
