//! Who may queue: a bounded number, of which one owner's flood keeps no other out.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

type Owner = Option<Arc<str>>;

/// Places for requests that run and wait. When all are taken, an owner that holds less than an even
/// share of them still gets one.
pub(crate) struct Places {
    most: usize,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    total: usize,
    owners: HashMap<Owner, usize>,
}

impl Places {
    pub(crate) fn new(most: usize) -> Self {
        Self { most, taken: Mutex::default() }
    }

    /// Takes a place for a request of `owner`; false where there is none.
    pub(crate) fn take(&self, owner: &Owner) -> bool {
        let mut taken = self.lock();
        let own = taken.owners.get(owner).copied().unwrap_or(0);
        let owners = taken.owners.len() + usize::from(own == 0);
        if taken.total >= self.most && own >= self.most / owners {
            return false;
        }
        taken.total += 1;
        taken.owners.insert(owner.clone(), own + 1);
        true
    }

    /// Gives a place back that was taken for a request of `owner`.
    pub(crate) fn give_back(&self, owner: &Owner) {
        let mut taken = self.lock();
        let Some(own) = taken.owners.get_mut(owner) else { return };
        *own -= 1;
        if *own == 0 {
            taken.owners.remove(owner);
        }
        taken.total -= 1;
    }

    /// Places taken.
    pub(crate) fn taken(&self) -> usize {
        self.lock().total
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(name: &str) -> Owner {
        Some(name.into())
    }

    #[test]
    fn all_places_are_one_owners_while_nobody_else_wants_them() {
        let places = Places::new(3);
        assert_eq!([0; 4].map(|_| places.take(&None)), [true, true, true, false]);
        places.give_back(&None);
        assert!(places.take(&None));
        assert_eq!(places.taken(), 3);
    }

    #[test]
    fn a_flood_keeps_no_other_owner_out_and_nobody_gets_more_than_a_share_over_the_limit() {
        let places = Places::new(8);
        while places.take(&owner("flood")) {}
        let modest = [0; 5].map(|_| places.take(&owner("modest")));
        assert_eq!(modest, [true, true, true, true, false]);
        assert!(places.take(&owner("third")) && !places.take(&owner("flood")));
    }

    #[test]
    fn nothing_is_kept_of_owners_that_are_gone() {
        let places = Places::new(2);
        for name in ["a", "b", "a"] {
            assert!(places.take(&owner(name)));
            places.give_back(&owner(name));
            places.give_back(&owner(name)); // harmless
        }
        assert_eq!(places.taken(), 0);
        assert!(places.lock().owners.is_empty());
    }
}
