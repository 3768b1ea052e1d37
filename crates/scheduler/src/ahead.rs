//! The step after one that still runs: where that one only decodes, each of its sequences goes on by the token that it is about to draw.
//!
//! Nothing else is planned so: nobody is admitted, drafted for or preempted, and blocks are taken only where there are some to spare. What a
//! step is planned for that turns out to have ended is computed in vain; its blocks are let go of when the sequence is removed, which is sound
//! since steps run in the order in which they are queued.

use crate::{BLOCK_SIZE, Chunk, Scheduler, SequenceId, StepPlan};

impl StepPlan {
    /// Whether the step only decodes, every sequence draws one token, and nothing of it is drafted.
    pub fn decodes_plainly(&self) -> bool {
        self.decodes == self.chunks.len() && self.chunks.iter().all(|c| c.outputs == 1 && c.drafted == 0)
    }
}

impl Scheduler {
    /// Plans into `next` the step after `plan`, which [decodes plainly](StepPlan::decodes_plainly) and is not committed yet: a token more
    /// for those of its sequences that are still there, have got no other tokens since, and of which `goes_on` holds. [`Scheduler::commit`] takes both, in their
    /// order, `plan`'s tokens appended between. Returns whether there is such a step; without, nothing was changed but for spare
    /// blocks, which the next plan lets go of.
    pub fn plan_ahead(
        &mut self,
        plan: &StepPlan,
        next: &mut StepPlan,
        goes_on: impl Fn(SequenceId) -> bool,
    ) -> bool {
        next.clear();
        let spare = self.running.len();
        for &Chunk { id, start, len, .. } in plan.chunks.iter().filter(|chunk| goes_on(chunk.id)) {
            let start = start + len;
            let Some(sequence) = self.sequences.get_mut(&id).filter(|s| s.tokens.len() == start) else {
                continue;
            };
            if sequence.blocks.len() * BLOCK_SIZE <= start {
                if self.pool.available() <= spare {
                    return false;
                }
                sequence.blocks.extend(self.pool.allocate());
            }
            next.chunks.push(Chunk { id, start, len: 1, outputs: 1, drafted: 0 });
        }
        next.decodes = next.chunks.len();
        next.decodes > 0
    }
}
