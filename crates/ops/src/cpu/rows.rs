//! Spreading an op's rows over the pool.

use super::pool::Pool;
use std::marker::PhantomData;
use std::ops::Range;

/// Elements below which an op is done sooner on one thread than handed out.
const SMALL: usize = 16 * 1024;

/// Calls `job` with ranges that together are `0..rows`, on several threads unless `rows` rows of
/// `width` elements are little work.
pub(super) fn for_rows(pool: &Pool, rows: usize, width: usize, job: impl Fn(Range<usize>) + Sync) {
    if rows * width < SMALL || pool.threads() == 1 {
        return job(0..rows);
    }
    let chunk = rows.div_ceil(4 * pool.threads());
    pool.run(rows.div_ceil(chunk), |part| job(part * chunk..rows.min((part + 1) * chunk)));
}

/// A slice of which several threads write parts that do not overlap.
pub(super) struct Disjoint<'a, T> {
    start: *mut T,
    len: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for a `&mut [T]` whose parts go to several threads.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), slice: PhantomData }
    }

    /// A part of the slice.
    ///
    /// # Safety
    /// No other part that is alive overlaps it.
    ///
    /// # Panics
    /// If the part is not inside the slice.
    #[allow(clippy::mut_from_ref)] // what the type is for
    pub unsafe fn part(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: inside the slice that `self` borrows mutably, and exclusive as the caller promises.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(range.start), range.len()) }
    }
}
