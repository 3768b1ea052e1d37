//! Where the loop meets the tier on disk, if there is one.

use std::time::Duration;

use rudder_kvstore::BlockKey;
use rudder_scheduler::{SequenceId, StepPlan};

use super::StepLoop;

impl StepLoop {
    /// Before a step is planned: blocks that were loaded take their places.
    pub(super) fn fetch_blocks(&mut self) {
        let Some(tier) = &mut self.tier else { return };
        let active = &mut self.active;
        tier.fetch(&mut self.scheduler, &mut *self.model, |id, tokens| {
            let first = active.get_mut(&id).filter(|active| !active.preempted);
            if let Some(cached) = first.and_then(|active| active.cached.as_mut()) {
                *cached += tokens;
            }
        });
    }

    /// A sequence was queued whose prompt's blocks have these names.
    pub(super) fn expect_blocks(&mut self, id: SequenceId, keys: Vec<BlockKey>) {
        if let Some(tier) = &mut self.tier {
            tier.expect(id, keys);
        }
    }

    /// After it is planned: who finds more on disk waits for that. If that is everybody, so does the loop.
    pub(super) fn hold_for_tier(&mut self, plan: &mut StepPlan) {
        let Some(tier) = &mut self.tier else { return };
        tier.hold(&mut self.scheduler, plan);
        tier.read_ahead(&self.scheduler);
        if plan.chunks.is_empty() {
            tier.wait();
        }
    }

    /// After a step: blocks that it filled are kept.
    pub(super) fn keep_blocks(&mut self, plan: &StepPlan, took: Duration) {
        if let Some(tier) = &mut self.tier {
            tier.keep(&self.scheduler, &mut *self.model, plan, took);
            self.record_turns(plan);
        }
    }

    /// Before a sequence is forgotten: so are its last ones.
    pub(super) fn keep_last_blocks(&mut self, id: SequenceId) {
        if let Some(tier) = &mut self.tier {
            tier.end(&self.scheduler, &mut *self.model, id);
        }
    }
}
