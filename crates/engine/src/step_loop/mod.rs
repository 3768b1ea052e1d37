//! The step loop: one thread that plans, runs the model, samples and delivers, step after step.

mod active;
mod ahead;
pub(crate) mod compute;
mod deliver;
mod drafts;
mod grammars;
mod model_drafts;
mod sessions;
mod tier;
mod waiting;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, mpsc};
use std::time::{Duration, Instant};

use rudder_kvstore::BlockKey;
use rudder_model::Model;
use rudder_ops::{Batch, SampleRow, Sampled, SamplingParams, TokenCounts};
use rudder_scheduler::{Pace, Policy, Scheduler, SchedulerConfig, SequenceId, StepPlan};
use tokio::sync::mpsc::UnboundedSender;

use self::active::Active;
use self::ahead::Flight;
use self::compute::guarded;
use self::sessions::Sessions;
use crate::draft::{Drafting, ModelDrafter};
use crate::draft_model::DraftModel;
use crate::engine::{DraftCounts, DraftMode, EngineConfig, Shared, Stats};
use crate::mask_workers::MaskWorkers;
use crate::reasoning::Reasoning;
use crate::request::{Event, GenerateRequest};
use crate::tier::DiskTier;

const _: () = assert!(rudder_ops::BLOCK_SIZE == rudder_scheduler::BLOCK_SIZE);

/// Most prompt tokens of requests that are taken in between two steps, and what a short prompt counts as: to look them
/// up in the prefix cache takes a few milliseconds, for which those that run would wait.
const MOST_ARRIVING: usize = 32 * 1024;
const LEAST_ARRIVING: usize = 512;

/// What handles tell the loop.
pub(crate) enum Command {
    Submit(Box<Submission>),
    Cancel(SequenceId),
    Do(Errand),
    Stop,
}

/// What is done between two steps, one at a time while anybody waits for tokens. Returns whether there was anything to
/// do: whoever asked a question may be gone.
pub(crate) type Errand = Box<dyn FnOnce(&mut StepLoop) -> bool + Send>;

/// A checked request on its way to the loop, with what its thread could make of it.
pub(crate) struct Submission {
    pub(crate) id: SequenceId,
    pub(crate) request: GenerateRequest,
    /// A copy of the prompt, which the scheduler takes.
    pub(crate) tokens: Vec<u32>,
    /// Of the prompt, where they are needed.
    pub(crate) counts: Option<TokenCounts>,
    /// The names of the prompt's blocks, where there is a tier on disk.
    pub(crate) keys: Vec<BlockKey>,
    /// `request.max_tokens`, cut to what the context holds.
    pub(crate) max_tokens: usize,
    pub(crate) events: UnboundedSender<Event>,
    pub(crate) submitted: Instant,
}

/// See the module.
pub(crate) struct StepLoop {
    model: Box<dyn Model>,
    scheduler: Scheduler,
    commands: mpsc::Receiver<Command>,
    /// Requests that came and are not yet taken in.
    arrived: VecDeque<Box<Submission>>,
    /// Taken and not yet done.
    errands: VecDeque<Errand>,
    shared: Arc<Shared>,
    active: HashMap<SequenceId, Active>,
    masks: MaskWorkers,
    tier: Option<DiskTier>,
    sessions: Sessions,
    /// Absent when drafts are off.
    drafting: Option<Drafting>,
    /// Absent without a draft model, and when it has failed.
    model_drafter: Option<Box<ModelDrafter>>,
    stats: Stats,
    pace: Pace,
    /// Of live requests that have one.
    deadlines: BTreeSet<(Instant, SequenceId)>,
    /// When those that wait were last told where they stand.
    reported: Instant,
    /// The step whose forward pass was queued and that has not landed.
    flight: Option<Flight>,
    /// Whether something came or went since the last full plan.
    disturbed: bool,
    /// Why the model can be used no more.
    broken: Option<String>,
    // Reused from step to step, so that a step allocates nothing of its own.
    plan: StepPlan,
    /// What is queued behind the step in flight.
    next: StepPlan,
    batch: Batch,
    chunk: Vec<u32>,
    rows: Vec<SampleRow<'static>>,
    /// How to draw for sequences that are gone.
    nobodys: SamplingParams,
    sampled: Vec<Sampled>,
}

impl StepLoop {
    pub(crate) fn new(
        model: Box<dyn Model>,
        config: &EngineConfig,
        tier: Option<DiskTier>,
        draft: Option<DraftModel>,
        commands: mpsc::Receiver<Command>,
        shared: Arc<Shared>,
    ) -> Self {
        let mut scheduler = Scheduler::new(SchedulerConfig {
            blocks: config.kv_blocks,
            max_sequences: config.max_sequences,
            max_batch_tokens: config.max_batch_tokens,
            max_drafted: config.draft.max_drafted(),
            prefix_cache: config.prefix_cache,
            policy: Policy::Fair,
        });
        let mut sessions = Sessions::new();
        if let Some(tier) = &tier {
            sessions.restore(&mut scheduler, tier);
        }
        let draft = draft.filter(|_| config.draft == DraftMode::Lookup);
        let stats =
            Stats { model_drafts: draft.as_ref().map(|_| DraftCounts::default()), ..Stats::default() };
        Self {
            model_drafter: draft.and_then(|draft| model_drafts::start(draft, &*model, config)),
            model,
            scheduler,
            commands,
            arrived: VecDeque::new(),
            errands: VecDeque::new(),
            shared,
            active: HashMap::new(),
            masks: MaskWorkers::start(),
            tier,
            sessions,
            drafting: (config.draft == DraftMode::Lookup).then(|| Drafting::new(config.draft.max_drafted())),
            stats,
            pace: Pace::new(config.decode_latency_target),
            deadlines: BTreeSet::new(),
            reported: Instant::now(),
            flight: None,
            disturbed: false,
            broken: None,
            plan: StepPlan::default(),
            next: StepPlan::default(),
            batch: Batch::default(),
            chunk: Vec::new(),
            rows: Vec::new(),
            nobodys: SamplingParams::default(),
            sampled: Vec::new(),
        }
    }

    /// Longest sequence that the KV pool holds, in tokens.
    pub(crate) fn max_tokens(&self) -> usize {
        self.scheduler.max_tokens()
    }

    /// Runs until told to stop, until nobody holds a handle any more, or until nothing can be computed any more.
    pub(crate) fn run(mut self) {
        let ended = catch_unwind(AssertUnwindSafe(|| self.take_steps()));
        // Nobody reads what would come once the rest has ended.
        self.shared.draining.store(true, Ordering::Release);
        if ended.is_err() {
            return self.give_up();
        }
        let reason = self.broken.take();
        let message = reason.as_deref().unwrap_or("the server is shutting down");
        let ids: Vec<SequenceId> = self.active.keys().copied().collect();
        for id in ids {
            self.fail(id, message);
        }
        // What came meanwhile ends with the rest.
        self.refuse_arrived(message);
        self.publish_stats();
        if let Some(reason) = reason {
            let shared = self.shared.clone();
            // Whoever hears of it is refused from then on.
            drop(self);
            shared.broken.send_replace(Some(reason));
        }
    }

    fn take_steps(&mut self) {
        while self.broken.is_none() && self.take_commands() {
            self.step();
            self.publish_stats();
        }
    }

    /// After a panic nothing here can be relied on any more: tells whoever waits, and no more than that.
    fn give_up(mut self) {
        const REASON: &str = "the engine failed unexpectedly";
        self.arrived.extend(self.active.drain().map(|(_, active)| Box::new(active.submission)));
        self.refuse_arrived(REASON);
        let shared = self.shared.clone();
        drop(self);
        shared.broken.send_replace(Some(REASON.into()));
    }

    /// Ends what has come and was not taken in.
    fn refuse_arrived(&mut self, message: &str) {
        let commands = std::iter::from_fn(|| self.commands.try_recv().ok());
        let queued = commands.filter_map(|command| match command {
            Command::Submit(submission) => Some(submission),
            _ => None,
        });
        for submission in self.arrived.drain(..).chain(queued) {
            self.shared.places.give_back(&submission.request.owner);
            // A receiver that is gone wants to hear nothing.
            let _ = submission.events.send(Event::Failed { message: message.into() });
        }
    }

    /// Hears all commands that are there, takes in some of the requests that have come, and does one of the errands; when
    /// idle, does them all and waits for more. False means stop.
    fn take_commands(&mut self) -> bool {
        loop {
            let command = if self.active.is_empty() && self.arrived.is_empty() {
                self.go_on();
                while let Some(errand) = self.errands.pop_front() {
                    errand(self);
                }
                self.check_idle();
                self.publish_stats();
                match self.commands.recv() {
                    Ok(command) => command,
                    Err(mpsc::RecvError) => return false,
                }
            } else {
                match self.commands.try_recv() {
                    Ok(command) => command,
                    Err(mpsc::TryRecvError::Empty) => break,
                    Err(mpsc::TryRecvError::Disconnected) => return false,
                }
            };
            match command {
                Command::Submit(submission) => self.arrived.push_back(submission),
                Command::Cancel(id) => self.cancel(id),
                Command::Do(errand) => self.errands.push_back(errand),
                Command::Stop => return false,
            }
        }
        self.take_in();
        while let Some(errand) = self.errands.pop_front() {
            if errand(self) {
                break;
            }
        }
        true
    }

    fn cancel(&mut self, id: SequenceId) {
        match self.arrived.iter().position(|submission| submission.id == id) {
            Some(at) => {
                if let Some(submission) = self.arrived.remove(at) {
                    self.shared.places.give_back(&submission.request.owner);
                }
            }
            None => drop(self.end(id)),
        }
    }

    /// Takes in requests that have come, as many as keep those that run waiting for no more than a moment.
    fn take_in(&mut self) {
        let mut tokens = 0;
        while tokens < MOST_ARRIVING
            && let Some(submission) = self.arrived.pop_front()
        {
            tokens += submission.tokens.len().max(LEAST_ARRIVING);
            self.submit(*submission);
        }
    }

    /// With nothing live, every block must be free or cached.
    fn check_idle(&self) {
        let used = self.scheduler.counts().used;
        debug_assert_eq!(used, 0, "KV blocks leaked");
        debug_assert!(
            self.model_drafter.as_ref().is_none_or(|drafter| drafter.is_idle()),
            "of the draft model"
        );
        if used != 0 {
            tracing::error!(used, "KV blocks are held although nothing runs; please report this defect");
        }
    }

    fn submit(&mut self, mut submission: Submission) {
        let (id, tokens) = (submission.id, std::mem::take(&mut submission.tokens));
        let keys = std::mem::take(&mut submission.keys);
        let request = &submission.request;
        self.scheduler.add(id, tokens, request.prompt_logprobs, request.origin());
        self.expect_blocks(id, keys);
        let counts = submission.counts.take();
        let active = Active {
            reasoning: request.reasoning.clone().map(Reasoning::new),
            submission,
            counts,
            grammar: None,
            scores: Vec::new(),
            generated: 0,
            cached: None,
            preempted: false,
            planned: None,
            first_token: None,
            drafter: None,
            drafted: 0,
            accepted: 0,
            guessed: false,
        };
        self.deadlines.extend(active.submission.request.deadline.map(|deadline| (deadline, id)));
        self.active.insert(id, active);
        self.disturbed = true;
        self.begin_turn(id);
    }

    fn step(&mut self) {
        self.follow_grammars();
        self.fetch_blocks();
        self.end_protections();
        self.look_after_waiting();
        self.go_on();
        if self.flight.is_some() {
            return;
        }
        self.propose_drafts();
        let mut plan = std::mem::take(&mut self.plan);
        self.scheduler.plan(&mut plan);
        self.disturbed = false;
        self.note_admissions(&plan);
        self.find_sessions(&plan);
        self.hold_for_tier(&mut plan);
        if !plan.chunks.is_empty() {
            self.run_plan(&plan);
        }
        self.plan = plan;
    }

    fn run_plan(&mut self, plan: &StepPlan) {
        self.fill_batch(plan);
        if self.can_fly(plan) {
            return self.take_off(plan);
        }
        let began = Instant::now();
        let outcome = self.compute(plan);
        self.end_step(plan, outcome, began.elapsed(), false);
    }

    /// A step ran, or failed, after so long: what it drew is handed out, while the next one runs or before. How long a
    /// failed one took tells nothing.
    fn end_step(&mut self, plan: &StepPlan, outcome: Result<(), String>, took: Duration, next_runs: bool) {
        let computed = Instant::now();
        self.stats.steps += 1;
        match outcome {
            Ok(()) => {
                self.measure(plan, took);
                self.scheduler.commit(plan);
                self.deliver(plan);
                self.keep_blocks(plan, took);
                // What is done beside the next step is part of its time.
                let after = if next_runs { Duration::ZERO } else { computed.elapsed() };
                self.pace.record(plan, took + after);
                self.scheduler.limit_prefill(self.pace.prefill_limit());
            }
            Err(message) => {
                tracing::error!(message, sequences = plan.chunks.len(), "a step failed");
                for chunk in &plan.chunks {
                    self.fail(chunk.id, &message);
                }
                let model = &mut self.model;
                self.broken = self.broken.take().or(guarded(|| model.recover()).err());
            }
        }
    }

    fn note_admissions(&mut self, plan: &StepPlan) {
        self.stats.preemptions += plan.preempted.len() as u64;
        for &id in &plan.preempted {
            self.release_guesses(id);
            let loads = self.tier.as_ref().is_some_and(|tier| tier.is_loading(id));
            match self.active.get_mut(&id) {
                // It finds again what it would have had.
                Some(active) if loads && !active.preempted => active.cached = None,
                Some(active) => active.preempted = true,
                None => {}
            }
        }
        let now = Instant::now();
        for (id, cached) in &plan.admitted {
            let Some(active) = self.active.get_mut(id) else { continue };
            if active.planned.is_none() {
                active.planned = Some(now);
                self.stats.prompt_tokens += active.submission.request.prompt.len() as u64;
            }
            active.cached.get_or_insert(*cached);
            self.start_grammar(*id);
        }
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
        stats.sessions = self.sessions.stats(&self.scheduler);
        stats.tier = self.tier.as_ref().map(DiskTier::stats).unwrap_or_default();
        *self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner) = *stats;
    }
}
