//! What a draft model has read of one sequence: its newest tokens.
//!
//! A window begins somewhere in the sequence, at the draft model's position 0, and grows with it. Where it finds no
//! more blocks, its oldest one goes, but never the first, which attention leans on whatever is said there (attention
//! sinks, Xiao et al. 2023, arXiv:2309.17453). Keys keep the positions that they were given, so nothing is read twice.
//! A draft may be wrong at no cost but time, so nothing else of a long context is missed.

use rudder_ops::{BLOCK_SIZE, Batch};

use super::acceptance::{Acceptance, Evidence};

/// Most tokens that a draft model guesses in one go.
pub(crate) const MOST_GUESSES: usize = 8;

/// See the module.
#[derive(Debug)]
pub(crate) struct Window {
    /// Index in the sequence of the token at position 0.
    start: usize,
    /// Index of the next token to read.
    read: usize,
    /// Tokens after the first block whose blocks were given up.
    dropped: usize,
    blocks: Vec<u32>,
    /// Tokens guessed last, and how sure they were; see [`super::acceptance::sureness`].
    guesses: Vec<(u32, usize)>,
    /// Index of the first of them.
    guessed_at: usize,
    /// How often guesses were right.
    pub(crate) rates: Acceptance,
}

impl Window {
    /// On a sequence from token `start` on, with at most `most` blocks.
    pub(crate) fn new(start: usize, most: usize) -> Self {
        Self {
            start,
            read: start,
            dropped: 0,
            blocks: Vec::with_capacity(most),
            guesses: Vec::with_capacity(MOST_GUESSES),
            guessed_at: start,
            rates: Acceptance::of_sequence(),
        }
    }

    /// Index of the next token to read.
    pub(crate) fn read(&self) -> usize {
        self.read
    }

    /// The draft model's position of a token.
    pub(crate) fn position(&self, index: usize) -> usize {
        index - self.start
    }

    /// Tokens from the start of the KV to this one.
    fn place(&self, index: usize) -> usize {
        self.position(index) - self.dropped
    }

    /// Sees to it that tokens before `end` have room, in at most `most` blocks; `free` are those that nobody
    /// holds. False where there is none.
    pub(crate) fn make_room(&mut self, end: usize, most: usize, free: &mut Vec<u32>) -> bool {
        while self.place(end) > self.blocks.len() * BLOCK_SIZE {
            let block = if self.blocks.len() < most { free.pop() } else { None };
            match block {
                Some(block) => self.blocks.push(block),
                // The block that goes is read to its end, so that what is read stays without gaps.
                None if self.blocks.len() > 2 && self.place(self.read) >= 2 * BLOCK_SIZE => {
                    self.blocks[1..].rotate_left(1);
                    self.dropped += BLOCK_SIZE;
                }
                None => return false,
            }
        }
        true
    }

    /// Adds tokens of the sequence, or guesses, from `index` on to a batch; logits are wanted for the last `outputs`.
    pub(crate) fn push(&self, batch: &mut Batch, tokens: &[u32], index: usize, outputs: usize) {
        let rows = batch.rows();
        batch.push(tokens, self.place(index), &self.blocks, outputs);
        batch.positions[rows..].iter_mut().for_each(|position| *position += self.dropped as u32);
    }

    /// Tokens before `index` were read.
    pub(crate) fn set_read(&mut self, index: usize) {
        self.read = index;
    }

    /// The first token guessed next will be the sequence's token `index`.
    pub(crate) fn begin_guesses(&mut self, index: usize) {
        self.guessed_at = index;
        self.guesses.clear();
    }

    /// A further token was guessed; all guesses before it are read.
    pub(crate) fn guess(&mut self, token: u32, sureness: usize) {
        self.guesses.push((token, sureness));
    }

    /// The tokens guessed, in order.
    pub(crate) fn guesses(&self) -> impl Iterator<Item = u32> + '_ {
        self.guesses.iter().map(|guess| guess.0)
    }

    /// Compares the guesses with what the sequence then said: counts them, and keeps what was read rightly.
    pub(crate) fn settle(&mut self, tokens: &[u32], engine: &mut Acceptance) {
        let said = tokens.get(self.guessed_at..).unwrap_or_default();
        let read = self.guesses.len().saturating_sub(1);
        for (at, (&(guess, sureness), &token)) in self.guesses.iter().zip(said).enumerate() {
            let hit = guess == token;
            for rates in [&mut self.rates, &mut *engine] {
                rates.record(Evidence::Unguessed, 0, hit);
                rates.record(Evidence::Guessed, sureness, hit);
            }
            if !hit {
                break;
            }
            if at < read {
                self.read = self.guessed_at + at + 1;
            }
        }
        self.guesses.clear();
        // The last token is read once more for its logits.
        self.read = self.read.min(tokens.len() - 1);
    }

    /// Gives its blocks back.
    pub(crate) fn release(self, free: &mut Vec<u32>) {
        free.extend(self.blocks);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads `tokens` of a sequence up to `end`; returns the block and offset of each.
    fn read(window: &mut Window, end: usize, most: usize, free: &mut Vec<u32>) -> Option<Batch> {
        let from = window.read();
        if !window.make_room(end, most, free) {
            return None;
        }
        let mut batch = Batch::default();
        window.push(&mut batch, &vec![7; end - from], from, 1);
        window.set_read(end);
        Some(batch)
    }

    #[test]
    fn a_full_window_gives_up_its_second_block_and_positions_go_on() {
        let mut free: Vec<u32> = (0..8).rev().collect();
        let mut window = Window::new(100, 4);
        let batch = read(&mut window, 164, 4, &mut free).unwrap();
        assert_eq!(batch.positions, (0..64).collect::<Vec<_>>());
        assert_eq!(batch.block_tables, [0, 1, 2, 3]);
        let batch = read(&mut window, 166, 4, &mut free).unwrap();
        assert_eq!((&batch.positions[..], &batch.block_tables[..]), (&[64, 65][..], &[0, 2, 3, 1][..]));
        assert_eq!(batch.spans[0].context, 50);
        assert_eq!(batch.slots, [16, 17], "the block that was given up is written again");
        assert_eq!(window.position(166), 66);
        window.release(&mut free);
        free.sort_unstable();
        assert_eq!(free, (0..8).collect::<Vec<_>>());
    }

    #[test]
    fn without_blocks_there_is_no_room_and_what_was_read_is_kept() {
        let mut free = vec![0];
        let mut window = Window::new(0, 4);
        assert!(read(&mut window, 40, 4, &mut free).is_none());
        assert!(read(&mut window, 16, 4, &mut free).is_some());
        assert!(read(&mut window, 17, 4, &mut free).is_none());
        assert_eq!(window.read(), 16);
        window.release(&mut free);
        assert_eq!(free, [0]);
    }

    #[test]
    fn what_was_guessed_rightly_need_not_be_read_again() {
        let mut engine = Acceptance::of_engine();
        // Of four guesses the first three were read.
        for (said, kept) in
            [(&[9][..], 10), (&[5, 9], 11), (&[5, 6, 7, 9], 13), (&[5, 6, 7, 8, 1], 13), (&[], 9)]
        {
            let mut window = Window::new(0, 4);
            window.set_read(10);
            window.begin_guesses(10);
            (5..9).for_each(|token| window.guess(token, 9));
            assert_eq!(window.guesses().collect::<Vec<_>>(), [5, 6, 7, 8]);
            let tokens = [&[1; 10][..], said].concat();
            window.settle(&tokens, &mut engine);
            assert_eq!(window.read(), kept, "{said:?}");
            window.settle(&tokens, &mut engine);
            assert_eq!(window.read(), kept, "nothing is counted twice");
        }
    }

    #[test]
    fn rates_follow_what_was_guessed() {
        let (mut engine, first) = (Acceptance::of_engine(), Acceptance::of_engine());
        let mut window = Window::new(0, 4);
        let rate = |window: &Window, engine: &Acceptance| window.rates.rate(engine, Evidence::Unguessed, 0);
        let expected = rate(&window, &first);
        let mut tokens = vec![1];
        for _ in 0..40 {
            window.begin_guesses(tokens.len());
            window.guess(3, 9);
            tokens.push(4);
            window.settle(&tokens, &mut engine);
        }
        assert!(rate(&window, &engine) < 0.1 && rate(&window, &first) < expected);
    }
}
