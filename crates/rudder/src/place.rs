//! Where a model runs, and how much KV it holds there.

use anyhow::{Context, Result, bail};
use rudder_comm::Group;
use rudder_cuda::Cuda;
use rudder_hub::bytes;
use rudder_model::{KvSize, LoadError, LoadOptions, Loaded, ModelSource, Node};
use rudder_ops::BLOCK_SIZE;
use rudder_ops::cpu::{Cpu, KvDType};

use crate::kv::KvNeeds;
use crate::machine;
use crate::settings::{KvCacheDtype, ModelSettings};

/// Share of a GPU's memory that weights, workspace and KV take together, unless told otherwise.
const GPU_MEMORY_UTILIZATION: f64 = 0.9;

/// A backend, and what it is asked to hold.
pub struct Place {
    backend: Backend,
    /// Size of the KV cache.
    pub kv: KvSize,
    /// What its elements are.
    pub kv_format: &'static str,
    /// Longest sequence in tokens, if the KV cache holds so many.
    pub max_context: usize,
}

enum Backend {
    Cpu(Box<Cpu>),
    /// The ranks of a model that is cut.
    Cpus(Group, Vec<Cpu>),
    Cuda(Box<Cuda>),
    /// The same on as many GPUs.
    Cudas(Group, Vec<Cuda>),
}

impl Backend {
    /// Bytes of a KV block in all layers, on all ranks together.
    fn kv_block_bytes(&self, source: &ModelSource) -> u64 {
        match self {
            Self::Cpu(cpu) => source.kv_block_bytes(&**cpu),
            Self::Cpus(_, cpus) => cpus.first().map_or(0, |cpu| source.kv_block_bytes(cpu)),
            Self::Cuda(cuda) => source.kv_block_bytes(&**cuda),
            Self::Cudas(_, cudas) => cudas.first().map_or(0, |cuda| source.kv_block_bytes(cuda)),
        }
    }
}

impl Place {
    /// The CPU, for the ranks of a group that this process has: weights and KV must fit in the memory that is available and that a
    /// draft model, which takes `beside` bytes, leaves.
    ///
    /// # Errors
    /// If they do not, or wishes do not fit each other.
    pub fn cpu(
        source: &ModelSource,
        settings: &ModelSettings,
        group: Group,
        threads: usize,
        beside: u64,
    ) -> Result<Self> {
        if settings.kv_cache_dtype == Some(KvCacheDtype::Fp8) {
            bail!("kv_cache_dtype = fp8 is for GPUs (device = cuda); on the CPU leave it out");
        }
        if settings.fp8_activations == Some(true) {
            bail!(
                "fp8_activations is for Hopper and Blackwell GPUs (device = cuda); on the CPU leave it out"
            );
        }
        let kv_dtype = KvDType::of_cpu();
        let nodes = group.nodes() as u64;
        let backend = match group.world() {
            1 => Backend::Cpu(Box::new(Cpu::new(threads, kv_dtype))),
            _ => {
                let cpus = ranks_on(&group, threads, kv_dtype);
                Backend::Cpus(group, cpus)
            }
        };
        let weight_bytes = source.widened_bytes() / nodes;
        let available = machine::memory().available.saturating_sub(beside);
        if weight_bytes > available {
            bail!(
                "the weights take {}, but only {} of memory are available{}; choose a smaller model or quantisation",
                bytes(weight_bytes),
                bytes(available),
                if beside > 0 { " beside the draft model" } else { "" }
            );
        }
        let needs = KvNeeds {
            block_bytes: backend.kv_block_bytes(source) / nodes,
            context_length: source.config().context_length,
            available: available - weight_bytes,
            max_context: settings.max_context,
            kv_memory: settings.kv_memory.map(|b| b.0),
        };
        let plan = needs.plan()?;
        let kv = KvSize::Blocks(plan.blocks);
        Ok(Self { backend, kv, kv_format: named(kv_dtype), max_context: plan.max_context })
    }

    /// A GPU, or as many as a group has ranks in this process, from this one on: the KV cache gets what a largest step leaves of the
    /// memory.
    ///
    /// # Errors
    /// If a GPU cannot be used.
    pub fn gpu(source: &ModelSource, settings: &ModelSettings, group: Group, index: usize) -> Result<Self> {
        let (kv_dtype, kv_format) = match settings.kv_cache_dtype {
            Some(KvCacheDtype::Fp8) => (rudder_cuda::KvDType::Fp8, "fp8"),
            Some(KvCacheDtype::Auto) | None => (rudder_cuda::KvDType::Bf16, "bf16"),
        };
        let nodes = group.nodes() as u64;
        let backend = match group.world() {
            1 => Backend::Cuda(Box::new(gpu(source, index, kv_dtype, settings)?)),
            ranks => {
                let here = group.local().len();
                let cudas = gpus(source, &group, index, kv_dtype, settings).with_context(|| {
                    format!("tensor_parallel_size = {ranks} takes {here} GPUs of this machine, from cuda:{index} on")
                })?;
                Backend::Cudas(group, cudas)
            }
        };
        let kv = match settings.kv_memory {
            // Asked for on each node.
            Some(asked) => KvSize::Bytes(asked.0.saturating_mul(nodes)),
            None => KvSize::DeviceShare(settings.gpu_memory_utilization.unwrap_or(GPU_MEMORY_UTILIZATION)),
        };
        let max_context = settings.max_context.unwrap_or(source.config().context_length);
        Ok(Self { backend, kv, kv_format, max_context })
    }

    /// Where a draft model runs, whole: on the CPU, or the first GPU of the model that it drafts for. Ranks of that model
    /// sleep meanwhile.
    ///
    /// # Errors
    /// If the GPU cannot be used.
    pub fn of_draft(gpu: Option<usize>, threads: usize, options: LoadOptions) -> Result<Self> {
        let (backend, kv_format) = match gpu {
            Some(index) => (Backend::Cuda(Box::new(Cuda::new(index)?)), "bf16"),
            None => {
                let kv_dtype = KvDType::of_cpu();
                (Backend::Cpu(Box::new(Cpu::new(threads, kv_dtype))), named(kv_dtype))
            }
        };
        Ok(Self { backend, kv: options.kv, kv_format, max_context: options.max_context })
    }

    /// Bytes of a KV block of this model, on all ranks together.
    pub fn kv_block_bytes(&self, source: &ModelSource) -> u64 {
        self.backend.kv_block_bytes(source)
    }

    /// Loads the model here. `progress` is told the bytes of weights done and to do.
    ///
    /// # Errors
    /// See [`ModelSource::load`].
    pub fn load(
        self,
        source: &ModelSource,
        options: LoadOptions,
        progress: impl FnMut(u64, u64) + Send,
    ) -> Result<Loaded, LoadError> {
        match self.backend {
            Backend::Cpu(cpu) => source.load(*cpu, options, progress),
            Backend::Cpus(group, cpus) => source.load_ranks(group, cpus, options, progress),
            Backend::Cuda(cuda) => source.load(*cuda, options, progress),
            Backend::Cudas(group, cudas) => source.load_ranks(group, cudas, options, progress),
        }
    }

    /// Loads the ranks here of a model whose node 0 is another process.
    ///
    /// # Errors
    /// See [`ModelSource::load_node`].
    pub fn load_node(
        self,
        source: &ModelSource,
        options: LoadOptions,
        progress: impl FnMut(u64, u64) + Send,
    ) -> Result<Node, LoadError> {
        match self.backend {
            Backend::Cpus(group, cpus) => source.load_node(group, cpus, options, progress),
            Backend::Cudas(group, cudas) => source.load_node(group, cudas, options, progress),
            Backend::Cpu(_) | Backend::Cuda(_) => {
                Err(LoadError::Options("a model in one piece has no other nodes".into()))
            }
        }
    }
}

/// The ranks of a group, each on a GPU of its own.
fn gpus(
    source: &ModelSource,
    group: &Group,
    first: usize,
    kv_dtype: rudder_cuda::KvDType,
    settings: &ModelSettings,
) -> Result<Vec<Cuda>> {
    let members = group.members().into_iter().zip(first..);
    members.map(|(member, index)| Ok(gpu(source, index, kv_dtype, settings)?.in_group(member))).collect()
}

/// A GPU for the model or a rank of it.
fn gpu(
    source: &ModelSource,
    index: usize,
    kv_dtype: rudder_cuda::KvDType,
    settings: &ModelSettings,
) -> Result<Cuda> {
    let mut cuda = Cuda::new(index)?.with_kv_dtype(kv_dtype);
    if settings.fp8_activations == Some(true) {
        cuda.set_fp8_products(true).context("fp8_activations cannot be had; leave it out")?;
        if source.fp4_activations() && cuda.has_fp4_products() {
            cuda.set_fp4_products(true)?;
        }
    }
    Ok(cuda)
}

/// What people call the elements of a KV cache on the CPU.
fn named(kv_dtype: KvDType) -> &'static str {
    match kv_dtype {
        KvDType::F16 => "f16",
        KvDType::BF16 => "bf16",
        KvDType::F32 => "f32",
    }
}

/// The ranks of a group, which share `threads` threads.
fn ranks_on(group: &Group, threads: usize, kv_dtype: KvDType) -> Vec<Cpu> {
    let members = group.members().into_iter().zip(shares(threads, group.local().len()));
    members.map(|(member, threads)| Cpu::new(threads, kv_dtype).in_group(member)).collect()
}

/// Threads for each rank: as evenly as they divide, at least one. The first rank, which samples too, has no fewer than another.
fn shares(threads: usize, ranks: usize) -> impl Iterator<Item = usize> {
    (0..ranks).map(move |rank| (threads / ranks + usize::from(rank < threads % ranks)).max(1))
}

/// The longest sequence that `kv_blocks` hold: `max_context`, unless nobody asked for that.
///
/// # Errors
/// If it was asked for and does not fit.
pub fn fit(max_context: usize, asked: bool, kv_blocks: usize) -> Result<usize> {
    let holds = kv_blocks.saturating_mul(BLOCK_SIZE);
    if asked && holds < max_context {
        bail!(
            "the KV cache holds {holds} tokens, less than max_context = {max_context}; set max_context or \
             max_batch_tokens lower, or gpu_memory_utilization higher"
        );
    }
    Ok(max_context.min(holds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_share_the_threads_and_have_one_each() {
        assert_eq!(shares(8, 2).collect::<Vec<_>>(), [4, 4]);
        assert_eq!(shares(7, 3).collect::<Vec<_>>(), [3, 2, 2]);
        assert_eq!(shares(1, 2).collect::<Vec<_>>(), [1, 1]);
    }

    #[test]
    fn a_context_that_was_asked_for_is_held_or_refused_and_another_gives_way() {
        assert_eq!((fit(100, true, 7).unwrap(), fit(100, false, 7).unwrap()), (100, 100));
        assert_eq!(fit(100, false, 6).unwrap(), 96);
        assert!(fit(100, true, 6).unwrap_err().to_string().contains("holds 96 tokens"));
    }
}
