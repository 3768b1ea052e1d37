//! A step's plan as flat arrays: what every backend needs to know of a step.

/// Tokens in one KV block.
pub const BLOCK_SIZE: usize = 16;

/// One sequence's share of a [`Batch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First row of this sequence in the batch.
    pub start: usize,
    /// Rows (new tokens) of this sequence in this step.
    pub len: usize,
    /// Tokens in the KV cache after this step, the new ones included. Row `start + i` attends to
    /// the first `context - len + i + 1` of them.
    pub context: usize,
    /// Where this sequence's block table begins in [`Batch::block_tables`]; it holds
    /// `context.div_ceil(BLOCK_SIZE)` entries.
    pub table: usize,
}

/// One step's input: prefill chunks and decodes of many sequences, concatenated without padding.
///
/// Reused from step to step so that its vectors keep their capacity.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// Token ids, `[rows]`.
    pub tokens: Vec<u32>,
    /// Empty where all tokens are known. Else all rows are of tokens that the step before drew and nobody has seen yet
    /// ([`crate::Backend::draw`]): which of its outputs each is of, `[rows]`.
    pub drawn: Vec<u32>,
    /// Position of every token in its sequence, `[rows]`.
    pub positions: Vec<u32>,
    /// KV slot of every token, `block * BLOCK_SIZE + offset`, `[rows]`.
    pub slots: Vec<u32>,
    /// The sequences, in row order.
    pub spans: Vec<Span>,
    /// All block tables, concatenated.
    pub block_tables: Vec<u32>,
    /// Rows whose logits are wanted, ascending.
    pub outputs: Vec<u32>,
}

impl Batch {
    /// Empties the batch, keeping its memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.drawn.clear();
        self.positions.clear();
        self.slots.clear();
        self.spans.clear();
        self.block_tables.clear();
        self.outputs.clear();
    }

    /// Makes it a copy of `other`, keeping its memory; derived `clone_from` would not.
    pub fn copy_from(&mut self, other: &Batch) {
        self.tokens.clone_from(&other.tokens);
        self.drawn.clone_from(&other.drawn);
        self.positions.clone_from(&other.positions);
        self.slots.clone_from(&other.slots);
        self.spans.clone_from(&other.spans);
        self.block_tables.clone_from(&other.block_tables);
        self.outputs.clone_from(&other.outputs);
    }

    /// Rows in this step.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Appends `tokens` of a sequence whose first `computed` tokens are cached already and whose
    /// blocks are `blocks` (at least enough for `computed + tokens.len()`). Logits are wanted for
    /// the last `outputs` of the new tokens.
    ///
    /// # Panics
    /// If `blocks` is too short or `outputs` exceeds `tokens`: a scheduler's defect.
    pub fn push(&mut self, tokens: &[u32], computed: usize, blocks: &[u32], outputs: usize) {
        let context = computed + tokens.len();
        let used = context.div_ceil(BLOCK_SIZE);
        assert!(blocks.len() >= used && outputs <= tokens.len());
        let (start, table) = (self.tokens.len(), self.block_tables.len());
        self.tokens.extend_from_slice(tokens);
        for position in computed..context {
            self.positions.push(position as u32);
            self.slots
                .push(blocks[position / BLOCK_SIZE] * BLOCK_SIZE as u32 + (position % BLOCK_SIZE) as u32);
        }
        self.block_tables.extend_from_slice(&blocks[..used]);
        self.spans.push(Span { start, len: tokens.len(), context, table });
        let end = self.tokens.len();
        self.outputs.extend((end - outputs..end).map(|row| row as u32));
    }

    /// Appends the token that the step before draws for its output `output`, of a sequence of `computed` tokens without it. Its
    /// logits are wanted. A batch has only such rows or none.
    ///
    /// # Panics
    /// As [`Batch::push`], and if the batch has known tokens.
    pub fn push_drawn(&mut self, output: u32, computed: usize, blocks: &[u32]) {
        assert_eq!(self.drawn.len(), self.tokens.len(), "known tokens and drawn ones in a batch");
        self.push(&[0], computed, blocks, 1);
        self.drawn.push(output);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn push_maps_positions_to_slots_through_the_block_table() {
        let mut batch = Batch::default();
        batch.push(&[7, 8, 9], 15, &[4, 2], 1);
        batch.push(&[5], 0, &[9], 1);
        assert_eq!(batch.positions, [15, 16, 17, 0]);
        assert_eq!(batch.slots, [4 * 16 + 15, 2 * 16, 2 * 16 + 1, 9 * 16]);
        assert_eq!(batch.outputs, [2, 3]);
        assert_eq!(batch.spans[1], Span { start: 3, len: 1, context: 1, table: 2 });
        assert_eq!(batch.block_tables, [4, 2, 9]);
    }
}
