//! What a step drew, handed out: scores, tokens, ends.

use std::sync::atomic::Ordering;
use std::time::Instant;

use rudder_ops::Sampled;
use rudder_scheduler::{Chunk, SequenceId, StepPlan};

use super::StepLoop;
use super::active::{Active, Held};
use crate::request::{Event, FinishReason, Token};

impl StepLoop {
    /// Hands out what the step drew, in batch order.
    pub(super) fn deliver(&mut self, plan: &StepPlan) {
        let mut sampled = std::mem::take(&mut self.sampled);
        let mut drawn = sampled.drain(..);
        for chunk in &plan.chunks {
            self.report_prefill(chunk);
            let mut wanted = true;
            for row in 0..chunk.outputs {
                let Some(one) = drawn.next() else { break };
                wanted = wanted && self.deliver_one(chunk, row, one);
            }
            self.send_to_grammar(chunk.id);
        }
        drop(drawn);
        self.sampled = sampled;
    }

    fn report_prefill(&mut self, chunk: &Chunk) {
        let Some(active) = self.active.get(&chunk.id) else { return };
        let total = active.submission.request.prompt.len();
        if active.first_token.is_none() {
            let done = (chunk.start + chunk.len).min(total);
            let cached = active.cached.unwrap_or(0);
            // A receiver that is gone has a cancellation on its way.
            let _ = active.submission.events.send(Event::Prefill { done, total, cached });
        }
    }

    /// Hands out what an output row of a chunk drew: a score within the prompt, or a new token. Returns
    /// whether the chunk's next row is of use: it is not where the token is none that was drafted.
    fn deliver_one(&mut self, chunk: &Chunk, row: usize, sampled: Sampled) -> bool {
        let (id, position) = (chunk.id, chunk.start + chunk.len - chunk.outputs + 1 + row);
        let Some(active) = self.active.get_mut(&id) else { return false };
        let known = self.scheduler.sequence(id).map_or(0, |sequence| sequence.tokens.len());
        let generates = position >= active.submission.request.prompt.len();
        if generates && chunk.outputs == 1 && known > position {
            return false; // tokens were forced while the step was in flight
        }
        if let Some(fault) = sampled.fault {
            self.fail(id, fault);
            return false;
        }
        let token = Token { id: sampled.token, logprob: sampled.logprob, top: sampled.top };
        if active.is_scoring() {
            let prompt = &active.submission.request.prompt;
            if position < prompt.len() {
                active.scores.truncate(position - 1); // a preempted prompt is scored again from its start
                active.scores.push(token);
                return true;
            }
            let first = Token { id: prompt[0], logprob: None, top: Vec::new() };
            let scores = std::iter::once(first).chain(active.scores.drain(..)).collect();
            let _ = active.submission.events.send(Event::Prompt(scores));
        }
        active.first_token.get_or_insert_with(Instant::now);
        if active.submission.max_tokens == 0 {
            self.finish(id, FinishReason::Length);
            return false;
        }
        let accepted = row < active.followed(chunk.drafted)
            && self.scheduler.sequence(id).is_some_and(|sequence| sequence.draft()[row] == token.id);
        let first = chunk.drafted == 0 || row == 0;
        if accepted {
            active.accepted += 1;
            self.stats.accepted_at[row] += 1;
            if let Some(counts) = self.stats.model_drafts.as_mut().filter(|_| active.guessed) {
                counts.accepted_at[row] += 1;
            }
        }
        if first && !self.follow_grammar(id) {
            return false;
        }
        let token_id = token.id;
        self.take_drawn(id, token, accepted) && !self.end_reasoning(id, token_id) && accepted
    }

    /// Appends what ends the reasoning, if the token just taken was the last that its budget allows. Returns
    /// whether it was.
    fn end_reasoning(&mut self, id: SequenceId, token: u32) -> bool {
        let reasoning = self.active.get_mut(&id).and_then(|active| active.reasoning.as_mut());
        let Some(end) = reasoning.and_then(|reasoning| reasoning.take(token)) else { return false };
        let _ = end
            .iter()
            .all(|&id_| self.take_drawn(id, Token { id: id_, logprob: None, top: Vec::new() }, false));
        true
    }

    /// As [`StepLoop::take_token`], and the grammar, if there is one, is to hear of it.
    fn take_drawn(&mut self, id: SequenceId, token: Token, accepted: bool) -> bool {
        let token_id = token.id;
        let goes_on = self.take_token(id, token, accepted);
        if goes_on && let Some(Active { grammar: Some(Held::Here(job)), .. }) = self.active.get_mut(&id) {
            job.tokens.push(token_id);
        }
        goes_on
    }

    /// A token was drawn or forced for a sequence: it grows, or ends. With `accepted`, the step has
    /// computed it already. Returns whether the sequence goes on.
    pub(super) fn take_token(&mut self, id: SequenceId, token: Token, accepted: bool) -> bool {
        let Some(active) = self.active.get_mut(&id) else { return false };
        self.stats.generation_tokens += 1;
        active.generated += 1;
        if let Some(counts) = &mut active.counts {
            counts.add(token.id);
        }
        if let (Some(drafter), Some(drafting), Some(sequence)) =
            (&mut active.drafter, &mut self.drafting, self.scheduler.sequence(id))
        {
            drafter.observe(&sequence.tokens, token.id, &mut drafting.acceptance);
        }
        if active.stops_at(token.id) {
            self.finish(id, FinishReason::Stop);
            return false;
        }
        let token_id = token.id;
        let _ = active.submission.events.send(Event::Token(token));
        if active.generated >= active.submission.max_tokens {
            self.finish(id, FinishReason::Length);
            return false;
        }
        if accepted {
            self.scheduler.accept(id, token_id);
        } else {
            self.scheduler.append(id, token_id);
        }
        true
    }

    pub(super) fn finish(&mut self, id: SequenceId, reason: FinishReason) {
        if let Some(active) = self.end(id) {
            let _ = active.submission.events.send(Event::Finished { reason, usage: active.usage() });
        }
    }

    pub(super) fn fail(&mut self, id: SequenceId, message: &str) {
        if let Some(active) = self.end(id) {
            let _ = active.submission.events.send(Event::Failed { message: message.into() });
        }
    }

    /// Forgets a sequence, however it ended; unknown ids are fine. Its place and its blocks are
    /// free before its client hears of the end, who may send the next request at once.
    pub(super) fn end(&mut self, id: SequenceId) -> Option<Active> {
        self.keep_answer(id);
        self.end_turn(id);
        self.keep_last_blocks(id);
        self.release_guesses(id);
        self.scheduler.remove(id);
        let active = self.active.remove(&id)?;
        self.disturbed = true;
        let ms = active.submission.submitted.elapsed().as_millis() as u64;
        let mean = self.shared.mean_request_ms.load(Ordering::Relaxed);
        let mean = if mean == 0 { ms } else { (mean * 7 + ms) / 8 };
        self.shared.mean_request_ms.store(mean, Ordering::Relaxed);
        if let Some(deadline) = active.submission.request.deadline {
            self.deadlines.remove(&(deadline, id));
        }
        self.shared.places.give_back(&active.submission.request.owner);
        Some(active)
    }
}
