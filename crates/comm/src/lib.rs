//! Collectives between the ranks of a model, each of which holds a part of every layer: threads of one process, or of several processes
//! (nodes), which talk over TCP.
//!
//! Every rank calls the same collectives in the same order. What they give is the same bits however the threads are timed:
//! sums are taken in the order of the ranks. A rank that cannot go on says so with [`Group::fail`]; then every collective, those
//! that others wait in too, is an error until [`Group::mend`], and nobody waits for ever.
//!
//! Over nodes, the ranks of a process first show each other what they have, then the first of them brings it to the other nodes and
//! theirs here (`nodes.rs`); so the sums are the same bits as in one process. A node that is gone ends the group for good.

mod barrier;
mod frame;
mod join;
mod nodes;
mod pulse;

use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use barrier::Barrier;
use nodes::{Audience, Nodes};
use pulse::End;

pub use join::{JoinError, Terms};

/// One of `world` ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rank {
    /// Its number, from 0.
    pub index: usize,
    /// How many there are.
    pub world: usize,
}

impl Rank {
    /// The one rank of a model that is not cut.
    pub const ALONE: Self = Self { index: 0, world: 1 };
}

/// Why a collective could not be completed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("rank {rank} failed: {reason}")]
pub struct Failed {
    /// The rank that could not go on.
    pub rank: usize,
    /// What it said.
    pub reason: String,
}

/// The ranks of one model together. Cheap to clone; all clones are one group.
#[derive(Clone)]
pub struct Group {
    shared: Arc<Shared>,
}

/// A rank's place in its [`Group`].
pub struct Member {
    rank: Rank,
    shared: Arc<Shared>,
}

struct Shared {
    /// Of the ranks of this process.
    barrier: Barrier,
    /// The other processes, if there are any.
    nodes: Option<Nodes>,
    /// What each rank shows the others. Two sides, used in turn: a rank that is at its next collective writes to one while slower ranks
    /// still read the other, and nobody is two ahead. So one crossing of the barrier is enough for a collective.
    shown: Vec<[RwLock<Vec<f32>>; 2]>,
}

impl Shared {
    fn local(&self) -> Range<usize> {
        self.nodes.as_ref().map_or(0..self.shown.len(), Nodes::local)
    }
}

impl Group {
    /// A group of `world` ranks in this process.
    ///
    /// # Panics
    /// If `world` is 0.
    pub fn new(world: usize) -> Self {
        assert!(world > 0, "a group has at least one rank");
        Self::of(world, world, None)
    }

    /// A group over nodes that have joined.
    fn over(nodes: Nodes) -> Self {
        Self::of(nodes.world(), nodes.local().len(), Some(nodes))
    }

    fn of(world: usize, local: usize, nodes: Option<Nodes>) -> Self {
        let shown = (0..world).map(|_| Default::default()).collect();
        Self { shared: Arc::new(Shared { barrier: Barrier::new(local), nodes, shown }) }
    }

    /// Ranks in the group.
    pub fn world(&self) -> usize {
        self.shared.shown.len()
    }

    /// The ranks of this process.
    pub fn local(&self) -> Range<usize> {
        self.shared.local()
    }

    /// The members in this process, in order; each is to be used by one thread at a time, and there should be one of each.
    pub fn members(&self) -> Vec<Member> {
        let world = self.world();
        self.local()
            .map(|index| Member { rank: Rank { index, world }, shared: self.shared.clone() })
            .collect()
    }

    /// Ends the collectives that wait in this process, and those to come, with an error: `rank` cannot go on. The first reason stays. Other
    /// nodes hear of it when the step ends.
    pub fn fail(&self, rank: usize, reason: String) {
        self.shared.barrier.fail(Failed { rank, reason });
    }

    /// Makes a group usable again after a failure, which is returned. To be called when no rank is in a collective.
    pub fn mend(&self) -> Option<Failed> {
        self.shared.barrier.mend()
    }
}

/// Of a group over several processes. In one of a single process there is nothing to do.
impl Group {
    /// Processes that share the ranks.
    pub fn nodes(&self) -> usize {
        self.shared.nodes.as_ref().map_or(1, Nodes::count)
    }

    /// The number of this process among them.
    pub fn node(&self) -> usize {
        self.shared.nodes.as_ref().map_or(0, Nodes::index)
    }

    /// Tells each node every node's `word`, in their order. All call it, outside of steps.
    ///
    /// # Errors
    /// If a node has failed or is gone.
    pub fn agree(&self, word: u64) -> Result<Vec<u64>, Failed> {
        self.shared.nodes.as_ref().map_or_else(|| Ok(vec![word]), |nodes| nodes.agree(word))
    }

    /// Tells the other nodes that this one cannot go on, before steps begin.
    pub fn withdraw(&self, reason: String) {
        if let Some(nodes) = &self.shared.nodes {
            nodes.withdraw(&Failed {
                rank: self.local().start,
                reason: format!("node {}: {reason}", nodes.index()),
            });
        }
    }

    /// On node 0: begins a step on the others, which [`Group::next`] gives them. A node that is gone fails the step.
    pub fn begin(&self, step: &[u8]) {
        if let Some(Err(failed)) = self.shared.nodes.as_ref().map(|nodes| nodes.begin(step)) {
            self.shared.barrier.fail(failed);
        }
    }

    /// On node 0, when its ranks have ended the step: waits until the other nodes have, and fails the step if it failed there.
    pub fn end(&self) {
        let Some(nodes) = &self.shared.nodes else { return };
        if let Some(failed) = nodes.end(self.shared.barrier.failed().as_ref()) {
            self.shared.barrier.fail(failed);
        }
    }

    /// On another node: waits for the next step, and puts it into `step`; false if node 0 has ended in good order.
    ///
    /// # Errors
    /// If node 0 is gone.
    pub fn next(&self, step: &mut Vec<u8>) -> Result<bool, Failed> {
        self.shared.nodes.as_ref().map_or(Ok(false), |nodes| nodes.next(step))
    }

    /// On another node, when its ranks have ended the step: makes the group whole if it failed, and tells node 0 how it ended.
    ///
    /// # Errors
    /// If node 0 is gone.
    pub fn done(&self) -> Result<(), Failed> {
        let failed = self.shared.barrier.mend();
        self.shared.nodes.as_ref().map_or(Ok(()), |nodes| nodes.done(failed.as_ref()))
    }

    /// Ends the group in good order: the other nodes are told. The last clone that goes does the same.
    pub fn bye(&self) {
        if let Some(nodes) = &self.shared.nodes {
            nodes.health().finish(End::Bye);
        }
    }

    /// Waits until the group has ended; the node that is gone, unless it was in good order.
    pub fn lost(&self) -> Option<Failed> {
        match self.shared.nodes.as_ref()?.health().wait() {
            End::Lost(failed) => Some(failed),
            End::Bye => None,
        }
    }
}

impl Member {
    /// Which rank this is.
    pub fn rank(&self) -> Rank {
        self.rank
    }

    /// The ranks of this process.
    pub fn local(&self) -> Range<usize> {
        self.shared.local()
    }

    /// Whether no rank is known to have failed, on another node neither, nor a node to be gone: for who waits elsewhere than in a collective.
    ///
    /// # Errors
    /// If one has, or is.
    pub fn check(&self) -> Result<(), Failed> {
        let failed = self.shared.barrier.failed();
        let lost = || match self.shared.nodes.as_ref()?.health().end()? {
            End::Lost(failed) => Some(failed),
            End::Bye => None,
        };
        let heard = || self.shared.nodes.as_ref()?.heard();
        failed.or_else(lost).or_else(heard).map_or(Ok(()), Err)
    }

    /// Makes `x` the sum of all ranks' `x`, added in the order of the ranks: the same bits on each.
    ///
    /// # Errors
    /// If a rank failed, or the ranks' lengths differ.
    pub fn all_reduce(&self, x: &mut [f32]) -> Result<(), Failed> {
        if self.rank.world == 1 {
            return Ok(());
        }
        let side = self.show(x, Audience::All)?;
        for (index, shown) in self.shared.shown.iter().enumerate() {
            let part = shown[side].read().unwrap_or_else(PoisonError::into_inner);
            if part.len() != x.len() {
                return Err(self.differs(index, part.len(), x.len()));
            }
            match index {
                0 => x.copy_from_slice(&part),
                _ => x.iter_mut().zip(part.iter()).for_each(|(x, y)| *x += y),
            }
        }
        Ok(())
    }

    /// Tells every rank each rank's `mine`, in `all`, which is as long as there are ranks. Nobody goes on before all have come.
    ///
    /// # Errors
    /// If a rank failed, or is at another collective.
    pub fn share(&self, mine: u64, all: &mut [u64]) -> Result<(), Failed> {
        // Sixteen bits at a time, which f32 holds exactly.
        let pieces: [f32; 4] = std::array::from_fn(|i| f32::from((mine >> (16 * i)) as u16));
        let side = self.show(&pieces, Audience::All)?;
        for (index, (shown, all)) in self.shared.shown.iter().zip(all).enumerate() {
            let shown = shown[side].read().unwrap_or_else(PoisonError::into_inner);
            if shown.len() != pieces.len() {
                return Err(self.differs(index, shown.len(), pieces.len()));
            }
            *all = shown.iter().rev().fold(0, |word, &piece| word << 16 | piece as u64);
        }
        Ok(())
    }

    /// Puts the ranks' `part`s, each `rows` rows of its own width, side by side in the order of the ranks, into `whole`,
    /// `[rows, sum of the widths]`. Rank 0 gives `whole`; the others give `None` and get nothing.
    ///
    /// # Errors
    /// If a rank failed, or the parts do not fill `whole`.
    pub fn gather(&self, part: &[f32], rows: usize, whole: Option<&mut [f32]>) -> Result<(), Failed> {
        let side = self.show(part, Audience::First)?;
        let Some(whole) = whole else { return Ok(()) };
        let total = whole.len() / rows.max(1);
        let mut at = 0;
        for (index, shown) in self.shared.shown.iter().enumerate() {
            let part = shown[side].read().unwrap_or_else(PoisonError::into_inner);
            let width = part.len() / rows.max(1);
            if part.len() != rows * width || at + width > total {
                return Err(self.differs(index, part.len(), whole.len()));
            }
            for row in 0..rows {
                whole[row * total + at..][..width].copy_from_slice(&part[row * width..][..width]);
            }
            at += width;
        }
        if rows * at == whole.len() { Ok(()) } else { Err(self.differs(0, rows * at, whole.len())) }
    }

    /// Shows `x` to the other ranks and waits until all have shown theirs; returns the side they are on.
    fn show(&self, x: &[f32], audience: Audience) -> Result<usize, Failed> {
        let nodes = self.shared.nodes.as_ref();
        // No crossing can happen before this rank arrives, so the side is the same for all. Over nodes there are two for each collective.
        let side = self.shared.barrier.crossings() / (1 + usize::from(nodes.is_some())) % 2;
        let mut shown =
            self.shared.shown[self.rank.index][side].write().unwrap_or_else(PoisonError::into_inner);
        shown.clear();
        shown.extend_from_slice(x);
        drop(shown);
        self.shared.barrier.wait()?;
        let Some(nodes) = nodes else { return Ok(side) };
        if self.rank.index == nodes.local().start
            && let Err(failed) = nodes.exchange(&self.shared.shown, side, audience)
        {
            self.shared.barrier.fail(failed.clone());
            return Err(failed);
        }
        self.shared.barrier.wait()?;
        Ok(side)
    }

    fn differs(&self, rank: usize, found: usize, expected: usize) -> Failed {
        let reason = format!("{found} elements where rank {} has {expected}", self.rank.index);
        Failed { rank, reason }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `work` on a thread for each rank, and returns what they return, in order.
    fn on_all<T: Send>(group: &Group, work: impl Fn(Member) -> T + Sync) -> Vec<T> {
        let work = &work;
        std::thread::scope(|scope| {
            let threads: Vec<_> =
                group.members().into_iter().map(|member| scope.spawn(move || work(member))).collect();
            threads.into_iter().map(|thread| thread.join().expect("no rank panics")).collect()
        })
    }

    /// Numbers whose sum depends on the order.
    fn number(rank: usize, step: usize, i: usize) -> f32 {
        let hash = (rank * 7919 + step * 104_729 + i * 31 + 17) as u32 % 2003;
        (hash as f32 - 1000.0) * 10f32.powi((hash % 13) as i32 - 6)
    }

    #[test]
    fn sums_are_taken_in_the_order_of_the_ranks_whoever_comes_first() {
        for world in [1, 2, 3, 4] {
            let group = Group::new(world);
            let found = on_all(&group, |member| {
                let rank = member.rank().index;
                let mut bits = Vec::new();
                for step in 0..200 {
                    let len = 1 + step * 7 % 50;
                    let mut x: Vec<f32> = (0..len).map(|i| number(rank, step, i)).collect();
                    if (step + rank) % 5 == 0 {
                        std::thread::yield_now();
                    }
                    member.all_reduce(&mut x).expect("no rank fails");
                    bits.extend(x.iter().map(|x| x.to_bits()));
                }
                bits
            });
            let mut expected = Vec::new();
            for step in 0..200 {
                for i in 0..1 + step * 7 % 50 {
                    let parts = (0..world).map(|rank| number(rank, step, i));
                    expected.push(parts.reduce(|sum, x| sum + x).map(f32::to_bits).unwrap_or_default());
                }
            }
            assert!(found.iter().all(|bits| *bits == expected), "{world} ranks");
        }
    }

    #[test]
    fn words_are_shared_bit_for_bit() {
        let words = [u64::MAX, 0, 0x8000_7fff_0001_fffe];
        let found = on_all(&Group::new(3), |member| {
            let mut all = [7; 3];
            for round in 0..5 {
                member.share(words[member.rank().index].rotate_left(round), &mut all)?;
                assert_eq!(all, words.map(|word| word.rotate_left(round)));
            }
            Ok::<_, Failed>(all)
        });
        assert!(found.iter().all(Result::is_ok), "{found:?}");
    }

    #[test]
    fn parts_of_any_width_lie_side_by_side_on_rank_0() {
        let group = Group::new(3);
        let widths = [4, 1, 2];
        let found = on_all(&group, |member| {
            let Rank { index, .. } = member.rank();
            let mut whole = vec![0.0; if index == 0 { 2 * 7 } else { 0 }];
            for rows in [2, 0, 2] {
                let part: Vec<f32> = (0..rows * widths[index]).map(|i| (100 * index + i) as f32).collect();
                let whole = if index == 0 { Some(&mut whole[..rows * 7]) } else { None };
                member.gather(&part, rows, whole).expect("no rank fails");
            }
            whole
        });
        let first = [0., 1., 2., 3., 100., 200., 201.];
        let second = [4., 5., 6., 7., 101., 202., 203.];
        assert_eq!(found[0], [first, second].concat());
        assert!(found[1].is_empty() && found[2].is_empty());
    }

    #[test]
    fn a_rank_that_fails_ends_the_collectives_of_all_until_the_group_is_mended() {
        let group = Group::new(3);
        for round in 0..3 {
            let found = on_all(&group, |member| {
                member.all_reduce(&mut [1.0])?;
                if member.rank().index == 1 {
                    group.fail(1, format!("no memory in round {round}"));
                    group.fail(1, "a second reason".into());
                    return Err(Failed { rank: 1, reason: "its own".into() });
                }
                member.all_reduce(&mut [1.0; 9])
            });
            let failed = Failed { rank: 1, reason: format!("no memory in round {round}") };
            assert_eq!((&found[0], &found[2]), (&Err(failed.clone()), &Err(failed.clone())));
            assert_eq!(group.members()[0].all_reduce(&mut [1.0]), Err(failed.clone()));
            assert_eq!(group.mend(), Some(failed));
            assert_eq!(group.mend(), None);
            let sums = on_all(&group, |member| {
                let mut x = [member.rank().index as f32];
                member.all_reduce(&mut x).map(|()| x)
            });
            assert!(sums.iter().all(|sum| *sum == Ok([3.0])));
        }
    }

    #[test]
    fn ranks_that_disagree_about_a_length_are_an_error_on_each() {
        let group = Group::new(2);
        let found = on_all(&group, |member| member.all_reduce(&mut vec![1.0; 1 + member.rank().index]));
        assert!(found.iter().all(Result::is_err), "{found:?}");
        let found = on_all(&group, |member| {
            let mut whole = [0.0; 5];
            let whole = (member.rank().index == 0).then_some(&mut whole[..]);
            member.gather(&[1.0; 2], 1, whole)
        });
        assert!(found[0].is_err() && found[1].is_ok());
    }
}
