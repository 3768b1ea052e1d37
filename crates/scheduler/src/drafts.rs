//! Drafted tokens: guesses at what follows a sequence's known tokens (speculative decoding, Leviathan
//! et al. 2022, arXiv:2211.17192). They run in one chunk with the last known token, each with an
//! output row, so that one step tells how far the guess holds.
//!
//! - They come last: a draft gets no more than half of the token budget that decodes leave, and only
//!   blocks that neither an admission nor the next decodes need. What finds no room is dropped.
//! - Blocks that hold rejected tokens alone are let go before the next plan, so a draft preempts nobody.
//! - Keys and values of rejected tokens lie beyond the computed ones and are written over.

use crate::scheduler::Budget;
use crate::{BLOCK_SIZE, Scheduler, SequenceId, StepPlan};

impl Scheduler {
    /// Whether a draft for the sequence would be planned, room given: it decodes, and all of its
    /// tokens but the last are computed.
    pub fn can_draft(&self, id: SequenceId) -> bool {
        self.sequences.get(&id).is_some_and(|s| s.is_decoding() && s.pending() == 1)
    }

    /// Whether the next step is to hold prefill, as far as that is known before it is planned: drafts then take
    /// time from it.
    pub fn expects_prefill(&self) -> bool {
        let next = || self.waiting_in_line().next().or_else(|| self.waiting.first().copied());
        self.is_prefilling() || next().is_some_and(|id| self.has_room(id))
    }

    /// Whether a sequence that runs is still within its prompt.
    pub fn is_prefilling(&self) -> bool {
        self.running.iter().any(|id| self.sequences[id].is_prefilling())
    }

    /// Proposes what may follow a sequence's known tokens. It replaces an earlier proposal and holds
    /// until a token is appended. Unknown ids are fine.
    pub fn propose(&mut self, id: SequenceId, draft: &[u32]) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.draft.clear();
            sequence.draft.extend_from_slice(draft);
        }
    }

    /// Adds a generated token whose keys and values the step just committed has computed: it was
    /// drawn where the same token was drafted, and all before it were accepted.
    ///
    /// # Panics
    /// If earlier tokens are not computed: then neither is this one.
    pub fn accept(&mut self, id: SequenceId, token: u32) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            assert_eq!(sequence.pending(), 0, "a drafted token is accepted after those before it");
            sequence.tokens.push(token);
            sequence.computed += 1;
            self.index_full_blocks(id);
        }
    }

    /// Lengthens the chunks of decodes by their drafts, oldest first.
    pub(crate) fn plan_drafts(&self, plan: &mut StepPlan, budget: &mut Budget) {
        let mut room = self.config.max_drafted.min(budget.tokens / 2);
        for chunk in plan.chunks.iter_mut() {
            let sequence = &self.sequences[&chunk.id];
            if chunk.outputs == 1 && chunk.start + chunk.len == sequence.tokens.len() {
                chunk.drafted = sequence.draft.len().min(room).min(self.max_tokens() - sequence.tokens.len());
                chunk.len += chunk.drafted;
                chunk.outputs += chunk.drafted;
                room -= chunk.drafted;
                budget.tokens -= chunk.drafted;
            }
        }
    }

    /// Gives planned drafts blocks while there are some to spare, and shortens the others.
    pub(crate) fn place_drafts(&mut self, plan: &mut StepPlan) {
        for chunk in plan.chunks.iter_mut().filter(|chunk| chunk.drafted > 0) {
            let sequence = self.sequences.get_mut(&chunk.id).expect("planned sequences are known");
            let end = chunk.start + chunk.len;
            while sequence.blocks.len() * BLOCK_SIZE < end && self.pool.available() > self.running.len() {
                sequence.blocks.extend(self.pool.allocate());
            }
            let cut = end.saturating_sub(sequence.blocks.len() * BLOCK_SIZE);
            chunk.len -= cut;
            chunk.outputs -= cut;
            chunk.drafted -= cut;
        }
    }

    /// Lets go of blocks beyond the known tokens.
    pub(crate) fn release_draft_blocks(&mut self) {
        for id in &self.running {
            let sequence = self.sequences.get_mut(id).expect("running sequences are known");
            let needed = sequence.tokens.len().div_ceil(BLOCK_SIZE);
            for block in sequence.blocks.drain(needed.min(sequence.blocks.len())..).rev() {
                self.pool.release(block);
            }
        }
    }
}
