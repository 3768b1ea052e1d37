//! The step loop: one thread that plans, runs the model, samples and delivers, step after step.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, mpsc};
use std::time::{Duration, Instant};

use rudder_model::Model;
use rudder_ops::{Batch, OpError, SampleRow, Sampled, TokenCounts};
use rudder_scheduler::{Chunk, Scheduler, SchedulerConfig, Sequence, SequenceId, StepPlan};
use tokio::sync::mpsc::UnboundedSender;

use crate::engine::{EngineConfig, Shared, Stats};
use crate::grammar::Next;
use crate::mask_workers::{MaskJob, MaskWorkers};
use crate::request::{Event, FinishReason, GenerateRequest, Token, Usage};

/// How long a step waits for grammars before it is planned. Most answer within it, and what they
/// force then goes through the model together with the token drawn last.
const GRAMMAR_PATIENCE: Duration = Duration::from_micros(200);

const _: () = assert!(rudder_ops::BLOCK_SIZE == rudder_scheduler::BLOCK_SIZE);

/// What handles tell the loop.
pub(crate) enum Command {
    Submit(Box<Submission>),
    Cancel(SequenceId),
    Stop,
}

/// A checked request on its way to the loop.
pub(crate) struct Submission {
    pub(crate) id: SequenceId,
    pub(crate) request: GenerateRequest,
    /// `request.max_tokens`, cut to what the context holds.
    pub(crate) max_tokens: usize,
    pub(crate) events: UnboundedSender<Event>,
    pub(crate) submitted: Instant,
}

/// A live sequence, beside what the scheduler knows of it.
struct Active {
    submission: Submission,
    counts: Option<TokenCounts>,
    grammar: Option<Held>,
    /// Prompt tokens scored so far, when asked for.
    scores: Vec<Token>,
    generated: usize,
    cached: Option<usize>,
    planned: Option<Instant>,
    first_token: Option<Instant>,
}

/// Where a sequence's state in its grammar is.
enum Held {
    /// Here, its answer about the next token ready.
    Here(Box<MaskJob>),
    /// With a worker.
    Away,
}

/// See the module.
pub(crate) struct StepLoop {
    model: Box<dyn Model>,
    scheduler: Scheduler,
    commands: mpsc::Receiver<Command>,
    shared: Arc<Shared>,
    active: HashMap<SequenceId, Active>,
    masks: MaskWorkers,
    stats: Stats,
    // Reused from step to step, so that a step allocates nothing of its own.
    plan: StepPlan,
    batch: Batch,
    rows: Vec<SampleRow<'static>>,
    sampled: Vec<Sampled>,
}

impl StepLoop {
    pub(crate) fn new(
        model: Box<dyn Model>,
        config: &EngineConfig,
        commands: mpsc::Receiver<Command>,
        shared: Arc<Shared>,
    ) -> Self {
        let scheduler = Scheduler::new(SchedulerConfig {
            blocks: config.kv_blocks,
            max_sequences: config.max_sequences,
            max_batch_tokens: config.max_batch_tokens,
            prefix_cache: config.prefix_cache,
        });
        Self {
            model,
            scheduler,
            commands,
            shared,
            active: HashMap::new(),
            masks: MaskWorkers::start(),
            stats: Stats::default(),
            plan: StepPlan::default(),
            batch: Batch::default(),
            rows: Vec::new(),
            sampled: Vec::new(),
        }
    }

    /// Longest sequence that the KV pool holds, in tokens.
    pub(crate) fn max_tokens(&self) -> usize {
        self.scheduler.max_tokens()
    }

    /// Runs until told to stop or until nobody holds a handle any more.
    pub(crate) fn run(mut self) {
        while self.take_commands() {
            self.step();
            self.publish_stats();
        }
        let ids: Vec<SequenceId> = self.active.keys().copied().collect();
        for id in ids {
            self.fail(id, "the server is shutting down");
        }
        self.publish_stats();
    }

    /// Takes all commands that are there; when idle, waits for one. False means stop.
    fn take_commands(&mut self) -> bool {
        loop {
            let command = if self.active.is_empty() {
                self.check_idle();
                self.publish_stats();
                match self.commands.recv() {
                    Ok(command) => command,
                    Err(mpsc::RecvError) => return false,
                }
            } else {
                match self.commands.try_recv() {
                    Ok(command) => command,
                    Err(mpsc::TryRecvError::Empty) => return true,
                    Err(mpsc::TryRecvError::Disconnected) => return false,
                }
            };
            match command {
                Command::Submit(submission) => self.submit(*submission),
                Command::Cancel(id) => drop(self.end(id)),
                Command::Stop => return false,
            }
        }
    }

    /// With nothing live, every block must be free or cached.
    fn check_idle(&self) {
        let used = self.scheduler.counts().used;
        debug_assert_eq!(used, 0, "KV blocks leaked");
        if used != 0 {
            tracing::error!(used, "KV blocks are held although nothing runs; please report this defect");
        }
    }

    fn submit(&mut self, submission: Submission) {
        let request = &submission.request;
        self.scheduler.add(submission.id, request.prompt.to_vec(), request.prompt_logprobs);
        let counts = request.sampling.needs_counts().then(|| TokenCounts::of_prompt(&request.prompt));
        let id = submission.id;
        let grammar = request.grammar.clone().filter(|_| submission.max_tokens > 0).map(|grammar| {
            let jump = request.sampling.logprobs.is_none();
            self.masks.send(Box::new(MaskJob::new(id, grammar, jump, self.model.config().vocab)));
            Held::Away
        });
        let active = Active {
            submission,
            counts,
            grammar,
            scores: Vec::new(),
            generated: 0,
            cached: None,
            planned: None,
            first_token: None,
        };
        self.active.insert(id, active);
    }

    fn step(&mut self) {
        self.follow_grammars();
        let mut plan = std::mem::take(&mut self.plan);
        self.scheduler.plan(&mut plan);
        if !plan.chunks.is_empty() {
            self.run_plan(&plan);
        }
        self.plan = plan;
    }

    fn run_plan(&mut self, plan: &StepPlan) {
        self.note_admissions(plan);
        self.fill_batch(plan);
        match self.compute(plan) {
            Ok(()) => {
                self.scheduler.commit(plan);
                self.deliver(plan);
            }
            Err(message) => {
                tracing::error!(message, sequences = plan.chunks.len(), "a step failed");
                for chunk in &plan.chunks {
                    self.fail(chunk.id, &message);
                }
            }
        }
        self.stats.steps += 1;
    }

    fn note_admissions(&mut self, plan: &StepPlan) {
        self.stats.preemptions += plan.preempted.len() as u64;
        let now = Instant::now();
        for (id, cached) in &plan.admitted {
            let Some(active) = self.active.get_mut(id) else { continue };
            if active.planned.is_none() {
                active.planned = Some(now);
                active.cached = Some(*cached);
                self.stats.prompt_tokens += active.submission.request.prompt.len() as u64;
            }
        }
    }

    fn fill_batch(&mut self, plan: &StepPlan) {
        self.batch.clear();
        for &Chunk { id, start, len, outputs } in &plan.chunks {
            let Some(sequence) = self.scheduler.sequence(id) else { continue };
            self.batch.push(&sequence.tokens[start..start + len], start, &sequence.blocks, outputs);
        }
    }

    /// Runs the model and the sampler over the batch; a panic in either is this step's fault only.
    fn compute(&mut self, plan: &StepPlan) -> Result<(), String> {
        let (model, batch) = (&mut self.model, &self.batch);
        guarded(|| model.forward(batch))?;
        self.await_masks(plan);
        let mut rows = recycle(std::mem::take(&mut self.rows));
        for chunk in plan.chunks.iter().filter(|c| c.outputs > 0) {
            let (Some(sequence), Some(active)) =
                (self.scheduler.sequence(chunk.id), self.active.get(&chunk.id))
            else {
                continue;
            };
            let end = chunk.start + chunk.len;
            rows.extend((end - chunk.outputs..end).map(|at| sample_row(sequence, active, at + 1)));
        }
        let (model, sampled, wanted) = (&mut self.model, &mut self.sampled, rows.len());
        sampled.clear();
        let outcome = if rows.is_empty() { Ok(()) } else { guarded(|| model.sample(&rows, sampled)) };
        self.rows = recycle(rows);
        match outcome {
            Ok(()) if self.sampled.len() != wanted => Err("the sampler did not answer every row".into()),
            outcome => outcome,
        }
    }

    /// Hands out what the step drew, in batch order.
    fn deliver(&mut self, plan: &StepPlan) {
        let mut sampled = std::mem::take(&mut self.sampled);
        let mut drawn = sampled.drain(..);
        for chunk in &plan.chunks {
            self.report_prefill(chunk);
            let end = chunk.start + chunk.len;
            for position in end - chunk.outputs + 1..=end {
                if let Some(one) = drawn.next() {
                    self.deliver_one(chunk.id, position, one);
                }
            }
        }
        drop(drawn);
        self.sampled = sampled;
    }

    fn report_prefill(&mut self, chunk: &Chunk) {
        let Some(active) = self.active.get(&chunk.id) else { return };
        let total = active.submission.request.prompt.len();
        if active.first_token.is_none() {
            let done = (chunk.start + chunk.len).min(total);
            // A receiver that is gone has a cancellation on its way.
            let _ = active.submission.events.send(Event::Prefill { done, total });
        }
    }

    /// Hands out the token at `position` of a sequence: a score within its prompt, or a new token.
    fn deliver_one(&mut self, id: SequenceId, position: usize, sampled: Sampled) {
        let Some(active) = self.active.get_mut(&id) else { return };
        if let Some(fault) = sampled.fault {
            return self.fail(id, fault);
        }
        let token = Token { id: sampled.token, logprob: sampled.logprob, top: sampled.top };
        if active.is_scoring() {
            let prompt = &active.submission.request.prompt;
            if position < prompt.len() {
                active.scores.truncate(position - 1); // a preempted prompt is scored again from its start
                active.scores.push(token);
                return;
            }
            let first = Token { id: prompt[0], logprob: None, top: Vec::new() };
            let scores = std::iter::once(first).chain(active.scores.drain(..)).collect();
            let _ = active.submission.events.send(Event::Prompt(scores));
        }
        active.first_token.get_or_insert_with(Instant::now);
        if active.submission.max_tokens == 0 {
            return self.finish(id, FinishReason::Length);
        }
        let token_id = token.id;
        if self.follow_grammar(id) && self.take_token(id, token) {
            self.send_to_grammar(id, token_id);
        }
    }

    /// A token was drawn or forced for a sequence: it grows, or ends. Returns whether it goes on.
    fn take_token(&mut self, id: SequenceId, token: Token) -> bool {
        let Some(active) = self.active.get_mut(&id) else { return false };
        self.stats.generation_tokens += 1;
        active.generated += 1;
        if let Some(counts) = &mut active.counts {
            counts.add(token.id);
        }
        let request = &active.submission.request;
        if !request.ignore_eos && request.stop_tokens.contains(&token.id) {
            self.finish(id, FinishReason::Stop);
            return false;
        }
        let token_id = token.id;
        let _ = active.submission.events.send(Event::Token(token));
        if active.generated >= active.submission.max_tokens {
            self.finish(id, FinishReason::Length);
            return false;
        }
        self.scheduler.append(id, token_id);
        true
    }

    /// Before a step is planned: hears the grammars that have an answer by now, so that forced
    /// tokens are part of this step and sequences at their end are not.
    fn follow_grammars(&mut self) {
        let deadline = Instant::now() + GRAMMAR_PATIENCE;
        while let Some(job) = self.masks.take(Some(deadline)) {
            let id = job.id;
            let started = self.put_back(job);
            if started {
                self.follow_grammar(id);
            }
        }
    }

    /// Before the sampler: waits for the masks of all rows.
    fn await_masks(&mut self, plan: &StepPlan) {
        for chunk in plan.chunks.iter().filter(|c| c.outputs > 0) {
            while matches!(self.active.get(&chunk.id), Some(Active { grammar: Some(Held::Away), .. })) {
                let Some(job) = self.masks.take(None) else { break };
                self.put_back(job);
            }
        }
    }

    /// Takes a job back to its sequence, if that is still there. Returns whether the sequence has
    /// begun to generate.
    fn put_back(&mut self, job: Box<MaskJob>) -> bool {
        let Some(active) = self.active.get_mut(&job.id) else { return false };
        active.grammar = Some(Held::Here(job));
        active.first_token.is_some()
    }

    /// Does what a sequence's grammar asks for without a draw: forced tokens, the end, or failure.
    /// Returns whether a token drawn now is wanted.
    fn follow_grammar(&mut self, id: SequenceId) -> bool {
        let Some(Active { grammar: Some(Held::Here(job)), .. }) = self.active.get_mut(&id) else {
            return true;
        };
        let next = std::mem::replace(&mut job.next, Ok(Next::Draw));
        let mut forced = std::mem::take(&mut job.forced);
        let jumped = !forced.is_empty();
        let goes_on = next.is_err()
            || forced
                .drain(..)
                .all(|id_| self.take_token(id, Token { id: id_, logprob: None, top: Vec::new() }));
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

    /// Sends a sequence's grammar on its way past a drawn token.
    fn send_to_grammar(&mut self, id: SequenceId, token: u32) {
        let Some(active) = self.active.get_mut(&id) else { return };
        if let Some(Held::Here(mut job)) = active.grammar.take_if(|held| matches!(held, Held::Here(_))) {
            job.token = Some(token);
            active.grammar = Some(Held::Away);
            self.masks.send(job);
        }
    }

    fn finish(&mut self, id: SequenceId, reason: FinishReason) {
        if let Some(active) = self.end(id) {
            let _ = active.submission.events.send(Event::Finished { reason, usage: active.usage() });
        }
    }

    fn fail(&mut self, id: SequenceId, message: &str) {
        if let Some(active) = self.end(id) {
            let _ = active.submission.events.send(Event::Failed { message: message.into() });
        }
    }

    /// Forgets a sequence, however it ended; unknown ids are fine. Its place and its blocks are
    /// free before its client hears of the end, who may send the next request at once.
    fn end(&mut self, id: SequenceId) -> Option<Active> {
        self.scheduler.remove(id);
        let active = self.active.remove(&id)?;
        let ms = active.submission.submitted.elapsed().as_millis() as u64;
        let mean = self.shared.mean_request_ms.load(Ordering::Relaxed);
        let mean = if mean == 0 { ms } else { (mean * 7 + ms) / 8 };
        self.shared.mean_request_ms.store(mean, Ordering::Relaxed);
        self.shared.in_flight.fetch_sub(1, Ordering::AcqRel);
        Some(active)
    }

    fn publish_stats(&mut self) {
        let (blocks, prefix) = (self.scheduler.counts(), self.scheduler.prefix_stats());
        let stats = &mut self.stats;
        stats.running = self.scheduler.running();
        stats.kv_blocks = blocks.used + blocks.cached + blocks.free;
        stats.kv_blocks_used = blocks.used;
        stats.kv_blocks_cached = blocks.cached;
        stats.kv_blocks_free = blocks.free;
        stats.prefix_queries = prefix.queries;
        stats.prefix_hits = prefix.hits;
        *self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner) = *stats;
    }
}

impl Active {
    /// Whether its prompt is still being scored.
    fn is_scoring(&self) -> bool {
        self.submission.request.prompt_logprobs && self.first_token.is_none()
    }

    /// The mask for a token drawn now. None where the grammar does without a draw.
    fn mask(&self) -> Option<&[u32]> {
        match &self.grammar {
            Some(Held::Here(job)) if job.next == Ok(Next::Draw) && job.forced.is_empty() => Some(&job.mask),
            _ => None,
        }
    }

    fn usage(&self) -> Usage {
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

/// What the sampler needs for the token at `position` of a sequence.
fn sample_row<'a>(sequence: &'a Sequence, active: &'a Active, position: usize) -> SampleRow<'a> {
    SampleRow {
        params: &active.submission.request.sampling,
        counts: active.counts.as_ref(),
        position: position as u64,
        mask: active.mask(),
        forced: if active.is_scoring() { sequence.tokens.get(position).copied() } else { None },
    }
}

/// Runs the model, which may fail or panic; the message is fit for the client.
fn guarded(work: impl FnOnce() -> Result<(), OpError>) -> Result<(), String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(outcome) => outcome.map_err(|error| format!("the model failed: {error}")),
        Err(_) => Err("the model failed unexpectedly".into()),
    }
}

/// An emptied vector's memory under another lifetime: collecting in place keeps the allocation.
fn recycle<'a>(mut rows: Vec<SampleRow<'_>>) -> Vec<SampleRow<'a>> {
    rows.clear();
    rows.into_iter().map(|_| unreachable!("the vector is empty")).collect()
}
