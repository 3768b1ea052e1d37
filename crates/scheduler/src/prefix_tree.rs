//! The prefix tree: which cached block continues which, found by content.
//!
//! A node is a full block; an edge is the block's sixteen tokens. A node's identity is its block,
//! so a path from the root spells a token prefix and lists the blocks that hold its keys and
//! values. A conversation is a chain, so the child that came last is looked at first: a comparison of
//! sixteen tokens a block, and a hash of them only where a path branches. The tokens lie by block, apart from the
//! nodes: a path's mostly follow each other there, and a known path is compared at about the speed of memory.

use std::collections::HashMap;

use crate::{BLOCK_SIZE, BlockId};

/// A node's place: its parent (`None` under the root) and the tokens of its own block.
type Edge = (Option<BlockId>, [u32; BLOCK_SIZE]);

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct PrefixTree {
    by_edge: HashMap<Edge, BlockId>,
    /// Indexed by block; `None` for blocks outside the tree.
    nodes: Vec<Option<Node>>,
    /// Indexed by block: of those in the tree, what they hold.
    tokens: Vec<[u32; BLOCK_SIZE]>,
}

#[derive(Debug, Clone, Copy)]
struct Node {
    /// `None` under the root.
    parent: Option<BlockId>,
    children: u32,
    /// The child that came last. It may have left the tree, and may even have come back elsewhere.
    newest: Option<BlockId>,
}

impl PrefixTree {
    /// An empty tree over blocks `0 .. blocks`.
    pub(crate) fn new(blocks: usize) -> Self {
        Self { by_edge: HashMap::new(), nodes: vec![None; blocks], tokens: vec![[0; BLOCK_SIZE]; blocks] }
    }

    /// The block that continues `parent` with these tokens.
    pub(crate) fn child(&self, parent: Option<BlockId>, tokens: &[u32; BLOCK_SIZE]) -> Option<BlockId> {
        let newest = parent.and_then(|parent| self.nodes[parent as usize]?.newest);
        let is_below = |block: BlockId| self.nodes[block as usize].is_some_and(|node| node.parent == parent);
        newest
            .filter(|&block| is_below(block) && self.holds(block, tokens))
            .or_else(|| self.by_edge.get(&(parent, *tokens)).copied())
    }

    /// Whether a block of the tree holds these tokens.
    pub(crate) fn holds(&self, block: BlockId, tokens: &[u32; BLOCK_SIZE]) -> bool {
        self.tokens[block as usize] == *tokens
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
        if let Some(&present) = self.by_edge.get(&edge) {
            return Some(present);
        }
        self.by_edge.insert(edge, block);
        self.nodes[block as usize] = Some(Node { parent, children: 0, newest: None });
        self.tokens[block as usize] = *tokens;
        if let Some(parent) = parent.and_then(|parent| self.nodes[parent as usize].as_mut()) {
            parent.children += 1;
            parent.newest = Some(block);
        }
        None
    }

    /// Whether the block is a node.
    pub(crate) fn contains(&self, block: BlockId) -> bool {
        self.nodes[block as usize].is_some()
    }

    /// Whether the block has no children.
    pub(crate) fn is_leaf(&self, block: BlockId) -> bool {
        self.nodes[block as usize].is_some_and(|node| node.children == 0)
    }

    /// Takes a leaf out of the tree; returns its parent.
    ///
    /// # Panics
    /// If the block is no leaf: its children would then hang below whatever the block holds next.
    pub(crate) fn remove(&mut self, block: BlockId) -> Option<BlockId> {
        let node = self.nodes[block as usize].take().expect("the block is in the tree");
        assert_eq!(node.children, 0, "block {block} is evicted before its children");
        self.by_edge.remove(&(node.parent, self.tokens[block as usize]));
        if let Some(parent) = node.parent.and_then(|parent| self.nodes[parent as usize].as_mut()) {
            parent.children -= 1;
        }
        node.parent
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Change {
        /// Under one of the blocks in the tree, or the root, by its place in a list of them.
        Insert(usize, u32),
        Remove(usize),
    }

    fn change() -> impl Strategy<Value = Change> {
        prop_oneof![
            3 => (any::<usize>(), 0u32..4).prop_map(|(at, token)| Change::Insert(at, token)),
            2 => any::<usize>().prop_map(Change::Remove),
        ]
    }

    proptest! {
        #[test]
        fn every_child_is_found_and_nothing_else(changes in prop::collection::vec(change(), 1..200)) {
            let mut tree = PrefixTree::new(16);
            // Edges and their blocks, as they should be.
            let mut model: Vec<(Edge, BlockId)> = Vec::new();
            for change in changes {
                match change {
                    Change::Insert(at, token) => {
                        let parents: Vec<_> =
                            std::iter::once(None).chain(model.iter().map(|&(_, block)| Some(block))).collect();
                        let edge = (parents[at % parents.len()], [token; BLOCK_SIZE]);
                        let free = (0..16).find(|&block| !tree.contains(block));
                        let present = model.iter().find(|(known, _)| *known == edge).map(|&(_, block)| block);
                        if let Some(block) = free {
                            prop_assert_eq!(tree.insert(edge.0, &edge.1, block), present);
                            if present.is_none() {
                                model.push((edge, block));
                            }
                        }
                    }
                    Change::Remove(at) => {
                        let leaves: Vec<_> = (0..16).filter(|&block| tree.is_leaf(block)).collect();
                        if let Some(&leaf) = leaves.get(at % leaves.len().max(1)) {
                            let at = model.iter().position(|&(_, block)| block == leaf).unwrap();
                            prop_assert_eq!(tree.remove(leaf), model.swap_remove(at).0.0);
                        }
                    }
                }
                for parent in std::iter::once(None).chain((0..16).filter(|&b| tree.contains(b)).map(Some)) {
                    for token in 0..4 {
                        let edge = (parent, [token; BLOCK_SIZE]);
                        let known = model.iter().find(|(known, _)| *known == edge).map(|&(_, block)| block);
                        prop_assert_eq!(tree.child(parent, &edge.1), known);
                    }
                }
            }
        }
    }
}
