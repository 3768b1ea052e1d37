//! A model made of ranks: each holds a part of every layer, and all run every step together.
//!
//! Rank 0 runs on the caller's thread, each other one on a thread of its own that sleeps between steps. A rank that fails or panics
//! ends the step of all with its error; the next step finds them ready again.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::{Builder, JoinHandle};

use rudder_comm::{Group, Rank};
use rudder_ops::{Backend, Batch, OpError, SampleRow, Sampled};

use crate::decoder::Decoder;
use crate::fingerprint::Fingerprint;
use crate::load::kv_blocks_in;
use crate::{KvBlock, KvSize, LoadError, LoadOptions, Loaded, Model, ModelConfig, ModelSource};

/// One rank's part of the model, which its thread holds in a step and anybody between two.
type Part = Arc<Mutex<Box<dyn Model>>>;

/// The ranks as one model.
pub(crate) struct Ranks {
    config: ModelConfig,
    kv_block: Option<KvBlock>,
    group: Group,
    parts: Vec<Part>,
    /// The step that all ranks run.
    batch: Arc<RwLock<Batch>>,
    /// Of the ranks from 1 on.
    workers: Vec<Worker>,
}

/// A rank's thread.
struct Worker {
    /// Begins a step; without it the thread ends.
    begin: Option<SyncSender<()>>,
    done: Receiver<()>,
    thread: Option<JoinHandle<()>>,
}

impl ModelSource {
    /// Whether the model can be cut for `world` ranks. Reads no weights.
    ///
    /// # Errors
    /// If not; says why, which tensor stands in the way, and for how many ranks it can be cut.
    pub fn check_ranks(&self, world: usize) -> Result<(), LoadError> {
        self.cut(world).map(drop)
    }

    /// Cuts the model and loads a part onto each of `backends`, which are the members of `group` in their order. The options are those
    /// of the whole model; a KV cache's bytes are shared by the ranks.
    ///
    /// # Errors
    /// As [`ModelSource::check_ranks`] and [`ModelSource::load`].
    pub fn load_ranks<B: Backend>(
        &self,
        group: Group,
        backends: Vec<B>,
        options: LoadOptions,
        mut progress: impl FnMut(u64, u64) + Send,
    ) -> Result<Loaded, LoadError> {
        let world = group.world();
        let ranks = backends.iter().map(Backend::rank);
        if !ranks.eq((0..world).map(|index| Rank { index, world })) {
            return Err(LoadError::Options(format!("{world} ranks need a backend each, in their order")));
        }
        let kv_block_bytes = backends.first().map_or(0, |backend| self.kv_block_bytes(backend));
        let mut decoders = self.load_parts(backends, options, &mut progress)?;
        let weight_bytes = self.weight_bytes();
        progress(weight_bytes, weight_bytes);
        if let KvSize::DeviceShare(share) = options.kv {
            fill_memory(&group, &mut decoders, share, kv_block_bytes / world as u64)?;
        }
        let kv_blocks = decoders.first().map_or(0, |decoder| decoder.limits.kv_blocks);
        let parts = decoders.into_iter().map(|decoder| Box::new(decoder) as Box<dyn Model>).collect();
        let model = Ranks::new(group, self.config().clone(), parts)?;
        let kv_bytes = kv_block_bytes.saturating_mul(kv_blocks as u64);
        Ok(Loaded { model: Box::new(model), kv_blocks, kv_bytes, weight_bytes })
    }

    /// Loads all parts at the same time, each on a thread of its own.
    fn load_parts<B: Backend>(
        &self,
        backends: Vec<B>,
        options: LoadOptions,
        progress: impl FnMut(u64, u64) + Send,
    ) -> Result<Vec<Decoder<B>>, LoadError> {
        let cut = self.cut(backends.len())?;
        let shards: Vec<_> = backends.iter().map(|backend| cut.shard(backend.rank())).collect();
        let done = Mutex::new((progress, vec![0; shards.len()]));
        let report = |rank: usize, bytes: u64, total: u64| {
            let (progress, done) = &mut *lock(&done);
            done[rank] = bytes;
            // What every rank has is counted by each.
            progress(done.iter().sum::<u64>().min(total), total);
        };
        let report = &report;
        std::thread::scope(|scope| {
            let threads: Vec<_> = backends
                .into_iter()
                .zip(&shards)
                .enumerate()
                .map(|(rank, (backend, shard))| {
                    let progress = move |bytes, total| report(rank, bytes, total);
                    scope.spawn(move || self.decoder(backend, shard, options, progress))
                })
                .collect();
            let loaded = threads.into_iter().map(|thread| thread.join().unwrap_or_else(|e| resume_unwind(e)));
            loaded.collect()
        })
    }
}

/// Runs a largest step on all ranks, then gives each as many KV blocks, of `block_bytes` on a rank, as this share of the device with the
/// least room holds.
fn fill_memory<B: Backend>(
    group: &Group,
    decoders: &mut [Decoder<B>],
    share: f64,
    block_bytes: u64,
) -> Result<(), LoadError> {
    std::thread::scope(|scope| {
        for (rank, decoder) in decoders.iter_mut().enumerate() {
            scope.spawn(move || attempt(group, rank, || decoder.rehearse()));
        }
    });
    if let Some(failed) = group.mend() {
        return Err(LoadError::Backend(OpError::Backend(failed.reason)));
    }
    let mut least = usize::MAX;
    for decoder in &*decoders {
        least = least.min(kv_blocks_in(share, decoder.backend.memory()?, block_bytes)?);
    }
    decoders.iter_mut().try_for_each(|decoder| decoder.set_kv_blocks(least))?;
    Ok(())
}

impl Ranks {
    /// The parts of a model that is `config` as a whole, the members of `group` in their order.
    fn new(group: Group, config: ModelConfig, parts: Vec<Box<dyn Model>>) -> Result<Self, LoadError> {
        let kv_blocks: Option<Vec<KvBlock>> = parts.iter().map(|part| part.kv_block()).collect();
        let kv_block = kv_blocks.map(|blocks| KvBlock {
            bytes: blocks.iter().map(|block| block.bytes).sum(),
            fingerprint: Fingerprint::of_ranks(blocks.iter().map(|block| block.fingerprint)),
        });
        let parts: Vec<Part> = parts.into_iter().map(|part| Arc::new(Mutex::new(part))).collect();
        let batch = Arc::default();
        let workers = parts.iter().enumerate().skip(1);
        let workers = workers.map(|(rank, part)| Worker::start(&group, rank, part, &batch));
        let workers = workers.collect::<Result<_, _>>().map_err(|error| {
            LoadError::Backend(OpError::Backend(format!("cannot start a rank's thread: {error}")))
        })?;
        Ok(Self { config, kv_block, group, parts, batch, workers })
    }

    fn first(&self) -> MutexGuard<'_, Box<dyn Model>> {
        lock(&self.parts[0])
    }

    /// Bytes of each rank's piece of a block of so many bytes: they lie one after the other.
    fn piece(&self, bytes: usize) -> Result<usize, OpError> {
        match self.kv_block {
            Some(block) if block.bytes == bytes => Ok(bytes / self.parts.len()),
            Some(block) => {
                Err(OpError::Backend(format!("a KV block of {bytes} bytes; a block has {}", block.bytes)))
            }
            None => Err(OpError::Backend("this model does not move KV blocks".into())),
        }
    }
}

impl Model for Ranks {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn forward(&mut self, batch: &Batch) -> Result<(), OpError> {
        self.batch.write().unwrap_or_else(PoisonError::into_inner).copy_from(batch);
        for (worker, rank) in self.workers.iter().zip(1..) {
            if !worker.begin() {
                self.group.fail(rank, format!("the thread of rank {rank} is gone"));
            }
        }
        run(&self.group, 0, &self.parts[0], batch);
        self.workers.iter().for_each(Worker::wait);
        self.group.mend().map_or(Ok(()), |failed| Err(OpError::Backend(failed.reason)))
    }

    fn sample(&mut self, rows: &[SampleRow<'_>], out: &mut Vec<Sampled>) -> Result<(), OpError> {
        self.first().sample(rows, out)
    }

    fn kv_block(&self) -> Option<KvBlock> {
        self.kv_block
    }

    fn export_block(&mut self, block: u32, out: &mut [u8]) -> Result<(), OpError> {
        let piece = self.piece(out.len())?;
        let mut parts = self.parts.iter().zip(out.chunks_mut(piece));
        parts.try_for_each(|(part, out)| lock(part).export_block(block, out))
    }

    fn import_block(&mut self, block: u32, bytes: &[u8]) -> Result<(), OpError> {
        let piece = self.piece(bytes.len())?;
        let mut parts = self.parts.iter().zip(bytes.chunks(piece));
        parts.try_for_each(|(part, bytes)| lock(part).import_block(block, bytes))
    }

    fn logits(&mut self) -> Result<Vec<f32>, OpError> {
        self.first().logits()
    }
}

impl Worker {
    fn start(group: &Group, rank: usize, part: &Part, batch: &Arc<RwLock<Batch>>) -> std::io::Result<Self> {
        let (begin, begun) = sync_channel(1);
        let (finish, done) = sync_channel(1);
        let (group, part, batch) = (group.clone(), part.clone(), batch.clone());
        let work = move || {
            while begun.recv().is_ok() {
                run(&group, rank, &part, &batch.read().unwrap_or_else(PoisonError::into_inner));
                if finish.send(()).is_err() {
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

    /// Waits until the step is done; where the thread is gone, there is none.
    fn wait(&self) {
        let _ = self.done.recv();
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
fn run(group: &Group, rank: usize, part: &Part, batch: &Batch) {
    let mut part = lock(part);
    attempt(group, rank, || part.forward(batch));
}

/// Does a rank's share of what all do. An error or a panic ends the others' shares too.
fn attempt(group: &Group, rank: usize, work: impl FnOnce() -> Result<(), OpError>) {
    let reason = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.to_string(),
        Err(panic) => format!("rank {rank} panicked: {}", message(&*panic)),
    };
    group.fail(rank, reason);
}

/// What a panic says.
fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it does not say why")
}

/// Nothing that is locked here is left half done by a panic.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hf_config;
    use rudder_comm::Member;

    fn config() -> ModelConfig {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/qwen2/config.json");
        hf_config::parse(&std::fs::read(file).expect("a fixture")).expect("a configuration").config
    }

    /// What a rank does in a step, by the step's number.
    #[derive(Clone, Copy, PartialEq)]
    enum Fault {
        Error(usize),
        Panic(usize),
        None,
    }

    /// A model of one collective a layer that fails in the middle of a step.
    struct Fake {
        config: ModelConfig,
        member: Member,
        fault: Fault,
        steps: usize,
        sum: f32,
    }

    impl Model for Fake {
        fn config(&self) -> &ModelConfig {
            &self.config
        }
        fn forward(&mut self, batch: &Batch) -> Result<(), OpError> {
            self.steps += 1;
            let mut x = [batch.tokens[0] as f32];
            for layer in 0..10 {
                if layer == 4 && self.fault == Fault::Error(self.steps) {
                    return Err(OpError::Backend("no memory".into()));
                }
                assert!(layer != 6 || self.fault != Fault::Panic(self.steps), "a defect");
                self.member.all_reduce(&mut x)?;
            }
            self.sum = x[0];
            Ok(())
        }
        fn sample(&mut self, _: &[SampleRow<'_>], _: &mut Vec<Sampled>) -> Result<(), OpError> {
            Ok(())
        }
        fn logits(&mut self) -> Result<Vec<f32>, OpError> {
            Ok(vec![self.sum])
        }
    }

    fn ranks(faults: [Fault; 3]) -> Ranks {
        let group = Group::new(3);
        let parts = group.members().into_iter().zip(faults).map(|(member, fault)| {
            Box::new(Fake { config: config(), member, fault, steps: 0, sum: 0.0 }) as Box<dyn Model>
        });
        let parts = parts.collect();
        Ranks::new(group, config(), parts).expect("threads start")
    }

    fn step(model: &mut Ranks) -> Result<f32, String> {
        let mut batch = Batch::default();
        batch.push(&[2], 0, &[0], 1);
        model.forward(&batch).map_err(|error| error.to_string())?;
        Ok(model.logits().expect("logits")[0])
    }

    #[test]
    fn a_rank_that_fails_or_panics_ends_that_step_for_all_and_no_other() {
        let sum = Ok(2.0 * 3f32.powi(10));
        for faulty in 0..3 {
            for (fault, said) in [(Fault::Error(2), "no memory"), (Fault::Panic(2), "panicked: a defect")] {
                let mut faults = [Fault::None; 3];
                faults[faulty] = fault;
                let mut model = ranks(faults);
                assert_eq!(step(&mut model), sum);
                let message = step(&mut model).expect_err("a rank failed");
                assert!(message.contains(said), "{message}");
                assert_eq!(step(&mut model), sum);
                assert_eq!(step(&mut model), sum);
            }
        }
    }

    #[test]
    fn ranks_that_fail_together_name_one_reason_and_go_on() {
        let mut model = ranks([Fault::Error(1), Fault::Panic(1), Fault::Error(2)]);
        assert_eq!(step(&mut model), Err("no memory".into()));
        assert_eq!(step(&mut model), Err("no memory".into()));
        assert!(step(&mut model).is_ok());
        assert!(model.kv_block().is_none() && model.export_block(0, &mut []).is_err());
    }
}
