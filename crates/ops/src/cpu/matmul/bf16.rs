//! The inner loops over BF16 weights, plain or [`compact`].
//!
//! As in [`kernel`](super::kernel), an output is summed over its inputs in one fixed order, and compact weights are
//! widened to the very vectors that plain ones lie in, so that both give the same bits. Few rows are memory's
//! work: compact weights are widened in registers, record by record. For many rows, which are arithmetic's, the first of them leave what
//! they widen of a group of tiles in memory that stays in the cache and serves the others.

use super::compact::{self, HEADER_BYTES, Patches, RECORD_BYTES, TABLE_BYTES};
use super::kernel::{
    AHEAD, Input, Job, MANY_ROWS, ROW_BLOCK, part_of, passes, prefetch, prefetch_second, store, with_rows,
};
use super::layout::{LANES, tile_bytes};
use super::unit::{Unit, VECTOR};
use crate::DType;
use crate::cpu::memory::LINE;
use std::ops::Range;

/// Rows of a register tile, which is two tiles of weights wide.
pub(super) const ROWS: usize = 6;

/// What a job needs beside its tiles where they are compact.
#[derive(Clone, Copy)]
pub(super) struct Compact<'a> {
    /// The patches of all tiles of the part.
    pub patches: &'a [u32],
    /// Room for [`group_tiles`] of the job's width in their plain form. A job of fewer than [`MANY_ROWS`] rows needs none.
    pub room: *mut u8,
    /// The part's tiles that this thread is likely to take next, if any.
    pub next: &'a [u8],
}

/// Vectors of a plain tile, one for each pair of inputs.
fn pairs(job: &Job<'_>) -> usize {
    job.width.div_ceil(2)
}

/// The loop over a job with BF16 weights.
///
/// # Safety
/// See [`Kernel`](super::kernel::Kernel); compact tiles are as [`compact::Table::pack`] made them, and their room is
/// this call's alone.
#[inline(always)]
pub(super) unsafe fn bf16<U: Unit>(job: &Job<'_>) {
    let Input::Pairs(x) = job.input else { unreachable!("bf16 weights take bf16 rows") };
    // SAFETY: as the caller promises.
    unsafe {
        if job.rows >= MANY_ROWS && (U::MANY || job.compact.is_some()) {
            return many::<U>(job, x);
        }
        for (tile, row, count) in passes::<U>(job) {
            let ahead = if row % ROW_BLOCK == 0 { AHEAD } else { 0 };
            let bytes = job.tiles[tile * job.tile_bytes..][..job.tile_bytes].as_ptr();
            match job.compact {
                Some(compact) => compact_pass::<U>(job, x, compact, bytes, tile, row, count, ahead),
                None => pass::<U>(job, x, bytes, tile, row, count, ahead),
            }
        }
    }
}

/// `count` rows, as many as [`passes`] gives, times one plain tile.
///
/// # Safety
/// See [`bf16`]; `weights` holds the tile, and the tile and the rows are of the job.
#[inline(always)]
unsafe fn pass<U: Unit>(
    job: &Job<'_>,
    x: &[u32],
    weights: *const u8,
    tile: usize,
    row: usize,
    count: usize,
    ahead: usize,
) {
    let pairs = pairs(job);
    let x = x[row * pairs..][..count * pairs].as_ptr();
    // SAFETY: `weights` and `x` hold a tile and `count` rows of `pairs` pairs; the rest as promised.
    unsafe {
        with_rows!(U, count, R => store::<U, R>(job, tile, row, rows::<U, R>(weights, x, pairs, ahead)))
    }
}

/// [`pass`] for a compact tile.
///
/// # Safety
/// As there.
#[allow(clippy::too_many_arguments)] // pass's, and where the patches are
#[inline(always)]
unsafe fn compact_pass<U: Unit>(
    job: &Job<'_>,
    x: &[u32],
    Compact { patches, .. }: Compact<'_>,
    bytes: *const u8,
    tile: usize,
    row: usize,
    count: usize,
    ahead: usize,
) {
    let pairs = pairs(job);
    let x = x[row * pairs..][..count * pairs].as_ptr();
    // SAFETY: `bytes` and `x` hold a compact tile and `count` rows of `pairs` pairs; the rest as promised.
    unsafe {
        with_rows!(U, count, R => {
            store::<U, R>(job, tile, row, compact_rows::<U, R>(bytes, patches, x, pairs, ahead, None))
        })
    }
}

/// Many rows, on units with the registers for it six of them times two tiles at a time. As many loads as dot products
/// start in a cycle; a row times a tile takes a load for each dot product, this way two for three. Plain weights that are computed with are
/// not fetched ahead, for that takes the place of a load.
///
/// All rows go over a group of tiles before the next: its weights come from the second-level cache, and a few rows' activations are read
/// once for the whole group. The first rows widen its tiles as they meet them, so that the one hides behind the other. Meanwhile the
/// compact tiles of the next group are fetched from memory, a share with each few rows, so that widening does not wait for them.
///
/// # Safety
/// See [`bf16`].
#[inline(always)]
unsafe fn many<U: Unit>(job: &Job<'_>, x: &[u32]) {
    let (tiles, pairs) = (job.outputs.div_ceil(LANES), pairs(job));
    let first = if job.compact.is_some() { part_of::<U>(job.rows) } else { 0 };
    let step = if U::MANY { ROWS } else { part_of::<U>(job.rows) };
    let shares = (job.rows - first).div_ceil(step);
    let mut groups = groups(tiles, group_tiles(job.width)).peekable();
    while let Some(group) = groups.next() {
        let next = widened_next(job.tiles, job.tile_bytes, job.compact, groups.peek(), group.len());
        let bytes = job.tiles[group.start * job.tile_bytes..group.end * job.tile_bytes].as_ptr();
        let (weights, tile_bytes) = match job.compact {
            None => (bytes, job.tile_bytes),
            Some(Compact { patches, room, .. }) => {
                let x = x[..first * pairs].as_ptr();
                for i in 0..group.len() {
                    // SAFETY: the tiles and the rows are of the job, and the room is for a group.
                    unsafe {
                        let (from, plain) = (bytes.add(i * job.tile_bytes), room.add(i * pairs * VECTOR));
                        with_rows!(U, first, R => {
                            let sums = compact_rows::<U, R>(from, patches, x, pairs, AHEAD, Some(plain));
                            store::<U, R>(job, group.start + i, 0, sums);
                        });
                    }
                }
                (room.cast_const(), pairs * VECTOR)
            }
        };
        for (share, row) in (first..job.rows).step_by(step).enumerate() {
            fetch(next, share, shares);
            let last = job.rows.min(row + step);
            let twos = if U::MANY && last - row == ROWS { group.len() / 2 * 2 } else { 0 };
            for i in (0..twos).step_by(2) {
                let (tile, x) = (group.start + i, x[row * pairs..][..ROWS * pairs].as_ptr());
                // SAFETY: `weights` and `x` hold the group's tiles and the rows of `pairs` pairs; the rest as promised.
                unsafe {
                    let two = [weights.add(i * tile_bytes), weights.add((i + 1) * tile_bytes)];
                    let [one, two] = two_tiles::<U, ROWS>(two, x, pairs);
                    store::<U, ROWS>(job, tile, row, one);
                    store::<U, ROWS>(job, tile + 1, row, two);
                }
            }
            // What is left: fewer rows, or one tile.
            for i in twos..group.len() {
                let mut row = row;
                while row < last {
                    let rows = part_of::<U>(last - row);
                    // SAFETY: the tile and the rows are of the job; the rest as promised.
                    unsafe {
                        pass::<U>(job, x, weights.add(i * tile_bytes), group.start + i, row, rows, 0);
                    }
                    row += rows;
                }
            }
        }
    }
}

/// Most tiles of `width` inputs that [`many`] rows go over together: as many as leave room in a second-level cache of a megabyte, and
/// at least two.
pub(super) fn group_tiles(width: usize) -> usize {
    const BYTES: usize = 640 << 10;
    (BYTES / tile_bytes(DType::BF16, width) / 2 * 2).max(2)
}

/// `tiles` tiles in groups of about one size, of whole twos but for the last, at most `most` and a number of twos.
pub(super) fn groups(tiles: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let count = tiles.div_ceil(most);
    let size = tiles.div_ceil(count).next_multiple_of(2);
    (0..tiles).step_by(size).map(move |first| first..tiles.min(first + size))
}

/// The compact tiles that are widened after a group: `group`, the next one of a job's `tiles` of `tile_bytes` each, or as many as `most` of what
/// comes after the job. None where tiles are plain.
#[inline(always)]
pub(super) fn widened_next<'a>(
    tiles: &'a [u8],
    tile_bytes: usize,
    compact: Option<Compact<'a>>,
    group: Option<&Range<usize>>,
    most: usize,
) -> &'a [u8] {
    match (compact, group) {
        (None, _) => &[],
        (Some(_), Some(group)) => &tiles[group.start * tile_bytes..group.end * tile_bytes],
        (Some(Compact { next, .. }), None) => &next[..next.len().min(most * tile_bytes)],
    }
}

/// Starts fetching a share of `tiles` to the second-level cache, `share` of `shares`.
#[inline(always)]
pub(super) fn fetch(tiles: &[u8], share: usize, shares: usize) {
    let lines = tiles.len().div_ceil(LINE);
    for line in share * lines / shares..(share + 1) * lines / shares {
        prefetch_second(tiles.as_ptr().wrapping_add(line * LINE));
    }
}

/// `R` rows times one plain tile: even and odd pairs of inputs in an accumulator each, then their sum.
///
/// # Safety
/// `weights` holds a tile of `pairs` pairs; `x` holds `R` rows of them.
#[inline(always)]
pub(super) unsafe fn rows<U: Unit, const R: usize>(
    weights: *const u8,
    x: *const u32,
    pairs: usize,
    ahead: usize,
) -> [U::Floats; R] {
    // SAFETY: `at` stays below `pairs`.
    unsafe {
        let mut even = [U::splat(0.0); R];
        let mut odd = [U::splat(0.0); R];
        for at in (0..pairs / 2).map(|two| 2 * two) {
            let from = weights.add(at * VECTOR);
            prefetch(from.wrapping_add(ahead), 2 * VECTOR);
            let (a, b) = (U::load_bytes(from), U::load_bytes(from.add(VECTOR)));
            for r in 0..R {
                let x = x.add(r * pairs + at);
                even[r] = U::dot_bf16(even[r], a, *x);
                odd[r] = U::dot_bf16(odd[r], b, *x.add(1));
            }
        }
        if pairs % 2 == 1 {
            let a = U::load_bytes(weights.add((pairs - 1) * VECTOR));
            for (r, even) in even.iter_mut().enumerate() {
                *even = U::dot_bf16(*even, a, *x.add(r * pairs + pairs - 1));
            }
        }
        for (even, odd) in even.iter_mut().zip(odd) {
            *even = U::add(*even, odd);
        }
        even
    }
}

/// `R` rows times two plain tiles, each output summed as in [`rows`].
///
/// # Safety
/// `weights` are tiles of `pairs` pairs; `x` holds `R` rows of them.
#[inline(always)]
pub(super) unsafe fn two_tiles<U: Unit, const R: usize>(
    weights: [*const u8; 2],
    x: *const u32,
    pairs: usize,
) -> [[U::Floats; R]; 2] {
    // SAFETY: `at + half` stays below `pairs`.
    unsafe {
        // Of each row, for even and odd pairs, of both tiles.
        let mut sums = [[[U::splat(0.0); 2]; 2]; R];
        for at in (0..pairs / 2).map(|two| 2 * two) {
            for half in 0..2 {
                let from = (at + half) * VECTOR;
                let (a, b) = (U::load_bytes(weights[0].add(from)), U::load_bytes(weights[1].add(from)));
                for (r, sums) in sums.iter_mut().enumerate() {
                    let x = *x.add(r * pairs + at + half);
                    sums[half][0] = U::dot_bf16(sums[half][0], a, x);
                    sums[half][1] = U::dot_bf16(sums[half][1], b, x);
                }
            }
        }
        if pairs % 2 == 1 {
            let from = (pairs - 1) * VECTOR;
            let (a, b) = (U::load_bytes(weights[0].add(from)), U::load_bytes(weights[1].add(from)));
            for (r, sums) in sums.iter_mut().enumerate() {
                let x = *x.add(r * pairs + pairs - 1);
                sums[0][0] = U::dot_bf16(sums[0][0], a, x);
                sums[0][1] = U::dot_bf16(sums[0][1], b, x);
            }
        }
        let mut out = [[U::splat(0.0); R]; 2];
        for (r, [even, odd]) in sums.into_iter().enumerate() {
            for tile in 0..2 {
                out[tile][r] = U::add(even[tile], odd[tile]);
            }
        }
        out
    }
}

/// `R` rows times one compact tile, each output summed as in [`rows`]. Writes the tile's plain form to `plain`, if that is given.
///
/// # Safety
/// `tile` holds a compact tile of `pairs` pairs, whose patches are among `patches`; `x` holds `R` rows of `pairs` pairs, and `plain` has
/// room for as many vectors.
#[inline(always)]
pub(super) unsafe fn compact_rows<U: Unit, const R: usize>(
    tile: *const u8,
    patches: &[u32],
    x: *const u32,
    pairs: usize,
    ahead: usize,
    plain: Option<*mut u8>,
) -> [U::Floats; R] {
    // SAFETY: the tile is a header and a record for each four pairs.
    unsafe {
        let (table, mut patches) = header(tile, patches);
        let mut even = [U::splat(0.0); R];
        let mut odd = [U::splat(0.0); R];
        for record in 0..pairs / 4 {
            let from = tile.add(HEADER_BYTES + record * RECORD_BYTES);
            prefetch(from.wrapping_add(ahead), RECORD_BYTES);
            let [a, b, c, d] = widen::<U>(from, &table, record, &mut patches);
            if let Some(plain) = plain {
                let to = plain.add(4 * record * VECTOR);
                U::store_bytes(a, to);
                U::store_bytes(b, to.add(VECTOR));
                U::store_bytes(c, to.add(2 * VECTOR));
                U::store_bytes(d, to.add(3 * VECTOR));
            }
            for r in 0..R {
                let x = x.add(r * pairs + 4 * record);
                even[r] = U::dot_bf16(even[r], a, *x);
                odd[r] = U::dot_bf16(odd[r], b, *x.add(1));
                even[r] = U::dot_bf16(even[r], c, *x.add(2));
                odd[r] = U::dot_bf16(odd[r], d, *x.add(3));
            }
        }
        for (even, odd) in even.iter_mut().zip(odd) {
            *even = U::add(*even, odd);
        }
        even
    }
}

/// A compact tile's table and patches.
///
/// # Safety
/// `tile` holds a compact tile.
#[inline(always)]
unsafe fn header(tile: *const u8, patches: &[u32]) -> ([u8; TABLE_BYTES], Patches<'_>) {
    // SAFETY: the header is that long.
    let header = unsafe { &*tile.cast::<[u8; HEADER_BYTES]>() };
    compact::header(header, patches)
}

/// The four plain vectors of a record: the high bytes that its codes stand for beside the low bytes.
///
/// # Safety
/// `from` holds a record.
#[inline(always)]
unsafe fn widen<U: Unit>(
    from: *const u8,
    table: &[u8; TABLE_BYTES],
    record: usize,
    patches: &mut Patches<'_>,
) -> [U::Bytes; 4] {
    // SAFETY: a record is three vectors; `bytes` is two.
    unsafe {
        let codes = U::load_bytes(from);
        let mut high =
            [U::lookup(table, U::field::<0>(codes, 15)), U::lookup(table, U::field::<4>(codes, 15))];
        if patches.are_due(record) {
            let mut bytes = [0; 2 * VECTOR];
            U::store_bytes(high[0], bytes.as_mut_ptr());
            U::store_bytes(high[1], bytes.as_mut_ptr().add(VECTOR));
            patches.apply(record, &mut bytes);
            high = [U::load_bytes(bytes.as_ptr()), U::load_bytes(bytes.as_ptr().add(VECTOR))];
        }
        let [a, b] = U::interleave(U::load_bytes(from.add(VECTOR)), high[0]);
        let [c, d] = U::interleave(U::load_bytes(from.add(2 * VECTOR)), high[1]);
        [a, b, c, d]
    }
}
