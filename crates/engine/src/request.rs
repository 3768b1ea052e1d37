//! What the engine is asked and what it answers: tokens in, events out. No text here.

use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rudder_scheduler::Origin;

use crate::grammar::Grammar;
use crate::reasoning::ReasoningBudget;

pub use rudder_ops::{LogitBias, SamplingParams, TokenLogprob};

/// One sequence to generate. A client's `n` choices are `n` of these with the same prompt.
#[derive(Debug, Clone)]
pub struct GenerateRequest {
    /// Prompt tokens; at least one.
    pub prompt: Arc<[u32]>,
    /// How to draw.
    pub sampling: SamplingParams,
    /// Generate at most this many tokens; cut to what the context still holds. With 0 the prompt is
    /// computed (and scored) and nothing is drawn.
    pub max_tokens: usize,
    /// End after drawing any of these. The token is counted in the usage but not sent.
    pub stop_tokens: Vec<u32>,
    /// Go on past `stop_tokens`, to `max_tokens`.
    pub ignore_eos: bool,
    /// Report log-probabilities of the prompt's own tokens too (`echo` with `logprobs`). Such a
    /// prompt is computed afresh, without the prefix cache.
    pub prompt_logprobs: bool,
    /// What the generated tokens must match. Where it can only end, the sequence ends as with a stop
    /// token; where it leaves one way only and no log-probabilities are asked for, the tokens of
    /// that way come without a draw.
    pub grammar: Option<Arc<dyn Grammar>>,
    /// The most that it may reason.
    pub reasoning: Option<ReasoningBudget>,
    /// Stands for the API key that asks; none where there are none.
    pub owner: Option<Arc<str>>,
    /// The owner's share of service relative to others'; 1 is usual. It is the same in all requests of an
    /// owner.
    pub weight: u32,
    /// The conversation that it is a turn of. Keys of two owners never meet.
    pub session: Option<Arc<str>>,
    /// What the generated tokens are expected to be, or empty. It speeds them up where it is right
    /// and changes nothing about them.
    pub prediction: Arc<[u32]>,
    /// Urgency among the owner's own, lower is sooner; 0 is usual. Each step doubles or halves the share of
    /// service, from -3 to 3; above 0 other owners' go first too.
    pub priority: i32,
    /// Where it still waits then, it is dropped: [`Event::Expired`]. What has begun goes on.
    pub deadline: Option<Instant>,
}

impl GenerateRequest {
    /// A plain request of nobody in particular, for `max_tokens` tokens whatever they are.
    pub fn new(prompt: impl Into<Arc<[u32]>>, sampling: SamplingParams, max_tokens: usize) -> Self {
        Self {
            prompt: prompt.into(),
            sampling,
            max_tokens,
            stop_tokens: Vec::new(),
            ignore_eos: false,
            prompt_logprobs: false,
            grammar: None,
            reasoning: None,
            owner: None,
            weight: 1,
            session: None,
            prediction: Arc::from([]),
            priority: 0,
            deadline: None,
        }
    }

    /// Whom it works for, in the scheduler's terms.
    pub(crate) fn origin(&self) -> Origin {
        let hash = |key: &Arc<str>| BuildHasherDefault::<DefaultHasher>::default().hash_one(key);
        Origin {
            owner: self.owner.as_ref().map_or(0, hash),
            weight: self.weight,
            session: self.session.as_ref().map(hash),
            priority: self.priority,
        }
    }
}

/// A generated (or, with `prompt_logprobs`, scored) token.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Its log-probability, when asked for.
    pub logprob: Option<f32>,
    /// The most likely alternatives, best first, as many as asked for.
    pub top: Vec<TokenLogprob>,
}

/// Why a generation ended by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token was drawn, or the grammar has come to its end.
    Stop,
    /// `max_tokens` or the context length was reached.
    Length,
}

/// Where a generation's time went, and its counts.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    /// Prompt tokens.
    pub prompt_tokens: usize,
    /// Of these, found in the prefix cache.
    pub cached_tokens: usize,
    /// Tokens generated, a final stop token included.
    pub completion_tokens: usize,
    /// Tokens drafted, and of these accepted: drawn in a step with the token before them.
    pub drafted_tokens: usize,
    /// See `drafted_tokens`.
    pub accepted_tokens: usize,
    /// Tokens of [`GenerateRequest::prediction`] that came as predicted.
    pub predicted_tokens: usize,
    /// Those that did not.
    pub mispredicted_tokens: usize,
    /// Submission to first planned step.
    pub queue: Duration,
    /// First planned step to first token.
    pub prefill: Duration,
    /// First token to the end.
    pub decode: Duration,
}

/// What a [`crate::Generation`] yields. The last event is always `Finished`, `Failed` or `Expired`.
#[derive(Debug, Clone)]
pub enum Event {
    /// It waits; comes now and then.
    Queued {
        /// Its place in line, from 1 on. Others may pass it, and it others.
        position: usize,
    },
    /// Prefill went on: `done` of `total` prompt tokens are in the cache.
    Prefill {
        /// Prompt tokens computed or found.
        done: usize,
        /// Prompt tokens.
        total: usize,
        /// Of these, found in the prefix cache.
        cached: usize,
    },
    /// The prompt's own tokens, scored; comes once, before any `Token`. The first has no
    /// log-probability.
    Prompt(Vec<Token>),
    /// A token was drawn.
    Token(Token),
    /// The end.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Counts and times.
        usage: Usage,
    },
    /// The end, by a fault of ours; the message is fit for the client.
    Failed {
        /// What went wrong.
        message: String,
    },
    /// The end: its deadline passed while it waited.
    Expired {
        /// All of its time was spent in the queue.
        usage: Usage,
    },
}

impl Event {
    pub(crate) fn is_last(&self) -> bool {
        matches!(self, Self::Finished { .. } | Self::Failed { .. } | Self::Expired { .. })
    }
}

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The prompt is empty.
    #[error("the prompt is empty; send at least one token")]
    EmptyPrompt,
    /// A token id lies outside the vocabulary.
    #[error("token id {token} is outside the vocabulary of {vocab} tokens")]
    BadToken {
        /// The offending id.
        token: u32,
        /// Vocabulary size.
        vocab: usize,
    },
    /// The prompt leaves no room for an answer.
    #[error("prompt is too long: {tokens} tokens > {maximum} maximum")]
    TooLong {
        /// Prompt tokens.
        tokens: usize,
        /// Most that one sequence can hold, the answer's first token included.
        maximum: usize,
    },
    /// So many requests side by side never find places.
    #[error(
        "{count} answers are asked for at once, and at most {most} run and wait here; send fewer prompts or a smaller n"
    )]
    TooMany {
        /// Requests.
        count: usize,
        /// Most that can run and wait.
        most: usize,
    },
    /// The queue is full.
    #[error("the server is at capacity ({waiting} requests waiting); retry in {} s", retry_after.as_secs())]
    Busy {
        /// Requests waiting.
        waiting: usize,
        /// When to try again.
        retry_after: Duration,
    },
    /// The engine is draining or gone.
    #[error("the server is shutting down")]
    ShuttingDown,
}
