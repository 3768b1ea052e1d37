//! Which cached block goes next when blocks run out: the one least likely to be wanted again.
//!
//! Only leaves of the prefix tree can go, as a block is worth nothing without those before it. Every
//! unheld leaf waits in a session's list, in order of use; blocks without a session share one list. A
//! block belongs to the session that used it, of several to the one that was protected the longest then.
//! A session is *protected* until a tick that the engine chooses, and has *returned* if it paused and went
//! on before. Prompts that nobody comes back to are the most of what fills a cache, so first go
//!
//! - the leaves of sessions that are not protected and have not returned, and of none,
//! - then of those that have returned,
//! - then of protected ones: those of the least rank first, from [`NEEDED`] on last.
//!
//! The protected go first, however, while they hold more than [`PROTECTED_SHARE`] of the pool, and those that
//! returned go before those that did not, while together with the protected they hold more: as in a segmented
//! LRU (Karedla, Love and Wherry, 1994), the rest is for newcomers. Among those that stand alike, the owner
//! that holds most for its weight loses first (`shares`), of its unprotected leaves the least recently used.
//!
//! So protection decides who goes first and never whether somebody goes. What is protected keeps the
//! prefix that it needs, whoever that belongs to: a block goes after all that continue it.
//!
//! A choice costs O(log sessions), all else O(log owners) a path and stretch of it that is one session's, besides
//! a few nanoseconds a block; nothing is allocated in the long run but the path that a session is remembered by. Order of use is exact for all but a prefix whose last
//! continuation was evicted before its time: it counts as just used.

use crate::BlockId;
use crate::block_pool::first_blocks;
use crate::key_heap::KeyHeaps;
use crate::shares::{Class, NOBODYS, Shares};

/// Time in the engine's unit; it only grows.
pub type Tick = u64;

/// Most sessions known at once.
pub const MAX_SESSIONS: usize = 1024;
/// Of the pool, how much may be cached for protected sessions before they lose blocks to others.
pub const PROTECTED_SHARE: f64 = 0.75;
/// Protected sessions of this rank and above lose blocks only after all others.
pub(crate) const NEEDED: u64 = u64::MAX - 1;

/// Names a session. A handle of one that was closed names none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SessionHandle {
    slot: u32,
    epoch: u32,
}

impl SessionHandle {
    /// Tells it from all others that are open.
    pub(crate) fn slot(self) -> u32 {
        self.slot
    }
}

/// The slot of blocks that belong to no session.
const NOBODY: SessionHandle = SessionHandle { slot: MAX_SESSIONS as u32, epoch: 0 };

/// What has been evicted so far, and what is protected now; in blocks but for the first two.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RetentionStats {
    /// Sessions open.
    pub sessions: usize,
    /// Of these, protected.
    pub protected_sessions: usize,
    /// Cached for protected sessions.
    pub protected: usize,
    /// Evicted although protected.
    pub evicted_protected: u64,
    /// Evicted besides.
    pub evicted_unprotected: u64,
}

/// What is kept of a session, in blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SessionBlocks {
    /// Of the path it is remembered by.
    pub path: usize,
    /// Of these, still there.
    pub cached: usize,
    /// Cached blocks that belong to it, over all its paths.
    pub own: usize,
    /// Whether they are protected.
    pub protected: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Retention {
    blocks: Vec<Block>,
    lists: LeafLists,
    slots: Vec<Slot>,
    /// Slots not in use.
    vacant: Vec<u32>,
    /// Slots with leaves, by owner and class: protected ones by rank, others by the use of their oldest leaf.
    leaves: KeyHeaps,
    shares: Shares,
    /// Protected slots, by the end of their protection.
    expiring: KeyHeaps,
    /// Counts releases of sequences.
    uses: u64,
    /// Unheld blocks in the tree, in all slots.
    cached: usize,
    stats: RetentionStats,
    /// Most protected blocks.
    limit: usize,
}

/// What is known of a block.
#[derive(Debug, Clone, Copy)]
struct Block {
    /// Whose it is.
    session: SessionHandle,
    /// When it was let go of last.
    used: u64,
    /// How often it has held something else.
    generation: u32,
    /// Another session has used it too.
    shared: bool,
}

#[derive(Debug, Default)]
struct Slot {
    epoch: u32,
    /// Whose it is; an index of [`Shares`].
    owner: u32,
    /// Protected before this tick; 0 is not.
    until: Tick,
    rank: u64,
    /// Whether it has gone on after a pause.
    returned: bool,
    /// Its unheld blocks.
    blocks: usize,
    /// The path it is remembered by, each block with its generation.
    path: Vec<(BlockId, u32)>,
    /// Where the prompt of a shorter path ended that it has taken since: the block's place on it, the block, its generation.
    aside: Option<(usize, BlockId, u32)>,
}

impl Retention {
    pub fn new(blocks: usize) -> Self {
        let fresh = Block { session: NOBODY, used: 0, generation: 0, shared: false };
        Self {
            blocks: vec![fresh; blocks],
            lists: LeafLists::new(blocks, MAX_SESSIONS + 1),
            slots: (0..=MAX_SESSIONS).map(|_| Slot::default()).collect(),
            vacant: (0..MAX_SESSIONS as u32).rev().collect(),
            leaves: KeyHeaps::new(heap_of(MAX_SESSIONS as u32 + 1, Class::New) as usize, MAX_SESSIONS + 1),
            shares: Shares::new(MAX_SESSIONS),
            expiring: KeyHeaps::new(1, MAX_SESSIONS + 1),
            uses: 0,
            cached: 0,
            stats: RetentionStats::default(),
            limit: (blocks as f64 * PROTECTED_SHARE) as usize,
        }
    }

    /// Unheld blocks in the tree: all can be evicted, if their turn comes.
    pub fn cached(&self) -> usize {
        self.cached
    }

    pub fn stats(&self) -> RetentionStats {
        let sessions = MAX_SESSIONS - self.vacant.len();
        let protected_sessions = self.expiring.len(0);
        RetentionStats { sessions, protected_sessions, protected: self.protected(), ..self.stats }
    }

    /// Cached for protected sessions.
    fn protected(&self) -> usize {
        self.shares.total(Class::Kept) + self.shares.total(Class::Needed)
    }

    /// A new session, nobody's; none if there are [`MAX_SESSIONS`].
    pub fn open(&mut self) -> Option<SessionHandle> {
        let slot = self.vacant.pop()?;
        Some(SessionHandle { slot, epoch: self.slots[slot as usize].epoch })
    }

    /// Forgets a session. Its blocks are nobody's then.
    pub fn close(&mut self, session: SessionHandle) {
        let Some(slot) = self.slot_of(session) else { return };
        self.expiring.remove(slot);
        self.give_leaves_to_nobody(slot);
        let blocks = self.slots[slot as usize].blocks as isize;
        self.tally(slot, -blocks);
        let closed = std::mem::take(&mut self.slots[slot as usize]);
        self.slots[slot as usize].epoch = closed.epoch.wrapping_add(1);
        self.tally(NOBODY.slot, blocks);
        self.file(slot);
        self.file(NOBODY.slot);
        if closed.owner != NOBODYS {
            self.shares.leave(closed.owner);
        }
        self.vacant.push(slot);
    }

    /// The leaves go to that end of nobody's list where their order is kept best.
    fn give_leaves_to_nobody(&mut self, slot: u32) {
        let used = |leaf: BlockId| self.blocks[leaf as usize].used;
        let last = self.lists.newest(NOBODY.slot).map(used);
        let append = self.lists.oldest(slot).is_some_and(|leaf| last.is_none_or(|last| last <= used(leaf)));
        while let Some(leaf) = if append { self.lists.oldest(slot) } else { self.lists.newest(slot) } {
            self.lists.unlink(leaf);
            match append {
                true => self.lists.push_newest(NOBODY.slot, leaf),
                false => self.lists.push_oldest(NOBODY.slot, leaf),
            }
        }
    }

    /// A session works for this owner.
    pub fn own(&mut self, session: SessionHandle, owner: u64, weight: u32) {
        let Some(slot) = self.slot_of(session).filter(|&slot| self.slots[slot as usize].owner == NOBODYS)
        else {
            return;
        };
        if owner != 0 {
            let owner = self.shares.join(owner, weight);
            self.change(slot, |entry| entry.owner = owner);
        }
    }

    /// A session goes on after a pause.
    pub fn returned(&mut self, session: SessionHandle) {
        if let Some(slot) = self.slot_of(session) {
            self.change(slot, |entry| entry.returned = true);
        }
    }

    /// Protects a session's blocks before `until`; 0 ends it. Of the protected, the least rank goes first.
    pub fn protect(&mut self, session: SessionHandle, until: Tick, rank: u64) {
        let Some(slot) = self.slot_of(session) else { return };
        self.change(slot, |entry| (entry.until, entry.rank) = (until, rank));
        match until {
            0 => self.expiring.remove(slot),
            _ => self.expiring.set(0, slot, until),
        }
    }

    /// Changes where a slot stands, and its blocks with it.
    fn change(&mut self, slot: u32, change: impl FnOnce(&mut Slot)) {
        let blocks = self.slots[slot as usize].blocks as isize;
        self.tally(slot, -blocks);
        change(&mut self.slots[slot as usize]);
        self.tally(slot, blocks);
        self.file(slot);
    }

    /// It is `now`: ends the protection of sessions whose time is over.
    pub fn advance(&mut self, now: Tick) {
        while let Some((slot, _)) = self.expiring.first(0).filter(|&(_, until)| until <= now) {
            let epoch = self.slots[slot as usize].epoch;
            self.protect(SessionHandle { slot, epoch }, 0, 0);
        }
    }

    /// What is kept of a session.
    pub fn session(&self, session: SessionHandle) -> Option<SessionBlocks> {
        let slot = &self.slots[self.slot_of(session)? as usize];
        Some(SessionBlocks {
            path: slot.path.len(),
            cached: self.left_of(&slot.path),
            own: slot.blocks,
            protected: slot.until > 0,
        })
    }

    /// Whose a block is.
    pub fn session_of(&self, block: BlockId) -> Option<SessionHandle> {
        let session = self.blocks[block as usize].session;
        self.slot_of(session).map(|_| session)
    }

    /// Whether what is remembered of a session begins with these blocks, as far as they go.
    pub fn begins_with(&self, session: SessionHandle, blocks: &[BlockId]) -> bool {
        // One block says it of all before it: it has been only there since it was filled.
        let (Some(slot), Some((at, &block))) = (self.slot_of(session), blocks.iter().enumerate().next_back())
        else {
            return false;
        };
        self.slots[slot as usize].path.get(at) == Some(&(block, self.generation(block)))
    }

    /// Whether a session is remembered by this path, whose first `prompt` blocks are a prompt's, once it is done with: if
    /// it is no shorter than what is left of the last one, or goes on from the shorter one that came last. A title or
    /// a subagent's question leaves a session what it was; what was compacted and goes on is what it is from then on.
    pub fn prefers(&self, session: SessionHandle, path: &[BlockId], prompt: usize) -> bool {
        let Some(slot) = self.slot_of(session).map(|slot| &self.slots[slot as usize]) else { return false };
        let goes_on = |(at, block, generation)| {
            at + 1 < prompt && path.get(at) == Some(&block) && self.generation(block) == generation
        };
        self.left_of(&slot.path) <= path.len() || slot.aside.is_some_and(goes_on)
    }

    /// A session's sequence is done with its path, whose first `prompt` blocks are its prompt's. See [`Self::prefers`].
    pub fn remember(&mut self, session: SessionHandle, path: &[BlockId], prompt: usize) {
        let Some(kept) = self.session(session) else { return };
        if !self.prefers(session, path, prompt) {
            let last = prompt.checked_sub(1).and_then(|at| Some((at, *path.get(at)?)));
            let aside = last.map(|(at, block)| (at, block, self.generation(block)));
            self.slots[session.slot as usize].aside = aside;
            return;
        }
        let slot = &mut self.slots[session.slot as usize];
        slot.aside = None;
        // What both have in common need not be written again.
        slot.path.truncate(common_blocks(&slot.path[..kept.cached], path));
        let new = path[slot.path.len()..].iter();
        slot.path.extend(new.map(|&block| (block, self.blocks[block as usize].generation)));
    }

    /// What follows `block`, the last of a path of `len` blocks in the tree, on the path that the block's session is
    /// remembered by, as far as that is still there.
    pub fn remembered_after(&self, block: BlockId, len: usize) -> &[(BlockId, u32)] {
        let path = &self.slots[self.slot_of_block(block) as usize].path;
        match path.get(len - 1) {
            Some(&found) if found == (block, self.generation(block)) => &path[len..self.left_of(path)],
            _ => &[],
        }
    }

    /// How many blocks of a path, once in the tree, are still there: tails go before prefixes.
    fn left_of(&self, path: &[(BlockId, u32)]) -> usize {
        path.partition_point(|&(block, generation)| self.generation(block) == generation)
    }

    /// How often a block has held something else.
    pub fn generation(&self, block: BlockId) -> u32 {
        self.blocks[block as usize].generation
    }

    /// The releases that follow, up to the next call, are one use.
    pub fn begin_use(&mut self) {
        self.uses += 1;
    }

    /// Nobody holds these blocks any more, the end of a path in the tree; a sequence of this session was the last.
    /// `is_leaf` says whether the path's last block is one.
    pub fn add_path(&mut self, path: &[BlockId], is_leaf: bool, session: Option<SessionHandle>) {
        for &block in path {
            self.blocks[block as usize].used = self.uses;
            if let Some(session) = session {
                self.assign(block, session);
            }
        }
        self.count(path, 1);
        if let Some(&leaf) = path.last().filter(|_| is_leaf) {
            let slot = self.slot_of_block(leaf);
            self.lists.push_newest(slot, leaf);
            self.file(slot);
        }
    }

    /// A block that a session has used becomes its own, unless it is another's that is protected as long.
    fn assign(&mut self, block: BlockId, session: SessionHandle) {
        let before = self.blocks[block as usize].session;
        let Some(slot) = self.slot_of(session).filter(|_| session != before) else { return };
        let other = self.slot_of(before);
        let until = |slot: u32| self.slots[slot as usize].until;
        let takes = other.is_none_or(|other| until(other) < until(slot));
        let entry = &mut self.blocks[block as usize];
        entry.shared |= other.is_some();
        if takes {
            entry.session = session;
        }
    }

    /// These blocks, the end of a path in the tree, are held again; or its last leaves the tree. Only that one can be a
    /// leaf.
    pub fn take_path(&mut self, path: &[BlockId]) {
        self.count(path, -1);
        if let Some(&last) = path.last()
            && self.lists.unlink(last)
        {
            self.file(self.slot_of_block(last));
        }
    }

    /// The last block after an unheld one has left the tree.
    pub fn becomes_leaf(&mut self, block: BlockId, after: BlockId) {
        let slot = self.slot_of_block(block);
        // Let go of together with what came after it, it is now the oldest; else it was used since.
        match self.blocks[block as usize].used == self.blocks[after as usize].used {
            true => self.lists.push_oldest(slot, block),
            false => self.lists.push_newest(slot, block),
        }
        self.file(slot);
    }

    /// A block has left the tree.
    pub fn forget(&mut self, block: BlockId) {
        let Block { used, generation, .. } = self.blocks[block as usize];
        let generation = generation.wrapping_add(1);
        self.blocks[block as usize] = Block { session: NOBODY, used, generation, shared: false };
    }

    /// The leaf to evict now.
    pub fn choose(&mut self) -> Option<BlockId> {
        use Class::{Kept, Needed, New, Returned};
        let protected = self.protected();
        let order = match protected + self.shares.total(Returned) > self.limit {
            _ if protected > self.limit => [Kept, Needed, New, Returned],
            true => [Returned, New, Kept, Needed],
            false => [New, Returned, Kept, Needed],
        };
        let (class, owner) = order.into_iter().find_map(|class| Some((class, self.shares.loser(class)?)))?;
        let (slot, _) = self.leaves.first(heap_of(owner, class))?;
        match class {
            New | Returned => self.stats.evicted_unprotected += 1,
            Kept | Needed => self.stats.evicted_protected += 1,
        }
        self.lists.oldest(slot)
    }

    /// A leaf that this session alone has used. Others become nobody's.
    pub fn next_exclusive(&mut self, session: SessionHandle) -> Option<BlockId> {
        let slot = self.slot_of(session)?;
        while let Some(leaf) = self.lists.oldest(slot) {
            if !self.blocks[leaf as usize].shared {
                return Some(leaf);
            }
            self.take_path(&[leaf]);
            self.blocks[leaf as usize].session = NOBODY;
            self.add_path(&[leaf], true, None);
        }
        None
    }

    fn slot_of(&self, session: SessionHandle) -> Option<u32> {
        let is_open = session != NOBODY && self.slots[session.slot as usize].epoch == session.epoch;
        is_open.then_some(session.slot)
    }

    fn slot_of_block(&self, block: BlockId) -> u32 {
        self.slot_of(self.blocks[block as usize].session).unwrap_or(NOBODY.slot)
    }

    /// Counts unheld blocks of a path in or out of their slots: at once as far as they are one session's.
    fn count(&mut self, mut path: &[BlockId], sign: isize) {
        self.cached = self.cached.strict_add_signed(sign * path.len() as isize);
        while let Some(&first) = path.first() {
            let session = self.blocks[first as usize].session;
            let its =
                path.iter().take_while(|&&block| self.blocks[block as usize].session == session).count();
            self.tally(self.slot_of_block(first), sign * its as isize);
            path = &path[its..];
        }
    }

    /// A slot has so many unheld blocks more, or less.
    fn tally(&mut self, slot: u32, change: isize) {
        let entry = &mut self.slots[slot as usize];
        entry.blocks = entry.blocks.strict_add_signed(change);
        self.shares.count(entry.owner, entry.class(), change);
    }

    /// Counts anew what is counted along the way. `is_unheld` and `is_leaf` are asked of every block: whether it is in the
    /// tree and nobody's, and whether nothing comes after it there.
    #[cfg(test)]
    pub fn check(&self, is_unheld: impl Fn(BlockId) -> bool, is_leaf: impl Fn(BlockId) -> bool) {
        let mut counts = vec![0; self.slots.len()];
        for block in 0..self.blocks.len() as BlockId {
            counts[self.slot_of_block(block) as usize] += usize::from(is_unheld(block));
            let listed = self.lists.links[block as usize] != UNLINKED;
            assert_eq!(listed, is_unheld(block) && is_leaf(block), "block {block} waits to be evicted");
        }
        assert_eq!(self.cached, counts.iter().sum());
        assert_eq!(self.slots.iter().map(|slot| slot.blocks).collect::<Vec<_>>(), counts);
        for class in Class::ALL {
            let of_class = self.slots.iter().filter(|slot| slot.class() == class);
            assert_eq!(self.shares.total(class), of_class.map(|slot| slot.blocks).sum());
        }
    }

    /// Puts a slot where it belongs after a change.
    fn file(&mut self, slot: u32) {
        let before = self.leaves.heap_of(slot);
        let entry = &self.slots[slot as usize];
        let now = heap_of(entry.owner, entry.class());
        match self.lists.oldest(slot) {
            None => self.leaves.remove(slot),
            Some(_) if entry.until > 0 => self.leaves.set(now, slot, entry.rank),
            Some(oldest) => self.leaves.set(now, slot, self.blocks[oldest as usize].used),
        }
        for heap in before.filter(|&before| before != now).into_iter().chain([now]) {
            let (owner, class) = owner_of(heap);
            self.shares.set_losing(owner, class, self.leaves.len(heap) > 0);
        }
    }
}

impl Slot {
    fn class(&self) -> Class {
        match self.until {
            0 if self.returned => Class::Returned,
            0 => Class::New,
            _ if self.rank >= NEEDED => Class::Needed,
            _ => Class::Kept,
        }
    }
}

/// How many blocks two paths in the tree have in common. Where they have the same block, they have all before it.
fn common_blocks(one: &[(BlockId, u32)], other: &[BlockId]) -> usize {
    first_blocks(one.len().min(other.len()), |at| one[at].0 == other[at])
}

/// Where an owner's slots of a class wait, in [`Retention::leaves`].
fn heap_of(owner: u32, class: Class) -> u32 {
    owner * Class::ALL.len() as u32 + class as u32
}

/// The reverse of [`heap_of`].
fn owner_of(heap: u32) -> (u32, Class) {
    let classes = Class::ALL.len() as u32;
    (heap / classes, Class::ALL[(heap % classes) as usize])
}

/// Doubly linked lists threaded through the blocks, one for each slot: O(1) at both ends and in the middle.
#[derive(Debug)]
struct LeafLists {
    /// (older, newer) of each block; after the blocks come the lists' sentinels.
    links: Vec<(u32, u32)>,
    blocks: u32,
}

const UNLINKED: (u32, u32) = (u32::MAX, u32::MAX);

impl LeafLists {
    fn new(blocks: usize, lists: usize) -> Self {
        let sentinels = (blocks..blocks + lists).map(|sentinel| (sentinel as u32, sentinel as u32));
        Self {
            links: std::iter::repeat_n(UNLINKED, blocks).chain(sentinels).collect(),
            blocks: blocks as u32,
        }
    }

    fn oldest(&self, slot: u32) -> Option<BlockId> {
        let block = self.links[(self.blocks + slot) as usize].1;
        (block < self.blocks).then_some(block)
    }

    fn newest(&self, slot: u32) -> Option<BlockId> {
        let block = self.links[(self.blocks + slot) as usize].0;
        (block < self.blocks).then_some(block)
    }

    fn push_newest(&mut self, slot: u32, block: BlockId) {
        let sentinel = self.blocks + slot;
        self.insert(self.links[sentinel as usize].0, block, sentinel);
    }

    fn push_oldest(&mut self, slot: u32, block: BlockId) {
        let sentinel = self.blocks + slot;
        self.insert(sentinel, block, self.links[sentinel as usize].1);
    }

    fn insert(&mut self, older: u32, block: BlockId, newer: u32) {
        self.links[block as usize] = (older, newer);
        self.links[older as usize].1 = block;
        self.links[newer as usize].0 = block;
    }

    /// Takes a block out; returns whether it was in a list.
    fn unlink(&mut self, block: BlockId) -> bool {
        let (older, newer) = std::mem::replace(&mut self.links[block as usize], UNLINKED);
        let linked = (older, newer) != UNLINKED;
        if linked {
            self.links[older as usize].1 = newer;
            self.links[newer as usize].0 = older;
        }
        linked
    }
}
