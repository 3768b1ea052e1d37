//! Who may queue: a bounded number, of which one owner's flood keeps no other out.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

type Owner = Option<Arc<str>>;

/// Places for requests that run and wait. When all are taken, an owner that holds less than its share
/// of them, by weight, still gets one.
pub struct Places {
    most: usize,
    taken: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    total: usize,
    owners: HashMap<Owner, Own>,
}

/// What an owner has.
#[derive(Clone, Copy)]
struct Own {
    places: usize,
    weight: usize,
}

impl Places {
    /// So many places.
    pub fn new(most: usize) -> Self {
        Self { most, taken: Mutex::default() }
    }

    /// Takes a place for a request of `owner`, which has this weight; false where there is none.
    pub fn take(&self, owner: &Owner, weight: u32) -> bool {
        let weight = weight.max(1) as usize;
        let mut taken = self.lock();
        let own = taken.owners.get(owner).copied().unwrap_or(Own { places: 0, weight });
        if taken.total >= self.most {
            let known: usize = taken.owners.values().map(|own| own.weight).sum();
            let all = known + if own.places == 0 { weight } else { 0 };
            if own.places >= self.most * own.weight / all {
                return false;
            }
        }
        taken.total += 1;
        taken.owners.insert(owner.clone(), Own { places: own.places + 1, ..own });
        true
    }

    /// Gives a place back that was taken for a request of `owner`.
    pub fn give_back(&self, owner: &Owner) {
        let mut taken = self.lock();
        let Some(own) = taken.owners.get_mut(owner) else { return };
        own.places -= 1;
        if own.places == 0 {
            taken.owners.remove(owner);
        }
        taken.total -= 1;
    }

    /// Places taken.
    pub fn taken(&self) -> usize {
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
        assert_eq!([0; 4].map(|_| places.take(&None, 1)), [true, true, true, false]);
        places.give_back(&None);
        assert!(places.take(&None, 1));
        assert_eq!(places.taken(), 3);
    }

    #[test]
    fn a_flood_keeps_no_other_owner_out_and_nobody_gets_more_than_a_share_over_the_limit() {
        let places = Places::new(8);
        while places.take(&owner("flood"), 1) {}
        let modest = [0; 5].map(|_| places.take(&owner("modest"), 1));
        assert_eq!(modest, [true, true, true, true, false]);
        assert!(places.take(&owner("third"), 1) && !places.take(&owner("flood"), 1));
    }

    #[test]
    fn of_a_full_queue_each_owner_gets_its_share_by_weight() {
        let places = Places::new(8);
        while places.take(&owner("flood"), 1) {}
        let heavy = [0; 7].map(|_| places.take(&owner("heavy"), 3));
        assert_eq!(heavy, [true, true, true, true, true, true, false]); // three quarters of 8
        let zero = [0; 3].map(|_| places.take(&owner("zero"), 0));
        assert_eq!(zero, [true, false, false]); // a fifth of 8
    }

    #[test]
    fn nothing_is_kept_of_owners_that_are_gone() {
        let places = Places::new(2);
        for name in ["a", "b", "a"] {
            assert!(places.take(&owner(name), 1));
            places.give_back(&owner(name));
            places.give_back(&owner(name)); // harmless
        }
        assert_eq!(places.taken(), 0);
        assert!(places.lock().owners.is_empty());
    }
}
