//! Who holds how much of what is cached, and so whose blocks go next: max-min fair by weight.
//!
//! Of each [`Class`] the owner that holds most for its weight loses a block first. So an owner that fills
//! the cache pushes out its own blocks once it has as much as any other, and whoever holds less than its
//! share loses none to it; what one does not hold the others have.

use std::collections::HashMap;

use crate::key_heap::KeyHeaps;

/// How likely a cached block is to be wanted again, the least likely first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Class {
    /// Of a session that has never come back, or of none.
    New,
    /// Of one that has come back before, and was expected sooner.
    Returned,
    /// Of one that is expected, or that is to stay.
    Kept,
    /// Of one that a turn waits for.
    Needed,
}

impl Class {
    pub const ALL: [Self; 4] = [Self::New, Self::Returned, Self::Kept, Self::Needed];
    const COUNT: usize = Self::ALL.len();
}

/// The index of the owner 0, whom also everything counts for that belongs to nobody.
pub(crate) const NOBODYS: u32 = 0;

/// See the module.
#[derive(Debug)]
pub(crate) struct Shares {
    owners: Vec<Owner>,
    by_key: HashMap<u64, u32>,
    vacant: Vec<u32>,
    /// By class: owners that have something to lose, who holds most for its weight first.
    losing: KeyHeaps,
    totals: [usize; Class::COUNT],
}

#[derive(Debug, Clone, Copy)]
struct Owner {
    key: u64,
    weight: u64,
    /// Members that are counted for it.
    members: usize,
    /// Blocks by class.
    blocks: [usize; Class::COUNT],
}

impl Shares {
    /// For at most so many owners besides the owner 0.
    pub fn new(most: usize) -> Self {
        let nobody = Owner { key: 0, weight: 1, members: 1, blocks: [0; Class::COUNT] };
        Self {
            owners: vec![nobody],
            by_key: HashMap::from([(0, NOBODYS)]),
            vacant: Vec::new(),
            losing: KeyHeaps::new(Class::COUNT, (most + 1) * Class::COUNT),
            totals: [0; Class::COUNT],
        }
    }

    /// One more member of an owner of this weight, at least 1, whose index is returned.
    pub fn join(&mut self, key: u64, weight: u32) -> u32 {
        let weight = u64::from(weight.max(1));
        let index = match self.by_key.get(&key) {
            Some(&index) => index,
            None => {
                let owner = Owner { key, weight, members: 0, blocks: [0; Class::COUNT] };
                let index = self.vacant.pop().unwrap_or(self.owners.len() as u32);
                match self.owners.get_mut(index as usize) {
                    Some(vacant) => *vacant = owner,
                    None => self.owners.push(owner),
                }
                self.by_key.insert(key, index);
                index
            }
        };
        let owner = &mut self.owners[index as usize];
        owner.weight = weight;
        owner.members += 1;
        index
    }

    /// One member less, which holds nothing any more.
    pub fn leave(&mut self, index: u32) {
        let owner = &mut self.owners[index as usize];
        owner.members -= 1;
        if owner.members == 0 {
            debug_assert_eq!(owner.blocks, [0; Class::COUNT]);
            self.by_key.remove(&owner.key);
            self.vacant.push(index);
        }
    }

    /// An owner holds so many blocks more, or less.
    pub fn count(&mut self, index: u32, class: Class, change: isize) {
        let held = &mut self.owners[index as usize].blocks[class as usize];
        *held = held.strict_add_signed(change);
        let total = &mut self.totals[class as usize];
        *total = total.strict_add_signed(change);
        if self.losing.heap_of(item(index, class)).is_some() {
            self.set_losing(index, class, true);
        }
    }

    /// Blocks of a class, whosever.
    pub fn total(&self, class: Class) -> usize {
        self.totals[class as usize]
    }

    /// Whether an owner has a block of this class that can go.
    pub fn set_losing(&mut self, index: u32, class: Class, losing: bool) {
        let owner = &self.owners[index as usize];
        match losing {
            true => {
                // In fixed point; the greatest first.
                let share = ((owner.blocks[class as usize] as u64) << 20) / owner.weight;
                self.losing.set(class as u32, item(index, class), u64::MAX - share);
            }
            false => self.losing.remove(item(index, class)),
        }
    }

    /// Who loses the next block of a class, if there is one to lose.
    pub fn loser(&self, class: Class) -> Option<u32> {
        self.losing.first(class as u32).map(|(item, _)| item / Class::COUNT as u32)
    }
}

/// An owner's place among those that may lose blocks of a class.
fn item(owner: u32, class: Class) -> u32 {
    owner * Class::COUNT as u32 + class as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_holds_most_for_its_weight_loses_first() {
        let mut shares = Shares::new(3);
        let [light, heavy] = [shares.join(7, 1), shares.join(9, 3)];
        shares.count(light, Class::New, 10);
        shares.count(heavy, Class::New, 20);
        assert_eq!(shares.loser(Class::New), None, "nothing of theirs can go");
        [light, heavy].into_iter().for_each(|owner| shares.set_losing(owner, Class::New, true));
        assert_eq!((shares.loser(Class::New), shares.loser(Class::Kept)), (Some(light), None));
        shares.count(heavy, Class::New, 11);
        assert_eq!((shares.loser(Class::New), shares.total(Class::New)), (Some(heavy), 41));
        shares.set_losing(heavy, Class::New, false);
        assert_eq!(shares.loser(Class::New), Some(light));
    }

    #[test]
    fn an_owner_without_members_is_forgotten_and_its_place_used_again() {
        let mut shares = Shares::new(2);
        let first = shares.join(7, 1);
        assert_eq!(shares.join(7, 1), first);
        shares.leave(first);
        assert_eq!(shares.join(8, 1), first + 1, "one is left");
        shares.leave(first);
        assert_eq!(shares.join(9, 1), first);
        assert_eq!(shares.join(0, 1), NOBODYS);
        shares.leave(NOBODYS);
        assert_eq!(shares.by_key.len(), 3);
    }
}
