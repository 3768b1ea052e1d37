//! Stops asking a disk that keeps failing, and tries again later.

use std::time::{Duration, Instant};

/// Failures in a row after which it pauses.
const FAILURES: u32 = 3;
/// The first pause; each further one doubles.
const PAUSE: Duration = Duration::from_secs(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(600);

/// See the module. Time is an argument, and monotonic.
#[derive(Debug, Default)]
pub(crate) struct Breaker {
    failures: u32,
    pauses: u32,
    until: Option<Instant>,
}

impl Breaker {
    /// Whether the disk may be asked.
    pub fn allows(&self, now: Instant) -> bool {
        self.until.is_none_or(|until| now >= until)
    }

    /// The disk did as it was asked.
    pub fn success(&mut self) {
        *self = Self::default();
    }

    /// The disk failed; says for how long it is left alone if a pause begins with this.
    pub fn failure(&mut self, now: Instant) -> Option<Duration> {
        self.failures += 1;
        // After a pause, one failure is enough for the next.
        if self.failures < FAILURES && self.pauses == 0 || !self.allows(now) {
            return None;
        }
        let pause = PAUSE.saturating_mul(1 << self.pauses.min(16)).min(LONGEST_PAUSE);
        self.pauses += 1;
        self.until = Some(now + pause);
        Some(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_failures_in_a_row_pause_and_each_trial_that_fails_pauses_longer() {
        let mut breaker = Breaker::default();
        let start = Instant::now();
        assert_eq!((breaker.failure(start), breaker.failure(start)), (None, None));
        breaker.success();
        assert_eq!((breaker.failure(start), breaker.failure(start)), (None, None));
        assert!(breaker.allows(start));
        assert_eq!(breaker.failure(start), Some(PAUSE));
        assert!(!breaker.allows(start) && !breaker.allows(start + PAUSE / 2));
        assert_eq!(breaker.failure(start), None, "what was on its way fails within the pause");
        let later = start + PAUSE;
        assert!(breaker.allows(later));
        assert_eq!(breaker.failure(later), Some(PAUSE * 2));
        assert!(!breaker.allows(later + PAUSE));
        let mut now = later;
        for _ in 0..40 {
            now += LONGEST_PAUSE;
            assert!(breaker.failure(now).is_some_and(|pause| pause <= LONGEST_PAUSE));
        }
        breaker.success();
        assert!(breaker.allows(now) && breaker.failure(now).is_none());
    }
}
