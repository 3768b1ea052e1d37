//! The tier below the KV cache: blocks on disk, written behind and fetched ahead of the step loop.
//!
//! - **Out.** Full blocks of sequences worth keeping are copied out after a step, a bounded number a
//!   step, and written by a thread of its own. Where the disk does not keep up, the rest waits for the
//!   next step, and what is left when the sequence ends is dropped and counted.
//! - **In.** Where a sequence is admitted and the disk continues what the prefix tree holds, measured
//!   [`speeds`] decide: the blocks are loaded, or the prompt is computed as without a disk. While a
//!   sequence's blocks are read, by another thread, the scheduler holds it and others run; blocks are
//!   put in place between steps. A load that takes as long as the prefill would have is given up.
//!   A sequence that has to wait before it is admitted has its blocks brought into the page cache
//!   meanwhile ([`ahead`]).
//! - **Faults.** A block that cannot be read or is damaged is forgotten, and its sequence computes from
//!   there on. A disk that fails again and again is left alone for a while ([`breaker`]).
//!
//! Device memory is host memory on the CPU backend, so there is no tier between. A backend with memory
//! of its own goes through the same two calls, `Model::export_block` and `Model::import_block`.

mod ahead;
mod breaker;
mod buffers;
mod reader;
mod speeds;
mod writer;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rudder_kvstore::{
    BLOCK_TOKENS, BlockKey, Disk, Fingerprint, Label, Medium, ReadError, Store, StoreError, StoreStats,
};
use rudder_model::Model;
use rudder_scheduler::{BLOCK_SIZE, MAX_SESSIONS, Scheduler, Sequence, SequenceId, StepPlan};

use self::ahead::{Ahead, Hint};
use self::breaker::Breaker;
use self::reader::{Arrival, Order, Reader};
use self::speeds::Speeds;
use self::writer::{Block, Job, Queue, Writer};
use crate::session_record::SessionRecord;

const _: () = assert!(BLOCK_TOKENS == BLOCK_SIZE);

/// Shorter sequences are not kept: they are computed again in no time.
const LEAST_BLOCKS: usize = 256 / BLOCK_SIZE;
/// Most bytes copied out after a step, and once more of each sequence that ends with it: a millisecond or two each.
const OUT_BYTES: usize = 8 << 20;
/// Most bytes put in place between two steps. Somebody waits for them.
const IN_BYTES: usize = 32 << 20;
/// How long the step loop waits for blocks, with nothing else to do, before it looks for commands.
const WAIT: Duration = Duration::from_millis(2);

/// Where blocks are kept, and how many.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TierConfig {
    /// The folder; this process's alone while it runs.
    pub folder: PathBuf,
    /// Most bytes on disk.
    pub capacity: u64,
}

/// Why there can be no tier.
#[derive(Debug, thiserror::Error)]
pub enum TierError {
    /// The backend keeps its blocks to itself.
    #[error("this backend cannot move KV blocks out of its memory")]
    Unsupported,
    /// The store cannot be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The system refuses a thread.
    #[error("no thread for the KV tier: {0}")]
    Thread(std::io::Error),
}

/// Counters of the tier since the start, and gauges now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TierStats {
    /// Of the store on disk.
    pub store: StoreStats,
    /// Bytes of one block.
    pub block_bytes: u64,
    /// Blocks waiting to be written.
    pub queued: u64,
    /// Blocks not written because the disk did not keep up or was left alone.
    pub dropped: u64,
    /// Admissions whose next blocks were loaded.
    pub loads: u64,
    /// Admissions whose next blocks lay on disk and were computed, because that was thought faster.
    pub prefills: u64,
    /// Blocks that were asked for ahead of the admission of their sequences.
    pub ahead: u64,
    /// Loads cut short, by a fault or because they took too long; the rest was computed.
    pub given_up: u64,
    /// Whether loads are tried now.
    pub reads: bool,
}

/// An open tier, ready for an engine.
pub struct DiskTier {
    store: Arc<Store>,
    writer: Writer,
    reader: Reader,
    ahead: Ahead,
    /// Sequences that arrived since the last plan.
    arrived: Vec<SequenceId>,
    reads: Breaker,
    speeds: Speeds,
    /// Of live sequences.
    chains: HashMap<SequenceId, Chain>,
    loads: HashMap<SequenceId, Load>,
    next_ticket: u64,
    /// Most blocks put in place between two steps.
    in_blocks: usize,
    stats: TierStats,
}

/// A sequence's blocks by name.
#[derive(Default)]
struct Chain {
    /// Of its full blocks, from the first on; of all that are in the prefix tree, or of its prompt.
    keys: Vec<BlockKey>,
    /// How many of them are on disk or on their way.
    offered: usize,
    /// Its session's.
    label: Label,
    /// Whether its session was deleted: nothing more of it is written then.
    deleted: bool,
    /// While it waits to be admitted: that the system fetches what it will load.
    hint: Option<Hint>,
}

/// A sequence that waits for its blocks.
struct Load {
    ticket: u64,
    wanted: usize,
    done: usize,
    deadline: Instant,
    cancelled: Arc<AtomicBool>,
}

impl Drop for Load {
    fn drop(&mut self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }
}

/// The part of the tier that moves while the step loop sleeps.
#[derive(Clone)]
pub(crate) struct TierWatch {
    store: Arc<Store>,
    queue: Queue,
}

impl TierWatch {
    /// Completes what the step loop published.
    pub fn complete(&self, stats: &mut TierStats) {
        stats.store = self.store.stats();
        stats.queued = self.queue.len() as u64;
        stats.dropped += self.queue.dropped();
    }

    /// The names of a prompt's full blocks but for its last token's, which is computed anyway; none of a prompt
    /// too short to be kept.
    pub fn keys(&self, prompt: &[u32]) -> Vec<BlockKey> {
        let (blocks, _) = prompt[..prompt.len().saturating_sub(1)].as_chunks::<BLOCK_SIZE>();
        let mut parent = self.store.root();
        let name = |tokens| {
            parent = parent.child(tokens);
            parent
        };
        if blocks.len() < LEAST_BLOCKS { Vec::new() } else { blocks.iter().map(name).collect() }
    }

    /// Whether there is anything on disk of a session with a key.
    pub fn keeps(&self, key: &str) -> bool {
        self.store.bears(Label::of(key))
    }

    /// Whether all is written that is to be.
    pub fn is_written(&self) -> bool {
        self.queue.is_empty()
    }
}

impl DiskTier {
    /// Opens the tier of a model.
    ///
    /// # Errors
    /// If the folder cannot be used or is in use, the capacity is too small, or the backend cannot move blocks.
    pub fn open(config: &TierConfig, model: &dyn Model) -> Result<Self, TierError> {
        let disk = Disk::open(&config.folder).map_err(StoreError::from)?;
        Self::open_on(Arc::new(disk), config.capacity, model)
    }

    /// As [`Self::open`], on any medium.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_on(medium: Arc<dyn Medium>, capacity: u64, model: &dyn Model) -> Result<Self, TierError> {
        let block = model.kv_block().ok_or(TierError::Unsupported)?;
        let store = Store::open(medium, capacity, block.bytes, Fingerprint(block.fingerprint))?;
        let store = Arc::new(store);
        Ok(Self {
            in_blocks: blocks_in(IN_BYTES, block.bytes),
            writer: Writer::start(store.clone()).map_err(TierError::Thread)?,
            reader: Reader::start(store.clone()).map_err(TierError::Thread)?,
            ahead: start_ahead(store.clone()).map_err(TierError::Thread)?,
            arrived: Vec::new(),
            reads: Breaker::default(),
            speeds: Speeds::default(),
            chains: HashMap::new(),
            loads: HashMap::new(),
            next_ticket: 0,
            stats: TierStats { block_bytes: block.bytes as u64, ..TierStats::default() },
            store,
        })
    }

    /// Has every load tried, and waits minutes for it. For tests, where a stalled thread is not a slow disk.
    #[doc(hidden)]
    #[must_use]
    pub fn patient(self) -> Self {
        Self { speeds: Speeds::patient(), ..self }
    }

    /// What the step loop knows; [`TierWatch`] adds the rest.
    pub(crate) fn stats(&self) -> TierStats {
        TierStats { reads: self.reads.allows(Instant::now()), ..self.stats }
    }

    /// A view of what other threads do, for any thread.
    pub(crate) fn watch(&self) -> TierWatch {
        TierWatch { store: self.store.clone(), queue: self.writer.queue() }
    }

    /// Tokens that can be read.
    pub fn tokens(&self) -> usize {
        self.store.stats().blocks as usize * BLOCK_SIZE
    }

    /// Most bytes on disk.
    pub fn capacity(&self) -> u64 {
        self.store.capacity()
    }

    // ---- in --------------------------------------------------------------------------------

    /// A sequence has arrived whose prompt's blocks have these names, from [`TierWatch::keys`].
    pub(crate) fn expect(&mut self, id: SequenceId, keys: Vec<BlockKey>) {
        self.chains.entry(id).or_default().keys = keys;
        self.arrived.push(id);
    }

    /// After a plan: those that arrived and must wait will soon want what the disk has of them.
    pub(crate) fn read_ahead(&mut self, scheduler: &Scheduler) {
        for id in std::mem::take(&mut self.arrived) {
            // Who was admitted has blocks.
            let waiting = scheduler.sequence(id).filter(|sequence| sequence.blocks.is_empty());
            let Some(sequence) = waiting.filter(|_| self.reads.allows(Instant::now())) else { continue };
            let keys = self.keys_on_disk(id, sequence, scheduler.cached_blocks(id));
            let blocks = keys.len();
            let hint = if keys.is_empty() { None } else { self.ahead.fetch(keys) };
            if let (Some(hint), Some(chain)) = (hint, self.chains.get_mut(&id)) {
                self.stats.ahead += blocks as u64;
                chain.hint = Some(hint);
            }
        }
    }

    /// Of the sequences that `plan` admits, holds those whose next blocks come sooner from disk.
    pub(crate) fn hold(&mut self, scheduler: &mut Scheduler, plan: &mut StepPlan) {
        for id in &plan.preempted {
            self.loads.remove(id);
        }
        for index in 0..plan.admitted.len() {
            let (id, cached) = plan.admitted[index];
            if let Some(chain) = self.chains.get_mut(&id) {
                // What is not in the page cache by now is read or computed.
                chain.hint = None;
            }
            let Some(sequence) = scheduler.sequence(id) else { continue };
            let keys = self.keys_on_disk(id, sequence, cached / BLOCK_SIZE);
            if !keys.is_empty() && self.prefers_load(keys.len()) {
                self.load(id, keys);
                scheduler.hold(plan, id);
            }
        }
    }

    /// The blocks on disk that continue a sequence's first `cached` ones, within its prompt and less its
    /// last token, from which the first new one is drawn.
    fn keys_on_disk(&mut self, id: SequenceId, sequence: &Sequence, cached: usize) -> Vec<BlockKey> {
        let end = (sequence.prompt_len - 1) / BLOCK_SIZE;
        if end < LEAST_BLOCKS || end <= cached || sequence.is_scoring() {
            return Vec::new();
        }
        let chain = self.chains.entry(id).or_default();
        chain.extend(self.store.root(), sequence, end);
        let rest = &chain.keys[cached..end];
        rest[..self.store.readable(rest)].to_vec()
    }

    fn prefers_load(&mut self, blocks: usize) -> bool {
        let waiting: usize = self.loads.values().map(|load| load.wanted - load.done).sum();
        let bytes = self.store.block_bytes();
        let prefers = self.reads.allows(Instant::now())
            && self.speeds.prefers_load(blocks * bytes, waiting * bytes, blocks * BLOCK_SIZE);
        let count = if prefers { &mut self.stats.loads } else { &mut self.stats.prefills };
        *count += 1;
        prefers
    }

    fn load(&mut self, id: SequenceId, keys: Vec<BlockKey>) {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        let cancelled = Arc::new(AtomicBool::new(false));
        let deadline = Instant::now() + self.speeds.patience(keys.len() * BLOCK_SIZE);
        let load = Load { ticket, wanted: keys.len(), done: 0, deadline, cancelled: cancelled.clone() };
        self.loads.insert(id, load);
        self.reader.read(Order { ticket, keys, cancelled });
    }

    /// Whether a sequence waits for its blocks.
    pub(crate) fn is_loading(&self, id: SequenceId) -> bool {
        self.loads.contains_key(&id)
    }

    /// Puts blocks that have arrived in their places, and lets sequences go on whose blocks have all
    /// arrived or will not. `ended` is told each of these with the number of tokens it was given.
    pub(crate) fn fetch(
        &mut self,
        scheduler: &mut Scheduler,
        model: &mut dyn Model,
        mut ended: impl FnMut(SequenceId, usize),
    ) {
        let mut waits = false;
        for _ in 0..self.in_blocks {
            let Some(arrival) = self.reader.arrived() else {
                waits = true;
                break;
            };
            let over = match arrival {
                Arrival::Block { ticket, payload } => {
                    let over = self.place(scheduler, model, ticket, &payload);
                    self.reader.give_back(payload);
                    over
                }
                Arrival::End { ticket, bytes, took, outcome } => {
                    self.speeds.read(bytes, took);
                    match outcome {
                        // What was evicted meanwhile says nothing of the disk.
                        Ok(()) | Err(ReadError::Missing) => (),
                        Err(error) => self.read_failed(&error.to_string()),
                    }
                    self.find(ticket)
                }
            };
            if let Some(id) = over {
                ended(id, self.end_load(scheduler, id));
            }
        }
        self.give_up_late_loads(scheduler, waits, ended);
    }

    /// Gives up loads whose time is over. It speaks against the disk only where the loop waits for it and no other
    /// load was before it.
    fn give_up_late_loads(
        &mut self,
        scheduler: &mut Scheduler,
        waits: bool,
        mut ended: impl FnMut(SequenceId, usize),
    ) {
        let now = Instant::now();
        let first = self.loads.values().map(|load| load.ticket).min();
        while let Some((&id, load)) = self.loads.iter().find(|(_, load)| load.deadline <= now) {
            if waits && Some(load.ticket) == first {
                self.read_failed("reading took longer than computing would");
            }
            ended(id, self.end_load(scheduler, id));
        }
    }

    /// Waits a moment for blocks, if any are awaited.
    pub(crate) fn wait(&mut self) {
        if !self.loads.is_empty() {
            self.reader.wait(WAIT);
        }
    }

    /// Fills the next block of the sequence that waits for it. Returns the sequence if its load is over.
    fn place(
        &mut self,
        scheduler: &mut Scheduler,
        model: &mut dyn Model,
        ticket: u64,
        payload: &[u8],
    ) -> Option<SequenceId> {
        let id = self.find(ticket)?;
        let sequence = scheduler.sequence(id)?;
        let block = *sequence.blocks.get(sequence.computed / BLOCK_SIZE)?;
        match model.import_block(block, payload) {
            Ok(()) => {
                scheduler.restored(id, 1);
                let load = self.loads.get_mut(&id)?;
                load.done += 1;
                let whole = load.done == load.wanted;
                if whole {
                    self.reads.success();
                }
                whole.then_some(id)
            }
            Err(error) => {
                tracing::warn!(%error, "a KV block could not be put in place");
                Some(id)
            }
        }
    }

    fn find(&self, ticket: u64) -> Option<SequenceId> {
        self.loads.iter().find(|(_, load)| load.ticket == ticket).map(|(&id, _)| id)
    }

    fn read_failed(&mut self, error: &str) {
        if let Some(pause) = self.reads.failure(Instant::now()) {
            tracing::warn!(error, ?pause, "KV blocks cannot be read from disk; pausing");
        }
    }

    /// Lets a sequence go on; returns how many tokens it was given.
    fn end_load(&mut self, scheduler: &mut Scheduler, id: SequenceId) -> usize {
        scheduler.go_on(id);
        let Some(load) = self.loads.remove(&id) else { return 0 };
        self.stats.given_up += u64::from(load.done < load.wanted);
        load.done * BLOCK_SIZE
    }

    // ---- out -------------------------------------------------------------------------------

    /// A sequence was admitted: what is written of it bears its session's label.
    pub(crate) fn label(&mut self, id: SequenceId, label: Label) {
        self.chains.entry(id).or_default().label = label;
    }

    /// What bears a label goes last when the disk needs room, or no longer.
    pub(crate) fn pin(&self, label: Label, pinned: bool) {
        self.writer.queue_job(Job::Pin(label, pinned));
    }

    /// Keeps a record of what bears a label, once what is queued is written; in place of one that waits already, where that stood.
    pub(crate) fn record(&self, label: Label, record: &SessionRecord) {
        self.writer.queue_record(label, record.encode());
    }

    /// The records of an earlier process whose KV is still on disk, oldest first. Others go.
    pub(crate) fn past_sessions(&self) -> Vec<SessionRecord> {
        let found = self.store.read_records(MAX_SESSIONS).unwrap_or_else(|error| {
            tracing::warn!(%error, "sessions on disk cannot be listed");
            Vec::new()
        });
        let past = found.into_iter().filter_map(|(label, body)| {
            let record = SessionRecord::decode(&body).filter(|record| self.tokens_at(&record.marks) > 0);
            if record.is_none() {
                self.store.remove_record(label);
            }
            record
        });
        past.collect()
    }

    /// The session of a live sequence is being deleted: nothing more of that sequence is written.
    pub(crate) fn forsake(&mut self, id: SequenceId) {
        self.chains.entry(id).or_default().deleted = true;
    }

    /// Erases what bears a label and what nobody else has used, once all that is queued is written.
    pub(crate) fn erase(&self, label: Label) {
        self.writer.queue_erasure(label);
    }

    /// After a step: learns how fast it was, and has the blocks written that its sequences have filled.
    pub(crate) fn keep(
        &mut self,
        scheduler: &Scheduler,
        model: &mut dyn Model,
        plan: &StepPlan,
        took: Duration,
    ) {
        let tokens: usize = plan.chunks.iter().map(|chunk| chunk.len).sum();
        let outputs: usize = plan.chunks.iter().map(|chunk| chunk.outputs).sum();
        if outputs * 2 <= tokens {
            self.speeds.computed(tokens, took);
        }
        let mut room = blocks_in(OUT_BYTES, self.store.block_bytes());
        for chunk in &plan.chunks {
            if let Some(sequence) = scheduler.sequence(chunk.id) {
                self.offer(chunk.id, sequence, model, &mut room);
            }
        }
    }

    /// Names by which it can be told later how much of a live sequence is on disk: of every
    /// [`LEAST_BLOCKS`]th block.
    pub(crate) fn marks(&self, id: SequenceId) -> Vec<BlockKey> {
        let keys = self.chains.get(&id).map_or(&[][..], |chain| &chain.keys);
        keys.chunks_exact(LEAST_BLOCKS).map(|keys| keys[LEAST_BLOCKS - 1]).collect()
    }

    /// How many of a live sequence's [marks](Self::marks) are on disk or on their way.
    pub(crate) fn marks_on_disk(&self, id: SequenceId) -> usize {
        self.chains.get(&id).map_or(0, |chain| chain.offered / LEAST_BLOCKS)
    }

    /// Tokens on disk of what had these marks; may be short by one mark's.
    pub(crate) fn tokens_at(&self, marks: &[BlockKey]) -> usize {
        self.store.readable(marks) * LEAST_BLOCKS * BLOCK_SIZE
    }

    /// Before a sequence is forgotten: has more of its blocks written, as after a step.
    pub(crate) fn end(&mut self, scheduler: &Scheduler, model: &mut dyn Model, id: SequenceId) {
        self.loads.remove(&id);
        if let Some(sequence) = scheduler.sequence(id) {
            self.offer(id, sequence, model, &mut blocks_in(OUT_BYTES, self.store.block_bytes()));
            let chain = self.chains.get(&id).filter(|chain| !chain.deleted);
            if let Some(chain) = chain.filter(|_| sequence.indexed_blocks() >= LEAST_BLOCKS) {
                self.stats.dropped += sequence.indexed_blocks().saturating_sub(chain.offered) as u64;
            }
        }
        self.chains.remove(&id);
    }

    /// Queues a sequence's full blocks that are not on disk, at most `room` of them.
    fn offer(&mut self, id: SequenceId, sequence: &Sequence, model: &mut dyn Model, room: &mut usize) {
        let full = sequence.indexed_blocks();
        if full < LEAST_BLOCKS {
            return;
        }
        let chain = self.chains.entry(id).or_default();
        if chain.deleted {
            return;
        }
        chain.extend(self.store.root(), sequence, full);
        while chain.offered < full {
            let rest = &chain.keys[chain.offered..full];
            chain.offered += self.store.touch(rest, chain.label);
            if chain.offered == full || *room == 0 {
                return;
            }
            let Some(mut payload) = self.writer.buffer(Instant::now()) else { return };
            let (index, key) = (chain.offered, chain.keys[chain.offered]);
            if model.export_block(sequence.blocks[index], &mut payload).is_err()
                || !self.store.announce(key, chain.label)
            {
                return self.writer.give_back(payload);
            }
            let tokens = *sequence.block_tokens(index);
            self.writer.queue_job(Job::Write(Block { key, tokens, payload }));
            chain.offered += 1;
            *room -= 1;
        }
    }
}

fn start_ahead(store: Arc<Store>) -> std::io::Result<Ahead> {
    Ahead::start(move |keys| store.read_ahead(keys))
}

/// Blocks in so many bytes; at least one.
fn blocks_in(bytes: usize, block_bytes: usize) -> usize {
    (bytes / block_bytes.max(1)).max(1)
}

impl Chain {
    /// Names a sequence's blocks up to `blocks`, which are full.
    fn extend(&mut self, root: BlockKey, sequence: &Sequence, blocks: usize) {
        for index in self.keys.len()..blocks {
            let parent = self.keys.last().copied().unwrap_or(root);
            self.keys.push(parent.child(sequence.block_tokens(index)));
        }
    }
}

#[cfg(test)]
mod tests {
    use rudder_model::{KvBlock, ModelConfig};
    use rudder_ops::{Batch, OpError, SampleRow, Sampled};
    use rudder_scheduler::{Origin, Policy, SchedulerConfig};

    use super::*;

    /// A model of which only blocks are wanted.
    struct Blocks;

    impl Model for Blocks {
        fn config(&self) -> &ModelConfig {
            unimplemented!()
        }
        fn forward(&mut self, _: &Batch) -> Result<(), OpError> {
            unimplemented!()
        }
        fn sample(&mut self, _: &[SampleRow<'_>], _: &mut Vec<Sampled>) -> Result<(), OpError> {
            unimplemented!()
        }
        fn logits(&mut self) -> Result<Vec<f32>, OpError> {
            unimplemented!()
        }
        fn kv_block(&self) -> Option<KvBlock> {
            Some(KvBlock { bytes: 4096, fingerprint: [7; 32] })
        }
        fn import_block(&mut self, _: u32, _: &[u8]) -> Result<(), OpError> {
            Ok(())
        }
    }

    fn open(folder: &std::path::Path) -> DiskTier {
        let config = TierConfig { folder: folder.into(), capacity: 1 << 20 };
        // One block at a time is put in place.
        DiskTier { in_blocks: 1, ..DiskTier::open(&config, &Blocks).unwrap().patient() }
    }

    /// A prompt of so many blocks that lie on disk.
    fn store(tier: &DiskTier, blocks: usize) -> Vec<u32> {
        let mut parent = tier.store.root();
        for _ in 0..blocks {
            parent = parent.child(&[5; BLOCK_SIZE]);
            tier.store.announce(parent, Label::NOBODY);
            tier.store.write(parent, [5; BLOCK_SIZE], &[0; 4096]).unwrap();
        }
        vec![5; blocks * BLOCK_SIZE + 1]
    }

    fn admit(tier: &mut DiskTier, scheduler: &mut Scheduler, id: SequenceId, prompt: Vec<u32>) {
        let mut plan = StepPlan::default();
        scheduler.add(id, prompt, false, Origin::default());
        scheduler.plan(&mut plan);
        tier.hold(scheduler, &mut plan);
        assert!(tier.is_loading(id));
    }

    fn scheduler() -> Scheduler {
        Scheduler::new(SchedulerConfig {
            blocks: 64,
            max_sequences: 2,
            max_batch_tokens: 64,
            max_drafted: 0,
            prefix_cache: true,
            policy: Policy::Fair,
        })
    }

    /// Takes in the next arrival; returns the loads that ended, and with how many tokens.
    fn fetch_one(tier: &mut DiskTier, scheduler: &mut Scheduler) -> Vec<(SequenceId, usize)> {
        let mut over = Vec::new();
        tier.reader.wait(Duration::from_secs(60));
        tier.fetch(scheduler, &mut Blocks, |id, tokens| over.push((id, tokens)));
        over
    }

    #[test]
    fn a_load_whose_time_is_over_is_given_up_although_its_blocks_keep_arriving() {
        let folder = tempfile::tempdir().unwrap();
        let (mut tier, mut scheduler) = (open(folder.path()), scheduler());
        let prompt = store(&tier, 20);
        admit(&mut tier, &mut scheduler, 1, prompt);
        assert_eq!(fetch_one(&mut tier, &mut scheduler), []);
        tier.loads.get_mut(&1).unwrap().deadline = Instant::now();
        assert_eq!(fetch_one(&mut tier, &mut scheduler), [(1, 2 * BLOCK_SIZE)]);
        assert_eq!(tier.stats().given_up, 1);
    }

    #[test]
    fn a_load_that_came_too_late_speaks_against_the_disk_although_it_came() {
        let folder = tempfile::tempdir().unwrap();
        let (mut tier, mut scheduler) = (open(folder.path()), scheduler());
        store(&tier, 1);
        let keys = vec![tier.store.root().child(&[5; BLOCK_SIZE])];
        for ticket in 0..3 {
            assert!(tier.stats().reads);
            let (deadline, cancelled) = (Instant::now(), Arc::<AtomicBool>::default());
            let load = Load { ticket, wanted: 1, done: 0, deadline, cancelled: cancelled.clone() };
            tier.loads.insert(ticket, load);
            tier.fetch(&mut scheduler, &mut Blocks, |_, _| ());
            tier.reader.read(Order { ticket, keys: keys.clone(), cancelled: Arc::default() });
            // The block and the end.
            (0..2).for_each(|_| assert_eq!(fetch_one(&mut tier, &mut scheduler), []));
        }
        assert!(!tier.stats().reads);
    }
}
