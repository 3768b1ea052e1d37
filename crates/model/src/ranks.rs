//! A model made of ranks: each holds a part of every layer, and all run every step together.
//!
//! The ranks may be of several processes (nodes). Then node 0 has the model, as far as anybody above can see, and tells the others each step's
//! batch; a [`Node`] runs what it is told. Where steps are queued ahead, it is told a step before anybody knows the tokens, and is asked whether
//! the one before went well there when rank 0's draw has come.

use std::panic::resume_unwind;
use std::sync::{Mutex, MutexGuard};

use rudder_comm::{Failed, Group, Rank};
use rudder_ops::{Backend, Batch, OpError, SampleRow, Sampled};

use crate::batch_bytes::{self, Told};
use crate::crew::{Crew, attempt, lock};
use crate::decoder::Decoder;
use crate::fingerprint::Fingerprint;
use crate::load::kv_blocks_in;
use crate::{KvBlock, KvSize, LoadError, LoadOptions, Loaded, Model, ModelConfig, ModelSource};

/// The ranks as one model.
pub(crate) struct Ranks {
    config: ModelConfig,
    kv_block: Option<KvBlock>,
    crew: Crew,
    /// What other nodes are told.
    bytes: Vec<u8>,
}

/// Ranks of a model whose node 0 is another process.
pub struct Node {
    crew: Crew,
    /// Blocks in the KV cache, the same number on all nodes.
    pub kv_blocks: usize,
}

/// What a node has loaded.
struct Parts<B: Backend> {
    decoders: Vec<Decoder<B>>,
    kv_blocks: usize,
    /// Of all ranks of all nodes together.
    kv_block_bytes: u64,
}

/// What other nodes have to say about loading.
fn refused(failed: Failed) -> LoadError {
    LoadError::Backend(OpError::Backend(failed.reason))
}

impl ModelSource {
    /// Whether the model can be cut for `world` ranks. Reads no weights.
    ///
    /// # Errors
    /// If not; says why, which tensor stands in the way, and for how many ranks it can be cut.
    pub fn check_ranks(&self, world: usize) -> Result<(), LoadError> {
        self.cut(world).map(drop)
    }

    /// Cuts the model and loads a part onto each of `backends`, which are the members of `group` in this process in their order. The options
    /// are those of the whole model; a KV cache's bytes are shared by the ranks. Over several nodes, this is node 0, its options hold for
    /// all, and there are as many KV blocks as the node with the least room for them has.
    ///
    /// # Errors
    /// As [`ModelSource::check_ranks`] and [`ModelSource::load`], or if another node fails.
    pub fn load_ranks<B: Backend>(
        &self,
        group: Group,
        backends: Vec<B>,
        options: LoadOptions,
        progress: impl FnMut(u64, u64) + Send,
    ) -> Result<Loaded, LoadError> {
        let Parts { decoders, kv_blocks, kv_block_bytes } =
            self.load_here(&group, backends, options, progress)?;
        let model = Ranks::new(group, self.config().clone(), boxed(decoders))?;
        let kv_bytes = kv_block_bytes.saturating_mul(kv_blocks as u64);
        Ok(Loaded { model: Box::new(model), kv_blocks, kv_bytes, weight_bytes: self.weight_bytes() })
    }

    /// The same on another node, where `group`'s node 0 has called [`ModelSource::load_ranks`].
    ///
    /// # Errors
    /// As there.
    pub fn load_node<B: Backend>(
        &self,
        group: Group,
        backends: Vec<B>,
        options: LoadOptions,
        progress: impl FnMut(u64, u64) + Send,
    ) -> Result<Node, LoadError> {
        let Parts { decoders, kv_blocks, .. } = self.load_here(&group, backends, options, progress)?;
        Ok(Node { crew: Crew::new(group, boxed(decoders))?, kv_blocks })
    }

    fn load_here<B: Backend>(
        &self,
        group: &Group,
        backends: Vec<B>,
        options: LoadOptions,
        mut progress: impl FnMut(u64, u64) + Send,
    ) -> Result<Parts<B>, LoadError> {
        let loaded = self.load_agreed(group, backends, options, &mut progress);
        match &loaded {
            Ok(_) => progress(self.weight_bytes(), self.weight_bytes()),
            Err(error) => group.withdraw(error.to_string()),
        }
        loaded
    }

    fn load_agreed<B: Backend>(
        &self,
        group: &Group,
        backends: Vec<B>,
        options: LoadOptions,
        progress: impl FnMut(u64, u64) + Send,
    ) -> Result<Parts<B>, LoadError> {
        let world = group.world();
        let ranks = backends.iter().map(Backend::rank);
        if !ranks.eq(group.local().map(|index| Rank { index, world })) {
            return Err(LoadError::Options(format!("{world} ranks need a backend each, in their order")));
        }
        let kv_block_bytes = backends.first().map_or(0, |backend| self.kv_block_bytes(backend));
        let rehearsed = options.kv.is_rehearsed();
        let options = agree(group, options, kv_block_bytes)?;
        let mut decoders = self.load_parts(world, backends, options, progress)?;
        if rehearsed {
            rehearse(group, &mut decoders)?;
        }
        if let KvSize::DeviceShare(share) = options.kv {
            fill_memory(group, &mut decoders, share, kv_block_bytes / world as u64)?;
        } else {
            // Nobody begins before all have loaded.
            group.agree(0).map_err(refused)?;
        }
        let kv_blocks = decoders.first().map_or(0, |decoder| decoder.limits.kv_blocks);
        Ok(Parts { decoders, kv_blocks, kv_block_bytes })
    }

    /// Loads all parts at the same time, each on a thread of its own.
    fn load_parts<B: Backend>(
        &self,
        world: usize,
        backends: Vec<B>,
        options: LoadOptions,
        progress: impl FnMut(u64, u64) + Send,
    ) -> Result<Vec<Decoder<B>>, LoadError> {
        let cut = self.cut(world)?;
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

fn boxed<B: Backend>(decoders: Vec<Decoder<B>>) -> Vec<Box<dyn Model>> {
    decoders.into_iter().map(|decoder| Box::new(decoder) as Box<dyn Model>).collect()
}

/// The options that all nodes load with.
fn agree(group: &Group, options: LoadOptions, kv_block_bytes: u64) -> Result<LoadOptions, LoadError> {
    if group.nodes() == 1 {
        return Ok(options);
    }
    let of_first = |n: usize| group.agree(n as u64).map(|all| all[0] as usize).map_err(refused);
    let (max_batch_tokens, max_outputs) =
        (of_first(options.max_batch_tokens)?, of_first(options.max_outputs)?);
    let max_context = of_first(options.max_context)?;
    let blocks = match options.kv {
        KvSize::Blocks(blocks) => blocks as u64,
        KvSize::Bytes(bytes) => bytes / kv_block_bytes.max(1),
        KvSize::DeviceShare(_) => u64::MAX,
    };
    let all = group.agree(blocks).map_err(refused)?;
    let kv = match options.kv {
        share if all.iter().all(|&blocks| blocks == u64::MAX) => share,
        _ if all.contains(&u64::MAX) => {
            let reason =
                "kv_memory is set on some nodes and not on others; set it on all of them, or on none";
            return Err(LoadError::Options(reason.into()));
        }
        _ => KvSize::Blocks(all.into_iter().fold(usize::MAX, |least, blocks| least.min(blocks as usize))),
    };
    Ok(LoadOptions { max_batch_tokens, max_outputs, kv, max_context })
}

/// Runs a largest step on all ranks.
fn rehearse<B: Backend>(group: &Group, decoders: &mut [Decoder<B>]) -> Result<(), LoadError> {
    std::thread::scope(|scope| {
        for (rank, decoder) in group.local().zip(decoders) {
            scope.spawn(move || attempt(group, rank, || decoder.rehearse()));
        }
    });
    group.mend().map_or(Ok(()), |failed| Err(refused(failed)))
}

/// Gives each rank as many KV blocks, of `block_bytes` on a rank, as this share of the device with the least room holds.
fn fill_memory<B: Backend>(
    group: &Group,
    decoders: &mut [Decoder<B>],
    share: f64,
    block_bytes: u64,
) -> Result<(), LoadError> {
    let mut least = usize::MAX;
    for decoder in &*decoders {
        least = least.min(kv_blocks_in(share, decoder.backend.memory()?, block_bytes)?);
    }
    let least = group.agree(least as u64).map_err(refused)?.into_iter().fold(least, |a, b| a.min(b as usize));
    decoders.iter_mut().try_for_each(|decoder| decoder.set_kv_blocks(least))?;
    // Nobody begins before all are ready.
    group.agree(0).map_err(refused)?;
    Ok(())
}

impl Ranks {
    /// The parts of a model that is `config` as a whole, the members of `group` in this process in their order.
    fn new(group: Group, config: ModelConfig, parts: Vec<Box<dyn Model>>) -> Result<Self, LoadError> {
        let kv_blocks: Option<Vec<KvBlock>> = parts.iter().map(|part| part.kv_block()).collect();
        // Blocks do not move between nodes.
        let kv_block = kv_blocks.filter(|_| group.nodes() == 1).map(|blocks| KvBlock {
            bytes: blocks.iter().map(|block| block.bytes).sum(),
            fingerprint: Fingerprint::of_ranks(blocks.iter().map(|block| block.fingerprint)),
        });
        Ok(Self { config, kv_block, crew: Crew::new(group, parts)?, bytes: Vec::new() })
    }

    fn first(&self) -> MutexGuard<'_, Box<dyn Model>> {
        lock(&self.crew.parts[0])
    }

    /// Bytes of each rank's piece of a block of so many bytes: they lie one after the other.
    fn piece(&self, bytes: usize) -> Result<usize, OpError> {
        match self.kv_block {
            Some(block) if block.bytes == bytes => Ok(bytes / self.crew.parts.len()),
            Some(block) => {
                Err(OpError::Backend(format!("a KV block of {bytes} bytes; a block has {}", block.bytes)))
            }
            None => Err(OpError::Backend("this model does not move KV blocks".into())),
        }
    }

    /// Waits for the other nodes to have done what they were told, and says what failed, here or there.
    fn ended(&self) -> Result<(), OpError> {
        let group = &self.crew.group;
        group.end();
        group.mend().map_or(Ok(()), |failed| Err(OpError::Backend(failed.reason)))
    }
}

impl Model for Ranks {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn forward(&mut self, batch: &Batch) -> Result<(), OpError> {
        let group = &self.crew.group;
        if group.nodes() > 1 {
            batch_bytes::write(batch, &mut self.bytes);
            group.begin(&self.bytes);
        }
        self.crew.run(batch);
        self.ended()
    }

    fn sample(&mut self, rows: &[SampleRow<'_>], out: &mut Vec<Sampled>) -> Result<(), OpError> {
        self.first().sample(rows, out)?;
        // Of ranks that do not draw ahead nothing is left to be told.
        if self.draws_ahead() { self.landed() } else { Ok(()) }
    }

    fn draws_ahead(&self) -> bool {
        self.first().draws_ahead()
    }

    fn draw(&mut self, rows: &[SampleRow<'_>]) -> Result<(), OpError> {
        self.first().draw(rows)
    }

    fn drawn(&mut self, out: &mut Vec<Sampled>) -> Result<(), OpError> {
        self.first().drawn(out)?;
        self.landed()
    }

    fn landed(&mut self) -> Result<(), OpError> {
        self.crew.group.begin(&batch_bytes::landed());
        self.crew.landed();
        self.ended()
    }

    fn recover(&mut self) -> Result<(), OpError> {
        self.crew.recover()
    }

    fn kv_block(&self) -> Option<KvBlock> {
        self.kv_block
    }

    fn export_block(&mut self, block: u32, out: &mut [u8]) -> Result<(), OpError> {
        let piece = self.piece(out.len())?;
        let mut parts = self.crew.parts.iter().zip(out.chunks_mut(piece));
        parts.try_for_each(|(part, out)| lock(part).export_block(block, out))
    }

    fn import_block(&mut self, block: u32, bytes: &[u8]) -> Result<(), OpError> {
        let piece = self.piece(bytes.len())?;
        let mut parts = self.crew.parts.iter().zip(bytes.chunks(piece));
        parts.try_for_each(|(part, bytes)| lock(part).import_block(block, bytes))
    }

    fn logits(&mut self) -> Result<Vec<f32>, OpError> {
        self.first().logits()
    }
}

impl Node {
    /// Does what node 0 tells it, step after step, until node 0 ends.
    ///
    /// # Errors
    /// If node 0 is gone, or a rank here can be used no more; to the other nodes this one is gone then.
    pub fn run(self) -> Result<(), OpError> {
        let group = &self.crew.group;
        let gone = |failed: Failed| OpError::Backend(failed.reason);
        let (mut bytes, mut words, mut batch) = (Vec::new(), Vec::new(), Batch::default());
        while group.next(&mut bytes).map_err(gone)? {
            let well = match batch_bytes::read(&bytes, &mut words, &mut batch) {
                Ok(Told::Step) => self.crew.run(&batch),
                Ok(Told::Landed) => self.crew.landed(),
                Err(reason) => {
                    group.fail(group.local().start, reason);
                    true
                }
            };
            if !well {
                self.crew.recover()?;
            }
            group.done().map_err(gone)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hf_config;
    use rudder_comm::{Member, Terms};
    use std::net::TcpListener;
    use std::time::Duration;

    fn config() -> ModelConfig {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/qwen2/config.json");
        hf_config::parse(&std::fs::read(file).expect("a fixture")).expect("a configuration").config
    }

    /// What a rank does in a step, by the step's number.
    #[derive(Clone, Copy, PartialEq)]
    enum Fault {
        Error(usize),
        Panic(usize),
        /// When it is asked whether it went well.
        Landing(usize),
        /// From here on, for good.
        Gone(usize),
        None,
    }

    /// A model of one collective a layer that fails in the middle of a step, or afterwards. It sums known tokens, or the numbers of the outputs
    /// that are to draw them and 5.
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
            let mut x = [batch.drawn.first().map_or(batch.tokens[0], |output| output + 5) as f32];
            for layer in 0..10 {
                if layer == 4 && (self.fault == Fault::Error(self.steps) || self.is_gone()) {
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
        fn draws_ahead(&self) -> bool {
            true
        }
        fn draw(&mut self, _: &[SampleRow<'_>]) -> Result<(), OpError> {
            Ok(())
        }
        fn drawn(&mut self, _: &mut Vec<Sampled>) -> Result<(), OpError> {
            Ok(())
        }
        fn landed(&mut self) -> Result<(), OpError> {
            match self.fault == Fault::Landing(self.steps) {
                true => Err(OpError::Backend("it waited in vain".into())),
                false => Ok(()),
            }
        }
        fn recover(&mut self) -> Result<(), OpError> {
            if self.is_gone() { Err(OpError::Backend("an illegal address".into())) } else { Ok(()) }
        }
        fn logits(&mut self) -> Result<Vec<f32>, OpError> {
            Ok(vec![self.sum])
        }
    }

    impl Fake {
        fn is_gone(&self) -> bool {
            matches!(self.fault, Fault::Gone(from) if self.steps >= from)
        }
    }

    fn parts(group: &Group, faults: &[Fault]) -> Vec<Box<dyn Model>> {
        let members = group.members().into_iter();
        let part = |member: Member| {
            let fault = faults[member.rank().index];
            Box::new(Fake { config: config(), member, fault, steps: 0, sum: 0.0 }) as Box<dyn Model>
        };
        members.map(part).collect()
    }

    fn ranks(faults: [Fault; 3]) -> Ranks {
        let group = Group::new(3);
        let parts = parts(&group, &faults);
        Ranks::new(group, config(), parts).expect("threads start")
    }

    /// Has `work` do something with three ranks, each a node of its own; here these are threads that talk over TCP.
    fn over_nodes(faults: [Fault; 3], work: impl FnOnce(&mut Ranks)) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = &listener.local_addr().expect("an address").to_string();
        let terms = &Terms { nodes: 3, world: 3, others: Vec::new() };
        let patience = Duration::from_secs(30);
        std::thread::scope(|scope| {
            for node in 1..3 {
                scope.spawn(move || {
                    let group = Group::follow(address, node, terms, patience).expect("it joins");
                    let parts = parts(&group, &faults);
                    let crew = Crew::new(group, parts).expect("threads start");
                    let ended = Node { crew, kv_blocks: 0 }.run().map_err(|error| error.to_string());
                    match faults[node] {
                        Fault::Gone(_) => assert_eq!(ended, Err(format!("rank {node}: an illegal address"))),
                        // One node's end is all nodes' end.
                        _ if faults.iter().any(|fault| matches!(fault, Fault::Gone(_))) => {
                            assert!(ended.is_err())
                        }
                        _ => assert_eq!(ended, Ok(())),
                    }
                });
            }
            let group = Group::lead(listener, terms, patience).expect("all join");
            let parts = parts(&group, &faults);
            work(&mut Ranks::new(group, config(), parts).expect("threads start"));
        });
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

    #[test]
    fn a_device_that_computes_no_more_is_told_from_a_step_that_fails() {
        for faulty in 0..3 {
            let mut faults = [Fault::None; 3];
            faults[faulty] = Fault::Error(1);
            let mut model = ranks(faults);
            assert!(step(&mut model).is_err() && model.recover().is_ok());
            faults[faulty] = Fault::Gone(2);
            let mut model = ranks(faults);
            assert!(step(&mut model).is_ok() && model.recover().is_ok() && step(&mut model).is_err());
            let error = model.recover().expect_err("a rank is gone").to_string();
            assert_eq!(error, format!("rank {faulty}: an illegal address"));
        }
    }

    #[test]
    fn a_node_whose_device_computes_no_more_is_gone() {
        over_nodes([Fault::None, Fault::None, Fault::Gone(2)], |model| {
            assert!(step(model).is_ok());
            assert!(step(model).is_err() && step(model).is_err());
            assert!(model.crew.group.lost().is_some_and(|failed| failed.rank == 2));
        });
    }

    /// A step that goes on from what the second output of the one before draws.
    fn fly(model: &mut Ranks) -> Result<f32, String> {
        let mut batch = Batch::default();
        batch.push_drawn(1, 9, &[0]);
        model.forward(&batch).map_err(|error| error.to_string())?;
        Ok(model.logits().expect("logits")[0])
    }

    #[test]
    fn ranks_go_on_from_what_is_drawn_and_what_failed_meanwhile_on_one_is_told_when_it_lands() {
        let (known, drawn) = (Ok(2.0 * 3f32.powi(10)), Ok(6.0 * 3f32.powi(10)));
        let work = |faulty: Option<usize>, model: &mut Ranks| {
            let landed = |model: &mut Ranks, whole: bool| match model.drawn(&mut Vec::new()) {
                Ok(()) => assert!(whole, "{faulty:?}"),
                Err(error) => assert!(!whole && error.to_string().contains("in vain"), "{error}"),
            };
            assert_eq!((step(model), fly(model)), (known.clone(), drawn.clone()));
            landed(model, faulty.is_none());
            assert_eq!((step(model), fly(model)), (known.clone(), drawn.clone()));
            landed(model, true);
        };
        for faulty in [None, Some(0), Some(1), Some(2)] {
            let fault = |rank| if faulty == Some(rank) { Fault::Landing(2) } else { Fault::None };
            let faults = [0, 1, 2].map(fault);
            work(faulty, &mut ranks(faults));
            over_nodes(faults, |model| work(faulty, model));
        }
    }

    #[test]
    fn a_step_that_fails_behind_one_in_flight_leaves_that_one_whole() {
        for faulty in 0..3 {
            let mut faults = [Fault::None; 3];
            faults[faulty] = Fault::Error(2);
            over_nodes(faults, |model| {
                assert!(step(model).is_ok());
                assert_eq!(fly(model), Err("no memory".into()));
                assert!(model.drawn(&mut Vec::new()).is_ok());
                assert!(step(model).is_ok() && fly(model).is_ok() && model.drawn(&mut Vec::new()).is_ok());
            });
        }
    }
}
