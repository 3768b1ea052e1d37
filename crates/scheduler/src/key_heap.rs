//! A binary min-heap of small integers by key, in which each can be found, moved and taken out.
//!
//! All memory is taken at the start.

/// See the module.
#[derive(Debug)]
pub(crate) struct KeyHeap {
    heap: Vec<u32>,
    /// Where each item is in `heap`; [`ABSENT`] if nowhere.
    places: Vec<u32>,
    keys: Vec<u64>,
}

const ABSENT: u32 = u32::MAX;

impl KeyHeap {
    /// An empty heap for the items `0 .. items`.
    pub fn new(items: usize) -> Self {
        Self { heap: Vec::with_capacity(items), places: vec![ABSENT; items], keys: vec![0; items] }
    }

    /// Items in it.
    pub fn len(&self) -> usize {
        self.heap.len()
    }

    /// The item with the least key.
    pub fn first(&self) -> Option<(u32, u64)> {
        self.heap.first().map(|&item| (item, self.keys[item as usize]))
    }

    /// Puts an item in, or gives it another key.
    pub fn set(&mut self, item: u32, key: u64) {
        let mut place = self.places[item as usize];
        if place == ABSENT {
            place = self.heap.len() as u32;
            self.heap.push(item);
            self.places[item as usize] = place;
        } else if self.keys[item as usize] == key {
            return;
        }
        self.keys[item as usize] = key;
        self.settle(place as usize);
    }

    /// Takes an item out, if it is in.
    pub fn remove(&mut self, item: u32) {
        let place = std::mem::replace(&mut self.places[item as usize], ABSENT);
        if place == ABSENT {
            return;
        }
        self.heap.swap_remove(place as usize);
        if let Some(&moved) = self.heap.get(place as usize) {
            self.places[moved as usize] = place;
            self.settle(place as usize);
        }
    }

    fn key_at(&self, place: usize) -> u64 {
        self.keys[self.heap[place] as usize]
    }

    /// Moves the item at a place up or down until it stands right.
    fn settle(&mut self, mut place: usize) {
        while place > 0 && self.key_at(place) < self.key_at((place - 1) / 2) {
            self.swap(place, (place - 1) / 2);
            place = (place - 1) / 2;
        }
        loop {
            let children = 2 * place + 1..self.heap.len().min(2 * place + 3);
            let Some(least) = children.min_by_key(|&child| self.key_at(child)) else { return };
            if self.key_at(place) <= self.key_at(least) {
                return;
            }
            self.swap(place, least);
            place = least;
        }
    }

    fn swap(&mut self, a: usize, b: usize) {
        self.heap.swap(a, b);
        self.places[self.heap[a] as usize] = a as u32;
        self.places[self.heap[b] as usize] = b as u32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_first_is_always_the_least(acts in prop::collection::vec((0u32..20, prop::option::of(0u64..50)), 1..300)) {
            let mut heap = KeyHeap::new(20);
            let mut model = BTreeMap::new();
            for (item, key) in acts {
                match key {
                    Some(key) => {
                        heap.set(item, key);
                        model.insert(item, key);
                    }
                    None => {
                        heap.remove(item);
                        model.remove(&item);
                    }
                }
                let first = heap.first();
                prop_assert_eq!(first.map(|(_, key)| key), model.values().min().copied());
                prop_assert!(first.is_none_or(|(item, key)| model[&item] == key));
            }
        }
    }
}
