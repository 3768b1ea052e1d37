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
//! computed in tiles, so that a key loaded once serves up to eight of them, and two vectors of keys
//! are computed beside each other, so that an element of a query loaded once serves both. Where
//! several tiles read a piece, it is widened to f32 once for all of them; pieces in bf16 are read as they are, by
//! [`attention_pairs`](super::attention_pairs).
//!
//! Within a sliding window, pieces and blocks that no query of a tile sees are passed over; what stands before the
//! window in a block is masked. A sink enters a query's sum when all pieces are merged.

use super::attention_pairs::{PairTile, Pairs};
use super::kv::{Bf16, Element, KvCache, Layer, Layout, Loaded};
use super::matmul;
use super::memory::from_line;
use super::pool::Pool;
use super::rows::Disjoint;
use super::simd::{self, Kernel, LANES, Level, Simd};
use crate::{AttentionShape, BLOCK_SIZE, Batch, Span};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Tokens of a piece.
pub(super) const PIECE: usize = 512;
/// Rows of one sequence that a thread takes at a time.
const ROWS: usize = 16;
/// Most queries in a tile.
pub(super) const MAX_TILE: usize = 8;
/// Tiles from which on widening a piece once is less work than widening it in each of them.
const WIDEN: usize = 3;
/// Multiplications below which one thread is as fast as several.
const SMALL: usize = 128 * 1024;
/// Most f32 that partial results may take when pieces are computed in parallel.
const MAX_PARTIALS: usize = 4 << 20;

/// How a step's attention over some of its rows is cut; the same for all layers.
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
    /// Plans all rows of `batch`.
    pub fn set(&mut self, batch: &Batch) {
        self.clear();
        for span in &batch.spans {
            for start in (0..span.len).step_by(ROWS) {
                self.push(span, start, ROWS.min(span.len - start));
            }
        }
    }

    /// Plans the rows of `batch` that are outputs.
    pub fn set_outputs(&mut self, batch: &Batch) {
        self.clear();
        let mut outputs = batch.outputs.iter().map(|&row| row as usize).peekable();
        for span in &batch.spans {
            while let Some(row) = outputs.next_if(|&row| row < span.start + span.len) {
                let mut rows = 1;
                while rows < ROWS
                    && outputs.next_if(|&next| next == row + rows && next < span.start + span.len).is_some()
                {
                    rows += 1;
                }
                self.push(span, row - span.start, rows);
            }
        }
    }

    fn clear(&mut self) {
        self.blocks.clear();
        self.pieces.clear();
        (self.max_rows, self.pairs) = (0, 0);
    }

    /// Plans `rows` rows of a sequence from its row `start` of this step on.
    fn push(&mut self, &span: &Span, start: usize, rows: usize) {
        let position = span.context - span.len + start;
        let pieces = (position + rows).div_ceil(PIECE);
        let first_piece = self.pieces.len();
        self.pieces.extend((0..pieces).map(|piece| (self.blocks.len(), piece)));
        self.blocks.push(RowBlock { span, row: span.start + start, rows, position, first_piece, pieces });
        self.max_rows = self.max_rows.max(rows);
        self.pairs += rows * (position + rows);
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
    /// The running results of a row block, `[queries, state]`.
    states: Vec<f32>,
    tile: TileBuffers,
}

/// What computing the tiles of a piece takes.
#[derive(Default)]
struct TileBuffers {
    /// The piece's keys and values in f32, as blocks of one head.
    widened: Vec<f32>,
    /// A tile's scores, `[tile, PIECE]`.
    scores: Vec<f32>,
    /// Its queries and probabilities in bf16.
    pairs: Pairs,
    /// Its results on one piece, `[tile, state]`.
    partials: Vec<f32>,
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
    /// Latest keys that a query sees, its own included; none: all.
    pub window: Option<usize>,
    /// A logit for each query head that draws its share of the softmax, if there are any.
    pub sinks: Option<&'a [f32]>,
    /// Rows `[q | k | v]`.
    pub qkv: &'a [f32],
    pub level: Level,
}

impl Attention<'_> {
    /// Computes `out`. All block tables are within `cache`.
    pub fn run(&self, pool: &Pool, cache: &KvCache, layer: usize, buffers: &mut Buffers, out: &Out<'_>) {
        match cache.layer(layer) {
            Layer::F16(kv) => Job { op: self, kv, layout: cache.layout }.run(pool, buffers, out),
            Layer::BF16(kv) => Job { op: self, kv, layout: cache.layout }.run(pool, buffers, out),
            Layer::F32(kv) => Job { op: self, kv, layout: cache.layout }.run(pool, buffers, out),
        }
    }
}

/// Where attention's result goes.
pub(super) struct Out<'a> {
    /// `[rows, heads * head_dim]`.
    pub rows: Disjoint<'a, f32>,
    /// The same in pairs of bf16, where they are wanted and a head is whole pairs.
    pub pairs: Option<Disjoint<'a, u32>>,
}

/// An [`Attention`] on elements of a known type.
struct Job<'a, E> {
    op: &'a Attention<'a>,
    kv: &'a [E],
    layout: Layout,
}

impl<E: Stored> Job<'_, E> {
    fn run(&self, pool: &Pool, buffers: &mut Buffers, out: &Out<'_>) {
        let plan = self.op.plan;
        let Buffers { workers, partials } = buffers;
        for worker in workers.iter_mut() {
            self.reserve(worker.get_mut().unwrap_or_else(PoisonError::into_inner));
        }
        let small = plan.pairs * self.op.shape.out_width() < SMALL;
        let threads = if small { 1 } else { pool.threads() };
        let units = plan.blocks.len() * self.layout.kv_heads;
        let len = plan.pieces.len() * self.layout.kv_heads * self.unit_len();
        let parallel_pieces = units < 2 * threads
            && threads > 1
            && plan.pieces.len() > plan.blocks.len()
            && len <= MAX_PARTIALS;
        if !parallel_pieces {
            return claim(pool, threads, units, workers, |unit, worker| self.whole(unit, worker, out));
        }
        partials.resize(partials.len().max(len), 0.0);
        let shared = Disjoint::new(partials);
        let tasks = plan.pieces.len() * self.layout.kv_heads;
        claim(pool, threads, tasks, workers, |task, worker| self.one_piece(task, worker, &shared));
        let partials = &*partials;
        claim(pool, threads, units, workers, |unit, worker| self.merge_pieces(unit, worker, partials, out));
    }

    /// Query heads that share a key head.
    fn group(&self) -> usize {
        self.op.shape.heads / self.op.shape.kv_heads
    }

    /// The first key that the query at a position of its sequence sees.
    fn first_key(&self, position: usize) -> usize {
        self.op.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// The first piece that a row block sees anything of.
    fn first_piece(&self, block: &RowBlock) -> usize {
        self.first_key(block.position) / PIECE
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
        let Worker { states, tile } = worker;
        if E::PAIRED {
            tile.pairs.reserve(self.op.plan.max_rows * self.group(), self.layout.head_dim);
        }
        if E::WIDENS && self.op.plan.max_rows * self.group() >= WIDEN * self.op.level.tile() {
            grow(&mut tile.widened, PIECE / BLOCK_SIZE * self.layout.head_len());
        }
        grow(&mut tile.scores, MAX_TILE * PIECE + LANES); // from a cache line on
        grow(&mut tile.partials, MAX_TILE * self.state_len());
        grow(states, self.unit_len());
    }

    /// A row block and key head from first to last piece.
    fn whole(&self, unit: usize, worker: &mut Worker, out: &Out<'_>) {
        // Last first: the later rows of a chunk are the longer work.
        let block = &self.op.plan.blocks[self.op.plan.blocks.len() - 1 - unit / self.layout.kv_heads];
        let head = unit % self.layout.kv_heads;
        let len = self.state_len();
        let Worker { states, tile } = worker;
        let states = &mut states[..block.rows * self.group() * len];
        states.fill(0.0);
        self.take_queries(block, head, &mut tile.pairs);
        for piece in self.first_piece(block)..block.pieces {
            self.tiles(block, head, piece, tile, |first, pieces| {
                self.op.level.run(Merge { states: &mut states[first * len..], pieces, len });
            });
        }
        self.finish(block, head, states, out);
    }

    /// One piece of a row block and key head, into its place of `shared`.
    fn one_piece(&self, task: usize, worker: &mut Worker, shared: &Disjoint<'_, f32>) {
        let (index, head) = (task / self.layout.kv_heads, task % self.layout.kv_heads);
        let (block, piece) = self.op.plan.pieces[index];
        let block = &self.op.plan.blocks[block];
        if piece < self.first_piece(block) {
            return;
        }
        let len = self.unit_len();
        // SAFETY: every task has its own part.
        let states = unsafe { shared.part(task * len..(task + 1) * len) };
        self.take_queries(block, head, &mut worker.tile.pairs);
        self.tiles(block, head, piece, &mut worker.tile, |first, tile| {
            states[first * self.state_len()..][..tile.len()].copy_from_slice(tile);
        });
    }

    /// The pieces of a row block and key head, merged first to last.
    fn merge_pieces(&self, unit: usize, worker: &mut Worker, partials: &[f32], out: &Out<'_>) {
        let (block, head) = (&self.op.plan.blocks[unit / self.layout.kv_heads], unit % self.layout.kv_heads);
        let len = self.state_len();
        let states = &mut worker.states[..block.rows * self.group() * len];
        states.fill(0.0);
        for piece in self.first_piece(block)..block.pieces {
            let task = (block.first_piece + piece) * self.layout.kv_heads + head;
            let pieces = &partials[task * self.unit_len()..][..states.len()];
            self.op.level.run(Merge { states, pieces, len });
        }
        self.finish(block, head, states, out);
    }

    /// Takes a row block's queries in the form that tiles want.
    fn take_queries(&self, block: &RowBlock, head: usize, pairs: &mut Pairs) {
        if E::PAIRED {
            let (dim, group) = (self.layout.head_dim, self.group());
            for row in 0..block.rows {
                let start = (block.row + row) * self.op.shape.qkv_width() + head * group * dim;
                let queries = &self.op.qkv[start..][..group * dim];
                pairs.take(self.op.level, queries, self.op.shape.scale, row * group, dim);
            }
        }
    }

    /// Computes the tiles of a piece and hands each one's states to `take` with the index of its
    /// first query. Query `i` of a row block is head `i % group` of row `i / group`.
    fn tiles(
        &self,
        block: &RowBlock,
        head: usize,
        piece: usize,
        buffers: &mut TileBuffers,
        mut take: impl FnMut(usize, &[f32]),
    ) {
        let TileBuffers { widened, scores, pairs, partials } = buffers;
        let scores = from_line(scores);
        let (group, count) = (self.group(), block.rows * self.group());
        let table =
            &self.op.batch.block_tables[block.span.table..][..block.span.context.div_ceil(BLOCK_SIZE)];
        let table = &table[piece * PIECE / BLOCK_SIZE..];
        let step = self.op.level.tile();
        let widen = E::WIDENS && count >= WIDEN * step;
        if widen {
            let keys = (block.position + block.rows - piece * PIECE).min(PIECE);
            let unseen = self.first_key(block.position).saturating_sub(piece * PIECE) / BLOCK_SIZE;
            let from = unseen * self.layout.head_len();
            self.widen(&table[unseen..keys.div_ceil(BLOCK_SIZE)], head, &mut widened[from..]);
        }
        for first in (0..count).step_by(step) {
            let used = step.min(count - first);
            let tile = used.next_power_of_two();
            let (mut begins, mut limits) = ([0; MAX_TILE], [0; MAX_TILE]);
            let mut queries = [&[][..]; MAX_TILE];
            for i in 0..tile {
                let query = first + i.min(used - 1); // lanes beyond the last query repeat it; for pairs they hold what lies there
                let row = query / group;
                let position = block.position + row;
                begins[i] = self.first_key(position).saturating_sub(piece * PIECE).min(PIECE);
                limits[i] = (position + 1).saturating_sub(piece * PIECE).min(PIECE);
                queries[i] = self.query(block.row + row, head * group + query % group);
            }
            let (begins, limits, queries) = (&begins[..tile], &limits[..tile], &queries[..tile]);
            let (layout, scale) = (self.layout, self.op.shape.scale);
            let states = &mut partials[..tile * self.state_len()];
            if widen {
                let (kv, layout) = (&widened[..], Layout { kv_heads: 1, ..layout });
                let table = &IN_ORDER;
                let tile =
                    Tile { queries, begins, limits, kv, layout, head: 0, table, scale, scores, states };
                self.op.level.run(tile);
            } else {
                let kv = self.kv;
                let tile = Tile { queries, begins, limits, kv, layout, head, table, scale, scores, states };
                E::run(self.op.level, tile, first, pairs);
            }
            take(first, &partials[..used * self.state_len()]);
        }
    }

    /// Widens a head of the blocks of `table` to blocks of one head in order.
    fn widen(&self, table: &[u32], head: usize, to: &mut [f32]) {
        let len = self.layout.head_len();
        for (&block, to) in table.iter().zip(to.chunks_exact_mut(len)) {
            let from = &self.kv[self.layout.keys(block as usize, head)..][..len];
            E::widen(self.op.level, from, to);
        }
    }

    fn query(&self, row: usize, head: usize) -> &[f32] {
        let dim = self.layout.head_dim;
        &self.op.qkv[row * self.op.shape.qkv_width() + head * dim..][..dim]
    }

    /// Divides by the sums and writes the heads of a group.
    fn finish(&self, block: &RowBlock, head: usize, states: &[f32], out: &Out<'_>) {
        let (dim, group, len) = (self.layout.head_dim, self.group(), self.state_len());
        let sinks = self.op.sinks.map(|sinks| &sinks[head * group..][..group]);
        for (row, states) in states.chunks_exact(group * len).enumerate() {
            let start = (block.row + row) * self.op.shape.out_width() + head * group * dim;
            // SAFETY: every row and head belongs to one unit.
            let to = unsafe { out.rows.part(start..start + group * dim) };
            // SAFETY: likewise.
            let pairs =
                out.pairs.as_ref().map(|pairs| unsafe { pairs.part(start / 2..(start + group * dim) / 2) });
            self.op.level.run(Finish { states, len, sinks, dim, to, pairs });
        }
    }
}

/// The states of a row's neighbouring heads divided by their sums, and in pairs of bf16 where they are wanted.
struct Finish<'a> {
    states: &'a [f32],
    /// f32 of a state.
    len: usize,
    sinks: Option<&'a [f32]>,
    /// Elements of a head.
    dim: usize,
    to: &'a mut [f32],
    pairs: Option<&'a mut [u32]>,
}

impl Kernel for Finish<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Finish { states, len, sinks, dim, to, pairs } = self;
        for (head, (state, to)) in states.chunks_exact(len).zip(to.chunks_exact_mut(dim)).enumerate() {
            let sink = sinks.map_or(0.0, |sinks| (sinks[head] - state[len - 2]).exp());
            let scale = 1.0 / (state[len - 1] + sink);
            for (y, x) in to.iter_mut().zip(state) {
                *y = x * scale;
            }
        }
        if let Some(pairs) = pairs {
            // SAFETY: the caller's promise is the same.
            unsafe { matmul::Pairs { x: to, row: to.len(), out: pairs }.run::<S>() };
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

/// Merges the states of a later piece into running ones. A sum of zero means nothing seen.
struct Merge<'a> {
    states: &'a mut [f32],
    pieces: &'a [f32],
    /// f32 of a state.
    len: usize,
}

impl Kernel for Merge<'_> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let n = self.len - 2;
        for (state, piece) in self.states.chunks_exact_mut(self.len).zip(self.pieces.chunks_exact(self.len)) {
            let (most, sum) = (state[n], state[n + 1]);
            let (piece_most, piece_sum) = (piece[n], piece[n + 1]);
            if piece_sum == 0.0 {
                continue;
            }
            if sum == 0.0 {
                state.copy_from_slice(piece);
                continue;
            }
            let (new, a, b) = match piece_most > most {
                true => (piece_most, (most - piece_most).exp(), 1.0),
                false => (most, 1.0, (piece_most - most).exp()),
            };
            for (x, y) in state[..n].chunks_exact_mut(LANES).zip(piece.chunks_exact(LANES)) {
                // SAFETY: every chunk is a vector; the instructions are the caller's promise.
                unsafe {
                    let scaled = S::mul(S::load(x.as_ptr()), S::splat(a));
                    S::store(x.as_mut_ptr(), S::add(scaled, S::mul(S::load(y.as_ptr()), S::splat(b))));
                }
            }
            state[n] = new;
            state[n + 1] = sum * a + piece_sum * b;
        }
    }
}

/// How attention reads an element.
trait Stored: Element {
    /// Whether it may pay to widen a piece once for many tiles.
    const WIDENS: bool;
    /// Widens whole vectors; called only where [`Stored::WIDENS`].
    fn widen(level: Level, from: &[Self], to: &mut [f32]);
    /// Computes a tile whose first query is `first` of the row block's; `pairs` has them where elements lie in pairs.
    fn run(level: Level, tile: Tile<'_, Self>, first: usize, pairs: &mut Pairs);
}

impl Stored for u16 {
    const WIDENS: bool = true;
    fn widen(level: Level, from: &[Self], to: &mut [f32]) {
        level.run(Widen { from, to });
    }
    fn run(level: Level, tile: Tile<'_, Self>, _: usize, _: &mut Pairs) {
        level.run(tile);
    }
}

impl Stored for f32 {
    const WIDENS: bool = false;
    fn widen(_: Level, from: &[Self], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
    fn run(level: Level, tile: Tile<'_, Self>, _: usize, _: &mut Pairs) {
        level.run(tile);
    }
}

impl Stored for Bf16 {
    const WIDENS: bool = false;
    fn widen(_: Level, _: &[Self], _: &mut [f32]) {
        unreachable!("pairs are not widened");
    }
    fn run(level: Level, tile: Tile<'_, Self>, first: usize, pairs: &mut Pairs) {
        level.run(PairTile { tile, first, pairs });
    }
}

/// The block table of a widened piece.
const IN_ORDER: [u32; PIECE / BLOCK_SIZE] = {
    let mut table = [0; PIECE / BLOCK_SIZE];
    let mut i = 0;
    while i < table.len() {
        table[i] = i as u32;
        i += 1;
    }
    table
};

/// Whole vectors of stored elements to f32.
struct Widen<'a, E> {
    from: &'a [E],
    to: &'a mut [f32],
}

impl<E: Loaded> Kernel for Widen<'_, E> {
    type Output = ();
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for (from, to) in self.from.chunks_exact(LANES).zip(self.to.chunks_exact_mut(LANES)) {
            // SAFETY: every chunk is a vector; the instructions are the caller's promise.
            unsafe { S::store(to.as_mut_ptr(), E::load::<S>(from.as_ptr())) };
        }
    }
}

/// Up to [`Simd::TILE`] queries on one piece of their sequence.
pub(super) struct Tile<'a, E> {
    /// `head_dim` elements each. Pairs have their own.
    pub queries: &'a [&'a [f32]],
    /// The first of the piece's keys that each query sees.
    pub begins: &'a [usize],
    /// Behind the last of the piece's keys that each query sees.
    pub limits: &'a [usize],
    /// The layer, or a widened piece.
    pub kv: &'a [E],
    pub layout: Layout,
    pub head: usize,
    /// The sequence's blocks from the piece on.
    pub table: &'a [u32],
    /// Of the scores; pairs' queries have it already.
    pub scale: f32,
    pub scores: &'a mut [f32],
    pub states: &'a mut [f32],
}

impl<E: Loaded> Kernel for Tile<'_, E> {
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

impl<E: Loaded> Tile<'_, E> {
    /// Fills `states`; `T` is the number of queries.
    ///
    /// # Safety
    /// The CPU has the instructions of `S`; so for the parts below.
    #[inline(always)]
    unsafe fn compute<S: Simd, const T: usize>(mut self) {
        let limits: [usize; T] = std::array::from_fn(|i| self.limits[i]);
        let begins: [usize; T] = std::array::from_fn(|i| self.begins[i]);
        let most = limits.into_iter().fold(0, usize::max);
        let (blocks, padded) = (most.div_ceil(BLOCK_SIZE), self.layout.padded());
        let first = (begins.into_iter().fold(PIECE, usize::min) / BLOCK_SIZE).min(blocks);
        // Two vectors of sums for each query where they fit the registers, and one for what is left.
        let (pairs, pair_parts) = match S::PAIRS {
            true => (first + (blocks - first) / 2 * 2, padded / LANES / 2 * 2),
            false => (first, 0),
        };
        // SAFETY: the caller's promise is the same.
        unsafe {
            for block in (first..pairs).step_by(2) {
                self.products::<S, T, 2>(block);
            }
            for block in pairs..blocks {
                self.products::<S, T, 1>(block);
            }
            for (i, state) in self.states.chunks_exact_mut(padded + 2).enumerate() {
                let row = &mut self.scores[i * PIECE..(i + 1) * PIECE];
                let (start, end) = (begins[i] / LANES * LANES, limits[i].next_multiple_of(LANES));
                row[start..begins[i]].fill(f32::NEG_INFINITY);
                row[limits[i]..end].fill(f32::NEG_INFINITY);
                (state[padded], state[padded + 1]) = simd::softmax::<S>(&mut row[start..end]);
            }
            for part in (0..pair_parts).step_by(2) {
                self.values::<S, T, 2>(begins, limits, part * LANES);
            }
            for part in pair_parts..padded / LANES {
                self.values::<S, T, 1>(begins, limits, part * LANES);
            }
        }
    }

    /// `scores[i, k] = query i * key k * scale` for the keys of `B` blocks from `block` of the table on.
    #[inline(always)]
    unsafe fn products<S: Simd, const T: usize, const B: usize>(&mut self, block: usize) {
        let dim = self.layout.head_dim;
        // `array::from_fn` lacks the instructions of `S`, so it would call its closure for each element.
        let (mut queries, mut keys) = ([&[][..]; T], [&[][..]; B]);
        for (to, query) in queries.iter_mut().zip(&self.queries[..T]) {
            *to = &query[..dim];
        }
        for (to, &block) in keys.iter_mut().zip(&self.table[block..block + B]) {
            let start = self.layout.keys(block as usize, self.head);
            *to = &self.kv[start..][..BLOCK_SIZE * dim];
        }
        // SAFETY: `d` is below the queries' length; `BLOCK_SIZE` keys' elements `d` and as many scores are a vector.
        unsafe {
            let mut sums = [[S::splat(0.0); B]; T];
            for d in 0..dim {
                let mut key = [S::splat(0.0); B];
                for b in 0..B {
                    key[b] = E::load::<S>(keys[b].as_ptr().add(d * BLOCK_SIZE));
                }
                for i in 0..T {
                    let x = S::splat(*queries[i].get_unchecked(d));
                    for b in 0..B {
                        sums[i][b] = S::fma(x, key[b], sums[i][b]);
                    }
                }
            }
            for (i, sums) in sums.into_iter().enumerate() {
                for (b, sum) in sums.into_iter().enumerate() {
                    let scores = &mut self.scores[i * PIECE + (block + b) * BLOCK_SIZE..][..BLOCK_SIZE];
                    S::store(scores.as_mut_ptr(), S::mul(sum, S::splat(self.scale)));
                }
            }
        }
    }

    /// `states[i] = sum over k of scores[i, k] * value k`, in the order of the keys, for `P` vectors of
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
        let padded = self.layout.padded();
        let scores = &self.scores[..T * PIECE];
        // SAFETY: `P` parts of a value are as many vectors, as are those of a state; a key's index in the
        // piece is below `PIECE`.
        unsafe {
            let mut sums = [[S::splat(0.0); P]; T];
            let blocks = self.table[..most.div_ceil(BLOCK_SIZE)].iter().enumerate();
            for (index, &block) in blocks.skip(earliest / BLOCK_SIZE) {
                let start = self.layout.values(block as usize, self.head);
                let values = &self.kv[start..start + BLOCK_SIZE * padded];
                let first = index * BLOCK_SIZE;
                // Keys that some queries see, then those that all see, then again some.
                let end = most.min(first + BLOCK_SIZE);
                let begin = earliest.clamp(first, end);
                let all_from = latest.clamp(begin, end);
                let all_to = least.clamp(all_from, end);
                for key in begin..all_from {
                    let value = values[(key - first) * padded + part..][..P * LANES].as_ptr();
                    let sees = std::array::from_fn(|i| begins[i] <= key && key < limits[i]);
                    add::<S, E, T, P>(&mut sums, value, scores[key..].as_ptr(), Some(sees));
                }
                for key in all_from..all_to {
                    let value = values[(key - first) * padded + part..][..P * LANES].as_ptr();
                    add::<S, E, T, P>(&mut sums, value, scores[key..].as_ptr(), None);
                }
                for key in all_to..end {
                    let value = values[(key - first) * padded + part..][..P * LANES].as_ptr();
                    let sees = std::array::from_fn(|i| begins[i] <= key && key < limits[i]);
                    add::<S, E, T, P>(&mut sums, value, scores[key..].as_ptr(), Some(sees));
                }
            }
            for (i, sums) in sums.into_iter().enumerate() {
                let state = &mut self.states[i * (padded + 2) + part..][..P * LANES];
                for (p, sum) in sums.into_iter().enumerate() {
                    S::store(state[p * LANES..].as_mut_ptr(), sum);
                }
            }
        }
    }
}

/// `sums[i] += scores[i] * value` for the queries that see the value (all if `sees` is none), for `P` vectors
/// of its elements; the scores lie [`PIECE`] apart.
///
/// # Safety
/// The CPU has the instructions of `S`; the vectors and scores can be read.
#[inline(always)]
unsafe fn add<S: Simd, E: Loaded, const T: usize, const P: usize>(
    sums: &mut [[S::V; P]; T],
    value: *const E,
    scores: *const f32,
    sees: Option<[bool; T]>,
) {
    // SAFETY: the caller's promise is the same.
    unsafe {
        let mut parts = [S::splat(0.0); P];
        for (p, part) in parts.iter_mut().enumerate() {
            *part = E::load::<S>(value.add(p * LANES));
        }
        for (i, sums) in sums.iter_mut().enumerate() {
            // A value a query must not see is not even multiplied by zero: it may be NaN.
            if sees.is_none_or(|sees| sees[i]) {
                let score = S::splat(*scores.add(i * PIECE));
                for p in 0..P {
                    sums[p] = S::fma(score, parts[p], sums[p]);
                }
            }
        }
    }
}
