//! Memory-mapped files.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;
use rudder_ops::RawTensor;

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

/// Gives back the pages of a tensor that lies in `map`. They stay in the system's cache, where a later
/// read finds them, and no longer count as this process's memory. A part that was copied out of it is left alone.
#[cfg(unix)]
pub(crate) fn release(map: &Mmap, tensor: &RawTensor) {
    let (bytes, mapped) = (tensor.bytes(), map.as_ptr_range());
    if bytes.as_ptr() < mapped.start || bytes.as_ptr_range().end > mapped.end {
        return;
    }
    let offset = bytes.as_ptr() as usize - map.as_ptr() as usize;
    // SAFETY: the mapping is read-only and of a file, so its pages can be read again at any time.
    let given =
        unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset, bytes.len()) };
    drop(given); // where the system declines, the pages stay, which harms nothing
}

/// Other systems are not told.
#[cfg(not(unix))]
pub(crate) fn release(_map: &Mmap, _tensor: &RawTensor) {}
