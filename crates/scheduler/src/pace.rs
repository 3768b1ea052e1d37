//! How many prompt tokens a step may hold beside decodes, so that these keep their pace.
//!
//! Step times are measured as they come: of steps that only decode, and per prompt token of the
//! others. From them follows the prefill that fits into the target between two tokens. Prefill may
//! always take as long as the decodes themselves, so that it gets half of the machine even where these
//! alone miss the target.

use std::time::Duration;

use crate::BLOCK_SIZE;

/// How much a new measurement moves an estimate.
const GAIN: f64 = 0.25;

/// See the module.
#[derive(Debug)]
pub struct Pace {
    /// Seconds between two tokens of a decode beside prefill.
    target: f64,
    /// Most tokens of a step.
    most: usize,
    /// Seconds of a step without prefill; 0 while unknown.
    decode_step: f64,
    /// Seconds that a prompt token adds to a step; 0 while unknown.
    prefill_token: f64,
}

impl Pace {
    /// For steps that may take `target` where they decode, and hold `most` tokens.
    pub fn new(target: Duration, most: usize) -> Self {
        Self { target: target.as_secs_f64(), most, decode_step: 0.0, prefill_token: 0.0 }
    }

    /// A step of `decodes` decodes and `prefill` prompt tokens took this long.
    pub fn record(&mut self, decodes: usize, prefill: usize, took: Duration) {
        let took = took.as_secs_f64();
        match (decodes > 0, prefill) {
            (true, 0) => approach(&mut self.decode_step, took),
            (_, 0) => {}
            (true, _) => {
                approach(&mut self.prefill_token, (took - self.decode_step).max(0.0) / prefill as f64)
            }
            (false, _) => approach(&mut self.prefill_token, took / prefill as f64),
        }
    }

    /// Most prompt tokens of the next step, if it decodes.
    pub fn prefill_limit(&self) -> usize {
        if self.prefill_token == 0.0 {
            return self.most;
        }
        let seconds = (self.target - self.decode_step).max(self.decode_step);
        let tokens = seconds / self.prefill_token;
        (tokens as usize).clamp(BLOCK_SIZE.min(self.most), self.most)
    }
}

fn approach(estimate: &mut f64, measured: f64) {
    *estimate += if *estimate == 0.0 { measured } else { GAIN * (measured - *estimate) };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine whose steps take what they cost, in milliseconds.
    struct Machine {
        base: f64,
        token: f64,
    }

    impl Machine {
        /// The prefill of each step, after some with as much as may be, beside one decode.
        fn settle(&self, pace: &mut Pace) -> usize {
            for _ in 0..100 {
                let prefill = pace.prefill_limit();
                pace.record(1, prefill, self.took(1, prefill));
            }
            pace.prefill_limit()
        }

        fn took(&self, decodes: usize, prefill: usize) -> Duration {
            Duration::from_secs_f64((self.base * decodes as f64 + self.token * prefill as f64) / 1e3)
        }
    }

    fn pace() -> Pace {
        Pace::new(Duration::from_millis(100), 512)
    }

    #[test]
    fn nothing_is_held_back_before_anything_is_known() {
        assert_eq!(pace().prefill_limit(), 512);
    }

    #[test]
    fn a_step_takes_what_the_target_says() {
        let machine = Machine { base: 20.0, token: 2.0 };
        let mut pace = pace();
        pace.record(0, 300, machine.took(0, 300));
        pace.record(1, 0, machine.took(1, 0));
        assert_eq!(pace.prefill_limit(), 40); // 20 ms + 40 * 2 ms
        assert_eq!(machine.settle(&mut pace), 40);
    }

    #[test]
    fn it_follows_decodes_that_slow_down_though_none_runs_alone() {
        let mut pace = pace();
        pace.record(1, 0, Duration::from_millis(10));
        let limit = Machine { base: 40.0, token: 2.0 }.settle(&mut pace);
        assert!((28..=32).contains(&limit), "{limit}"); // 40 ms + 30 * 2 ms
    }

    #[test]
    fn prefill_gets_half_of_a_machine_that_is_too_slow_for_the_target() {
        let machine = Machine { base: 300.0, token: 10.0 };
        let mut pace = pace();
        pace.record(1, 0, machine.took(1, 0));
        assert_eq!(machine.settle(&mut pace), 30);
    }

    #[test]
    fn a_fast_machine_is_not_held_back() {
        assert_eq!(Machine { base: 5.0, token: 0.05 }.settle(&mut pace()), 512);
    }

    #[test]
    fn a_hiccup_does_not_stop_prefill() {
        let machine = Machine { base: 20.0, token: 2.0 };
        let mut pace = pace();
        pace.record(1, 0, machine.took(1, 0));
        machine.settle(&mut pace);
        pace.record(1, 40, Duration::from_secs(60));
        assert_eq!(pace.prefill_limit(), BLOCK_SIZE);
        assert!(machine.settle(&mut pace) >= 38);
    }
}
