//! From prompt tokens to streamed text: the pipeline that every dialect and the terminal use.
//!
//! A [`Completion`] becomes one engine request per choice. [`Running`] joins their events,
//! detokenises, watches for stop strings, and hands out what is new as [`Delta`]s. Dropping it
//! cancels whatever still runs.

use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use rudder_engine::{Engine, GenerateRequest, ReasoningBudget, SamplingParams, SubmitError, Token, Usage};
use rudder_text::{CompiledGrammar, Text};

use crate::answer::{AnswerReader, Reading};
use crate::choice::Choice;
use crate::conversation::{Message, Piece};
use crate::grammar;
use crate::metrics::Metrics;
use crate::progress::Progress;
use crate::responses::store::StoreStats;
use crate::session::Origin;
use crate::urgency::Urgency;

/// What is to be generated, in no dialect's terms.
#[derive(Debug, Clone)]
pub struct Completion {
    /// Prompts in tokens; each is answered `n` times.
    pub prompts: Vec<Arc<[u32]>>,
    /// Choices for each prompt. Choice `i` draws with `sampling.seed + i`.
    pub n: usize,
    /// How to draw.
    pub sampling: SamplingParams,
    /// Most tokens of a choice; `None` is the rest of the context, 0 only reads the prompt.
    pub max_tokens: Option<usize>,
    /// Text is cut before the first of these, and its choice ends there.
    pub stop: Arc<[String]>,
    /// Tokens that end a choice: usually [`Text::stop_tokens`] and what the client adds.
    pub stop_tokens: Vec<u32>,
    /// Report the prompts' own log-probabilities.
    pub prompt_logprobs: bool,
    /// Report the ids of generated tokens.
    pub token_ids: bool,
    /// What generated tokens are held to.
    pub(crate) grammar: Option<Arc<CompiledGrammar>>,
    /// The most that each choice may reason.
    pub reasoning: Option<ReasoningBudget>,
    /// What the answers are expected to be, in tokens, or empty.
    pub prediction: Arc<[u32]>,
    /// Read the text as an answer: reasoning, text and calls.
    pub(crate) reading: Option<Arc<Reading>>,
    /// Whose it is.
    pub origin: Origin,
    /// How soon it is wanted.
    pub urgency: Urgency,
    /// When the request came in; times are measured from here.
    pub arrived: Instant,
}

impl Completion {
    /// A completion of no prompt yet, with default sampling, to the model's own end.
    pub fn new(text: &Text) -> Self {
        Self {
            prompts: Vec::new(),
            n: 1,
            sampling: SamplingParams::default(),
            max_tokens: None,
            stop: Arc::from([]),
            stop_tokens: text.stop_tokens().to_vec(),
            prompt_logprobs: false,
            token_ids: false,
            grammar: None,
            reasoning: None,
            prediction: Arc::from([]),
            reading: None,
            origin: Origin::default(),
            urgency: Urgency::default(),
            arrived: Instant::now(),
        }
    }
}

/// What is new in one choice.
#[derive(Debug, Default)]
pub struct Delta {
    /// Choice: prompt index times `n` plus the choice of that prompt.
    pub index: usize,
    /// Text to append; empty where it is read as an answer.
    pub text: String,
    /// Pieces of the answer to append.
    pub pieces: Vec<Piece>,
    /// With log-probabilities or token ids asked for, the tokens that the text is made of.
    pub tokens: Vec<Token>,
    /// With log-probabilities asked for, the tokens that texts of the answer are made of, with the indices of their
    /// pieces.
    pub text_tokens: Vec<(usize, Token)>,
    /// With prompt log-probabilities asked for, the prompt's tokens; comes once, first.
    pub prompt: Vec<Token>,
    /// Set in a choice's last delta.
    pub end: Option<End>,
}

impl Delta {
    pub(crate) fn is_empty(&self) -> bool {
        self.text.is_empty()
            && self.pieces.is_empty()
            && self.tokens.is_empty()
            && self.prompt.is_empty()
            && self.end.is_none()
    }

    pub(crate) fn clear(&mut self) {
        self.text.clear();
        self.pieces.clear();
        self.tokens.clear();
        self.text_tokens.clear();
        self.prompt.clear();
        self.end = None;
    }
}

/// Why and how a choice ended.
#[derive(Debug, Clone, PartialEq)]
pub struct End {
    /// Why.
    pub reason: EndReason,
    /// Counts and times.
    pub usage: Usage,
}

/// Why a choice ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EndReason {
    /// A stop token was drawn.
    StopToken,
    /// This stop string (its index in the request) came up.
    StopString(usize),
    /// The token limit or the context's end was reached.
    Length,
    /// It was ended from here, by [`Running::stop`].
    Stopped,
    /// The engine failed; the message is fit for the client.
    Failed(String),
    /// Its deadline passed while it waited.
    Expired,
}

impl EndReason {
    /// OpenAI's word for it.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::StopToken | Self::StopString(_) | Self::Stopped => "stop",
            Self::Length => "length",
            Self::Failed(_) => "error",
            Self::Expired => "expired",
        }
    }

    /// What its client is told in place of an answer, if there is none.
    pub fn failure(&self) -> Option<Failed> {
        match self {
            Self::Failed(message) => Some(Failed::Engine(message.clone())),
            Self::Expired => Some(Failed::Expired),
            Self::StopToken | Self::StopString(_) | Self::Stopped | Self::Length => None,
        }
    }
}

/// Why a completion has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failed {
    /// The engine failed; the message is fit for the client.
    #[error("{0}")]
    Engine(String),
    /// Its deadline passed first.
    #[error("the request's time was over before its turn came; nothing of it was computed")]
    Expired,
}

/// Tokens billed for a whole request: every prompt once, every choice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Prompt tokens.
    pub prompt_tokens: usize,
    /// Of these, found in the prefix cache.
    pub cached_tokens: usize,
    /// Tokens generated.
    pub completion_tokens: usize,
    /// Of these, spent on reasoning.
    pub reasoning_tokens: usize,
    /// Tokens drafted, and of these accepted.
    pub drafted_tokens: usize,
    /// See `drafted_tokens`.
    pub accepted_tokens: usize,
    /// Tokens of the prediction that came as predicted.
    pub predicted_tokens: usize,
    /// Those that did not.
    pub mispredicted_tokens: usize,
    /// The longest times of a choice: waiting, reading the prompt, generating.
    pub queue: Duration,
    /// See `queue`.
    pub prefill: Duration,
    /// See `queue`.
    pub decode: Duration,
}

/// Starts completions. Cheap to clone.
#[derive(Clone)]
pub struct Generator {
    text: Text,
    engine: Engine,
    metrics: Arc<Metrics>,
    /// Of owners whose share of service is not 1.
    weights: Arc<HashMap<Arc<str>, u32>>,
}

impl Generator {
    /// Joins a model's text with the engine that runs it; `model` labels the metrics.
    pub fn new(model: &str, text: Text, engine: Engine) -> Self {
        Self { text, engine, metrics: Arc::new(Metrics::new(model)), weights: Arc::default() }
    }

    /// The same, with these owners' shares of service; others have 1.
    pub(crate) fn with_weights(self, weights: HashMap<Arc<str>, u32>) -> Self {
        Self { weights: Arc::new(weights), ..self }
    }

    /// The model's text.
    pub fn text(&self) -> &Text {
        &self.text
    }

    /// The engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// What has been counted so far, in Prometheus' text format.
    pub(crate) fn metrics(&self, store: &StoreStats) -> String {
        self.metrics.render(&self.engine.stats(), store)
    }

    /// Counts the time that a stage of a conversation's preparation took.
    pub(crate) fn prepared(&self, stage: &str, took: Duration) {
        self.metrics.prepared(stage, took);
    }

    /// Queues every choice.
    ///
    /// # Errors
    /// See [`SubmitError`]; then nothing of this completion runs.
    pub fn start(&self, completion: &Completion) -> Result<Running, SubmitError> {
        let count = completion.prompts.len() * completion.n;
        self.engine.check_count(count)?;
        let mut choices = Vec::with_capacity(count);
        for prompt in &completion.prompts {
            for choice in 0..completion.n {
                let request = self.engine_request(completion, prompt, choice);
                let generation = self.engine.submit(request)?;
                let decoder = match &completion.reading {
                    Some(reading) => self.text.decoder_for(reading.format),
                    None => self.text.decoder(),
                };
                choices.push(Choice::new(
                    choices.len(),
                    generation,
                    decoder,
                    completion,
                    prompt.len(),
                    self.metrics.clone(),
                ));
            }
        }
        Ok(Running { choices, n: completion.n, prompts: completion.prompts.clone() })
    }

    /// An owner's share of service relative to others'.
    pub(crate) fn weight(&self, owner: Option<&Arc<str>>) -> u32 {
        owner.and_then(|owner| self.weights.get(owner)).copied().unwrap_or(1)
    }

    fn engine_request(&self, completion: &Completion, prompt: &Arc<[u32]>, choice: usize) -> GenerateRequest {
        let mut sampling = completion.sampling.clone();
        sampling.seed = sampling.seed.wrapping_add(choice as u64);
        let owner = completion.origin.owner.clone();
        GenerateRequest {
            prompt: prompt.clone(),
            sampling,
            max_tokens: completion.max_tokens.unwrap_or(usize::MAX),
            stop_tokens: completion.stop_tokens.clone(),
            ignore_eos: completion.stop_tokens.is_empty(),
            prompt_logprobs: completion.prompt_logprobs,
            grammar: completion.grammar.clone().map(grammar::for_engine),
            reasoning: completion.reasoning.clone(),
            weight: self.weight(owner.as_ref()),
            owner,
            session: completion.origin.session.clone(),
            prediction: completion.prediction.clone(),
            priority: completion.urgency.priority,
            deadline: completion.urgency.deadline,
        }
    }
}

/// A running completion. Dropping it cancels its choices.
pub struct Running {
    choices: Vec<Choice>,
    n: usize,
    prompts: Vec<Arc<[u32]>>,
}

impl Running {
    /// Waits until something is new, then takes everything that is there at once; see
    /// [`Running::deltas`]. Returns false when all choices have ended before. Cancel-safe.
    pub async fn advance(&mut self) -> bool {
        poll_fn(|cx| self.poll_advance(cx)).await
    }

    fn poll_advance(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        let (mut running, mut news) = (false, false);
        for choice in &mut self.choices {
            running |= choice.is_running();
            news |= choice.collect(cx);
        }
        match (running, news) {
            (_, true) => Poll::Ready(true),
            (true, false) => Poll::Pending,
            (false, false) => Poll::Ready(false),
        }
    }

    /// What the last [`Running::advance`] found, at most one for each choice.
    pub fn deltas(&self) -> impl Iterator<Item = &Delta> {
        self.choices.iter().map(Choice::delta).filter(|delta| !delta.is_empty())
    }

    /// A prompt's tokens.
    ///
    /// # Panics
    /// If there is no such prompt.
    pub fn prompt(&self, index: usize) -> &[u32] {
        &self.prompts[index]
    }

    /// Number of choices, over all prompts.
    pub fn choices(&self) -> usize {
        self.choices.len()
    }

    /// What each choice has said so far, where it is read as an answer.
    pub fn answers(&self) -> impl Iterator<Item = &Message> {
        self.choices.iter().filter_map(Choice::reader).map(AnswerReader::answer)
    }

    /// Ends every choice that still runs, at once. The next [`Running::advance`] finds what was held
    /// back, and their ends. What was said is remembered, so that a turn that goes on from it finds it
    /// in the prefix cache.
    pub fn stop(&mut self) {
        self.choices.iter_mut().for_each(Choice::stop);
    }

    /// The same for each choice where its text is next outside a call, however much has come by then: stopped
    /// within one, that would be cut short.
    pub fn stop_outside_calls(&mut self) {
        self.choices.iter_mut().for_each(Choice::stop_outside_calls);
    }

    /// How far it has come, while nothing was drawn; of several choices, the first that tells.
    pub fn progress(&self) -> Option<Progress> {
        self.choices.iter().filter(|_| self.is_silent()).find_map(Choice::progress)
    }

    /// Whether nothing was drawn yet.
    pub fn is_silent(&self) -> bool {
        self.choices.iter().all(Choice::is_silent)
    }

    /// Counts over all choices. A prompt's cached tokens are those of its first choice, as the
    /// others find what that one has just computed.
    pub fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        for (index, choice) in self.choices.iter().enumerate() {
            let usage = choice.usage();
            totals.reasoning_tokens += choice.reader().map_or(0, AnswerReader::reasoning_tokens);
            totals.completion_tokens += usage.completion_tokens;
            totals.drafted_tokens += usage.drafted_tokens;
            totals.accepted_tokens += usage.accepted_tokens;
            totals.predicted_tokens += usage.predicted_tokens;
            totals.mispredicted_tokens += usage.mispredicted_tokens;
            totals.queue = totals.queue.max(usage.queue);
            totals.prefill = totals.prefill.max(usage.prefill);
            totals.decode = totals.decode.max(usage.decode);
            if index % self.n == 0 {
                totals.prompt_tokens += usage.prompt_tokens;
                totals.cached_tokens += usage.cached_tokens;
            }
        }
        totals
    }

    /// Runs to the end and returns one whole delta for each choice.
    ///
    /// # Errors
    /// Why any choice has no answer; the others are then cancelled.
    pub async fn finish(&mut self) -> Result<Vec<Delta>, Failed> {
        let mut whole: Vec<Delta> =
            (0..self.choices.len()).map(|index| Delta { index, ..Delta::default() }).collect();
        while self.advance().await {
            for (choice, sum) in self.choices.iter_mut().zip(&mut whole) {
                let delta = choice.delta_mut();
                sum.text.push_str(&delta.text);
                sum.pieces.append(&mut delta.pieces);
                sum.tokens.append(&mut delta.tokens);
                sum.prompt.append(&mut delta.prompt);
                sum.end = delta.end.take().or(sum.end.take());
                if let Some(failure) = sum.end.as_ref().and_then(|end| end.reason.failure()) {
                    self.choices.clear();
                    return Err(failure);
                }
            }
        }
        Ok(whole)
    }
}
