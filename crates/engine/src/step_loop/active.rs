//! A live sequence, beside what the scheduler knows of it.

use std::time::Instant;

use rudder_ops::TokenCounts;

use super::Submission;
use crate::grammar::Next;
use crate::mask_workers::MaskJob;
use crate::request::{Token, Usage};

/// See the module.
pub(super) struct Active {
    pub(super) submission: Submission,
    pub(super) counts: Option<TokenCounts>,
    pub(super) grammar: Option<Held>,
    /// Prompt tokens scored so far, when asked for.
    pub(super) scores: Vec<Token>,
    pub(super) generated: usize,
    pub(super) cached: Option<usize>,
    pub(super) planned: Option<Instant>,
    pub(super) first_token: Option<Instant>,
}

/// Where a sequence's state in its grammar is.
pub(super) enum Held {
    /// Here, its answer about the next token ready.
    Here(Box<MaskJob>),
    /// With a worker.
    Away,
}

impl Active {
    /// Whether its prompt is still being scored.
    pub(super) fn is_scoring(&self) -> bool {
        self.submission.request.prompt_logprobs && self.first_token.is_none()
    }

    /// The mask for a token drawn now. None where the grammar does without a draw.
    pub(super) fn mask(&self) -> Option<&[u32]> {
        match &self.grammar {
            Some(Held::Here(job)) if job.next == Ok(Next::Draw) && job.forced.is_empty() => Some(&job.mask),
            _ => None,
        }
    }

    pub(super) fn usage(&self) -> Usage {
        let submitted = self.submission.submitted;
        let planned = self.planned.unwrap_or(submitted);
        let first_token = self.first_token.unwrap_or(planned);
        Usage {
            prompt_tokens: self.submission.request.prompt.len(),
            cached_tokens: self.cached.unwrap_or(0),
            completion_tokens: self.generated,
            queue: planned - submitted,
            prefill: first_token - planned,
            decode: first_token.elapsed(),
        }
    }
}
