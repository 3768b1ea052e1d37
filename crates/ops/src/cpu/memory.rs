//! Memory for packed weights, activations, keys and values, in huge pages.
//!
//! Weights are streamed once a step, and with pages of 4 KiB the address translations cost more than
//! the bytes; so they do where a multiplication writes a few columns of many rows. A huge page is 2 MiB and most
//! matrices are not much larger, so owners share large regions, one after another, and a region is given back when the last
//! of its owners is.

use crate::{OpError, Result};
use memmap2::{MmapMut, MmapRaw};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, Mutex, PoisonError};

/// Address space taken at a time. Pages that were neither written to nor provided take no memory.
const REGION: usize = 128 << 20;
pub(super) const HUGE_PAGE: usize = 2 << 20;
/// Bytes of a cache line. What is owned starts at one.
pub(super) const LINE: usize = 64;

/// `x` from its first cache line on: no vector from there spans two. There are [`LINE`] bytes more in `x` than are wanted.
pub(super) fn from_line<T>(x: &mut [T]) -> &mut [T] {
    let skipped = x.as_ptr().align_offset(LINE).min(LINE / size_of::<T>());
    &mut x[skipped..]
}

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

    /// Has the system provide the huge pages that a range of the bytes lies in, where it can; else they come as they are written to.
    pub fn provide(&self, range: Range<usize>) {
        let at = self.region.as_ptr().wrapping_add(self.start) as usize;
        let first = (at + range.start) / HUGE_PAGE * HUGE_PAGE;
        let last = (at + range.end).next_multiple_of(HUGE_PAGE);
        let (first, last) = (first.max(at) - at, last.min(at + self.len) - at);
        #[cfg(target_os = "linux")]
        if let Err(error) =
            self.region.advise_range(memmap2::Advice::PopulateWrite, self.start + first, last - first)
        {
            tracing::debug!(%error, "memory is not provided ahead");
        }
        #[cfg(not(target_os = "linux"))]
        let _ = (first, last);
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
        .map_err(|e| OpError::Backend(format!("cannot allocate {len} bytes: {e}")))?;
    #[cfg(target_os = "linux")]
    if let Err(error) = map.advise(memmap2::Advice::HugePage) {
        tracing::debug!(%error, "no huge pages");
    }
    let start = map.as_ptr().align_offset(HUGE_PAGE).min(HUGE_PAGE);
    Ok((Arc::new(MmapRaw::from(map)), start))
}

/// A type of numbers.
///
/// # Safety
/// Bytes of zero are a value of it, and it is aligned to no more than a cache line.
pub(super) unsafe trait Number: Copy {}

// SAFETY: every pattern of bits is a value of these.
unsafe impl Number for u16 {}
// SAFETY: as above.
unsafe impl Number for [u16; 1] {}
// SAFETY: as above.
unsafe impl Number for u32 {}
// SAFETY: as above.
unsafe impl Number for f32 {}

/// Numbers, zeros at first, in such memory. What was neither written to nor provided takes none.
pub(super) struct Numbers<T> {
    memory: Memory,
    number: PhantomData<T>,
}

impl<T: Number> Numbers<T> {
    /// `len` zeros.
    ///
    /// # Errors
    /// If the system has no more memory.
    pub fn new(len: usize) -> Result<Self> {
        let bytes = len.checked_mul(size_of::<T>()).filter(|&bytes| bytes <= isize::MAX as usize - HUGE_PAGE);
        let bytes = bytes.ok_or_else(|| OpError::Backend(format!("cannot allocate {len} numbers")))?;
        Ok(Self { memory: Memory::new(bytes)?, number: PhantomData })
    }

    /// [`Memory::provide`] of a range of numbers.
    pub fn provide(&self, range: Range<usize>) {
        self.memory.provide(range.start * size_of::<T>()..range.end * size_of::<T>());
    }
}

impl<T: Number> Deref for Numbers<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        let bytes = self.memory.bytes();
        // SAFETY: the bytes start at a cache line, and were zeros or numbers of this type ever since.
        unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len() / size_of::<T>()) }
    }
}

impl<T: Number> DerefMut for Numbers<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        let bytes = self.memory.bytes_mut();
        // SAFETY: as in `deref`.
        unsafe { std::slice::from_raw_parts_mut(bytes.as_mut_ptr().cast(), bytes.len() / size_of::<T>()) }
    }
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

    #[test]
    fn providing_memory_changes_nothing_in_it_or_beside_it() {
        let mut all: Vec<Memory> =
            [100, 3 * HUGE_PAGE + 5, 0, 64].map(|len| Memory::new(len).unwrap()).into();
        for (i, memory) in all.iter_mut().enumerate() {
            memory.bytes_mut().fill(i as u8 + 1);
        }
        for memory in &all {
            let len = memory.bytes().len();
            for range in [0..len, len / 3..len / 2, len..len] {
                memory.provide(range);
            }
        }
        for (i, memory) in all.iter().enumerate() {
            assert!(memory.bytes().iter().all(|&b| b == i as u8 + 1));
        }
    }

    #[test]
    fn numbers_are_zeros_that_can_be_written_and_too_many_are_an_error() {
        let mut numbers = Numbers::<f32>::new(1000).unwrap();
        assert!(numbers.len() == 1000 && numbers.iter().all(|&x| x == 0.0));
        numbers[999] = 1.5;
        assert_eq!(numbers[998..], [0.0, 1.5]);
        for len in [usize::MAX, usize::MAX / 4, 1 << 58] {
            assert!(Numbers::<f32>::new(len).is_err());
        }
    }
}
