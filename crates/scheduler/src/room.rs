//! Who gives way: running sequences that lose their blocks or their place to others.
//!
//! Places and blocks are shared among owners max-min, by weight: a sequence takes them from an owner that
//! still holds at least as much for its weight afterwards; so no exchange is undone by the reverse one. Within an owner a
//! prefill gives way to one that stands well before it in line. A sequence gives way to others that wait at most
//! [`MOST_YIELDS`] times, lest it compute the same for ever; to the next tokens of those that run, when no block is left,
//! as often as it must. The running sequence that came first does neither: so something always comes to its end.
//! Nobody gives way before it is known that all who do make enough room.

use std::cmp::Reverse;

use crate::block_pool::first_blocks;
use crate::fairness::{Candidate, Origin};
use crate::scheduler::{Budget, Policy, Scheduler, StepPlan};
use crate::sequence::SequenceId;
use crate::{BLOCK_SIZE, BlockId};

/// How often one sequence gives way to others that wait.
const MOST_YIELDS: u32 = 4;

/// What each owner holds; made when somebody must give way.
#[derive(Debug, Default)]
pub(crate) struct Holdings(Vec<Holding>);

#[derive(Debug, Clone, Copy)]
struct Holding {
    owner: u64,
    weight: f64,
    running: usize,
    /// Blocks, shared ones counted for each who shares them.
    blocks: usize,
}

impl Holding {
    /// What it has for its weight, if that changes by `more`: places, or blocks.
    fn share(&self, places: bool, more: f64) -> f64 {
        let held = if places { self.running } else { self.blocks };
        (held as f64 + more) / self.weight
    }
}

impl Holdings {
    fn of(&self, origin: &Origin) -> Holding {
        let none = Holding { owner: origin.owner, weight: origin.owner_weight(), running: 0, blocks: 0 };
        self.0.iter().find(|holding| holding.owner == origin.owner).copied().unwrap_or(none)
    }

    fn add(&mut self, origin: &Origin, blocks: usize) {
        match self.0.iter_mut().find(|holding| holding.owner == origin.owner) {
            Some(holding) => {
                holding.running += 1;
                holding.blocks += blocks;
            }
            None => {
                let (owner, weight) = (origin.owner, origin.owner_weight());
                self.0.push(Holding { owner, weight, running: 1, blocks });
            }
        }
    }
}

/// Running sequences that are to give way.
#[derive(Debug, Default)]
struct Yielding {
    ids: Vec<SequenceId>,
    /// Those that nobody holds without them.
    blocks: usize,
}

/// Who gives way first: the greatest.
type Rank = (f64, Reverse<u64>, i32, SequenceId);

fn greatest(ranks: impl Iterator<Item = Rank>) -> Option<SequenceId> {
    let order = |a: &Rank, b: &Rank| a.0.total_cmp(&b.0).then((a.1, a.2, a.3).cmp(&(b.1, b.2, b.3)));
    ranks.max_by(order).map(|(.., id)| id)
}

impl Scheduler {
    /// Who loses its blocks where a running sequence finds none for its next token: of the owner that
    /// holds most, the least urgent, youngest. By arrival alone, the youngest.
    pub(crate) fn victim_for_blocks(&mut self) -> SequenceId {
        self.count_holdings(&[]);
        let rank = |&id: &SequenceId| match self.config.policy {
            Policy::Fair => {
                let origin = &self.sequences[&id].origin;
                (self.holdings.of(origin).share(false, 0.0), Reverse(0), origin.priority, id)
            }
            Policy::FirstComeFirstServed => (0.0, Reverse(0), 0, id),
        };
        let most = greatest(self.running.iter().skip(1).map(rank));
        most.or(self.running.last().copied()).expect("a sequence that needs a block runs")
    }

    /// Makes room for `line[at]`, the first that waits, if others should give way to it who hold enough together; they
    /// leave the plan. Returns whether there is room.
    pub(crate) fn make_room(
        &mut self,
        line: &[Candidate],
        at: usize,
        plan: &mut StepPlan,
        budget: &mut Budget,
    ) -> bool {
        if self.config.policy != Policy::Fair || self.running.len() < 2 {
            return false;
        }
        let mut yielding = Yielding::default();
        while !self.has_room_without(line[at].id, &yielding) {
            let Some(victim) = self.who_yields_to(line, at, &yielding.ids) else { return false };
            yielding.blocks += self.freed_by(victim, &yielding.ids);
            yielding.ids.push(victim);
        }
        for victim in yielding.ids {
            self.preempt(victim, plan);
            self.sequences.get_mut(&victim).expect("it ran").yields += 1;
            if let Some(at) = plan.chunks.iter().position(|chunk| chunk.id == victim) {
                budget.give_back(&plan.chunks.remove(at));
                plan.decodes -= usize::from(at < plan.decodes);
            }
        }
        true
    }

    /// Whether there is a place, and the pool has blocks for all known tokens and a spare one per
    /// running sequence.
    pub(crate) fn has_room(&self, id: SequenceId) -> bool {
        self.has_room_without(id, &Yielding::default())
    }

    /// As [`Self::has_room`], once these have given way.
    fn has_room_without(&self, id: SequenceId, yielding: &Yielding) -> bool {
        let sequence = &self.sequences[&id];
        let running = self.running.len() - yielding.ids.len();
        let held = sequence.cached.held(|at, block| self.holders_without(&yielding.ids, at, block) > 0);
        let needed = sequence.tokens.len().div_ceil(BLOCK_SIZE) - held;
        running < self.config.max_sequences && needed + running <= self.pool.available() + yielding.blocks
    }

    /// How many blocks only this running sequence holds besides those that give way before it: its last ones, as
    /// whoever holds a block holds all before it.
    fn freed_by(&self, id: SequenceId, before: &[SequenceId]) -> usize {
        let blocks = &self.sequences[&id].blocks;
        blocks.len() - first_blocks(blocks.len(), |at| self.holders_without(before, at, blocks[at]) > 1)
    }

    /// How many sequences hold a block, the one `at` this place of all their paths, besides those that give way.
    fn holders_without(&self, yielding: &[SequenceId], at: usize, block: BlockId) -> usize {
        let hold = |id: &&SequenceId| self.sequences[*id].blocks.get(at) == Some(&block);
        self.pool.holders(block) - yielding.iter().filter(hold).count()
    }

    /// Who gives way to `line[at]` after those that are to already: the last of its owner's prefills that are more
    /// than a step's tokens behind it, else the least urgent, youngest sequence of an owner that has too much.
    fn who_yields_to(
        &mut self,
        line: &[Candidate],
        at: usize,
        yielding: &[SequenceId],
    ) -> Option<SequenceId> {
        let (next, step) = (&line[at], self.config.max_batch_tokens as f64);
        let behind = line[at + 1..].iter().rev().take_while(|other| other.place > next.place + step);
        let mut behind = behind.filter(|other| other.owner == next.owner).map(|other| other.id);
        if let Some(prefill) = behind.find(|id| self.may_yield(id, yielding)) {
            return Some(prefill);
        }
        self.count_holdings(yielding);
        let sequence = &self.sequences[&next.id];
        let lacks_place = self.running.len() - yielding.len() == self.config.max_sequences;
        // A place, or blocks.
        let amount = |blocks: usize| if lacks_place { 1.0 } else { blocks as f64 };
        let needs = amount(sequence.tokens.len().div_ceil(BLOCK_SIZE));
        let mine = self.holdings.of(&sequence.origin);
        let has_too_much = |id: &&SequenceId| {
            let other = &self.sequences[*id];
            let theirs = self.holdings.of(&other.origin);
            let given = amount(other.blocks.len());
            theirs.share(lacks_place, -given) >= mine.share(lacks_place, needs)
        };
        let rank = |&id: &SequenceId| {
            let origin = &self.sequences[&id].origin;
            let held = self.holdings.of(origin).share(lacks_place, 0.0);
            (held, Reverse(origin.owner), origin.priority, id)
        };
        let may_yield = |id: &&SequenceId| self.may_yield(id, yielding);
        greatest(self.running.iter().filter(may_yield).filter(has_too_much).map(rank))
    }

    /// Whether a sequence runs and is not to give way already, did not come first of those, and has not given way too
    /// often.
    fn may_yield(&self, id: &SequenceId, yielding: &[SequenceId]) -> bool {
        self.running[1..].binary_search(id).is_ok()
            && !yielding.contains(id)
            && self.sequences[id].yields < MOST_YIELDS
    }

    /// Counts what owners hold without those that are to give way.
    fn count_holdings(&mut self, yielding: &[SequenceId]) {
        self.holdings.0.clear();
        for id in self.running.iter().filter(|id| !yielding.contains(id)) {
            let sequence = &self.sequences[id];
            self.holdings.add(&sequence.origin, sequence.blocks.len());
        }
    }
}
