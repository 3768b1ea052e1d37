//! Rows of a step that see the same keys: sequences that begin alike, and a sequence's drafted tokens.
//!
//! Decode attention takes a context in splits of 256 tokens, of fewer only where few rows see little, and combines the splits' results by their
//! sums of exponentials. So a split whose blocks several rows have in common can be computed for all of them at once: a cascade of as many
//! levels as the prefixes have. Which those are is read off the block tables in every step: what the prefix tree shares are the same blocks. The
//! kernel puts the bits in place that the rows would have computed alone.

use crate::step::SPLIT;
use rudder_ops::BLOCK_SIZE;

/// (row, head) pairs that a tile of the kernel holds; as in attention.cu.
const PAIRS: usize = 32;
/// Words of block tables that a split's blocks take.
const BLOCKS: usize = SPLIT / BLOCK_SIZE;
/// Bytes a layer that must be read less for one more launch to pay: what memory brings in 3 µs. Reckoned, not measured.
const WORTH: usize = 14 << 20;

/// When keys that several rows see are read once for all of them. Unless it is `Auto`, contexts are cut into splits of 256 tokens however few
/// rows there are, so that both come to the same bits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SharedPrefixes {
    /// Where that saves more than the launch costs.
    #[default]
    Auto,
    /// Wherever two rows share a split: for tests and benches.
    Always,
    /// Nowhere.
    Never,
}

/// A row that attention computes by itself.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Alone {
    /// The row in the batch.
    pub row: u32,
    /// Where its block table begins.
    pub table: usize,
    /// Keys that it sees.
    pub context: usize,
    /// Tokens of its splits, of which only whole ones, of [`SPLIT`], are shared.
    pub split: usize,
    /// Splits that it shares.
    pub shared: u32,
}

/// What the rows of a step share.
#[derive(Debug, Default)]
pub(crate) struct SharedPrefix {
    pub when: SharedPrefixes,
    /// Bytes of a token's keys and values in one layer.
    pub token_bytes: usize,
    /// The rows, those that share side by side.
    pub rows: Vec<Alone>,
    /// Tiles, four words each: first row, rows, block table, first split and the one after the last; padded to a power of two by
    /// tiles of nothing, so that steps of about as many are the same launch.
    pub tiles: Vec<u32>,
    /// Splits of the longest tile, rounded up to a power of two.
    pub splits: usize,
}

impl Alone {
    /// The blocks of one split; none if it is no whole one, or the row's last token is not behind it, which a row keeps for itself.
    fn split<'a>(&self, split: usize, tables: &'a [u32]) -> Option<&'a [u32]> {
        let first = self.table + split * BLOCKS;
        (self.split == SPLIT && self.context > (split + 1) * SPLIT).then(|| &tables[first..first + BLOCKS])
    }
}

/// Whether two rows have a split in common.
fn same(a: &Alone, b: &Alone, split: usize, tables: &[u32]) -> bool {
    let blocks = a.split(split, tables);
    blocks.is_some() && blocks == b.split(split, tables)
}

impl SharedPrefix {
    /// Forgets the last step.
    pub fn clear(&mut self) {
        self.rows.clear();
        self.tiles.clear();
        self.splits = 0;
    }

    /// Finds what `self.rows` share, each KV head being read by `heads` query heads.
    pub fn find(&mut self, tables: &[u32], heads: usize) {
        let most = PAIRS / heads.max(1);
        if self.when == SharedPrefixes::Never || most < 2 {
            return;
        }
        let Self { rows, tiles, splits, .. } = self;
        let saved = divide(rows, 0, 0, most, tables, tiles, splits);
        if self.when == SharedPrefixes::Auto && saved * SPLIT * self.token_bytes < WORTH {
            self.tiles.clear();
            return;
        }
        self.splits = self.splits.next_power_of_two();
        let tiles = (self.tiles.len() / 4).next_power_of_two();
        self.tiles.resize(if self.tiles.is_empty() { 0 } else { 4 * tiles }, 0);
    }
}

/// Divides rows that agree in all splits before `depth`, the first being row `first` of the step's, by what they share from there on.
/// Returns how many splits need not be read.
fn divide(
    rows: &mut [Alone],
    first: usize,
    depth: usize,
    most: usize,
    tables: &[u32],
    tiles: &mut Vec<u32>,
    longest: &mut usize,
) -> usize {
    rows.sort_unstable_by(|a, b| a.split(depth, tables).cmp(&b.split(depth, tables)).then(a.row.cmp(&b.row)));
    let (mut saved, mut next) = (0, first);
    for run in rows.chunk_by_mut(|a, b| same(a, b, depth, tables)) {
        let first = next;
        next += run.len();
        if run.len() < 2 {
            continue;
        }
        // Rows are finite, so that they differ, or end, somewhere.
        let mut end = depth + 1;
        while run.windows(2).all(|pair| same(&pair[0], &pair[1], end, tables)) {
            end += 1;
        }
        run.iter_mut().for_each(|row| row.shared = end as u32);
        *longest = (*longest).max(end - depth);
        for (i, tile) in run.chunks(most).enumerate() {
            let words = [first + i * most, tile.len(), tile[0].table, depth | end << 16];
            tiles.extend(words.map(|n| n as u32));
            saved += (tile.len() - 1) * (end - depth);
        }
        saved += divide(run, first, end, most, tables, tiles, longest);
    }
    saved
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of so many tokens of tables that lie one after another.
    fn rows(tables: &[Vec<u32>], contexts: &[usize]) -> (Vec<Alone>, Vec<u32>) {
        let mut all = Vec::new();
        let rows = tables.iter().zip(contexts).zip(0..).map(|((blocks, &context), row)| {
            let table = all.len();
            all.extend(blocks);
            Alone { row, table, context, split: SPLIT, shared: 0 }
        });
        (rows.collect(), all)
    }

    /// Blocks of whole splits by name: a split's blocks are those of no other name.
    fn table(splits: &[u32]) -> Vec<u32> {
        splits.iter().flat_map(|split| (0..16).map(move |block| 100 * split + block)).collect()
    }

    fn find(tables: &[Vec<u32>], contexts: &[usize], heads: usize, when: SharedPrefixes) -> SharedPrefix {
        let (rows, all) = rows(tables, contexts);
        let mut prefix = SharedPrefix { when, token_bytes: 4096, rows, ..SharedPrefix::default() };
        prefix.find(&all, heads);
        prefix
    }

    #[test]
    fn prefixes_of_several_levels_become_tiles_of_each() {
        // Rows 0 and 3 share three splits, row 2 the first of them; row 1 shares nothing.
        let tables = [[7, 5, 6, 1], [8, 5, 6, 2], [7, 9, 6, 3], [7, 5, 6, 4]].map(|splits| table(&splits));
        let found = find(&tables, &[1024; 4], 4, SharedPrefixes::Always);
        let order: Vec<(u32, u32)> = found.rows.iter().map(|row| (row.row, row.shared)).collect();
        assert_eq!(order, [(0, 3), (3, 3), (2, 1), (1, 0)]);
        assert_eq!(found.tiles, [0, 3, 0, 1 << 16, 0, 2, 0, 1 | 3 << 16]);
        assert_eq!(found.splits, 2);
    }

    #[test]
    fn a_row_keeps_its_last_token_for_itself() {
        let tables = [table(&[1, 2]), table(&[1, 2])];
        // The second split ends with the first row's last token.
        let found = find(&tables, &[512, 513], 1, SharedPrefixes::Always);
        assert!(found.rows.iter().all(|row| row.shared == 1));
        let found = find(&tables, &[256, 500], 1, SharedPrefixes::Always);
        assert!(found.tiles.is_empty() && found.rows.iter().all(|row| row.shared == 0));
    }

    #[test]
    fn rows_of_small_splits_share_nothing() {
        let tables = vec![table(&[1, 2, 3]); 3];
        let (mut rows, all) = rows(&tables, &[700; 3]);
        rows[1].split = SPLIT / 2;
        let mut prefix = SharedPrefix { when: SharedPrefixes::Always, rows, ..SharedPrefix::default() };
        prefix.find(&all, 4);
        let mut found: Vec<(u32, u32)> = prefix.rows.iter().map(|row| (row.row, row.shared)).collect();
        found.sort();
        assert_eq!(found, [(0, 2), (1, 0), (2, 2)]);
    }

    #[test]
    fn a_block_that_differs_ends_a_split_and_what_follows() {
        let mut tables = [table(&[1, 2, 3, 4]), table(&[1, 2, 3, 4])];
        tables[1][16 + 15] = 77;
        let found = find(&tables, &[1024; 2], 1, SharedPrefixes::Always);
        assert!(found.rows.iter().all(|row| row.shared == 1));
        // Alike further on counts for nothing: another prefix, another content.
        assert_eq!(found.tiles, [0, 2, 0, 1 << 16]);
    }

    #[test]
    fn tiles_hold_32_pairs_and_are_padded() {
        let tables = vec![table(&[1, 2]); 9];
        let found = find(&tables, &[512; 9], 10, SharedPrefixes::Always);
        let counts: Vec<u32> = found.tiles.chunks(4).map(|tile| tile[1]).collect();
        assert_eq!(counts, [3, 3, 3, 0]);
        let wide = find(&tables, &[512; 9], 17, SharedPrefixes::Always);
        assert!(wide.tiles.is_empty() && wide.rows.iter().all(|row| row.shared == 0));
    }

    #[test]
    fn little_is_not_worth_a_launch() {
        let tables = vec![table(&(0..40).collect::<Vec<_>>()); 2];
        let tiles = |context, when| find(&tables, &[context; 2], 4, when).tiles.len();
        // 14 MiB of 4096 bytes a token.
        let bound = (WORTH / 4096).next_multiple_of(SPLIT);
        assert_eq!((tiles(bound, SharedPrefixes::Auto), tiles(bound + 1, SharedPrefixes::Auto)), (0, 4));
        assert_eq!((tiles(257, SharedPrefixes::Always), tiles(bound + 1, SharedPrefixes::Never)), (4, 0));
    }
}
