//! A live sequence, beside what the scheduler knows of it.

use std::sync::Arc;
use std::time::Instant;

use rudder_ops::TokenCounts;

use super::Submission;
use crate::draft::Drafter;
use crate::grammar::Next;
use crate::mask_workers::{LateDraft, MaskJob};
use crate::reasoning::Reasoning;
use crate::request::{Token, Usage};

/// See the module.
pub(super) struct Active {
    pub(super) submission: Submission,
    pub(super) counts: Option<TokenCounts>,
    /// Absent without a grammar, and before the sequence runs.
    pub(super) grammar: Option<Held>,
    pub(super) reasoning: Option<Reasoning>,
    /// Prompt tokens scored so far, when asked for.
    pub(super) scores: Vec<Token>,
    pub(super) generated: usize,
    /// Prompt tokens that it found computed when it was first admitted.
    pub(super) cached: Option<usize>,
    /// Whether it was ever preempted with something computed: what it finds later is its own.
    pub(super) preempted: bool,
    pub(super) planned: Option<Instant>,
    pub(super) first_token: Option<Instant>,
    /// Absent where nothing is drafted, and before the sequence runs.
    pub(super) drafter: Option<Box<Drafter>>,
    pub(super) drafted: usize,
    pub(super) accepted: usize,
    /// Whether its present draft is the draft model's.
    pub(super) guessed: bool,
}

/// Where a sequence's state in its grammar is.
pub(super) enum Held {
    /// Here, its answer about the next token ready.
    Here(Box<MaskJob>),
    /// With a worker, who may be sent a draft for it.
    Away(Arc<LateDraft>),
}

impl Active {
    /// Whether its prompt is still being scored.
    pub(super) fn is_scoring(&self) -> bool {
        self.submission.request.prompt_logprobs && self.first_token.is_none()
    }

    /// The mask for the token drawn `row` rows after the sequence's last known one, that is after as
    /// many drafted ones. None where the grammar does without a draw, or does not allow the draft.
    pub(super) fn mask(&self, row: usize) -> Option<&[u32]> {
        match &self.grammar {
            Some(Held::Here(job)) if job.next == Ok(Next::Draw) && job.forced.is_empty() => job.mask(row),
            _ => None,
        }
    }

    /// How many of `drafted` tokens its grammar follows.
    pub(super) fn followed(&self, drafted: usize) -> usize {
        match &self.grammar {
            Some(Held::Here(job)) => drafted.min(job.followed),
            Some(Held::Away(_)) => 0,
            None => drafted,
        }
    }

    /// Whether its grammar, if it has one, could follow a draft now.
    pub(super) fn follows_drafts(&self) -> bool {
        self.grammar.as_ref().is_none_or(|held| match held {
            Held::Here(job) => job.follows(),
            Held::Away(late) => late.is_open(),
        })
    }

    /// Whether this token ends it.
    pub(super) fn stops_at(&self, token: u32) -> bool {
        let request = &self.submission.request;
        !request.ignore_eos && request.stop_tokens.contains(&token)
    }

    pub(super) fn usage(&self) -> Usage {
        let prediction = self.drafter.as_ref().and_then(|drafter| drafter.prediction());
        let (predicted_tokens, mispredicted_tokens) = prediction.unwrap_or_default();
        let (submitted, now) = (self.submission.submitted, Instant::now());
        let planned = self.planned.unwrap_or(now);
        let first_token = self.first_token.unwrap_or(now);
        Usage {
            prompt_tokens: self.submission.request.prompt.len(),
            cached_tokens: self.cached.unwrap_or(0),
            completion_tokens: self.generated,
            drafted_tokens: self.drafted,
            accepted_tokens: self.accepted,
            predicted_tokens,
            mispredicted_tokens,
            queue: planned - submitted,
            prefill: first_token - planned,
            decode: now - first_token,
        }
    }
}
