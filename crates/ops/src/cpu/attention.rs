//! Paged attention with a running softmax.
//!
//! A query's keys are cut at multiples of [`PIECE`] tokens of its sequence. Each piece gives its
//! maximum score, its sum of exponentials and its weighted sum of values, and the pieces are
//! merged first to last (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022,
//! arXiv:2205.14135). The cuts depend on nothing but the position, and within a piece every
//! query has its own accumulators, so an answer's bits are the same in a decode step and in a
//! chunk of any size, on any number of threads, with or without the pieces computed in parallel.
//!
//! Queries that read the same keys (the heads of a group, neighbouring rows of a sequence) are
//! computed in tiles, so that a key loaded and widened once serves up to eight of them.

use super::kv::{Element, KvCache, Layer, Layout};
use super::pool::Pool;
use super::rows::Disjoint;
use super::simd::{self, Kernel, LANES, Level, Simd};
use crate::{AttentionShape, BLOCK_SIZE, Batch, Span};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Tokens of a piece.
const PIECE: usize = 512;
/// Rows of one sequence that a thread takes at a time.
const ROWS: usize = 16;
/// Most queries in a tile.
const MAX_TILE: usize = 8;
/// Multiplications below which one thread is as fast as several.
const SMALL: usize = 128 * 1024;
/// Most f32 that partial results may take when pieces are computed in parallel.
const MAX_PARTIALS: usize = 4 << 20;

/// How a step's attention is cut; the same for all layers.
#[derive(Default)]
pub(super) struct Plan {
    blocks: Vec<RowBlock>,
    /// Every piece of every row block: the row block's index and the piece's.
    pieces: Vec<(usize, usize)>,
    /// Most rows in a row block.
    max_rows: usize,
    /// Query-key pairs of one head.
    pairs: usize,
}

/// Neighbouring rows of one sequence.
struct RowBlock {
    span: Span,
    /// First row in the batch.
    row: usize,
    rows: usize,
    /// Position of the first row in its sequence.
    position: usize,
    /// Its pieces in [`Plan::pieces`].
    first_piece: usize,
    pieces: usize,
}

impl Plan {
    /// Plans `batch`.
    pub fn set(&mut self, batch: &Batch) {
        self.blocks.clear();
        self.pieces.clear();
        (self.max_rows, self.pairs) = (0, 0);
        for &span in &batch.spans {
            for start in (0..span.len).step_by(ROWS) {
                let rows = ROWS.min(span.len - start);
                let position = span.context - span.len + start;
                let pieces = (position + rows).div_ceil(PIECE);
                let first_piece = self.pieces.len();
                self.pieces.extend((0..pieces).map(|piece| (self.blocks.len(), piece)));
                self.blocks.push(RowBlock {
                    span,
                    row: span.start + start,
                    rows,
                    position,
                    first_piece,
                    pieces,
                });
                self.max_rows = self.max_rows.max(rows);
                self.pairs += rows * (position + rows);
            }
        }
    }
}

/// Buffers that attention reuses.
pub(super) struct Buffers {
    workers: Vec<Mutex<Worker>>,
    partials: Vec<f32>,
}

/// Buffers of one thread.
#[derive(Default)]
struct Worker {
    /// A tile's queries, `[head_dim, tile]`.
    queries: Vec<f32>,
    /// Its scores, `[tile, PIECE]`.
    scores: Vec<f32>,
    /// Its results on one piece, `[tile, state]`.
    partials: Vec<f32>,
    /// The running results of a row block, `[queries, state]`.
    states: Vec<f32>,
}

impl Buffers {
    pub fn new(threads: usize) -> Self {
        Self { workers: (0..threads).map(|_| Mutex::default()).collect(), partials: Vec::new() }
    }
}

/// One layer's attention over one step.
pub(super) struct Attention<'a> {
    pub plan: &'a Plan,
    pub batch: &'a Batch,
    pub shape: &'a AttentionShape,
    /// Rows `[q | k | v]`.
    pub qkv: &'a [f32],
    pub level: Level,
}

impl Attention<'_> {
    /// Computes `out`, `[rows, heads * head_dim]`. All block tables are within `cache`.
    pub fn run(&self, pool: &Pool, cache: &KvCache, layer: usize, buffers: &mut Buffers, out: &mut [f32]) {
        match cache.layer(layer) {
            Layer::F16(kv) => Job { op: self, kv, layout: cache.layout }.run(pool, buffers, out),
            Layer::F32(kv) => Job { op: self, kv, layout: cache.layout }.run(pool, buffers, out),
        }
    }
}

/// An [`Attention`] on elements of a known type.
struct Job<'a, E> {
    op: &'a Attention<'a>,
    kv: &'a [E],
    layout: Layout,
}

impl<E: Element> Job<'_, E> {
    fn run(&self, pool: &Pool, buffers: &mut Buffers, out: &mut [f32]) {
        let plan = self.op.plan;
        let Buffers { workers, partials } = buffers;
        for worker in workers.iter_mut() {
            self.reserve(worker.get_mut().unwrap_or_else(PoisonError::into_inner));
        }
        let out = Disjoint::new(out);
        let small = plan.pairs * self.op.shape.out_width() < SMALL;
        let threads = if small { 1 } else { pool.threads() };
        let units = plan.blocks.len() * self.layout.kv_heads;
        let len = plan.pieces.len() * self.layout.kv_heads * self.unit_len();
        let parallel_pieces = units < 2 * threads
            && threads > 1
            && plan.pieces.len() > plan.blocks.len()
            && len <= MAX_PARTIALS;
        if !parallel_pieces {
            return claim(pool, threads, units, workers, |unit, worker| self.whole(unit, worker, &out));
        }
        partials.resize(partials.len().max(len), 0.0);
        let shared = Disjoint::new(partials);
        let tasks = plan.pieces.len() * self.layout.kv_heads;
        claim(pool, threads, tasks, workers, |task, worker| self.one_piece(task, worker, &shared));
        let partials = &*partials;
        claim(pool, threads, units, workers, |unit, worker| self.merge_pieces(unit, worker, partials, &out));
    }

    /// Query heads that share a key head.
    fn group(&self) -> usize {
        self.op.shape.heads / self.op.shape.kv_heads
    }

    /// f32 of a query's state: its weighted sum of values in whole vectors, its maximum, its sum.
    fn state_len(&self) -> usize {
        self.layout.padded() + 2
    }

    /// f32 of the states of a row block's queries of one key head, as many as any row block has.
    fn unit_len(&self) -> usize {
        self.op.plan.max_rows * self.group() * self.state_len()
    }

    fn reserve(&self, worker: &mut Worker) {
        let grow = |x: &mut Vec<f32>, len: usize| x.resize(x.len().max(len), 0.0);
        grow(&mut worker.queries, MAX_TILE * self.layout.head_dim);
        grow(&mut worker.scores, MAX_TILE * PIECE);
        grow(&mut worker.partials, MAX_TILE * self.state_len());
        grow(&mut worker.states, self.unit_len());
    }

    /// A row block and key head from first to last piece.
    fn whole(&self, unit: usize, worker: &mut Worker, out: &Disjoint<'_, f32>) {
        // Last first: the later rows of a chunk are the longer work.
        let block = &self.op.plan.blocks[self.op.plan.blocks.len() - 1 - unit / self.layout.kv_heads];
        let head = unit % self.layout.kv_heads;
        let len = self.state_len();
        let Worker { queries, scores, partials, states } = worker;
        let states = &mut states[..block.rows * self.group() * len];
        states.fill(0.0);
        for piece in 0..block.pieces {
            self.tiles(block, head, piece, queries, scores, partials, |first, tile| {
                for (state, partial) in
                    states[first * len..].chunks_exact_mut(len).zip(tile.chunks_exact(len))
                {
                    merge(state, partial);
                }
            });
        }
        self.finish(block, head, states, out);
    }

    /// One piece of a row block and key head, into its place of `shared`.
    fn one_piece(&self, task: usize, worker: &mut Worker, shared: &Disjoint<'_, f32>) {
        let (index, head) = (task / self.layout.kv_heads, task % self.layout.kv_heads);
        let (block, piece) = self.op.plan.pieces[index];
        let len = self.unit_len();
        // SAFETY: every task has its own part.
        let states = unsafe { shared.part(task * len..(task + 1) * len) };
        let Worker { queries, scores, partials, .. } = worker;
        self.tiles(&self.op.plan.blocks[block], head, piece, queries, scores, partials, |first, tile| {
            states[first * self.state_len()..][..tile.len()].copy_from_slice(tile);
        });
    }

    /// The pieces of a row block and key head, merged first to last.
    fn merge_pieces(&self, unit: usize, worker: &mut Worker, partials: &[f32], out: &Disjoint<'_, f32>) {
        let (block, head) = (&self.op.plan.blocks[unit / self.layout.kv_heads], unit % self.layout.kv_heads);
        let len = self.state_len();
        let states = &mut worker.states[..block.rows * self.group() * len];
        states.fill(0.0);
        for piece in 0..block.pieces {
            let task = (block.first_piece + piece) * self.layout.kv_heads + head;
            let partials = &partials[task * self.unit_len()..][..states.len()];
            for (state, partial) in states.chunks_exact_mut(len).zip(partials.chunks_exact(len)) {
                merge(state, partial);
            }
        }
        self.finish(block, head, states, out);
    }

    /// Computes the tiles of a piece and hands each one's states to `take` with the index of its
    /// first query. Query `i` of a row block is head `i % group` of row `i / group`.
    #[allow(clippy::too_many_arguments)] // the buffers of one worker, borrowed apart
    fn tiles(
        &self,
        block: &RowBlock,
        head: usize,
        piece: usize,
        queries: &mut [f32],
        scores: &mut [f32],
        partials: &mut [f32],
        mut take: impl FnMut(usize, &[f32]),
    ) {
        let (group, count) = (self.group(), block.rows * self.group());
        let table =
            &self.op.batch.block_tables[block.span.table..][..block.span.context.div_ceil(BLOCK_SIZE)];
        let table = &table[piece * PIECE / BLOCK_SIZE..];
        let step = self.op.level.tile();
        for first in (0..count).step_by(step) {
            let used = step.min(count - first);
            let tile = used.next_power_of_two();
            let mut limits = [0; MAX_TILE];
            for i in 0..tile {
                let query = first + i.min(used - 1); // lanes beyond the last query repeat it
                let row = query / group;
                limits[i] = (block.position + row + 1).saturating_sub(piece * PIECE).min(PIECE);
                let q = self.query(block.row + row, head * group + query % group);
                for (d, &x) in q.iter().enumerate() {
                    queries[d * tile + i] = x;
                }
            }
            let states = &mut partials[..tile * self.state_len()];
            self.op.level.run(Tile {
                queries: &queries[..tile * self.layout.head_dim],
                limits: &limits[..tile],
                kv: self.kv,
                layout: self.layout,
                head,
                table,
                scale: self.op.shape.scale,
                scores,
                states,
            });
            take(first, &states[..used * self.state_len()]);
        }
    }

    fn query(&self, row: usize, head: usize) -> &[f32] {
        let dim = self.layout.head_dim;
        &self.op.qkv[row * self.op.shape.qkv_width() + head * dim..][..dim]
    }

    /// Divides by the sums and writes the heads of a group.
    fn finish(&self, block: &RowBlock, head: usize, states: &[f32], out: &Disjoint<'_, f32>) {
        let (dim, padded, width) = (self.layout.head_dim, self.layout.padded(), self.op.shape.out_width());
        for (query, state) in states.chunks_exact(self.state_len()).enumerate() {
            let (row, head) = (block.row + query / self.group(), head * self.group() + query % self.group());
            let start = row * width + head * dim;
            // SAFETY: every row and head belongs to one unit.
            let out = unsafe { out.part(start..start + dim) };
            let scale = 1.0 / state[padded + 1];
            for (y, x) in out.iter_mut().zip(state) {
                *y = x * scale;
            }
        }
    }
}

/// Runs `tasks` tasks on up to `threads` threads, each with a worker's buffers of its own.
fn claim(
    pool: &Pool,
    threads: usize,
    tasks: usize,
    workers: &[Mutex<Worker>],
    run: impl Fn(usize, &mut Worker) + Sync,
) {
    let next = AtomicUsize::new(0);
    pool.run(threads.min(tasks), |thread| {
        let mut worker = workers[thread].lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let task = next.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                return;
            }
            run(task, &mut worker);
        }
    });
}

/// Merges the state of a later piece into a running one. A sum of zero means nothing seen.
fn merge(state: &mut [f32], piece: &[f32]) {
    let n = state.len() - 2;
    let (most, sum) = (state[n], state[n + 1]);
    let (piece_most, piece_sum) = (piece[n], piece[n + 1]);
    if piece_sum == 0.0 {
        return;
    }
    if sum == 0.0 {
        return state.copy_from_slice(piece);
    }
    let new = if piece_most > most { piece_most } else { most };
    let (a, b) = ((most - new).exp(), (piece_most - new).exp());
    for (x, y) in state[..n].iter_mut().zip(piece) {
        *x = *x * a + y * b;
    }
    state[n] = new;
    state[n + 1] = sum * a + piece_sum * b;
}

/// Up to [`Simd::TILE`] queries on one piece of their sequence.
struct Tile<'a, E> {
    /// `[head_dim, tile]`.
    queries: &'a [f32],
    /// How many of the piece's keys each query sees.
    limits: &'a [usize],
    /// The layer.
    kv: &'a [E],
    layout: Layout,
    head: usize,
    /// The sequence's blocks from the piece on.
    table: &'a [u32],
    scale: f32,
    scores: &'a mut [f32],
    states: &'a mut [f32],
}

impl<E: Element> Kernel for Tile<'_, E> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the caller's promise is the same.
        unsafe {
            match self.limits.len() {
                1 => self.compute::<S, 1>(),
                2 => self.compute::<S, 2>(),
                4 => self.compute::<S, 4>(),
                _ => self.compute::<S, 8>(),
            }
        }
    }
}

impl<E: Element> Tile<'_, E> {
    /// Fills `states`; `T` is the number of queries.
    ///
    /// # Safety
    /// The CPU has the instructions of `S`; so for the two parts below.
    #[inline(always)]
    unsafe fn compute<S: Simd, const T: usize>(mut self) {
        let limits: [usize; T] = std::array::from_fn(|i| self.limits[i]);
        let padded = self.layout.padded();
        // SAFETY: the caller's promise is the same.
        unsafe {
            self.products::<S, T>(limits);
            for (i, state) in self.states.chunks_exact_mut(padded + 2).enumerate() {
                let row = &mut self.scores[i * PIECE..(i + 1) * PIECE];
                let whole = limits[i].next_multiple_of(LANES);
                row[limits[i]..whole].fill(f32::NEG_INFINITY);
                (state[padded], state[padded + 1]) = simd::softmax::<S>(&mut row[..whole]);
            }
            self.values::<S, T>(limits);
        }
    }

    /// `scores[i, k] = query i * key k * scale`, sixteen keys at a time.
    #[inline(always)]
    unsafe fn products<S: Simd, const T: usize>(&mut self, limits: [usize; T]) {
        let most = limits.into_iter().fold(0, usize::max);
        let (queries, _) = self.queries.as_chunks::<T>();
        for (index, &block) in self.table[..most.div_ceil(BLOCK_SIZE)].iter().enumerate() {
            let start = self.layout.keys(block as usize, self.head);
            let keys = &self.kv[start..start + BLOCK_SIZE * self.layout.head_dim];
            // SAFETY: every chunk of keys and of scores is a vector.
            unsafe {
                let mut sums = [S::splat(0.0); T];
                for (keys, query) in keys.chunks_exact(BLOCK_SIZE).zip(queries) {
                    let keys = E::load::<S>(keys.as_ptr());
                    for i in 0..T {
                        sums[i] = S::fma(S::splat(query[i]), keys, sums[i]);
                    }
                }
                for (i, sum) in sums.into_iter().enumerate() {
                    let scores = &mut self.scores[i * PIECE + index * BLOCK_SIZE..][..BLOCK_SIZE];
                    S::store(scores.as_mut_ptr(), S::mul(sum, S::splat(self.scale)));
                }
            }
        }
    }

    /// `states[i] = sum over k of scores[i, k] * value k`, in the order of the keys.
    #[inline(always)]
    unsafe fn values<S: Simd, const T: usize>(&mut self, limits: [usize; T]) {
        let most = limits.into_iter().fold(0, usize::max);
        let least = limits.into_iter().fold(PIECE, usize::min);
        let padded = self.layout.padded();
        let scores: [&[f32]; T] = std::array::from_fn(|i| &self.scores[i * PIECE..(i + 1) * PIECE]);
        for part in (0..padded).step_by(LANES) {
            // SAFETY: a part of a value is a vector, as is a part of a state.
            unsafe {
                let mut sums = [S::splat(0.0); T];
                for (index, &block) in self.table[..most.div_ceil(BLOCK_SIZE)].iter().enumerate() {
                    let start = self.layout.values(block as usize, self.head);
                    let values = &self.kv[start..start + BLOCK_SIZE * padded];
                    let first = index * BLOCK_SIZE;
                    if first + BLOCK_SIZE <= least {
                        let weights: [&[f32]; T] =
                            std::array::from_fn(|i| &scores[i][first..first + BLOCK_SIZE]);
                        for (k, value) in values.chunks_exact(padded).enumerate() {
                            let value = E::load::<S>(value[part..part + LANES].as_ptr());
                            for i in 0..T {
                                sums[i] = S::fma(S::splat(weights[i][k]), value, sums[i]);
                            }
                        }
                        continue;
                    }
                    // A value some query must not see is not even multiplied by zero: it may be NaN.
                    for (k, value) in values.chunks_exact(padded).enumerate().take(most - first) {
                        let value = E::load::<S>(value[part..part + LANES].as_ptr());
                        for i in 0..T {
                            if first + k < limits[i] {
                                sums[i] = S::fma(S::splat(scores[i][first + k]), value, sums[i]);
                            }
                        }
                    }
                }
                for (i, sum) in sums.into_iter().enumerate() {
                    S::store(self.states[i * (padded + 2) + part..][..LANES].as_mut_ptr(), sum);
                }
            }
        }
    }
}
