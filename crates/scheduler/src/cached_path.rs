//! The cached blocks that a waiting sequence can begin with, kept from step to step.
//!
//! A prompt of 140,000 tokens is a path of 9,000 blocks, and one that finds no room is asked about in every
//! step. So its path is looked up once and then kept up to date: nothing is done while the prefix tree is
//! what it was; else what has left the tree is taken off the path's end, and what has come is added there.
//! Blocks leave the tree leaves first, so what is left of a path is a prefix of it, and sequences hold whole
//! paths, so what is held of it is one too.
//!
//! Nor is it looked up block by block: whose block a path has come to remembers what came after it last time.
//! That only says where to look. What has left the tree since is passed over, by its generation, and of the
//! rest all tokens are compared; where they part, one block is looked up, and whoever's that is asked.

use crate::block_pool::{BlockPool, first_blocks};
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

    /// How many of its blocks are held: the first ones. `is_held` is told a block's place and the block.
    pub fn held(&self, is_held: impl Fn(usize, BlockId) -> bool) -> usize {
        first_blocks(self.blocks.len(), |at| is_held(at, self.blocks[at].0))
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
        let (wanted, _) = tokens[..tokens.len() - 1].as_chunks();
        while let Some(next) = wanted.get(self.blocks.len()) {
            if self.follow(&wanted[self.blocks.len()..], pool) == 0 {
                let last = self.blocks.last().map(|&(block, _)| block);
                let Some(block) = pool.lookup(last, next) else { break };
                self.blocks.push((block, pool.generation(block)));
            }
        }
    }

    /// Adds the blocks that are remembered after the last one, while they hold what is wanted; returns how many.
    fn follow(&mut self, wanted: &[[u32; BLOCK_SIZE]], pool: &BlockPool) -> usize {
        let Some(&(last, _)) = self.blocks.last() else { return 0 };
        let remembered = pool.remembered_after(last, self.blocks.len());
        let pairs = remembered.iter().zip(wanted);
        let same = pairs.take_while(|&(&(block, _), tokens)| pool.holds(block, tokens)).count();
        self.blocks.extend_from_slice(&remembered[..same]);
        same
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

    /// The path found block by block.
    fn looked_up(tokens: &[u32], pool: &BlockPool) -> Vec<(BlockId, u32)> {
        let mut path: Vec<(BlockId, u32)> = Vec::new();
        for wanted in tokens[..tokens.len() - 1].as_chunks().0 {
            let Some(block) = pool.lookup(path.last().map(|&(block, _)| block), wanted) else { break };
            path.push((block, pool.generation(block)));
        }
        path
    }

    proptest! {
        #[test]
        fn a_kept_path_is_what_a_fresh_look_finds(
            blocks in 6usize..20,
            acts in prop::collection::vec((0u32..3, 1usize..90, 0usize..8, 1u64..9, 0usize..6), 1..40),
        ) {
            let mut scheduler = Scheduler::new(SchedulerConfig { blocks, max_batch_tokens: 24, ..CONFIG });
            let mut plan = StepPlan::default();
            let mut sessions = [None; 4];
            for (id, (stream, len, steps, life, session)) in acts.into_iter().enumerate() {
                let prompt = (0..len as u32).map(|at| if at < 40 { stream } else { at % (stream + 1) });
                let origin = Origin { owner: u64::from(stream), ..Origin::default() };
                scheduler.add(id as SequenceId, prompt.collect(), false, origin);
                // Of several turns of a session some fork, some are nobody's, and now and then one is closed.
                if let Some(of) = sessions.get_mut(session) {
                    let session = *of.get_or_insert_with(|| scheduler.open_session().unwrap());
                    scheduler.protect(session, u64::from(stream), life);
                    scheduler.join_session(id as SequenceId, session);
                    if steps == 0 {
                        scheduler.close_session(session);
                        *of = None;
                    }
                }
                for turn in 0..steps {
                    step(&mut scheduler, &mut plan, |other| (other + turn as u64).is_multiple_of(life));
                    scheduler.pool.check(scheduler.sequences.values().map(|sequence| &sequence.blocks[..]));
                    // Not all in every step, so that some miss changes.
                    let waiting = scheduler.waiting.iter().copied().filter(|id| !(id + turn as u64).is_multiple_of(3));
                    for id in waiting.collect::<Vec<_>>() {
                        scheduler.update_cached(id);
                        let sequence = &scheduler.sequences[&id];
                        let fresh = looked_up(&sequence.tokens, &scheduler.pool);
                        prop_assert_eq!(&sequence.cached.blocks, &fresh);
                        let held = fresh.iter().filter(|&&(block, _)| scheduler.pool.is_used(block)).count();
                        let is_used = |_, block| scheduler.pool.is_used(block);
                        prop_assert_eq!(sequence.cached.held(is_used), held);
                    }
                }
            }
        }
    }

    /// A scheduler of many blocks in which a session had a turn of 1,601 tokens.
    fn after_a_turn() -> (Scheduler, Vec<u32>) {
        let mut scheduler = Scheduler::new(SchedulerConfig { blocks: 256, max_batch_tokens: 4096, ..CONFIG });
        let prompt: Vec<u32> = (0..1601).collect();
        turn(&mut scheduler, 0, &prompt);
        (scheduler, prompt)
    }

    /// A turn of a session of its own, which ends with its first token; returns how many blocks of it were
    /// cached, and how many lookups told.
    fn turn(scheduler: &mut Scheduler, id: SequenceId, prompt: &[u32]) -> (usize, usize) {
        let lookups = scheduler.pool.lookups();
        scheduler.add(id, prompt.to_vec(), false, Origin::default());
        let found = (scheduler.cached_blocks(id), scheduler.pool.lookups() - lookups);
        let fresh = looked_up(prompt, &scheduler.pool);
        assert_eq!(scheduler.sequences[&id].cached.blocks, fresh);
        let session = scheduler.open_session().unwrap();
        scheduler.join_session(id, session);
        step(scheduler, &mut StepPlan::default(), |_| true);
        assert!(scheduler.sequence(id).is_none());
        scheduler.pool.check(std::iter::empty());
        found
    }

    #[test]
    fn a_remembered_path_is_found_in_a_lookup_or_two_and_so_is_a_fork() {
        let (mut scheduler, mut prompt) = after_a_turn();
        prompt.extend([7; 40]);
        assert_eq!(turn(&mut scheduler, 1, &prompt), (100, 2), "its head, and what is new");
        let fork: Vec<u32> = prompt[..800].iter().copied().chain(9000..9900).collect();
        assert_eq!(turn(&mut scheduler, 2, &fork), (50, 2));
        let of_fork = [&fork[..], &[8; 40]].concat();
        assert_eq!(turn(&mut scheduler, 3, &of_fork), (106, 3), "its head, where they part, and what is new");
        assert_eq!(turn(&mut scheduler, 4, &prompt), (102, 2));
    }

    #[test]
    fn of_a_remembered_path_that_has_lost_its_end_only_the_rest_is_found() {
        let (mut scheduler, prompt) = after_a_turn();
        turn(&mut scheduler, 1, &vec![9; 16 * 206]);
        assert_eq!(scheduler.counts().cached, 256);
        assert_eq!(turn(&mut scheduler, 2, &prompt).0, 50, "half of it went");
        assert_eq!(turn(&mut scheduler, 3, &prompt).0, 100);
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
