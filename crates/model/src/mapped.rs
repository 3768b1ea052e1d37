//! Memory-mapped files.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

use crate::LoadError;

/// Maps a file for reading. An empty file is an error.
pub(crate) fn map(path: &Path) -> Result<Arc<Mmap>, LoadError> {
    let file = File::open(path).map_err(|e| LoadError::io(path, e))?;
    let metadata = file.metadata().map_err(|e| LoadError::io(path, e))?;
    if !metadata.is_file() {
        return Err(LoadError::invalid(path, "not a file"));
    }
    if metadata.len() == 0 {
        return Err(LoadError::invalid(path, "the file is empty; fetch it again"));
    }
    // SAFETY: the mapping is read-only and every length read from it is checked against its size. Weight
    // files are taken to stay as they are while a model is loaded; the cache writes them once, by rename.
    let map = unsafe { Mmap::map(&file) }.map_err(|e| LoadError::io(path, e))?;
    Ok(Arc::new(map))
}
