//! Gate and up in BF16 with their activation behind them, for many rows.
//!
//! Tiles of the gate and of up that make the same outputs are multiplied in twos, as [`bf16`](super::bf16) does with neighbours, so that
//! both lie in registers when they are joined. What goes to memory is what *down* reads: pairs of bf16, an eighth of the two products in f32.
//! Every product is summed and every output rounded as it is in two multiplications, an activation and a conversion.

use super::bf16::{Compact, ROWS, compact_rows, fetch, group_tiles, groups, rows, two_tiles, widened_next};
use super::kernel::{AHEAD, part_of, with_rows};
use super::layout::LANES;
use super::unit::{Unit, VECTOR};
use crate::Activation;
use crate::cpu::activation::gated_vector;
use crate::cpu::simd::Simd;
use std::ops::Range;

/// Consecutive tiles of gate and up times all rows.
pub(super) struct Job<'a> {
    pub activation: Activation,
    /// Gate and up.
    pub halves: [Half<'a>; 2],
    /// Tiles of each.
    pub tiles: usize,
    pub width: usize,
    pub rows: usize,
    /// `[rows, width / 2]` rounded up, pairs of bf16.
    pub x: &'a [u32],
    /// Where row 0 of the first tile's first pair of outputs goes.
    pub out: *mut u32,
    /// Pairs between rows of `out`.
    pub stride: usize,
}

/// The gate's tiles, or up's.
pub(super) struct Half<'a> {
    pub tiles: &'a [u8],
    pub tile_bytes: usize,
    /// Where they are compact; the room is for [`group_tiles`] of both halves together.
    pub compact: Option<Compact<'a>>,
    /// Biases of the tiles' outputs.
    pub bias: Option<&'a [f32]>,
}

/// The loop over a job, for one unit.
///
/// # Safety
/// As of [`kernel::Kernel`](super::kernel::Kernel), `out` being valid for writes of eight pairs a tile in each row.
pub(super) type Kernel = unsafe fn(&Job<'_>);

/// The loop over a job.
///
/// # Safety
/// See [`Kernel`]; compact tiles are as [`bf16`](super::bf16::bf16) wants them.
#[inline(always)]
pub(super) unsafe fn gated<U: Unit>(job: &Job<'_>) {
    let pairs = job.width.div_ceil(2);
    let widens = job.halves.iter().any(|half| half.compact.is_some());
    let first = if widens { part_of::<U>(job.rows) } else { 0 };
    let step = if U::MANY { ROWS } else { part_of::<U>(job.rows) };
    let shares = (job.rows - first).div_ceil(step);
    let mut groups = groups(job.tiles, (group_tiles(job.width) / 4 * 2).max(2)).peekable();
    while let Some(group) = groups.next() {
        let following = groups.peek();
        let next = |half: usize| {
            let Half { tiles, tile_bytes, compact, .. } = &job.halves[half];
            widened_next(tiles, *tile_bytes, *compact, following, group.len())
        };
        let next = [next(0), next(1)];
        let [gates, ups] = [half(job, 0, &group, pairs), half(job, 1, &group, pairs)];
        let to_widen = if widens { 0..group.len() } else { 0..0 };
        for i in to_widen {
            // SAFETY: the tiles and rows are of the job, and the room is for a group.
            unsafe {
                with_rows!(U, first, R => {
                    let both = [widened::<U, R>(job, gates, i, pairs), widened::<U, R>(job, ups, i, pairs)];
                    store::<U, R>(job, group.start + i, 0, both);
                });
            }
        }
        let at = |i: usize| [gates.plain(i), ups.plain(i)];
        for (share, row) in (first..job.rows).step_by(step).enumerate() {
            for next in next {
                fetch(next, share, shares);
            }
            let last = job.rows.min(row + step);
            if U::MANY && last - row == ROWS {
                let x = job.x[row * pairs..][..ROWS * pairs].as_ptr();
                for i in 0..group.len() {
                    // SAFETY: `at` and `x` hold tiles and rows of `pairs` pairs; the rest as promised.
                    unsafe {
                        let both = two_tiles::<U, ROWS>(at(i), x, pairs);
                        store::<U, ROWS>(job, group.start + i, row, both);
                    }
                }
                continue;
            }
            for i in 0..group.len() {
                let mut row = row;
                while row < last {
                    let count = part_of::<U>(last - row);
                    let x = job.x[row * pairs..][..count * pairs].as_ptr();
                    // SAFETY: as above.
                    unsafe {
                        with_rows!(U, count, R => {
                            let [gate, up] = at(i);
                            let both = [rows::<U, R>(gate, x, pairs, 0), rows::<U, R>(up, x, pairs, 0)];
                            store::<U, R>(job, group.start + i, row, both);
                        });
                    }
                    row += count;
                }
            }
        }
    }
}

/// The tiles of a group's half as they are and as they are computed with.
#[derive(Clone, Copy)]
struct Group<'a> {
    tiles: *const u8,
    tile_bytes: usize,
    compact: Option<Compact<'a>>,
    /// Where compact tiles' plain form goes, those of gate and up by turns.
    room: *mut u8,
    plain_bytes: usize,
}

impl Group<'_> {
    /// A tile in its plain form.
    #[inline(always)]
    fn plain(&self, i: usize) -> *const u8 {
        match self.compact {
            None => self.tiles.wrapping_add(i * self.tile_bytes),
            Some(_) => self.room.wrapping_add(i * self.plain_bytes).cast_const(),
        }
    }
}

/// The tiles of a half that a group has.
#[inline(always)]
fn half<'a>(job: &Job<'a>, half: usize, group: &Range<usize>, pairs: usize) -> Group<'a> {
    let &Half { tiles, tile_bytes, compact, .. } = &job.halves[half];
    let room = compact.map_or(std::ptr::null_mut(), |compact| compact.room);
    Group {
        tiles: tiles[group.start * tile_bytes..group.end * tile_bytes].as_ptr(),
        tile_bytes,
        compact,
        room: room.wrapping_add(half * pairs * VECTOR),
        plain_bytes: 2 * pairs * VECTOR,
    }
}

/// The first `R` rows times a tile, which is left in its plain form.
///
/// # Safety
/// The tile and the rows are of the job, and the room is for it.
#[inline(always)]
unsafe fn widened<U: Unit, const R: usize>(
    job: &Job<'_>,
    half: Group<'_>,
    i: usize,
    pairs: usize,
) -> [U::Floats; R] {
    // SAFETY: as the caller promises.
    unsafe {
        let (tile, x) = (half.tiles.add(i * half.tile_bytes), job.x[..R * pairs].as_ptr());
        match half.compact {
            None => rows::<U, R>(tile, x, pairs, 0),
            Some(Compact { patches, .. }) => {
                let plain = Some(half.room.add(i * half.plain_bytes));
                compact_rows::<U, R>(tile, patches, x, pairs, AHEAD, plain)
            }
        }
    }
}

/// Adds the biases to gate and up of `R` rows, joins them and writes what comes out.
///
/// # Safety
/// See [`Kernel`].
#[inline(always)]
unsafe fn store<U: Unit, const R: usize>(
    job: &Job<'_>,
    tile: usize,
    row: usize,
    [gate, up]: [[U::Floats; R]; 2],
) {
    // Not by `map`, which lacks the unit's features and so would call its closure.
    let mut bias = [None; 2];
    for (to, half) in bias.iter_mut().zip(&job.halves) {
        if let Some(bias) = half.bias {
            *to = Some(bias[tile * LANES..].first_chunk().expect("a tile's biases"));
        }
    }
    for (r, (gate, up)) in gate.into_iter().zip(up).enumerate() {
        // SAFETY: eight pairs of the row lie in `out` as promised.
        unsafe {
            let (gate, up) = (biased::<U>(gate, bias[0]), biased::<U>(up, bias[1]));
            let y = gated_vector::<U::Simd>(job.activation, gate, up);
            let mut twice = [0; LANES];
            U::Simd::store_pairs(twice.as_mut_ptr(), U::Simd::pair(y, y));
            let out = job.out.add((row + r) * job.stride + tile * LANES / 2);
            out.copy_from_nonoverlapping(twice.as_ptr(), LANES / 2);
        }
    }
}

/// `sum` with a vector of biases, if there is one.
///
/// # Safety
/// The processor has the unit's features.
#[inline(always)]
unsafe fn biased<U: Unit>(mut sum: U::Floats, bias: Option<&[f32; LANES]>) -> <U::Simd as Simd>::V {
    let mut floats = [0.0; LANES];
    // SAFETY: a tile's biases are a vector, and so are the floats.
    unsafe {
        if let Some(bias) = bias {
            sum = U::add(sum, U::load_f32(bias.as_ptr().cast()));
        }
        U::store(sum, floats.as_mut_ptr());
        U::Simd::load(floats.as_ptr())
    }
}
