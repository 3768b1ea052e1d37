//! From settings to a running engine: resolve the model's name, fetch, open, load, start.
//! `serve`, `chat` and `bench throughput` all begin here.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rudder_comm::Group;
use rudder_engine::{DiskTier, Engine, EngineConfig, TierConfig};
use rudder_hub::{ModelRef, Progress, default_root};
use rudder_model::{LoadOptions, Model, ModelSource};
use rudder_ops::{BLOCK_SIZE, DType};
use rudder_text::Text;

use crate::device::Choice;
use crate::draft_model::{DraftSource, DraftSummary};
use crate::place::{Place, fit};
use crate::settings::{Draft, LoadFormat, ModelSettings, Quantization};
use crate::{device, machine, models, nodes, text_source};

/// A model that runs.
pub struct Launched<T = Text> {
    /// Its step loop.
    pub engine: Engine,
    /// Its tokenizer and chat template.
    pub text: T,
    /// What to call it.
    pub name: String,
    /// The ranks that share it.
    pub group: Group,
    /// Facts for the startup summary.
    pub summary: Summary,
}

/// What was loaded and what it takes.
#[derive(Debug)]
pub struct Summary {
    /// Architecture, as `qwen2`.
    pub architecture: String,
    /// Storage formats of the weights, most bytes first.
    pub formats: String,
    /// Licence of the weights, where the catalog states it.
    pub licence: Option<&'static str>,
    /// Bytes of the weights.
    pub weight_bytes: u64,
    /// Bytes of the KV cache.
    pub kv_bytes: u64,
    /// What its elements are, as `f16`.
    pub kv_format: &'static str,
    /// Tokens that the KV cache holds.
    pub kv_tokens: usize,
    /// Most bytes of KV on disk, and tokens found there, if there is such a tier.
    pub kv_disk: Option<(u64, usize)>,
    /// Longest sequence in tokens.
    pub max_context: usize,
    /// Longest sequence that the model could do.
    pub context_length: usize,
    /// The draft model, if there is one.
    pub draft: Option<DraftSummary>,
    /// What the model runs on, and why.
    pub device: String,
    /// Worker threads.
    pub threads: usize,
    /// Ranks that share the model, and the nodes that they are on.
    pub ranks: usize,
    /// See `ranks`.
    pub nodes: usize,
    /// Time from the start of loading to a running engine.
    pub took: Duration,
}

/// Where several GPUs share a model, has their libraries load all kernels before any runs, unless the user says otherwise: a kernel that is
/// loaded when it is first used may have to wait for those that run, and these wait for other GPUs. CUDA reads the variable when it begins;
/// to be called while the process has one thread, else it does nothing.
pub fn load_kernels_first(settings: &ModelSettings) {
    const VARIABLE: &str = "CUDA_MODULE_LOADING";
    let alone = || std::fs::read_dir("/proc/self/task").is_ok_and(|threads| threads.count() == 1);
    let shared = settings.tensor_parallel_size.is_some_and(|ranks| ranks > 1);
    if !shared || std::env::var_os(VARIABLE).is_some() {
        return;
    }
    match alone() {
        true => {
            // SAFETY: no other thread is there that could look at variables.
            unsafe { std::env::set_var(VARIABLE, "EAGER") };
            tracing::debug!("{VARIABLE} is EAGER");
        }
        false => tracing::debug!(
            "{VARIABLE}=EAGER, set by whoever starts this, would have GPUs wait less for each other"
        ),
    }
}

/// Brings the model up. Downloads it first if it is a catalog or hub model not yet in the cache.
///
/// # Errors
/// If the model cannot be found, fetched, read or held in memory; each says what to do.
pub fn launch(settings: &ModelSettings) -> Result<Launched> {
    if settings.load_format == Some(LoadFormat::Dummy) {
        bail!("random weights have no tokenizer; only `rudder bench throughput` runs them");
    }
    let device = device::choose(settings.device.unwrap_or_default())?;
    let (reference, path, source) = open(settings)?;
    let draft = DraftSource::open(settings)?;
    let licence = match &reference {
        ModelRef::Catalog(entry) => Some(&*entry.licence),
        _ => None,
    };
    let opened = Opened { formats: formats(&source, &path), source, name: name(&reference), licence };
    bring_up(settings, device, opened, draft.as_ref(), |source| {
        let text = text(source, &path)?;
        draft.as_ref().map_or(Ok(()), |draft| draft.check(&text))?;
        Ok(text)
    })
}

/// Brings up random weights in a model's shape, without a tokenizer.
///
/// # Errors
/// If there is no such shape, or it cannot be held in memory.
pub fn launch_dummy(settings: &ModelSettings) -> Result<Launched<()>> {
    let device = device::choose(settings.device.unwrap_or_default())?;
    let name = settings.model.clone().context("random weights in which model's shape? set --model")?;
    if settings.draft_model.is_some() {
        bail!("what random weights say cannot be guessed; leave draft_model out");
    }
    let source = ModelSource::dummy(&name)?;
    let opened = Opened { source, name, licence: None, formats: "random BF16".to_owned() };
    bring_up(settings, device, opened, None, |_| Ok(()))
}

/// A model that was found, and what to say of it.
struct Opened {
    source: ModelSource,
    name: String,
    licence: Option<&'static str>,
    formats: String,
}

/// Loads a model and its draft model, and starts their engine, `text` beside it.
fn bring_up<T: Send>(
    settings: &ModelSettings,
    device: Choice,
    opened: Opened,
    draft: Option<&DraftSource>,
    text: impl FnOnce(&ModelSource) -> Result<T> + Send,
) -> Result<Launched<T>> {
    if settings.node_rank.is_some_and(|node| node > 0) {
        bail!("node 0 alone answers; start the others with `rudder serve`");
    }
    if settings.nnodes.is_some_and(|nodes| nodes > 1) && settings.kv_disk.is_some_and(|size| size.0 > 0) {
        bail!("KV is not kept on disk where nodes share a model; leave kv_disk out");
    }
    let Opened { source, name, licence, formats } = opened;
    let group = nodes::join(settings, &source, device.gpu.is_some())?;
    let began = Instant::now();
    let source = quantised(source, settings, &device)?;
    let threads = settings.threads.unwrap_or_else(machine::default_threads);
    let config = source.config().clone();
    let limits = Limits::of(settings, device.gpu.is_some())?;
    let gpu = device.gpu.as_ref().map(|gpu| gpu.index);
    let longest = settings.max_context.unwrap_or(config.context_length);
    let planned = draft.map(|draft| draft.plan(gpu, threads, limits.sequences, longest)).transpose()?;
    let place = match gpu {
        Some(index) => Place::gpu(&source, settings, group.clone(), index)?,
        None => {
            let beside = planned.as_ref().map_or(0, |plan| plan.bytes());
            Place::cpu(&source, settings, group.clone(), threads, beside)?
        }
    };
    // First, so that on a GPU the model's KV cache gets what is then left.
    let drafting = planned.map(|plan| plan.load(place.max_context)).transpose()?;
    let (drafting, draft_summary) = drafting.unzip();
    let (weight_bytes, kv_format) = (source.weight_bytes(), place.kv_format);
    let draft = settings.draft.unwrap_or(Draft::Lookup).mode();
    let options = LoadOptions {
        max_batch_tokens: limits.batch_tokens,
        // The scheduler asks for at most one row of logits a running sequence, drafts aside.
        max_outputs: limits.sequences + draft.max_drafted(),
        kv: place.kv,
        max_context: place.max_context,
    };
    let mut progress = Progress::new("loading", weight_bytes);
    // The tokenizer takes a thread as long as the weights take it: build both at the same time.
    let (text, loaded) = std::thread::scope(|scope| {
        let text = scope.spawn(|| text(&source));
        let loaded = place.load(&source, options, |done, _| progress.set(done));
        (text.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), loaded)
    });
    drop(progress);
    let (text, loaded) = (text?, loaded?);
    let max_context = fit(options.max_context, settings.max_context.is_some(), loaded.kv_blocks)?;

    let tier = tier(settings, &*loaded.model)?;
    let kv_disk = tier.as_ref().map(|tier| (tier.capacity(), tier.tokens()));
    let engine = Engine::start_drafting(
        loaded.model,
        EngineConfig {
            kv_blocks: loaded.kv_blocks,
            max_context,
            max_sequences: limits.sequences,
            max_batch_tokens: limits.batch_tokens,
            decode_latency_target: Duration::from_millis(settings.decode_latency_target.unwrap_or(100)),
            max_waiting: settings.max_waiting.unwrap_or(256),
            prefix_cache: settings.prefix_cache.unwrap_or(true),
            draft,
        },
        tier,
        drafting,
    );
    let summary = Summary {
        architecture: config.architecture,
        formats,
        licence,
        weight_bytes: loaded.weight_bytes,
        kv_bytes: loaded.kv_bytes,
        kv_format,
        kv_tokens: loaded.kv_blocks * BLOCK_SIZE,
        kv_disk,
        draft: draft_summary,
        max_context: engine.max_context(),
        context_length: config.context_length,
        device: device.reason,
        threads,
        ranks: group.world(),
        nodes: group.nodes(),
        took: began.elapsed(),
    };
    Ok(Launched { engine, text, name, group, summary })
}

/// Runs what node 0 tells this node to, until that ends; `begin` is called once all is loaded.
///
/// # Errors
/// If the model cannot be found, fetched, read or held in memory, the nodes do not come together, or node 0 is gone.
pub fn follow(settings: &ModelSettings, begin: impl FnOnce()) -> Result<()> {
    let device = device::choose(settings.device.unwrap_or_default())?;
    let source = match settings.load_format {
        Some(LoadFormat::Dummy) => ModelSource::dummy(models::asked(settings))?,
        _ => open(settings)?.2,
    };
    let group = nodes::join(settings, &source, device.gpu.is_some())?;
    let source = quantised(source, settings, &device)?;
    let threads = settings.threads.unwrap_or_else(machine::default_threads);
    let limits = Limits::of(settings, device.gpu.is_some())?;
    let place = match device.gpu.as_ref().map(|gpu| gpu.index) {
        Some(index) => Place::gpu(&source, settings, group.clone(), index),
        None => Place::cpu(&source, settings, group.clone(), threads, 0),
    };
    // Node 0 waits for what this one has to say.
    let place = place.inspect_err(|error| group.withdraw(error.to_string()))?;
    let options = LoadOptions {
        max_batch_tokens: limits.batch_tokens,
        max_outputs: limits.sequences,
        kv: place.kv,
        max_context: place.max_context,
    };
    let mut progress = Progress::new("loading", source.weight_bytes());
    let node = place.load_node(&source, options, |done, _| progress.set(done))?;
    drop(progress);
    let (ranks, nodes) = (group.local(), group.nodes());
    println!("node      {} of {nodes}, with ranks {} to {}", group.node(), ranks.start, ranks.end - 1);
    println!("device    {}", device.reason);
    println!("kv cache  {} tokens", node.kv_blocks * BLOCK_SIZE);
    println!("ready     node 0 begins the steps");
    begin();
    node.run().context("start all nodes again")?;
    println!("node 0 has ended");
    Ok(())
}

/// The model asked for, where it lies, and what lies there. Downloads it first if need be.
fn open(settings: &ModelSettings) -> Result<(ModelRef, PathBuf, ModelSource)> {
    let reference = ModelRef::parse(models::asked(settings))?;
    let path = models::cache(settings.cache.clone()).pull(&reference, &models::sources())?;
    let source = ModelSource::open(&path)?;
    Ok((reference, path, source))
}

/// The weights as asked for.
fn quantised(source: ModelSource, settings: &ModelSettings, device: &Choice) -> Result<ModelSource> {
    match settings.quantization {
        Some(Quantization::Fp8) if device.gpu.is_none() => {
            bail!(
                "quantization = fp8 is for GPUs (device = cuda); on the CPU a GGUF with Q4_K or Q8_0 does as much"
            );
        }
        Some(Quantization::Fp8) => Ok(source.with_fp8()),
        None => Ok(source),
    }
}

/// The tier on disk, if one is asked for.
fn tier(settings: &ModelSettings, model: &dyn Model) -> Result<Option<DiskTier>> {
    let Some(capacity) = settings.kv_disk.map(|size| size.0).filter(|&capacity| capacity > 0) else {
        return Ok(None);
    };
    if settings.prefix_cache == Some(false) {
        bail!("kv_disk keeps what the prefix cache finds; leave prefix_cache on, or kv_disk out");
    }
    let folder = settings.kv_dir.clone().unwrap_or_else(|| default_root().with_file_name("kv"));
    let tier = DiskTier::open(&TierConfig { folder: folder.clone(), capacity }, model);
    tier.map(Some).with_context(|| format!("cannot keep KV in {} (kv_dir)", folder.display()))
}

/// How much a step may hold.
struct Limits {
    sequences: usize,
    batch_tokens: usize,
}

impl Limits {
    fn of(settings: &ModelSettings, gpu: bool) -> Result<Self> {
        let (sequences, tokens) = if gpu { (256, 4096) } else { (64, 512) };
        let sequences = settings.max_sequences.unwrap_or(sequences);
        // Prompts are read beside as many answers as there may be.
        let batch_tokens = settings.max_batch_tokens.unwrap_or(tokens.max(sequences + tokens / 2));
        if batch_tokens < sequences {
            bail!(
                "max_batch_tokens is {batch_tokens}, less than max_sequences ({sequences}); \
                 a step computes at least one token of every running sequence"
            );
        }
        Ok(Self { sequences, batch_tokens })
    }
}

/// The tokenizer and chat template of a model.
///
/// # Errors
/// If its files say nothing of them, or nothing that makes sense.
pub fn text(source: &ModelSource, path: &Path) -> Result<Text> {
    let text = match source.gguf() {
        Some(gguf) => Text::from_gguf(text_source::from_gguf(gguf)),
        None => Text::from_folder(path),
    };
    text.with_context(|| format!("cannot read the tokenizer of {}", path.display()))
}

/// The storage formats of the weights, most bytes first: `Q4_K, Q6_K`.
pub fn formats(source: &ModelSource, path: &Path) -> String {
    let Some(gguf) = source.gguf() else { return folder_format(path) };
    let mut sizes: Vec<(DType, usize)> = Vec::new();
    for tensor in gguf.tensor_names().filter_map(|name| gguf.tensor(name).ok()) {
        let (dtype, bytes) = (tensor.dtype, tensor.bytes().len());
        match sizes.iter_mut().find(|(d, _)| *d == dtype) {
            Some((_, sum)) => *sum += bytes,
            None => sizes.push((dtype, bytes)),
        }
    }
    sizes.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    // Norms and biases are too small to name.
    let total: usize = sizes.iter().map(|(_, bytes)| bytes).sum();
    let named = sizes.iter().filter(|(_, bytes)| bytes * 100 >= total);
    named.map(|(dtype, _)| format!("{dtype:?}")).collect::<Vec<_>>().join(", ")
}

/// What config.json says that the weights are stored in.
fn folder_format(folder: &Path) -> String {
    let config = std::fs::read(folder.join("config.json")).ok();
    let config: Option<serde_json::Value> = config.and_then(|json| serde_json::from_slice(&json).ok());
    let dtype = config.as_ref().and_then(|c| c.get("dtype").or_else(|| c.get("torch_dtype"))?.as_str());
    dtype.unwrap_or("safetensors").to_owned()
}

/// What clients call the model: the catalog's name, the hub's, or the file's without its ending.
pub fn name(reference: &ModelRef) -> String {
    let of_path =
        |name: Option<&std::ffi::OsStr>| name.unwrap_or("model".as_ref()).to_string_lossy().into_owned();
    match reference {
        ModelRef::Catalog(entry) => entry.name.clone(),
        ModelRef::Hub(id) => id.repo.clone(),
        ModelRef::File(path) => of_path(path.file_stem()),
        // "." and a trailing slash have no name of their own.
        ModelRef::Folder(path) => of_path(path.canonicalize().as_deref().unwrap_or(path).file_name()),
    }
}
