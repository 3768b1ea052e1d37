//! Stored responses and conversations: a database that one thread of its own reads and writes.
//!
//! Callers on async threads hand it jobs through a bounded queue. Jobs that wait together are one
//! transaction, and are answered after its commit; they run in the order they were handed in, so
//! that a read sees every write before it.

mod db;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use self::db::{Db, Unusable, Write, is_damage};
use super::types::{Link, Record, weight};
use crate::admission::Owner;
use crate::openai::ApiError;
use crate::unix_now;

/// The database's name in the data folder.
const FILE: &str = "responses.sqlite3";
/// Most KiB of entries that wait to be written; then those who bring more wait.
const QUEUE_KIB: usize = 64 << 10;
/// Most jobs of one transaction.
const BATCH: usize = 128;
/// How often what has expired is thrown out.
const UPKEEP: Duration = Duration::from_secs(60);
/// Most bytes kept where there is no file: it is the process's memory.
const MAX_IN_MEMORY: u64 = 256 << 20;

/// Where responses are stored, for how long, and how many.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreConfig {
    /// The data folder; `None` keeps them in memory, until the process ends.
    pub folder: Option<PathBuf>,
    /// How long after its last use an entry is kept.
    pub retention: Duration,
    /// Bytes over which the entries used longest ago are thrown out.
    pub max_bytes: u64,
}

impl Default for StoreConfig {
    /// In memory, 30 days, 1 GiB.
    fn default() -> Self {
        Self { folder: None, retention: Duration::from_secs(30 * 24 * 3600), max_bytes: 1 << 30 }
    }
}

/// What a request that goes on from a response needs of it.
#[derive(Debug, Clone)]
pub(crate) enum History {
    /// The items up to and with its output.
    Found(Arc<Link>),
    /// It, or one before it in its chain, is not there (any more), is another's, failed or still runs.
    Missing,
}

/// A conversation's head.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Conversation {
    pub id: String,
    pub created_at: u64,
    pub metadata: Value,
}

/// Which items of a list are wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PageQuery {
    /// Most items.
    pub limit: usize,
    /// Oldest first.
    pub ascending: bool,
    /// Only those that come after the item of this id, in the order asked for.
    pub after: Option<String>,
}

/// Some items of a list.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Page {
    pub items: Vec<Value>,
    /// Whether there are more.
    pub has_more: bool,
}

/// The store could not do what was asked: the disk is full, the file is damaged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the store of responses failed: {0}")]
pub(crate) struct StoreError(String);

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        Self::internal(format!("{error}. Try again; the server's log says more."))
    }
}

/// A job that was handed in. Dropping this changes nothing about the job.
pub(crate) struct Pending<T>(oneshot::Receiver<Result<T, StoreError>>);

impl<T> Pending<T> {
    /// Waits until it is done and its writes are committed.
    pub async fn done(self) -> Result<T, StoreError> {
        self.0.await.unwrap_or_else(|_| Err(StoreError("it has been closed".into())))
    }
}

/// What operators watch of a store.
#[derive(Debug, Default)]
pub(crate) struct StoreStats {
    /// Bytes in use.
    pub bytes: AtomicU64,
    /// Jobs that failed.
    pub failures: AtomicU64,
    /// Entries thrown out before their time, for want of space.
    pub evicted: AtomicU64,
}

/// The handle of the database's thread.
pub(crate) struct Store {
    jobs: Mutex<Option<Sender<Box<dyn Job>>>>,
    room: Arc<Semaphore>,
    stats: Arc<StoreStats>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Store {
    /// Opens the database of the folder. Where that cannot be, entries are kept in memory, and the
    /// log says why. Responses that a crash cut off read as failed from now on.
    pub fn open(config: &StoreConfig) -> Self {
        let stats = Arc::new(StoreStats::default());
        let (jobs, received) = mpsc::channel();
        let keeper = Keeper::new(config, stats.clone());
        let thread = keeper.and_then(|keeper| {
            let run = move || keeper.run(&received);
            std::thread::Builder::new().name("store".into()).spawn(run).map_err(|error| error.to_string())
        });
        let thread = thread.inspect_err(|error| tracing::error!(error, "responses cannot be stored")).ok();
        Self {
            jobs: Mutex::new(thread.is_some().then_some(jobs)),
            room: Arc::new(Semaphore::new(QUEUE_KIB)),
            stats,
            thread: Mutex::new(thread),
        }
    }

    /// What operators watch.
    pub fn stats(&self) -> &StoreStats {
        &self.stats
    }

    /// Writes a response for the first time. When it is completed or incomplete and belongs to a
    /// conversation, its items are added there. Failures are counted and logged.
    pub async fn insert(&self, owner: Owner, record: Record) -> Pending<bool> {
        self.submit(record_weight(&record), move |db| db.put(&owner, &record, Write::New, unix_now())).await
    }

    /// As [`Store::insert`], in the place of what is known of the response; not if it was deleted
    /// in the meantime. Tells whether it was there.
    pub async fn update(&self, owner: Owner, record: Record) -> Pending<bool> {
        self.submit(record_weight(&record), move |db| db.put(&owner, &record, Write::Known, unix_now())).await
    }

    /// A response and its input.
    pub async fn get(&self, owner: Owner, id: &str) -> Result<Option<Record>, StoreError> {
        let id = id.to_owned();
        self.submit(0, move |db| db.get(&owner, &id)).await.done().await
    }

    /// Forgets a response; whether there was one.
    pub async fn delete(&self, owner: Owner, id: &str) -> Result<bool, StoreError> {
        let id = id.to_owned();
        self.submit(0, move |db| db.delete(&owner, &id)).await.done().await
    }

    /// What a request that goes on from this response needs.
    pub async fn history(&self, owner: Owner, id: &str) -> Result<History, StoreError> {
        let id = id.to_owned();
        self.submit(0, move |db| db.history(&owner, &id, unix_now())).await.done().await
    }

    /// Everything that a response was made from; `None` if it is not there.
    pub async fn input_items(&self, owner: Owner, id: &str) -> Result<Option<Vec<Value>>, StoreError> {
        let id = id.to_owned();
        self.submit(0, move |db| db.input_items(&owner, &id, unix_now())).await.done().await
    }

    /// Writes a new conversation with its first items, each with an id.
    pub async fn create_conversation(
        &self,
        owner: Owner,
        conversation: Conversation,
        items: Vec<Value>,
    ) -> Result<(), StoreError> {
        let size = items.iter().map(weight).sum::<usize>();
        let work = move |db: &Db| {
            let now = unix_now();
            db.put_conversation(&owner, &conversation, now)?;
            db.append(&conversation.id, &items, now)
        };
        self.submit(size, work).await.done().await
    }

    /// A conversation's head.
    pub async fn conversation(&self, owner: Owner, id: &str) -> Result<Option<Conversation>, StoreError> {
        let id = id.to_owned();
        self.submit(0, move |db| db.conversation(&owner, &id)).await.done().await
    }

    /// Gives a conversation other metadata; its head, if it is there.
    pub async fn update_conversation(
        &self,
        owner: Owner,
        id: &str,
        metadata: Value,
    ) -> Result<Option<Conversation>, StoreError> {
        let work = move |db: &Db, id: &str| {
            let Some(conversation) = db.conversation(&owner, id)? else { return Ok(None) };
            let conversation = Conversation { metadata: metadata.clone(), ..conversation };
            db.put_conversation(&owner, &conversation, unix_now())?;
            Ok(Some(conversation))
        };
        let id = id.to_owned();
        self.submit(0, move |db| work(db, &id)).await.done().await
    }

    /// Forgets a conversation with its items; whether there was one.
    pub async fn delete_conversation(&self, owner: Owner, id: &str) -> Result<bool, StoreError> {
        let id = id.to_owned();
        self.submit(0, move |db| db.delete_conversation(&owner, &id)).await.done().await
    }

    /// All items of a conversation, oldest first; `None` if it is not there.
    pub async fn conversation_items(&self, owner: Owner, id: &str) -> Result<Option<Vec<Value>>, StoreError> {
        self.in_conversation(owner, id, 0, |db, id| db.items(id)).await
    }

    /// Adds items, each with an id, to a conversation. Those whose ids it has already stay as they
    /// are. `None` if it is not there.
    pub async fn append(&self, owner: Owner, id: &str, items: Vec<Value>) -> Result<Option<()>, StoreError> {
        let size = items.iter().map(weight).sum();
        self.in_conversation(owner, id, size, move |db, id| db.append(id, &items, unix_now())).await
    }

    /// Some items of a conversation. `None` if it is not there, `Some(None)` if it has no item
    /// `after`.
    pub async fn page(
        &self,
        owner: Owner,
        id: &str,
        query: PageQuery,
    ) -> Result<Option<Option<Page>>, StoreError> {
        self.in_conversation(owner, id, 0, move |db, id| db.page(id, &query)).await
    }

    /// One item of a conversation.
    pub async fn item(&self, owner: Owner, id: &str, item: &str) -> Result<Option<Value>, StoreError> {
        let item = item.to_owned();
        let found = self.in_conversation(owner, id, 0, move |db, id| db.item(id, &item)).await?;
        Ok(found.flatten())
    }

    /// Forgets one item of a conversation and returns the conversation's head; `None` if one of the
    /// two is not there.
    pub async fn delete_item(
        &self,
        owner: Owner,
        id: &str,
        item: &str,
    ) -> Result<Option<Conversation>, StoreError> {
        let item = item.to_owned();
        let work = move |db: &Db, id: &str| match db.delete_item(id, &item)? {
            true => db.conversation(&owner, id),
            false => Ok(None),
        };
        Ok(self.in_conversation(owner, id, 0, work).await?.flatten())
    }

    /// Waits until everything that was handed in is in the file.
    pub async fn flush(&self) {
        // There is nothing to say of a job that does nothing.
        let _ = self.submit(0, |_| Ok(())).await.done().await;
    }

    /// `work` in a conversation; `None` if it is not there.
    async fn in_conversation<T: Send + 'static>(
        &self,
        owner: Owner,
        id: &str,
        size: usize,
        mut work: impl FnMut(&Db, &str) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<Option<T>, StoreError> {
        let id = id.to_owned();
        let work = move |db: &Db| match db.conversation(&owner, &id)? {
            Some(_) => work(db, &id).map(Some),
            None => Ok(None),
        };
        self.submit(size, work).await.done().await
    }

    /// Hands a job in; waits while too many bytes wait to be written.
    async fn submit<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnMut(&Db) -> rusqlite::Result<T> + Send + 'static,
    ) -> Pending<T> {
        let (reply, pending) = oneshot::channel();
        let permits = (bytes / 1024).clamp(1, QUEUE_KIB) as u32;
        // The semaphore is never closed.
        let room = self.room.clone().acquire_many_owned(permits).await.ok();
        let task = Task { work, result: None, reply, _room: room };
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        // Without a thread the job is dropped, and `Pending::done` says so.
        if jobs.as_ref().is_none_or(|jobs| jobs.send(Box::new(task)).is_err()) {
            self.stats.failures.fetch_add(1, Ordering::Relaxed);
        }
        Pending(pending)
    }
}

impl Drop for Store {
    /// Writes what waits and closes the file.
    fn drop(&mut self) {
        self.jobs.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that stores responses panicked");
        }
    }
}

/// Work for the database's thread. It may be run again, if the transaction it was part of failed.
trait Job: Send {
    fn run(&mut self, db: &Db) -> rusqlite::Result<()>;
    fn reply(self: Box<Self>, failed: Option<StoreError>);
}

struct Task<F, T> {
    work: F,
    result: Option<T>,
    reply: oneshot::Sender<Result<T, StoreError>>,
    _room: Option<OwnedSemaphorePermit>,
}

impl<F: FnMut(&Db) -> rusqlite::Result<T> + Send, T: Send> Job for Task<F, T> {
    fn run(&mut self, db: &Db) -> rusqlite::Result<()> {
        self.result = Some((self.work)(db)?);
        Ok(())
    }

    fn reply(self: Box<Self>, failed: Option<StoreError>) {
        let result = match (failed, self.result) {
            (None, Some(result)) => Ok(result),
            (failed, _) => Err(failed.unwrap_or_else(|| StoreError("it did not run".into()))),
        };
        // Nobody may be waiting for it.
        let _ = self.reply.send(result);
    }
}

/// The database's thread.
struct Keeper {
    db: Db,
    retention: Duration,
    max_bytes: u64,
    stats: Arc<StoreStats>,
}

impl Keeper {
    fn new(config: &StoreConfig, stats: Arc<StoreStats>) -> Result<Self, String> {
        let mut max_bytes = config.max_bytes;
        let db = match config.folder.as_deref().map(open_in) {
            Some(Ok(db)) => db,
            reason => {
                if let Some(Err(reason)) = reason {
                    tracing::warn!("stored responses are kept in memory, until this process ends: {reason}");
                }
                max_bytes = max_bytes.min(MAX_IN_MEMORY);
                Db::in_memory().map_err(|error| error.to_string())?
            }
        };
        match db.transaction(Db::fail_unfinished) {
            Ok(0) => {}
            Ok(count) => {
                tracing::warn!(count, "responses were cut off by the last end; they read as failed now")
            }
            Err(error) => {
                tracing::error!(%error, "responses that were cut off by the last end could not be found")
            }
        }
        Ok(Self { db, retention: config.retention, max_bytes, stats })
    }

    /// Runs jobs until no handle is left.
    fn run(mut self, jobs: &Receiver<Box<dyn Job>>) {
        let mut upkeep = Instant::now();
        loop {
            match jobs.recv_timeout(upkeep.saturating_duration_since(Instant::now())) {
                Ok(first) => {
                    let mut batch = vec![first];
                    batch.extend(jobs.try_iter().take(BATCH - 1));
                    self.run_batch(batch);
                    self.make_room();
                }
                Err(RecvTimeoutError::Timeout) => {
                    self.expire();
                    self.make_room();
                    upkeep = Instant::now() + UPKEEP;
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// All jobs in one transaction; if that fails, each in its own.
    fn run_batch(&mut self, mut jobs: Vec<Box<dyn Job>>) {
        if self.db.transaction(|db| jobs.iter_mut().try_for_each(|job| job.run(db))).is_ok() {
            return jobs.into_iter().for_each(|job| job.reply(None));
        }
        for mut job in jobs {
            let result = self.db.transaction(|db| job.run(db));
            let failed = result.err().map(|error| self.failed(&error));
            job.reply(failed);
        }
    }

    fn expire(&mut self) {
        let before = unix_now().saturating_sub(self.retention.as_secs());
        match self.db.transaction(|db| db.expire(before)) {
            Ok(0) => {}
            Ok(count) => {
                tracing::info!(count, "stored responses and conversations had their time and were removed");
                self.shrink();
            }
            Err(error) => drop(self.failed(&error)),
        }
    }

    fn make_room(&mut self) {
        match self.db.transaction(|db| db.evict(self.max_bytes)) {
            Ok(0) => {}
            Ok(count) => {
                tracing::info!(count, "the oldest stored responses and conversations made room for others");
                self.stats.evicted.fetch_add(count as u64, Ordering::Relaxed);
                self.shrink();
            }
            Err(error) => drop(self.failed(&error)),
        }
        if let Ok(bytes) = self.db.size() {
            self.stats.bytes.store(bytes, Ordering::Relaxed);
        }
    }

    fn shrink(&mut self) {
        if let Err(error) = self.db.shrink() {
            self.failed(&error);
        }
    }

    /// Counts and logs a failure; a damaged file is replaced.
    fn failed(&mut self, error: &rusqlite::Error) -> StoreError {
        self.stats.failures.fetch_add(1, Ordering::Relaxed);
        tracing::error!(%error, "stored responses could not be read or written");
        if is_damage(error)
            && let Err(error) = self.db.replace(error)
        {
            tracing::error!(%error, "a new database of stored responses could not be begun; they are kept in memory");
        }
        StoreError(error.to_string())
    }
}

fn open_in(folder: &std::path::Path) -> Result<Db, String> {
    std::fs::create_dir_all(folder)
        .map_err(|error| format!("the folder {} cannot be made: {error}", folder.display()))?;
    let path = folder.join(FILE);
    Db::open(&path).map_err(|unusable| match unusable {
        Unusable::InUse => {
            format!("another server uses {}; give this one a --data-dir of its own", path.display())
        }
        Unusable::Inaccessible(error) => format!("{} cannot be opened: {error}", path.display()),
    })
}

fn record_weight(record: &Record) -> usize {
    weight(&record.response) + record.input.iter().map(weight).sum::<usize>()
}
