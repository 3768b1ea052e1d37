//! How much of prompts a step may hold beside decodes, so that these keep their pace.
//!
//! Step times are measured as they come: of steps that only decode, with what each drafted token adds to
//! them, and what prompt tokens add to the others, by how many tokens come before them, as attention to long
//! contexts may cost much more than all else. From them follows the prefill that fits into the target between two tokens. Prefill may
//! always take as long as the decodes themselves, so that it gets half of the machine even where these
//! alone miss the target. Drafts leave prefill its share of the time: a step that they lengthen gives it as
//! many times longer, since it gives several tokens too. Where prompts never end, a step without them now and then tells what the decodes
//! take: else their slowing down would be put down to the prompts, and these held back for it.

use std::time::Duration;

use crate::StepPlan;

/// How much a new measurement moves an estimate.
const GAIN: f64 = 0.25;
/// An estimate that has aged is moved by more, up to this.
const MOST_GAIN: f64 = 0.75;
/// Most steps in a row with prompts beside decodes.
const MEASURE_EVERY: u32 = 16;
/// What is left of earlier steps' weight with each one that holds prompts.
const MEMORY: f64 = 0.85;
/// Of their square, how much contexts must vary for half of the weight in what a context costs, and drafts'
/// lengths in what a drafted token costs.
const VARIED: f64 = 0.01;

/// What a step that decodes may hold of prompts, in the seconds that they take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PrefillLimit {
    /// Most time beside decodes without drafts. With 0, prompts wait for the next step.
    pub time: f64,
    /// Time of the decodes without drafts; absent while it is not known.
    pub decodes: Option<f64>,
    /// Time that each drafted token adds to theirs.
    pub drafted: f64,
    /// Time of a prompt token that has none before it.
    pub token: f64,
    /// Time that each token before it adds.
    pub context: f64,
}

impl PrefillLimit {
    /// As much as fits into a step.
    pub const NONE: Self =
        Self { time: f64::INFINITY, decodes: None, drafted: 0.0, token: 0.0, context: 0.0 };

    /// How many times as long `decodes` sequences take with `drafted` tokens as without: no more than the tokens
    /// that each gets if all of them are accepted.
    pub(crate) fn stretch(&self, drafted: usize, decodes: usize) -> f64 {
        let per_decode = drafted as f64 / decodes.max(1) as f64;
        self.decodes.map_or(1.0, |time| 1.0 + (drafted as f64 * self.drafted / time).min(per_decode))
    }

    /// What `len` prompt tokens take after `start` others.
    pub fn time_of(&self, start: usize, len: usize) -> f64 {
        len as f64 * (self.token + self.context * (start as f64 + len as f64 / 2.0))
    }

    /// How many prompt tokens take `time` after `start` others.
    pub fn tokens_in(&self, time: f64, start: usize) -> usize {
        if time.is_infinite() {
            return usize::MAX;
        }
        // The root of context / 2 * len² + first * len = time, in the form that bears a context of 0.
        let first = self.token + self.context * start as f64;
        let root = (first * first + 2.0 * self.context * time).sqrt();
        (2.0 * time / (first + root)).round() as usize
    }
}

/// See the module.
#[derive(Debug)]
pub struct Pace {
    /// Seconds between two tokens of a decode beside prefill.
    target: f64,
    decodes: DecodeTimes,
    /// Steps that decoded since one without prefill.
    age: u32,
    prefill: PrefillTimes,
}

impl Pace {
    /// For steps that may take `target` where they decode.
    pub fn new(target: Duration) -> Self {
        let (decodes, prefill) = (DecodeTimes::default(), PrefillTimes::default());
        Self { target: target.as_secs_f64(), decodes, age: 0, prefill }
    }

    /// A step took this long.
    pub fn record(&mut self, plan: &StepPlan, took: Duration) {
        let took = took.as_secs_f64();
        let (decodes, prefills) = plan.chunks.split_at(plan.decodes);
        let drafted = decodes.iter().map(|chunk| chunk.drafted).sum::<usize>() as f64;
        let (mut tokens, mut contexts) = (0.0, 0.0);
        for chunk in prefills {
            tokens += chunk.len as f64;
            contexts += chunk.len as f64 * (chunk.start as f64 + chunk.len as f64 / 2.0);
        }
        match (decodes.is_empty(), prefills.is_empty()) {
            (true, true) => {}
            (false, true) => self.record_decodes(drafted, took),
            (true, false) => self.prefill.record(tokens, contexts, took),
            (false, false) => {
                self.age += 1;
                self.prefill.record(tokens, contexts, (took - self.decodes.of(drafted)).max(0.0));
            }
        }
    }

    fn record_decodes(&mut self, drafted: f64, took: f64) {
        let gain = match self.decodes.seconds {
            0.0 => 1.0,
            _ => (1.0 - (1.0 - GAIN).powf(f64::from(self.age + 1))).min(MOST_GAIN),
        };
        self.decodes.record(drafted, took, gain);
        self.age = 0;
    }

    /// What the next step may hold of prompts, if it decodes.
    pub fn prefill_limit(&self) -> PrefillLimit {
        if self.prefill.tokens == 0.0 {
            return PrefillLimit::NONE;
        }
        let (token, context) = self.prefill.costs();
        let decodes = self.decodes.of(0.0);
        PrefillLimit {
            time: match self.age < MEASURE_EVERY {
                true => (self.target - decodes).max(decodes),
                false => 0.0,
            },
            decodes: (decodes > 0.0).then_some(decodes),
            drafted: self.decodes.slope,
            token,
            context,
        }
    }
}

/// What steps without prefill take: a line over their drafted tokens, by least squares, later steps weighing
/// more. While drafts do not vary in length, the slope stays what it was.
#[derive(Debug, Default)]
struct DecodeTimes {
    /// Means over the steps: seconds, 0 while unknown, and drafted tokens.
    seconds: f64,
    drafted: f64,
    /// Of the drafted tokens, and with the seconds.
    variance: f64,
    covariance: f64,
    /// Seconds that a drafted token adds.
    slope: f64,
}

impl DecodeTimes {
    fn record(&mut self, drafted: f64, seconds: f64, gain: f64) {
        let (more, longer) = (drafted - self.drafted, seconds - self.seconds);
        self.drafted += gain * more;
        self.seconds += gain * longer;
        self.variance = (1.0 - gain) * (self.variance + gain * more * more);
        self.covariance = (1.0 - gain) * (self.covariance + gain * more * longer);
        let inertia = VARIED * (1.0 + self.drafted * self.drafted);
        let slope = (self.covariance + inertia * self.slope) / (self.variance + inertia);
        // Neither a drafted token nor the others take less than no time.
        self.slope = slope.max(0.0).min(self.seconds / self.drafted);
    }

    /// Seconds of a step with so many drafted tokens.
    fn of(&self, drafted: f64) -> f64 {
        (self.seconds + self.slope * (drafted - self.drafted)).max(0.0)
    }
}

/// What prompt tokens take: a line over the tokens before them, by least squares over the steps, weighted by
/// their tokens, earlier ones less. While contexts do not vary, the slope stays what it was.
#[derive(Debug, Default)]
struct PrefillTimes {
    /// Sums over the steps: tokens, seconds, and of each token's context itself, its square, and its product
    /// with the token's seconds.
    tokens: f64,
    seconds: f64,
    contexts: f64,
    squares: f64,
    products: f64,
    /// Seconds that each token before it adds to a token.
    slope: f64,
}

impl PrefillTimes {
    fn record(&mut self, tokens: f64, contexts: f64, seconds: f64) {
        let mean = contexts / tokens;
        let add = |sum: &mut f64, new: f64| *sum = MEMORY * *sum + new;
        add(&mut self.tokens, tokens);
        add(&mut self.seconds, seconds);
        add(&mut self.contexts, contexts);
        add(&mut self.squares, contexts * mean);
        add(&mut self.products, seconds * mean);
        let square = self.contexts * self.contexts / self.tokens;
        let variance = (self.squares - square).max(0.0);
        let covariance = self.products - self.contexts * self.seconds / self.tokens;
        let inertia = VARIED * square;
        if variance + inertia > 0.0 {
            let slope = (covariance + inertia * self.slope) / (variance + inertia);
            // Neither a context nor the tokens themselves take less than no time.
            self.slope = slope.clamp(0.0, self.seconds / self.contexts);
        }
    }

    /// Seconds of a token without a context, and what each token of one adds.
    fn costs(&self) -> (f64, f64) {
        let token = (self.seconds - self.slope * self.contexts) / self.tokens;
        (token.max(0.0), self.slope)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BLOCK_SIZE, Chunk};

    /// A machine whose steps take what they cost, in milliseconds.
    #[derive(Clone, Copy)]
    struct Machine {
        base: f64,
        drafted: f64,
        token: f64,
        context: f64,
    }

    fn machine(base: f64, token: f64) -> Machine {
        Machine { base, drafted: 0.0, token, context: 0.0 }
    }

    /// A step of so many decodes, and prompt tokens after others.
    fn plan(decodes: usize, start: usize, len: usize) -> StepPlan {
        let chunk = |start, len| Chunk { id: 0, start, len, outputs: 0, drafted: 0 };
        let mut chunks = vec![chunk(0, 1); decodes];
        chunks.extend((len > 0).then(|| chunk(start, len)));
        StepPlan { chunks, decodes, ..StepPlan::default() }
    }

    /// A decode with so many drafted tokens.
    fn drafted(tokens: usize) -> StepPlan {
        let chunk = Chunk { id: 0, start: 0, len: 1 + tokens, outputs: 1 + tokens, drafted: tokens };
        StepPlan { chunks: vec![chunk], decodes: 1, ..StepPlan::default() }
    }

    /// What a step of at most 512 tokens holds after `start` others.
    fn allowed(pace: &Pace, start: usize) -> usize {
        let limit = pace.prefill_limit();
        match limit.time > 0.0 {
            true => limit.tokens_in(limit.time, start).clamp(BLOCK_SIZE, 512),
            false => 0,
        }
    }

    impl Machine {
        fn step(&self, pace: &mut Pace, decodes: usize, start: usize, len: usize) -> f64 {
            let after = start as f64 + len as f64 / 2.0;
            let took = self.base * decodes as f64 + len as f64 * (self.token + self.context * after);
            pace.record(&plan(decodes, start, len), Duration::from_secs_f64(took / 1e3));
            took
        }

        fn draft(&self, pace: &mut Pace, tokens: usize) {
            let took = self.base + self.drafted * tokens as f64;
            pace.record(&drafted(tokens), Duration::from_secs_f64(took / 1e3));
        }

        /// Runs steps with as much prefill as may be, beside one decode; returns how much that was.
        fn run(&self, pace: &mut Pace, steps: usize) -> Vec<usize> {
            let step = |_| {
                let prefill = allowed(pace, 0);
                self.step(pace, 1, 0, prefill);
                prefill
            };
            (0..steps).map(step).collect()
        }

        /// The prefill of each step, after many.
        fn settle(&self, pace: &mut Pace) -> usize {
            self.run(pace, 100);
            self.step(pace, 1, 0, 0);
            allowed(pace, 0)
        }
    }

    fn pace() -> Pace {
        Pace::new(Duration::from_millis(100))
    }

    #[test]
    fn nothing_is_held_back_before_anything_is_known() {
        assert_eq!(pace().prefill_limit(), PrefillLimit::NONE);
        assert_eq!(PrefillLimit::NONE.tokens_in(f64::INFINITY, 7), usize::MAX);
    }

    #[test]
    fn a_step_takes_what_the_target_says() {
        let machine = machine(20.0, 2.0);
        let mut pace = pace();
        machine.step(&mut pace, 0, 0, 300);
        machine.step(&mut pace, 1, 0, 0);
        assert_eq!(allowed(&pace, 0), 40); // 20 ms + 40 * 2 ms
        assert_eq!(pace.prefill_limit().decodes, Some(0.02));
        assert_eq!(machine.settle(&mut pace), 40);
    }

    #[test]
    fn it_follows_decodes_that_slow_down_though_prompts_never_end() {
        let mut pace = pace();
        machine(10.0, 0.0).step(&mut pace, 1, 0, 0);
        let limit = machine(40.0, 2.0).settle(&mut pace);
        assert!((28..=32).contains(&limit), "{limit}"); // 40 ms + 30 * 2 ms
    }

    #[test]
    fn decodes_that_slow_down_leave_prefill_its_half() {
        let mut pace = pace();
        machine(10.0, 2.0).settle(&mut pace);
        let given: usize = machine(80.0, 2.0).run(&mut pace, 400).iter().sum();
        assert!(given > 400 * 30, "{given}"); // 80 ms beside 80 ms, but for learning it
        let decodes = pace.prefill_limit().decodes.unwrap();
        assert!((decodes - 0.08).abs() < 1e-3, "{decodes}");
    }

    #[test]
    fn one_step_in_seventeen_is_spent_on_measuring() {
        let given = machine(20.0, 2.0).run(&mut pace(), 1700);
        assert_eq!(given.iter().filter(|&&prefill| prefill == 0).count(), 100);
    }

    #[test]
    fn a_few_prompt_tokens_with_odd_times_do_not_outweigh_many() {
        let machine = machine(20.0, 1.0);
        let mut pace = pace();
        machine.step(&mut pace, 1, 0, 0);
        assert_eq!(machine.settle(&mut pace), 80);
        for _ in 0..8 {
            pace.record(&plan(1, 0, 2), Duration::from_millis(32)); // six times as long
        }
        machine.step(&mut pace, 1, 0, 80);
        assert!(allowed(&pace, 0) > 50, "{:?}", pace.prefill_limit());
    }

    #[test]
    fn tokens_after_long_contexts_are_known_to_take_longer() {
        // As on a GPU: a token after 140,000 others takes fifteen times as long as the first.
        let machine = Machine { context: 5e-6, ..machine(20.0, 0.05) };
        let mut pace = pace();
        machine.step(&mut pace, 1, 0, 0);
        for turn in 0..10 {
            let start = if turn % 2 == 0 { 1000 } else { 140_000 };
            (0..20).for_each(|_| {
                let prefill = allowed(&pace, start);
                machine.step(&mut pace, 1, start, prefill);
            });
        }
        machine.step(&mut pace, 1, 0, 0);
        for start in [0, 1000, 30_000, 140_000, 300_000] {
            let prefill = pace.prefill_limit().tokens_in(pace.prefill_limit().time, start);
            let took = machine.step(&mut pace, 1, start, prefill);
            assert!((90.0..110.0).contains(&took), "{took} ms for {prefill} tokens after {start}");
        }
    }

    #[test]
    fn what_a_context_costs_is_remembered_while_contexts_are_alike() {
        let machine = Machine { context: 5e-6, ..machine(20.0, 0.05) };
        let mut pace = pace();
        machine.step(&mut pace, 1, 0, 0);
        for start in [1000, 140_000, 1000, 140_000] {
            machine.step(&mut pace, 1, start, 100);
        }
        for _ in 0..300 {
            machine.step(&mut pace, 1, 1000, 100);
        }
        machine.step(&mut pace, 1, 0, 0);
        let limit = pace.prefill_limit();
        let took = machine.step(&mut pace, 1, 140_000, limit.tokens_in(limit.time, 140_000));
        assert!((90.0..110.0).contains(&took), "{took} ms");
    }

    #[test]
    fn what_drafts_take_is_told_from_what_decodes_take() {
        let machine = Machine { drafted: 2.5, ..machine(20.0, 2.0) };
        let mut pace = pace();
        machine.step(&mut pace, 0, 0, 300);
        machine.draft(&mut pace, 0);
        assert_eq!(pace.prefill_limit().stretch(8, 1), 1.0, "nothing was drafted yet");
        [16, 16, 9, 32, 0, 16].into_iter().cycle().take(100).for_each(|n| machine.draft(&mut pace, n));
        for n in [0, 7, 20] {
            let limit = pace.prefill_limit();
            assert!((limit.decodes.unwrap() - 0.02).abs() < 1e-3, "{limit:?}");
            assert!((limit.drafted - 0.0025).abs() < 1e-4, "{limit:?}");
            assert!((limit.time - 0.08).abs() < 1e-3, "{limit:?}");
            assert!((limit.stretch(16, 1) - 3.0).abs() < 0.1, "{limit:?}");
            (0..500).for_each(|_| machine.draft(&mut pace, n)); // now they are alike
        }
    }

    #[test]
    fn a_step_with_drafts_takes_no_longer_a_token_than_one_without() {
        let limit = PrefillLimit { decodes: Some(1e-6), drafted: 0.1, ..PrefillLimit::NONE };
        assert_eq!((limit.stretch(8, 1), limit.stretch(8, 4), limit.stretch(0, 1)), (9.0, 3.0, 1.0));
        assert_eq!(PrefillLimit::NONE.stretch(8, 1), 1.0);
    }

    #[test]
    fn time_and_tokens_are_each_others_reverse() {
        for (token, context) in [(2e-3, 0.0), (1e-5, 1e-9), (0.0, 1e-9)] {
            let limit = PrefillLimit { token, context, ..PrefillLimit::NONE };
            for (start, len) in [(0, 1), (16, 4000), (100_000, 1), (100_000, 8192)] {
                assert_eq!(limit.tokens_in(limit.time_of(start, len), start), len, "{limit:?}");
            }
        }
    }

    #[test]
    fn prefill_gets_half_of_a_machine_that_is_too_slow_for_the_target() {
        let machine = machine(300.0, 10.0);
        let mut pace = pace();
        machine.step(&mut pace, 1, 0, 0);
        assert_eq!(machine.settle(&mut pace), 30);
    }

    #[test]
    fn a_fast_machine_is_not_held_back() {
        assert_eq!(machine(5.0, 0.05).settle(&mut pace()), 512);
    }

    #[test]
    fn a_hiccup_does_not_stop_prefill() {
        let machine = machine(20.0, 2.0);
        let mut pace = pace();
        machine.step(&mut pace, 1, 0, 0);
        machine.settle(&mut pace);
        pace.record(&plan(1, 0, 40), Duration::from_secs(60));
        assert_eq!(allowed(&pace, 0), BLOCK_SIZE);
        assert!(machine.settle(&mut pace) >= 38);
    }
}
