//! Attention of a tile of queries over a piece of keys and values in bf16.
//!
//! The same steps as [`attention`](super::attention) takes in f32, with dot products of bf16 pairs in the place of
//! multiplications: two elements of a query and of sixteen keys at a time, then the probabilities of two keys and sixteen
//! elements of their values. Queries and probabilities are rounded to bf16; sums, among them the sum of the
//! probabilities, stay in f32. A query's result depends on no other query of the tile.

use super::attention::{MAX_TILE, PIECE, Tile};
use super::kv::Bf16;
use super::matmul::pair_bf16;
use super::simd::{self, Kernel, LANES, Simd};
use crate::BLOCK_SIZE;

/// Pairs of keys in a piece.
const PAIRS: usize = PIECE / 2;

/// Buffers of a tile.
#[derive(Default)]
pub(super) struct Pairs {
    /// Its queries, `[tile, head_dim / 2]`.
    queries: Vec<u32>,
    /// Its probabilities, `[tile, PAIRS]`.
    probabilities: Vec<u32>,
}

impl Pairs {
    /// Sees to it that there is room for tiles of heads of `head_dim`.
    pub fn reserve(&mut self, head_dim: usize) {
        self.queries.resize(self.queries.len().max(MAX_TILE * head_dim / 2), 0);
        self.probabilities.resize(MAX_TILE * PAIRS, 0);
    }
}

/// A tile whose keys and values are bf16.
pub(super) struct PairTile<'a, 'b> {
    pub tile: Tile<'a, Bf16>,
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
        let half = self.tile.layout.head_dim / 2;
        for (query, out) in self.tile.queries.iter().zip(self.pairs.queries.chunks_exact_mut(half)) {
            pair_bf16(query.as_chunks::<2>().0, out);
        }
        // SAFETY: the caller's promise is the same.
        unsafe {
            for block in (first..twos).step_by(2) {
                self.products::<S, T, 2>(block);
            }
            for block in twos..blocks {
                self.products::<S, T, 1>(block);
            }
            for (i, state) in self.tile.states.chunks_exact_mut(padded + 2).enumerate() {
                let row = &mut self.tile.scores[i * PIECE..(i + 1) * PIECE];
                let (start, end) = (begins[i] / LANES * LANES, limits[i].next_multiple_of(LANES));
                row[start..begins[i]].fill(f32::NEG_INFINITY);
                row[limits[i]..end].fill(f32::NEG_INFINITY);
                (state[padded], state[padded + 1]) = simd::softmax::<S>(&mut row[start..end]);
                let pairs = &mut self.pairs.probabilities[i * PAIRS..(i + 1) * PAIRS];
                pair_bf16(row[start..end].as_chunks::<2>().0, &mut pairs[start / 2..end / 2]);
            }
            for part in (0..two_parts).step_by(2) {
                self.values::<S, T, 2>(begins, limits, part * LANES);
            }
            for part in two_parts..padded / LANES {
                self.values::<S, T, 1>(begins, limits, part * LANES);
            }
        }
    }

    /// `scores[i, k] = query i * key k * scale` for the keys of `B` blocks from `block` of the table on.
    #[inline(always)]
    unsafe fn products<S: Simd, const T: usize, const B: usize>(&mut self, block: usize) {
        let Tile { layout, kv, table, head, scale, ref mut scores, .. } = self.tile;
        let half = layout.head_dim / 2;
        let queries = &self.pairs.queries[..T * half];
        let keys: [&[Bf16]; B] = std::array::from_fn(|b| {
            &kv[layout.keys(table[block + b] as usize, head)..][..2 * BLOCK_SIZE * half]
        });
        // SAFETY: `d` is below the pairs of a query and of each key; as many keys' pairs and scores as a block has are
        // a vector.
        unsafe {
            let mut sums = [[S::splat(0.0); B]; T];
            for d in 0..half {
                for b in 0..B {
                    let key = S::load_pairs(keys[b].as_ptr().add(d * 2 * BLOCK_SIZE).cast());
                    for (i, sums) in sums.iter_mut().enumerate() {
                        let x = *queries.get_unchecked(i * half + d);
                        sums[b] = S::dot_pairs(sums[b], key, x);
                    }
                }
            }
            for (i, sums) in sums.into_iter().enumerate() {
                for (b, sum) in sums.into_iter().enumerate() {
                    let scores = &mut scores[i * PIECE + (block + b) * BLOCK_SIZE..][..BLOCK_SIZE];
                    S::store(scores.as_mut_ptr(), S::mul(sum, S::splat(scale)));
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
        let Tile { layout, kv, table, head, ref mut states, .. } = self.tile;
        let padded = layout.padded();
        let probabilities = &self.pairs.probabilities[..T * PAIRS];
        // SAFETY: `P` parts of two values are as many vectors of pairs, as are those of a state; a pair's index in
        // the piece is below `PAIRS`.
        unsafe {
            let mut sums = [[S::splat(0.0); P]; T];
            let blocks = table[..most.div_ceil(BLOCK_SIZE)].iter().enumerate();
            for (index, &block) in blocks.skip(earliest / BLOCK_SIZE) {
                let values = &kv[layout.values(block as usize, head)..][..BLOCK_SIZE * padded];
                let first = index * BLOCK_SIZE / 2;
                let last = most.div_ceil(2).min(first + BLOCK_SIZE / 2);
                for pair in first.max(earliest / 2)..last {
                    let value = values[2 * ((pair - first) * padded + part)..][..2 * P * LANES].as_ptr();
                    let probabilities = probabilities[pair..].as_ptr();
                    let whole = latest <= 2 * pair && 2 * pair + 2 <= least;
                    if whole {
                        add::<S, T, P>(&mut sums, value, probabilities, None);
                        continue;
                    }
                    let sees = |i: usize, key: usize| begins[i] <= key && key < limits[i];
                    let seen = std::array::from_fn(|i| {
                        let low = if sees(i, 2 * pair) { 0xffff } else { 0 };
                        low | if sees(i, 2 * pair + 1) { 0xffff_0000 } else { 0 }
                    });
                    add::<S, T, P>(&mut sums, value, probabilities, Some(seen));
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
/// [`PAIRS`] apart. `seen` has the bits of the values that each query sees, all if it is none.
///
/// # Safety
/// The CPU has the instructions of `S`; the vectors and probabilities can be read.
#[inline(always)]
unsafe fn add<S: Simd, const T: usize, const P: usize>(
    sums: &mut [[S::V; P]; T],
    values: *const Bf16,
    probabilities: *const u32,
    seen: Option<[u32; T]>,
) {
    // SAFETY: the caller's promise is the same.
    unsafe {
        for p in 0..P {
            let values = S::load_pairs(values.add(2 * p * LANES).cast());
            for (i, sums) in sums.iter_mut().enumerate() {
                let x = *probabilities.add(i * PAIRS);
                match seen {
                    None => sums[p] = S::dot_pairs(sums[p], values, x),
                    // A value a query must not see is not even multiplied by zero: it may be NaN.
                    Some(seen) if seen[i] != 0 => {
                        sums[p] = S::dot_pairs(sums[p], S::mask(values, seen[i]), x);
                    }
                    Some(_) => {}
                }
            }
        }
    }
}
