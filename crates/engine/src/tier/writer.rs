//! Writes blocks behind the step loop's back.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Instant;

use rudder_kvstore::{BLOCK_TOKENS, BlockKey, Label, Store, WriteError};

use super::breaker::Breaker;
use super::buffers::Buffers;

/// Blocks on their way to the disk take at most about so many bytes of memory.
const QUEUE_BYTES: usize = 64 << 20;

/// What the thread does, in order.
pub(crate) enum Job {
    Write(Block),
    /// What the label uses goes last, or no longer.
    Pin(Label, bool),
    /// Keep a record for the label.
    Record(Label, Vec<u8>),
    /// Erase what bears the label.
    Erase(Label),
}

/// A block to write.
pub(crate) struct Block {
    pub key: BlockKey,
    pub tokens: [u32; BLOCK_TOKENS],
    /// From [`Writer::buffer`].
    pub payload: Box<[u8]>,
}

/// The way to the writing thread, which ends when this is gone and everything is written.
pub(crate) struct Writer {
    jobs: mpsc::Sender<Job>,
    queue: Queue,
}

/// What waits to be written.
#[derive(Clone)]
pub(crate) struct Queue {
    buffers: Arc<Buffers>,
    health: Arc<Health>,
}

#[derive(Default)]
struct Health {
    breaker: Mutex<Breaker>,
    /// Blocks that came while the disk was left alone.
    dropped: AtomicU64,
    /// Jobs that are not done.
    jobs: AtomicU64,
}

impl Writer {
    /// Starts the thread.
    ///
    /// # Errors
    /// If the system refuses a thread.
    pub fn start(store: Arc<Store>) -> std::io::Result<Self> {
        let (jobs, receiver) = mpsc::channel();
        let buffers = Arc::new(Buffers::new(store.block_bytes(), QUEUE_BYTES));
        let health = Arc::new(Health::default());
        let queue = Queue { buffers: buffers.clone(), health: health.clone() };
        std::thread::Builder::new()
            .name("rudder-kv-writer".into())
            .spawn(move || write_all(&store, &receiver, &buffers, &health))?;
        Ok(Self { jobs, queue })
    }

    /// A buffer to fill. None while the queue is full or the disk is left alone.
    pub fn buffer(&self, now: Instant) -> Option<Box<[u8]>> {
        self.queue.health.breaker().allows(now).then(|| self.queue.buffers.take())?
    }

    /// Gives a buffer back unused.
    pub fn give_back(&self, buffer: Box<[u8]>) {
        self.queue.buffers.give(buffer);
    }

    /// Queues an announced block, or what is to be done after all that is queued.
    pub fn queue_job(&self, job: Job) {
        self.queue.health.jobs.fetch_add(1, Ordering::Relaxed);
        // The thread outlives this handle: it ends by the channel's end.
        let _ = self.jobs.send(job);
    }

    /// What is queued.
    pub fn queue(&self) -> Queue {
        self.queue.clone()
    }
}

impl Queue {
    /// Blocks queued.
    pub fn len(&self) -> usize {
        self.buffers.out()
    }

    /// Whether all is done.
    pub fn is_empty(&self) -> bool {
        self.len() == 0 && self.health.jobs.load(Ordering::Relaxed) == 0
    }

    /// Queued blocks that were dropped because the disk had failed before.
    pub fn dropped(&self) -> u64 {
        self.health.dropped.load(Ordering::Relaxed)
    }
}

impl Health {
    fn breaker(&self) -> MutexGuard<'_, Breaker> {
        self.breaker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What came of writing.
    fn note(&self, outcome: Result<(), WriteError>) {
        let Err(error) = outcome else { return self.breaker().success() };
        let pause = self.breaker().failure(Instant::now());
        if let Some(pause) = pause {
            tracing::warn!(%error, ?pause, "KV blocks cannot be written to disk; pausing");
        }
    }
}

fn write_all(store: &Store, jobs: &mpsc::Receiver<Job>, buffers: &Buffers, health: &Health) {
    for job in jobs {
        match job {
            Job::Write(block) => {
                write(store, &block, health);
                buffers.give(block.payload);
            }
            Job::Pin(label, pinned) => store.pin(label, pinned),
            Job::Record(label, body) => {
                if health.breaker().allows(Instant::now()) {
                    health.note(store.write_record(label, &body));
                }
            }
            Job::Erase(label) => {
                if let Err(error) = store.erase(label) {
                    tracing::warn!(%error, "a deleted session's KV blocks could not all be erased from disk");
                }
            }
        }
        health.jobs.fetch_sub(1, Ordering::Relaxed);
    }
}

fn write(store: &Store, block: &Block, health: &Health) {
    if health.breaker().allows(Instant::now()) {
        health.note(store.write(block.key, block.tokens, &block.payload));
    } else {
        store.withdraw(&block.key);
        health.dropped.fetch_add(1, Ordering::Relaxed);
    }
}
