//! The block pool: reference counts, the free list, and least-recently-used eviction.
//!
//! Every block is in exactly one state: *used* (held by sequences), *cached* (held by none, kept
//! in the prefix tree, evictable) or *free*. Sequences release their blocks from the tail, and a
//! sequence that holds a block holds the whole path to it, so the oldest cached block is always a
//! leaf of the tree and eviction is O(1).

use crate::BLOCK_SIZE;
use crate::prefix_tree::PrefixTree;

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
    unused: LruList,
}

impl BlockPool {
    pub(crate) fn new(blocks: usize) -> Self {
        Self {
            references: vec![0; blocks],
            free: (0..blocks as BlockId).rev().collect(),
            tree: PrefixTree::new(blocks),
            unused: LruList::new(blocks),
        }
    }

    /// Blocks that can be had now, cached ones included.
    pub(crate) fn available(&self) -> usize {
        self.free.len() + self.unused.len
    }

    pub(crate) fn counts(&self) -> BlockCounts {
        let (cached, free) = (self.unused.len, self.free.len());
        BlockCounts { used: self.references.len() - cached - free, cached, free }
    }

    /// A block for writing, held once; evicts the least recently used cached block if none is free.
    pub(crate) fn allocate(&mut self) -> Option<BlockId> {
        let block = self.free.pop().or_else(|| {
            let oldest = self.unused.pop_oldest()?;
            self.tree.remove(oldest);
            Some(oldest)
        })?;
        self.references[block as usize] = 1;
        Some(block)
    }

    /// The cached or used block that continues `parent` with these tokens; not held yet.
    pub(crate) fn lookup(&self, parent: Option<BlockId>, tokens: &[u32; BLOCK_SIZE]) -> Option<BlockId> {
        self.tree.child(parent, tokens)
    }

    /// Whether a sequence holds the block.
    pub(crate) fn is_used(&self, block: BlockId) -> bool {
        self.references[block as usize] > 0
    }

    /// Holds a block once more.
    pub(crate) fn retain(&mut self, block: BlockId) {
        let references = &mut self.references[block as usize];
        if *references == 0 {
            self.unused.remove(block);
        }
        *references += 1;
    }

    /// Lets go of a block. Call from the tail of a sequence to its head.
    pub(crate) fn release(&mut self, block: BlockId) {
        let references = &mut self.references[block as usize];
        *references = references.checked_sub(1).expect("only a held block is released");
        if *references == 0 {
            if self.tree.contains(block) {
                self.unused.push_newest(block);
            } else {
                self.free.push(block);
            }
        }
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
                self.retain(present);
                self.release(block);
                present
            }
            None => block,
        }
    }
}

/// A doubly linked list threaded through the blocks: O(1) at both ends and in the middle.
#[derive(Debug)]
struct LruList {
    /// (older, newer) of each block in the list; the last entry is the list's sentinel.
    links: Vec<(BlockId, BlockId)>,
    len: usize,
}

impl LruList {
    fn new(blocks: usize) -> Self {
        let sentinel = blocks as BlockId;
        Self { links: vec![(sentinel, sentinel); blocks + 1], len: 0 }
    }

    fn sentinel(&self) -> BlockId {
        (self.links.len() - 1) as BlockId
    }

    fn push_newest(&mut self, block: BlockId) {
        let sentinel = self.sentinel();
        let newest = self.links[sentinel as usize].0;
        self.links[block as usize] = (newest, sentinel);
        self.links[newest as usize].1 = block;
        self.links[sentinel as usize].0 = block;
        self.len += 1;
    }

    fn remove(&mut self, block: BlockId) {
        let (older, newer) = self.links[block as usize];
        self.links[older as usize].1 = newer;
        self.links[newer as usize].0 = older;
        self.len -= 1;
    }

    fn pop_oldest(&mut self) -> Option<BlockId> {
        let oldest = self.links[self.sentinel() as usize].1;
        (self.len > 0).then(|| {
            self.remove(oldest);
            oldest
        })
    }
}
