//! The handle to a running step loop: submission, admission limits, statistics, shutdown.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use rudder_model::Model;
use rudder_ops::TokenCounts;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::sync::watch;

use crate::draft::MAX_DRAFT;
use crate::draft_model::DraftModel;
use crate::places::Places;
use crate::request::{Event, GenerateRequest, SubmitError};
use crate::sessions::SessionStats;
use crate::step_loop::{Command, StepLoop, Submission};
use crate::tier::{DiskTier, TierStats, TierWatch};

/// How long a shutdown waits for KV blocks on their way to disk.
const WRITE_PATIENCE: Duration = Duration::from_secs(2);

/// How an engine is set up.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// KV blocks in the pool.
    pub kv_blocks: usize,
    /// Longest sequence, prompt and answer together, in tokens.
    pub max_context: usize,
    /// Most sequences running at once; also the most output rows of a step.
    pub max_sequences: usize,
    /// Most tokens computed in one step.
    pub max_batch_tokens: usize,
    /// How long a step with decodes may take; the prefill beside them is cut to that.
    pub decode_latency_target: Duration,
    /// Most requests waiting before new ones are turned away.
    pub max_waiting: usize,
    /// Keep finished sequences' blocks for later requests that begin alike.
    pub prefix_cache: bool,
    /// Where drafts come from.
    pub draft: DraftMode,
}

impl EngineConfig {
    /// Most requests that run and wait.
    fn places(&self) -> usize {
        self.max_sequences + self.max_waiting
    }
}

/// Where drafted tokens come from (speculative decoding). Answers are the same with and without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DraftMode {
    /// Nowhere.
    Off,
    /// What followed the same tokens earlier in the sequence, in its predicted output, or in what its
    /// owner's other requests (without owners, its session's) were answered.
    Lookup,
}

impl DraftMode {
    /// Most drafted tokens of a step: rows of logits that the model needs beside one for each
    /// running sequence.
    pub fn max_drafted(self) -> usize {
        match self {
            Self::Off => 0,
            Self::Lookup => 64,
        }
    }
}

/// Counters since the start, and gauges now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Sequences running.
    pub running: usize,
    /// Requests waiting.
    pub waiting: usize,
    /// KV blocks in the pool.
    pub kv_blocks: usize,
    /// Blocks held by running sequences.
    pub kv_blocks_used: usize,
    /// Unheld blocks that the prefix tree keeps for reuse.
    pub kv_blocks_cached: usize,
    /// Blocks holding nothing. used + cached + free = all.
    pub kv_blocks_free: usize,
    /// Steps run.
    pub steps: u64,
    /// Prompt tokens of admitted requests.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub generation_tokens: u64,
    /// Tokens looked up in the prefix tree.
    pub prefix_queries: u64,
    /// Of these, found.
    pub prefix_hits: u64,
    /// Sequences preempted because blocks ran out.
    pub preemptions: u64,
    /// Sessions, and what is kept for them.
    pub sessions: SessionStats,
    /// The tier on disk; all zero without one.
    pub tier: TierStats,
    /// Drafts that were run, and the tokens in them.
    pub drafts: u64,
    /// See `drafts`.
    pub drafted_tokens: u64,
    /// Drafted tokens accepted, by their place in the draft.
    pub accepted_at: [u64; MAX_DRAFT],
    /// Of these three, what came from the draft model; none where there was none from the start.
    pub model_drafts: Option<DraftCounts>,
}

/// Drafts of one source.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DraftCounts {
    /// Drafts that were run.
    pub drafts: u64,
    /// Tokens in them.
    pub tokens: u64,
    /// Tokens accepted, by their place in the draft.
    pub accepted_at: [u64; MAX_DRAFT],
}

impl Stats {
    /// Drafts that were copied.
    pub fn copies(&self) -> DraftCounts {
        let model = self.model_drafts.unwrap_or_default();
        let mut accepted_at = self.accepted_at;
        accepted_at.iter_mut().zip(model.accepted_at).for_each(|(all, model)| *all -= model);
        let (drafts, tokens) = (self.drafts - model.drafts, self.drafted_tokens - model.tokens);
        DraftCounts { drafts, tokens, accepted_at }
    }
}

/// What the handle and the step loop both see.
pub(crate) struct Shared {
    pub(crate) stats: Mutex<Stats>,
    /// Requests submitted and not yet ended.
    pub(crate) places: Places,
    /// Moving average of a request's time from submission to end, in milliseconds.
    pub(crate) mean_request_ms: AtomicU64,
    /// Why nothing can be computed any more, once that is so.
    pub(crate) broken: watch::Sender<Option<String>>,
    /// Whether nothing new is taken.
    pub(crate) draining: AtomicBool,
    next_id: AtomicU64,
}

/// A handle to a running engine. Cheap to clone; all clones drive the same step loop, which ends
/// when the last clone and the last [`Generation`] are gone.
#[derive(Clone)]
pub struct Engine {
    pub(crate) commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
    config: Arc<EngineConfig>,
    pub(crate) tier: Option<TierWatch>,
    vocab: usize,
    max_context: usize,
}

impl Engine {
    /// Starts the step loop on a thread of its own.
    ///
    /// # Panics
    /// If the configuration holds no room for one token of every running sequence, or the system
    /// refuses a thread.
    pub fn start(model: Box<dyn Model>, config: EngineConfig) -> Self {
        Self::start_with(model, config, None)
    }

    /// As [`Self::start`], with a tier for KV blocks on disk, which was opened for this model.
    ///
    /// # Panics
    /// As [`Self::start`].
    pub fn start_with(model: Box<dyn Model>, config: EngineConfig, tier: Option<DiskTier>) -> Self {
        Self::start_drafting(model, config, tier, None)
    }

    /// As [`Self::start_with`], with a draft model of the same vocabulary, which is of no use where drafts are off.
    /// Its steps are measured first. If it fails, now or later, the engine warns once and goes on without it.
    ///
    /// # Panics
    /// As [`Self::start`].
    pub fn start_drafting(
        model: Box<dyn Model>,
        config: EngineConfig,
        tier: Option<DiskTier>,
        draft: Option<DraftModel>,
    ) -> Self {
        let vocab = model.config().vocab;
        let shared = Arc::new(Shared {
            stats: Mutex::new(Stats {
                kv_blocks: config.kv_blocks,
                kv_blocks_free: config.kv_blocks,
                ..Stats::default()
            }),
            places: Places::new(config.places()),
            mean_request_ms: AtomicU64::new(0),
            broken: watch::Sender::new(None),
            draining: AtomicBool::new(false),
            next_id: AtomicU64::new(0),
        });
        let (commands, receiver) = mpsc::channel();
        let watch = tier.as_ref().map(DiskTier::watch);
        let step_loop = StepLoop::new(model, &config, tier, draft, receiver, shared.clone());
        let max_context = config.max_context.min(step_loop.max_tokens());
        std::thread::Builder::new()
            .name("rudder-step-loop".into())
            .spawn(move || step_loop.run())
            .expect("the system can start a thread");
        Self { commands, shared, config: Arc::new(config), tier: watch, vocab, max_context }
    }

    /// Checks that so many requests could be queued side by side, if nothing else ran.
    ///
    /// # Errors
    /// [`SubmitError::TooMany`], if they never could.
    pub fn check_count(&self, count: usize) -> Result<(), SubmitError> {
        let most = self.config.places();
        if count > most { Err(SubmitError::TooMany { count, most }) } else { Ok(()) }
    }

    /// Queues a request. Returns at once; never blocks on the step loop.
    ///
    /// # Errors
    /// See [`SubmitError`]; nothing was queued then.
    pub fn submit(&self, request: GenerateRequest) -> Result<Generation, SubmitError> {
        self.check(&request)?;
        self.take_place(&request)?;
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let (events, receiver) = unbounded_channel();
        let max_tokens = request.max_tokens.min(self.max_context - request.prompt.len());
        let submitted = Instant::now();
        let submission = Submission {
            id,
            tokens: request.prompt.to_vec(),
            counts: request.sampling.needs_counts().then(|| TokenCounts::of_prompt(&request.prompt)),
            keys: self.tier.as_ref().map_or_else(Vec::new, |tier| tier.keys(&request.prompt)),
            request,
            max_tokens,
            events,
            submitted,
        };
        if let Err(mpsc::SendError(refused)) = self.commands.send(Command::Submit(Box::new(submission))) {
            if let Command::Submit(submission) = refused {
                self.shared.places.give_back(&submission.request.owner);
            }
            return Err(SubmitError::ShuttingDown);
        }
        Ok(Generation { id, events: receiver, ended: false, commands: self.commands.clone() })
    }

    /// Longest sequence, prompt and answer together: the configured context, or less if the KV
    /// pool holds less.
    pub fn max_context(&self) -> usize {
        self.max_context
    }

    /// The configuration in force.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Vocabulary size of the model.
    pub fn vocab_size(&self) -> usize {
        self.vocab
    }

    /// A snapshot of the engine's counters and gauges.
    pub fn stats(&self) -> Stats {
        let mut stats = *self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner);
        // Counted from submission on, also while the step loop has not seen them yet.
        stats.waiting = self.shared.places.taken().saturating_sub(stats.running);
        if let Some(tier) = &self.tier {
            tier.complete(&mut stats.tier);
        }
        stats
    }

    /// Waits until nothing can be computed any more, if ever, and says why: the model can be used no more, or the step loop
    /// panicked. What ran has failed then, and nothing new is taken.
    pub async fn broken(&self) -> String {
        let mut broken = self.shared.broken.subscribe();
        match broken.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(reason)) => reason.clone(),
            // The sender is this handle's own, and what was waited for is there.
            _ => std::future::pending().await,
        }
    }

    /// Takes nothing new, waits until everything running has ended or `grace` is over, then
    /// fails what is left and stops the step loop. Returns whether all ended by themselves.
    pub async fn shutdown(&self, grace: Duration) -> bool {
        const POLL: Duration = Duration::from_millis(10);
        self.shared.draining.store(true, Ordering::Release);
        let idle = || self.shared.places.taken() == 0;
        let deadline = Instant::now() + grace;
        while !idle() && Instant::now() < deadline {
            tokio::time::sleep(POLL).await;
        }
        let drained = idle();
        let deadline = Instant::now() + WRITE_PATIENCE;
        while drained
            && self.tier.as_ref().is_some_and(|tier| !tier.is_written())
            && Instant::now() < deadline
        {
            tokio::time::sleep(POLL).await;
        }
        // A closed channel means that the loop has ended already.
        let _ = self.commands.send(Command::Stop);
        drained
    }

    fn check(&self, request: &GenerateRequest) -> Result<(), SubmitError> {
        if self.shared.draining.load(Ordering::Acquire) {
            return Err(SubmitError::ShuttingDown);
        }
        if request.prompt.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        if request.prompt.len() >= self.max_context {
            return Err(SubmitError::TooLong { tokens: request.prompt.len(), maximum: self.max_context });
        }
        // The greatest is found faster in a long prompt than the first that is too great.
        let greatest = request.prompt.iter().copied().max().max(request.prediction.iter().copied().max());
        match greatest {
            Some(token) if token as usize >= self.vocab => {
                Err(SubmitError::BadToken { token, vocab: self.vocab })
            }
            _ => Ok(()),
        }
    }

    /// Counts a request in, unless as many run and wait as may.
    fn take_place(&self, request: &GenerateRequest) -> Result<(), SubmitError> {
        if self.shared.places.take(&request.owner, request.weight) {
            return Ok(());
        }
        let waiting = self.shared.places.taken().saturating_sub(self.config.max_sequences);
        let mean = self.shared.mean_request_ms.load(Ordering::Relaxed);
        // Places free up max_sequences at a time, one mean request time apart.
        let seconds = (mean / 1000).clamp(1, 60);
        Err(SubmitError::Busy { waiting, retry_after: Duration::from_secs(seconds) })
    }
}

/// A running generation. Dropping it cancels: its blocks are free within one step.
pub struct Generation {
    id: u64,
    events: UnboundedReceiver<Event>,
    /// Whether the last event was taken.
    ended: bool,
    commands: mpsc::Sender<Command>,
}

impl Generation {
    /// The next event; `None` after the last one.
    pub async fn next(&mut self) -> Option<Event> {
        let event = self.events.recv().await;
        self.until_the_last(event)
    }

    /// The next event from a thread that is not in an async runtime.
    pub fn next_blocking(&mut self) -> Option<Event> {
        let event = self.events.blocking_recv();
        self.until_the_last(event)
    }

    /// A request that was sent while the step loop ended is told so here, as the loop never saw it.
    fn until_the_last(&mut self, event: Option<Event>) -> Option<Event> {
        if event.is_none() && !self.ended {
            self.ended = true;
            return Some(Event::Failed { message: SubmitError::ShuttingDown.to_string() });
        }
        self.ended |= event.as_ref().is_some_and(Event::is_last);
        event
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        // Cancelling what has ended already is harmless, and a closed channel has nothing to cancel.
        let _ = self.commands.send(Command::Cancel(self.id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_that_the_ending_step_loop_never_saw_is_told_so_once() {
        let (events, receiver) = unbounded_channel();
        let commands = mpsc::channel().0;
        let mut generation = Generation { id: 0, events: receiver, ended: false, commands };
        drop(events);
        let Some(Event::Failed { message }) = generation.next_blocking() else { panic!("no last event") };
        assert_eq!(message, "the server is shutting down");
        assert!(generation.next_blocking().is_none());
    }

    #[test]
    fn nothing_follows_the_last_event() {
        let (events, receiver) = unbounded_channel();
        let commands = mpsc::channel().0;
        let mut generation = Generation { id: 0, events: receiver, ended: false, commands };
        events.send(Event::Expired { usage: crate::Usage::default() }).unwrap();
        drop(events);
        assert!(matches!(generation.next_blocking(), Some(Event::Expired { .. })));
        assert!(generation.next_blocking().is_none());
    }
}
