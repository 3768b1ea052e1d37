//! Memory for packed weights, in huge pages.
//!
//! Weights are streamed once a step, and with pages of 4 KiB the address translations cost more than
//! the bytes. A huge page is 2 MiB and most matrices are not much larger, so matrices share large
//! regions, one after another, and a region is given back when the last of its matrices is.

use crate::{OpError, Result};
use memmap2::{MmapMut, MmapRaw};
use std::sync::{Arc, Mutex, PoisonError};

/// Address space taken at a time. Pages that nothing was written to take no memory.
const REGION: usize = 128 << 20;
const HUGE_PAGE: usize = 2 << 20;
/// Matrices start at a cache line.
const LINE: usize = 64;

/// Bytes inside a region that belong to one owner.
pub(super) struct Memory {
    region: Arc<MmapRaw>,
    start: usize,
    len: usize,
}

/// The region being filled and where its free part begins.
static CURRENT: Mutex<Option<(Arc<MmapRaw>, usize)>> = Mutex::new(None);

impl Memory {
    /// `len` zeroed bytes.
    ///
    /// # Errors
    /// If the system has no more memory.
    pub fn new(len: usize) -> Result<Self> {
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((region, free)) = current.as_mut()
            && region.len() - *free >= len
        {
            let memory = Self { region: region.clone(), start: *free, len };
            *free += len.next_multiple_of(LINE).min(region.len() - *free);
            return Ok(memory);
        }
        let (region, start) = map(len.max(REGION))?;
        let memory = Self { region: region.clone(), start, len };
        if len < REGION {
            *current = Some((region, start + len.next_multiple_of(LINE)));
        }
        Ok(memory)
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the range lies inside the mapping, which lives as long as `self`, is initialised (zeroed by
        // the system) and belongs to `self` alone, whose other accessor borrows it mutably.
        unsafe { std::slice::from_raw_parts(self.region.as_ptr().add(self.start), self.len) }
    }

    /// The bytes, to be filled.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.region.as_mut_ptr().add(self.start), self.len) }
    }
}

/// Maps a region with room for `len` bytes after its first huge-page boundary; returns that too.
fn map(len: usize) -> Result<(Arc<MmapRaw>, usize)> {
    let map = MmapMut::map_anon(len + HUGE_PAGE)
        .map_err(|e| OpError::Backend(format!("cannot allocate {len} bytes for packed weights: {e}")))?;
    #[cfg(target_os = "linux")]
    if let Err(error) = map.advise(memmap2::Advice::HugePage) {
        tracing::debug!(%error, "no huge pages for packed weights");
    }
    let start = map.as_ptr().align_offset(HUGE_PAGE).min(HUGE_PAGE);
    Ok((Arc::new(MmapRaw::from(map)), start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_get_zeroed_bytes_of_their_own() {
        let lengths = [1, 64, 100, 3 << 20, REGION + 5, 7];
        let mut all: Vec<Memory> = lengths.iter().map(|&len| Memory::new(len).unwrap()).collect();
        for (i, memory) in all.iter_mut().enumerate() {
            assert_eq!(memory.bytes().len(), lengths[i]);
            assert!(memory.bytes().iter().all(|&b| b == 0));
            assert_eq!(memory.bytes().as_ptr().align_offset(LINE), 0);
            memory.bytes_mut().fill(i as u8 + 1);
        }
        for (i, memory) in all.iter().enumerate() {
            assert!(memory.bytes().iter().all(|&b| b == i as u8 + 1));
        }
    }
}
