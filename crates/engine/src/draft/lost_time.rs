//! When the draft model reads a sequence: once as much time was lost for want of its guesses as reading takes.
//!
//! How long guesses will be of use is not known: an answer may end, or become a copy. Whoever waits until what was lost
//! is what it costs pays no more than twice what would have been best in hindsight (ski rental, Karlin et al. 1988,
//! Algorithmica 3). So a draft model costs nothing on short answers and on those that are copied but for a token
//! here and there, and catches up with a copy only when it is wanted for longer again.

use std::collections::HashMap;

/// See the module. In seconds, by sequence.
#[derive(Debug, Default)]
pub(crate) struct LostTime {
    seconds: HashMap<u64, f32>,
}

impl LostTime {
    /// A step took so much longer than it would have with guesses for this sequence.
    pub(crate) fn add(&mut self, id: u64, seconds: f32) {
        *self.seconds.entry(id).or_default() += seconds.max(0.0);
    }

    /// Whether reading for so long is worth it now.
    pub(crate) fn is_worth(&self, id: u64, reading: f32) -> bool {
        self.seconds.get(&id).is_some_and(|&lost| lost >= reading)
    }

    /// The sequence was read, or has ended: what was lost counts no more.
    pub(crate) fn forget(&mut self, id: u64) {
        self.seconds.remove(&id);
    }

    /// Whether nothing is counted for anyone.
    pub(crate) fn is_empty(&self) -> bool {
        self.seconds.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Steps that lose a second each without guesses, of which these are wanted; what was lost and read in all.
    fn spent(wanted: usize, reading: f32) -> f32 {
        let mut lost = LostTime::default();
        let mut spent = 0.0;
        for step in 0..wanted {
            if lost.is_worth(7, reading) {
                return step as f32 + reading;
            }
            lost.add(7, 1.0);
            spent += 1.0;
        }
        spent
    }

    #[test]
    fn it_costs_at_most_twice_what_would_have_been_best() {
        for reading in [1.0f32, 3.0, 10.0] {
            for wanted in 1..40 {
                let best = reading.min(wanted as f32);
                assert!(spent(wanted, reading) <= 2.0 * best, "{wanted} steps, {reading} s");
            }
        }
        assert_eq!(spent(3, 10.0), 3.0, "a few places where a copy strays are not worth it");
        assert_eq!(spent(100, 10.0), 20.0);
    }

    #[test]
    fn each_sequence_counts_for_itself_and_anew_when_it_was_read() {
        let mut lost = LostTime::default();
        lost.add(1, 2.0);
        lost.add(1, -5.0);
        assert!(lost.is_worth(1, 2.0) && !lost.is_worth(1, 2.5) && !lost.is_worth(2, 0.0));
        lost.forget(1);
        assert!(!lost.is_worth(1, 0.1) && lost.is_empty());
    }
}
