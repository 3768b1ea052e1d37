//! A device's memory and its queue of work: a GPU, or the CPU that emulates one.
//!
//! Work is queued on one stream and runs in the order of the calls.

use crate::cublaslt::CublasLt;
use crate::gpu::{Event, Gpu};
use crate::mapping::Mapping;
use crate::queue::{Graphs, Launch, Product, ProductShape, Queue, Work};
use rudder_ops::{OpError, Result};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Every kernel that is launched by name, with the dynamic shared memory that it may ask for.
pub(crate) const KERNELS: &[(&str, u32)] = &[
    ("embed", 0),
    ("rms_norm", 0),
    ("silu_mul", 0),
    ("gather", 0),
    ("pack_rows", 0),
    ("add_bias", 0),
    ("add_parts", 0),
    ("matmul_few_8", 0),
    ("matmul_few_16", 0),
    ("matmul_few_gated_8", 0),
    ("matmul_few_gated_16", 0),
    ("matmul_few_experts", 0),
    ("matmul_few_gated_experts", 0),
    ("matmul_tiles", MATMUL_TILES_SHARED),
    ("matmul_wgmma", MATMUL_WGMMA_SHARED),
    ("matmul_tcgen05", MATMUL_TCGEN05_SHARED),
    ("matmul_few_8_mxfp4", 0),
    ("matmul_few_16_mxfp4", 0),
    ("matmul_few_gated_8_mxfp4", 0),
    ("matmul_few_gated_16_mxfp4", 0),
    ("matmul_few_experts_mxfp4", 0),
    ("matmul_few_gated_experts_mxfp4", 0),
    ("matmul_tiles_mxfp4", MATMUL_TILES_SHARED),
    ("matmul_wgmma_mxfp4", MATMUL_WGMMA_SHARED),
    ("matmul_tcgen05_mxfp4", MATMUL_TCGEN05_SHARED),
    ("widen_mxfp4", 0),
    ("matmul_few_8_fp8", 0),
    ("matmul_few_16_fp8", 0),
    ("matmul_few_gated_8_fp8", 0),
    ("matmul_few_gated_16_fp8", 0),
    ("matmul_few_experts_fp8", 0),
    ("matmul_few_gated_experts_fp8", 0),
    ("matmul_tiles_fp8", MATMUL_TILES_SHARED),
    ("matmul_wgmma_fp8", MATMUL_WGMMA_SHARED),
    ("matmul_tcgen05_fp8", MATMUL_TCGEN05_SHARED),
    ("widen_fp8", 0),
    ("matmul_few_8_int4", 0),
    ("matmul_few_16_int4", 0),
    ("matmul_few_gated_8_int4", 0),
    ("matmul_few_gated_16_int4", 0),
    ("matmul_few_experts_int4", 0),
    ("matmul_few_gated_experts_int4", 0),
    ("matmul_tiles_int4", MATMUL_TILES_SHARED),
    ("matmul_wgmma_int4", MATMUL_WGMMA_SHARED),
    ("matmul_tcgen05_int4", MATMUL_TCGEN05_SHARED),
    ("widen_int4", 0),
    ("matmul_few_8_nvfp4", 0),
    ("matmul_few_16_nvfp4", 0),
    ("matmul_few_gated_8_nvfp4", 0),
    ("matmul_few_gated_16_nvfp4", 0),
    ("matmul_few_experts_nvfp4", 0),
    ("matmul_few_gated_experts_nvfp4", 0),
    ("matmul_tiles_nvfp4", MATMUL_TILES_SHARED),
    ("matmul_wgmma_nvfp4", MATMUL_WGMMA_SHARED),
    ("matmul_tcgen05_nvfp4", MATMUL_TCGEN05_SHARED),
    ("widen_nvfp4", 0),
    ("quantise_rows", 0),
    ("matmul_fp8_fp8", MATMUL_FP8_SHARED),
    ("matmul_fp8_tcgen05", MATMUL_FP8_TCGEN05_SHARED),
    ("quantise_rows_mx", 0),
    ("matmul_mxfp4_mxfp8", MATMUL_MXFP4_MXFP8_SHARED),
    ("quantise_rows_nvfp4", 0),
    ("matmul_nvfp4_nvfp4", MATMUL_NVFP4_NVFP4_SHARED),
    ("rope_and_cache", 0),
    ("attention_combine", 0),
    ("attention_any", 0),
    ("attention_decode_64", 0),
    ("attention_decode_96", 0),
    ("attention_decode_128", 0),
    ("attention_decode_256", 0),
    ("attention_shared_64", 0),
    ("attention_shared_96", 0),
    ("attention_shared_128", 0),
    ("attention_shared_256", 0),
    ("attention_prefill_64", attention_prefill_shared(64)),
    ("attention_prefill_96", attention_prefill_shared(96)),
    ("attention_prefill_128", attention_prefill_shared(128)),
    ("attention_prefill_256", attention_prefill_shared(256)),
    ("rope_and_cache_fp8", 0),
    ("attention_any_fp8", 0),
    ("attention_decode_64_fp8", 0),
    ("attention_decode_96_fp8", 0),
    ("attention_decode_128_fp8", 0),
    ("attention_decode_256_fp8", 0),
    ("attention_shared_64_fp8", 0),
    ("attention_shared_96_fp8", 0),
    ("attention_shared_128_fp8", 0),
    ("attention_shared_256_fp8", 0),
    ("attention_prefill_64_fp8", attention_prefill_shared(64)),
    ("attention_prefill_96_fp8", attention_prefill_shared(96)),
    ("attention_prefill_128_fp8", attention_prefill_shared(128)),
    ("attention_prefill_256_fp8", attention_prefill_shared(256)),
    ("attention_wgmma_64", attention_wgmma_shared(64)),
    ("attention_wgmma_96", attention_wgmma_shared(96)),
    ("attention_wgmma_128", attention_wgmma_shared(128)),
    ("attention_wgmma_256", attention_wgmma_shared(256)),
    ("attention_tcgen05_64", attention_tcgen05_shared(64)),
    ("attention_tcgen05_96", attention_tcgen05_shared(96)),
    ("attention_tcgen05_128", attention_tcgen05_shared(128)),
    ("attention_tcgen05_256", attention_tcgen05_shared(256)),
    ("attention_wgmma_64_fp8", attention_wgmma_shared(64)),
    ("attention_wgmma_96_fp8", attention_wgmma_shared(96)),
    ("attention_wgmma_128_fp8", attention_wgmma_shared(128)),
    ("attention_wgmma_256_fp8", attention_wgmma_shared(256)),
    ("attention_tcgen05_64_fp8", attention_tcgen05_shared(64)),
    ("attention_tcgen05_96_fp8", attention_tcgen05_shared(96)),
    ("attention_tcgen05_128_fp8", attention_tcgen05_shared(128)),
    ("attention_tcgen05_256_fp8", attention_tcgen05_shared(256)),
    ("moe_route", 0),
    ("moe_count", 0),
    ("moe_offsets", 0),
    ("moe_sort", 0),
    ("moe_combine", 0),
    ("sample", 0),
    ("all_reduce_once", 0),
    ("all_reduce_twice", 0),
    ("all_reduce_multicast", 0),
    ("all_reduce_norm", 0),
    ("all_reduce_norm_multicast", 0),
    ("gather_parts", 0),
    ("embed_from_first", 0),
];

/// Three stages of two tiles of 128 x 64 bf16.
pub(crate) const MATMUL_TILES_SHARED: u32 = 3 * 2 * 128 * 64 * 2;

/// Six stages of two tiles of 128 x 64 bf16, and room for them to begin on 1 KiB.
pub(crate) const MATMUL_WGMMA_SHARED: u32 = 6 * 2 * 128 * 64 * 2 + 1024;

/// Three stages of the same.
pub(crate) const MATMUL_TCGEN05_SHARED: u32 = 3 * 2 * 128 * 64 * 2 + 1024;

/// Four stages of two tiles of 128 x 128 FP8, and room for them to begin on 1 KiB.
pub(crate) const MATMUL_FP8_SHARED: u32 = 4 * 2 * 128 * 128 + 1024;

/// Three stages of the same.
pub(crate) const MATMUL_FP8_TCGEN05_SHARED: u32 = 3 * 2 * 128 * 128 + 1024;

/// The same, and two words of scales a row.
pub(crate) const MATMUL_MXFP4_MXFP8_SHARED: u32 = MATMUL_FP8_TCGEN05_SHARED + 3 * 2 * 128 * 4;

/// The same, and four.
pub(crate) const MATMUL_NVFP4_NVFP4_SHARED: u32 = MATMUL_FP8_TCGEN05_SHARED + 3 * 2 * 128 * 16;

/// Two stages of 64 keys and values, each row of bf16 padded by 16 bytes. Keys and values of FP8 take a little less: one such stage, and two of
/// FP8.
pub(crate) const fn attention_prefill_shared(head_dim: u32) -> u32 {
    2 * 2 * 64 * (head_dim + 8) * 2
}

/// 128 queries, two tiles of keys and two of values, of 128 tokens or, where heads are large, 64; and room for them to begin on 1 KiB.
pub(crate) const fn attention_wgmma_shared(head_dim: u32) -> u32 {
    let tokens = if head_dim > 128 { 64 } else { 128 };
    (128 + 4 * tokens) * head_dim * 2 + 1024
}

/// The same, and weights of 128 rows in bf16.
pub(crate) const fn attention_tcgen05_shared(head_dim: u32) -> u32 {
    let tokens = if head_dim > 128 { 64 } else { 128 };
    attention_wgmma_shared(head_dim) + 128 * tokens * 2
}

/// A device; clones are the same one.
#[derive(Clone)]
pub(crate) struct Device(Arc<Inner>);

struct Inner {
    kind: Kind,
    queue: Mutex<Queue>,
}

enum Kind {
    Gpu(Gpu),
    #[cfg(feature = "emulate")]
    Emulated {
        imex_channel: u32,
    },
}

/// Memory of a device, zeros at first; given back when dropped.
pub(crate) struct Buffer {
    device: Device,
    address: u64,
    bytes: usize,
    /// What it is part of, if it was not allocated for itself.
    mapping: Option<Mapping>,
}

/// Page-locked memory of the host: copies between it and the device run beside other work.
pub(crate) struct Staging {
    device: Device,
    at: *mut u8,
    bytes: usize,
    /// When its last copy is done.
    copied: Point,
}

/// Memory of a device for what changes from step to step, and the stage that it comes by; both grow to the largest and stay.
#[derive(Default)]
pub(crate) struct Inlet(Option<(Staging, Buffer)>);

/// A point in a device's queue of work. It has come where it was not recorded yet, and where work is done as it is queued.
pub(crate) struct Point {
    device: Device,
    event: Option<Event>,
}

// SAFETY: the memory belongs to this value alone, the event's calls bind the context.
unsafe impl Send for Staging {}

/// A kernel's argument: its bytes, from the lowest on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Arg(u64);

/// Where a kernel runs: blocks, and threads in a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Grid {
    pub blocks: [u32; 3],
    pub threads: u32,
}

impl Device {
    /// The GPU of this number.
    pub fn gpu(index: usize) -> Result<Self> {
        let gpu = Gpu::new(index)?;
        let cublaslt = match CublasLt::new(&gpu) {
            Ok(cublaslt) => Some(cublaslt),
            Err(reason) => {
                tracing::warn!("prompts will be slow, products of many rows run on a plain kernel: {reason}");
                None
            }
        };
        Ok(Self::new(Kind::Gpu(gpu), Queue { cublaslt, ..Queue::default() }))
    }

    /// The CPU in a GPU's place.
    #[cfg(feature = "emulate")]
    pub fn emulated() -> Self {
        Self::emulated_in(0)
    }

    /// The same in an IMEX channel: memory of other channels cannot be imported.
    #[cfg(feature = "emulate")]
    pub fn emulated_in(imex_channel: u32) -> Self {
        Self::new(Kind::Emulated { imex_channel }, Queue::default())
    }

    fn new(kind: Kind, queue: Queue) -> Self {
        Self(Arc::new(Inner { kind, queue: Mutex::new(queue) }))
    }

    fn kind(&self) -> &Kind {
        &self.0.kind
    }

    /// The GPU, where the device is one.
    pub fn on_gpu(&self) -> Option<&Gpu> {
        match self.kind() {
            Kind::Gpu(gpu) => Some(gpu),
            #[cfg(feature = "emulate")]
            Kind::Emulated { .. } => None,
        }
    }

    /// The GPU, for what only GPUs do.
    pub fn expect_gpu(&self) -> Result<&Gpu> {
        self.on_gpu().ok_or_else(|| OpError::Backend("the device is no GPU".to_owned()))
    }

    /// The IMEX channel, where no GPU is.
    #[cfg(feature = "emulate")]
    pub fn imex_channel(&self) -> Option<u32> {
        match self.kind() {
            Kind::Gpu(_) => None,
            Kind::Emulated { imex_channel } => Some(*imex_channel),
        }
    }

    /// The driver's number of it.
    pub fn ordinal(&self) -> i32 {
        self.on_gpu().map_or(0, Gpu::device)
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.0.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps launches from here on until something asks for what they do (see [`crate::queue`]).
    pub fn gather(&self) -> Result<()> {
        self.flush()?;
        self.queue().open = true;
        Ok(())
    }

    /// Runs the launches that were kept; from here on they run at once.
    pub fn flush(&self) -> Result<()> {
        let mut queue = self.queue();
        queue.open = false;
        if queue.pending.is_empty() {
            return Ok(());
        }
        match self.kind() {
            Kind::Gpu(gpu) => queue.run(gpu),
            #[cfg(feature = "emulate")]
            Kind::Emulated { .. } => queue.pending.drain(..).try_for_each(|work| emulate(&work)),
        }
    }

    /// Whether launches may run as graphs; they do unless told otherwise.
    pub fn set_graphs(&self, on: bool) -> Result<()> {
        self.flush()?;
        self.queue().without_graphs = !on;
        Ok(())
    }

    /// Whether kernels of steps of decodes may be brought up early; they may unless told otherwise.
    pub fn set_dependent_launches(&self, on: bool) -> Result<()> {
        self.synchronize()?;
        let mut queue = self.queue();
        queue.launches_plainly = !on;
        queue.graphs = Graphs::default();
        Ok(())
    }

    /// Sequences of launches that run as graphs.
    pub fn graphs(&self) -> usize {
        self.queue().graphs()
    }

    /// Allocates zeros.
    pub fn buffer(&self, bytes: usize) -> Result<Buffer> {
        let bytes = bytes.max(1);
        let address = match self.kind() {
            Kind::Gpu(gpu) => gpu.allocate(bytes)?,
            #[cfg(feature = "emulate")]
            Kind::Emulated { .. } => crate::emulated::allocate(bytes)?,
        };
        Ok(Buffer { device: self.clone(), address, bytes, mapping: None })
    }

    /// The first `bytes` of mapped memory, of any content.
    pub fn mapped(&self, mapping: Mapping, bytes: usize) -> Buffer {
        Buffer { device: self.clone(), address: mapping.address(), bytes, mapping: Some(mapping) }
    }

    /// Queues a kernel. `args` must be what the kernel's source asks for, in its order.
    pub fn launch(&self, kernel: &'static str, grid: Grid, shared: u32, args: &[Arg]) -> Result<()> {
        // A grid without blocks is an error to the driver, and nothing to do.
        if grid.blocks.contains(&0) {
            return Ok(());
        }
        self.submit(Work::Kernel(Launch::new(kernel, grid, shared, args)))
    }

    /// Whether cuBLASLt is there and knows a way to do such a product; emulated, one of many rows.
    pub fn can_multiply(&self, shape: ProductShape) -> bool {
        match self.kind() {
            Kind::Gpu(_) => self.queue().cublaslt.as_mut().is_some_and(|cublaslt| cublaslt.can(shape)),
            #[cfg(feature = "emulate")]
            Kind::Emulated { .. } => shape.rows >= crate::emulated::PRODUCT_ROWS,
        }
    }

    /// Queues a product that [`Device::can_multiply`].
    pub fn multiply(&self, product: Product) -> Result<()> {
        self.submit(Work::Product(product))
    }

    fn submit(&self, work: Work) -> Result<()> {
        let mut queue = self.queue();
        if queue.open {
            queue.pending.push(work);
            return Ok(());
        }
        match self.kind() {
            Kind::Gpu(gpu) => queue.run_one(gpu, &work),
            #[cfg(feature = "emulate")]
            Kind::Emulated { .. } => emulate(&work),
        }
    }

    /// Bytes of memory that are free, and all; emulated, those of a small GPU whatever was allocated.
    pub fn memory(&self) -> Result<(u64, u64)> {
        match self.kind() {
            Kind::Gpu(gpu) => gpu.memory().map(|(free, total)| (free as u64, total as u64)),
            #[cfg(feature = "emulate")]
            Kind::Emulated { .. } => Ok((1 << 20, 2 << 20)),
        }
    }

    /// Its multiprocessors; emulated, so few that tests see more and fewer blocks than that.
    pub fn multiprocessors(&self) -> usize {
        match self.kind() {
            Kind::Gpu(gpu) => gpu.multiprocessors(),
            #[cfg(feature = "emulate")]
            Kind::Emulated { .. } => 6,
        }
    }

    /// Whether it has Hopper's products of warpgroups, which nothing before or after it has.
    pub fn has_wgmma(&self) -> bool {
        match self.kind() {
            Kind::Gpu(gpu) => gpu.compute_capability() == (9, 0),
            #[cfg(feature = "emulate")]
            Kind::Emulated { .. } => true,
        }
    }

    /// Whether it has the tensor cores of Blackwell that have a memory of their own.
    pub fn has_tcgen05(&self) -> bool {
        match self.kind() {
            Kind::Gpu(gpu) => matches!(gpu.compute_capability(), (10, 0 | 3)),
            #[cfg(feature = "emulate")]
            Kind::Emulated { .. } => true,
        }
    }

    /// What tells this device from the others of the process.
    pub fn id(&self) -> u64 {
        match self.kind() {
            Kind::Gpu(gpu) => gpu.id(),
            #[cfg(feature = "emulate")]
            Kind::Emulated { .. } => Arc::as_ptr(&self.0).addr() as u64,
        }
    }

    /// What tells this device from all others, of other processes and machines too.
    pub fn uuid(&self) -> u64 {
        match self.kind() {
            Kind::Gpu(gpu) => gpu.uuid(),
            #[cfg(feature = "emulate")]
            Kind::Emulated { .. } => self.id() ^ u64::from(std::process::id()) << 48,
        }
    }

    /// Lets kernels here use the memory of the device of this id; false if the machine does not connect the two so.
    pub fn reach(&self, id: u64) -> Result<bool> {
        match self.kind() {
            Kind::Gpu(gpu) => gpu.reach(id),
            #[cfg(feature = "emulate")]
            Kind::Emulated { .. } => Ok(true),
        }
    }

    /// Runs the launches that were kept, and says whether all that was queued is done.
    pub fn is_idle(&self) -> Result<bool> {
        self.flush()?;
        self.on_gpu().map_or(Ok(true), Gpu::is_idle)
    }

    /// Waits until all that was queued is done.
    pub fn synchronize(&self) -> Result<()> {
        self.flush()?;
        match self.kind() {
            Kind::Gpu(gpu) => gpu.synchronize(),
            #[cfg(feature = "emulate")]
            Kind::Emulated { .. } => Ok(()),
        }
    }
}

#[cfg(feature = "emulate")]
fn emulate(work: &Work) -> Result<()> {
    match work {
        Work::Kernel(launch) => {
            crate::emulated::launch(launch.kernel, launch.grid, launch.shared, launch.args())
        }
        Work::Product(product) => {
            crate::emulated::multiply(product);
            Ok(())
        }
    }
}

impl Buffer {
    pub fn device(&self) -> &Device {
        &self.device
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn address(&self) -> u64 {
        self.address
    }

    fn check(&self, offset: usize, len: usize) -> Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.bytes => Ok(()),
            _ => {
                let all = self.bytes;
                Err(OpError::Backend(format!("{len} bytes at {offset} lie outside a buffer of {all}")))
            }
        }
    }

    /// Copies `data` to `offset` when all that was queued before is done.
    pub fn write(&self, offset: usize, data: &[u8]) -> Result<()> {
        self.queue_write(offset, data)?;
        self.device.synchronize()
    }

    /// Queues a copy of `data` to `offset`, which may read `data` until it is done.
    fn queue_write(&self, offset: usize, data: &[u8]) -> Result<()> {
        self.check(offset, data.len())?;
        self.device.flush()?;
        match self.device.kind() {
            Kind::Gpu(gpu) => gpu.write(self.address + offset as u64, data),
            #[cfg(feature = "emulate")]
            Kind::Emulated { .. } => {
                crate::emulated::write(self.address + offset as u64, data);
                Ok(())
            }
        }
    }

    /// Copies what lies at `offset` when all that was queued before is done.
    pub fn read(&self, offset: usize, data: &mut [u8]) -> Result<()> {
        self.check(offset, data.len())?;
        self.device.flush()?;
        match self.device.kind() {
            Kind::Gpu(gpu) => gpu.read(self.address + offset as u64, data),
            #[cfg(feature = "emulate")]
            Kind::Emulated { .. } => {
                crate::emulated::read(self.address + offset as u64, data);
                Ok(())
            }
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // What is mapped is given back with its mapping, once nothing uses it.
        let mapped = self.mapping.is_some();
        if let Err(e) = if mapped { self.device.synchronize() } else { self.device.flush() } {
            tracing::warn!("{e}");
        }
        match self.device.kind() {
            _ if mapped => {}
            Kind::Gpu(gpu) => gpu.free(self.address),
            #[cfg(feature = "emulate")]
            Kind::Emulated { .. } => crate::emulated::free(self.address, self.bytes),
        }
    }
}

impl Staging {
    /// Allocates a stage.
    pub fn new(device: &Device, bytes: usize) -> Result<Self> {
        let copied = Point::new(device)?;
        let at = match device.kind() {
            Kind::Gpu(gpu) => gpu.allocate_host(bytes)?,
            #[cfg(feature = "emulate")]
            Kind::Emulated { .. } => Box::into_raw(vec![0u8; bytes].into_boxed_slice()).cast(),
        };
        Ok(Self { device: device.clone(), at, bytes, copied })
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where it lies, for the host and for every device.
    pub fn address(&self) -> u64 {
        self.at.expose_provenance() as u64
    }

    /// Makes the first word 1 while kernels look at it.
    pub fn raise(&self) {
        assert!(self.bytes >= 4 && self.at.addr().is_multiple_of(4), "a stage with a word");
        // SAFETY: a word of this value's memory, which kernels and the host only access whole while kernels run.
        unsafe { AtomicU32::from_ptr(self.at.cast()) }.store(1, Ordering::Release);
    }

    /// Whether [`Staging::memory`] has nothing to wait for.
    pub fn has_come(&self) -> Result<bool> {
        self.copied.has_come()
    }

    /// Its memory, once what was sent last has left it, and what was fetched last has come.
    pub fn memory(&mut self) -> Result<&mut [u8]> {
        self.copied.wait()?;
        // SAFETY: `bytes` initialised bytes that belong to this value; no copy of them is under way.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.at, self.bytes) })
    }

    /// `len` of its bytes from `at` on, for a copy or before one: to be looked at by nobody before that is done (`memory` waits).
    fn part(&mut self, at: usize, len: usize) -> &mut [u8] {
        let fits = at.checked_add(len).is_some_and(|end| end <= self.bytes);
        assert!(fits, "a stage of {} bytes holds no {len} at {at}", self.bytes);
        // SAFETY: within the stage's own memory, which lives until its copies are done.
        unsafe { std::slice::from_raw_parts_mut(self.at.add(at), len) }
    }

    /// Queues the copy of the first `len` bytes to `offset` of `to`.
    pub fn send(&mut self, len: usize, to: &Buffer, offset: usize) -> Result<()> {
        to.queue_write(offset, self.part(0, len))?;
        self.copied.record()
    }

    /// Takes over bytes to `at`, where no copy is under way, and queues copies of `len` of them each, one behind the other, to a buffer from an
    /// offset on.
    pub fn send_pieces<'a>(
        &mut self,
        at: usize,
        bytes: &[u8],
        pieces: impl Iterator<Item = (&'a Buffer, usize)>,
        len: usize,
    ) -> Result<()> {
        self.part(at, bytes.len()).copy_from_slice(bytes);
        for ((to, offset), at) in pieces.zip((at..at + bytes.len()).step_by(len)) {
            to.queue_write(offset, self.part(at, len))?;
        }
        self.copied.record()
    }

    /// Queues the copy of `len` bytes at the beginning of `from` to its own; [`Staging::memory`] waits for them.
    pub fn fetch(&mut self, from: &Buffer, len: usize) -> Result<()> {
        from.check(0, len)?;
        from.device.flush()?;
        match from.device.kind() {
            Kind::Gpu(gpu) => gpu.fetch(from.address, self.part(0, len))?,
            #[cfg(feature = "emulate")]
            Kind::Emulated { .. } => crate::emulated::read(from.address, self.part(0, len)),
        }
        self.copied.record()
    }

    /// Queues copies beside the work, which wait for nothing of it but what lies before a point: `len` bytes each, of a buffer from an offset on, one
    /// behind the other to its own beginning. [`Staging::memory`] waits for them.
    pub fn fetch_beside<'a>(
        &mut self,
        after: &Point,
        pieces: impl Iterator<Item = (&'a Buffer, usize)>,
        len: usize,
    ) -> Result<()> {
        after.on_gpu().map_or(Ok(()), |(gpu, event)| gpu.wait_beside(event))?;
        for ((from, offset), at) in pieces.zip((0..).step_by(len)) {
            from.check(offset, len)?;
            let address = from.address + offset as u64;
            match from.device.kind() {
                Kind::Gpu(gpu) => gpu.fetch_beside(address, self.part(at, len))?,
                #[cfg(feature = "emulate")]
                Kind::Emulated { .. } => crate::emulated::read(address, self.part(at, len)),
            }
        }
        self.copied.on_gpu().map_or(Ok(()), |(gpu, event)| gpu.record_beside(event))
    }
}

impl Point {
    pub fn new(device: &Device) -> Result<Self> {
        let event = device.on_gpu().map(Gpu::event).transpose()?;
        Ok(Self { device: device.clone(), event })
    }

    /// The GPU and its event, where there is one.
    fn on_gpu(&self) -> Option<(&Gpu, &Event)> {
        self.device.on_gpu().zip(self.event.as_ref())
    }

    /// Puts it behind all that is queued.
    pub fn record(&self) -> Result<()> {
        self.device.flush()?;
        self.on_gpu().map_or(Ok(()), |(gpu, event)| gpu.record(event))
    }

    pub fn has_come(&self) -> Result<bool> {
        self.on_gpu().map_or(Ok(true), |(gpu, event)| gpu.has_come(event))
    }

    fn wait(&self) -> Result<()> {
        self.on_gpu().map_or(Ok(()), |(gpu, event)| gpu.wait(event))
    }
}

impl Inlet {
    /// Queues the copy of `data` to the device.
    pub fn send(&mut self, device: &Device, data: &[u8]) -> Result<&Buffer> {
        if self.0.as_ref().is_none_or(|(_, buffer)| buffer.bytes() < data.len()) {
            let room = data.len().next_power_of_two().max(1 << 16);
            self.0 = None; // first give back, then take
            self.0 = Some((Staging::new(device, room)?, device.buffer(room)?));
        }
        let (staging, buffer) = self.0.as_mut().expect("allocated above");
        staging.memory()?[..data.len()].copy_from_slice(data);
        staging.send(data.len(), buffer, 0)?;
        Ok(buffer)
    }

    /// Where it comes to, once something was sent.
    pub fn buffer(&self) -> Option<&Buffer> {
        self.0.as_ref().map(|(_, buffer)| buffer)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        match self.device.kind() {
            Kind::Gpu(gpu) => gpu.free_host(self.at),
            #[cfg(feature = "emulate")]
            Kind::Emulated { .. } => {
                // SAFETY: the boxed slice that `new` made.
                drop(unsafe { Box::from_raw(std::ptr::slice_from_raw_parts_mut(self.at, self.bytes)) })
            }
        }
    }
}

impl Grid {
    /// `blocks` blocks in a row.
    pub fn new(blocks: usize, threads: u32) -> Self {
        Self::of([blocks, 1, 1], threads)
    }

    pub fn of(blocks: [usize; 3], threads: u32) -> Self {
        Self { blocks: blocks.map(|n| u32::try_from(n).unwrap_or(u32::MAX)), threads }
    }

    /// A thread an element, 256 to a block.
    pub fn elements(n: usize) -> Self {
        Self::new(n.div_ceil(256), 256)
    }
}

impl Arg {
    /// The pointer that a kernel takes for "not given".
    pub const NULL: Arg = Arg(0);

    /// `offset` bytes into a buffer.
    pub fn at(buffer: &Buffer, offset: usize) -> Self {
        Self(buffer.address + offset as u64)
    }

    /// A pointer `bytes` further on.
    pub fn after(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }

    /// The argument's bytes as a number: of a pointer, its address.
    pub(crate) fn value(self) -> u64 {
        self.0
    }

    pub(crate) fn bits(&self) -> *mut std::ffi::c_void {
        std::ptr::from_ref(&self.0).cast_mut().cast()
    }
}

impl From<&Buffer> for Arg {
    fn from(buffer: &Buffer) -> Self {
        Self(buffer.address)
    }
}

/// A size or count: the kernels' `int` and `long long` both read it from the lower bytes.
impl From<usize> for Arg {
    fn from(n: usize) -> Self {
        Self(n as u64)
    }
}

impl From<bool> for Arg {
    fn from(holds: bool) -> Self {
        Self(u64::from(holds))
    }
}

impl From<f32> for Arg {
    fn from(x: f32) -> Self {
        Self(u64::from(x.to_bits()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_memory_fits_a_multiprocessor_of_hopper() {
        assert!(KERNELS.iter().all(|(_, shared)| *shared <= 227 * 1024));
    }

    #[test]
    fn arguments_lie_in_their_lowest_bytes() {
        let arg = Arg::from(1.5f32);
        // SAFETY: reads the first four of eight bytes.
        assert_eq!(unsafe { *arg.bits().cast::<f32>() }, 1.5);
        let arg = Arg::from(7usize);
        // SAFETY: as above.
        assert_eq!(unsafe { *arg.bits().cast::<i32>() }, 7);
    }

    #[cfg(feature = "emulate")]
    #[test]
    fn every_kernel_that_is_launched_exists() {
        for (name, _) in KERNELS {
            assert!(crate::emulated::exists(name), "{name}");
        }
    }

    #[cfg(feature = "emulate")]
    #[test]
    fn buffers_are_zero_and_refuse_what_lies_outside() -> Result<()> {
        let buffer = Device::emulated().buffer(5000)?;
        let mut data = vec![1; 5000];
        buffer.read(0, &mut data)?;
        assert!(data.iter().all(|&b| b == 0));
        buffer.write(4990, &[7; 10])?;
        assert!(buffer.write(4991, &[7; 10]).is_err() && buffer.read(usize::MAX, &mut data).is_err());
        buffer.read(0, &mut data)?;
        assert_eq!((data[4989], data[4999]), (0, 7));
        Ok(())
    }
}
