//! Computes grammar masks beside the forward pass, on plain threads.
//!
//! A [`MaskJob`] holds one sequence's [`Constraint`] with its buffers. It travels to a worker when
//! a token was drawn, and back with the mask for the next one; nothing is allocated on the way. It
//! travels once more with a draft, and back with the masks after each drafted token.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};
use std::time::Instant;

use rudder_scheduler::SequenceId;

use crate::grammar::{Constraint, Grammar, Next};

/// Enough for masks to keep up with any number of sequences (some 0.1 ms each); more threads would
/// take cores from the forward pass.
const WORKERS: usize = 2;

/// One sequence's state in its grammar; see the module.
pub(crate) struct MaskJob {
    pub(crate) id: SequenceId,
    grammar: Arc<dyn Grammar>,
    /// Absent before the first run.
    constraint: Option<Box<dyn Constraint>>,
    /// Drawn since the last run.
    pub(crate) tokens: Vec<u32>,
    /// Tokens that may be drawn next, to be followed as far as the grammar goes.
    pub(crate) draft: Vec<u32>,
    /// How many tokens of the draft there is a mask after.
    pub(crate) followed: usize,
    /// Those masks, one after the other.
    ahead: Vec<u32>,
    /// All tokens that the constraint took.
    taken: Vec<u32>,
    /// Whether the grammar can go back over a draft.
    follows: bool,
    /// Whether tokens that the grammar forces are appended without a draw.
    jump: bool,
    /// Forced tokens, to be appended before the mask holds.
    pub(crate) forced: Vec<u32>,
    /// Allowed tokens, one bit each.
    pub(crate) mask: Vec<u32>,
    /// How the last run ended.
    pub(crate) next: Result<Next, String>,
}

impl MaskJob {
    /// A job for a sequence of which nothing is generated, in a vocabulary of `vocab` tokens.
    pub(crate) fn new(id: SequenceId, grammar: Arc<dyn Grammar>, jump: bool, vocab: usize) -> Self {
        Self {
            id,
            grammar,
            constraint: None,
            tokens: Vec::new(),
            draft: Vec::new(),
            followed: 0,
            ahead: Vec::new(),
            taken: Vec::new(),
            follows: true,
            jump,
            forced: Vec::new(),
            mask: vec![0; vocab.div_ceil(32)],
            next: Ok(Next::Draw),
        }
    }

    /// The mask after `drafted` tokens that were drafted, if there is one.
    pub(crate) fn mask(&self, drafted: usize) -> Option<&[u32]> {
        match drafted.checked_sub(1) {
            None => Some(&self.mask),
            Some(index) if drafted <= self.followed => self.ahead.chunks_exact(self.mask.len()).nth(index),
            Some(_) => None,
        }
    }

    /// Whether a draft may be followed from here.
    pub(crate) fn follows(&self) -> bool {
        self.follows && self.forced.is_empty() && self.next == Ok(Next::Draw)
    }

    fn run(&mut self) {
        if self.draft.is_empty() {
            let outcome = catch_unwind(AssertUnwindSafe(|| self.try_run()));
            self.next = outcome.unwrap_or_else(|_| Err("the grammar failed unexpectedly".into()));
            return;
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| self.try_follow()));
        if !matches!(outcome, Ok(Ok(()))) {
            // The answer may never come this way, so it must not fail for it.
            self.follows = false;
            self.followed = 0;
            let outcome = catch_unwind(AssertUnwindSafe(|| self.start_again()));
            if let Err(message) = outcome.unwrap_or_else(|_| Err("the grammar failed unexpectedly".into())) {
                self.next = Err(message);
            }
        }
        self.draft.clear();
    }

    fn try_run(&mut self) -> Result<Next, String> {
        let constraint = match &mut self.constraint {
            Some(constraint) => constraint,
            none => none.insert(self.grammar.start()?),
        };
        for &token in &self.tokens {
            constraint.accept(token)?;
        }
        self.taken.append(&mut self.tokens);
        self.followed = 0;
        self.mask.fill(0);
        let next = constraint.next(&mut self.mask, self.jump.then_some(&mut self.forced))?;
        self.taken.extend_from_slice(&self.forced);
        Ok(next)
    }

    /// Finds the masks after each drafted token, up to one that is not allowed or after which a token
    /// is not drawn.
    fn try_follow(&mut self) -> Result<(), String> {
        let Some(constraint) = &mut self.constraint else { return Ok(()) };
        let words = self.mask.len();
        self.ahead.clear();
        self.followed = 0;
        let mut taken = 0;
        for &token in &self.draft {
            let mask = self.ahead.rchunks_exact(words).next().unwrap_or(&self.mask);
            if mask.get(token as usize / 32).is_none_or(|word| word >> (token % 32) & 1 == 0) {
                break;
            }
            constraint.accept(token)?;
            let begin = self.ahead.len();
            self.ahead.resize(begin + words, 0);
            let next = constraint.next(&mut self.ahead[begin..], self.jump.then_some(&mut self.forced))?;
            taken += 1 + self.forced.len();
            if next == Next::End || !self.forced.is_empty() {
                self.forced.clear();
                break;
            }
            self.followed += 1;
        }
        constraint.roll_back(taken)
    }

    /// A new state that has taken the same tokens.
    fn start_again(&mut self) -> Result<(), String> {
        self.forced.clear();
        let constraint = self.constraint.insert(self.grammar.start()?);
        self.taken.iter().try_for_each(|&token| constraint.accept(token))
    }
}

/// The workers, as the step loop sees them. They end when this is dropped.
pub(crate) struct MaskWorkers {
    queue: Arc<Queue>,
    done: mpsc::Receiver<Box<MaskJob>>,
    /// Jobs sent and not taken back.
    out: usize,
}

#[derive(Default)]
struct Queue {
    state: Mutex<QueueState>,
    changed: Condvar,
}

#[derive(Default)]
struct QueueState {
    jobs: VecDeque<Box<MaskJob>>,
    closed: bool,
}

impl MaskWorkers {
    /// # Panics
    /// If the system refuses a thread.
    pub(crate) fn start() -> Self {
        let (sender, done) = mpsc::channel();
        let queue = Arc::<Queue>::default();
        for index in 0..WORKERS {
            let (queue, sender) = (queue.clone(), sender.clone());
            std::thread::Builder::new()
                .name(format!("rudder-masks-{index}"))
                .spawn(move || work(&queue, &sender))
                .expect("the system can start a thread");
        }
        Self { queue, done, out: 0 }
    }

    /// Hands a job over.
    pub(crate) fn send(&mut self, job: Box<MaskJob>) {
        self.out += 1;
        self.queue.lock().jobs.push_back(job);
        self.queue.changed.notify_one();
    }

    /// A job that is done, waited for until `deadline`, or for as long as it takes.
    pub(crate) fn take(&mut self, deadline: Option<Instant>) -> Option<Box<MaskJob>> {
        if self.out == 0 {
            return None;
        }
        let job = match deadline {
            Some(deadline) => {
                self.done.recv_timeout(deadline.saturating_duration_since(Instant::now())).ok()?
            }
            None => self.done.recv().ok()?,
        };
        self.out -= 1;
        Some(job)
    }
}

/// A worker's life.
fn work(queue: &Queue, done: &mpsc::Sender<Box<MaskJob>>) {
    while let Some(mut job) = queue.next() {
        job.run();
        if done.send(job).is_err() {
            return;
        }
    }
}

impl Drop for MaskWorkers {
    fn drop(&mut self) {
        self.queue.lock().closed = true;
        self.queue.changed.notify_all();
    }
}

impl Queue {
    fn lock(&self) -> std::sync::MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The oldest job, waited for; `None` once closed.
    fn next(&self) -> Option<Box<MaskJob>> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return None;
            }
            if let Some(job) = state.jobs.pop_front() {
                return Some(job);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
