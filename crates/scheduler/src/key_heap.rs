//! Binary min-heaps of small integers by key, in which each item can be found, moved and taken out. An item
//! is in at most one of them.
//!
//! Memory is taken at the start, but for what a heap holds.

/// See the module.
#[derive(Debug)]
pub(crate) struct KeyHeaps {
    heaps: Vec<Vec<u32>>,
    /// Which heap each item is in, and where in it; [`ABSENT`] if in none.
    places: Vec<(u32, u32)>,
    keys: Vec<u64>,
}

const ABSENT: (u32, u32) = (u32::MAX, u32::MAX);

impl KeyHeaps {
    /// Empty heaps for the items `0 .. items`.
    pub fn new(heaps: usize, items: usize) -> Self {
        Self { heaps: vec![Vec::new(); heaps], places: vec![ABSENT; items], keys: vec![0; items] }
    }

    /// Items in a heap.
    pub fn len(&self, heap: u32) -> usize {
        self.heaps[heap as usize].len()
    }

    /// The item of a heap with the least key.
    pub fn first(&self, heap: u32) -> Option<(u32, u64)> {
        self.heaps[heap as usize].first().map(|&item| (item, self.keys[item as usize]))
    }

    /// The heap that an item is in.
    pub fn heap_of(&self, item: u32) -> Option<u32> {
        let (heap, _) = self.places[item as usize];
        (heap != ABSENT.0).then_some(heap)
    }

    /// Puts an item in a heap, or gives it another key there, and takes it out of any other.
    pub fn set(&mut self, heap: u32, item: u32, key: u64) {
        if self.heap_of(item).is_some_and(|other| other != heap) {
            self.remove(item);
        }
        let mut place = self.places[item as usize];
        if place == ABSENT {
            let items = &mut self.heaps[heap as usize];
            place = (heap, items.len() as u32);
            items.push(item);
            self.places[item as usize] = place;
        } else if self.keys[item as usize] == key {
            return;
        }
        self.keys[item as usize] = key;
        self.settle(heap as usize, place.1 as usize);
    }

    /// Takes an item out of its heap, if it is in one.
    pub fn remove(&mut self, item: u32) {
        let (heap, place) = std::mem::replace(&mut self.places[item as usize], ABSENT);
        if (heap, place) == ABSENT {
            return;
        }
        let items = &mut self.heaps[heap as usize];
        items.swap_remove(place as usize);
        if let Some(&moved) = items.get(place as usize) {
            self.places[moved as usize] = (heap, place);
            self.settle(heap as usize, place as usize);
        }
    }

    fn key_at(&self, heap: usize, place: usize) -> u64 {
        self.keys[self.heaps[heap][place] as usize]
    }

    /// Moves the item at a place up or down until it stands right.
    fn settle(&mut self, heap: usize, mut place: usize) {
        while place > 0 && self.key_at(heap, place) < self.key_at(heap, (place - 1) / 2) {
            self.swap(heap, place, (place - 1) / 2);
            place = (place - 1) / 2;
        }
        loop {
            let children = 2 * place + 1..self.heaps[heap].len().min(2 * place + 3);
            let Some(least) = children.min_by_key(|&child| self.key_at(heap, child)) else { return };
            if self.key_at(heap, place) <= self.key_at(heap, least) {
                return;
            }
            self.swap(heap, place, least);
            place = least;
        }
    }

    fn swap(&mut self, heap: usize, a: usize, b: usize) {
        let items = &mut self.heaps[heap];
        items.swap(a, b);
        self.places[items[a] as usize].1 = a as u32;
        self.places[items[b] as usize].1 = b as u32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_first_is_always_the_least_of_its_heap(
            acts in prop::collection::vec((0u32..20, prop::option::of((0u32..3, 0u64..50))), 1..300),
        ) {
            let mut heaps = KeyHeaps::new(3, 20);
            let mut model = BTreeMap::new();
            for (item, place) in acts {
                match place {
                    Some((heap, key)) => {
                        heaps.set(heap, item, key);
                        model.insert(item, (heap, key));
                    }
                    None => {
                        heaps.remove(item);
                        model.remove(&item);
                    }
                }
                prop_assert_eq!(heaps.heap_of(item), place.map(|(heap, _)| heap));
                for heap in 0..3 {
                    let keys = || model.values().filter(|(of, _)| *of == heap).map(|(_, key)| *key);
                    let first = heaps.first(heap);
                    prop_assert_eq!(first.map(|(_, key)| key), keys().min());
                    prop_assert!(first.is_none_or(|(item, key)| model[&item] == (heap, key)));
                    prop_assert_eq!(heaps.len(heap), keys().count());
                }
            }
        }
    }
}
