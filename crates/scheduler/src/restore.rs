//! Sequences whose next blocks are filled from outside, from a slower tier, rather than computed.
//!
//! A plan admits a sequence as always: it takes its blocks and a first chunk. Where the engine can fetch
//! what comes next faster than compute it, it holds the sequence: the chunk leaves the plan and the
//! sequence keeps its blocks and is planned no more, until it is let go on. Meanwhile whatever was
//! fetched counts as computed and is found by others.

use crate::{BLOCK_SIZE, Scheduler, SequenceId, StepPlan};

impl Scheduler {
    /// Takes a sequence that `plan` admitted out of it again; see the module. It must be let go on,
    /// removed or preempted in time: those that begin alike wait for it.
    pub fn hold(&mut self, plan: &mut StepPlan, id: SequenceId) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.held = true;
            plan.chunks.retain(|chunk| chunk.id != id);
        }
    }

    /// The first `blocks` uncomputed blocks of a held sequence have been filled. They are full blocks of
    /// known tokens, and at least the last known token is left to compute.
    ///
    /// # Panics
    /// If there are no such blocks.
    pub fn restored(&mut self, id: SequenceId, blocks: usize) {
        let Some(sequence) = self.sequences.get_mut(&id).filter(|sequence| sequence.held) else { return };
        let end = sequence.computed + blocks * BLOCK_SIZE;
        assert!(end.is_multiple_of(BLOCK_SIZE) && end < sequence.tokens.len());
        sequence.computed = end;
        sequence.charged = sequence.charged.max(end);
        self.index_full_blocks(id);
    }

    /// How many blocks a waiting sequence was last seen to find in the prefix tree: when it came, or when a
    /// plan asked whether to admit it.
    pub fn cached_blocks(&self, id: SequenceId) -> usize {
        self.sequences.get(&id).map_or(0, |sequence| sequence.cached.len())
    }

    /// Lets a held sequence go on with what it has.
    pub fn go_on(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.held = false;
        }
    }
}
