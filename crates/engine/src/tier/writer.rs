//! Writes blocks behind the step loop's back.

use std::collections::HashMap;
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
    /// Keep the label's record of this number.
    Record(Label, u64),
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
    records: Arc<Mutex<Records>>,
}

/// Records on their way to the disk: of each label the newest alone, however slow the disk is.
#[derive(Default)]
struct Records {
    /// Each with the number of the job that is queued for it.
    bodies: HashMap<Label, (u64, Vec<u8>)>,
    next: u64,
}

impl Records {
    /// Replaces what waits for the label; returns the number of the job to queue if nothing does.
    fn put(&mut self, label: Label, body: Vec<u8>) -> Option<u64> {
        match self.bodies.get_mut(&label) {
            Some((_, waiting)) => {
                *waiting = body;
                None
            }
            None => {
                let number = self.next;
                self.next += 1;
                self.bodies.insert(label, (number, body));
                Some(number)
            }
        }
    }

    /// What waits for the label, if this is its job.
    fn take(&mut self, label: Label, number: u64) -> Option<Vec<u8>> {
        self.bodies.get(&label).filter(|(of, _)| *of == number)?;
        self.bodies.remove(&label).map(|(_, body)| body)
    }
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
        let (writer, work) = Self::new(store);
        std::thread::Builder::new().name("rudder-kv-writer".into()).spawn(work)?;
        Ok(writer)
    }

    /// A writer, and what its thread does.
    fn new(store: Arc<Store>) -> (Self, impl FnOnce() + Send) {
        let (jobs, receiver) = mpsc::channel();
        let buffers = Arc::new(Buffers::new(store.block_bytes(), QUEUE_BYTES));
        let (health, records) = (Arc::<Health>::default(), Arc::<Mutex<Records>>::default());
        let queue = Queue { buffers: buffers.clone(), health: health.clone() };
        let writer = Self { jobs, queue, records: records.clone() };
        (writer, move || write_all(&store, &receiver, &buffers, &health, &records))
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

    /// Queues a label's record, unless one waits already, which it replaces.
    pub fn queue_record(&self, label: Label, body: Vec<u8>) {
        if let Some(number) = lock(&self.records).put(label, body) {
            self.queue_job(Job::Record(label, number));
        }
    }

    /// Queues the erasure of what bears a label. A record that waits is erased with it, one that comes later is not.
    pub fn queue_erasure(&self, label: Label) {
        lock(&self.records).bodies.remove(&label);
        self.queue_job(Job::Erase(label));
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
        lock(&self.breaker)
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn write_all(
    store: &Store,
    jobs: &mpsc::Receiver<Job>,
    buffers: &Buffers,
    health: &Health,
    records: &Mutex<Records>,
) {
    for job in jobs {
        match job {
            Job::Write(block) => {
                write(store, &block, health);
                buffers.give(block.payload);
            }
            Job::Pin(label, pinned) => store.pin(label, pinned),
            Job::Record(label, number) => {
                let body = lock(records).take(label, number);
                if let Some(body) = body.filter(|_| health.breaker().allows(Instant::now())) {
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

#[cfg(test)]
mod tests {
    use rudder_kvstore::{Disk, Fingerprint};

    use super::*;

    const ALICE: Label = Label(11);
    const BOB: Label = Label(12);

    fn open(folder: &std::path::Path) -> Store {
        let disk = Disk::open(folder).unwrap();
        Store::open(Arc::new(disk), 1 << 20, 4096, Fingerprint([7; 32])).unwrap()
    }

    #[test]
    fn of_a_labels_records_that_wait_the_newest_is_written_alone_unless_it_is_erased_with_the_label() {
        let folder = tempfile::tempdir().unwrap();
        let store = Arc::new(open(folder.path()));
        store.read_records(9).unwrap();
        let (writer, work) = Writer::new(store.clone());
        let jobs = || writer.queue.health.jobs.load(Ordering::Relaxed);
        (0..100).for_each(|number| writer.queue_record(ALICE, vec![number]));
        assert_eq!(jobs(), 1);
        writer.queue_record(BOB, b"erased".to_vec());
        writer.queue_erasure(BOB);
        writer.queue_record(BOB, b"back".to_vec());
        assert_eq!(jobs(), 4);
        let queue = writer.queue();
        drop(writer);
        work();
        assert!(queue.is_empty());
        drop(store);
        let records = open(folder.path()).read_records(9).unwrap();
        assert_eq!(records, [(ALICE, vec![99]), (BOB, b"back".to_vec())]);
    }
}
