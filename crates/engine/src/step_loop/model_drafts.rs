//! Where the step loop meets the draft model, if there is one.

use rudder_model::Model;
use rudder_scheduler::SequenceId;

use super::StepLoop;
use crate::draft::{Drafting, Find, ModelDrafter, Subject};
use crate::draft_model::DraftModel;
use crate::engine::EngineConfig;

/// The draft model at work, or nothing if it fails at once.
pub(super) fn start(
    draft: DraftModel,
    model: &dyn Model,
    config: &EngineConfig,
) -> Option<Box<ModelDrafter>> {
    match ModelDrafter::new(draft, model.config().vocab, config.decode_latency_target) {
        Ok(drafter) => Some(Box::new(drafter)),
        Err(message) => {
            report(&message);
            None
        }
    }
}

fn report(message: &str) {
    tracing::warn!(
        message,
        "the draft model failed and is off until the next start; answers go on without it"
    );
}

impl StepLoop {
    /// Before drafts are proposed: has the draft model guess where that pays. Beside a prefill, whose step takes its
    /// time anyway, it rests.
    pub(super) fn guess(&mut self, decodes: usize) {
        let outcome = self.with_drafter(|drafter, find, drafting| drafter.draft(find, decodes, drafting));
        if let Some(Err(message)) = outcome {
            report(&message);
            self.model_drafter = None;
        }
    }

    /// Whether the draft model would do something by now, while a step is in flight.
    pub(super) fn would_guess(&mut self, decodes: usize) -> bool {
        self.with_drafter(|drafter, find, drafting| drafter.has_work(find, decodes, drafting)) == Some(true)
    }

    /// Whether the draft model, if there is one, did nothing for the step that was planned last.
    pub(super) fn drafter_rested(&self) -> bool {
        self.model_drafter.as_ref().is_none_or(|drafter| drafter.rested())
    }

    fn with_drafter<T>(
        &mut self,
        work: impl FnOnce(&mut ModelDrafter, Find<'_, '_>, &mut Drafting) -> T,
    ) -> Option<T> {
        let (drafter, drafting) = (self.model_drafter.as_mut()?, self.drafting.as_mut()?);
        let (scheduler, active) = (&self.scheduler, &self.active);
        let find = |id: SequenceId| {
            let (active, sequence) = (active.get(&id)?, scheduler.sequence(id)?);
            let request = &active.submission.request;
            Some(Subject {
                tokens: &sequence.tokens,
                rest: active.submission.max_tokens.saturating_sub(active.generated + 1),
                mask: active.mask(0),
                stops: if request.ignore_eos { &[] } else { &request.stop_tokens },
            })
        };
        Some(work(drafter, &find, drafting))
    }

    /// A sequence has ended or lost its place: so do its tokens in the draft model's cache.
    pub(super) fn release_guesses(&mut self, id: SequenceId) {
        if let Some(drafter) = &mut self.model_drafter {
            drafter.release(id);
        }
    }
}
