//! Steps that are queued while the one before them runs, so that the device does not wait for the host.
//!
//! Where the model draws ahead, the forward pass of a step that only decodes is queued and left in flight. While it runs, what the step before
//! drew is delivered, and grammars are asked what may be drawn next. Then its draw is queued, and behind that the forward pass of the step
//! after it, before anybody knows the tokens, which the device takes from the draw. At last it lands: its tokens arrive. So a grammar has as
//! long as a forward pass takes, and penalties count every token.
//!
//! The loop lands what is in flight and plans in full again as soon as something may change what runs: a request came or ended, tokens
//! were forced, a prompt goes on (its blocks arrived from disk, or it only stood back for a step), a draft would pay, a draft model has something to read or to try. Of a sequence that turns out to have ended, or to go on otherwise than by what was drawn, what is in flight is dropped.

use std::time::{Duration, Instant};

use rudder_ops::MOST_DRAWN_AHEAD;
use rudder_scheduler::StepPlan;

use super::StepLoop;
use super::active::{Active, Held};
use super::compute::{answers_all, guarded};
use crate::grammar::Next;

/// Most steps in a row that are planned ahead while others wait, for whom there may be room by now.
const MOST_BESIDE_WAITING: u32 = 8;

/// A step whose forward pass was queued; [`StepLoop::plan`] is its plan.
#[derive(Debug, Clone, Copy)]
pub(super) struct Flight {
    /// When it was queued, or the one before it landed.
    began: Instant,
    /// Steps since the last full plan.
    steps: u32,
}

impl Active {
    /// Whether its tokens can be drawn before it is known which they are.
    fn flies(&self) -> bool {
        let alternatives = self.submission.request.sampling.logprobs.unwrap_or(0);
        !self.is_scoring() && alternatives <= MOST_DRAWN_AHEAD
    }

    /// Whether the token that is about to be drawn is its next one, and not its last.
    fn goes_on(&self) -> bool {
        let drawn = match &self.grammar {
            Some(Held::Here(job)) => job.next == Ok(Next::Draw) && job.forced.is_empty(),
            Some(Held::Away(_)) => false,
            None => true,
        };
        drawn && self.generated + 1 < self.submission.max_tokens
    }
}

impl StepLoop {
    /// Whether a step may be left in flight.
    pub(super) fn can_fly(&self, plan: &StepPlan) -> bool {
        self.model.draws_ahead()
            && self.drafter_rested()
            && plan.decodes_plainly()
            && plan.chunks.iter().all(|chunk| self.active.get(&chunk.id).is_some_and(Active::flies))
    }

    /// Queues a step whose tokens are known and that is filled in; `plan` is what is in flight then.
    pub(super) fn take_off(&mut self, plan: &StepPlan) {
        match self.queue_forward() {
            Ok(()) => self.flight = Some(Flight { began: Instant::now(), steps: 0 }),
            Err(message) => self.end_step(plan, Err(message), Duration::ZERO, false),
        }
    }

    /// Lands what is in flight, and queues the next step behind it where that may be.
    pub(super) fn go_on(&mut self) {
        let Some(flight) = self.flight.take() else { return };
        if !self.plan.chunks.iter().any(|chunk| self.active.contains_key(&chunk.id)) {
            return; // nobody is left to land
        }
        let (mut plan, mut next) = (std::mem::take(&mut self.plan), std::mem::take(&mut self.next));
        self.await_masks(&plan);
        if let Err(message) = self.with_rows(&plan, |model, rows, _| model.draw(rows)) {
            self.end_step(&plan, Err(message), Duration::ZERO, false);
        } else {
            let queued = self.plan_next(flight, &plan, &mut next).then(|| {
                self.fill_drawn(&plan, &next);
                self.queue_forward()
            });
            let landed = self.land(&plan, flight, matches!(queued, Some(Ok(()))));
            match queued {
                Some(Ok(())) => {
                    std::mem::swap(&mut plan, &mut next);
                    self.flight = Some(Flight { began: landed, steps: flight.steps + 1 });
                    self.disturbed |= self.look_for_drafts();
                }
                Some(Err(message)) => self.end_step(&next, Err(message), Duration::ZERO, false),
                None => {}
            }
        }
        (self.plan, self.next) = (plan, next);
    }

    /// Plans the step after the one in flight, if nothing speaks against it.
    fn plan_next(&mut self, flight: Flight, plan: &StepPlan, next: &mut StepPlan) -> bool {
        let others_wait = self.scheduler.waiting() > 0 && flight.steps >= MOST_BESIDE_WAITING;
        if self.disturbed || others_wait || self.scheduler.is_prefilling() {
            return false;
        }
        let active = &self.active;
        let goes_on = |id| active.get(&id).is_some_and(Active::goes_on);
        let planned = self.scheduler.plan_ahead(plan, next, goes_on);
        // Those that are left out go on, or end, after a full plan.
        self.disturbed |= next.chunks.len() < plan.chunks.len();
        planned
    }

    /// Fills the batch with the tokens that `plan` is about to draw for the sequences of `next`.
    fn fill_drawn(&mut self, plan: &StepPlan, next: &StepPlan) {
        self.batch.clear();
        let mut outputs = plan.chunks.iter().zip(0..);
        for chunk in &next.chunks {
            let output = outputs.find(|(before, _)| before.id == chunk.id).map(|(_, output)| output);
            let (Some(output), Some(sequence)) = (output, self.scheduler.sequence(chunk.id)) else {
                unreachable!("a step goes on with sequences of the one before");
            };
            self.batch.push_drawn(output, chunk.start, &sequence.blocks);
        }
    }

    fn queue_forward(&mut self) -> Result<(), String> {
        let (model, batch) = (&mut self.model, &self.batch);
        guarded(|| model.forward(batch))
    }

    /// Waits for what a step drew and hands it out, beside the next step if that runs; returns when it came.
    fn land(&mut self, plan: &StepPlan, flight: Flight, next_runs: bool) -> Instant {
        let (model, sampled) = (&mut self.model, &mut self.sampled);
        let outcome = guarded(|| model.drawn(sampled)).and_then(|()| answers_all(sampled, plan.chunks.len()));
        let landed = Instant::now();
        self.end_step(plan, outcome, landed - flight.began, next_runs);
        landed
    }
}
