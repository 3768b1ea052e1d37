//! Gate and up in BF16 with their activation behind them, for many rows.
//!
//! Tiles of the gate and of up that make the same outputs are multiplied in twos, as [`bf16`](super::bf16) does with neighbours, so that
//! both lie in registers when they are joined. What goes to memory is what *down* reads: pairs of bf16, an eighth of the two products in f32.
//! Every product is summed and every output rounded as it is in two multiplications, an activation and a conversion.

use super::bf16::{Compact, ROWS, fetch, group_tiles, groups, rows, two_tiles, widen_tile, widened_next};
use super::kernel::{part_of, with_rows};
use super::layout::LANES;
use super::unit::{Unit, VECTOR};
use crate::Activation;
use crate::cpu::activation::gated_vector;
use crate::cpu::simd::Simd;

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
    let step = if U::MANY { ROWS } else { part_of::<U>(job.rows) };
    let shares = job.rows.div_ceil(step);
    let mut groups = groups(job.tiles, (group_tiles(job.width) / 4 * 2).max(2)).peekable();
    while let Some(group) = groups.next() {
        let following = groups.peek();
        let next = |half: usize| {
            let Half { tiles, tile_bytes, compact, .. } = &job.halves[half];
            widened_next(tiles, *tile_bytes, *compact, following, group.len())
        };
        let next = [next(0), next(1)];
        // SAFETY: the tiles are of the job and the room is for a group.
        let weights = unsafe {
            [
                ready::<U>(job, 0, group.start, group.len(), pairs),
                ready::<U>(job, 1, group.start, group.len(), pairs),
            ]
        };
        let [(gates, gate_bytes), (ups, up_bytes)] = weights;
        let at = |i: usize| [gates.wrapping_add(i * gate_bytes), ups.wrapping_add(i * up_bytes)];
        for (share, row) in (0..job.rows).step_by(step).enumerate() {
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

/// Where `count` tiles of a half lie in their plain form, from tile `first` on, and how many bytes apart; widens compact ones, those of gate and
/// up by turns.
///
/// # Safety
/// The tiles are of the job, whose room is for as many of both halves.
#[inline(always)]
unsafe fn ready<U: Unit>(
    job: &Job<'_>,
    half: usize,
    first: usize,
    count: usize,
    pairs: usize,
) -> (*const u8, usize) {
    let Half { tiles, tile_bytes, compact, .. } = &job.halves[half];
    let bytes = tiles[first * tile_bytes..(first + count) * tile_bytes].as_ptr();
    let Some(Compact { patches, room, .. }) = *compact else { return (bytes, *tile_bytes) };
    let room = room.wrapping_add(half * pairs * VECTOR);
    for i in 0..count {
        // SAFETY: as the caller promises.
        unsafe {
            let (from, to) = (bytes.add(i * tile_bytes), room.add(2 * i * pairs * VECTOR));
            widen_tile::<U>(from, patches, pairs, to);
        }
    }
    (room.cast_const(), 2 * pairs * VECTOR)
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
            *to = Some(bias[tile * LANES..][..LANES].as_ptr());
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
unsafe fn biased<U: Unit>(mut sum: U::Floats, bias: Option<*const f32>) -> <U::Simd as Simd>::V {
    let mut floats = [0.0; LANES];
    // SAFETY: a tile's biases are a vector, and so are the floats.
    unsafe {
        if let Some(bias) = bias {
            sum = U::add(sum, U::load_f32(bias.cast()));
        }
        U::store(sum, floats.as_mut_ptr());
        U::Simd::load(floats.as_ptr())
    }
}
