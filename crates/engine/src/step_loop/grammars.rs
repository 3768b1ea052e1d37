//! Where the step loop and the grammars' workers meet: when a sequence is admitted, before a step is planned, before
//! its rows are sampled, and after a token was drawn.

use std::time::{Duration, Instant};

use rudder_scheduler::{SequenceId, StepPlan};

use super::StepLoop;
use super::active::{Active, Held};
use crate::grammar::Next;
use crate::mask_workers::MaskJob;
use crate::request::{FinishReason, Token};

/// How long a step waits for grammars before it is planned. Most answer within it, and what they
/// force then goes through the model together with the token drawn last.
const GRAMMAR_PATIENCE: Duration = Duration::from_micros(200);

impl StepLoop {
    /// A sequence was admitted: its grammar, if it has one, is asked for the first mask. Those that wait are not
    /// before it at the workers.
    pub(super) fn start_grammar(&mut self, id: SequenceId) {
        let Some(active) = self.active.get_mut(&id).filter(|active| active.grammar.is_none()) else { return };
        let submission = &active.submission;
        let wanted = submission.request.grammar.clone().filter(|_| submission.max_tokens > 0);
        active.grammar = wanted.map(|grammar| {
            let jump = submission.request.sampling.logprobs.is_none();
            let job = MaskJob::new(id, grammar, jump, self.model.config().vocab);
            Held::Away(self.masks.send(Box::new(job)))
        });
    }

    /// Before a step is planned: hears the grammars that have an answer by now, so that forced
    /// tokens are part of this step and sequences at their end are not.
    pub(super) fn follow_grammars(&mut self) {
        let deadline = Instant::now() + GRAMMAR_PATIENCE;
        while let Some(job) = self.masks.take(Some(deadline)) {
            let id = job.id;
            let started = self.put_back(job);
            if started {
                self.follow_grammar(id);
            }
        }
    }

    /// Before drafts are proposed: takes what else is done by now, so that a draft is sent with the job. Forced tokens
    /// and ends are left for after the step, as those that come later.
    pub(super) fn take_late_grammars(&mut self) {
        while let Some(job) = self.masks.take(Some(Instant::now())) {
            self.put_back(job);
        }
    }

    /// Before the sampler: waits for the masks of all rows.
    pub(super) fn await_masks(&mut self, plan: &StepPlan) {
        for chunk in plan.chunks.iter().filter(|c| c.outputs > 0) {
            while matches!(self.active.get(&chunk.id), Some(Active { grammar: Some(Held::Away(_)), .. })) {
                let Some(mut job) = self.masks.take(None) else { break };
                // A draft may have been sent when the worker had just finished.
                if job.take_late_draft() {
                    self.masks.send(job);
                } else {
                    self.put_back(job);
                }
            }
        }
    }

    /// Takes a job back to its sequence, if that is still there. Returns whether the sequence has
    /// begun to generate.
    pub(super) fn put_back(&mut self, mut job: Box<MaskJob>) -> bool {
        // A draft that it was sent in vain was for a step that did not hold the sequence.
        job.take_late_draft();
        job.draft.clear();
        let Some(active) = self.active.get_mut(&job.id) else { return false };
        active.grammar = Some(Held::Here(job));
        active.first_token.is_some()
    }

    /// Does what a sequence's grammar asks for without a draw: forced tokens, the end, or failure.
    /// Returns whether a token drawn now is wanted.
    pub(super) fn follow_grammar(&mut self, id: SequenceId) -> bool {
        let Some(Active { grammar: Some(Held::Here(job)), .. }) = self.active.get_mut(&id) else {
            return true;
        };
        let next = std::mem::replace(&mut job.next, Ok(Next::Draw));
        let mut forced = std::mem::take(&mut job.forced);
        let jumped = !forced.is_empty();
        let goes_on = next.is_err()
            || forced
                .drain(..)
                .all(|id_| self.take_token(id, Token { id: id_, logprob: None, top: Vec::new() }, false));
        match next {
            _ if !goes_on => return false,
            Err(message) => self.fail(id, &message),
            Ok(Next::End) => self.finish(id, FinishReason::Stop),
            Ok(Next::Draw) => {
                if let Some(Active { grammar: Some(Held::Here(job)), .. }) = self.active.get_mut(&id) {
                    job.forced = forced; // keeps its memory
                }
                return !jumped;
            }
        }
        false
    }

    /// Sends a sequence's grammar on its way past the tokens drawn, if there are any.
    pub(super) fn send_to_grammar(&mut self, id: SequenceId) {
        let Some(active) = self.active.get_mut(&id) else { return };
        let drawn = |held: &mut Held| matches!(held, Held::Here(job) if !job.tokens.is_empty());
        if let Some(Held::Here(job)) = active.grammar.take_if(drawn) {
            active.grammar = Some(Held::Away(self.masks.send(job)));
        }
    }
}
