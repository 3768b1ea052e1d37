//! SHA-256 on the fly: what is written is hashed, so a file is never read a second time.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::HubError;

/// A file being written, with the SHA-256 and length of all that is in it so far.
pub struct Sha256Writer {
    file: File,
    path: PathBuf,
    hash: Sha256,
    length: u64,
}

impl Sha256Writer {
    /// Starts an empty file.
    ///
    /// # Errors
    /// If the file cannot be made.
    pub fn create(path: &Path) -> Result<Self, HubError> {
        let file = File::create(path).map_err(HubError::io("create", path))?;
        Ok(Self { file, path: path.to_owned(), hash: Sha256::new(), length: 0 })
    }

    /// Goes on at the end of a file that may be there already; what it holds is hashed first.
    ///
    /// # Errors
    /// If the file cannot be read or written.
    pub fn append(path: &Path) -> Result<Self, HubError> {
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .map_err(HubError::io("open", path))?;
        let (mut hash, mut length, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 20]);
        loop {
            let n = file.read(&mut buffer).map_err(HubError::io("read", path))?;
            if n == 0 {
                return Ok(Self { file, path: path.to_owned(), hash, length });
            }
            hash.update(&buffer[..n]);
            length += n as u64;
        }
    }

    /// Bytes in the file.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Adds bytes.
    ///
    /// # Errors
    /// If the disk is full or fails.
    pub fn write(&mut self, data: &[u8]) -> Result<(), HubError> {
        self.file.write_all(data).map_err(HubError::io("write", &self.path))?;
        self.hash.update(data);
        self.length += data.len() as u64;
        Ok(())
    }

    /// Flushes the file to disk, and deletes it if it is not what was expected.
    ///
    /// # Errors
    /// [`HubError::Corrupt`] when length or SHA-256 are not the expected ones.
    pub fn finish(self, size: u64, sha256: Option<&str>) -> Result<(), HubError> {
        let found: String = self.hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        let corrupt = |expected: String, found: String| {
            remove(&self.path)?;
            Err(HubError::Corrupt { what: self.path.display().to_string(), expected, found })
        };
        if self.length != size {
            return corrupt(format!("{size} bytes"), format!("{} bytes", self.length));
        }
        if let Some(expected) = sha256.filter(|s| *s != found) {
            return corrupt(format!("SHA-256 {expected}"), found);
        }
        self.file.sync_all().map_err(HubError::io("write", &self.path))
    }
}

/// Removes a file or folder that may not be there.
pub(crate) fn remove(path: &Path) -> Result<(), HubError> {
    let removed = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(HubError::io("remove", path)(e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // SHA-256 of "abc", from FIPS 180-4's examples.
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

    #[test]
    fn an_appended_file_has_the_hash_of_the_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "ab").unwrap();
        let mut w = Sha256Writer::append(&path).unwrap();
        assert_eq!(w.length(), 2);
        w.write(b"c").unwrap();
        w.finish(3, Some(ABC)).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"abc");
    }

    #[test]
    fn a_wrong_length_or_hash_deletes_the_file() {
        let dir = tempfile::tempdir().unwrap();
        for (data, size) in [("abd", 3), ("abcd", 3), ("ab", 3)] {
            let path = dir.path().join("f");
            let mut w = Sha256Writer::create(&path).unwrap();
            w.write(data.as_bytes()).unwrap();
            assert!(matches!(w.finish(size, Some(ABC)), Err(HubError::Corrupt { .. })), "{data}");
            assert!(!path.exists(), "{data}");
        }
    }
}
