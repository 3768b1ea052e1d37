//! The cached blocks that a waiting sequence can begin with, kept from step to step.
//!
//! A prompt of 140,000 tokens is a path of 9,000 blocks, and one that finds no room is asked about in every
//! step. So its path is looked up once and then kept up to date: nothing is done while the prefix tree is
//! what it was; else what has left the tree is taken off the path's end, and what has come is added there.
//! Blocks leave the tree leaves first, so what is left of a path is a prefix of it, and sequences hold whole
//! paths, so what is held of it is one too.

use crate::block_pool::BlockPool;
use crate::sequence::block_at;
use crate::{BLOCK_SIZE, BlockId, Scheduler, SequenceId};

/// See the module.
#[derive(Debug, Clone, Default)]
pub(crate) struct CachedPath {
    /// Each block with its generation then: another one tells that it has left the tree since.
    blocks: Vec<(BlockId, u32)>,
    /// The tree's changes and the sequence's tokens when it was brought up to date.
    seen: Option<(u64, usize)>,
}

impl CachedPath {
    /// Blocks in it.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Its blocks in order.
    pub fn blocks(&self) -> impl Iterator<Item = BlockId> {
        self.blocks.iter().map(|&(block, _)| block)
    }

    /// How many of its blocks sequences hold: the first ones.
    pub fn held(&self, pool: &BlockPool) -> usize {
        self.blocks.partition_point(|&(block, _)| pool.is_used(block))
    }

    /// Brings it up to date. At least the last token is left to compute, since the next token's logits come
    /// from it.
    pub fn update(&mut self, tokens: &[u32], pool: &BlockPool) {
        let now = Some((pool.changes(), tokens.len()));
        if self.seen == now {
            return;
        }
        self.seen = now;
        while self.blocks.pop_if(|(block, generation)| pool.generation(*block) != *generation).is_some() {}
        for index in self.blocks.len()..(tokens.len() - 1) / BLOCK_SIZE {
            let parent = self.blocks.last().map(|&(block, _)| block);
            let Some(block) = pool.lookup(parent, block_at(tokens, index)) else { break };
            self.blocks.push((block, pool.generation(block)));
        }
    }
}

impl Scheduler {
    /// Brings up to date what is cached of a waiting sequence; returns how many blocks. A prompt whose every
    /// token is scored is computed whole.
    pub(crate) fn update_cached(&mut self, id: SequenceId) -> usize {
        let Some(sequence) = self.sequences.get_mut(&id) else { return 0 };
        if self.config.prefix_cache && !sequence.is_scoring() {
            sequence.cached.update(&sequence.tokens, &self.pool);
        }
        sequence.cached.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Origin, Policy, SchedulerConfig, StepPlan};

    const CONFIG: SchedulerConfig = SchedulerConfig {
        blocks: 16,
        max_sequences: 4,
        max_batch_tokens: 64,
        max_drafted: 0,
        prefix_cache: true,
        policy: Policy::Fair,
    };

    /// A step after which each sequence that was computed whole gets another token, or ends where `ends`
    /// says so.
    fn step(scheduler: &mut Scheduler, plan: &mut StepPlan, ends: impl Fn(SequenceId) -> bool) {
        scheduler.plan(plan);
        scheduler.commit(plan);
        for chunk in &plan.chunks {
            let sequence = scheduler.sequence(chunk.id).unwrap();
            match sequence.pending() {
                0 if ends(chunk.id) || sequence.tokens.len() == scheduler.max_tokens() => {
                    scheduler.remove(chunk.id);
                }
                0 => scheduler.append(chunk.id, chunk.id as u32 % 3),
                _ => {}
            }
        }
    }

    proptest! {
        #[test]
        fn a_kept_path_is_what_a_fresh_look_finds(
            blocks in 6usize..20,
            acts in prop::collection::vec((0u32..3, 1usize..90, 0usize..8, 1u64..9), 1..40),
        ) {
            let mut scheduler = Scheduler::new(SchedulerConfig { blocks, max_batch_tokens: 24, ..CONFIG });
            let mut plan = StepPlan::default();
            for (id, (stream, len, steps, life)) in acts.into_iter().enumerate() {
                let prompt = (0..len as u32).map(|at| if at < 40 { stream } else { at % (stream + 1) });
                let origin = Origin { owner: u64::from(stream), ..Origin::default() };
                scheduler.add(id as SequenceId, prompt.collect(), false, origin);
                for turn in 0..steps {
                    step(&mut scheduler, &mut plan, |other| (other + turn as u64).is_multiple_of(life));
                    // Not all in every step, so that some miss changes.
                    let waiting = scheduler.waiting.iter().copied().filter(|id| !(id + turn as u64).is_multiple_of(3));
                    for id in waiting.collect::<Vec<_>>() {
                        scheduler.update_cached(id);
                        let sequence = &scheduler.sequences[&id];
                        let mut fresh = CachedPath::default();
                        fresh.update(&sequence.tokens, &scheduler.pool);
                        prop_assert_eq!(&sequence.cached.blocks, &fresh.blocks);
                        let held = fresh.blocks().filter(|&block| scheduler.pool.is_used(block)).count();
                        prop_assert_eq!(fresh.held(&scheduler.pool), held);
                    }
                }
            }
        }
    }

    #[test]
    fn a_prompt_that_finds_no_room_is_looked_up_only_where_the_tree_has_changed() {
        let mut scheduler = Scheduler::new(CONFIG);
        let mut plan = StepPlan::default();
        scheduler.add(0, vec![1; 60], false, Origin::default());
        scheduler.add(1, vec![2; 60], false, Origin::default());
        (0..3).for_each(|_| step(&mut scheduler, &mut plan, |_| false));
        scheduler.add(2, vec![3; 160], false, Origin::default());
        let (lookups, changes) = (scheduler.pool.lookups(), scheduler.pool.changes());
        for _ in 0..32 {
            step(&mut scheduler, &mut plan, |_| false);
            assert_eq!((scheduler.running(), scheduler.waiting()), (2, 1));
        }
        let changes = scheduler.pool.changes() - changes;
        let lookups = scheduler.pool.lookups() - lookups;
        assert_eq!(changes, 4, "two blocks were filled for each that runs");
        assert!(lookups as u64 <= changes, "{lookups} lookups");
    }
}
