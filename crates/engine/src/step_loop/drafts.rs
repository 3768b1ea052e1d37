//! Drafts in the step loop: proposed before a step is planned, measured after it ran.

use std::time::Duration;

use rudder_scheduler::{SequenceId, StepPlan};

use super::StepLoop;
use super::active::{Active, Held};
use crate::draft::{Drafter, MAX_DRAFT, Party};
use crate::mask_workers::MaskWorkers;

/// Prompts whose answers are shorter are not indexed for them.
const LEAST_ANSWER: usize = 3;
/// An index is made for at most so many tokens of an answer; more find their place too.
const EXPECTED_ANSWER: usize = 16 * 1024;

impl StepLoop {
    /// Proposes drafts for the sequences that decode, as long as it pays.
    pub(super) fn propose_drafts(&mut self) {
        if self.drafting.is_none() {
            return;
        }
        let decodes = self.find_drafts();
        self.guess(decodes);
        self.propose_chosen();
    }

    /// Whether drafts would pay by now, while a step is in flight.
    pub(super) fn look_for_drafts(&mut self) -> bool {
        let decodes = self.find_drafts();
        let copies =
            self.drafting.as_ref().is_some_and(|drafting| drafting.chosen.iter().any(|&len| len > 0));
        copies || self.would_guess(decodes)
    }

    /// Looks up what may follow the sequences that decode, and chooses how much of it to draft. Returns how many decode.
    fn find_drafts(&mut self) -> usize {
        let Some(drafting) = &mut self.drafting else { return 0 };
        drafting.begin();
        let mut decodes = 0;
        for (&id, active) in self.active.iter_mut().filter(|(_, active)| active.planned.is_some()) {
            let Some(sequence) = self.scheduler.sequence(id) else { continue };
            let decoding = self.scheduler.can_draft(id);
            decodes += usize::from(decoding);
            if active.submission.max_tokens < LEAST_ANSWER {
                continue;
            }
            let may_draft = decoding && active.follows_drafts();
            let request = &active.submission.request;
            let drafter = active.drafter.get_or_insert_with(|| {
                let expected = sequence.prompt_len + active.submission.max_tokens.min(EXPECTED_ANSWER);
                let (predicted, party) = (&request.prediction, Party::of(request));
                party.iter().for_each(|party| drafting.siblings.begin(party));
                let new = Drafter::new(expected, predicted, party.as_ref(), &drafting.siblings);
                let mut drafter = Box::new(new);
                // A short prompt's first step has drawn a token already.
                for at in sequence.prompt_len..sequence.tokens.len() {
                    drafter.observe(&sequence.tokens[..at], sequence.tokens[at], &mut drafting.acceptance);
                }
                drafter
            });
            drafting.to_index -= drafter.index(&sequence.tokens, drafting.to_index);
            let session = self.sessions.key_of(id);
            drafter.show(&sequence.tokens, sequence.prompt_len, session, false, &mut drafting.siblings);
            // The row after a draft draws a token too.
            let most = active.submission.max_tokens - active.generated - 1;
            if may_draft && most > 0 {
                drafter.hear(&drafting.siblings);
                drafter.aim(&sequence.tokens, &drafting.acceptance);
                let gains = drafter.gains(&sequence.tokens, most.min(MAX_DRAFT), &drafting.acceptance);
                drafting.lengths.offer(drafting.sequences.len(), gains);
                drafting.sequences.push(id);
            }
        }
        let prompt_token = self.scheduler.expects_prefill().then(|| self.pace.prefill_limit().token as f32);
        drafting.choose(decodes, prompt_token);
        decodes
    }

    /// Proposes drafts of the lengths chosen.
    fn propose_chosen(&mut self) {
        self.take_late_grammars();
        let Some(drafting) = &mut self.drafting else { return };
        for (index, (&id, &len)) in drafting.sequences.iter().zip(&drafting.chosen).enumerate() {
            let (Some(active), Some(sequence)) = (self.active.get_mut(&id), self.scheduler.sequence(id))
            else {
                continue;
            };
            drafting.draft.clear();
            let guesses = self.model_drafter.as_ref().and_then(|drafter| drafter.guesses(index));
            active.guessed = guesses.is_some();
            if let Some(guesses) = guesses {
                drafting.draft.extend(guesses.take(len));
            } else if let Some(drafter) = &active.drafter {
                let ends = |token| active.stops_at(token);
                drafter.draft(&sequence.tokens, len, &mut drafting.draft, ends);
            }
            send_draft(active, &mut drafting.draft, &mut self.masks);
            self.scheduler.propose(id, &drafting.draft);
        }
    }

    /// Counts the drafts of a step that ran, and what it took if it only decoded.
    pub(super) fn measure(&mut self, plan: &StepPlan, took: Duration) {
        let Some(drafting) = &mut self.drafting else { return };
        for chunk in plan.chunks.iter().filter(|chunk| chunk.drafted > 0) {
            self.stats.drafts += 1;
            self.stats.drafted_tokens += chunk.drafted as u64;
            let Some(active) = self.active.get_mut(&chunk.id) else { continue };
            active.drafted += chunk.drafted;
            if let Some(counts) = self.stats.model_drafts.as_mut().filter(|_| active.guessed) {
                counts.drafts += 1;
                counts.tokens += chunk.drafted as u64;
            }
        }
        if plan.chunks.iter().all(|chunk| chunk.outputs == chunk.len) {
            drafting.cost.record(plan.chunks.iter().map(|chunk| chunk.len).sum(), took);
            if let Some(drafter) = &mut self.model_drafter {
                drafter.save(took);
            }
        }
    }

    /// Keeps what a sequence said for those of the same party, before it is forgotten.
    pub(super) fn keep_answer(&mut self, id: SequenceId) {
        let (Some(drafting), Some(active), Some(sequence)) =
            (&mut self.drafting, self.active.get_mut(&id), self.scheduler.sequence(id))
        else {
            return;
        };
        if let Some(drafter) = &mut active.drafter {
            let session = self.sessions.key_of(id);
            drafter.show(&sequence.tokens, sequence.prompt_len, session, true, &mut drafting.siblings);
            Party::of(&active.submission.request).iter().for_each(|party| drafting.siblings.end(party));
        }
    }
}

/// Sends a draft to the sequence's grammar, if there is one. Nothing is left of it where the grammar cannot follow.
fn send_draft(active: &mut Active, draft: &mut Vec<u32>, masks: &mut MaskWorkers) {
    match active.grammar.take() {
        Some(Held::Here(mut job)) => {
            let follows = draft.first().is_some_and(|&first| job.follows() && job.allows(first));
            if follows {
                job.draft.extend_from_slice(draft);
                active.grammar = Some(Held::Away(masks.send(job)));
            } else {
                draft.clear();
                active.grammar = Some(Held::Here(job));
            }
        }
        Some(Held::Away(late)) => {
            late.send(draft);
            active.grammar = Some(Held::Away(late));
        }
        None => {}
    }
}
