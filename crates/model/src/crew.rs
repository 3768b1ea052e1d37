//! The ranks of one process: the first runs on the caller's thread, each other one on a thread of its own that sleeps between steps.
//!
//! A rank that fails or panics ends the step of all with its error; the next step finds them ready again.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::{Builder, JoinHandle};

use rudder_comm::Group;
use rudder_ops::{Batch, OpError};

use crate::{LoadError, Model};

/// One rank's part of the model, which its thread holds in a step and anybody between two.
pub(crate) type Part = Arc<Mutex<Box<dyn Model>>>;

/// See the module.
pub(crate) struct Crew {
    pub group: Group,
    pub parts: Vec<Part>,
    /// The step that all run.
    batch: Arc<RwLock<Batch>>,
    /// Of all ranks here but the first.
    workers: Vec<Worker>,
}

/// A rank's thread.
struct Worker {
    /// Begins a step; without it the thread ends.
    begin: Option<SyncSender<()>>,
    /// Whether the step went well.
    done: Receiver<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Crew {
    /// The parts of the model that the members of `group` in this process have, in their order.
    pub fn new(group: Group, parts: Vec<Box<dyn Model>>) -> Result<Self, LoadError> {
        let parts: Vec<Part> = parts.into_iter().map(|part| Arc::new(Mutex::new(part))).collect();
        let batch = Arc::default();
        let workers = group.local().zip(&parts).skip(1);
        let workers = workers.map(|(rank, part)| Worker::start(&group, rank, part, &batch));
        let workers = workers.collect::<Result<_, _>>().map_err(|error| {
            LoadError::Backend(OpError::Backend(format!("cannot start a rank's thread: {error}")))
        })?;
        Ok(Self { group, parts, batch, workers })
    }

    /// Runs a step on all ranks here; false if one failed, which is known to the group.
    pub fn run(&self, batch: &Batch) -> bool {
        self.batch.write().unwrap_or_else(PoisonError::into_inner).copy_from(batch);
        let first = self.group.local().start;
        for (worker, rank) in self.workers.iter().zip(first + 1..) {
            if !worker.begin() {
                self.group.fail(rank, format!("the thread of rank {rank} is gone"));
            }
        }
        let mut well = run(&self.group, first, &self.parts[0], batch);
        for worker in &self.workers {
            well &= worker.wait();
        }
        well
    }

    /// Asks all ranks here whether what was queued went well ([`Model::landed`]); false if it did not on one, which is known to the group.
    pub fn landed(&self) -> bool {
        let mut well = true;
        for (rank, part) in self.group.local().zip(&self.parts) {
            well &= attempt(&self.group, rank, || lock(part).landed());
        }
        well
    }

    /// Whether all ranks here can be used on ([`Model::recover`]).
    ///
    /// # Errors
    /// Names the first that cannot.
    pub fn recover(&self) -> Result<(), OpError> {
        for (rank, part) in self.group.local().zip(&self.parts) {
            lock(part).recover().map_err(|error| OpError::Backend(format!("rank {rank}: {error}")))?;
        }
        Ok(())
    }
}

impl Worker {
    fn start(group: &Group, rank: usize, part: &Part, batch: &Arc<RwLock<Batch>>) -> std::io::Result<Self> {
        let (begin, begun) = sync_channel(1);
        let (finish, done) = sync_channel(1);
        let (group, part, batch) = (group.clone(), part.clone(), batch.clone());
        let work = move || {
            while begun.recv().is_ok() {
                let well = run(&group, rank, &part, &batch.read().unwrap_or_else(PoisonError::into_inner));
                if finish.send(well).is_err() {
                    return;
                }
            }
        };
        let thread = Builder::new().name(format!("rank-{rank}")).spawn(work)?;
        Ok(Self { begin: Some(begin), done, thread: Some(thread) })
    }

    /// Begins a step; false if the thread is gone.
    fn begin(&self) -> bool {
        self.begin.as_ref().is_some_and(|begin| begin.send(()).is_ok())
    }

    /// Waits until the step is done, and says whether it went well; where the thread is gone, there is none.
    fn wait(&self) -> bool {
        self.done.recv().unwrap_or(false)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.begin = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // what runs on it does not panic: steps are caught
        }
    }
}

/// Runs a rank's share of a step.
fn run(group: &Group, rank: usize, part: &Part, batch: &Batch) -> bool {
    let mut part = lock(part);
    attempt(group, rank, || part.forward(batch))
}

/// Does a rank's share of what all do; false if it failed. An error or a panic ends the others' shares too.
pub(crate) fn attempt(group: &Group, rank: usize, work: impl FnOnce() -> Result<(), OpError>) -> bool {
    let reason = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => return true,
        Ok(Err(error)) => error.to_string(),
        Err(panic) => format!("rank {rank} panicked: {}", message(&*panic)),
    };
    group.fail(rank, reason);
    false
}

/// What a panic says.
fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it does not say why")
}

/// Nothing that is locked here is left half done by a panic.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
