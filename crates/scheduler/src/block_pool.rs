//! The block pool: reference counts, the free list, and eviction.
//!
//! Every block is in exactly one state: *used* (held by sequences), *cached* (held by none, kept
//! in the prefix tree, evictable) or *free*. A sequence that holds a block holds the whole path to it,
//! so what comes after an unheld block is unheld too, and all cached blocks can be evicted, leaves
//! first. `retention` chooses which. A path is held and let go of as a whole: its blocks' counts change in one
//! pass, and what else must change does so once for all that were a session's.

use crate::BLOCK_SIZE;
use crate::prefix_tree::PrefixTree;
use crate::retention::{Retention, SessionHandle};

/// A block's index in the KV cache.
pub type BlockId = u32;

/// How many blocks are in which state; the three add up to the pool's size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlockCounts {
    /// Held by sequences.
    pub used: usize,
    /// Held by none, kept for reuse.
    pub cached: usize,
    /// Holding nothing.
    pub free: usize,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct BlockPool {
    references: Vec<u32>,
    free: Vec<BlockId>,
    tree: PrefixTree,
    /// How often a block came into the tree or left it.
    changes: u64,
    #[cfg(test)]
    lookups: std::cell::Cell<usize>,
    pub(crate) retention: Retention,
}

impl BlockPool {
    pub(crate) fn new(blocks: usize) -> Self {
        Self {
            references: vec![0; blocks],
            free: (0..blocks as BlockId).rev().collect(),
            tree: PrefixTree::new(blocks),
            changes: 0,
            #[cfg(test)]
            lookups: std::cell::Cell::default(),
            retention: Retention::new(blocks),
        }
    }

    /// Blocks that can be had now, cached ones included.
    pub(crate) fn available(&self) -> usize {
        self.free.len() + self.retention.cached()
    }

    pub(crate) fn counts(&self) -> BlockCounts {
        let (cached, free) = (self.retention.cached(), self.free.len());
        BlockCounts { used: self.references.len() - cached - free, cached, free }
    }

    /// A block for writing, held once; evicts a cached block if none is free.
    pub(crate) fn allocate(&mut self) -> Option<BlockId> {
        let block = self.free.pop().or_else(|| {
            let victim = self.retention.choose()?;
            self.leave_tree(victim);
            Some(victim)
        })?;
        self.references[block as usize] = 1;
        Some(block)
    }

    /// Evicts what this session alone has used and nobody holds; returns how many blocks.
    pub(crate) fn drop_exclusive(&mut self, session: SessionHandle) -> usize {
        let before = self.free.len();
        while let Some(block) = self.retention.next_exclusive(session) {
            self.leave_tree(block);
            self.free.push(block);
        }
        self.free.len() - before
    }

    /// An unheld leaf leaves the tree, here and nowhere else.
    fn leave_tree(&mut self, block: BlockId) {
        debug_assert!(!self.is_used(block), "a held block is evicted");
        self.changes += 1;
        self.retention.take_path(&[block]);
        if let Some(parent) = self.tree.remove(block)
            && !self.is_used(parent)
            && self.tree.is_leaf(parent)
        {
            self.retention.becomes_leaf(parent, block);
        }
        self.retention.forget(block);
    }

    /// The cached or used block that continues `parent` with these tokens; not held yet.
    pub(crate) fn lookup(&self, parent: Option<BlockId>, tokens: &[u32; BLOCK_SIZE]) -> Option<BlockId> {
        #[cfg(test)]
        self.lookups.set(self.lookups.get() + 1);
        self.tree.child(parent, tokens)
    }

    /// The blocks after `block`, the last of a path of `len` of the tree, on the path that its session is remembered
    /// by, each with its generation. They are in the tree; what they hold is for the caller to compare.
    pub(crate) fn remembered_after(&self, block: BlockId, len: usize) -> &[(BlockId, u32)] {
        self.retention.remembered_after(block, len)
    }

    /// Whether a block of the tree holds these tokens.
    pub(crate) fn holds(&self, block: BlockId, tokens: &[u32; BLOCK_SIZE]) -> bool {
        self.tree.holds(block, tokens)
    }

    /// How often a block came into the tree or left it: while this stands still, a lookup finds what it found.
    pub(crate) fn changes(&self) -> u64 {
        self.changes
    }

    /// How often the block has left the tree.
    pub(crate) fn generation(&self, block: BlockId) -> u32 {
        self.retention.generation(block)
    }

    /// Every block is in one state, held by those who say so, and counted as what it is.
    #[cfg(test)]
    pub(crate) fn check<'a>(&self, held: impl Iterator<Item = &'a [BlockId]>) {
        let mut references = vec![0; self.references.len()];
        held.flatten().for_each(|&block| references[block as usize] += 1);
        assert_eq!(self.references, references);
        let free: std::collections::HashSet<_> = self.free.iter().copied().collect();
        assert_eq!(free.len(), self.free.len());
        for block in 0..references.len() as BlockId {
            let somewhere = self.is_used(block) || self.tree.contains(block);
            assert_ne!(somewhere, free.contains(&block), "block {block} is free, or in use");
        }
        let is_unheld = |block| !self.is_used(block) && self.tree.contains(block);
        self.retention.check(is_unheld, |block| self.tree.is_leaf(block));
    }

    #[cfg(test)]
    pub(crate) fn lookups(&self) -> usize {
        self.lookups.get()
    }

    /// How many sequences hold the block.
    pub(crate) fn holders(&self, block: BlockId) -> usize {
        self.references[block as usize] as usize
    }

    /// Whether a sequence holds the block.
    pub(crate) fn is_used(&self, block: BlockId) -> bool {
        self.holders(block) > 0
    }

    /// Holds the end of a path in the tree once more, before which all is held already.
    pub(crate) fn retain_path(&mut self, path: &[BlockId]) {
        let held = path.partition_point(|&block| self.is_used(block));
        path.iter().for_each(|&block| self.references[block as usize] += 1);
        self.retention.take_path(&path[held..]);
    }

    /// Lets go of a sequence's blocks, of which the first `indexed` are in the tree.
    ///
    /// # Panics
    /// If it does not hold them.
    pub(crate) fn release_path(
        &mut self,
        blocks: &mut Vec<BlockId>,
        indexed: usize,
        session: Option<SessionHandle>,
        prompt_blocks: usize,
    ) {
        blocks.drain(indexed..).rev().for_each(|block| self.release(block));
        if let Some(session) = session {
            self.retention.remember(session, blocks, prompt_blocks);
        }
        for &block in &*blocks {
            let references = &mut self.references[block as usize];
            *references = references.checked_sub(1).expect("only a held block is released");
        }
        self.retention.begin_use();
        let held = blocks.partition_point(|&block| self.is_used(block));
        let is_leaf = blocks.last().is_some_and(|&last| self.tree.is_leaf(last));
        self.retention.add_path(&blocks[held..], is_leaf, session);
        blocks.clear();
    }

    /// Frees a block that is not in the tree, and so held once.
    ///
    /// # Panics
    /// If it is not.
    pub(crate) fn release(&mut self, block: BlockId) {
        debug_assert!(!self.tree.contains(block), "a block of the tree is freed");
        let references = std::mem::take(&mut self.references[block as usize]);
        assert_eq!(references, 1, "only a held block is released");
        self.free.push(block);
    }

    /// Makes a full, held block findable. If the same content is in the tree already, the caller's
    /// hold moves to that block, which is returned; the duplicate is let go.
    pub(crate) fn index(
        &mut self,
        parent: Option<BlockId>,
        tokens: &[u32; BLOCK_SIZE],
        block: BlockId,
    ) -> BlockId {
        match self.tree.insert(parent, tokens, block) {
            Some(present) => {
                self.retain_path(&[present]);
                self.release(block);
                present
            }
            None => {
                self.changes += 1;
                block
            }
        }
    }
}

/// How many of a path's `len` blocks, the first ones, are so. `is` is told a block's place on the path.
pub(crate) fn first_blocks(len: usize, is: impl Fn(usize) -> bool) -> usize {
    let (mut first, mut end) = (0, len);
    while first < end {
        let middle = usize::midpoint(first, end);
        match is(middle) {
            true => first = middle + 1,
            false => end = middle,
        }
    }
    first
}
