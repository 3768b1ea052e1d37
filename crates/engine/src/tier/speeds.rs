//! Whether blocks come sooner from the disk or out of a prefill, by what both took lately.

use std::time::Duration;

/// Taken for granted before anything was measured: a slow solid-state disk, and a small model on a CPU.
const READ_BYTES_PER_SECOND: f64 = 500e6;
const PREFILL_TOKENS_PER_SECOND: f64 = 1000.0;
/// What a load takes beside reading: the way to the reading thread and back, between two steps.
const OVERHEAD: f64 = 0.0005;
/// See [`Speeds::weight`].
const WEIGHT: f64 = 0.25;
/// A measurement counts as at most so many times the mean: one that stalled tells little of the next.
const MOST_SLOWER: f64 = 4.0;
/// Steps with fewer prompt tokens say nothing about prefill.
const LEAST_TOKENS: usize = 64;
/// Every load that is not tried for the disk's sake makes the disk look so much faster, so that it is tried again.
const HOPE: f64 = 0.95;
/// Loads that save less than so many times their overhead say nothing about the disk.
const LEAST_SAVED: f64 = 2.0;
/// No load is given up before.
const LEAST_PATIENCE: Duration = Duration::from_millis(100);

/// See the module. All in seconds.
#[derive(Debug)]
pub(crate) struct Speeds {
    per_byte: f64,
    per_token: f64,
    /// A new measurement's, against all before it.
    weight: f64,
}

impl Default for Speeds {
    fn default() -> Self {
        let (per_byte, per_token) = (1.0 / READ_BYTES_PER_SECOND, 1.0 / PREFILL_TOKENS_PER_SECOND);
        Self { per_byte, per_token, weight: WEIGHT }
    }
}

impl Speeds {
    /// Of a prefill so slow that every load pays and a stalled thread makes none late, whatever is measured.
    pub fn patient() -> Self {
        Self { per_token: 1.0, weight: 0.0, ..Self::default() }
    }

    /// A step over so many tokens, most of them of prompts, took so long.
    pub fn computed(&mut self, tokens: usize, took: Duration) {
        if tokens >= LEAST_TOKENS {
            mix(&mut self.per_token, took.as_secs_f64() / tokens as f64, self.weight);
        }
    }

    /// Reading so many bytes took so long.
    pub fn read(&mut self, bytes: usize, took: Duration) {
        if bytes > 0 {
            mix(&mut self.per_byte, took.as_secs_f64() / bytes as f64, self.weight);
        }
    }

    /// Whether loading `bytes`, after `queued` others, takes less time than computing `tokens`.
    pub fn prefers_load(&mut self, bytes: usize, queued: usize, tokens: usize) -> bool {
        let prefill = tokens as f64 * self.per_token;
        let load = |bytes: usize| OVERHEAD + bytes as f64 * self.per_byte;
        let prefers = load(queued + bytes) < prefill;
        if load(bytes) >= prefill && prefill >= LEAST_SAVED * OVERHEAD {
            self.per_byte *= HOPE;
        }
        prefers
    }

    /// How long a load may take that saves computing `tokens`: as long as that would have taken. So a
    /// turn takes at most twice as long as without the disk.
    pub fn patience(&self, tokens: usize) -> Duration {
        // Years would overflow an instant, and nobody waits for an hour.
        let seconds = (tokens as f64 * self.per_token).min(3600.0);
        Duration::from_secs_f64(seconds).max(LEAST_PATIENCE)
    }
}

fn mix(mean: &mut f64, new: f64, weight: f64) {
    *mean += weight * (new.min(MOST_SLOWER * *mean) - *mean);
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: usize = 196_608;

    #[test]
    fn a_fast_disk_is_preferred_to_a_slow_prefill_and_a_fast_prefill_to_a_slow_disk() {
        let mut speeds = Speeds::default();
        assert!(speeds.prefers_load(250 * BLOCK, 0, 4000));
        for _ in 0..50 {
            speeds.computed(512, Duration::from_millis(1)); // as a large GPU would
        }
        assert!(!speeds.prefers_load(250 * BLOCK, 0, 4000));
        assert!(speeds.patience(4000) == LEAST_PATIENCE);
        for _ in 0..50 {
            speeds.computed(512, Duration::from_secs(1));
            speeds.read(BLOCK, Duration::from_secs(1)); // as a network folder might
        }
        assert!(!speeds.prefers_load(250 * BLOCK, 0, 4000));
        assert_eq!(speeds.patience(4000).as_secs(), 7);
    }

    #[test]
    fn a_long_queue_before_the_disk_speaks_for_prefill() {
        let mut speeds = Speeds::default();
        assert!(speeds.prefers_load(BLOCK, 0, 16));
        assert!(!speeds.prefers_load(BLOCK, 1000 * BLOCK, 16));
    }

    #[test]
    fn a_disk_that_was_slow_once_is_tried_again() {
        let mut speeds = Speeds::default();
        for _ in 0..50 {
            speeds.read(BLOCK, Duration::from_secs(2));
        }
        let refused = (0..1000).take_while(|_| !speeds.prefers_load(10 * BLOCK, 0, 160)).count();
        assert!((1..200).contains(&refused), "{refused}");
    }

    #[test]
    fn a_load_refused_for_its_queue_or_its_length_does_not_make_the_disk_look_faster() {
        let mut speeds = Speeds::default();
        let per_byte = speeds.per_byte;
        assert!((0..100).all(|_| !speeds.prefers_load(BLOCK, 1000 * BLOCK, 16)));
        for _ in 0..50 {
            speeds.computed(512, Duration::from_millis(1)); // as a large GPU would
        }
        assert!((0..100).all(|_| !speeds.prefers_load(16 * BLOCK, 0, 256)));
        assert_eq!(speeds.per_byte, per_byte);
    }

    #[test]
    fn one_stalled_read_does_not_make_the_disk_look_slow() {
        let mut speeds = Speeds::default();
        speeds.read(BLOCK, Duration::from_secs(10));
        assert!(speeds.prefers_load(10 * BLOCK, 0, 160));
    }

    #[test]
    fn small_steps_say_nothing_about_prefill() {
        let mut speeds = Speeds::default();
        speeds.computed(8, Duration::from_secs(1));
        assert_eq!(speeds.patience(1000).as_secs(), 1);
    }
}
