//! How long pauses last: counts by length, the later ones weighing more.

use crate::Tick;

/// Lengths in powers of two milliseconds; the last bucket is open.
const BUCKETS: usize = 24;

/// See the module.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Pauses {
    counts: [f32; BUCKETS],
    total: f32,
}

impl Pauses {
    /// No pauses yet.
    pub fn new() -> Self {
        Self { counts: [0.0; BUCKETS], total: 0.0 }
    }

    /// As if `count` pauses of this length had been seen.
    pub fn assumed(pause: Tick, count: f32) -> Self {
        let mut pauses = Self::new();
        pauses.counts[bucket(pause)] = count;
        pauses.total = count;
        pauses
    }

    /// One more pause; `keep` of the weight of all before it is left.
    pub fn record(&mut self, pause: Tick, keep: f32) {
        self.counts.iter_mut().for_each(|count| *count *= keep);
        self.counts[bucket(pause)] += 1.0;
        self.total = self.total * keep + 1.0;
    }

    /// A time within which this share of pauses is over, 0 to 1. `others` count as so many pauses more.
    pub fn quantile(&self, share: f32, others: &Self, weight: f32) -> Tick {
        let scale = if others.total > 0.0 { weight / others.total } else { 0.0 };
        let mut left = (self.total + scale * others.total) * share;
        for (bucket, (own, other)) in self.counts.iter().zip(&others.counts).enumerate() {
            left -= own + scale * other;
            if left <= 0.0 {
                return end(bucket);
            }
        }
        end(BUCKETS - 1)
    }
}

fn bucket(pause: Tick) -> usize {
    (pause.max(1).ilog2() as usize).min(BUCKETS - 1)
}

/// What is longer than all in the bucket.
fn end(bucket: usize) -> Tick {
    2 << bucket
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_longer_than_its_share_of_pauses_and_not_twice_as_long() {
        let mut pauses = Pauses::new();
        (0..90).for_each(|_| pauses.record(1000, 1.0));
        (0..10).for_each(|_| pauses.record(60_000, 1.0));
        let none = Pauses::new();
        assert_eq!(pauses.quantile(0.5, &none, 1.0), 1024);
        assert_eq!(pauses.quantile(0.89, &none, 1.0), 1024);
        assert_eq!(pauses.quantile(0.95, &none, 1.0), 65_536);
    }

    #[test]
    fn what_was_learnt_before_is_outweighed_by_what_is_new() {
        let mut pauses = Pauses::new();
        (0..100).for_each(|_| pauses.record(1000, 0.9));
        (0..30).for_each(|_| pauses.record(60_000, 0.9));
        assert_eq!(pauses.quantile(0.5, &Pauses::new(), 1.0), 65_536);
    }

    #[test]
    fn others_count_while_there_are_few_of_its_own() {
        let others = Pauses::assumed(60_000, 10.0);
        let mut pauses = Pauses::new();
        assert_eq!(pauses.quantile(0.5, &others, 2.0), 65_536);
        (0..3).for_each(|_| pauses.record(500, 0.9));
        assert_eq!(pauses.quantile(0.5, &others, 2.0), 512);
    }

    #[test]
    fn no_length_is_too_long_or_too_short() {
        let mut pauses = Pauses::new();
        pauses.record(0, 0.9);
        assert_eq!(pauses.quantile(1.0, &Pauses::new(), 0.0), 2);
        pauses.record(Tick::MAX, 0.9);
        assert!(pauses.quantile(1.0, &Pauses::new(), 0.0) > 1 << 23);
    }
}
