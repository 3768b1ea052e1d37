//! The inner loops: rows of activations times tiles of weights, written once for all units.
//!
//! An output is summed over its inputs in one fixed order, whatever the number of rows that are
//! computed together: `R` rows share the unpacking of the weights, never an accumulator.
//!
//! Everything a unit's operation is called from is `inline(always)` and no closure: only then is
//! it compiled with the features of the function at the top, and not as calls.

use super::bf16::Compact;
use super::layout::{BLOCK, LANES, Layout, Quants, Scales};
use super::quantize::Activations;
use super::unit::{Unit, VECTOR};
use crate::cpu::memory::LINE;
use crate::{DType, mxfp4};

/// Rows computed per pass over a set of tiles, so that their activations stay in the cache.
pub(super) const ROW_BLOCK: usize = 64;

/// Rows from which on arithmetic and no longer memory bounds a multiplication.
pub(super) const MANY_ROWS: usize = 12;

/// Bytes of weights to fetch ahead while a tile is read for the first time. The hardware alone does not
/// look far enough ahead once several rows are computed a block: some 200 ns at 12 GB/s a thread.
pub(super) const AHEAD: usize = 4096;

/// Activations of a job.
#[derive(Clone, Copy)]
pub(super) enum Input<'a> {
    /// `[rows, width]`, for F32 and F16 weights.
    Plain(&'a [f32]),
    /// `[rows, width / 2]` rounded up, for BF16 weights.
    Pairs(&'a [u32]),
    /// `[rows, width / 32]`.
    Quantized(&'a [Activations]),
}

/// Consecutive tiles of one part of a matrix times all rows.
pub(super) struct Job<'a> {
    /// The tiles, `tile_bytes` each.
    pub tiles: &'a [u8],
    pub tile_bytes: usize,
    pub width: usize,
    pub rows: usize,
    pub input: Input<'a>,
    /// Of BF16 tiles that are compact.
    pub compact: Option<Compact<'a>>,
    /// Biases of the tiles' outputs.
    pub bias: Option<&'a [f32]>,
    /// Outputs in the tiles; the last tile may have fewer than [`LANES`].
    pub outputs: usize,
    /// Where row 0 of the first tile's first output goes.
    pub out: *mut f32,
    /// Floats between rows of `out`.
    pub stride: usize,
}

/// A loop over a job, for one unit and storage format.
///
/// # Safety
/// The processor has the unit's features; the job's slices have the lengths its sizes say; `out` is
/// valid for writes of `outputs` floats in each of `rows` rows, which nobody else accesses.
pub(super) type Kernel = unsafe fn(&Job<'_>);

/// A storage format as a type, so that kernels are compiled for each.
pub(super) trait Format {
    const DTYPE: DType;
}

/// The passes over a job, (tile, first row, number of rows): 8, 4, 3, 2 or 1 rows at a time.
pub(super) fn passes<U: Unit>(job: &Job<'_>) -> impl Iterator<Item = (usize, usize, usize)> {
    let (rows, tiles) = (job.rows, job.outputs.div_ceil(LANES));
    (0..rows).step_by(ROW_BLOCK).flat_map(move |first| {
        let last = rows.min(first + ROW_BLOCK);
        (0..tiles).flat_map(move |tile| {
            let mut row = first;
            std::iter::from_fn(move || {
                let count = part_of::<U>(last - row);
                row += count;
                (count > 0).then_some((tile, row - count, count))
            })
        })
    })
}

/// How many of `rows` rows are computed in one pass.
pub(super) fn part_of<U: Unit>(rows: usize) -> usize {
    match rows {
        8.. if U::ALL_PASSES => 8,
        4.. => 4,
        few if U::ALL_PASSES => few,
        few => few.min(1),
    }
}

/// `$pass` with the number of its rows, one that [`part_of`] gives, as the constant `$rows`.
macro_rules! with_rows {
    ($unit:ty, $count:expr, $rows:ident => $pass:expr) => {
        match $count {
            8 if <$unit>::ALL_PASSES => with_rows!($rows = 8, $pass),
            3 if <$unit>::ALL_PASSES => with_rows!($rows = 3, $pass),
            2 if <$unit>::ALL_PASSES => with_rows!($rows = 2, $pass),
            4 => with_rows!($rows = 4, $pass),
            _ => with_rows!($rows = 1, $pass),
        }
    };
    ($rows:ident = $count:literal, $pass:expr) => {{
        const $rows: usize = $count;
        $pass
    }};
}
pub(super) use with_rows;

/// Starts loading the cache lines of `bytes` bytes at `from`, which need not be mapped.
#[inline(always)]
pub(in crate::cpu) fn prefetch(from: *const u8, bytes: usize) {
    for at in (0..bytes).step_by(LINE) {
        // SAFETY: a prefetch reads nothing; SSE is part of x86-64.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(
                from.wrapping_add(at).cast(),
            );
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (from, at);
    }
}

/// Starts loading a cache line to the second-level cache; it need not be mapped.
#[inline(always)]
pub(super) fn prefetch_second(from: *const u8) {
    // SAFETY: as in `prefetch`.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(from.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = from;
}

/// The loop over a job with quantised weights.
///
/// # Safety
/// See [`Kernel`].
#[inline(always)]
pub(super) unsafe fn quantized<U: Unit, F: Format>(job: &Job<'_>) {
    let Input::Quantized(x) = job.input else { unreachable!("quantised weights take quantised rows") };
    for (tile, row, count) in passes::<U>(job) {
        let weights = job.tiles[tile * job.tile_bytes..][..job.tile_bytes].as_ptr();
        let ahead = if row % ROW_BLOCK == 0 { AHEAD } else { 0 };
        let blocks = job.width / BLOCK;
        let x = x[row * blocks..][..count * blocks].as_ptr();
        // SAFETY: `weights` and `x` hold a tile and `count` rows of `blocks` blocks; the rest as promised.
        unsafe {
            with_rows!(U, count, R => {
                store::<U, R>(job, tile, row, tile_rows::<U, F, R>(weights, x, blocks, ahead))
            })
        }
    }
}

/// Adds the biases to the results of `R` rows and writes them.
///
/// # Safety
/// See [`Kernel`].
#[inline(always)]
pub(super) unsafe fn store<U: Unit, const R: usize>(
    job: &Job<'_>,
    tile: usize,
    row: usize,
    sums: [U::Floats; R],
) {
    let first = tile * LANES;
    let lanes = LANES.min(job.outputs - first);
    // SAFETY: a whole tile's biases are a vector; its output lanes lie in `out` as promised.
    unsafe {
        let out = job.out.add(row * job.stride + first);
        if lanes == LANES {
            let bias = job.bias.map(|bias| bias[first..first + LANES].as_ptr().cast());
            for (r, mut sum) in sums.into_iter().enumerate() {
                if let Some(bias) = bias {
                    sum = U::add(sum, U::load_f32(bias));
                }
                U::store(sum, out.add(r * job.stride));
            }
            return;
        }
    }
    for (r, sum) in sums.into_iter().enumerate() {
        let mut values = [0.0; LANES];
        // SAFETY: `values` has room for a vector; the output lanes lie in `out` as promised.
        unsafe {
            U::store(sum, values.as_mut_ptr());
            if let Some(bias) = job.bias {
                for (value, bias) in values.iter_mut().zip(&bias[first..first + lanes]) {
                    *value += bias;
                }
            }
            let out = job.out.add((row + r) * job.stride + first);
            out.copy_from_nonoverlapping(values.as_ptr(), lanes);
        }
    }
}

/// `R` rows times one tile.
///
/// # Safety
/// `weights` holds a tile of `blocks` blocks; `x` holds `R` rows of `blocks` blocks.
#[inline(always)]
unsafe fn tile_rows<U: Unit, F: Format, const R: usize>(
    mut weights: *const u8,
    x: *const Activations,
    blocks: usize,
    ahead: usize,
) -> [U::Floats; R] {
    let layout = const { Layout::of(F::DTYPE).expect("a quantised format") };
    let scales = layout.scales;
    // SAFETY: `weights` walks over the tile's records and `block` over its blocks.
    unsafe {
        let mut sums = [U::splat(0.0); R];
        let mut block = 0;
        while block < blocks {
            let header = weights;
            weights = weights.add(scales.header_bytes());
            for _ in 0..scales.blocks() {
                prefetch(weights.wrapping_add(ahead), scales.block_bytes() + layout.quants.bytes());
                let quants = unpack::<U>(layout.quants, weights.add(scales.block_bytes()));
                let scale = scales_of::<U>(scales, header, weights);
                let min = minimums_of::<U>(scales, header, weights);
                for (r, sum) in sums.iter_mut().enumerate() {
                    let x = &*x.add(r * blocks + block);
                    *sum = block_dot::<U>(layout, *sum, quants, scale, min, x);
                }
                weights = weights.add(scales.block_bytes() + layout.quants.bytes());
                block += 1;
            }
        }
        sums
    }
}

/// Adds one row's products with a block to `sum`.
#[inline(always)]
unsafe fn block_dot<U: Unit>(
    layout: Layout,
    mut sum: U::Floats,
    quants: [U::Bytes; 8],
    scale: [U::Floats; 2],
    min: [U::Floats; 2],
    x: &Activations,
) -> U::Floats {
    let fours = x.quants.as_ptr().cast::<i32>();
    // SAFETY: a block of activations holds eight times four bytes, aligned.
    unsafe {
        if matches!(layout.scales, Scales::SuperHalves | Scales::SuperHalvesMin) {
            let mut dots =
                [U::splat_int(-layout.offset * x.sums[0]), U::splat_int(-layout.offset * x.sums[1])];
            for (i, &quants) in quants.iter().enumerate() {
                dots[i / 4] = U::dot::<false>(dots[i / 4], quants, *fours.add(i));
            }
            let first = U::mul(U::to_floats(dots[0]), scale[0]);
            let both = U::fused(U::to_floats(dots[1]), scale[1], first);
            sum = U::fused(both, U::splat(x.scale), sum);
        } else {
            let mut dot = U::splat_int(-layout.offset * x.sum);
            for (i, &quants) in quants.iter().enumerate() {
                dot = match layout.quants {
                    Quants::Eight => U::dot::<true>(dot, quants, *fours.add(i)),
                    _ => U::dot::<false>(dot, quants, *fours.add(i)),
                };
            }
            sum = U::add(sum, U::mul(U::to_floats(dot), U::mul(scale[0], U::splat(x.scale))));
        }
        match layout.scales {
            Scales::Block | Scales::Exponents | Scales::SuperHalves => sum,
            Scales::BlockMin | Scales::SuperMin => U::add(sum, U::mul(min[0], U::splat(x.scaled_sum))),
            Scales::SuperHalvesMin => {
                let first = U::add(sum, U::mul(min[0], U::splat(x.scaled_sums[0])));
                U::add(first, U::mul(min[1], U::splat(x.scaled_sums[1])))
            }
        }
    }
}

/// The scales of a block's two halves (the same twice where a block has one).
#[inline(always)]
unsafe fn scales_of<U: Unit>(scales: Scales, header: *const u8, block: *const u8) -> [U::Floats; 2] {
    // SAFETY: the header and the block are as long as `scales` says.
    unsafe {
        match scales {
            Scales::Block | Scales::BlockMin => [U::load_f16(block); 2],
            // The quants are twice the numbers.
            Scales::Exponents => [U::mul(U::load_exponents(block), U::splat(0.5)); 2],
            Scales::SuperMin | Scales::SuperHalvesMin => {
                let d = U::load_f16(header);
                [U::mul(d, U::load_u8(block)), U::mul(d, U::load_u8(block.add(LANES)))]
            }
            Scales::SuperHalves => {
                let d = U::load_f16(header);
                [U::mul(d, U::load_i8(block)), U::mul(d, U::load_i8(block.add(LANES)))]
            }
        }
    }
}

/// The minimums of a block's two halves (the same twice where a block has one).
#[inline(always)]
unsafe fn minimums_of<U: Unit>(scales: Scales, header: *const u8, block: *const u8) -> [U::Floats; 2] {
    // SAFETY: the header and the block are as long as `scales` says.
    unsafe {
        match scales {
            Scales::Block | Scales::Exponents | Scales::SuperHalves => [U::splat(0.0); 2],
            Scales::BlockMin => [U::load_f16(block.add(2 * LANES)); 2],
            Scales::SuperMin => [U::mul(U::load_f16(header.add(2 * LANES)), U::load_u8(block.add(LANES))); 2],
            Scales::SuperHalvesMin => {
                let min = U::load_f16(header.add(2 * LANES));
                [U::mul(min, U::load_u8(block.add(2 * LANES))), U::mul(min, U::load_u8(block.add(3 * LANES)))]
            }
        }
    }
}

/// Widens a block's quants to bytes.
#[inline(always)]
unsafe fn unpack<U: Unit>(quants: Quants, from: *const u8) -> [U::Bytes; 8] {
    // SAFETY: `from` holds as many bytes as `quants` says.
    unsafe {
        match quants {
            Quants::Eight => {
                let [a, b, c, d] = four::<U>(from);
                let [e, f, g, h] = four::<U>(from.add(4 * VECTOR));
                [a, b, c, d, e, f, g, h]
            }
            Quants::Two => {
                let (a, b) = (U::load_bytes(from), U::load_bytes(from.add(VECTOR)));
                [
                    U::field::<0>(a, 3),
                    U::field::<2>(a, 3),
                    U::field::<4>(a, 3),
                    U::field::<6>(a, 3),
                    U::field::<0>(b, 3),
                    U::field::<2>(b, 3),
                    U::field::<4>(b, 3),
                    U::field::<6>(b, 3),
                ]
            }
            Quants::Four => nibbles::<U>(from),
            Quants::Codes => {
                let [a, b, c, d, e, f, g, h] = nibbles::<U>(from);
                [
                    U::lookup(&mxfp4::UNSIGNED, a),
                    U::lookup(&mxfp4::UNSIGNED, b),
                    U::lookup(&mxfp4::UNSIGNED, c),
                    U::lookup(&mxfp4::UNSIGNED, d),
                    U::lookup(&mxfp4::UNSIGNED, e),
                    U::lookup(&mxfp4::UNSIGNED, f),
                    U::lookup(&mxfp4::UNSIGNED, g),
                    U::lookup(&mxfp4::UNSIGNED, h),
                ]
            }
            Quants::Five => {
                let low = nibbles::<U>(from);
                let high = U::load_bytes(from.add(4 * VECTOR));
                [
                    U::or(low[0], U::field::<-4>(high, 16)),
                    U::or(low[1], U::field::<-3>(high, 16)),
                    U::or(low[2], U::field::<-2>(high, 16)),
                    U::or(low[3], U::field::<-1>(high, 16)),
                    U::or(low[4], U::field::<0>(high, 16)),
                    U::or(low[5], U::field::<1>(high, 16)),
                    U::or(low[6], U::field::<2>(high, 16)),
                    U::or(low[7], U::field::<3>(high, 16)),
                ]
            }
            Quants::Six => {
                let low = nibbles::<U>(from);
                let (a, b) = (U::load_bytes(from.add(4 * VECTOR)), U::load_bytes(from.add(5 * VECTOR)));
                [
                    U::or(low[0], U::field::<-4>(a, 48)),
                    U::or(low[1], U::field::<-2>(a, 48)),
                    U::or(low[2], U::field::<0>(a, 48)),
                    U::or(low[3], U::field::<2>(a, 48)),
                    U::or(low[4], U::field::<-4>(b, 48)),
                    U::or(low[5], U::field::<-2>(b, 48)),
                    U::or(low[6], U::field::<0>(b, 48)),
                    U::or(low[7], U::field::<2>(b, 48)),
                ]
            }
        }
    }
}

#[inline(always)]
unsafe fn four<U: Unit>(from: *const u8) -> [U::Bytes; 4] {
    // SAFETY: `from` holds four vectors.
    unsafe {
        [
            U::load_bytes(from),
            U::load_bytes(from.add(VECTOR)),
            U::load_bytes(from.add(2 * VECTOR)),
            U::load_bytes(from.add(3 * VECTOR)),
        ]
    }
}

#[inline(always)]
unsafe fn nibbles<U: Unit>(from: *const u8) -> [U::Bytes; 8] {
    // SAFETY: `from` holds four vectors.
    unsafe {
        let [a, b, c, d] = four::<U>(from);
        [
            U::field::<0>(a, 15),
            U::field::<0>(b, 15),
            U::field::<0>(c, 15),
            U::field::<0>(d, 15),
            U::field::<4>(a, 15),
            U::field::<4>(b, 15),
            U::field::<4>(c, 15),
            U::field::<4>(d, 15),
        ]
    }
}

/// The loop over a job with weights that are not quantised.
///
/// # Safety
/// See [`Kernel`].
#[inline(always)]
pub(super) unsafe fn plain<U: Unit, F: Format>(job: &Job<'_>) {
    let Input::Plain(x) = job.input else { unreachable!("plain weights take plain rows") };
    for (tile, row, count) in passes::<U>(job) {
        let weights = job.tiles[tile * job.tile_bytes..][..job.tile_bytes].as_ptr();
        let ahead = if row % ROW_BLOCK == 0 { AHEAD } else { 0 };
        let x = x[row * job.width..][..count * job.width].as_ptr();
        // SAFETY: `weights` and `x` hold a tile and `count` rows of `width` inputs; the rest as promised.
        unsafe {
            with_rows!(U, count, R => {
                store::<U, R>(job, tile, row, plain_rows::<U, F, R>(weights, x, job.width, ahead))
            })
        }
    }
}

/// `R` rows times one tile in f32: even and odd inputs in an accumulator each, then their sum.
///
/// # Safety
/// `weights` holds a tile of `width` inputs; `x` holds `R` rows of `width` floats.
#[inline(always)]
unsafe fn plain_rows<U: Unit, F: Format, const R: usize>(
    weights: *const u8,
    x: *const f32,
    width: usize,
    ahead: usize,
) -> [U::Floats; R] {
    // SAFETY: `at` stays below `width`.
    unsafe {
        let mut even = [U::splat(0.0); R];
        let mut odd = [U::splat(0.0); R];
        for pair in 0..width / 2 {
            let two = 2 * LANES * F::DTYPE.block_bytes();
            prefetch(weights.wrapping_add(pair * two + ahead), two);
            let (a, b) = (load::<U, F>(weights, 2 * pair), load::<U, F>(weights, 2 * pair + 1));
            for r in 0..R {
                let x = x.add(r * width + 2 * pair);
                even[r] = U::fused(a, U::splat(*x), even[r]);
                odd[r] = U::fused(b, U::splat(*x.add(1)), odd[r]);
            }
        }
        if width % 2 == 1 {
            let a = load::<U, F>(weights, width - 1);
            for (r, even) in even.iter_mut().enumerate() {
                *even = U::fused(a, U::splat(*x.add(r * width + width - 1)), *even);
            }
        }
        for (even, odd) in even.iter_mut().zip(odd) {
            *even = U::add(*even, odd);
        }
        even
    }
}

/// Weights of input `at` for all lanes.
#[inline(always)]
unsafe fn load<U: Unit, F: Format>(weights: *const u8, at: usize) -> U::Floats {
    // SAFETY: the tile holds input `at`.
    unsafe {
        let from = weights.add(at * LANES * F::DTYPE.block_bytes());
        match F::DTYPE {
            DType::F32 => U::load_f32(from),
            DType::F16 => U::load_f16(from),
            _ => unreachable!(),
        }
    }
}
