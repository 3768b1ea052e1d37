//! How many prompt tokens a step may hold beside decodes, so that these keep their pace.
//!
//! Step times are measured as they come: of steps that only decode, and per prompt token of the
//! others. From them follows the prefill that fits into the target between two tokens. Prefill may
//! always take as long as the decodes themselves, so that it gets half of the machine even where these
//! alone miss the target. Where prompts never end, a step without them now and then tells what the decodes
//! take: else their slowing down would be put down to the prompts, and these held back for it.

use std::time::Duration;

use crate::BLOCK_SIZE;

/// How much a new measurement moves an estimate.
const GAIN: f64 = 0.25;
/// An estimate that has aged is moved by more, up to this.
const MOST_GAIN: f64 = 0.75;
/// Most steps in a row with prompts beside decodes.
const MEASURE_EVERY: u32 = 16;

/// What a step that decodes may hold of prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrefillLimit {
    /// Most prompt tokens. With 0, prompts wait for the next step.
    pub tokens: usize,
    /// Prompt tokens that take as long as the decodes; absent while that is not known.
    pub decodes: Option<usize>,
}

/// See the module.
#[derive(Debug)]
pub struct Pace {
    /// Seconds between two tokens of a decode beside prefill.
    target: f64,
    /// Most tokens of a step.
    most: usize,
    /// Seconds of a step without prefill; 0 while unknown.
    decode_step: f64,
    /// Steps that decoded since it was measured.
    age: u32,
    /// Seconds that prompts took, and their tokens: sums over the steps, earlier ones weighing less.
    prefill: [f64; 2],
}

impl Pace {
    /// For steps that may take `target` where they decode, and hold `most` tokens.
    pub fn new(target: Duration, most: usize) -> Self {
        Self { target: target.as_secs_f64(), most, decode_step: 0.0, age: 0, prefill: [0.0; 2] }
    }

    /// A step of `decodes` decodes and `prefill` prompt tokens took this long.
    pub fn record(&mut self, decodes: usize, prefill: usize, took: Duration) {
        let took = took.as_secs_f64();
        match (decodes > 0, prefill) {
            (true, 0) => self.record_decodes(took),
            (_, 0) => {}
            (true, _) => {
                self.age += 1;
                self.record_prefill(prefill, (took - self.decode_step).max(0.0));
            }
            (false, _) => self.record_prefill(prefill, took),
        }
    }

    fn record_decodes(&mut self, took: f64) {
        let gain = match self.decode_step {
            0.0 => 1.0,
            _ => (1.0 - (1.0 - GAIN).powf(f64::from(self.age + 1))).min(MOST_GAIN),
        };
        self.decode_step += gain * (took - self.decode_step);
        self.age = 0;
    }

    /// A step with many prompt tokens tells more than one with few.
    fn record_prefill(&mut self, tokens: usize, seconds: f64) {
        for (sum, new) in self.prefill.iter_mut().zip([seconds, tokens as f64]) {
            *sum = (1.0 - GAIN) * *sum + new;
        }
    }

    /// What the next step may hold of prompts, if it decodes.
    pub fn prefill_limit(&self) -> PrefillLimit {
        let [seconds, tokens] = self.prefill;
        if seconds == 0.0 {
            return PrefillLimit { tokens: self.most, decodes: None };
        }
        let tokens_in = |time: f64| (time * tokens / seconds).round() as usize;
        let fits = tokens_in((self.target - self.decode_step).max(self.decode_step));
        PrefillLimit {
            tokens: match self.age < MEASURE_EVERY {
                true => fits.clamp(BLOCK_SIZE.min(self.most), self.most),
                false => 0,
            },
            decodes: (self.decode_step > 0.0).then(|| tokens_in(self.decode_step)),
        }
    }
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
        /// Runs steps with as much prefill as may be, beside one decode; returns how much that was.
        fn run(&self, pace: &mut Pace, steps: usize) -> Vec<usize> {
            let step = |_| {
                let prefill = pace.prefill_limit().tokens;
                pace.record(1, prefill, self.took(1, prefill));
                prefill
            };
            (0..steps).map(step).collect()
        }

        /// The prefill of each step, after many.
        fn settle(&self, pace: &mut Pace) -> usize {
            self.run(pace, 100);
            pace.record(1, 0, self.took(1, 0));
            pace.prefill_limit().tokens
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
        assert_eq!(pace().prefill_limit(), PrefillLimit { tokens: 512, decodes: None });
    }

    #[test]
    fn a_step_takes_what_the_target_says() {
        let machine = Machine { base: 20.0, token: 2.0 };
        let mut pace = pace();
        pace.record(0, 300, machine.took(0, 300));
        pace.record(1, 0, machine.took(1, 0));
        // 20 ms + 40 * 2 ms
        assert_eq!(pace.prefill_limit(), PrefillLimit { tokens: 40, decodes: Some(10) });
        assert_eq!(machine.settle(&mut pace), 40);
    }

    #[test]
    fn it_follows_decodes_that_slow_down_though_prompts_never_end() {
        let mut pace = pace();
        pace.record(1, 0, Duration::from_millis(10));
        let limit = Machine { base: 40.0, token: 2.0 }.settle(&mut pace);
        assert!((28..=32).contains(&limit), "{limit}"); // 40 ms + 30 * 2 ms
    }

    #[test]
    fn decodes_that_slow_down_leave_prefill_its_half() {
        let mut pace = pace();
        pace.record(1, 0, Duration::from_millis(10));
        Machine { base: 10.0, token: 2.0 }.settle(&mut pace);
        let slow = Machine { base: 80.0, token: 2.0 };
        let given: usize = slow.run(&mut pace, 400).iter().sum();
        assert!(given > 400 * 30, "{given}"); // 80 ms beside 80 ms, but for learning it
        assert_eq!(pace.prefill_limit().decodes, Some(40));
    }

    #[test]
    fn one_step_in_seventeen_is_spent_on_measuring() {
        let given = Machine { base: 20.0, token: 2.0 }.run(&mut pace(), 1700);
        assert_eq!(given.iter().filter(|&&prefill| prefill == 0).count(), 100);
    }

    #[test]
    fn a_few_prompt_tokens_with_odd_times_do_not_outweigh_many() {
        let machine = Machine { base: 20.0, token: 1.0 };
        let mut pace = pace();
        pace.record(1, 0, machine.took(1, 0));
        assert_eq!(machine.settle(&mut pace), 80);
        for _ in 0..8 {
            pace.record(1, 2, machine.took(1, 12)); // six times as long
        }
        pace.record(1, 80, machine.took(1, 80));
        assert!(pace.prefill_limit().tokens > 50, "{:?}", pace.prefill_limit());
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
        assert_eq!(pace.prefill_limit().tokens, BLOCK_SIZE);
        assert!(machine.settle(&mut pace) >= 38);
    }
}
