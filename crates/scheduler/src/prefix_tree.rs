//! The prefix tree: which cached block continues which, found by content.
//!
//! A node is a full block; an edge is the block's sixteen tokens. A node's identity is its block,
//! so a path from the root spells a token prefix and lists the blocks that hold its keys and
//! values. Lookup costs one hash of sixteen tokens a block, and compares tokens, not only hashes.

use std::collections::HashMap;

use crate::{BLOCK_SIZE, BlockId};

/// A node's place: its parent (`None` under the root) and the tokens of its own block.
type Edge = (Option<BlockId>, [u32; BLOCK_SIZE]);

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct PrefixTree {
    nodes: HashMap<Edge, BlockId>,
    /// The edge of each block in the tree, and how many children it has; indexed by block.
    edges: Vec<Option<(Edge, u32)>>,
}

impl PrefixTree {
    /// An empty tree over blocks `0 .. blocks`.
    pub(crate) fn new(blocks: usize) -> Self {
        Self { nodes: HashMap::new(), edges: vec![None; blocks] }
    }

    /// The block that continues `parent` with these tokens.
    pub(crate) fn child(&self, parent: Option<BlockId>, tokens: &[u32; BLOCK_SIZE]) -> Option<BlockId> {
        self.nodes.get(&(parent, *tokens)).copied()
    }

    /// Puts `block` below `parent`, unless a block with the same tokens is there: that one is
    /// returned.
    pub(crate) fn insert(
        &mut self,
        parent: Option<BlockId>,
        tokens: &[u32; BLOCK_SIZE],
        block: BlockId,
    ) -> Option<BlockId> {
        let edge = (parent, *tokens);
        if let Some(&present) = self.nodes.get(&edge) {
            return Some(present);
        }
        self.nodes.insert(edge, block);
        self.edges[block as usize] = Some((edge, 0));
        if let Some((_, children)) = parent.and_then(|p| self.edges[p as usize].as_mut()) {
            *children += 1;
        }
        None
    }

    /// Whether the block is a node.
    pub(crate) fn contains(&self, block: BlockId) -> bool {
        self.edges[block as usize].is_some()
    }

    /// Whether the block has no children.
    pub(crate) fn is_leaf(&self, block: BlockId) -> bool {
        self.edges[block as usize].is_some_and(|(_, children)| children == 0)
    }

    /// Takes a leaf out of the tree; returns its parent.
    ///
    /// # Panics
    /// If the block is no leaf: its children would then hang below whatever the block holds next.
    pub(crate) fn remove(&mut self, block: BlockId) -> Option<BlockId> {
        let (edge, children) = self.edges[block as usize].take().expect("the block is in the tree");
        assert_eq!(children, 0, "block {block} is evicted before its children");
        self.nodes.remove(&edge);
        if let Some((_, children)) = edge.0.and_then(|p| self.edges[p as usize].as_mut()) {
            *children -= 1;
        }
        edge.0
    }
}
