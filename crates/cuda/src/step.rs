//! A step's batch on the device: what the kernels need to know of it, in one buffer, brought there by one copy.

use crate::device::{Arg, Device, Inlet};
use crate::matmul::Instructions;
use crate::shared_prefix::{Alone, SharedPrefix, SharedPrefixes};
use rudder_ops::{AttentionShape, BLOCK_SIZE, Batch, OpError, Result};

/// (token, head) rows that a tile of prefill attention holds, and one of the kernels made for a GPU.
const TILE_ROWS: usize = 64;
const WIDE_TILE_ROWS: usize = 128;
/// Tokens in one split of decode attention where there are rows enough, and the fewest; as in attention.cu.
pub(crate) const SPLIT: usize = 256;
const LEAST_SPLIT: usize = 64;
/// An H200's, each of which is to have a block; as in attention.cu.
const MULTIPROCESSORS: usize = 132;
/// The longest context that counts as short.
const LONG: usize = 4 * SPLIT;
/// Head sizes that the fast attention kernels are compiled for.
pub(crate) const HEAD_DIMS: [usize; 4] = [64, 96, 128, 256];

/// The slot of a row that writes no keys and values; as in attention.cu.
const NO_SLOT: u32 = u32::MAX;

/// In place of an output: the row's token is known; as in rows.cu.
const KNOWN: u32 = u32::MAX;

/// Tokens of a row's splits, of which it sees `seen` tokens, where one split of every row is `blocks` blocks; as `split_of` in attention.cu.
pub(crate) fn split_of(seen: usize, blocks: usize) -> usize {
    let mut split = SPLIT;
    while seen > SPLIT && split > LEAST_SPLIT && blocks * seen.div_ceil(split) < MULTIPROCESSORS {
        split /= 2;
    }
    split
}

/// The most splits that a row has which sees up to `longest` tokens, at least one.
pub(crate) fn most_splits(longest: usize, blocks: usize) -> usize {
    // Splits are halved while they are too few, so that they become fewer than twice as many as enough.
    let small = if longest > SPLIT { 2 * ((MULTIPROCESSORS - 1) / blocks.max(1)) } else { 1 };
    longest.div_ceil(SPLIT).max(longest.div_ceil(LEAST_SPLIT).min(small)).max(1)
}

/// Blocks of one split of one row.
pub(crate) fn blocks_of(shape: &AttentionShape) -> usize {
    shape.kv_heads * (shape.heads / shape.kv_heads).div_ceil(16)
}

/// Where each list of a step begins in its buffer, in bytes, in the order of [`List`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum List {
    /// Token ids, one a row.
    Tokens,
    /// In a step of decodes, which output of the step before drew a row's token, or [`KNOWN`].
    Drawn,
    /// Positions, one a row.
    Positions,
    /// KV slots, one a row.
    Slots,
    /// Where a row's block table begins, one a row.
    RowTables,
    /// Keys that a row sees, one a row.
    RowContexts,
    /// Rows whose logits are wanted.
    Outputs,
    /// Rows that attention computes one by one.
    Alone,
    /// Tiles of prefill attention, four words each: first row, tokens, first token's position, block table.
    Tiles,
    /// How many of its first splits each row computed alone shares; none where nothing is shared.
    Shared,
    /// What such rows share (see [`SharedPrefix::tiles`]).
    SharedTiles,
    /// All block tables.
    Tables,
}

const LISTS: usize = List::Tables as usize + 1;

/// The open step.
pub(crate) struct Step {
    lists: [Vec<u32>; LISTS],
    offsets: [usize; LISTS],
    words: Vec<u32>,
    inlet: Inlet,
    /// Rows that kernels compute: those of the batch, and in a decode step rows of nothing behind them, so that steps of about as
    /// many sequences are the same launches.
    pub rows: usize,
    /// Rows of the batch.
    pub real: usize,
    /// Most rows that a step may be padded to: what every tensor has room for.
    pub room: usize,
    /// Largest token id of the batch.
    pub largest_token: u32,
    /// Blocks that a cache must have for the step's slots and block tables to lie in it.
    pub blocks: usize,
    /// The longest context among the rows computed alone.
    longest: usize,
    /// Blocks of one split of all of them, as [`split_of`] takes it.
    pub split_blocks: usize,
    /// Whether it is a decode step.
    decode: bool,
    /// For which attention the rows were divided into tiles.
    pub shape: Option<AttentionShape>,
    /// What computes the tiles.
    pub instructions: Instructions,
    /// What the rows computed alone have in common.
    pub prefix: SharedPrefix,
}

impl Step {
    pub fn new() -> Self {
        Self {
            lists: Default::default(),
            offsets: [0; LISTS],
            words: Vec::new(),
            inlet: Inlet::default(),
            rows: 0,
            real: 0,
            room: usize::MAX,
            largest_token: 0,
            blocks: 0,
            longest: 0,
            split_blocks: MULTIPROCESSORS,
            decode: false,
            shape: None,
            instructions: Instructions::Mma,
            prefix: SharedPrefix::default(),
        }
    }

    /// Entries of a list; of tiles, words.
    pub fn len(&self, list: List) -> usize {
        self.lists[list as usize].len()
    }

    /// A list as a kernel's argument.
    pub fn arg(&self, list: List) -> Arg {
        self.arg_from(list, 0)
    }

    /// The same, of a list that not all steps have.
    pub fn given(&self, list: List) -> Arg {
        if self.len(list) == 0 { Arg::NULL } else { self.arg(list) }
    }

    /// A list from its entry `first` on.
    pub fn arg_from(&self, list: List, first: usize) -> Arg {
        let at = self.offsets[list as usize] + 4 * first;
        self.inlet.buffer().map_or(Arg::NULL, |buffer| Arg::at(buffer, at))
    }

    /// Takes over a batch, after checking that it does not contradict itself, and queues its copy to the device.
    pub fn set(&mut self, batch: &Batch, device: &Device) -> Result<()> {
        check(batch)?;
        self.real = batch.rows();
        self.rows = if is_decode(batch) { padded_rows(self.real, self.room) } else { self.real };
        self.largest_token = batch.tokens.iter().copied().max().unwrap_or(0);
        let used =
            batch.block_tables.iter().copied().chain(batch.slots.iter().map(|s| s / BLOCK_SIZE as u32));
        self.blocks = used.max().map_or(0, |block| block as usize + 1);
        self.fill(batch);
        self.layout();
        self.inlet.send(device, bytes(&self.words)).map(drop)
    }

    fn fill(&mut self, batch: &Batch) {
        self.lists.iter_mut().for_each(Vec::clear);
        let mut put = |list: List, values: &[u32]| self.lists[list as usize].extend_from_slice(values);
        put(List::Tokens, &batch.tokens);
        put(List::Drawn, &batch.drawn);
        put(List::Positions, &batch.positions);
        put(List::Slots, &batch.slots);
        put(List::Outputs, &batch.outputs);
        put(List::Tables, &batch.block_tables);
        // A row of no sequence sees nothing, and its keys and values go nowhere.
        for list in [List::Tokens, List::Positions, List::RowTables, List::RowContexts] {
            self.lists[list as usize].resize(self.rows, 0);
        }
        self.lists[List::Slots as usize].resize(self.rows, NO_SLOT);
        let rows_a_tile = match self.instructions {
            Instructions::Mma => TILE_ROWS,
            Instructions::Wgmma | Instructions::Tcgen05 => WIDE_TILE_ROWS,
        };
        let tokens_a_tile = self.shape.as_ref().map_or(0, |shape| tile_tokens(shape, rows_a_tile));
        self.longest = 0;
        self.prefix.clear();
        for span in &batch.spans {
            let computed = span.context - span.len;
            for i in 0..span.len {
                self.lists[List::RowTables as usize][span.start + i] = span.table as u32;
                self.lists[List::RowContexts as usize][span.start + i] = (computed + i + 1) as u32;
            }
            // A tile goes through its context alone. Over a long one, a span that fills no more than one tile is faster row by row,
            // each row's context split.
            let tiled = span.len > tokens_a_tile || (span.len > 1 && span.context <= LONG);
            if tiled && tokens_a_tile > 0 {
                for first in (0..span.len).step_by(tokens_a_tile) {
                    let tokens = tokens_a_tile.min(span.len - first);
                    let tile = [span.start + first, tokens, computed + first, span.table];
                    self.lists[List::Tiles as usize].extend(tile.map(|n| n as u32));
                }
            } else {
                self.prefix.rows.extend((0..span.len).map(|i| Alone {
                    row: (span.start + i) as u32,
                    table: span.table,
                    context: computed + i + 1,
                    split: SPLIT,
                    shared: 0,
                }));
                self.longest = self.longest.max(span.context);
            }
        }
        self.decode = is_decode(batch);
        self.share(batch);
        if self.decode {
            for list in [List::Outputs, List::Alone] {
                self.lists[list as usize].extend(self.real as u32..self.rows as u32);
            }
            // Known or not, the step is the same launches.
            self.lists[List::Drawn as usize].resize(self.rows, KNOWN);
            let shared = &mut self.lists[List::Shared as usize];
            shared.resize(if shared.is_empty() { 0 } else { self.rows }, 0);
        }
    }

    /// Lists the rows computed alone, and what they share.
    fn share(&mut self, batch: &Batch) {
        if let Some(shape) = self.shape.filter(|shape| HEAD_DIMS.contains(&shape.head_dim)) {
            // Which rows are computed alone goes with their lengths, and no row's splits may.
            let alone = if self.decode { self.rows } else { batch.rows() };
            self.split_blocks = match self.prefix.when {
                SharedPrefixes::Auto => (alone * blocks_of(&shape)).min(MULTIPROCESSORS),
                SharedPrefixes::Always | SharedPrefixes::Never => MULTIPROCESSORS,
            };
            for row in &mut self.prefix.rows {
                row.split = split_of(row.context, self.split_blocks);
            }
            self.prefix.find(&batch.block_tables, shape.heads / shape.kv_heads);
        }
        let rows = &self.prefix.rows;
        self.lists[List::Alone as usize].extend(rows.iter().map(|row| row.row));
        if !self.prefix.tiles.is_empty() {
            self.lists[List::Shared as usize].extend(rows.iter().map(|row| row.shared));
            self.lists[List::SharedTiles as usize].extend(&self.prefix.tiles);
        }
    }

    /// The most splits of a row computed alone, of which none sees more than `window` tokens. Decode steps round it up, so that more of them are
    /// the same launches.
    pub fn splits(&self, window: usize) -> usize {
        let splits = most_splits(self.longest.min(window), self.split_blocks);
        if self.decode { splits.next_power_of_two() } else { splits }
    }

    /// Of a tensor's rows those that are no padding.
    pub fn real_of(&self, rows: usize) -> usize {
        if rows == self.rows { self.real } else { rows }
    }

    /// Lays the lists side by side, each on 16 bytes.
    fn layout(&mut self) {
        self.words.clear();
        for (list, offset) in self.lists.iter().zip(&mut self.offsets) {
            *offset = 4 * self.words.len();
            self.words.extend_from_slice(list);
            self.words.resize(self.words.len().next_multiple_of(4), 0);
        }
    }
}

/// Tokens in a tile of prefill attention of so many (token, head) rows; 0 where there is no such kernel.
fn tile_tokens(shape: &AttentionShape, rows: usize) -> usize {
    if HEAD_DIMS.contains(&shape.head_dim) { rows / (shape.heads / shape.kv_heads) } else { 0 }
}

/// Whether every row is a sequence's next token, and its logits are wanted.
pub(crate) fn is_decode(batch: &Batch) -> bool {
    let rows = batch.rows();
    rows > 0 && batch.spans.len() == rows && batch.outputs.len() == rows
}

/// Rows that a decode step of `rows` is padded to: up to an eighth more, as far as there is room.
fn padded_rows(rows: usize, room: usize) -> usize {
    let step = (rows.next_power_of_two() / 8).max(1);
    let padded = rows.next_multiple_of(step);
    if padded <= room { padded } else { rows }
}

fn check(batch: &Batch) -> Result<()> {
    let refuse = |what: String| Err(OpError::Backend(what));
    let rows = batch.rows();
    if batch.positions.len() != rows || batch.slots.len() != rows {
        return refuse("a batch's tokens, positions and slots differ in number".to_owned());
    }
    if !batch.drawn.is_empty() && (batch.drawn.len() != rows || !is_decode(batch)) {
        return refuse("a batch of drawn tokens and others".to_owned());
    }
    for span in &batch.spans {
        let table = span.table.saturating_add(span.context.div_ceil(BLOCK_SIZE));
        let fits = span.len <= span.context && table <= batch.block_tables.len();
        if !fits || span.start.saturating_add(span.len) > rows {
            return refuse(format!("a batch holds a bad {span:?}"));
        }
    }
    if batch.outputs.iter().any(|&row| row as usize >= rows) {
        return refuse("a batch wants the output of a row that it does not have".to_owned());
    }
    Ok(())
}

/// The bytes of plain numbers.
pub(crate) fn bytes<T: Copy>(data: &[T]) -> &[u8] {
    // SAFETY: used with types without padding; any initialised memory is bytes.
    unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), std::mem::size_of_val(data)) }
}

/// The bytes of plain numbers, to be written.
pub(crate) fn bytes_mut<T: Copy>(data: &mut [T]) -> &mut [u8] {
    // SAFETY: used with types that any bytes are a value of.
    unsafe { std::slice::from_raw_parts_mut(data.as_mut_ptr().cast(), std::mem::size_of_val(data)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(shape: Option<AttentionShape>, batch: &Batch) -> Step {
        let rows = batch.rows();
        let mut step = Step { shape, rows, real: rows, ..Step::new() };
        step.fill(batch);
        step.layout();
        step
    }

    fn list(step: &Step, list: List) -> &[u32] {
        &step.lists[list as usize]
    }

    #[test]
    fn decodes_are_alone_and_prompts_in_tiles_of_64_heads() {
        let mut batch = Batch::default();
        batch.push(&[1; 21], 5, &[0, 1], 1);
        batch.push(&[2], 600, &(10..48).collect::<Vec<_>>(), 1);
        let shape = AttentionShape { heads: 14, kv_heads: 2, head_dim: 64, scale: 1.0 };
        let tiled = step(Some(shape), &batch);
        // 64 / 7 heads: nine tokens a tile.
        assert_eq!(list(&tiled, List::Tiles), [0, 9, 5, 0, 9, 9, 14, 0, 18, 3, 23, 0]);
        assert_eq!((list(&tiled, List::Alone), tiled.splits(usize::MAX)), (&[21u32][..], 4));
        assert_eq!(list(&tiled, List::RowContexts)[19..], [25, 26, 601]);
        assert_eq!(list(&tiled, List::RowTables)[20..], [0, 2]);

        let mut drafts = Batch::default();
        drafts.push(&[1; 5], 1100, &(0..70).collect::<Vec<_>>(), 5);
        drafts.push(&[1; 10], 1100, &(70..140).collect::<Vec<_>>(), 1);
        let mixed = step(Some(shape), &drafts);
        assert_eq!(list(&mixed, List::Alone), [0, 1, 2, 3, 4]);
        assert_eq!(list(&mixed, List::Tiles), [5, 9, 1100, 70, 14, 1, 1109, 70]);

        let odd = step(Some(AttentionShape { head_dim: 80, ..shape }), &batch);
        assert_eq!((odd.len(List::Tiles), odd.len(List::Alone)), (0, 22));
    }

    #[test]
    fn decode_steps_are_padded_by_rows_of_nothing() {
        assert_eq!(
            [1, 8, 9, 15, 17, 33, 100, 129].map(|n| padded_rows(n, 1000)),
            [1, 8, 10, 16, 20, 40, 112, 160]
        );
        assert_eq!((padded_rows(9, 10), padded_rows(9, 9)), (10, 9));
        let mut batch = Batch::default();
        (0..9).for_each(|i| batch.push(&[i], 300 + i as usize, &(0..20).collect::<Vec<_>>(), 1));
        assert!(is_decode(&batch));
        let mut step = Step { rows: 10, real: 9, ..Step::new() };
        step.fill(&batch);
        assert_eq!(list(&step, List::Alone), (0..10).collect::<Vec<_>>());
        assert_eq!((list(&step, List::Outputs).len(), list(&step, List::Slots)[9]), (10, NO_SLOT));
        assert_eq!((list(&step, List::RowContexts)[8], list(&step, List::RowContexts)[9]), (309, 0));
        assert_eq!((step.splits(usize::MAX), step.real_of(10), step.real_of(7)), (2, 9, 7));
        batch.push(&[1, 2], 0, &[21], 1);
        assert!(!is_decode(&batch));
    }

    #[test]
    fn contexts_are_cut_into_more_splits_where_few_rows_run() {
        // One row of eight KV heads, then eight; what fits one split stays whole.
        let of = |blocks| move |seen| split_of(seen, blocks);
        assert_eq!([256, 257, 2048, 2049, 4096, 4097].map(of(8)), [256, 64, 64, 128, 128, 256]);
        assert_eq!([256, 300, 600, 1200].map(of(64)), [256, 128, 256, 256]);
        assert_eq!([300, 600].map(of(MULTIPROCESSORS)), [256, 256]);
        for blocks in 1..=MULTIPROCESSORS {
            let mut most = 0;
            for seen in 1..6000usize {
                most = most.max(seen.div_ceil(split_of(seen, blocks)));
                let room = most_splits(seen, blocks);
                assert!(most <= room && room <= 2 * most, "{seen} tokens, {blocks} blocks: {most}, {room}");
            }
        }
    }

    #[test]
    fn lists_begin_on_16_bytes_and_keep_what_they_hold() {
        let mut batch = Batch::default();
        batch.push(&[7, 8, 9], 0, &[4], 2);
        let step = step(None, &batch);
        assert!(step.offsets.iter().all(|offset| offset.is_multiple_of(16)));
        let at = step.offsets[List::Outputs as usize] / 4;
        assert_eq!(step.words[at..at + 2], [1, 2]);
        let at = step.offsets[List::Tables as usize] / 4;
        assert_eq!(step.words[at], 4);
    }
}
