//! Who gives way: running sequences that lose their blocks or their place to others.
//!
//! Places and blocks are shared among owners max-min, by weight: a sequence takes them from an owner that
//! still holds at least as much for its weight afterwards; so no exchange is undone by the reverse one. Within an owner a
//! prefill gives way to one that stands well before it in line. A sequence gives way at most
//! [`MOST_YIELDS`] times, lest it compute the same for ever, and the running sequence that came first
//! never does, nor loses its blocks to decodes: so something always comes to its end.

use std::cmp::Reverse;

use crate::BLOCK_SIZE;
use crate::fairness::{Candidate, Origin};
use crate::scheduler::{Policy, Scheduler, StepPlan};
use crate::sequence::SequenceId;

/// How often one sequence gives way.
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
        self.count_holdings();
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

    /// Makes room for the first in line that waits, if others should give way to it.
    pub(crate) fn make_room(&mut self, plan: &mut StepPlan) {
        if self.config.policy != Policy::Fair || self.running.len() < 2 {
            return;
        }
        let Some(at) = self.line.iter().position(|candidate| !self.is_running(candidate.id)) else { return };
        let next = self.line[at];
        self.update_cached(next.id);
        while !self.has_room(next.id) {
            let Some(victim) = self.who_yields_to(&next, at) else { return };
            self.preempt(victim, plan);
            self.sequences.get_mut(&victim).expect("it ran").yields += 1;
        }
    }

    /// Who gives way to `next`, which is `at` in line: the last of its owner's prefills that are more than a
    /// step's tokens behind it, else the least urgent, youngest sequence of an owner that has too much.
    fn who_yields_to(&mut self, next: &Candidate, at: usize) -> Option<SequenceId> {
        let step = self.config.max_batch_tokens as f64;
        let behind = self.line[at + 1..].iter().rev().take_while(|other| other.place > next.place + step);
        let mut behind = behind.filter(|other| other.owner == next.owner).map(|other| other.id);
        if let Some(prefill) = behind.find(|id| self.may_yield(id)) {
            return Some(prefill);
        }
        self.count_holdings();
        let sequence = &self.sequences[&next.id];
        let lacks_place = self.running.len() == self.config.max_sequences;
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
        greatest(self.running.iter().filter(|id| self.may_yield(id)).filter(has_too_much).map(rank))
    }

    /// Whether a sequence runs, did not come first of those, and has not given way too often.
    fn may_yield(&self, id: &SequenceId) -> bool {
        self.running[1..].binary_search(id).is_ok() && self.sequences[id].yields < MOST_YIELDS
    }

    fn count_holdings(&mut self) {
        self.holdings.0.clear();
        for id in &self.running {
            let sequence = &self.sequences[id];
            self.holdings.add(&sequence.origin, sequence.blocks.len());
        }
    }
}
