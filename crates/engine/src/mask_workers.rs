//! Computes grammar masks beside the forward pass, on plain threads.
//!
//! A [`MaskJob`] holds one sequence's [`Constraint`] with its buffers. It travels to a worker when
//! a token was drawn, and back with the mask for the next one; nothing is allocated on the way. It
//! travels once more with a draft, and back with the masks after each drafted token; where the mask is late, the
//! draft is sent after it ([`LateDraft`]). What was drafted stays taken until it is known what was drawn, so
//! that accepted tokens are parsed once.

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
    /// All tokens of the sequence that the constraint took.
    taken: Vec<u32>,
    /// What it took beyond them: a draft, and what that forces.
    tried: Vec<u32>,
    /// Whether the grammar can go back over a draft.
    follows: bool,
    late: Arc<LateDraft>,
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
            tried: Vec::new(),
            follows: true,
            late: Arc::default(),
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

    /// Whether a token may be drawn next.
    pub(crate) fn allows(&self, token: u32) -> bool {
        allows(&self.mask, token)
    }

    /// Takes the draft that was sent after it; returns whether it is still to be followed.
    pub(crate) fn take_late_draft(&mut self) -> bool {
        self.late.take(&mut self.draft);
        if !self.follows() {
            self.draft.clear();
        }
        !self.draft.is_empty()
    }

    /// Whether its sequence is still there, which holds the way for late drafts while the job is away.
    fn is_wanted(&self) -> bool {
        Arc::strong_count(&self.late) > 1
    }

    fn run(&mut self) {
        if !self.is_wanted() {
            return;
        }
        if self.draft.is_empty() {
            let outcome = catch_unwind(AssertUnwindSafe(|| self.try_run()));
            self.next = outcome.unwrap_or_else(|_| Err("the grammar failed unexpectedly".into()));
            self.take_late_draft();
        }
        if !self.draft.is_empty() {
            self.follow();
        }
        if !self.follows {
            self.late.close();
        }
    }

    fn try_run(&mut self) -> Result<Next, String> {
        if self.constraint.is_none() {
            self.constraint = Some(self.grammar.start()?);
        }
        let taken = self.give_back()?;
        let Some(constraint) = &mut self.constraint else { return Ok(Next::Draw) };
        for &token in &self.tokens[taken..] {
            constraint.accept(token)?;
        }
        self.taken.append(&mut self.tokens);
        self.followed = 0;
        self.mask.fill(0);
        let next = constraint.next(&mut self.mask, self.jump.then_some(&mut self.forced))?;
        self.taken.extend_from_slice(&self.forced);
        Ok(next)
    }

    /// Gives back what was tried, but for what was then drawn; returns how many of the drawn tokens are taken.
    fn give_back(&mut self) -> Result<usize, String> {
        let kept = self.tried.iter().zip(&self.tokens).take_while(|(tried, drawn)| tried == drawn).count();
        let rest = self.tried.len() - kept;
        self.tried.clear();
        let Some(constraint) = self.constraint.as_mut().filter(|_| rest > 0) else { return Ok(kept) };
        let outcome = catch_unwind(AssertUnwindSafe(|| constraint.roll_back(rest)));
        if matches!(outcome, Ok(Ok(()))) {
            return Ok(kept);
        }
        self.follows = false;
        self.start_again()?;
        Ok(0)
    }

    /// Finds the masks after each drafted token, as far as the grammar goes.
    fn follow(&mut self) {
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

    /// Up to a token that is not allowed or after which a token is not drawn.
    fn try_follow(&mut self) -> Result<(), String> {
        self.followed = 0;
        self.give_back()?;
        let Some(constraint) = self.constraint.as_mut().filter(|_| self.follows) else { return Ok(()) };
        let words = self.mask.len();
        self.ahead.clear();
        for &token in &self.draft {
            if !allows(self.ahead.rchunks_exact(words).next().unwrap_or(&self.mask), token) {
                break;
            }
            constraint.accept(token)?;
            self.tried.push(token);
            let begin = self.ahead.len();
            self.ahead.resize(begin + words, 0);
            let next = constraint.next(&mut self.ahead[begin..], self.jump.then_some(&mut self.forced))?;
            if next == Next::End || !self.forced.is_empty() {
                self.tried.append(&mut self.forced);
                break;
            }
            self.followed += 1;
        }
        Ok(())
    }

    /// A new state that has taken the same tokens.
    fn start_again(&mut self) -> Result<(), String> {
        self.forced.clear();
        self.tried.clear();
        let constraint = self.constraint.insert(self.grammar.start()?);
        self.taken.iter().try_for_each(|&token| constraint.accept(token))
    }
}

fn allows(mask: &[u32], token: u32) -> bool {
    mask.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
}

/// A draft for a job that is with a worker. It is followed when the job is done with what it was sent for.
#[derive(Debug, Default)]
pub(crate) struct LateDraft(Mutex<Late>);

#[derive(Debug, Default)]
struct Late {
    tokens: Vec<u32>,
    /// Whether the grammar cannot go back over drafts.
    closed: bool,
}

impl LateDraft {
    /// Sends a draft; it takes the place of an earlier one.
    pub(crate) fn send(&self, draft: &[u32]) {
        let mut late = self.lock();
        late.tokens.clear();
        late.tokens.extend_from_slice(draft);
    }

    /// Whether a draft is of use.
    pub(crate) fn is_open(&self) -> bool {
        !self.lock().closed
    }

    /// Takes the draft, if one was sent.
    fn take(&self, into: &mut Vec<u32>) {
        into.append(&mut self.lock().tokens);
    }

    fn close(&self) {
        self.lock().closed = true;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Late> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// Hands a job over. What comes back takes a draft for it until it is done; nothing is computed for a job
    /// of which it was dropped.
    pub(crate) fn send(&mut self, job: Box<MaskJob>) -> Arc<LateDraft> {
        let late = job.late.clone();
        self.out += 1;
        self.queue.lock().jobs.push_back(job);
        self.queue.changed.notify_one();
        late
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Cannot even start.
    #[derive(Debug)]
    struct Broken;

    impl Grammar for Broken {
        fn start(&self) -> Result<Box<dyn Constraint>, String> {
            Err("asked".into())
        }
    }

    #[test]
    fn nothing_is_computed_for_a_sequence_that_is_gone() {
        let mut job = MaskJob::new(1, Arc::new(Broken), true, 128);
        job.run();
        assert_eq!(job.next, Ok(Next::Draw));
        let sequence = job.late.clone();
        job.run();
        assert_eq!(job.next, Err("asked".into()));
        drop(sequence);
    }
}
