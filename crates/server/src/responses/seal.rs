//! Reasoning handed to clients for safe keeping: readable by this server alone, and unforgeable.
//!
//! `encrypted_content` is base64 of a version, a tag (HMAC-SHA-256, cut to 16 bytes) and the text. Clients
//! that may read reasoning get its text beside it, so it is authenticated and not hidden.

use std::io::{self, Write};
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// The key's name in a data folder.
const KEY_FILE: &str = "seal.key";
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

    /// The key of a data folder, made if there is none yet.
    ///
    /// # Errors
    /// If the folder cannot be read or written, or its key is damaged.
    pub fn of_folder(folder: &Path) -> io::Result<Self> {
        let path = folder.join(KEY_FILE);
        let at = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        match std::fs::read(&path) {
            Ok(bytes) => match bytes.try_into() {
                Ok(key) => Ok(Self::new(key)),
                Err(_) => {
                    Err(at(io::Error::other("this is no key of 32 bytes; remove it to have a new one made")))
                }
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let seal = Self::random().map_err(io::Error::other)?;
                write_private(folder, &path, &seal.key).map_err(at)?;
                Ok(seal)
            }
            Err(error) => Err(at(error)),
        }
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

/// Writes a file that only its owner may read; the folder is made so too, if it is not there.
fn write_private(folder: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let (mut make, mut open) = (std::fs::DirBuilder::new(), std::fs::OpenOptions::new());
    make.recursive(true);
    open.write(true).create_new(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
        make.mode(0o700);
        open.mode(0o600);
    }
    make.create(folder)?;
    // Whole or not at all, should the process end meanwhile.
    let partial = path.with_extension(format!("{}.partial", std::process::id()));
    open.open(&partial)?.write_all(bytes)?;
    std::fs::rename(partial, path)
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

    #[test]
    fn a_folder_keeps_its_key() {
        let folder = tempfile::TempDir::new().unwrap();
        let folder = folder.path().join("new");
        let sealed = Seal::of_folder(&folder).unwrap().close("think");
        assert_eq!(Seal::of_folder(&folder).unwrap().open(&sealed).as_deref(), Some("think"));
        std::fs::write(folder.join(KEY_FILE), "short").unwrap();
        assert!(Seal::of_folder(&folder).is_err());
    }
}
