//! A prompt beside a decode that drafts, on a machine of virtual time: drafts cost the newcomer nothing, and the
//! decode goes on at its pace.

use std::time::Duration;

use rudder_scheduler::{Origin, Pace, Policy, Scheduler, SchedulerConfig, StepPlan};

/// Milliseconds of a step's decodes, of a drafted token and of a prompt token: a 0.5B model on two CPU cores.
const DECODES: f64 = 20.0;
const DRAFTED: f64 = 2.5;
const PROMPT: f64 = 1.6;
/// Milliseconds between two tokens.
const TARGET: f64 = 100.0;

const DECODER: u64 = 1;
const NEWCOMER: u64 = 2;

struct Machine {
    scheduler: Scheduler,
    pace: Pace,
    plan: StepPlan,
    /// Milliseconds since the start.
    now: f64,
    /// Tokens that the decoder was given.
    given: usize,
    /// Whether the newcomer has its first token.
    answered: bool,
    longest_step: f64,
}

impl Machine {
    fn new() -> Self {
        let config = SchedulerConfig {
            blocks: 1024,
            max_sequences: 4,
            max_batch_tokens: 512,
            max_drafted: 64,
            prefix_cache: true,
            policy: Policy::Fair,
        };
        let mut scheduler = Scheduler::new(config);
        scheduler.add(DECODER, (0..100).collect(), false, Origin::default());
        Self {
            scheduler,
            pace: Pace::new(Duration::from_secs_f64(TARGET / 1e3)),
            plan: StepPlan::default(),
            now: 0.0,
            given: 0,
            answered: false,
            longest_step: 0.0,
        }
    }

    /// A step in which the decoder drafts so many tokens, the last quarter of them wrong.
    fn step(&mut self, drafted: usize) {
        if self.scheduler.can_draft(DECODER) {
            self.scheduler.propose(DECODER, &vec![7; drafted]);
        }
        let mut plan = std::mem::take(&mut self.plan);
        self.scheduler.plan(&mut plan);
        let took: f64 = plan
            .chunks
            .iter()
            .enumerate()
            .map(|(index, chunk)| {
                let decodes = index < plan.decodes;
                if decodes { DECODES + DRAFTED * chunk.drafted as f64 } else { PROMPT * chunk.len as f64 }
            })
            .sum();
        self.now += took;
        self.longest_step = self.longest_step.max(took);
        self.scheduler.commit(&plan);
        for chunk in plan.chunks.iter().filter(|chunk| chunk.outputs > 0) {
            let accepted = chunk.drafted * 3 / 4;
            (0..accepted).for_each(|_| self.scheduler.accept(chunk.id, 7));
            self.scheduler.append(chunk.id, 8);
            self.given += if chunk.id == DECODER { accepted + 1 } else { 0 };
            self.answered |= chunk.id == NEWCOMER;
        }
        self.pace.record(&plan, Duration::from_secs_f64(took / 1e3));
        self.scheduler.limit_prefill(self.pace.prefill_limit());
        self.plan = plan;
    }
}

/// Milliseconds that a newcomer of `prompt` tokens waits for its first one beside a decoder whose drafts have these
/// lengths in turn, milliseconds between two tokens of the decoder meanwhile, and the longest step.
fn beside(drafts: &[usize], prompt: u32) -> (f64, f64, f64) {
    let mut machine = Machine::new();
    machine.step(0);
    machine.step(0);
    let mut drafts = drafts.iter().copied().cycle();
    (0..30).for_each(|_| machine.step(drafts.next().unwrap()));
    let (began, given) = (machine.now, machine.given);
    machine.longest_step = 0.0;
    machine.scheduler.add(NEWCOMER, (1000..1000 + prompt).collect(), false, Origin::default());
    while !machine.answered {
        machine.step(drafts.next().unwrap());
    }
    let waited = machine.now - began;
    (waited, waited / (machine.given - given) as f64, machine.longest_step)
}

#[test]
fn a_newcomer_waits_no_longer_beside_drafts() {
    for prompt in [300, 700, 1500, 3000] {
        let (plain, ..) = beside(&[0], prompt);
        for drafts in [&[16][..], &[4], &[8, 20, 0, 12], &[28, 0, 3]] {
            let (drafted, ..) = beside(drafts, prompt);
            // The step that ends the prompt may hold more of drafts than is left of the prompt.
            let last = DECODES + DRAFTED * *drafts.iter().max().unwrap() as f64;
            assert!(
                drafted <= 1.05 * plain + last,
                "{prompt} tokens beside {drafts:?}: {drafted} ms, {plain} without"
            );
        }
    }
}

#[test]
fn the_decode_keeps_its_pace_and_gains_by_its_drafts() {
    let (_, plain, step) = beside(&[0], 3000);
    assert!((0.9 * TARGET..1.1 * TARGET).contains(&plain) && step < 1.1 * TARGET, "{plain} ms, {step} ms");
    let (_, drafted, step) = beside(&[16], 3000);
    assert!(drafted < plain / 3.0 && step < 3.3 * TARGET, "{drafted} ms a token, {step} ms a step");
}
