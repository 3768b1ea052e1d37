//! What runs next: decodes first, then chunks of prefill, under one token budget.
//!
//! - Prefills, running and waiting ones alike, stand in one line, which `fairness` orders. A sequence
//!   is admitted when the pool holds blocks for all its known tokens (they are taken at once, so a
//!   prefill never stalls for blocks) and one spare for each running sequence. While the first that
//!   waits finds no room, nobody behind it is admitted.
//! - Each step, that first one may take the place of others (`room.rs`): of a prefill well behind it in
//!   line, or of an owner that holds more than it would. They are preempted only as it is admitted.
//! - A decode that finds no block preempts the youngest sequence of the owner that holds most. A
//!   preempted sequence keeps its tokens and its place in line, and finds most of its blocks again in
//!   the prefix tree.
//! - Of the running sequences, the one that came first is never preempted. As the line lets nobody wait
//!   for ever, everyone becomes that one or ends before.
//! - A decode is one token, or several where some were appended without a draw. Each sequence gets
//!   one; for the others decodes may take half of what is then left, so prefill never stands still.
//! - Drafted tokens take what the other decodes leave; see `drafts`.
//! - Beside decodes, prefill keeps to a limit, so that these keep a pace; where drafts lengthen the decodes,
//!   it keeps its share of the time. To the prompts of an owner that
//!   floods a step gives no more time than a sixth of what it takes for others: so they slow others'
//!   answers by a sixth at most, and where these end the sooner, the flood has the machine to itself.
//! - A waiting sequence whose next block another computes in this very step (forks of one prompt), or
//!   has fetched, lets it go ahead and then shares, rather than compute the same twice.

use std::collections::{BTreeSet, HashMap};

use crate::BLOCK_SIZE;
use crate::block_pool::{BlockCounts, BlockPool};
use crate::fairness::{Candidate, FairQueue, Origin};
use crate::pace::PrefillLimit;
use crate::room::Holdings;
use crate::sequence::{Sequence, SequenceId};

/// Others' time over a flood's, where they share a step.
const OTHERS_TO_FLOOD: f64 = 6.0;

/// Sizes and switches of a [`Scheduler`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// KV blocks in the pool.
    pub blocks: usize,
    /// Most sequences running at once; also the most output rows of a step, drafts aside.
    pub max_sequences: usize,
    /// Most tokens computed in one step; at least `max_sequences`.
    pub max_batch_tokens: usize,
    /// Most drafted tokens in one step. Each is an output row more.
    pub max_drafted: usize,
    /// Keep blocks of finished sequences for later ones that begin alike.
    pub prefix_cache: bool,
    /// In which order.
    pub policy: Policy,
}

/// In which order waiting sequences are served.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Policy {
    /// Owners and sessions share by tokens used.
    #[default]
    Fair,
    /// By arrival.
    FirstComeFirstServed,
}

/// One sequence's share of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// The sequence.
    pub id: SequenceId,
    /// First token of the chunk; those before it are computed.
    pub start: usize,
    /// Tokens in the chunk.
    pub len: usize,
    /// Logits are wanted for the last `outputs` tokens: 0 within a prompt, 1 at the end of the
    /// known tokens, `len` while a prompt is scored, and one more for each drafted token.
    pub outputs: usize,
    /// The last `drafted` tokens are not known yet but proposed: the beginning of the sequence's draft.
    pub drafted: usize,
}

/// Which sequences run how many tokens next. Reused from step to step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StepPlan {
    /// What to compute, in this order.
    pub chunks: Vec<Chunk>,
    /// How many of the chunks, the first ones, are decodes; the others are prefill.
    pub decodes: usize,
    /// Sequences that began to run with this step, and how many of their tokens were cached.
    pub admitted: Vec<(SequenceId, usize)>,
    /// Sequences that lost their blocks with this step.
    pub preempted: Vec<SequenceId>,
}

impl StepPlan {
    pub(crate) fn clear(&mut self) {
        self.chunks.clear();
        self.decodes = 0;
        self.admitted.clear();
        self.preempted.clear();
    }
}

/// Use of the prefix tree so far, in tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PrefixStats {
    /// Looked up.
    pub queries: u64,
    /// Found.
    pub hits: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Scheduler {
    pub(crate) config: SchedulerConfig,
    pub(crate) pool: BlockPool,
    pub(crate) sequences: HashMap<SequenceId, Sequence>,
    /// Ascending by arrival, since ids are.
    pub(crate) waiting: BTreeSet<SequenceId>,
    /// Ascending by arrival.
    pub(crate) running: Vec<SequenceId>,
    fair: FairQueue,
    /// Who wants prefill, in the order of the step being planned; running and waiting.
    pub(crate) line: Vec<Candidate>,
    /// For steps that also decode.
    prefill_limit: PrefillLimit,
    pub(crate) holdings: Holdings,
    prefix_stats: PrefixStats,
}

impl Scheduler {
    /// An idle scheduler.
    ///
    /// # Panics
    /// If a step could not hold one token of every running sequence.
    pub fn new(config: SchedulerConfig) -> Self {
        assert!(config.max_sequences > 0 && config.max_batch_tokens >= config.max_sequences);
        Self {
            pool: BlockPool::new(config.blocks),
            config,
            sequences: HashMap::new(),
            waiting: BTreeSet::new(),
            running: Vec::with_capacity(config.max_sequences),
            fair: FairQueue::new(config.max_batch_tokens),
            line: Vec::new(),
            prefill_limit: PrefillLimit::NONE,
            holdings: Holdings::default(),
            prefix_stats: PrefixStats::default(),
        }
    }

    /// Longest sequence that the pool can hold, in tokens.
    pub fn max_tokens(&self) -> usize {
        self.config.blocks * BLOCK_SIZE
    }

    /// Queues a sequence. Its prompt and answer together must not outgrow [`Self::max_tokens`].
    ///
    /// # Panics
    /// If the id is known or the prompt empty or too long: the engine checks its input.
    pub fn add(&mut self, id: SequenceId, prompt: Vec<u32>, score_prompt: bool, origin: Origin) {
        assert!(!prompt.is_empty() && prompt.len() <= self.max_tokens());
        let previous = self.sequences.insert(id, Sequence::new(prompt, score_prompt, origin));
        assert!(previous.is_none(), "sequence {id} was added twice");
        let cached = self.update_cached(id);
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.charged = cached * BLOCK_SIZE;
        }
        self.waiting.insert(id);
        self.fair.join(id, &origin);
    }

    /// Forgets a sequence, finished or cancelled, and lets go of its blocks. Unknown ids are fine.
    pub fn remove(&mut self, id: SequenceId) {
        if let Some(mut sequence) = self.sequences.remove(&id) {
            self.waiting.remove(&id);
            self.running.retain(|&other| other != id);
            self.fair.leave(id, &sequence.origin);
            release_blocks(&mut self.pool, &mut sequence);
        }
    }

    /// A sequence by its id.
    pub fn sequence(&self, id: SequenceId) -> Option<&Sequence> {
        self.sequences.get(&id)
    }

    /// Sequences running.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Sequences waiting.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Those waiting, in the order in which the last step saw them: the next to be served first.
    pub fn waiting_in_line(&self) -> impl Iterator<Item = SequenceId> {
        self.line.iter().map(|candidate| candidate.id).filter(|id| self.waiting.contains(id))
    }

    /// From now on, a step that also decodes holds to this, so that it keeps a pace.
    pub fn limit_prefill(&mut self, limit: PrefillLimit) {
        self.prefill_limit = limit;
    }

    /// Blocks by state.
    pub fn counts(&self) -> BlockCounts {
        self.pool.counts()
    }

    /// Use of the prefix tree so far.
    pub fn prefix_stats(&self) -> PrefixStats {
        self.prefix_stats
    }

    /// Plans the next step into `plan`. It is empty only when nothing waits or runs, or all that could run is held.
    pub fn plan(&mut self, plan: &mut StepPlan) {
        plan.clear();
        let mut budget = Budget { tokens: self.config.max_batch_tokens, outputs: self.config.max_sequences };
        self.release_draft_blocks();
        self.reserve_blocks(plan);
        self.form_line();
        let admits = plan.preempted.is_empty();
        self.plan_decodes(plan, &mut budget);
        self.plan_drafts(plan, &mut budget);
        plan.decodes = plan.chunks.len();
        let times = self.prefill_times(plan);
        self.plan_prefills(plan, &mut budget, times, admits);
        self.place_drafts(plan);
    }

    /// How much time prefill may take beside the step's decodes, and of it that of owners that flood.
    fn prefill_times(&self, plan: &StepPlan) -> PrefillTimes {
        let PrefillLimit { time, decodes, .. } = self.prefill_limit;
        let drafted = plan.chunks.iter().map(|chunk| chunk.drafted).sum();
        let stretch = self.prefill_limit.stretch(drafted, plan.decodes);
        let time = time * stretch;
        let floods = |chunk: &Chunk| self.fair.floods(self.sequences[&chunk.id].origin.owner);
        match decodes {
            _ if plan.decodes == 0 => PrefillTimes { all: f64::INFINITY, floods: f64::INFINITY },
            Some(decodes) if !plan.chunks.iter().all(floods) => {
                PrefillTimes { all: time, floods: decodes * stretch / OTHERS_TO_FLOOD }
            }
            _ => PrefillTimes { all: time, floods: time },
        }
    }

    /// Advances the planned sequences by the known tokens that were computed and makes their full
    /// blocks findable. Drafted tokens are not known before [`Self::accept`].
    /// Call after the model ran; sequences removed meanwhile are passed over.
    pub fn commit(&mut self, plan: &StepPlan) {
        for chunk in &plan.chunks {
            let Some(sequence) = self.sequences.get_mut(&chunk.id) else { continue };
            sequence.computed = chunk.start + chunk.len - chunk.drafted;
            self.fair.charge(chunk.id, &sequence.origin, sequence.cost_to(sequence.computed));
            sequence.charged = sequence.charged.max(sequence.computed);
            self.index_full_blocks(chunk.id);
        }
    }

    /// Adds a generated token to a sequence, running or waiting. Several may be added between two steps.
    pub fn append(&mut self, id: SequenceId, token: u32) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.tokens.push(token);
            sequence.draft.clear();
        }
    }

    /// Makes the full blocks of a sequence's computed tokens findable.
    pub(crate) fn index_full_blocks(&mut self, id: SequenceId) {
        let Some(sequence) = self.sequences.get_mut(&id).filter(|_| self.config.prefix_cache) else { return };
        for index in sequence.indexed..sequence.computed / BLOCK_SIZE {
            let parent = sequence.parent(index);
            let block = self.pool.index(parent, sequence.block_tokens(index), sequence.blocks[index]);
            sequence.blocks[index] = block;
            sequence.indexed = index + 1;
        }
    }

    /// Gives running sequences blocks for all their known tokens, the oldest first. Where none is
    /// left, somebody loses its own.
    fn reserve_blocks(&mut self, plan: &mut StepPlan) {
        let mut index = 0;
        while let Some(&id) = self.running.get(index) {
            let sequence = self.sequences.get_mut(&id).expect("running sequences are known");
            if sequence.blocks.len() * BLOCK_SIZE >= sequence.tokens.len() {
                index += 1;
            } else if let Some(block) = self.pool.allocate() {
                sequence.blocks.push(block);
            } else {
                let victim = self.victim_for_blocks();
                self.preempt(victim, plan);
                index -= usize::from(victim < id);
            }
        }
    }

    /// Puts everyone who wants prefill in line.
    fn form_line(&mut self) {
        self.fair.settle();
        self.line.clear();
        let prefills = self.running.iter().filter(|id| self.sequences[id].is_prefilling());
        for &id in prefills.chain(&self.waiting) {
            let sequence = &self.sequences[&id];
            let cost = sequence.cost_to(sequence.tokens.len());
            self.line.push(self.fair.candidate(id, &sequence.origin, cost));
        }
        match self.config.policy {
            Policy::Fair => self.fair.sort(&mut self.line),
            Policy::FirstComeFirstServed => self.line.sort_unstable_by_key(|candidate| candidate.id),
        }
    }

    /// Decodes, oldest first.
    fn plan_decodes(&self, plan: &mut StepPlan, budget: &mut Budget) {
        let decoding = || self.running.iter().filter(|id| self.sequences[id].is_decoding());
        let mut more = (budget.tokens - decoding().count()) / 2;
        for &id in decoding() {
            let sequence = &self.sequences[&id];
            let len = sequence.pending().min(1 + more);
            let outputs = usize::from(len == sequence.pending());
            more -= len - 1;
            budget.take(len, outputs);
            plan.chunks.push(Chunk { id, start: sequence.computed, len, outputs, drafted: 0 });
        }
    }

    pub(crate) fn is_running(&self, id: SequenceId) -> bool {
        self.running.binary_search(&id).is_ok()
    }

    /// Takes a running sequence's blocks; it waits again.
    pub(crate) fn preempt(&mut self, id: SequenceId, plan: &mut StepPlan) {
        self.running.retain(|&other| other != id);
        let sequence = self.sequences.get_mut(&id).expect("running sequences are known");
        release_blocks(&mut self.pool, sequence);
        self.waiting.insert(id);
        plan.preempted.push(id);
    }

    /// A chunk of a running sequence's prefill, of at most `most` tokens and as long as the budget allows;
    /// returns its length.
    fn plan_prefill(&self, id: SequenceId, most: usize, plan: &mut StepPlan, budget: &mut Budget) -> usize {
        let sequence = &self.sequences[&id];
        let scoring = sequence.is_scoring();
        let most = if scoring { most.min(budget.outputs) } else { most };
        let len = sequence.pending().min(most);
        let outputs = match (scoring, len == sequence.pending()) {
            (true, _) => len,
            (false, true) => 1,
            (false, false) => 0,
        };
        if len == 0 || outputs > budget.outputs {
            return 0;
        }
        budget.take(len, outputs);
        plan.chunks.push(Chunk { id, start: sequence.computed, len, outputs, drafted: 0 });
        len
    }

    /// Prefill along the line while budget and time last: running sequences go on, waiting ones are
    /// admitted while there are blocks and places.
    fn plan_prefills(
        &mut self,
        plan: &mut StepPlan,
        budget: &mut Budget,
        mut times: PrefillTimes,
        mut admits: bool,
    ) {
        let line = std::mem::take(&mut self.line);
        let next = line.iter().position(|candidate| !self.is_running(candidate.id));
        for (at, &Candidate { id, owner, .. }) in line.iter().enumerate() {
            if budget.tokens == 0 || times.all <= 0.0 {
                break;
            }
            let running = self.is_running(id);
            if !running && (!admits || plan.preempted.contains(&id)) {
                continue;
            }
            let start =
                if running { self.sequences[&id].computed } else { self.update_cached(id) * BLOCK_SIZE };
            let floods = self.fair.floods(owner);
            let most = self.prefill_limit.tokens_in(times.of(floods), start).min(budget.tokens);
            // Whatever is first goes on.
            let most = if plan.chunks.len() == plan.decodes {
                most.max(BLOCK_SIZE.min(budget.tokens))
            } else {
                most
            };
            if most == 0 || !running && self.is_being_computed(id, start / BLOCK_SIZE, plan) {
                continue;
            }
            if !running {
                let has_room =
                    self.has_room(id) || next == Some(at) && self.make_room(&line, at, plan, budget);
                if !has_room {
                    admits = false; // nor any behind it, lest they keep it waiting
                    continue;
                }
                plan.admitted.push((id, self.start(id)));
            }
            let len = self.plan_prefill(id, most, plan, budget);
            times.take(floods, self.prefill_limit.time_of(start, len));
        }
        self.line = line;
    }

    /// Whether this step computes, or a slower tier brings, for another sequence, the block after the
    /// `cached` first ones.
    fn is_being_computed(&self, id: SequenceId, cached: usize, plan: &StepPlan) -> bool {
        let sequence = &self.sequences[&id];
        let end = (cached + 1) * BLOCK_SIZE;
        self.config.prefix_cache
            && !sequence.is_scoring()
            && end < sequence.tokens.len()
            && self.running.iter().map(|id| (id, &self.sequences[id])).any(|(id, other)| {
                // The block itself first: it differs for nearly all, and is cheap to compare.
                other.computed < end
                    && other.tokens.len() >= end
                    && other.tokens[end - BLOCK_SIZE..end] == sequence.tokens[end - BLOCK_SIZE..end]
                    && other.tokens[..end] == sequence.tokens[..end]
                    && (other.held || plan.chunks.iter().any(|chunk| chunk.id == *id))
            })
    }

    /// Gives a waiting sequence its blocks; returns how many of its tokens are cached.
    fn start(&mut self, id: SequenceId) -> usize {
        self.waiting.remove(&id);
        let at = self.running.partition_point(|&other| other < id);
        self.running.insert(at, id);
        let sequence = self.sequences.get_mut(&id).expect("waiting sequences are known");
        let path = std::mem::take(&mut sequence.cached);
        sequence.blocks.extend(path.blocks());
        self.pool.retain_path(&sequence.blocks);
        sequence.indexed = path.len();
        sequence.computed = path.len() * BLOCK_SIZE;
        if !std::mem::replace(&mut sequence.started, true) {
            sequence.charged = sequence.computed;
        }
        while sequence.blocks.len() * BLOCK_SIZE < sequence.tokens.len() {
            sequence.blocks.push(self.pool.allocate().expect("the pool was asked before"));
        }
        self.prefix_stats.queries += sequence.tokens.len() as u64;
        self.prefix_stats.hits += sequence.computed as u64;
        sequence.computed
    }
}

/// Time that a step has left for prefill.
struct PrefillTimes {
    all: f64,
    /// Of it, for owners that flood.
    floods: f64,
}

impl PrefillTimes {
    /// What an owner has left that floods, or does not.
    fn of(&self, floods: bool) -> f64 {
        if floods { self.floods.min(self.all).max(0.0) } else { self.all }
    }

    fn take(&mut self, floods: bool, time: f64) {
        self.all -= time;
        self.floods += if floods { -time } else { time / OTHERS_TO_FLOOD };
    }
}

/// What a step may still hold.
pub(crate) struct Budget {
    pub(crate) tokens: usize,
    pub(crate) outputs: usize,
}

impl Budget {
    fn take(&mut self, tokens: usize, outputs: usize) {
        self.tokens -= tokens;
        self.outputs -= outputs;
    }

    /// A planned chunk is not to run after all.
    pub(crate) fn give_back(&mut self, chunk: &Chunk) {
        self.tokens += chunk.len;
        self.outputs += chunk.outputs - chunk.drafted;
    }
}

/// Lets go of all blocks.
fn release_blocks(pool: &mut BlockPool, sequence: &mut Sequence) {
    let prompt_blocks = sequence.prompt_blocks();
    pool.release_path(&mut sequence.blocks, sequence.indexed, sequence.session, prompt_blocks);
    sequence.computed = 0;
    sequence.indexed = 0;
    sequence.held = false;
}
