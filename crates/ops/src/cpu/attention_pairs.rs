//! Attention of a tile of queries over a piece of keys and values in bf16.
//!
//! The same steps as [`attention`](super::attention) takes in f32, with dot products of bf16 pairs in the place of
//! multiplications: two elements of a query and of sixteen keys at a time, then the probabilities of two keys and sixteen
//! elements of their values. Queries and probabilities are rounded to bf16; sums, among them the sum of the
//! probabilities, stay in f32. A query's result depends on no other query of the tile. The keys or values of a block are too
//! short a run for the hardware to fetch the next ones in time, so each block's are fetched while the one before is computed.

use super::attention::{MAX_TILE, PIECE, Tile};
use super::kv::Bf16;
use super::matmul::{pair_bf16, prefetch};
use super::memory::from_line;
use super::simd::{self, Kernel, LANES, Level, Simd};
use crate::BLOCK_SIZE;

/// Pairs of keys in a piece.
const PAIRS: usize = PIECE / 2;

/// Keys whose scores become probabilities at a time.
const STEP: usize = 2 * LANES;

/// What is kept in bf16 pairs while a row block is computed.
#[derive(Default)]
pub(super) struct Pairs {
    /// Its queries of one key head times the scores' scale over ln 2, `[queries, head_dim / 2]`, and room for the lanes
    /// behind the last.
    queries: Vec<u32>,
    /// A tile's probabilities, `[tile, PAIRS]`.
    probabilities: Vec<u32>,
}

impl Pairs {
    /// Sees to it that there is room for `queries` of `head_dim`.
    pub fn reserve(&mut self, queries: usize, head_dim: usize) {
        let queries = (queries + MAX_TILE) * head_dim / 2;
        self.queries.resize(self.queries.len().max(queries), 0);
        self.probabilities.resize(MAX_TILE * PAIRS + LANES, 0); // from a cache line on
    }

    /// Takes neighbouring queries, of which `first` is the first in the row block.
    pub fn take(&mut self, level: Level, x: &[f32], scale: f32, first: usize, head_dim: usize) {
        let pairs = &mut self.queries[first * head_dim / 2..][..x.len() / 2];
        level.run(Scaled { x, scale: scale * std::f32::consts::LOG2_E, pairs });
    }
}

/// A tile whose keys and values are bf16.
pub(super) struct PairTile<'a, 'b> {
    pub tile: Tile<'a, Bf16>,
    /// Its first query in the row block.
    pub first: usize,
    pub pairs: &'b mut Pairs,
}

impl Kernel for PairTile<'_, '_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's promise is the same.
        unsafe {
            match self.tile.limits.len() {
                1 => self.compute::<S, 1>(),
                2 => self.compute::<S, 2>(),
                4 => self.compute::<S, 4>(),
                _ => self.compute::<S, 8>(),
            }
        }
    }
}

impl PairTile<'_, '_> {
    /// Fills the tile's states; `T` is the number of queries.
    ///
    /// # Safety
    /// The CPU has the instructions of `S`; so for the parts below.
    #[inline(always)]
    unsafe fn compute<S: Simd, const T: usize>(mut self) {
        let limits: [usize; T] = std::array::from_fn(|i| self.tile.limits[i]);
        let begins: [usize; T] = std::array::from_fn(|i| self.tile.begins[i]);
        let most = limits.into_iter().fold(0, usize::max);
        let (blocks, padded) = (most.div_ceil(BLOCK_SIZE), self.tile.layout.padded());
        let first = (begins.into_iter().fold(PIECE, usize::min) / BLOCK_SIZE).min(blocks);
        // Two vectors of sums for each query where they fit the registers, and one for what is left.
        let (twos, two_parts) = match S::PAIRS {
            true => (first + (blocks - first) / 2 * 2, padded / LANES / 2 * 2),
            false => (first, 0),
        };
        // SAFETY: the caller's promise is the same.
        unsafe {
            for block in (first..twos).step_by(2) {
                self.products::<S, T, 2>(block, blocks);
            }
            for block in twos..blocks {
                self.products::<S, T, 1>(block, blocks);
            }
            // All maxima first: a row's ends in steps that wait for one another, lane against lane; meanwhile the next row's begins.
            let mut maxima = [0.0; T];
            for (i, maximum) in maxima.iter_mut().enumerate() {
                let row = &mut self.tile.scores[i * PIECE..(i + 1) * PIECE];
                let (start, end) = (begins[i] / STEP * STEP, limits[i].next_multiple_of(STEP));
                row[start..begins[i]].fill(f32::NEG_INFINITY);
                row[limits[i]..end].fill(f32::NEG_INFINITY);
                *maximum = largest::<S>(&row[start..end]);
            }
            let probabilities = from_line(&mut self.pairs.probabilities);
            for (i, state) in self.tile.states.chunks_exact_mut(padded + 2).enumerate() {
                let row = &self.tile.scores[i * PIECE..(i + 1) * PIECE];
                let (start, end) = (begins[i] / STEP * STEP, limits[i].next_multiple_of(STEP));
                let pairs = &mut probabilities[i * PAIRS..(i + 1) * PAIRS];
                state[padded] = maxima[i] * std::f32::consts::LN_2;
                state[padded + 1] =
                    exponentials::<S>(&row[start..end], maxima[i], &mut pairs[start / 2..end / 2]);
            }
            for part in (0..two_parts).step_by(2) {
                self.values::<S, T, 2>(begins, limits, part * LANES);
            }
            for part in two_parts..padded / LANES {
                self.values::<S, T, 1>(begins, limits, part * LANES);
            }
        }
    }

    /// `scores[i, k] = query i * key k`, the query scaled, for the keys of `B` blocks from `block` of the table on; `blocks` is
    /// how many the piece has.
    #[inline(always)]
    unsafe fn products<S: Simd, const T: usize, const B: usize>(&mut self, block: usize, blocks: usize) {
        let Tile { layout, kv, table, head, ref mut scores, .. } = self.tile;
        let half = layout.head_dim / 2;
        let queries = &self.pairs.queries[self.first * half..][..T * half];
        let keys_of = |block: usize| &kv[layout.keys(table[block] as usize, head)..][..2 * BLOCK_SIZE * half];
        // `array::from_fn` lacks the instructions of `S`, so it would call its closure for each element.
        let (mut keys, mut ahead) = ([&[][..]; B], [&[][..]; B]);
        for b in 0..B {
            keys[b] = keys_of(block + b);
            ahead[b] = keys_of((block + B + b).min(blocks - 1));
        }
        // SAFETY: `d` is below the pairs of a query and of each key; as many keys' pairs and scores as a block has are
        // a vector.
        unsafe {
            let mut sums = [[S::splat(0.0); B]; T];
            for d in 0..half {
                let mut pairs = [S::load_pairs(keys[0].as_ptr().add(d * 2 * BLOCK_SIZE).cast()); B];
                for ahead in ahead {
                    prefetch(ahead.as_ptr().wrapping_add(d * 2 * BLOCK_SIZE).cast(), 64);
                }
                for b in 1..B {
                    pairs[b] = S::load_pairs(keys[b].as_ptr().add(d * 2 * BLOCK_SIZE).cast());
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let x = *queries.get_unchecked(i * half + d);
                    for b in 0..B {
                        sums[b] = S::dot_pairs(sums[b], pairs[b], x);
                    }
                }
            }
            for (i, sums) in sums.into_iter().enumerate() {
                for (b, sum) in sums.into_iter().enumerate() {
                    let scores = &mut scores[i * PIECE + (block + b) * BLOCK_SIZE..][..BLOCK_SIZE];
                    S::store(scores.as_mut_ptr(), sum);
                }
            }
        }
    }

    /// `states[i] = sum over k of probabilities[i, k] * value k`, two keys at a time in their order, for `P` vectors of
    /// the values' elements from `part` on.
    #[inline(always)]
    unsafe fn values<S: Simd, const T: usize, const P: usize>(
        &mut self,
        begins: [usize; T],
        limits: [usize; T],
        part: usize,
    ) {
        let most = limits.into_iter().fold(0, usize::max);
        let least = limits.into_iter().fold(PIECE, usize::min);
        let earliest = begins.into_iter().fold(PIECE, usize::min);
        let latest = begins.into_iter().fold(0, usize::max);
        // Blocks all of whose keys every query sees.
        let whole = latest.div_ceil(BLOCK_SIZE)..least / BLOCK_SIZE;
        let Tile { layout, kv, table, head, ref mut states, .. } = self.tile;
        let padded = layout.padded();
        let probabilities = &from_line(&mut self.pairs.probabilities)[..T * PAIRS];
        // SAFETY: `P` parts of two values are as many vectors of pairs, as are those of a state; a pair's index in
        // the piece is below `PAIRS`.
        unsafe {
            let mut sums = [[S::splat(0.0); P]; T];
            let blocks = table[..most.div_ceil(BLOCK_SIZE)].iter().enumerate();
            for (index, &block) in blocks.skip(earliest / BLOCK_SIZE) {
                let values = &kv[layout.values(block as usize, head)..][..BLOCK_SIZE * padded];
                let first = index * BLOCK_SIZE / 2;
                let end = most.div_ceil(2).min(first + BLOCK_SIZE / 2);
                if whole.contains(&index) {
                    let next = table[(index + 1).min(most.div_ceil(BLOCK_SIZE) - 1)];
                    let ahead = &kv[layout.values(next as usize, head)..][..BLOCK_SIZE * padded];
                    let (mut value, mut ahead) =
                        (values.as_ptr().add(2 * part), ahead.as_ptr().add(2 * part));
                    // Up to an `end` that the compiler does not know: unrolled, the loop spills its sums.
                    for pair in first..end {
                        prefetch(ahead.cast(), P * 64);
                        add::<S, T, P>(&mut sums, value, probabilities.as_ptr().add(pair));
                        (value, ahead) = (value.wrapping_add(2 * padded), ahead.wrapping_add(2 * padded));
                    }
                    continue;
                }
                // Pairs that some queries see a key of, then those that all see both of, then again some.
                let begin = (earliest / 2).clamp(first, end);
                let all_from = latest.div_ceil(2).clamp(begin, end);
                let all_to = (least / 2).clamp(all_from, end);
                let at = |pair: usize| {
                    let value = values[2 * ((pair - first) * padded + part)..][..2 * P * LANES].as_ptr();
                    (value, probabilities[pair..].as_ptr())
                };
                let seen = |pair: usize| {
                    let sees = |i: usize, key: usize| begins[i] <= key && key < limits[i];
                    std::array::from_fn(|i| {
                        let low = if sees(i, 2 * pair) { 0xffff } else { 0 };
                        low | if sees(i, 2 * pair + 1) { 0xffff_0000 } else { 0 }
                    })
                };
                for pair in begin..all_from {
                    let (value, probabilities) = at(pair);
                    add_seen::<S, T, P>(&mut sums, value, probabilities, seen(pair));
                }
                for pair in all_from..all_to {
                    let (value, probabilities) = at(pair);
                    add::<S, T, P>(&mut sums, value, probabilities);
                }
                for pair in all_to..end {
                    let (value, probabilities) = at(pair);
                    add_seen::<S, T, P>(&mut sums, value, probabilities, seen(pair));
                }
            }
            for (i, sums) in sums.into_iter().enumerate() {
                let state = &mut states[i * (padded + 2) + part..][..P * LANES];
                for (p, sum) in sums.into_iter().enumerate() {
                    S::store(state[p * LANES..].as_mut_ptr(), sum);
                }
            }
        }
    }
}

/// `sums[i] += probabilities[i] * values`, of two keys at a time, for `P` vectors of their elements; the probabilities lie
/// [`PAIRS`] apart.
///
/// # Safety
/// The CPU has the instructions of `S`; the vectors and probabilities can be read.
#[inline(always)]
unsafe fn add<S: Simd, const T: usize, const P: usize>(
    sums: &mut [[S::V; P]; T],
    values: *const Bf16,
    probabilities: *const u32,
) {
    // SAFETY: the caller's promise is the same.
    unsafe {
        let mut parts = [S::load_pairs(values.cast()); P];
        for (p, part) in parts.iter_mut().enumerate() {
            *part = S::load_pairs(values.add(2 * p * LANES).cast());
        }
        for (i, sums) in sums.iter_mut().enumerate() {
            let x = *probabilities.add(i * PAIRS);
            for p in 0..P {
                sums[p] = S::dot_pairs(sums[p], parts[p], x);
            }
        }
    }
}

/// [`add`] where not every query sees both keys; `seen` has the bits of the values that each one sees.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn add_seen<S: Simd, const T: usize, const P: usize>(
    sums: &mut [[S::V; P]; T],
    values: *const Bf16,
    probabilities: *const u32,
    seen: [u32; T],
) {
    // SAFETY: the caller's promise is the same.
    unsafe {
        for p in 0..P {
            let values = S::load_pairs(values.add(2 * p * LANES).cast());
            for (i, sums) in sums.iter_mut().enumerate() {
                // A value a query must not see is not even multiplied by zero: it may be NaN.
                if seen[i] != 0 {
                    let x = *probabilities.add(i * PAIRS);
                    sums[p] = S::dot_pairs(sums[p], S::mask(values, seen[i]), x);
                }
            }
        }
    }
}

/// `x * scale` in pairs of bf16.
struct Scaled<'a> {
    x: &'a [f32],
    scale: f32,
    pairs: &'a mut [u32],
}

impl Kernel for Scaled<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { x, scale, pairs } = self;
        let (whole, rest) = x.as_chunks::<STEP>();
        let (to, rest_to) = pairs.split_at_mut(whole.len() * LANES);
        for (two, to) in whole.iter().zip(to.chunks_exact_mut(LANES)) {
            // SAFETY: there are two vectors of numbers and one of pairs; the instructions are the caller's promise.
            unsafe {
                let a = S::mul(S::load(two.as_ptr()), S::splat(scale));
                let b = S::mul(S::load(two.as_ptr().add(LANES)), S::splat(scale));
                S::store_pairs(to.as_mut_ptr(), S::pair(a, b));
            }
        }
        for (&[a, b], to) in rest.as_chunks::<2>().0.iter().zip(rest_to) {
            pair_bf16(&[[a * scale, b * scale]], std::slice::from_mut(to));
        }
    }
}

/// The largest of `x`.
///
/// # Safety
/// The CPU has the instructions of `S`. `x` is whole [`STEP`]s; unused lanes hold minus infinity.
#[inline(always)]
unsafe fn largest<S: Simd>(x: &[f32]) -> f32 {
    // SAFETY: every chunk is two vectors; the instructions are the caller's promise.
    unsafe {
        let mut most = [S::splat(f32::NEG_INFINITY); 2];
        for two in x.chunks_exact(STEP) {
            most[0] = S::max(S::load(two.as_ptr()), most[0]);
            most[1] = S::max(S::load(two.as_ptr().add(LANES)), most[1]);
        }
        simd::max::<S>(S::max(most[0], most[1]))
    }
}

/// `2^(x[i] - most)` in pairs of bf16; returns the sum of what was rounded.
///
/// # Safety
/// As of [`largest`]; `pairs` is as long as `x` in pairs.
#[inline(always)]
unsafe fn exponentials<S: Simd>(x: &[f32], most: f32, pairs: &mut [u32]) -> f32 {
    // SAFETY: every chunk is two vectors, or one of pairs; the instructions are the caller's promise.
    unsafe {
        let mut total = S::splat(0.0);
        for (two, pairs) in x.chunks_exact(STEP).zip(pairs.chunks_exact_mut(LANES)) {
            let a = S::exp2(S::sub(S::load(two.as_ptr()), S::splat(most)));
            let b = S::exp2(S::sub(S::load(two.as_ptr().add(LANES)), S::splat(most)));
            S::store_pairs(pairs.as_mut_ptr(), S::pair(a, b));
            total = S::add(S::add(total, a), b);
        }
        simd::sum::<S>(total)
    }
}
