//! A sequence: its tokens and its place in the KV cache.

use crate::cached_path::CachedPath;
use crate::fairness::{DECODE_COST, Origin};
use crate::retention::SessionHandle;
use crate::{BLOCK_SIZE, BlockId};

/// Names a sequence; chosen by the engine, ascending by arrival.
pub type SequenceId = u64;

/// See the module.
#[derive(Debug, Clone)]
pub struct Sequence {
    /// Prompt and what was generated so far.
    pub tokens: Vec<u32>,
    /// How many of `tokens` are the prompt.
    pub prompt_len: usize,
    /// How many of `tokens` have their keys and values in the cache.
    pub computed: usize,
    /// The blocks that hold them, and room for the rest of the known tokens.
    pub blocks: Vec<BlockId>,
    /// How many of `blocks` are in the prefix tree: a prefix of them.
    pub(crate) indexed: usize,
    /// While it waits: the blocks that it can begin with.
    pub(crate) cached: CachedPath,
    /// Logits are wanted for every prompt token, so the prompt is computed whole.
    pub(crate) score_prompt: bool,
    /// Its next blocks are being filled from outside: nothing of it is planned.
    pub(crate) held: bool,
    /// Whose blocks its own are once it lets go of them.
    pub(crate) session: Option<SessionHandle>,
    /// A guess at the tokens after `tokens`.
    pub(crate) draft: Vec<u32>,
    /// Whom it works for.
    pub(crate) origin: Origin,
    /// How many of `tokens` its origin was charged for or found in the cache; before it first runs, a
    /// guess. Computing a token again after a preemption costs nothing.
    pub(crate) charged: usize,
    /// Whether it has run.
    pub(crate) started: bool,
    /// How often it gave way to another.
    pub(crate) yields: u32,
}

impl Sequence {
    pub(crate) fn new(prompt: Vec<u32>, score_prompt: bool, origin: Origin) -> Self {
        Self {
            prompt_len: prompt.len(),
            tokens: prompt,
            computed: 0,
            blocks: Vec::new(),
            indexed: 0,
            cached: CachedPath::default(),
            score_prompt,
            held: false,
            session: None,
            draft: Vec::new(),
            origin,
            charged: 0,
            started: false,
            yields: 0,
        }
    }

    /// What was proposed to follow [`Self::tokens`]; a plan may use less of it.
    pub fn draft(&self) -> &[u32] {
        &self.draft
    }

    /// Tokens whose keys and values are still to be computed.
    pub fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Whether it is past its prompt: what it computes are generated tokens.
    pub(crate) fn is_decoding(&self) -> bool {
        !self.held && self.computed >= self.prompt_len && self.pending() > 0
    }

    /// Whether it runs and is still within its prompt.
    pub(crate) fn is_prefilling(&self) -> bool {
        !self.held && !self.is_decoding()
    }

    /// How many of its blocks are in the prefix tree: full, computed, and never written again.
    pub fn indexed_blocks(&self) -> usize {
        self.indexed
    }

    /// Full blocks of its prompt but for its last token's, from which the first new one is drawn.
    pub(crate) fn prompt_blocks(&self) -> usize {
        self.prompt_len.saturating_sub(1) / BLOCK_SIZE
    }

    /// Whether logits of prompt rows are still wanted.
    pub fn is_scoring(&self) -> bool {
        self.score_prompt && self.tokens.len() == self.prompt_len
    }

    /// What its origin is still to be charged for computing the tokens before `end`, in prompt tokens.
    pub(crate) fn cost_to(&self, end: usize) -> f64 {
        let prompt = end.min(self.prompt_len).saturating_sub(self.charged);
        let generated = end.saturating_sub(self.charged.max(self.prompt_len));
        prompt as f64 + DECODE_COST * generated as f64
    }

    /// The tokens of full block `index`.
    ///
    /// # Panics
    /// If the known tokens end before the block does.
    pub fn block_tokens(&self, index: usize) -> &[u32; BLOCK_SIZE] {
        block_at(&self.tokens, index)
    }

    /// The block before `index` on the path, `None` at the head.
    pub(crate) fn parent(&self, index: usize) -> Option<BlockId> {
        index.checked_sub(1).map(|before| self.blocks[before])
    }
}

/// The tokens of full block `index` of a sequence.
///
/// # Panics
/// If they end before the block does.
pub(crate) fn block_at(tokens: &[u32], index: usize) -> &[u32; BLOCK_SIZE] {
    tokens[index * BLOCK_SIZE..].first_chunk().expect("the block is full")
}
