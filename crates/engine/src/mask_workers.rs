//! Computes grammar masks beside the forward pass, on plain threads.
//!
//! A [`MaskJob`] holds one sequence's [`Constraint`] with its buffers. It travels to a worker when
//! a token was drawn, and back with the mask for the next one; nothing is allocated on the way.

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
    pub(crate) token: Option<u32>,
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
            token: None,
            jump,
            forced: Vec::new(),
            mask: vec![0; vocab.div_ceil(32)],
            next: Ok(Next::Draw),
        }
    }

    fn run(&mut self) {
        let outcome = catch_unwind(AssertUnwindSafe(|| self.try_run()));
        self.next = outcome.unwrap_or_else(|_| Err("the grammar failed unexpectedly".into()));
    }

    fn try_run(&mut self) -> Result<Next, String> {
        let constraint = match &mut self.constraint {
            Some(constraint) => constraint,
            none => none.insert(self.grammar.start()?),
        };
        if let Some(token) = self.token.take() {
            constraint.accept(token)?;
        }
        self.mask.fill(0);
        let forced = self.jump.then_some(&mut self.forced);
        constraint.next(&mut self.mask, forced)
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
